"""README's two tables of who may claim, and from whom: for each life-cycle state that Auto Scaling
knows, they say what `decide` decides."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

import pytest
from botocore import loaders
from lab import README

from eni_ctl import Eni, Failure, Instance, NotYet, decide

HERE = Instance("i-00000001", "us-west-1a", "us-west-1", "web", "InService")
FREE = Eni("eni-00000001", "06:00:00:00:00:01", "us-west-1a", "10.0.1.22", "web")
HELD = FREE._replace(
    status="in-use",
    holder="i-00000002",
    attachment="eni-attach-00000001",
    attachment_status="attached",
    device_index=1,
)
OWN, HOLDERS = "own state", "held by an instance in"
CLAIMS, WAITS, TAKES = "claims", "waits", "takes"


@functools.cache
def states() -> list[str]:
    """All life-cycle states of Auto Scaling's model, and no group."""
    model = loaders.Loader().load_service_model("autoscaling", "service-2")
    return [*model["shapes"]["LifecycleState"]["enum"], "in no group"]


def as_claimant(state: str, force: bool) -> str:
    """What an instance in that state does about a free ENI."""
    here = HERE._replace(state="" if state == "in no group" else state)
    try:
        decision = decide(here, [FREE], {}, force, "")
    except NotYet:
        return WAITS
    except Failure as error:
        return f"exit code {error.exit_code}"
    assert [(step.action, step.eni) for step in decision.steps] == [("attach", FREE)]
    return CLAIMS


def from_holder(state: str, force: bool) -> str:
    """What an instance in service does about an ENI whose holder is in that state."""
    decision = decide(HERE, [HELD], {HELD.holder: state}, force, "")
    if not decision.steps:
        assert decision.waiting_for
        return WAITS
    assert [(step.action, step.eni) for step in decision.steps] == [("release", HELD)]
    return TAKES


def read_table(first_heading: str) -> list[list[str]]:
    """The rows of the README's table whose first heading that is."""
    pattern = rf"^\| {re.escape(first_heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)"
    tables = re.findall(pattern, README, re.M)
    assert len(tables) == 1, f"README has {len(tables)} tables with {first_heading!r}"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in tables[0].splitlines()]


def covers(cell: str, state: str) -> bool:
    """Whether a cell such as "`InService`, `Pending…`" is about a state."""
    plain = cell.replace("`", "").replace("in no group with -n", "in no group")
    for name in re.split(r", (?:or )?| or ", plain):
        if state == name or (name.endswith("…") and state.startswith(name[:-1])):
            return True
    return False


def promise(table: str, state: str, force: bool) -> str:
    """The cell of the README for a state."""
    rows = [row for row in read_table(table) if covers(row[0], state)]
    assert len(rows) == 1, f"README has {len(rows)} rows for {state} in the table {table!r}"
    return rows[0][2 if force else 1]


def all_cases() -> Iterator[tuple[str, str, str, str, str]]:
    """(state, as claimant, with -f, from holder, with -f)"""
    for state in states():
        yield (
            state,
            as_claimant(state, force=False),
            as_claimant(state, force=True),
            from_holder(state, force=False),
            from_holder(state, force=True),
        )


@pytest.mark.pure
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("state", states())
def test_the_readme_says_who_may_claim(state: str, force: bool) -> None:
    assert promise(OWN, state, force).startswith(as_claimant(state, force))


@pytest.mark.pure
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("state", states())
def test_the_readme_says_from_whom(state: str, force: bool) -> None:
    assert promise(HOLDERS, state, force).startswith(from_holder(state, force))


@pytest.mark.pure
def test_all_states_in_one_table(record_property: Callable[[str, object], None]) -> None:
    """Printed at the end of the session."""
    head = ("state", "free: -a", "free: -a -f", "held by such: -a", "held by such: -a -f")
    for state, *cells in [head, *all_cases()]:
        record_property(f"{state:28}", "".join(f"{cell:24}" for cell in cells).rstrip())
