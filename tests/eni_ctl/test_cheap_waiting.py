"""What a wait costs: API calls, IMDS requests, lines in the journal, memory and CPU.

The bounds are for a wait of 300 s. The tests wait less, and allow less;
CPU and memory are measured in the process itself, so that a busy machine does not matter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from lab import Lab, Machine, await_that
from lab.watching import calls, give_up, run_measured

Record = Callable[[str, object], None]
DESCRIBES = ("DescribeNetworkInterfaces", "DescribeAutoScalingInstances")


def hold(lab: Lab, subnet: str, eni: str, state: str = "InService") -> Machine:
    peer = lab.launch(subnet, group="web")
    peer.instance.life_cycle = state
    lab.aws.attach(lab.aws.lab_eni(eni), peer.instance, 1)
    await_that(peer.appeared.is_set)
    lab.aws.imds_calls.clear()
    return peer


def test_a_minute_beside_a_healthy_holder_takes_forty_describes_at_most(
    lab: Lab, subnet: str, machine: Machine, eni: str, record_property: Record
) -> None:
    hold(lab, subnet, eni)
    run = run_measured(machine, "-a", "-t", "60")
    assert run.code == 1
    describes = sum(calls(lab, action) for action in DESCRIBES)
    record_property("describes in a minute beside a healthy holder", describes)
    assert 5 <= describes <= 40
    assert len(lab.aws.calls) == describes
    assert len(run.log) <= 8


def test_words_that_have_the_time_in_them_are_no_new_reason(lab: Lab, machine: Machine) -> None:
    """Auto Scaling names three times where it refuses a clock; each new reason is polled quickly
    for 10 s."""
    machine.instance.clock_offset = -3600
    run = run_measured(machine, "-a", "-t", "60")
    assert run.code == 1
    assert 2 <= calls(lab, "DescribeAutoScalingInstances") <= 30


@pytest.mark.parametrize("code", ["IncorrectState", "OperationNotPermitted", "AuthFailure"])
def test_refused_detaches_cost_little(
    lab: Lab, subnet: str, machine: Machine, eni: str, code: str, record_property: Record
) -> None:
    """Measured on an earlier version in 300 s of IncorrectState: 420 MiB, 623 IMDS requests, and
    29 equal lines. That is out of memory on a small instance, in the middle of a failover."""
    hold(lab, subnet, eni, "Terminating:Wait")
    lab.aws.refuse("DetachNetworkInterface", eni, code, "It is not to be.")
    run = run_measured(machine, "-a", "-t", "40")
    assert run.code in (1, 4)
    record_property("CPU", run.cpu)
    record_property("peak memory", f"{run.memory:.0f} MiB")
    assert run.memory <= 80
    assert run.cpu <= 2
    assert len(lab.aws.imds_calls) <= 25
    assert len(run.log) <= 10
    assert calls(lab, "DetachNetworkInterface") <= 7  # after 0, 1, 3, 7, 15, 31 s


def test_a_hopeless_attach_is_tried_ever_more_seldom(lab: Lab, machine: Machine, eni: str) -> None:
    lab.aws.refuse("AttachNetworkInterface", eni, "IncorrectState", "It is not to be.")
    run = run_measured(machine, "-a", "-t", "60")
    assert run.code in (1, 4)
    assert 2 <= calls(lab, "AttachNetworkInterface") <= 7  # after 0, 1, 3, 7, 15, 31 s


def test_a_host_without_a_free_slot_asks_ever_more_seldom(lab: Lab, subnet: str, eni: str) -> None:
    machine = lab.launch(subnet, group="web", max_interfaces=1)
    run = run_measured(machine, "-a")
    assert run.code == 4
    assert calls(lab, "AttachNetworkInterface") <= 5


def test_a_wait_for_the_device_costs_little(
    lab: Lab, machine: Machine, eni: str, record_property: Record
) -> None:
    lab.aws.never_plug.add(eni)
    run = run_measured(machine, "-a", "-t", "30")
    assert run.code == 1
    record_property("CPU", run.cpu)
    assert run.cpu <= 2
    assert calls(lab, "DescribeNetworkInterfaces") <= 4
    assert len(lab.aws.imds_calls) <= 25


def test_a_wait_for_the_address_costs_little(
    lab: Lab, machine: Machine, eni: str, record_property: Record
) -> None:
    machine.configures = False
    run = run_measured(machine, "-a", "-t", "30")
    assert run.code == 1
    record_property("CPU", run.cpu)
    assert run.cpu <= 2
    assert calls(lab, "DescribeNetworkInterfaces") <= 4


def test_a_wait_for_the_address_asks_ip_seldom_and_not_at_all_while_the_device_is_down(
    lab: Lab, machine: Machine, eni: str, record_property: Record
) -> None:
    machine.configures = False
    asks = "eni_ctl.py: ip -json addr"
    down = give_up(machine, "-a", "-v", over="eth1 is not up")
    assert down.stderr.count(asks) == 0
    machine.ip("link", "set", "eth1", "up")
    up = machine.eni_ctl("-a", "-v", "-t", "50")
    assert up.returncode == 1
    record_property("times that `ip` was asked, in 50 s", up.stderr.count(asks))
    assert 1 <= up.stderr.count(asks) <= 200  # after 10 s, twice a second
