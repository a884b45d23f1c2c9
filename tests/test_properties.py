"""What holds for any input: hosts, answers of `ip` and EC2, files and arguments.

Here nothing runs; state files through real readers are in test_state_file.py, routes in a real
kernel in test_routes_kernel.py, and decide() in test_decide.py.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab.ec2 import wildcard
from test_routes_plan import make_host, make_options

import add_routes
import eni_ctl
from add_routes import GROUP, PRIORITIES, PROTOCOL, Host, Route, Rule, Step

pytestmark = pytest.mark.pure
settings.register_profile("pure", deadline=None, derandomize=True)
settings.load_profile("pure")

T = TypeVar("T")


def one_line_or(failure: type[Exception], call: Callable[[], T]) -> T | None:
    """What the call returns, or None where it raises that failure, whose text must be one line."""
    try:
        return call()
    except failure as error:
        text = str(error)
    assert len(text.splitlines()) == 1, text
    return None


# --- planning routes

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
def routes(draw: st.DrawFn, protocol: int, tables: Mapping[str, int]) -> Route:
    """A route to somewhere else than the devices' subnets: ours, in its device's table, or not."""
    family = draw(st.sampled_from([4, 6]))
    if draw(st.booleans()):
        destination = "default"
    else:
        number = draw(st.integers(0, 9))
        destination = f"198.51.100.{number * 16}/28" if family == 4 else f"2001:db8:a{number}::/64"
    gateway = draw(st.sampled_from(["", "10.0.0.99" if family == 4 else "fe80::99"]))
    metric = draw(st.sampled_from([0, 50])) if family == 4 else 1024
    device, table = draw(st.sampled_from(DEVICES)), draw(st.sampled_from([254, 101, 300]))
    if protocol == PROTOCOL:
        table = tables[device]
    return Route(family, table, destination, metric, device, gateway, protocol=protocol)


stale_rules = st.builds(
    lambda family, priority, host, table: Rule(
        family,
        priority,
        ("10.0.0." if family == 4 else "2001:db8::") + str(host)
        if priority == add_routes.FROM
        else "all",
        table if priority in (add_routes.FROM, add_routes.DEFAULT) else add_routes.MAIN,
    ),
    st.sampled_from([4, 6]),
    st.sampled_from(PRIORITIES),
    st.integers(2, 9),
    st.sampled_from([*TABLES.values(), 300]),
)  # some for addresses that the first device has


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    """Any state that a host may be in, with leftovers of ours and things of others."""
    named = draw(st.sets(st.sampled_from(DEVICES)))
    vpn = draw(st.sampled_from([99, *(TABLES[d] for d in DEVICES if d not in named)]))
    # Where our leftovers are: runs with -t may have been before.
    left = {d: draw(st.sampled_from([table, table + 200])) for d, table in TABLES.items()}
    if not named:
        left = dict(zip(DEVICES, draw(st.permutations(sorted(left.values())))))
    ours = draw(st.lists(routes(PROTOCOL, left), max_size=4))
    theirs = draw(st.lists(routes(3, left), max_size=6))
    found = {route[:4]: route for route in ours + theirs}  # the kernel has one of a kind
    rules = draw(st.lists(stale_rules, max_size=5, unique=True))
    return make_host(
        groups={"lo": 0} | {device: draw(st.sampled_from([0, GROUP])) for device in DEVICES},
        addresses={device: draw(addresses_of(device)) for device in DEVICES},
        rules=rules,
        routes=list(found.values()),
        tables={253, 254, 255, *(r.table for r in rules), *(r.table for r in found.values())},
        names={"main": 254, "vpn": vpn} | {device: TABLES[device] for device in named},
        families=(4, 6),
    )


def done(host: Host, steps: Sequence[tuple[int, str]]) -> Host:
    """The host after these commands of `ip`, each of which must be one that the kernel accepts and
    that concerns nobody but us."""
    groups, rules = dict(host.groups), list(host.rules)
    routes = {route[:4]: route for route in host.routes}
    for family, words in steps:
        kind, verb, *rest = words.replace(" onlink", " onlink yes").split()
        if kind == "link":
            groups[rest[1]] = int(rest[3])
            continue
        if kind == "route":
            rest = ["to", *rest]
        given = dict(zip(rest[::2], rest[1::2]))
        assert given["protocol"] == str(PROTOCOL)
        if kind == "rule":
            table = {"main": "254"}.get(given["lookup"], given["lookup"])
            rule = Rule(family, int(given["pref"]), given["from"], int(table))
            assert (rule in rules) == (verb == "del"), words
            (rules.remove if verb == "del" else rules.append)(rule)
        else:
            named = {"to": "destination", "dev": "device", "via": "gateway", "src": "source"}
            values: dict[str, Any] = {named[n]: v for n, v in given.items() if n in named}
            numbers = {"metric": "0", **given}
            values |= {name: int(numbers[name]) for name in ("table", "metric", "protocol")}
            route = Route(family, **values, onlink="onlink" in given)
            known = routes.get(route[:4])
            assert (known is not None) == (verb in ("del", "replace")), words
            assert known is None or known.protocol == PROTOCOL, words
            routes[route[:4]] = route
            if verb == "del":
                del routes[route[:4]]
    tables = {253, 254, 255, *(r.table for r in rules), *(r.table for r in routes.values())}
    return host._replace(groups=groups, rules=rules, routes=list(routes.values()), tables=tables)


def same(one: Host, other: Host) -> bool:
    return (one.groups, sorted(one.rules), sorted(one.routes)) == (
        other.groups,
        sorted(other.rules),
        sorted(other.routes),
    )


def of_others(host: Host, device: str) -> list[Any]:
    """What no run for the device may touch."""
    groups = {name: group for name, group in host.groups.items() if name != device}
    routes = [r for r in host.routes if (r.protocol, r.device) != (PROTOCOL, device)]
    mine = [str(address.ip) for address in host.addresses[device]]
    served = {n: t for n, t in host.names.items() if n in DEVICES and n != device}
    rules = [
        r
        for r in host.rules
        if r.priority == add_routes.FROM
        and r.table in served.values()
        and add_routes.owner(host, device, r.table) in served
        and r.source not in mine
    ]
    return [groups, sorted(routes), sorted(rules)]


def plan(host: Host, device: str, **values: Any) -> list[Step]:
    options = make_options(device, **values)
    table = 0 if options.remove else add_routes.choose_table(host, device)
    return add_routes.plan(host, options, table)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(host=hosts(), device=st.sampled_from(DEVICES), default=st.booleans())
def test_a_plan_is_complete_and_can_be_taken_back_and_touches_nobody_else(
    host: Host, device: str, default: bool
) -> None:
    steps = one_line_or(add_routes.Failure, lambda: plan(host, device, default=default))
    if steps is None:
        return
    table = add_routes.choose_table(host, device)
    after = done(host, [(step.family, step.do) for step in steps])
    after = after._replace(names={device: table, **host.names})  # write_name() does
    assert plan(after, device, default=default) == []
    assert of_others(after, device) == of_others(host, device)
    own = sorted(str(address.ip) for address in host.addresses[device])
    assert sorted(r[2:] for r in after.rules if r.source in own) == [(ip, table) for ip in own]
    assert same(done(after, [(step.family, step.undo) for step in steps[::-1]]), host)

    gone = done(after, [(s.family, s.do) for s in plan(after, device, remove=True)])
    assert of_others(gone, device) == of_others(host, device)
    assert not [r for r in gone.routes if (r.protocol, r.device) == (PROTOCOL, device)]
    assert not [r for r in gone.rules if r.source in own]
    assert gone.groups[device] == 0
    assert plan(gone, device, remove=True) == []


@given(host=hosts())
def test_no_two_devices_share_a_table_nor_take_one_with_another_name(host: Host) -> None:
    tables = {}
    left = {r.device: r.table for r in host.routes if r.protocol == PROTOCOL}
    for device in DEVICES:
        try:
            steps = plan(host, device)
        except add_routes.Failure:
            continue
        tables[device] = add_routes.choose_table(host, device)
        others = {number for name, number in host.names.items() if name != device}
        assert tables[device] not in others or tables[device] == left.get(device)
        host = done(host, [(step.family, step.do) for step in steps])
        host = host._replace(names={device: tables[device], **host.names})
    assert len(set(tables.values())) == len(tables)
    assert tables == {device: add_routes.choose_table(host, device) for device in tables}


# --- answers of `ip`

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
LINKS = [{"ifname": "lo", "group": "default"}, {"ifname": "eth1", "group": "7700"}]
DEVICE = {"ifname": "eth1", "flags": ["BROADCAST", "UP"], "addr_info": []}
ADDRESSES = [
    {"family": "inet", "local": "10.0.1.22", "prefixlen": 24, "scope": "global"},
    {"family": "inet6", "local": "2001:db8:1::22", "prefixlen": 64, "scope": "0"},
]
RULES = [
    {"priority": 0, "src": "all", "table": "255"},
    {"priority": 20001, "src": "10.0.1.5", "table": "101", "protocol": "77"},
]
ROUTES = [
    {"dst": "default", "gateway": "10.0.1.1", "dev": "eth1", "protocol": "16", "flags": []},
    {"dst": "10.0.1.0/24", "dev": "eth1", "prefsrc": "10.0.1.22", "flags": []},
    {"dst": "default", "via": {"family": "inet6", "host": "fe80::1"}, "dev": "eth1", "flags": []},
]


@st.composite
def spoilt(draw: st.DrawFn, document: Any) -> Any:
    """The document with something else in the place of one of its parts, or without it."""
    copy = json.loads(json.dumps(document))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = node if isinstance(node, dict) else range(len(node))
        for key in list(keys) if isinstance(node, (dict, list)) else ():
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(copy)
    node, key = draw(st.sampled_from(places))
    if draw(st.booleans()):
        node[key] = draw(anything)
    else:
        del node[key]
    return copy


listed = [LINKS, [{**DEVICE, "addr_info": ADDRESSES}], RULES, ROUTES]


@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.one_of(spoilt(listed), st.lists(anything, min_size=4, max_size=4)))
def test_whatever_ip_says_add_routes_ends_in_a_plan_or_in_one_line(
    documents: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    output = "".join(f"{json.dumps(document)}\n" for document in documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(add_routes, "ip", lambda *_: (output, {}))
        code = add_routes.main(["-d", "eth1", "--dry-run"])
    said = capsys.readouterr()
    assert (code, len(said.err.splitlines())) in [(0, 0), (1, 1)]
    check_commands(said.out)


ENI = eni_ctl.Eni("eni-1", "02:00:00:00:00:01", "us-west-1a", "10.0.1.22")


@settings(max_examples=1000)
@given(document=spoilt([{**DEVICE, "addr_info": ADDRESSES}]) | anything)
def test_whatever_ip_says_eni_ctl_finds_the_address_or_waits(document: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eni_ctl, "find_device", lambda mac: "eth1")
        patch.setattr(eni_ctl, "run_ip", lambda *_: document)
        network = one_line_or(eni_ctl.NotYet, lambda: eni_ctl.read_network(ENI))
    if network:
        subnet = ipaddress.ip_interface(f"{ENI.ip}/{network.prefix}").network
        assert network.gateway == str(subnet.network_address + 1)


# --- answers of EC2

NAMED = {"Key": "Name", "Value": "web"}
DESCRIBED = {
    "NetworkInterfaceId": "eni-1",
    "MacAddress": "02:00:00:00:00:01",
    "AvailabilityZone": "us-west-1a",
    "PrivateIpAddress": "10.0.1.22",
    "Status": "in-use",
    "TagSet": [NAMED, {"Key": "FQDN", "Value": "web.example.com"}],
    "Attachment": {
        "AttachmentId": "eni-attach-1",
        "InstanceId": "i-00000001",
        "DeviceIndex": 1,
        "Status": "attached",
    },
}


@settings(max_examples=1000)
@given(items=st.lists(spoilt(DESCRIBED) | anything, max_size=3))
def test_whatever_ec2_says_its_enis_are_read_or_asked_for_again(items: list[Any]) -> None:
    def pages(self: Any, action: str, key: str, **_: Any) -> list[Any]:
        return items

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eni_ctl.Aws, "pages", pages)
        aws = object.__new__(eni_ctl.Aws)
        enis = one_line_or(eni_ctl.Throttled, lambda: aws.enis("web"))
    if enis is not None:
        named = [item for item in items if NAMED in item.get("TagSet", [])]
        assert [eni.id for eni in enis] == [item["NetworkInterfaceId"] for item in named]


@given(value=st.text("a*?\\[]", max_size=6), other=st.text("a*?\\[]", max_size=6))
def test_an_escaped_filter_matches_its_value_and_nothing_else(value: str, other: str) -> None:
    pattern = wildcard(eni_ctl.escape_filter(value))
    assert pattern.fullmatch(value)
    assert bool(pattern.fullmatch(other)) == (value == other)


# --- files and arguments


@given(lines=st.lists(st.binary(max_size=30)), table=st.integers(1, 2**32), name=st.from_regex(
    r"\A[a-z][a-z0-9.-]{0,10}\Z"
))  # fmt: skip
def test_rt_tables_are_read_whatever_else_they_hold(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], table: int, name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "rt_tables"
    path.write_bytes(b"\n".join([*lines, f"{table}\t{name}".encode(), b""]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(add_routes, "RT_TABLES", (str(path),))
        assert add_routes.read_names()[name] == table


def check_commands(text: str) -> None:
    """Each line is one command of `ip` that a shell can read, and nothing else."""
    for line in text.splitlines():
        assert re.fullmatch(r"ip -[46] (link|rule|route) (set|add|del|replace)( [\w.:/-]+)+", line)


words = st.one_of(
    st.text(max_size=12),
    st.from_regex(r"\A[0-9a-f.:]{1,12}(/[0-9]{1,3})?\Z"),
    st.sampled_from(["eth1", "eth0", "main", "10.0.1.1", "10.0.1.0/24", "eth1;reboot", "-1"]),
)


@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given=st.dictionaries(st.sampled_from(["-d", "-g", "-n", "-t"]), words))
def test_no_argument_becomes_another_command(
    given: Mapping[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = given.get("-d", "eth1")
    interfaces = [ipaddress.ip_interface("10.0.1.22/24"), ipaddress.ip_interface("2001:db8::2/64")]
    host = make_host(groups={device: 0}, addresses={device: interfaces}, families=(4, 6))
    arguments = [f"{flag}{value}" for flag, value in {"-d": device, **given}.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(add_routes, "read_host", lambda verbose: host)
        try:
            code = add_routes.main([*arguments, "--dry-run"])
        except SystemExit as error:
            code = int(str(error.code))
    said = capsys.readouterr()
    assert (code, len(said.err.splitlines())) in [(0, 0), (1, 1), (2, 1)]
    check_commands(said.out)
