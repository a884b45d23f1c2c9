"""What eni_ctl.py does next, by what EC2 says of the ENIs and their holders."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eni_ctl import Decision, Eni, Failure, Instance, NeedsPerson, NotYet, decide

pytestmark = pytest.mark.pure

HERE = Instance("i-00000001", "us-west-1a", "us-west-1", "web", "InService")
STATES = ["InService", "Pending", "Standby", "Detached", "Terminating", "Terminating:Wait"]
STATES += ["Terminated", "Warmed:Running", "Warmed:Terminating", "in no group", ""]


def eni(
    number: int,
    holder: str = "",
    status: str = "attached",
    index: int = 1,
    zone: str = "a",
    **more: Any,
) -> Eni:
    attached: dict[str, Any] = {
        "status": "in-use",
        "holder": holder,
        "attachment": f"eni-attach-{number}",
        "attachment_status": status,
        "device_index": index,
    }
    name = f"eni-{number}"
    mac = f"02:00:00:00:00:{number:02x}"
    fields = {**(attached if holder else {}), **more}
    return Eni(name, mac, f"us-west-1{zone}", f"10.0.1.{number}")._replace(**fields)


def steps(decision: Decision) -> list[str]:
    """The decision in words: what is kept, or the steps in their order."""
    if decision.keep:
        return [f"keep {decision.keep.id}"]
    return [f"{step.action} {step.eni.id}" for step in decision.steps]


OTHER = "i-00000002"
THIRD = "i-00000003"


@pytest.mark.parametrize(
    ("enis", "states", "expected"),
    [
        ([eni(1)], {}, ["attach eni-1"]),
        ([eni(1, HERE.id)], {}, ["keep eni-1"]),
        ([eni(1), eni(2, HERE.id, "attaching")], {}, ["keep eni-2"]),
        ([eni(1, HERE.id, index=2), eni(2, HERE.id)], {}, ["keep eni-2"]),
        ([eni(1, HERE.id, index=0, card_index=1)], {}, ["keep eni-1"]),
        ([eni(1, OTHER)], {}, []),
        ([eni(1, OTHER)], {OTHER: "InService"}, []),
        ([eni(1, OTHER)], {OTHER: "Standby"}, []),
        ([eni(1, OTHER)], {OTHER: "Terminating:Proceed"}, ["release eni-1"]),
        ([eni(1, OTHER)], {OTHER: "Warmed:Stopped"}, ["release eni-1"]),
        ([eni(1, OTHER), eni(2)], {OTHER: "Terminating"}, ["attach eni-2", "release eni-1"]),
        ([eni(1, HERE.id, index=0), eni(2)], {}, ["attach eni-2"]),
        ([eni(1, zone="c"), eni(2)], {}, ["attach eni-2"]),
        ([eni(1, ip=""), eni(2)], {}, ["attach eni-2"]),
        ([eni(1, HERE.id, ip="", interface_type="efa-only"), eni(2)], {}, ["attach eni-2"]),
        ([eni(1, service="amazon-aws"), eni(2)], {}, ["attach eni-2"]),
    ],
)
def test_the_next_steps_follow_from_what_ec2_says(
    enis: list[Eni], states: dict[str, str], expected: list[str]
) -> None:
    assert steps(decide(HERE, enis, states, False, "")) == expected


@pytest.mark.parametrize("status", ["pending", "associated", "in-use", "attaching", ""])
def test_an_eni_between_two_states_is_waited_for_and_its_status_named(status: str) -> None:
    decision = decide(HERE, [eni(1)._replace(status=status)], {}, True, "")
    assert decision == Decision(waiting_for=(f'eni-1 has the status "{status}"',))


def test_an_eni_that_is_leaving_this_instance_is_waited_for() -> None:
    with pytest.raises(NotYet, match=r"^eni-1 is being detached from this instance$"):
        decide(HERE, [eni(1, HERE.id, "detaching"), eni(2)], {}, False, "")


@pytest.mark.parametrize("state", ["Standby", "EnteringStandby", "Warmed:Running", "Quarantined"])
def test_an_instance_out_of_service_waits_and_says_so(state: str) -> None:
    with pytest.raises(NotYet, match=f"^this instance is {state}: it claims nothing until"):
        decide(HERE._replace(state=state), [eni(1)], {}, True, "")


@pytest.mark.parametrize("state", ["Terminating", "Terminated", "Detaching", "Detached"])
def test_an_instance_that_is_leaving_claims_nothing(state: str) -> None:
    with pytest.raises(Failure, match=f"^this instance is {state}: it claims nothing$") as raised:
        decide(HERE._replace(state=state), [eni(1)], {}, True, "")
    assert type(raised.value) is Failure


def test_force_takes_an_eni_from_the_holder_that_needs_it_least() -> None:
    states = {
        "i-00000002": "InService",
        "i-00000003": "Standby",
        "i-00000004": "in no group",
        "i-00000005": "Warmed:Stopped",
    }
    enis = [eni(number, f"i-0000000{number}") for number in (2, 3, 4, 5)]
    assert steps(decide(HERE, enis, states, True, "")) == [
        "release eni-5",
        "release eni-4",
        "release eni-3",
        "release eni-2",
    ]


def test_force_takes_nothing_from_a_holder_whose_state_is_unknown() -> None:
    assert steps(decide(HERE, [eni(1, OTHER)], {}, True, "")) == []


@pytest.mark.parametrize(
    ("enis", "words"),
    [
        ([], 'no network interface named "web" in us-west-1'),
        (
            [eni(1, zone="c"), eni(2, ip="")],
            'no usable network interface named "web" in us-west-1a: '
            "eni-1 is in us-west-1c; eni-2 has no address",
        ),
        (
            [eni(1, OTHER, index=0)],
            'no usable network interface named "web" in us-west-1a: '
            "eni-1 is the primary one of i-00000002",
        ),
        (
            [eni(1, service="amazon-aws")],
            'no usable network interface named "web" in us-west-1a: eni-1 belongs to amazon-aws',
        ),
    ],
)
def test_what_no_wait_can_mend_needs_a_person(enis: list[Eni], words: str) -> None:
    with pytest.raises(NeedsPerson, match=f"^{words}$"):
        decide(HERE, enis, {}, False, "")


def test_the_eni_that_was_claimed_last_is_tried_first() -> None:
    enis = [eni(number) for number in range(1, 9)]
    for claimed in enis:
        assert decide(HERE, enis, {}, False, claimed.id).steps[0].eni == claimed


def test_hosts_try_a_pool_in_different_orders() -> None:
    """With 100 hosts and 100 ENIs, random first choices are 63 different ones on average."""
    pool = [eni(number) for number in range(1, 101)]
    hosts = [HERE._replace(id=f"i-{number:08x}") for number in range(100)]
    first = {decide(host, pool, {}, False, "").steps[0].eni.id for host in hosts}
    assert len(first) > 50


holders = st.sampled_from(["", HERE.id, OTHER, THIRD])
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
    states=st.dictionaries(st.sampled_from([OTHER, THIRD]), st.sampled_from(STATES)),
    claimed=st.sampled_from(["", "eni-1", "eni-2", "eni-3"]),
)
def test_no_eni_of_a_holder_that_may_be_in_service_is_ever_touched(
    enis: list[Eni], states: dict[str, str], claimed: str
) -> None:
    try:
        decision = decide(HERE, enis, states, False, claimed)
    except (NeedsPerson, NotYet):
        return
    if decision.keep:
        assert decision.keep.holder == HERE.id
    for step in decision.steps:
        assert step.eni in enis
        assert step.eni.device_index != 0
        assert step.eni.zone == HERE.zone
        if step.action == "attach":
            assert step.eni.holder == ""
        else:
            assert states[step.eni.holder].startswith(("Terminat", "Warmed:"))
