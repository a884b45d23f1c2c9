"""Devices that come and go, with and without their hooks, and an upgrade in place."""

from __future__ import annotations

import contextlib
import signal

import pytest
from lab.outcomes import Outcome, needs
from lab.world import (
    ETH0,
    OTHER,
    PLACES,
    SAME,
    WATCH,
    MakeHost,
    Place,
    RecordProperty,
    World,
    pinging,
)

HOOKED = pytest.mark.parametrize(
    "hooked",
    [True, pytest.param(False, marks=needs(hooks=Outcome.ANOTHER_RUN))],
    ids=["hooks run", "no hook runs"],
)


@HOOKED
@PLACES
def test_an_eni_that_is_pulled_and_plugged_again_talks(
    make_host: MakeHost, place: Place, hooked: bool
) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    host.works(host.talks(*ETH0, *place))
    host.pull("eth1")
    if hooked:
        host.hook("eth1", "-r")
    host.plug("eth1", *place)
    host.configure("eth1", *place)
    if hooked:
        host.hook("eth1")
    host.settles(host.talks(*ETH0, *place))


@pytest.mark.parametrize("hooked", [True, False], ids=["its hook runs", "no hook runs"])
@PLACES
def test_eth0_talks_when_the_eni_is_pulled(make_host: MakeHost, place: Place, hooked: bool) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    host.works(host.talks(*ETH0, *place))
    host.pull("eth1")
    if hooked:
        host.hook("eth1", "-r")
    host.settles(host.talks(*ETH0))


@HOOKED
def test_another_eni_in_its_place_talks(make_host: MakeHost, hooked: bool) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    host.up("eth1", *SAME)
    host.works(host.talks(*ETH0, *SAME))
    host.pull("eth1")
    if hooked:
        host.hook("eth1", "-r")
    host.plug("eth1", *OTHER)
    host.configure("eth1", *OTHER)
    if hooked:
        host.hook("eth1")
    host.settles(host.talks(*ETH0, *OTHER))


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(SAME, id="same subnet"),
        # By main, the new device's subnet is reached by the new device.
        pytest.param(OTHER, id="other subnet", marks=needs(hooks=Outcome.ANOTHER_RUN)),
    ],
)
def test_eth0_talks_beside_a_new_device_whose_hook_has_not_run(
    make_host: MakeHost, place: Place
) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    host.plug("eth1", *place)
    host.configure("eth1", *place)
    host.settles(host.talks(*ETH0))


@needs(hooks=Outcome.ANOTHER_RUN)
@PLACES
def test_a_new_device_whose_hook_has_not_run_talks(make_host: MakeHost, place: Place) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    host.plug("eth1", *place)
    host.configure("eth1", *place)
    host.options["eth1"] = ()
    host.settles(host.talks(*ETH0, *place))


@PLACES
def test_an_eni_gets_its_address_after_its_device_is_up(make_host: MakeHost, place: Place) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    host.plug("eth1", *place)
    host.run_ip("link set eth1 up")
    host.hook("eth1")  # fails: no address
    host.configure("eth1", *place)
    host.hook("eth1")
    host.settles(host.talks(*ETH0, *place))


@PLACES
def test_a_run_that_was_killed_is_mended_after_a_replug(make_host: MakeHost, place: Place) -> None:
    """SIGKILL leaves everything in place; the ENI's device comes back in no group."""
    host = make_host()
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    host.works(host.talks(*ETH0, *place))
    if host.mode == WATCH:
        host.end_watch(signal.SIGKILL)
    host.pull("eth1")
    host.plug("eth1", *place)
    host.configure("eth1", *place)
    if host.mode == WATCH:
        host.start_watch()
    host.hook("eth1")
    host.settles(host.talks(*ETH0, *place))


@PLACES
def test_what_the_service_made_stays_when_it_ends(make_host: MakeHost, place: Place) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    host.works(host.talks(*ETH0, *place))
    if host.mode == WATCH:
        assert host.end_watch() == 0
    host.settles(host.talks(*ETH0, *place))


@PLACES
def test_hooks_may_run_beside_the_service(make_host: MakeHost, place: Place) -> None:
    host = make_host()
    for device, addresses in (("eth0", ETH0), ("eth1", place)):
        host.plug(device, *addresses)
        host.configure(device, *addresses)
        assert host.run_hook(device) == 0
    host.settles(host.talks(*ETH0, *place))


# What the first edition made for eth0 and eth1; ENI stands for the ENI's address, PREFIX for its
# subnet and ROUTER for the subnet's router.
FIRST_EDITION = """
-4 link set dev eth0 group 7700
-4 link set dev eth1 group 7700
-4 route add 10.0.1.0/24 dev eth0 src 10.0.1.10 table 100 protocol 77
-4 route add default via 10.0.1.1 dev eth0 table 100 protocol 77
-4 route add PREFIX4 dev eth1 src ENI4 table 101 protocol 77
-4 route add default via ROUTER4 dev eth1 table 101 protocol 77
-6 route add 2001:db8:0:1::/64 dev eth0 metric 1024 table 100 protocol 77
-6 route add default via fe80:ec2::1 dev eth0 metric 1024 table 100 protocol 77
-6 route add PREFIX6 dev eth1 metric 1024 table 101 protocol 77
-6 route add default via fe80:ec2::1 dev eth1 metric 1024 table 101 protocol 77
-4 rule add pref 20000 lookup main suppress_prefixlength 0 suppress_ifgroup 7700 protocol 77
-4 rule add pref 20001 from 10.0.1.10 lookup 100 protocol 77
-4 rule add pref 20001 from ENI4 lookup 101 protocol 77
-6 rule add pref 20000 lookup main suppress_prefixlength 0 suppress_ifgroup 7700 protocol 77
-6 rule add pref 20001 from 2001:db8:0:1::10 lookup 100 protocol 77
-6 rule add pref 20001 from ENI6 lookup 101 protocol 77
"""


@PLACES
def test_an_upgrade_from_the_first_edition_loses_less_than_a_second(
    make_host: MakeHost, world: World, place: Place, record_property: RecordProperty
) -> None:
    host = make_host(watch=False)
    for device, addresses in (("eth0", ETH0), ("eth1", place)):
        host.plug(device, *addresses)
        host.configure(device, *addresses)
        host.options[device] = ()
    v4, v6 = place
    words = FIRST_EDITION.replace("ENI4", v4).replace("ENI6", v6)
    words = words.replace("PREFIX4", v4.replace(".22", ".0/24"))
    words = words.replace("PREFIX6", v6.replace("::22", "::/64"))
    words = words.replace("ROUTER4", world.vpc.router_of(v4))
    for line in words.split("\n"):
        if line:
            host.run_ip(line)
    for device, number in (("eth0", 100), ("eth1", 101)):
        host.write(f"/etc/iproute2/rt_tables.d/{device}.conf", f"{number} {device}\n")
    everything = host.talks(*ETH0, *place)
    host.works(everything)
    before = host.own()
    with contextlib.ExitStack() as pings:
        losses = [
            pings.enter_context(pinging(peer, address))
            for peer in (world.client, world.neighbour)
            for address in (ETH0[0], *place)
        ]
        host.hook("eth1")
        if host.mode == WATCH:
            host.start_watch()
        host.awaits(lambda: host.surveyed or host.own() != before)
        host.settles(everything)
        if host.mode == WATCH:
            host.awaits(host.is_served)  # packets flow before it has changed all
    most = max(loss["lost"] for loss in losses)
    record_property("packets lost at five a second, at most", most)
    host.must(most <= 5, f"packets lost: {losses}")
    upgraded = host.own()
    host.delete_all_of_ours()
    host.run_again_if_hooks()
    host.awaits(lambda: len(host.own()) >= len(upgraded))
    host.settles(everything)
    host.must(host.own() == upgraded, f"after the upgrade: {upgraded}")
