"""Several ENIs of one name: what EC2 refuses for one of them concerns that one alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from lab import Lab, Machine, await_that, odd
from lab.aws import Call
from lab.ec2 import DENIED
from lab.knobs import Change
from lab.vpc import OUTER_LIMIT
from lab.watching import all_at_once, attached_by, calls, holder, last_line, wait_for_line
from lab.wire import Answer

import eni_ctl

# Codes and words of refusals that concern one ENI, as EC2 gives them.
REFUSALS = {
    # EC2 User Guide, "Elastic Fabric Adapter"; hashicorp/terraform-provider-aws issue 44355.
    "an EFA": ("OperationNotPermitted", "An EFA cannot be attached to a running instance."),
    # cloud-custodian/cloud-custodian issue 4754; the words are aws/aws-k8s-tester issue 70's.
    "another's": ("AuthFailure", "You do not have permission to access the specified resource."),
    "between two states": ("IncorrectState", "The network interface is not 'available'."),
    "another VPC's": ("InvalidParameterCombination", "They belong to different VPCs."),
    "not supported": ("UnsupportedOperation", "The instance type does not support it."),
    "taken meanwhile": ("InvalidNetworkInterface.InUse", "Interface: [it] in use."),
    "taken, in other words": ("InvalidParameterValue", "The network interface is in use."),
    "a value": ("InvalidParameterValue", "A value that is not supported."),
    "gone": ("InvalidNetworkInterfaceID.NotFound", "The networkInterface ID does not exist"),
}
NO_ADDRESS: Change = odd.having(PrivateIpAddresses=[])
EMPTY = Answer(
    200,
    b'<DescribeNetworkInterfacesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/">'
    b"<networkInterfaceSet/></DescribeNetworkInterfacesResponse>",
    "text/xml",
)


def order_of(lab: Lab, machine: Machine, enis: Sequence[str]) -> list[str]:
    """The order in which this machine tries the ENIs: seen where each of them is refused."""
    refused = [
        lab.aws.refuse("AttachNetworkInterface", eni, "UnsupportedOperation", "no") for eni in enis
    ]
    assert machine.eni_ctl("-a").returncode != 0
    for refusal in refused:
        refusal.times = 0
    order = list(dict.fromkeys(attached_by(lab, machine)))
    assert sorted(order) == sorted(enis), "it has not tried each of them"
    lab.aws.calls.clear()
    return order


def test_of_a_poisoned_a_refused_and_a_good_interface_the_good_one_is_attached_in_any_order(
    lab: Lab, subnet: str
) -> None:
    """At most one attach call is wasted: the one on the ENI that EC2 refuses."""
    enis = [lab.aws.create_eni(subnet, name="web") for _ in range(3)]
    machine = lab.launch(subnet, group="web")
    order = order_of(lab, machine, enis)
    for roles in itertools.permutations(["poisoned", "refused", "good"]):
        by_role = dict(zip(roles, order))
        poisoned = lab.aws.lab_eni(by_role["poisoned"])
        poisoned.change = lambda item: NO_ADDRESS(odd.lacking("PrivateIpAddress")(item))
        code, words = REFUSALS["an EFA"]
        refusal = lab.aws.refuse("AttachNetworkInterface", by_role["refused"], code, words)
        done = machine.eni_ctl("-a")
        assert done.returncode == 0, f"{roles}: {done.stderr}"
        assert done.stdout.startswith(f"attached {by_role['good']} "), roles
        tried = attached_by(lab, machine)
        assert tried in ([by_role["refused"], by_role["good"]], [by_role["good"]]), roles
        assert machine.eni_ctl("-d").returncode == 0
        poisoned.change, refusal.times = lambda item: item, 0
        lab.aws.calls.clear()


class Pair:
    """A host, and a pool of two ENIs of which one is refused in turn: the other is the good one.

    Which of the two is tried first depends on their ids, so each is the bad one once.
    """

    def __init__(self, lab: Lab, subnet: str, why: str) -> None:
        self.lab, self.subnet, self.why = lab, subnet, why
        self.enis = [lab.aws.create_eni(subnet, name=why) for _ in range(2)]
        self.machine = lab.launch(subnet, group=why)

    def __str__(self) -> str:
        return self.why

    def hold(self, state: str) -> list[Machine]:
        """Two peers in that state, each of which holds an ENI."""
        peers = []
        for eni in self.enis:
            peer = self.lab.launch(self.subnet, group=self.why, life_cycle=state)
            self.lab.aws.attach(self.lab.aws.lab_eni(eni), peer.instance, 1)
            await_that(peer.appeared.is_set)
            peers.append(peer)
        return peers

    def attach(self, good: str, *options: str) -> None:
        done = self.machine.eni_ctl("-a", *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"attached {good} "), done.stdout

    def free(self) -> None:
        assert self.machine.eni_ctl("-d").returncode == 0
        for eni in self.enis:
            if holder(self.lab, eni):
                self.lab.aws.detach(self.lab.aws.lab_eni(eni), force=True)
        await_that(lambda: not any(holder(self.lab, eni) for eni in self.enis))


def test_an_attach_that_is_refused_for_one_interface_is_tried_with_the_next(
    lab: Lab, subnet: str
) -> None:
    def tries_the_next(pair: Pair) -> None:
        for bad, good in (pair.enis, reversed(pair.enis)):
            before = calls(lab, "AttachNetworkInterface", pair.machine)
            refusal = lab.aws.refuse("AttachNetworkInterface", bad, *REFUSALS[pair.why])
            pair.attach(good)
            assert calls(lab, "AttachNetworkInterface", pair.machine) - before <= 2
            refusal.times = 0
            pair.free()

    all_at_once([Pair(lab, subnet, why) for why in REFUSALS], tries_the_next)


def test_an_attach_that_iam_denies_for_one_interface_is_tried_with_the_next(
    lab: Lab, subnet: str
) -> None:
    """A condition on a tag of the ENI, say: RaJiska/terraform-aws-fck-nat issue 83."""

    def tries_the_next(pair: Pair) -> None:
        for bad, good in (pair.enis, reversed(pair.enis)):
            denial = lab.aws.deny("AttachNetworkInterface", bad, pair.why)
            pair.attach(good)
            lab.aws.denials.remove(denial)
            pair.free()

    all_at_once([Pair(lab, subnet, why) for why in DENIED], tries_the_next)


def test_where_all_are_refused_each_is_named_with_awss_words(lab: Lab, subnet: str) -> None:
    machine = lab.launch(subnet, group="web")
    words = {}
    for why in ("an EFA", "another VPC's", "not supported"):
        eni = lab.aws.create_eni(subnet, name="web")
        code, words[eni] = REFUSALS[why]
        lab.aws.refuse("AttachNetworkInterface", eni, code, words[eni])
    done = machine.eni_ctl("-a")
    assert done.returncode == 4
    for eni, sentence in words.items():
        assert eni in last_line(done)
        assert sentence.rstrip(".") in last_line(done)


def test_a_refused_interface_is_attached_once_ec2_refuses_it_no_more(
    lab: Lab, machine: Machine, eni: str
) -> None:
    lab.aws.refuse("AttachNetworkInterface", eni, "IncorrectState", "not yet", times=2)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert calls(lab, "AttachNetworkInterface") == 3


@pytest.mark.parametrize("options", [[], ["-f"]])
def test_a_detach_that_is_refused_for_one_interface_is_tried_with_the_next(
    lab: Lab, subnet: str, options: list[str]
) -> None:
    """Two holders are dying, or healthy where it is forced; one of them does not let go."""

    def tries_the_next(pair: Pair) -> None:
        for bad, good in (pair.enis, reversed(pair.enis)):
            pair.hold("InService" if options else "Terminating:Wait")
            refusal = lab.aws.refuse("DetachNetworkInterface", bad, *REFUSALS[pair.why])
            pair.attach(good, *options)
            refusal.times = 0
            pair.free()

    whys = ("an EFA", "between two states", "another's", "not supported")
    all_at_once([Pair(lab, subnet, why) for why in whys], tries_the_next)


@pytest.mark.parametrize("code", ["IncorrectInstanceState", "InvalidInstanceID.NotFound"])
def test_what_ec2_says_of_one_holder_is_not_taken_for_this_host(
    lab: Lab, subnet: str, code: str
) -> None:
    """In a detach, the instance is the holder."""
    pair = Pair(lab, subnet, code)
    for bad, good in (pair.enis, reversed(pair.enis)):
        pair.hold("Terminating")
        words = "The instance is not in a valid state for this operation."  # [ours]
        refusal = lab.aws.refuse("DetachNetworkInterface", bad, code, words)
        pair.attach(good)
        refusal.times = 0
        pair.free()


def test_a_detach_that_hangs_even_by_force_does_not_block_the_next_holder(
    lab: Lab, subnet: str
) -> None:
    pair = Pair(lab, subnet, "hangs")
    pair.hold("Terminating")
    machine = pair.machine.instance.id
    first, second = sorted(pair.enis, key=lambda eni: eni_ctl.rank(machine, eni))
    lab.aws.stuck_for_good.add(first)
    pair.attach(second)
    forced = [c.params.get("Force") for c in lab.aws.calls if c.action == "DetachNetworkInterface"]
    assert forced[:2] == [None, "true"]


def test_a_detach_that_iam_denies_for_one_holder_is_tried_with_the_next(
    lab: Lab, subnet: str
) -> None:
    pair = Pair(lab, subnet, "service control policy")
    for bad, good in ((0, 1), (1, 0)):
        dying = pair.hold("Terminating")
        lab.aws.deny("DetachNetworkInterface", dying[bad].instance.id, pair.why)
        pair.attach(pair.enis[good])
        pair.free()


def test_a_host_without_a_free_slot_does_not_try_each_interface(lab: Lab, subnet: str) -> None:
    """AttachmentLimitExceeded is about the instance: no other ENI can help."""
    for _ in range(5):
        lab.aws.create_eni(subnet, name="web")
    machine = lab.launch(subnet, group="web", max_interfaces=1)
    done = machine.eni_ctl("-a")
    assert done.returncode == 4
    assert "AttachmentLimitExceeded" in last_line(done)
    assert len(set(attached_by(lab, machine))) == 1


def hold(lab: Lab, subnet: str, eni: str, state: str = "InService") -> Machine:
    """A peer in that state which holds the ENI."""
    peer = lab.launch(subnet, group="web", life_cycle=state)
    lab.aws.attach(lab.aws.lab_eni(eni), peer.instance, 1)
    await_that(lambda: lab.aws.lab_eni(eni).attachment_status == "attached")
    return peer


@pytest.mark.parametrize("state", ["InService", "Terminating:Wait"])
def test_nothing_is_taken_that_could_not_be_attached_here(
    lab: Lab, subnet: str, machine: Machine, eni: str, state: str
) -> None:
    """IAM would permit the detach, and not the attach: the ENI would be nobody's."""
    peer = hold(lab, subnet, eni, state)
    lab.aws.deny("AttachNetworkInterface", machine.instance.id, "service control policy")
    done = machine.eni_ctl("-a", "-f")
    assert done.returncode == 4
    assert "not allowed: ec2:AttachNetworkInterface" in last_line(done)
    assert (holder(lab, eni), calls(lab, "DetachNetworkInterface")) == (peer.instance.id, 0)


def test_nothing_is_taken_with_the_credentials_of_an_account_that_lacks_this_host(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    """Another account may have an ENI of the name, too. This host's own is not shown there."""
    peer = hold(lab, subnet, eni)
    lab.aws.fail("DescribeNetworkInterfaces", says=EMPTY, skip=1, times=-1)
    done = machine.eni_ctl("-a", "-f", "-n", "web")
    assert done.returncode == 4
    assert (holder(lab, eni), calls(lab, "DetachNetworkInterface")) == (peer.instance.id, 0)


def is_attach(call: Call) -> bool:
    return call.action == "AttachNetworkInterface" and not call.dry_run


def test_a_host_that_has_no_free_slot_takes_nothing_once_it_knows(
    lab: Lab, subnet: str, eni: str
) -> None:
    """EC2 tells of the slots only when it is to attach. Then a spare gets the ENI, and keeps it."""
    hold(lab, subnet, eni)
    spare = lab.launch(subnet, group="web")
    full = lab.launch(subnet, group="web", max_interfaces=1)
    process = full.start_eni_ctl("-a", "-f")
    await_that(lambda: any(call.status for call in lab.aws.calls if is_attach(call)))
    lab.aws.attach(lab.aws.lab_eni(eni), spare.instance, 1)
    _, err = process.communicate(timeout=OUTER_LIMIT)
    assert process.returncode == 4, err
    assert "AttachmentLimitExceeded" in err.splitlines()[-1]
    assert calls(lab, "DetachNetworkInterface") == 1
    assert holder(lab, eni) == spare.instance.id


# --- what AWS services own


@pytest.mark.parametrize("interface_type", ["nat_gateway", "lambda", "vpc_endpoint"])
@pytest.mark.parametrize("options", [[], ["-f"]])
def test_an_interface_of_an_aws_service_is_passed_over(
    lab: Lab, subnet: str, machine: Machine, eni: str, interface_type: str, options: list[str]
) -> None:
    lab.aws.create_eni(subnet, name="web", interface_type=interface_type, owner="amazon-aws")
    done = machine.eni_ctl("-a", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"attached {eni} ")
    assert set(attached_by(lab, machine)) == {eni}
    assert calls(lab, "DetachNetworkInterface") == 0


def test_an_interface_that_an_aws_service_left_behind_is_passed_over(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    lab.aws.create_eni(subnet, name="web", owner="amazon-elb", status="available")
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert attached_by(lab, machine) == [eni]


@pytest.mark.parametrize("options", [[], ["-f"]])
def test_an_interface_of_an_aws_service_alone_needs_a_person_and_is_named(
    lab: Lab, subnet: str, options: list[str]
) -> None:
    machine = lab.launch(subnet, group="web")
    eni = lab.aws.create_eni(subnet, name="web", interface_type="nat_gateway", owner="amazon-aws")
    done = machine.eni_ctl("-a", *options)
    assert done.returncode == 4
    assert eni in last_line(done)
    assert "amazon-aws" in last_line(done)
    assert calls(lab, "AttachNetworkInterface") == calls(lab, "DetachNetworkInterface") == 0


# --- what this host was launched with


def test_an_efa_of_this_host_that_has_the_name_too_is_passed_over(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    """A launch template can tag all interfaces that it makes. One of the type efa-only has no
    address (EC2 User Guide, "Elastic Fabric Adapter"), and stays where it was launched."""
    efa = lab.aws.create_eni(subnet, name="web", interface_type="efa-only")
    lab.aws.never_plug.add(efa)  # it is no network device
    lab.aws.attach(lab.aws.lab_eni(efa), machine.instance, 1)
    done = machine.eni_ctl("-a")
    assert done.stdout == f"attached {eni} (10.0.1.22) as eth1\n", done.stderr
    assert machine.eni_ctl("-s").returncode == 0
    done = machine.eni_ctl("-d")
    assert (done.returncode, done.stdout) == (0, f"detached {eni} (10.0.1.22)\n"), done.stderr
    assert holder(lab, efa) == machine.instance.id


# --- force takes from those who can spare it first

WORTH = [
    ("in no group", "Terminated"),
    ("Standby", "in no group"),
    ("InService", "Standby"),
    ("InService", "Warmed:Stopped"),
    ("InService", "Terminating"),
]


@pytest.mark.parametrize(("keeps", "loses"), WORTH)
def test_force_takes_from_the_holder_that_can_spare_it(
    lab: Lab, subnet: str, keeps: str, loses: str
) -> None:
    enis = [lab.aws.create_eni(subnet, name="web") for _ in range(2)]
    machine = lab.launch(subnet, group="web")
    # Which ENI would be first depends on the ids: try it both ways.
    for kept, lost in (enis, reversed(enis)):
        peers = {}
        for eni, state in ((kept, keeps), (lost, loses)):
            group = None if state == "in no group" else "web"
            peers[eni] = lab.launch(subnet, group=group)
            if group:
                peers[eni].instance.life_cycle = state
            lab.aws.attach(lab.aws.lab_eni(eni), peers[eni].instance, 1)
            await_that(peers[eni].appeared.is_set)
        done = machine.eni_ctl("-a", "-f")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"attached {lost} ")
        assert loses in done.stderr
        assert holder(lab, kept) == peers[kept].instance.id
        for eni in enis:
            lab.aws.detach(lab.aws.lab_eni(eni), force=True)
        await_that(lambda: not any(holder(lab, eni) for eni in enis))


def test_force_takes_a_free_interface_before_any_other(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    other = lab.aws.create_eni(subnet, name="web")
    dying = lab.launch(subnet, group="web", life_cycle="Terminating")
    lab.aws.attach(lab.aws.lab_eni(other), dying.instance, 1)
    done = machine.eni_ctl("-a", "-f")
    assert done.stdout.startswith(f"attached {eni} "), done.stderr
    assert calls(lab, "DetachNetworkInterface") == 0


def test_a_waiting_host_says_so_only_when_the_answer_changes(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    dying = lab.launch(subnet, group="web", life_cycle="Terminating")
    lab.aws.attach(lab.aws.lab_eni(eni), dying.instance, 1)
    lab.aws.refuse("DetachNetworkInterface", eni, "IncorrectState", "first words", times=2)
    lab.aws.refuse("DetachNetworkInterface", eni, "IncorrectState", "other words", times=1)
    waiting = machine.start_eni_ctl("-a")
    wait_for_line(waiting, "first words")
    wait_for_line(waiting, "other words")
    out, err = waiting.communicate(timeout=OUTER_LIMIT)
    assert out.startswith(f"attached {eni} "), err
    refused = [line for line in err.splitlines() if "first words" in line]
    assert refused == []


def test_an_eni_that_stays_in_use_unseen_blocks_the_next_one_for_half_a_minute_only(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    """This host had it last, so that it may be its own: EC2 shows an attachment late."""
    other = lab.aws.create_eni(subnet, name="web")
    machine.write("/run/eni_ctl.lock", f"{eni} /etc/default/eni\n")
    in_use = "InvalidNetworkInterface.InUse"
    lab.aws.refuse("AttachNetworkInterface", eni, in_use, f"Interface: [{eni}] in use.")
    done = machine.eni_ctl("-a")
    assert done.stdout.startswith(f"attached {other} "), done.stderr
    assert f"{eni} is in use, and EC2 does not show yet by whom" in done.stderr
