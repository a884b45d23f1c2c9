"""Debian's images for EC2. At boot cloud-init writes netplan's file, for the interfaces that are
there; systemd-networkd and systemd-resolved do the rest. An ENI that comes later is nobody's, so
80-eni.network configures it, and add_routes.service gives it its routes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent

import pytest
from lab import SCRIPTS, TOP, Lab, snippet
from lab.boot import INSTALL, SOURCE, Booted, Mirror, make_disk, stock_disk
from lab.vm import POOL, Image, debian
from sites import CLIENT, ENABLE_NAT, ENI, NAT_FILES, PRIMARY, SECOND, SPARE, Site

pytestmark = pytest.mark.timeout(0)  # none, each wait has its own: see PROCESSOR_TIME
USER_DATA = snippet("#cloud-config")
FOR_THE_MIRROR = snippet("# The files for the web server, and their checksum")
AT_ONCE = snippet("# At once")
UPGRADE = snippet("# After an upgrade")
UNINSTALL = snippet("# Uninstall")
END_DEFAULT = snippet("# To end --default of the service").replace("eth1", "enp2s0")
FILES = {path: text.replace("eth1", "enp2s0") for path, text in NAT_FILES.items()}
# A rule of the administrator's own, and what keeps networkd from removing it. Not for Debian 13:
# there, it also keeps what cloud-init has networkd make for an ENI, when the ENI is gone.
OWN_RULE = {
    path: snippet(f"# {path}").replace("eth1", "enp2s0")
    for path in (
        "/etc/systemd/system/own-rules.service",
        "/etc/systemd/networkd.conf.d/own-rules.conf",
    )
}
# What the user adds to these user data: a unit that needs the ENI.
PAGES_PATH = "/etc/systemd/system/pages.service"
WRITE_PAGES = f"""
write_files:
  - path: {PAGES_PATH}
    content: |
{indent(NAT_FILES[PAGES_PATH], 6 * " ")}
"""
# cloud-init does its hot-plug for the drivers of EC2's NICs alone, and the lab's have another.
HOT_PLUG = """
sed -i 's/"vif|ena|ixgbevf"/"vif|ena|ixgbevf|virtio_net"/' \\
    /usr/lib/python3/dist-packages/cloudinit/sources/DataSourceEc2.py
"""
# The ENI and its addresses stay, but networkd takes our routes away, or the addresses for a moment.
DISTURBANCES = (
    "networkctl reconfigure enp2s0",
    "systemctl restart systemd-networkd",
    "netplan apply",
)


@pytest.mark.virtual_machine
@pytest.mark.parametrize("release", ["bookworm", "trixie"])
def test_the_life_of_a_cloud_image(
    lab: Lab, tmp_path: Path, release: str, record_property: Callable[[str, object], None]
) -> None:
    """It is a NAT instance; its spare is a plain host."""
    site = Site(lab, tmp_path, ipv6=True)
    image = Image(release, "netplan")
    files, units = FILES, "pages.service"
    has_own_rule = release == "bookworm"
    if has_own_rule:
        files, units = FILES | OWN_RULE, "pages.service own-rules.service"
    enable = f"{ENABLE_NAT}\nsystemctl enable {units}"
    disk = make_disk(lab, image, tmp_path / "cloud", files, enable)
    stock = stock_disk(lab, image, tmp_path / "stock")

    # The first boot.
    host = site.boot(disk, options="", ip=PRIMARY[0], ipv6=PRIMARY[1:])
    answered, active = site.await_active(host)
    record_property("power-on to the NIC's hot-plug", host.plugged)
    record_property("power-on to the address's first answer", answered)
    record_property("power-on to eni.service active", active)
    site.check(host)
    site.check_main(host)
    site.check_journal(host, "--unit eni --unit add_routes", f"({ENI}) as enp2s0", most=12)
    site.check_forwarding()
    host.await_that(lambda: site.fetches(ENI))
    host.await_sh("ip rule", lambda s: ("20005:" in s) == has_own_rule)

    # What an administrator does, and what it costs.
    for command in DISTURBANCES:
        lost = site.pings_lost(host, command)
        record_property(f"{command}: pings lost, of five a second", lost)
        site.check_main(host)
        site.check_forwarding()
        assert ("20005:" in host.sh("ip rule")) == has_own_rule

    # A second ENI, of another name, by hand.
    site.check_a_second_eni(host)

    # A reboot with the ENI attached: cloud-init knows of it now.
    attaches = site.attaches()
    host.vm.reboot()
    site.await_active(host)
    site.check(host)
    site.check_main(host)
    site.check_forwarding()
    assert site.attaches() == attaches

    # A spare of the stock image boots beside it, and user data install all. Nothing there waits
    # for the ENI but eni.service.
    with mirror(image, tmp_path / "mirror") as user_data:
        options = {"ip": SPARE[0], "ipv6": SPARE[1:], "user_data": user_data}
        spare = site.boot(stock, options="", **options)
        ssh = site.await_ssh(spare)
        spare.await_sh("ls /var/lib/cloud/instance/boot-finished", bool)
        told = spare.sh("cat /var/log/cloud-init-output.log")
        assert spare.vm.run("cloud-init status").stdout == "status: done\n", told
    record_property("power-on to ssh, of a host that waits", ssh)
    record_property("power-on to the end of its user data", spare.past())
    assert spare.ordered_after("eni.service") == {"shutdown.target", "pages.service"}
    assert spare.is_active("multi-user.target") == "active"
    assert spare.is_active("eni.service") == "activating"
    assert spare.is_active("pages.service") == "inactive"
    assert site.holder() == host.instance.id

    # Stopped with the drop-in, the host gives the ENI back, and the spare has it.
    site.add_detach_drop_in(host)
    host.sh("systemctl stop eni.service")
    site.await_active(spare)
    site.check_without(host)
    site.check_main(host)
    site.check(spare)
    site.check_main(spare)
    spare.await_that(lambda: site.fetches(ENI))

    # The spare is killed, and the host takes the ENI over, while the group still ends the spare.
    site.kill(spare)
    host.sh("systemctl start eni.service")
    site.check(host)
    site.check_main(host)
    site.check_forwarding()

    # By hand: detach, and attach.
    host.sh("eni_ctl.py -d")
    site.check_without(host)
    site.check_main(host)
    host.sh("eni_ctl.py -a")
    site.check(host)
    site.check_main(host)

    if has_own_rule:
        # It is no NAT instance any more.
        host.sh(END_DEFAULT)
        host.await_sh("ip rule", lambda s: "32702:" not in s and f"from {ENI} lookup" in s)
        site.check(host)
        site.check_main(host)
        assert "20005:" in host.sh("ip rule")

    # Uninstalled, with what the user has added, it leaves nothing but the table's name.
    host.sh(UNINSTALL)
    assert "20005:" not in host.sh("ip rule")
    host.sh(f"cd /etc/systemd/system; rm -r *.service.d; systemctl disable {units}")
    assert site.holder() is None
    left = host.sh("ip rule; ip -6 rule; ip route show table all; ip link; ls /etc/systemd/system")
    assert not re.search(r"proto 77|group 7700|eni|add_routes", left), left
    site.check_main(host)

    # Installed while the host runs, it works without a reboot.
    install = f"cd {SOURCE}\n{snippet(INSTALL['netplan'])}"
    host.sh(f"{install}\n{AT_ONCE}")
    site.check(host)
    site.check_main(host)

    # An upgrade does no harm.
    attaches = site.attaches()
    host.sh(f"{install}\n{UPGRADE}")
    site.check(host)
    assert host.is_active("eni.service") == "active"
    assert site.attaches() == attaches


@pytest.mark.virtual_machine
def test_a_nat_instance_with_two_enis_beside_cloud_inits_own_hot_plug(
    lab: Lab, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Debian 13's cloud-init configures a hot-plugged ENI by netplan, some time after networkd has
    done it by 80-eni.network. Debian 12's does so only if it is told to."""
    site = Site(lab, tmp_path, ipv6=True)
    commands = f"{HOT_PLUG}\n{ENABLE_NAT}"
    disk = make_disk(lab, Image("trixie", "netplan"), tmp_path / "cloud", FILES, commands)
    host = site.boot(disk, options="", ip=PRIMARY[0], ipv6=PRIMARY[1:])
    _, active = site.await_active(host)
    record_property("power-on to eni.service active", active)
    await_netplan(host, "enp2s0")
    record_property("power-on to cloud-init's own configuration of the ENI", host.past())
    site.await_both(host)
    site.check(host)
    site.check_main(host)
    site.check_forwarding()
    host.await_that(lambda: site.fetches(ENI))

    # A second ENI, of another name.
    second = lab.aws.create_eni(site.subnet, name="vpn", ip=SECOND)
    host.sh("eni_ctl.py -a -n vpn -o /run/vpn")
    await_netplan(host, "enp3s0")
    host.await_that(lambda: site.pings(site.client, SECOND, 1))
    host.await_that(lambda: site.calls(host, SECOND, CLIENT))
    site.await_both(host)
    site.check_main(host)
    host.sh("eni_ctl.py -d -n vpn -o /run/vpn")
    await_netplan_without(host, lab.aws.eni(second).mac_address)
    site.await_both(host)
    site.check(host)

    # Stopped with the drop-in, it gives the ENI back; started, it takes it again.
    site.add_detach_drop_in(host)
    host.sh("systemctl stop eni.service")
    assert site.holder() is None
    await_netplan_without(host, lab.aws.eni(site.eni).mac_address)
    host.await_that(lambda: site.pings(site.client, PRIMARY[0], 1))
    site.check_without(host)
    site.check_main(host)
    host.sh("systemctl start eni.service")
    await_netplan(host, "enp2s0")
    site.await_both(host)
    site.check(host)
    site.check_forwarding()


# cloud-init rewrites netplan's file for each ENI that comes or goes, and has netplan apply it.
NETPLAN = "cat /etc/netplan/50-cloud-init.yaml; systemctl is-active cloud-init-hotplugd.service"


def await_netplan(host: Booted, device: str) -> None:
    """Wait until networkd has the device's addresses by a file of netplan's."""
    pattern = r"/10-netplan-.*\(configured\).*\binactive$"
    told = f"networkctl status {device} | cat; {NETPLAN}"
    host.await_sh(told, lambda s: re.search(pattern, s, re.S) is not None)


def await_netplan_without(host: Booted, mac: str) -> None:
    host.await_sh(NETPLAN, lambda s: mac not in s and s.endswith("inactive"))


@contextmanager
def mirror(image: Image, directory: Path) -> Iterator[str]:
    """README's web server with the files of its user data, which are yielded, with a unit of the
    user's own; and with packages."""
    directory.mkdir()
    for name in SCRIPTS:
        shutil.copy(TOP / name, directory)
    shutil.copytree(TOP / "systemd", directory / "systemd")
    command = ["sh", "-euc", FOR_THE_MIRROR]
    done = subprocess.run(command, cwd=directory, check=True, stdout=subprocess.PIPE, text=True)
    checksum, file = done.stdout.split()
    assert file == "eni_ctl.tar.gz"
    (directory / "debian").symlink_to(debian(image) / POOL)
    with Mirror(directory):
        user_data = USER_DATA.replace("CHECKSUM", checksum)
        enable = "systemctl enable eni.service"
        assert enable in user_data
        yield user_data.replace(enable, f"{enable} pages.service") + WRITE_PAGES
