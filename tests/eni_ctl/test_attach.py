"""eni_ctl.py -a as a process against the lab: what it does with what it finds."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any, Literal

import pytest
from lab import Lab, Machine, await_that
from lab.vpc import OUTER_LIMIT
from lab.watching import give_up, last_line, wait_for_line

from eni_ctl import LOOK_AGAIN, STATES_AGE


def actions(lab: Lab) -> list[str]:
    return [call.action for call in lab.aws.calls]


def test_attaches_the_eni_named_after_the_group(lab: Lab, machine: Machine, eni: str) -> None:
    done = machine.eni_ctl("-a")
    assert (done.returncode, done.stdout) == (0, f"attached {eni} (10.0.1.22) as eth1\n"), (
        done.stderr
    )
    assert machine.state() == {
        "FQDN": "web.example.com",
        "IP": "10.0.1.22",
        "GW": "10.0.1.1",
        "DEVICE": "eth1",
        "ASG_NAME": "web",
        "INSTANCE_ID": machine.instance.id,
        "ENI_ID": eni,
        "ATTACHMENT_ID": lab.aws.eni(eni).attachment_id,
    }


def actions_of_an_attach(lab: Lab, machine: Machine) -> list[str]:
    """Without second looks, which a run is right to take where this machine is so busy: at
    life-cycle states that were too old when they were needed, and at an ENI whose device has not
    appeared yet."""
    started = time.monotonic()
    assert machine.eni_ctl("-a").returncode == 0
    took = time.monotonic() - started
    called = actions(lab)
    after = called.index("DescribeNetworkInterfaces") + 1
    if took > STATES_AGE and called[after] == "DescribeAutoScalingInstances":
        del called[after]
    while took > LOOK_AGAIN[0] and called[-1] == "DescribeNetworkInterfaces":
        called.pop()
    return called


def test_an_attach_takes_three_api_calls(lab: Lab, machine: Machine) -> None:
    assert actions_of_an_attach(lab, machine) == [
        "DescribeAutoScalingInstances",
        "DescribeNetworkInterfaces",
        "AttachNetworkInterface",
    ]


def test_an_attach_takes_two_api_calls_where_imds_has_the_tags(
    lab: Lab, subnet: str, eni: str
) -> None:
    machine = lab.launch(subnet, group="web", tags_in_imds=True)
    called = actions_of_an_attach(lab, machine)
    assert called == ["DescribeNetworkInterfaces", "AttachNetworkInterface"]


def test_a_second_run_attaches_nothing_and_rewrites_the_state_file(
    lab: Lab, machine: Machine, eni: str
) -> None:
    first = machine.eni_ctl("-a")
    state = machine.state()
    machine.write("/etc/default/eni", "FQDN=stale\n")
    second = machine.eni_ctl("-a")
    assert second.stdout == first.stdout
    assert second.returncode == 0
    assert machine.state() == state
    assert actions(lab).count("AttachNetworkInterface") == 1


def test_the_name_option_needs_no_group(lab: Lab, subnet: str, eni: str) -> None:
    machine = lab.launch(subnet)
    done = machine.eni_ctl("-a", "-n", "web")
    assert done.returncode == 0, done.stderr
    assert machine.state()["ASG_NAME"] == "web"


def test_an_instance_in_no_group_needs_a_person(lab: Lab, subnet: str) -> None:
    machine = lab.launch(subnet)
    done = machine.eni_ctl("-a")
    assert done.returncode == 4
    assert last_line(done) == (
        f"eni_ctl.py: {machine.instance.id} is in no Auto Scaling group, and no -n NAME was given"
    )


def test_a_group_known_late_is_waited_for(lab: Lab, subnet: str, eni: str) -> None:
    machine = lab.launch(subnet)
    lab.aws.fail(
        "DescribeAutoScalingInstances",
        skip=1,
        how="hang",
        seconds=0.01,
        do=lambda: lab.aws.join(machine.instance, "web"),
    )
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr


def test_no_eni_of_the_name_needs_a_person(lab: Lab, subnet: str) -> None:
    machine = lab.launch(subnet, group="web")
    lab.aws.create_eni(subnet, name="Web")
    done = machine.eni_ctl("-a")
    assert done.returncode == 4
    assert last_line(done) == 'eni_ctl.py: no network interface named "web" in us-west-1'


def test_an_eni_in_another_zone_needs_a_person(lab: Lab, subnet: str) -> None:
    eni = lab.aws.create_eni(lab.add_subnet("10.0.2.0/24", "c"), name="web")
    machine = lab.launch(subnet, group="web")
    done = machine.eni_ctl("-a")
    assert done.returncode == 4
    assert last_line(done) == (
        f'eni_ctl.py: no usable network interface named "web" in us-west-1a: {eni} is in us-west-1c'
    )
    assert lab.aws.eni(eni).attachment_id is None


def test_an_eni_of_the_instances_own_zone_is_taken_where_two_zones_have_one(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    other = lab.aws.create_eni(lab.add_subnet("10.0.2.0/24", "c"), name="web")
    assert machine.eni_ctl("-a").returncode == 0
    assert lab.aws.eni(eni).instance.id == machine.instance.id
    assert lab.aws.eni(other).attachment_id is None


def test_primary_interfaces_of_the_same_name_are_no_candidates(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    lab.launch(subnet, group="web", primary_name="web")
    own = lab.launch(subnet, group="web", primary_name="web")
    done = own.eni_ctl("-a")
    assert done.stdout == f"attached {eni} (10.0.1.22) as eth1\n"


def test_only_primary_interfaces_of_the_name_need_a_person(lab: Lab, subnet: str) -> None:
    machine = lab.launch(subnet, group="web", primary_name="web")
    done = machine.eni_ctl("-a")
    assert done.returncode == 4
    assert "is the primary one of " + machine.instance.id in done.stderr


@pytest.mark.parametrize("state", ["Terminating", "Terminating:Wait", "Terminated"])
def test_an_eni_of_a_terminating_instance_is_taken_over_without_waiting_for_its_shutdown(
    lab: Lab, subnet: str, machine: Machine, eni: str, state: str
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    machine.instance.life_cycle = state
    heir = lab.launch(subnet, group="web")
    done = heir.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"attached {eni} (10.0.1.22) as eth1\n"
    assert f"{eni} is held by {machine.instance.id} ({state})" in done.stderr
    assert lab.aws.eni(eni).instance.id == heir.instance.id
    assert machine.instance.model.state == "running"
    assert machine.devices() == ["eth0"]


def test_an_eni_of_an_instance_in_service_is_never_taken(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    rival = lab.launch(subnet, group="web")
    held = rf"^eni_ctl.py: {eni} is held by {machine.instance.id} \(InService\) since 20\S+ \S+; "
    give_up(rival, "-a", over=held)
    assert "DetachNetworkInterface" not in actions(lab)
    assert actions(lab).count("AttachNetworkInterface") == 1
    assert not rival.exists("/etc/default/eni")


@pytest.mark.parametrize("state", ["Pending:Wait", "Standby", "Detaching", "EnteringStandby"])
def test_an_eni_of_an_instance_in_any_other_state_is_never_taken(
    lab: Lab, subnet: str, machine: Machine, eni: str, state: str
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    machine.instance.life_cycle = state
    spare = lab.launch(subnet, group="web")
    give_up(spare, "-a", over=rf"is held by {machine.instance.id} \({state}\)")
    assert lab.aws.eni(eni).instance.id == machine.instance.id


def test_an_eni_of_an_instance_in_no_group_is_never_taken(lab: Lab, subnet: str, eni: str) -> None:
    holder = lab.launch(subnet)
    assert holder.eni_ctl("-a", "-n", "web").returncode == 0
    spare = lab.launch(subnet, group="web")
    give_up(spare, "-a", over=rf"is held by {holder.instance.id} \(in no group\)")
    assert lab.aws.eni(eni).instance.id == holder.instance.id


def test_force_takes_an_eni_even_from_an_instance_in_service(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    rival = lab.launch(subnet, group="web")
    done = rival.eni_ctl("-a", "-f")
    assert done.returncode == 0, done.stderr
    assert lab.aws.eni(eni).instance.id == rival.instance.id


def test_an_eni_that_is_released_is_noticed_while_waiting(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    spare = lab.launch(subnet, group="web")
    waiting = spare.start_eni_ctl("-a")
    holding = rf"{eni} is held by {machine.instance.id} \(InService\)"
    wait_for_line(waiting, f"waiting, [0-9]+ s of 300 s: .*{holding}")
    assert machine.eni_ctl("-d").returncode == 0
    out, _ = waiting.communicate(timeout=OUTER_LIMIT)
    assert out == f"attached {eni} (10.0.1.22) as eth1\n"


def test_a_holder_that_starts_to_terminate_is_noticed_while_waiting(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    waiting = lab.launch(subnet, group="web").start_eni_ctl("-a")
    wait_for_line(waiting, "is held by")
    machine.instance.life_cycle = "Terminating:Wait"
    out, _ = waiting.communicate(timeout=OUTER_LIMIT)
    assert out == f"attached {eni} (10.0.1.22) as eth1\n"


@pytest.mark.parametrize("code", ["IncorrectState", "OperationNotPermitted"])
def test_where_ec2_refuses_the_detach_the_shutdown_is_waited_for(
    lab: Lab, subnet: str, machine: Machine, eni: str, code: str
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    lab.aws.fail("DetachNetworkInterface", code=code, status=400, times=-1)
    lab.aws.shutdown_delay = 13  # longer than what needs a person is tried
    lab.terminate(machine)
    done = lab.launch(subnet, group="web").eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"attached {eni} (10.0.1.22) as eth1\n"


def test_a_detach_that_hangs_at_a_terminating_holder_is_forced_only_after_a_while(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    lab.aws.stuck.add(eni)
    machine.instance.life_cycle = "Terminating"
    started = time.monotonic()
    done = lab.launch(subnet, group="web").eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started > 30
    forced = [c.params.get("Force") for c in lab.aws.calls if c.action == "DetachNetworkInterface"]
    assert forced == [None, "true"]


@pytest.mark.parametrize("state", ["Warmed:Pending", "Warmed:Running"])
def test_a_warmed_instance_claims_nothing_until_it_is_in_service(
    lab: Lab, subnet: str, eni: str, state: str
) -> None:
    machine = lab.launch(subnet, group="web", life_cycle=state)
    waiting = machine.start_eni_ctl("-a")
    reason = f"this instance is {state}: it claims nothing until it is in service"
    wait_for_line(waiting, f"waiting, .*{reason}")
    assert lab.aws.eni(eni).attachment_id is None
    machine.instance.life_cycle = "InService"
    out, _ = waiting.communicate(timeout=OUTER_LIMIT)
    assert out == f"attached {eni} (10.0.1.22) as eth1\n"


@pytest.mark.parametrize("tags_in_imds", [False, True])
def test_a_terminating_instance_claims_nothing(
    lab: Lab, subnet: str, eni: str, tags_in_imds: bool
) -> None:
    machine = lab.launch(subnet, group="web", life_cycle="Terminating", tags_in_imds=tags_in_imds)
    done = machine.eni_ctl("-a")
    assert done.returncode == 1
    reason = r"eni_ctl.py: this instance is Terminat\w+: it claims nothing"
    assert re.fullmatch(reason, last_line(done))
    assert lab.aws.eni(eni).attachment_id is None


def test_an_instance_that_begins_to_terminate_while_it_waits_claims_nothing(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    spare = lab.launch(subnet, group="web")
    waiting = spare.start_eni_ctl("-a")
    wait_for_line(waiting, "is held by")
    spare.instance.life_cycle = "Terminating"
    _, err = waiting.communicate(timeout=OUTER_LIMIT)
    assert waiting.returncode == 1
    assert err.endswith("this instance is Terminating: it claims nothing\n")


def test_after_a_lost_race_the_next_eni_of_the_pool_is_taken(
    lab: Lab, subnet: str, eni: str
) -> None:
    """Both are shown as free, for describe lags; the one that is tried first is not."""
    enis = {eni, lab.aws.create_eni(subnet, name="web", ip="10.0.1.23")}
    rival, machine = lab.launch(subnet, group="web"), lab.launch(subnet, group="web")
    first = machine.eni_ctl("-a", "--dry-run").stdout.split("NetworkInterfaceId ")[1].split(",")[0]
    lab.aws.describe_lag = 60
    lab.aws.attach(lab.aws.lab_eni(first), rival.instance, 1)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    lost = f"eni_ctl.py: {first} was taken by another host meanwhile"
    assert lost in done.stderr.splitlines()
    (other,) = enis - {first}
    assert done.stdout.startswith(f"attached {other} ")


def test_every_host_of_a_pool_gets_an_eni(lab: Lab, subnet: str) -> None:
    enis = {lab.aws.create_eni(subnet, name="web") for _ in range(3)}
    machines = [lab.launch(subnet, group="web") for _ in enis]
    running = [machine.start_eni_ctl("-a") for machine in machines]
    for process in running:
        _, err = process.communicate(timeout=OUTER_LIMIT)
        assert process.returncode == 0, err
    assert {machine.state()["ENI_ID"] for machine in machines} == enis


def test_a_taken_device_index_is_passed_over(lab: Lab, subnet: str, machine: Machine) -> None:
    other = lab.aws.create_eni(subnet, name="data")
    lab.aws.attach(lab.aws.lab_eni(other), machine.instance, 1)
    await_that(machine.appeared.is_set)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert machine.state()["DEVICE"] == "eth2"
    indexes = [c.params["DeviceIndex"] for c in lab.aws.calls if "DeviceIndex" in c.params]
    assert indexes == ["1", "2"]


def test_an_instance_may_have_more_network_interfaces_than_sixteen(lab: Lab, subnet: str) -> None:
    """Some types have 24 (EC2's DescribeInstanceTypes, MaximumNetworkInterfaces, of 2026)."""
    lab.aws.create_eni(subnet, name="web")
    machine = lab.launch(subnet, group="web", max_interfaces=24)
    for index in range(1, 17):
        other = lab.aws.create_eni(subnet, name="data")
        lab.aws.attach(lab.aws.lab_eni(other), machine.instance, index)
    await_that(lambda: len(machine.device_of) == 16)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    indexes = [c.params["DeviceIndex"] for c in lab.aws.calls if "DeviceIndex" in c.params]
    assert indexes[-1] == "17"


def test_an_instance_without_a_free_slot_needs_a_person(lab: Lab, subnet: str, eni: str) -> None:
    machine = lab.launch(subnet, group="web", max_interfaces=1)
    done = machine.eni_ctl("-a")
    assert done.returncode == 4
    assert "no free slot" in done.stderr
    assert "AttachmentLimitExceeded" in done.stderr


@pytest.mark.parametrize("name", ["web*", "w?b", "back\\slash", "we[b]", "*", "ünïcode name"])
def test_wildcards_in_the_name_mean_themselves(lab: Lab, subnet: str, eni: str, name: str) -> None:
    wanted = lab.aws.create_eni(subnet, name=name, ip="10.0.1.33")
    machine = lab.launch(subnet, group=name)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"attached {wanted} (10.0.1.33) as eth1\n"
    assert machine.state()["ASG_NAME"] == name


def test_a_name_on_the_second_page_is_found(lab: Lab, subnet: str) -> None:
    machine = lab.launch(subnet, group="web")
    far = lab.add_subnet("10.0.2.0/24", "c")
    for _ in range(3):
        lab.aws.create_eni(far, name="web")
    eni = lab.aws.create_eni(subnet, name="web")
    lab.aws.page_size = 1
    done = machine.eni_ctl("-a")
    assert done.stdout.startswith(f"attached {eni} ")


@pytest.mark.parametrize("device", ["ens6", "enX1", "eth10"])
def test_the_device_is_found_whatever_its_name(lab: Lab, machine: Machine, device: str) -> None:
    machine.device_names = [device]
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert machine.state()["DEVICE"] == device


def test_a_bridge_on_the_eni_is_not_taken_for_it(lab: Lab, machine: Machine) -> None:
    machine.device_names = ["ens6"]
    assert machine.eni_ctl("-a").returncode == 0
    machine.ip("link", "add", "br0", "type", "bridge")
    machine.ip("link", "set", "ens6", "master", "br0")
    addresses = [machine.read(f"/sys/class/net/{name}/address") for name in ("br0", "ens6")]
    assert addresses[0] == addresses[1]
    assert machine.eni_ctl("-a").returncode == 0
    assert machine.state()["DEVICE"] == "ens6"


def test_the_gateway_of_a_slash_20_is_its_first_address(lab: Lab) -> None:
    subnet = lab.add_subnet("10.0.16.0/20")
    lab.aws.create_eni(subnet, name="web", ip="10.0.22.7")
    machine = lab.launch(subnet, group="web", ip="10.0.31.9")
    assert machine.eni_ctl("-a").returncode == 0
    assert machine.state()["GW"] == "10.0.16.1"


def test_an_eni_without_ipv4_works(lab: Lab) -> None:
    subnet = lab.add_subnet("10.0.1.0/24", cidr6="2001:db8:0:1::/64")
    lab.aws.create_eni(subnet, name="web", ipv4=False, ipv6=["2001:db8:0:1::22"])
    machine = lab.launch(subnet, group="web", ip="10.0.1.10", ipv6=["2001:db8:0:1::10"])
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert machine.state()["IP"] == "2001:db8:0:1::22"
    assert machine.state()["GW"] == "fe80:ec2::1"


def test_a_device_that_never_appears_is_a_failure_at_the_deadline(
    lab: Lab, machine: Machine, eni: str
) -> None:
    lab.aws.never_plug.add(eni)
    mac = lab.aws.eni(eni).mac_address
    missing = f"^eni_ctl.py: no device with {eni}'s MAC address {mac} has appeared; "
    give_up(machine, "-a", over=missing)
    assert not machine.exists("/etc/default/eni")


def test_an_address_that_never_comes_is_a_failure_at_the_deadline(
    lab: Lab, machine: Machine, eni: str
) -> None:
    machine.configures = False
    give_up(machine, "-a", over=f"^eni_ctl.py: eth1 is not up with {eni}'s address 10.0.1.22; ")


def test_the_region_comes_from_imds(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(region="eu-central-1")
    subnet = lab.add_subnet("10.0.1.0/24")
    lab.aws.create_eni(subnet, name="web")
    machine = lab.launch(subnet, group="web")
    assert machine.eni_ctl("-a").returncode == 0


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
@pytest.mark.parametrize("region", ["eu-central-1", "evil.example/"])
def test_another_region_in_the_environment_is_ignored_with_one_line(
    lab: Lab, machine: Machine, variable: str, region: str
) -> None:
    environment: dict[str, Any] = {variable: region}
    done = machine.eni_ctl("-a", **environment)
    assert done.returncode == 0, done.stderr
    assert f'ignoring {variable}="{region}", because this instance is in us-west-1\n' in done.stderr
    assert lab.aws.eni(machine.state()["ENI_ID"]).instance.id == machine.instance.id


def test_a_name_server_that_never_answers_does_not_outlive_the_deadline(
    lab: Lab, machine: Machine
) -> None:
    machine.write("/etc/hosts", "127.0.0.1 localhost\n")
    machine.write("/etc/resolv.conf", "nameserver 10.0.1.99\noptions timeout:30\n")
    give_up(machine, "-a", over=r"^eni_ctl.py: DescribeAutoScaling\S+ ")


def test_two_runs_at_once_attach_one_eni(lab: Lab, subnet: str, machine: Machine) -> None:
    lab.aws.create_eni(subnet, name="web")
    running = [machine.start_eni_ctl("-a") for _ in range(2)]
    results = [process.communicate(timeout=OUTER_LIMIT) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert actions(lab).count("AttachNetworkInterface") == 1


def test_a_detach_by_hand_is_let_in_beside_a_run_that_waits(
    lab: Lab, machine: Machine, eni: str
) -> None:
    lab.aws.never_plug.add(eni)
    waiting = machine.start_eni_ctl("-a")
    wait_for_line(waiting, "no device with")
    first = lab.aws.eni(eni).attachment_id
    done = machine.eni_ctl("-d")
    assert (done.returncode, done.stdout) == (0, f"detached {eni} (10.0.1.22)\n"), done.stderr
    assert lab.aws.eni(eni).attachment_id != first
    waiting.kill()
    waiting.communicate()


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_in_mid_claim_a_second_run_holds_one_eni(
    lab: Lab, subnet: str, machine: Machine, when: Literal["before", "after"]
) -> None:
    """Even where EC2 still shows every ENI of the pool as free."""
    lab.aws.create_eni(subnet, name="web")
    lab.aws.describe_lag = 2
    killed: list[subprocess.Popen[str]] = []
    lab.aws.fail("AttachNetworkInterface", when=when, how="drop", do=lambda: killed[0].kill())
    killed.append(machine.start_eni_ctl("-a"))
    killed[0].communicate(timeout=OUTER_LIMIT)
    assert killed[0].returncode == -signal.SIGKILL
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    held = [e.model.id for e in lab.aws.enis.values() if e.model.attachment_id]
    assert sorted(held) == sorted([machine.instance.eni_id, machine.state()["ENI_ID"]])


def test_an_answer_lost_after_the_attach_took_effect_costs_no_second_eni(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    lab.aws.create_eni(subnet, name="web")
    lab.aws.describe_lag = 2
    lab.aws.fail("AttachNetworkInterface", when="after", how="reset")
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert len(lab.aws.instances[machine.instance.id].model.nics) == 2


@pytest.mark.parametrize("action", ["DescribeAutoScalingInstances", "DescribeNetworkInterfaces"])
@pytest.mark.parametrize(
    ("code", "status"), [("RequestLimitExceeded", 503), ("Throttling", 400), ("InternalError", 500)]
)
def test_throttling_and_server_errors_are_waited_out(
    lab: Lab, machine: Machine, action: str, code: str, status: int
) -> None:
    lab.aws.fail(action, code=code, status=status, times=2)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    answers = [call.status for call in lab.aws.calls if call.action == action]
    assert answers[:3] == [status, status, 200]


def test_throttling_past_the_deadline_is_a_failure(lab: Lab, machine: Machine) -> None:
    lab.aws.fail("DescribeNetworkInterfaces", times=-1)
    refused = "DescribeNetworkInterfaces: RequestLimitExceeded: Request limit exceeded.; "
    done = give_up(machine, "-a", over=f"^eni_ctl.py: {refused}")
    seconds = int(done.args[-1])
    assert len(lab.aws.calls) <= 0.4 * seconds  # without backing off it would be one a second


def test_an_instance_that_ec2_does_not_know_yet_is_waited_for(lab: Lab, machine: Machine) -> None:
    lab.aws.fail("AttachNetworkInterface", code="InvalidInstanceID.NotFound", status=400, times=2)
    assert machine.eni_ctl("-a").returncode == 0


@pytest.mark.parametrize("how", ["reset", "empty", "truncate", "html"])
def test_cut_off_or_foreign_answers_are_asked_for_again(
    lab: Lab, machine: Machine, how: Any
) -> None:
    lab.aws.fail("DescribeNetworkInterfaces", how=how, status=200)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr


def test_a_call_that_hangs_does_not_outlive_the_deadline(lab: Lab, machine: Machine) -> None:
    lab.aws.fail("DescribeNetworkInterfaces", how="hang", times=-1, seconds=600)
    give_up(machine, "-a", over=r"^eni_ctl.py: DescribeNetworkInterfaces \(")
