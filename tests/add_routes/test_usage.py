"""add_routes.py's options, their errors, its lock, and how ifupdown calls it."""

from __future__ import annotations

import re
import subprocess

import pytest
from lab.kernel import SCRIPT, Kernel
from lab.vpc import OUTER_LIMIT

import add_routes


@pytest.mark.parametrize("arguments", ["-d eth1", "-d eth1 --default"])
def test_a_dry_run_prints_what_a_shell_can_run(kernel: Kernel, arguments: str) -> None:
    before = kernel.state()
    done = kernel.add_routes(f"{arguments} --dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert kernel.state() == before
    assert kernel.sh("ls /etc/iproute2; find /run -name '*.lock'") == "rt_tables\n"
    kernel.sh(done.stdout)
    by_hand = kernel.state()
    kernel.serve(f"{arguments} -r", arguments)
    assert kernel.state() == by_hand
    assert kernel.add_routes(f"{arguments} --dry-run").stdout == "nothing to change\n"


def test_verbose_says_each_command(kernel: Kernel) -> None:
    dry = kernel.add_routes("-d eth1 --dry-run").stdout
    said = kernel.add_routes("-d eth1 -v").stderr
    assert [line for line in said.splitlines() if "-json" not in line] == dry.splitlines()


def test_a_dry_run_whose_commands_nobody_reads_ends_with_one_line(kernel: Kernel) -> None:
    done = kernel.run("sh", "-c", f"{SCRIPT} -d eth1 --dry-run >/dev/full")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr


@pytest.mark.pure
def test_an_unexpected_error_is_one_line_and_a_failure(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(add_routes, "serve", lambda *_: 1 / 0)
    assert add_routes.main(["-d", "eth1"]) == 1
    words = "unexpected ZeroDivisionError: division by zero (-v shows where)"
    assert capfd.readouterr().err == f"add_routes.py: {words}\n"


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "2>&1 | true"])
def test_nobody_needs_to_read_what_verbose_says(kernel: Kernel, redirection: str) -> None:
    kernel.serve("-d eth1")
    wanted = kernel.state()
    kernel.serve("-d eth1 -r")
    kernel.sh(f"{SCRIPT} -d eth1 -v {redirection}")
    assert kernel.state() == wanted


def test_an_interrupted_run_ends_with_one_line_and_changes_nothing(kernel: Kernel) -> None:
    before = kernel.state()
    for at in range(1, 6):
        done = kernel.add_routes("-d eth1", **kernel.fake_ip("kill -INT $PPID; sleep 1", at))
        assert done.returncode == 130
        assert done.stderr == "add_routes.py: interrupted\n"
        assert kernel.state() == before


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ("-d eth7", 1, "eth7"),
        ("-d eth2", 1, "eth2"),  # has no address
        ("-d eth1;reboot", 1, "eth1;reboot"),
        ("--device=-batch", 1, "-batch"),
        ("-d ../x", 1, "../x"),
        ("-d .", 1, "'.'"),
        ("-d all", 1, "all"),
        ("-d default", 1, "default"),
        ("-d sixteen-letters-", 1, "sixteen-letters-"),
        ("-d eth1#", 1, "eth1#"),
        ("-d $(reboot)", 1, "$(reboot)"),
        ("-d :0", 1, "''"),
        ("-d éth1", 1, "éth1"),
        ("-r -d ../x", 1, "../x"),
        ("-d eth1 -g 10.0.2.1", 1, "10.0.2.1"),
        ("-d eth1 -g 10.0.1.1 -n 10.0.1.16/28", 1, "10.0.1.1 "),
        ("-d eth1 -g 10.0.1.22", 1, "10.0.1.22"),
        ("-d eth1 -g 10.0.1.40 -n 10.0.1.16/28", 1, "10.0.1.40"),
        ("-d eth1 -n 10.9.0.0/24", 1, "10.9.0.0/24"),
        ("-d eth1 -g 2001:db8:9::1", 1, "2001:db8:9::1"),
        ("-d eth1 -n 24", 2, "24"),
        ("-d eth1 -n 10.0.1.22/24", 2, "10.0.1.22/24"),
        ("-d eth1 -n 10.0.1.0", 2, "10.0.1.0"),
        ("-d eth1 -n 0.0.0.0/0", 2, "0.0.0.0/0"),
        ("-d eth1 -g router", 2, "router"),
        ("-d eth1 -g fe80::1%eth1", 2, "fe80::1%eth1"),
        ("-d eth1 -t main", 1, "main"),
        ("-d eth1 -t 255", 1, "255"),
        ("-d eth1 -t 0", 1, "table 0"),
        ("-d eth1 -t 4294967296", 1, "4294967296"),
        ("-d eth1 -t a;b", 1, "a;b"),
        ("-d eth3", 1, "10.0.3.9/32"),
        ("-d eth4", 1, "group 5"),
        ("-d eth1 -x", 2, "-x"),
        ("-d eth0 -d eth1", 2, "2 device(s)"),
        ("-d eth0 --default eth1", 2, "--default eth1"),
        ("--watch --default", 2, "--default DEVICE"),
        ("--watch --default eth1;reboot", 1, "eth1;reboot"),
        ("--watch -r", 2, "-r"),
        ("--watch -d eth1 -g 10.0.1.9", 2, "-g"),
        ("-d", 2, "-d"),
        ("", 2, "-d"),
    ],
)
def test_impossible_arguments_are_one_line_and_no_change(
    kernel: Kernel, arguments: str, code: int, named: str
) -> None:
    kernel.add_device("eth2")
    kernel.add_device("eth3", "10.0.3.9/32")
    kernel.add_device("eth4", "10.0.4.9/24")
    kernel.sh("ip link set eth4 group 5; ip addr flush dev eth2")
    before = kernel.state()
    done = kernel.add_routes(arguments, IFACE="")
    assert (done.returncode, done.stdout) == (code, "")
    *usage, error = done.stderr.splitlines()
    assert (usage != []) == (code == 2)
    assert all(line.startswith(("usage: add_routes.py [-d DEVICE]", "  ")) for line in usage)
    assert error.startswith("add_routes.py: ")
    assert named in error
    assert kernel.state() == before
    assert not kernel.run("ls", "/etc/iproute2/rt_tables.d").stdout


def test_help_begins_with_a_usage_line_and_needs_no_host() -> None:
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True, env={})
    assert done.stdout.startswith("usage: add_routes.py [-d DEVICE]")
    parts = ["options:\n", "Examples:\n", "Files:\n", "Exit codes:\n"]
    assert sorted(parts, key=done.stdout.index) == parts


def test_the_examples_of_the_help_are_command_lines_of_it() -> None:
    assert add_routes.__doc__
    examples = re.findall(r"^  add_routes\.py (.+?)  +\w", add_routes.__doc__, re.M)
    assert len(examples) == 5
    for example in examples:
        add_routes.parse(example.split())


def test_the_end_of_an_alias_removes_nothing_but_its_own_rules(kernel: Kernel) -> None:
    kernel.sh("ip addr add 10.0.1.23/24 dev eth1 label eth1:0")
    kernel.serve("-d eth1")
    before = kernel.rules()
    assert kernel.add_routes("-r", IFACE="eth1:0", MODE="stop").returncode == 0
    assert set(before) - set(kernel.rules()) == {"20030: from 10.0.1.23 lookup 101"}
    kernel.sh("ip addr del 10.0.1.23/24 dev eth1")
    assert kernel.add_routes("-r", IFACE="eth1:0", MODE="stop").returncode == 0
    assert kernel.device_to("198.51.100.1", "10.0.1.22") == "eth1"


def test_ifupdown_says_the_device_by_the_environment(kernel: Kernel) -> None:
    before = kernel.state()
    for device in ("--all", "lo"):
        for arguments in ("", "-r"):
            done = kernel.add_routes(arguments, IFACE=device, MODE="start", PHASE="post-up")
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert kernel.state() == before
    assert kernel.add_routes("", IFACE="eth1:0", MODE="start").returncode == 0
    assert kernel.device_to("198.51.100.1", "10.0.1.22") == "eth1"
    assert kernel.add_routes("-r", IFACE="eth1", MODE="stop").returncode == 0
    assert kernel.state() == before


def test_the_stanza_of_ipv6_or_an_alias_does_not_end_the_default_of_the_one_of_ipv4(
    kernel: Kernel,
) -> None:
    def hook(arguments: str, device: str, family: str) -> None:
        done = kernel.add_routes(arguments, IFACE=device, ADDRFAM=family)
        assert (done.returncode, done.stderr) == (0, "")

    hook("--default", "eth1", "inet")
    hook("", "eth1", "inet6")
    hook("", "eth1:0", "inet")
    assert kernel.device_to("198.51.100.1") == "eth1"
    assert kernel.device_to("2001:db8:9::1") == "eth1"
    hook("-r", "eth1", "inet")
    hook("", "eth1", "inet")
    assert kernel.device_to("198.51.100.1") == "eth0"


def test_without_a_lock_nothing_is_done(kernel: Kernel) -> None:
    kernel.sh("mount -o remount,ro /run")
    before = kernel.state()
    done = kernel.add_routes("-d eth1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "add_routes.py: /run/add_routes.lock: Read-only file system\n"
    assert kernel.state() == before


def test_a_run_waits_for_another(kernel: Kernel) -> None:
    holder = subprocess.Popen(
        kernel.command("flock", "/run/add_routes.lock", "sh", "-c", "echo held; read line"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    waiting = subprocess.Popen(kernel.command(SCRIPT, "-d", "eth1"))
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(timeout=0.5)
    assert kernel.rules() == []
    holder.communicate("done\n", timeout=OUTER_LIMIT)
    assert waiting.wait(timeout=OUTER_LIMIT) == 0
    assert kernel.device_to("198.51.100.1", "10.0.1.22") == "eth1"


def test_a_host_without_ip_is_told_so(kernel: Kernel) -> None:
    done = kernel.run("/usr/bin/env", "PATH=/nowhere", "/usr/bin/python3", SCRIPT, "-d", "eth1")
    assert (done.returncode, done.stderr) == (1, "add_routes.py: ip: No such file or directory\n")
