"""eni_ctl.py's options, their errors, and what it loads."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest
from lab import TOP, Lab, Machine
from lab.vpc import OUTER_LIMIT
from lab.watching import last_line

import eni_ctl

SCRIPT = str(TOP / "eni_ctl.py")


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one of -a, -d and -s is required"),
        (["-a", "-d"], "argument -d/--detach: not allowed with argument -a/--attach"),
        (["-x"], "unrecognized arguments: -x"),
        (["-n", "web"], "one of -a, -d and -s is required"),
        (["-a", "--att"], "unrecognized arguments: --att"),
        (["-a", "eth1"], "unrecognized arguments: eth1"),
        (["-a", "-t", "0"], "-t 0: expected 1 to 86400 seconds"),
        (["-a", "-t", "nan"], "-t nan: expected 1 to 86400 seconds"),
        (["-a", "-t", "soon"], "argument -t/--timeout: invalid float value: 'soon'"),
        (["-a", "-n", ""], '-n "": expected 1 to 256 characters of UTF-8'),
        (["-a", "-n", b"\xff"], '-n "\\udcff": expected 1 to 256 characters of UTF-8'),
        (["-a", "-o", "/dev/null"], '-o "/dev/null": expected a regular file'),
        (["-a", "-o", "/run"], '-o "/run": expected a regular file'),
        (["-a", "-o", ""], '-o "": expected a regular file'),
        (["-d", "-f"], "-f goes with -a"),
        (["-a", "--json"], "--json goes with -s"),
        (["-s", "--dry-run"], "--dry-run goes with -a or -d"),
    ],
)
def test_a_usage_error_is_a_usage_line_and_one_line_and_exit_code_2(
    arguments: list[str | bytes], words: str
) -> None:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    usage, error = done.stderr.splitlines()
    assert usage.startswith("usage: eni_ctl.py (-a | -d | -s) ")
    assert error.startswith(f"eni_ctl.py: error: {words}")


@pytest.mark.usefixtures("inside")
def test_help_is_a_short_man_page() -> None:
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True)
    parts = ["usage: ", "options:\n", "Examples:\n", "Files:\n", "Exit codes:\n"]
    assert sorted(parts, key=done.stdout.index) == parts


def test_the_examples_of_the_help_are_command_lines_of_it() -> None:
    assert eni_ctl.__doc__
    examples = re.findall(r"^  eni_ctl\.py (.+?)(?:  +\w| \| |$)", eni_ctl.__doc__, re.M)
    assert len(examples) == 7
    for example in examples:
        eni_ctl.parse(example.split())


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["--version"], 0), ([], 2)])
def test_help_and_usage_load_neither_boto3_nor_requests(arguments: list[str], code: int) -> None:
    done = subprocess.run(
        ["/usr/bin/python3", "-X", "importtime", SCRIPT, *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in loaded
    assert not loaded & {"boto3", "botocore", "requests", "urllib3"}


def test_a_lock_file_that_cannot_be_opened_is_one_line(machine: Machine) -> None:
    machine.run("mount", "-o", "remount,ro", "/run")
    done = machine.eni_ctl("-a")
    assert done.returncode == 1
    assert done.stderr == "eni_ctl.py: cannot open /run/eni_ctl.lock: Read-only file system\n"


@pytest.mark.parametrize("verb", ["-a", "-d", "-s"])
def test_a_ca_file_that_this_user_may_not_read_needs_a_person(machine: Machine, verb: str) -> None:
    """As for an ordinary user, who has no right to read any file."""
    path = machine.environment["AWS_CA_BUNDLE"]
    machine.run("chmod", "0", path)
    ordinary = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    done = machine.run(*ordinary, "eni_ctl.py", verb)
    assert done.returncode == 4, done.stderr
    problem = f"eni_ctl.py: cannot read the CA file {path} of AWS_CA_BUNDLE: Permission denied"
    assert last_line(done) == problem


def test_verbose_reports_each_request_and_command(lab: Lab, machine: Machine) -> None:
    done = machine.eni_ctl("-a", "-v")
    assert done.returncode == 0
    lines = [line.removeprefix("eni_ctl.py: ") for line in done.stderr.splitlines()]
    words = [line.split(" (")[0] for line in lines]
    assert "IMDS, GET http://169.254.169.254/latest/meta-data/instance-id: 200" in words
    assert "ip -json addr show dev eth1" in words
    assert [word for word in words if word.endswith(("Instances", "Interfaces", "Interface"))] == [
        call.action for call in lab.aws.calls
    ]


def test_a_reader_that_has_seen_enough_is_no_error(machine: Machine) -> None:
    machine.eni_ctl("-a")
    done = machine.run("bash", "-c", "set -o pipefail; eni_ctl.py -s | true")
    assert done.returncode == 0, done.stderr
    assert all(" waiting, " in line for line in done.stderr.splitlines())


def test_an_interrupt_ends_it_with_one_line(lab: Lab, machine: Machine) -> None:
    lab.aws.imds_up = False
    process = machine.start_eni_ctl("-a")
    assert process.stderr
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=OUTER_LIMIT)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("eni_ctl.py: interrupted: IMDS")
    assert "Traceback" not in err


def test_sigterm_ends_it_at_once(lab: Lab, machine: Machine) -> None:
    lab.aws.imds_up = False
    process = machine.start_eni_ctl("-a")
    assert process.stderr
    process.stderr.readline()
    process.terminate()
    process.communicate(timeout=OUTER_LIMIT)
    assert process.returncode == -signal.SIGTERM


def test_the_metadata_block_agrees_with_pyproject() -> None:
    import re

    if sys.version_info < (3, 11):
        pytest.fail("the tests need Python 3.11, for tomllib")
    import tomllib

    block = re.search(r"# /// script\n(.*?)# ///\n", (TOP / "eni_ctl.py").read_text(), re.S)
    assert block
    script = tomllib.loads(block[1].replace("# ", ""))
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    assert script["requires-python"] == project["requires-python"]
    assert script["dependencies"] == project["dependencies"]
