"""The small language of the fault tests: places where a run goes wrong, and a tally of what held.

A `Place` is one simulated machine in an Auto Scaling group of its own, with a pool of ENIs of that
name. A lab has several places, so that several faults can be tried at the same time: `try_all`
takes a list of cases, gives each case a place that is free, and collects what went wrong, in words.
A test passes where that list is empty. `note` counts each attempt for the tables at the session's
end; "held" means that the run ended as it has to.

For example, each kind of bad answer to one API call, after which the next answer is right:

    def attempt(place: Place, how: str) -> str:
        fault = place.fail("AttachNetworkInterface", how=how)   # the first such call goes wrong
        done = place.machine.eni_ctl("-a")                      # the real script, as a process
        held = done.returncode == 0 and len(place.held()) == 1  # it holds one ENI of its pool
        held = held and fault in place.struck                   # and the fault did happen
        note(f"wrong answer, once: {how}", "API", held)
        place.release()                                         # free for the next case
        return "" if held else f"{how}: {done.stderr}"

    places = [Place(lab, subnet, f"group{n}") for n in range(3)]
    assert try_all(places, ["reset", "empty", "html", "truncate"], attempt) == []
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from lab import Lab, Machine, await_that
from lab.vpc import OUTER_LIMIT
from lab.wire import Fault

T = TypeVar("T")
REFUSE = """
table inet lab {
    chain output {
        type filter hook output priority filter;
        tcp dport { 80, 443 } reject with tcp reset
    }
}
"""
tried: dict[tuple[str, str], list[bool]] = {}  # (what, with): whether each held
fleets: list[tuple[str, ...]] = []  # rows of the table


class Place:
    """A machine in the group of that name, and free ENIs of the name."""

    def __init__(self, lab: Lab, subnet: str, name: str, free: int = 2, **more: Any) -> None:
        self.lab, self.name = lab, name
        self.enis = [
            lab.aws.create_eni(subnet, name=name, tags={"FQDN": f"{name}.example.com"})
            for _ in range(free)
        ]
        self.machine: Machine = lab.launch(subnet, group=name, **more)
        self.faults: list[Fault] = []
        self.struck: list[Fault] = []  # a fault as often as it struck

    def fail(self, what: str, **options: Any) -> Fault:
        """As Aws.fail, for this machine alone. `refused` refuses connections from that request on.
        All requests that were spoilt are counted in `struck`."""
        act = options.pop("do", None)
        if options.pop("refused", False):
            options["how"] = "drop"
            act = partial(self.refuse, soon_over=options.get("times", 1) == 1)

        def do() -> None:
            self.struck.append(fault)
            if act:
                act()

        fault = self.lab.aws.fail(what, do=do, source=self.machine.instance.ip, **options)
        self.faults.append(fault)
        return fault

    def refuse(self, soon_over: bool) -> None:
        """Connections to IMDS and AWS are refused from now on, or for a moment."""
        self.machine.write("/run/refuse", REFUSE)
        self.machine.run("nft", "-f", "/run/refuse")
        if soon_over:
            threading.Timer(0.5, self.accept).start()

    def accept(self) -> None:
        self.machine.run("nft", "delete", "table", "inet", "lab")

    def attach(self, eni: str) -> None:
        """As if a run had attached it long ago."""
        self.machine.appeared.clear()
        self.lab.aws.attach(self.lab.aws.lab_eni(eni), self.machine.instance, 1)
        assert self.machine.appeared.wait(OUTER_LIMIT)
        lab_eni = self.lab.aws.lab_eni(eni)
        await_that(lambda: lab_eni.attachment_status == "attached")
        self.forget()

    def held(self) -> list[str]:
        """The ENIs of the pool that this machine holds."""
        enis = [self.lab.aws.lab_eni(eni) for eni in self.enis]
        here = self.machine.instance.id
        return [e.model.id for e in enis if e.model.instance and e.model.instance.id == here]

    def release(self) -> None:
        """Free all, without any fault: the state before the first run."""
        for fault in self.faults:
            fault.times = 0
        self.faults.clear()
        self.struck.clear()
        self.accept()
        for eni in self.held():
            lab_eni = self.lab.aws.lab_eni(eni)
            await_that(lambda lab_eni=lab_eni: lab_eni.attachment_status != "attaching")  # type: ignore[misc]
            if lab_eni.attachment_status == "attached":
                self.lab.aws.detach(lab_eni)
        await_that(lambda: not self.held() and self.machine.devices() == ["eth0"])
        self.forget()

    def forget(self) -> None:
        """EC2 shows the ENIs as they are, without lag."""
        for eni in self.enis:
            self.lab.aws.forget_history(eni)


def try_all(
    places: list[Place], cases: Iterable[T], attempt: Callable[[Place, T], str]
) -> list[str]:
    """Try each case at one of the places, several at a time; what did not hold, in words."""
    free = list(places)
    lock = threading.Lock()

    def one(case: T) -> str:
        with lock:
            place = free.pop()
        try:
            return attempt(place, case)
        finally:
            with lock:
                free.append(place)

    with ThreadPoolExecutor(len(places)) as pool:
        return [wrong for wrong in pool.map(one, cases) if wrong]


def note(what: str, how: str, held: bool) -> None:
    tried.setdefault((what, how), []).append(held)


def note_fleet(
    what: str, hosts: Sequence[str], calls: Iterable[tuple[str, str, int]], seconds: float
) -> None:
    """Calls are (instance, action, HTTP status; 0 where there was no answer yet)."""
    counted = list(calls)
    per_host = Counter(host for host, _, _ in counted)
    claims = Counter(host for host, action, _ in counted if action == "AttachNetworkInterface")
    throttled = sum(status == 503 for _, _, status in counted) / len(counted)
    row = [what, f"{throttled:.0%}", f"{seconds:.0f} s"]
    for count in (claims, per_host):
        numbers = [count[host] for host in hosts]
        row.insert(-2, f"{sum(numbers) / len(numbers):.1f}, {max(numbers)}")
    fleets.append(tuple(row))


def summary() -> list[str]:
    """The tables for the end of a session."""
    by_kind: dict[tuple[str, str], list[bool]] = {}
    for (what, how), held in tried.items():
        by_kind.setdefault((what.partition(":")[0], how), []).extend(held)
    every, total = (
        [("what went wrong", "in", "tried", "held")]
        + [
            (what, how, str(len(held)), str(sum(held)))
            for (what, how), held in sorted(rows.items())
        ]
        for rows in (tried, by_kind)
    )
    attaches, all_calls = "attach calls a host (mean, max)", "all calls"
    head = ("fleet", attaches, all_calls, "throttled", "to the last claim")
    tables = [every, total] * bool(tried) + [[head, *fleets]] * bool(fleets)
    return [line for table in tables for line in ["", *align(table)]]


def align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def wrong_end(
    done: subprocess.CompletedProcess[str], code: int, took: float = 0, limit: float = 0
) -> str:
    """What is not as it has to be where a run cannot succeed; empty where all is.

    took and limit: in seconds, for a run that has a deadline to keep.
    """
    lines = done.stderr.splitlines()
    # If it needs more than a second to end after its deadline, the thread that ends it then says
    # once more what it gave up.
    end = 2 if all("; gave up after " in line for line in lines[-2:]) else 1
    # On its way it may say that it waits, and what EC2 refuses for one ENI.
    usual = r"eni_ctl\.py: (waiting, |eni-)"
    others = [line for line in lines[:-end] if not re.match(usual, line)]
    complaints = {
        f"exit code {done.returncode}, expected {code}": done.returncode != code,
        "no line on stderr": not lines,
        "more than one line": bool(others),
        "a traceback": "Traceback" in done.stderr,
        "an error that nobody expected": "unexpected" in done.stderr,
        f"it took {took:.1f} s": took > limit,
    }
    return ", ".join(words for words, so in complaints.items() if so)


def timed(action: Callable[[], T]) -> tuple[T, float]:
    started = time.monotonic()
    result = action()
    return result, time.monotonic() - started
