"""How long a wait lasts, and how often it asks, by what goes wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from eni_ctl import Deadline, Failure, NeedsPerson, NotYet, Overloaded, Poll, wait

pytestmark = pytest.mark.pure
POLL = Poll(quick=1.0, slow=5.0, slowest=15.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def waiting(errors: Sequence[Failure], seconds: float = 300) -> tuple[float, int]:
    """How long a wait lasts that meets these errors, the last for ever; and how many attempts."""
    clock = Clock()
    count = 0

    def attempt() -> None:
        nonlocal count
        count += 1
        raise errors[min(count, len(errors)) - 1]

    with pytest.raises(Failure):
        wait(attempt, Deadline(seconds, clock, clock.sleep), POLL)
    return clock.now - 100, count


@pytest.mark.parametrize(
    ("errors", "lasts", "attempts"),
    [
        ([NotYet("x")], 300, 10 + 290 / 5),
        ([NeedsPerson("x")], 10, 6),  # after 0, 1, 3, 7, 9, 10 s
        ([NotYet("x"), NeedsPerson("x")], 11, 7),
        ([NeedsPerson("x"), NotYet("x"), NeedsPerson("x")], 12, 8),
        ([Failure("x")], 0, 1),
    ],
)
def test_waits_last_as_long_as_waiting_can_help(
    errors: list[Failure], lasts: float, attempts: int
) -> None:
    seconds, count = waiting(errors)
    assert abs(seconds - lasts) <= 1
    assert abs(count - attempts) <= 1


def test_a_wait_asks_quickly_again_when_its_reason_has_changed() -> None:
    _, steady = waiting([NotYet("x")], seconds=60)
    _, changed = waiting([NotYet("x")] * 12 + [NotYet("y")], seconds=60)
    assert steady == 10 + 10
    assert changed == 10 + 2 + 10 + 6


def test_an_overload_now_and_then_does_not_make_a_long_wait_ask_more_often() -> None:
    steady = [NotYet("held")] * 20
    _, usual = waiting([NotYet("held")])
    _, throttled = waiting([*steady, *[Overloaded("slow down"), *steady] * 9, NotYet("held")])
    assert throttled <= usual


def test_a_wait_with_patience_ends_before_the_deadline_with_its_own_error() -> None:
    clock = Clock()

    def attempt() -> None:
        raise NotYet("x")

    with pytest.raises(NotYet, match=r"^x$"):
        wait(attempt, Deadline(300, clock, clock.sleep), POLL, patience=5)
    assert clock.now == 105


def test_a_reported_wait_has_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="eni_ctl")
    waiting([NotYet("x")])
    assert len(caplog.messages) == 7
    assert caplog.messages[0] == "waiting, 2 s of 300 s: x"


def test_waits_grow_under_throttling_and_end_at_the_deadline() -> None:
    seconds, count = waiting([Overloaded("x")])
    assert seconds == 300
    assert 20 <= count <= 50
