"""Any state that a host may be in, with leftovers of ours and things of others, for hypothesis."""

from __future__ import annotations

import ipaddress
from typing import Any

from hosts import make_address, make_host
from hypothesis import strategies as st

from add_routes import GROUP, Device, Host, Wish

DEVICES = ("eth0", "eth1", "ens5")
TABLES = {"eth0": 100, "eth1": 101, "ens5": 1000}


def addresses_of(device: str) -> st.SearchStrategy[list[Any]]:
    """Of both families; no address is on two devices."""
    first = 50 * DEVICES.index(device) + 2
    number = st.integers(first, first + 5)
    v4 = st.builds("10.0.{}.{}/{}".format, st.integers(0, 2), number, st.sampled_from([16, 24, 32]))
    v6 = st.builds(
        "2001:db8:{}::{}/{}".format, st.integers(0, 2), number, st.just(64) | st.just(128)
    )
    several = st.lists(v4 | v6, max_size=5, unique_by=lambda text: text.split("/")[0])
    return several.map(lambda texts: [ipaddress.ip_interface(text) for text in texts])


@st.composite
def devices(draw: st.DrawFn, name: str) -> Device:
    addresses = []
    for interface in draw(addresses_of(name)):
        label = draw(st.sampled_from(["", name, f"{name}:0"]))
        flags = {"dynamic": draw(st.booleans()), "tentative": draw(st.booleans())}
        addresses.append(make_address(str(interface), label=label, **flags))
    return Device(
        group=draw(st.sampled_from([0, 0, GROUP, GROUP, 5])),
        is_up=draw(st.sampled_from([True, True, True, False])),
        is_ethernet=draw(st.sampled_from([True, True, True, False])),
        is_hardware=draw(st.booleans()),
        addresses=tuple(addresses),
    )


@st.composite
def hops(draw: st.DrawFn, family: int, ours: bool) -> str:
    """What follows a route's destination: by one device or several, or by somebody else's. We make
    routes of several hops only as copies, which is not what is left over."""
    gateway = st.sampled_from(["", "via 10.0.0.99 " if family == 4 else "via fe80::99 "])
    device = st.sampled_from([*DEVICES, "docker0"])
    if ours or draw(st.sampled_from([True, True, True, False])):
        return f"{draw(gateway)}dev {draw(device)}"
    several = draw(st.lists(device, min_size=2, max_size=3))
    return " ".join(f"nexthop {draw(gateway)}dev {name} weight 1" for name in several)


@st.composite
def route_lines(draw: st.DrawFn, table: int, protocol: int) -> str:
    family = draw(st.sampled_from([4, 6]))
    number = draw(st.integers(0, 5))
    if draw(st.booleans()):
        destination = "default"
    elif family == 4:
        destination = draw(st.sampled_from([f"198.51.100.{number * 16}/28", f"10.0.{number}.0/24"]))
    else:
        destination = f"2001:db8:{number}::/64"
    metric = draw(st.sampled_from(["", " metric 50"])) if family == 4 else " metric 1024"
    more = draw(st.sampled_from(["", " mtu 1400 advmss 1360", " pref medium"]))
    end = f"table {table} proto {protocol}{metric}{more}"
    # The first word of IPv6 says the family to make_host().
    line = f"{destination} {draw(hops(family, protocol != 3))} {end}"
    return line if family == 4 or "::" in line else f"{line} from ::/0"


@st.composite
def rule_lines(draw: st.DrawFn, protocol: int) -> str:
    priority = draw(st.sampled_from([20000, 20001, 20010, 20030, 32699, 32702, 99]))
    number = draw(st.integers(2, 5))
    sources = ["all", f"10.0.0.{number}", f"2001:db8::{number}"]
    table = draw(st.sampled_from([*TABLES.values(), 254, 300]))
    end = f" proto {protocol}" if protocol else ""
    return f"{priority}: from {draw(st.sampled_from(sources))} lookup {table}{end}"


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    named = draw(st.sets(st.sampled_from(DEVICES)))
    names = {name: TABLES[name] for name in named}
    names["vpn"] = draw(st.sampled_from([99, 101, 1000]))
    routes = draw(st.lists(route_lines(254, 3), max_size=6))
    for table in (101, 300, 1000):
        routes += draw(st.lists(route_lines(table, 3), max_size=1))
        routes += draw(st.lists(route_lines(table, draw(st.sampled_from([77, 78]))), max_size=2))
    rules = draw(st.lists(rule_lines(77), max_size=4, unique=True))
    rules += draw(st.lists(rule_lines(0), max_size=2, unique=True))
    found = {name: draw(devices(name)) for name in DEVICES}
    host = make_host(routes=routes, rules=rules, names=names, devices=found)
    # The kernel has one route of a kind.
    unique = {route.key: route for route in host.routes}
    return host._replace(routes=list(unique.values()))


@st.composite
def wishes(draw: st.DrawFn) -> Wish:
    """Of a run for a device, or of --watch."""
    device = draw(st.sampled_from(DEVICES))
    default = draw(st.sampled_from(["", device]))
    if draw(st.booleans()):
        return Wish(device=device, default=default, is_hook=draw(st.booleans()))
    patterns = draw(st.sampled_from([("*",), ("eth*",), ("ens5", "eth1"), ()]))
    return Wish(patterns=patterns, hardware=not patterns, default=default)
