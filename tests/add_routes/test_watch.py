"""add_routes.py --watch, on the kernel of a host with two ENIs and nobody behind them.

Each test waits for what has to become so, for as long as a busy machine needs.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import await_that
from lab.kernel import SCRIPT, Kernel
from lab.vpc import OUTER_LIMIT

import add_routes

TICKS = os.sysconf("SC_CLK_TCK")
Note = Callable[[str, object], None]

# A line of what somebody else does, again and again.
STORM = "for n in $(seq 100); do echo route {verb} 10.99.0.$n via 10.0.1.66 dev eth0; done"


class Watch:
    """A running add_routes.py --watch, and what it has said."""

    def __init__(self, kernel: Kernel, *arguments: str, **environment: str) -> None:
        self.kernel = kernel
        self.log = kernel.directory / "watch.log"
        patterns = () if "-d" in arguments else ("-d", "eth*")
        with self.log.open("a") as file:
            self.process = subprocess.Popen(
                kernel.command(SCRIPT, "--watch", *patterns, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=os.environ | environment,
            )

    def said(self) -> list[str]:
        return self.log.read_text().splitlines()

    def awaits(self, condition: Callable[[], bool]) -> None:
        def met() -> bool:
            assert self.process.poll() is None, self.said()
            return condition()

        await_that(met)

    def awaits_peace(self) -> None:
        """Wait until it has found nothing to do: it sleeps for a second, and runs no program."""
        before = None
        while (now := self.times_asleep()) is None or now != before:
            before = now
            time.sleep(1)

    def times_asleep(self) -> int | None:
        """How often it has gone to sleep. None while it is awake: it, or a program that it has
        started, works, or would if this busy machine had time for it."""
        proc = Path(f"/proc/{self.process.pid}")
        status = (proc / "status").read_text()
        asleep = re.search(r"^State:\tS", status, re.M) is not None
        children = (proc / f"task/{self.process.pid}/children").read_text()
        count = re.search(r"^voluntary_ctxt_switches:\t(\d+)", status, re.M)
        assert count
        return int(count[1]) if asleep and not children else None

    def cpu_seconds(self) -> float:
        """Its own, and those of the programs that it has run."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        return sum(map(int, stat.rpartition(")")[2].split()[11:15])) / TICKS

    def memory_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) / 1024

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(OUTER_LIMIT)


@pytest.fixture
def start(kernel: Kernel) -> Iterator[Callable[..., Watch]]:
    """Starts --watch with these arguments."""
    started: list[Watch] = []

    def begin(*arguments: str, **environment: str) -> Watch:
        started.append(Watch(kernel, *arguments, **environment))
        return started[-1]

    yield begin
    for watch in started:
        if watch.process.poll() is None:
            watch.end(signal.SIGKILL)


Start = Callable[..., Watch]


@pytest.fixture
def served(kernel: Kernel) -> list[str]:
    """The state of the host when it is served, and served no more afterwards."""
    kernel.serve("-d eth0", "-d eth1")
    state = kernel.state()
    kernel.serve("-d eth1 -r")
    kernel.sh("rm -r /etc/iproute2/rt_tables.d")
    return state


DELETE_ALL = """
for family in 4 6; do
    ip -$family -N rule | sed -n 's/^\\([0-9]*\\):.* proto 77$/\\1/p' |
        while read -r pref; do ip -$family rule del pref $pref; done
    ip -$family route flush table all proto 77
done
"""


def test_it_serves_at_once_and_ends_at_sigterm_and_leaves_all_in_place(
    kernel: Kernel, start: Start, served: list[str]
) -> None:
    watch = start()
    watch.awaits(lambda: kernel.state() == served)
    assert watch.end() == 0
    assert kernel.state() == served


def test_rules_and_routes_that_somebody_deletes_come_back(
    kernel: Kernel, start: Start, served: list[str], record_property: Note
) -> None:
    watch = start()
    watch.awaits(lambda: kernel.state() == served)
    watch.awaits_peace()
    kernel.sh(DELETE_ALL)
    began = time.monotonic()
    watch.awaits(lambda: kernel.state() == served)
    record_property("all rules and routes deleted, to all of them back", time.monotonic() - began)


def test_addresses_and_devices_that_come_and_go_are_followed(kernel: Kernel, start: Start) -> None:
    def has(address: str) -> bool:
        return any(f"from {address} " in rule for rule in kernel.rules())

    watch = start()
    watch.awaits(lambda: has("10.0.1.22"))
    kernel.sh("ip addr add 10.0.1.23/32 dev eth1; ip -6 addr add 2001:db8:1::23/64 dev eth1")
    watch.awaits(lambda: has("10.0.1.23") and has("2001:db8:1::23"))
    kernel.sh("ip addr del 10.0.1.23/32 dev eth1")
    watch.awaits(lambda: not has("10.0.1.23"))
    kernel.add_device("eth2", "10.0.2.9/24")
    watch.awaits(lambda: has("10.0.2.9"))
    kernel.sh("ip link del eth2")
    watch.awaits(lambda: not has("10.0.2.9"))
    kernel.sh("ip link set eth1 down; ip link set eth1 up")
    watch.awaits(lambda: len(kernel.table(101)) == 2)
    kernel.add_device("other0", "10.0.9.9/24")
    kernel.sh("ip addr add 10.0.1.24/24 dev eth1")
    watch.awaits(lambda: has("10.0.1.24"))
    assert not has("10.0.9.9")


def test_without_a_pattern_it_serves_hardware_only(kernel: Kernel) -> None:
    """These devices are no hardware, so nothing is to be done."""
    done = kernel.run(SCRIPT, "--watch", "--dry-run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing to change\n", "")


def test_default_is_the_devices_as_long_as_it_is_there(kernel: Kernel, start: Start) -> None:
    watch = start("--default", "eth2")
    watch.awaits(lambda: kernel.device_to("198.51.100.1", "10.0.1.22") == "eth1")
    assert kernel.device_to("198.51.100.1") == "eth0"
    for _ in range(2):
        kernel.add_device("eth2", "10.0.2.9/24")
        watch.awaits(lambda: kernel.device_to("198.51.100.1") == "eth2")
        kernel.sh("ip link del eth2")
        assert kernel.device_to("198.51.100.1") == "eth0"
        watch.awaits(lambda: not [rule for rule in kernel.rules() if "lookup 102" in rule])


def test_the_device_of_default_is_served_whatever_the_pattern(kernel: Kernel, start: Start) -> None:
    watch = start("-d", "eth0", "--default", "eth1")
    watch.awaits(lambda: kernel.device_to("198.51.100.1") == "eth1")
    assert not [line for line in watch.said() if "--default" in line]


def test_default_for_a_device_that_is_not_there_is_told(kernel: Kernel, start: Start) -> None:
    watch = start("--default", "eth7")
    line = "add_routes.py: --default: eth7 is not there, or not up with an address"
    watch.awaits(lambda: line in watch.said())


def test_it_does_not_answer_its_own_changes(kernel: Kernel, start: Start) -> None:
    """It looks once more, finds nothing to do, and sleeps."""
    watch = start(**kernel.fake_ip(":"))
    watch.awaits(lambda: kernel.device_to("198.51.100.1", "10.0.1.22") == "eth1")
    watch.awaits_peace()
    assert kernel.calls() <= 2 * 3 + 2
    calls = kernel.calls()
    time.sleep(3)
    assert kernel.calls() == calls
    assert len([line for line in watch.said() if "changes" in line]) == 1


def test_while_nothing_happens_it_costs_nothing(
    kernel: Kernel, start: Start, record_property: Note
) -> None:
    watch = start()
    watch.awaits(lambda: kernel.device_to("198.51.100.1", "10.0.1.22") == "eth1")
    watch.awaits_peace()
    before = watch.cpu_seconds()
    time.sleep(60)
    idle = watch.cpu_seconds() - before
    record_property("CPU in 60 s without a change", idle)
    record_property("memory", f"{watch.memory_mib():.1f} MiB")
    assert idle == 0
    assert watch.memory_mib() < 32


def test_a_storm_of_routes_costs_little_and_an_address_that_comes_meanwhile_is_served(
    kernel: Kernel, start: Start, record_property: Note
) -> None:
    watch = start()
    watch.awaits(lambda: kernel.device_to("198.51.100.1", "10.0.1.22") == "eth1")
    watch.awaits_peace()
    lines = "".join(kernel.sh(STORM.format(verb=verb)) for verb in ("add", "del"))
    kernel.sh(f"cat > /run/storm <<EOF\n{lines}EOF\n")
    loop = "while ip -batch /run/storm; do echo >> /run/rounds; sleep 0.18; done"
    storm = subprocess.Popen(kernel.command("sh", "-c", loop))
    try:
        before, began = watch.cpu_seconds(), time.monotonic()
        time.sleep(10)
        kernel.sh("ip addr add 10.0.1.23/24 dev eth1")
        added = time.monotonic()
        watch.awaits(lambda: any("from 10.0.1.23 " in rule for rule in kernel.rules()))
        record_property("in a storm, an address to its rule", time.monotonic() - added)
        time.sleep(max(0.0, began + 20 - time.monotonic()))
        seconds = time.monotonic() - began
        cpu = watch.cpu_seconds() - before
        changes = 200 * int(kernel.sh("wc -l < /run/rounds")) / seconds
    finally:
        storm.kill()
        storm.wait()
    record_property("the storm", f"{changes:.0f} changes a second for {seconds:.0f} s")
    record_property("its cost", f"{100 * cpu / seconds:.0f}% of one core")
    assert cpu < seconds / 4
    # The routes are main's own device's, so only the address was a change for us.
    assert len([line for line in watch.said() if "changes" in line]) == 2


def test_killed_at_any_ip_it_makes_all_right_when_started_again(
    kernel: Kernel, start: Start, served: list[str]
) -> None:
    real = shutil.which("ip")
    for after in ("", f'{real} "$@" > /dev/null; '):
        for at in range(1, 6):
            watch = start(**kernel.fake_ip(f"{after}kill -9 $PPID; exit 1", at))
            assert watch.process.wait(OUTER_LIMIT) == -signal.SIGKILL
            again = start()
            again.awaits(lambda: kernel.state() == served)
            again.end(signal.SIGKILL)
            kernel.serve("-d eth1 -r")


def test_what_is_left_of_a_killed_one_does_no_harm_after_a_replug(
    kernel: Kernel, start: Start
) -> None:
    """The rules of then are there, and the device is in no group any more."""
    watch = start()
    watch.awaits(lambda: kernel.device_to("198.51.100.1", "10.0.1.22") == "eth1")
    watch.end(signal.SIGKILL)
    kernel.sh("ip link del eth1")
    kernel.add_device("eth1", "10.0.1.22/24", "2001:db8:1::22/64")
    again = start()
    again.awaits(lambda: kernel.device_to("10.0.1.77", "10.0.1.22") == "eth1")
    again.awaits(lambda: kernel.device_to("2001:db8:1::77", "2001:db8:1::22") == "eth1")
    assert kernel.device_to("10.0.1.77", "10.0.1.5") == "eth0"


def test_sigterm_ends_it_even_while_ip_hangs(kernel: Kernel, start: Start) -> None:
    watch = start(**kernel.fake_ip("sleep 1000", 2))
    watch.awaits(lambda: kernel.calls() == 2)
    assert watch.end() == 0
    # By itself, add_routes.py gives `ip` up after 10 s, and says so.
    assert not any("did not finish" in line for line in watch.said())


def test_a_second_one_ends_with_one_line(kernel: Kernel, start: Start) -> None:
    watch = start()
    watch.awaits(lambda: kernel.device_to("198.51.100.1", "10.0.1.22") == "eth1")
    done = kernel.run(SCRIPT, "--watch")
    assert (done.returncode, done.stdout) == (1, "")
    expected = "another --watch is running; it holds /run/add_routes.watch.lock"
    assert done.stderr == f"add_routes.py: {expected}\n"


def test_hooks_run_beside_it(kernel: Kernel, start: Start, served: list[str]) -> None:
    watch = start()
    hooks = []
    for arguments in [["eth0"], ["eth1"]] * 4:
        command = kernel.command(SCRIPT, "-d", *arguments)
        hooks.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    ends = [(hook.communicate(timeout=OUTER_LIMIT)[1], hook.returncode) for hook in hooks]
    assert ends == [("", 0)] * 8
    watch.awaits(lambda: kernel.state() == served)
    kernel.serve("-d eth1 -r")  # it is still up, so --watch serves it again
    watch.awaits(lambda: kernel.state() == served)


@pytest.mark.pure
def test_nothing_is_a_repeat_only_because_the_host_is_young(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock begins at the boot."""
    now = 10.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    fight = add_routes.Fight()
    for number in range(8):
        fight.note([add_routes.Step(4, f"rule add {number}", f"rule del {number}")])
        now += 2
    assert (fight.repeats, fight.pause()) == ([], 0.0)


@pytest.mark.pure
@pytest.mark.parametrize(
    ("pause", "is_a_fight"), [(10, True), (50, False)], ids=["five in a minute", "one in a minute"]
)
def test_a_fight_is_what_is_undone_five_times_within_a_minute(
    monkeypatch: pytest.MonkeyPatch, pause: float, is_a_fight: bool
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    fight = add_routes.Fight()
    for _ in range(9):
        fight.note([add_routes.Step(4, "rule add 1", "rule del 1")])
        now += pause
    assert (fight.pause() > 0) == is_a_fight
    now += 2 * add_routes.FIGHT_SECONDS
    assert fight.pause() == 0


def test_a_link_that_flaps_is_no_fight(kernel: Kernel, start: Start, served: list[str]) -> None:
    """The kernel itself empties a device's table when its link goes down."""
    watch = start()
    for _ in range(7):
        watch.awaits(lambda: kernel.state() == served)
        kernel.sh("ip link set eth1 down")
        watch.awaits(lambda: "from 10.0.1.22 lookup 101" not in "".join(kernel.rules()))
        kernel.sh("ip link set eth1 up")
        kernel.sh("ip -6 address replace 2001:db8:1::22/64 dev eth1 nodad")
    watch.awaits(lambda: kernel.state() == served)
    assert not [line for line in watch.said() if "keeps undoing" in line]


def test_the_default_of_a_watch_ends_by_a_restart_without_it_and_a_removal(
    kernel: Kernel, start: Start, served: list[str]
) -> None:
    """In README's order: a removal beside the watch that asks for it would not last."""
    watch = start("--default", "eth1")
    watch.awaits(lambda: "from all lookup 101" in "".join(kernel.rules()))
    watch.end()
    watch = start()
    kernel.serve("-r -d eth1")
    watch.awaits(lambda: kernel.state() == served)
    watch.awaits_peace()
    assert kernel.state() == served


def test_in_a_fight_it_slows_down_and_says_so_once(
    kernel: Kernel, start: Start, served: list[str]
) -> None:
    watch = start()
    watch.awaits(lambda: kernel.state() == served)
    loop = "while :; do ip rule del pref 20030 from 10.0.1.22 2>/dev/null; sleep 0.05; done"
    enemy = subprocess.Popen(kernel.command("sh", "-c", loop))
    try:
        watch.awaits(lambda: any("keeps undoing" in line for line in watch.said()))
        before, began = watch.cpu_seconds(), time.monotonic()
        time.sleep(15)
        assert watch.cpu_seconds() - before < (time.monotonic() - began) / 4
    finally:
        enemy.kill()
        enemy.wait()
    (line,) = [line for line in watch.said() if "keeps undoing" in line]
    assert "rule add pref 20030 from 10.0.1.22 lookup 101" in line
    watch.awaits(lambda: kernel.state() == served)


def test_what_cannot_be_served_is_said_once_and_does_not_stop_it(
    kernel: Kernel, start: Start
) -> None:
    kernel.add_device("eth2", "10.0.2.9/32")
    kernel.add_device("eth3", "10.0.4.9/24")
    kernel.sh("ip link set eth3 group 5")
    watch = start()
    watch.awaits(lambda: kernel.device_to("198.51.100.1", "10.0.1.22") == "eth1")
    kernel.sh("ip addr add 10.0.1.23/24 dev eth1")
    watch.awaits(lambda: kernel.device_to("198.51.100.1", "10.0.1.23") == "eth1")
    (line,) = [line for line in watch.said() if "expected" in line]
    assert line == (
        "add_routes.py: eth2 has 10.0.2.9/32 and no gateway; expected -g or -n; "
        "eth3 is in interface group 5; expected none or 7700"
    )
    kernel.sh("ip addr add 10.0.2.10/24 dev eth2; ip link set eth3 group 0")
    watch.awaits(lambda: kernel.device_to("198.51.100.1", "10.0.2.9") == "eth2")
    watch.awaits(lambda: kernel.device_to("198.51.100.1", "10.0.4.9") == "eth3")


def test_a_broken_ip_does_not_end_it(kernel: Kernel, start: Start) -> None:
    environment = kernel.fake_ip("echo Out of luck >&2; exit 2", 4)
    watch = start(**environment)
    watch.awaits(lambda: any("Out of luck" in line for line in watch.said()))
    kernel.sh("ip addr add 10.0.1.23/24 dev eth1")
    watch.awaits(lambda: kernel.device_to("198.51.100.1", "10.0.1.23") == "eth1")


@pytest.mark.parametrize("end", ["2>&- >/dev/null", "2>&1 >/dev/null | true"])
def test_nobody_needs_to_read_what_it_says(kernel: Kernel, end: str) -> None:
    starter = "sh -c 'echo $$ >/run/watch.pid; exec \"$@\"' sh"
    line = f"{starter} {SCRIPT} --watch -d 'eth*' {end}"
    shell = subprocess.Popen(kernel.command("sh", "-c", line))
    await_that(lambda: kernel.device_to("198.51.100.1", "10.0.1.22") == "eth1")
    kernel.sh("ip addr add 10.0.1.23/24 dev eth1")
    await_that(lambda: kernel.device_to("198.51.100.1", "10.0.1.23") == "eth1")
    kernel.sh("kill $(cat /run/watch.pid)")
    shell.wait(OUTER_LIMIT)
