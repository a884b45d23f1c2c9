"""The lab as a fixture, and what no test may do."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import faults
import pytest
from lab import Lab, Machine
from lab.vpc import in_lab


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "pure: decides only; no sockets, no other programs")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """In CI a skip is a failure: what was not run was not shown."""
    report = yield
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, each followed by a short one: workers of pytest-xdist begin with two."""
    longest = [item for item in items if "release" in getattr(item, "fixturenames", ())]
    others = [item for item in items if item not in longest]
    for number, item in enumerate(longest):
        others.insert(2 * number, item)
    items[:] = others


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells the main process what it has tried."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = faults.tried


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for which, held in getattr(node, "workeroutput", {}).get("tried", {}).items():
        faults.tried.setdefault(which, []).extend(held)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The faults that were tried, and how many of them were held; times that tests have noted."""
    for line in faults.summary():
        terminalreporter.write_line(line)
    for report in terminalreporter.getreports("passed"):
        if report.when == "call" and report.user_properties:
            terminalreporter.write_line(f"\n{report.nodeid}")
            for what, seconds in report.user_properties:
                terminalreporter.write_line(f"  {what}: {seconds:.1f} s")


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
