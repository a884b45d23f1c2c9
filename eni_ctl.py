#!/usr/bin/python3 -I
"""Give this EC2 instance the network interface (ENI) that is named after its Auto Scaling group.

How it attaches: it asks IMDS for the instance's id, finds the name of the instance's group, finds
the ENIs with that Name tag, attaches one, waits for its device and address, and writes the state
file. A free ENI is attached. An ENI of a terminating instance is detached there first, if EC2 says
that this instance may attach it. An ENI of an instance in service is never taken, unless by
--force: this program waits for it.

Each run may be killed at any point, and be started again. It ends at its deadline (-t) at the
latest, or a second later.

Examples:
  eni_ctl.py -a                  attach, as eni.service does at boot
  eni_ctl.py -s                  show the ENIs of the name, who holds them, and the device here
  eni_ctl.py -d                  detach from this instance
  eni_ctl.py -a --dry-run        say what an attach would do, and whether AWS allows it
  eni_ctl.py -a -f               attach, even if a host in service holds the ENI
  eni_ctl.py -a -n vpn -o /var/lib/vpn/eni
                                 attach the ENI that is named "vpn", with a state file of its own
  eni_ctl.py -s --json | jq .device
                                 for programs

Files:
  /etc/default/eni    what is attached, as KEY=value lines for sh, bash and systemd
  /run/eni_ctl.lock   held during each step, and says which ENI this host last tried to attach

Exit codes:
  0  done and verified
  1  failed for now; trying again can help
  2  usage error
  3  only from --status: no ENI of the name is attached here
  4  a person must act: no group, no usable ENI, another zone, no permission, no free slot
  130  interrupted

IAM actions: autoscaling:DescribeAutoScalingInstances, ec2:DescribeNetworkInterfaces,
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
import io
import json
import logging
import os
import re
import select
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Callable, NamedTuple, NoReturn, TypeVar

# boto3, requests and what only some runs need are imported where they are used: --help and usage
# errors do without them.

__version__ = "2.0.0"

STATE_FILE = "/etc/default/eni"
LOCK_FILE = "/run/eni_ctl.lock"

# All times are in seconds.
TIMEOUT = 300.0  # for the whole run; TimeoutStartSec in systemd/eni.service is a little more
KILL_AFTER = 1.0  # past the deadline, a call that never returns (DNS, say) ends with the process
GRACE = 10.0  # after a launch, IAM, Auto Scaling and tags may need this long to be right
QUICK_PHASE = 10.0  # a wait polls quickly for this long after its reason has changed
STATES_AGE = 7.0  # life-cycle states that are older are read again before anything is decided
LOOK_AGAIN = (5.0, 30.0)  # EC2 is asked again about an ENI without device after 5, 10, 20, 30 ... s
ASK_AGAIN = 10.0  # a detach that EC2 has taken, but does not show, is asked for again after this
FORCE_AFTER = 30.0  # a detach at a holder that takes longer than this is forced
FIRST_REPORT = 2.0  # a run reports that it waits after this time, and whenever that has doubled
REFUSAL_PAUSES = (1.0, 30.0)  # a refused attach or detach is repeated after 1, 2, 4 ... 30 s
CREDENTIAL_PAUSES = (1.0, 60.0)  # new credentials are fetched after 1, 2, 4 ... 60 s
SHOWN_WITHIN = 30.0  # EC2 shows an attachment late, but not later than this


class Poll(NamedTuple):
    """The pauses of a wait."""

    quick: float  # in its quick phase
    slow: float  # later
    slowest: float  # when the other side is overloaded


POLL_EC2 = Poll(quick=1.0, slow=5.0, slowest=15.0)
POLL_LOCAL = Poll(quick=0.1, slow=0.1, slowest=1.5)  # IMDS and the lock
POLL_DEVICE = Poll(quick=0.1, slow=0.5, slowest=1.5)  # the kernel, by a process of `ip`

# 0 is the primary ENI. The largest instance types of 2026 have 24 ENIs on a card (EC2's
# DescribeInstanceTypes, MaximumNetworkInterfaces). EC2 itself says when there is no room for more,
# so this bound is only for a run that it does not tell.
DEVICE_INDEXES = range(1, 64)
ZONE_OR_REGION = r"[a-z]{2,9}(-[a-z0-9]{1,20}){2,6}"
IFF_UP = 1  # of a device's flags (linux/if.h)
NO_GROUP = "in no group"  # stands for the life-cycle state of an instance that has none
IPV6_ROUTER = "fe80:ec2::1"  # of every VPC subnet (VPC user guide, "Configure route tables")

T = TypeVar("T")
log = logging.getLogger("eni_ctl")  # info for the user, debug for --verbose


# --- errors: the class says what a wait does about one, the text is what the user reads ---


class Failure(Exception):
    """Ends the run at once: to wait longer cannot help, though another run may."""

    exit_code = 1

    def __init__(self, text: str, aws_code: str = "") -> None:
        super().__init__(text)
        self.aws_code = aws_code  # AWS's error code, where AWS refused a call


class NotYet(Failure):
    """Tried again until the deadline."""


class Overloaded(NotYet):
    """AWS or IMDS is throttling or out of reach: as NotYet, but tried ever less often."""


class NeedsPerson(Failure):
    """Tried again for GRACE only, because right after a launch it may come right by itself."""

    exit_code = 4


class DryRun(Exception):
    """--dry-run has come to the first call that would change something, or to the end."""


# AWS's error codes, by what they mean here (EC2 API reference, "Error codes").
IN_USE = "InvalidNetworkInterface.InUse"
DETACHED_ALREADY = "InvalidAttachmentID.NotFound"
NO_FREE_SLOT = "AttachmentLimitExceeded"
# Codes of our own, because AWS's say many things: aws_failure() makes the first of an
# InvalidParameterValue about a device index, the second of an AuthFailure about an ENI.
INDEX_TAKEN = "device index taken"
NOT_PERMITTED_HERE = "AuthFailure of an ENI"
DETACH_HANGS = "even a detach by force hangs"  # Claim.release() says so, and EC2 says nothing
DENIED = {"UnauthorizedOperation", "AccessDenied", "AccessDeniedException"}
CLOCK_NOT_SET = {
    "SignatureDoesNotMatch",
    "InvalidSignatureException",
    "RequestTimeTooSkewed",
    "RequestInTheFuture",
    "RequestExpired",
}
INVALID_KEYS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
}
STALE_CREDENTIALS = CLOCK_NOT_SET | INVALID_KEYS | {"AuthFailure"}
# Keys that do not come from a role, by botocore's name for where they come from.
KEYS_OF_A_PERSON = {
    "env": "the environment",
    "shared-credentials-file": "~/.aws/credentials",
    "config-file": "~/.aws/config",
}
INSTANCE_NOT_READY = {
    "IncorrectInstanceState",
    "InvalidInstanceID",
    "InvalidInstanceID.NotFound",
    "OptInRequired",  # the account or region is being activated
}
ENI_NOT_READY = {
    IN_USE,
    INDEX_TAKEN,
    NOT_PERMITTED_HERE,
    DETACHED_ALREADY,
    "IncorrectState",
    "InvalidNetworkInterfaceID.NotFound",
}
THROTTLED = {
    "EC2ThrottledException",
    "PriorRequestNotComplete",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "SlowDown",
    "ThrottledException",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
}
HINTS = {
    "InvalidParameterCombination": "is the ENI in another zone? ",
    NO_FREE_SLOT: "no free slot for an ENI on this instance: ",
    **dict.fromkeys(CLOCK_NOT_SET, "is this host's clock set? "),
}


# --- what there is ---


class Instance(NamedTuple):
    """This instance, as IMDS and its group describe it."""

    id: str
    zone: str
    region: str
    name: str = ""  # the Name tag to look for: the group's name, or what -n says
    state: str = ""  # life-cycle state in the group; empty where it is in no group


class Eni(NamedTuple):
    """A network interface, as DescribeNetworkInterfaces shows it. What it lacks is empty.

    -s --json prints these fields, and those of Network, by name: a new name breaks its users.
    """

    id: str
    mac: str
    zone: str
    ip: str
    name: str = ""
    fqdn: str = ""
    status: str = "available"
    interface_type: str = "interface"  # API_NetworkInterface, InterfaceType: efa-only, trunk …
    service: str = ""  # the AWS service that owns it; empty for one of the account's own
    holder: str = ""  # the instance of its attachment
    attachment: str = ""
    attachment_status: str = ""  # attaching, attached, detaching
    device_index: int = -1
    card_index: int = 0
    since: str = ""
    delete_on_termination: bool = False

    @property
    def is_primary(self) -> bool:
        """A primary ENI cannot be moved. A launch template may have given it the group's name."""
        return self.device_index == 0 and self.card_index == 0

    @property
    def is_movable(self) -> bool:
        """An EFA without addresses stays where it was launched, too, and may have the name."""
        return not self.is_primary and self.interface_type != "efa-only"

    @property
    def is_free(self) -> bool:
        return self.status == "available" and not self.attachment and not self.holder

    def is_attached_to(self, instance: str) -> bool:
        return self.holder == instance and self.attachment_status in ("attaching", "attached")


class Network(NamedTuple):
    """The ENI's device and prefix length, as the kernel shows them, and its subnet's gateway."""

    device: str
    prefix: int
    gateway: str


class Step(NamedTuple):
    """One thing that would bring the instance nearer to its ENI."""

    action: str  # attach, or release: detach it from its holder
    eni: Eni


class Decision(NamedTuple):
    """What --attach should do now."""

    keep: Eni | None = None  # the ENI that is attached here already
    steps: tuple[Step, ...] = ()  # by preference; the first that EC2 does not refuse is enough
    waiting_for: tuple[str, ...] = ()  # a clause about each ENI that may become free by itself


# --- the three verbs: each returns what the user reads on stdout, and the exit code ---


def attach(options: argparse.Namespace, deadline: Deadline) -> tuple[str, int]:
    lock = Lock(LOCK_FILE, options, deadline)
    imds = Imds(deadline)
    instance = see_instance(imds)
    if not options.dry_run:
        clear_foreign_attachment(instance, lock)
    aws = Aws(instance.region, deadline, options.dry_run, imds)
    instance = identify(instance, aws, imds, options, deadline)
    claim = Claim(instance, aws, lock, deadline, options)
    patience, longest = LOOK_AGAIN
    pace = Pace(POLL_DEVICE)  # of all looks at the device, which are quick only once
    while True:
        eni = wait(claim.step, deadline, POLL_EC2)
        try:
            network = await_network(instance, eni, lock, deadline, patience, pace)
            break
        except NotYet:
            # No device has come. Perhaps EC2 has undone the attachment, or a peer has the ENI.
            patience = min(patience * 2, longest)
    warn_of_deletion(eni)
    return f"attached {eni.id} ({eni.ip}) as {network.device}", 0


def detach(options: argparse.Namespace, deadline: Deadline) -> tuple[str, int]:
    lock = Lock(LOCK_FILE, options, deadline)
    imds = Imds(deadline)
    record = read_state_file(options.state_file)
    instance = see_instance(imds)
    aws = Aws(instance.region, deadline, options.dry_run, imds)
    instance = identify(instance, aws, imds, options, deadline, record)
    withdrawal = Withdrawal(instance, aws, lock, deadline, options)
    detached = wait(withdrawal.step, deadline, POLL_EC2)
    if not detached:
        return f"not attached: {instance.id} holds no ENI named {quoted(instance.name)}", 0
    return "detached " + ", ".join(f"{eni.id} ({eni.ip})" for eni in detached), 0


def status(options: argparse.Namespace, deadline: Deadline) -> tuple[str, int]:
    imds = Imds(deadline)
    instance = see_instance(imds)
    aws = Aws(instance.region, deadline, options.dry_run, imds)
    instance = identify(instance, aws, imds, options, deadline)
    enis = wait(lambda: aws.enis_named(instance.name), deadline, POLL_EC2)
    instances = {instance.id, *holding_instances(enis)}
    members = wait(lambda: aws.members(instances), deadline, POLL_EC2)
    report = describe_state(instance, enis, life_cycle_states(instances, members))
    exit_code = 3
    if not own_enis(instance.id, enis):
        wait(lambda: aws.enis_of(instance.id), deadline, POLL_EC2)  # raises for another account
    eni = attached_eni(instance.id, enis)
    if eni:
        exit_code = add_network(report, eni)
    answer = json.dumps(report, indent=2) if options.json else status_table(report)
    return answer, exit_code


# --- deciding: from what there is, what to do next; nothing here acts ---


def decide(
    instance: Instance, enis: Sequence[Eni], states: Mapping[str, str], force: bool, tried: str
) -> Decision:
    """What --attach does next. Raises Failure, NeedsPerson or NotYet if nothing may be claimed.

    If others hold all candidates, there are no steps, and Claim.act() raises NotYet.
    enis: all ENIs of the name. states: the holders' life-cycle states, as far as they are known.
    tried: the ENI that a run here last tried to attach; it may be ours before EC2 shows it.
    """
    attached = attached_eni(instance.id, enis)
    if attached:
        return Decision(keep=attached)
    for eni in own_enis(instance.id, enis):
        if eni.attachment_status == "detaching":
            raise NotYet(f"{eni.id} is being detached from this instance")
    check_may_claim(instance.state)

    candidates = find_candidates(instance, enis)
    candidates.sort(key=lambda eni: (eni.id != tried, rank(instance.id, eni.id)))
    steps: list[Step] = []
    for eni in candidates:
        if eni.is_free:
            steps.append(Step("attach", eni))
    takeable = [eni for eni in candidates if may_take(eni, states, force)]
    takeable.sort(key=lambda eni: whom_to_spare(states[eni.holder]))
    for eni in takeable:
        steps.append(Step("release", eni))
    waiting_for: list[str] = []
    for eni in candidates:
        if not eni.is_free and eni not in takeable:
            waiting_for.append(why_not_free(eni, states))
    return Decision(steps=tuple(steps), waiting_for=tuple(waiting_for))


def check_may_claim(state: str) -> None:
    """Return if an instance in that life-cycle state may claim an ENI.

    Raises Failure in a state that leads out of the group, and NotYet in one that can lead back into
    service. An instance without a state is in no group; -n named the ENI for it.
    """
    if re.match("Pending|InService|$", state):
        return
    if re.match("Terminat|Detach", state):
        raise Failure(f"this instance is {state}: it claims nothing")
    raise NotYet(f"this instance is {state}: it claims nothing until it is in service")


def may_take(eni: Eni, states: Mapping[str, str], force: bool) -> bool:
    """Whether the ENI may be taken from the instance that holds it.

    It may be taken from a dying or warm holder, with --force from any. The holder's state must be
    known, because without it a healthy host could be robbed.
    """
    if eni.is_free or not eni.attachment or eni.holder not in states:
        return False
    return force or is_dying_or_warm(states[eni.holder])


def is_dying_or_warm(state: str) -> bool:
    """Whether an instance in that life-cycle state is not in use by its group, nor coming back."""
    return re.match("Terminat|Warmed:", state) is not None


def whom_to_spare(state: str) -> int:
    """Sort key for --force: an ENI is taken from the holder with the lowest one first."""
    if is_dying_or_warm(state):
        return 0
    if state == NO_GROUP:
        return 1
    if re.match("Pending|InService", state):
        return 3
    return 2  # Standby, Detaching and the like


def find_candidates(instance: Instance, enis: Sequence[Eni]) -> list[Eni]:
    """The ENIs that could be attached here. Raises NeedsPerson where there are none."""
    candidates: list[Eni] = []
    reasons: list[str] = []
    for eni in enis:
        reason = why_unusable(eni)
        if not reason and eni.zone != instance.zone:
            reason = f"is in {eni.zone or 'an unknown zone'}"
        if reason:
            reasons.append(f"{eni.id} {reason}")
        else:
            candidates.append(eni)
    if candidates:
        return candidates
    name = quoted(instance.name)
    if not reasons:
        raise NeedsPerson(f"no network interface named {name} in {instance.region}")
    raise NeedsPerson(
        f"no usable network interface named {name} in {instance.zone}: {list_some(reasons)}"
    )


def why_unusable(eni: Eni) -> str:
    """Why no instance could attach it as a second interface; empty where one could."""
    if eni.is_primary:
        return f"is the primary one of {eni.holder or eni.service}"
    if eni.service:
        return f"belongs to {eni.service}"
    if not eni.ip:
        return "has no address"
    if not eni.mac:
        return "has no MAC address"
    return ""


def why_not_free(eni: Eni, states: Mapping[str, str]) -> str:
    """A clause about an ENI that is in use, or between two states."""
    if eni.holder and eni.attachment_status in ("attaching", "attached"):
        state = states.get(eni.holder, "state unknown")
        ends = ", and will be deleted with it" if eni.delete_on_termination else ""
        return f"{eni.id} is held by {eni.holder} ({state}) since {eni.since}{ends}"
    if eni.holder and eni.attachment_status == "detaching":
        return f"{eni.id} is being detached from {eni.holder}"
    return f"{eni.id} has the status {quoted(eni.status)}"


def own_enis(instance: str, enis: Iterable[Eni]) -> list[Eni]:
    """What the instance holds that could be moved, in the order of the device indexes."""
    own = [eni for eni in enis if eni.holder == instance and eni.is_movable]
    return sorted(own, key=lambda eni: (eni.card_index, eni.device_index))


def attached_eni(instance: str, enis: Iterable[Eni]) -> Eni | None:
    """The ENI that the instance has already, or is just getting; of several, the first by index."""
    for eni in own_enis(instance, enis):
        if eni.is_attached_to(instance):
            return eni
    return None


def holding_instances(enis: Iterable[Eni]) -> set[str]:
    return {eni.holder for eni in enis if eni.holder}


def rank(instance: str, eni: str) -> str:
    """Sort key: each host tries the ENIs of a pool in an order of its own, so that few collide."""
    import hashlib

    return hashlib.sha256(f"{instance} {eni}".encode()).hexdigest()


# --- attaching ---


class Claim:
    """How --attach comes to an ENI: it looks, decides and acts, one step at a time."""

    def __init__(
        self,
        instance: Instance,
        aws: Aws,
        lock: Lock,
        deadline: Deadline,
        options: argparse.Namespace,
    ) -> None:
        self.instance = instance
        self.aws = aws
        self.lock = lock
        self.deadline = deadline
        self.force = options.force
        self.named = options.name is not None
        self.states: dict[str, str] = {}  # the holders' life-cycle states
        self.states_read = deadline.elapsed()  # our own has just been read
        self.permitted: set[str] = set()  # the ENIs that IAM lets this instance attach
        self.granted: Eni | None = None  # what EC2 let this run attach
        # By ENI: when EC2 first called it in use and did not show a holder.
        self.unseen_since: dict[str, float] = {}
        # By attachment: since when EC2 shows that it is being detached.
        self.detaching_since: dict[str, float] = {}
        # By attachment: when it was detached by force for the first time.
        self.forced_at: dict[str, float] = {}
        # By attachment: when to repeat a detach that EC2 has accepted and does not show.
        self.ask_again_at: dict[str, float] = {}
        self.refusals = Refusals(deadline)
        self.record_is_checked = False

    def step(self) -> Eni:
        """The ENI that is attached here. Raises NotYet after a step that was not the last."""
        with self.lock.held():
            enis = self.aws.enis_named(self.instance.name)
            if not enis:
                self.aws.enis_of(self.instance.id)  # raises for the credentials of another account
            if not self.aws.dry_run:
                self.clear_stale_attachment(enis)
            if self.needs_states(enis):
                self.read_states(enis)
            if self.aws.dry_run:
                return self.rehearse(enis)
            decision = decide(self.instance, enis, self.states, self.force, self.lock.tried)
            if decision.keep:
                self.lock.remember(decision.keep.id)
                return decision.keep
            return self.act(decision)

    def rehearse(self, enis: Sequence[Eni]) -> Eni:
        """What --dry-run does. Raises DryRun with what would be done, or what EC2 says."""
        try:
            decision = decide(self.instance, enis, self.states, self.force, self.lock.tried)
            if decision.keep:
                raise DryRun(f"would keep: {decision.keep.id} is attached here")
            return self.act(decision)
        except NotYet as error:
            # These are no answer to what was asked.
            if isinstance(error, Overloaded) or error.aws_code in STALE_CREDENTIALS:
                raise
            raise DryRun(f"would wait: {error}") from None

    def needs_states(self, enis: Sequence[Eni]) -> bool:
        """Whether life-cycle states must be read before anything can be decided.

        Our own and the holders' must be fresh. The holders' do not matter while an ENI is free, or
        is ours already.
        """
        if attached_eni(self.instance.id, enis):
            return False
        if self.states_are_old():
            return True
        for eni in enis:
            if eni.is_free and eni.zone == self.instance.zone and not why_unusable(eni):
                return False
        return not holding_instances(enis) <= self.states.keys()

    def states_are_old(self) -> bool:
        return self.deadline.elapsed() - self.states_read > STATES_AGE

    def read_states(self, enis: Sequence[Eni]) -> None:
        holders = holding_instances(enis)
        members = self.aws.members(holders | {self.instance.id})
        self.states = life_cycle_states(holders, members)
        own = members.get(self.instance.id)
        if own:
            self.instance = self.instance._replace(state=own.state or self.instance.state)
        elif not self.named:
            raise NeedsPerson(f"{self.instance.id} is in no Auto Scaling group any more")
        elif self.instance.state:
            # To be left out of one answer must not make a host on standby claim an ENI by -n. One
            # that has really left its group claims in its next run.
            raise NotYet(f"Auto Scaling does not list {self.instance.id} any more")
        self.states_read = self.deadline.elapsed()

    def act(self, decision: Decision) -> Eni:
        """Take the first step that EC2 does not refuse. Raises a Failure where none is left."""
        refusals: list[Failure] = []
        for step in decision.steps:
            try:
                if step.action == "attach":
                    return self.attach(step.eni)
                self.release(step.eni)
            except Failure as error:
                if not another_may_do(step, error):
                    raise
                refusals.append(error)
        raise nothing_left(refusals, decision.waiting_for)

    def attach(self, eni: Eni) -> Eni:
        """Claim the ENI: this call of EC2 is the claim, and nothing else is."""
        self.refusals.check(ATTACH_ANYTHING)
        self.refusals.check(f"attach {eni.id}")
        was_tried = eni.id == self.lock.tried
        self.lock.remember(eni.id)
        try:
            attachment = self.aws.attach(eni.id, self.instance.id)
        except Failure as error:
            if not is_refusal(error):
                raise  # the call may have taken effect all the same
            return self.find_own(eni, was_tried, error)
        self.granted = eni._replace(
            holder=self.instance.id, attachment=attachment, attachment_status="attaching"
        )
        return self.granted

    def find_own(self, eni: Eni, was_tried: bool, error: Failure) -> Eni:
        """The ENI that EC2 refused to attach, if it is ours already; otherwise raises the error."""
        call = f"attach {eni.id}"
        if error.aws_code == IN_USE:
            if self.granted and self.granted.id == eni.id:
                return self.granted
            if was_tried:
                self.check_not_ours(eni, call)
        self.lock.remember("")
        if not concerns_one_eni(error):
            call = ATTACH_ANYTHING
        raise self.refusals.note(call, about(eni, error)) from None

    def check_not_ours(self, eni: Eni, call: str) -> None:
        """Raise NotYet for an ENI that EC2 lists as free, but refuses as in use.

        A run here has tried to attach it, so it is probably ours: EC2 shows an attachment late.
        Without this, the run would take a second ENI of the pool. Returns when EC2 has had the time
        to show it.
        """
        now = self.deadline.elapsed()
        since = self.unseen_since.setdefault(eni.id, now)
        if now - since < SHOWN_WITHIN:
            reason = NotYet(f"{eni.id} is in use, and EC2 does not show yet by whom")
            raise self.refusals.note(call, reason)

    def release(self, eni: Eni) -> NoReturn:
        """Have EC2 detach the ENI from its holder, by force where that hangs. Raises NotYet."""
        now = self.deadline.elapsed()
        hangs = eni.attachment_status == "detaching"
        if hangs:
            due = self.detaching_since.setdefault(eni.attachment, now) + FORCE_AFTER
        else:
            due = self.ask_again_at.get(eni.attachment, now)
        if now < due:
            forced_at = self.forced_at.get(eni.attachment, now)
            # It may hang for ever, so another ENI is worth a try. But with --force that may be one
            # of a host in service: then this one is waited for.
            hangs_for_good = now - forced_at > FORCE_AFTER and not self.force
            code = DETACH_HANGS if hangs_for_good else ""
            raise NotYet(f"{eni.id} is being detached from {eni.holder}", code)

        held = why_not_free(eni, self.states)
        call = f"detach {eni.attachment}"
        self.refusals.check(call)
        self.check_could_attach(eni)
        if self.states_are_old():  # the check took long
            raise NotYet(held)
        try:
            self.aws.detach(eni.attachment, force=hangs)
        except Failure as error:
            if not is_refusal(error):
                raise
            # The holder's shutdown releases the ENI, too: waiting helps, unless IAM says no.
            kind = NeedsPerson if error.aws_code in DENIED else NotYet
            reason = kind(f"{held}, and EC2 does not detach it: {error}", error.aws_code)
            raise self.refusals.note(call, reason) from None
        if hangs:
            self.forced_at.setdefault(eni.attachment, now)
        self.detaching_since.pop(eni.attachment, None)
        self.ask_again_at[eni.attachment] = now + ASK_AGAIN
        log.info("%s: detaching it there%s", held, ", by force" if hangs else "")
        warn_of_deletion(eni)
        raise NotYet(f"{eni.id} is being detached from {eni.holder}")

    def check_could_attach(self, eni: Eni) -> None:
        """Raise the Failure for which the ENI could not be attached here, if one is known.

        So no holder loses an ENI that would be nobody's afterwards.
        """
        last = self.refusals.last(ATTACH_ANYTHING)
        if last and last.aws_code == NO_FREE_SLOT:
            raise last.with_traceback(None)
        if eni.id in self.permitted:
            return
        call = f"attach {eni.id}"
        self.refusals.check(call)
        self.aws.enis_of(self.instance.id)  # raises for the credentials of another account
        try:
            self.aws.ask_to_attach(eni.id, self.instance.id)
        except Failure as error:
            if not is_refusal(error):
                raise
            # What EC2 says of the ENI itself is no reason: it is in use as yet.
            if error.aws_code in DENIED or not concerns_one_eni(error):
                raise self.refusals.note(call, about(eni, error)) from None
        self.permitted.add(eni.id)

    def clear_stale_attachment(self, enis: Sequence[Eni]) -> None:
        """Take the attachment out of a state file where EC2 does not show it here any more."""
        record = read_state_file(self.lock.state_file)
        if self.record_is_checked or not has_attachment(record):
            return
        recorded = record.get("ENI_ID", NULL)
        shown = [eni for eni in enis if eni.id == recorded]
        if shown:
            here = shows_here(self.instance, shown)
        else:
            here = is_here(self.aws, self.instance, recorded)
            self.record_is_checked = True  # EC2 is asked about it only once in a run
        if not here:
            could_write = clear_attachment(self.lock.state_file, record)
            # A file that cannot be written is not tried again at each poll. One that was written
            # has no attachment to check any more.
            self.record_is_checked = not could_write


def shows_here(instance: Instance, shown: Iterable[Eni]) -> bool:
    """Whether EC2 shows one of the ENIs at this instance, or its device is still there."""
    return any(eni.holder == instance.id or find_device(eni.mac) for eni in shown)


def is_here(aws: Aws, instance: Instance, eni_id: str) -> bool:
    """Whether EC2, asked about the ENI, shows it at this instance, or its device is still there.

    Raises a Failure for another account.
    """
    shown = aws.enis_with_ids({eni_id})
    if not shown:  # it has been deleted, or the credentials belong to another account
        aws.enis_of(instance.id)
    return shows_here(instance, shown)


def clear_foreign_attachment(instance: Instance, lock: Lock) -> None:
    """Take the attachment out of a state file that was written for another instance.

    The file may have come with an AMI, or with a disk from a former life of this host.
    """
    with lock.held():
        record = read_state_file(lock.state_file)
        if has_attachment(record) and record.get("INSTANCE_ID") != instance.id:
            clear_attachment(lock.state_file, record)


def clear_attachment(state_file: str, record: Mapping[str, str]) -> bool:
    """Say in the state file that nothing is attached; whether it could be written."""
    try:
        write_state_file(state_file, without_attachment(record))
    except Failure as error:
        log.info("%s", error)
        return False
    return True


def await_network(
    instance: Instance, eni: Eni, lock: Lock, deadline: Deadline, patience: float, pace: Pace
) -> Network:
    """See the ENI's address up, and write the state file.

    Raises NotYet after patience seconds, so that EC2 is asked whether the ENI is still ours.
    """

    def confirm() -> Network:
        with lock.held():
            network = read_network(eni)
            write_state_file(lock.state_file, state_values(instance, eni, network))
        return network

    deadline.doing = f"{eni.id} is attached, waiting for its device and address"
    return wait(confirm, deadline, pace.poll, patience, pace)


def warn_of_deletion(eni: Eni) -> None:
    if eni.delete_on_termination:
        log.warning("%s", deletion_warning(eni))


def deletion_warning(eni: Eni) -> str:
    return (
        f"warning: {eni.id} will be deleted with {eni.holder}, because its attachment has "
        "DeleteOnTermination"
    )


# --- detaching ---


class Withdrawal:
    """How --detach takes the ENIs from this instance: it looks and acts, one step at a time."""

    def __init__(
        self,
        instance: Instance,
        aws: Aws,
        lock: Lock,
        deadline: Deadline,
        options: argparse.Namespace,
    ) -> None:
        self.instance = instance
        self.aws = aws
        self.lock = lock
        self.deadline = deadline
        self.named = options.name is not None
        self.targets: dict[str, Eni] = {}  # by attachment
        self.refused: set[str] = set()  # attachments that EC2 has surely not begun to detach
        self.gateways: dict[str, str] = {}  # by attachment
        # By attachment: when to repeat a detach that EC2 has accepted and does not show.
        self.ask_again_at: dict[str, float] = {}
        # By ENI: since when this run knows of a claim that EC2 does not show.
        self.unseen_since: dict[str, float] = {}
        self.refusals = Refusals(deadline)

    def step(self) -> list[Eni]:
        """What has been detached. Raises NotYet until it and its devices are gone."""
        with self.lock.held():
            record = read_state_file(self.lock.state_file)
            held = self.aws.enis_of(self.instance.id)
            if self.targets:
                held += self.refused_and_unlisted(held)
            else:
                suspects = self.read_suspects(held, record)
                held = own_enis(self.instance.id, [*held, *suspects])
                self.note_targets(held, record)
            if self.aws.dry_run:
                self.rehearse()
            refusals = self.detach_targets(held)
            remaining = self.find_remaining(held)
            if not self.aws.dry_run:
                self.write_record(held, remaining, record)
            if refusals:
                raise nothing_left(refusals)
            if remaining:
                raise NotYet(f"{join_ids(remaining)} is being detached")
            self.lock.remember("")
            return list(self.targets.values())

    def rehearse(self) -> None:
        """Raise DryRun, unless there is something for EC2 to judge."""
        if not self.targets:
            raise DryRun("would do nothing: no such network interface is attached here")
        if all(eni.attachment_status == "detaching" for eni in self.targets.values()):
            raise DryRun(f"would wait: {join_ids(self.targets.values())} is being detached")

    def read_suspects(self, held: Sequence[Eni], record: Mapping[str, str]) -> list[Eni]:
        """What EC2 shows of the ENIs that may be here, though it does not list them here.

        Raises NotYet where it may show one late.
        """
        suspects: list[Eni] = []
        for eni in self.aws.enis_with_ids(self.suspected_ids(held, record)):
            if not self.is_target(eni, record):
                continue
            now = self.deadline.elapsed()
            unseen = now - self.unseen_since.setdefault(eni.id, now)
            if eni.is_free and (find_device(eni.mac) or unseen < GRACE):
                raise NotYet(f"{eni.id} was claimed here, and EC2 does not show it attached yet")
            suspects.append(eni)
        return suspects

    def suspected_ids(self, held: Sequence[Eni], record: Mapping[str, str]) -> set[str]:
        """The ENIs that a run here has attached, or has tried to, without those that are listed."""
        suspects = {self.lock.tried_for_state_file}
        if record.get("ATTACHMENT_ID", NULL) != NULL:
            suspects.add(recorded_eni(record, self.instance.id))
        return suspects - {eni.id for eni in held} - {""}

    def note_targets(self, held: Sequence[Eni], record: Mapping[str, str]) -> None:
        """Which ENIs to detach, and their gateways, which the state file keeps."""
        for eni in held:
            if eni.attachment and self.is_target(eni, record):
                self.targets[eni.attachment] = eni
                with contextlib.suppress(NotYet):
                    self.gateways[eni.attachment] = read_network(eni).gateway

    def refused_and_unlisted(self, held: Sequence[Eni]) -> list[Eni]:
        """The targets whose detach EC2 has refused, and which it does not list any more.

        Its list may be wrong, so the detach is asked for again: EC2 says then if they are gone.
        """
        held_ids = {eni.id for eni in held}
        unlisted: list[Eni] = []
        for eni in self.targets.values():
            if eni.attachment in self.refused and eni.id not in held_ids:
                unlisted.append(eni)
        return unlisted

    def is_target(self, eni: Eni, record: Mapping[str, str]) -> bool:
        """Whether the ENI is of the name, or one that this host attached under another name."""
        if eni.name and eni.name == self.instance.name:
            return True
        if self.named:
            return eni.id == record.get("ENI_ID") and record.get("ASG_NAME") == self.instance.name
        return eni.id in (record.get("ENI_ID"), self.lock.tried_for_state_file)

    def detach_targets(self, held: Sequence[Eni]) -> list[Failure]:
        """Have EC2 detach the targets; what it says of those that it refuses to detach."""
        refusals: list[Failure] = []
        for eni in held:
            try:
                if eni.attachment in self.targets:
                    self.detach(eni)
            except Failure as error:
                if not concerns_one_eni(error):
                    raise
                refusals.append(error)
        return refusals

    def find_remaining(self, held: Sequence[Eni]) -> list[Eni]:
        """The targets that EC2 still shows here, or whose devices are still there.

        An ENI that a waiting run of --attach has attached again meanwhile is not among them.
        """
        remaining = [eni for eni in held if eni.attachment in self.targets]
        held_ids = {eni.id for eni in held}
        for eni in self.targets.values():
            if eni.id not in held_ids and find_device(eni.mac):
                remaining.append(eni)
        return remaining

    def detach(self, eni: Eni) -> None:
        now = self.deadline.elapsed()
        if eni.attachment_status == "detaching" or now < self.ask_again_at.get(eni.attachment, now):
            return
        call = f"detach {eni.attachment}"
        self.refusals.check(call)
        self.refused.discard(eni.attachment)
        try:
            self.aws.detach(eni.attachment)
        except Failure as error:
            # Only these errors prove that EC2 has not begun. A denial does not: an attachment that
            # is gone has no tags, so a policy with tags in its condition denies its detach.
            if error.aws_code in THROTTLED or (is_refusal(error) and error.aws_code not in DENIED):
                self.refused.add(eni.attachment)
            if not is_refusal(error):
                raise
            raise self.refusals.note(call, about(eni, error)) from None
        self.ask_again_at[eni.attachment] = now + ASK_AGAIN

    def write_record(
        self, held: Sequence[Eni], remaining: Sequence[Eni], record: Mapping[str, str]
    ) -> None:
        """Say in the state file what is gone, unless that would be untrue."""
        recorded = record.get("ENI_ID", NULL)
        if any(eni.id == recorded for eni in held):
            return
        is_target = any(eni.id == recorded for eni in self.targets.values())
        if not is_target and has_attachment(record) and is_here(self.aws, self.instance, recorded):
            return  # it was attached under another name, and EC2 lists it late
        gone = self.gone_targets(remaining)
        recorded_and_gone = [eni for eni in gone if eni.id == recorded]
        if gone:
            eni = (recorded_and_gone or gone)[-1]
            values = self.values_after_detach(eni, record)
        elif remaining:
            return
        elif record:
            values = without_attachment(record)
        else:
            values = state_values(self.instance, None, None)
        if values != record:
            write_state_file(self.lock.state_file, values)

    def gone_targets(self, remaining: Sequence[Eni]) -> list[Eni]:
        remaining_ids = {eni.id for eni in remaining}
        return [eni for eni in self.targets.values() if eni.id not in remaining_ids]

    def values_after_detach(self, eni: Eni, record: Mapping[str, str]) -> dict[str, str]:
        """What the state file says after the ENI's detach. Its gateway stays there."""
        values = without_attachment(state_values(self.instance, eni, None))
        gateway = self.gateways.get(eni.attachment, NULL)
        if gateway == NULL and eni.id == record.get("ENI_ID"):
            gateway = record.get("GW", NULL)
        return {**values, "GW": gateway}


def recorded_eni(record: Mapping[str, str], instance: str) -> str:
    """The ENI of a state file that was written for this instance; empty where it was not."""
    if record.get("INSTANCE_ID") != instance or record.get("ENI_ID", NULL) == NULL:
        return ""
    return record["ENI_ID"]


# --- what EC2 refuses ---


ATTACH_ANYTHING = "attach anything"  # the call, where EC2's refusal is not about one ENI


class Refusal(NamedTuple):
    error: Failure
    pause: float
    until: float


class Refusals:
    """The calls that EC2 refused. Each may be repeated after a pause, which doubles each time."""

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline
        self.by_call: dict[str, Refusal] = {}

    def check(self, call: str) -> None:
        """Raise the call's last error again while its pause lasts."""
        refusal = self.by_call.get(call)
        if refusal and self.deadline.elapsed() < refusal.until:
            raise refusal.error.with_traceback(None)

    def last(self, call: str) -> Failure | None:
        """The error of the last time, also after its pause."""
        refusal = self.by_call.get(call)
        return refusal.error if refusal else None

    def note(self, call: str, error: Failure) -> Failure:
        """Keep the error, and return it. It is logged if its text is new."""
        first, longest = REFUSAL_PAUSES
        last = self.by_call.get(call)
        pause = min(last.pause * 2, longest) if last else first
        if last is None or str(last.error) != str(error):
            log.info("%s", error)
        self.by_call[call] = Refusal(error, pause, self.deadline.elapsed() + pause)
        return error


def nothing_left(refusals: Sequence[Failure], waiting_for: Sequence[str] = ()) -> Failure:
    """The Failure for a round in which EC2 refused each call; it names each ENI."""
    reasons = [str(error) for error in refusals] + list(waiting_for)
    if waiting_for or any(isinstance(error, NotYet) for error in refusals):
        return NotYet(list_some(reasons))
    return NeedsPerson(list_some(reasons))


def about(eni: Eni, error: Failure) -> Failure:
    """The same error, in words that name the ENI."""
    if error.aws_code == IN_USE:
        return type(error)(f"{eni.id} was taken by another host meanwhile", error.aws_code)
    return type(error)(f"{eni.id}: {error}", error.aws_code)


def is_refusal(error: Failure) -> bool:
    """Whether AWS understood the call and said no, so that it had no effect.

    Credentials and the clock are not what the call is about.
    """
    if isinstance(error, Overloaded):
        return False
    return error.aws_code != "" and error.aws_code not in STALE_CREDENTIALS


def concerns_one_eni(error: Failure) -> bool:
    """Whether EC2 refused a call because of the ENI in it, so that another ENI may do."""
    return is_refusal(error) and error.aws_code not in INSTANCE_NOT_READY | {NO_FREE_SLOT}


def another_may_do(step: Step, error: Failure) -> bool:
    """Whether EC2 may accept another step of the round, although it refused this one."""
    if step.action == "release" and error.aws_code in INSTANCE_NOT_READY:
        return True  # the instance of a detach is the holder, and the next ENI has another
    return concerns_one_eni(error)


def aws_failure(action: str, code: str, status: int, message: str, origin: str = "") -> Failure:
    """The Failure for an error answer of AWS. origin: of keys that cannot be renewed."""
    # EC2 uses this code for many errors; only the message tells them apart.
    if code == "InvalidParameterValue" and "in use" in message:
        code = IN_USE
    elif code == "InvalidParameterValue" and "device index" in message:
        code = INDEX_TAKEN
    text = f"{HINTS.get(code, '')}{action}: {code}: {one_line(message)}"
    if origin:
        text += f" (the keys are from {origin})"
    # EC2 also says this of a resource that is somebody else's. The describe before an attach or a
    # detach has just proved the credentials.
    if code == "AuthFailure" and not action.startswith("Describe"):
        code = NOT_PERMITTED_HERE
    if code in DENIED:
        reason = message.partition("Encoded authorization failure message")[0]
        permission = f"{service_of(action)}:{action}"
        return NeedsPerson(f"not allowed: {permission}: {one_line(reason)}", code)
    if origin and code in INVALID_KEYS:
        return NeedsPerson(text, code)
    if code in STALE_CREDENTIALS | INSTANCE_NOT_READY | ENI_NOT_READY:
        return NotYet(text, code)
    # botocore makes a code of the HTTP status where the body is not AWS's.
    if code in THROTTLED or status >= 500 or status == 429 or code.isdigit():
        return Overloaded(text, code)
    return NeedsPerson(text, code)


def service_of(action: str) -> str:
    if action.startswith("AssumeRole"):
        return "sts"
    return "autoscaling" if "AutoScaling" in action else "ec2"


# --- who this instance is ---


def see_instance(imds: Imds) -> Instance:
    """What IMDS says of this instance. Raises a Failure."""
    return Instance(
        id=imds.get("meta-data/instance-id", r"i-[0-9a-f]{8,17}"),
        zone=imds.get("meta-data/placement/availability-zone", ZONE_OR_REGION),
        region=imds.get("meta-data/placement/region", ZONE_OR_REGION),
    )


def identify(
    instance: Instance,
    aws: Aws,
    imds: Imds,
    options: argparse.Namespace,
    deadline: Deadline,
    record: Mapping[str, str] | None = None,
) -> Instance:
    """This instance with its name, and for --attach with its life-cycle state. Raises a Failure.

    record: the state file, for --detach. If it was written for this instance, it tells the name
    where no group does.
    """
    ignore_other_regions(instance.region)
    # IMDS has the tag only where instance tags in metadata are on; it saves an API call.
    tag = "meta-data/tags/instance/aws:autoscaling:groupName"
    name = options.name or imds.hint(tag, r"[^\x00-\x1f\ufffd]{1,255}")
    instance = instance._replace(name=name)
    if name and options.verb is not attach:
        return instance
    target = target_state(imds) if name else ""
    if target == "InService":
        return instance._replace(state=target)
    if record and recorded_eni(record, instance.id):
        try:
            return add_group(instance, aws, options.name, target)
        except Failure:
            recorded = record.get("ASG_NAME", NULL)
            return instance._replace(name="" if recorded == NULL else recorded)
    return wait(lambda: add_group(instance, aws, options.name, target), deadline, POLL_EC2)


def ignore_other_regions(region: str) -> None:
    """An ENI can be attached in the instance's own region only: no other can be meant."""
    for variable in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        value = os.environ.get(variable, region)
        if value != region:
            log.info(
                "ignoring %s=%s, because this instance is in %s", variable, quoted(value), region
            )


def target_state(imds: Imds) -> str:
    """The life-cycle state that the instance is to have, as IMDS has it; empty if IMDS has none.

    An instance for which it has none can be in a group all the same.
    """
    return imds.hint("meta-data/autoscaling/target-lifecycle-state", r"[A-Za-z:]{1,40}")


def add_group(instance: Instance, aws: Aws, name: str | None, target: str) -> Instance:
    """The instance with its group's name, unless it has a name, and with its life-cycle state.

    target: the state that IMDS says the instance is to have, or none.
    """
    member = aws.members({instance.id}).get(instance.id)
    if member is None and name is None:
        aws.enis_of(instance.id)  # raises for the credentials of another account
        raise NeedsPerson(f"{instance.id} is in no Auto Scaling group, and no -n NAME was given")
    if member is None and target not in ("", "Detached"):
        raise NotYet(f"IMDS says {target} of {instance.id}, and Auto Scaling does not list it yet")
    if member is None:
        return instance
    if not member.group or not member.state:
        raise Overloaded(
            f"DescribeAutoScalingInstances: an answer without {instance.id}'s group or state"
        )
    return instance._replace(name=instance.name or member.group, state=member.state)


# --- time ---


class Deadline:
    """When this run is over. No wait outlives it."""

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.seconds = seconds
        self.clock = clock
        self.sleep = sleep
        self.start = clock()
        self.doing = "starting"  # for the message of a run that is cut off
        self.next_report = FIRST_REPORT

    def elapsed(self) -> float:
        return self.clock() - self.start

    def remaining(self) -> float:
        return max(0.0, self.seconds - self.elapsed())

    def enforce(self) -> None:
        """End the process if it is still there just after the deadline.

        A thread does it, because no signal handler of Python's runs while the main thread is stuck
        in a C function such as getaddrinfo.
        """

        def end() -> None:
            try:
                log.info("%s; gave up after %g s", self.doing, self.seconds)
            finally:
                os._exit(Failure.exit_code)

        timer = threading.Timer(self.remaining() + KILL_AFTER, end)
        timer.daemon = True
        timer.start()

    def pause(self, seconds: float, reason: str) -> None:
        """Sleep, and say why if the run has taken long. Raises Failure at the deadline."""
        self.doing = reason
        if self.remaining() <= seconds:
            self.sleep(self.remaining())
            raise Failure(f"{reason}; gave up after {self.seconds:g} s")
        if self.elapsed() >= self.next_report:
            log.info("waiting, %.0f s of %g s: %s", self.elapsed(), self.seconds, reason)
            self.next_report = self.elapsed() * 2
        self.sleep(seconds)


def wait(
    attempt: Callable[[], T],
    deadline: Deadline,
    poll: Poll,
    patience: float = float("inf"),
    pace: Pace | None = None,
) -> T:
    """What attempt returns; it is tried again as long as it raises NotYet.

    pace: of an earlier wait for the same, which this one goes on with.
    Raises its last error: Failure at once, NeedsPerson after GRACE, NotYet when patience is over,
    and at the deadline Failure with the same reason.
    """
    pace = pace or Pace(poll)
    started = deadline.elapsed()
    grace_ends: float | None = None
    while True:
        try:
            return attempt()
        except NeedsPerson as error:
            now = deadline.elapsed()
            if grace_ends is None:
                grace_ends = min(now + GRACE, deadline.seconds)
                grace_pause = poll.quick
            if now + poll.quick > grace_ends:
                raise
            # The pauses double, because eni.service repeats all this. The last one is cut, so that
            # one more attempt falls just before the grace ends.
            pause = min(grace_pause, max(poll.quick, grace_ends - now - poll.quick))
            grace_pause *= 2
            reason = str(error)
        except NotYet as error:
            if deadline.elapsed() - started >= patience:
                raise
            grace_ends = None
            pause = pace.seconds(error, deadline.elapsed())
            reason = str(error)
        deadline.pause(pause, reason)


class Pace:
    """How long a wait pauses: a short time at first, longer later, and longer under overload."""

    def __init__(self, poll: Poll) -> None:
        self.poll = poll
        self.reason = ""  # AWS's error code, whose words may have the time in them, or the text
        self.quick_until = 0.0
        self.back_off = 0.0

    def seconds(self, error: NotYet, now: float) -> float:
        import random

        reason = error.aws_code or str(error)
        # An overload says nothing new of what is waited for.
        is_news = not self.reason or not isinstance(error, Overloaded)
        if reason != self.reason and is_news:
            self.reason = reason
            self.quick_until = now + QUICK_PHASE
        usual = self.poll.quick if now < self.quick_until else self.poll.slow
        # All hosts of an account share its rate limits. So each slows down fast and speeds up
        # little by little, at random, because otherwise all would come back together.
        if isinstance(error, Overloaded):
            self.back_off = min(max(self.back_off, usual) * 2, self.poll.slowest)
        else:
            self.back_off = self.back_off * 0.9
        longest = max(self.back_off, usual)
        return random.uniform(max(longest / 2, usual), longest)


# --- AWS ---


class Member(NamedTuple):
    """An instance in an Auto Scaling group. What AWS leaves out is empty."""

    group: str
    state: str


class Aws:
    """EC2 and Auto Scaling by boto3. Each call is made once, because wait() is what tries again.

    botocore's own retries would sleep past the deadline, and hide the reason.
    """

    def __init__(self, region: str, deadline: Deadline, dry_run: bool, imds: Imds) -> None:
        self.region = region
        self.deadline = deadline
        self.dry_run = dry_run
        self.imds = imds
        self.session: Any = None
        self.loader: Any = None  # of botocore's data
        self.clients: dict[str, Any] = {}
        self.credentials_pause = CREDENTIAL_PAUSES[0]
        self.credentials_until = 0.0  # not before then are new ones fetched
        self.imds_has_credentials = False  # as it had when boto3 last found none

    def enis_named(self, name: str) -> list[Eni]:
        """All ENIs with exactly that Name tag, in all zones of the region."""
        enis = self.enis("tag:Name", [escape_filter(name)])
        return [eni for eni in enis if eni.name == name]

    def enis_of(self, instance: str) -> list[Eni]:
        """What the instance holds that could be moved.

        Raises NeedsPerson if EC2 does not even show the primary ENI, because then the credentials
        belong to another account.
        """
        enis = self.enis("attachment.instance-id", [instance])
        if not enis:
            raise NeedsPerson(
                f"EC2 shows no network interface of {instance}, not even its primary one:"
                " are these credentials of its account?"
            )
        return own_enis(instance, enis)

    def enis_with_ids(self, ids: Collection[str]) -> list[Eni]:
        """The ENIs with these ids, as far as they exist."""
        if not ids:
            return []
        return self.enis("network-interface-id", sorted(ids))

    def enis(self, filter_name: str, values: list[str]) -> list[Eni]:
        by = [{"Name": filter_name, "Values": values}]
        # EC2 refuses this action without a page size in an account that has very many ENIs.
        items = self.describe("DescribeNetworkInterfaces", "NetworkInterfaces", 1000, Filters=by)
        enis = [parse_eni(item) for item in dicts(items)]
        return [eni for eni in enis if eni.id]

    def members(self, instances: Collection[str]) -> dict[str, Member]:
        """Those of the instances that are in an Auto Scaling group."""
        members: dict[str, Member] = {}
        ids = sorted(instances)
        for start in range(0, len(ids), 50):  # Auto Scaling takes 50 at a time
            batch = ids[start : start + 50]
            items = self.describe(
                "DescribeAutoScalingInstances", "AutoScalingInstances", 50, InstanceIds=batch
            )
            for item in dicts(items):
                member = Member(
                    text_of(item, "AutoScalingGroupName"), text_of(item, "LifecycleState")
                )
                members[text_of(item, "InstanceId")] = member
        return members

    def attach(self, eni: str, instance: str) -> str:
        """Attach the ENI at the first free device index; the attachment's id."""
        for index in DEVICE_INDEXES:
            try:
                answer = self.call(
                    "AttachNetworkInterface",
                    NetworkInterfaceId=eni,
                    InstanceId=instance,
                    DeviceIndex=index,
                    NetworkCardIndex=0,
                )
            except NotYet as error:
                if error.aws_code != INDEX_TAKEN:
                    raise
                continue
            if "AttachmentId" not in answer:
                raise Overloaded("AttachNetworkInterface: an answer without AttachmentId")
            return str(answer["AttachmentId"])
        raise NeedsPerson(f"{instance} has no free device index below {DEVICE_INDEXES.stop}")

    def ask_to_attach(self, eni: str, instance: str) -> None:
        """Return if IAM permits to attach the ENI. Raises Failure."""
        with contextlib.suppress(DryRun):
            self.call(
                "AttachNetworkInterface",
                NetworkInterfaceId=eni,
                InstanceId=instance,
                DeviceIndex=DEVICE_INDEXES.start,
                DryRun=True,
            )

    def detach(self, attachment: str, force: bool = False) -> None:
        """Begin to detach. To find it gone already is as good."""
        arguments = {"Force": True} if force else {}
        try:
            self.call("DetachNetworkInterface", AttachmentId=attachment, **arguments)
        except NotYet as error:
            if error.aws_code != DETACHED_ALREADY:
                raise

    def call(self, action: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a call that changes something; with --dry-run it raises DryRun instead."""
        from botocore import xform_name

        if self.dry_run:
            arguments["DryRun"] = True
        with self.api_call(action, arguments):
            client = self.client(service_of(action))
            parameters = client.meta.service_model.operation_model(action).input_shape.members
            # Debian 11's botocore has no network cards. Where it has them, card 0 must be named:
            # without it EC2 was seen to look at the indexes of another card (cilium pull 42512).
            if "NetworkCardIndex" not in parameters:
                arguments.pop("NetworkCardIndex", None)
            answer: dict[str, Any] = getattr(client, xform_name(action))(**arguments)
        return answer

    def describe(
        self, action: str, key: str, page_size: int, **arguments: Any
    ) -> list[dict[str, Any]]:
        """What the answer has under key, from all of its pages."""
        from botocore import xform_name

        items: list[dict[str, Any]] = []
        with self.api_call(action, arguments):
            paginator = self.client(service_of(action)).get_paginator(xform_name(action))
            pages = paginator.paginate(**arguments, PaginationConfig={"PageSize": page_size})
            for page in pages:
                if key not in page:  # well-formed, but not AWS's: it does not say what exists
                    raise Overloaded(f"{action}: an answer without {key}")
                items += page[key]
        return items

    @contextlib.contextmanager
    def api_call(self, action: str, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Around an API call: says what is being done, and turns all errors into ours."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
        from botocore.parsers import ResponseParserError

        described = ", ".join(f"{key} {value}" for key, value in arguments.items())
        self.deadline.doing = f"{action} ({described})"
        log.debug("%s", self.deadline.doing)
        try:
            yield
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            details = error.response.get("Error", {})  # missing where the body is not AWS's
            code = details.get("Code") or str(status)
            if code == "DryRunOperation":
                raise DryRun(f"would call {self.deadline.doing}: permitted") from None
            origin = ""
            if code in STALE_CREDENTIALS:
                origin = self.origin_of_keys()
                self.forget_credentials()
            # To get credentials, botocore may make a call of its own, such as AssumeRole.
            asked = error.operation_name
            message = details.get("Message") or ""
            raise aws_failure(asked, code, status, message, origin) from None
        except NoCredentialsError:
            self.forget_credentials()
            raise self.why_no_credentials() from None
        except settings_errors() as error:
            raise NeedsPerson(f"boto3: {one_line(error)}") from None
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            # A profile's credential_process, or the file of a web identity's token.
            raise NeedsPerson(f"boto3: {error.filename}: {error.strerror}") from None
        except RuntimeError as error:
            # So botocore says that the credentials which it has just fetched have expired.
            if "expired" not in str(error):
                raise
            self.forget_credentials()
            raise NotYet(f"is this host's clock set? {action}: {one_line(error)}") from None
        # LookupError and the like: botocore trips over answers that are not AWS's, or IMDS's.
        except (BotoCoreError, ResponseParserError, LookupError, TypeError, ValueError) as error:
            raise Overloaded(f"{action}: {one_line(error)}") from None

    def client(self, service: str) -> Any:
        import boto3
        import botocore.session
        from botocore.config import Config

        if self.session is None:
            core = botocore.session.Session()
            # The loader keeps the models of the APIs, 6 MiB. All sessions can share it.
            if self.loader is not None:
                core.register_component("data_loader", self.loader)
            self.loader = core.get_component("data_loader")
            self.session = boto3.session.Session(botocore_session=core, region_name=self.region)
        if service not in self.clients:
            config = Config(connect_timeout=5, read_timeout=10, retries={"max_attempts": 0})
            try:
                self.clients[service] = self.session.client(service, config=config)
            except json.JSONDecodeError:
                raise  # of an answer of IMDS
            except ValueError as error:
                # Only settings have been read: AWS_ENDPOINT_URL, AWS_METADATA_SERVICE_TIMEOUT.
                raise NeedsPerson(f"boto3 cannot use its settings: {one_line(error)}") from None
        return self.clients[service]

    def origin_of_keys(self) -> str:
        """Where boto3 has found keys that it cannot renew; empty for those of a role."""
        credentials = self.session.get_credentials() if self.session else None
        return KEYS_OF_A_PERSON.get(getattr(credentials, "method", ""), "")

    def forget_credentials(self) -> None:
        """Have the next call fetch new ones, but not at every poll of a long wait."""
        now = self.deadline.elapsed()
        if now < self.credentials_until:
            return
        self.drop_session()
        self.credentials_until = now + self.credentials_pause
        self.credentials_pause = min(self.credentials_pause * 2, CREDENTIAL_PAUSES[1])

    def drop_session(self) -> None:
        self.session = None
        self.clients = {}

    def why_no_credentials(self) -> Failure:
        """Why boto3 has none, as IMDS tells it. Drops the session if IMDS has them by now."""
        if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
            return NeedsPerson("no credentials: AWS_EC2_METADATA_DISABLED keeps boto3 from IMDS")
        folder = "meta-data/iam/security-credentials/"
        role = self.imds.get_once(folder, r"[\w+=,.@-]+", optional=True)
        if not role:
            return NeedsPerson("no credentials: has the instance an IAM instance profile?")
        answer = self.imds.get_once(folder + role, r"(?s)\s*\{.*\}\s*", optional=True)
        try:
            document = json.loads(answer or "{}")
        except ValueError:
            document = {}
        code = str(document.get("Code", "no answer"))
        if code == "Success":
            # They have come since boto3 asked. So the pause that began without them is over, once.
            if not self.imds_has_credentials:
                self.drop_session()
            self.imds_has_credentials = True
            return Overloaded(f"boto3 does not have the credentials of the role {role} yet")
        self.imds_has_credentials = False
        reason = f"IMDS has no credentials of the role {role}: {quoted(code)}"
        if "Message" in document:
            reason += f": {one_line(document['Message'])}"
        # "EC2 cannot assume the role": its trust policy, or the role itself, is missing.
        if code.startswith("AssumeRole"):
            return NeedsPerson(reason)
        return Overloaded(reason)


def settings_errors() -> tuple[type[Exception], ...]:
    """boto3's errors about its own settings: AWS_PROFILE, a configuration file, half a key."""
    from botocore import exceptions

    names = (
        "ConfigNotFound",
        "ConfigParseError",
        "InvalidChecksumConfigError",
        "InvalidConfigError",
        "InvalidDefaultsMode",
        "InvalidIMDSEndpointError",
        "InvalidIMDSEndpointModeError",
        "InvalidMaxRetryAttemptsError",
        "InvalidRetryConfigurationError",
        "InvalidRetryModeError",
        "InvalidSTSRegionalEndpointsConfigError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "SSOError",
        "TokenRetrievalError",
        "UnknownCredentialError",
    )
    # Debian 11's botocore does not have them all.
    return tuple(getattr(exceptions, name) for name in names if hasattr(exceptions, name))


def parse_eni(item: Mapping[str, Any]) -> Eni:
    """The ENI of an item in EC2's answer. One that is odd has empty fields, and is not usable."""
    attachment = item.get("Attachment")
    # EC2 may go on to show an attachment that is over.
    if not isinstance(attachment, dict) or text_of(attachment, "Status") == "detached":
        attachment = {}
    tags = {text_of(tag, "Key"): text_of(tag, "Value") for tag in dicts(item.get("TagSet"))}
    addresses = [text_of(item, "PrivateIpAddress")]
    for address in dicts(item.get("Ipv6Addresses")):
        addresses.append(text_of(address, "Ipv6Address"))
    owner = text_of(attachment, "InstanceOwnerId")
    service = ""
    if item.get("RequesterManaged"):
        service = text_of(item, "RequesterId") or "an AWS service"
    if owner and not owner.isdigit():
        service = owner  # amazon-elb, amazon-aws …; an account is a number
    return Eni(
        id=text_of(item, "NetworkInterfaceId"),
        mac=text_of(item, "MacAddress").lower(),
        zone=text_of(item, "AvailabilityZone"),
        ip=first_address(addresses),
        name=tags.get("Name", ""),
        fqdn=tags.get("FQDN", ""),
        status=text_of(item, "Status"),
        interface_type=text_of(item, "InterfaceType"),
        service=service,
        holder=text_of(attachment, "InstanceId"),
        attachment=text_of(attachment, "AttachmentId"),
        attachment_status=text_of(attachment, "Status"),
        device_index=number_of(attachment, "DeviceIndex", -1),
        card_index=number_of(attachment, "NetworkCardIndex", 0),
        since=text_of(attachment, "AttachTime"),
        delete_on_termination=bool(attachment.get("DeleteOnTermination")),
    )


def text_of(item: Mapping[str, Any], key: str) -> str:
    """The member of an answer as text; empty where it is missing."""
    value = item.get(key)
    return "" if value is None else str(value)


def number_of(item: Mapping[str, Any], key: str, default: int) -> int:
    value = item.get(key)
    return value if isinstance(value, int) else default


def first_address(addresses: Iterable[str]) -> str:
    """The first that is an IP address, in the kernel's spelling; empty where none is."""
    import ipaddress

    for address in addresses:
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(address))
    return ""


def life_cycle_states(instances: Iterable[str], members: Mapping[str, Member]) -> dict[str, str]:
    """The life-cycle state of each instance, without those for which Auto Scaling left it out."""
    states: dict[str, str] = {}
    for instance in instances:
        state = members[instance].state if instance in members else NO_GROUP
        if state:
            states[instance] = state
    return states


def escape_filter(value: str) -> str:
    """The value as EC2's filters take it literally: * and ? are wildcards, \\ escapes."""
    return re.sub(r"([*?\\])", r"\\\1", value)


def prepare_botocore() -> None:
    """Have botocore ask IMDS for credentials patiently, and never through a proxy.

    It tries once and for 1 s, which is too little at boot.
    """
    for variable, patient in (
        ("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "3"),
        ("AWS_METADATA_SERVICE_TIMEOUT", "2"),
    ):
        if not os.environ.get(variable):  # botocore fails at one that is empty
            os.environ[variable] = patient
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if others.strip() == "*":  # for all hosts, if it stands alone
        return
    host = imds_endpoint().split("//")[-1].rsplit("/")[0]
    os.environ["no_proxy"] = f"{others},{host}"


def check_ca_file() -> None:
    """Raise NeedsPerson if boto3 could not use the CA file that the environment names.

    boto3 would call it a failure of the connection, for which waiting might help.
    """
    import ssl

    for variable in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        path = os.environ.get(variable)
        if not path:
            continue
        try:
            ssl.create_default_context(cafile=path)
        except OSError as error:  # ssl.SSLError among them: the file has no certificate
            raise NeedsPerson(
                f"cannot read the CA file {path} of {variable}: {error.strerror}"
            ) from None
        return


# --- the instance metadata service ---


class Imds:
    """Version 2; version 1 only where there is no token path.

    botocore's own client of IMDS falls back to version 1 for other reasons, too, and has no
    deadline.
    """

    def __init__(self, deadline: Deadline) -> None:
        import requests

        # Kept, because requests is imported only here.
        self.address_errors = (
            requests.exceptions.MissingSchema,
            requests.exceptions.InvalidSchema,
            requests.exceptions.InvalidURL,
        )
        self.base = f"{imds_endpoint()}/latest/"
        self.deadline = deadline
        self.session = requests.Session()
        self.session.trust_env = False  # a proxy would answer for its own instance
        self.request_error = requests.RequestException
        self.token: str | None = None  # None: not asked for yet; empty: there is none

    def get(self, path: str, pattern: str) -> str:
        """The value at path, as soon as IMDS has one that matches."""
        return wait(lambda: self.get_once(path, pattern), self.deadline, POLL_LOCAL)

    def hint(self, path: str, pattern: str) -> str:
        """A value that saves an API call; empty where IMDS has none, or an odd one."""
        anything = r"(?s).*"
        value = wait(lambda: self.get_once(path, anything, True), self.deadline, POLL_LOCAL)
        return value if re.fullmatch(pattern, value) else ""

    def get_once(self, path: str, pattern: str, optional: bool = False) -> str:
        """As get, but raises Overloaded where IMDS does not answer with such a value yet.

        Empty where it is optional, and IMDS has none.
        """
        if self.token is None:
            self.token = self.fetch_token()
        headers = {"X-aws-ec2-metadata-token": self.token} if self.token else {}
        status, body = self.request("GET", path, headers)
        if status == 401:
            self.token = None  # it has expired: the next attempt fetches another
        if status == 404 and optional:
            return ""
        if status == 404:
            raise Overloaded(f"IMDS at {self.base} has no {path}")
        return self.checked(path, pattern, status, body)

    def fetch_token(self) -> str:
        """A token for five minutes; empty where IMDS has no token path."""
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "300"}
        status, body = self.request("PUT", "api/token", lifetime)
        if status == 403:
            raise NeedsPerson(f"IMDS at {self.base} is switched off (403)")
        if status in (404, 405):
            return ""
        return self.checked("api/token", r"[!-~]+", status, body)

    def request(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str]:
        url = self.base + path
        self.deadline.doing = f"IMDS, {method} {url}"
        try:
            answer = self.session.request(
                method,
                url,
                headers=dict(headers),
                timeout=min(2.0, self.deadline.remaining() + 0.1),
                allow_redirects=False,
            )
            expected = int(answer.headers.get("Content-Length", 0))
        except self.address_errors as error:
            raise NeedsPerson(
                f"AWS_EC2_METADATA_SERVICE_ENDPOINT is no address: {one_line(error)}"
            ) from None
        except (self.request_error, ValueError) as error:
            raise Overloaded(f"IMDS, {method} {url}: {type(error).__name__}") from None
        log.debug("IMDS, %s %s: %s", method, url, answer.status_code)
        if len(answer.content) < expected:  # requests does not mind, nor does urllib3 before 2.0
            raise Overloaded(f"IMDS, {method} {url}: the answer was cut off")
        if answer.status_code == 200 and "html" in answer.headers.get("Content-Type", ""):
            raise Overloaded(f"IMDS, {method} {url}: the answer is HTML")
        return answer.status_code, answer.content.decode("utf-8", "replace")

    def checked(self, path: str, pattern: str, status: int, body: str) -> str:
        if status == 200 and re.fullmatch(pattern, body):
            return body
        raise Overloaded(f"IMDS at {self.base}{path} answered {status} {quoted(body[:40])}")


def imds_endpoint() -> str:
    """As botocore finds it (AWS SDKs and Tools Reference Guide, "IMDS credential provider")."""
    mode = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").lower()
    default = "http://[fd00:ec2::254]" if mode == "ipv6" else "http://169.254.169.254"
    return (os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or default).rstrip("/")


# --- the kernel ---


def find_device(mac: str) -> str | None:
    """The device with that MAC address, whatever its name: eth1, ens6, enX1."""
    try:
        devices = sorted(os.listdir("/sys/class/net"))
    except OSError as error:
        raise Failure(f"cannot list /sys/class/net: {error.strerror}") from None
    for device in devices:
        path = f"/sys/class/net/{device}"
        try:
            with open(f"{path}/address") as file:
                address = file.read().strip()
            # A VLAN or a bridge on the ENI has its MAC, too, and links to what is below it.
            stacked = any(entry.startswith("lower_") for entry in os.listdir(path))
        except OSError:  # it went while we looked, or is no device (bonding_masters)
            continue
        if address == mac and not stacked:
            return device
    return None


def read_network(eni: Eni) -> Network:
    """The ENI's device, up and with the ENI's address. Raises NotYet."""
    device = find_device(eni.mac)
    if device is None:
        raise NotYet(f"no device with {eni.id}'s MAC address {eni.mac} has appeared")
    # `ip` shows an address in a VRF, too, to which a socket could not be bound.
    for address in read_addresses(device):
        unusable = address.get("tentative") or address.get("dadfailed")
        if same_address(address.get("local"), eni.ip) and not unusable:
            prefix = number_of(address, "prefixlen", -1)
            return Network(device, prefix, gateway_of(device, eni.ip, prefix))
    raise NotYet(f"{device} is not up with {eni.id}'s address {eni.ip}")


def is_up(device: str) -> bool:
    try:
        with open(f"/sys/class/net/{device}/flags", encoding="ascii") as file:
            return int(file.read(), 16) & IFF_UP != 0
    except (OSError, ValueError):
        return False


def read_addresses(device: str) -> list[dict[str, Any]]:
    """The addresses on the device, as `ip` lists them; none if it is down."""
    addresses: list[dict[str, Any]] = []
    if not is_up(device):  # `ip` costs a hundred times as much
        return addresses
    links = run_ip("addr", "show", "dev", device)
    if links and not dicts(links):
        raise NotYet(f"ip -json addr show dev {device}: {quoted(str(links))} is no list of links")
    for link in dicts(links):
        addresses += dicts(link.get("addr_info"))
    return addresses


def has_rule(ip: str) -> bool:
    """Whether a routing rule, as add_routes.py makes it, is for packets from that address."""
    rules = run_ip("-6" if ":" in ip else "-4", "rule")
    return any(same_address(rule.get("src"), ip) for rule in dicts(rules))


def gateway_of(device: str, ip: str, prefix: int) -> str:
    """A VPC's router has the first address of every IPv4 subnet, and the same one in IPv6.

    Raises NotYet for a prefix length that is none.
    """
    import ipaddress

    try:
        interface = ipaddress.ip_interface(f"{ip}/{prefix}")
    except ValueError:
        raise NotYet(f"ip -json addr show dev {device}: {ip} has no prefix length") from None
    if interface.version == 6:
        return IPV6_ROUTER
    return str(interface.network.network_address + 1)


def same_address(one: object, other: str) -> bool:
    """Compare as addresses: there is more than one way to write an IPv6 address."""
    return isinstance(one, str) and first_address([one]) == other


def dicts(value: object) -> list[dict[str, Any]]:
    """The objects in a list of JSON; what is odd is left out."""
    if not isinstance(value, list):
        return []
    return [item for item in value if isinstance(item, dict)]


def run_ip(*arguments: str) -> Any:
    """What `ip -json ARGUMENTS` says. Raises NotYet with the kernel's words."""
    command = ["ip", "-json", *arguments]
    log.debug("%s", " ".join(command))
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=5
        )
        if done.returncode == 0:
            return json.loads(done.stdout or "[]")
        problem = done.stderr
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    raise NotYet(f"{' '.join(command)}: {one_line(problem)}")


# --- what is kept on disk ---

STATE_KEYS = ("FQDN", "IP", "GW", "DEVICE", "ASG_NAME", "INSTANCE_ID", "ENI_ID", "ATTACHMENT_ID")
NULL = "null"  # in the state file: there is none


def state_values(instance: Instance, eni: Eni | None, network: Network | None) -> dict[str, str]:
    """What the state file says of an attachment, or of an instance without an ENI."""
    values = dict.fromkeys(STATE_KEYS, NULL)
    values.update(FQDN="", ASG_NAME=instance.name, INSTANCE_ID=instance.id)
    if eni:
        values.update(FQDN=eni.fqdn, IP=eni.ip, ENI_ID=eni.id, ATTACHMENT_ID=eni.attachment)
    if network:
        values.update(GW=network.gateway, DEVICE=network.device)
    return values


def without_attachment(values: Mapping[str, str]) -> dict[str, str]:
    """What the state file says when nothing is attached any more."""
    complete = {key: values.get(key, NULL) for key in STATE_KEYS}
    return {**complete, "DEVICE": NULL, "ATTACHMENT_ID": NULL}


def has_attachment(values: Mapping[str, str]) -> bool:
    return values.get("ATTACHMENT_ID", NULL) != NULL or values.get("DEVICE", NULL) != NULL


def read_state_file(path: str) -> dict[str, str]:
    """What the state file says; empty where there is none that can be read as one."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            words = shlex.split(file.read(65536), comments=True)
    except (OSError, ValueError):
        return {}
    pairs = [word.partition("=") for word in words]
    return {key: value for key, _, value in pairs if key in STATE_KEYS}


def write_state_file(path: str, values: Mapping[str, str]) -> None:
    """Replace it whole, so that a reader sees the old one or the new. Raises Failure."""
    path = os.path.realpath(path)
    temporary = f"{path}.new"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # left by a run that was killed
        with open(temporary, "x", encoding="utf-8", errors="surrogateescape", newline="") as file:
            os.fchmod(file.fileno(), 0o644)
            for key, value in values.items():
                file.write(f"{key}={quote_for_shell(value)}\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise Failure(f"cannot write the state file {path}: {error.strerror}") from None


def quote_for_shell(value: str) -> str:
    """The value as sh, bash and systemd's EnvironmentFile all read it back, and never run it.

    Without control characters, except tab and newline, and without Unicode's noncharacters: systemd
    ignores a variable that has one of the former, and the whole file for one of the latter.
    """
    value = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufdd0-\ufdef]", "", value)
    value = "".join(c for c in value if not f"{ord(c):04x}".endswith(("fffe", "ffff")))
    return shlex.quote(value) if value else ""


class Lock:
    """Lets one step in at a time, and remembers the ENI that a run here last tried to attach.

    It is never held across a wait: whoever runs this program by hand is let in at once.

    EC2 shows an attachment late. To a run that comes right after another, or after one that was
    killed, our own ENI may look free, and attaching it fails as "in use". Without this note the run
    would think that another host had taken it, and take a second ENI of the pool.
    """

    def __init__(self, path: str, options: argparse.Namespace, deadline: Deadline) -> None:
        self.path = path
        self.state_file = options.state_file
        self.deadline = deadline
        self.tried = ""
        self.tried_for_state_file = ""  # the same, if it was for the state file of this run
        self.file: int | None = None
        if options.dry_run:
            return  # it changes nothing, and waits for nobody
        try:
            self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except PermissionError as error:
            raise NeedsPerson(f"cannot open {path}: {error.strerror}; are you root?") from None
        except OSError as error:
            raise Failure(f"cannot open {path}: {error.strerror}") from None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        if self.file is None:
            yield
            return
        wait(self.take, self.deadline, POLL_LOCAL)
        try:
            self.recall()
            yield
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)

    def take(self) -> None:
        assert self.file is not None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotYet(f"another run of eni_ctl.py holds {self.path}") from None

    def recall(self) -> None:
        """Read the note: one line, an ENI and a state file."""
        assert self.file is not None
        line, _, _ = os.pread(self.file, 8192, 0).decode("utf-8", "surrogateescape").partition("\n")
        self.tried, _, state_file = line.strip().partition(" ")
        self.tried_for_state_file = self.tried if state_file == self.state_file else ""

    def remember(self, eni: str) -> None:
        """Write the note, in one call, so that it is whole even after a kill."""
        if self.file is None:
            return
        note = f"{eni} {self.state_file}\n" if eni else "\n"
        try:
            os.pwrite(self.file, note.encode("utf-8", "surrogateescape"), 0)
        except OSError as error:  # /run is full: to attach matters more than to remember it
            log.info("cannot write %s: %s", self.path, error.strerror)
        self.tried = self.tried_for_state_file = eni


# --- what the user reads ---


def quoted(value: str) -> str:
    """Text from elsewhere for a message: in quotes, on one line, in plain ASCII."""
    return json.dumps(value[:300])


def one_line(message: object) -> str:
    return json.dumps(" ".join(str(message).split())[:600])[1:-1]


def join_ids(enis: Iterable[Eni]) -> str:
    return ", ".join(sorted({eni.id for eni in enis}))


def list_some(clauses: Sequence[str]) -> str:
    """The first few, so that the line stays readable."""
    shown = "; ".join(clauses[:5])
    more = len(clauses) - 5
    return f"{shown}; and {more} more" if more > 0 else shown


def add_network(report: dict[str, Any], eni: Eni) -> int:
    """Add the kernel's part to the report of --status; the exit code."""
    try:
        report.update(read_network(eni)._asdict(), ip=eni.ip)
        report["rule"] = has_rule(eni.ip)
    except NotYet as error:
        report["problem"] = str(error)
        return Failure.exit_code
    return 0


def describe_state(
    instance: Instance, enis: Sequence[Eni], states: Mapping[str, str]
) -> dict[str, Any]:
    """The report of --status, without the kernel's part."""
    rows = []
    warnings = []
    for eni in enis:
        problem = why_unusable(eni)
        row = {**eni._asdict(), "holder_state": states.get(eni.holder, ""), "problem": problem}
        rows.append(row)
        if problem:
            warnings.append(f"{eni.id} cannot be attached: it {problem}")
        elif eni.delete_on_termination:
            warnings.append(deletion_warning(eni))
    return {
        "instance": instance.id,
        "zone": instance.zone,
        "region": instance.region,
        "name": instance.name,
        "state": states.get(instance.id, ""),
        "enis": rows,
        "warnings": warnings,
    }


def status_table(report: Mapping[str, Any]) -> str:
    """The report of --status for people."""
    name = quoted(report["name"])
    lines = [
        f"instance  {report['instance']} in {report['zone']}, {report['state'] or 'state unknown'}",
        f"name      {name}",
    ]
    if report["enis"]:
        lines += eni_table(report["enis"])
    else:
        lines.append(f"eni       no network interface named {name} in {report['region']}")
    if "rule" in report:
        device, ip = report["device"], report["ip"]
        lines.append(f"device    {device}, {ip}/{report['prefix']}, gateway {report['gateway']}")
        hint = f"none: run add_routes.py -d {device}, or replies may leave by another device"
        lines.append("rule      " + (f"from {ip}" if report["rule"] else hint))
    else:
        lines.append(f"device    {report.get('problem', 'none: not attached here')}")
    lines += report["warnings"]
    return "\n".join(lines)


def eni_table(enis: Sequence[Mapping[str, str]]) -> list[str]:
    rows = [["eni", "address", "zone", "status", "holder"]]
    for eni in enis:
        holder = eni["holder"] or eni["service"] or "-"
        state = eni["holder_state"]
        rows.append([eni["id"], eni["ip"] or "-", eni["zone"], eni["status"], f"{holder} {state}"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return lines


class Stderr(io.TextIOBase):
    """Stderr, as far as somebody reads it: a message must never fail, nor delay the run."""

    def write(self, message: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            _, writable, _ = select.select([], [2], [], 0)
            if writable:  # not a pipe that is full; it has room for so many bytes
                os.write(2, message.encode("utf-8", "backslashreplace")[: select.PIPE_BUF])
        return len(message)


# --- the command line ---


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    description, examples, rest = (__doc__ or "").partition("Examples:\n")
    parser = argparse.ArgumentParser(
        prog="eni_ctl.py",
        usage="%(prog)s (-a | -d | -s) [-n NAME] [-t SECONDS] [-f] [-o FILE] [--dry-run] [--json] "
        "[-v] [--version]",
        description=description,
        epilog=examples + rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb = parser.add_mutually_exclusive_group()
    for short, long, function, explanation in (
        ("-a", "--attach", attach, "attach the ENI, wait until its address is up"),
        ("-d", "--detach", detach, "detach the ENI from this instance, wait until it is gone"),
        ("-s", "--status", status, "show the current state; changes nothing"),
    ):
        verb.add_argument(
            short, long, dest="verb", action="store_const", const=function, help=explanation
        )
    add = parser.add_argument
    add("-n", "--name", help="the ENI's Name tag, instead of the group's name")
    add("-t", "--timeout", type=float, default=TIMEOUT, metavar="SECONDS",
        help="deadline for the whole run (default %(default)g)")  # fmt: skip
    add("-f", "--force", action="store_true", help="take the ENI even from a holder in service")
    add("-o", "--state-file", default=STATE_FILE, metavar="FILE",
        help="state file (default %(default)s)")  # fmt: skip
    add("--dry-run", action="store_true", help="say what would be done; ask EC2 if it is allowed")
    add("--json", action="store_true", help="the report of --status for programs")
    add("-v", "--verbose", action="store_true", help="report each request and command")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.verb is None:
        parser.error("one of -a, -d and -s is required")
    check_options(parser, options)
    return options


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse values that are out of range, and options that do not go together."""
    path = options.state_file
    if options.name is not None and not re.fullmatch(r"[^\ud800-\udfff]{1,256}", options.name):
        parser.error(f"-n {quoted(options.name)}: expected 1 to 256 characters of UTF-8")
    if not 1 <= options.timeout <= 86400:
        parser.error(f"-t {options.timeout:g}: expected 1 to 86400 seconds")
    if not path or (os.path.exists(path) and not os.path.isfile(path)):
        parser.error(f"-o {quoted(path)}: expected a regular file")
    if options.force and options.verb is not attach:
        parser.error("-f goes with -a")
    if options.json and options.verb is not status:
        parser.error("--json goes with -s")
    if options.dry_run and options.verb is status:
        parser.error("--dry-run goes with -a or -d")


def main(argv: Sequence[str] | None = None) -> int:
    open_standard_files()
    sys.stderr = Stderr()
    options = parse(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("eni_ctl.py: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if options.verbose else logging.INFO)
    prepare_botocore()
    deadline = Deadline(options.timeout)
    deadline.enforce()
    try:
        check_ca_file()
        answer, exit_code = options.verb(options, deadline)
    except DryRun as result:
        answer, exit_code = str(result), 0
    except Failure as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        log.error("interrupted: %s", deadline.doing)
        return 130
    except Exception as error:
        if options.verbose:
            raise
        log.error("unexpected %s: %s (-v shows where)", type(error).__name__, one_line(error))
        return Failure.exit_code
    try:
        print(answer, flush=True)
    except OSError as error:
        # Python would complain, too, when it flushes stdout at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # What was attached or detached is done, even if nobody reads it; a report is not.
        if options.verb is status and not isinstance(error, BrokenPipeError):
            log.error("cannot write the report: %s", error.strerror)
            return Failure.exit_code
    return int(exit_code)


def open_standard_files() -> None:
    """Open those that are closed: else the next file would become stderr, and get its messages."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free one, which is this


if __name__ == "__main__":
    exit_code = main()
    gc.freeze()  # skips Python's last garbage collection: a quarter of a run's CPU time
    raise SystemExit(exit_code)
