"""The state file as a record: read before it is overwritten, and never left untrue."""

from __future__ import annotations

import math

import pytest
from lab import Lab, Machine, await_that
from lab.watching import await_waiting, calls, holder, wait_for_line

STATE = "/etc/default/eni"
KEYS = ["FQDN", "IP", "GW", "DEVICE", "ASG_NAME", "INSTANCE_ID", "ENI_ID", "ATTACHMENT_ID"]


def record(**values: str) -> str:
    """The text of a state file with these values."""
    known = {
        "FQDN": "web.example.com",
        "IP": "10.0.1.22",
        "GW": "10.0.1.1",
        "DEVICE": "eth1",
        "ASG_NAME": "web",
        "INSTANCE_ID": "i-0123456789abcdef0",
        "ENI_ID": "eni-0123456789abcdef0",
        "ATTACHMENT_ID": "eni-attach-0123456789abcdef0",
    }
    return "".join(f"{key}={value}\n" for key, value in {**known, **values}.items())


# --- what was attached by another name, or has another name now


def test_what_was_attached_by_name_is_detached_without_the_name(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    """A drop-in of eni.service has -a -n vpn, and its ExecStop is -d."""
    vpn = lab.aws.create_eni(subnet, name="vpn", ip="10.0.1.33")
    assert machine.eni_ctl("-a", "-n", "vpn").returncode == 0
    done = machine.eni_ctl("-d")
    assert (done.returncode, done.stdout) == (0, f"detached {vpn} (10.0.1.33)\n"), done
    assert holder(lab, vpn) is None
    assert machine.state()["ENI_ID"] == vpn
    assert machine.state()["ATTACHMENT_ID"] == "null"


def test_what_was_attached_by_name_is_detached_by_a_host_in_no_group(
    lab: Lab, subnet: str, eni: str
) -> None:
    machine = lab.launch(subnet)
    assert machine.eni_ctl("-a", "-n", "web").returncode == 0
    done = machine.eni_ctl("-d")
    assert (done.returncode, done.stdout) == (0, f"detached {eni} (10.0.1.22)\n"), done


def test_an_interface_that_was_renamed_since_is_detached(
    lab: Lab, machine: Machine, eni: str
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    lab.aws.rename(eni, "web-old")
    done = machine.eni_ctl("-d")
    assert (done.returncode, done.stdout) == (0, f"detached {eni} (10.0.1.22)\n"), done
    assert holder(lab, eni) is None


def test_the_record_in_another_file_counts_too(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    vpn = lab.aws.create_eni(subnet, name="vpn", ip="10.0.1.33")
    machine.run("mkdir", "-p", "/var/lib/vpn")
    assert machine.eni_ctl("-a", "-n", "vpn", "-o", "/var/lib/vpn/eni").returncode == 0
    done = machine.eni_ctl("-d", "-o", "/var/lib/vpn/eni")
    assert (done.returncode, done.stdout) == (0, f"detached {vpn} (10.0.1.33)\n"), done
    assert machine.state("/var/lib/vpn/eni")["ATTACHMENT_ID"] == "null"


def test_both_the_interface_of_the_name_and_the_recorded_one_are_detached(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    vpn = lab.aws.create_eni(subnet, name="vpn", ip="10.0.1.33")
    assert machine.eni_ctl("-a").returncode == 0
    assert machine.eni_ctl("-a", "-n", "vpn").returncode == 0
    assert machine.eni_ctl("-d").returncode == 0
    assert holder(lab, eni) is None
    assert holder(lab, vpn) is None


def test_an_interface_of_a_third_name_stays(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    other = lab.aws.create_eni(subnet, name="data")
    lab.aws.attach(lab.aws.lab_eni(other), machine.instance, 1)
    await_that(machine.appeared.is_set)
    assert machine.eni_ctl("-a").returncode == 0
    assert machine.eni_ctl("-d").returncode == 0
    assert holder(lab, eni) is None
    assert holder(lab, other) == machine.instance.id


@pytest.mark.parametrize("recorded", ["here", "elsewhere"])
def test_a_recorded_interface_that_another_instance_holds_is_left_alone(
    lab: Lab, subnet: str, machine: Machine, eni: str, recorded: str
) -> None:
    """A state file from an image, or of a time before the failover."""
    peer = lab.launch(subnet, group="web")
    attachment = lab.aws.attach(lab.aws.lab_eni(eni), peer.instance, 1)
    await_that(peer.appeared.is_set)
    instance = machine.instance.id if recorded == "here" else peer.instance.id
    text = record(ENI_ID=eni, INSTANCE_ID=instance, ATTACHMENT_ID=attachment)
    machine.write(STATE, text)
    done = machine.eni_ctl("-d")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("not attached")
    assert holder(lab, eni) == peer.instance.id
    assert calls(lab, "DetachNetworkInterface") == 0
    assert machine.state()["ATTACHMENT_ID"] == "null"


def test_a_primary_interface_in_the_record_is_left_alone(lab: Lab, machine: Machine) -> None:
    primary = machine.instance.eni_id
    machine.write(STATE, record(ENI_ID=primary, INSTANCE_ID=machine.instance.id))
    done = machine.eni_ctl("-d")
    assert done.returncode == 0, done.stderr
    assert machine.devices() == ["eth0"]
    assert calls(lab, "DetachNetworkInterface") == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ENI_ID=\n",
        "ENI_ID=null\nATTACHMENT_ID=null\n",
        "ENI_ID='eni-1; reboot'\n",
        "ENI_ID=$(reboot)\n",
        "\x00\xff ENI_ID=eni-0123456789abcdef0",
        "ENI_ID=eni-0123456789abcdef0\n",
    ],
)
@pytest.mark.parametrize("verb", ["-a", "-d"])
def test_a_record_that_says_nothing_true_does_no_harm(
    lab: Lab, machine: Machine, eni: str, text: str, verb: str
) -> None:
    machine.write(STATE, text)
    done = machine.eni_ctl(verb)
    assert done.returncode == 0, done.stderr
    assert list(machine.state()) == KEYS


def test_a_record_that_is_still_true_is_not_erased_by_a_detach_of_another_name(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    state = machine.state()
    done = machine.eni_ctl("-d", "-n", "nosuch")
    assert done.returncode == 0, done.stderr
    assert holder(lab, eni) == machine.instance.id
    assert machine.state() == state


def test_a_record_that_is_still_true_is_not_erased_where_ec2_lists_the_attachment_late(
    lab: Lab, machine: Machine, eni: str
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    state = machine.state()
    lab.aws.next_lags = [math.inf, math.inf]
    done = machine.eni_ctl("-d", "-n", "nosuch")
    assert done.returncode == 0, done.stderr
    assert not lab.aws.next_lags
    assert holder(lab, eni) == machine.instance.id
    assert machine.state() == state


def test_a_comment_in_the_record_is_no_part_of_it(lab: Lab, subnet: str, machine: Machine) -> None:
    """After a reboot, when nothing but the record tells of the attachment."""
    vpn = lab.aws.create_eni(subnet, name="vpn", ip="10.0.1.33")
    assert machine.eni_ctl("-a", "-n", "vpn").returncode == 0
    text = machine.read(STATE)
    machine.write(STATE, f"# don't edit\n{text}# once: ENI_ID=eni-0123456789abcdef0\n")
    machine.run("rm", "/run/eni_ctl.lock")
    done = machine.eni_ctl("-d")
    assert (done.returncode, done.stdout) == (0, f"detached {vpn} (10.0.1.33)\n"), done


def test_a_record_without_a_name_does_not_mean_interfaces_without_a_name(
    lab: Lab, subnet: str
) -> None:
    machine = lab.launch(subnet)  # in no group, which would have told a name
    other = lab.aws.create_eni(subnet, name=None)
    lab.aws.attach(lab.aws.lab_eni(other), machine.instance, 1)
    await_that(machine.appeared.is_set)
    instance, gone = machine.instance.id, "eni-0123456789abcdef0"
    machine.write(STATE, f"INSTANCE_ID={instance}\nENI_ID={gone}\n")
    done = machine.eni_ctl("-d")
    assert done.returncode == 0, done.stderr
    assert holder(lab, other) == instance


# --- a record of a former life


@pytest.mark.parametrize("told", ["the image's", "a former life's"])
def test_an_untrue_record_is_retired_at_once_not_at_the_end_of_the_wait(
    lab: Lab, subnet: str, machine: Machine, eni: str, told: str
) -> None:
    peer = lab.launch(subnet, group="web")
    lab.aws.attach(lab.aws.lab_eni(eni), peer.instance, 1)
    instance = machine.instance.id if told == "a former life's" else "i-0123456789abcdef0"
    machine.write(STATE, record(ENI_ID=eni, INSTANCE_ID=instance))
    waiting = machine.start_eni_ctl("-a")
    await_that(lambda: machine.state()["ATTACHMENT_ID"] == "null")
    assert machine.state()["DEVICE"] == "null"
    wait_for_line(waiting, "waiting")
    assert waiting.poll() is None
    waiting.terminate()
    waiting.communicate()


def test_another_instances_record_is_retired_even_if_this_one_never_learns_its_group(
    lab: Lab, subnet: str
) -> None:
    """The file came with an AMI, and programs of this host read it."""
    machine = lab.launch(subnet)
    machine.write(STATE, record())
    done = machine.eni_ctl("-a")
    assert done.returncode == 4
    assert "in no Auto Scaling group" in done.stderr
    assert machine.state()["ATTACHMENT_ID"] == "null"
    assert machine.state()["DEVICE"] == "null"


def test_a_record_is_retired_where_the_interface_is_gone_for_good(lab: Lab, subnet: str) -> None:
    machine = lab.launch(subnet, group="web")
    machine.write(STATE, record())
    assert machine.eni_ctl("-a").returncode == 4
    assert machine.state()["ATTACHMENT_ID"] == "null"
    assert machine.state()["DEVICE"] == "null"


def test_a_true_record_stays_while_nothing_can_be_learnt(
    lab: Lab, machine: Machine, eni: str
) -> None:
    """An outage of the API says nothing about the attachment."""
    assert machine.eni_ctl("-a").returncode == 0
    state = machine.state()
    lab.aws.fail("DescribeNetworkInterfaces", times=-1)
    for verb in ("-a", "-d"):
        await_waiting(machine, verb, for_what="RequestLimitExceeded")
        assert machine.state() == state


def test_a_true_record_stays_where_the_own_attachment_is_shown_late(
    lab: Lab, machine: Machine, eni: str
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    state = machine.state()
    lab.aws.next_lags = [60]
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert machine.state() == state
    assert calls(lab, "AttachNetworkInterface") <= 2


@pytest.mark.parametrize("verb", ["-s", "--dry-run"])
def test_a_record_is_only_read_where_nothing_is_to_be_changed(
    lab: Lab, subnet: str, machine: Machine, eni: str, verb: str
) -> None:
    machine.write(STATE, record())
    before = machine.read(STATE)
    machine.eni_ctl(*(["-s"] if verb == "-s" else ["-a", "--dry-run"]))
    assert machine.read(STATE) == before


# --- an attachment that ends with its instance


@pytest.mark.parametrize("verb", ["-a", "-s"])
def test_a_fixed_address_that_would_die_with_its_instance_is_warned_of(
    lab: Lab, machine: Machine, eni: str, verb: str
) -> None:
    """API_NetworkInterfaceAttachment: DeleteOnTermination."""
    quiet = machine.eni_ctl("-a")
    assert "DeleteOnTermination" not in quiet.stdout + quiet.stderr
    lab.aws.eni(eni).delete_on_termination = True
    done = machine.eni_ctl(verb)
    assert done.returncode == 0, done.stderr
    assert "DeleteOnTermination" in done.stdout + done.stderr
    if verb == "-a":
        assert done.stdout == f"attached {eni} (10.0.1.22) as eth1\n"
        assert eni in done.stderr
        assert machine.instance.id in done.stderr


def test_a_host_that_waits_for_such_an_address_says_so(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    lab.aws.eni(eni).delete_on_termination = True
    spare = lab.launch(subnet, group="web")
    await_waiting(spare, "-a", for_what="and will be deleted with it")


def test_programs_are_told_of_it_too(lab: Lab, machine: Machine, eni: str) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    lab.aws.eni(eni).delete_on_termination = True
    done = machine.eni_ctl("-s", "--json")
    assert done.returncode == 0
    assert "delete_on_termination" in done.stdout.lower() or "DeleteOnTermination" in done.stdout
