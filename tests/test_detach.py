"""eni_ctl.py -d and -s as processes against the lab."""

from __future__ import annotations

import json

import pytest
from lab import Lab, Machine


def test_detaches_and_waits_until_the_device_is_gone(lab: Lab, machine: Machine, eni: str) -> None:
    machine.eni_ctl("-a")
    lab.aws.detach_delay = 1
    done = machine.eni_ctl("-d")
    assert (done.returncode, done.stdout) == (0, f"detached {eni} (10.0.1.22)\n"), done.stderr
    assert machine.devices() == ["eth0"]
    assert lab.aws.eni(eni).attachment_id is None
    assert machine.state() == {
        "FQDN": "web.example.com",
        "IP": "10.0.1.22",
        "GW": "10.0.1.1",
        "DEVICE": "null",
        "ASG_NAME": "web",
        "INSTANCE_ID": machine.instance.id,
        "ENI_ID": eni,
        "ATTACHMENT_ID": "null",
    }


def test_a_second_detach_changes_nothing(machine: Machine) -> None:
    machine.eni_ctl("-a")
    machine.eni_ctl("-d")
    state = machine.state()
    done = machine.eni_ctl("-d")
    assert done.returncode == 0
    assert done.stdout == f'not attached: {machine.instance.id} holds no ENI named "web"\n'
    assert machine.state() == state


def test_attach_works_again_right_after(lab: Lab, machine: Machine, eni: str) -> None:
    machine.eni_ctl("-a")
    machine.eni_ctl("-d")
    done = machine.eni_ctl("-a")
    assert done.stdout == f"attached {eni} (10.0.1.22) as eth1\n"


def test_a_host_that_holds_nothing_has_nothing_to_detach(lab: Lab, machine: Machine) -> None:
    done = machine.eni_ctl("-d")
    assert done.returncode == 0
    assert done.stdout == f'not attached: {machine.instance.id} holds no ENI named "web"\n'
    assert machine.state()["ATTACHMENT_ID"] == "null"
    assert machine.state()["DEVICE"] == "null"
    assert "DetachNetworkInterface" not in [call.action for call in lab.aws.calls]


def test_an_eni_that_another_instance_holds_is_left_alone(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    machine.eni_ctl("-a")
    other = lab.launch(subnet, group="web")
    other.write("/etc/default/eni", "DEVICE=eth1\nATTACHMENT_ID=eni-attach-0\n")
    done = other.eni_ctl("-d")
    assert done.returncode == 0
    assert done.stdout == f'not attached: {other.instance.id} holds no ENI named "web"\n'
    assert lab.aws.eni(eni).instance.id == machine.instance.id
    assert machine.devices() == ["eth0", "eth1"]
    assert other.state()["ATTACHMENT_ID"] == "null"


def test_a_primary_interface_of_the_same_name_is_left_alone(lab: Lab, subnet: str) -> None:
    machine = lab.launch(subnet, group="web", primary_name="web")
    done = machine.eni_ctl("-d")
    assert done.returncode == 0
    assert machine.devices() == ["eth0"]


def test_a_detach_that_hangs_is_never_forced_here(lab: Lab, machine: Machine, eni: str) -> None:
    machine.eni_ctl("-a")
    lab.aws.stuck.add(eni)
    done = machine.eni_ctl("-d", "-t", "6")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"{eni} is being detached; gave up after 6 s"
    detaches = [c.params for c in lab.aws.calls if c.action == "DetachNetworkInterface"]
    assert ["Force" in params for params in detaches] == [False]


def test_what_an_earlier_run_began_is_finished(lab: Lab, machine: Machine, eni: str) -> None:
    machine.eni_ctl("-a")
    lab.aws.stuck.add(eni)
    lab.aws.fail("DetachNetworkInterface", when="after", how="reset")
    assert machine.eni_ctl("-d", "-t", "6").returncode == 1
    second = machine.start_eni_ctl("-d")
    assert second.stderr
    assert f"{eni} is being detached" in second.stderr.readline()
    lab.aws.detach(lab.aws.port(eni), force=True)
    out, _ = second.communicate(timeout=60)
    assert out == f"detached {eni} (10.0.1.22)\n"


def test_a_detach_after_a_kill_in_mid_attach_finds_the_eni(
    lab: Lab, machine: Machine, eni: str
) -> None:
    """EC2 shows the ENI as free for a while, though the killed run's claim took effect."""
    lab.aws.describe_lag = 9
    lab.aws.fail("AttachNetworkInterface", when="after", how="reset", times=-1)
    assert machine.eni_ctl("-a", "-t", "6").returncode == 1
    done = machine.eni_ctl("-d")
    assert done.stdout == f"detached {eni} (10.0.1.22)\n", done.stderr
    assert lab.aws.eni(eni).attachment_id is None


def test_status_tells_what_is_so_and_changes_nothing(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    spare = lab.launch(subnet, group="web")
    machine.eni_ctl("-a")
    before = len(lab.aws.calls)
    done = machine.eni_ctl("-s")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"instance  {machine.instance.id} in us-west-1a, InService"
    assert lines[1] == 'name      "web"'
    assert lines[3].split() == [
        *(eni, "10.0.1.22", "us-west-1a", "in-use", machine.instance.id, "InService")
    ]
    assert lines[4] == "device    eth1, 10.0.1.22/24, gateway 10.0.1.1"
    assert lines[5].startswith("rule      none: run add_routes.py -d eth1")
    assert {c.action for c in lab.aws.calls[before:]} == {
        "DescribeAutoScalingInstances",
        "DescribeNetworkInterfaces",
    }
    elsewhere = spare.eni_ctl("-s")
    assert elsewhere.returncode == 3
    assert elsewhere.stdout.splitlines()[4] == "device    none: not attached here"


def test_status_sees_the_rule(machine: Machine) -> None:
    machine.eni_ctl("-a")
    machine.ip("rule", "add", "from", "10.0.1.22", "lookup", "101")
    assert machine.eni_ctl("-s").stdout.splitlines()[5] == "rule      from 10.0.1.22"


def test_status_for_programs_is_json(machine: Machine, eni: str) -> None:
    machine.eni_ctl("-a")
    report = json.loads(machine.eni_ctl("-s", "--json").stdout)
    assert report["instance"] == machine.instance.id
    assert (report["device"], report["ip"], report["prefix"]) == ("eth1", "10.0.1.22", 24)
    assert report["rule"] is False
    assert [(e["id"], e["holder"], e["holder_state"]) for e in report["enis"]] == [
        (eni, machine.instance.id, "InService")
    ]


def test_status_of_an_eni_without_its_device_is_a_failure(
    lab: Lab, machine: Machine, eni: str
) -> None:
    machine.configures = False
    machine.eni_ctl("-a", "-t", "6")
    done = machine.eni_ctl("-s")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == (
        f"device    eth1 is not up with {eni}'s address 10.0.1.22"
    )


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
    done = machine.eni_ctl("-a", "--dry-run", "-t", "6")
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1] == (
        "not allowed: the instance's IAM policy lacks ec2:AttachNetworkInterface"
    )
