"""The VPC of the routing cases drops what a real one drops, and nothing else."""

from __future__ import annotations

import pytest
from lab.world import (
    CLIENT,
    ETH0,
    HOOKS,
    INTERNET,
    OTHER,
    PLACES,
    Call,
    MakeHost,
    Place,
    Subject,
    World,
    device_mac,
    failing,
    failing_after,
    forward,
)


@pytest.fixture
def mode() -> str:
    """Nothing is called here."""
    return HOOKS


def without_add_routes(make_host: MakeHost, place: Place) -> Subject:
    host = make_host(watch=False)
    for device, addresses in (("eth0", ETH0), ("eth1", place)):
        host.plug(device, *addresses)
        host.configure(device, *addresses)
    return host


@PLACES
def test_what_leaves_by_another_interface_than_its_own_is_dropped(
    make_host: MakeHost, world: World, place: Place
) -> None:
    host = without_add_routes(make_host, place)
    assert failing_after(host.talks(*ETH0, peers=[world.client, world.internet]), 60) == []
    calls = host.talks(*place, peers=[world.client, world.internet])
    assert len(failing(calls)) == len(calls)


@PLACES
def test_it_passes_where_the_check_of_that_interface_is_off(
    make_host: MakeHost, world: World, place: Place
) -> None:
    host = without_add_routes(make_host, place)
    world.vpc.set_source_check(device_mac("eth0"), False)
    calls = host.talks(*place, peers=[world.client, world.internet])
    assert failing_after(calls, 60) == []


def test_the_checks_of_two_interfaces_are_apart(make_host: MakeHost, world: World) -> None:
    """Whoever forwards by eth0 what came in by the ENI needs eth0's check off, not the ENI's."""
    host = without_add_routes(make_host, OTHER)
    forward(host)
    world.route_in_vpc(INTERNET[0], OTHER[0], source=CLIENT[0])
    call = [Call(world.client, INTERNET[0], None, CLIENT[0])]
    world.vpc.set_source_check(device_mac("eth1"), False)
    assert failing(call) != []
    world.vpc.set_source_check(device_mac("eth0"), False)
    assert failing_after(call, 60) == []
