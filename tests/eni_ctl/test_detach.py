"""eni_ctl.py -d as a process against the lab."""

from __future__ import annotations

import signal
import subprocess

from lab import Lab, Machine, await_that
from lab.vpc import OUTER_LIMIT
from lab.watching import give_up, holder, wait_for_line


def test_a_detach_waits_until_the_device_is_gone(lab: Lab, machine: Machine, eni: str) -> None:
    machine.eni_ctl("-a")
    lab.aws.detach_delay = 1
    done = machine.eni_ctl("-d")
    assert (done.returncode, done.stdout) == (0, f"detached {eni} (10.0.1.22)\n"), done.stderr
    assert machine.devices() == ["eth0"]
    assert lab.aws.eni(eni).attachment_id is None
    assert machine.state() == {
        "FQDN": "web.example.com",
        "IP": "10.0.1.22",
        "GW": "10.0.1.1",
        "DEVICE": "null",
        "ASG_NAME": "web",
        "INSTANCE_ID": machine.instance.id,
        "ENI_ID": eni,
        "ATTACHMENT_ID": "null",
    }


def test_a_second_detach_changes_nothing(machine: Machine) -> None:
    machine.eni_ctl("-a")
    machine.eni_ctl("-d")
    state = machine.state()
    done = machine.eni_ctl("-d")
    assert done.returncode == 0
    assert done.stdout == f'not attached: {machine.instance.id} holds no ENI named "web"\n'
    assert machine.state() == state


def test_an_attach_right_after_a_detach_works(lab: Lab, machine: Machine, eni: str) -> None:
    machine.eni_ctl("-a")
    machine.eni_ctl("-d")
    done = machine.eni_ctl("-a")
    assert done.stdout == f"attached {eni} (10.0.1.22) as eth1\n"


def test_a_host_that_holds_nothing_has_nothing_to_detach(lab: Lab, machine: Machine) -> None:
    done = machine.eni_ctl("-d")
    assert done.returncode == 0
    assert done.stdout == f'not attached: {machine.instance.id} holds no ENI named "web"\n'
    assert machine.state()["ATTACHMENT_ID"] == "null"
    assert machine.state()["DEVICE"] == "null"
    assert "DetachNetworkInterface" not in [call.action for call in lab.aws.calls]


def test_an_eni_that_another_instance_holds_is_left_alone(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    machine.eni_ctl("-a")
    other = lab.launch(subnet, group="web")
    other.write("/etc/default/eni", "DEVICE=eth1\nATTACHMENT_ID=eni-attach-0\n")
    done = other.eni_ctl("-d")
    assert done.returncode == 0
    assert done.stdout == f'not attached: {other.instance.id} holds no ENI named "web"\n'
    assert lab.aws.eni(eni).instance.id == machine.instance.id
    assert machine.devices() == ["eth0", "eth1"]
    assert other.state()["ATTACHMENT_ID"] == "null"


def test_a_primary_interface_of_the_same_name_is_left_alone(lab: Lab, subnet: str) -> None:
    machine = lab.launch(subnet, group="web", primary_name="web")
    done = machine.eni_ctl("-d")
    assert done.returncode == 0
    assert machine.devices() == ["eth0"]


def test_a_detach_that_hangs_is_never_forced_here(lab: Lab, machine: Machine, eni: str) -> None:
    machine.eni_ctl("-a")
    lab.aws.stuck.add(eni)
    give_up(machine, "-d", over=f"^eni_ctl.py: {eni} is being detached; ")
    detaches = [c.params for c in lab.aws.calls if c.action == "DetachNetworkInterface"]
    assert ["Force" in params for params in detaches] == [False]


def test_a_detach_that_an_earlier_run_began_is_finished(
    lab: Lab, machine: Machine, eni: str
) -> None:
    machine.eni_ctl("-a")
    lab.aws.stuck.add(eni)
    lab.aws.fail("DetachNetworkInterface", when="after", how="reset")
    assert machine.eni_ctl("-d", "-t", "20").returncode == 1
    second = machine.start_eni_ctl("-d")
    wait_for_line(second, f"{eni} is being detached")
    lab.aws.detach(lab.aws.lab_eni(eni), force=True)
    out, _ = second.communicate(timeout=OUTER_LIMIT)
    assert out == f"detached {eni} (10.0.1.22)\n"


def test_an_eni_that_only_the_second_answer_shows_is_detached_too(
    lab: Lab, machine: Machine, eni: str
) -> None:
    """EC2's answers come from copies of its data, of which one may be behind another. The run that
    attached it was killed before its device came."""
    lab.aws.never_plug.add(eni)
    killed = machine.start_eni_ctl("-a")
    await_that(lambda: holder(lab, eni) == machine.instance.id)
    killed.kill()
    killed.communicate()
    lab.aws.next_lags = [OUTER_LIMIT, 0, OUTER_LIMIT]
    words = "The network interface attachment is not in a valid state."  # [ours]
    lab.aws.refuse("DetachNetworkInterface", eni, "IncorrectState", words, times=1)
    done = machine.eni_ctl("-d")
    assert (done.returncode, done.stdout) == (0, f"detached {eni} (10.0.1.22)\n"), done.stderr
    assert [c.action for c in lab.aws.calls].count("DetachNetworkInterface") == 2
    assert lab.aws.eni(eni).attachment_id is None


def test_an_eni_that_ec2_shows_late_is_waited_for_even_after_a_long_wait_for_the_lock(
    lab: Lab, machine: Machine, eni: str
) -> None:
    lab.aws.never_plug.add(eni)
    killed = machine.start_eni_ctl("-a")
    await_that(lambda: holder(lab, eni) == machine.instance.id)
    killed.kill()
    killed.communicate()
    lab.aws.describe_lag = OUTER_LIMIT
    other = machine.popen("flock", "/run/eni_ctl.lock", "sh", "-c", "echo held; exec sleep 12")
    assert other.stdout
    assert other.stdout.readline() == "held\n"
    run = machine.start_eni_ctl("-d")
    wait_for_line(run, "waiting.*was claimed here")
    lab.aws.describe_lag = 0
    out, err = run.communicate(timeout=OUTER_LIMIT)
    assert (run.returncode, out) == (0, f"detached {eni} (10.0.1.22)\n"), err
    other.communicate()


def test_a_detach_after_a_kill_in_mid_attach_finds_the_eni(
    lab: Lab, machine: Machine, eni: str
) -> None:
    """EC2 shows the ENI as free for a while, though the killed run's claim took effect."""
    lab.aws.describe_lag = 30
    killed: list[subprocess.Popen[str]] = []
    lab.aws.fail("AttachNetworkInterface", when="after", how="drop", do=lambda: killed[0].kill())
    killed.append(machine.start_eni_ctl("-a"))
    killed[0].communicate(timeout=OUTER_LIMIT)
    assert killed[0].returncode == -signal.SIGKILL
    done = machine.eni_ctl("-d")
    assert done.stdout == f"detached {eni} (10.0.1.22)\n", done.stderr
    assert lab.aws.eni(eni).attachment_id is None
