"""Programs that change the network after `up`: dhclient, keepalived, radvd, systemd-networkd."""

from __future__ import annotations

import pytest
from lab.daemons import Networkd, start_dhclient, start_keepalived, start_radvd
from lab.outcomes import Outcome, needs
from lab.vpc import V6_ROUTER
from lab.world import (
    ENI_NEIGHBOUR,
    ETH0,
    OTHER,
    PLACES,
    SAME,
    MakeHost,
    Peer,
    Place,
    RecordProperty,
    Subject,
    World,
    device_mac,
    forward,
    of_family,
    pinging,
)

LEASED = {"eth0": ETH0[0], "eth1": OTHER[0]}
ANOTHER = {"eth0": "10.0.1.77", "eth1": "10.0.3.77"}
DEVICES = pytest.mark.parametrize("device", ["eth0", "eth1"])


def start_leased(make_host: MakeHost, world: World, device: str) -> Subject:
    """Of two devices, one has its IPv4 address by DHCP."""
    host = make_host()
    world.start_dhcp()
    for name, addresses in (("eth0", ETH0), ("eth1", OTHER)):
        host.plug(name, *addresses)
        if name == device:
            host.configure(name, *of_family(6, addresses))
            host.daemon(start_dhclient(host, device, metric=0 if device == "eth0" else 100))
            host.awaits(lambda: has(host, device, LEASED[device]))
        else:
            host.configure(name, *addresses)
        host.hook(name)
    host.works(host.talks(*ETH0, *OTHER))
    return host


def has(host: Subject, device: str, address: str) -> bool:
    """Whether dhclient has set it up: eth0 gets main's only default route."""
    route = host.ip("-4", "route", "show", "default", "dev", "eth0")
    return route != "" and f" {address}/" in host.ip("-4", "addr", "show", "dev", device)


@needs(hooks=Outcome.ANOTHER_RUN)
@DEVICES
def test_a_lease_ends_and_comes_back_with_the_same_address(
    make_host: MakeHost, world: World, device: str
) -> None:
    host = start_leased(make_host, world, device)
    world.stop_dhcp()
    host.awaits(lambda: "inet " not in host.ip("-4", "addr", "show", "dev", device))
    world.start_dhcp()
    host.awaits(lambda: has(host, device, LEASED[device]))
    host.settles(host.talks(*ETH0, *OTHER))


@needs(hooks=Outcome.ANOTHER_RUN)
@DEVICES
def test_a_lease_is_refused_and_another_address_comes(
    make_host: MakeHost, world: World, device: str
) -> None:
    host = start_leased(make_host, world, device)
    world.vpc.own(device_mac(device), ANOTHER[device])
    world.vpc.disown(device_mac(device), LEASED[device])
    world.vpc.lease(device_mac(device), [ANOTHER[device]])
    host.awaits(lambda: has(host, device, ANOTHER[device]))
    kept = [a for a in (*ETH0, *OTHER) if a != LEASED[device]]
    host.settles(host.talks(*kept, ANOTHER[device]))


# Keepalived gives an IPv6 address without an end, but not as a preferred one.
VIRTUAL = pytest.mark.parametrize(
    "virtual", ["10.0.3.24/32", "10.0.3.24/24", "2001:db8:0:3::24/128", "2001:db8:0:3::24/64"]
)


@needs(hooks=Outcome.ANOTHER_RUN)
@VIRTUAL
def test_keepalived_brings_a_virtual_address(
    make_host: MakeHost, world: World, virtual: str
) -> None:
    host = make_host()
    address = virtual.partition("/")[0]
    host.up("eth0", *ETH0)
    host.up("eth1", *OTHER)
    host.works(host.talks(*ETH0, *OTHER))
    world.vpc.own(device_mac("eth1"), address)
    family = 6 if ":" in address else 4
    (own,), (theirs,) = of_family(family, OTHER), of_family(family, ENI_NEIGHBOUR)
    keepalived = host.daemon(start_keepalived(host, "eth1", own, theirs, virtual))
    host.awaits(lambda: f" {virtual}" in host.ip("addr", "show", "dev", "eth1"))
    host.settles(host.talks(*ETH0, *OTHER, address))
    keepalived.end()
    host.awaits(lambda: f" {virtual}" not in host.ip("addr", "show", "dev", "eth1"))
    host.settles(host.talks(*ETH0, *OTHER))


@needs(hooks=Outcome.ANOTHER_RUN)
@PLACES
def test_of_two_ipv6_routers_the_better_one_retires(
    make_host: MakeHost, world: World, place: Place
) -> None:
    """A router that forwards until it says that it is none any more."""
    router = world.neighbour if place == SAME else world.eni_neighbour
    world.vpc.set_source_check(world.mac_of[router.name], False)
    forward(router)
    link_local = link_local_of(router)
    world.start_dhcp()  # the VPC's own router advertises itself
    radvd = start_radvd(router, "high")
    host = make_host()
    for device, addresses in (("eth0", ETH0), ("eth1", place)):
        host.plug(device, *addresses)
        world.vpc.configure(host, device, addresses)
        host.add_default_routes(device, *of_family(4, addresses))
    for gateway in (link_local, V6_ROUTER):
        host.awaits_output(gateway, "ip -6 route show default dev eth1")
    host.hook("eth0")
    host.hook("eth1")
    host.works(host.talks(*ETH0, *place))
    radvd.end()
    router.ok("sh", "-c", "echo 0 >/proc/sys/net/ipv6/conf/all/forwarding")
    host.awaits(lambda: link_local not in host.ip("-6", "route", "show", "default"))
    host.settles(host.talks(*ETH0, *place))
    world.vpc.set_source_check(world.mac_of[router.name], True)


def link_local_of(peer: Peer) -> str:
    words = peer.ip("-6", "addr", "show", "dev", "eth0", "scope", "link").split()
    return words[words.index("inet6") + 1].partition("/")[0]


def start_networkd(make_host: MakeHost, world: World, place: Place) -> tuple[Subject, Networkd]:
    host = make_host()
    devices = {"eth0": ETH0, "eth1": place}
    for device, addresses in devices.items():
        host.plug(device, *addresses)
    networkd = Networkd(host, world.vpc, devices)
    host.daemon(networkd.bus)
    networkd.await_configured()
    for device in devices:
        host.hook(device)
    host.works(host.talks(*ETH0, *place))
    return host, networkd


RECONFIGURES = needs(hooks=Outcome.ANOTHER_RUN)


@pytest.mark.several_users
@pytest.mark.parametrize(
    "what",
    [
        "restarts",
        pytest.param("reconfigures the ENI", marks=RECONFIGURES),
        pytest.param("reconfigures eth0", marks=RECONFIGURES),
    ],
)
@PLACES
def test_both_talk_after_systemd_networkd(
    make_host: MakeHost, world: World, place: Place, what: str, record_property: RecordProperty
) -> None:
    host, networkd = start_networkd(make_host, world, place)
    with pinging(world.client, place[0]) as to_eni, pinging(world.client, ETH0[0]) as to_eth0:
        if what == "restarts":
            networkd.restart()
            networkd.await_configured()
        else:
            device = "eth0" if what == "reconfigures eth0" else "eth1"
            networkd.reconfigure(device)
            networkd.await_configured(device)
        host.settles(host.talks(*ETH0, *place))
    record_property("packets lost at five a second, by the ENI", to_eni["lost"])
    record_property("packets lost at five a second, by eth0", to_eth0["lost"])


@pytest.mark.several_users
@PLACES
def test_both_talk_after_systemd_networkd_reloads_an_unchanged_configuration(
    make_host: MakeHost, world: World, place: Place
) -> None:
    host, networkd = start_networkd(make_host, world, place)
    networkd.networkctl("reload")
    networkd.await_configured()
    host.settles(host.talks(*ETH0, *place))
