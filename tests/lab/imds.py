"""The instance metadata service: what it says to which instance, and its tokens.

Source: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-instance-metadata.html
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from moto.core.utils import utcnow

from lab.wire import Answer

if TYPE_CHECKING:
    from lab.aws import Aws, Instance

ACCOUNT = "123456789012"  # moto's default
INSTANCE_TYPE = "t3.medium"
ROLE = "eni-host"
# EC2 counts device indexes on each network card. moto knows one card only: it is told
# card * SLOTS + index, which on card 0 is the index.
SLOTS = 100
# Of the dated versions, those that cloud-init asks for. All give the newest tree here.
VERSIONS = ("2009-04-04", "2016-09-02", "2018-09-24", "2021-03-23", "latest")


def metadata(aws: Aws, instance: Instance, method: str, path: str, headers: Any) -> Answer:
    """Answer to `method` on `path`, which begins with a version, as `instance` asked it."""
    version, _, rest = path.partition("/")
    if version in VERSIONS:
        path = f"latest/{rest}"
    if path == "latest/api/token":
        v1_only = instance.tokens == "v1 only"
        return imds_error(404) if v1_only else new_token(aws, instance, method, headers)
    if method not in ("GET", "HEAD"):
        return imds_error(405)
    token = headers.get("X-aws-ec2-metadata-token")
    if instance.tokens == "required" or (instance.tokens == "optional" and token is not None):
        owner, until = aws.imds_tokens.get(token or "", ("", 0.0))
        if owner != instance.id or until < time.monotonic():
            return imds_error(401)
    said = dict(tree(aws, instance))
    if path in said:
        return Answer(200, said[path].encode())
    folder = path.rstrip("/") + "/"
    below = [name.removeprefix(folder) for name in said if name.startswith(folder)]
    names = {first + slash: None for first, slash, _ in (name.partition("/") for name in below)}
    return Answer(200, "\n".join(names).encode()) if names else imds_error(404)


def new_token(aws: Aws, instance: Instance, method: str, headers: Any) -> Answer:
    if method != "PUT":
        return imds_error(405)
    if "X-Forwarded-For" in headers:
        return imds_error(403)
    ttl = headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
    if not (re.fullmatch("[0-9]{1,5}", ttl) and 1 <= int(ttl) <= 21600):
        return imds_error(400)
    token = secrets.token_urlsafe(42)
    aws.imds_tokens[token] = (instance.id, time.monotonic() + int(ttl))
    said = {"X-aws-ec2-metadata-token-ttl-seconds": ttl}
    return Answer(200, token.encode(), headers=said)


def tree(aws: Aws, instance: Instance) -> Iterator[tuple[str, str]]:
    data = "latest/meta-data/"
    host_name = f"ip-{instance.ip.replace('.', '-')}.{aws.region}.compute.internal"
    yield data + "ami-id", instance.model.image_id
    yield data + "hostname", host_name
    yield data + "instance-id", instance.id
    yield data + "instance-type", INSTANCE_TYPE
    yield data + "local-hostname", host_name
    yield data + "local-ipv4", instance.ip
    yield data + "mac", instance.mac
    yield data + "placement/availability-zone", instance.zone
    yield data + "placement/region", aws.region
    for nic in instance.model.nics.values():
        # A new ENI is listed late, and as device 0 until IMDS knows better.
        since = aws.enis[nic.id].plugged
        age = time.monotonic() - since if since is not None else -1.0
        if age < aws.imds_lag / 2:
            continue
        card, index = divmod(nic.device_index, SLOTS)
        mac = f"{data}network/interfaces/macs/{nic.mac_address}/"
        yield mac + "device-number", str(index if age >= aws.imds_lag else 0)
        if instance.cards > 1:
            yield mac + "network-card", str(card)
        yield mac + "interface-id", nic.id
        yield mac + "mac", nic.mac_address
        yield mac + "subnet-ipv4-cidr-block", nic.subnet.cidr_block
        ipv4 = [item["PrivateIpAddress"] for item in nic.private_ip_addresses]
        if ipv4:
            yield mac + "local-ipv4s", "\n".join(ipv4)
        if nic.ipv6_addresses:
            yield mac + "ipv6s", "\n".join(nic.ipv6_addresses)
    if instance.role:
        yield f"{data}iam/security-credentials/{ROLE}", credentials(aws, instance)
        yield f"{data}iam/info", role_info(instance)
    if instance.tags_in_imds:
        for tag in instance.model.get_tags():
            yield f"{data}tags/instance/{tag['key']}", tag["value"]
    if instance.group is not None and instance.target_in_imds:
        state = target(instance.life_cycle, instance.warm_pool)
        yield data + "autoscaling/target-lifecycle-state", state
    document = {
        "accountId": ACCOUNT,
        "architecture": "x86_64",
        "availabilityZone": instance.zone,
        "instanceId": instance.id,
        "instanceType": INSTANCE_TYPE,
        "privateIp": instance.ip,
        "region": aws.region,
        "version": "2017-09-30",
    }
    yield "latest/dynamic/instance-identity/document", json.dumps(document, indent=2)
    if instance.user_data:
        yield "latest/user-data", instance.user_data


def credentials(aws: Aws, instance: Instance) -> str:
    """The document at the role's path, with or without credentials."""
    if instance.role_error:
        said = {
            "Code": instance.role_error,
            "Message": role_error_message(),
            "LastUpdated": stamp(utcnow() - timedelta(seconds=instance.clock_offset)),
        }
        return json.dumps(said, indent=2)
    session = instance.credentials
    if expired(session):
        arn = aws.iam.get_role(ROLE).arn
        seconds = aws.credential_seconds
        session = aws.sts.assume_role(aws.region, instance.id, arn, "", seconds, "")
        instance.credentials = session
    end = session.expiration - timedelta(seconds=instance.clock_offset)
    said = {
        "Code": "Success",
        "LastUpdated": stamp(end - timedelta(seconds=aws.credential_seconds)),
        "Type": "AWS-HMAC",
        "AccessKeyId": session.access_key_id,
        "SecretAccessKey": session.secret_access_key,
        "Token": session.session_token,
        "Expiration": stamp(end),
    }
    return json.dumps(said, indent=2)


def role_info(instance: Instance) -> str:
    """iam/info: the instance profile, and whether its role can be assumed."""
    said = {
        "Code": instance.role_error or "Success",
        "LastUpdated": stamp(utcnow() - timedelta(seconds=instance.clock_offset)),
        "InstanceProfileArn": f"arn:aws:iam::{ACCOUNT}:instance-profile/{ROLE}",
        "InstanceProfileId": "AIPA0123456789ABCDEFG",
    }
    if instance.role_error:
        said["Message"] = role_error_message()
    return json.dumps(said, indent=2)


def role_error_message() -> str:
    guide = "https://docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot_iam-ec2.html"
    return f"EC2 cannot assume the role {ROLE}. Please see documentation at {guide}."


def stamp(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def target(life_cycle: str, warm_pool: str = "Stopped") -> str:
    """IMDS's autoscaling/target-lifecycle-state, for an instance whose state is `life_cycle`.

    It is one of the steady states, on the way to which the instance is: Detached, InService,
    Standby, Terminated, Warmed:Hibernated, Warmed:Running, Warmed:Stopped, Warmed:Terminated.
    Source: https://docs.aws.amazon.com/autoscaling/ec2/userguide/retrieving-target-lifecycle-state-through-imds.html
    """
    warmed, state, _ = re.fullmatch("(Warmed:)?(.*?)(:.*)?", life_cycle).groups()  # type: ignore[union-attr]
    steady = {
        "Pending": f"Warmed:{warm_pool}" if warmed else "InService",
        "Terminating": f"{warmed or ''}Terminated",
        "EnteringStandby": "Standby",
        "Detaching": "Detached",
        # The guide does not name these; the instance comes back into service.
        "ReplacingRootVolume": "InService",
        "RootVolumeReplaced": "InService",
    }
    return steady.get(state, life_cycle)


def expired(session: Any) -> bool:
    return session is None or session.expiration < utcnow()


def imds_error(status: int) -> Answer:
    return Answer(status, f"<html><body>{status}</body></html>".encode(), "text/html")
