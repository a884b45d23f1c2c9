"""Runs by hand beside eni.service, which waits: the lock is held for steps, not for waits."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from lab import Lab, Machine, await_that
from lab.vpc import OUTER_LIMIT
from lab.watching import holder, wait_for_line

Record = Callable[[str, object], None]


@pytest.fixture
def peer(lab: Lab, subnet: str, eni: str) -> Machine:
    """A healthy host that holds the ENI."""
    peer = lab.launch(subnet, group="web")
    lab.aws.attach(lab.aws.lab_eni(eni), peer.instance, 1)
    await_that(peer.appeared.is_set)
    return peer


@pytest.fixture
def waiting(machine: Machine, peer: Machine) -> Iterator[subprocess.Popen[str]]:
    """eni.service's run on the machine, which waits for the ENI."""
    process = machine.start_eni_ctl("-a")
    wait_for_line(process, "waiting")
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def test_force_by_hand_is_done_at_once_beside_a_waiting_service(
    lab: Lab,
    machine: Machine,
    eni: str,
    waiting: subprocess.Popen[str],
    record_property: Record,
) -> None:
    started = time.monotonic()
    done = machine.eni_ctl("-a", "-f")
    record_property("-a -f by hand beside a waiting service", time.monotonic() - started)
    assert (done.returncode, done.stdout) == (0, f"attached {eni} (10.0.1.22) as eth1\n"), done
    out, err = waiting.communicate(timeout=OUTER_LIMIT)
    assert out == f"attached {eni} (10.0.1.22) as eth1\n", err
    assert holder(lab, eni) == machine.instance.id


def test_a_detach_by_hand_is_done_at_once_beside_a_waiting_service(
    lab: Lab,
    subnet: str,
    machine: Machine,
    waiting: subprocess.Popen[str],
    record_property: Record,
) -> None:
    vpn = lab.aws.create_eni(subnet, name="vpn", ip="10.0.1.33")
    assert machine.eni_ctl("-a", "-n", "vpn").returncode == 0
    started = time.monotonic()
    done = machine.eni_ctl("-d", "-n", "vpn")
    record_property("-d by hand beside a waiting service", time.monotonic() - started)
    assert (done.returncode, done.stdout) == (0, f"detached {vpn} (10.0.1.33)\n"), done
    assert waiting.poll() is None


def test_a_detach_of_nothing_by_hand_is_done_beside_a_waiting_service(
    machine: Machine, waiting: subprocess.Popen[str]
) -> None:
    done = machine.eni_ctl("-d")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("not attached")
    assert waiting.poll() is None


@pytest.mark.parametrize("options", [["-a"], ["-d"], ["-a", "-f"]])
def test_a_dry_run_by_hand_is_done_beside_a_waiting_service(
    machine: Machine, waiting: subprocess.Popen[str], options: list[str]
) -> None:
    done = machine.eni_ctl(*options, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("would ")
    assert waiting.poll() is None


def test_a_service_that_waits_for_its_device_does_not_keep_the_lock(
    lab: Lab, machine: Machine, eni: str
) -> None:
    lab.aws.never_plug.add(eni)
    running = machine.start_eni_ctl("-a")
    await_that(lambda: lab.aws.lab_eni(eni).attachment_status == "attached")
    wait_for_line(running, "device")
    done = machine.eni_ctl("-d")
    assert (done.returncode, done.stdout) == (0, f"detached {eni} (10.0.1.22)\n"), done
    running.kill()
    running.communicate()


def test_a_detach_that_hangs_does_not_keep_the_lock(lab: Lab, machine: Machine, eni: str) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    lab.aws.stuck.add(eni)
    running = machine.start_eni_ctl("-d")
    wait_for_line(running, "being detached")
    done = machine.eni_ctl("-a", "--dry-run")
    assert done.returncode == 0, done.stderr
    lab.aws.detach(lab.aws.lab_eni(eni), force=True)
    out, err = running.communicate(timeout=OUTER_LIMIT)
    assert out == f"detached {eni} (10.0.1.22)\n", err
