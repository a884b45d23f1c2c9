"""Which hosts claim an ENI, and from whom: by their states in the group."""

from __future__ import annotations

import subprocess

import pytest
from lab import Lab, Machine, await_that, odd
from lab.vpc import OUTER_LIMIT
from lab.watching import (
    all_at_once,
    attached_by,
    await_waiting,
    calls,
    holder,
    last_line,
    wait_for_line,
)

WAITING = [
    "Standby",
    "EnteringStandby",
    "Warmed:Pending",
    "Warmed:Pending:Wait",
    "Warmed:Pending:Proceed",
    "Warmed:Stopped",
    "Warmed:Running",
    "Warmed:Hibernated",
    "Warmed:Terminating",
    "Warmed:Terminating:Wait",
    "Warmed:Terminated",
]
LEAVING = [
    "Detaching",
    "Detached",
    "Terminating",
    "Terminating:Wait",
    "Terminating:Proceed",
    "Terminating:Retained",
    "Terminated",
]
# Of holders: those that need their ENI no more, and those that need it or may need it again.
SPARED = [
    "Terminating",
    "Terminating:Wait",
    "Terminating:Proceed",
    "Terminating:Retained",
    "Terminated",
    "Warmed:Pending",
    "Warmed:Running",
    "Warmed:Stopped",
    "Warmed:Hibernated",
    "Warmed:Terminating:Wait",
]
NEEDED = [
    "Pending",
    "Pending:Wait",
    "Pending:Proceed",
    "InService",
    "Standby",
    "EnteringStandby",
    "Detaching",
    "Detached",
    "ReplacingRootVolume",
    "ReplacingRootVolume:Wait",
    "RootVolumeReplaced",
]
CLAIMING = ["Pending", "Pending:Wait", "Pending:Proceed", "InService"]
# How the host learns its group: by the API, or by instance tags in IMDS. IMDS may say what state
# the host is on the way to, or not (404: it says so only once there was a change since 2022).
TOLD = ["by the API", "tags", "tags, no target state"]


def launch(
    lab: Lab, subnet: str, state: str, told: str = "by the API", group: str = "web"
) -> Machine:
    machine = lab.launch(subnet, group=group, tags_in_imds=told != "by the API")
    machine.instance.life_cycle = state
    machine.instance.target_in_imds = told != "tags, no target state"
    return machine


def hold(lab: Lab, subnet: str, eni: str, state: str, group: str = "web") -> Machine:
    """A peer in that state which holds the ENI."""
    peer = lab.launch(subnet, group=group)
    peer.instance.life_cycle = state
    lab.aws.attach(lab.aws.lab_eni(eni), peer.instance, 1)
    await_that(peer.appeared.is_set)
    await_that(lambda: lab.aws.lab_eni(eni).attachment_status == "attached")
    return peer


# --- the own state


class Case:
    """A group of one host in that state, and of its one ENI; a peer in another state holds it."""

    def __init__(
        self, lab: Lab, subnet: str, state: str, told: str = "by the API", held: str = ""
    ) -> None:
        self.lab, self.state, self.held, self.told = lab, state, held, told
        group = f"{state}, {told}, held: {held or None}"
        self.eni = lab.aws.create_eni(subnet, name=group)
        self.peer = hold(lab, subnet, self.eni, held, group) if held else None
        self.machine = launch(lab, subnet, state, told, group)

    def __str__(self) -> str:
        return f"{self.state}, {self.told}, held by {self.held or 'nobody'}"

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self.machine.eni_ctl("-a", *options)

    def detaches(self) -> int:
        return calls(self.lab, "DetachNetworkInterface", self.machine)


def test_a_host_on_its_way_into_service_or_in_it_claims(lab: Lab, subnet: str) -> None:
    def claims(case: Case) -> None:
        done = case.run()
        assert done.returncode == 0, done.stderr
        assert holder(lab, case.eni) == case.machine.instance.id

    all_at_once([Case(lab, subnet, state, told) for state in CLAIMING for told in TOLD], claims)


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("state", ["Standby", "Warmed:Pending", "Warmed:Running"])
def test_a_host_in_standby_or_in_the_warm_pool_claims_once_it_is_in_service(
    lab: Lab, subnet: str, eni: str, state: str, told: str
) -> None:
    machine = launch(lab, subnet, state, told)
    waiting = machine.start_eni_ctl("-a")
    wait_for_line(waiting, rf"waiting.*{state}")
    assert attached_by(lab, machine) == []
    machine.instance.life_cycle = "InService"
    out, err = waiting.communicate(timeout=OUTER_LIMIT)
    assert out == f"attached {eni} (10.0.1.22) as eth1\n", err


@pytest.mark.parametrize("options", [[], ["-f"]])
def test_a_host_that_is_kept_out_of_service_waits(
    lab: Lab, subnet: str, options: list[str]
) -> None:
    def waits(case: Case) -> None:
        await_waiting(case.machine, "-a", *options, for_what=f"is {case.state}:")
        assert attached_by(lab, case.machine) == []

    all_at_once([Case(lab, subnet, state) for state in WAITING], waits)


@pytest.mark.parametrize("options", [[], ["-f"]])
def test_a_host_that_leaves_its_group_gives_up_at_once(
    lab: Lab, subnet: str, options: list[str]
) -> None:
    def gives_up(case: Case) -> None:
        done = case.run(*options)
        assert done.returncode == 1, done.stderr
        assert case.state in last_line(done)
        assert "gave up" not in last_line(done)
        assert attached_by(lab, case.machine) == []

    all_at_once([Case(lab, subnet, state) for state in LEAVING], gives_up)


def test_a_host_that_holds_its_interface_already_is_done_in_any_state(
    lab: Lab, subnet: str
) -> None:
    def is_done(case: Case) -> None:
        assert case.run().returncode == 0
        case.machine.instance.life_cycle = case.state
        done = case.run()
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"attached {case.eni} ")
        assert len(attached_by(lab, case.machine)) == 1

    cases = [Case(lab, subnet, state) for state in [*WAITING, *LEAVING]]
    for case in cases:
        case.machine.instance.life_cycle = "InService"
    all_at_once(cases, is_done)


def test_a_host_in_no_group_claims_by_name(lab: Lab, subnet: str, eni: str) -> None:
    machine = lab.launch(subnet)
    done = machine.eni_ctl("-a", "-n", "web")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("state", ["Standby", "Warmed:Running"])
def test_a_name_by_hand_does_not_make_a_host_claim(
    lab: Lab, subnet: str, eni: str, state: str
) -> None:
    await_waiting(launch(lab, subnet, state), "-a", "-n", "web", for_what=f"is {state}:")
    assert calls(lab, "AttachNetworkInterface") == 0


def test_a_host_on_standby_does_not_claim_by_name_when_one_answer_leaves_it_out(
    lab: Lab, subnet: str, eni: str
) -> None:
    machine = launch(lab, subnet, "Standby")
    waiting = machine.start_eni_ctl("-a", "-n", "web")
    wait_for_line(waiting, "waiting.*Standby")
    machine.instance.change = odd.lacking("InstanceId")
    wait_for_line(waiting, "waiting.*Auto Scaling does not list .* any more")
    machine.instance.change = lambda item: item
    wait_for_line(waiting, "waiting.*Standby")
    assert attached_by(lab, machine) == []
    waiting.kill()
    waiting.communicate()


def test_a_host_that_only_imds_knows_to_be_in_a_warm_pool_does_not_claim_by_name(
    lab: Lab, subnet: str, eni: str
) -> None:
    machine = launch(lab, subnet, "Warmed:Running")
    machine.instance.warm_pool = "Running"
    machine.instance.change = odd.lacking("InstanceId")
    await_waiting(machine, "-a", "-n", "web", for_what="Auto Scaling does not list it yet")
    assert attached_by(lab, machine) == []


# --- the holder's state


def test_an_interface_is_taken_from_a_holder_that_ends_or_is_in_the_warm_pool(
    lab: Lab, subnet: str
) -> None:
    def is_taken(case: Case) -> None:
        assert case.peer
        done = case.run()
        assert done.returncode == 0, done.stderr
        assert f"{case.peer.instance.id} ({case.held})" in done.stderr
        assert holder(lab, case.eni) == case.machine.instance.id

    cases = [Case(lab, subnet, "InService", held=state) for state in SPARED]
    all_at_once(cases, is_taken)


def test_an_interface_of_a_holder_in_any_other_state_is_never_taken(lab: Lab, subnet: str) -> None:
    def is_kept(case: Case) -> None:
        assert case.peer
        held_by = rf"{case.peer.instance.id} \({case.held}\)"
        await_waiting(case.machine, "-a", for_what=held_by)
        assert holder(lab, case.eni) == case.peer.instance.id
        assert case.detaches() == 0

    cases = [Case(lab, subnet, "InService", held=state) for state in NEEDED]
    all_at_once(cases, is_kept)


def test_a_host_in_standby_leaves_the_dying_holders_interface_to_the_replacement(
    lab: Lab, subnet: str, eni: str
) -> None:
    dying = hold(lab, subnet, eni, "InService")
    standby = launch(lab, subnet, "Standby")
    waiting = standby.start_eni_ctl("-a")
    wait_for_line(waiting, "waiting")
    dying.instance.life_cycle = "Terminating:Wait"
    replacement = launch(lab, subnet, "Pending")
    done = replacement.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert holder(lab, eni) == replacement.instance.id
    assert waiting.poll() is None
    assert attached_by(lab, standby) == []
    waiting.terminate()
    waiting.communicate()


def test_a_holder_that_goes_back_to_the_warm_pool_is_relieved_while_we_wait(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    """With "reuse on scale in", an instance returns to the warm pool with its ENIs."""
    peer = hold(lab, subnet, eni, "InService")
    waiting = machine.start_eni_ctl("-a")
    wait_for_line(waiting, peer.instance.id)
    peer.instance.life_cycle = "Warmed:Stopped"
    lab.aws.halt(peer.instance)
    out, err = waiting.communicate(timeout=OUTER_LIMIT)
    assert out == f"attached {eni} (10.0.1.22) as eth1\n", err


def test_a_holder_that_left_the_group_keeps_its_interface(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    peer = hold(lab, subnet, eni, "InService")
    lab.aws.leave(peer.instance)
    await_waiting(machine, "-a", for_what=rf"{peer.instance.id} \(in no group\)")
    assert holder(lab, eni) == peer.instance.id
    assert calls(lab, "DetachNetworkInterface") == 0
