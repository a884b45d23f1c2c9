"""EC2 and Auto Scaling over moto, which forgives what they refuse.

Permission, throttling, the refusals of the actions that the scripts use, filters, paging. The
wording of errors is that of real answers, as users pasted them into bug reports; [ours] marks those
for which none was found. Only the codes are EC2's promise:
https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html
"""

from __future__ import annotations

import base64
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from botocore.model import OperationNotFoundError
from moto.autoscaling.responses import AutoScalingResponse
from moto.core.exceptions import ServiceException
from moto.core.request import Request
from moto.core.responses import ActionResult, EmptyResult
from moto.core.utils import utcnow
from moto.ec2.responses import EC2Response
from moto.iam.access_control import IAMRequest
from moto.iam.responses import IamResponse
from werkzeug.exceptions import HTTPException
from werkzeug.test import EnvironBuilder

from lab.imds import ACCOUNT, INSTANCE_TYPE, SLOTS, expired
from lab.knobs import Change
from lab.wire import Answer, Handler

if TYPE_CHECKING:
    from lab.aws import Aws, Instance

# action: (bucket size, refill per second) of one account in one region. Attach and Detach are
# "mutating actions". A describe call with neither filter nor page size has a bucket of its own.
# Auto Scaling publishes no numbers.
# https://docs.aws.amazon.com/ec2/latest/devguide/ec2-api-throttling.html
UNFILTERED = "DescribeNetworkInterfaces, unfiltered and unpaginated"
EC2_THROTTLE = {
    "DescribeNetworkInterfaces": (100, 20.0),
    UNFILTERED: (50, 10.0),
    "AttachNetworkInterface": (50, 5.0),
    "DetachNetworkInterface": (50, 5.0),
}
# In an account with very many ENIs, DescribeNetworkInterfaces wants pages or one of these filters.
# API_DescribeNetworkInterfaces; aws/amazon-vpc-resource-controller-k8s issue 188.
NARROW_FILTERS = {
    "group-id",
    "mac-address",
    "private-dns-name",
    "private-ip-address",
    "subnet-id",
    "vpc-id",
}
HTTP_STATUS = {  # of an error; every other code is a 400
    "DryRunOperation": 412,
    "UnauthorizedOperation": 403,
    "AccessDenied": 403,
    "AuthFailure": 401,
    "SignatureDoesNotMatch": 403,
    "InvalidClientTokenId": 403,
    "ExpiredToken": 403,
    "RequestTimeTooSkewed": 403,
    "OptInRequired": 403,
    "RequestLimitExceeded": 503,
}
MESSAGES = {
    "RequestLimitExceeded": "Request limit exceeded.",
    "Throttling": "Rate exceeded",
    "AuthFailure": "AWS was not able to validate the provided access credentials",
    "DryRunOperation": "Request would have succeeded, but DryRun flag is set.",
    "OptInRequired": "You are not subscribed to this service. Please go to http://aws.amazon.com"
    " to subscribe.",
    "RequestExpired": "Request has expired.",
    "RequestTimeTooSkewed": "The difference between the request time and the current time is too"
    " large.",
    "RequestInTheFuture": "The request's time stamp is in the future.",  # [ours]
}

# Why IAM denies an action, in the words of its error messages; {action} is "ec2:Attach…".
# IAM User Guide, "Troubleshoot access denied error messages".
DENIED = {
    "no identity-based policy": "because no identity-based policy allows the {action} action",
    "identity-based policy": "with an explicit deny in an identity-based policy",
    "service control policy": "with an explicit deny in a service control policy",
    "resource control policy": "with an explicit deny in a resource control policy",
    "permissions boundary": "because no permissions boundary allows the {action} action",
    "session policy": "because no session policy allows the {action} action",
    "VPC endpoint policy": "because no VPC endpoint policy allows the {action} action",
}

# A request whose time stamp is further off is refused (EC2 API Reference, "Common errors").
SKEW_LIMIT = 15 * 60
# What each service is known to say then, if the instance's clock is (behind, ahead). EC2:
# aws/aws-sdk-java issue 519. Auto Scaling: aws/aws-cli issue 602, aws/aws-sdk-ruby issue 522.
SKEW_CODES = {
    "ec2": ("RequestExpired", "AuthFailure"),
    "autoscaling": ("SignatureDoesNotMatch", "SignatureDoesNotMatch"),
}


@dataclass
class LabEni:
    """An ENI: moto's model, and what moto has no room for."""

    model: Any
    attachment_status: str = ""  # attaching, attached, detaching
    plugged: float | None = None  # since when the device is there
    # interface, efa, efa-only, nat_gateway, lambda … (API_NetworkInterface, InterfaceType).
    interface_type: str = "interface"
    # The AWS service that made the ENI for itself, as in InstanceOwnerId ("amazon-aws").
    owner: str = ""
    # A status that EC2 shows though the ENI has no attachment: pending, associated, in-use,
    # attaching, detaching. With an owner, "available" is an ENI that its service has left behind.
    status: str = ""
    # Seconds after which EC2 undoes the next attachments, one each.
    undone_after: list[float] = field(default_factory=list)
    change: Change = field(default=lambda item: item)  # see lab.odd
    history: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    @property
    def addresses(self) -> list[str]:
        ipv4 = [item["PrivateIpAddress"] for item in self.model.private_ip_addresses]
        return [*ipv4, *self.model.ipv6_addresses]

    @property
    def tags(self) -> dict[str, str]:
        """By moto's own index: its get_tags() reads every tag of the account for one ENI's."""
        return dict(self.model.ec2_backend.tags.get(self.model.id, {}))

    @property
    def held_by_its_service(self) -> bool:
        return bool(self.owner) and self.status != "available"

    def describe(self) -> dict[str, Any]:
        eni = self.model
        result: dict[str, Any] = {
            "NetworkInterfaceId": eni.id,
            "SubnetId": eni.subnet.id,
            "VpcId": eni.subnet.vpc_id,
            "AvailabilityZone": eni.subnet.availability_zone,
            "Description": eni.description,
            "OwnerId": ACCOUNT,
            "RequesterManaged": bool(self.owner),
            "SourceDestCheck": True,
            "InterfaceType": self.interface_type,
            "MacAddress": eni.mac_address,
            "Groups": [],
            "TagSet": [{"Key": key, "Value": value} for key, value in self.tags.items()],
            "PrivateIpAddresses": [
                {"PrivateIpAddress": item["PrivateIpAddress"], "Primary": item["Primary"]}
                for item in eni.private_ip_addresses
            ],
            "Ipv6Addresses": [{"Ipv6Address": address} for address in eni.ipv6_addresses],
            "Status": self.status or ("in-use" if eni.attachment_id else "available"),
        }
        if self.owner:
            result["RequesterId"] = self.owner
        if eni.private_ip_address:
            result["PrivateIpAddress"] = eni.private_ip_address
        if eni.attachment_id:
            card, index = divmod(eni.device_index, SLOTS)
            result["Attachment"] = {
                "AttachmentId": eni.attachment_id,
                "InstanceId": eni.instance.id,
                "InstanceOwnerId": ACCOUNT,
                "DeviceIndex": index,
                "NetworkCardIndex": card,
                "AttachTime": eni.attach_time,
                "DeleteOnTermination": eni.delete_on_termination,
                "Status": self.attachment_status,
            }
        elif self.held_by_its_service:
            result["Status"] = self.status or "in-use"
            result["Attachment"] = {
                "AttachmentId": self.service_attachment,
                "InstanceOwnerId": self.owner,
                "DeviceIndex": 1,
                "NetworkCardIndex": 0,
                "DeleteOnTermination": False,
                "Status": "attached",
            }
        return result

    @property
    def service_attachment(self) -> str:
        return str(self.model.id).replace("eni-", "ela-attach-")

    def append_history(self) -> None:
        self.history.append((time.monotonic(), self.describe()))

    def seen(self, lag: float) -> dict[str, Any]:
        """What DescribeNetworkInterfaces knows of it: the attachment of `lag` seconds ago."""
        if not lag or not self.history:
            return self.describe()
        past = [what for when, what in self.history if when <= time.monotonic() - lag]
        return past[-1] if past else self.history[0][1]


class Refused(ServiceException):
    """An error answer with an HTTP status that the code alone does not tell."""

    def __init__(self, code: str, message: str, status: int) -> None:
        super().__init__(code, message)
        self.status = status


def refuse(code: str, message: str = "") -> ServiceException:
    return ServiceException(code, message or MESSAGES[code])


def wildcard(pattern: str) -> re.Pattern[str]:
    r"""EC2's filter values: `*` any text, `?` one character, `\` takes the next one literally.

    moto uses fnmatch instead, where `[` is special and `\` is not.
    Source: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/Using_Filtering.html
    """
    parts = re.findall(r"\\.|.|\\$", pattern, re.DOTALL)
    special = {"*": ".*", "?": "."}
    return re.compile(
        "".join(special.get(part) or re.escape(part.removeprefix("\\") or part) for part in parts),
        re.DOTALL,
    )


FILTERS: dict[str, Callable[[dict[str, Any]], list[Any]]] = {  # DescribeNetworkInterfaces'
    "network-interface-id": lambda eni: [eni["NetworkInterfaceId"]],
    "subnet-id": lambda eni: [eni["SubnetId"]],
    "vpc-id": lambda eni: [eni["VpcId"]],
    "availability-zone": lambda eni: [eni["AvailabilityZone"]],
    "description": lambda eni: [eni["Description"]],
    "owner-id": lambda eni: [eni["OwnerId"]],
    "mac-address": lambda eni: [eni["MacAddress"]],
    "status": lambda eni: [eni["Status"]],
    "private-ip-address": lambda eni: [eni.get("PrivateIpAddress")],
    "addresses.private-ip-address": lambda eni: [
        item["PrivateIpAddress"] for item in eni["PrivateIpAddresses"]
    ],
    "ipv6-addresses.ipv6-address": lambda eni: [
        item["Ipv6Address"] for item in eni["Ipv6Addresses"]
    ],
    "tag-key": lambda eni: [tag["Key"] for tag in eni["TagSet"]],
    "attachment.attachment-id": lambda eni: [eni.get("Attachment", {}).get("AttachmentId")],
    "attachment.instance-id": lambda eni: [eni.get("Attachment", {}).get("InstanceId")],
    "attachment.device-index": lambda eni: [eni.get("Attachment", {}).get("DeviceIndex")],
    "attachment.status": lambda eni: [eni.get("Attachment", {}).get("Status")],
}


def filter_values(eni: dict[str, Any], name: str) -> list[str]:
    """What a described ENI offers to the filter `name`."""
    if name.startswith("tag:"):
        key = name.removeprefix("tag:")
        return [tag["Value"] for tag in eni["TagSet"] if tag["Key"] == key]
    return [str(value) for value in FILTERS[name](eni) if value is not None]


def page(items: list[Any], token: str | None, size: int) -> tuple[list[Any], str | None]:
    """The page of `items` that `token` asks for, and the token of the next one."""
    try:
        start = int(base64.urlsafe_b64decode(token)) if token else 0
    except ValueError:
        raise refuse("InvalidParameterValue", "Unable to parse pagination token") from None
    more = start + size < len(items)
    following = base64.urlsafe_b64encode(str(start + size).encode()).decode()
    return items[start : start + size], following if more else None


class Ec2(EC2Response):
    """The EC2 actions that the scripts use; moto's own answer the others."""

    def __init__(self, aws: Aws) -> None:
        super().__init__()
        self.aws = aws

    def describe_network_interfaces(self) -> ActionResult:
        ids = self._get_param("NetworkInterfaceIds", [])
        size = self._get_int_param("MaxResults")
        if ids and size:
            message = "NetworkInterfaceIds cannot be used with MaxResults"  # [ours]
            raise refuse("InvalidParameterCombination", message)
        if size is not None and not 5 <= size <= 1000:
            message = f"Value ( {size} ) for parameter maxResults is invalid. Expecting 5 to 1000."
            raise refuse("InvalidParameterValue", message)
        filters = self._filters_from_querystring()
        for name in filters:
            if name not in FILTERS and not name.startswith("tag:"):
                raise refuse("InvalidParameterValue", f"The filter '{name}' is invalid")
        narrow = bool(ids or size or NARROW_FILTERS & filters.keys())
        if self.aws.large_account and not narrow:
            message = "The account has too many network interfaces: use pagination."  # [ours]
            raise refuse("OperationNotPermitted", message)
        lag = self.aws.next_lags.pop(0) if self.aws.next_lags else self.aws.describe_lag
        enis = [self.aws.lab_eni(eni_id) for eni_id in ids or self.aws.enis]
        shown = [(eni, eni.seen(lag)) for eni in enis]
        for name, patterns in filters.items():
            regexes = [wildcard(pattern) for pattern in patterns]
            shown = [
                (eni, item)
                for eni, item in shown
                if any(r.fullmatch(v) for r in regexes for v in filter_values(item, name))
            ]
        found = [eni.change(item) for eni, item in shown]
        if self.access_key in self.aws.strangers:
            found = []
        if size is None:
            # All in one answer, however many (cilium/cilium pull 37983: 19,000).
            return ActionResult({"NetworkInterfaces": found})
        size = min(size, self.aws.page_size)
        items, token = page(found, self._get_param("NextToken"), size)
        return ActionResult({"NetworkInterfaces": items, "NextToken": token})

    def create_network_interface(self) -> ActionResult:
        result = super().create_network_interface()
        answer: Any = result.result
        eni = answer["NetworkInterface"]
        self.aws.enis[eni.id] = LabEni(eni)
        self.aws.enis[eni.id].append_history()
        return result

    def attach_network_interface(self) -> ActionResult:
        eni = self.aws.lab_eni(self._get_param("NetworkInterfaceId"))
        instance = self.aws.instances.get(self._get_param("InstanceId"))
        if instance is None:
            message = f"The instance ID '{self._get_param('InstanceId')}' does not exist"
            raise refuse("InvalidInstanceID.NotFound", message)
        index = self._get_int_param("DeviceIndex")
        card = self._get_int_param("NetworkCardIndex")
        check_refusals(self.aws, "AttachNetworkInterface", [eni.model.id, instance.id])
        check_attachable(eni, instance)
        check_slot(instance, index, card)
        card = card or 0
        attachment_id = self.aws.attach(eni, instance, index, card)
        return ActionResult({"AttachmentId": attachment_id, "NetworkCardIndex": card})

    def detach_network_interface(self) -> ActionResult:
        attachment_id = self._get_param("AttachmentId")
        eni = find_attachment(self.aws, attachment_id)
        if eni is None:
            message = f"The network interface attachment ID '{attachment_id}' does not exist"
            raise refuse("InvalidAttachmentID.NotFound", message)
        if eni.held_by_its_service:
            # boto/boto3 issue 2218, rebuy-de/aws-nuke issue 1232.
            message = "You are not allowed to manage 'ela-attach' attachments."
            raise refuse("OperationNotPermitted", message)
        if eni.model.device_index == 0:
            # redhat-performance/cloud-governance pull 950.
            primary = "The network interface at device index 0 and networkCard index 0"
            raise refuse("OperationNotPermitted", f"{primary} cannot be detached.")
        holder = eni.model.instance.id
        check_refusals(self.aws, "DetachNetworkInterface", [eni.model.id, holder])
        if holder in self.aws.refuse_detach:
            message = f"Instance '{holder}' is not in a valid state for this operation."  # [ours]
            raise refuse("IncorrectState", message)
        force = self._get_bool_param("Force", False)
        if eni.attachment_status == "detaching" and not force:
            # The code that EC2's list has for a resource in "an incorrect state for the request".
            message = f"Network interface attachment '{attachment_id}' is being detached."  # [ours]
            raise refuse("IncorrectState", message)
        self.aws.detach(eni, force)
        return EmptyResult()


def find_attachment(aws: Aws, attachment_id: str | None) -> LabEni | None:
    """The ENI that an attachment id belongs to."""
    for eni in aws.enis.values():
        own = eni.service_attachment if eni.held_by_its_service else eni.model.attachment_id
        if own == attachment_id:
            return eni
    return None


def check_refusals(aws: Aws, action: str, resources: list[str]) -> None:
    """Refuse what Aws.refuse() says."""
    for refusal in aws.refusals:
        if refusal.strikes(action, resources):
            raise Refused(refusal.code, refusal.message, refusal.status)


def check_attachable(eni: LabEni, instance: Instance) -> None:
    """Refuse what EC2 refuses because of the ENI itself, or of its and the instance's state."""
    model = eni.model
    if model.attachment_id or eni.held_by_its_service or eni.status:
        if eni.owner and not eni.held_by_its_service:
            # AWS's words for what is another's: aws/aws-k8s-tester issue 70, a detach.
            raise Refused(
                "AuthFailure", "You do not have permission to access the specified resource.", 400
            )
        # Also while it is "pending": hashicorp/terraform-provider-aws issue 27513.
        raise refuse("InvalidNetworkInterface.InUse", f"Interface: [{model.id}] in use.")
    if instance.zone != model.subnet.availability_zone:
        message = (
            "You may not attach a network interface to an instance"
            " if they are not in the same availability zone"
        )
        raise refuse("InvalidParameterCombination", message)
    if instance.model.state not in ("running", "stopped"):
        # The words are AttachVolume's.
        raise refuse("IncorrectState", f"Instance '{instance.id}' is not 'running'.")
    if eni.interface_type.startswith("efa") and instance.model.state == "running":
        # EC2 User Guide, "Elastic Fabric Adapter": an EFA is attached at the launch or to a
        # stopped instance. hashicorp/terraform-provider-aws issue 44355.
        message = (
            f"Interface type '{eni.interface_type}' cannot be attached to a running"
            f" instance: '{instance.id}'."  # [ours], as is the code
        )
        raise refuse("OperationNotPermitted", message)


def check_slot(instance: Instance, index: int, card: int | None) -> None:
    """Refuse a device index or a network card that the instance does not have free."""
    if card is not None and card >= instance.cards:
        message = f"Network card index {card} exceeds the limit for {INSTANCE_TYPE}."  # [ours]
        raise refuse("InvalidParameterValue", message)
    slots = [divmod(slot, SLOTS) for slot in instance.model.nics]
    # A request that names no card is for card 0. But EC2 was seen to refuse it where the index
    # is in use on any card: cilium/cilium pull 42512.
    clashes = [slot for slot in slots if slot == (card, index)]
    if card is None:
        clashes = [slot for slot in slots if slot[1] == index]
    if clashes:
        message = (
            f"Instance '{instance.id}' already has an interface attached at device index '{index}'."
        )
        raise refuse("InvalidParameterValue", message)
    # Each card has a limit of its own: API_NetworkCardInfo, MaximumNetworkInterfaces.
    on_card = [slot for slot in slots if slot[0] == (card or 0)]
    if len(on_card) >= instance.max_interfaces:
        message = f"Interface count {len(on_card) + 1} exceeds the limit for {INSTANCE_TYPE}"
        raise refuse("AttachmentLimitExceeded", message)


class AutoScaling(AutoScalingResponse):
    def __init__(self, aws: Aws) -> None:
        super().__init__()
        self.aws = aws

    def create_auto_scaling_group(self) -> ActionResult:
        result = super().create_auto_scaling_group()
        group = self.aws.autoscaling.autoscaling_groups[self._get_param("AutoScalingGroupName")]
        for member in group.instance_states:
            self.aws.adopt(member)
        return result

    def describe_auto_scaling_instances(self) -> ActionResult:
        ids = self._get_param("InstanceIds", [])
        size = self._get_int_param("MaxRecords", 50)
        if len(ids) > 50 or size > 50:
            # Source: API_DescribeAutoScalingInstances, "array members: maximum number of 50 items".
            message = "The number of instance ids that may be passed in is limited to 50"  # [ours]
            raise refuse("ValidationError", message)
        found = self.autoscaling_backend.describe_auto_scaling_instances(instance_ids=ids)
        items = [self.describe_member(member) for member in found]
        if self.access_key in self.aws.strangers:
            items = []
        size = min(size, self.aws.page_size)
        shown, token = page(items, self._get_param("NextToken"), size)
        return ActionResult({"AutoScalingInstances": shown, "NextToken": token})

    def describe_member(self, member: Any) -> dict[str, Any]:
        """As in API_AutoScalingInstanceDetails."""
        item = {
            "InstanceId": member.instance_id,
            "InstanceType": INSTANCE_TYPE,
            "AutoScalingGroupName": member.auto_scaling_group_name,
            "AvailabilityZone": member.availability_zone,
            "LifecycleState": member.lifecycle_state,
            "HealthStatus": "HEALTHY",
            "ProtectedFromScaleIn": False,
        }
        return self.aws.instances[member.instance_id].change(item)


def make_response(aws: Aws, service: str) -> EC2Response | AutoScalingResponse | IamResponse:
    """What answers a request to the service: moto's class, or ours over it."""
    if service == "ec2":
        return Ec2(aws)
    if service == "autoscaling":
        return AutoScaling(aws)
    return IamResponse()


def perform(aws: Aws, connection: Handler, body: bytes, action: str, dry_run: bool) -> Answer:
    """Do what a request asks for, or refuse it."""
    service = connection.headers.get("Host", "").split(".")[0]
    response: Any = make_response(aws, service)
    environ = EnvironBuilder(
        path=connection.path,
        base_url=f"https://{connection.headers.get('Host')}/",
        method=connection.command,
        headers=list(connection.headers.items()),
        data=body,
    ).get_environ()
    try:
        response.setup_class(Request(environ))
        if not token_left(aws, bucket(response, action)):
            raise refuse("RequestLimitExceeded" if service == "ec2" else "Throttling")
        check_clock(aws, response, service, connection)
        authorize(aws, response, service, action, connection, body)
        if dry_run:
            raise refuse("DryRunOperation")
        verb = re.sub(r"(?<!^)(?=[A-Z])", "_", action).lower()
        status, _, text = response.serialized(getattr(response, verb)())
    except OperationNotFoundError:
        message = f"The action {action} is not valid for this web service."
        return error_answer(connection, "InvalidAction", message, 400)
    except Refused as error:
        return error_answer(connection, error.code, error.message, error.status)
    except ServiceException as error:
        status = HTTP_STATUS.get(error.code, 400)
        return error_answer(connection, error.code, error.message, status)
    content = text if isinstance(text, bytes) else text.encode()
    return Answer(int(status), content, "text/xml;charset=UTF-8")


def authorize(
    aws: Aws, response: Any, service: str, action: str, connection: Handler, body: bytes
) -> None:
    """Check signature and policy, and refuse with each service's own words."""
    region = "us-east-1" if service == "iam" else aws.region
    scope = f"/{region}/{service}/aws4_request,"
    if scope not in connection.headers.get("Authorization", ""):
        raise refuse("AuthFailure")
    try:
        iam = IAMRequest(
            account_id=ACCOUNT,
            method=connection.command,
            path=connection.path,
            data=response.data,
            body=body,
            headers=response.headers,
            action=action,
        )
        iam.check_signature()
    except HTTPException as error:
        raise refuse(error.error_type, error.message) from None  # type: ignore[attr-defined]
    session = aws.sts.get_assumed_role_from_access_key(response.access_key)
    if response.access_key.startswith("AKIA"):  # of a user, who has one for good
        iam.check_action_permitted("*")
        return
    if session is None or expired(session):
        code = "RequestExpired" if service == "ec2" else "ExpiredToken"
        raise refuse(code, "The security token included in the request is expired")
    name = f"{service}:{action}"
    concerned = resources(aws, response, action)
    if not concerned:
        why = aws.why_denied(session.arn, name, "*", {})
        if why:
            raise denied(session.arn, service, action, "", why)
    for kind, resource in concerned:
        arn = f"arn:aws:ec2:{aws.region}:{ACCOUNT}:{kind}/{resource}"
        why = aws.why_denied(session.arn, name, arn, tags_of(aws, resource))
        for denial in aws.denials:
            if denial.action in (action, name) and denial.resource == resource:
                why = why or denial.why
        if why:
            raise denied(session.arn, service, action, arn, why)


def denied(user: str, service: str, action: str, resource: str, why: str) -> ServiceException:
    """AWS's refusal of what IAM denies: aws/karpenter-provider-aws issue 7370."""
    name = f"{service}:{action}"
    message = f"User: {user} is not authorized to perform: {name}"
    if resource:
        message += f" on resource: {resource}"
    message += " " + DENIED[why].format(action=name)
    if service != "ec2":
        return refuse("AccessDenied", message)
    message = f"You are not authorized to perform this operation. {message}."
    if not action.startswith("Describe"):
        message += f" Encoded authorization failure message: {secrets.token_urlsafe(300)}"
    return refuse("UnauthorizedOperation", message)


def resources(aws: Aws, response: Any, action: str) -> list[tuple[str, str]]:
    """What an attach or a detach is about, as (resource type, id): both need the permission.

    Service Authorization Reference, "Actions, resources, and condition keys for Amazon EC2".
    EC2 looks at the policy first. So the detach of an attachment that has gone, which is about
    nothing that has a tag, may be denied: hashicorp/terraform-provider-aws pull 46211.
    """
    if action == "AttachNetworkInterface":
        eni_id = response._get_param("NetworkInterfaceId")
        instance_id = response._get_param("InstanceId")
    elif action == "DetachNetworkInterface":
        eni = find_attachment(aws, response._get_param("AttachmentId"))
        eni_id = eni.model.id if eni else "*"
        instance_id = eni.model.instance.id if eni and eni.model.instance else "*"
    else:
        return []
    return [("network-interface", eni_id), ("instance", instance_id)]


def tags_of(aws: Aws, resource: str) -> dict[str, str]:
    """The tags of an ENI or an instance; none of what does not exist."""
    return dict(aws.ec2.tags.get(resource, {}))


def check_clock(aws: Aws, response: Any, service: str, connection: Handler) -> None:
    """Refuse a request whose time stamp is too far off, in the service's own way.

    All clocks are this machine's. So a request of an instance whose clock is an hour behind comes
    to an AWS whose clock is an hour ahead.
    """
    session = aws.sts.get_assumed_role_from_access_key(response.access_key)
    if session is None:
        return
    instance = aws.instances[session.session_name]
    now = utcnow() - timedelta(seconds=instance.clock_offset)
    sent = datetime.strptime(connection.headers.get("X-Amz-Date", ""), "%Y%m%dT%H%M%SZ")
    behind = (now - sent).total_seconds()
    if abs(behind) <= SKEW_LIMIT:
        return
    code = instance.skew_codes.get(service) or SKEW_CODES[service][behind < 0]
    if "Signature" not in code:
        raise refuse(code)
    limit = now + timedelta(seconds=SKEW_LIMIT if behind < 0 else -SKEW_LIMIT)
    stamps = [f"{when:%Y%m%dT%H%M%SZ}" for when in (sent, limit, now)]
    words = "Signature expired: {} is now earlier than {} ({} - 15 min.)"
    if behind < 0:
        words = "Signature not yet current: {} is still later than {} ({} + 15 min.)"
    raise refuse(code, words.format(*stamps))


def bucket(response: Any, action: str) -> str:
    """The name of the bucket that a request takes its token from."""
    if action != "DescribeNetworkInterfaces":
        return action
    narrowed = response._filters_from_querystring() or response._get_int_param("MaxResults")
    return action if narrowed or response._get_param("NetworkInterfaceIds") else UNFILTERED


def token_left(aws: Aws, action: str) -> bool:
    """Take a token from the action's bucket, if it is throttled."""
    if action not in aws.throttle:
        return True
    size, refill = aws.throttle[action]
    now = time.monotonic()
    tokens, when = aws.buckets.get(action, (float(size), now))
    tokens = min(float(size), tokens + (now - when) * refill)
    aws.buckets[action] = (tokens - 1 if tokens >= 1 else tokens, now)
    return tokens >= 1


def error_answer(connection: Handler, code: str, message: str, status: int) -> Answer:
    error = f"<Code>{escape(code)}</Code><Message>{escape(message)}</Message>"
    request = secrets.token_hex(16)
    if connection.headers.get("Host", "").startswith("ec2."):
        text = (
            f"<Response><Errors><Error>{error}</Error></Errors>"
            f"<RequestID>{request}</RequestID></Response>"
        )
    else:
        text = (
            '<ErrorResponse xmlns="http://autoscaling.amazonaws.com/doc/2011-01-01/"><Error>'
            f"<Type>Sender</Type>{error}</Error><RequestId>{request}</RequestId></ErrorResponse>"
        )
    xml = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'
    return Answer(status, xml.encode(), "text/xml;charset=UTF-8")
