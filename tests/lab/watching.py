"""What runs of eni_ctl.py on the lab's machines asked for, said and cost."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from lab import Lab, Machine

T = TypeVar("T")

# Runs a command, and prints as the last line of stdout what it cost.
MEASURE = """
import json, os, resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


class Measured(NamedTuple):
    code: int
    cpu: float  # seconds
    memory: float  # peak, in MiB
    log: list[str]  # the lines on stderr


def all_at_once(cases: Iterable[T], attempt: Callable[[T], None]) -> None:
    """Try each case in a thread of its own; what did not hold is told for all of them together.

    A case has machines and ENIs of its own. Most of a run's time is waiting, so many at once take
    little longer than one.
    """

    def one(case: T) -> str:
        try:
            attempt(case)
        except AssertionError as error:
            return f"{case}: {error}"
        return ""

    with ThreadPoolExecutor(8) as pool:
        wrong = [text for text in pool.map(one, list(cases)) if text]
    assert not wrong, "\n".join(wrong)


def calls(lab: Lab, action: str, machine: Machine | None = None) -> int:
    """How often an API action was asked for, of one machine or of all; dry runs do not count."""
    asked = [call for call in lab.aws.calls if call.action == action and not call.dry_run]
    if machine is not None:
        asked = [call for call in asked if call.instance_id == machine.instance.id]
    return len(asked)


def attached_by(lab: Lab, machine: Machine) -> list[str]:
    """The ENIs of a machine's attach calls, in their order; dry runs do not count."""
    return [
        call.params["NetworkInterfaceId"]
        for call in lab.aws.calls
        if call.action == "AttachNetworkInterface"
        and call.instance_id == machine.instance.id
        and not call.dry_run
    ]


def holder(lab: Lab, eni: str) -> str | None:
    """The instance that an ENI is attached to."""
    instance = lab.aws.eni(eni).instance
    return str(instance.id) if instance else None


def wait_for_line(process: subprocess.Popen[str], pattern: str) -> str:
    """The first line on the process's stderr that matches."""
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if re.search(pattern, line):
            return line
    raise AssertionError(f"it ended without a line like {pattern}: {''.join(lines)}")


def await_waiting(machine: Machine, *arguments: str, for_what: str) -> str:
    """Start a run, and end it once it says that it waits for something: that line.

    So no deadline of a run has to be guessed, which a busy machine could miss.
    """
    process = machine.start_eni_ctl(*arguments)
    try:
        line = wait_for_line(process, f"waiting, .*{for_what}")
        assert process.poll() is None
        return line
    finally:
        process.kill()
        process.communicate()


def give_up(
    machine: Machine, *arguments: str, over: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A run that comes to its deadline while it waits for what its last line says.

    20 s are enough to come to that, unless this machine is busy: then the run gets longer.
    """
    for seconds in (20, 60, 180):
        done = machine.eni_ctl(*arguments, "-t", str(seconds), **environment)
        assert done.returncode == 1, done.stderr
        assert last_line(done).endswith(f"; gave up after {seconds} s")
        if re.search(over, last_line(done)):
            return done
    raise AssertionError(f"it has not come to {over}: {done.stderr}")


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a run that failed said in the end, after the lines about its waiting.

    Not for one that succeeded: those lines may then be the last ones, on a busy machine.
    """
    assert done.returncode != 0, done.stderr
    return done.stderr.splitlines()[-1]


def run_measured(machine: Machine, *arguments: str) -> Measured:
    """A run of eni_ctl.py, and what it cost."""
    program = "/usr/local/sbin/eni_ctl.py"
    done = machine.run("/usr/bin/python3", "-IS", "-c", MEASURE, program, *arguments)
    code, cpu, memory = json.loads(done.stdout.splitlines()[-1])
    return Measured(code, cpu, memory, done.stderr.splitlines())
