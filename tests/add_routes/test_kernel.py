"""add_routes.py as a process, on the kernel of a host with two ENIs and nobody behind them."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lab.kernel import SCRIPT, Kernel
from lab.vpc import OUTER_LIMIT
from strategies import DEVICES, addresses_of

NO_PREFIX_ROUTE = """
ip addr del 10.0.1.22/24 dev eth1
ip addr add 10.0.1.22/24 dev eth1 noprefixroute
"""


def test_each_source_address_leaves_by_its_own_device(kernel: Kernel) -> None:
    assert kernel.device_to("198.51.100.1", "10.0.1.22") == "eth0"  # the problem
    kernel.serve("-d eth0", "-d eth1")
    for destination in ("198.51.100.1", "10.0.1.77", "10.0.1.1"):
        assert kernel.device_to(destination, "10.0.1.5") == "eth0"
        assert kernel.device_to(destination, "10.0.1.22") == "eth1"
    for destination in ("2001:db8:9::1", "2001:db8:1::77"):
        assert kernel.device_to(destination, "2001:db8:1::5") == "eth0"
        assert kernel.device_to(destination, "2001:db8:1::22") == "eth1"
    assert kernel.device_to("198.51.100.1") == "eth0"
    assert kernel.device_to("2001:db8:9::1") == "eth0"
    assert kernel.table(101) == [
        "default via 10.0.1.1 dev eth1",
        "10.0.1.0/24 dev eth1 scope 253 src 10.0.1.22",
    ]
    assert "20030: from 10.0.1.22 lookup 101" in kernel.rules()


def test_an_eni_is_right_even_where_nobody_serves_eth0(kernel: Kernel) -> None:
    kernel.serve("-d eth1")
    assert kernel.device_to("198.51.100.1", "10.0.1.22") == "eth1"
    assert kernel.device_to("2001:db8:9::1", "2001:db8:1::22") == "eth1"


def test_main_stays_as_it_was(kernel: Kernel) -> None:
    before = [kernel.sh(f"ip -{family} -d route show table main") for family in (4, 6)]
    kernel.serve("-d eth0", "-d eth1 --default", "-d eth1", "-d eth1 -r")
    assert [kernel.sh(f"ip -{family} -d route show table main") for family in (4, 6)] == before


def test_a_second_run_only_reads(kernel: Kernel) -> None:
    for arguments in ("-d eth0", "-d eth1 --default"):
        kernel.serve(arguments)
        before = kernel.state()
        environment = kernel.fake_ip(":")
        assert kernel.add_routes(arguments, **environment).returncode == 0
        assert kernel.calls() == 3
        assert kernel.state() == before


def test_the_number_of_processes_does_not_grow_with_the_addresses(kernel: Kernel) -> None:
    kernel.add_device("eth2", "10.0.2.9/24", "2001:db8:2::9/64")
    kernel.add_device("eth3", "2001:db8:3::9/64", *(f"10.0.3.{n}/24" for n in range(10, 60)))
    calls = []
    for device in ("eth2", "eth3"):
        assert kernel.add_routes(f"-d {device}", **kernel.fake_ip(":")).returncode == 0
        calls.append(kernel.calls())
    # Three ask, two change.
    assert calls == [5, 5]
    for n in range(10, 60):
        assert kernel.device_to("198.51.100.1", f"10.0.3.{n}") == "eth3"


def test_containers_and_static_routes_of_main_go_on(kernel: Kernel) -> None:
    kernel.sh("ip link add br0 type bridge; ip link set br0 up; ip addr add 172.17.0.1/16 dev br0")
    kernel.sh("ip route add 192.0.2.0/24 via 10.0.1.77 dev eth0")
    kernel.sh("ip route add 203.0.113.0/24 via 10.0.1.88 dev eth1")
    kernel.serve("-d eth0", "-d eth1")
    for source in ("10.0.1.5", "10.0.1.22"):
        assert kernel.device_to("172.17.0.9", source) == "br0"
    assert kernel.json("route get 192.0.2.9 from 10.0.1.5")[0]["gateway"] == "10.0.1.77"
    assert kernel.json("route get 192.0.2.9 from 10.0.1.22")[0]["gateway"] == "10.0.1.1"
    assert kernel.device_to("192.0.2.9", "10.0.1.22") == "eth1"
    assert kernel.json("route get 203.0.113.9 from 10.0.1.22")[0]["gateway"] == "10.0.1.88"


@pytest.mark.parametrize(
    ("address", "arguments", "gateway"),
    [
        ("10.0.22.7/20", "", "10.0.16.1"),
        ("10.0.22.7/28", "", "10.0.22.1"),
        ("10.0.22.7/24", "-g 10.0.22.9", "10.0.22.9"),
        ("10.0.22.7/32", "-n 10.0.16.0/20", "10.0.16.1"),
        ("10.0.22.7/32", "-g 10.0.22.9", "10.0.22.9"),
        ("10.0.22.7/24", "-n 10.0.22.0/28", "10.0.22.1"),
        ("2001:db8:2::7/64", "", "fe80:ec2::1"),
        ("2001:db8:2::7/64", "-g fe80::9", "fe80::9"),
        ("2001:db8:2::7/128", "", "fe80:ec2::1"),
        ("2001:db8:2::7/64", "-g 2001:db8:2::1", "2001:db8:2::1"),
    ],
)
def test_the_gateway_is_that_of_the_subnet(
    kernel: Kernel, address: str, arguments: str, gateway: str
) -> None:
    kernel.add_device("eth2", address)
    kernel.serve(f"-d eth2 {arguments}")
    family = 6 if ":" in address else 4
    found = kernel.json(f"-{family} route show table 102 default")
    assert [(route["gateway"], route["dev"]) for route in found] == [(gateway, "eth2")]
    before = kernel.state()
    kernel.serve(f"-d eth2 {arguments}")
    assert kernel.state() == before


def test_an_ipv6_router_that_main_knows_is_the_gateway(kernel: Kernel) -> None:
    kernel.sh("ip -6 route add default via fe80::99 dev eth1 metric 2048 proto ra")
    kernel.sh(
        "ip -6 addr del 2001:db8:1::22/64 dev eth1; ip -6 addr add 2001:db8:1::22/128 dev eth1"
    )
    kernel.sh("ip -6 route add 2001:db8:1::/64 dev eth1 metric 300 proto ra")
    kernel.serve("-d eth0", "-d eth1")
    assert kernel.json("-6 route show table 101 default")[0]["gateway"] == "fe80::99"
    assert kernel.device_to("2001:db8:1::77", "2001:db8:1::22") == "eth1"
    assert "gateway" not in kernel.json("-6 route get 2001:db8:1::77 from 2001:db8:1::22")[0]


def test_a_new_gateway_replaces_the_old_one(kernel: Kernel) -> None:
    kernel.serve("-d eth1", "-d eth1 -g 10.0.1.9")
    assert kernel.json("route show table 101 default")[0]["gateway"] == "10.0.1.9"
    kernel.serve("-d eth1")
    assert kernel.json("route show table 101 default")[0]["gateway"] == "10.0.1.1"


def test_every_address_that_can_be_a_source_gets_a_rule(kernel: Kernel) -> None:
    kernel.sh("ip addr add 169.254.9.9/16 dev eth1 scope link")
    kernel.sh("ip -6 addr add 2001:db8:1::dead/64 dev eth1 preferred_lft 0")
    conf = "/proc/sys/net/ipv6/conf/eth1"
    kernel.sh(f"echo 1 > {conf}/accept_dad; echo 1000 > {conf}/dad_transmits")  # one a second
    kernel.sh("ip -6 addr add 2001:db8:1::7e/64 dev eth1")
    assert kernel.json("-6 addr show dev eth1 tentative")[0]["addr_info"]
    kernel.serve("-d eth1")
    sources = {rule.split()[2] for rule in kernel.rules() if rule.startswith("20030:")}
    of_eth0 = {"10.0.1.5", "2001:db8:1::5"}
    assert sources - of_eth0 == {
        "10.0.1.22",
        "2001:db8:1::22",
        "2001:db8:1::7e",
        "2001:db8:1::dead",
    }


def test_an_address_that_went_away_leaves_no_rule(kernel: Kernel) -> None:
    kernel.sh("ip addr add 10.0.1.23/24 dev eth1")
    kernel.serve("-d eth0", "-d eth1")
    kernel.sh("ip addr del 10.0.1.23/24 dev eth1; ip addr add 10.0.1.24/24 dev eth1")
    kernel.serve("-d eth1")
    sources = [rule.split()[2] for rule in kernel.rules() if "lookup 101" in rule]
    assert sources == ["10.0.1.22", "10.0.1.24", "2001:db8:1::22"]


def test_an_address_that_moved_follows_its_device(kernel: Kernel) -> None:
    kernel.sh("ip addr add 10.0.1.23/24 dev eth1")
    kernel.serve("-d eth0", "-d eth1")
    kernel.sh("ip addr del 10.0.1.23/24 dev eth1; ip addr add 10.0.1.23/24 dev eth0")
    kernel.serve("-d eth0")
    assert kernel.device_to("198.51.100.1", "10.0.1.23") == "eth0"


@pytest.mark.parametrize("pulled", [False, True], ids=["there", "gone"])
@pytest.mark.parametrize("device", ["eth1", "ens5"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_removing_leaves_nothing_of_the_device(
    kernel: Kernel, device: str, pulled: bool, named: bool
) -> None:
    if device != "eth1":
        kernel.add_device(device, "10.0.5.5/24", "2001:db8:5::5/64")
    kernel.serve("-d eth0")
    before = kernel.state()
    kernel.serve(f"-d {device} --default")
    assert kernel.state() != before
    if not named:
        kernel.sh("rm -r /etc/iproute2/rt_tables.d")
    if pulled:
        kernel.sh(f"ip link del {device}")
    kernel.serve(f"-d {device} -r")
    assert kernel.rules() == []
    if not pulled:
        assert kernel.state() == before
    kernel.serve(f"-d {device} -r", "-d eth0 -r")
    assert kernel.rules() == []
    assert " group 7700" not in kernel.sh("ip -o link")
    assert kernel.device_to("198.51.100.1", "10.0.1.5") == "eth0"


@pytest.mark.parametrize(
    ("devices", "tables"),
    [
        (["eth0", "eth1", "eth10"], [100, 101, 110]),
        (["ens5", "enp0s6"], [1000, 1001]),
        (["eth152", "eth153", "eth154", "eth155", "eth900"], [252, 1000, 1001, 1002, 1003]),
        (["eth01", "eth1.10", "eth1"], [1000, 1001, 101]),
    ],
)
def test_each_device_has_a_table_of_its_own(
    bare: Kernel, devices: list[str], tables: list[int]
) -> None:
    for n, device in enumerate(devices):
        bare.add_device(device, f"10.0.{n}.9/24")
    for _ in range(2):  # the second run finds the names
        bare.serve(*(f"-d {device}" for device in devices))
        found = [rule.split()[-1] for rule in bare.rules() if rule.startswith("20030:")]
        assert found == [str(table) for table in tables]
    for device in devices:
        assert f"dev {device} " in bare.sh(f"ip route show table {device}")


def test_a_table_keeps_the_number_that_its_name_has(bare: Kernel) -> None:
    bare.sh("mkdir /etc/iproute2/rt_tables.d; echo 77 eth1 > /etc/iproute2/rt_tables.d/eth1.conf")
    bare.sh("echo 0x3e8 isp >> /etc/iproute2/rt_tables; echo 102 isp2 >> /etc/iproute2/rt_tables")
    bare.sh("ip rule add from 192.0.2.1 lookup 1001")
    for n, device in enumerate(("eth1", "eth2", "ens5")):
        bare.add_device(device, f"10.0.{n}.9/24")
        bare.serve(f"-d {device}")
    found = [rule.split()[-1] for rule in bare.rules() if rule.startswith("20030:")]
    assert found == ["77", "1002", "1003"]
    assert bare.sh("cat /etc/iproute2/rt_tables.d/eth2.conf") == "1002 eth2\n"


def test_a_table_can_be_given_by_name_or_number(bare: Kernel) -> None:
    bare.sh("echo 300 isp >> /etc/iproute2/rt_tables")
    for n, arguments in enumerate(("eth1 -t isp", "eth2 -t 400", "eth3 -t new", "ens5 -t other")):
        bare.add_device(arguments.split()[0], f"10.0.{n}.9/24")
        bare.serve(f"-d {arguments}", f"-d {arguments}")
    found = [rule.split()[-1] for rule in bare.rules() if rule.startswith("20030:")]
    assert found == ["300", "400", "103", "1000"]
    assert "dev eth3" in bare.sh("ip route show table new")
    before = bare.state()
    done = bare.add_routes("-d eth1 -t 400")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert bare.state() == before
    bare.serve("-d eth1")  # nothing says otherwise: where it is now
    assert bare.table(300)


def test_a_table_that_has_a_name_can_be_given_another(bare: Kernel) -> None:
    bare.add_device("ens5", "10.0.5.9/24")
    bare.serve("-d ens5")
    for name in ("web", "api"):
        bare.serve(f"-d ens5 -t {name}")
        assert "dev ens5" in bare.sh(f"ip route show table {name}")


@pytest.mark.parametrize(
    "theirs", ["200 isp2\n201 mgmt\n", "200 ens6\n", "# ours\n1001 ens6\n", "1001 mgmt\n"]
)
def test_a_file_of_somebody_elses_that_is_named_after_the_device_stays(
    bare: Kernel, theirs: str
) -> None:
    bare.add_device("ens5", "10.0.5.9/24")
    bare.add_device("ens6", "10.0.6.9/24")
    bare.sh("mkdir /etc/iproute2/rt_tables.d; ip route add default dev ens5 table 200")
    path = "/etc/iproute2/rt_tables.d/ens6.conf"
    bare.sh(f"printf '{theirs}' >{path}")
    for _ in range(2):
        for device in ("ens5", "ens6"):
            assert bare.add_routes(f"-d {device}").returncode == 0
    assert bare.sh(f"cat {path}") == theirs


def test_a_name_moves_to_a_new_table_with_its_device(bare: Kernel) -> None:
    """Somebody else has filled the old one."""
    bare.add_device("ens5", "10.0.5.9/24")
    bare.serve("-d ens5", "-d ens5 -r")
    bare.sh("ip route add default dev ens5 table 1000")
    bare.serve("-d ens5")
    assert bare.sh("cat /etc/iproute2/rt_tables.d/ens5.conf") == "1001 ens5\n"


def test_everybody_can_read_the_names_of_the_tables_and_nobody_hold_the_lock(bare: Kernel) -> None:
    bare.add_device("ens5", "10.0.5.9/24")
    for umask in ("077", "022"):
        bare.sh("rm -rf /etc/iproute2/rt_tables.d /run/add_routes.lock")
        bare.sh(f"umask {umask}; {SCRIPT} -d ens5")
        files = "/etc/iproute2/rt_tables.d /etc/iproute2/rt_tables.d/ens5.conf /run/add_routes.lock"
        assert bare.sh(f"stat -c %a {files}").split() == ["755", "644", "600"]


def test_an_address_that_is_never_the_first_choice_has_a_rule_too(kernel: Kernel) -> None:
    """So keepalived can make them: scope link."""
    kernel.sh("ip addr add 10.0.1.40/28 dev eth1 scope link")
    kernel.sh("ip addr add 10.0.1.41/32 dev eth1 scope site")
    kernel.sh("ip addr add 169.254.9.9/32 dev eth1 scope global")
    kernel.serve("-d eth1")
    for source in ("10.0.1.40", "10.0.1.41", "169.254.9.9"):
        assert kernel.device_to("198.51.100.1", source) == "eth1"
    assert kernel.table(101)[0].startswith("default via 10.0.1.1 dev eth1")
    assert not [rule for rule in kernel.rules() if "fe80::" in rule]


def test_a_device_whose_name_is_no_text_spoils_nothing(kernel: Kernel) -> None:
    kernel.sh("""ip link add "$(printf 'caf\\351')" type bridge""")
    kernel.serve("-d eth1")
    assert kernel.device_to("198.51.100.1", "10.0.1.22") == "eth1"


def test_a_vpns_tap_is_not_taken_for_an_eni(kernel: Kernel) -> None:
    """An Ethernet device, too; and OpenVPN's redirect-gateway gives it main's default route."""
    kernel.sh("mount -t sysfs lab /sys; ip tuntap add tap0 mode tap; ip link set tap0 up")
    kernel.sh("ip addr add 10.8.0.2/24 dev tap0; ip route prepend default via 10.8.0.1 dev tap0")
    kernel.serve("-d eth1")
    assert "group default" in kernel.sh("ip link show dev tap0")
    assert "20020: from 10.0.1.5 lookup 254 suppress_prefixlength 1" in kernel.rules()


def test_an_overlay_with_mains_default_route_is_not_taken_for_an_eni(kernel: Kernel) -> None:
    kernel.sh("mount -t sysfs lab /sys")
    kernel.sh("ip link add vx0 type vxlan id 7 local 10.0.1.5 remote 10.0.1.99 dstport 4789")
    kernel.sh("ip addr add 10.10.10.9/24 dev vx0; ip link set vx0 up; ip route del default")
    kernel.sh("ip route add default via 10.0.1.1 dev eth0 metric 100")
    kernel.sh("ip route add default via 10.10.10.1 dev vx0 metric 50")
    kernel.serve("-d eth0", "-d eth1")
    for source in ("10.0.1.5", "10.0.1.22"):
        assert kernel.device_to("10.10.10.5", source) == "vx0"


@pytest.mark.parametrize("options", ["", " -g 10.0.1.9"])
@pytest.mark.parametrize("change", ["ip route del 10.0.1.0/24 dev eth1", NO_PREFIX_ROUTE])
def test_an_eni_whose_subnet_is_not_in_main_is_served(
    kernel: Kernel, change: str, options: str
) -> None:
    """networkd with a table of its own, and others, leave the subnet's route out of main."""
    kernel.sh(change)
    kernel.serve(f"-d eth1{options}")
    for destination in ("198.51.100.1", "10.0.1.77"):
        assert kernel.device_to(destination, "10.0.1.22") == "eth1"
    assert kernel.add_routes("-d eth0 --dry-run").stdout == "nothing to change\n"


def test_a_nexthop_group_of_one_member_is_not_repaired_for_ever(kernel: Kernel) -> None:
    """So the kernel leaves a group when the device of its other member goes."""
    kernel.sh("ip nexthop add id 30 via fe80::60 dev eth1; ip nexthop add id 31 group 30")
    kernel.sh("ip -6 route add 2001:db8:50::/64 nhid 31")
    kernel.serve("-d eth1")
    assert kernel.device_to("2001:db8:50::9", "2001:db8:1::22") == "eth1"
    assert kernel.add_routes("-d eth1 --dry-run").stdout == "nothing to change\n"


@pytest.mark.parametrize("options", ["", "--default"])
def test_own_addresses_stay_the_hosts_where_the_kernels_first_rule_has_been_moved(
    kernel: Kernel, options: str
) -> None:
    """As it is usual with VRFs: the kernel's documentation, vrf.rst."""
    kernel.sh("ip rule add pref 32765 lookup local && ip rule del pref 0")
    kernel.serve(f"-d eth1 {options}")
    for address in ("10.0.1.5", "10.0.1.22"):
        assert kernel.device_to(address) == "lo"
        assert kernel.device_to(address, "10.0.1.22") == "lo"
        assert kernel.device_to(address, "198.51.100.1", "iif eth0") == "lo"
    kernel.sh("ip rule add pref 0 lookup local && ip rule del pref 32765")
    kernel.serve(f"-d eth1 {options}")
    assert "lookup 255" not in "".join(kernel.rules())


def test_what_is_forwarded_by_mains_own_device_follows_mains_routes(kernel: Kernel) -> None:
    kernel.sh("ip route add 192.0.2.0/24 via 10.0.1.77 dev eth0")
    kernel.sh("echo 1 >/proc/sys/net/ipv4/ip_forward")
    kernel.serve("-d eth0 --default", "-d eth1")
    forwarded = kernel.json("route get 192.0.2.9 from 10.9.9.9 iif eth0")
    assert forwarded[0]["gateway"] == "10.0.1.77"


def test_a_list_that_has_changed_while_it_was_read_is_read_again(kernel: Kernel) -> None:
    """The kernel's words for a list in which something may be missing; `ip` ends with 0."""
    kernel.serve("-d eth0", "-d eth1 --default")
    before = kernel.state()
    action = "echo 'Dump was interrupted and may be inconsistent.' >&2; exit 0"
    for at in range(1, 4):
        done = kernel.add_routes("-d eth0", **kernel.fake_ip(action, at))
        assert (done.returncode, done.stderr) == (0, "")
        assert kernel.state() == before
    always = kernel.fake_ip(action)
    fake = kernel.directory / "ip"
    fake.write_text(fake.read_text().replace('[ $(wc -l < "$CALLS") = "$AT" ]', "true"))
    done = kernel.add_routes("-d eth0", **always)
    assert done.returncode == 1
    assert "the host changes faster than it can be read" in done.stderr
    assert kernel.state() == before


def test_without_a_writable_etc_the_numbers_stay(bare: Kernel) -> None:
    bare.add_device("ens5", "10.0.5.9/24")
    bare.add_device("ens6", "10.0.6.9/24")
    bare.sh("mount -o remount,ro /etc/iproute2")
    for _ in range(2):
        for device in ("ens6", "ens5"):
            done = bare.add_routes(f"-d {device}")
            assert done.returncode == 0
            assert "rt_tables.d" in done.stderr
            assert done.stderr.count("\n") == 1
    assert [r.split()[-1] for r in bare.rules() if r.startswith("20030:")] == ["1000", "1001"]


def test_default_sends_the_rest_by_the_device_as_long_as_it_is_there(kernel: Kernel) -> None:
    kernel.add_device("eth2", "10.0.2.9/24")
    for switch in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        kernel.sh(f"echo 1 > /proc/sys/net/{switch}")
    kernel.serve("-d eth0", "-d eth1 --default")
    assert kernel.device_to("198.51.100.1") == "eth1"
    assert kernel.device_to("2001:db8:9::1") == "eth1"
    assert kernel.device_to("198.51.100.1", "10.0.2.77", "iif eth2") == "eth1"
    assert kernel.device_to("169.254.169.254") == "eth0"
    assert kernel.device_to("fd00:ec2::254") == "eth0"
    assert kernel.device_to("10.0.2.77") == "eth2"
    assert kernel.device_to("198.51.100.1", "10.0.1.5") == "eth0"
    kernel.sh("ip link del eth1")
    assert kernel.device_to("198.51.100.1") == "eth0"
    assert kernel.device_to("2001:db8:9::1") == "eth0"
    assert kernel.device_to("198.51.100.1", "10.0.2.77", "iif eth2") == "eth0"


def test_the_last_call_for_default_wins_and_a_call_without_it_ends_it(kernel: Kernel) -> None:
    kernel.serve("-d eth0 --default", "-d eth1 --default")
    assert kernel.device_to("198.51.100.1") == "eth1"
    assert sum(rule.startswith("32702:") for rule in kernel.rules()) == 2
    kernel.serve("-d eth0 -r")
    assert kernel.device_to("198.51.100.1") == "eth1"
    kernel.serve("-d eth1")
    assert [rule for rule in kernel.rules() if rule.startswith("327")] == []


def test_hooks_at_once_do_not_disturb_each_other(kernel: Kernel) -> None:
    kernel.serve("-d eth0", "-d eth1 --default")
    wanted = kernel.state()
    kernel.serve("-d eth0 -r", "-d eth1 -r")
    hooks = [
        subprocess.Popen(
            kernel.command(SCRIPT, "-d", *arguments), stderr=subprocess.PIPE, text=True
        )
        for arguments in [["eth0"], ["eth1", "--default"]] * 4
    ]
    ends = [(hook.communicate(timeout=OUTER_LIMIT)[1], hook.returncode) for hook in hooks]
    assert ends == [("", 0)] * 8
    assert kernel.state() == wanted


def test_what_another_program_does_at_the_same_moment_is_no_error(kernel: Kernel) -> None:
    kernel.serve("-d eth0")
    before = kernel.state()
    real, rule = shutil.which("ip"), "pref 20030 from 10.0.1.22 lookup 101 protocol 77"
    done = kernel.add_routes("-d eth1", **kernel.fake_ip(f"{real} rule add {rule}", 4))
    assert (done.returncode, done.stderr) == (0, "")
    assert kernel.device_to("198.51.100.1", "10.0.1.22") == "eth1"
    assert kernel.table(101, 6)
    done = kernel.add_routes("-d eth1 -r", **kernel.fake_ip(f"{real} rule del {rule}", 4))
    assert (done.returncode, done.stderr) == (0, "")
    assert kernel.state() == before
    kernel.serve("-d eth1")
    done = kernel.add_routes("-d eth1 -r", **kernel.fake_ip(f"{real} link del eth1", 4))
    assert (done.returncode, done.stderr) == (0, "")
    assert [rule for rule in kernel.rules() if "lookup 101" in rule] == []


def test_what_exists_but_is_not_what_was_wanted_is_left_to_its_owner(kernel: Kernel) -> None:
    """Another program takes the table at the moment in which we do."""
    theirs = "route add default via 10.0.1.66 dev eth1 table 101"
    action = f"{shutil.which('ip')} {theirs}"
    done = kernel.add_routes("-d eth1", **kernel.fake_ip(action, 4))
    assert (done.returncode, done.stderr) == (0, "")
    assert kernel.sh("ip route show table 101") == "default via 10.0.1.66 dev eth1 \n"
    assert kernel.json("route get 198.51.100.1 from 10.0.1.22")[0]["gateway"] == "10.0.1.1"


@pytest.mark.parametrize("arguments", ["-d eth1 --default", "-d eth1 -r"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_failing_ip_leaves_everything_as_it_was(
    kernel: Kernel, arguments: str, after: bool
) -> None:
    kernel.serve("-d eth0", "-d eth1" if "-r" in arguments else "-d eth0")
    before = kernel.state()
    action = "echo 'RTNETLINK answers: Out of luck' >&2; exit 2"
    if after:  # it did all, and yet failed
        action = f'{shutil.which("ip")} "$@" >/dev/null; {action}'
    for at in range(1, 6):
        done = kernel.add_routes(arguments, **kernel.fake_ip(action, at))
        assert done.returncode == 1
        assert "RTNETLINK answers: Out of luck" in done.stderr
        assert done.stderr.count("\n") == 1
        assert kernel.state() == before


def test_routes_of_all_kinds_are_copied_and_a_second_run_finds_them_right(kernel: Kernel) -> None:
    kernel.sh(
        """
        ip route add default via 10.0.1.1 dev eth1 metric 9 mtu lock 1399 rto_min 5ms congctl reno
        ip route add 198.51.100.0/24 nexthop via 10.0.1.60 dev eth0 nexthop via 10.0.1.61 dev eth1
        ip route add 198.51.101.0/24 mtu 1300 nexthop via 10.0.1.60 dev eth1 weight 2 \\
            nexthop via 10.0.1.61 dev eth1 weight 3
        ip nexthop add id 10 via 10.0.1.9 dev eth1; ip route add 192.0.2.0/24 nhid 10
        ip route add blackhole 10.9.0.0/16; ip route add 10.8.0.0/16 via inet6 fe80::1 dev eth1
        ip route add 10.7.0.0/16 via 10.66.0.7 dev eth1 onlink advmss 1300 initcwnd 20 quickack 1
        ip -6 route add 2001:db8:9::/64 nexthop via fe80::1 dev eth1 nexthop via fe80::2 dev eth1
        ip -6 route add default via fe80::9 dev eth1 metric 2000 mtu 1300 hoplimit 60 pref low
        ip route add 10.6.0.0/16 dev eth1 scope global
        ip nexthop add id 11 dev eth1; ip route add 10.5.0.0/16 nhid 11
        ip route add 10.4.0.0/16 metric 50 nexthop via 10.66.0.7 dev eth1 onlink \\
            nexthop via 10.0.1.60 dev eth0
        ip -6 route add 2001:db8:8::/64 metric 50 nexthop via fe80::1 dev eth1 onlink \\
            nexthop via fe80::2 dev eth0
        """
    )
    kernel.serve("-d eth1")
    assert kernel.add_routes("-d eth1 --dry-run").stdout == "nothing to change\n"
    # Each next hop of a route with several has a line of its own.
    assert len(kernel.table(101)) == 10 + 2
    assert len(kernel.table(101, 6)) == 5 + 2


def test_a_route_that_ip_prints_and_does_not_read_spoils_no_other(kernel: Kernel) -> None:
    novel = "10.5.0.0/16 via 10.0.1.9 dev eth1 novel 7"
    real = shutil.which("ip")
    action = f'{real} "$@" && if [ "$1" = -4 ]; then echo {novel}; fi; exit'
    environment = kernel.fake_ip(action)
    fake = kernel.directory / "ip"
    fake.write_text(fake.read_text().replace('[ $(wc -l < "$CALLS") = "$AT" ]', '[ "$3" = -o ]'))
    done = kernel.add_routes("-d eth1", **environment)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("add_routes.py: ip -4 route add 10.5.0.0/16 via 10.0.1.9 dev eth1 novel")
    assert kernel.device_to("198.51.100.1", "10.0.1.22") == "eth1"
    assert kernel.device_to("2001:db8:9::1", "2001:db8:1::22") == "eth1"


def test_what_the_kernel_refuses_is_said_in_its_words_and_undone(kernel: Kernel) -> None:
    kernel.add_device("eth2", "10.0.2.9/24", "2001:db8:2::9/64")
    kernel.serve("-d eth0")
    before = kernel.state()
    local = kernel.sh("ip -6 -o address show dev eth2 scope link").split()[3].split("/")[0]
    done = kernel.add_routes(f"-d eth2 -g {local}")  # after all of IPv4 was done
    assert done.returncode == 1
    assert f"ip -6 route add default via {local} dev eth2" in done.stderr
    assert "Error: Gateway can not be a local address" in done.stderr
    assert kernel.state() == before
    kernel.sh("ip link set eth2 down")
    before = kernel.state()
    done = kernel.add_routes("-d eth2")
    assert done.returncode == 1
    assert done.stderr == "add_routes.py: eth2 is down; expected it up\n"
    assert kernel.state() == before


def test_killed_at_any_ip_the_next_run_makes_it_right(kernel: Kernel) -> None:
    kernel.serve("-d eth0", "-d eth1 --default")
    wanted = kernel.state()
    kernel.serve("-d eth1 -r")
    without = kernel.state()
    for after in ("", f'{shutil.which("ip")} "$@" > /dev/null; '):
        for at in range(1, 6):
            for arguments, end in (("-d eth1 --default", wanted), ("-d eth1 -r", without)):
                environment = kernel.fake_ip(f"{after}kill -9 $PPID; exit 1", at)
                assert kernel.add_routes(arguments, **environment).returncode == -9
                kernel.serve(arguments)
                assert kernel.state() == end


def test_what_others_made_stays(kernel: Kernel) -> None:
    others = [
        "ip route add 198.51.100.0/24 via 10.0.1.66 dev eth1 table 101",
        "ip rule add pref 20001 from 10.0.1.99 lookup 101",
        "ip rule add pref 50 from 192.0.2.7 lookup 7",
        "ip route add default via 10.0.1.77 dev eth1 table 101",
    ]
    kernel.sh("\n".join(others))
    before = kernel.state()
    kernel.serve("-d eth0", "-d eth1 --default")
    gone = set(before) - set(kernel.state())
    assert [line for line in gone if not line.endswith("group default")] == []
    assert "20030: from 10.0.1.22 lookup 1000" in kernel.rules()
    second = kernel.state()
    kernel.serve("-d eth1 --default")
    assert kernel.state() == second
    kernel.serve("-d eth1 -r", "-d eth0 -r")
    assert kernel.state() == before


@st.composite
def foreign(draw: st.DrawFn) -> str:
    """A rule or a route of somebody else, in our tables and among our priorities, too."""
    version = draw(st.sampled_from([4, 6]))
    table, number = draw(st.sampled_from([254, 100, 101, 1000])), draw(st.integers(0, 5))
    if draw(st.booleans()):
        priority = draw(st.sampled_from([99, 20000, 20001, 32700, 32702]))
        return f"ip -{version} rule add pref {priority} fwmark {number + 1} lookup {table}"
    subnets = {4: f"198.51.100.{number * 16}/28", 6: f"2001:db8:a{number}::/64"}
    destination = draw(st.sampled_from(["default", subnets[version]]))
    device = draw(st.sampled_from(DEVICES))
    return f"ip -{version} route replace {destination} dev {device} metric 2000 table {table}"


# Without shrinking: each example takes a second.
@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    addresses=st.fixed_dictionaries({device: addresses_of(device) for device in DEVICES}),
    others=st.lists(foreign(), max_size=8, unique=True),
    order=st.permutations(DEVICES),
    default=st.sampled_from(["", "--default"]),
)
def test_any_host_is_served_and_is_afterwards_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    addresses: dict[str, list[Any]],
    others: list[str],
    order: list[str],
    default: str,
) -> None:
    kernel = Kernel(tmp_path_factory.mktemp("kernel"))
    try:
        for device in DEVICES:
            kernel.add_device(device, *map(str, addresses[device]))
        kernel.sh("\n".join(others))
        before = kernel.state()
        served = []
        for device in order:
            found = kernel.state()
            done = kernel.add_routes(f"-d {device} {default}")
            if done.returncode:
                assert (done.returncode, done.stderr.count("\n")) == (1, 1)
                assert kernel.state() == found
            else:
                served.append(device)
        for device in served[-1:] if default else served:  # the last call with --default wins
            dry = kernel.add_routes(f"-d {device} {default} --dry-run").stdout
            assert dry == "nothing to change\n"
        for device in served:
            for address in addresses[device]:
                far = "203.0.113.1" if address.version == 4 else "2001:db8:ff::1"
                assert kernel.device_to(far, str(address.ip)) == device
        for device in order:
            assert kernel.add_routes(f"-d {device} -r").returncode == 0
        assert kernel.state() == before
    finally:
        kernel.close()
