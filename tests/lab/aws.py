"""The lab's AWS: EC2, Auto Scaling and IMDS as an instance meets them, in threads of this process.

moto keeps the world (VPC, ENIs, instances, groups, roles), reads requests, checks signatures, and
writes answers. What it lacks is added here and in the neighbours:

    lab.ec2    permission, clocks, throttling, EC2's refusals, filters and paging
    lab.imds   the metadata service
    lab.judge  whether a policy allows a request, which npm's iam-simulate decides
    lab.knobs  all that a test may change
    lab.odd    items of answers that lack something, or that are spelt in another way
    lab.wire   HTTP, and requests that go wrong on demand
    this file  the world, and the phases of an attachment in time

It listens on port 443 of the real host names and port 80 of the real IMDS address, so it runs in a
network namespace of its own. The caller puts the addresses on an interface, `host_names` into
/etc/hosts and `ca` into AWS_CA_BUNDLE; the programs under test need no other configuration.
"""

from __future__ import annotations

import base64
import contextlib
import heapq
import ipaddress
import itertools
import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from moto.autoscaling.models import autoscaling_backends
from moto.ec2.models import ec2_backends
from moto.ec2.models.amis import Ami
from moto.iam.models import iam_backends
from moto.sts.models import sts_backends

from lab.ec2 import DENIED, MESSAGES, LabEni, error_answer, perform, refuse
from lab.imds import ACCOUNT, INSTANCE_TYPE, ROLE, SLOTS, imds_error, metadata
from lab.judge import Judge, Verdict
from lab.knobs import Change, Denial, Knobs, Refusal
from lab.wire import Answer, Fault, Handler, Listener, authority, come_first, server_context

T = TypeVar("T")
SEED_ACTIONS = (
    "autoscaling:DescribeAutoScalingGroups",
    "autoscaling:DescribeAutoScalingInstances",
    "ec2:DescribeNetworkInterfaces",
    "ec2:AttachNetworkInterface",
    "ec2:DetachNetworkInterface",
)


@dataclass
class Call:
    """One API request, from its arrival on."""

    action: str
    instance_id: str | None  # whose credentials signed it
    params: dict[str, str]
    dry_run: bool
    status: int = 0  # set before the answer is sent; stays 0 when none is


@dataclass
class Instance:
    model: Any  # moto's, as are the next two
    primary: Any
    member: Any  # its entry in the group
    group: str | None
    max_interfaces: int  # on each network card
    tags_in_imds: bool
    role: bool
    tokens: str
    cards: int = 1  # network cards
    user_data: str = ""
    credentials: Any = None
    # The code of the document that IMDS has in the place of the role's credentials. IAM User Guide,
    # "Troubleshoot IAM and Amazon EC2".
    role_error: str = ""
    # Its clock, compared with AWS's: -3600 is an hour behind. Each service has its own code for
    # that, if `skew_codes` names no other.
    clock_offset: float = 0.0
    skew_codes: dict[str, str] = field(default_factory=dict)
    target_in_imds: bool = True  # False: IMDS has no target-lifecycle-state, though in a group
    warm_pool: str = "Stopped"  # Running, Hibernated: where an instance of the warm pool goes
    change: Change = field(default=lambda item: item)  # of the member that Auto Scaling describes

    def __post_init__(self) -> None:
        self.id: str = self.model.id
        self.zone: str = self.model.placement.zone
        self.eni_id: str = self.primary.id
        self.mac: str = self.primary.mac_address
        self.ip: str = self.primary.private_ip_address

    @property
    def life_cycle(self) -> str:
        """Auto Scaling's word for the instance; "" outside any group."""
        return str(self.member.lifecycle_state) if self.member else ""

    @life_cycle.setter
    def life_cycle(self, state: str) -> None:
        if self.member is None:
            raise ValueError(f"{self.id} is in no group, so it has no life cycle")
        self.member.lifecycle_state = state


class Aws(Knobs):
    """One region of one account. Its knobs may be changed while it runs."""

    def __init__(
        self,
        *,
        region: str = "us-west-1",
        endpoint: str = "203.0.113.10",
        endpoint6: str = "",
        imds: Sequence[str] = ("169.254.169.254",),
        ca_dir: Path,
    ) -> None:
        super().__init__()
        self.region, self.imds_addresses = region, tuple(imds)
        self.endpoints = [address for address in (endpoint, endpoint6) if address]
        self.host_names = [f"{name}.{region}.amazonaws.com" for name in ("ec2", "autoscaling")]
        self.host_names.append("iam.amazonaws.com")  # one for all regions
        # Only these are reached by IPv6 (EC2 Developer Guide, "Service endpoints").
        self.host_names6 = [f"{name}.{region}.api.aws" for name in ("ec2", "autoscaling")]
        self.ca = ca_dir / "ca.pem"

        # The world.
        self.enis: dict[str, LabEni] = {}
        self.instances: dict[str, Instance] = {}
        self.strangers: set[str] = set()  # access keys of another account's
        self._vpc: Any = None
        self._policy: dict[str, Any] | None = None  # None: SEED_ACTIONS, on all resources
        self._judge: Judge | None = None  # of the policy, if there is one

        # What was asked.
        self.calls: list[Call] = []
        self.imds_calls: list[tuple[str, str, str]] = []  # method, path, source address
        self.imds_tokens: dict[str, tuple[str, float]] = {}  # token: (instance id, until)
        self.buckets: dict[str, tuple[float, float]] = {}  # action: (tokens, when)

        # How it works.
        self._faults: list[Fault] = []
        self._lock = threading.RLock()  # one request at a time changes the world
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = itertools.count()
        self._due = threading.Condition()
        self._timer = threading.Thread(target=self._keep_time, daemon=True)
        self._failures: list[Exception] = []
        self._stopped = threading.Event()
        self._api: list[Listener] = []
        self._imds: list[Listener] = []

    # --- life

    def start(self) -> None:
        for backends in (ec2_backends, autoscaling_backends, iam_backends, sts_backends):
            backends.clear()  # they belong to the process
        self.ec2 = ec2_backends[ACCOUNT][self.region]
        self.autoscaling = autoscaling_backends[ACCOUNT][self.region]
        self.iam, self.sts = iam_backends[ACCOUNT]["aws"], sts_backends[ACCOUNT]["aws"]
        service = {"Service": "ec2.amazonaws.com"}
        trust = {"Effect": "Allow", "Principal": service, "Action": "sts:AssumeRole"}
        document = json.dumps({"Version": "2012-10-17", "Statement": trust})
        self.iam.create_role(ROLE, document, "/", None, "", [], None)
        authority().cert_pem.write_to_path(str(self.ca))
        self._timer.start()
        tls = server_context((*self.host_names, *self.host_names6))
        self._api = [Listener(ip, 443, self._answer_api, tls) for ip in self.endpoints]
        self.imds_up = True

    def stop(self) -> None:
        """End every thread; raise the first exception of a hook or of the lab itself."""
        self._stopped.set()
        self.imds_up = False
        while self._api:
            self._api.pop().stop()
        with self._due:
            self._due.notify()
        self._timer.join()
        if self._judge:
            self._judge.close()
        if self._failures:
            raise self._failures.pop(0)

    def __enter__(self) -> Aws:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def imds_up(self) -> bool:
        """False: connections to IMDS are refused."""
        return bool(self._imds)

    @imds_up.setter
    def imds_up(self, up: bool) -> None:
        while self._imds and not up:
            self._imds.pop().stop()
        if up and not self._imds:
            self._imds = [Listener(ip, 80, self._answer_imds) for ip in self.imds_addresses]

    # --- the world

    def add_subnet(self, cidr: str, zone: str, cidr6: str | None = None) -> str:
        zones = self.ec2.zones[self.region]
        if zone not in [known.name for known in zones]:  # moto knows two of us-west-1's
            zones.append(type(zones[0])(zone, self.region, f"{zone}-id"))
        if self._vpc is None:
            self._vpc = self.ec2.create_vpc("10.0.0.0/16")
        network = ipaddress.IPv4Network(cidr)
        blocks = [item["cidr_block"] for item in self._vpc.get_cidr_block_association_set()]
        if not any(network.subnet_of(ipaddress.IPv4Network(block)) for block in blocks):
            self._vpc.associate_vpc_cidr_block(cidr)
        return str(self.ec2.create_subnet(self._vpc.id, cidr, cidr6, availability_zone=zone).id)

    def launch(
        self,
        subnet_id: str,
        *,
        ip: str | None = None,
        ipv6: Sequence[str] = (),
        group: str | None = None,
        life_cycle: str = "InService",
        max_interfaces: int = 4,
        tags_in_imds: bool = False,
        role: bool = True,
        tokens: Literal["required", "optional", "v1 only"] = "required",
        primary_name: str | None = None,
        cards: int = 1,
        user_data: str = "",
    ) -> Instance:
        with self._lock:
            model = self.ec2.run_instances(
                "ami-lab",
                1,
                None,
                [],
                subnet_id=subnet_id,
                private_ip=ip or self._free_address(subnet_id),
                region_name=self.region,
                instance_type=INSTANCE_TYPE,
                is_instance_type_default=True,
                block_device_mappings=[],
                tags={"instance": {"Name": group or "lab"}},
            ).instances[0]
            primary = model.nics[0]
            primary.ipv6_addresses = list(ipv6)
            primary.delete_on_termination = True
            if primary_name is not None:
                primary.add_tags({"Name": primary_name})
            self.enis[primary.id] = LabEni(primary, "attached", plugged=0.0)
            instance = Instance(
                model,
                primary,
                None,
                group,
                max_interfaces,
                tags_in_imds,
                role,
                tokens,
                cards,
                user_data,
            )
            self.instances[instance.id] = instance
            if group is not None:
                self.join(instance, group, life_cycle)
            return instance

    def adopt(self, member: Any) -> Instance:
        """Know the instance of a group's member that moto has launched from a launch template."""
        group = self.autoscaling.autoscaling_groups[member.auto_scaling_group_name]
        launch_template: Any = group.ec2_launch_template
        template = launch_template.get_version(group.launch_template_version).data
        options = template.get("MetadataOptions", {})
        model = self.ec2.get_instance(member.instance_id)
        primary = model.nics[0]
        primary.delete_on_termination = True
        self.enis[primary.id] = LabEni(primary, "attached", plugged=0.0)
        instance = Instance(
            model,
            primary,
            member,
            group.name,
            max_interfaces=4,
            tags_in_imds=options.get("InstanceMetadataTags") == "enabled",
            role="IamInstanceProfile" in template,
            tokens=options.get("HttpTokens", "optional"),
            user_data=base64.b64decode(str(template.get("UserData", ""))).decode(),
        )
        self.instances[instance.id] = instance
        return instance

    def join(self, instance: Instance, group: str, life_cycle: str = "InService") -> None:
        """Put a running instance into a group, which is made at need."""
        with self._lock:
            groups = self.autoscaling.autoscaling_groups
            if group not in groups:
                unset = ("vpc_zone_identifier", "default_cooldown", "health_check_period")
                empty = ("load_balancers", "target_group_arns", "termination_policies", "tags")
                options: dict[str, Any] = {name: [] for name in empty} | dict.fromkeys(unset)
                self.autoscaling.create_auto_scaling_group(
                    name=group,
                    availability_zones=[instance.zone],
                    desired_capacity=0,
                    max_size=10_000,
                    min_size=0,
                    launch_config_name="",
                    launch_template={},
                    health_check_type=None,
                    placement_group=None,
                    instance_id=instance.id,
                    **options,
                )
            self.autoscaling.attach_instances(group, [instance.id])
            instance.group, instance.member = group, groups[group].instance_states[-1]
            instance.life_cycle = life_cycle

    def leave(self, instance: Instance) -> None:
        """Take an instance out of its group, as DetachInstances has done in the end."""
        with self._lock:
            group = self.autoscaling.autoscaling_groups[instance.group or ""]
            group.instance_states.remove(instance.member)
            # Auto Scaling removes this tag only: its user guide, "Tag Auto Scaling groups and
            # instances".
            self.ec2.delete_tags([instance.id], {"aws:autoscaling:groupName": group.name})
            instance.group = instance.member = None

    def halt(self, instance: Instance) -> None:
        """Stop the instance, as a warm pool does. Its ENIs stay attached."""
        vars(instance.model.instance_state).update(name="stopped", code=80)

    def _free_address(self, subnet_id: str) -> str:
        taken = {address for eni in self.enis.values() for address in eni.addresses}
        hosts = itertools.islice(self.ec2.get_subnet(subnet_id).cidr.hosts(), 9, None)
        return next(str(host) for host in hosts if str(host) not in taken)

    def create_eni(
        self,
        subnet_id: str,
        *,
        name: str | None,
        ip: str | None = None,
        secondary: Sequence[str] = (),
        ipv6: Sequence[str] = (),
        tags: dict[str, str] | None = None,
        ipv4: bool = True,
        interface_type: str = "interface",
        owner: str = "",
        status: str = "",
    ) -> str:
        """A new ENI's id.

        With ipv4=False it has IPv6 addresses only, if any. An ENI of type efa-only has no address.
        With an owner, such as "amazon-aws", an AWS service made it for itself (RequesterManaged),
        and holds it unless its status is "available".
        """
        with self._lock:
            tags = dict(tags or {}) if name is None else {**(tags or {}), "Name": name}
            subnet = self.ec2.get_subnet(subnet_id)
            address = ip or self._free_address(subnet_id)
            eni = self.ec2.create_network_interface(subnet, address, tags=tags)
            eni.ipv6_addresses = list(ipv6)
            others = [{"Primary": False, "PrivateIpAddress": other} for other in secondary]
            eni.private_ip_addresses.extend(others)
            if not ipv4 or interface_type == "efa-only":
                eni.private_ip_address, eni.private_ip_addresses = None, []
            lab_eni = LabEni(eni, interface_type=interface_type, owner=owner, status=status)
            self.enis[eni.id] = lab_eni
            lab_eni.append_history()
            return str(eni.id)

    def eni(self, eni_id: str) -> Any:
        """moto's model of the ENI."""
        return self.lab_eni(eni_id).model

    def lab_eni(self, eni_id: str) -> LabEni:
        if eni_id not in self.enis:
            message = f"The networkInterface ID '{eni_id}' does not exist"
            raise refuse("InvalidNetworkInterfaceID.NotFound", message)
        return self.enis[eni_id]

    def rename(self, eni_id: str, name: str) -> None:
        """Change the ENI's Name tag."""
        with self._lock:
            self.ec2.create_tags([eni_id], {"Name": name})

    def forget_history(self, eni_id: str) -> None:
        """Show the ENI as it is now, whatever the lag, until its next change."""
        with self._lock:
            lab_eni = self.lab_eni(eni_id)
            lab_eni.history.clear()
            lab_eni.append_history()

    def refuse(
        self, action: str, resource: str, code: str, message: str, *, times: int = -1
    ) -> Refusal:
        """Let EC2 refuse an action for one ENI or instance; times=0 in the result ends it."""
        refusal = Refusal(action, resource, code, message, times=times)
        self.refusals.append(refusal)
        return refusal

    def deny(self, action: str, resource: str, why: str) -> Denial:
        """Let IAM deny an action for one ENI or instance; `why` is a key of lab.ec2.DENIED.

        It stands for other policies than the role's, which set_policy() replaces.
        """
        if why not in DENIED:
            raise ValueError(f"{why!r}: expected one of {', '.join(DENIED)}")
        denial = Denial(action, resource, why)
        self.denials.append(denial)
        return denial

    def set_policy(self, document: dict[str, Any]) -> None:
        """Make this the only policy of the instances' role, from the next request on.

        Without one, the role has SEED_ACTIONS, so that the demo and the bench need no judge.
        """
        self._policy = document
        self._judge = self._judge or Judge()

    def why_denied(self, user: str, action: str, resource: str, tags: dict[str, str]) -> str:
        """Why the role's policy does not allow an action: a key of lab.ec2.DENIED, or nothing."""
        if self._judge is None or self._policy is None:
            return "" if action in SEED_ACTIONS else "no identity-based policy"
        verdict = self._judge.ask(self._policy, action, resource, tags, user)
        return {
            Verdict.ALLOWED: "",
            Verdict.NOT_ALLOWED: "no identity-based policy",
            Verdict.DENIED: "identity-based policy",
        }[verdict]

    def add_image(self, name: str, owner: str, created: datetime) -> str:
        """A public image's id."""
        image = f"ami-{secrets.token_hex(8)}"
        self.ec2.amis[image] = Ami(
            self.ec2, image, name=name, owner_id=owner, creation_date=created, public=True
        )
        return image

    def add_administrator(self) -> dict[str, str]:
        """Somebody who may do everything: the environment variables of their access key."""
        return self._add_user("admin")

    def add_stranger(self) -> dict[str, str]:
        """An administrator of another account, to whom nothing in this one exists."""
        key = self._add_user("stranger")
        self.strangers.add(key["AWS_ACCESS_KEY_ID"])
        return key

    def _add_user(self, name: str) -> dict[str, str]:
        self.iam.create_user(self.region, name)
        allow = {"Effect": "Allow", "Action": "*", "Resource": "*"}
        document = json.dumps({"Version": "2012-10-17", "Statement": allow})
        self.iam.put_user_policy(name, "policy", document)
        key = self.iam.create_access_key(name)
        return {
            "AWS_ACCESS_KEY_ID": key.access_key_id,
            "AWS_SECRET_ACCESS_KEY": key.secret_access_key,
        }

    # --- attachments and shutdowns, in time

    def attach(self, eni: LabEni, instance: Instance, index: int, card: int = 0) -> str:
        with self._lock:
            slot = card * SLOTS + index
            attachment_id = str(instance.model.attach_eni(eni.model, slot))
            eni.attachment_status = "attaching"
            eni.append_history()
            self._later(self.attach_delay, lambda: self._plug(eni, attachment_id))
            if eni.undone_after:
                # aws/amazon-ecs-agent issue 1520.
                after = eni.undone_after.pop(0)
                self._later(after, lambda: self._release(eni, attachment_id))
            return attachment_id

    def detach(self, eni: LabEni, force: bool = False) -> None:
        with self._lock:
            attachment_id = eni.model.attachment_id
            eni.attachment_status = "detaching"
            eni.append_history()
            hangs = eni.model.id in self.stuck and not force
            if not hangs and eni.model.id not in self.stuck_for_good:
                self._later(self.detach_delay, lambda: self._release(eni, attachment_id))

    def terminate(self, instance: Instance) -> None:
        """Life cycle Terminating at once; terminated, and its ENIs free, after `shutdown_delay`."""
        if instance.member:
            instance.life_cycle = "Terminating"
        state = vars(instance.model.instance_state)
        half = self.shutdown_delay / 2
        self._later(half, lambda: state.update(name="shutting-down", code=32))
        self._later(2 * half, lambda: self._end(instance))

    def _plug(self, lab_eni: LabEni, attachment_id: str) -> None:
        eni = lab_eni.model
        if eni.attachment_id == attachment_id and eni.id not in self.never_plug:
            lab_eni.plugged = time.monotonic()
            self.plug(eni.instance.id, eni)
        with self._lock:
            if eni.attachment_id == attachment_id and lab_eni.attachment_status == "attaching":
                lab_eni.attachment_status = "attached"
                lab_eni.append_history()

    def _release(self, lab_eni: LabEni, attachment_id: str) -> None:
        eni = lab_eni.model
        if eni.attachment_id != attachment_id:
            return
        if lab_eni.plugged is not None and eni.device_index != 0:
            self.unplug(eni.instance.id, eni)
        with self._lock:
            eni.instance.detach_eni(eni)
            lab_eni.attachment_status, lab_eni.plugged = "", None
            lab_eni.append_history()

    def _end(self, instance: Instance) -> None:
        with self._lock:
            vars(instance.model.instance_state).update(name="terminated", code=48)
            if instance.group is not None:
                group = self.autoscaling.autoscaling_groups[instance.group]
                group.instance_states.remove(instance.member)
            held = [self.enis[eni.id] for eni in instance.model.nics.values()]
        # The primary ENI has DeleteOnTermination, and so may others (EC2 User Guide, "Elastic
        # network interfaces", "Termination behavior").
        doomed = [eni.model.id for eni in held if eni.model.delete_on_termination]
        for eni in held:
            self._release(eni, eni.model.attachment_id)
        with self._lock:
            for eni_id in doomed:
                del self.enis[eni_id], self.ec2.enis[eni_id]

    def _later(self, delay: float, action: Callable[[], None]) -> None:
        with self._due:
            heapq.heappush(self._agenda, (time.monotonic() + delay, next(self._sequence), action))
            self._due.notify()

    def _keep_time(self) -> None:
        come_first()
        while True:
            with self._due:
                if self._stopped.is_set():
                    return
                wait = self._agenda[0][0] - time.monotonic() if self._agenda else None
                if wait is None or wait > 0:
                    self._due.wait(wait)
                    continue
                action = heapq.heappop(self._agenda)[2]
            with contextlib.suppress(Exception):
                self._watch(action)

    def _watch(self, action: Callable[[], T]) -> T:
        """Run `action`, and keep what it raises for stop()."""
        try:
            return action()
        except Exception as error:
            self._failures.append(error)
            raise

    # --- requests

    def fail(
        self,
        what: str,
        *,
        code: str = "RequestLimitExceeded",
        status: int = 503,
        times: int = 1,
        how: Literal["answer", "reset", "empty", "truncate", "html", "hang", "drop"] = "answer",
        when: Literal["before", "after"] = "before",
        seconds: float = 0,
        skip: int = 0,
        do: Callable[[], object] | None = None,
        source: str = "",
        says: Answer | None = None,
    ) -> Fault:
        """Spoil requests for `what`: an API action, or the beginning of an IMDS path ("" is all).

        After the first `skip` of them, `times` are spoilt (-1: all). "before": the request has no
        effect; "after": it takes effect and its answer is lost. `do` runs at that point. "truncate"
        cuts the true answer in the middle, so it takes effect; "hang" says nothing for `seconds`
        (0: for ever) and then goes on as if nothing had been; "drop" closes and "reset" resets.
        With `source`, only requests from that address are spoilt; `says` is the answer to give
        where AWS has none like it.
        """
        watched = (lambda: self._watch(do)) if do else None
        fault = Fault(what, code, status, times, how, when, seconds, skip, watched, source, says)
        self._faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        self._faults.clear()

    def _answer(
        self, connection: Handler, concerns: Callable[[str], bool], make: Callable[[], Answer]
    ) -> None:
        """Send the answer that `make` makes, or what a fault makes of it."""

        def act() -> Answer:
            with self._lock:
                return self._watch(make)

        source = source_of(connection)
        with self._lock:
            asked = (f for f in self._faults if concerns(f.what) and f.source in ("", source))
            fault = next((f for f in asked if f.strikes()), None)
        if fault:
            spoilt = self._spoilt(connection, fault)
            fault.deliver(connection, act, spoilt, self._stopped)
        else:
            connection.send(act())

    def _spoilt(self, connection: Handler, fault: Fault) -> Answer:
        if fault.says:
            return fault.says
        if connection.headers.get("Host", "") not in (*self.host_names, *self.host_names6):
            return imds_error(fault.status)
        message = MESSAGES.get(fault.code, "spoilt by the lab")
        return error_answer(connection, fault.code, message, fault.status)

    def _answer_imds(self, connection: Handler, body: bytes) -> None:
        path = unquote(urlsplit(connection.path).path).lstrip("/")
        source = source_of(connection)
        self.imds_calls.append((connection.command, path, source))

        def make() -> Answer:
            for eni in self.enis.values():
                if eni.model.instance and source in eni.addresses:
                    instance = self.instances[eni.model.instance.id]
                    return metadata(self, instance, connection.command, path, connection.headers)
            # It was terminated, or a test forgot to bind its socket.
            return Answer(503, f"no instance has the address {source}".encode())

        self._answer(connection, path.startswith, make)

    def _answer_api(self, connection: Handler, body: bytes) -> None:
        params = {name: values[0] for name, values in parse_qs(body.decode(), True).items()}
        action, dry_run = params.get("Action", ""), params.get("DryRun") == "true"
        key = connection.headers.get("Authorization", "").partition("Credential=")[2].split("/")[0]
        session = self.sts.get_assumed_role_from_access_key(key)
        call = Call(action, session.session_name if session else None, params, dry_run)
        self.calls.append(call)
        connection.sending = lambda status: setattr(call, "status", status)

        def make() -> Answer:
            return perform(self, connection, body, action, dry_run)

        # What a test plans for an action is for the action, not for its dry runs.
        name = f"{action}, dry run" if dry_run else action
        self._answer(connection, lambda what: what == name, make)


def source_of(connection: Handler) -> str:
    """The caller's address."""
    return str(ipaddress.ip_address(connection.client_address[0].partition("%")[0]))
