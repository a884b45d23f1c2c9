"""eni_ctl.py --status: what it shows, and that it changes nothing."""

from __future__ import annotations

import json

from lab import Lab, Machine
from lab.watching import give_up


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
    give_up(machine, "-a", over="is not up")
    done = machine.eni_ctl("-s")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == (
        f"device    eth1 is not up with {eni}'s address 10.0.1.22"
    )
