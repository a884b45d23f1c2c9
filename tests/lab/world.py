"""A VPC with one host whose routing is judged by packets, and all those who talk with it.

    World      the VPC, and who is in it: a neighbour in eth0's subnet, one in the ENI's, a client
               in a third subnet, and a host on the internet behind the router
    Subject    the host that add_routes.py runs on, by hooks or by --watch
    Call       one connection to be tried, and whom the other end must see

A test makes the subject, lets something happen, and ends with subject.settles(calls), which finds
the outcome (tests/lab/outcomes.py), notes it for the table and compares it with the expected one.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from lab import TOP, await_that
from lab.caller import BULK, BULK_SIZE, COUNT, ECHO
from lab.daemons import Daemon
from lab.outcomes import Case, Outcome
from lab.vpc import IMDS, OUTER_LIMIT, V6_ROUTER, Host, Vpc, run

CALLER = Path(__file__).with_name("caller.py").read_text()
SUBNETS = {
    "10.0.1.0/24": "2001:db8:0:1::/64",
    "10.0.2.0/24": "2001:db8:0:2::/64",
    "10.0.3.0/24": "2001:db8:0:3::/64",
    "10.0.16.0/20": "2001:db8:0:4::/64",
    "198.51.100.0/24": "2001:db8:ffff::/64",  # the internet: the router simply routes there
}
ETH0 = ("10.0.1.10", "2001:db8:0:1::10")
# Where the ENI is: in eth0's subnet or in another.
SAME = ("10.0.1.22", "2001:db8:0:1::22")
OTHER = ("10.0.3.22", "2001:db8:0:3::22")
LARGE = ("10.0.22.7", "2001:db8:0:4::7")  # its router is not x.x.x.1
NEIGHBOUR = ("10.0.1.60", "2001:db8:0:1::60")
CLIENT = ("10.0.2.50", "2001:db8:0:2::50")
ENI_NEIGHBOUR = ("10.0.3.60", "2001:db8:0:3::60")
INTERNET = ("198.51.100.80", "2001:db8:ffff::80")
# A pod behind the neighbour, one behind the ENI's, a container on the host itself.
POD = ("10.244.1.5", "fd00:244:1::5")
ENI_POD = ("10.244.2.5", "fd00:244:2::5")
CONTAINER = ("172.17.0.2", "fd00:17::2")

Place = tuple[str, str]
HOOKS, WATCH = "hooks", "watch"
PLACES = pytest.mark.parametrize("place", [SAME, OTHER], ids=["same subnet", "other subnet"])
FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
OURS = re.compile(r"proto (77|78)\b")  # what add_routes.py makes carries these numbers
PATIENCE = 1.0  # seconds for one connection; who fails is asked again
LIMIT = 60.0  # seconds until what is expected has to be so
BRIEF = 1.5  # seconds of asking for what is not expected to work


class Call(NamedTuple):
    """One connection: the other end has to reply with `expected`."""

    caller: Caller
    address: str
    source: str | None
    expected: str
    port: int = ECHO

    def __str__(self) -> str:
        source = f" from {self.source}" if self.source else ""
        return f"{self.caller.name}{source} to {self.address} port {self.port}"


class Caller:
    """Who answers calls and makes them (tests/lab/caller.py)."""

    def __init__(self, name: str, addresses: Sequence[str], enter: Sequence[str] = ()) -> None:
        self.name = name
        self.addresses = addresses
        self.process = subprocess.Popen(
            [*enter, "/usr/bin/python3", "-IS", "-c", CALLER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"


class Peer(Host, Caller):
    """A host that does so."""

    def __init__(self, name: str, *addresses: str) -> None:
        Host.__init__(self, name)
        Caller.__init__(self, name, addresses, self.command())

    def ok(self, *command: str) -> str:
        """Run a command that has to work."""
        return run(*self.command(*command))

    def nft(self, rules: str) -> None:
        run(*self.command("nft", "-f", "-"), stdin=rules)

    def stop(self) -> None:
        super().stop()
        self.process.communicate()


def of_family(family: int, addresses: Iterable[str]) -> list[str]:
    return [address for address in addresses if (":" in address) == (family == 6)]


def failing(calls: Sequence[Call]) -> list[str]:
    """Make all the calls at once: those that do not work."""
    by_caller: dict[Caller, list[Call]] = {}
    for call in calls:
        by_caller.setdefault(call.caller, []).append(call)
    for caller, theirs in by_caller.items():
        line = [[call.address, call.source, call.port, PATIENCE] for call in theirs]
        assert caller.process.stdin
        caller.process.stdin.write(f"{json.dumps(line)}\n")
        caller.process.stdin.flush()
    wrong = []
    for caller, theirs in by_caller.items():
        assert caller.process.stdout
        replies = json.loads(caller.process.stdout.readline())
        for call, reply in zip(theirs, replies):
            if reply != call.expected:
                wrong.append(f"{call}: {reply or 'no connection'}")
    return wrong


def failing_after(calls: Sequence[Call], seconds: float) -> list[str]:
    """Ask until all calls work, for so many seconds: those that still do not."""
    deadline = time.monotonic() + seconds
    while wrong := failing(calls):
        if time.monotonic() > deadline:
            return wrong
        time.sleep(0.05)
    return []


class World:
    """The VPC, and who is in it."""

    def __init__(self) -> None:
        self.vpc = Vpc()
        self.peers: list[Peer] = []
        self.pods: list[tuple[Peer, Peer]] = []  # each with its gateway
        self.mac_of: dict[str, str] = {}
        for cidr, cidr6 in SUBNETS.items():
            self.vpc.add_subnet(cidr, cidr6)
        self.neighbour = self.add("neighbour", *NEIGHBOUR)
        self.client = self.add("client", *CLIENT)
        self.eni_neighbour = self.add("eni_neighbour", *ENI_NEIGHBOUR)
        self.internet = self.add("internet", *INTERNET)
        self.all = list(self.peers)
        # The router has IMDS's addresses, and answers calls there.
        self.router = Caller("router", IMDS)

    def add(self, name: str, *addresses: str) -> Peer:
        """Somebody who talks with the host: eth0 with these addresses, and the VPC's router."""
        peer = Peer(name, *addresses)
        self.peers.append(peer)
        self.mac_of[name] = mac(len(self.peers))
        self.vpc.plug(peer, "eth0", self.mac_of[name], addresses)
        self.vpc.configure(peer, "eth0", addresses)
        for address in addresses:
            peer.ip(*default_route(self.vpc, "eth0", address).split())
        return peer

    def add_pod(self, gateway: Peer, *addresses: str) -> Peer:
        """Somebody behind a neighbour, who forwards what is for them."""
        pod = put_behind(gateway, "pod", *addresses)
        self.pods.append((gateway, pod))
        # The neighbour's own source check knows the pod's addresses.
        self.vpc.own(self.mac_of[gateway.name], *addresses)
        return pod

    def start_dhcp(self) -> None:
        """DHCP, and router advertisements of the VPC's router."""
        self.vpc.start_dhcp()

    def stop_dhcp(self) -> None:
        self.vpc.stop_dhcp()

    def give(self, peer: Peer, address: str) -> None:
        """One more address for a peer."""
        length = 64 if ":" in address else 24
        peer.ip("addr", "replace", f"{address}/{length}", "dev", "eth0", *nodad(address).split())
        self.vpc.own(self.mac_of[peer.name], address)

    def forget_neighbours(self) -> None:
        """Nobody remembers whose MAC address belongs to an address of the last host.

        `ip` fails if the kernel forgets one meanwhile, as it does when a bridge loses its carrier.
        """
        for words in ("neigh flush all", "neigh flush nud permanent"):
            flush = ["ip", *words.split()]
            for command in (flush, *(peer.command(*flush) for peer in self.all)):
                await_that(partial(succeeds, command))

    def route_in_vpc(self, destination: str, address: str, source: str = "") -> None:
        """An entry of the route table of the source's subnet, or of all: the destination is behind
        the ENI with that address. It is for that source alone: others there use another table."""
        chosen = f"from {source} iif {self.vpc.bridge_of(source)[0]}" if source else "from all"
        bridge, _ = self.vpc.bridge_of(address)
        family = "-6" if ":" in destination else "-4"
        route = f"{destination} via {address} dev {bridge}"
        run("ip", family, *f"rule add pref 100 {chosen} to {destination} lookup 100".split())
        run("ip", family, *f"route replace {route} table 100".split())

    def map_address(self, address: str, device: str) -> None:
        """An address of a delegated prefix: the VPC itself knows whose it is, and asks nobody."""
        bridge, _ = self.vpc.bridge_of(address)
        to = f"{address} lladdr {device_mac(device)} nud permanent"
        run("ip", "neigh", "replace", *to.split(), "dev", bridge)
        for peer in self.all:
            if self.vpc.bridge_of(peer.addresses[0])[0] == bridge:
                peer.ip("neigh", "replace", *to.split(), "dev", "eth0")

    def tidy(self) -> None:
        """Take away what the last test has added to the VPC."""
        for family in ("-4", "-6"):
            while "100:" in run("ip", family, "rule"):
                run("ip", family, "route", "flush", "table", "100")
                run("ip", family, "rule", "del", "pref", "100")
        self.stop_dhcp()
        for gateway, pod in self.pods:
            pod.stop()
            gateway.ip("link", "del", f"br{pod.init.pid}")
        self.pods.clear()
        self.forget_neighbours()

    def close(self) -> None:
        with contextlib.ExitStack() as last_first:  # all of it, even if some of it fails
            last_first.callback(self.vpc.close)
            last_first.callback(self.router.process.communicate)
            last_first.callback(self.router.process.kill)
            for peer in [*self.peers, *(pod for _, pod in self.pods)]:
                last_first.callback(peer.stop)


def put_behind(gateway: Host, name: str, *addresses: str, length: int = 0) -> Peer:
    """A network namespace behind a bridge of the gateway's, which is its default gateway."""
    peer = Peer(name, *addresses)
    bridge = f"br{peer.init.pid}"
    lines = [
        f"link add {bridge} type bridge",
        f"link set {bridge} up",
        f"link add c{peer.init.pid} type veth peer name eth0 netns {peer.init.pid}",
        f"link set c{peer.init.pid} master {bridge} up",
    ]
    theirs = ["link set eth0 up"]
    for address in addresses:
        length = length or (64 if ":" in address else 24)
        network = ipaddress.ip_interface(f"{address}/{length}").network
        lines.append(f"addr add {network[1]}/{length} dev {bridge}{nodad(address)}")
        theirs.append(f"addr add {address}/{length} dev eth0{nodad(address)}")
        theirs.append(f"route add default via {network[1]} dev eth0")
    run(*gateway.command("ip", "-batch", "-"), stdin="\n".join(lines))
    run(*peer.command("ip", "-batch", "-"), stdin="\n".join(theirs))
    forward(gateway)
    return peer


def forward(host: Host) -> None:
    switches = "/proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding"
    run(*host.command("sh", "-c", f"for switch in {switches}; do echo 1 >$switch; done"))


def nodad(address: str) -> str:
    """Nobody else has the address, so that it can be used at once."""
    return " nodad" if ":" in address else ""


def mac(number: int) -> str:
    return f"06:00:00:00:00:{number:02x}"


def usual_metric(device: str, address: str) -> int:
    """The metric of main's default route by a device: eth0's is the best one."""
    number = int(re.sub("[^0-9]", "", device))
    if number == 0:
        return 0
    return (2000 if ":" in address else 100) * number


def succeeds(command: Sequence[str]) -> bool:
    return subprocess.run(command, timeout=OUTER_LIMIT).returncode == 0


def device_mac(device: str) -> str:
    """The MAC address of a device of the subject: the same in each test, by its number."""
    return f"06:00:00:00:01:{int(re.sub('[^0-9]', '', device)):02x}"


def default_route(vpc: Vpc, device: str, address: str, metric: int = 0) -> str:
    suffix = f" metric {metric}" if metric else ""
    if ":" in address:
        # A router advertisement may have brought eth0's before.
        return f"-6 route replace default via {V6_ROUTER} dev {device}{suffix}"
    return f"route add default via {vpc.router_of(address)} dev {device}{suffix}"


def script_text() -> str:
    """add_routes.py, or another script that is to be judged by the same cases."""
    return Path(os.environ.get("ADD_ROUTES", TOP / "add_routes.py")).read_text()


class Subject(Peer):
    """The host that add_routes.py runs on.

    With hooks, add_routes.py runs for each device that comes up or goes down, as by ifupdown.
    With --watch, it is started once, before the devices come up.
    """

    def __init__(
        self, world: World, mode: str, case: Case, *options: str, watch: bool = True
    ) -> None:
        super().__init__("host")
        self.world = world
        self.mode = mode
        self.case = case
        self.options: dict[str, tuple[str, ...]] = {}  # of the hook, by device
        self.watch: subprocess.Popen[str] | None = None
        self.log: list[str] = []  # what hooks have said
        self.extra: list[Peer] = []  # containers and the like, on this host
        self.daemons: list[Daemon] = []
        self.write("/usr/local/sbin/add_routes.py", script_text(), 0o755)
        if mode == WATCH and watch:
            self.start_watch(*options)

    @property
    def surveyed(self) -> bool:
        """Whether another script is judged: then nothing is expected."""
        return "ADD_ROUTES_COLUMN" in os.environ

    # --- its devices ---

    def plug(self, device: str, *addresses: str) -> None:
        """An ENI appears as a device, which is still down."""
        self.world.vpc.plug(self, device, device_mac(device), addresses)

    def configure(self, device: str, *addresses: str, metric: int | None = None) -> None:
        """What ifupdown does, as README's stanzas say: eth0's default routes are the best ones."""
        self.world.vpc.configure(self, device, addresses)
        self.add_default_routes(device, *addresses, metric=metric)

    def add_default_routes(self, device: str, *addresses: str, metric: int | None = None) -> None:
        first = [*of_family(4, addresses)[:1], *of_family(6, addresses)[:1]]
        for address in first:
            number = usual_metric(device, address) if metric is None else metric
            self.ip(*default_route(self.world.vpc, device, address, number).split())

    def up(self, device: str, *addresses: str, options: Sequence[str] = ()) -> None:
        """A device appears, is configured, and its hook runs."""
        self.plug(device, *addresses)
        self.configure(device, *addresses)
        self.hook(device, *options)

    def down(self, device: str) -> None:
        """As `ifdown` does: its hook, and the addresses go."""
        self.hook(device, "-r")
        self.ip("addr", "flush", "dev", device)
        self.ip("link", "set", device, "down")

    def bounce(self, device: str, *addresses: str) -> None:
        """The link is down for a moment. The network set-up brings back what the kernel drops."""
        self.run_ip(f"link set {device} down")
        self.run_ip(f"link set {device} up")
        for address in of_family(6, addresses):
            self.add_address(device, f"{address}/64")
        self.add_default_routes(device, *addresses)

    @contextlib.contextmanager
    def storm(self, gateway: str) -> Iterator[None]:
        """A thousand changes of routes a second."""
        lines = []
        for verb in ("add", "del"):
            for number in range(100):
                lines.append(f"route {verb} 10.99.0.{number} via {gateway} dev eth0")
        self.write("/run/storm", "\n".join(lines))
        process = self.popen("sh", "-c", "while ip -force -batch /run/storm; do sleep 0.2; done")
        yield
        process.kill()
        process.communicate()

    def pull(self, device: str) -> None:
        """The ENI is detached."""
        self.world.vpc.unplug(device_mac(device))

    def add_address(self, device: str, address: str, *words: str) -> None:
        self.run_ip(f"addr add {address} dev {device} {' '.join(words)}{nodad(address)}")

    def run_ip(self, words: str) -> None:
        self.ip(*words.split())

    def run_lines(self, lines: str) -> None:
        """Commands of README's, as an administrator pastes them."""
        self.ok("sh", "-ec", lines)

    def set_rp_filter(self, strictness: int) -> None:
        """For all devices, also those to come."""
        switches = "/proc/sys/net/ipv4/conf/*/rp_filter"
        self.ok("sh", "-c", f"for switch in {switches}; do echo {strictness} >$switch; done")

    def add_container(self, *addresses: str, length: int = 0) -> Peer:
        """A container behind a bridge of this host."""
        container = put_behind(self, "container", *addresses, length=length)
        self.extra.append(container)
        return container

    def daemon(self, daemon: Daemon) -> Daemon:
        """It ends with this host."""
        self.daemons.append(daemon)
        return daemon

    def awaits(self, condition: Callable[[], bool]) -> None:
        await_that(condition, LIMIT)

    def awaits_output(self, words: str, command: str) -> None:
        self.awaits(lambda: words in self.ok(*command.split()))

    # --- add_routes.py ---

    def hook(self, device: str, *options: str) -> None:
        """What ifupdown calls, `|| true`; with --watch nothing does."""
        if self.mode == HOOKS:
            self.run_hook(device, *options)

    def run_hook(self, device: str, *options: str) -> int:
        if "-r" in options:
            self.options.pop(device, None)
        else:
            self.options[device] = options
        done = self.run("add_routes.py", *options, environment={"IFACE": device})
        words = f"{done.stdout}{done.stderr}".strip()
        self.log.append(f"add_routes.py {' '.join(options)} ({device}): {done.returncode} {words}")
        return done.returncode

    def run_again(self) -> None:
        """One more run, for the ENI. The first edition gets one for each device."""
        devices = list(self.options) if self.surveyed else list(self.options)[-1:]
        for device in devices:
            if self.run("test", "-e", f"/sys/class/net/{device}").returncode == 0:
                self.run_hook(device, *self.options[device])

    def run_again_if_hooks(self) -> None:
        """Something else calls add_routes.py, which does not help here, but must not harm."""
        if self.mode == HOOKS:
            self.run_again()

    def hooks_at_once(self, *devices: str) -> None:
        if self.mode == HOOKS:
            runs = [self.popen("add_routes.py", "-d", device) for device in devices]
            for device, run_of_it in zip(devices, runs):
                self.options[device] = ()
                self.log.append(f"{device}: {run_of_it.communicate(timeout=OUTER_LIMIT)}")

    def delete_all_of_ours(self) -> None:
        """Somebody deletes all rules but the kernel's own three, and empties the tables."""
        for family in (4, 6):
            rules = self.ip(f"-{family}", "-N", "rule").splitlines()
            for priority, _, text in (line.partition(":") for line in rules):
                if OURS.search(text):
                    self.run("ip", f"-{family}", "rule", "del", "pref", priority)
            for protocol in ("77", "78"):
                words = f"ip -{family} route flush proto {protocol} table all"
                self.run(*words.split())

    def start_watch(self, *options: str) -> None:
        """In the lab a NIC is one end of a veth pair, so --watch is told which devices are NICs."""
        patterns = [] if "-d" in options else ["-d", "eth*"]
        with (self.root / "watch.log").open("a") as log:
            self.watch = subprocess.Popen(
                self.command("add_routes.py", "--watch", *patterns, *options),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                env=self.environment,
            )

    def is_served(self) -> bool:
        """Whether --watch, started now, would change nothing."""
        done = self.run("add_routes.py", "--watch", "-d", "eth*", "--dry-run")
        return done.stdout == "nothing to change\n"

    def end_watch(self, number: int = signal.SIGTERM) -> int:
        assert self.watch
        self.watch.send_signal(number)
        return self.watch.wait(OUTER_LIMIT)

    # --- judging ---

    def talks(self, *addresses: str, peers: Sequence[Caller] = ()) -> list[Call]:
        """Each address answers all peers and calls them."""
        calls = []
        for address in addresses:
            for peer in peers or self.world.all:
                family = 6 if ":" in address else 4
                for theirs in of_family(family, peer.addresses):
                    calls.append(Call(peer, address, theirs, theirs))
                    calls.append(Call(self, theirs, address, address))
        return calls

    def judge(self, calls: Sequence[Call], snippet: Callable[[], None] | None = None) -> Outcome:
        outcomes = [Outcome.PASSED]
        if self.mode == HOOKS:
            outcomes.append(Outcome.ANOTHER_RUN)
        if snippet:
            outcomes.append(Outcome.SNIPPET)
        for outcome in outcomes:
            if outcome == Outcome.ANOTHER_RUN:
                self.run_again()
            if outcome == Outcome.SNIPPET and snippet:
                snippet()
            if not failing_after(calls, self.seconds_for(outcome)):
                return outcome
        return Outcome.FAILED

    def seconds_for(self, outcome: Outcome) -> float:
        """A busy machine gets all the time it needs, but only for what is expected to work."""
        if self.surveyed:
            return BRIEF
        return LIMIT if outcome == self.case.expected else BRIEF

    def settles(self, calls: Sequence[Call], snippet: Callable[[], None] | None = None) -> None:
        """Find out what it takes until all calls work."""
        outcome = self.judge(calls, snippet)
        self.case.record(outcome)
        if not self.surveyed:
            assert outcome <= self.case.expected, self.story(calls)

    def works(self, calls: Sequence[Call]) -> None:
        """What must be so before the case begins, whatever the case is about."""
        wrong = failing_after(calls, BRIEF if self.surveyed else LIMIT)
        if wrong:
            self.case.record(Outcome.FAILED)
        assert wrong == [], self.story(calls)

    def must(self, condition: bool, words: str) -> None:
        """What a case demands beside packets."""
        if not condition:
            self.case.record(Outcome.FAILED)
        assert condition, f"{words}\n{self.story([])}"

    def story(self, calls: Sequence[Call]) -> str:
        """What a reader needs in order to understand a failure."""
        parts = ["\n".join(["these calls fail:", *failing(calls)]), *self.log]
        if self.watch:
            parts.append((self.root / "watch.log").read_text())
        for words in ("-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all"):
            lines = self.ip(*words.split()).splitlines()
            shown = [
                line for line in lines if not re.match("local|broadcast|multicast|anycast", line)
            ]
            parts.append("\n".join([f"$ ip {words}", *shown]))
        return "\n".join(parts)

    def foreign(self) -> str:
        """All rules and routes that are not add_routes.py's, but for the seconds they have left."""
        asked = ["-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all"]
        lines = []
        for words in asked:
            for line in self.ip("-N", *words.split()).splitlines():
                if not OURS.search(line):
                    lines.append(re.sub(r" expires \S+", "", line))
        return "\n".join(lines)

    def own(self) -> list[str]:
        """All rules and routes that are add_routes.py's."""
        asked = ["-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all"]
        lines = [line for words in asked for line in self.ip("-N", *words.split()).splitlines()]
        return sorted(line for line in lines if OURS.search(line))

    def stop(self) -> None:
        for peer in self.extra:
            peer.stop()
        for daemon in self.daemons:
            daemon.end(signal.SIGKILL)
        if self.watch and self.watch.poll() is None:
            self.watch.kill()
        super().stop()
        if self.watch:
            self.watch.wait()
        for mac_address in [m for m in self.world.vpc.ports if m.startswith("06:00:00:00:01:")]:
            self.world.vpc.unplug(mac_address)


MakeHost = Callable[..., Subject]
RecordProperty = Callable[[str, object], None]


@contextlib.contextmanager
def pinging(pinger: Host, address: str) -> Iterator[dict[str, int]]:
    """Five packets a second, until the block ends: how many were sent and lost.

    The block begins with the first answer.
    """
    ping = pinger.popen("ping", "-n", "-i", "0.2", "-W", "1", address)
    count: dict[str, int] = {}
    try:
        assert ping.stdout
        # Before that, ping may not even be ready for the signal that ends it.
        assert any("bytes from" in line for line in ping.stdout)
        yield count
    finally:
        ping.send_signal(signal.SIGINT)
        out, err = ping.communicate(timeout=OUTER_LIMIT)
    found = re.search(r"(\d+) packets transmitted, (\d+) received", out)
    assert found, out + err
    count.update(sent=int(found[1]), lost=int(found[1]) - int(found[2]))


def bulk(peer: Peer, address: str, source: str | None = None) -> list[Call]:
    """A megabit each way: full segments, more of them than one window."""
    return [
        Call(peer, address, source, str(BULK_SIZE), port=BULK),
        Call(peer, address, source, str(BULK_SIZE), port=COUNT),
    ]
