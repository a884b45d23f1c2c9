"""What main says of other destinations, now and later, goes for each address by its own device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from lab.outcomes import Outcome, needs
from lab.world import (
    ENI_NEIGHBOUR,
    ENI_POD,
    ETH0,
    FAMILIES,
    NEIGHBOUR,
    OTHER,
    PLACES,
    POD,
    SAME,
    Call,
    MakeHost,
    Peer,
    Place,
    Subject,
    World,
    bulk,
    of_family,
)

PODS = {4: "10.244.1.0/24", 6: "fd00:244:1::/64"}
ENI_PODS = {4: "10.244.2.0/24", 6: "fd00:244:2::/64"}
NOBODY = {4: "10.0.1.99", 6: "2001:db8:0:1::99"}


def start(host: Subject, place: Place, route: str = "") -> None:
    """Both devices are up; a route by eth0 is there before the hooks run."""
    host.plug("eth0", *ETH0)
    host.configure("eth0", *ETH0)
    if route:
        host.run_ip(route)
    host.hook("eth0")
    host.up("eth1", *place)
    host.works(host.talks(*ETH0, *place))


@PLACES
@FAMILIES
def test_pods_are_reached_by_a_route_that_was_there(
    make_host: MakeHost, world: World, place: Place, family: int
) -> None:
    host = make_host()
    pod = world.add_pod(world.neighbour, *POD)
    gateway, address = of_family(family, [NEIGHBOUR[0], NEIGHBOUR[1], ETH0[0], ETH0[1]])
    start(host, place, f"route add {PODS[family]} via {gateway} dev eth0")
    host.settles(host.talks(address, peers=[pod, *world.all]))


@PLACES
@FAMILIES
def test_pods_are_reached_by_a_route_that_enters_main_later(
    make_host: MakeHost, world: World, place: Place, family: int
) -> None:
    host = make_host()
    pod = world.add_pod(world.neighbour, *POD)
    start(host, place)
    (gateway,) = of_family(family, NEIGHBOUR)
    (address,) = of_family(family, ETH0)
    host.run_ip(f"route add {PODS[family]} via {gateway} dev eth0")
    host.settles(host.talks(address, peers=[pod, *world.all]))


@PLACES
@FAMILIES
def test_pods_are_reached_when_their_route_changes(
    make_host: MakeHost, world: World, place: Place, family: int
) -> None:
    host = make_host()
    pod = world.add_pod(world.neighbour, *POD)
    start(host, place, f"route add {PODS[family]} via {NOBODY[family]} dev eth0")
    (gateway,) = of_family(family, NEIGHBOUR)
    (address,) = of_family(family, ETH0)
    host.run_ip(f"route replace {PODS[family]} via {gateway} dev eth0")
    host.settles(host.talks(address, peers=[pod, *world.all]))


@PLACES
@FAMILIES
def test_the_vpc_is_reached_when_a_wrong_route_goes(
    make_host: MakeHost, world: World, place: Place, family: int
) -> None:
    host = make_host()
    there = {4: "10.0.2.0/24", 6: "2001:db8:0:2::/64"}[family]
    host.plug("eth0", *ETH0)
    host.configure("eth0", *ETH0)
    host.run_ip(f"route add {there} via {NOBODY[family]} dev eth0")
    host.hook("eth0")
    host.up("eth1", *place)
    (address,) = of_family(family, ETH0)
    host.works(host.talks(address, peers=[world.neighbour]))
    host.run_ip(f"route del {there} via {NOBODY[family]} dev eth0")
    host.settles(host.talks(address))


@FAMILIES
@pytest.mark.parametrize(
    "when",
    ["before", pytest.param("later", marks=needs(hooks=Outcome.ANOTHER_RUN))],
)
def test_pods_behind_the_enis_neighbour_are_reached(
    make_host: MakeHost, world: World, family: int, when: str
) -> None:
    host = make_host()
    pod = world.add_pod(world.eni_neighbour, *ENI_POD)
    (gateway,) = of_family(family, ENI_NEIGHBOUR)
    (address,) = of_family(family, OTHER)
    route = f"route add {ENI_PODS[family]} via {gateway} dev eth1"
    host.up("eth0", *ETH0)
    host.plug("eth1", *OTHER)
    host.configure("eth1", *OTHER)
    if when == "before":
        host.run_ip(route)
    host.hook("eth1")
    host.works(host.talks(*ETH0, *OTHER))
    if when == "later":
        host.run_ip(route)
    host.settles(host.talks(address, peers=[pod, *world.all]))


@PLACES
@FAMILIES
def test_pods_are_reached_by_a_route_over_several_gateways(
    make_host: MakeHost, world: World, place: Place, family: int
) -> None:
    host = make_host()
    pod = world.add_pod(world.neighbour, *POD)
    (gateway,) = of_family(family, NEIGHBOUR)
    (address,) = of_family(family, ETH0)
    second = {4: "10.0.1.61", 6: "2001:db8:0:1::61"}[family]
    world.give(world.neighbour, second)
    hops = " ".join(f"nexthop via {hop} dev eth0 weight 1" for hop in (gateway, second))
    start(host, place, f"route add {PODS[family]} {hops}")
    host.settles(host.talks(address, peers=[pod, *world.all]))


@FAMILIES
def test_of_a_route_over_both_devices_each_address_takes_its_own_part(
    make_host: MakeHost, world: World, family: int
) -> None:
    host = make_host()
    pods = [world.add_pod(gateway, *POD) for gateway in (world.neighbour, world.eni_neighbour)]
    hops = []
    for device, addresses in (("eth0", NEIGHBOUR), ("eth1", ENI_NEIGHBOUR)):
        (gateway,) = of_family(family, addresses)
        hops.append(f"nexthop via {gateway} dev {device} weight 1")
    host.up("eth0", *ETH0)
    host.plug("eth1", *OTHER)
    host.configure("eth1", *OTHER)
    host.run_ip(f"route add {PODS[family]} {' '.join(hops)}")
    host.hook("eth1")
    host.hook("eth0")
    calls = []
    for pod, addresses in zip(pods, (ETH0, OTHER)):
        calls += host.talks(*of_family(family, addresses), peers=[pod])
    host.settles(calls)


@pytest.mark.parametrize("what", ["a nexthop object", "a group of nexthop objects"])
@PLACES
@FAMILIES
def test_pods_are_reached_by_nexthop_objects(
    make_host: MakeHost, world: World, place: Place, family: int, what: str
) -> None:
    host = make_host()
    pod = world.add_pod(world.neighbour, *POD)
    (gateway,) = of_family(family, NEIGHBOUR)
    (address,) = of_family(family, ETH0)
    host.plug("eth0", *ETH0)
    host.configure("eth0", *ETH0)
    host.run_ip(f"nexthop add id 10 via {gateway} dev eth0")
    host.run_ip("nexthop add id 20 group 10")
    number = 10 if what == "a nexthop object" else 20
    host.run_ip(f"-{family} route add {PODS[family]} nhid {number}")
    host.hook("eth0")
    host.up("eth1", *place)
    host.settles(host.talks(address, peers=[pod, *world.all]))


@pytest.mark.parametrize("attribute", ["mtu 1280", "mtu lock 1280", "advmss 1100"])
@PLACES
def test_a_route_keeps_its_mtu_and_its_mss(
    make_host: MakeHost, world: World, place: Place, attribute: str
) -> None:
    """Larger packets than it allows get lost at the neighbour, and nobody says so."""
    host = make_host()
    pod = world.add_pod(world.neighbour, *POD)
    start(host, place, f"route add {PODS[4]} via {NEIGHBOUR[0]} dev eth0 {attribute}")
    # An MTU limits what the host sends, an MSS what it is sent.
    device = f"br{pod.init.pid}" if "mtu" in attribute else "eth0"
    with large_packets_get_lost(world.neighbour, device):
        host.settles([*host.talks(ETH0[0], peers=[pod]), *bulk(pod, ETH0[0]), *bulk(host, POD[0])])


HOLE = """
table inet hole {
    chain output {
        type filter hook output priority filter;
        icmp type destination-unreachable drop
    }
}
"""


@contextlib.contextmanager
def large_packets_get_lost(gateway: Peer, device: str) -> Iterator[None]:
    """On their way out of the gateway by a device."""
    gateway.nft(HOLE)
    gateway.ip("link", "set", device, "mtu", "1280")
    try:
        yield
    finally:
        gateway.ip("link", "set", device, "mtu", "1500")
        gateway.nft("delete table inet hole")


def test_a_route_by_a_gateway_that_is_in_no_subnet_is_kept(
    make_host: MakeHost, world: World
) -> None:
    host = make_host()
    pod = world.add_pod(world.neighbour, *POD)
    world.neighbour.ip("addr", "replace", "192.0.2.1/32", "dev", "eth0")
    world.vpc.own(world.mac_of["neighbour"], "192.0.2.1")
    start(host, SAME, f"route add {PODS[4]} via 192.0.2.1 dev eth0 onlink")
    host.settles(host.talks(ETH0[0], peers=[pod]))


def test_an_ipv4_route_by_an_ipv6_gateway_is_kept(make_host: MakeHost, world: World) -> None:
    host = make_host()
    pod = world.add_pod(world.neighbour, *POD)
    start(host, SAME, f"route add {PODS[4]} via inet6 {NEIGHBOUR[1]} dev eth0")
    host.settles(host.talks(ETH0[0], peers=[pod]))


@pytest.mark.parametrize("kind", ["unreachable", "prohibit", "blackhole"])
def test_what_main_forbids_is_forbidden_to_both_addresses(
    make_host: MakeHost, world: World, kind: str
) -> None:
    host = make_host()
    (client,) = of_family(4, world.client.addresses)
    host.up("eth0", *ETH0)
    host.up("eth1", *OTHER)
    host.works(host.talks(*ETH0, *OTHER))
    host.run_ip(f"route add {kind} {client}/32")
    peers = [world.neighbour, world.eni_neighbour, world.internet]
    denied = [Call(host, client, source, "") for source in (ETH0[0], OTHER[0])]
    host.settles([*host.talks(ETH0[0], OTHER[0], peers=peers), *denied])


@needs(hooks=Outcome.ANOTHER_RUN)
@PLACES
def test_the_eni_talks_after_its_link_was_down(make_host: MakeHost, place: Place) -> None:
    """The kernel drops a device's routes and its IPv6 addresses then, and brings few back."""
    host = make_host()
    start(host, place)
    host.bounce("eth1", *place)
    host.settles(host.talks(*ETH0, *place))


@needs(hooks=Outcome.ANOTHER_RUN)
@PLACES
def test_eth0_talks_after_its_link_was_down(make_host: MakeHost, place: Place) -> None:
    host = make_host()
    start(host, place)
    host.bounce("eth0", *ETH0)
    host.settles(host.talks(*ETH0, *place))


@needs(hooks=Outcome.ANOTHER_RUN)
@PLACES
def test_both_talk_after_somebody_has_deleted_all_rules_and_routes(
    make_host: MakeHost, place: Place
) -> None:
    host = make_host()
    start(host, place)
    host.delete_all_of_ours()
    host.settles(host.talks(*ETH0, *place))


@needs(hooks=Outcome.ANOTHER_RUN)
def test_an_address_that_comes_during_a_storm_of_routes_talks(
    make_host: MakeHost, world: World
) -> None:
    """Thousands of routes by eth0 come and go in main."""
    host = make_host()
    second = "10.0.3.23"
    host.up("eth0", *ETH0)
    host.plug("eth1", *OTHER, second)
    host.configure("eth1", *OTHER)
    host.hook("eth1")
    host.works(host.talks(*ETH0, *OTHER))
    with host.storm(NEIGHBOUR[0]):
        host.add_address("eth1", f"{second}/24")
        host.settles(host.talks(*ETH0, *OTHER, second))
