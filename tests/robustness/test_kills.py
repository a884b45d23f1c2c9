"""SIGKILL at every point of a run; then one more run makes everything right.

Each kind of point is tried at its first, second, ... occurrence until a run meets no more of them.
An IMDS request changes nothing, so that before and after it are the same.
"""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Literal

import pytest
from lab import Lab, Machine, await_that
from lab.vpc import OUTER_LIMIT
from places import Place, note, try_all

pytestmark = pytest.mark.timeout(1800)  # for a machine that does other things too

ACTIONS = {
    "-a": ("DescribeAutoScalingInstances", "DescribeNetworkInterfaces", "AttachNetworkInterface"),
    "-d": ("DescribeAutoScalingInstances", "DescribeNetworkInterfaces", "DetachNetworkInterface"),
}
OLD = "".join(f"{key}=old\n" for key in ("FQDN", "IP", "GW", "DEVICE", "ASG_NAME")) + (
    "INSTANCE_ID=old\nENI_ID=old\nATTACHMENT_ID=old\n"
)
RETIRED = re.sub("(DEVICE|ATTACHMENT_ID)=old", r"\1=null", OLD)
# Runs a script as it is, and kills the process before the call number N into C that one of these of
# its functions makes, or when one returns: each is a step to a file or to the lock.
STEP = """
import os, runpy, signal, sys
at, names, script = int(sys.argv[1]), sys.argv[2].split(","), sys.argv[3]
def step(frame, event, called):
    global at
    if event not in ("c_call", "return") or frame.f_code.co_filename != script:
        return
    owner = type(frame.f_locals.get("self")).__name__
    pure = event == "c_call" and isinstance(called.__self__, (str, bytes, list, dict))
    if frame.f_code.co_name in names and owner in ("NoneType", "Lock") and not pure:
        at -= 1
        if at == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.argv = sys.argv[3:]
sys.setprofile(step)
runpy.run_path(script, run_name="__main__")
"""
# Stands before the real `ip`, counts its runs, and at one of them kills who called it: after the
# first LINES lines of its batch took effect, or before it did anything, or after all.
IP = """#!/bin/sh
ip=$(PATH=/usr/sbin:/usr/bin:/sbin:/bin command -v ip)
[ -n "$AT" ] || exec "$ip" "$@"
echo >> /run/ip.calls
[ $(wc -l < /run/ip.calls) = "$AT" ] || exec "$ip" "$@"
case $LINES in
    none) ;;
    all) "$ip" "$@" > /dev/null ;;
    *)
        head -n "$LINES" > /run/ip.lines
        [ $(wc -l < /run/ip.lines) = "$LINES" ] || { "$ip" "$@" < /run/ip.lines; exit; }
        "$ip" "$@" < /run/ip.lines > /dev/null
        ;;
esac
kill -9 $PPID
"""
STRIDES = {"IMDS request": 2, "step of the state file": 2, "step of the lock and its note": 2}
Arm = Callable[[Place, str, int], "subprocess.Popen[str]"]


def at_imds(place: Place, verb: str, n: int) -> subprocess.Popen[str]:
    started: list[subprocess.Popen[str]] = []
    place.fail("", how="drop", skip=n, do=lambda: started[0].kill())
    started.append(place.machine.start_eni_ctl(verb))
    return started[0]


def at_call(
    place: Place, verb: str, n: int, action: str, when: Literal["before", "after"]
) -> subprocess.Popen[str]:
    started: list[subprocess.Popen[str]] = []
    place.fail(action, when=when, how="drop", skip=n, do=lambda: started[0].kill())
    started.append(place.machine.start_eni_ctl(verb))
    return started[0]


def at_ip(place: Place, verb: str, n: int, lines: str) -> subprocess.Popen[str]:
    place.machine.run("rm", "-f", "/run/ip.calls")
    return place.machine.start_eni_ctl(verb, AT=str(n + 1), LINES=lines)


def at_step(place: Place, verb: str, n: int, names: str) -> subprocess.Popen[str]:
    script = "/usr/local/sbin/eni_ctl.py"
    return place.machine.popen("/usr/bin/python3", "-c", STEP, str(n + 1), names, script, verb)


POINTS: dict[str, Arm] = {
    "IMDS request": at_imds,
    "ip, before": partial(at_ip, lines="none"),
    "ip, after": partial(at_ip, lines="all"),
    "step of the state file": partial(at_step, names="write_state_file"),
    "step of the lock and its note": partial(at_step, names="__init__,held,take,recall,remember"),
}


def points(verb: str) -> dict[str, Arm]:
    calls: dict[str, Arm] = {
        f"{action}, {when}": partial(at_call, action=action, when=when)
        for action in ACTIONS[verb]
        for when in ("before", "after")
    }
    return POINTS | calls


def whole(place: Place) -> str:
    """Which state file is there, whole: the old one, with its attachment or without, or a new one.

    The old one is another instance's, so that a run of -a begins with taking the attachment out.
    """
    text = place.machine.read("/etc/default/eni")
    if text in (OLD, RETIRED):
        return "old"
    lines = [line.partition("=")[0] for line in text.splitlines()]
    right = lines == [line.partition("=")[0] for line in OLD.splitlines()] and text.endswith("\n")
    return "new" if right and place.machine.state()["INSTANCE_ID"] != "old" else "broken"


def prepare(place: Place, verb: str) -> None:
    place.release()
    place.machine.write("/etc/default/eni", OLD)
    place.machine.run("sh", "-c", "rm -f /run/eni_ctl.lock /etc/default/eni.new")
    if verb == "-d":
        place.attach(place.enis[0])


def one_more_run(place: Place, verb: str) -> str:
    """What is wrong after a second run that nothing disturbs; empty where all is right."""
    wrong = [] if whole(place) != "broken" else ["the state file is broken"]
    for fault in place.faults:
        fault.times = 0
    done = place.machine.eni_ctl(verb)
    if done.returncode or "holds /run" in done.stderr:
        wrong.append(f"exit code {done.returncode}: {done.stderr}")
    held, state = place.held(), place.machine.state()
    if len(held) != (verb == "-a"):
        wrong.append(f"holds {held}")
    if verb == "-a" and (state["ENI_ID"] not in held or state["DEVICE"] != "eth1"):
        wrong.append(f"the state file says {state}")
    if verb == "-d" and (state["DEVICE"], state["ATTACHMENT_ID"]) != ("null", "null"):
        wrong.append(f"the state file says {state}")
    if place.machine.exists("/etc/default/eni.new"):
        wrong.append("left eni.new")
    return ", ".join(wrong)


@pytest.mark.parametrize("verb", ["-a", "-d"])
def test_killed_at_any_point_one_more_run_makes_it_right(lab: Lab, subnet: str, verb: str) -> None:
    """Of a pool of two, while EC2 shows attachments late."""
    lab.aws.attach_delay = lab.aws.detach_delay = 0.1
    lab.aws.describe_lag = 0.5
    places = [Place(lab, subnet, f"group{n}") for n in range(6)]
    for place in places:
        place.machine.write("/usr/local/sbin/ip", IP, 0o755)
    met: set[str] = set()

    def attempt(place: Place, case: tuple[str, int]) -> str:
        kind, n = case
        wrong = []
        while True:
            prepare(place, verb)
            process = points(verb)[kind](place, verb, n)
            out, err = process.communicate(timeout=OUTER_LIMIT)
            if process.returncode != -signal.SIGKILL:
                break  # it met no more of them
            met.add(kind)
            complaint = one_more_run(place, verb)
            note(f"SIGKILL: {kind}", f"eni_ctl.py {verb}", not complaint)
            wrong += [f"{kind} {n}: {complaint}"] if complaint else []
            n += STRIDES.get(kind, 1)
        if process.returncode != 0:
            wrong.append(f"{kind} {n}: not killed, and yet {process.returncode} {out}{err}")
        return "\n".join(wrong)

    cases = [(kind, n) for kind in points(verb) for n in range(STRIDES.get(kind, 1))]
    assert try_all(places, cases, attempt) == []
    assert met == set(points(verb))


def routing(machine: Machine) -> list[str]:
    """Its rules, routes, interface groups and names of tables."""
    words = ("-d rule", "-6 -d rule", "route show table all", "-6 route show table all", "link")
    text = "".join(machine.ip(*line.split()) for line in words)
    names = machine.run("sh", "-c", "cat /etc/iproute2/rt_tables.d/*").stdout
    return sorted(text.splitlines()) + names.splitlines()


@pytest.mark.parametrize(("verb", "back"), [("up", "down"), ("down", "up")])
def test_add_routes_killed_at_any_point_is_made_right_by_one_more_run(
    lab: Lab, verb: str, back: str
) -> None:
    """At each `ip`, before it and after each line of its batch; at each step to lock and name."""
    lab.aws.attach_delay = 0.1
    subnet = lab.add_subnet("10.0.1.0/24", cidr6="2001:db8:0:1::/64")
    eni = lab.aws.create_eni(subnet, name="web", ipv6=["2001:db8:0:1::22"])
    machine = lab.launch(subnet, group="web", ipv6=["2001:db8:0:1::10"])
    lab.aws.attach(lab.aws.lab_eni(eni), machine.instance, 1)
    assert machine.appeared.wait(OUTER_LIMIT)
    await_that(lambda: "2001:db8:0:1::22" in machine.ip("addr", "show", "dev", "eth1"))
    machine.await_network()
    machine.write("/usr/local/sbin/ip", IP, 0o755)
    arguments = {"up": ["-d", "eth1", "--default"], "down": ["-d", "eth1", "-r"]}

    def run(which: str) -> None:
        done = machine.run("add_routes.py", *arguments[which])
        assert (done.returncode, done.stderr) == (0, "")

    run("up")
    run(back)
    run(verb)
    wanted = routing(machine)
    wrong: list[str] = []

    def survives(process: subprocess.Popen[str], kind: str) -> bool:
        """Whether the run was killed, and one more run then made all right."""
        out, err = process.communicate(timeout=OUTER_LIMIT)
        if process.returncode == 0:
            return False
        assert process.returncode == -signal.SIGKILL, out + err
        run(verb)
        found = routing(machine)
        held = found == wanted
        note(f"SIGKILL: {kind}", f"add_routes.py, {verb}", held)
        if not held:
            wrong.append(f"{kind}: {set(found) ^ set(wanted)}")
        return True

    def before_each() -> None:
        run(back)
        if verb == "up":
            machine.run("sh", "-c", "rm -f /run/add_routes.lock /etc/iproute2/rt_tables.d/e*")
        machine.run("rm", "-f", "/run/ip.calls")

    def killed_at(call: int, lines: str) -> bool:
        before_each()
        start = {"AT": str(call), "LINES": lines}
        process = machine.popen("add_routes.py", *arguments[verb], environment=start)
        return survives(process, f"ip, line {lines} of its batch")

    calls = 1
    while killed_at(calls, "none"):
        assert killed_at(calls, "all")
        lines = itertools.count(1)
        while killed_at(calls, str(next(lines))):
            pass
        calls += 1
    assert calls > 5  # three ask, two change
    for n in itertools.count(1):
        before_each()
        script = "/usr/local/sbin/add_routes.py"
        step = [
            "/usr/bin/python3",
            "-c",
            STEP,
            str(n),
            "locked,try_lock,write_names,write_file",
            script,
        ]
        if not survives(machine.popen(*step, *arguments[verb]), "step of the lock and the name"):
            break
    assert n > 4
    assert wrong == []
