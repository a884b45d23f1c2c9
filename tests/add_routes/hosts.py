"""Hosts for the tests of planning, in the words of `ip`, and a kernel that is only a list.

make_host() takes the lines that `ip -N -o route show table all` and `ip -N rule` print. after()
does to such a host what the steps of a plan do to a real one, and refuses what a kernel refuses.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import add_routes
from add_routes import GROUP, OURS, Address, Device, Host, Route, Rule, Step, Wish

NAMES = {"local": 255, "main": 254, "default": 253, "unspec": 0}
KERNEL_RULES = [
    "0: from all lookup 255",
    "32766: from all lookup 254",
    "32767: from all lookup 253",
]


def make_address(text: str, **flags: Any) -> Address:
    interface = ipaddress.ip_interface(text)
    return Address(str(interface.ip), interface.network, **flags)


def make_device(*addresses: str | Address, **values: Any) -> Device:
    found = []
    for address in addresses:
        found.append(address if isinstance(address, Address) else make_address(address))
    return Device(addresses=tuple(found), **values)


def make_host(
    devices: Mapping[str, Device] | None = None,
    *,
    routes: Iterable[str] = (),
    rules: Iterable[str] = (),
    names: dict[str, int] | None = None,
    families: tuple[int, ...] = (4, 6),
    **named: Device,
) -> Host:
    """A host with lo and these devices."""
    every = {"lo": Device(is_ethernet=False), **(devices or {}), **named}
    host = Host(every, [], [], {**NAMES, **(names or {})}, families)
    for line in KERNEL_RULES:
        for family in (4, 6):
            add_routes.read_line(host, family, line)
    for line in [*rules, *routes]:
        add_routes.read_line(host, 6 if is_ipv6(line) else 4, line)
    return host


def is_ipv6(line: str) -> bool:
    """A next hop of IPv6 does not make a route of IPv4 one of IPv6."""
    return "::" in line and "via inet6" not in line


def two_enis(**values: Any) -> Host:
    """eth0 with main's default route, and eth1 in another subnet."""
    values.setdefault("routes", TWO_ENIS)
    values.setdefault("families", (4,))
    devices = {"eth0": make_device("10.0.1.10/24"), "eth1": make_device("10.0.3.22/24")}
    return make_host(devices, **values)


TWO_ENIS = [
    "default via 10.0.1.1 dev eth0",
    "10.0.1.0/24 dev eth0 proto 2 scope 253 src 10.0.1.10",
    "10.0.3.0/24 dev eth1 proto 2 scope 253 src 10.0.3.22",
]


def plan(host: Host, device: str = "eth1", **values: Any) -> list[str]:
    """The commands of a run for the device."""
    return commands(add_routes.make_plan(host, Wish(device=device, **values)).steps)


def commands(steps: Iterable[Step]) -> list[str]:
    return [step.do for step in steps]


def served(host: Host, device: str = "eth1", **values: Any) -> Host:
    """The host after a run for the device."""
    return after(host, add_routes.make_plan(host, Wish(device=device, **values)).steps)


def after(host: Host, steps: Sequence[Step]) -> Host:
    """The host after these steps."""
    devices = dict(host.devices)
    rules = list(host.rules)
    routes = list(host.routes)
    for step in steps:
        kind, verb, *words = step.do.split()
        if kind == "link":
            _, name, _, group = words
            assert {devices[name].group, int(group)} == {0, GROUP}, step.do
            devices[name] = devices[name]._replace(group=int(group))
        elif kind == "rule":
            change_rules(rules, step.family, verb, words)
        else:
            change_routes(routes, step.family, verb, words)
    return host._replace(devices=devices, rules=rules, routes=routes)


def change_rules(rules: list[Rule], family: int, verb: str, words: list[str]) -> None:
    _, priority, *text, _, protocol = words
    assert int(protocol) in OURS
    shown = " ".join(text).replace("lookup main", "lookup 254")
    rule = Rule(family, int(priority), shown, int(protocol))
    assert (rule in rules) == (verb == "del"), rule
    if verb == "add":
        rules.append(rule)
    else:
        rules.remove(rule)


def change_routes(routes: list[Route], family: int, verb: str, words: list[str]) -> None:
    destination, *text = words
    at = text.index("table")
    _, table, _, protocol = text[at : at + 4]
    del text[at : at + 4]
    if "global" in text:  # `ip` does not print that scope
        text = text[: text.index("scope")] + text[text.index("global") + 1 :]
    assert int(protocol) in OURS
    assert text[at : at + 1] in ([], ["nexthop"])
    route = Route(family, int(table), destination, tuple(text), int(protocol))
    known = [other for other in routes if other.key == route.key]
    assert bool(known) == (verb != "add"), route
    for other in known:
        assert other.protocol in OURS, other
        routes.remove(other)
    if verb != "del":
        routes.append(route)


def same(one: Host, other: Host) -> bool:
    """Whether they differ in nothing but the order in which things are listed."""
    return (
        one.devices == other.devices
        and sorted(one.rules) == sorted(other.rules)
        and sorted(one.routes) == sorted(other.routes)
    )


def foreign(host: Host) -> list[Any]:
    """All that is not ours."""
    rules = [rule for rule in host.rules if rule.protocol not in OURS]
    routes = [route for route in host.routes if route.protocol not in OURS]
    groups = {name: device.group for name, device in host.devices.items() if device.group != GROUP}
    return [rules, routes, {name: group for name, group in groups.items() if group != 0}]
