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
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from botocore.model import OperationNotFoundError
from moto.autoscaling.responses import AutoScalingResponse
from moto.core.exceptions import ServiceException
from moto.core.request import Request
from moto.core.responses import ActionResult, EmptyResult
from moto.ec2.responses import EC2Response
from moto.iam.access_control import IAMRequest
from werkzeug.exceptions import HTTPException
from werkzeug.test import EnvironBuilder

from lab.imds import ACCOUNT, INSTANCE_TYPE, expired
from lab.wire import Answer, Handler

if TYPE_CHECKING:
    from lab.aws import Aws

# action: (bucket size, refill per second) of one account in one region. Attach and Detach are
# "mutating actions"; Describe has the large bucket for naming a filter, else it is (50, 10). Auto
# Scaling publishes no numbers. https://docs.aws.amazon.com/ec2/latest/devguide/ec2-api-throttling.html
EC2_THROTTLE = {
    "DescribeNetworkInterfaces": (100, 20.0),
    "AttachNetworkInterface": (50, 5.0),
    "DetachNetworkInterface": (50, 5.0),
}
HTTP_STATUS = {  # of an error; every other code is a 400
    "DryRunOperation": 412,
    "UnauthorizedOperation": 403,
    "AccessDenied": 403,
    "AuthFailure": 401,
    "SignatureDoesNotMatch": 403,
    "InvalidClientTokenId": 403,
    "ExpiredToken": 403,
    "RequestLimitExceeded": 503,
}
MESSAGES = {
    "RequestLimitExceeded": "Request limit exceeded.",
    "Throttling": "Rate exceeded",
    "AuthFailure": "AWS was not able to validate the provided access credentials",
    "DryRunOperation": "Request would have succeeded, but DryRun flag is set.",
}


@dataclass
class Port:
    """An ENI: moto's model and what that has no room for."""

    model: Any
    status: str = ""  # of the attachment: attaching, attached, detaching
    plugged: float | None = None  # since when the device is there
    history: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    @property
    def addresses(self) -> list[str]:
        ipv4 = [item["PrivateIpAddress"] for item in self.model.private_ip_addresses]
        return [*ipv4, *self.model.ipv6_addresses]

    def describe(self) -> dict[str, Any]:
        eni = self.model
        result: dict[str, Any] = {
            "NetworkInterfaceId": eni.id,
            "SubnetId": eni.subnet.id,
            "VpcId": eni.subnet.vpc_id,
            "AvailabilityZone": eni.subnet.availability_zone,
            "Description": eni.description,
            "OwnerId": ACCOUNT,
            "RequesterManaged": False,
            "SourceDestCheck": True,
            "InterfaceType": "interface",
            "MacAddress": eni.mac_address,
            "Groups": [],
            "TagSet": [{"Key": tag["key"], "Value": tag["value"]} for tag in eni.get_tags()],
            "PrivateIpAddresses": [
                {"PrivateIpAddress": item["PrivateIpAddress"], "Primary": item["Primary"]}
                for item in eni.private_ip_addresses
            ],
            "Ipv6Addresses": [{"Ipv6Address": address} for address in eni.ipv6_addresses],
            "Status": "in-use" if eni.attachment_id else "available",
        }
        if eni.private_ip_address:
            result["PrivateIpAddress"] = eni.private_ip_address
        if eni.attachment_id:
            result["Attachment"] = {
                "AttachmentId": eni.attachment_id,
                "InstanceId": eni.instance.id,
                "InstanceOwnerId": ACCOUNT,
                "DeviceIndex": eni.device_index,
                "NetworkCardIndex": 0,
                "AttachTime": eni.attach_time,
                "DeleteOnTermination": eni.delete_on_termination,
                "Status": self.status,
            }
        return result

    def note(self) -> None:
        self.history.append((time.monotonic(), self.describe()))

    def seen(self, lag: float) -> dict[str, Any]:
        """What DescribeNetworkInterfaces knows of it: the attachment of `lag` seconds ago."""
        if not lag or not self.history:
            return self.describe()
        past = [what for when, what in self.history if when <= time.monotonic() - lag]
        return past[-1] if past else self.history[0][1]


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
        lag = self.aws.describe_lag
        found = [self.aws.port(eni_id).seen(lag) for eni_id in ids or self.aws.ports]
        filters = self._filters_from_querystring()
        for name in filters:
            if name not in FILTERS and not name.startswith("tag:"):
                raise refuse("InvalidParameterValue", f"The filter '{name}' is invalid")
        for name, patterns in filters.items():
            regexes = [wildcard(pattern) for pattern in patterns]
            found = [
                eni
                for eni in found
                if any(r.fullmatch(v) for r in regexes for v in filter_values(eni, name))
            ]
        size = min(size or 1000, self.aws.page_size)
        shown, token = page(found, self._get_param("NextToken"), size)
        return ActionResult({"NetworkInterfaces": shown, "NextToken": token})

    def attach_network_interface(self) -> ActionResult:
        port = self.aws.port(self._get_param("NetworkInterfaceId"))
        instance = self.aws.instances.get(self._get_param("InstanceId"))
        if instance is None:
            message = f"The instance ID '{self._get_param('InstanceId')}' does not exist"
            raise refuse("InvalidInstanceID.NotFound", message)
        index, card = self._get_int_param("DeviceIndex"), self._get_int_param("NetworkCardIndex", 0)
        eni, nics = port.model, instance.model.nics
        if eni.attachment_id:
            raise refuse("InvalidNetworkInterface.InUse", f"Interface: [{eni.id}] in use.")
        if instance.zone != eni.subnet.availability_zone:
            message = (
                "You may not attach a network interface to an instance"
                " if they are not in the same availability zone"
            )
            raise refuse("InvalidParameterCombination", message)
        if instance.model.state not in ("running", "stopped"):
            # The words are AttachVolume's.
            raise refuse("IncorrectState", f"Instance '{instance.id}' is not 'running'.")
        if card != 0:
            message = f"Network card index {card} exceeds the limit for {INSTANCE_TYPE}."  # [ours]
            raise refuse("InvalidParameterValue", message)
        if index in nics:
            message = (
                f"Instance '{instance.id}' already has an interface attached"
                f" at device index '{index}'."
            )
            raise refuse("InvalidParameterValue", message)
        if len(nics) >= instance.max_interfaces:
            message = f"Interface count {len(nics) + 1} exceeds the limit for {INSTANCE_TYPE}"
            raise refuse("AttachmentLimitExceeded", message)
        attachment_id = self.aws.attach(port, instance, index)
        return ActionResult({"AttachmentId": attachment_id, "NetworkCardIndex": 0})

    def detach_network_interface(self) -> ActionResult:
        attachment_id = self._get_param("AttachmentId")
        ports = self.aws.ports.values()
        port = next((port for port in ports if port.model.attachment_id == attachment_id), None)
        if port is None:
            message = f"The network interface attachment ID '{attachment_id}' does not exist"
            raise refuse("InvalidAttachmentID.NotFound", message)
        if port.model.device_index == 0:
            primary = "The network interface at device index 0 and networkCard index 0"
            raise refuse("OperationNotPermitted", f"{primary} cannot be detached.")
        holder = port.model.instance.id
        if holder in self.aws.refuse_detach:
            message = f"Instance '{holder}' is not in a valid state for this operation."  # [ours]
            raise refuse("IncorrectState", message)
        force = self._get_bool_param("Force", False)
        if port.status == "detaching" and not force:
            # The code that EC2's list has for a resource in "an incorrect state for the request".
            message = f"Network interface attachment '{attachment_id}' is being detached."  # [ours]
            raise refuse("IncorrectState", message)
        self.aws.detach(port, force)
        return EmptyResult()


class AutoScaling(AutoScalingResponse):
    def __init__(self, aws: Aws) -> None:
        super().__init__()
        self.aws = aws

    def describe_auto_scaling_instances(self) -> ActionResult:
        ids = self._get_param("InstanceIds", [])
        size = self._get_int_param("MaxRecords", 50)
        if len(ids) > 50 or size > 50:
            # Source: API_DescribeAutoScalingInstances, "array members: maximum number of 50 items".
            message = "The number of instance ids that may be passed in is limited to 50"  # [ours]
            raise refuse("ValidationError", message)
        found = self.autoscaling_backend.describe_auto_scaling_instances(instance_ids=ids)
        size = min(size, self.aws.page_size)
        shown, token = page(found, self._get_param("NextToken"), size)
        return ActionResult({"AutoScalingInstances": shown, "NextToken": token})


def perform(aws: Aws, connection: Handler, body: bytes, action: str, dry_run: bool) -> Answer:
    """Do what a request asks for, or refuse it."""
    service = connection.headers.get("Host", "").split(".")[0]
    response: Any = (Ec2 if service == "ec2" else AutoScaling)(aws)
    environ = EnvironBuilder(
        path=connection.path,
        base_url=f"https://{connection.headers.get('Host')}/",
        method=connection.command,
        headers=list(connection.headers.items()),
        data=body,
    ).get_environ()
    try:
        if not token_left(aws, action):
            raise refuse("RequestLimitExceeded" if service == "ec2" else "Throttling")
        response.setup_class(Request(environ))
        authorize(aws, response, service, action, connection, body)
        if dry_run:
            raise refuse("DryRunOperation")
        verb = re.sub(r"(?<!^)(?=[A-Z])", "_", action).lower()
        status, _, text = response.serialized(getattr(response, verb)())
    except OperationNotFoundError:
        message = f"The action {action} is not valid for this web service."
        return error_answer(connection, "InvalidAction", message, 400)
    except ServiceException as error:
        status = HTTP_STATUS.get(error.code, 400)
        return error_answer(connection, error.code, error.message, status)
    content = text if isinstance(text, bytes) else text.encode()
    return Answer(int(status), content, "text/xml;charset=UTF-8")


def authorize(
    aws: Aws, response: Any, service: str, action: str, connection: Handler, body: bytes
) -> None:
    """moto's check of signature and policy, with each service's own words."""
    scope = f"/{aws.region}/{service}/aws4_request,"
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
    if session is None or expired(session):
        code = "RequestExpired" if service == "ec2" else "ExpiredToken"
        raise refuse(code, "The security token included in the request is expired")
    try:
        iam.check_action_permitted("*")
    except HTTPException:
        name = f"{service}:{action}"
        message = (
            f"User: {session.arn} is not authorized to perform: {name}"
            f" because no identity-based policy allows the {name} action"
        )
        if service != "ec2":
            raise refuse("AccessDenied", message) from None
        message = f"You are not authorized to perform this operation. {message}."
        if not action.startswith("Describe"):
            message += f" Encoded authorization failure message: {secrets.token_urlsafe(300)}"
        raise refuse("UnauthorizedOperation", message) from None


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
