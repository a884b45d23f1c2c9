"""The lab's AWS refuses what AWS refuses, and says it in AWS's words."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from http.client import HTTPConnection, HTTPException, HTTPResponse, RemoteDisconnected
from pathlib import Path
from typing import Any

import pytest
from botocore.config import Config
from botocore.credentials import InstanceMetadataProvider
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    HTTPClientError,
    ReadTimeoutError,
)
from botocore.parsers import ResponseParserError
from botocore.utils import InstanceMetadataFetcher
from lab.asking import (
    ENI6,
    HOST,
    IMDS,
    ONCE,
    PEER,
    ask,
    attachment_status,
    client,
    described,
    make_client,
    metadata,
    refusal,
    token,
    wait,
)
from lab.aws import SEED_ACTIONS, Aws, Instance
from lab.ec2 import EC2_THROTTLE, UNFILTERED, wildcard
from lab.imds import target
from lab.vpc import OUTER_LIMIT

# --- attach


def test_an_attachment_goes_through_its_phases(
    aws: Aws, host: Instance, eni: str, request: pytest.FixtureRequest
) -> None:
    ec2 = client(aws)
    seen: list[tuple[str, str, str]] = []
    gate = threading.Event()  # until it is set, no device comes or goes
    request.addfinalizer(gate.set)

    def plug(instance_id: str, model: Any) -> None:
        gate.wait()
        seen.append(("plug", instance_id, model.id))

    def unplug(instance_id: str, model: Any) -> None:
        gate.wait()
        seen.append(("unplug", instance_id, model.id))

    aws.plug, aws.unplug = plug, unplug
    answer = ec2.attach_network_interface(
        NetworkInterfaceId=eni, InstanceId=host.id, DeviceIndex=1, NetworkCardIndex=0
    )
    attachment = described(ec2, eni)["Attachment"]
    assert (attachment["Status"], attachment["AttachmentId"], attachment["InstanceId"]) == (
        "attaching",
        answer["AttachmentId"],
        host.id,
    )
    assert attachment["DeviceIndex"] == 1
    assert "AttachTime" in attachment
    assert described(ec2, eni)["Status"] == "in-use"
    assert seen == []
    gate.set()
    wait(lambda: attachment_status(ec2, eni) == "attached", "the attachment")
    assert seen == [("plug", host.id, eni)]
    gate.clear()
    ec2.detach_network_interface(AttachmentId=answer["AttachmentId"])
    assert attachment_status(ec2, eni) == "detaching"
    gate.set()
    wait(lambda: attachment_status(ec2, eni) is None, "the detachment")
    assert described(ec2, eni)["Status"] == "available"
    assert seen[1:] == [("unplug", host.id, eni)]


def test_attach_refuses_an_eni_in_use(aws: Aws, subnet: str, host: Instance, eni: str) -> None:
    peer = aws.launch(subnet)
    client(aws).attach_network_interface(NetworkInterfaceId=eni, InstanceId=host.id, DeviceIndex=1)
    assert refusal(
        client(aws).attach_network_interface,
        NetworkInterfaceId=eni,
        InstanceId=peer.id,
        DeviceIndex=1,
    ) == (400, "InvalidNetworkInterface.InUse", f"Interface: [{eni}] in use.")


def test_attach_refuses_a_taken_index(aws: Aws, subnet: str, host: Instance, eni: str) -> None:
    ec2 = client(aws)
    other = aws.create_eni(subnet, name="other")
    ec2.attach_network_interface(NetworkInterfaceId=other, InstanceId=host.id, DeviceIndex=1)
    assert refusal(
        ec2.attach_network_interface, NetworkInterfaceId=eni, InstanceId=host.id, DeviceIndex=1
    ) == (
        400,
        "InvalidParameterValue",
        f"Instance '{host.id}' already has an interface attached at device index '1'.",
    )


def test_attach_refuses_another_zone(aws: Aws, host: Instance) -> None:
    far = aws.create_eni(aws.add_subnet("10.0.2.0/24", "us-west-1c"), name="web")
    status, code, message = refusal(
        client(aws).attach_network_interface,
        NetworkInterfaceId=far,
        InstanceId=host.id,
        DeviceIndex=1,
    )
    assert (status, code) == (400, "InvalidParameterCombination")
    assert "not in the same availability zone" in message


def test_attach_refuses_more_interfaces_than_the_type_has(aws: Aws, subnet: str, eni: str) -> None:
    small = aws.launch(subnet, ip=HOST, max_interfaces=1)
    assert refusal(
        client(aws).attach_network_interface,
        NetworkInterfaceId=eni,
        InstanceId=small.id,
        DeviceIndex=1,
    ) == (400, "AttachmentLimitExceeded", "Interface count 2 exceeds the limit for t3.medium")


def test_attach_refuses_an_instance_that_does_not_run(aws: Aws, host: Instance, eni: str) -> None:
    ec2 = client(aws)
    vars(host.model.instance_state).update(name="shutting-down", code=32)
    status, code, _ = refusal(
        ec2.attach_network_interface, NetworkInterfaceId=eni, InstanceId=host.id, DeviceIndex=1
    )
    assert (status, code) == (400, "IncorrectState")


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"NetworkInterfaceId": "eni-0"}, "InvalidNetworkInterfaceID.NotFound"),
        ({"InstanceId": "i-0"}, "InvalidInstanceID.NotFound"),
        ({"NetworkCardIndex": 1}, "InvalidParameterValue"),
    ],
)
def test_attach_refuses_what_does_not_exist(
    aws: Aws, host: Instance, eni: str, wrong: dict[str, Any], code: str
) -> None:
    right = {"NetworkInterfaceId": eni, "InstanceId": host.id, "DeviceIndex": 1}
    assert refusal(client(aws).attach_network_interface, **{**right, **wrong})[:2] == (400, code)


def test_one_of_many_attaches_at_once_wins(
    aws: Aws, subnet: str, eni: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = aws.attach

    def slowly(*args: Any) -> str:  # time for the others between the check and the effect
        time.sleep(0.5)
        return real(*args)

    hosts = [aws.launch(subnet, ip=HOST), *(aws.launch(subnet) for _ in range(9))]
    ec2 = client(aws, max_pool_connections=10)
    start = threading.Barrier(10)
    monkeypatch.setattr(aws, "attach", slowly)

    def attach(host: Instance) -> str:
        start.wait(OUTER_LIMIT)
        try:
            ec2.attach_network_interface(NetworkInterfaceId=eni, InstanceId=host.id, DeviceIndex=1)
        except ClientError as error:
            return str(error.response["Error"]["Code"])
        return "attached"

    with ThreadPoolExecutor(10) as pool:
        results = sorted(pool.map(attach, hosts))
    assert results == ["InvalidNetworkInterface.InUse"] * 9 + ["attached"]


def test_an_eni_that_never_plugs_is_attached_without_a_device(
    aws: Aws, host: Instance, eni: str
) -> None:
    ec2 = client(aws)
    plugged: list[str] = []
    aws.plug = lambda instance_id, model: plugged.append(model.id)
    aws.never_plug.add(eni)
    ec2.attach_network_interface(NetworkInterfaceId=eni, InstanceId=host.id, DeviceIndex=1)
    wait(lambda: attachment_status(ec2, eni) == "attached", "the attachment")
    assert plugged == []
    assert str(aws.eni(eni).mac_address) not in (metadata("network/interfaces/macs/") or "")


# --- detach


def test_detach_refuses_what_ec2_refuses(aws: Aws, subnet: str, host: Instance, eni: str) -> None:
    ec2 = client(aws)
    primary = described(ec2, host.eni_id)["Attachment"]["AttachmentId"]
    assert refusal(ec2.detach_network_interface, AttachmentId=primary) == (
        400,
        "OperationNotPermitted",
        "The network interface at device index 0 and networkCard index 0 cannot be detached.",
    )
    assert refusal(ec2.detach_network_interface, AttachmentId="eni-attach-0") == (
        400,
        "InvalidAttachmentID.NotFound",
        "The network interface attachment ID 'eni-attach-0' does not exist",
    )
    attachment = ec2.attach_network_interface(
        NetworkInterfaceId=eni, InstanceId=host.id, DeviceIndex=1
    )["AttachmentId"]
    aws.refuse_detach.add(host.id)
    assert refusal(ec2.detach_network_interface, AttachmentId=attachment)[1] == "IncorrectState"
    aws.refuse_detach.clear()
    aws.detach_delay = 3600
    ec2.detach_network_interface(AttachmentId=attachment)
    assert refusal(ec2.detach_network_interface, AttachmentId=attachment)[1] == "IncorrectState"


def test_a_stuck_detach_needs_force(aws: Aws, host: Instance, eni: str) -> None:
    aws.attach_delay = aws.detach_delay = 0.01
    ec2 = client(aws)
    aws.stuck.add(eni)
    attachment = ec2.attach_network_interface(
        NetworkInterfaceId=eni, InstanceId=host.id, DeviceIndex=1
    )["AttachmentId"]
    ec2.detach_network_interface(AttachmentId=attachment)
    time.sleep(0.1)  # ten times the delay
    assert attachment_status(ec2, eni) == "detaching"
    ec2.detach_network_interface(AttachmentId=attachment, Force=True)
    wait(lambda: attachment_status(ec2, eni) is None, "the detachment")


def test_a_terminated_instance_lets_its_enis_go(
    aws: Aws, subnet: str, host: Instance, eni: str
) -> None:
    aws.launch(subnet, ip=PEER)
    ec2, scaling = client(aws, source=PEER), client(aws, "autoscaling", PEER)
    ec2.attach_network_interface(NetworkInterfaceId=eni, InstanceId=host.id, DeviceIndex=1)
    aws.shutdown_delay = 20
    aws.terminate(host)
    listed = scaling.describe_auto_scaling_instances(InstanceIds=[host.id])
    assert listed["AutoScalingInstances"][0]["LifecycleState"] == "Terminating"
    assert described(ec2, eni)["Status"] == "in-use"
    wait(lambda: described(ec2, eni)["Status"] == "available", "the termination")
    gone = refusal(ec2.describe_network_interfaces, NetworkInterfaceIds=[host.eni_id])
    assert gone[1] == "InvalidNetworkInterfaceID.NotFound"
    listed = scaling.describe_auto_scaling_instances(InstanceIds=[host.id])
    assert listed["AutoScalingInstances"] == []


# --- describe


@pytest.mark.parametrize(
    ("pattern", "value", "matches"),
    [
        ("web", "web", True),
        ("web", "Web", False),
        ("web", "website", False),
        ("web*", "website", True),
        ("w?b", "web", True),
        ("w?b", "wb", False),
        (r"web\*", "web*", True),
        (r"web\*", "website", False),
        (r"web\?", "webs", False),
        (r"a\\b", r"a\b", True),
        ("a\\", "a\\", True),
        ("w[e]b", "web", False),
        ("w[e]b", "w[e]b", True),
        ("a*b", "a\nb", True),
        ("", "", True),
        ("*", "", True),
    ],
)
def test_filter_values_are_ec2s_wildcards(pattern: str, value: str, matches: bool) -> None:
    assert bool(wildcard(pattern).fullmatch(value)) is matches


@pytest.mark.parametrize(
    ("name", "values", "found"),
    [
        ("tag:Name", ["web*"], {"web", "web*?\\"}),
        ("tag:Name", [r"web\*\?\\"], {"web*?\\"}),
        ("tag:Name", ["Web"], set()),
        ("tag:Name", ["web", "other"], {"web", "other"}),
        ("tag-key", ["Name"], {"web", "other", "web*?\\"}),
        ("status", ["available"], {"web", "other", "web*?\\"}),
        ("attachment.instance-id", ["i-*"], {None}),
        ("availability-zone", ["us-west-1b"], set()),
        ("addresses.private-ip-address", ["10.0.1.50"], {"web"}),
    ],
)
def test_describe_filters_as_ec2_does(
    aws: Aws, subnet: str, host: Instance, eni: str, name: str, values: list[str], found: set[str]
) -> None:
    for other in ("other", "web*?\\"):
        aws.create_eni(subnet, name=other)
    answer = client(aws).describe_network_interfaces(Filters=[{"Name": name, "Values": values}])
    names = [
        next((tag["Value"] for tag in item["TagSet"] if tag["Key"] == "Name"), None)
        for item in answer["NetworkInterfaces"]
    ]
    assert set(names) == found
    assert len(names) == len(found)


def test_describe_refuses_an_unknown_filter(aws: Aws, host: Instance) -> None:
    filters = [{"Name": "tag:Name", "Values": ["x"]}, {"Name": "colour", "Values": ["red"]}]
    assert refusal(client(aws).describe_network_interfaces, Filters=filters) == (
        400,
        "InvalidParameterValue",
        "The filter 'colour' is invalid",
    )


def test_enis_come_in_pages_only_where_the_client_asks_for_pages(
    aws: Aws, subnet: str, host: Instance
) -> None:
    enis = {aws.create_eni(subnet, name="web") for _ in range(12)}
    ec2 = client(aws)
    filters = [{"Name": "tag:Name", "Values": ["web"]}]
    whole = ec2.describe_network_interfaces(Filters=filters)
    assert len(whole["NetworkInterfaces"]) == 12
    assert "NextToken" not in whole
    first = ec2.describe_network_interfaces(Filters=filters, MaxResults=5)
    assert len(first["NetworkInterfaces"]) == 5
    assert first["NextToken"]
    paginator = ec2.get_paginator("describe_network_interfaces")
    pages = paginator.paginate(Filters=filters, PaginationConfig={"PageSize": 5})
    found = [eni["NetworkInterfaceId"] for page in pages for eni in page["NetworkInterfaces"]]
    assert set(found) == enis
    assert len(found) == 12
    wrong = refusal(ec2.describe_network_interfaces, NextToken="x", MaxResults=5)
    assert wrong[1] == "InvalidParameterValue"


def test_members_of_groups_come_in_pages_though_the_client_did_not_ask(
    aws: Aws, subnet: str, host: Instance
) -> None:
    peers = {aws.launch(subnet, group="web").id for _ in range(4)}
    aws.page_size = 2
    scaling = client(aws, "autoscaling")
    pages = scaling.get_paginator("describe_auto_scaling_instances").paginate()
    listed = [item["InstanceId"] for page in pages for item in page["AutoScalingInstances"]]
    assert set(listed) == peers | {host.id}
    assert len(listed) == 5


def test_auto_scaling_takes_fifty_ids_at_most(aws: Aws, host: Instance) -> None:
    scaling = client(aws, "autoscaling")
    assert scaling.describe_auto_scaling_instances(InstanceIds=[host.id] * 50)
    too_many = refusal(scaling.describe_auto_scaling_instances, InstanceIds=[host.id] * 51)
    assert too_many[:2] == (400, "ValidationError")


def test_describe_lags_behind_an_attach(aws: Aws, host: Instance, eni: str) -> None:
    aws.attach_delay, aws.describe_lag = 0.0, 3600.0
    ec2 = client(aws)
    start = time.monotonic()
    ec2.attach_network_interface(NetworkInterfaceId=eni, InstanceId=host.id, DeviceIndex=1)
    assert described(ec2, eni)["Status"] == "available"
    aws.describe_lag = 4.0
    wait(lambda: described(ec2, eni)["Status"] == "in-use", "the describe")
    assert time.monotonic() - start >= 4


def test_an_eni_can_have_ipv6_addresses_only_and_secondaries(aws: Aws, subnet: str) -> None:
    host = aws.launch(subnet, ip=HOST, primary_name="web")
    six = aws.create_eni(subnet, name="six", ipv6=[ENI6], ipv4=False)
    many = aws.create_eni(subnet, name="many", secondary=["10.0.1.77"], tags={"FQDN": "a.b"})
    ec2 = client(aws)
    assert "PrivateIpAddress" not in described(ec2, six)
    assert described(ec2, six)["PrivateIpAddresses"] == []
    assert described(ec2, six)["Ipv6Addresses"] == [{"Ipv6Address": ENI6}]
    private = described(ec2, many)["PrivateIpAddresses"]
    assert [item["Primary"] for item in private] == [True, False]
    assert {"Key": "FQDN", "Value": "a.b"} in described(ec2, many)["TagSet"]
    assert {"Key": "Name", "Value": "web"} in described(ec2, host.eni_id)["TagSet"]


def test_the_group_lists_the_instance_and_its_life_cycle(aws: Aws, subnet: str) -> None:
    name = "web*?\\ é"
    host = aws.launch(subnet, ip=HOST, group=name, life_cycle="Warmed:Pending")
    scaling = client(aws, "autoscaling")
    members = scaling.describe_auto_scaling_instances(InstanceIds=[host.id])
    member = members["AutoScalingInstances"][0]
    assert member["AutoScalingGroupName"] == name
    assert member["LifecycleState"] == "Warmed:Pending"
    assert member["AvailabilityZone"] == "us-west-1a"
    host.life_cycle = "InService"
    groups = scaling.describe_auto_scaling_groups(AutoScalingGroupNames=[name])["AutoScalingGroups"]
    assert [item["LifecycleState"] for item in groups[0]["Instances"]] == ["InService"]


# --- permission


@pytest.mark.parametrize("missing", SEED_ACTIONS)
def test_each_action_needs_its_permission(aws: Aws, host: Instance, eni: str, missing: str) -> None:
    actions = [action for action in SEED_ACTIONS if action != missing]
    ec2, scaling = client(aws), client(aws, "autoscaling")
    calls: dict[str, Callable[[], Any]] = {
        "DescribeAutoScalingGroups": scaling.describe_auto_scaling_groups,
        "DescribeAutoScalingInstances": scaling.describe_auto_scaling_instances,
        "DescribeNetworkInterfaces": ec2.describe_network_interfaces,
        "AttachNetworkInterface": lambda: ec2.attach_network_interface(
            NetworkInterfaceId=eni, InstanceId=host.id, DeviceIndex=1
        ),
        "DetachNetworkInterface": lambda: ec2.detach_network_interface(AttachmentId="eni-attach-0"),
    }
    aws.set_policy(
        {
            "Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", "Action": actions, "Resource": "*"}],
        }
    )
    service, _, action = missing.partition(":")
    status, code, message = refusal(calls.pop(action))
    assert (status, code) == (
        403,
        "UnauthorizedOperation" if service == "ec2" else "AccessDenied",
    )
    assert message.startswith("You are not authorized to perform this operation.") == (
        service == "ec2"
    )
    assert f"/{host.id} is not authorized to perform: {missing}" in message
    for call in calls.values():
        code = ""
        try:
            call()
        except ClientError as error:
            code = error.response["Error"]["Code"]
        assert code in ("", "InvalidAttachmentID.NotFound")


def test_the_policy_refuses_every_other_action(aws: Aws, host: Instance) -> None:
    assert refusal(client(aws).describe_instances)[:2] == (403, "UnauthorizedOperation")
    everything = {"Effect": "Allow", "Action": "*", "Resource": "*"}
    aws.set_policy({"Version": "2012-10-17", "Statement": [everything]})
    assert client(aws).describe_instances()["Reservations"]


def test_a_dry_run_says_so_and_does_nothing(aws: Aws, host: Instance, eni: str) -> None:
    ec2 = client(aws)
    params = {"NetworkInterfaceId": eni, "InstanceId": host.id, "DeviceIndex": 1, "DryRun": True}
    assert refusal(ec2.attach_network_interface, **params) == (
        412,
        "DryRunOperation",
        "Request would have succeeded, but DryRun flag is set.",
    )
    assert described(ec2, eni)["Status"] == "available"
    nothing = {"Effect": "Deny", "Action": "*", "Resource": "*"}
    aws.set_policy({"Version": "2012-10-17", "Statement": [nothing]})
    assert refusal(ec2.attach_network_interface, **params)[:2] == (403, "UnauthorizedOperation")
    assert [(call.dry_run, call.status) for call in aws.calls] == [
        (True, 412),
        (False, 200),
        (True, 403),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"aws_secret_access_key": "wrong"},
        {"aws_session_token": "wrong"},
        {"aws_access_key_id": "ASIAWRONGWRONGWRONG0"},
        {"region_name": "us-east-1", "endpoint_url": "https://ec2.us-west-1.amazonaws.com"},
    ],
)
def test_credentials_are_checked(aws: Aws, host: Instance, change: dict[str, str]) -> None:
    keys = json.loads(metadata("iam/security-credentials/eni-host") or "")
    right = {
        "region_name": "us-west-1",
        "aws_access_key_id": keys["AccessKeyId"],
        "aws_secret_access_key": keys["SecretAccessKey"],
        "aws_session_token": keys["Token"],
    }
    options: dict[str, Any] = {**right, **change}
    ec2 = make_client("ec2", verify=str(aws.ca), config=Config(retries=ONCE), **options)
    assert refusal(ec2.describe_network_interfaces)[:2] == (401, "AuthFailure")


def test_credentials_expire_and_imds_has_new_ones(aws: Aws, host: Instance) -> None:
    ec2, scaling = client(aws), client(aws, "autoscaling")
    ec2.describe_network_interfaces()
    old = metadata("iam/security-credentials/eni-host")
    assert metadata("iam/security-credentials/eni-host") == old
    host.credentials.expiration -= timedelta(hours=6, seconds=1)
    assert metadata("iam/security-credentials/eni-host") != old
    assert refusal(ec2.describe_network_interfaces)[1] == "RequestExpired"
    assert refusal(scaling.describe_auto_scaling_groups)[1] == "ExpiredToken"
    client(aws).describe_network_interfaces()


def test_another_region_has_its_own_names(
    addresses: None, aws: Aws, host: Instance, tmp_path: Path
) -> None:
    aws.stop()
    with Aws(region="eu-central-1", ca_dir=tmp_path) as far:
        far.launch(far.add_subnet("10.0.1.0/24", "eu-central-1b"), ip=HOST)
        assert far.host_names[0] == "ec2.eu-central-1.amazonaws.com"
        assert metadata("placement/region") == "eu-central-1"
        enis = client(far).describe_network_interfaces()["NetworkInterfaces"]
        assert [eni["AvailabilityZone"] for eni in enis] == ["eu-central-1b"]


# --- IMDS


@pytest.mark.parametrize(
    ("tokens", "plain", "bad", "good"),
    [("required", 401, 401, 200), ("optional", 200, 401, 200), ("v1 only", 200, 200, None)],
)
def test_imds_wants_a_token_and_counts_its_time(
    aws: Aws, subnet: str, tokens: Any, plain: int, bad: int, good: int | None
) -> None:
    aws.launch(subnet, ip=HOST, tokens=tokens)
    path = "meta-data/instance-id"
    assert ask(path)[0] == plain
    assert ask(path, {"X-aws-ec2-metadata-token": "bad"})[0] == bad
    if good is None:
        ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
        assert ask("api/token", ttl, "PUT")[0] == 404
    else:
        assert ask(path, token())[0] == good


def test_a_token_expires_and_belongs_to_one_instance(aws: Aws, subnet: str, host: Instance) -> None:
    aws.launch(subnet, ip=PEER)
    path, short = "meta-data/instance-id", token(seconds=10)
    assert ask(path, short)[0] == 200
    assert ask(path, short, source=PEER)[0] == 401
    wait(lambda: ask(path, short)[0] == 401, "the token to expire")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 400),
        ({"X-aws-ec2-metadata-token-ttl-seconds": "0"}, 400),
        ({"X-aws-ec2-metadata-token-ttl-seconds": "21601"}, 400),
        ({"X-aws-ec2-metadata-token-ttl-seconds": "ten"}, 400),
        ({"X-aws-ec2-metadata-token-ttl-seconds": "9", "X-Forwarded-For": "10.0.0.1"}, 403),
        ({"X-aws-ec2-metadata-token-ttl-seconds": "21600"}, 200),
    ],
)
def test_the_token_request_is_strict(
    aws: Aws, host: Instance, headers: dict[str, str], status: int
) -> None:
    assert ask("api/token", headers, "PUT")[0] == status


def test_imds_says_what_the_instance_is(aws: Aws, subnet: str, host: Instance) -> None:
    expected = {
        "instance-id": host.id,
        "placement/availability-zone": "us-west-1a",
        "placement/region": "us-west-1",
        "local-ipv4": HOST,
        "mac": host.mac,
        "iam/security-credentials/": "eni-host",
        "network/interfaces/macs/": f"{host.mac}/",
        f"network/interfaces/macs/{host.mac}/device-number": "0",
        f"network/interfaces/macs/{host.mac}/interface-id": host.eni_id,
        f"network/interfaces/macs/{host.mac}/local-ipv4s": HOST,
        f"network/interfaces/macs/{host.mac}/subnet-ipv4-cidr-block": "10.0.1.0/24",
        "autoscaling/target-lifecycle-state": "InService",
        "tags/instance/": None,
        "no/such/thing": None,
    }
    assert {path: metadata(path) for path in expected} == expected
    document = json.loads(ask("dynamic/instance-identity/document", token())[1])
    assert (document["instanceId"], document["region"]) == (host.id, "us-west-1")


def test_imds_has_tags_and_no_role_when_told_so(aws: Aws, subnet: str) -> None:
    aws.launch(subnet, ip=HOST, group="web*?\\", tags_in_imds=True, role=False)
    assert metadata("tags/instance/aws:autoscaling:groupName") == "web*?\\"
    assert metadata("tags/instance/Name") is not None
    assert metadata("iam/security-credentials/") is None


def test_imds_knows_the_instance_by_any_of_its_addresses(
    aws: Aws, subnet: str, host: Instance
) -> None:
    aws.launch(subnet, ip=PEER)
    eni = aws.create_eni(subnet, name="web", secondary=["10.0.1.77"], ipv6=[ENI6])
    ec2 = client(aws)
    ec2.attach_network_interface(NetworkInterfaceId=eni, InstanceId=host.id, DeviceIndex=1)
    for source in (HOST, "10.0.1.77", ENI6):
        assert metadata("instance-id", source) == host.id
    assert metadata("instance-id", PEER) != host.id


def test_imds_lists_a_new_eni_late_and_as_device_0_at_first(
    aws: Aws, host: Instance, eni: str
) -> None:
    aws.attach_delay, aws.imds_lag = 0.0, 20.0
    ec2 = client(aws)
    path = f"network/interfaces/macs/{aws.eni(eni).mac_address}/device-number"
    ec2.attach_network_interface(NetworkInterfaceId=eni, InstanceId=host.id, DeviceIndex=1)
    said: list[str | None] = []

    def correct() -> bool:
        said.append(metadata(path))
        return said[-1] == "1"

    wait(correct, "the device number")
    assert list(dict.fromkeys(said)) == [None, "0", "1"]


@pytest.mark.parametrize(
    ("life_cycle", "expected"),
    [
        ("InService", "InService"),
        ("Pending:Wait", "InService"),
        ("Terminating:Wait", "Terminated"),
        ("Terminated", "Terminated"),
        ("Warmed:Pending", "Warmed:Stopped"),
        ("Warmed:Running", "Warmed:Running"),
        ("Warmed:Terminating", "Warmed:Terminated"),
        ("Standby", "Standby"),
    ],
)
def test_imds_names_the_target_life_cycle_state(life_cycle: str, expected: str) -> None:
    assert target(life_cycle) == expected


def test_botocore_gets_its_credentials_from_imds(
    aws: Aws, host: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if address[0] == IMDS:
            self.bind((HOST, 0))
        real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    provider = InstanceMetadataProvider(InstanceMetadataFetcher(timeout=60, num_attempts=1))
    credentials = provider.load()
    assert credentials is not None
    assert credentials.get_frozen_credentials().access_key == host.credentials.access_key_id


def test_imds_keeps_its_connections(aws: Aws, host: Instance) -> None:
    connection = HTTPConnection(IMDS, 80, timeout=60, source_address=(HOST, 0))
    headers = token()
    for _ in range(3):
        connection.request("GET", "/latest/meta-data/instance-id", headers=headers)
        response: HTTPResponse = connection.getresponse()
        assert response.read().decode() == host.id
        assert not response.will_close
    connection.close()


def test_imds_can_be_down_and_come_up(aws: Aws, host: Instance) -> None:
    aws.imds_up = False
    with pytest.raises(ConnectionRefusedError):
        ask("meta-data/instance-id")
    aws.imds_up = True
    assert metadata("instance-id") == host.id


# --- faults


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("answer", ClientError),
        ("reset", HTTPClientError),
        ("drop", ConnectionClosedError),
        ("empty", ResponseParserError),
        ("html", None),
        ("truncate", ResponseParserError),
        ("hang", ReadTimeoutError),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_api_call_can_fail_before_or_after_its_effect(
    aws: Aws, host: Instance, eni: str, how: Any, when: Any, expected: Any
) -> None:
    # Only a call that hangs may run into its time limit, however busy this machine is.
    ec2 = client(aws, read_timeout=0.3 if how == "hang" else 60)
    done: list[bool] = []
    aws.fail(
        "AttachNetworkInterface",
        how=how,
        when=when,
        do=lambda: done.append(aws.eni(eni).attachment_id is not None),
    )
    params = {"NetworkInterfaceId": eni, "InstanceId": host.id, "DeviceIndex": 1}
    if expected is None:  # botocore takes any XML of status 200 for a success
        assert "AttachmentId" not in ec2.attach_network_interface(**params)
    else:
        with pytest.raises(expected):
            ec2.attach_network_interface(**params)
    took_effect = when == "after" or how == "truncate"
    if how == "hang":
        wait(lambda: bool(done), "the fault")
        ec2 = client(aws)
    assert done == [took_effect]
    assert (described(ec2, eni)["Status"] == "in-use") is took_effect


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("reset", ConnectionResetError),
        ("drop", RemoteDisconnected),
        ("truncate", HTTPException),
        ("hang", TimeoutError),
    ],
)
def test_an_imds_request_can_fail(
    aws: Aws, host: Instance, how: Any, expected: type[Exception]
) -> None:
    headers = token()
    aws.fail("latest/meta-data/", how=how)
    timeout = 0.3 if how == "hang" else 60
    connection = HTTPConnection(IMDS, 80, timeout=timeout, source_address=(HOST, 0))
    connection.request("GET", "/latest/meta-data/instance-id", headers=headers)
    with pytest.raises(expected) as caught:
        connection.getresponse().read()
    if how == "reset":  # of which http.client's RemoteDisconnected is a kind
        assert caught.type is ConnectionResetError
    connection.close()
    assert metadata("instance-id") == host.id


def test_faults_are_counted(aws: Aws, host: Instance) -> None:
    headers = token()
    aws.fail("latest/meta-data/instance-id", status=503, skip=1, times=2)
    aws.fail("latest/meta-data/mac", how="empty", times=-1)
    path = "meta-data/instance-id"
    assert [ask(path, headers)[0] for _ in range(4)] == [200, 503, 503, 200]
    assert [ask("meta-data/mac", headers) for _ in range(3)] == [(200, "")] * 3
    aws.clear_faults()
    assert ask("meta-data/mac", headers) == (200, host.mac)
    aws.fail("", status=500)
    assert ask("meta-data/mac", headers)[0] == 500
    aws.fail("DescribeNetworkInterfaces", code="InternalError", status=500)
    assert refusal(client(aws).describe_network_interfaces)[:2] == (500, "InternalError")


def test_a_hanging_request_then_goes_on(aws: Aws, host: Instance) -> None:
    headers = token()
    aws.fail("latest/meta-data/instance-id", how="hang", seconds=0.2)
    start = time.monotonic()
    assert ask("meta-data/instance-id", headers) == (200, host.id)
    assert time.monotonic() - start >= 0.2


def test_requests_beyond_the_bucket_are_throttled(aws: Aws, host: Instance) -> None:
    aws.throttle = {"DescribeNetworkInterfaces": (3, 0.0), "DescribeAutoScalingGroups": (0, 0.0)}
    ec2 = client(aws)
    for _ in range(3):
        ec2.describe_network_interfaces(MaxResults=5)
    assert refusal(ec2.describe_network_interfaces, MaxResults=5) == (
        503,
        "RequestLimitExceeded",
        "Request limit exceeded.",
    )

    def is_let_through() -> bool:
        with suppress(ClientError):
            ec2.describe_network_interfaces(MaxResults=5)
            return True
        return False

    aws.throttle["DescribeNetworkInterfaces"] = (3, 5.0)
    wait(is_let_through, "a token, of which five come in a second")
    scaling = client(aws, "autoscaling")
    assert refusal(scaling.describe_auto_scaling_groups) == (400, "Throttling", "Rate exceeded")
    assert EC2_THROTTLE["AttachNetworkInterface"] == (50, 5.0)


def test_an_unfiltered_and_unpaginated_describe_has_a_bucket_of_its_own(
    aws: Aws, host: Instance, eni: str
) -> None:
    aws.throttle = {UNFILTERED: (0, 0.0)}
    ec2 = client(aws)
    assert refusal(ec2.describe_network_interfaces)[1] == "RequestLimitExceeded"
    ec2.describe_network_interfaces(MaxResults=5)
    ec2.describe_network_interfaces(NetworkInterfaceIds=[eni])
    ec2.describe_network_interfaces(Filters=[{"Name": "tag:Name", "Values": ["web"]}])


# --- the record, and the end


def test_calls_are_recorded(aws: Aws, host: Instance, eni: str) -> None:
    ec2 = client(aws)
    ec2.describe_network_interfaces(NetworkInterfaceIds=[eni])
    refusal(ec2.detach_network_interface, AttachmentId="eni-attach-0")
    aws.fail("DescribeNetworkInterfaces", how="drop")
    with pytest.raises(ConnectionClosedError):
        ec2.describe_network_interfaces()
    assert [(call.action, call.instance_id, call.status) for call in aws.calls] == [
        ("DescribeNetworkInterfaces", host.id, 200),
        ("DetachNetworkInterface", host.id, 400),
        ("DescribeNetworkInterfaces", host.id, 0),
    ]
    assert aws.calls[0].params["NetworkInterfaceId.1"] == eni
    assert ("PUT", "latest/api/token", HOST) in aws.imds_calls


def test_stop_raises_what_a_hook_raised(aws: Aws, host: Instance, eni: str) -> None:
    def plug(instance_id: str, model: Any) -> None:
        raise OSError("no such namespace")

    aws.attach_delay, aws.plug = 0.0, plug
    ec2 = client(aws)
    ec2.attach_network_interface(NetworkInterfaceId=eni, InstanceId=host.id, DeviceIndex=1)
    wait(lambda: bool(aws._failures), "the hook")
    with pytest.raises(OSError, match="no such namespace"):
        aws.stop()


def test_stop_raises_what_a_fault_raised(aws: Aws, host: Instance) -> None:
    def kill() -> None:
        raise ProcessLookupError("it is gone already")

    aws.fail("latest/api/token", do=kill)
    with pytest.raises(RemoteDisconnected):
        token()
    with pytest.raises(ProcessLookupError, match="gone already"):
        aws.stop()


def test_stop_is_quick_with_timers_and_hanging_requests(aws: Aws, host: Instance) -> None:
    asked = threading.Event()
    ends: list[Exception] = []
    aws.fail("latest/api/token", how="hang", do=asked.set)
    aws.shutdown_delay = 120
    aws.terminate(host)

    def hang() -> None:
        try:
            token()
        except (OSError, HTTPException) as error:
            ends.append(error)

    hanging = threading.Thread(target=hang)
    hanging.start()
    assert asked.wait(OUTER_LIMIT)
    start = time.monotonic()
    aws.stop()
    assert time.monotonic() - start < aws.shutdown_delay / 2
    hanging.join(OUTER_LIMIT)
    (end,) = ends
    assert not isinstance(end, TimeoutError)  # by which the caller itself would have ended
