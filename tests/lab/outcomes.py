"""What became of the routing cases, and the table of them that ends a run of the tests.

A case is a test of tests/add_routes/test_packets_*.py. Each runs once for each way to call
add_routes.py, which is a column of the table.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any

import pytest

PROPERTY = "outcome of a routing case"


class Outcome(enum.IntEnum):
    """The later, the worse."""

    PASSED = 0
    ANOTHER_RUN = 1
    SNIPPET = 2
    FAILED = 3

    @property
    def words(self) -> str:
        return {
            Outcome.PASSED: "passed",
            Outcome.ANOTHER_RUN: "needs another run",
            Outcome.SNIPPET: "needs the snippet",
            Outcome.FAILED: "FAILED",
        }[self]


def needs(**modes: Outcome) -> pytest.MarkDecorator:
    """Marks a case with the outcomes that README documents, by mode, where they are not PASSED."""
    return pytest.mark.needs(**modes)


class Case:
    """One test as a row and a column of the table."""

    def __init__(self, request: pytest.FixtureRequest, mode: str, column: str) -> None:
        item = request.node
        chosen = item.callspec.id if hasattr(item, "callspec") else ""
        parameters = [part for part in chosen.split("-") if part not in ("", mode)]
        self.test = item.originalname.removeprefix("test_").replace("_", " ")
        self.variant = ", ".join(parameters)
        self.group = item.path.stem.removeprefix("test_packets_").replace("_", " ")
        self.column = column
        self.item = item
        self.outcomes: list[Outcome] = []
        self.expected = Outcome.PASSED
        for mark in item.iter_markers("needs"):
            self.expected = mark.kwargs.get(mode, self.expected)

    def record(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        row = [self.group, self.test, self.variant, self.column, int(outcome)]
        self.item.user_properties.append((PROPERTY, row))

    def is_better_than_expected(self) -> bool:
        """Then what README says of it is out of date."""
        return bool(self.outcomes) and max(self.outcomes) < self.expected


Cells = dict[str, dict[str, Outcome]]  # by column and variant, for instance a subnet and a family


def summary(reports: Iterable[pytest.TestReport]) -> list[str]:
    """The table's lines, a row for each test with all its variants."""
    table: dict[tuple[str, str], Cells] = {}
    columns: list[str] = []
    for group, test, variant, column, number in rows(reports):
        cells = table.setdefault((group, test), {}).setdefault(column, {})
        cells[variant] = max(cells.get(variant, Outcome.PASSED), Outcome(number))
        if column not in columns:
            columns.append(column)
    if not table:
        return []
    columns.sort(key=lambda column: (column == "--watch", column))
    lines = ["", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    group_before = ""
    for (group, test), by_column in sorted(table.items()):
        if group != group_before:
            lines.append(f"| **{group}** |{' |' * len(columns)}")
            group_before = group
        shown = [in_words(by_column.get(column, {}).values()) for column in columns]
        lines.append(f"| {test} | {' | '.join(shown)} |")
    lines.append(f"| **all** |{' |' * len(columns)}")
    for outcome in Outcome:
        counts = [count(table.values(), column, outcome) for column in columns]
        lines.append(f"| {outcome.words} | {' | '.join(map(str, counts))} |")
    return lines


def in_words(outcomes: Iterable[Outcome]) -> str:
    """How many variants of a test had which outcome."""
    found = list(outcomes)
    parts = [f"{found.count(outcome)} {outcome.words}" for outcome in sorted(set(found))]
    return ", ".join(parts)


def count(table: Iterable[Cells], column: str, outcome: Outcome) -> int:
    return sum(list(cells.get(column, {}).values()).count(outcome) for cells in table)


def rows(reports: Iterable[pytest.TestReport]) -> Iterable[Any]:
    for report in reports:
        if report.when == "teardown":  # it has all that was recorded
            for name, row in report.user_properties:
                if name == PROPERTY:
                    yield row
