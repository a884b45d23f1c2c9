"""eni_ctl.py and the instance metadata service: late, failing, old, or not to be asked."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
from lab import Lab, Machine, snippet
from lab.aws import Aws
from lab.vpc import OUTER_LIMIT
from lab.watching import give_up, last_line, wait_for_line
from lab.wire import Answer

IPV6_ONLY = snippet("# /etc/systemd/system/eni.service.d/ipv6.conf")


def paths(aws: Aws) -> list[str]:
    return [f"{method} {path}" for method, path, _ in aws.imds_calls]


@pytest.mark.parametrize("tokens", ["required", "optional", "v1 only"])
def test_imds_version_1_is_used_only_where_there_is_no_token(
    lab: Lab, subnet: str, eni: str, tokens: str
) -> None:
    machine = lab.launch(subnet, group="web", tokens=tokens)
    assert machine.eni_ctl("-a").returncode == 0


def test_an_attach_makes_few_requests_to_imds(lab: Lab, machine: Machine) -> None:
    machine.eni_ctl("-a")
    own = [path for path in paths(lab.aws) if "security-credentials" not in path]
    assert len(own) <= 7, own


def test_imds_that_comes_up_late_is_waited_for(lab: Lab, machine: Machine) -> None:
    lab.aws.imds_up = False
    process = machine.start_eni_ctl("-a")
    wait_for_line(process, "IMDS, PUT http://169.254.169.254/latest/api/token")
    lab.aws.imds_up = True
    _, err = process.communicate(timeout=OUTER_LIMIT)
    assert process.returncode == 0, err


@pytest.mark.parametrize(
    ("how", "status"),
    [("answer", 503), ("answer", 500), ("answer", 429), ("answer", 401), ("answer", 400)]
    + [(how, 200) for how in ("reset", "drop", "empty", "html")],
)
def test_bad_answers_of_imds_are_asked_for_again(
    lab: Lab, machine: Machine, how: Any, status: int
) -> None:
    lab.aws.fail("latest/", how=how, status=status, times=3)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", [b"", b"a\tb", b"\xff"])
@pytest.mark.parametrize("path", ["autoscaling/target-lifecycle-state", "tags/instance/"])
def test_auto_scaling_is_asked_where_imds_has_an_odd_value(
    lab: Lab, subnet: str, eni: str, path: str, text: bytes
) -> None:
    """IMDS's values would only have saved that call."""
    machine = lab.launch(subnet, group="web", tags_in_imds=True)
    lab.aws.fail(f"latest/meta-data/{path}", says=Answer(200, text), times=-1)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr


def test_imds_that_hangs_does_not_outlive_the_deadline(lab: Lab, machine: Machine) -> None:
    lab.aws.fail("", how="hang", times=-1, seconds=60)
    give_up(machine, "-a", over=re.escape("169.254.169.254"))


def test_imds_that_is_switched_off_needs_a_person(lab: Lab, machine: Machine) -> None:
    lab.aws.fail("latest/api/token", status=403, times=-1)
    done = machine.eni_ctl("-a")
    assert done.returncode == 4
    last = last_line(done)
    assert last == "eni_ctl.py: IMDS at http://169.254.169.254/latest/ is switched off (403)"


def test_an_imds_token_that_has_expired_is_replaced(lab: Lab, machine: Machine) -> None:
    lab.aws.fail(
        "latest/meta-data/placement/availability-zone", do=lab.aws.imds_tokens.clear, status=401
    )
    assert machine.eni_ctl("-a").returncode == 0


def test_no_proxy_is_asked_for_imds(lab: Lab, machine: Machine) -> None:
    """Neither by the script nor by botocore for the credentials; a dead proxy would refuse."""
    done = machine.eni_ctl("-a", http_proxy="http://10.0.1.1:9", HTTP_PROXY="http://10.0.1.1:9")
    assert done.returncode == 0, done.stderr


def test_other_names_in_no_proxy_stay_there(lab: Lab, machine: Machine) -> None:
    proxy = "http://10.0.1.1:9"
    done = machine.eni_ctl(
        "-a", http_proxy=proxy, https_proxy=proxy, no_proxy="example.com,.amazonaws.com"
    )
    assert done.returncode == 0, done.stderr


def test_no_proxy_for_any_host_stays_so(lab: Lab, machine: Machine) -> None:
    """The star means that only where it stands alone."""
    proxy = "http://10.0.1.1:9"
    done = machine.eni_ctl("-a", http_proxy=proxy, https_proxy=proxy, no_proxy="*")
    assert done.returncode == 0, done.stderr


def test_an_imds_endpoint_in_the_environment_is_used(lab: Lab, machine: Machine) -> None:
    lab.aws.fail("", how="html", times=1)
    endpoint = "http://127.0.0.1:9/"
    asked = f"{endpoint}latest/api/token"
    give_up(machine, "-a", over=asked, AWS_EC2_METADATA_SERVICE_ENDPOINT=endpoint)
    assert lab.aws.imds_calls == []


def test_imds_is_reached_by_ipv6_where_the_environment_says_so(lab: Lab) -> None:
    subnet = lab.add_subnet("10.0.1.0/24", cidr6="2001:db8:0:1::/64")
    lab.aws.create_eni(subnet, name="web")
    machine = lab.launch(subnet, group="web", ipv6=["2001:db8:0:1::10"])
    machine.ip("-6", "route", "add", "default", "via", "fe80:ec2::1", "dev", "eth0")
    done = machine.eni_ctl("-a", AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE="IPv6")
    assert done.returncode == 0, done.stderr
    assert {source for _, _, source in lab.aws.imds_calls} == {"2001:db8:0:1::10"}


def test_a_host_without_ipv4_needs_two_variables(lab: Lab) -> None:
    subnet = lab.add_subnet("10.0.1.0/24", cidr6="2001:db8:0:1::/64")
    lab.aws.create_eni(subnet, name="web", ipv4=False, ipv6=["2001:db8:0:1::22"])
    machine = lab.launch(subnet, group="web", ipv6=["2001:db8:0:1::10"])
    machine.ip("-4", "address", "flush", "dev", "eth0")
    machine.ip("-6", "route", "add", "default", "via", "fe80:ec2::1", "dev", "eth0")
    assert machine.eni_ctl("-a", "-t", "2").returncode == 1
    done = machine.eni_ctl("-a", **dict(re.findall("^Environment=(.+)=(.+)$", IPV6_ONLY, re.M)))
    assert done.returncode == 0, done.stderr
    assert machine.state()["IP"] == "2001:db8:0:1::22"


def test_an_instance_without_a_profile_needs_a_person(lab: Lab, subnet: str) -> None:
    machine = lab.launch(subnet, group="web", role=False)
    done = machine.eni_ctl("-a")
    assert done.returncode == 4
    last = last_line(done)
    assert last == "eni_ctl.py: no credentials: has the instance an IAM instance profile?"


def test_credentials_that_arrive_late_are_waited_for(lab: Lab, machine: Machine) -> None:
    machine.instance.role = False
    timer = threading.Timer(3, lambda: setattr(machine.instance, "role", True))
    timer.start()
    done = machine.eni_ctl("-a")
    timer.join()
    assert done.returncode == 0, done.stderr
