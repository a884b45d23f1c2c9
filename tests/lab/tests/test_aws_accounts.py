"""The lab's AWS does what real accounts do, beyond the documented happy path."""

from __future__ import annotations

import json
from typing import Any

import pytest
from botocore import loaders
from lab import odd
from lab.asking import HOST, PEER, client, described, metadata, refusal, wait
from lab.aws import Aws, Instance
from lab.ec2 import DENIED
from lab.imds import ACCOUNT, target

# The steady states: all that IMDS ever says (Amazon EC2 Auto Scaling User Guide, "Retrieve the
# target lifecycle state through instance metadata").
STEADY = {
    "Detached",
    "InService",
    "Standby",
    "Terminated",
    "Warmed:Hibernated",
    "Warmed:Running",
    "Warmed:Stopped",
    "Warmed:Terminated",
}
DENY_ALL = {"Effect": "Deny", "Action": "*", "Resource": "*"}
NAMED_WEB = [{"Name": "tag:Name", "Values": ["web"]}]


def life_cycle_states() -> list[str]:
    """All that Auto Scaling may say, but the one that it says it does not use."""
    model = loaders.Loader().load_service_model("autoscaling", "service-2")
    return [state for state in model["shapes"]["LifecycleState"]["enum"] if state != "Quarantined"]


def attach(ec2: Any, eni: str, host: Instance, index: int = 1, **more: Any) -> str:
    answer = ec2.attach_network_interface(
        NetworkInterfaceId=eni, InstanceId=host.id, DeviceIndex=index, **more
    )
    return str(answer["AttachmentId"])


# --- large accounts


def test_a_large_account_wants_pages_or_a_narrow_filter(
    aws: Aws, subnet: str, host: Instance, eni: str
) -> None:
    aws.large_account = True
    ec2 = client(aws)
    describe = ec2.describe_network_interfaces
    assert refusal(describe)[:2] == (400, "OperationNotPermitted")
    assert refusal(describe, Filters=NAMED_WEB)[:2] == (400, "OperationNotPermitted")
    narrow = [{"Name": "subnet-id", "Values": [subnet]}]
    for options in (
        {"Filters": NAMED_WEB, "MaxResults": 1000},
        {"Filters": [*NAMED_WEB, *narrow]},
        {"NetworkInterfaceIds": [eni]},
    ):
        assert describe(**options)["NetworkInterfaces"]


# --- network cards


def test_each_network_card_has_device_indexes_of_its_own(aws: Aws, subnet: str, eni: str) -> None:
    host = aws.launch(subnet, ip=HOST, cards=2)
    ec2 = client(aws)
    other = aws.create_eni(subnet, name="other")
    attach(ec2, eni, host, 0, NetworkCardIndex=1)
    attach(ec2, other, host, 1, NetworkCardIndex=0)
    shown = described(ec2, eni)["Attachment"]
    assert (shown["NetworkCardIndex"], shown["DeviceIndex"]) == (1, 0)
    third = aws.create_eni(subnet, name="third")
    taken = refusal(
        ec2.attach_network_interface,
        NetworkInterfaceId=third,
        InstanceId=host.id,
        DeviceIndex=0,
        NetworkCardIndex=1,
    )
    assert taken[1] == "InvalidParameterValue"
    assert "already has an interface attached at device index '0'" in taken[2]


def test_an_eni_at_index_0_of_the_second_card_can_be_detached(
    aws: Aws, subnet: str, eni: str
) -> None:
    host = aws.launch(subnet, ip=HOST, cards=2)
    ec2 = client(aws)
    attachment = attach(ec2, eni, host, 0, NetworkCardIndex=1)
    ec2.detach_network_interface(AttachmentId=attachment)
    wait(lambda: described(ec2, eni)["Status"] == "available", "the detachment")


def test_without_a_card_in_the_request_an_index_of_any_card_counts_as_taken(
    aws: Aws, subnet: str, eni: str
) -> None:
    """As Debian 11's botocore asks, which does not know of network cards."""
    host = aws.launch(subnet, ip=HOST, cards=2)
    ec2 = client(aws)
    attach(ec2, aws.create_eni(subnet, name="other"), host, 1, NetworkCardIndex=1)
    params = {"NetworkInterfaceId": eni, "InstanceId": host.id}
    assert refusal(ec2.attach_network_interface, DeviceIndex=1, **params)[1] == (
        "InvalidParameterValue"
    )
    attach(ec2, eni, host, 1, NetworkCardIndex=0)


def test_each_card_has_a_limit_of_its_own(aws: Aws, subnet: str, eni: str) -> None:
    host = aws.launch(subnet, ip=HOST, cards=2, max_interfaces=1)
    ec2 = client(aws)
    params = {"NetworkInterfaceId": eni, "InstanceId": host.id, "DeviceIndex": 1}
    full = refusal(ec2.attach_network_interface, NetworkCardIndex=0, **params)
    assert full[1] == "AttachmentLimitExceeded"
    ec2.attach_network_interface(NetworkCardIndex=1, **params)


def test_imds_names_the_network_card_where_there_are_several(aws: Aws, subnet: str) -> None:
    host = aws.launch(subnet, ip=HOST, cards=2)
    aws.launch(subnet, ip=PEER)
    eni = aws.create_eni(subnet, name="web")
    aws.attach_delay = 0
    attach(client(aws), eni, host, 0, NetworkCardIndex=1)
    folder = f"network/interfaces/macs/{aws.eni(eni).mac_address}"
    wait(lambda: metadata(f"{folder}/device-number") is not None, "the device")
    assert metadata(f"{folder}/network-card") == "1"
    assert metadata(f"{folder}/device-number") == "0"
    assert metadata(f"network/interfaces/macs/{host.mac}/network-card") == "0"


# --- interface types and owners


@pytest.mark.parametrize("interface_type", ["efa", "efa-only"])
def test_an_efa_cannot_be_attached_to_a_running_instance(
    aws: Aws, subnet: str, host: Instance, interface_type: str
) -> None:
    efa = aws.create_eni(subnet, name="web", interface_type=interface_type)
    ec2 = client(aws)
    shown = described(ec2, efa)
    assert shown["InterfaceType"] == interface_type
    assert ("PrivateIpAddress" in shown) == (interface_type == "efa")
    params = {"NetworkInterfaceId": efa, "InstanceId": host.id, "DeviceIndex": 1}
    assert refusal(ec2.attach_network_interface, **params)[1] == "OperationNotPermitted"
    aws.launch(subnet, ip=PEER)
    aws.halt(host)
    client(aws, source=PEER).attach_network_interface(**params)


@pytest.mark.parametrize("interface_type", ["nat_gateway", "lambda", "interface"])
def test_an_eni_of_an_aws_service_can_be_neither_attached_nor_detached(
    aws: Aws, subnet: str, host: Instance, interface_type: str
) -> None:
    eni = aws.create_eni(subnet, name="web", interface_type=interface_type, owner="amazon-aws")
    ec2 = client(aws)
    shown = described(ec2, eni)
    assert (shown["Status"], shown["RequesterManaged"]) == ("in-use", True)
    assert shown["Attachment"]["InstanceOwnerId"] == "amazon-aws"
    assert "InstanceId" not in shown["Attachment"]
    params = {"NetworkInterfaceId": eni, "InstanceId": host.id, "DeviceIndex": 1}
    assert refusal(ec2.attach_network_interface, **params)[1] == "InvalidNetworkInterface.InUse"
    assert refusal(
        ec2.detach_network_interface, AttachmentId=shown["Attachment"]["AttachmentId"]
    ) == (400, "OperationNotPermitted", "You are not allowed to manage 'ela-attach' attachments.")


def test_an_eni_that_an_aws_service_left_behind_cannot_be_attached(
    aws: Aws, subnet: str, host: Instance
) -> None:
    eni = aws.create_eni(subnet, name="web", owner="amazon-elb", status="available")
    ec2 = client(aws)
    shown = described(ec2, eni)
    assert (shown["Status"], shown["RequesterManaged"]) == ("available", True)
    assert "Attachment" not in shown
    params = {"NetworkInterfaceId": eni, "InstanceId": host.id, "DeviceIndex": 1}
    assert refusal(ec2.attach_network_interface, **params)[:2] == (400, "AuthFailure")


# --- states


@pytest.mark.parametrize("status", ["pending", "associated", "in-use", "attaching", "detaching"])
def test_an_eni_may_be_busy_without_an_attachment(
    aws: Aws, host: Instance, eni: str, status: str
) -> None:
    ec2 = client(aws)
    aws.lab_eni(eni).status = status
    assert described(ec2, eni)["Status"] == status
    assert "Attachment" not in described(ec2, eni)
    params = {"NetworkInterfaceId": eni, "InstanceId": host.id, "DeviceIndex": 1}
    assert refusal(ec2.attach_network_interface, **params)[1] == "InvalidNetworkInterface.InUse"
    aws.lab_eni(eni).status = ""
    ec2.attach_network_interface(**params)


def test_a_stale_attachment_may_be_shown(aws: Aws, host: Instance, eni: str) -> None:
    aws.lab_eni(eni).change = odd.with_stale_attachment(host.id, ACCOUNT)
    ec2 = client(aws)
    shown = described(ec2, eni)
    assert (shown["Status"], shown["Attachment"]["Status"]) == ("available", "detached")
    assert shown["Attachment"]["InstanceId"] == host.id
    attach(ec2, eni, host)


def test_ec2_may_undo_an_attachment(aws: Aws, host: Instance, eni: str) -> None:
    aws.lab_eni(eni).undone_after = [30.0]
    unplugged: list[str] = []
    aws.unplug = lambda instance_id, model: unplugged.append(model.id)
    ec2 = client(aws)
    attach(ec2, eni, host)
    assert described(ec2, eni)["Status"] == "in-use"
    wait(lambda: described(ec2, eni)["Status"] == "available", "the end of the attachment")
    assert unplugged == [eni]
    attach(ec2, eni, host)
    assert aws.lab_eni(eni).undone_after == []


def test_an_older_answer_may_come_after_a_newer_one(aws: Aws, host: Instance, eni: str) -> None:
    ec2 = client(aws)
    attach(ec2, eni, host)
    aws.next_lags = [0, 60, 0]
    seen = [described(ec2, eni)["Status"] for _ in range(4)]
    assert seen == ["in-use", "available", "in-use", "in-use"]


# --- refusals for one resource


def test_an_action_may_be_refused_for_one_eni(
    aws: Aws, subnet: str, host: Instance, eni: str
) -> None:
    other = aws.create_eni(subnet, name="web")
    ec2 = client(aws)
    refused = aws.refuse("AttachNetworkInterface", eni, "IncorrectState", "not now", times=2)
    params = {"NetworkInterfaceId": eni, "InstanceId": host.id, "DeviceIndex": 1}
    for _ in range(2):
        assert refusal(ec2.attach_network_interface, **params) == (400, "IncorrectState", "not now")
    attach(ec2, other, host, 2)
    attachment = attach(ec2, eni, host)
    assert refused.times == 0
    aws.refuse("DetachNetworkInterface", eni, "OperationNotPermitted", "never")
    for _ in range(3):
        assert refusal(ec2.detach_network_interface, AttachmentId=attachment)[2] == "never"
    ec2.detach_network_interface(AttachmentId=aws.eni(other).attachment_id)


@pytest.mark.parametrize("why", DENIED)
def test_iam_may_deny_an_action_for_one_resource_in_its_own_words(
    aws: Aws, subnet: str, host: Instance, eni: str, why: str
) -> None:
    other = aws.create_eni(subnet, name="web")
    aws.deny("AttachNetworkInterface", eni, why)
    ec2 = client(aws)
    params = {"InstanceId": host.id, "DeviceIndex": 1}
    for dry_run in (False, True):
        status, code, message = refusal(
            ec2.attach_network_interface, NetworkInterfaceId=eni, DryRun=dry_run, **params
        )
        assert (status, code) == (403, "UnauthorizedOperation")
        assert DENIED[why].format(action="ec2:AttachNetworkInterface") in message
        arn = f"arn:aws:ec2:us-west-1:{ACCOUNT}:network-interface/{eni}"
        assert f"ec2:AttachNetworkInterface on resource: {arn} " in message
        assert ". Encoded authorization failure message: " in message
    attach(ec2, other, host)


def test_a_denial_for_an_instance_concerns_all_of_its_enis(
    aws: Aws, subnet: str, host: Instance, eni: str
) -> None:
    peer = aws.launch(subnet, ip=PEER)
    ec2 = client(aws)
    attachment = attach(ec2, eni, peer)
    aws.deny("DetachNetworkInterface", peer.id, "service control policy")
    denied = refusal(ec2.detach_network_interface, AttachmentId=attachment)
    assert f":instance/{peer.id} with an explicit deny in a service control policy." in denied[2]


@pytest.mark.parametrize("kind", ["network-interface", "instance"])
def test_a_policys_conditions_are_judged_for_the_eni_and_for_the_instance(
    aws: Aws, subnet: str, host: Instance, eni: str, kind: str
) -> None:
    keys = {"network-interface": "Name", "instance": "aws:autoscaling:groupName"}
    statements = [
        {
            "Effect": "Allow",
            "Action": "ec2:*NetworkInterface",
            "Resource": f"arn:aws:ec2:*:*:{one}/*",
            "Condition": {"StringEquals": {f"aws:ResourceTag/{key}": "web"}},
        }
        for one, key in keys.items()
    ]
    aws.set_policy({"Version": "2012-10-17", "Statement": statements})
    ec2 = client(aws)
    attachment = attach(ec2, eni, host)
    if kind == "instance":
        aws.leave(host)
    else:
        aws.rename(eni, "db")
    concerned = {"network-interface": eni, "instance": host.id}[kind]
    arn = f"arn:aws:ec2:us-west-1:{ACCOUNT}:{kind}/{concerned}"
    status, code, message = refusal(ec2.detach_network_interface, AttachmentId=attachment)
    assert (status, code) == (403, "UnauthorizedOperation")
    assert f"{arn} because no identity-based policy allows" in message
    aws.set_policy({"Version": "2012-10-17", "Statement": [*statements, DENY_ALL]})
    message = refusal(ec2.detach_network_interface, AttachmentId=attachment)[2]
    assert "with an explicit deny in an identity-based policy" in message


def test_a_gone_attachment_has_no_tags_that_a_policy_could_want(
    aws: Aws, host: Instance, eni: str
) -> None:
    allow = {"Effect": "Allow", "Action": "ec2:DetachNetworkInterface", "Resource": "*"}
    aws.set_policy({"Version": "2012-10-17", "Statement": [allow]})
    ec2 = client(aws)
    gone = {"AttachmentId": "eni-attach-0"}
    assert refusal(ec2.detach_network_interface, **gone)[1] == "InvalidAttachmentID.NotFound"
    scoped = {**allow, "Condition": {"StringEquals": {"aws:ResourceTag/Name": "web"}}}
    aws.set_policy({"Version": "2012-10-17", "Statement": [scoped]})
    assert refusal(ec2.detach_network_interface, **gone)[1] == "UnauthorizedOperation"


# --- clocks


@pytest.mark.parametrize(
    ("offset", "service", "code", "words"),
    [
        (-3600, "ec2", "RequestExpired", "Request has expired."),
        (3600, "ec2", "AuthFailure", "AWS was not able to validate"),
        (-3600, "autoscaling", "SignatureDoesNotMatch", "Signature expired: 20"),
        (3600, "autoscaling", "SignatureDoesNotMatch", "Signature not yet current: 20"),
    ],
)
def test_a_clock_that_is_off_is_refused_in_the_services_own_way(
    aws: Aws, host: Instance, offset: float, service: str, code: str, words: str
) -> None:
    api = client(aws, service)
    action = {"ec2": "describe_network_interfaces"}.get(service, "describe_auto_scaling_instances")
    describe = getattr(api, action)
    host.clock_offset = offset
    _, said, message = refusal(describe)
    assert said == code
    assert message.startswith(words)
    host.clock_offset = 0
    describe()


@pytest.mark.parametrize(
    "code",
    ["InvalidSignatureException", "RequestTimeTooSkewed", "RequestInTheFuture", "RequestExpired"],
)
def test_a_service_may_have_another_code_for_a_clock_that_is_off(
    aws: Aws, host: Instance, code: str
) -> None:
    scaling = client(aws, "autoscaling")
    host.clock_offset, host.skew_codes = -3600, {"autoscaling": code}
    assert refusal(scaling.describe_auto_scaling_instances)[1] == code


def test_a_clock_that_is_off_by_minutes_does_not_matter(aws: Aws, host: Instance) -> None:
    host.clock_offset = -600
    assert client(aws).describe_network_interfaces(MaxResults=5)


def test_a_clock_is_the_instances_own(aws: Aws, subnet: str, host: Instance) -> None:
    aws.launch(subnet, ip=PEER)
    host.clock_offset = -3600
    assert client(aws, source=PEER).describe_network_interfaces(MaxResults=5)


def test_the_credentials_end_by_awss_clock(aws: Aws, host: Instance) -> None:
    def end() -> str:
        document = metadata("iam/security-credentials/eni-host")
        return str(json.loads(document or "{}")["Expiration"])

    now = end()
    host.clock_offset = 7 * 24 * 3600
    assert end() < now


# --- the end of an instance, and groups


@pytest.mark.parametrize("deleted", [True, False])
def test_an_eni_is_deleted_with_its_instance_where_the_attachment_says_so(
    aws: Aws, subnet: str, host: Instance, eni: str, deleted: bool
) -> None:
    aws.launch(subnet, ip=PEER)
    ec2 = client(aws, source=PEER)
    attach(ec2, eni, host)
    assert described(ec2, eni)["Attachment"]["DeleteOnTermination"] is False
    aws.eni(eni).delete_on_termination = deleted
    assert described(ec2, eni)["Attachment"]["DeleteOnTermination"] is deleted
    aws.terminate(host)
    wait(lambda: host.model.state == "terminated" and host.eni_id not in aws.enis, "the end")
    with aws._lock:  # it goes in the same moment as the primary one
        assert (eni in aws.enis) is not deleted
    if not deleted:
        assert described(ec2, eni)["Status"] == "available"


@pytest.mark.parametrize("state", life_cycle_states())
def test_every_life_cycle_state_is_described_and_has_a_steady_target(
    aws: Aws, subnet: str, state: str
) -> None:
    host = aws.launch(subnet, ip=HOST, group="web", life_cycle=state)
    scaling = client(aws, "autoscaling")
    members = scaling.describe_auto_scaling_instances(InstanceIds=[host.id])
    assert members["AutoScalingInstances"][0]["LifecycleState"] == state
    assert metadata("autoscaling/target-lifecycle-state") == target(state)
    assert target(state) in STEADY


@pytest.mark.parametrize("warm_pool", ["Stopped", "Running", "Hibernated"])
def test_the_target_on_the_way_into_a_warm_pool_is_the_pools(
    aws: Aws, subnet: str, warm_pool: str
) -> None:
    host = aws.launch(subnet, ip=HOST, group="web", life_cycle="Warmed:Pending:Wait")
    host.warm_pool = warm_pool
    assert metadata("autoscaling/target-lifecycle-state") == f"Warmed:{warm_pool}"


def test_imds_may_have_no_target_state(aws: Aws, subnet: str, host: Instance) -> None:
    host.target_in_imds = False
    assert metadata("autoscaling/target-lifecycle-state") is None
    host.target_in_imds = True
    assert metadata("autoscaling/target-lifecycle-state") == "InService"
    aws.leave(host)
    assert metadata("autoscaling/target-lifecycle-state") is None
    scaling = client(aws, "autoscaling")
    members = scaling.describe_auto_scaling_instances(InstanceIds=[host.id])
    assert members["AutoScalingInstances"] == []


# --- credentials


def test_a_role_that_cannot_be_assumed_has_an_error_document(aws: Aws, host: Instance) -> None:
    host.role_error = "AssumeRoleUnauthorizedAccess"
    document = json.loads(metadata("iam/security-credentials/eni-host") or "{}")
    assert document["Code"] == "AssumeRoleUnauthorizedAccess"
    assert document["Message"].startswith("EC2 cannot assume the role eni-host.")
    assert "AccessKeyId" not in document
    assert json.loads(metadata("iam/info") or "{}")["Code"] == "AssumeRoleUnauthorizedAccess"
    host.role_error = ""
    document = json.loads(metadata("iam/security-credentials/eni-host") or "{}")
    assert document["Code"] == "Success"
    assert json.loads(metadata("iam/info") or "{}")["Code"] == "Success"


# --- odd items


def test_an_item_may_lack_a_member(aws: Aws, subnet: str, host: Instance, eni: str) -> None:
    ec2, scaling = client(aws), client(aws, "autoscaling")
    attach(ec2, eni, host)
    aws.lab_eni(eni).change = odd.lacking("MacAddress")
    assert "MacAddress" not in described(ec2, eni)
    aws.lab_eni(eni).change = odd.lacking("Attachment", "InstanceId")
    assert "InstanceId" not in described(ec2, eni)["Attachment"]
    assert "DeviceIndex" in described(ec2, eni)["Attachment"]
    host.change = odd.lacking("LifecycleState")
    member = scaling.describe_auto_scaling_instances()["AutoScalingInstances"][0]
    assert member["AutoScalingGroupName"] == "web"
    assert "LifecycleState" not in member


def test_a_tag_may_be_odd(aws: Aws, host: Instance, eni: str) -> None:
    ec2 = client(aws)
    aws.lab_eni(eni).change = odd.tagged({"Key": "empty"}, {"Value": "nameless"})
    assert described(ec2, eni)["TagSet"] == [
        {"Key": "empty"},
        {"Value": "nameless"},
        {"Key": "Name", "Value": "web"},
    ]


@pytest.mark.parametrize(
    ("spell", "expected"),
    [
        (odd.upper_case, "2001:DB8:0:1::5"),
        (odd.uncompressed, "2001:0db8:0000:0001:0000:0000:0000:0005"),
    ],
)
def test_an_ipv6_address_may_be_spelt_in_another_way(
    aws: Aws, subnet: str, host: Instance, spell: Any, expected: str
) -> None:
    eni = aws.create_eni(subnet, name="web", ipv6=["2001:db8:0:1::5"])
    aws.lab_eni(eni).change = odd.spelling_ipv6(spell)
    assert described(client(aws), eni)["Ipv6Addresses"] == [{"Ipv6Address": expected}]


def test_a_name_tag_may_change(aws: Aws, host: Instance, eni: str) -> None:
    ec2 = client(aws)
    aws.rename(eni, "old")
    assert ec2.describe_network_interfaces(Filters=NAMED_WEB)["NetworkInterfaces"] == []
    assert {"Key": "Name", "Value": "old"} in described(ec2, eni)["TagSet"]
