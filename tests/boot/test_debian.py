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
from lab import README, TOP, Lab, files_of_readme, nat_interfaces, snippet
from lab.boot import make_disk
from lab.vm import RELEASES, Image
from sites import ENI, NAT_FILES, Site

pytestmark = pytest.mark.timeout(0)  # none, each wait has its own: see PROCESSOR_TIME
INTERFACES = snippet("# /etc/network/interfaces")
NAT_INTERFACES = nat_interfaces()
OPTIONS = snippet("# /etc/systemd/system/eni.service.d/options.conf")
# The disk that it is run on is not running yet.
SERVICE = snippet("install -m 755 add_routes.py /usr/local/sbin/").replace(" --now", "")
UNITS = (TOP / "systemd/eni.service", TOP / "systemd/add_routes.service")


@pytest.fixture
def site(lab: Lab, tmp_path: Path) -> Site:
    return Site(lab, tmp_path)


@pytest.mark.virtual_machine
@pytest.mark.parametrize("release", RELEASES)
def test_the_life_of_a_nat_instance_and_of_its_successors(
    site: Site, tmp_path: Path, release: str, record_property: Callable[[str, object], None]
) -> None:
    """Four starts of three hosts of one group. One of them is not a NAT instance but a plain host:
    with the device names that udev gives of itself, add_routes.service in the place of hooks, a
    unit that needs the ENI, and a kernel hardened against user namespaces."""
    lab, image = site.lab, Image(release)
    disk = make_disk(
        lab,
        image,
        tmp_path / "nat",
        {
            "/etc/network/interfaces": NAT_INTERFACES,
            "/etc/nftables.conf": NAT_FILES["/etc/nftables.conf"],
            "/etc/sysctl.d/nat.conf": "net.ipv4.ip_forward=1\n",
        },
        "systemctl enable nftables",
    )
    stanzas = INTERFACES.replace("eth0", "enp1s0").replace("eth1", "enp2s0")
    plain = make_disk(
        lab,
        image,
        tmp_path / "plain",
        {
            "/etc/network/interfaces": re.sub(".*add_routes.py.*\n", "", stanzas),
            "/etc/sysctl.d/hardened.conf": "user.max_user_namespaces=0\n",
            "/etc/systemd/system/pages.service": NAT_FILES["/etc/systemd/system/pages.service"],
        },
        f"{SERVICE}\nsystemctl enable pages.service",
    )

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
    site.check_journal(first, "--unit eni", f"({ENI}) as eth1", most=6)
    assert site.attaches() == 1

    # A reboot: all again, but no second attach. Meanwhile a spare boots, and takes nothing. For
    # both, IMDS is out of reach during the first 20 s that they ask it.
    first.vm.reboot()
    first.start = time.monotonic()
    lab.aws.imds_up = False
    spare = site.boot(plain, options="")
    for machine in (first, spare):
        machine.await_sh("journalctl --boot --unit eni", lambda s: "IMDS, PUT" in s)
    timer = threading.Timer(20, lambda: setattr(lab.aws, "imds_up", True))
    timer.start()
    _, active = site.await_active(first)
    record_property("reboot to eni.service active, two at once, IMDS late", active)
    timer.join()
    site.check(first)
    site.check_forwarding()
    spare.await_sh("journalctl --boot --unit eni", lambda s: "is held by" in s)
    # The spare's boot has not waited for the ENI; the unit that needs it does.
    assert spare.ordered_after("eni.service") == {"shutdown.target", "pages.service"}
    spare.await_sh("systemctl is-active multi-user.target", lambda s: s == "active")
    assert spare.is_active("eni.service") == "activating"
    assert spare.is_active("pages.service") == "inactive"
    assert spare.is_active("add_routes.service") == "active"
    for machine, which in ((first, "that gets its ENI"), (spare, "that waits for it")):
        record_property(f"multi-user.target of a host {which}", machine.reached_multi_user())
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
    spare.await_sh("systemctl is-active pages.service", lambda s: s == "active")
    spare.await_that(lambda: site.fetches(ENI))
    journal = spare.sh("journalctl --no-pager --boot --unit add_routes --output cat")
    assert len(re.findall("^add_routes.py: ", journal, re.M)) <= 6, journal

    # The spare is killed; a replacement takes over while the group still ends it.
    first.vm.power_off()
    site.kill(spare)
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
    site.add_detach_drop_in(heir)
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
@pytest.mark.parametrize(("name", "limit"), [("eni", 1.6), ("add_routes", 1.4)])
def test_the_units_are_as_tight_as_the_readme_says(name: str, limit: float) -> None:
    unit = TOP / f"systemd/{name}.service"
    command = ["systemd-analyze", "security", "--no-pager", "--offline=true", str(unit)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    exposure = re.search(r"Overall exposure level for .*: ([0-9.]+)", told)
    assert exposure
    assert f"rates `{name}.service` {exposure[1]} (0 is" in README.replace("\n", " ")
    assert float(exposure[1]) <= limit


def test_the_units_verify_with_all_drop_ins_of_the_readme(lab: Lab, subnet: str) -> None:
    machine = lab.launch(subnet)
    for unit in UNITS:
        machine.write(f"/etc/systemd/system/{unit.name}", unit.read_text())
    files = files_of_readme("/etc/systemd/system")
    assert len(files) >= 5
    for path, text in files.items():
        machine.write(path, text)
    names = [*(unit.name for unit in UNITS), "pages.service"]
    done = machine.run("systemd-analyze", "verify", *names)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_options_of_the_readme_are_understood(lab: Lab, subnet: str) -> None:
    machine = lab.launch(subnet)
    command = re.findall("^ExecStart=(.+)$", OPTIONS, re.M)[-1]
    done = machine.run(*command.split())
    assert done.returncode == 4, done.stderr  # they are right, but there is no such ENI
