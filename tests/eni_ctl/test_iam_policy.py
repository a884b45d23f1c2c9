"""The two IAM policies in the README: enough for all that eni_ctl.py does, and nothing too much.

The judge of both is another program (lab.judge); here it is asked directly, and by the lab's EC2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lab import TOP, Lab, Machine, await_that
from lab.imds import ACCOUNT
from lab.judge import SERVICE_DATA, Judge, Verdict
from lab.watching import last_line

from eni_ctl import rank

Policy = dict[str, Any]
Note = Callable[[str, object], None]

ARN = f"arn:aws:ec2:us-west-1:{ACCOUNT}"
MOVES = ("ec2:AttachNetworkInterface", "ec2:DetachNetworkInterface")
DESCRIBES = ("autoscaling:DescribeAutoScalingInstances", "ec2:DescribeNetworkInterfaces")
GROUP_TAG = "aws:autoscaling:groupName"
OWN_TAGS = {"Name": "web", GROUP_TAG: "web"}
# Tags of the resources of the matrix. A host may give an instance any name, but not that group.
ENIS = {
    "own ENI": {"Name": "web"},
    "foreign ENI": {"Name": "db"},
    "ENI without a name": {},
}
INSTANCES = {
    "own group's instance": OWN_TAGS,
    "foreign group's instance": {"Name": "web", GROUP_TAG: "db"},
    "instance in no group": {"Name": "web"},
}
INTRUSIONS = (
    ("ec2:CreateTags", f"{ARN}:network-interface/eni-0"),
    ("ec2:CreateTags", f"{ARN}:instance/i-0"),
    ("ec2:DeleteNetworkInterface", f"{ARN}:network-interface/eni-0"),
    ("ec2:ModifyNetworkInterfaceAttribute", f"{ARN}:network-interface/eni-0"),
    ("ec2:AssignPrivateIpAddresses", f"{ARN}:network-interface/eni-0"),
    ("ec2:TerminateInstances", f"{ARN}:instance/i-0"),
    ("ec2:ModifyInstanceAttribute", f"{ARN}:instance/i-0"),
    ("ec2:CreateRoute", f"{ARN}:route-table/rtb-0"),
    ("ec2:DescribeInstances", "*"),
    ("autoscaling:DescribePolicies", "*"),
)


def readme_policies() -> dict[str, Policy]:
    """The policies as they stand in README.md."""
    blocks = re.findall(r"```json\n(.*?)```", (TOP / "README.md").read_text(), re.S)
    scoped, simple = (json.loads(block) for block in blocks if '"Statement"' in block)
    return {"scoped": scoped, "simple": simple}


@pytest.fixture(params=readme_policies())
def policy(request: pytest.FixtureRequest) -> Policy:
    return readme_policies()[request.param]


@pytest.fixture
def simple() -> Policy:
    return readme_policies()["simple"]


@pytest.fixture
def scoped() -> Policy:
    return readme_policies()["scoped"]


@pytest.fixture(scope="module")
def judge(inside: None) -> Iterator[Judge]:
    with Judge() as judge:
        yield judge


def without(policy: Policy, action: str) -> Policy:
    statements = [
        {**statement, "Action": [a for a in statement["Action"] if a != action]}
        for statement in policy["Statement"]
    ]
    return {**policy, "Statement": [s for s in statements if s["Action"]]}


# --- what the policies allow


@pytest.mark.parametrize("action", MOVES)
@pytest.mark.parametrize("which", readme_policies())
def test_only_the_own_groups_eni_can_be_moved_and_only_at_the_own_groups_instances(
    judge: Judge, which: str, action: str, record_property: Note
) -> None:
    """The simple policy lets everything be moved."""
    policy = readme_policies()[which]
    allowed = set()
    for eni, eni_tags in ENIS.items():
        for instance, instance_tags in INSTANCES.items():
            verdicts = {
                judge.ask(policy, action, f"{ARN}:network-interface/eni-0", eni_tags),
                judge.ask(policy, action, f"{ARN}:instance/i-0", instance_tags),
            }
            if verdicts == {Verdict.ALLOWED}:
                allowed.add((eni, instance))
            verdict = "allowed" if (eni, instance) in allowed else "denied"
            record_property(f"{eni}, {instance}", verdict)
    everything = {(eni, instance) for eni in ENIS for instance in INSTANCES}
    own = {("own ENI", "own group's instance")}
    assert allowed == {"scoped": own, "simple": everything}[which]


@pytest.mark.parametrize("which", readme_policies())
def test_what_an_intruder_would_do_is_denied_even_with_the_own_groups_resources(
    judge: Judge, which: str, record_property: Note
) -> None:
    policy = readme_policies()[which]
    allowed = []
    for action, resource in INTRUSIONS:
        verdict = judge.ask(policy, action, resource, OWN_TAGS)
        record_property(f"{action}, {resource.removeprefix(f'{ARN}:')}", verdict.value)
        if verdict is not Verdict.NOT_ALLOWED:
            allowed.append((action, resource))
    assert allowed == []


@pytest.mark.parametrize("which", readme_policies())
def test_no_other_action_of_three_services_is_allowed(
    judge: Judge, which: str, record_property: Note
) -> None:
    """Of all that AWS's Service Authorization Reference lists, on what has the own group's tags."""
    actions = []
    for service in ("autoscaling", "ec2", "iam"):
        entries = json.loads((SERVICE_DATA / f"actions/{service}.json").read_text())
        actions += [f"{service}:{entry['name']}" for entry in entries.values()]
    policy = readme_policies()[which]
    allowed = set()
    for action in actions:
        if judge.ask(policy, action, "*", OWN_TAGS) is Verdict.ALLOWED:
            allowed.add(action)
    record_property(f"allowed of {len(actions)} actions", ", ".join(sorted(allowed)))
    unused = {"scoped": set(), "simple": {"autoscaling:DescribeAutoScalingGroups"}}
    assert allowed == {*MOVES, *DESCRIBES} | unused[which]


# --- eni_ctl.py with them


def test_the_readmes_policies_are_enough(
    lab: Lab, subnet: str, machine: Machine, policy: Policy
) -> None:
    lab.aws.set_policy(policy)
    assert machine.eni_ctl("-a").returncode == 0
    assert machine.eni_ctl("-s").returncode == 0
    machine.instance.life_cycle = "Terminating"
    heir = lab.launch(subnet, group="web")
    assert heir.eni_ctl("-a").returncode == 0
    assert heir.eni_ctl("-d").returncode == 0


def hold(lab: Lab, subnet: str, eni: str, group: str) -> Machine:
    """A dying instance of the group that holds the ENI."""
    holder = lab.launch(subnet, group=group)
    lab.aws.attach(lab.aws.lab_eni(eni), holder.instance, 1)
    await_that(lambda: lab.aws.lab_eni(eni).attachment_status == "attached")
    holder.instance.life_cycle = "Terminating"
    return holder


def test_an_eni_of_the_name_in_another_groups_hands_is_passed_over(
    lab: Lab, subnet: str, machine: Machine, eni: str, scoped: Policy
) -> None:
    """Both holders are dying. The foreign one has the ENI that this host tries first."""
    me = machine.instance.id
    foreign = lab.aws.create_eni(subnet, name="spare")
    while rank(me, foreign) > rank(me, eni):
        foreign = lab.aws.create_eni(subnet, name="spare")
    lab.aws.rename(foreign, "web")
    hold(lab, subnet, eni, "web")
    stranger = hold(lab, subnet, foreign, "db")
    lab.aws.set_policy(scoped)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert f":instance/{stranger.instance.id} because no identity-based policy" in done.stderr
    assert machine.state()["ENI_ID"] == eni
    assert lab.aws.eni(foreign).instance.id == stranger.instance.id
    first = next(call for call in lab.aws.calls if call.action == "DetachNetworkInterface")
    assert (first.params["AttachmentId"], first.status) == (
        lab.aws.eni(foreign).attachment_id,
        403,
    )


def test_where_only_another_group_has_the_eni_awss_words_tell_why(
    lab: Lab, subnet: str, machine: Machine, eni: str, scoped: Policy
) -> None:
    stranger = hold(lab, subnet, eni, "db")
    lab.aws.set_policy(scoped)
    done = machine.eni_ctl("-a")
    assert done.returncode == 4
    last = last_line(done)
    assert f"{eni} is held by {stranger.instance.id}" in last
    assert "not allowed: ec2:DetachNetworkInterface: " in last
    assert f":instance/{stranger.instance.id} because no identity-based policy allows" in last


def test_force_takes_nothing_that_the_policy_does_not_let_this_host_attach(
    lab: Lab, subnet: str, eni: str, scoped: Policy
) -> None:
    """The policy lets it be detached, because the ENI and its holder have the tags."""
    peer = hold(lab, subnet, eni, "web")
    machine = lab.launch(subnet)  # in no group, and so without the tag
    lab.aws.set_policy(scoped)
    for options in (["--dry-run"], []):
        done = machine.eni_ctl("-a", "-n", "web", "-f", *options)
        assert done.returncode == 4
        assert "not allowed: ec2:AttachNetworkInterface" in last_line(done)
        assert lab.aws.eni(eni).instance.id == peer.instance.id
        assert lab.aws.lab_eni(eni).attachment_status == "attached"


def test_another_name_than_the_policys_is_refused(
    lab: Lab, subnet: str, machine: Machine, scoped: Policy
) -> None:
    db = lab.aws.create_eni(subnet, name="db")
    lab.aws.set_policy(scoped)
    done = machine.eni_ctl("-a", "-n", "db")
    assert done.returncode == 4
    last = last_line(done)
    assert f":network-interface/{db} because no identity-based policy allows" in last
    lab.aws.set_policy(json.loads(json.dumps(scoped).replace('/Name": "web"', '/Name": "db"')))
    done = machine.eni_ctl("-a", "-n", "db")
    assert done.returncode == 0, done.stderr


def test_an_instance_in_no_group_needs_a_tag_of_its_own(
    lab: Lab, subnet: str, eni: str, scoped: Policy
) -> None:
    machine = lab.launch(subnet)
    lab.aws.ec2.create_tags([machine.instance.id], {"eni": "web"})
    lab.aws.set_policy(scoped)
    assert machine.eni_ctl("-a", "-n", "web").returncode == 4
    lab.aws.set_policy(json.loads(json.dumps(scoped).replace(GROUP_TAG, "eni")))
    done = machine.eni_ctl("-a", "-n", "web")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("change", ["the instance leaves its group", "the ENI is renamed"])
def test_a_host_cannot_detach_what_has_lost_the_policys_tag(
    lab: Lab, machine: Machine, eni: str, policy: Policy, change: str
) -> None:
    """With the simple policy it can."""
    lab.aws.set_policy(policy)
    assert machine.eni_ctl("-a").returncode == 0
    if "leaves" in change:
        lab.aws.leave(machine.instance)
        resource = f":instance/{machine.instance.id} "
    else:
        lab.aws.rename(eni, "old")
        resource = f":network-interface/{eni} "
    done = machine.eni_ctl("-d")
    if policy == readme_policies()["simple"]:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 4
        assert resource in last_line(done)


@pytest.mark.parametrize("verb", ["-a", "-d"])
def test_a_denial_because_the_attachment_has_just_gone_does_no_harm(
    lab: Lab, subnet: str, machine: Machine, eni: str, scoped: Policy, verb: str
) -> None:
    """An attachment that EC2 does not know any more has no tag that the policy could allow."""
    lab.aws.set_policy(scoped)
    holder = machine if verb == "-d" else hold(lab, subnet, eni, "web")
    if verb == "-d":
        assert machine.eni_ctl("-a").returncode == 0

    def detach() -> None:
        lab.aws.detach(lab.aws.lab_eni(eni))
        await_that(lambda: lab.aws.eni(eni).attachment_id is None)

    lab.aws.fail("DetachNetworkInterface", how="hang", seconds=0.01, do=detach)
    done = machine.eni_ctl(verb)
    assert done.returncode == 0, done.stderr
    detaches = [call for call in lab.aws.calls if call.action == "DetachNetworkInterface"]
    assert [call.status for call in detaches] == [403]
    assert lab.aws.eni(eni).instance is not holder.instance.model


# --- what is missing


@pytest.mark.parametrize(
    ("action", "verb"),
    [
        ("autoscaling:DescribeAutoScalingInstances", "-a"),
        ("autoscaling:DescribeAutoScalingInstances", "-s"),
        ("ec2:DescribeNetworkInterfaces", "-a"),
        ("ec2:DescribeNetworkInterfaces", "-d"),
        ("ec2:AttachNetworkInterface", "-a"),
        ("ec2:DetachNetworkInterface", "-d"),
    ],
)
def test_a_missing_action_needs_a_person_and_is_named(
    lab: Lab, machine: Machine, scoped: Policy, action: str, verb: str
) -> None:
    if verb == "-d":
        assert machine.eni_ctl("-a").returncode == 0
    lab.aws.set_policy(without(scoped, action))
    done = machine.eni_ctl(verb)
    assert done.returncode == 4
    last = last_line(done)
    assert f"not allowed: {action}: " in last
    assert f"because no identity-based policy allows the {action} action" in last
    assert "Encoded" not in last


def test_a_take_over_without_the_permission_to_detach_needs_a_person(
    lab: Lab, subnet: str, machine: Machine, simple: Policy
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    lab.aws.set_policy(without(simple, "ec2:DetachNetworkInterface"))
    machine.instance.life_cycle = "Terminating"
    done = lab.launch(subnet, group="web").eni_ctl("-a")
    assert done.returncode == 4
    last = last_line(done)
    assert "EC2 does not detach it: not allowed: ec2:DetachNetworkInterface: " in last


def test_a_permission_that_arrives_late_is_waited_for(lab: Lab, machine: Machine) -> None:
    lab.aws.fail("DescribeNetworkInterfaces", code="UnauthorizedOperation", status=403, times=2)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
