"""Hosts where ifupdown or NetworkManager configures a hot-plugged device by itself: Debian 11's
image for EC2, and Debian 12 with NetworkManager. add_routes.service gives the ENI its routes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lab import Lab, snippet
from lab.boot import make_disk
from lab.vm import Image
from sites import ENABLE_NAT, ENI, NAT_FILES, PRIMARY, SPARE, Site

pytestmark = pytest.mark.timeout(0)  # none, each wait has its own: see PROCESSOR_TIME
HOSTS = {
    Image("bullseye", "cloud-ifupdown"): (
        "/etc/network/interfaces.d/eni",
        ["ifdown eth1; ifup eth1", "systemctl restart networking; ifup eth1"],
    ),
    Image("bookworm", "networkmanager"): (
        "/etc/NetworkManager/conf.d/80-eni.conf",
        [
            "nmcli device reapply eth1",
            "nmcli device connect eth1",
            "systemctl restart NetworkManager",
        ],
    ),
}


@pytest.mark.virtual_machine
@pytest.mark.parametrize("image", HOSTS, ids="-".join)
def test_the_life_of_a_host_that_configures_the_eni_by_itself(
    lab: Lab, tmp_path: Path, image: Image, record_property: Callable[[str, object], None]
) -> None:
    """It is a NAT instance with a unit that needs the ENI, and so is its spare."""
    site = Site(lab, tmp_path, ipv6=True)
    path, disturbances = HOSTS[image]
    own = snippet(f"# {path}")
    disk = make_disk(lab, image, tmp_path / "disk", {path: own, **NAT_FILES}, ENABLE_NAT)

    # The first boot.
    host = site.boot(disk, ip=PRIMARY[0], ipv6=PRIMARY[1:])
    _, active = site.await_active(host)
    record_property("power-on to eni.service active", active)
    site.check(host)
    site.check_main(host)
    site.check_forwarding()
    host.await_that(lambda: site.fetches(ENI))

    # What an administrator does, and what it costs.
    for command in disturbances:
        lost = site.pings_lost(host, command)
        record_property(f"{command}: pings lost, of five a second", lost)
        site.check_main(host)
        site.check_forwarding()

    # A second ENI, of another name, by hand.
    host.write(f"{path}-vpn", own.replace("eth1", "eth2"))
    site.check_a_second_eni(host)

    # A reboot with the ENI attached. Beside it a spare boots, where nothing waits but eni.service.
    attaches = site.attaches()
    host.vm.reboot()
    spare = site.boot(disk, ip=SPARE[0], ipv6=SPARE[1:])
    record_property("power-on to ssh, of a host that waits", site.await_ssh(spare))
    site.await_active(host)
    site.check(host)
    site.check_main(host)
    site.check_forwarding()
    assert spare.ordered_after("eni.service") == {"shutdown.target", "pages.service"}
    spare.await_sh("systemctl is-active multi-user.target", lambda s: s == "active")
    record_property("its start to multi-user.target", spare.reached_multi_user())
    assert spare.is_active("eni.service") == "activating"
    assert spare.is_active("pages.service") == "inactive"
    assert site.attaches() == attaches

    # Stopped with the drop-in, the host gives the ENI back, and the spare has it.
    site.add_detach_drop_in(host)
    host.sh("systemctl stop eni.service")
    site.await_active(spare)
    site.check_without(host)
    site.check_main(host)
    site.check(spare)
    site.check_main(spare)
    site.check_forwarding()
    spare.await_that(lambda: site.fetches(ENI))

    # The spare is killed, and the host takes the ENI over, while the group still ends the spare.
    site.kill(spare)
    host.sh("systemctl start eni.service")
    site.check(host)
    site.check_main(host)
    site.check_forwarding()
    host.await_that(lambda: site.fetches(ENI))

    # By hand: detach.
    host.sh("eni_ctl.py -d")
    site.check_without(host)
    site.check_main(host)
