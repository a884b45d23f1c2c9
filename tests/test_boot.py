"""The whole chain on real hosts: Debian in virtual machines, from power-on to packets, and over.

systemd starts eni.service; the simulated EC2 hot-plugs the NIC; udev, ifupdown and DHCP bring it
up; add_routes.py gives it its routes; a client elsewhere in the VPC is the judge.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import TOP, Lab, await_that, snippet
from lab.boot import Booted, boot, make_disk
from lab.vm import RELEASES, Disk
from lab.vpc import Host, run

pytestmark = pytest.mark.timeout(900)
INTERFACES = snippet("# /etc/network/interfaces")
NAT_INTERFACES = snippet("# /etc/network/interfaces, for a NAT instance")
DETACH = snippet("# /etc/systemd/system/eni.service.d/detach.conf")
OPTIONS = snippet("# /etc/systemd/system/eni.service.d/options.conf")
NFTABLES = snippet("# /etc/nftables.conf")
ENI, CLIENT, NEIGHBOUR = "10.0.1.22", "10.0.2.50", "10.0.1.60"
UNIT = TOP / "systemd/eni.service"


class Site:
    """The lab with a client in another subnet and a neighbour in the instances' own."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab, self.directory = lab, directory
        self.subnet = lab.add_subnet("10.0.1.0/24")
        lab.add_subnet("10.0.2.0/24")
        tags = {"FQDN": "web.example.com"}
        self.eni = lab.aws.create_eni(self.subnet, name="web", ip=ENI, tags=tags)
        self.client = lab.add_host("client", CLIENT)
        self.neighbour = lab.add_host("neighbour", NEIGHBOUR)
        # A private subnet, whose route table has the ENI as its default route, as EC2's can.
        lab.add_subnet("10.0.3.0/24")
        self.private = lab.add_host("private", "10.0.3.70")
        run("ip", "rule", "add", "iif", lab.vpc.bridge_of("10.0.3.1")[0], "lookup", "77")

    def boot(self, disk: Disk, **options: str) -> Booted:
        return boot(self.lab, self.subnet, disk, self.directory, group="web", **options)

    def await_active(self, machine: Booted) -> tuple[float, float]:
        """Wait until the ENI's address answers and eni.service is active; when each was.

        The client asks first, for each look into the guest slows its emulated processor.
        """
        try:
            await_that(lambda: self.pings(self.client, ENI, 1), 300)
        except AssertionError:
            raise AssertionError(machine.journal()) from None
        answered = machine.past()
        machine.await_sh("systemctl is-active eni.service", lambda s: s == "active", 300)
        return answered, machine.past()

    def holder(self) -> str | None:
        model = self.lab.aws.eni(self.eni)
        return str(model.instance.id) if model.attachment_id else None

    def attaches(self) -> int:
        calls = [call.action for call in self.lab.aws.calls if call.status == 200]
        return calls.count("AttachNetworkInterface")

    def check(self, machine: Booted) -> None:
        """Both addresses are reached from both places, and the state file tells of it.

        The unit is active once the address is up; ifupdown calls add_routes.py just after.
        """
        await_that(lambda: self.pings(self.client, ENI, 1), 60)
        for host, own in ((self.client, CLIENT), (self.neighbour, NEIGHBOUR)):
            for address in (machine.instance.ip, ENI):
                assert self.pings(host, address), f"{host.name} does not reach {address}"
                assert machine.ask(own, address) == address
        keys = [line.split("=")[0] for line in machine.sh("cat /etc/default/eni").splitlines()]
        assert " ".join(keys) == "FQDN IP GW DEVICE ASG_NAME INSTANCE_ID ENI_ID ATTACHMENT_ID"
        assert machine.sh(". /etc/default/eni; echo $IP $INSTANCE_ID").split() == [
            ENI,
            machine.instance.id,
        ]

    def check_forwarding(self) -> None:
        """What a host in the private subnet asks for goes out by the ENI, under its address."""
        self.lab.vpc.set_source_check(self.lab.aws.eni(self.eni).mac_address, False)
        run("ip", "route", "replace", "default", "via", ENI, "table", "77")
        await_that(lambda: self.private.ask(CLIENT) == ENI, 60)

    def check_without(self, machine: Booted) -> None:
        """Device, rules and table of the ENI are gone, the state file says so, eth0 works."""
        assert "eth1" not in machine.sh("ip -brief link")
        machine.await_sh("ip rule; ip -6 rule; ip route show table all", lambda s: ENI not in s, 60)
        assert machine.sh(". /etc/default/eni; echo $DEVICE $ATTACHMENT_ID") == "null null\n"
        for host, own in ((self.client, CLIENT), (self.neighbour, NEIGHBOUR)):
            assert self.pings(host, machine.instance.ip), f"{host.name} does not reach eth0"
            assert machine.ask(own, machine.instance.ip) == machine.instance.ip

    def pings(self, host: Host, address: str, patience: int = 5) -> bool:
        return host.run("ping", "-c1", f"-W{patience}", address).returncode == 0


@pytest.fixture
def site(lab: Lab, tmp_path: Path) -> Site:
    return Site(lab, tmp_path)


@pytest.mark.parametrize("release", RELEASES)
def test_the_life_of_a_nat_instance_and_of_its_successors(
    site: Site, tmp_path: Path, release: str, record_property: Callable[[str, object], None]
) -> None:
    """Four starts of three hosts of one group. One of them is not a NAT instance but a plain host,
    and has the device names that udev gives of itself."""
    lab = site.lab
    disk = make_disk(
        lab,
        release,
        tmp_path / "nat",
        {
            "/etc/network/interfaces": NAT_INTERFACES,
            "/etc/nftables.conf": NFTABLES,
            "/etc/sysctl.d/nat.conf": "net.ipv4.ip_forward=1\n",
        },
        "systemctl enable nftables",
    )
    stanzas = INTERFACES.replace("eth0", "enp1s0").replace("eth1", "enp2s0")
    plain = make_disk(lab, release, tmp_path / "plain", {"/etc/network/interfaces": stanzas})

    # The first boot.
    first = site.boot(disk)
    answered, active = site.await_active(first)
    assert first.plugged
    record_property("power-on to the NIC's hot-plug", first.plugged)
    record_property("power-on to the address's first answer", answered)
    record_property("power-on to eni.service active", active)
    record_property("  of which eni.service", first.eni_service_took())
    site.check(first)
    site.check_forwarding()
    journal = first.sh("journalctl --no-pager --boot --unit eni --output cat")
    assert f"attached {site.eni} ({ENI}) as eth1" in journal
    assert len(journal.splitlines()) <= 8, journal
    assert site.attaches() == 1

    # A reboot: all again, but no second attach. Meanwhile a spare boots, and takes nothing. For
    # both, IMDS is out of reach during the first 20 s that they ask it.
    first.vm.reboot()
    first.start = time.monotonic()
    lab.aws.imds_up = False
    spare = site.boot(plain, options="")
    for machine in (first, spare):
        machine.await_sh("journalctl --boot --unit eni", lambda s: "IMDS, PUT" in s, 300)
    timer = threading.Timer(20, lambda: setattr(lab.aws, "imds_up", True))
    timer.start()
    _, active = site.await_active(first)
    record_property("reboot to eni.service active, two at once, IMDS late", active)
    timer.join()
    site.check(first)
    site.check_forwarding()
    spare.await_sh("journalctl --boot --unit eni", lambda s: "is held by" in s, 300)
    assert spare.vm.run("systemctl is-active eni.service").stdout.strip() == "activating"
    assert site.attaches() == 1
    assert site.holder() == first.instance.id

    # By hand: detach, and the spare has it within seconds, without a reboot.
    began = time.monotonic()
    first.sh("eni_ctl.py -d")
    answered, active = site.await_active(spare)
    released = first.start + first.unplugged - spare.start
    record_property("eni_ctl.py -d to the release", first.start + first.unplugged - began)
    record_property("release to the NIC's hot-plug at the waiting host", spare.plugged - released)
    record_property("release to the address's answer there", answered - released)
    record_property("release to its eni.service active", active - released)
    site.check_without(first)
    site.check(spare)
    assert spare.sh(". /etc/default/eni; echo $DEVICE") == "enp2s0\n"

    # The spare is killed; a replacement takes over while the group still ends it.
    first.vm.power_off()
    lab.aws.shutdown_delay = 600
    spare.vm.power_off()
    lab.aws.terminate(spare.instance)
    began = time.monotonic()
    heir = site.boot(disk)
    answered, active = site.await_active(heir)
    booted = heir.start - began
    record_property("kill to the NIC's hot-plug at the replacement", booted + heir.plugged)
    record_property("kill to the address's next answer", booted + answered)
    record_property("kill to its eni.service active", booted + active)
    record_property("  of which eni.service", heir.eni_service_took())
    site.check(heir)
    site.check_forwarding()
    assert lab.aws.instances[spare.instance.id].model.state != "terminated"

    # Stopped with the drop-in, it gives the ENI back; started, it takes it again. By hand, too.
    heir.write("/etc/systemd/system/eni.service.d/detach.conf", DETACH)
    heir.sh("systemctl daemon-reload")
    for stop, start in (
        ("systemctl stop eni.service", "systemctl start eni.service"),
        ("eni_ctl.py -d", "eni_ctl.py -a"),  # by hand
    ):
        heir.sh(stop)
        assert site.holder() is None
        site.check_without(heir)
        heir.sh(start)
        site.check(heir)


@pytest.mark.usefixtures("inside")
def test_the_unit_is_well_formed_and_tight() -> None:
    """Of systemd-analyze's scale, 0 is best and 10 worst."""
    command = ["systemd-analyze", "security", "--no-pager", "--offline=true", str(UNIT)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    exposure = re.search(r"Overall exposure level for eni.service: ([0-9.]+)", told)
    assert exposure
    assert float(exposure[1]) <= 1.5


def test_the_unit_verifies_with_the_drop_ins_of_the_readme(lab: Lab, subnet: str) -> None:
    machine = lab.launch(subnet)
    machine.write("/etc/systemd/system/eni.service", UNIT.read_text())
    machine.write("/etc/systemd/system/eni.service.d/detach.conf", DETACH)
    machine.write("/etc/systemd/system/eni.service.d/options.conf", OPTIONS)
    done = machine.run("systemd-analyze", "verify", "/etc/systemd/system/eni.service")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    command = re.findall("^ExecStart=(.+)$", OPTIONS, re.M)[-1]
    done = machine.run(*command.split(), "-t", "6")
    assert done.returncode == 4, done.stderr  # the options are right, but there is no such ENI
