"""What holds for any host, any answer of `ip`, any rt_tables file and any arguments.

Here nothing runs; routes in a real kernel are in test_kernel.py.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hosts import after, foreign, make_device, make_host, same
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lab.any_input import anything, one_line_or, spoilt
from strategies import DEVICES, hosts, wishes

import add_routes
from add_routes import FROM, GROUP, OURS, Host, Wish

pytestmark = pytest.mark.pure


# --- planning routes

# Without shrinking: it takes minutes for a whole host, and the host is short enough to read.
slowly = settings(suppress_health_check=[HealthCheck.too_slow], phases=[Phase.generate])


def planned(host: Host, wish: Wish) -> add_routes.Plan | None:
    return one_line_or(add_routes.Failure, lambda: add_routes.make_plan(host, wish))


def named(host: Host, plan: add_routes.Plan) -> Host:
    """The host with the names that write_names() gives."""
    return host._replace(names={**plan.tables, **host.names})


@settings(slowly, max_examples=200)
@given(host=hosts(), wish=wishes())
def test_a_plan_is_complete_and_can_be_taken_back_and_touches_nobody_else(
    host: Host, wish: Wish
) -> None:
    plan = planned(host, wish)
    if plan is None:
        return
    made = after(host, plan.steps)
    again = planned(named(made, plan), wish)
    assert again
    assert again.steps == []
    assert foreign(made) == foreign(host)
    taken_back = [step._replace(do=step.undo) for step in reversed(plan.steps)]
    assert same(after(made, taken_back), host)


@settings(slowly, max_examples=100)
@given(host=hosts(), wish=wishes())
def test_each_address_of_each_device_leads_to_the_table_of_its_device(
    host: Host, wish: Wish
) -> None:
    plan = planned(host, wish)
    if plan is None or not plan.tables:
        return
    made = after(host, plan.steps)
    for name, table in plan.tables.items():
        assert made.devices[name].group == GROUP
        held = [route for route in made.routes if route.table == table]
        assert {device for route in held for device in route.devices} <= {name}
        assert all(route.protocol in OURS for route in held)
    rules = [rule for rule in made.rules if rule.priority == FROM and rule.protocol == 77]
    sources = [rule.text for rule in rules]
    assert len(set(sources)) == len(sources)
    for rule in rules:
        (owner,) = [name for name, table in plan.tables.items() if table == rule.table]
        assert rule.text.split()[1] in [address.text for address in host.devices[owner].addresses]
    assert len(set(plan.tables.values())) == len(plan.tables)


@settings(slowly, max_examples=100)
@given(host=hosts(), wish=wishes(), removed=st.sampled_from(DEVICES))
def test_removing_a_device_leaves_nothing_of_it(host: Host, wish: Wish, removed: str) -> None:
    plan = planned(host, wish)
    made = named(after(host, plan.steps), plan) if plan else host
    remove = Wish(remove=removed)
    bare = after(made, add_routes.make_plan(made, remove).steps)
    assert add_routes.make_plan(bare, remove).steps == []
    assert foreign(bare) == foreign(host)
    own = add_routes.main_devices(bare)
    assert bare.devices[removed].group != GROUP or removed in own
    assert not [r for r in bare.routes if r.protocol in OURS and removed in r.devices]
    sources = [f"from {address.text} " for address in host.devices[removed].addresses]
    ours = [rule.text for rule in bare.rules if rule.protocol == 77]
    assert not [text for text in ours if text.startswith(tuple(sources))]


# --- answers of `ip`

DEVICE = {
    "ifname": "eth1",
    "flags": ["BROADCAST", "UP"],
    "group": "7700",
    "link_type": "ether",
    "addr_info": [
        {"family": "inet", "local": "10.0.3.22", "prefixlen": 24, "scope": "global"},
        {"family": "inet6", "local": "2001:db8:3::22", "prefixlen": 64, "scope": "0"},
    ],
}
OTHER = {
    "ifname": "eth0",
    "flags": ["UP"],
    "group": "0",
    "link_type": "[1]",
    "addr_info": [{"local": "10.0.1.10", "prefixlen": 24, "scope": "0"}],
}
LINES = [
    "0:\tfrom all lookup 255",
    "20030:\tfrom 10.0.3.22 lookup 101 proto 77",
    "default via 10.0.1.1 dev eth0",
    "10.0.1.0/24 dev eth0 proto 2 scope 253 src 10.0.1.10",
    "10.0.3.0/24 dev eth1 proto 2 scope 253 src 10.0.3.22",
    "default via 10.0.3.1 dev eth1 table 101 proto 77",
    "10.9.0.0/16 \\\tnexthop via 10.0.1.6 dev eth0 weight 1 \\\tnexthop via 10.0.3.9 dev eth1",
    "6 10.4.0.0/16",
]
odd_words = st.lists(st.sampled_from(" ".join(LINES).split()) | st.text(max_size=9), max_size=9)
odd_lines = odd_words.map(" ".join)


@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=spoilt([DEVICE, OTHER]) | anything, lines=st.lists(odd_lines, max_size=5))
def test_whatever_ip_says_add_routes_ends_in_a_plan_or_in_one_line(
    document: Any, lines: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    def run_batch(flags: str, *_: object) -> subprocess.CompletedProcess[str]:
        said = "".join(f"{line}\n" for line in [*lines, *LINES])
        return subprocess.CompletedProcess(
            [], 0, json.dumps(document) if "json" in flags else said, ""
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(add_routes, "run_batch", run_batch)
        code = add_routes.main(["-d", "eth1", "--dry-run"])
    said = capfd.readouterr()
    assert code in (0, 1)
    assert all(line.startswith("add_routes.py: ") for line in said.err.splitlines())
    check_commands(said.out)


@given(odd=st.lists(spoilt(OTHER) | anything, max_size=4), lines=st.lists(odd_lines, max_size=4))
def test_one_odd_item_does_not_spoil_the_others(odd: list[Any], lines: list[str]) -> None:
    for item in odd:
        if isinstance(item, dict) and item.get("ifname") == "eth1":
            return
    found = add_routes.read_devices([*odd, DEVICE])
    assert [address.text for address in found["eth1"].addresses] == ["10.0.3.22", "2001:db8:3::22"]
    host = make_host()
    add_routes.read_lines_of_ip(host, 4, "\n".join([*lines, *LINES]))
    known = [f"{route.destination} {' '.join(route.words)}" for route in host.routes]
    assert "default via 10.0.1.1 dev eth0" in known


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
        patch.setattr(add_routes, "RT_TABLES", ("/nowhere/*", str(path.parent), str(path)))
        assert add_routes.read_names()[name] == table


def check_commands(text: str) -> None:
    """Each line is one command of `ip` that a shell can read, and nothing else."""
    for line in text.removesuffix("nothing to change\n").splitlines():
        assert re.fullmatch(r"ip -[46] (link|rule|route) (set|add|del|replace)( [\w.:/-]+)+", line)


words = st.one_of(
    st.text(max_size=12),
    st.from_regex(r"\A[0-9a-f.:]{1,12}(/[0-9]{1,3})?\Z"),
    st.sampled_from(["eth1", "eth0", "main", "10.0.1.1", "10.0.1.0/24", "eth1;reboot", "-1"]),
)


@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given=st.dictionaries(st.sampled_from(["-d", "-g", "-n", "-t"]), words))
def test_no_argument_becomes_another_command(
    given: Mapping[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    device = given.get("-d", "eth1")
    host = make_host({device: make_device("10.0.1.22/24", "2001:db8::2/64")})
    arguments = [f"{flag}{value}" for flag, value in {"-d": device, **given}.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(add_routes, "read_host", lambda: host)
        try:
            code = add_routes.main([*arguments, "--dry-run"])
        except SystemExit as error:
            code = int(str(error.code))
    said = capfd.readouterr()
    assert code in (0, 1, 2)
    assert said.err.count("add_routes.py: ") == (1 if code else 0)
    check_commands(said.out)
