"""Each address of the host answers everybody and calls everybody."""

from __future__ import annotations

import pytest
from lab import snippet
from lab.outcomes import Outcome, needs
from lab.vpc import IMDS
from lab.world import (
    ETH0,
    FAMILIES,
    LARGE,
    OTHER,
    PLACES,
    SAME,
    Call,
    MakeHost,
    Place,
    World,
    device_mac,
    of_family,
)

# A secondary address of the ENI, by family and place.
SECOND = {
    (4, SAME): "10.0.1.23",
    (6, SAME): "2001:db8:0:1::23",
    (4, OTHER): "10.0.3.23",
    (6, OTHER): "2001:db8:0:3::23",
}
DELEGATED = snippet("# At each boot, for a prefix that is delegated to the ENI")
ON_LO = snippet("# At each boot, for an address of the ENI on lo")
WIDE = {4: 24, 6: 64}
FULL = {4: 32, 6: 128}


def in_place(place: Place, text: str) -> str:
    """README's words, for an ENI in another subnet, or the same for one in eth0's."""
    if place == OTHER:
        return text
    return text.replace("10.0.3.", "10.0.1.").replace("2001:db8:0:3:", "2001:db8:0:1:")


@pytest.mark.parametrize(
    "place", [SAME, OTHER, LARGE], ids=["same subnet", "other subnet", "a subnet of 4096"]
)
@FAMILIES
def test_both_addresses_answer_and_call(make_host: MakeHost, place: Place, family: int) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    main = host.ip("route") + host.ip("-6", "route")
    host.up("eth1", *place)
    (eth0,) = of_family(family, ETH0)
    (eni,) = of_family(family, place)
    (imds,) = of_family(family, IMDS)
    host.settles(
        [
            *host.talks(eth0, eni),
            Call(host, imds, eth0, eth0),
            Call(host, imds, eni, eni),
            Call(host, imds, None, eth0),
            Call(host, eni, eth0, eth0),
            Call(host, eth0, eni, eni),
        ]
    )
    now = host.ip("route") + host.ip("-6", "route")
    host.must(set(main.splitlines()) <= set(now.splitlines()), f"main was {main}")


@PLACES
def test_it_does_not_matter_which_device_comes_up_first(make_host: MakeHost, place: Place) -> None:
    host = make_host()
    host.up("eth1", *place)
    host.up("eth0", *ETH0)
    host.settles(host.talks(*ETH0, *place))


@pytest.mark.parametrize("strictness", [0, 1, 2])
@PLACES
def test_every_reverse_path_filter_lets_both_addresses_talk(
    make_host: MakeHost, place: Place, strictness: int
) -> None:
    host = make_host()
    host.set_rp_filter(strictness)
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    host.settles(host.talks(*of_family(4, [*ETH0, *place])))


@needs(hooks=Outcome.ANOTHER_RUN)
@PLACES
@FAMILIES
def test_an_address_that_the_eni_gets_later_talks(
    make_host: MakeHost, place: Place, family: int
) -> None:
    host = make_host()
    second = SECOND[family, place]
    host.up("eth0", *ETH0)
    host.plug("eth1", *place, second)
    host.configure("eth1", *place)
    host.hook("eth1")
    host.works(host.talks(*ETH0, *place))
    host.add_address("eth1", f"{second}/{WIDE[family]}")
    host.settles(host.talks(*ETH0, *place, second))


@needs(hooks=Outcome.ANOTHER_RUN)
@FAMILIES
def test_an_address_that_moves_from_eth0_to_the_eni_talks(
    make_host: MakeHost, world: World, family: int
) -> None:
    host = make_host()
    moving = SECOND[family, SAME]
    host.plug("eth0", *ETH0, moving)
    host.configure("eth0", *ETH0, moving)
    host.hook("eth0")
    host.up("eth1", *SAME)
    host.works(host.talks(*ETH0, *SAME, moving))
    host.ip("addr", "del", f"{moving}/{WIDE[family]}", "dev", "eth0")
    world.vpc.own(device_mac("eth1"), moving)
    world.vpc.disown(device_mac("eth0"), moving)
    host.add_address("eth1", f"{moving}/{WIDE[family]}")
    world.forget_neighbours()
    host.settles(host.talks(*ETH0, *SAME, moving))


@PLACES
def test_the_end_of_an_alias_leaves_its_device_alone(make_host: MakeHost, place: Place) -> None:
    host = make_host()
    second = SECOND[4, place]
    host.up("eth0", *ETH0)
    host.plug("eth1", *place, second)
    host.configure("eth1", *place)
    host.hook("eth1")
    host.ip("addr", "add", f"{second}/24", "dev", "eth1", "label", "eth1:0")
    host.hook("eth1:0")
    host.works(host.talks(*ETH0, *place, second))
    host.hook("eth1:0", "-r")
    host.ip("addr", "del", f"{second}/24", "dev", "eth1")
    host.settles(host.talks(*ETH0, *place))


@PLACES
@FAMILIES
def test_an_address_without_a_subnet_may_come_first(
    make_host: MakeHost, place: Place, family: int
) -> None:
    host = make_host()
    second = SECOND[family, place]
    host.up("eth0", *ETH0)
    host.plug("eth1", *place, second)
    host.ip("link", "set", "eth1", "up")
    host.add_address("eth1", f"{second}/{FULL[family]}")
    host.configure("eth1", *place)
    host.hook("eth1")
    host.settles(host.talks(*ETH0, *place, second))


@pytest.mark.parametrize("network", ["", "10.0.3.0/24"], ids=["no option", "n"])
def test_an_address_of_elsewhere_may_come_first(
    make_host: MakeHost, world: World, network: str
) -> None:
    """A virtual IP address that the VPC's route tables send to the ENI."""
    host = make_host()
    virtual = "172.31.9.9"
    host.up("eth0", *ETH0)
    host.plug("eth1", *OTHER)
    world.vpc.own(device_mac("eth1"), virtual)
    world.route_in_vpc(virtual, OTHER[0])
    host.ip("link", "set", "eth1", "up")
    host.add_address("eth1", f"{virtual}/32")
    host.configure("eth1", *OTHER)
    host.hook("eth1", *(["-n", network] if network else []))
    host.settles(host.talks(*ETH0, *OTHER, virtual))


@PLACES
@FAMILIES
def test_an_address_that_is_no_longer_preferred_talks(
    make_host: MakeHost, place: Place, family: int
) -> None:
    host = make_host()
    second = SECOND[family, place]
    host.up("eth0", *ETH0)
    host.plug("eth1", *place, second)
    host.configure("eth1", *place)
    host.add_address("eth1", f"{second}/{WIDE[family]}", "preferred_lft", "0")
    host.hook("eth1")
    host.settles(host.talks(*ETH0, *place, second))


@FAMILIES
def test_an_eni_whose_only_address_is_no_longer_preferred_talks(
    make_host: MakeHost, family: int
) -> None:
    host = make_host()
    (address,) = of_family(family, OTHER)
    host.up("eth0", *ETH0)
    host.plug("eth1", address)
    host.ip("link", "set", "eth1", "up")
    host.add_address("eth1", f"{address}/{WIDE[family]}", "preferred_lft", "0")
    host.add_default_routes("eth1", address)
    host.hook("eth1")
    host.hook("eth1")  # a second look at the same address
    host.settles(host.talks(*ETH0, address))


@PLACES
def test_an_ipv6_address_that_is_still_being_probed_will_talk(
    make_host: MakeHost, place: Place
) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    host.plug("eth1", *place)
    host.configure("eth1", *of_family(4, place))
    (address,) = of_family(6, place)
    host.ip("addr", "add", f"{address}/64", "dev", "eth1")  # without nodad
    host.hook("eth1")
    host.awaits(lambda: host.ip("-6", "addr", "show", "tentative") == "")
    host.settles(host.talks(*ETH0, *place))


def test_an_ipv6_address_that_somebody_else_has_harms_no_other(
    make_host: MakeHost, world: World
) -> None:
    host = make_host()
    taken = of_family(6, world.neighbour.addresses)[0]
    host.up("eth0", *ETH0)
    host.plug("eth1", *SAME, taken)
    host.configure("eth1", *SAME)
    host.ip("addr", "add", f"{taken}/64", "dev", "eth1")
    host.awaits(lambda: "dadfailed" in host.ip("-6", "addr", "show", "dev", "eth1"))
    host.hook("eth1")
    host.settles(host.talks(*ETH0, *SAME))


def test_an_eni_with_ipv6_alone_talks(make_host: MakeHost) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    host.up("eth1", *of_family(6, OTHER))
    host.settles(host.talks(*ETH0, *of_family(6, OTHER)))


def test_an_eni_with_ipv6_on_a_host_without_talks(make_host: MakeHost) -> None:
    host = make_host()
    host.up("eth0", *of_family(4, ETH0))
    host.up("eth1", *OTHER)
    host.settles(host.talks(*of_family(4, ETH0), *OTHER))


@needs(hooks=Outcome.SNIPPET, watch=Outcome.SNIPPET)
@PLACES
@FAMILIES
def test_an_address_of_the_eni_on_lo_talks(
    make_host: MakeHost, world: World, place: Place, family: int
) -> None:
    host = make_host()
    on_lo = in_place(place, {4: "10.0.3.99", 6: "2001:db8:0:3::99"}[family])
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    world.vpc.own(device_mac("eth1"), on_lo)
    world.map_address(on_lo, "eth1")
    host.add_address("lo", f"{on_lo}/{FULL[family]}")
    rules = in_place(place, ON_LO)
    host.settles(host.talks(*ETH0, *place, on_lo), lambda: host.run_lines(rules))


@needs(hooks=Outcome.SNIPPET, watch=Outcome.SNIPPET)
@PLACES
@FAMILIES
def test_a_container_with_an_address_of_the_enis_prefix_talks(
    make_host: MakeHost, world: World, place: Place, family: int
) -> None:
    """The VPC delegates a prefix to the ENI, and containers have its addresses."""
    host = make_host()
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    address = in_place(place, {4: "10.0.3.70", 6: "2001:db8:0:3:64::2"}[family])
    world.vpc.own(device_mac("eth1"), address)
    world.map_address(address, "eth1")
    container = host.add_container(address, length={4: 28, 6: 80}[family])
    calls = host.talks(*ETH0, *place)
    for peer in world.all:
        (theirs,) = of_family(family, peer.addresses)
        calls.append(Call(peer, address, theirs, theirs))
        calls.append(Call(container, theirs, None, address))
    rules = in_place(place, DELEGATED)
    host.settles(calls, lambda: host.run_lines(rules))
