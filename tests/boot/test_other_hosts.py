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
from sites import PRIMARY, Site

pytestmark = pytest.mark.timeout(4000)  # each wait has its own end, see PROCESSOR_TIME
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
    site = Site(lab, tmp_path, ipv6=True)
    path, disturbances = HOSTS[image]
    disk = make_disk(lab, image, tmp_path / "disk", {path: snippet(f"# {path}")})

    # The first boot.
    host = site.boot(disk, ip=PRIMARY[0], ipv6=PRIMARY[1:])
    _, active = site.await_active(host)
    record_property("power-on to eni.service active", active)
    site.check(host)
    site.check_main(host)

    # What an administrator does, and what it costs.
    for command in disturbances:
        lost = site.pings_lost(host, command)
        record_property(f"{command}: pings lost, of five a second", lost)
        site.check_main(host)

    # A reboot with the ENI attached.
    host.vm.reboot()
    site.await_active(host)
    site.check(host)
    site.check_main(host)
    assert site.attaches() == 1

    # By hand: detach.
    host.sh("eni_ctl.py -d")
    site.check_without(host)
    site.check_main(host)
