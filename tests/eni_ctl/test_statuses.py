"""What EC2 says of an ENI and of its attachment: each status of the API reference counts."""

from __future__ import annotations

import pytest
from lab import Lab, Machine, await_that, odd
from lab.imds import ACCOUNT
from lab.vpc import OUTER_LIMIT
from lab.watching import (
    all_at_once,
    attached_by,
    await_waiting,
    calls,
    holder,
    wait_for_line,
)

BUSY = ["pending", "associated", "in-use", "attaching", "detaching"]


# --- an ENI that is neither free nor attached


def test_an_interface_that_is_busy_is_waited_for_and_its_status_named(
    lab: Lab, subnet: str
) -> None:
    """hashicorp/terraform-provider-aws issue 27513 has one that is in use without a holder."""

    def waits(case: tuple[Machine, str]) -> None:
        machine, eni = case
        status = lab.aws.lab_eni(eni).status
        waiting = machine.start_eni_ctl("-a")
        wait_for_line(waiting, f"waiting, .*{eni}.*{status}")
        assert attached_by(lab, machine) == []
        lab.aws.lab_eni(eni).status = ""
        out, err = waiting.communicate(timeout=OUTER_LIMIT)
        assert out.startswith(f"attached {eni} "), err

    cases = []
    for status in BUSY:
        eni = lab.aws.create_eni(subnet, name=status, status=status)
        cases.append((lab.launch(subnet, group=status), eni))
    all_at_once(cases, waits)


def test_force_does_not_touch_an_interface_that_is_busy_without_a_holder(
    lab: Lab, subnet: str
) -> None:
    def waits(case: tuple[Machine, str]) -> None:
        machine, status = case
        await_waiting(machine, "-a", "-f", for_what=f'has the status "{status}"')

    cases = []
    for status in BUSY:
        lab.aws.create_eni(subnet, name=status, status=status)
        cases.append((lab.launch(subnet, group=status), status))
    all_at_once(cases, waits)
    assert calls(lab, "AttachNetworkInterface") == calls(lab, "DetachNetworkInterface") == 0


def test_a_free_interface_is_taken_beside_a_busy_one(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    lab.aws.create_eni(subnet, name="web", status="pending")
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert attached_by(lab, machine) == [eni]


# --- a stale attachment: available, with an Attachment that is detached


@pytest.mark.parametrize("whose", ["ours", "another's"])
def test_a_stale_attachment_does_not_count(
    lab: Lab, machine: Machine, eni: str, whose: str
) -> None:
    """iasql/iasql pull 1576; API_NetworkInterfaceAttachment has the status detached."""
    instance = machine.instance.id if whose == "ours" else "i-0123456789abcdef0"
    lab.aws.lab_eni(eni).change = odd.with_stale_attachment(instance, ACCOUNT)
    assert machine.eni_ctl("-s").returncode == 3
    assert machine.eni_ctl("-d").returncode == 0
    done = machine.eni_ctl("-a")
    assert (done.returncode, done.stdout) == (0, f"attached {eni} (10.0.1.22) as eth1\n"), done
    assert calls(lab, "AttachNetworkInterface") == 1
    assert calls(lab, "DetachNetworkInterface") == 0
    assert machine.state()["ATTACHMENT_ID"] == lab.aws.eni(eni).attachment_id


# --- network cards


def test_an_interface_at_index_0_of_the_second_card_is_no_primary_one(
    lab: Lab, subnet: str, eni: str
) -> None:
    """Each card counts its own indexes: amazon-ec2-net-utils issue 104, cloud-init pull 6644."""
    machine = lab.launch(subnet, group="web", ip="10.0.1.10", cards=2)
    lab.aws.attach(lab.aws.lab_eni(eni), machine.instance, 0, card=1)
    await_that(machine.appeared.is_set)
    done = machine.eni_ctl("-a")
    assert (done.returncode, done.stdout) == (0, f"attached {eni} (10.0.1.22) as eth1\n"), done
    assert calls(lab, "AttachNetworkInterface") == 0
    assert machine.eni_ctl("-s").returncode == 0
    done = machine.eni_ctl("-d")
    assert (done.returncode, done.stdout) == (0, f"detached {eni} (10.0.1.22)\n"), done
    assert holder(lab, eni) is None


def test_an_interface_at_index_0_of_a_dying_holders_second_card_is_taken_over(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    dying = lab.launch(subnet, group="web", cards=2)
    lab.aws.attach(lab.aws.lab_eni(eni), dying.instance, 0, card=1)
    await_that(dying.appeared.is_set)
    dying.instance.life_cycle = "Terminating"
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert holder(lab, eni) == machine.instance.id


def test_an_index_that_is_taken_on_another_card_is_free_on_the_first(
    lab: Lab, subnet: str, eni: str
) -> None:
    """EC2 mixes them up where a request does not name the card: cilium/cilium pull 42512."""
    machine = lab.launch(subnet, group="web", ip="10.0.1.10", cards=2)
    other = lab.aws.create_eni(subnet, name="data")
    lab.aws.attach(lab.aws.lab_eni(other), machine.instance, 1, card=1)
    await_that(machine.appeared.is_set)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert calls(lab, "AttachNetworkInterface") == 1
    assert lab.aws.eni(eni).device_index == 1


# --- while the device has not appeared, EC2 is looked at again


def test_an_attachment_that_ec2_undoes_is_made_again(lab: Lab, machine: Machine, eni: str) -> None:
    """aws/amazon-ecs-agent issue 1520."""
    lab.aws.never_plug.add(eni)
    lab.aws.lab_eni(eni).undone_after = [3]
    running = machine.start_eni_ctl("-a")
    await_that(lambda: not lab.aws.lab_eni(eni).undone_after)  # it is attached, for 3 s
    await_that(lambda: holder(lab, eni) is None)
    lab.aws.never_plug.clear()
    out, err = running.communicate(timeout=OUTER_LIMIT)
    assert out == f"attached {eni} (10.0.1.22) as eth1\n", err
    assert calls(lab, "AttachNetworkInterface") == 2
    assert machine.state()["ATTACHMENT_ID"] == lab.aws.eni(eni).attachment_id


@pytest.mark.parametrize("plugged", [True, False])
def test_a_peer_that_takes_the_interface_meanwhile_is_named(
    lab: Lab, subnet: str, machine: Machine, eni: str, plugged: bool
) -> None:
    """Without its device, or with a device that has no address yet."""
    peer = lab.launch(subnet, group="web")
    machine.configures = False
    if not plugged:
        lab.aws.never_plug.add(eni)
    running = machine.start_eni_ctl("-a")
    await_that(lambda: lab.aws.lab_eni(eni).attachment_status == "attached")
    lab.aws.lab_eni(eni).status = "pending"  # so that nobody else attaches it meanwhile
    lab.aws.detach(lab.aws.lab_eni(eni), force=True)
    await_that(lambda: holder(lab, eni) is None)
    lab.aws.attach(lab.aws.lab_eni(eni), peer.instance, 1)
    lab.aws.lab_eni(eni).status = ""
    wait_for_line(running, f"{eni} .*{peer.instance.id}")
    lab.aws.never_plug.clear()
    machine.configures = True
    lab.aws.detach(lab.aws.lab_eni(eni), force=True)
    out, err = running.communicate(timeout=OUTER_LIMIT)
    assert out == f"attached {eni} (10.0.1.22) as eth1\n", err


def test_an_interface_that_is_deleted_meanwhile_is_missed(
    lab: Lab, machine: Machine, eni: str
) -> None:
    lab.aws.never_plug.add(eni)
    running = machine.start_eni_ctl("-a")
    await_that(lambda: lab.aws.lab_eni(eni).attachment_status == "attached")
    lab.aws.lab_eni(eni).status = "pending"  # so that nobody attaches it again
    lab.aws.detach(lab.aws.lab_eni(eni), force=True)
    await_that(lambda: holder(lab, eni) is None)
    del lab.aws.enis[eni]
    _, err = running.communicate(timeout=OUTER_LIMIT)
    assert running.returncode == 4
    assert 'no network interface named "web"' in err.splitlines()[-1]


@pytest.mark.parametrize("lags", [[0, 9], [0, 9, 0, 9, 0, 9]])
def test_an_older_answer_after_a_newer_one_costs_no_second_attach(
    lab: Lab, machine: Machine, eni: str, lags: list[float]
) -> None:
    """EC2 is eventually consistent: EC2 Developer Guide, "Eventual consistency"."""
    lab.aws.attach_delay = 6
    running = machine.start_eni_ctl("-a")
    await_that(lambda: calls(lab, "AttachNetworkInterface") == 1)
    lab.aws.next_lags = list(lags)
    out, err = running.communicate(timeout=OUTER_LIMIT)
    assert out == f"attached {eni} (10.0.1.22) as eth1\n", err
    assert calls(lab, "AttachNetworkInterface") == 1
