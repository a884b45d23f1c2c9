#!/usr/bin/python3
"""Give this EC2 instance the network interface (ENI) that is named after its Auto Scaling group.

    eni_ctl.py -a    attach it: at boot, from eni.service, or by hand; safe to run again
    eni_ctl.py -d    detach the one that this instance holds
    eni_ctl.py -s    say what is so, change nothing

The way: instance id (IMDS) -> the group's name -> the ENI with that Name tag -> attach -> wait
for its device and address -> write the state file. A free ENI in this zone is attached. One that
a terminating instance still holds is detached there first. One that an instance in service holds
is never taken, unless forced: this program waits for it until its deadline.

Files: /etc/default/eni    what is attached, as KEY=value lines for sh, bash and systemd
       /run/eni_ctl.lock   one run at a time; in it, the ENI that was claimed last
Exit:  0  done and verified
       1  failed for now; trying again can help
       2  usage
       3  --status only: no ENI is attached here
       4  a person must act: no group, no such ENI, another zone, permission missing, no free slot
IAM:   autoscaling:DescribeAutoScalingInstances, ec2:DescribeNetworkInterfaces,
       ec2:AttachNetworkInterface, ec2:DetachNetworkInterface
"""

# /// script
# requires-python = ">=3.9"
# dependencies = ["boto3", "requests"]
# ///

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Callable, NamedTuple, NoReturn, TypeVar

__version__ = "1.0.0"

STATE_FILE = "/etc/default/eni"
LOCK_FILE = "/run/eni_ctl.lock"
# All in seconds.
TIMEOUT = 300.0  # the whole run; systemd/eni.service allows a little more
OVERRUN = 1.0  # past the deadline, a call that does not return (DNS, say) is cut off
GRACE = 10.0  # IAM, Auto Scaling and tags lag behind a fresh launch
POLL_EC2 = 1.0  # a released ENI is noticed within 1.5
POLL_HERE = 0.1  # the kernel, IMDS and the lock: asking costs next to nothing
POLL_STATES = 5.0  # the holders' life-cycle states
FORCE_AFTER = 30.0  # a detach from a holder that is going away is forced
BACK_OFF = 15.0  # what is throttled or out of reach is asked so many times less often at most
FIRST_WORD = 2.0  # a wait is reported; again each time it has doubled

INDEXES = range(1, 16)  # 0 is the primary ENI; no instance type takes more than 15 a card
REGION = r"[a-z]{2,9}(-[a-z0-9]{1,20}){2,6}"  # and what a zone's name looks like
V6_ROUTER = "fe80:ec2::1"  # each VPC router has it (VPC user guide, "Configure route tables")

T = TypeVar("T")
verbose = False


class Failure(Exception):
    """What went wrong, as the one line that the user reads. Final, unless of a class below."""

    code = 1


class NotYet(Failure):
    """Waiting can help."""


class Throttled(NotYet):
    """AWS or IMDS is overloaded or out of reach: wait, and longer each time."""


class InUse(NotYet):
    """The ENI was free when we looked, and is not any more."""


class IndexTaken(NotYet):
    """Another ENI is attached at that device index."""


class AlreadyGone(NotYet):
    """There is no such attachment any more."""


class NeedsPerson(Failure):
    """Waiting does not help, once GRACE is over."""

    code = 4


class Denied(NeedsPerson):
    """The instance's IAM policy lacks an action."""


class Rehearsed(Exception):
    """--dry-run has come to the first step that would change something: its result."""


# What the error codes of AWS mean here; failure() adds what the code alone does not decide.
ERRORS: dict[str, type[Failure]] = {
    "UnauthorizedOperation": Denied,
    "AccessDenied": Denied,
    "AccessDeniedException": Denied,
    "InvalidNetworkInterface.InUse": InUse,
    "InvalidAttachmentID.NotFound": AlreadyGone,
    "RequestLimitExceeded": Throttled,
    "RequestThrottled": Throttled,
    "Throttling": Throttled,
    "ThrottlingException": Throttled,
    "IncorrectState": NotYet,  # of an ENI or instance that is between two states
    "IncorrectInstanceState": NotYet,
    "InvalidInstanceID.NotFound": NotYet,  # just after the launch
    "InvalidNetworkInterfaceID.NotFound": NotYet,  # deleted since we looked
    "AuthFailure": NotYet,  # new credentials are not known everywhere at once
    "InvalidClientTokenId": NotYet,
    "ExpiredToken": NotYet,
    "RequestExpired": NotYet,  # the clock is not set yet
}
HINTS = {
    "InvalidParameterCombination": "is the ENI in another zone? ",
    "AttachmentLimitExceeded": "no free slot for an ENI on this instance: ",
}


class Here(NamedTuple):
    """This instance, as IMDS and its group tell."""

    instance: str
    zone: str
    region: str
    name: str  # the Name tag to look for: the group's name, or what -n says
    state: str  # life-cycle state in the group; empty where there is none


class Eni(NamedTuple):
    """A network interface as DescribeNetworkInterfaces shows it."""

    id: str
    mac: str
    zone: str
    ip: str
    fqdn: str = ""
    status: str = "available"
    holder: str = ""  # an instance, or the AWS service that owns it; empty when free
    attachment: str = ""
    attachment_status: str = ""  # attaching, attached, detaching
    device_index: int = -1
    since: str = ""

    @classmethod
    def from_api(cls, item: Mapping[str, Any]) -> Eni:
        """Raises KeyError and the like where the answer is not what EC2 documents."""
        held = item.get("Attachment") or {}
        tags = {tag["Key"]: tag["Value"] for tag in item.get("TagSet", [])}
        return cls(
            id=item["NetworkInterfaceId"],
            mac=item["MacAddress"].lower(),
            zone=item["AvailabilityZone"],
            ip=item.get("PrivateIpAddress") or item["Ipv6Addresses"][0]["Ipv6Address"],
            fqdn=tags.get("FQDN", ""),
            status=item["Status"],
            holder=held.get("InstanceId") or held.get("InstanceOwnerId") or "",
            attachment=held.get("AttachmentId", ""),
            attachment_status=held.get("Status", ""),
            device_index=held.get("DeviceIndex", -1),
            since=str(held.get("AttachTime", "")),
        )


class Network(NamedTuple):
    """The ENI's device and the prefix of the address on it, as the kernel shows them."""

    device: str
    prefix: int
    gateway: str


class Step(NamedTuple):
    """What to do next: keep, attach (the first that can be had), release or wait."""

    do: str
    enis: tuple[Eni, ...] = ()
    why: str = ""


# --- deciding: from what was found, what to do; nothing here acts ---


def decide(
    here: Here, enis: Sequence[Eni], states: Mapping[str, str], force: bool, claimed: str
) -> Step:
    """The next step of --attach. Raises Failure or NeedsPerson where there is none.

    enis: all of the name. states: the life-cycle states known so far, by instance. claimed: the
    ENI that was last claimed from here, which may be ours though EC2 does not show it yet.
    """
    named = f"no network interface named {show(here.name)}"
    movable = [eni for eni in enis if eni.device_index != 0]
    mine = attached_to(here.instance, enis)
    staying = tuple(eni for eni in mine if eni.attachment_status != "detaching")
    if staying:
        return Step("keep", staying)
    if mine:
        return Step("wait", why=f"{mine[0].id} is being detached from this instance")
    if is_ending(here.state):
        raise Failure(f"this instance is {here.state}: it claims nothing")
    if here.state.startswith("Warmed:"):
        return Step("wait", why=f"this instance is {here.state}: it claims nothing yet")
    if not movable:
        primary = f"; {enis[0].id} is the primary one of {enis[0].holder}" if enis else ""
        raise NeedsPerson(f"{named} in {here.region}{primary}")
    local = [eni for eni in movable if eni.zone == here.zone]
    if not local:
        elsewhere = ", ".join(f"{eni.id} is in {eni.zone}" for eni in movable[:3])
        raise NeedsPerson(f"{named} in {here.zone}; {elsewhere}")
    local.sort(key=lambda eni: (eni.id != claimed, own_order(here.instance, eni.id)))
    free = tuple(eni for eni in local if not eni.holder)
    if free:
        return Step("attach", free)
    why = [f"{e.id} is held by {e.holder} ({states.get(e.holder, '?')}) {e.since}" for e in local]
    for eni, reason in zip(local, why):
        if force or is_ending(states.get(eni.holder, "")):
            return Step("release", (eni,), reason)
    return Step("wait", why="; ".join(why[:3]))


def attached_to(instance: str, enis: Iterable[Eni]) -> list[Eni]:
    """Those that the instance holds, in the order of their device indexes, but its primary one:
    that cannot be moved, though a launch template may have given it the group's name."""
    mine = [eni for eni in enis if eni.holder == instance and eni.device_index != 0]
    return sorted(mine, key=lambda eni: eni.device_index)


def is_ending(state: str) -> bool:
    """Whether an instance in that life-cycle state has left service for good."""
    return state.split("Warmed:")[-1].startswith(("Terminating", "Terminated"))


def own_order(instance: str, eni: str) -> str:
    """Sort key: hosts that share a pool try its ENIs in different orders, and rarely collide."""
    import hashlib

    return hashlib.sha256(f"{instance} {eni}".encode()).hexdigest()


def failure(action: str, code: str, status: int, message: str) -> Failure:
    """The Failure for an error answer of AWS."""
    kind = ERRORS.get(code)
    if code == "InvalidParameterValue":  # says it all; only the message tells what
        kind = InUse if "in use" in message else IndexTaken if "device index" in message else None
    elif kind is None and (status >= 500 or status == 429 or code.isdigit()):
        kind = Throttled  # botocore makes a code of the status where the body is not AWS's
    if kind is Denied:
        service = "autoscaling" if "AutoScaling" in action else "ec2"
        return Denied(f"not allowed: the instance's IAM policy lacks {service}:{action}")
    return (kind or NeedsPerson)(f"{HINTS.get(code, '')}{action}: {code}: {one_line(message)}")


def escape_filter(value: str) -> str:
    """The value as EC2's filters take it literally: * and ? are wildcards, \\ escapes."""
    return re.sub(r"([*?\\])", r"\\\1", value)


def quote(value: str) -> str:
    """The value as sh, bash and systemd's EnvironmentFile all read it back, and never run it.

    Control characters but tab and newline are left out, and Unicode's noncharacters: systemd
    drops a variable with the former, and the whole file for one of the latter.
    """
    value = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufdd0-\ufdef]", "", value)
    value = "".join(c for c in value if ord(c) & 0xFFFE != 0xFFFE)
    if re.fullmatch(r"[A-Za-z0-9_.:/@%+,-]*", value):
        return value
    return '"' + re.sub(r'([\\"$`])', r"\\\1", value) + '"'


def show(value: str) -> str:
    """Foreign text for a message: in quotes, one line, plain ASCII."""
    return json.dumps(value[:300])


def one_line(message: object) -> str:
    return show(" ".join(str(message).split()))[1:-1]


# --- the four doors: time, other programs, IMDS, AWS ---


class Deadline:
    """The point in time that no wait of this run outlives."""

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.seconds, self.clock, self.sleep = seconds, clock, sleep
        self.start = clock()
        self.doing = "starting"

    def past(self) -> float:
        return self.clock() - self.start

    def left(self) -> float:
        return max(0.0, self.seconds - self.past())

    def guard(self) -> None:
        """From a thread of its own, end the process if it is still there past the deadline."""

        def give_up() -> None:
            say(f"{self.doing}; gave up after {self.seconds:g} s")
            os._exit(Failure.code)

        watchdog = threading.Timer(self.left() + OVERRUN, give_up)
        watchdog.daemon = True
        watchdog.start()


def wait(attempt: Callable[[], T], deadline: Deadline, pause: float) -> T:
    """What attempt returns, tried again every pause seconds while it raises NotYet.

    Raises the last Failure: any other at once, NeedsPerson after GRACE, NotYet at the deadline.
    """
    import random

    slow, next_word = pause, FIRST_WORD
    refused: float | None = None  # since when
    while True:
        try:
            return attempt()
        except NeedsPerson as error:
            refused = deadline.past() if refused is None else refused
            if deadline.past() + pause > min(refused + GRACE, deadline.seconds):
                raise
            nap, reason = pause, str(error)
        except NotYet as error:
            refused, reason = None, str(error)
            # All hosts of an account share its rates: who is throttled slows down at once, and
            # comes back bit by bit. With jitter, or they would all come back together.
            throttled = isinstance(error, Throttled)
            slow = min(slow * 2, pause * BACK_OFF) if throttled else max(slow * 0.9, pause)
            nap = random.uniform(max(slow / 2, pause), slow)
        deadline.doing = reason
        if deadline.left() <= nap:
            deadline.sleep(deadline.left())
            raise Failure(f"{reason}; gave up after {deadline.seconds:g} s")
        if deadline.past() >= next_word:
            say(f"waiting, {deadline.past():.0f} s of {deadline.seconds:g} s: {reason}")
            next_word = deadline.past() * 2
        deadline.sleep(nap)


def run_ip(*arguments: str) -> Any:
    """What `ip -json ARGUMENTS` says. Raises NotYet with the kernel's words."""
    command = ["ip", "-json", *arguments]
    trace(" ".join(command))
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=5
        )
        if done.returncode == 0:
            return json.loads(done.stdout or "[]")
        words = done.stderr
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        words = str(error)
    raise NotYet(f"{' '.join(command)}: {one_line(words)}")


class Imds:
    """The instance metadata service: version 2, or 1 where there is no token path."""

    def __init__(self, deadline: Deadline) -> None:
        import requests

        self.base = imds_endpoint() + "/latest/"
        self.deadline = deadline
        self.session = requests.Session()
        self.session.trust_env = False  # a proxy would tell of its own instance
        self.error = requests.RequestException
        self.token: str | None = None

    def ask(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str]:
        url = self.base + path
        limit = min(2.0, self.deadline.left() + 0.1)
        try:
            answer = self.session.request(
                method, url, headers=dict(headers), timeout=limit, allow_redirects=False
            )
            # requests does not mind a body that was cut off, nor does urllib3 before version 2.
            whole = answer.raw.tell() >= int(answer.headers.get("Content-Length", 0))
        except (self.error, ValueError) as error:
            raise Throttled(f"IMDS, {method} {url}: {type(error).__name__}") from None
        trace(f"IMDS, {method} {url}: {answer.status_code}")
        html = answer.status_code == 200 and "html" in answer.headers.get("Content-Type", "")
        if html or not whole:
            raise Throttled(f"IMDS, {method} {url}: {'HTML' if html else 'cut off'}")
        return answer.status_code, answer.content.decode("utf-8", "replace")

    def fetch_token(self) -> str:
        """A token for five minutes, empty where IMDS knows none. Raises as get does."""
        ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "300"}
        status, text = self.ask("PUT", "api/token", ttl)
        if status == 403:
            raise NeedsPerson(f"IMDS at {self.base} is switched off (403)")
        if status in (404, 405):
            return ""
        if status != 200 or not re.fullmatch(r"[!-~]+", text):
            raise Throttled(f"IMDS at {self.base}api/token answered {status} {show(text[:40])}")
        return text

    def get(self, path: str, pattern: str) -> str:
        """The value at path, empty where there is none. Raises NeedsPerson where IMDS is off, and
        Throttled for any other answer and for a value that does not match the pattern."""
        if self.token is None:
            self.token = self.fetch_token()
        headers = {"X-aws-ec2-metadata-token": self.token} if self.token else {}
        status, text = self.ask("GET", path, headers)
        if status == 401:
            self.token = None  # it has expired: the next attempt fetches another
        if status == 404:
            return ""
        if status != 200 or not re.fullmatch(pattern, text):
            raise Throttled(f"IMDS at {self.base}{path} answered {status} {show(text[:40])}")
        return text

    def await_value(self, path: str, pattern: str, optional: bool = False) -> str:
        """The value at path as soon as IMDS tells it; empty where it has none and need not."""

        def attempt() -> str:
            value = self.get(path, pattern)
            if value or optional:
                return value
            raise Throttled(f"IMDS at {self.base} has no {path}")

        return wait(attempt, self.deadline, POLL_HERE)


def imds_endpoint() -> str:
    """As botocore finds it (AWS SDKs and Tools Reference Guide, "IMDS credential provider")."""
    mode = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").lower()
    stock = "http://[fd00:ec2::254]" if mode == "ipv6" else "http://169.254.169.254"
    return (os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or stock).rstrip("/")


class Aws:
    """EC2 and Auto Scaling by boto3. Each call is tried once: wait() is what tries again."""

    def __init__(self, region: str, deadline: Deadline, dry_run: bool, imds: Imds) -> None:
        self.region, self.deadline, self.dry_run, self.imds = region, deadline, dry_run, imds
        self.forget()

    def forget(self) -> None:
        """Start over with new credentials at the next call."""
        self.session: Any = None
        self.clients: dict[str, Any] = {}

    def client(self, service: str) -> Any:
        import boto3
        from botocore.config import Config

        if service not in self.clients:
            self.session = self.session or boto3.session.Session(region_name=self.region)
            config = Config(connect_timeout=5, read_timeout=10, retries={"max_attempts": 0})
            self.clients[service] = self.session.client(service, config=config)
        return self.clients[service]

    def call(self, action: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one API call. Raises a Failure, and Rehearsed instead of any change."""
        import botocore
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
        from botocore.parsers import ResponseParserError

        rehearsal = self.dry_run and not action.startswith("Describe")
        if rehearsal:
            arguments["DryRun"] = True
        told = ", ".join(f"{key} {value}" for key, value in arguments.items())
        self.deadline.doing = f"{action} ({told})"
        trace(self.deadline.doing)
        try:
            client = self.client("autoscaling" if "AutoScaling" in action else "ec2")
            if action == "AttachNetworkInterface":
                members = client.meta.service_model.operation_model(action).input_shape.members
                if "NetworkCardIndex" in members:  # Debian 11's botocore does not know it
                    arguments["NetworkCardIndex"] = 0
            answer: dict[str, Any] = getattr(client, botocore.xform_name(action))(**arguments)
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            said = error.response.get("Error", {})  # nothing where the body is not AWS's
            code, message = said.get("Code") or str(status), said.get("Message", "")
            if rehearsal and code == "DryRunOperation":
                raise Rehearsed(f"would call {action} ({told}): permitted") from None
            if ERRORS.get(code) is NotYet:
                self.forget()  # the credentials are too old, or too new
            raise failure(action, code, status, message) from None
        except NoCredentialsError:
            self.forget()
            if role := self.imds.get("meta-data/iam/security-credentials/", r"[\w+=,.@-]+"):
                raise Throttled(f"IMDS has no credentials of the role {role}") from None
            raise NeedsPerson("no credentials: has the instance an IAM instance profile?") from None
        # LookupError and the like: botocore trips over answers that are not AWS's, or IMDS's.
        except (BotoCoreError, ResponseParserError, LookupError, TypeError, ValueError) as error:
            raise Throttled(f"{action}: {one_line(error)}") from None
        return answer

    def pages(self, action: str, key: str, **arguments: Any) -> list[dict[str, Any]]:
        """All that the answer has under key, from all of its pages. Raises a Failure."""
        items: list[dict[str, Any]] = []
        while True:
            page = self.call(action, **arguments)
            if key not in page:  # well-formed, but not AWS's: it does not say what exists
                raise Throttled(f"{action}: an answer without {key}")
            items += page[key]
            if not page.get("NextToken"):
                return items
            arguments["NextToken"] = page["NextToken"]

    def groups(self, instances: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Group and life-cycle state of each of the instances that is in a group."""
        ids, found = sorted(instances), {}
        for start in range(0, len(ids), 50):  # more in one call are refused
            for item in self.pages(
                "DescribeAutoScalingInstances",
                "AutoScalingInstances",
                InstanceIds=ids[start : start + 50],
            ):
                if not item.keys() >= {"InstanceId", "AutoScalingGroupName", "LifecycleState"}:
                    raise Throttled("DescribeAutoScalingInstances: an answer that lacks a state")
                found[item["InstanceId"]] = (item["AutoScalingGroupName"], item["LifecycleState"])
        return found

    def enis(self, name: str) -> list[Eni]:
        """All ENIs with exactly that Name tag, in all zones of the region."""
        action, tag = "DescribeNetworkInterfaces", {"Key": "Name", "Value": name}
        named = [{"Name": "tag:Name", "Values": [escape_filter(name)]}]
        try:
            items = self.pages(action, "NetworkInterfaces", Filters=named)
            return [Eni.from_api(item) for item in items if tag in item.get("TagSet", [])]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Throttled(f"{action}: an answer that lacks {one_line(error)}") from None


# --- what the kernel shows ---


def find_device(mac: str) -> str | None:
    """The device with that MAC address, whatever its name: eth1, ens6, enX1."""
    try:
        devices = sorted(os.listdir("/sys/class/net"))
    except OSError as error:
        raise Failure(f"cannot list /sys/class/net: {error.strerror}") from None
    for device in devices:
        path = f"/sys/class/net/{device}"
        # OSError: it went while we looked, or is bonding_masters, which is no device.
        with contextlib.suppress(OSError), open(f"{path}/address") as file:
            # A VLAN or a bridge on the ENI has its MAC too, and links to what is below it.
            stacked = any(entry.startswith("lower_") for entry in os.listdir(path))
            if file.read().strip() == mac and not stacked:
                return device
    return None


def read_network(eni: Eni) -> Network:
    """The ENI's device, up and with the ENI's address. Raises NotYet."""
    import ipaddress

    device = find_device(eni.mac)
    if device is None:
        raise NotYet(f"no device with {eni.id}'s MAC address {eni.mac} has appeared")
    try:
        for link in run_ip("addr", "show", "dev", device):
            for address in link.get("addr_info", []):
                usable = "UP" in link["flags"] and not address.get("tentative")
                if usable and address["local"] == eni.ip:
                    interface = ipaddress.ip_interface(f"{eni.ip}/{address['prefixlen']}")
                    v4_router = str(interface.network.network_address + 1)  # in every VPC subnet
                    gateway = v4_router if interface.version == 4 else V6_ROUTER
                    return Network(device, address["prefixlen"], gateway)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        what = f"ip -json addr show dev {device}"
        raise NotYet(f"{what} is not understood: {one_line(repr(error))}") from None
    raise NotYet(f"{device} is not up with {eni.id}'s address {eni.ip}")


# --- what is kept on disk ---


def write_state(path: str, here: Here, eni: Eni | None, network: Network | None) -> None:
    """Replace the state file whole: what reads it sees the old one or the new. Raises Failure.

    Without an attachment (after a detach) or without an ENI, what is unknown is null.
    """
    values = {
        "FQDN": eni.fqdn if eni else "",
        "IP": eni.ip if eni else "null",
        "GW": network.gateway if network else "null",
        "DEVICE": network.device if network and eni and eni.attachment else "null",
        "ASG_NAME": here.name,
        "INSTANCE_ID": here.instance,
        "ENI_ID": eni.id if eni else "null",
        "ATTACHMENT_ID": eni.attachment or "null" if eni else "null",
    }
    path = os.path.realpath(path)
    fresh = f"{path}.new"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)  # left by a run that was killed
        with open(fresh, "x", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)
            file.writelines(f"{key}={quote(value)}\n" for key, value in values.items())
            file.flush()
            os.fsync(file.fileno())
        os.rename(fresh, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise Failure(f"cannot write the state file {path}: {error.strerror}") from None


class Lock:
    """One run at a time on this host, and a note of the ENI that was claimed last.

    EC2 shows an attachment late. In a second run right after the first, or after a kill in
    mid-claim, our ENI may still look free: without the note, its "in use" would be taken for a
    lost race, and a second ENI of the pool for the remedy.
    """

    def __init__(self, path: str, deadline: Deadline) -> None:
        try:
            self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise Failure(f"cannot open {path}: {error.strerror}") from None

        def take() -> None:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise NotYet(f"another run of eni_ctl.py holds {path}") from None

        wait(take, deadline, POLL_HERE)
        self.claimed = os.pread(self.file, 64, 0).decode("ascii", "replace").strip()

    def note(self, eni: str) -> None:
        os.pwrite(self.file, eni.ljust(64).encode(), 0)
        self.claimed = eni


# --- steps ---


def look_around(options: argparse.Namespace, deadline: Deadline) -> tuple[Here, Aws]:
    """Who and where this instance is, and its door to AWS. Raises a Failure."""
    imds = Imds(deadline)
    instance = imds.await_value("meta-data/instance-id", r"i-[0-9a-f]{8,17}")
    zone = imds.await_value("meta-data/placement/availability-zone", REGION)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
    region = region or imds.await_value("meta-data/placement/region", REGION)
    if not re.fullmatch(REGION, region):
        raise NeedsPerson(f"the region is {show(region)}, expected one like us-west-1")
    aws = Aws(region, deadline, options.dry_run, imds)
    # There only with instance tags in metadata switched on; it saves an API call.
    tag = "meta-data/tags/instance/aws:autoscaling:groupName"
    name = options.name or imds.await_value(tag, r"[^\x00-\x1f]{1,255}", optional=True)
    if name:
        path = "meta-data/autoscaling/target-lifecycle-state"
        state = imds.await_value(path, r"[A-Za-z:]{1,40}", optional=True)
        return Here(instance, zone, region, name, state), aws

    def ask_group() -> tuple[str, str]:
        if found := aws.groups([instance]).get(instance):
            return found
        raise NeedsPerson(f"{instance} is in no Auto Scaling group, and no -n NAME was given")

    return Here(instance, zone, region, *wait(ask_group, deadline, POLL_EC2)), aws


class Claim:
    """The way of --attach to an ENI: looks, decides and acts, one step an attempt."""

    def __init__(self, here: Here, aws: Aws, lock: Lock, deadline: Deadline, force: bool) -> None:
        self.here, self.aws, self.lock = here, aws, lock
        self.deadline, self.force = deadline, force
        self.states: dict[str, str] = {}
        self.states_due = 0.0
        self.detaching: dict[str, float] = {}  # since when we know, by attachment
        self.index = INDEXES.start

    def attempt(self) -> Eni:
        """The ENI that is attached here. Raises NotYet after a step that was not the last."""
        enis = self.aws.enis(self.here.name)
        step = decide(self.here, enis, self.states, self.force, self.lock.claimed)
        if step.do == "wait" and self.deadline.past() >= self.states_due:
            self.ask_states(enis)
            step = decide(self.here, enis, self.states, self.force, self.lock.claimed)
        if self.aws.dry_run and step.do in ("keep", "wait"):
            what = step.why or f"{step.enis[0].id} is attached here"
            raise Rehearsed(f"would {step.do}: {what}")
        if step.do == "keep":
            self.lock.note(step.enis[0].id)
            return step.enis[0]
        if step.do == "attach":
            return self.attach_one(step.enis)
        if step.do == "release":
            self.release(step.enis[0], step.why)
        raise NotYet(step.why)

    def ask_states(self, enis: Sequence[Eni]) -> None:
        """Learn our own life-cycle state and those of all holders."""
        holders = {eni.holder for eni in enis if eni.holder.startswith("i-")}
        found = self.aws.groups(holders | {self.here.instance})
        self.states = {holder: found.get(holder, ("", "in no group"))[1] for holder in holders}
        if self.here.instance in found:
            self.here = self.here._replace(state=found[self.here.instance][1])
        self.states_due = self.deadline.past() + POLL_STATES

    def attach_one(self, enis: Sequence[Eni]) -> Eni:
        """The first of the ENIs that nobody else takes before us."""
        for eni in enis:
            perhaps_ours = eni.id == self.lock.claimed
            if not self.aws.dry_run:
                self.lock.note(eni.id)
            try:
                return eni._replace(attachment=self.attach(eni), device_index=self.index)
            except InUse:
                if perhaps_ours:
                    raise NotYet(f"{eni.id} is in use, EC2 does not show yet by whom") from None
                self.lock.note("")
                say(f"lost the race for {eni.id}")
        raise NotYet(f"others took each network interface named {show(self.here.name)}")

    def attach(self, eni: Eni) -> str:
        """The id of the new attachment. This call is the claim; nothing else is."""
        while self.index < INDEXES.stop:
            try:
                answer = self.aws.call(
                    "AttachNetworkInterface",
                    NetworkInterfaceId=eni.id,
                    InstanceId=self.here.instance,
                    DeviceIndex=self.index,
                )
            except IndexTaken:
                self.index += 1
                continue
            if "AttachmentId" in answer:
                return str(answer["AttachmentId"])
            raise Throttled("AttachNetworkInterface: an answer without AttachmentId")
        raise NeedsPerson(f"{self.here.instance} has no free device index below {self.index}")

    def release(self, eni: Eni, why: str) -> None:
        """Ask EC2 to detach it from its holder, first gently. Where it refuses, just wait."""
        now = self.deadline.past()
        overdue = now - self.detaching.setdefault(eni.attachment, now) > FORCE_AFTER
        if eni.attachment_status == "detaching" and not overdue:
            return
        say(f"{why}: detaching it there{', by force' if overdue else ''}")
        try:
            self.aws.call("DetachNetworkInterface", AttachmentId=eni.attachment, Force=overdue)
        except AlreadyGone:
            trace(f"{eni.id} has just been released")
        except Denied:
            raise
        except NeedsPerson as error:
            raise NotYet(f"{why}, and EC2 does not detach it: {error}") from None
        self.detaching[eni.attachment] = now


# --- verbs: each returns what the user reads on stdout, and the exit code ---


def attach(options: argparse.Namespace, deadline: Deadline) -> tuple[str, int]:
    lock = Lock(LOCK_FILE, deadline)
    here, aws = look_around(options, deadline)
    eni = wait(Claim(here, aws, lock, deadline, options.force).attempt, deadline, POLL_EC2)
    deadline.doing = f"{eni.id} is attached, waiting for its device and address"
    network = wait(lambda: read_network(eni), deadline, POLL_HERE)
    write_state(options.state_file, here, eni, network)
    return f"attached {eni.id} ({eni.ip}) as {network.device}", 0


def detach(options: argparse.Namespace, deadline: Deadline) -> tuple[str, int]:
    lock = Lock(LOCK_FILE, deadline)
    here, aws = look_around(options, deadline)
    gone: dict[str, tuple[Eni, Network | None]] = {}

    def let_go() -> None:
        enis = aws.enis(here.name)
        mine = attached_to(here.instance, enis)
        hidden = any(eni.id == lock.claimed and not eni.holder for eni in enis)
        if hidden and not gone and deadline.past() < GRACE:
            raise NotYet(f"{lock.claimed} was claimed here, EC2 does not show it attached yet")
        for eni in mine:
            if eni.id not in gone:
                gone[eni.id] = (eni, None)
                with contextlib.suppress(NotYet):
                    gone[eni.id] = (eni, read_network(eni))
            if eni.attachment_status != "detaching":  # EC2 may show it as attached for a while yet
                with contextlib.suppress(AlreadyGone):
                    aws.call("DetachNetworkInterface", AttachmentId=eni.attachment)
        if mine or any(find_device(eni.mac) for eni, _ in gone.values()):
            raise NotYet(f"{', '.join(gone)} is being detached")

    wait(let_go, deadline, POLL_EC2)
    if aws.dry_run:
        raise Rehearsed("would do nothing: no such network interface is attached here")
    lock.note("")
    for eni, network in gone.values():
        write_state(options.state_file, here, eni._replace(attachment=""), network)
    if gone:
        return "detached " + ", ".join(f"{eni.id} ({eni.ip})" for eni, _ in gone.values()), 0
    with contextlib.suppress(OSError), open(options.state_file, "rb") as file:
        if file.read().endswith(b"\nATTACHMENT_ID=null\n"):  # it says so, and of which ENI
            options.state_file = None
    if options.state_file:
        write_state(options.state_file, here, None, None)
    return f"not attached: {here.instance} holds no ENI named {show(here.name)}", 0


def status(options: argparse.Namespace, deadline: Deadline) -> tuple[str, int]:
    here, aws = look_around(options, deadline)
    enis = wait(lambda: aws.enis(here.name), deadline, POLL_EC2)
    holders = {eni.holder for eni in enis if eni.holder.startswith("i-")}
    found = wait(lambda: aws.groups(holders | {here.instance}), deadline, POLL_EC2)
    state = {i: life_cycle for i, (_, life_cycle) in found.items()}
    report: dict[str, Any] = {**here._asdict(), "state": state.get(here.instance, here.state)}
    report["enis"] = [{**eni._asdict(), "holder_state": state.get(eni.holder, "")} for eni in enis]
    code = 3
    for mine in attached_to(here.instance, enis)[:1]:
        code = 0
        try:
            report.update(read_network(mine)._asdict(), ip=mine.ip)
            rules = run_ip("-6" if ":" in mine.ip else "-4", "rule")
            report["rule"] = any(rule.get("src") == mine.ip for rule in rules)
        except NotYet as error:
            report["problem"], code = str(error), 1
    return (json.dumps(report, indent=2) if options.json else table(report)), code


def table(report: Mapping[str, Any]) -> str:
    """The report of --status for people."""
    state = report["state"] or "in no group"
    lines = [
        f"instance  {report['instance']} in {report['zone']}, {state}",
        f"name      {show(report['name'])}",
    ]
    rows = [("eni", "address", "zone", "status", "holder")]
    for eni in report["enis"]:
        holder = f"{eni['holder'] or '-'} {eni['holder_state']}"
        rows.append((eni["id"], eni["ip"], eni["zone"], eni["status"], holder))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if "rule" in report:
        lines.append(f"device    {report['device']}, {report['ip']}/{report['prefix']}")
        lines[-1] += f", gateway {report['gateway']}"
        hint = f"none: run add_routes.py -d {report['device']}, or replies may leave by eth0"
        lines.append(f"rule      {'from ' + report['ip'] if report['rule'] else hint}")
    else:
        lines.append(f"device    {report.get('problem', 'none: not attached here')}")
    return "\n".join(lines)


# --- the command line ---


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def trace(line: str) -> None:
    if verbose:
        say(line)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="eni_ctl.py", allow_abbrev=False, description=(__doc__ or "")[:95],
                    epilog="Exit codes: 0 done; 1 failed for now, trying again can help; 2 usage; "
                    "3 --status only: not attached; 4 a person must act.")  # fmt: skip
    verb, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    for flag, name, function in (("-a", "--attach", attach), ("-d", "--detach", detach)):
        verb.add_argument(flag, name, dest="verb", action="store_const", const=function,
                          help=f"{name[2:]} it")  # fmt: skip
    verb.add_argument("-s", "--status", dest="verb", action="store_const", const=status,
                      help="say what is so, change nothing")  # fmt: skip
    verb.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add("-n", "--name", help="the ENI's Name tag, instead of the group's name")
    add("-t", "--timeout", type=float, default=TIMEOUT, metavar="SECONDS",
        help="for the whole run (default %(default)g)")  # fmt: skip
    add("-f", "--force", action="store_true", help="take it even from a holder in service")
    add("-o", "--state-file", default=STATE_FILE, metavar="FILE", help="default %(default)s")
    add("--dry-run", action="store_true", help="say what would be done; ask EC2 if it is allowed")
    add("--json", action="store_true", help="--status for programs")
    add("-v", "--verbose", action="store_true", help="report each request and command")
    options = parser.parse_args(argv)
    if options.name is not None and not re.fullmatch(r"[^\ud800-\udfff]{1,256}", options.name):
        parser.error(f"-n {show(options.name)}: expected 1 to 256 characters of UTF-8")
    if not 1 <= options.timeout <= 86400:
        parser.error(f"-t {options.timeout:g}: expected 1 to 86400 seconds")
    path = options.state_file
    if not path or (os.path.exists(path) and not os.path.isfile(path)):
        parser.error(f"-o {show(path)}: expected a regular file")
    if options.force and options.verb is not attach:
        parser.error("-f goes with -a")
    if options.json and options.verb is not status:
        parser.error("--json goes with -s")
    if options.dry_run and options.verb is status:
        parser.error("--dry-run goes with -a or -d")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    global verbose
    options = parse(argv)
    verbose = options.verbose
    gc.set_threshold(50_000)  # boto3 loads what stays: looking for garbage in it costs a tenth
    # botocore gets its credentials from IMDS: it asks once and for 1 s, too little at boot, and it
    # would ask a proxy.
    os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "3")
    os.environ.setdefault("AWS_METADATA_SERVICE_TIMEOUT", "2")
    no_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    host = imds_endpoint().split("//")[-1].rsplit("/")[0]
    os.environ["no_proxy"] = f"{no_proxy},{host}"
    deadline = Deadline(options.timeout)
    deadline.guard()
    try:
        text, code = options.verb(options, deadline)
    except Rehearsed as result:
        text, code = str(result), 0
    except Failure as error:
        say(str(error))
        return error.code
    except KeyboardInterrupt:
        say(f"interrupted: {deadline.doing}")
        return 130
    except Exception as error:
        if verbose:
            raise
        say(f"unexpected {type(error).__name__}: {one_line(error)} (-v shows where)")
        return Failure.code
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough; what is left must go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(code)


if __name__ == "__main__":
    exit_code = main()
    gc.freeze()  # or Python would look for garbage once more: a quarter of the whole run
    raise SystemExit(exit_code)
