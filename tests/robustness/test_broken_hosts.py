"""Hosts that lack what the scripts need, and runs that are told to stop."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator

import pytest
from lab import Lab, Machine, await_that
from lab.vpc import OUTER_LIMIT
from lab.watching import give_up, last_line, wait_for_line
from places import note, timed, wrong_end

# What `ip` may be: what it does, and what the last line must have, as a regular expression.
BAD_IP = {
    "missing": ("", "No such file or directory"),
    "failing": ("echo 'Cannot open netlink socket' >&2; exit 1", "Cannot open netlink socket"),
    "too old": ('echo \'Option "-json" is unknown, try "ip -help".\' >&2; exit 255', "is unknown"),
    "rubbish": ("echo '<html>'", "Expecting value"),
    "silent": ("exit 0", "eth1 is not up with"),
    "cut off": ("""echo '[{"ifname": "eth1", '""", "Expecting property name"),
    "numbers": ("echo '[5]'", "ip -json addr show dev eth1"),
    "no prefix": (
        """echo '[{"flags": ["UP"], "addr_info": [{"local": "10.0.1.22"}]}]'""",
        "10.0.1.22 has no prefix length",
    ),
    # The run's own deadline may come before that of its first `ip`, or after.
    "hanging": (
        "exec sleep 600",
        "is attached, waiting for its device and address|timed out after 5 seconds",
    ),
}


def tell(machine: Machine, script: str) -> str:
    """The last line of a run that fails with exit code 1; asserts that it ends as it has to."""
    done = machine.run("sh", "-c", script)
    assert wrong_end(done, 1) == "", done.stderr
    return last_line(done)


def bad_ips(
    machine: Machine, script: str, options: str, kinds: Iterable[str] = BAD_IP
) -> Iterator[tuple[str, str, str]]:
    """Run the script with each bad `ip`: which, all it said, and what is not as it has to be."""
    for kind in kinds:
        action, _ = BAD_IP[kind]
        machine.write("/run/bin/ip", f"#!/bin/sh\n{action}\n", 0o755)
        if not action:
            machine.run("rm", "/run/bin/ip")
        path = "PATH=/run/bin" + (":/usr/bin:/bin" if action else "")
        run = f"exec env {path} /usr/local/sbin/{script} {options}"
        done, took = timed(lambda run=run: machine.run("sh", "-c", run))  # type: ignore[misc]
        complaint = wrong_end(done, 1, took, 120)
        note(f"broken ip: {kind}", script, not complaint)
        yield kind, done.stderr, complaint


@pytest.mark.timeout(1800)  # the longest deadlines of all kinds, and more
def test_a_broken_ip_makes_eni_ctl_fail_with_one_line_at_the_deadline(
    lab: Lab, machine: Machine, eni: str
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    wrong = dict.fromkeys(BAD_IP, "")
    # A busy machine may miss a short deadline before the run asks `ip`.
    for seconds in (2, 20, 60):
        tried = bad_ips(machine, "eni_ctl.py -a", f"-t {seconds}", kinds=list(wrong))
        wrong = {
            kind: f"{complaint} {said}"
            for kind, said, complaint in tried
            if complaint or not re.search(BAD_IP[kind][1], said.splitlines()[-1])
        }
        if not wrong:
            break
    assert wrong == {}
    assert machine.state()["DEVICE"] == "eth1"
    assert machine.eni_ctl("-a").returncode == 0


def test_a_broken_ip_makes_add_routes_fail_and_change_nothing(machine: Machine) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    machine.await_network()
    before = machine.ip("rule") + machine.ip("route", "show", "table", "all")
    wrong = []
    for kind, said, complaint in bad_ips(machine, "add_routes.py", "-d eth1"):
        if complaint or "add_routes.py: " not in said:
            wrong.append(f"{kind}: {complaint} {said}")
    assert wrong == []
    assert machine.ip("rule") + machine.ip("route", "show", "table", "all") == before


def test_a_host_without_sys_is_told_so(machine: Machine) -> None:
    machine.run("mount", "-t", "tmpfs", "lab", "/sys")
    for verb in ("-a", "-d"):
        last = tell(machine, f"exec eni_ctl.py {verb}")
        note("no /sys", f"eni_ctl.py {verb}", True)
        assert "/sys/class/net" in last
        assert not machine.exists("/etc/default/eni")


def test_a_full_run_directory_costs_the_note_and_not_the_attach(machine: Machine, eni: str) -> None:
    machine.run("sh", "-c", "mount -t tmpfs -o size=4k lab /run; echo full >/run/full")
    done = machine.eni_ctl("-a")
    assert done.stdout == f"attached {eni} (10.0.1.22) as eth1\n", done.stderr
    assert "cannot write /run/eni_ctl.lock: No space left on device" in done.stderr


def test_a_state_file_that_cannot_be_replaced_stays_whole(machine: Machine) -> None:
    """A file system that knows chattr +i is not to be had everywhere; a mount point is as firm."""
    machine.write("/run/eni", "old\n")
    machine.run("touch", "/etc/default/eni")
    assert machine.run("mount", "--bind", "/run/eni", "/etc/default/eni").returncode == 0
    last = tell(machine, "exec eni_ctl.py -a")
    assert (
        last == "eni_ctl.py: cannot write the state file /etc/default/eni: Device or resource busy"
    )
    assert machine.read("/etc/default/eni") == "old\n"
    assert not machine.exists("/etc/default/eni.new")
    machine.run("umount", "/etc/default/eni")
    assert machine.eni_ctl("-a").returncode == 0
    note("state file not to be replaced", "eni_ctl.py -a", True)


def test_a_lock_that_is_held_is_waited_for_until_the_deadline(machine: Machine) -> None:
    hold = ["flock", "--no-fork", "/run/eni_ctl.lock", "sh", "-c", "echo held; exec sleep 600"]
    holder = machine.popen(*hold)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    for verb in ("-a", "-d"):
        held = "^eni_ctl.py: another run of eni_ctl.py holds /run/eni_ctl.lock; "
        done = give_up(machine, verb, over=held)
        assert wrong_end(done, 1) == "", done.stderr
        note("lock held", f"eni_ctl.py {verb}", True)
    assert machine.eni_ctl("-s").returncode == 3  # it only looks
    waiting = machine.start_eni_ctl("-a")
    wait_for_line(waiting, "another run")
    holder.kill()
    holder.communicate()
    _, err = waiting.communicate(timeout=OUTER_LIMIT)
    assert waiting.returncode == 0, err


def stopped(process: subprocess.Popen[str]) -> None:
    """End a run as systemd would; it leaves at once, and quietly."""
    process.terminate()
    _, err = process.communicate(timeout=OUTER_LIMIT)
    assert process.returncode == -signal.SIGTERM
    assert "Traceback" not in err


def test_a_run_that_is_told_to_stop_leaves_at_once_and_the_next_one_goes_on(
    lab: Lab, machine: Machine, eni: str
) -> None:
    where: dict[str, Callable[[], object]] = {
        "IMDS": lambda: lab.aws.fail("latest/meta-data/instance-id", how="hang", do=reached),
        "describe": lambda: lab.aws.fail("DescribeNetworkInterfaces", how="hang", do=reached),
        "attach": lambda: lab.aws.fail("AttachNetworkInterface", how="hang", do=reached),
        "attach, after": lambda: lab.aws.fail(
            "AttachNetworkInterface", how="hang", when="after", do=reached
        ),
    }
    there: list[bool] = []

    def reached() -> None:
        there.append(True)

    machine.write("/etc/default/eni", "old\n")
    for place, spoil in where.items():
        there.clear()
        spoil()
        process = machine.start_eni_ctl("-a")
        await_that(lambda: bool(there))
        stopped(process)
        assert machine.read("/etc/default/eni") == "old\n"
        note(f"SIGTERM: {place}", "eni_ctl.py -a", True)
    done = machine.eni_ctl("-a")
    assert done.stdout == f"attached {eni} (10.0.1.22) as eth1\n", done.stderr
    lab.aws.stuck.add(eni)
    process = machine.start_eni_ctl("-d")
    wait_for_line(process, "is being detached")
    stopped(process)
    lab.aws.detach(lab.aws.lab_eni(eni), force=True)
    assert machine.eni_ctl("-d").returncode == 0
    note("SIGTERM: detaching", "eni_ctl.py -d", True)


@pytest.mark.parametrize("arguments", [["-d", "eth1"], ["-d", "eth1", "-r"]])
def test_add_routes_that_is_told_to_stop_leaves_at_once_and_the_next_one_goes_on(
    machine: Machine, arguments: list[str]
) -> None:
    assert machine.eni_ctl("-a").returncode == 0
    machine.await_network()
    machine.write("/run/bin/ip", "#!/bin/sh\ntouch /run/asked\nexec sleep 600\n", 0o755)
    path = "/run/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    process = machine.popen("env", f"PATH={path}", "add_routes.py", *arguments)
    await_that(lambda: machine.exists("/run/asked"))
    stopped(process)
    done = machine.run("add_routes.py", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(re.search("from 10.0.1.22 ", machine.ip("rule"))) == ("-r" not in arguments)
    note("SIGTERM: ip hangs", "add_routes.py", True)
