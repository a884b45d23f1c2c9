"""What others have made in tables, rules and routes goes on working, and is left as it is."""

from __future__ import annotations

import pytest
from lab.world import (
    ETH0,
    OTHER,
    PLACES,
    Call,
    MakeHost,
    Place,
    Subject,
    World,
)

TABLES = pytest.mark.parametrize("table", [100, 101])


@pytest.mark.parametrize("when", ["before", "later"])
@TABLES
@PLACES
def test_a_transparent_proxy_has_the_table(
    make_host: MakeHost, place: Place, table: int, when: str
) -> None:
    """The kernel's own recipe: marked packets are delivered locally, by table 100 mostly."""
    host = make_host()

    rule = f"rule add fwmark 1 lookup {table}"
    route = f"route add local 0.0.0.0/0 dev lo table {table}"
    if when == "before":
        host.run_ip(rule)
        host.run_ip(route)
    before = host.foreign()
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    if when == "later":
        host.works(host.talks(*ETH0, *place))
        host.run_ip(rule)
        host.run_ip(route.replace("add", "replace"))  # `add` would tell that there is one
        host.run_again_if_hooks()
    host.settles(host.talks(*ETH0, *place))
    routes = [line.strip() for line in host.ip("route", "show", "table", str(table)).splitlines()]
    host.must(routes == ["local default dev lo scope host"], f"the proxy's table: {routes}")
    host.must(still_there(before, host), f"before: {before}")


def still_there(before: str, host: Subject) -> bool:
    """Whether all rules and routes of others are as they were."""
    return set(before.splitlines()) <= set(host.foreign().splitlines())


@TABLES
@PLACES
def test_a_vpn_has_the_table(make_host: MakeHost, place: Place, table: int) -> None:
    host = make_host()
    host.run_ip("tuntap add tun0 mode tun")
    host.run_ip("addr add 10.8.0.2/24 dev tun0")
    host.run_ip("link set tun0 up")
    host.run_ip(f"route add default dev tun0 table {table}")
    host.run_ip(f"rule add from 10.8.0.2 lookup {table}")
    before = host.foreign()
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    host.settles(host.talks(*ETH0, *place))
    host.must(still_there(before, host), f"before: {before}")
    by_tunnel = "dev tun0" in host.ip("route", "get", "198.51.100.9", "from", "10.8.0.2")
    host.must(by_tunnel, "the VPN's address no longer calls by the VPN")


@TABLES
@PLACES
def test_somebodys_rule_leads_to_the_table(make_host: MakeHost, place: Place, table: int) -> None:
    """An empty table sends nothing; ours there would."""
    host = make_host()
    host.run_ip(f"rule add pref 50 fwmark 7 lookup {table}")
    host.run_ip(f"rule add pref 60 from {ETH0[0]} to 10.0.2.0/24 lookup {table}")
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    host.settles(host.talks(*ETH0, *place))
    there = host.run("ip", "route", "show", "table", str(table)).stdout
    host.must(there == "", f"the table was empty: {there}")


@PLACES
def test_a_vpns_rules_before_ours_decide(make_host: MakeHost, world: World, place: Place) -> None:
    """As strongSwan's table 220: what it sends somewhere goes there."""
    host = make_host()
    host.up("eth0", *ETH0)
    host.run_ip("rule add pref 220 from all lookup 220")
    host.run_ip("route add unreachable 10.0.2.50 table 220")
    host.up("eth1", *place)
    calls = host.talks(*ETH0, *place, peers=[world.neighbour, world.internet])
    denied = [Call(host, "10.0.2.50", source, "") for source in (ETH0[0], place[0])]
    host.settles([*calls, *denied])


@PLACES
def test_nothing_of_others_changes_when_the_device_goes(make_host: MakeHost, place: Place) -> None:
    host = make_host()
    host.run_ip("rule add pref 20001 from 10.0.1.99 lookup 100")
    host.run_ip("route add 192.0.2.0/24 dev lo table 100")
    host.run_ip("route add 192.0.2.0/24 dev lo table 101")
    host.up("eth0", *ETH0)
    host.awaits_output("local fe80::", "ip -6 route show table local dev eth0")
    host.awaits(lambda: host.ip("-6", "addr", "show", "tentative") == "")
    before = host.foreign()
    host.up("eth1", *place)
    host.settles(host.talks(*ETH0, *place))
    host.pull("eth1")
    host.hook("eth1", "-r")
    host.settles(host.talks(*ETH0))
    host.must(host.foreign() == before, f"before: {before}")


@PLACES
def test_a_device_of_somebodys_interface_group_harms_no_other(
    make_host: MakeHost, place: Place
) -> None:
    host = make_host()
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    host.run_ip("tuntap add tun0 mode tun")
    host.run_ip("link set tun0 group 42 up")
    host.run_ip("addr add 10.8.0.2/24 dev tun0")
    host.run_again_if_hooks()
    host.settles(host.talks(*ETH0, *place))
    host.must("group 42" in host.ip("link", "show", "tun0"), "tun0 is in another group")


def test_a_table_number_of_the_eni_that_becomes_somebodys_is_left_to_them(
    make_host: MakeHost,
) -> None:
    """rt_tables gives eth1's usual number another name."""
    host = make_host()
    host.write("/etc/iproute2/rt_tables.d/proxy.conf", "101 proxy\n")
    host.up("eth0", *ETH0)
    host.up("eth1", *OTHER)
    host.settles(host.talks(*ETH0, *OTHER))
    there = host.run("ip", "route", "show", "table", "proxy").stdout
    host.must(there == "", f"the table was empty: {there}")
