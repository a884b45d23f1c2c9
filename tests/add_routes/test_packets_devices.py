"""Several devices: whoever is served, nobody is cut off."""

from __future__ import annotations

import pytest
from lab.vpc import V6_ROUTER
from lab.world import (
    ETH0,
    FAMILIES,
    INTERNET,
    PLACES,
    SAME,
    Call,
    MakeHost,
    Place,
    World,
    of_family,
)

# A third device, in eth0's subnet, the ENI's, or one of its own.
THIRDS = {
    "in eth0's subnet": ("10.0.1.33", "2001:db8:0:1::33"),
    "in the ENI's subnet": ("10.0.3.33", "2001:db8:0:3::33"),
    "in its own subnet": ("10.0.16.33", "2001:db8:0:4::33"),
}


@PLACES
@FAMILIES
def test_eth0_talks_without_a_hook_of_its_own(
    make_host: MakeHost, place: Place, family: int
) -> None:
    host = make_host("-d", "eth1")
    host.plug("eth0", *ETH0)
    host.configure("eth0", *ETH0)
    host.up("eth1", *place)
    host.settles(host.talks(*of_family(family, [*ETH0, *place])))


@PLACES
@FAMILIES
def test_eth0_talks_without_a_hook_of_its_own_beside_an_eni_with_default(
    make_host: MakeHost, place: Place, family: int
) -> None:
    """Else the administrator is locked out."""
    host = make_host("-d", "eth1", "--default", "eth1")
    host.plug("eth0", *ETH0)
    host.configure("eth0", *ETH0)
    host.up("eth1", *place, options=["--default"])
    (eni,) = of_family(family, place)
    (internet,) = of_family(family, INTERNET)
    host.settles(
        [*host.talks(*of_family(family, [*ETH0, *place])), Call(host, internet, None, eni)]
    )


@PLACES
def test_eth0_talks_when_its_hook_ran_before_it_had_an_address(
    make_host: MakeHost, place: Place
) -> None:
    host = make_host()
    host.plug("eth0", *ETH0)
    host.hook("eth0")
    host.configure("eth0", *ETH0)
    host.up("eth1", *place)
    host.settles(host.talks(*ETH0, *place))


@pytest.mark.parametrize("third", list(THIRDS))
@PLACES
def test_a_third_device_that_is_nobodys_harms_no_other(
    make_host: MakeHost, place: Place, third: str
) -> None:
    host = make_host("-d", "eth0", "-d", "eth1")
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    host.plug("eth2", *THIRDS[third])
    host.configure("eth2", *THIRDS[third], metric=3000)
    host.run_again_if_hooks()
    host.settles(host.talks(*ETH0, *place))


@pytest.mark.parametrize("third", list(THIRDS))
@PLACES
def test_three_devices_talk(make_host: MakeHost, place: Place, third: str) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    host.up("eth2", *THIRDS[third])
    host.settles(host.talks(*ETH0, *place, *THIRDS[third]))


@PLACES
def test_of_two_enis_one_goes_and_the_other_talks_on(make_host: MakeHost, place: Place) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    host.up("eth2", *THIRDS["in the ENI's subnet"])
    host.works(host.talks(*ETH0, *place, *THIRDS["in the ENI's subnet"]))
    host.pull("eth1")
    host.hook("eth1", "-r")
    host.settles(host.talks(*ETH0, *THIRDS["in the ENI's subnet"]))


@PLACES
@FAMILIES
def test_mains_default_route_moves_to_the_eni_and_back(
    make_host: MakeHost, world: World, place: Place, family: int
) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    (eth0,) = of_family(family, ETH0)
    (eni,) = of_family(family, place)
    (internet,) = of_family(family, INTERNET)
    before, after = (
        V6_ROUTER if family == 6 else world.vpc.router_of(address) for address in (eth0, eni)
    )
    host.run_ip(f"-{family} route del default dev eth0")
    host.run_ip(f"-{family} route add default via {after} dev eth1 metric 50")
    host.settles([*host.talks(eth0, eni), Call(host, internet, None, eni)])
    host.run_ip(f"-{family} route add default via {before} dev eth0 metric 10")
    host.run_ip(f"-{family} route del default dev eth1 metric 50")
    host.settles([*host.talks(eth0, eni), Call(host, internet, None, eth0)])


@PLACES
def test_both_talk_when_main_loses_its_default_routes(make_host: MakeHost, place: Place) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    host.works(host.talks(*ETH0, *place))
    for family in (4, 6):
        for device in ("eth0", "eth1"):
            host.run_ip(f"-{family} route del default dev {device}")
    host.run_again_if_hooks()
    host.settles(host.talks(*ETH0, *place))


@PLACES
def test_ifdown_of_the_eni_leaves_eth0_alone(make_host: MakeHost, place: Place) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    host.works(host.talks(*ETH0, *place))
    host.down("eth1")
    host.settles([*host.talks(*ETH0), Call(host, INTERNET[0], None, ETH0[0])])


@PLACES
def test_the_removal_of_eth0s_routing_leaves_the_eni_alone(
    make_host: MakeHost, place: Place
) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    host.works(host.talks(*ETH0, *place))
    host.hook("eth0", "-r")
    host.settles(host.talks(*place))


@PLACES
def test_hooks_of_all_devices_may_run_at_once(make_host: MakeHost, place: Place) -> None:
    host = make_host()
    for device, addresses in (("eth0", ETH0), ("eth1", place)):
        host.plug(device, *addresses)
        host.configure(device, *addresses)
    host.hooks_at_once("eth0", "eth1", "eth0", "eth1")
    host.settles(host.talks(*ETH0, *place))


def test_a_device_with_another_name_talks(make_host: MakeHost) -> None:
    host = make_host("-d", "en*")
    host.plug("ens5", *ETH0)
    host.configure("ens5", *ETH0, metric=0)
    host.hook("ens5")
    host.up("ens6", *SAME)
    host.settles(host.talks(*ETH0, *SAME))
