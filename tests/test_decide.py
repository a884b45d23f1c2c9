"""The pure parts of eni_ctl.py, as tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eni_ctl import (
    AlreadyGone,
    Deadline,
    Denied,
    Eni,
    Failure,
    Here,
    IndexTaken,
    InUse,
    NeedsPerson,
    NotYet,
    Throttled,
    decide,
    escape_filter,
    failure,
    wait,
)

pytestmark = pytest.mark.pure

HERE = Here("i-00000001", "us-west-1a", "us-west-1", "web", "InService")
STATES = ["InService", "Pending", "Standby", "Detached", "Terminating", "Terminating:Wait"]
STATES += ["Terminated", "Warmed:Running", "Warmed:Terminating", "in no group", ""]


def eni(
    number: int, holder: str = "", status: str = "attached", index: int = 1, zone: str = "a"
) -> Eni:
    attached = {
        "status": "in-use",
        "holder": holder,
        "attachment": f"eni-attach-{number}",
        "attachment_status": status,
        "device_index": index,
    }
    name = f"eni-{number}"
    mac = f"02:00:00:00:00:{number:02x}"
    return Eni(name, mac, f"us-west-1{zone}", f"10.0.1.{number}", **(attached if holder else {}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("enis", "states", "do", "which"),
    [
        ([eni(1)], {}, "attach", "eni-1"),
        ([eni(1, "i-00000001")], {}, "keep", "eni-1"),
        ([eni(1), eni(2, "i-00000001", "attaching")], {}, "keep", "eni-2"),
        ([eni(1, "i-00000001", index=2), eni(2, "i-00000001")], {}, "keep", "eni-2"),
        ([eni(1, "i-00000001", "detaching"), eni(2)], {}, "wait", ""),
        ([eni(1, "i-00000002")], {}, "wait", ""),
        ([eni(1, "i-00000002")], {"i-00000002": "InService"}, "wait", ""),
        ([eni(1, "i-00000002")], {"i-00000002": "Standby"}, "wait", ""),
        ([eni(1, "i-00000002")], {"i-00000002": "Terminating:Proceed"}, "release", "eni-1"),
        ([eni(1, "i-00000002")], {"i-00000002": "Warmed:Terminating"}, "release", "eni-1"),
        ([eni(1, "i-00000002"), eni(2)], {"i-00000002": "Terminating"}, "attach", "eni-2"),
        ([eni(1, "i-00000001", index=0), eni(2)], {}, "attach", "eni-2"),
        ([eni(1, zone="c"), eni(2)], {}, "attach", "eni-2"),
        ([eni(1, "amazon-elb")], {}, "wait", ""),
    ],
)
def test_the_next_step(enis: list[Eni], states: dict[str, str], do: str, which: str) -> None:
    step = decide(HERE, enis, states, False, "")
    assert step.do == do
    assert (step.enis[0].id if step.enis else "") == which


@pytest.mark.parametrize(
    ("enis", "words"),
    [
        ([], 'no network interface named "web" in us-west-1'),
        (
            [eni(1, zone="c")],
            'no network interface named "web" in us-west-1a; eni-1 is in us-west-1c',
        ),
        (
            [eni(1, "i-00000002", index=0)],
            'no network interface named "web" in us-west-1; eni-1 is the primary one of i-00000002',
        ),
    ],
)
def test_what_needs_a_person(enis: list[Eni], words: str) -> None:
    with pytest.raises(NeedsPerson, match=f"^{words}$"):
        decide(HERE, enis, {}, False, "")


def test_the_eni_that_was_claimed_last_is_tried_first() -> None:
    enis = [eni(number) for number in range(1, 9)]
    for claimed in enis:
        assert decide(HERE, enis, {}, False, claimed.id).enis[0] == claimed


def test_hosts_try_a_pool_in_different_orders() -> None:
    """With 100 hosts and 100 ENIs, random first choices are 63 different ones on average."""
    pool = [eni(number) for number in range(1, 101)]
    hosts = [HERE._replace(instance=f"i-{number:08x}") for number in range(100)]
    first = {decide(host, pool, {}, False, "").enis[0].id for host in hosts}
    assert len(first) > 50


holders = st.sampled_from(["", "i-00000001", "i-00000002", "i-00000003", "amazon-elb"])
pools = st.lists(
    st.builds(
        eni,
        st.integers(1, 99),
        holders,
        st.sampled_from(["attaching", "attached", "detaching"]),
        st.integers(0, 3),
        st.sampled_from("ac"),
    ),
    max_size=8,
    unique_by=lambda eni: eni.id,
)


@given(
    enis=pools,
    states=st.dictionaries(st.sampled_from(["i-00000002", "i-00000003"]), st.sampled_from(STATES)),
    claimed=st.sampled_from(["", "eni-1", "eni-2", "eni-3"]),
)
def test_no_eni_of_a_holder_that_may_be_in_service_is_ever_touched(
    enis: list[Eni], states: dict[str, str], claimed: str
) -> None:
    try:
        step = decide(HERE, enis, states, False, claimed)
    except NeedsPerson:
        return
    for chosen in step.enis:
        assert chosen in enis
        assert chosen.device_index != 0
        if step.do == "attach":
            assert (chosen.holder, chosen.zone) == ("", HERE.zone)
        if step.do == "release":
            assert "Terminat" in states[chosen.holder]
            assert chosen.zone == HERE.zone
        if step.do == "keep":
            assert chosen.holder == HERE.instance


@pytest.mark.parametrize(
    ("code", "status", "message", "kind", "exit_code"),
    [
        ("UnauthorizedOperation", 403, "You are not authorized", Denied, 4),
        ("InvalidNetworkInterface.InUse", 400, "Interface: [eni-1] in use.", InUse, 1),
        ("InvalidParameterValue", 400, "interface eni-1 is currently in use", InUse, 1),
        (
            "InvalidParameterValue",
            400,
            "Instance 'i-1' already has an interface attached at device index '1'.",
            IndexTaken,
            1,
        ),
        ("InvalidParameterValue", 400, "something else", NeedsPerson, 4),
        ("InvalidAttachmentID.NotFound", 400, "", AlreadyGone, 1),
        ("IncorrectInstanceState", 400, "", NotYet, 1),
        ("RequestLimitExceeded", 503, "", Throttled, 1),
        ("Throttling", 400, "Rate exceeded", Throttled, 1),
        ("503", 503, "Service Unavailable", Throttled, 1),
        ("403", 403, "Forbidden", Throttled, 1),
        ("AttachmentLimitExceeded", 400, "", NeedsPerson, 4),
        ("SomethingNew", 400, "", NeedsPerson, 4),
    ],
)
def test_what_error_codes_mean(
    code: str, status: int, message: str, kind: type[Failure], exit_code: int
) -> None:
    found = failure("AttachNetworkInterface", code, status, message)
    assert type(found) is kind
    assert found.code == exit_code
    assert "\n" not in str(found)


def test_filters_take_escaped_values_literally() -> None:
    assert escape_filter("a*b?c\\d") == "a\\*b\\?c\\\\d"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def waiting(errors: list[Failure], seconds: float = 300) -> tuple[float, int]:
    """How long a wait lasts that meets these errors, the last for ever; and how many attempts."""
    clock = Clock()
    count = 0

    def attempt() -> None:
        nonlocal count
        count += 1
        raise errors[min(count, len(errors)) - 1]

    with pytest.raises(Failure):
        wait(attempt, Deadline(seconds, clock, clock.sleep), 1.0)
    return clock.now - 100, count


@pytest.mark.parametrize(
    ("errors", "lasts", "attempts"),
    [
        ([NotYet("x")], 300, 300),
        ([NeedsPerson("x")], 10, 10),
        ([NotYet("x"), NeedsPerson("x")], 11, 11),
        ([NeedsPerson("x"), NotYet("x"), NeedsPerson("x")], 12, 12),
        ([Failure("x")], 0, 1),
    ],
)
def test_waits_last_as_long_as_waiting_can_help(
    errors: list[Failure], lasts: float, attempts: int
) -> None:
    seconds, count = waiting(errors)
    assert abs(seconds - lasts) <= 1
    assert abs(count - attempts) <= 1


def test_waits_grow_under_throttling_and_end_at_the_deadline() -> None:
    seconds, count = waiting([Throttled("x")])
    assert seconds == 300
    assert 20 <= count <= 50
