"""The IAM policy in the README: enough for all that eni_ctl.py does, and nothing in it too much."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from lab import TOP, Lab, Machine


def readme_policy(number: int = 0) -> dict[str, Any]:
    """A policy as it stands in README.md."""
    blocks = re.findall(r"```json\n(.*?)```", (TOP / "README.md").read_text(), re.S)
    policies = [json.loads(block) for block in blocks if '"Statement"' in block]
    return dict(policies[number])


def without(policy: dict[str, Any], action: str) -> dict[str, Any]:
    statements = [
        {**statement, "Action": [a for a in statement["Action"] if a != action]}
        for statement in policy["Statement"]
    ]
    return {**policy, "Statement": [s for s in statements if s["Action"]]}


def test_the_readmes_policy_is_enough(lab: Lab, subnet: str, machine: Machine) -> None:
    lab.aws.set_policy(readme_policy())
    assert machine.eni_ctl("-a").returncode == 0
    assert machine.eni_ctl("-s").returncode == 0
    machine.instance.life_cycle = "Terminating"
    heir = lab.launch(subnet, group="web")
    assert heir.eni_ctl("-a").returncode == 0
    assert heir.eni_ctl("-d").returncode == 0


@pytest.mark.parametrize(
    ("action", "verb"),
    [
        ("autoscaling:DescribeAutoScalingInstances", "-a"),
        ("autoscaling:DescribeAutoScalingInstances", "-s"),
        ("ec2:DescribeNetworkInterfaces", "-a"),
        ("ec2:DescribeNetworkInterfaces", "-d"),
        ("ec2:AttachNetworkInterface", "-a"),
        ("ec2:DetachNetworkInterface", "-d"),
    ],
)
def test_a_missing_action_needs_a_person_and_is_named(
    lab: Lab, machine: Machine, action: str, verb: str
) -> None:
    if verb == "-d":
        assert machine.eni_ctl("-a").returncode == 0
    lab.aws.set_policy(without(readme_policy(), action))
    done = machine.eni_ctl(verb, "-t", "20")
    assert done.returncode == 4
    last = done.stderr.splitlines()[-1]
    assert f"not allowed: {action}: " in last
    assert f"because no identity-based policy allows the {action} action" in last
    assert "Encoded" not in last


def test_a_take_over_without_the_permission_to_detach_needs_a_person(
    lab: Lab, subnet: str, machine: Machine
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    lab.aws.set_policy(without(readme_policy(), "ec2:DetachNetworkInterface"))
    machine.instance.life_cycle = "Terminating"
    done = lab.launch(subnet, group="web").eni_ctl("-a", "-t", "20")
    assert done.returncode == 4
    last = done.stderr.splitlines()[-1]
    assert "EC2 does not detach it: not allowed: ec2:DetachNetworkInterface: " in last


def test_a_permission_that_arrives_late_is_waited_for(lab: Lab, machine: Machine) -> None:
    lab.aws.fail("DescribeNetworkInterfaces", code="UnauthorizedOperation", status=403, times=2)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
