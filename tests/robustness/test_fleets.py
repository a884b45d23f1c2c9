"""Many hosts and one pool of ENIs, started together, under EC2's real throttling limits.

Up to 200 hosts are real: each has its namespaces and its own run of eni_ctl.py against the one
simulated AWS. A thousand are simulated: real are the steps (Claim) and the waits between them
(wait), simulated are EC2 and time. Each fleet adds a row to the table at the end of the session.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import subprocess
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable
from typing import Any

import places
import pytest
from lab import Lab, await_that
from lab.ec2 import EC2_THROTTLE
from lab.vpc import OUTER_LIMIT

from eni_ctl import (
    IN_USE,
    POLL_EC2,
    Claim,
    Deadline,
    Eni,
    Instance,
    Member,
    NotYet,
    Overloaded,
    wait,
)

ZONES = "abc"
MINUTES = 60.0
# The largest fleet takes one to four minutes, and several times as long on a busy machine: the
# simulated EC2 is one process. No run may come to its deadline before.
PATIENCE = 40 * MINUTES


class Fleet:
    """Hosts and ENIs of one name, dealt out over the zones, and the hosts' runs of eni_ctl.py."""

    def __init__(self, lab: Lab, hosts: int, enis: int) -> None:
        self.lab = lab
        subnets = [lab.add_subnet(f"10.0.{n}.0/24", zone) for n, zone in enumerate(ZONES)]
        self.enis = [lab.aws.create_eni(subnets[n % 3], name="web") for n in range(enis)]
        machines = [lab.launch(subnets[n % 3], group="web") for n in range(hosts)]
        self.machines = {machine.instance.id: machine for machine in machines}
        lab.aws.throttle = EC2_THROTTLE
        self.runs: dict[str, subprocess.Popen[str]] = {}

    def start(self) -> None:
        for name, machine in self.machines.items():
            self.runs[name] = machine.start_eni_ctl("-a", "-t", f"{2 * PATIENCE:.0f}")

    def holders(self) -> list[str]:
        models = [self.lab.aws.eni(eni) for eni in self.enis]
        return [model.instance.id for model in models if model.attachment_id]

    def check(self, living: Iterable[str]) -> None:
        """Each ENI has one holder, in its own zone and among the living; nobody has two."""
        holders = self.holders()
        assert len(holders) == len(set(holders)) == min(len(self.enis), len(self.machines))
        assert set(holders) <= set(living)
        for eni in map(self.lab.aws.eni, self.enis):
            if eni.attachment_id:
                zone = self.machines[eni.instance.id].instance.zone
                assert zone == eni.subnet.availability_zone

    def check_holders(self) -> None:
        """The runs of all that hold an ENI end well, and their state files say which."""
        for eni in map(self.lab.aws.eni, self.enis):
            if eni.attachment_id and eni.instance.id in self.runs:
                out, err = self.runs.pop(eni.instance.id).communicate(timeout=OUTER_LIMIT)
                assert out.startswith(f"attached {eni.id} "), err
                assert self.machines[eni.instance.id].state()["ENI_ID"] == eni.id

    def note(self, what: str, seconds: float) -> None:
        calls = [(call.instance_id or "", call.action, call.status) for call in self.lab.aws.calls]
        places.note_fleet(what, list(self.machines), calls, seconds)


@pytest.mark.timeout(3 * PATIENCE)
@pytest.mark.parametrize(("hosts", "enis"), [(10, 10), (100, 100), (200, 200)])
def test_each_host_of_a_fleet_gets_an_eni(lab: Lab, hosts: int, enis: int) -> None:
    fleet = Fleet(lab, hosts, enis)
    started = time.monotonic()
    fleet.start()
    await_that(lambda: len(fleet.holders()) == enis, PATIENCE)
    took = time.monotonic() - started
    fleet.check_holders()
    fleet.check(fleet.machines)
    fleet.note(f"{hosts} hosts, {enis} ENIs", took)


@pytest.mark.timeout(3 * PATIENCE)
def test_hosts_that_wait_get_the_enis_of_those_that_die(lab: Lab) -> None:
    fleet = Fleet(lab, 100, 60)
    started = time.monotonic()
    fleet.start()
    await_that(lambda: len(fleet.holders()) == 60, PATIENCE)
    took = time.monotonic() - started
    fleet.check_holders()
    fleet.check(fleet.machines)
    fleet.note("100 hosts, 60 ENIs", took)

    # Ten of each zone's twenty holders die; thirteen wait there at least.
    zone_of = {name: machine.instance.zone for name, machine in fleet.machines.items()}
    dying: list[str] = []
    for zone in ZONES:
        local = [name for name in fleet.holders() if zone_of[name].endswith(zone)]
        dying += local[:10]
    lab.aws.shutdown_delay = 2 * PATIENCE
    lab.aws.calls.clear()
    started = time.monotonic()
    for name in dying:
        lab.terminate(fleet.machines[name])
    living = fleet.machines.keys() - dying
    await_that(lambda: set(fleet.holders()) <= living and len(fleet.holders()) == 60, PATIENCE)
    took = time.monotonic() - started
    fleet.check_holders()
    fleet.check(living)
    fleet.note("  30 of them die, 40 wait", took)

    assert len(fleet.runs) == 10
    for run in fleet.runs.values():
        assert run.poll() is None
        assert run.stderr
        assert any("is held by i-" in line for line in run.stderr)  # it says so, sooner or later
        run.terminate()
        run.communicate()


class Schedule:
    """Time for threads of which one runs at any moment: a sleep lets the next one run."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[tuple[float, int, threading.Event]] = []
        self.order = itertools.count()

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        turn = threading.Event()
        heapq.heappush(self.due, (self.now + seconds, next(self.order), turn))
        self.next()
        turn.wait()

    def next(self) -> None:
        if self.due:
            self.now, _, turn = heapq.heappop(self.due)
            turn.set()

    def run(self, tasks: Iterable[Callable[[], object]]) -> None:
        """Run the tasks, all from now on, to their ends."""

        def begin(task: Callable[[], object], turn: threading.Event) -> None:
            turn.wait()
            task()
            self.next()

        threads = []
        for task in tasks:
            turn = threading.Event()
            heapq.heappush(self.due, (self.now, next(self.order), turn))
            threads.append(threading.Thread(target=begin, args=(task, turn), daemon=True))
        for thread in threads:
            thread.start()
        self.next()
        for thread in threads:
            thread.join()


class SimulatedEc2:
    """For a Claim: ENIs, who holds them, and the limits of an account. Each call takes 0.1 s."""

    def __init__(self, schedule: Schedule, enis: Iterable[Eni]) -> None:
        self.schedule = schedule
        self.pool = {eni.id: eni for eni in enis}
        self.buckets = {action: (float(size), 0.0) for action, (size, _) in EC2_THROTTLE.items()}
        self.calls: list[tuple[str, str, int]] = []
        self.last_claim = 0.0

    def take(self, caller: str, action: str) -> None:
        self.schedule.sleep(0.1)
        size, refill = EC2_THROTTLE[action]
        tokens, since = self.buckets[action]
        tokens = min(size, tokens + (self.schedule.now - since) * refill)
        status = 200 if tokens >= 1 else 503
        self.buckets[action] = (tokens - (tokens >= 1), self.schedule.now)
        self.calls.append((caller, action, status))
        if status == 503:
            raise Overloaded("RequestLimitExceeded")


class SimulatedDoor:
    """What eni_ctl.Aws is to one instance."""

    dry_run = False

    def __init__(self, ec2: SimulatedEc2, instance: str) -> None:
        self.ec2, self.instance = ec2, instance

    def enis_named(self, name: str) -> list[Eni]:
        self.ec2.take(self.instance, "DescribeNetworkInterfaces")
        return list(self.ec2.pool.values())

    def members(self, instances: Collection[str]) -> dict[str, Member]:
        return {instance: Member("web", "InService") for instance in instances}

    def attach(self, eni_id: str, instance: str) -> str:
        self.ec2.take(self.instance, "AttachNetworkInterface")
        eni = self.ec2.pool[eni_id]
        if eni.holder:
            raise NotYet(eni.id, IN_USE)
        attachment = f"eni-attach-{eni.id}"
        self.ec2.pool[eni.id] = eni._replace(
            status="in-use",
            holder=self.instance,
            attachment=attachment,
            attachment_status="attached",
            device_index=1,
        )
        self.ec2.last_claim = self.ec2.schedule.now
        return attachment


class NoLock:
    state_file = "/none"
    tried = ""

    def held(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def remember(self, eni: str) -> None:
        self.tried = eni


@pytest.mark.pure
@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("size", [100, 1000])
def test_a_simulated_fleet_gets_its_enis(size: int) -> None:
    random.seed(size)
    schedule = Schedule()
    zones = [f"us-west-1{zone}" for zone in ZONES]
    enis = [Eni(f"eni-{n:08x}", "02:00:00:00:00:00", zones[n % 3], "10.0.0.1") for n in range(size)]
    hosts = [
        Instance(f"i-{n:08x}", zones[n % 3], "us-west-1", "web", "InService") for n in range(size)
    ]
    ec2 = SimulatedEc2(schedule, enis)
    got: dict[str, str] = {}

    def attach(here: Instance) -> None:
        deadline = Deadline(15 * MINUTES, schedule.clock, schedule.sleep)
        door: Any = SimulatedDoor(ec2, here.id)
        lock: Any = NoLock()
        claim = Claim(here, door, lock, deadline, Namespace(force=False, name=None))
        got[here.id] = wait(claim.step, deadline, POLL_EC2).id

    schedule.run((lambda here=here: attach(here)) for here in hosts)  # type: ignore[misc]
    assert got == {eni.holder: eni.id for eni in ec2.pool.values()}
    assert len(got) == size
    what = f"{size} simulated hosts, {size} ENIs"
    places.note_fleet(what, list(got), ec2.calls, ec2.last_claim)
