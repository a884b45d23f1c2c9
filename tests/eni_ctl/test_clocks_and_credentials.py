"""Clocks that are not set yet, permissions, and roles without credentials."""

from __future__ import annotations

import json

from lab import Lab, Machine
from lab.ec2 import DENIED
from lab.vpc import OUTER_LIMIT
from lab.watching import (
    all_at_once,
    await_waiting,
    calls,
    give_up,
    last_line,
    wait_for_line,
)

HOUR = 3600
# What the services say of a clock that is off: (service, code or "" for what it is known for).
SKEWED = [
    ("ec2", ""),
    ("ec2", "AuthFailure"),
    ("autoscaling", ""),
    ("autoscaling", "InvalidSignatureException"),
    ("autoscaling", "RequestTimeTooSkewed"),
    ("autoscaling", "RequestInTheFuture"),
    ("autoscaling", "RequestExpired"),
]


# --- the clock


def test_a_clock_that_is_not_set_can_be_waited_for(lab: Lab, subnet: str) -> None:
    """aws/aws-cli issue 602, aws/aws-sdk-ruby issue 522: so it is at boot, before chrony."""

    def waits(case: tuple[Machine, str]) -> None:
        machine, code = case
        running = machine.start_eni_ctl("-a")
        # Longer than what needs a person is tried.
        wait_for_line(running, f"waiting, ([1-9][0-9]|1[0-9][0-9]) s .*{code}")
        machine.instance.clock_offset = 0
        out, err = running.communicate(timeout=OUTER_LIMIT)
        assert out.startswith("attached eni-"), err

    cases = []
    for service, code in SKEWED:
        for offset in (HOUR, -HOUR):
            group = f"{service} {code} {offset}"
            lab.aws.create_eni(subnet, name=group)
            # With the group's name in IMDS, EC2 is the first that is asked.
            machine = lab.launch(subnet, group=group, tags_in_imds=service == "ec2")
            machine.instance.clock_offset = offset
            machine.instance.skew_codes = {service: code}
            known = {"ec2": "(RequestExpired|AuthFailure)", "autoscaling": "SignatureDoesNotMatch"}
            cases.append((machine, code or known[service]))
    all_at_once(cases, waits)


def test_a_clock_half_a_day_ahead_is_waited_for_too(lab: Lab, machine: Machine, eni: str) -> None:
    """By such a clock IMDS's credentials have expired already, so botocore does not use them."""
    machine.instance.clock_offset = 12 * HOUR
    running = machine.start_eni_ctl("-a")
    wait_for_line(running, "waiting")
    machine.instance.clock_offset = 0
    out, err = running.communicate(timeout=OUTER_LIMIT)
    assert out == f"attached {eni} (10.0.1.22) as eth1\n", err
    assert "unexpected" not in err


def test_credentials_that_have_expired_when_they_come_are_waited_for(
    lab: Lab, machine: Machine, eni: str
) -> None:
    """By a clock that is ahead, they have. botocore raises RuntimeError then: before 1.25 (Debian
    11 has 1.20) for IMDS's credentials, and still for those of a credential_process."""
    key = lab.aws.add_administrator()
    said = {
        "Version": 1,
        "AccessKeyId": key["AWS_ACCESS_KEY_ID"],
        "SecretAccessKey": key["AWS_SECRET_ACCESS_KEY"],
        "SessionToken": "",
        "Expiration": "2020-01-01T00:00:00Z",
    }
    machine.write("/run/key", json.dumps(said))
    machine.write("/root/.aws/config", "[default]\ncredential_process = cat /run/key\n")
    running = machine.start_eni_ctl("-a", HOME="/root")
    wait_for_line(running, "waiting, .*clock")
    machine.write("/run/key", json.dumps({**said, "Expiration": "2100-01-01T00:00:00Z"}))
    out, err = running.communicate(timeout=OUTER_LIMIT)
    assert out == f"attached {eni} (10.0.1.22) as eth1\n", err


def test_a_service_that_is_not_subscribed_to_yet_is_waited_for(
    lab: Lab, machine: Machine, eni: str
) -> None:
    """OptInRequired: so it is for a while in a new account or region."""
    lab.aws.fail("DescribeNetworkInterfaces", code="OptInRequired", status=403, times=3)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert machine.eni_ctl("-d").returncode == 0
    lab.aws.fail("DescribeNetworkInterfaces", code="OptInRequired", status=403, times=-1)
    await_waiting(machine, "-a", for_what="OptInRequired")


# --- permissions, in AWS's own words


def test_what_iam_denies_is_told_in_awss_own_words(lab: Lab, subnet: str) -> None:
    """An SCP or a boundary is not the instance's policy: RaJiska/terraform-aws-fck-nat issue 83,
    aws-samples/data-perimeter-policy-examples issue 63."""

    def tells(case: tuple[Machine, str, str]) -> None:
        machine, eni, why = case
        done = machine.eni_ctl("-a")
        assert done.returncode == 4, done.stderr
        assert "ec2:AttachNetworkInterface" in last_line(done)
        assert DENIED[why].format(action="ec2:AttachNetworkInterface") in last_line(done)
        assert f"network-interface/{eni}" in last_line(done)
        assert "Encoded authorization failure message" not in done.stderr
        assert len(last_line(done)) < 1000

    cases = []
    for why in DENIED:
        eni = lab.aws.create_eni(subnet, name=why)
        lab.aws.deny("AttachNetworkInterface", eni, why)
        cases.append((lab.launch(subnet, group=why), eni, why))
    all_at_once(cases, tells)


def test_a_denied_detach_of_our_own_is_told_in_awss_own_words(
    lab: Lab, machine: Machine, eni: str
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    lab.aws.deny("DetachNetworkInterface", machine.instance.id, "service control policy")
    done = machine.eni_ctl("-d")
    assert done.returncode == 4
    assert "ec2:DetachNetworkInterface" in last_line(done)
    assert "with an explicit deny in a service control policy" in last_line(done)
    assert f"instance/{machine.instance.id}" in last_line(done)


def test_a_dry_run_tells_of_a_denial_too(lab: Lab, machine: Machine, eni: str) -> None:
    lab.aws.deny("AttachNetworkInterface", eni, "service control policy")
    done = machine.eni_ctl("-a", "--dry-run")
    assert done.returncode == 4
    assert "with an explicit deny in a service control policy" in last_line(done)


def test_auto_scalings_denial_is_told_in_awss_own_words(
    lab: Lab, machine: Machine, eni: str
) -> None:
    allowed = {"Effect": "Allow", "Action": "ec2:*", "Resource": "*"}
    lab.aws.set_policy({"Version": "2012-10-17", "Statement": [allowed]})
    done = machine.eni_ctl("-a")
    assert done.returncode == 4
    assert "autoscaling:DescribeAutoScalingInstances" in last_line(done)
    assert "because no identity-based policy allows" in last_line(done)


# --- the role's credentials


def test_a_role_that_cannot_be_assumed_needs_a_person(lab: Lab, machine: Machine) -> None:
    """IAM User Guide, "Troubleshoot IAM and Amazon EC2"."""
    machine.instance.role_error = "AssumeRoleUnauthorizedAccess"
    done = machine.eni_ctl("-a")
    assert done.returncode == 4
    assert "AssumeRoleUnauthorizedAccess" in last_line(done)
    machine.instance.role_error = ""
    assert machine.eni_ctl("-a").returncode == 0


def test_a_profile_that_is_not_found_yet_is_waited_for(lab: Lab, machine: Machine) -> None:
    machine.instance.role_error = "InstanceProfileNotFound"
    give_up(machine, "-a", over="InstanceProfileNotFound")
    machine.instance.role_error = ""
    assert machine.eni_ctl("-a").returncode == 0


def test_a_role_that_can_be_assumed_again_is_used(lab: Lab, machine: Machine, eni: str) -> None:
    machine.instance.role_error = "AssumeRoleUnauthorizedAccess"
    running = machine.start_eni_ctl("-a")
    wait_for_line(running, "AssumeRoleUnauthorizedAccess")
    machine.instance.role_error = ""
    out, err = running.communicate(timeout=OUTER_LIMIT)
    assert out == f"attached {eni} (10.0.1.22) as eth1\n", err


def test_refused_detaches_do_not_fetch_new_credentials(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    """Only the codes that new credentials cure are worth new ones."""
    dying = lab.launch(subnet, group="web", life_cycle="Terminating")
    lab.aws.attach(lab.aws.lab_eni(eni), dying.instance, 1)
    refused = "DetachNetworkInterface"
    lab.aws.refuse(refused, eni, "IncorrectState", "not now", times=4)
    lab.aws.fail(refused, how="hang", seconds=0.01, do=lab.aws.imds_calls.clear)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert calls(lab, refused) == 5
    assert [path for _, path, _ in lab.aws.imds_calls if "security-credentials" in path] == []
