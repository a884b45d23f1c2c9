"""add_routes.plan: from what the kernel says to the commands of `ip`."""

from __future__ import annotations

import argparse
import ipaddress
from typing import Any

import pytest

import add_routes
from add_routes import Failure, Host, Route, Rule, Step

pytestmark = pytest.mark.pure

FIRST = "suppress_prefixlength 0 suppress_ifgroup 7700"


def make_options(device: str = "eth1", **values: Any) -> argparse.Namespace:
    given = {"gateway": None, "network": None, "table": "", "remove": False, "default": False}
    if "gateway" in values:
        values["gateway"] = ipaddress.ip_address(values["gateway"])
    if "network" in values:
        values["network"] = ipaddress.ip_network(values["network"])
    return argparse.Namespace(**{"device": device, **given, **values})


def make_host(*addresses: str, **values: Any) -> Host:
    """A host of IPv4 with eth0, and eth1 that has these addresses."""
    found = {"eth1": [ipaddress.ip_interface(address) for address in addresses]}
    given: dict[str, Any] = {"groups": {"lo": 0, "eth0": 0, "eth1": 0}, "addresses": found}
    given |= {"rules": [], "routes": [], "tables": {253, 254, 255}, "families": (4,)}
    given["names"] = {"local": 255, "main": 254, "default": 253, "unspec": 0}
    return Host(**given | values)


def plan(host: Host, options: argparse.Namespace) -> list[str]:
    device = options.device
    table = 0 if options.remove else add_routes.choose_table(host, device, options.table)
    return [step.do for step in add_routes.plan(host, options, table)]


def after(host: Host, steps: list[Step], wanted: int, device: str = "eth1") -> Host:
    """The host as it is when the steps for an empty one are done."""
    rules = add_routes.plan_rules(host, make_options(device), wanted)
    routes = add_routes.plan_routes(host, make_options(device), 4, wanted)
    words = {rule.words("add") for rule in rules} | {route.words("add") for route in routes}
    assert words <= {step.do for step in steps}
    return host._replace(
        groups={**host.groups, device: 7700}, rules=rules, routes=[*host.routes, *routes]
    )


def main_route(destination: str, gateway: str = "", device: str = "eth1", **values: Any) -> Route:
    family = 6 if ":" in destination or gateway.startswith("fe80") else 4
    values.setdefault("metric", 0)
    values.setdefault("protocol", 3)
    return Route(family, 254, destination, device=device, gateway=gateway, **values)


def test_the_recipe_for_one_address() -> None:
    assert plan(make_host("10.0.1.22/24"), make_options()) == [
        "link set dev eth1 group 7700",
        "route add 10.0.1.0/24 dev eth1 src 10.0.1.22 table 101 protocol 77",
        "route add default via 10.0.1.1 dev eth1 table 101 protocol 77",
        f"rule add pref 20000 from all lookup main {FIRST} protocol 77",
        "rule add pref 20001 from 10.0.1.22 lookup 101 protocol 77",
    ]


def test_the_recipe_for_ipv6_names_no_source_that_might_be_tentative() -> None:
    host = make_host("2001:db8:1::22/64", families=(4, 6))
    assert plan(host, make_options()) == [
        "link set dev eth1 group 7700",
        "route add 2001:db8:1::/64 dev eth1 metric 1024 table 101 protocol 77",
        "route add default via fe80:ec2::1 dev eth1 metric 1024 table 101 protocol 77",
        f"rule add pref 20000 from all lookup main {FIRST} protocol 77",
        "rule add pref 20001 from 2001:db8:1::22 lookup 101 protocol 77",
    ]


def test_the_first_address_of_a_subnet_is_its_routes_source() -> None:
    steps = plan(make_host("10.0.1.22/24", "10.0.1.23/24", "10.7.0.5/16"), make_options())
    assert [step.split()[6] for step in steps if " src " in step] == ["10.7.0.5", "10.0.1.22"]


def test_default_adds_three_rules_at_the_end() -> None:
    host = make_host("10.0.1.22/24")
    more = [step for step in plan(host, make_options(default=True)) if "pref 327" in step]
    assert more == [
        "rule add pref 32700 from all to 169.254.0.0/16 lookup main protocol 77",
        "rule add pref 32701 from all lookup main suppress_prefixlength 0 protocol 77",
        "rule add pref 32702 from all lookup 101 protocol 77",
    ]
    assert not any("pref 327" in step for step in plan(host, make_options()))


def test_planning_after_the_plan_plans_nothing() -> None:
    host = make_host("10.0.1.22/24", "10.0.1.23/24")
    steps = add_routes.plan(host, make_options(), 101)
    done = after(host, steps, 101)
    assert add_routes.plan(done, make_options(), 101) == []
    # And removing takes all of it back, in the opposite order of rules and routes.
    removed = [step.do for step in add_routes.plan(done, make_options(remove=True))]
    assert sorted(removed) == sorted(step.undo for step in steps)
    kinds = [step.split()[0] for step in removed]
    assert kinds == sorted(kinds, key=["rule", "route", "link"].index)


@pytest.mark.parametrize(
    ("addresses", "options", "gateway"),
    [
        (["10.0.1.22/24"], {}, "10.0.1.1"),
        (["10.0.22.7/20"], {}, "10.0.16.1"),
        (["10.0.1.200/28"], {}, "10.0.1.193"),
        (["10.0.1.22/24", "10.7.0.5/16"], {}, "10.0.1.1"),
        (["10.0.1.22/32", "10.0.1.23/24"], {}, "10.0.1.1"),
        (["10.0.1.22/24"], {"gateway": "10.0.1.254"}, "10.0.1.254"),
        (["10.0.1.22/24"], {"network": "10.0.0.0/16"}, "10.0.0.1"),
        (["10.0.1.22/24"], {"network": "10.0.1.16/28"}, "10.0.1.17"),
        (["10.0.1.22/32"], {"network": "10.0.1.0/24"}, "10.0.1.1"),
        (["10.0.1.22/24"], {"gateway": "fe80::9", "network": "2001:db8::/64"}, "10.0.1.1"),
    ],
)
def test_the_gateway_of_ipv4(addresses: list[str], options: dict[str, str], gateway: str) -> None:
    steps = plan(make_host(*addresses), make_options(**options))
    assert f"route add default via {gateway} dev eth1 table 101 protocol 77" in steps


@pytest.mark.parametrize(
    ("routes", "options", "gateway"),
    [
        ([], {}, "fe80:ec2::1"),
        ([main_route("default", "fe80::7", metric=1024)], {}, "fe80::7"),
        (
            [main_route("default", f"fe80::{n}", metric=n) for n in (9, 8)],
            {},
            "fe80::8",
        ),
        ([main_route("default", "fe80::7", "eth0", metric=1024)], {}, "fe80:ec2::1"),
        ([main_route("default", "fe80::7")], {"gateway": "fe80::9"}, "fe80::9"),
        ([], {"gateway": "2001:db8:1::1"}, "2001:db8:1::1"),
    ],
)
def test_the_gateway_of_ipv6(routes: list[Route], options: dict[str, str], gateway: str) -> None:
    host = make_host("2001:db8:1::22/64", families=(4, 6), routes=routes)
    steps = plan(host, make_options(**options))
    assert f"route add default via {gateway} dev eth1 metric 1024 table 101 protocol 77" in steps


def test_a_gateway_without_a_subnet_is_on_link() -> None:
    steps = plan(make_host("10.0.1.22/32"), make_options(gateway="10.9.9.9"))
    assert "route add default via 10.9.9.9 dev eth1 onlink table 101 protocol 77" in steps


@pytest.mark.parametrize(
    ("host", "options", "named"),
    [
        (make_host("10.0.1.22/24"), make_options("eth9"), "no device named eth9"),
        (make_host("10.0.1.22/24"), make_options("eth0"), "eth0 has no address"),
        (make_host("10.0.1.22/32"), make_options(), "10.0.1.22/32 and no subnet"),
        (make_host("10.0.1.22/24"), make_options(gateway="10.0.2.1"), "gateway 10.0.2.1"),
        (make_host("10.0.1.1/24"), make_options(), "10.0.1.1 is eth1's own address"),
        (make_host("10.0.1.22/24"), make_options(network="10.0.2.0/24"), "10.0.2.0/24"),
        (make_host("10.0.1.22/24", groups={"eth1": 5}), make_options(), "group 5"),
        (make_host("10.0.1.22/24"), make_options(table="main"), "table main"),
        (make_host("10.0.1.22/24"), make_options(table="253"), "table 253"),
        (
            make_host("10.0.1.22/24", names={"eth0": 100}),
            make_options(table="100"),
            "table 100",
        ),
    ],
)
def test_what_cannot_be_planned_names_the_thing(
    host: Host, options: argparse.Namespace, named: str
) -> None:
    with pytest.raises(Failure, match="; expected") as caught:
        plan(host, options)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mains_routes_by_the_device_are_copied_and_no_others() -> None:
    routes = [
        main_route("default", "10.0.1.1"),
        main_route("10.0.1.0/24", source="10.0.1.22", protocol=2),
        main_route("10.9.0.0/16", "10.0.1.9", metric=50, onlink=True),
        main_route("10.8.0.0/16"),
        main_route("10.7.0.0/16", "inet6 fe80::1"),
        main_route("10.6.0.0/16", "10.0.1.6", "eth0"),
    ]
    steps = plan(make_host("10.0.1.22/24", routes=routes), make_options())
    assert [step for step in steps if step.startswith("route")] == [
        "route add 10.0.1.0/24 dev eth1 src 10.0.1.22 table 101 protocol 77",
        "route add 10.8.0.0/16 dev eth1 table 101 protocol 77",
        "route add 10.9.0.0/16 via 10.0.1.9 dev eth1 metric 50 onlink table 101 protocol 77",
        "route add 10.7.0.0/16 via inet6 fe80::1 dev eth1 table 101 protocol 77",
        "route add default via 10.0.1.1 dev eth1 table 101 protocol 77",
    ]


def test_a_given_network_takes_the_place_of_the_one_it_overlaps() -> None:
    routes = [main_route("10.0.1.0/24", source="10.0.1.22", protocol=2)]
    host = make_host("10.0.1.22/24", "10.7.0.5/16", routes=routes)
    steps = plan(host, make_options(network="10.0.1.16/28"))
    assert [step for step in steps if step.startswith("route") and "via" not in step] == [
        "route add 10.0.1.16/28 dev eth1 src 10.0.1.22 table 101 protocol 77",
        "route add 10.7.0.0/16 dev eth1 src 10.7.0.5 table 101 protocol 77",
    ]


def test_only_the_difference_is_changed() -> None:
    host = make_host("10.0.1.22/24", "10.0.1.23/24")
    done = after(host, add_routes.plan(host, make_options(), 101), 101)
    moved = done._replace(addresses=make_host("10.0.1.22/24", "10.0.1.24/24").addresses)
    assert plan(moved, make_options(gateway="10.0.1.9")) == [
        "route replace default via 10.0.1.9 dev eth1 table 101 protocol 77",
        "rule add pref 20001 from 10.0.1.24 lookup 101 protocol 77",
        "rule del pref 20001 from 10.0.1.23 lookup 101 protocol 77",
    ]


def test_what_others_made_is_not_planned_away_nor_replaced() -> None:
    theirs = [
        Route(4, 101, "default", 0, "eth1", "10.0.1.66", protocol=3),
        Route(4, 101, "198.51.100.0/24", 0, "eth1", "10.0.1.66", protocol=3),
    ]
    host = make_host("10.0.1.22/24", routes=theirs)
    assert not any("default" in step for step in plan(host, make_options()))
    assert plan(host, make_options(remove=True)) == []


def test_the_last_device_takes_the_shared_rules_along() -> None:
    shared = [Rule(4, 20000, "all", 254), Rule(4, 32700, "all", 254), Rule(4, 32701, "all", 254)]
    own = [Rule(4, 20001, "10.0.1.22", 101), Rule(4, 32702, "all", 101)]
    other = [Rule(4, 20001, "10.0.1.5", 100)]
    alone = plan(make_host("10.0.1.22/24", rules=shared + own), make_options(remove=True))
    assert [step.split()[3] for step in alone] == ["32702", "32701", "32700", "20001", "20000"]
    beside = plan(make_host("10.0.1.22/24", rules=shared + own + other), make_options(remove=True))
    assert [step.split()[3] for step in beside] == ["32702", "32701", "32700", "20001"]


@pytest.mark.parametrize(
    ("values", "removed"),
    [
        ({}, {"10.0.1.22"}),  # eth1 has 101 by its name
        ({"names": {"eth1": 1000}}, {"10.0.1.22", "10.0.5.5"}),  # but here 1000 too
        ({"names": {"ens5": 1000}}, {"10.0.1.22", "10.0.5.5"}),  # ens5 is gone as well
        ({"names": {"ens5": 1000}, "groups": {"ens5": 0}}, {"10.0.1.22"}),
        ({"routes": [Route(4, 1000, "default", 0, "ens5")]}, {"10.0.1.22"}),
        ({"routes": [Route(4, 101, "default", 0, "ens5")]}, {"10.0.5.5"}),
    ],
)
def test_a_device_that_is_gone_is_found_by_its_table(
    values: dict[str, Any], removed: set[str]
) -> None:
    rules = [Rule(4, 20001, "10.0.1.22", 101), Rule(4, 20001, "10.0.5.5", 1000)]
    rules += [Rule(4, 20001, "10.0.1.5", 100), Rule(4, 20000, "all", 254)]
    groups = {"lo": 0, "eth0": 7700} | values.pop("groups", {})
    names = {"main": 254, **values.pop("names", {})}
    if "ens5" not in names and not values:
        names["ens5"], groups["ens5"] = 1000, 7700
    host = make_host(rules=rules, groups=groups, names=names, **values)
    steps = plan(host._replace(addresses={}), make_options(remove=True))
    assert {step.split()[5] for step in steps if "pref 20001" in step} == removed
    assert all(step.startswith("rule del") for step in steps)


def test_to_serve_a_device_takes_nothing_from_one_that_is_gone() -> None:
    """Its own `down` does, which may be late."""
    host = make_host("10.0.1.22/24", rules=[Rule(4, 20001, "10.0.5.5", 1000)], tables={254, 1000})
    assert not [step for step in plan(host, make_options()) if " del " in step]


@pytest.mark.parametrize(
    ("device", "wanted", "values", "table"),
    [
        ("eth0", "", {}, 100),
        ("eth1", "", {}, 101),
        ("eth10", "", {}, 110),
        ("eth152", "", {}, 252),
        ("eth153", "", {}, 1000),
        ("eth155", "", {}, 1000),
        ("eth200", "", {}, 1000),
        ("eth900", "", {}, 1000),
        ("eth01", "", {}, 1000),
        ("eth1x", "", {}, 1000),
        ("ens5", "", {}, 1000),
        ("ens5", "", {"tables": {1000, 1002}}, 1001),
        ("ens5", "", {"names": {"isp": 1000}, "tables": {1001}}, 1002),
        ("ens5", "", {"names": {"ens5": 1234}}, 1234),
        ("eth1", "", {"names": {"eth1": 7}}, 7),
        ("eth1", "", {"names": {"eth1": 254}}, 101),
        ("eth1", "", {"names": {"isp": 101}}, 1000),
        ("eth1", "", {"names": {"eth0": 101}}, 1000),
        ("eth1", "", {"routes": [Route(4, 101, "default", 0, "eth0")], "tables": {101}}, 1000),
        ("eth1", "", {"routes": [Route(4, 300, "default", 0, "eth1")], "tables": {300}}, 300),
        ("eth1", "", {"routes": [Route(4, 101, "default", 0, "eth0", protocol=3)]}, 101),
        ("eth1", "300", {}, 300),
        ("eth1", "300", {"names": {"eth1": 101}}, 300),
        ("eth1", "isp", {"names": {"isp": 300}}, 300),
        ("eth1", "isp", {}, 101),
        ("ens5", "isp", {"tables": {1000}}, 1001),
        ("eth1", "4294967295", {}, 4294967295),
    ],
)
def test_the_table(device: str, wanted: str, values: dict[str, Any], table: int) -> None:
    host = make_host("10.0.1.22/24", **values)
    assert add_routes.choose_table(host, device, wanted) == table
