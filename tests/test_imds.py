"""eni_ctl.py and the instance metadata service: late, failing, old, or not to be asked."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from lab import Lab, Machine
from lab.aws import Aws


def paths(aws: Aws) -> list[str]:
    return [f"{method} {path}" for method, path, _ in aws.imds_calls]


@pytest.mark.parametrize("tokens", ["required", "optional", "v1 only"])
def test_version_2_is_used_and_1_only_where_there_is_no_token(
    lab: Lab, subnet: str, eni: str, tokens: str
) -> None:
    machine = lab.launch(subnet, group="web", tokens=tokens)
    assert machine.eni_ctl("-a").returncode == 0


def test_few_requests_are_made(lab: Lab, machine: Machine) -> None:
    machine.eni_ctl("-a")
    own = [path for path in paths(lab.aws) if "security-credentials" not in path]
    assert len(own) <= 7, own


def test_imds_that_comes_up_late_is_waited_for(lab: Lab, machine: Machine) -> None:
    lab.aws.imds_up = False
    process = machine.start_eni_ctl("-a")
    assert process.stderr
    assert "IMDS, PUT http://169.254.169.254/latest/api/token" in process.stderr.readline()
    lab.aws.imds_up = True
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


@pytest.mark.parametrize(
    ("how", "status"),
    [("answer", 503), ("answer", 500), ("answer", 429), ("answer", 401), ("answer", 400)]
    + [(how, 200) for how in ("reset", "drop", "empty", "html")],
)
def test_bad_answers_are_asked_for_again(lab: Lab, machine: Machine, how: Any, status: int) -> None:
    lab.aws.fail("latest/", how=how, status=status, times=3)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr


def test_imds_that_hangs_does_not_outlive_the_deadline(lab: Lab, machine: Machine) -> None:
    lab.aws.fail("", how="hang", times=-1, seconds=60)
    done = machine.eni_ctl("-a", "-t", "6")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("gave up after 6 s")
    assert "169.254.169.254" in done.stderr


def test_imds_that_is_switched_off_needs_a_person(lab: Lab, machine: Machine) -> None:
    lab.aws.fail("latest/api/token", status=403, times=-1)
    done = machine.eni_ctl("-a", "-t", "6")
    assert done.returncode == 4
    last = done.stderr.splitlines()[-1]
    assert last == "IMDS at http://169.254.169.254/latest/ is switched off (403)"


def test_a_token_that_has_expired_is_replaced(lab: Lab, machine: Machine) -> None:
    lab.aws.fail(
        "latest/meta-data/placement/availability-zone", do=lab.aws.imds_tokens.clear, status=401
    )
    assert machine.eni_ctl("-a").returncode == 0


def test_no_proxy_is_asked_for_imds(lab: Lab, machine: Machine) -> None:
    """Neither by the script nor by botocore for the credentials; a dead proxy would refuse."""
    done = machine.eni_ctl("-a", http_proxy="http://10.0.1.1:9", HTTP_PROXY="http://10.0.1.1:9")
    assert done.returncode == 0, done.stderr


def test_what_else_no_proxy_names_stays(lab: Lab, machine: Machine) -> None:
    proxy = "http://10.0.1.1:9"
    done = machine.eni_ctl(
        "-a", http_proxy=proxy, https_proxy=proxy, no_proxy="example.com,.amazonaws.com"
    )
    assert done.returncode == 0, done.stderr


def test_the_endpoint_of_the_environment_is_used(lab: Lab, machine: Machine) -> None:
    lab.aws.fail("", how="html", times=1)
    done = machine.eni_ctl("-a", "-t", "6", AWS_EC2_METADATA_SERVICE_ENDPOINT="http://127.0.0.1:9/")
    assert done.returncode == 1
    assert "http://127.0.0.1:9/latest/api/token" in done.stderr
    assert lab.aws.imds_calls == []


def test_imds_is_reached_by_ipv6_where_the_environment_says_so(lab: Lab) -> None:
    subnet = lab.add_subnet("10.0.1.0/24", cidr6="2001:db8:0:1::/64")
    lab.aws.create_eni(subnet, name="web")
    machine = lab.launch(subnet, group="web", ipv6=["2001:db8:0:1::10"])
    machine.ip("-6", "route", "add", "default", "via", "fe80:ec2::1", "dev", "eth0")
    done = machine.eni_ctl("-a", AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE="IPv6")
    assert done.returncode == 0, done.stderr
    assert {source for _, _, source in lab.aws.imds_calls} == {"2001:db8:0:1::10"}


def test_an_instance_without_a_profile_needs_a_person(lab: Lab, subnet: str) -> None:
    machine = lab.launch(subnet, group="web", role=False)
    done = machine.eni_ctl("-a", "-t", "6")
    assert done.returncode == 4
    last = done.stderr.splitlines()[-1]
    assert last == "no credentials: has the instance an IAM instance profile?"


def test_credentials_that_arrive_late_are_waited_for(lab: Lab, machine: Machine) -> None:
    machine.instance.role = False
    timer = threading.Timer(3, lambda: setattr(machine.instance, "role", True))
    timer.start()
    done = machine.eni_ctl("-a")
    timer.join()
    assert done.returncode == 0, done.stderr
