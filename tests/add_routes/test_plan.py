"""make_plan(): from what the kernel says to the commands of `ip`, as tables."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hosts import (
    TWO_ENIS,
    after,
    commands,
    foreign,
    make_address,
    make_device,
    make_host,
    plan,
    same,
    served,
    two_enis,
)

import add_routes
from add_routes import Failure, Host, Wish

pytestmark = pytest.mark.pure

NO_ENI = "from all lookup main suppress_prefixlength 1 suppress_ifgroup 7700"
END = "protocol 77"
# Two next hops of a multipath route, as `ip -o` prints them.
BY_ETH0 = "\\\tnexthop via 10.0.1.6 dev eth0 weight 1"
BY_ETH1 = "\\\tnexthop via 10.0.3.9 dev eth1 weight 3"


def routes_of(steps: list[str], table: int) -> list[str]:
    """The routes that the steps add to the table, without what all of them have in common."""
    found = []
    for step in steps:
        if step.startswith("route add ") and f" table {table} " in step:
            found.append(step.removeprefix("route add ").partition(" table ")[0])
    return found


def rules_of(steps: list[str], verb: str = "add") -> list[str]:
    found = []
    for step in steps:
        if step.startswith(f"rule {verb} pref "):
            found.append(step.removeprefix(f"rule {verb} pref ").removesuffix(f" {END}"))
    return found


def test_an_eni_in_another_subnet_gets_this_recipe() -> None:
    assert plan(two_enis()) == [
        "link set dev eth0 group 7700",
        "link set dev eth1 group 7700",
        f"route add 10.0.3.0/24 via 10.0.1.1 dev eth0 table 100 {END}",
        f"route add default via 10.0.1.1 dev eth0 table 100 {END}",
        f"route add 10.0.3.0/24 dev eth1 scope 253 src 10.0.3.22 table 101 {END}",
        f"route add default via 10.0.3.1 dev eth1 table 101 {END}",
        f"rule add pref 20000 {NO_ENI} {END}",
        f"rule add pref 20010 from 10.0.1.10 lookup 100 suppress_prefixlength 1 {END}",
        f"rule add pref 20020 from 10.0.1.10 lookup main suppress_prefixlength 1 {END}",
        f"rule add pref 20030 from 10.0.1.10 lookup 100 {END}",
        f"rule add pref 20030 from 10.0.3.22 lookup 101 {END}",
    ]


def test_in_one_subnet_mains_own_device_has_the_subnet_in_its_table() -> None:
    host = two_enis(
        eth1=make_device("10.0.1.22/24"),
        routes=[
            "default via 10.0.1.1 dev eth0",
            "10.0.1.0/24 dev eth1 proto 2 scope 253 src 10.0.1.22",
            "10.0.1.0/24 dev eth0 proto 2 scope 253 src 10.0.1.10",
        ],
    )
    steps = plan(host)
    assert routes_of(steps, 100) == [
        "10.0.1.0/24 dev eth0 scope 253 src 10.0.1.10",
        "default via 10.0.1.1 dev eth0",
    ]
    assert routes_of(steps, 101) == [
        "10.0.1.0/24 dev eth1 scope 253 src 10.0.1.22",
        "default via 10.0.1.1 dev eth1",
    ]


def test_ipv6_has_the_same_recipe_with_the_vpcs_router() -> None:
    host = make_host(
        eth0=make_device("2001:db8:1::10/64"),
        eth1=make_device("2001:db8:3::22/64"),
        routes=[
            "default via fe80::1 dev eth0 proto 9 metric 1024 expires 1790sec mtu 9001 pref medium",
            "2001:db8:1::/64 dev eth0 proto 2 metric 256 pref medium",
            "2001:db8:3::/64 dev eth1 proto 2 metric 256 pref medium",
        ],
    )
    steps = plan(host)
    assert routes_of(steps, 100) == [
        "2001:db8:3::/64 via fe80::1 dev eth0 metric 1024 mtu 9001",
        "default via fe80::1 dev eth0 metric 1024 mtu 9001",
    ]
    assert routes_of(steps, 101) == [
        "2001:db8:3::/64 dev eth1 metric 256",
        "default via fe80:ec2::1 dev eth1 metric 1024",
    ]
    assert rules_of(steps)[-1] == "20030 from 2001:db8:3::22 lookup 101"


def test_each_family_has_a_main_device_of_its_own() -> None:
    host = two_enis(
        families=(4, 6),
        eth0=make_device("10.0.1.10/24", "2001:db8:1::10/64"),
        eth1=make_device("10.0.3.22/24", "2001:db8:3::22/64"),
        routes=[*TWO_ENIS, "default via fe80::3 dev eth1 metric 100 pref medium"],
    )
    live = [rule for rule in rules_of(plan(host)) if rule.startswith("20020")]
    assert live == [
        "20020 from 10.0.1.10 lookup main suppress_prefixlength 1",
        "20020 from 2001:db8:3::22 lookup main suppress_prefixlength 7",
    ]


@pytest.mark.parametrize("device", ["eth0", "eth1"])
def test_it_does_not_matter_which_device_is_named(device: str) -> None:
    known = served(two_enis(), "eth1")
    assert same(served(known, device), known)


def test_while_mains_own_device_is_the_only_one_nothing_is_made() -> None:
    host = make_host(
        eth0=make_device("10.0.1.10/24", "10.0.1.11/24"),
        routes=["default via 10.0.1.1 dev eth0", "10.0.1.0/24 dev eth0 scope 253 src 10.0.1.10"],
    )
    assert plan(host, "eth0") == []


def test_in_a_family_that_only_mains_own_device_has_nothing_is_made() -> None:
    host = two_enis(
        families=(4, 6),
        eth0=make_device("10.0.1.10/24", "2001:db8:1::10/64"),
        routes=[*TWO_ENIS, "default via fe80::1 dev eth0 metric 1024 pref medium"],
    )
    assert not [step for step in plan(host) if "::" in step]


def test_default_adds_rules_at_the_end() -> None:
    more = set(plan(two_enis(), default="eth1")) - set(plan(two_enis()))
    assert sorted(rules_of(list(more))) == [
        "32698 from 10.0.1.10 lookup main",
        "32699 from all iif eth1 lookup 101",
        "32700 from all to 169.254.0.0/16 lookup main",
        "32701 from all lookup main suppress_prefixlength 1",
        "32702 from all lookup 101",
    ]


def test_default_stays_until_a_run_for_its_device_says_otherwise() -> None:
    host = served(two_enis(), "eth1", default="eth1")
    assert plan(host, "eth0") == []
    assert plan(host, "eth1", default="eth1") == []
    assert {rule[:5] for rule in rules_of(plan(host, "eth1"), "del")} == {
        "32698",
        "32699",
        "32700",
        "32701",
        "32702",
    }
    moved = served(host, "eth0", default="eth0")
    tables = [rule.table for rule in moved.rules if rule.priority == add_routes.DEFAULT]
    assert tables == [100]


@pytest.mark.parametrize(
    "asked", [{"default": "eth1"}, {"gateway": "10.0.3.9"}, {"network": "10.0.3.16/28"}]
)
def test_what_the_hook_of_a_stanza_has_asked_for_the_hook_of_the_next_one_does_not_end(
    asked: dict[str, str],
) -> None:
    """ifupdown calls one for IPv4, one for IPv6, and one for each alias."""
    host = served(two_enis(), "eth1", is_hook=True, **parsed(asked))
    assert plan(host, "eth1", is_hook=True) == []
    ended = plan(host, "eth1")
    assert rules_of(ended, "del") or [step for step in ended if step.startswith("route replace")]


def test_both_families_can_be_given_a_gateway() -> None:
    host = two_enis(
        families=(4, 6),
        eth0=make_device("10.0.1.10/24", "2001:db8:1::10/64"),
        eth1=make_device("10.0.3.22/24", "2001:db8:3::22/64"),
        routes=[*TWO_ENIS, "default via fe80::1 dev eth0 metric 1024 pref medium"],
    )
    for gateway in ("10.0.3.9", "fe80::9"):
        host = served(host, "eth1", is_hook=True, **parsed({"gateway": gateway}))
    explicit = [route for route in host.routes if route.protocol == add_routes.EXPLICIT]
    gateways = [route.words[1] for route in explicit]
    assert sorted(gateways) == ["10.0.3.9", "fe80::9"]


@pytest.mark.parametrize("gateway", ["fe80::9", "2001:db8:3::1"])
def test_a_gateway_of_a_family_that_the_device_does_not_have_is_not_ignored(gateway: str) -> None:
    with pytest.raises(Failure, match="eth1 has no IPv6 address"):
        plan(two_enis(), **parsed({"gateway": gateway}))


def test_a_family_without_a_gateway_costs_the_other_one_nothing() -> None:
    """The lease of IPv4 is lost, and an address of keepalived's is still there."""
    ipv6 = ["2001:db8:1::10/64", "2001:db8:3::22/64"]
    host = two_enis(
        families=(4, 6),
        eth0=make_device("10.0.1.10/24", ipv6[0]),
        eth1=make_device("10.0.3.22/24", ipv6[1]),
        routes=[*TWO_ENIS, "default via fe80::1 dev eth0 metric 1024 pref medium"],
    )
    host = served(host, "eth1")
    lost = make_device("10.0.3.99/32", ipv6[1], group=7700)
    routes = [r for r in host.routes if not (r.family == 4 and "eth1" in r.devices)]
    bare = host._replace(devices={**host.devices, "eth1": lost}, routes=routes)
    found = add_routes.make_plan(bare, Wish(device="eth0"))
    assert found.complaints == ["eth1 has 10.0.3.99/32 and no gateway; expected -g or -n"]
    assert [step for step in found.steps if step.family == 6] == []


def test_two_numbers_that_change_places_are_another_route() -> None:
    line = "10.9.0.0/16 via 10.0.3.9 dev eth1 initcwnd 10 initrwnd 20"
    known = served(two_enis(routes=[*TWO_ENIS, line]), "eth1")
    routes = [
        route._replace(words=(*route.words[:-4], "initcwnd", "20", "initrwnd", "10"))
        if route.destination == "10.9.0.0/16" and route.table == add_routes.MAIN
        else route
        for route in known.routes
    ]
    (step,) = plan(known._replace(routes=routes), "eth1")
    assert step.startswith("route replace 10.9.0.0/16 ")


def test_default_outlives_a_moment_without_an_address() -> None:
    host = served(two_enis(), "eth1", default="eth1")
    bare = host._replace(devices={**host.devices, "eth1": make_device(group=7700)})
    away = served(bare, "eth0")
    assert [rule.table for rule in away.rules if rule.priority == add_routes.DEFAULT] == [101]
    back = away._replace(devices={**away.devices, "eth1": host.devices["eth1"]})
    assert same(served(back, "eth0"), host)


@pytest.mark.parametrize("default", ["", "eth1"])
@pytest.mark.parametrize("device", ["eth0", "eth1"])
def test_planning_after_the_plan_plans_nothing(device: str, default: str) -> None:
    host = served(two_enis(), device, default=default if device == default else "")
    assert plan(host, device, default=default if device == default else "") == []


def test_removing_takes_all_of_it_back_rules_first() -> None:
    host = two_enis()
    known = served(host, default="eth1")
    steps = add_routes.make_plan(known, Wish(remove="eth1")).steps
    assert same(after(known, steps), host)
    kinds = [step.do.split()[0] for step in steps if step.do.split()[0] != "link"]
    assert kinds == sorted(kinds, reverse=True)


def test_removing_mains_own_device_leaves_the_others_right() -> None:
    """Else their packets to its subnet would leave by it, because main says so."""
    known = served(two_enis())
    host = after(known, add_routes.make_plan(known, Wish(remove="eth0")).steps)
    assert host.devices["eth0"].group == 7700
    ours = [rule.text for rule in host.rules if rule.protocol == 77]
    assert ours == [
        "from all lookup 254 suppress_prefixlength 1 suppress_ifgroup 7700",
        "from 10.0.3.22 lookup 101",
    ]
    empty = after(host, add_routes.make_plan(host, Wish(remove="eth1")).steps)
    assert same(empty, two_enis())


def test_removing_an_alias_removes_the_rules_of_its_addresses_only() -> None:
    alias = make_address("10.0.3.23/24", label="eth1:0")
    host = two_enis(eth1=make_device("10.0.3.22/24", alias))
    known = served(host)
    steps = add_routes.make_plan(known, Wish(remove="eth1:0")).steps
    assert commands(steps) == [f"rule del pref 20030 from 10.0.3.23 lookup 101 {END}"]


def test_what_a_device_that_is_gone_has_left_is_removed_by_any_run() -> None:
    known = served(two_enis())
    gone = make_host(
        families=(4,),
        eth0=known.devices["eth0"],
        routes=TWO_ENIS[:2],
    )
    gone = gone._replace(rules=known.rules)
    for wish in (Wish(device="eth0"), Wish(remove="eth1"), Wish(patterns=("eth*",))):
        host = after(gone, add_routes.make_plan(gone, wish).steps)
        assert not [rule for rule in host.rules if rule.protocol == 77]
        assert host.devices["eth0"].group == 0


def test_a_device_that_came_back_is_served_again_by_any_run() -> None:
    """As after a SIGKILL and a replug: the rules are there, the device is in no group."""
    known = served(two_enis())
    routes = [route for route in known.routes if "eth1" not in route.devices or route.table == 254]
    replugged = known._replace(
        devices={**known.devices, "eth1": make_device("10.0.3.22/24")}, routes=routes
    )
    assert same(served(replugged, "eth1"), known)
    steps = add_routes.make_plan(replugged, Wish(patterns=("eth*",))).steps
    assert same(after(replugged, steps), known)


def test_devices_of_earlier_runs_and_of_mains_default_routes_are_served_too() -> None:
    host = two_enis(
        eth2=make_device("10.0.4.9/24", group=7700),
        eth3=make_device("10.0.5.9/24"),
        eth4=make_device("10.0.6.9/24"),
        tun0=make_device("10.0.7.9/24", is_ethernet=False),
        routes=[
            *TWO_ENIS,
            "default via 10.0.5.1 dev eth3 metric 200",
            "default dev tun0 scope 253 metric 300",
        ],
    )
    sources = [rule.split()[2] for rule in rules_of(plan(host)) if rule.startswith("20030")]
    assert sources == ["10.0.1.10", "10.0.3.22", "10.0.4.9", "10.0.5.9"]


@pytest.mark.parametrize(
    ("wish", "sources"),
    [
        (Wish(hardware=True), ["10.0.1.10", "10.0.3.22"]),
        (Wish(patterns=("eth*",)), ["10.0.1.10", "10.0.3.22", "10.0.4.9"]),
        (Wish(patterns=("eth2", "ens*")), ["10.0.1.10", "10.0.4.9"]),
        (Wish(patterns=("nothing",)), []),
    ],
)
def test_watch_serves_hardware_or_what_matches(wish: Wish, sources: list[str]) -> None:
    host = two_enis(
        eth1=make_device("10.0.3.22/24", is_hardware=True),
        eth2=make_device("10.0.4.9/24"),
        eth5=make_device(),
    )
    steps = commands(add_routes.make_plan(host, wish).steps)
    assert [rule.split()[2] for rule in rules_of(steps) if rule.startswith("20030")] == sources


def test_watch_says_what_it_cannot_serve_and_serves_the_others() -> None:
    host = two_enis(
        eth2=make_device("10.0.4.9/32"),
        eth3=make_device("10.0.5.9/24", group=5),
        eth4=make_device(),
    )
    made = add_routes.make_plan(host, Wish(patterns=("eth*",)))
    assert made.complaints == [
        "eth2 has 10.0.4.9/32 and no gateway; expected -g or -n",
        "eth3 is in interface group 5; expected none or 7700",
    ]
    assert commands(made.steps) == plan(two_enis())


def test_a_sibling_that_cannot_be_served_does_not_stop_a_run() -> None:
    host = two_enis(eth2=make_device("10.0.4.9/32", group=7700))
    steps = plan(host)
    assert [step for step in steps if "eth2" in step] == []
    assert steps == plan(two_enis())


@pytest.mark.parametrize(
    ("address", "values", "gets_a_rule"),
    [
        ("10.0.3.23/24", {}, True),
        ("10.0.3.23/32", {}, True),
        ("10.0.3.23/24", {"tentative": True}, True),
        ("2001:db8:3::23/128", {"dynamic": True}, True),
    ],
)
def test_every_address_gets_a_rule(address: str, values: dict[str, Any], gets_a_rule: bool) -> None:
    host = two_enis(
        families=(4, 6), eth1=make_device("10.0.3.22/24", make_address(address, **values))
    )
    rule = f"20030 from {address.partition('/')[0]} lookup 101"
    assert (rule in rules_of(plan(host))) == gets_a_rule


def test_a_tentative_address_is_no_routes_source_yet() -> None:
    line = "2001:db8:9::/64 dev eth1 proto 4 src 2001:db8:3::22 metric 7 pref medium"
    for tentative, words in ((True, "metric 7"), (False, "src 2001:db8:3::22 metric 7")):
        address = make_address("2001:db8:3::22/64", tentative=tentative)
        host = make_host(eth1=make_device(address), routes=[line])
        assert routes_of(plan(host), 101)[0] == f"2001:db8:9::/64 dev eth1 {words}"


@pytest.mark.parametrize(
    ("addresses", "values", "default"),
    [
        (["10.0.3.22/24"], {}, "via 10.0.3.1 dev eth1"),
        (["10.0.22.7/20"], {}, "via 10.0.16.1 dev eth1"),
        (["10.0.3.200/28"], {}, "via 10.0.3.193 dev eth1"),
        (["10.0.3.22/24", "10.7.0.5/16"], {}, "via 10.0.3.1 dev eth1"),
        (["10.0.3.99/32", "10.0.3.22/24"], {}, "via 10.0.3.1 dev eth1"),
        (["10.0.3.99/32", "10.7.0.5/16", "10.0.3.22/24"], {}, "via 10.0.3.1 dev eth1"),
        (["10.9.9.9/32", "10.7.0.5/16", "10.0.3.22/24"], {}, "via 10.7.0.1 dev eth1"),
        (["10.0.3.22/24"], {"gateway": "10.0.3.254"}, "via 10.0.3.254 dev eth1"),
        (["10.0.3.22/24"], {"network": "10.0.0.0/16"}, "via 10.0.0.1 dev eth1"),
        (["10.0.3.22/24"], {"network": "10.0.3.16/28"}, "via 10.0.3.17 dev eth1"),
        (["10.0.3.99/32", "10.0.3.22/24"], {"network": "10.0.3.0/25"}, "via 10.0.3.1 dev eth1"),
        (["10.0.3.22/32"], {"network": "10.0.3.0/24"}, "via 10.0.3.1 dev eth1"),
        (["10.0.3.22/32"], {"gateway": "10.9.9.9"}, "via 10.9.9.9 dev eth1 onlink"),
        (["10.0.3.22/24"], {"gateway": "fe80::9", "is_hook": True}, "via 10.0.3.1 dev eth1"),
    ],
)
def test_the_gateway_of_ipv4(addresses: list[str], values: dict[str, Any], default: str) -> None:
    host = make_host(families=(4,), eth1=make_device(*addresses))
    assert routes_of(plan(host, **parsed(values)), 101)[-1] == f"default {default}"


def parsed(values: dict[str, Any]) -> dict[str, Any]:
    """As the command line reads them."""
    found = dict(values)
    if "gateway" in values:
        found["gateway"] = ipaddress.ip_address(values["gateway"])
    if "network" in values:
        found["network"] = ipaddress.ip_network(values["network"])
    return found


def test_the_address_by_dhcp_says_the_subnet_before_others() -> None:
    vip = make_address("10.7.0.5/16")
    leased = make_address("10.0.3.22/24", dynamic=True)
    host = make_host(families=(4,), eth1=make_device(vip, leased))
    assert routes_of(plan(host), 101)[-1] == "default via 10.0.3.1 dev eth1"


@pytest.mark.parametrize(
    ("lines", "values", "default"),
    [
        ([], {}, "via fe80:ec2::1 dev eth1 metric 1024"),
        (["default via fe80::7 dev eth1 metric 99 pref medium"], {}, "via fe80::7 dev eth1"),
        (
            [
                "default via fe80::9 dev eth1 metric 1024 pref low",
                "default via fe80::8 dev eth1 metric 1024 pref high",
            ],
            {},
            "via fe80::8 dev eth1",
        ),
        (
            ["default via fe80::7 dev eth1 metric 1024 pref medium"],
            {"gateway": "fe80::9"},
            "via fe80::9 dev eth1 metric 1024",
        ),
        ([], {"gateway": "2001:db8:3::1"}, "via 2001:db8:3::1 dev eth1 metric 1024"),
        ([], {"network": "2001:db8:3::/80"}, "via fe80:ec2::1 dev eth1 metric 1024"),
    ],
)
def test_the_gateway_of_ipv6(lines: list[str], values: dict[str, str], default: str) -> None:
    host = make_host(
        eth0=make_device("2001:db8:1::10/64"),
        eth1=make_device("2001:db8:3::22/64"),
        routes=["default via fe80::6 dev eth0 metric 1 pref medium", *lines],
    )
    assert routes_of(plan(host, **parsed(values)), 101)[-1].startswith(f"default {default}")


def test_mains_default_route_by_the_device_keeps_its_attributes_but_the_metric() -> None:
    line = "default via 10.0.3.9 dev eth1 proto 16 src 10.0.3.22 metric 2000 mtu lock 1400"
    host = two_enis(routes=[*TWO_ENIS, line])
    assert (
        routes_of(plan(host), 101)[-1]
        == "default via 10.0.3.9 dev eth1 src 10.0.3.22 mtu lock 1400"
    )


@pytest.mark.parametrize("device", ["eth0", "eth1"])
def test_a_default_route_of_ipv4_by_a_gateway_of_ipv6_is_copied(device: str) -> None:
    """RFC 5549; FRR makes such routes."""
    line = f"default via inet6 fe80::1 dev {device} metric 100"
    table = {"eth0": 100, "eth1": 101}[device]
    others = TWO_ENIS[1:] if device == "eth0" else TWO_ENIS
    host = two_enis(routes=[line, *others])
    assert routes_of(plan(host), table)[-1] == f"default via inet6 fe80::1 dev {device}"


@pytest.mark.parametrize("some", ["tos 0x10", "from 2001:db8:7::/64"])
def test_a_default_route_for_some_packets_only_is_not_the_devices(some: str) -> None:
    ipv6 = ["2001:db8:1::10/64", "2001:db8:3::22/64"]
    gateway = "fe80::7" if "::" in some else "10.0.3.7"
    host = two_enis(
        families=(4, 6),
        eth0=make_device("10.0.1.10/24", ipv6[0]),
        eth1=make_device("10.0.3.22/24", ipv6[1]),
        routes=[f"default {some} via {gateway} dev eth1", *TWO_ENIS],
    )
    defaults = [route for route in routes_of(plan(host), 101) if route.startswith("default")]
    assert defaults == [
        "default via 10.0.3.1 dev eth1",
        "default via fe80:ec2::1 dev eth1 metric 1024",
    ]


@pytest.mark.parametrize(
    ("rules", "is_added"),
    [
        (["0: from all lookup 255"], False),
        (["100: from all lookup 255", "32766: from all lookup 254"], False),  # Cilium's
        (["1000: from all lookup 300", "32765: from all lookup 255"], True),
        (["19990: from all lookup 255 proto 77", "32765: from all lookup 255"], True),
        (["100: from 10.9.9.9 lookup 255", "32765: from all lookup 255"], True),
    ],
)
def test_where_the_kernels_first_rule_has_been_moved_own_addresses_get_one_before_ours(
    rules: list[str], is_added: bool
) -> None:
    host = two_enis()
    host = host._replace(rules=[])
    for line in rules:
        add_routes.read_line(host, 4, line)
    ours = [rule for rule in served(host).rules if rule.priority == add_routes.OWN_ADDRESSES]
    assert [rule.text for rule in ours] == ["from all lookup 255"] * is_added


def test_mains_routes_by_an_eni_are_copied_whole_and_no_others() -> None:
    lines = [
        "10.9.0.0/16 via 10.0.3.9 dev eth1 proto 4 metric 50 onlink mtu lock 1399 initcwnd 20",
        "10.8.0.0/16 dev eth1 scope 253 linkdown",
        "10.7.0.0/16 via inet6 fe80::1 dev eth1",
        "10.6.0.0/16 via 10.0.1.6 dev eth0",
        "10.5.0.0/16 nhid 10 via 10.0.3.9 dev eth1 rto_min lock 5ms quickack 1 congctl reno",
        "6 10.4.0.0/16",
        "10.3.0.0/16 dev docker0 scope 253",
        f"10.2.0.0/16 {BY_ETH0} {BY_ETH1}",
        f"10.1.0.0/16 mtu 1400 \\\tnexthop via 10.0.3.8 dev eth1 weight 1 {BY_ETH1}",
    ]
    assert routes_of(plan(two_enis(routes=[*TWO_ENIS, *lines])), 101) == [
        "10.0.3.0/24 dev eth1 scope 253 src 10.0.3.22",
        "10.8.0.0/16 dev eth1 scope 253",
        "10.7.0.0/16 via inet6 fe80::1 dev eth1",
        "10.5.0.0/16 via 10.0.3.9 dev eth1 rto_min 5ms quickack 1 congctl reno",
        "10.2.0.0/16 via 10.0.3.9 dev eth1",
        "10.1.0.0/16 mtu 1400",  # its next hops come last
        "10.9.0.0/16 via 10.0.3.9 dev eth1 metric 50 onlink mtu lock 1399 initcwnd 20",
        "default via 10.0.3.1 dev eth1",
    ]


def test_mains_own_device_reaches_the_enis_destinations_by_its_gateway() -> None:
    lines = [
        "10.9.0.0/16 via 10.0.3.9 dev eth1",
        "10.9.7.0/24 via 10.0.1.7 dev eth0",  # inside the ENI's, so it comes before it
        "10.6.0.0/16 via 10.0.1.6 dev eth0",  # main says so itself
        f"10.2.0.0/16 {BY_ETH0} {BY_ETH1}",
    ]
    assert routes_of(plan(two_enis(routes=[*TWO_ENIS, *lines])), 100) == [
        "10.9.7.0/24 via 10.0.1.7 dev eth0",
        "10.2.0.0/16 via 10.0.1.6 dev eth0",
        "10.0.3.0/24 via 10.0.1.1 dev eth0",
        "10.9.0.0/16 via 10.0.1.1 dev eth0",
        "default via 10.0.1.1 dev eth0",
    ]


def test_the_next_hops_of_a_route_come_last() -> None:
    line = f"10.1.0.0/16 mtu 1400 \\\tnexthop via 10.0.3.8 dev eth1 weight 1 {BY_ETH1}"
    assert (
        f"route add 10.1.0.0/16 mtu 1400 table 101 {END} nexthop via 10.0.3.8 dev eth1 weight 1"
        " nexthop via 10.0.3.9 dev eth1 weight 3"
    ) in plan(two_enis(routes=[*TWO_ENIS, line]))


def test_a_given_network_takes_the_place_of_the_one_it_overlaps() -> None:
    host = two_enis(eth1=make_device("10.0.3.22/24", "10.7.0.5/16"))
    add_routes.read_line(host, 4, "10.7.0.0/16 dev eth1 proto 2 scope 253 src 10.7.0.5")
    steps = plan(host, network=ipaddress.ip_network("10.0.3.16/28"))
    assert routes_of(steps, 101) == [
        "10.7.0.0/16 dev eth1 scope 253 src 10.7.0.5",
        "10.0.3.16/28 dev eth1 scope 253 src 10.0.3.22",
        "default via 10.0.3.17 dev eth1",
    ]


def test_what_g_and_n_say_is_kept_by_runs_for_others_and_ended_by_one_for_the_device() -> None:
    values = parsed({"gateway": "10.0.3.9", "network": "10.0.3.0/28"})
    host = two_enis(eth1=make_device("10.0.3.12/24"))
    known = served(host, **values)
    assert plan(known, "eth0") == []
    assert plan(known, **values) == []
    assert same(served(known), served(host))


def test_only_the_difference_is_changed() -> None:
    known = served(two_enis(eth1=make_device("10.0.3.22/24", "10.0.3.23/24")))
    moved = make_device("10.0.3.22/24", "10.0.3.24/24", group=7700)
    host = known._replace(devices={**known.devices, "eth1": moved})
    assert plan(host, gateway=ipaddress.ip_address("10.0.3.9")) == [
        "route replace default via 10.0.3.9 dev eth1 table 101 protocol 78",
        f"rule add pref 20030 from 10.0.3.24 lookup 101 {END}",
        f"rule del pref 20030 from 10.0.3.23 lookup 101 {END}",
    ]


@pytest.mark.parametrize(
    "theirs",
    [
        "default via 10.0.3.66 dev eth1 table 101 proto 3",
        "198.51.100.0/24 via 10.0.3.66 dev eth1 table 101 proto 3",
        "2 0.0.0.0/0 dev lo table 101 scope 254",
        "20030: from 10.0.3.99 lookup 101",
        "100: from all fwmark 0x1 lookup 101 proto 4",
    ],
)
def test_a_table_with_anything_of_somebody_elses_is_not_used(theirs: str) -> None:
    kind = {"rules" if "from" in theirs else "routes": [theirs]}
    if "routes" in kind:
        kind["routes"] += TWO_ENIS
    host = two_enis(**kind)
    steps = plan(host)
    assert not [step for step in steps if "table 101" in step or "lookup 101" in step]
    assert "20030 from 10.0.3.22 lookup 1000" in rules_of(steps)
    assert foreign(served(host)) == foreign(host)


def test_a_table_of_ours_that_somebody_elses_rule_leads_to_stays_ours() -> None:
    """README's rule for published ports does so, and is there before the devices after a boot."""
    known = served(two_enis())
    add_routes.read_line(known, 4, "20005: from all fwmark 0x65 lookup 101")
    assert plan(known) == []
    booted = two_enis(rules=["20005: from all fwmark 0x65 lookup 101"], names={"eth1": 101})
    assert "20030 from 10.0.3.22 lookup 101" in rules_of(plan(booted))


def test_a_table_of_ours_that_somebody_else_fills_is_left() -> None:
    known = served(two_enis())
    add_routes.read_line(known, 4, "2 0.0.0.0/0 dev lo table 101 scope 254")
    host = served(known)
    assert foreign(host) == foreign(known)
    assert "from 10.0.3.22 lookup 1000" in [rule.text for rule in host.rules]
    assert [route for route in host.routes if route.table == 101] == known.routes[-1:]


@pytest.mark.parametrize(
    ("device", "wanted", "values", "table"),
    [
        ("eth1", "", {}, 101),
        ("eth10", "", {}, 110),
        ("eth152", "", {}, 252),
        ("eth153", "", {}, 1000),
        ("eth900", "", {}, 1000),
        ("eth01", "", {}, 1000),
        ("eth1x", "", {}, 1000),
        ("ens5", "", {}, 1000),
        ("ens5", "", {"names": {"isp": 1000}, "rules": ["9: from all lookup 1001"]}, 1002),
        ("ens5", "", {"names": {"ens5": 1234}}, 1234),
        ("eth1", "", {"names": {"eth1": 7}}, 7),
        ("eth1", "", {"names": {"eth1": 254}}, 101),
        ("eth1", "", {"names": {"isp": 101}}, 1000),
        ("eth1", "", {"names": {"eth0": 101}}, 1000),
        ("eth1", "", {"routes": ["10.0.3.0/24 dev eth1 table 300 proto 77"]}, 300),
        ("eth1", "", {"routes": ["10.0.3.0/24 dev eth1 table 300 proto 3"]}, 101),
        ("eth1", "", {"rules": ["20030: from 10.0.9.9 lookup 300 proto 77"]}, 300),
        ("eth1", "", {"rules": ["20001: from 10.0.9.9 lookup 300 proto 77"]}, 300),
        ("eth1", "300", {}, 300),
        ("eth1", "300", {"names": {"eth1": 101}}, 300),
        ("eth1", "300", {"routes": ["10.0.3.0/24 dev eth1 table 200 proto 77"]}, 300),
        ("eth1", "isp", {"names": {"isp": 300}}, 300),
        ("eth1", "isp", {}, 101),
        ("eth1", "4294967295", {}, 4294967295),
    ],
)
def test_the_table(device: str, wanted: str, values: dict[str, Any], table: int) -> None:
    host = make_host(
        {"eth0": make_device(), device: make_device("10.0.9.9/24")}, families=(4,), **values
    )
    made = add_routes.make_plan(host, Wish(device=device, table=wanted))
    assert made.tables == {device: table}


@pytest.mark.parametrize(
    ("host", "values", "message"),
    [
        (
            two_enis(),
            {"device": "eth9"},
            "no device named eth9; expected one that `ip link` lists",
        ),
        (
            two_enis(eth1=make_device()),
            {},
            "eth1 has no address; expected a global one, IPv4 or IPv6",
        ),
        (
            two_enis(eth1=make_device("10.0.3.22/24", is_up=False)),
            {},
            "eth1 is down; expected it up",
        ),
        (
            two_enis(eth1=make_device("10.0.3.22/24", group=5)),
            {},
            "eth1 is in interface group 5; expected none or 7700",
        ),
        (
            make_host(eth1=make_device("10.0.3.22/32")),
            {},
            "eth1 has 10.0.3.22/32 and no gateway; expected -g or -n",
        ),
        (
            make_host(eth1=make_device("10.0.3.1/24")),
            {},
            "eth1 has 10.0.3.1/24 and no gateway; expected -g or -n",
        ),
        (
            two_enis(),
            {"gateway": "10.0.9.1"},
            "gateway 10.0.9.1 of eth1 is outside; expected one in 10.0.3.0/24 or 10.0.3.0/24",
        ),
        (
            two_enis(),
            {"gateway": "10.0.3.22"},
            "gateway 10.0.3.22 is eth1's own address; expected another by -g",
        ),
        (
            two_enis(),
            {"network": "10.0.9.0/24"},
            "eth1 has 10.0.3.22; expected an address in 10.0.9.0/24",
        ),
        (
            two_enis(),
            {"table": "main"},
            "table main is reserved or somebody else's; choose another with -t",
        ),
        (
            two_enis(names={"eth0": 300}),
            {"table": "300"},
            "table 300 is reserved or somebody else's; choose another with -t",
        ),
        (
            two_enis(rules=["9: from all lookup 300"]),
            {"table": "300"},
            "table 300 is reserved or somebody else's; choose another with -t",
        ),
    ],
)
def test_what_cannot_be_planned_names_the_thing(
    host: Host, values: dict[str, str], message: str
) -> None:
    with pytest.raises(Failure) as caught:
        plan(host, **parsed(values))
    assert str(caught.value) == message


def test_the_rules_of_the_first_edition_are_replaced_and_its_tables_kept() -> None:
    host = two_enis(
        eth0=make_device("10.0.1.10/24", group=7700),
        eth1=make_device("10.0.3.22/24", group=7700),
        rules=[
            "20000: from all lookup 254 suppress_prefixlength 0 suppress_ifgroup 7700 proto 77",
            "20001: from 10.0.1.10 lookup 100 proto 77",
            "20001: from 10.0.3.22 lookup 101 proto 77",
        ],
        routes=[
            *TWO_ENIS,
            "default via 10.0.1.1 dev eth0 table 100 proto 77",
            "10.0.1.0/24 dev eth0 table 100 proto 77 scope 253 src 10.0.1.10",
            "default via 10.0.3.1 dev eth1 table 101 proto 77",
            "10.0.3.0/24 dev eth1 table 101 proto 77 scope 253 src 10.0.3.22",
        ],
    )
    assert plan(host) == [
        f"route add 10.0.3.0/24 via 10.0.1.1 dev eth0 table 100 {END}",
        f"rule add pref 20000 {NO_ENI} {END}",
        f"rule add pref 20010 from 10.0.1.10 lookup 100 suppress_prefixlength 1 {END}",
        f"rule add pref 20020 from 10.0.1.10 lookup main suppress_prefixlength 1 {END}",
        f"rule add pref 20030 from 10.0.1.10 lookup 100 {END}",
        f"rule add pref 20030 from 10.0.3.22 lookup 101 {END}",
        f"rule del pref 20001 from 10.0.3.22 lookup 101 {END}",
        f"rule del pref 20001 from 10.0.1.10 lookup 100 {END}",
        f"rule del pref 20000 {NO_ENI.replace('length 1', 'length 0')} {END}",
        f"route del 10.0.1.0/24 dev eth0 scope 253 src 10.0.1.10 table 100 {END}",
    ]
    assert same(served(host), served(two_enis()))
