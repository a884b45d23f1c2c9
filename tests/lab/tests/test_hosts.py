"""The lab's hosts have files and processes of their own."""

from __future__ import annotations

import subprocess

import pytest
from lab import Lab, Machine, await_that
from lab.vpc import OUTER_LIMIT


@pytest.fixture
def host(lab: Lab) -> Machine:
    return lab.launch(lab.add_subnet("10.0.1.0/24"), group="web", ip="10.0.1.10")


def test_a_host_starts_without_this_machines_defaults_and_routing_tables(host: Machine) -> None:
    for directory in ("/etc/default", "/etc/iproute2/rt_tables.d"):
        assert host.run("ls", "-A", directory).stdout == ""


def test_what_is_written_on_a_host_stays_there(lab: Lab, host: Machine) -> None:
    paths = ("/etc/hosts-too", "/etc/default/eni", "/usr/local/sbin/new", "/run/new", "/root/new")
    other = lab.add_host("other", "10.0.1.60")
    for path in paths:
        host.write(path, "here\n")
        assert host.read(path) == "here\n"
        assert not other.exists(path)
        assert subprocess.run(["test", "-e", path]).returncode == 1


def test_nothing_runs_on_a_host_whose_power_is_off(host: Machine) -> None:
    process = host.popen("sh", "-c", "trap '' TERM; while true; do sleep 0.01; done & wait")
    await_that(lambda: len(host.processes()) > 2)
    host.stop()
    assert host.processes() == []
    process.communicate(timeout=OUTER_LIMIT)
    host.stop()  # once more changes nothing
