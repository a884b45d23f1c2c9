"""eni_ctl.py --dry-run: what it would do, and whether EC2 would permit it."""

from __future__ import annotations

from typing import Any

import pytest
from lab import Lab, Machine
from lab.watching import last_line


@pytest.mark.parametrize("verb", ["-a", "-d"])
def test_a_dry_run_says_what_it_would_do_and_does_nothing(
    lab: Lab, machine: Machine, eni: str, verb: str
) -> None:
    if verb == "-d":
        machine.eni_ctl("-a")
    devices, before = machine.devices(), lab.aws.eni(eni).attachment_id
    done = machine.eni_ctl(verb, "--dry-run")
    assert done.returncode == 0, done.stderr
    action = {"-a": "AttachNetworkInterface", "-d": "DetachNetworkInterface"}[verb]
    assert done.stdout.startswith(f"would call {action} (")
    assert done.stdout.endswith("permitted\n")
    assert machine.devices() == devices
    assert lab.aws.eni(eni).attachment_id == before
    assert lab.aws.calls[-1].dry_run


@pytest.mark.parametrize("how", [{"code": "RequestLimitExceeded"}, {"how": "reset"}])
def test_a_dry_run_asks_again_where_ec2_gave_no_answer(
    lab: Lab, machine: Machine, how: dict[str, Any]
) -> None:
    lab.aws.fail("AttachNetworkInterface, dry run", times=1, **how)
    done = machine.eni_ctl("-a", "--dry-run")
    assert (done.returncode, done.stdout[-12:]) == (0, ": permitted\n"), done


def test_a_dry_run_where_there_is_nothing_to_do_says_so(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    assert machine.eni_ctl("-d", "--dry-run").stdout == (
        "would do nothing: no such network interface is attached here\n"
    )
    machine.eni_ctl("-a")
    assert machine.eni_ctl("-a", "--dry-run").stdout == f"would keep: {eni} is attached here\n"
    other = lab.launch(subnet, group="web").eni_ctl("-a", "--dry-run")
    assert other.stdout.startswith(f"would wait: {eni} is held by {machine.instance.id}")


def test_a_dry_run_without_the_permission_needs_a_person(
    lab: Lab, machine: Machine, eni: str
) -> None:
    lab.aws.set_policy(
        {
            "Version": "2012-10-17",
            "Statement": [
                {"Effect": "Allow", "Action": ["ec2:D*", "autoscaling:*"], "Resource": "*"}
            ],
        }
    )
    done = machine.eni_ctl("-a", "--dry-run")
    assert done.returncode == 4
    last = last_line(done)
    assert last.startswith(f"eni_ctl.py: {eni}: not allowed: ec2:AttachNetworkInterface: ")
