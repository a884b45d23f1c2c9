"""The lab as a fixture, and what no test may do."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import places
import pytest
from hypothesis import settings
from lab import Lab, Machine, await_that, outcomes
from lab.kernel import Kernel
from lab.vpc import in_lab
from lab.world import HOOKS, WATCH, Subject, World

# The same examples in each run, and as much time for each as a busy machine needs.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


# Where there is no lab: "none: " and why, set by tests/run.
NO_LAB = os.environ.get("ENI_LAB", "").partition("none: ")[2]
could_not_run: list[str] = []

# The routing cases' columns. Another script, named by ADD_ROUTES, is judged with hooks alone, and
# has a column of the name that ADD_ROUTES_COLUMN says.
COLUMN = os.environ.get("ADD_ROUTES_COLUMN")
COLUMNS = {HOOKS: "hooks", WATCH: "--watch"}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "pure: decides only; no sockets, no other programs")
    config.addinivalue_line("markers", "virtual_machine: boots Debian, whose image root must make")
    config.addinivalue_line("markers", "several_users: a program in it becomes another user")
    config.addinivalue_line("markers", "needs: what a routing case needs where it does not pass")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """In CI a skip is a failure: what was not run was not shown."""
    report = yield
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a lab only what needs none. The longest are spread among the others."""
    if NO_LAB:
        could_not_run.extend(i.nodeid for i in items if not i.get_closest_marker("pure"))
        items[:] = [item for item in items if item.get_closest_marker("pure")]
    longest = [item for item in items if item.get_closest_marker("virtual_machine")]
    others = [item for item in items if item not in longest]
    # The first two begin at once: workers of pytest-xdist begin with two tests each.
    places_of_longest = [0, 1]
    for number in range(1, len(longest)):
        places_of_longest.append(max(1, number * len(others) // len(longest)))
    merged: list[tuple[float, pytest.Item]] = list(enumerate(others))
    merged += [(place - 0.5, item) for place, item in zip(places_of_longest, longest)]
    items[:] = [item for _, item in sorted(merged, key=lambda pair: pair[0])]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells the main process what it has tried."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = places.tried


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for which, held in getattr(node, "workeroutput", {}).get("tried", {}).items():
        places.tried.setdefault(which, []).extend(held)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The faults that were tried, and how many of them were held; what tests have noted."""
    if could_not_run:
        terminalreporter.write_line(f"could not run {len(could_not_run)} other tests: {NO_LAB}")
    for line in places.summary():
        terminalreporter.write_line(line)
    for report in terminalreporter.getreports("passed"):
        noted = [pair for pair in report.user_properties if pair[0] != outcomes.PROPERTY]
        if report.when == "call" and noted:
            terminalreporter.write_line(f"\n{report.nodeid}")
            for what, value in noted:
                shown = f"{value:.1f} s" if isinstance(value, float) else str(value)
                terminalreporter.write_line(f"  {what}: {shown}")
    all_reports = [
        report
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport)
    ]
    for line in outcomes.summary(all_reports):
        terminalreporter.write_line(line)


class ForbiddenError(BaseException):
    """Not an Exception, so that nothing under test can swallow it."""


@pytest.fixture(autouse=True)
def pure(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests marked pure reach neither the network nor other programs."""
    if request.node.get_closest_marker("pure"):

        def forbid(*arguments: object, **_: object) -> NoReturn:
            raise ForbiddenError(f"a pure test used {arguments[1:]}")

        monkeypatch.setattr(socket.socket, "__init__", forbid)
        monkeypatch.setattr(subprocess.Popen, "__init__", forbid)


@pytest.fixture(autouse=True)
def turn(request: pytest.FixtureRequest) -> Iterator[None]:
    """As many stories of virtual machines at a time as there are processors. The more there are,
    the less of one each guest gets, and a guest with too little of it fails in ways of its own."""
    if not request.node.get_closest_marker("virtual_machine"):
        yield
        return
    folder = Path(tempfile.gettempdir())  # one for all workers
    with contextlib.ExitStack() as stack:
        turns = []
        for number in range(os.cpu_count() or 1):
            turns.append(stack.enter_context(Path(folder, f"turn-{number}").open("w")))
        await_that(lambda: any(map(is_taken, turns)), seconds=math.inf)
        yield


def is_taken(turn: IO[str]) -> bool:
    """Take the turn, unless another worker has it; it ends when the file is closed."""
    try:
        fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@pytest.fixture(scope="session")
def inside() -> None:
    """Everything that opens a socket or runs a script does so in the lab's namespaces."""
    if not in_lab():
        pytest.exit("run the tests by tests/run, which makes the lab's namespaces", 2)


@pytest.fixture
def make_lab(inside: None, tmp_path: Path) -> Iterator[Callable[..., Lab]]:
    with contextlib.ExitStack() as labs:
        yield lambda **options: labs.enter_context(Lab(tmp_path, **options))


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab()


@pytest.fixture
def subnet(lab: Lab) -> str:
    return lab.add_subnet("10.0.1.0/24")


@pytest.fixture
def eni(lab: Lab, subnet: str) -> str:
    """A free network interface named web, 10.0.1.22."""
    return lab.aws.create_eni(subnet, name="web", ip="10.0.1.22", tags={"FQDN": "web.example.com"})


@pytest.fixture
def machine(lab: Lab, subnet: str, eni: str) -> Machine:
    """An instance in the group web, in the ENI's subnet."""
    return lab.launch(subnet, group="web", ip="10.0.1.10")


@pytest.fixture
def bare(inside: None, tmp_path: Path) -> Iterator[Kernel]:
    """A host without devices."""
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.close()


@pytest.fixture
def kernel(bare: Kernel) -> Kernel:
    """eth0 with the default route, and eth1 in the same subnets."""
    bare.add_device("eth0", "10.0.1.5/24", "2001:db8:1::5/64")
    bare.add_device("eth1", "10.0.1.22/24", "2001:db8:1::22/64")
    bare.sh("ip route add default via 10.0.1.1 dev eth0")
    bare.sh("ip -6 route add default via fe80::1 dev eth0")
    return bare


@pytest.fixture(scope="module")
def shared_world(inside: None) -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    yield shared_world
    shared_world.tidy()


@pytest.fixture(params=[HOOKS] if COLUMN else [HOOKS, WATCH])
def mode(request: pytest.FixtureRequest) -> str:
    """How add_routes.py is called: by ifupdown's hooks, or as a service."""
    return str(request.param)


@pytest.fixture
def make_host(
    request: pytest.FixtureRequest, world: World, mode: str
) -> Iterator[Callable[..., Subject]]:
    """A host without devices. Options are those of --watch."""
    case = outcomes.Case(request, mode, COLUMN or COLUMNS[mode])
    subjects: list[Subject] = []

    def make(*options: str, watch: bool = True) -> Subject:
        subjects.append(Subject(world, mode, case, *options, watch=watch))
        return subjects[-1]

    yield make
    for subject in subjects:
        subject.stop()
    assert COLUMN or not case.is_better_than_expected(), case.outcomes
