#!/usr/bin/python3
"""Give each network interface (ENI) of this host a routing table of its own: the VPC drops a packet
that leaves by another ENI than the one that owns its source address.  Makes, in IPv4 and IPv6:

    interface group 7700     DEVICE is in it, as is each device that this script serves
    rule 20000 from all      main decides, but not by a default route or out by one of the group:
                             containers, VPNs and other devices go on working (once for all)
    rule 20001 from ADDRESS  the device's table (a rule for each of its addresses)
    table                    SUBNET dev DEVICE src ADDRESS
                             main's other routes that leave by DEVICE
                             default via GATEWAY dev DEVICE
  and with --default, for what has no source address yet and for what is forwarded:
    rule 32700               main, for the VPC's link-local IMDS, DNS and NTP
    rule 32701 from all      main, but not its default route
    rule 32702 from all      the device's table; when the device goes, main's default takes over

ifupdown calls it in `up` for each device, and with -r in `down`, where the device may be gone.  An
alias (eth1:0) means its device; lo and --all are none of its business.  One call states all that is
wanted for the device: give the same options in its inet and inet6 stanzas.  The last call with
--default wins.  Everything is read from the kernel; only what differs is changed; what is made
carries protocol 77 (`ip -N rule`), and nothing else is ever removed.  The table is the one that has
the device's name in rt_tables; else for ethN 100+N, for others the first free one from 1000 up.

Files: /etc/iproute2/rt_tables.d/DEVICE.conf (the table's name; -r leaves it, so that the number
stays), /run/add_routes.lock (one run waits for another).
Exit codes: 0 done; 1 failed, and what this run had done is taken back; 2 usage.
"""

from __future__ import annotations

import argparse
import fcntl
import glob
import ipaddress
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from typing import IO, NamedTuple, NoReturn

PROTOCOL = 77  # in no rt_protos of Debian 11 to 13, nor the kernel's, nor FRR's (186 to 198)
GROUP = 7700  # far from the small numbers that people give by hand
# Behind strongSwan (220) and Tailscale (5210 to 5270), for a VPN goes first; before main's 32766.
MAIN_FIRST, FROM = 20000, 20001
SERVICES, SPECIFIC, DEFAULT = 32700, 32701, 32702  # behind everybody's but main's own
PRIORITIES = (MAIN_FIRST, FROM, SERVICES, SPECIFIC, DEFAULT)
NO_DEFAULT = " suppress_prefixlength 0"
# Either alone leaks: a default route may leave by a device that nobody serves here; the subnet of
# two ENIs is in main twice, and the first of the two would win for both.
SUPPRESS = {MAIN_FIRST: f"{NO_DEFAULT} suppress_ifgroup {GROUP}", SPECIFIC: NO_DEFAULT}
MAIN, KERNEL_TABLES = 254, (0, 253, 254, 255)  # unspec, default, main, local
ETH_TABLES = range(100, 253)  # eth0 to eth152: eth153 would have the kernel's 253
FREE_TABLES = 1000  # and up
VPC_SERVICES = {4: "169.254.0.0/16", 6: "fd00:ec2::/32"}
VPC_ROUTER = "fe80:ec2::1"  # a VPC's IPv6 router has this address in every subnet
METRIC = {4: 0, 6: 1024}  # what the kernel gives a route that states none
# The kernel allows more in a name, but `ip -batch` reads quotes, comments and white space.
NAME, NAME_LENGTH = re.compile(r"(?!(all|default)$)[A-Za-z0-9_][A-Za-z0-9_.-]*"), 15  # IFNAMSIZ - 1
NAME_DIRECTORY = "/etc/iproute2/rt_tables.d"
RT_TABLES = ("/usr/share/iproute2/rt_tables", "/etc/iproute2/rt_tables", f"{NAME_DIRECTORY}/*.conf")
LOCK, LOCK_SECONDS = "/run/add_routes.lock", 30  # a run takes a tenth of a second
IP_SECONDS = 10
# What `ip` says when another program, or the loss of the device, was faster.
ALREADY = re.compile("File exists|No such (file|process)|(route del|group 0).*Cannot find device")


class Failure(Exception):
    """One line for the user; exit code 1."""


class Rule(NamedTuple):  # not a dataclass: importing those costs 9 ms, a quarter of a run
    family: int
    priority: int
    source: str
    table: int

    def words(self, verb: str) -> str:
        to = f" to {VPC_SERVICES[self.family]}" if self.priority == SERVICES else ""
        table = "main" if self.table == MAIN else self.table
        words = f"rule {verb} pref {self.priority} from {self.source}{to} lookup {table}"
        return f"{words}{SUPPRESS.get(self.priority, '')} protocol {PROTOCOL}"


class Route(NamedTuple):
    family: int
    table: int
    destination: str
    metric: int  # no two routes agree in all up to here
    device: str
    gateway: str = ""
    source: str = ""
    onlink: bool = False
    protocol: int = PROTOCOL

    def words(self, verb: str) -> str:
        words = f"route {verb} {self.destination}{f' via {self.gateway}' if self.gateway else ''}"
        words += f" dev {self.device}" + (f" src {self.source}" if self.source else "")
        words += (f" metric {self.metric}" if self.metric else "") + " onlink" * self.onlink
        return f"{words} table {self.table} protocol {self.protocol}"


class Host(NamedTuple):
    """What the kernel and the rt_tables files say."""

    groups: dict[str, int]  # every device's interface group; its addresses fit to be a source
    addresses: dict[str, list[ipaddress.IPv4Interface | ipaddress.IPv6Interface]]
    rules: list[Rule]  # ours
    routes: list[Route]  # everybody's
    tables: set[int]  # of everybody's rules and routes
    names: dict[str, int]  # of tables
    families: tuple[int, ...] = (4, 6)


class Step(NamedTuple):
    family: int
    do: str
    undo: str


def owner(host: Host, device: str, table: int) -> str:
    """The device that a table belongs to; empty when nothing says."""
    for route in host.routes:
        if route.table == table and route.protocol == PROTOCOL:
            return route.device
    for name, number in host.names.items():
        if number == table and (name == device or name in host.groups):
            return name
    return f"eth{table - ETH_TABLES.start}" if table in ETH_TABLES else ""


def choose_table(host: Host, device: str, wanted: str = "") -> int:
    known = host.tables | set(host.names.values())
    others = {table for table in known if owner(host, device, table) in {*host.groups} - {device}}
    if wanted in host.names or wanted.isdecimal():
        table = host.names[wanted] if wanted in host.names else int(wanted)
        if table in others or table in KERNEL_TABLES or table >= 2**32:
            raise Failure(f"table {wanted} is not to be had; expected one for {device} alone")
        return table
    found = [host.names.get(device, 0)]
    found += [r.table for r in host.routes if (r.protocol, r.device) == (PROTOCOL, device)]
    if re.fullmatch(r"eth(0|[1-9][0-9]*)", device):
        table = ETH_TABLES.start + int(device[3:])
        found += [table] if table in ETH_TABLES and table not in host.names.values() else []
    found = [table for table in found if table not in others and table not in KERNEL_TABLES]
    return found[0] if found else next(n for n in itertools.count(FREE_TABLES) if n not in known)


def plan_routes(host: Host, options: argparse.Namespace, family: int, table: int) -> list[Route]:
    """All that the device's table is to hold, what a gateway is reached by first."""
    device, gateway, given = options.device, options.gateway, options.network
    own = [a for a in host.addresses.get(device, []) if a.version == family]
    if not own:
        return []
    main = [r for r in host.routes if (r.family, r.table, r.device) == (family, MAIN, device)]
    known = [r for r in main if r.destination != "default"]
    on_link = {ipaddress.ip_network(r.destination): r.source for r in known if not r.gateway}
    on_link.update({a.network: str(a.ip) for a in own[::-1] if a.network.num_addresses > 1})
    home = next((net for net in on_link if own[0].ip in net), None)
    if given and given.version == family:
        if own[0].ip not in given:
            raise Failure(f"{device} has {own[0].ip}; expected an address in {given}")
        others = {net: source for net, source in on_link.items() if not given.overlaps(net)}
        home, on_link = given, {given: str(own[0].ip), **others}
    if gateway and gateway.version == family:
        if on_link and not gateway.is_link_local and not any(gateway in net for net in on_link):
            inside = " or ".join(map(str, on_link))
            raise Failure(f"gateway {gateway} of {device} is outside; expected one in {inside}")
    elif family == 6:
        learnt = sorted((r.metric, r.gateway) for r in main if r not in known and r.gateway)
        gateway = ipaddress.ip_address(learnt[0][1] if learnt else VPC_ROUTER)
    elif not home:
        raise Failure(f"{device} has {own[0]} and no subnet; expected -g or -n")
    else:
        gateway = home[1]
    if gateway in [a.ip for a in own]:  # the kernel takes it, in a table of ours
        raise Failure(f"gateway {gateway} is {device}'s own address; expected another by -g")
    # The kernel refuses a tentative IPv6 address as a route's source, and `up` mostly finds it so.
    sources = {str(net): source if family == 4 else "" for net, source in on_link.items()}
    metric = METRIC[family]
    return [
        *(Route(family, table, net, metric, device, "", src) for net, src in sources.items()),
        *(r._replace(table=table, source="", protocol=PROTOCOL) for r in known if r.gateway),
        Route(family, table, "default", metric, device, str(gateway), "", not on_link),
    ]


def plan_rules(host: Host, options: argparse.Namespace, table: int) -> list[Rule]:
    """All rules of ours that are to be, those of other devices included."""
    own = host.addresses.get(options.device, [])
    # A table that nobody owns was that of a device which is gone.
    mine = (options.device, "") if options.remove else (options.device,)
    gone = {r.table for r in host.rules if owner(host, options.device, r.table) in mine}
    rules = [r for r in host.rules if r.priority in (FROM, DEFAULT) and r.table not in gone]
    rules = [r for r in rules if r.source not in [str(a.ip) for a in own]]
    if not options.remove:
        rules += [Rule(a.version, FROM, str(a.ip), table) for a in own]
    for family in host.families:
        if options.default and not options.remove and family in [a.version for a in own]:
            rules = [r for r in rules if r[:2] != (family, DEFAULT)]
            rules.append(Rule(family, DEFAULT, "all", table))
        priorities = [r.priority for r in rules if r.family == family]
        if FROM in priorities:
            rules.append(Rule(family, MAIN_FIRST, "all", MAIN))
        if DEFAULT in priorities:
            rules.append(Rule(family, SERVICES, "all", MAIN))
            rules.append(Rule(family, SPECIFIC, "all", MAIN))
    return sorted(set(rules))


def plan(host: Host, options: argparse.Namespace, table: int = 0) -> list[Step]:
    """The steps from what is to what is wanted.  Routes come before the rules that lead to them and
    go after them: a packet in between meets the old way or the new one, never half a table."""
    device, group = options.device, host.groups.get(options.device, 0)
    join, leave = (f"link set dev {device} group {number}" for number in (GROUP, 0))
    steps = []
    if not options.remove:
        if device not in host.groups:
            raise Failure(f"no device named {device}; expected one that `ip link` lists")
        if group not in (0, GROUP):
            raise Failure(f"{device} is in interface group {group}; expected none or {GROUP}")
        if not host.addresses.get(device):
            raise Failure(f"{device} has no address; expected a global one, IPv4 or IPv6")
        steps += [] if group == GROUP else [Step(4, join, leave)]
    rules = plan_rules(host, options, table)
    theirs = {r[:4] for r in host.routes if r.protocol != PROTOCOL}
    ours = [r for r in host.routes if (r.device, r.protocol) == (device, PROTOCOL)]
    for family in host.families:
        routes = [] if options.remove else plan_routes(host, options, family, table)
        new = {r[:4]: r for r in routes if r[:4] not in theirs}
        old = {r[:4]: r for r in ours if r.family == family}
        for key, r in new.items():
            if key not in old:
                steps.append(Step(family, r.words("add"), r.words("del")))
            elif r != old[key]:
                steps.append(Step(family, r.words("replace"), old[key].words("replace")))
        missing = [r for r in rules if r.family == family and r not in host.rules]
        stale = sorted(r for r in host.rules if r.family == family and r not in rules)
        gone: list[Rule | Route] = [*stale[::-1], *(r for k, r in old.items() if k not in new)]
        steps += [Step(family, r.words("add"), r.words("del")) for r in missing]
        steps += [Step(family, r.words("del"), r.words("add")) for r in gone]
    return steps + [Step(host.families[-1], leave, join)] * (options.remove and group == GROUP)


def ip(flags: str, lines: list[str], verbose: bool) -> tuple[str, dict[int, str]]:
    """Run all lines by one `ip`: its output, and by a failed line's index what it said of it; the
    index is beyond the last line where it does not say which line it was."""
    if verbose:
        print("\n".join(f"ip {flags} {line}" for line in lines), file=sys.stderr)
    command, text = ["ip", *flags.split(), "-batch", "-"], "\n".join(lines) + "\n"
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=IP_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "", {len(lines): f"{' '.join(command)}: no end after {IP_SECONDS} s"}
    said = re.findall(r"(.*?)Command failed -:(\d+)", done.stderr, re.DOTALL)
    if done.returncode and not said:
        words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        return "", {len(lines): f"{' '.join(command)}: {words}"}
    failed = {int(number) - 1: " ".join(words.split()) for words, number in said}
    return done.stdout, {n: f"ip {flags} {lines[n]}: {words}" for n, words in failed.items()}


def apply(steps: list[Step], verbose: bool) -> None:
    """Do all the steps or none; raises Failure."""
    done: list[Step] = []
    while steps:
        family = steps[0].family
        batch = [step for step in steps if step.family == family]
        _, failed = ip(f"-{family}", [step.do for step in batch], verbose)
        line, error = next(iter(failed.items()), (len(batch), ""))  # `ip` stops at the first
        done += batch[:line]
        steps = batch[line + 1 :] + [step for step in steps if step.family != family]
        if error and not ALREADY.search(error):
            for version in (6, 4):
                undo = [step.undo for step in done[::-1] if step.family == version]
                left = ip(f"-{version} -force", undo, verbose)[1] if undo else {}
                error += "".join(f"; {w}" for w in left.values() if not ALREADY.search(w))
            raise Failure(error)


def plain(address: str) -> str:
    """The address in the one way to write it; raises ValueError for any other text."""
    return str(ipaddress.ip_address(address))


def read_host(verbose: bool) -> Host:
    """Ask `ip` once for each family; raises Failure, OSError."""
    # Without this file the kernel has no IPv6 (ipv6.disable=1), and `ip -6 rule` fails.
    families = (4, 6) if os.path.exists("/proc/net/if_inet6") else (4,)
    host = Host({}, {}, [], [], set(), read_names(), families)
    for family in families:
        lines = ["link show", "address show", "rule show", "route show table all"]
        output, failed = ip(f"-{family} -N -json", lines, verbose)
        for error in failed.values():
            raise Failure(error)
        links, devices, rules, routes = map(json.loads, output.splitlines())
        for link in links:
            group = link["group"].replace("default", "0")
            host.groups[link["ifname"]] = int(group) if group.isdecimal() else -1
        for device, found in ((d, a) for d in devices for a in d.get("addr_info", [])):
            unfit = found.keys() & {"deprecated", "temporary", "dadfailed"}
            if found["scope"] in ("0", "global") and not unfit:
                address = ipaddress.ip_interface(f"{found['local']}/{found['prefixlen']}")
                host.addresses.setdefault(device["ifname"], []).append(address)
        for found in rules:
            table, priority = int(found.get("table", 0)), found["priority"]
            host.tables.add(table)
            if found.get("protocol") == str(PROTOCOL) and priority in PRIORITIES:
                source = found["src"] if found["src"] == "all" else plain(found["src"])
                host.rules.append(Rule(family, priority, source, table))
        for found in routes:
            table, to = int(found.get("table", MAIN)), found["dst"]
            via = found.get("via") if family == 4 else None  # a next hop of IPv6, for IPv4
            host.tables.add(table)
            # One next hop and nothing special: not multipath, not encapsulated, not unreachable.
            if "dev" in found and "encap" not in found and found.get("type", "1") == "1":
                to = to if to == "default" else str(ipaddress.ip_network(to))
                gateway = plain(found["gateway"]) if "gateway" in found else ""
                gateway = f"inet6 {plain(via['host'])}" if via else gateway
                onlink, protocol = "onlink" in found["flags"], int(found.get("protocol", 0))
                source = plain(found["prefsrc"]) if "prefsrc" in found else ""
                common = (int(found.get("metric", 0)), found["dev"], gateway, source)
                host.routes.append(Route(family, table, to, *common, onlink, protocol))
    return host


def read_names() -> dict[str, int]:
    names = {}
    for path in (path for pattern in RT_TABLES for path in sorted(glob.glob(pattern))):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if found := re.match(r"\s*(0x[0-9a-fA-F]+|[0-9]+)\s+([^\s#]+)", line):
                    names[found[2]] = int(found[1], 16 if "x" in found[1] else 10)
    return names


def write_name(names: dict[str, int], options: argparse.Namespace, table: int) -> None:
    """Name the table, unless it has a name or the name has a table: it also does without."""
    name = options.device if options.table.isdecimal() else options.table or options.device
    path = f"{NAME_DIRECTORY}/{options.device}.conf"
    if options.remove or name in names or table in names.values():
        return
    try:
        os.makedirs(NAME_DIRECTORY, exist_ok=True)
        with open(f"{path}.new", "w", encoding="ascii") as file:
            file.write(f"{table} {name}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.new", path)
    except OSError as error:
        print(f"add_routes.py: {path}: {error.strerror}; {table} has no name", file=sys.stderr)


def lock() -> IO[str]:
    """The lock, held until the file is closed; raises Failure, OSError."""

    def expire(*_: object) -> NoReturn:
        raise Failure(f"{LOCK} is held by another run for {LOCK_SECONDS} s; see `fuser {LOCK}`")

    file = open(LOCK, "w", encoding="ascii")  # noqa: SIM115
    signal.signal(signal.SIGALRM, expire)
    signal.alarm(LOCK_SECONDS)
    fcntl.flock(file, fcntl.LOCK_EX)
    signal.alarm(0)
    return file


def network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    found = ipaddress.ip_network(text)
    if "/" not in text or not 0 < found.prefixlen < found.max_prefixlen - 1:
        raise ValueError
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    usage, show = argparse.SUPPRESS, argparse.RawDescriptionHelpFormatter  # an error is one line
    parser = argparse.ArgumentParser("add_routes.py", usage, __doc__, formatter_class=show)
    add = parser.add_argument
    add("-d", "--device", default=os.environ.get("IFACE"), help="default: ifupdown's $IFACE")
    add(
        "-g",
        "--gateway",
        type=ipaddress.ip_address,
        help="default: the subnet's base + 1; IPv6:"
        f" the router of main's default route by the device, else {VPC_ROUTER}",
    )
    add("-n", "--network", type=network, help="default: that of the device's first address")
    add("-t", "--table", default="", help="name or number")
    add("-r", "--remove", action="store_true", help="remove what was made for the device")
    add("--default", action="store_true", help="also for what has no source address yet")
    add("--dry-run", action="store_true", help="print the commands of `ip`, and change nothing")
    add("-v", "--verbose", action="store_true", help="print each command of `ip` on stderr")
    options = parser.parse_args(argv)
    if not options.device:
        parser.error("no device; expected -d DEVICE, or $IFACE")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.device in ("lo", "--all"):
        return 0
    options.device = options.device.partition(":")[0]
    try:
        for name, limit in ((options.device, NAME_LENGTH), (options.table or "none", 64)):
            if not NAME.fullmatch(name) or len(name) > limit:
                raise Failure(f"{name!r} is no usable name; expected at most {limit} plain letters")
        with open(os.devnull) if options.dry_run else lock():
            try:
                host = read_host(options.verbose)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise Failure(f"what `ip -json` says is not understood: {error!r}") from None
            table = 0 if options.remove else choose_table(host, options.device, options.table)
            steps = plan(host, options, table)
            if options.dry_run:
                print("".join(f"ip -{step.family} {step.do}\n" for step in steps), end="")
            else:
                apply(steps, options.verbose)
                write_name(host.names, options, table)
    except (Failure, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"add_routes.py: {text}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
