"""A NAT instance by the README: clients reach the internet by the ENI, with the ENI's address.

Its ENI's source check is off, eth0's is on.
"""

from __future__ import annotations

import pytest
from lab import snippet
from lab.vpc import IMDS
from lab.world import (
    CLIENT,
    CONTAINER,
    ENI_NEIGHBOUR,
    ETH0,
    INTERNET,
    NEIGHBOUR,
    PLACES,
    Call,
    MakeHost,
    Peer,
    Place,
    Subject,
    World,
    device_mac,
    forward,
)

NFTABLES = snippet("# /etc/nftables.conf")
# What add_routes.service is started with: "--default eth1".
OPTIONS = snippet("# /etc/systemd/system/add_routes.service.d/default.conf").rpartition("--watch")[
    2
]
FORWARDED = """
table ip forwarded {
    chain prerouting {
        type nat hook prerouting priority dstnat;
        iifname "eth1" tcp dport 2222 dnat to CLIENT:7
    }
}
"""
CLIENTS = pytest.mark.parametrize(
    "where", [CLIENT, NEIGHBOUR, ENI_NEIGHBOUR], ids=["a third subnet", "eth0's", "the ENI's"]
)


def start(make_host: MakeHost, world: World, place: Place, strictness: int = 0) -> Subject:
    host = make_host(*OPTIONS.split())
    host.set_rp_filter(strictness)
    host.up("eth0", *ETH0)
    host.up("eth1", *place, options=["--default"])
    host.write("/etc/nftables.conf", NFTABLES)
    host.ok("nft", "-f", "/etc/nftables.conf")
    forward(host)
    world.vpc.set_source_check(device_mac("eth1"), False)
    host.works(host.talks(*ETH0, *place))
    return host


def peer_at(world: World, where: Place) -> Peer:
    (peer,) = [peer for peer in world.all if peer.addresses == where]
    return peer


@pytest.mark.parametrize("strictness", [0, 1, 2])
@CLIENTS
@PLACES
def test_a_client_in_each_subnet_reaches_the_internet(
    make_host: MakeHost, world: World, place: Place, where: Place, strictness: int
) -> None:
    host = start(make_host, world, place, strictness)
    world.route_in_vpc(INTERNET[0], place[0], source=where[0])
    host.settles([Call(peer_at(world, where), INTERNET[0], None, place[0])])


@CLIENTS
@PLACES
def test_a_clients_port_that_is_forwarded_to_is_reached_from_the_internet(
    make_host: MakeHost, world: World, place: Place, where: Place
) -> None:
    host = start(make_host, world, place)
    world.route_in_vpc(INTERNET[0], place[0], source=where[0])
    host.nft(FORWARDED.replace("CLIENT", where[0]))
    # What comes in by the ENI is forwarded by it, and so is masqueraded.
    host.settles([Call(world.internet, place[0], None, place[0], port=2222)])


@PLACES
def test_the_hosts_own_calls_leave_by_the_eni(
    make_host: MakeHost, world: World, place: Place
) -> None:
    host = start(make_host, world, place)
    host.settles(
        [
            *host.talks(*ETH0, *place),
            Call(host, INTERNET[0], None, place[0]),
            Call(host, INTERNET[1], None, place[1]),
            Call(host, CLIENT[0], None, place[0]),
            Call(host, IMDS[0], None, ETH0[0]),
            Call(host, NEIGHBOUR[0], None, ETH0[0]),  # its subnet is in main, by eth0 first
        ]
    )


@PLACES
def test_containers_on_it_reach_the_internet(
    make_host: MakeHost, world: World, place: Place
) -> None:
    host = start(make_host, world, place)
    container = host.add_container(*CONTAINER)
    host.settles([Call(container, INTERNET[0], None, place[0])])


@pytest.mark.parametrize("hooked", [True, False], ids=["its hook runs", "no hook runs"])
@PLACES
def test_when_the_eni_is_pulled_eth0_takes_over(
    make_host: MakeHost, world: World, place: Place, hooked: bool
) -> None:
    host = start(make_host, world, place)
    host.pull("eth1")
    if hooked:
        host.hook("eth1", "-r")
    host.settles([*host.talks(*ETH0), Call(host, INTERNET[0], None, ETH0[0])])


@PLACES
def test_the_eni_comes_back_and_clients_reach_the_internet_again(
    make_host: MakeHost, world: World, place: Place
) -> None:
    host = start(make_host, world, place)
    host.pull("eth1")
    host.hook("eth1", "-r")
    host.up("eth1", *place, options=["--default"])
    world.vpc.set_source_check(device_mac("eth1"), False)
    world.route_in_vpc(INTERNET[0], place[0], source=NEIGHBOUR[0])
    host.settles([*host.talks(*ETH0, *place), Call(world.neighbour, INTERNET[0], None, place[0])])
