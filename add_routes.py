#!/usr/bin/python3 -IS
"""Give each network interface (ENI) of this host a routing table of its own.

The VPC drops a packet that leaves by another ENI than the one that owns its source address.
So every run looks at the whole host and makes these, in IPv4 and IPv6, where they are not yet:

    interface group 7700     every device that this program serves
    rule 20000 from all      use main for what leaves by no device of that group and by no default
                             route, so that containers and VPNs go on working; a route for half of
                             the internet, as some VPNs make two of, counts as a default route
    rule 20030 from ADDRESS  use the table of the device that owns the address: its subnets, main's
                             other routes by it, and a default route
  and where somebody has moved the kernel's rule for the host's own addresses behind these:
    rule 19990 from all      use local
  and for the addresses of main's own device, which is that of main's best default route:
    rule 20010 from ADDRESS  use its table, but not the default route: the other devices' subnets
                             are reached by its gateway
    rule 20020 from ADDRESS  use main, but not the default route: routes that enter main later work
  and with --default, for packets that have no source address yet, and for forwarded ones:
    rule 32698 from ADDRESS  use main for main's own device, if its table has been emptied
    rule 32699 iif DEVICE    use the device's table: answers to forwarded packets go back by it
    rule 32700 to SERVICES   use main for the VPC's link-local IMDS, DNS and NTP
    rule 32701 from all      use main, but not the default route
    rule 32702 from all      use the device's table; it is empty when the device is gone

ifupdown calls this program for each device: in `up`, and in `down` with -r. Or --watch serves all
hardware devices, and looks again at each change. It serves the devices named so far and those of
main's default routes, too. While main's own device is the only one, main is right, and nothing is
made. The rules and routes of this program carry protocol 77 (78: as -g or -n says); it changes no
others.

Examples:
  add_routes.py -d ens6              serve one device, and look after the others
  add_routes.py -d ens6 --default    for a NAT instance: what is forwarded leaves by ens6
  add_routes.py -d ens6 --dry-run    print the `ip` commands that this would take
  add_routes.py -d ens6 -r           remove what belongs to the device
  add_routes.py --watch              serve all hardware devices, as add_routes.service does
  up /usr/local/sbin/add_routes.py   in a stanza of /etc/network/interfaces

Files:
  /etc/iproute2/rt_tables.d/DEVICE.conf   the name of the device's table, so that its number stays
  /run/add_routes.lock                    held during each run
  /run/add_routes.watch.lock              held by --watch as long as it runs

Exit codes:
  0  done, or nothing to change
  1  failed, and what this run had done is taken back
  2  usage error
  130  interrupted, and what this run had done is taken back
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import fnmatch
import glob
import ipaddress
import itertools
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Union

if TYPE_CHECKING:
    import socket

PROGRAM = "add_routes.py"

# These two are in no rt_protos of Debian 11 to 13, nor the kernel's, nor FRR's (186 to 198).
PROTOCOL = 77
EXPLICIT = 78  # of a route that -g or -n asked for: later hooks and other devices' runs keep it
OURS = (PROTOCOL, EXPLICIT)
# The interface group of the devices that are served; people give small numbers by hand.
GROUP = 7700

# Priorities of our rules. They stand behind strongSwan's (220) and Tailscale's (5210 to 5270),
# because a VPN goes first, and before main's own (32766).
OWN_ADDRESSES = 19990
NO_ENI = 20000
DETOUR = 20010
LIVE = 20020
FROM = 20030
KEEP = 32698
BACK = 32699
SERVICES = 32700
SPECIFIC = 32701
DEFAULT = 32702
FIRST_EDITION_FROM = 20001  # of an earlier release: an upgraded host keeps its tables
# A VPN that takes all traffic may have no default route in main, but several that are as wide:
# 0.0.0.0/1 and 128.0.0.0/1, in IPv6 2000::/4 and up to fc00::/7 (OpenVPN's redirect-gateway). The
# lengths are not 0 for another reason, too: `wg-quick down` deletes all rules that suppress 0.
NOT_DEFAULT = {4: "suppress_prefixlength 1", 6: "suppress_prefixlength 7"}

MAIN = 254
LOCAL = 255
KERNEL_TABLES = (0, 253, MAIN, LOCAL)  # the first two are unspec and default; 0 is never free
ETH_TABLES = range(100, 253)  # eth0 to eth152, because eth153 would have the kernel's 253
FREE_TABLES = 1000  # and up
LARGEST_TABLE = 2**32 - 1

# IMDS, the DNS resolver and the clock of a VPC (User Guide, "Link-local addresses").
VPC_SERVICES = {4: "169.254.0.0/16", 6: "fd00:ec2::/32"}
VPC_ROUTER = "fe80:ec2::1"  # a VPC's IPv6 router has this address in every subnet

# The kernel allows more in a name, but `ip -batch` reads quotes, comments and white space.
NAME = re.compile(r"(?!(all|default)$)[A-Za-z0-9_][A-Za-z0-9_.-]*")
PLAIN_WORD = re.compile(r"[\w.:/-]+", re.ASCII)
LONGEST_DEVICE = 15  # IFNAMSIZ - 1
LONGEST_TABLE = 64
NAME_DIRECTORY = "/etc/iproute2/rt_tables.d"
RT_TABLES = ("/usr/share/iproute2/rt_tables", "/etc/iproute2/rt_tables", f"{NAME_DIRECTORY}/*.conf")

LOCK = "/run/add_routes.lock"
LOCK_SECONDS = 30  # a run takes a tenth of a second
WATCH_LOCK = "/run/add_routes.watch.lock"
IP_SECONDS = 10
MISREAD = 255  # the exit code of `ip` for a word that it does not know
# A run looks at the host at most this often. It looks again where `ip` refused a step, because the
# host may have changed meanwhile.
LOOKS = 4

# What --watch hears: links, addresses, routes, rules and nexthop objects
# (linux/rtnetlink.h, RTNLGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV4_RULE and so on).
HEARD_GROUPS = (1, 5, 7, 8, 9, 11, 19, 32)
QUIET_SECONDS = 0.2
STORM_SECONDS = 2.0  # without a quiet moment, it looks after this time
STORM_REST = 4  # in a storm, it rests this many times as long as it has worked
LONGEST_REST = 10.0
RETRY_SECONDS = 30.0  # after a run that failed
# Another program is fighting us when it undid what we did so often within this time, until it has
# not done so for as long.
FIGHT_REPEATS = 5
FIGHT_SECONDS = 60.0
SLOWEST_FIGHT = 30.0

# Words of `ip route show` that are a route's state, or that a copy gets anew.
STATE_WITH_VALUE = {"proto", "table", "nhid", "expires", "error", "age", "users", "used"}
STATE = {"dead", "linkdown", "pervasive", "unresolved", "notify", "offload", "trap"}
STATE |= {"rt_offload", "rt_trap", "offload_failed", "rt_offload_failed"}
ROUTER_PREFERENCE = {"high": 0, "medium": 1, "low": 2}  # RFC 4191

IPAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class Failure(Exception):
    """One line for the user; exit code 1."""


class Misread(Failure):
    """`ip` did not understand a line, ended, and did not say which line it was."""


class Wish(NamedTuple):  # not a dataclass: importing those costs 9 ms in each run
    """What the command line asks for."""

    device: str = ""  # must be served, or the run fails
    remove: str = ""  # a device or an alias
    patterns: tuple[str, ...] = ()  # --watch serves the devices that match
    hardware: bool = False  # --watch serves all hardware devices
    default: str = ""  # the device for --default
    gateway: IPAddress | None = None
    network: Network | None = None
    table: str = ""
    # ifupdown calls a hook for each stanza of a device: IPv4, IPv6, an alias. So what the hook of
    # one has asked for, the next one's does not end; a hook with -r does.
    is_hook: bool = False

    def ends_what_was_asked(self, name: str) -> bool:
        """Whether --default, -g and -n of earlier runs for the device count no more."""
        return name == self.device and not self.is_hook


class Address(NamedTuple):
    text: str  # as `ip` prints it
    network: Network
    label: str = ""  # the alias that it belongs to, or the device's name
    dynamic: bool = False  # by DHCP or a router advertisement
    tentative: bool = False  # the kernel still looks for a duplicate
    is_first_choice: bool = True  # as a source; not if its scope is link, say

    @property
    def ip(self) -> IPAddress:
        return ipaddress.ip_address(self.text)


class Device(NamedTuple):
    group: int = 0
    is_up: bool = True
    is_ethernet: bool = True
    is_hardware: bool = False
    addresses: tuple[Address, ...] = ()

    def addresses_of(self, family: int) -> list[Address]:
        return [address for address in self.addresses if address.network.version == family]


class Route(NamedTuple):
    """A line of `ip route show`, without its state."""

    family: int
    table: int
    destination: str
    words: tuple[str, ...]  # all that follows the destination, as `ip` prints it
    protocol: int = PROTOCOL
    # Whether a packet leaves by it (it is no blackhole, say), and `ip` can read it again.
    is_usable: bool = True

    @property
    def network(self) -> Network:
        everything = {4: "0.0.0.0/0", 6: "::/0"}[self.family]
        text = everything if self.destination == "default" else self.destination
        return ipaddress.ip_network(text)

    @property
    def devices(self) -> set[str]:
        """Several for a multipath route."""
        return {name for word, name in zip(self.words, self.words[1:]) if word == "dev"}

    @property
    def metric(self) -> int:
        return int(value_of("metric", self.words) or 0)

    @property
    def rank(self) -> tuple[int, int]:
        """Of the routes to one destination, the kernel takes that of the lowest rank."""
        preference = value_of("pref", self.words)
        return self.metric, ROUTER_PREFERENCE.get(preference, ROUTER_PREFERENCE["medium"])

    @property
    def key(self) -> tuple[int, int, str, int, str, str]:
        """The kernel keeps one route of a key."""
        source, tos = value_of("from", self.words), value_of("tos", self.words)
        return self.family, self.table, self.destination, self.metric, source, tos

    def command(self, verb: str) -> str:
        # `ip` prints this lock, and does not read it.
        words = " ".join(self.words).replace("rto_min lock", "rto_min")
        # What it prints without a scope is global; what it reads so is of scope link.
        if self.family == 4 and not {"via", "nexthop", "scope"}.intersection(self.words):
            words += " scope global"
        # It reads nothing but next hops behind the first one.
        before, nexthop, hops = words.partition("nexthop")
        ours = f"table {self.table} protocol {self.protocol}"
        parts = ["route", verb, self.destination, before, ours, nexthop, hops]
        return " ".join(part.strip() for part in parts if part)


class Rule(NamedTuple):
    """A line of `ip rule`."""

    family: int
    priority: int
    text: str  # what follows the priority, without the protocol
    protocol: int = PROTOCOL

    @property
    def table(self) -> int:
        number = value_of("lookup", self.text.split())
        return int(number) if number.isdecimal() else 0

    def command(self, verb: str) -> str:
        text = re.sub(rf"lookup {MAIN}\b", "lookup main", self.text)
        return f"rule {verb} pref {self.priority} {text} protocol {self.protocol}"


class Host(NamedTuple):
    """What the kernel and the rt_tables files say."""

    devices: dict[str, Device]
    rules: list[Rule]  # everybody's
    routes: list[Route]  # everybody's but those of the kernel's table local
    names: dict[str, int]  # of tables
    families: tuple[int, ...] = (4, 6)

    def main_routes(self, family: int) -> list[Route]:
        """Main's routes that a packet can leave by."""
        routes = []
        for route in self.routes:
            if route.table == MAIN and route.family == family and route.is_usable:
                routes.append(route)
        return routes

    def main_defaults(self, family: int) -> list[Route]:
        """Main's default routes for all packets, the best one first."""
        defaults = []
        for route in self.main_routes(family):
            is_for_some = "tos" in route.words or "from" in route.words
            if route.destination == "default" and not is_for_some:
                defaults.append(route)
        return sorted(defaults, key=lambda route: route.rank)


class Step(NamedTuple):
    """A command of `ip -FAMILY`, and the one that takes it back."""

    family: int
    do: str
    undo: str
    is_needed: bool = True  # else the run goes on without it


class Plan(NamedTuple):
    steps: list[Step]
    tables: dict[str, int]  # of devices
    complaints: list[str]  # devices that cannot be served, at least in one family, and why


class Result(NamedTuple):
    done: list[Step]
    complaints: list[str]
    is_whole: bool  # else it is worth trying again


# --- the verbs ---


def serve(wish: Wish, verbose: bool, keep_going: bool = False) -> Result:
    """Look at the host and make it right; raises Failure, OSError.

    `ip` may refuse a step because another program, or the loss of a device, was faster. So a
    refusal counts only when a new look asks for the same again."""
    done: list[Step] = []
    refused: dict[str, str] = {}
    with locked():
        try:
            for _ in range(LOOKS):
                host = read_host()
                plan = make_plan(host, wish)
                refused_before = refused
                refused = apply(plan.steps, done, verbose)
                if not refused or refused == refused_before:
                    break
            if not keep_going:
                check_needed(plan.steps, refused)
            complaints = [*plan.complaints, *write_names(host, wish, plan.tables)]
        except (Failure, OSError, KeyboardInterrupt):
            if not keep_going:
                take_back(done, verbose)
            raise
    return Result(done, [*complaints, *refused.values()], is_whole=not refused)


def check_needed(steps: list[Step], refused: dict[str, str]) -> None:
    for step in steps:
        if step.is_needed and step.do in refused:
            raise Failure(refused[step.do])


def rehearse(wish: Wish) -> None:
    """--dry-run: print the commands."""
    plan = make_plan(read_host(), wish)
    for step in plan.steps:
        print(f"ip -{step.family} {step.do}")
    if not plan.steps:
        print("nothing to change")
    for complaint in plan.complaints:
        say(complaint)


def watch(wish: Wish, verbose: bool) -> NoReturn:
    """Serve at once, and again after each change, until SIGTERM. What is made stays."""
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    with watch_lock():
        bell = open_bell()  # before the first look, so that no change is missed
        fight = Fight()
        said = ""
        while True:
            silence(bell)
            started = time.monotonic()
            result = serve_and_say(wish, verbose)
            complaints = "; ".join(result.complaints)
            if complaints and complaints != said:
                say(complaints)
            said = complaints
            fight.note(result.done)
            time.sleep(fight.pause())
            patience = None if result.is_whole else RETRY_SECONDS
            await_change(bell, time.monotonic() - started, patience)


def serve_and_say(wish: Wish, verbose: bool) -> Result:
    """For --watch: one line where something was changed, and no end."""
    try:
        result = serve(wish, verbose, keep_going=True)
    except (Failure, OSError) as error:
        return Result([], [error_text(error)], is_whole=False)
    if result.done:
        first = result.done[0]
        say(f"{len(result.done)} changes: ip -{first.family} {first.do} …")
    return result


def end(*_: object) -> NoReturn:
    raise SystemExit(0)


# --- deciding: from what is to what is wanted; nothing here acts ---


def make_plan(host: Host, wish: Wish) -> Plan:
    """The steps from what is to what is wanted; raises Failure."""
    host = without_addresses(host, wish.remove)
    served, complaints = devices_to_serve(host, wish)
    idle = idle_devices(host, served, wish.remove)
    tables = choose_tables(host, wish, served + idle)
    default = default_device(host, wish, tables)
    if wish.default and not default:
        complaints.append(f"--default: {wish.default} is not there, or not up with an address")
    only_mains_is_left = len(served) == 1 and main_devices(host).issuperset(served)
    if wish.remove and only_mains_is_left and not default:
        # It was served because of the device that is removed. The test of each family below misses
        # that where main has a default route in one family only.
        served = []

    routes: list[Route] = []
    rules: list[Rule] = []
    for family in host.families:
        present = [name for name in served if is_served_in(host, wish, family, name)]
        others = set(present) - {main_device(host, family)}
        if default or others:  # else main is right for its own device
            routes += plan_tables(host, wish, family, present, tables)
            rules += plan_rules(host, family, present, tables, default)

    members = set(idle)
    if rules:
        members.update(served)
        # Even where nobody serves it any more, the others' packets must not leave by it.
        members.update(own for own in main_devices(host) if host.devices[own].group == GROUP)
    steps = plan_groups(host, members) + plan_changes(host, wish, routes, rules)
    # One `ip` does all steps of a family.
    steps.sort(key=lambda step: step.family)
    return Plan(steps, tables if rules else {}, complaints)


def idle_devices(host: Host, served: list[str], removed: str) -> list[str]:
    """Devices of our group that cannot be served at the moment, because they have no address,
    say. They stay in the group, so that later runs serve them again."""
    idle = []
    for name, device in sorted(host.devices.items()):
        if device.group == GROUP and name not in served and name != removed:
            idle.append(name)
    return idle


def without_addresses(host: Host, removed: str) -> Host:
    """The host as if the device or the alias had no address. An alias is a label of addresses."""
    if not removed:
        return host
    devices = dict(host.devices)
    for name, device in devices.items():
        kept = [a for a in device.addresses if removed not in (name, a.label)]
        devices[name] = device._replace(addresses=tuple(kept))
    return host._replace(devices=devices)


def devices_to_serve(host: Host, wish: Wish) -> tuple[list[str], list[str]]:
    """Their names, and for each one that cannot be served the reason."""
    if wish.device and wish.device not in host.devices:
        raise Failure(f"no device named {wish.device}; expected one that `ip link` lists")
    served, complaints = [], []
    for name, device in sorted(host.devices.items()):
        if name == wish.device:
            check_device(host, wish, name)
            served.append(name)
        elif is_asked_for(host, wish, name) and device.addresses and device.is_up:
            try:
                check_device(host, wish, name)
            except Failure as error:
                complaints.append(str(error))
            if any(is_served_in(host, wish, family, name) for family in host.families):
                served.append(name)
    return served, complaints


def is_served_in(host: Host, wish: Wish, family: int, name: str) -> bool:
    """One family of a device can be served where the other cannot."""
    try:
        check_device(host, wish, name, (family,))
    except Failure:
        return False
    return bool(host.devices[name].addresses_of(family))


def is_asked_for(host: Host, wish: Wish, name: str) -> bool:
    """By an earlier run, by --watch, or by a default route of main's. A run with -r serves none
    anew, so that one for each device leaves nothing."""
    device = host.devices[name]
    if device.group == GROUP:
        return True
    if wish.remove or name == "lo":
        return False
    if name == wish.default or (wish.hardware and device.is_hardware):
        return True
    matches = any(fnmatch.fnmatchcase(name, pattern) for pattern in wish.patterns)
    return matches or name in devices_of_default_routes(host)


def check_device(
    host: Host, wish: Wish, name: str, families: tuple[int, ...] | None = None
) -> None:
    """Raises Failure where the device cannot be served, in these families or in all."""
    device = host.devices[name]
    check_name(name, "device", LONGEST_DEVICE)
    if device.group not in (0, GROUP):
        raise Failure(f"{name} is in interface group {device.group}; expected none or {GROUP}")
    if not device.addresses:
        raise Failure(f"{name} has no address; expected a global one, IPv4 or IPv6")
    if not device.is_up:
        raise Failure(f"{name} is down; expected it up")
    # A hook gets -g for the family of its stanza. The device may not have its addresses yet.
    if name == wish.device and not wish.is_hook:
        for asked in (wish.gateway, wish.network):
            if asked and not device.addresses_of(asked.version):
                raise Failure(f"{name} has no IPv{asked.version} address; {asked} needs one")
    for family in families or host.families:
        if device.addresses_of(family):
            # It raises Failure where it finds no gateway; the table does not matter to that.
            default_route(host, wish, family, name, MAIN)


def devices_of_default_routes(host: Host) -> set[str]:
    """Main may send by each of them, so each needs its rules."""
    devices = set()
    for family in host.families:
        for route in host.main_defaults(family):
            devices |= ethernet_devices(host, route)
    return devices


def ethernet_devices(host: Host, route: Route) -> set[str]:
    """An ENI is an Ethernet device; a tunnel, by which a route may lead too, is none."""
    present = route.devices.intersection(host.devices)
    return {name for name in present if host.devices[name].is_ethernet}


def main_device(host: Host, family: int) -> str:
    """Main's own device: that of its best default route; empty where there is none."""
    for route in host.main_defaults(family):
        devices = ethernet_devices(host, route)
        for word in route.words:
            if word in devices:
                return word
    return ""


def main_devices(host: Host) -> set[str]:
    """Main's own devices of all families; often it is one."""
    return {main_device(host, family) for family in host.families} - {""}


def default_device(host: Host, wish: Wish, tables: dict[str, int]) -> str:
    """The device for --default: the one asked for, else the one of an earlier run."""
    if wish.default:
        return wish.default if wish.default in tables else ""
    for rule in host.rules:
        if rule.protocol == PROTOCOL and rule.priority == DEFAULT:
            for name, table in tables.items():
                if table == rule.table and not wish.ends_what_was_asked(name):
                    return name
    return ""


# --- deciding: tables ---


def plan_tables(
    host: Host, wish: Wish, family: int, present: list[str], tables: dict[str, int]
) -> list[Route]:
    routes = []
    for name in present:
        routes += plan_table(host, wish, family, name, present, tables[name])
    return routes


def plan_table(
    host: Host, wish: Wish, family: int, name: str, present: list[str], table: int
) -> list[Route]:
    """All routes of the device's table; those that lead to a gateway come last."""
    explicit = explicit_routes(host, wish, family, name, table)
    default = default_route(host, wish, family, name, table)
    originals = main_routes_by(host, family, name)
    originals += link_to_gateway(host, name, originals, default)
    if name == main_device(host, family):
        rivals = set(present) - {name}
        originals = plan_detours(host, family, rivals, originals, default)

    # Where -n names a network, main's routes to it and into it are not copied.
    replaced = [route.network for route in explicit if route.destination != "default"]
    routes: dict[tuple[Any, ...], Route] = {}
    for route in sorted(originals, key=lambda route: route.rank):
        copy = Route(family, table, route.destination, usable_words(host, name, route))
        if not any(copy.network.overlaps(network) for network in replaced):
            routes.setdefault(copy.key, copy)
    for route in [*explicit, default]:
        routes[route.key] = route
    return sorted(routes.values(), key=lambda route: "via" in route.words)


def main_routes_by(host: Host, family: int, name: str) -> list[Route]:
    """Main's routes that leave by the device, as far as they do, but its default routes."""
    routes = []
    for route in host.main_routes(family):
        if name in route.devices and route.destination != "default":
            routes.append(route._replace(words=part_by(route, name)))
    return routes


def link_to_gateway(host: Host, name: str, own: list[Route], default: Route) -> list[Route]:
    """The device's subnet that has the gateway, where main does not have it.

    That is so for an address with `noprefixroute`, or for a network with a table of its own by
    systemd-networkd. Without that route, the kernel refuses the default route in IPv4.
    """
    gateway = value_of("via", default.words)
    is_ipv4 = gateway not in ("", "inet6") and default.family == 4
    if not is_ipv4 or "onlink" in default.words:
        return []
    router = ipaddress.ip_address(gateway)
    for route in own:
        if "via" not in route.words and router in route.network:
            return []
    for address in host.devices[name].addresses_of(4):
        if router in address.network:
            words = ("dev", name, "scope", "253", "src", address.text)
            return [Route(4, MAIN, str(address.network), words)]
    return []


def plan_detours(
    host: Host, family: int, rivals: set[str], own: list[Route], default: Route
) -> list[Route]:
    """Routes to where main sends by another served device, for the table of main's own device.

    With ens5 as main's own, and ens6 in 10.0.16.0/20, main sends from ens5's address to 10.0.16.7
    by ens6. So table ens5 gets a route to 10.0.16.0/20 by ens5's gateway, which rule DETOUR uses.
    """
    disputed = {}
    for route in host.main_routes(family):
        if route.destination != "default" and not rivals.isdisjoint(route.devices):
            disputed[route.destination] = route.network
    networks = set(disputed.values())
    lengths = {network.prefixlen for network in networks}
    kept = []
    for route in own:
        if is_inside_one_of(route.network, networks, lengths):
            kept.append(route)
    settled = {route.destination for route in kept}
    for destination in disputed:
        if destination not in settled:
            kept.append(default._replace(destination=destination))
    return kept


def is_inside_one_of(inner: Network, networks: set[Network], lengths: set[int]) -> bool:
    """lengths: the networks' prefix lengths. They are few, where the networks may be thousands."""
    for length in lengths:
        if length <= inner.prefixlen and inner.supernet(new_prefix=length) in networks:
            return True
    return False


def part_by(route: Route, name: str) -> tuple[str, ...]:
    """The words of a route as far as it leaves by this device."""
    # `ip` prints a nexthop group of one member as a list of one hop.
    if route.devices == {name} and route.words.count("nexthop") != 1:
        return route.words
    common: list[str] = []
    hops: list[list[str]] = []
    for word in route.words:
        if word == "nexthop":
            hops.append([])
        elif hops:
            hops[-1].append(word)
        else:
            common.append(word)
    own = [hop for hop in hops if value_of("dev", hop) == name]
    if len(own) == 1:  # a single hop has no weight, and comes first in what `ip` prints
        hop = own[0]
        if "weight" in hop:
            at = hop.index("weight")
            del hop[at : at + 2]
        return tuple(hop + common)
    for hop in own:
        common += ["nexthop", *hop]
    return tuple(common)


def usable_words(host: Host, name: str, route: Route) -> tuple[str, ...]:
    """The kernel refuses a tentative IPv6 address as a route's source."""
    source = value_of("src", route.words)
    for address in host.devices[name].addresses:
        if address.tentative and address.text == source:
            at = route.words.index("src")
            return route.words[:at] + route.words[at + 2 :]
    return route.words


def default_route(host: Host, wish: Wish, family: int, name: str, table: int) -> Route:
    """As -g or -n says; else main's default route by the device; else by the subnet's gateway."""
    for route in explicit_routes(host, wish, family, name, table):
        if route.destination == "default":
            return route
    for route in host.main_defaults(family):
        if name in route.devices:
            part = route._replace(words=part_by(route, name))
            words = without_metric(family, usable_words(host, name, part))
            return Route(family, table, "default", words)
    if family == 6:
        words = ("via", VPC_ROUTER, "dev", name, "metric", "1024")
    else:
        words = ("via", str(subnet_gateway(host, name)), "dev", name)
    return Route(family, table, "default", words)


def without_metric(family: int, words: tuple[str, ...]) -> tuple[str, ...]:
    """With the metric that the kernel gives a route that states none."""
    kept = list(words)
    if "metric" in kept:
        at = kept.index("metric")
        if family == 6:
            kept[at + 1] = "1024"
        else:
            del kept[at : at + 2]
    return tuple(kept)


def subnet_gateway(host: Host, name: str) -> IPAddress:
    """In IPv4, a VPC's router has the first address of each subnet."""
    addresses = host.devices[name].addresses_of(4)
    # An address by DHCP comes first: it is the ENI's own, and another may be a VIP.
    for address in sorted(addresses, key=lambda address: not address.dynamic):
        for network in [address.network, *link_networks(host, 4, name)]:
            gateway = network.network_address + 1
            if network.prefixlen < 31 and address.ip in network and address.ip != gateway:
                return gateway
    has = f"{addresses[0].text}/{addresses[0].network.prefixlen}"
    raise Failure(f"{name} has {has} and no gateway; expected -g or -n")


def link_networks(host: Host, family: int, name: str) -> list[Network]:
    """The networks that are reached on the device's link without a gateway."""
    networks = []
    for address in host.devices[name].addresses_of(family):
        if address.network.num_addresses > 1:
            networks.append(address.network)
    for route in host.main_routes(family):
        is_default = route.destination == "default"
        if name in route.devices and "via" not in route.words and not is_default:
            networks.append(route.network)
    return networks


def explicit_routes(host: Host, wish: Wish, family: int, name: str, table: int) -> list[Route]:
    """The routes that -n and -g ask for, else those that they asked for in an earlier run."""
    asked = asked_routes(host, wish, family, table) if name == wish.device else []
    if asked or wish.ends_what_was_asked(name):
        return asked
    kept = []
    for route in host.routes:
        if route.family == family and route.protocol == EXPLICIT and name in route.devices:
            kept.append(route._replace(table=table))
    return kept


def asked_routes(host: Host, wish: Wish, family: int, table: int) -> list[Route]:
    name = wish.device
    network = wish.network if wish.network and wish.network.version == family else None
    gateway = wish.gateway if wish.gateway and wish.gateway.version == family else None
    metric = ("metric", "1024") if family == 6 else ()
    routes = []
    if network:
        routes.append(asked_link(host, name, network, table))
        if not gateway:
            router = ipaddress.ip_address(VPC_ROUTER)
            gateway = network.network_address + 1 if family == 4 else router
    if gateway:
        check_gateway(host, name, gateway, network)
        is_on_link = not network and not link_networks(host, family, name)
        onlink = ("onlink",) if is_on_link else ()
        words = ("via", str(gateway), "dev", name, *metric, *onlink)
        routes.append(Route(family, table, "default", words, EXPLICIT))
    return routes


def asked_link(host: Host, name: str, network: Network, table: int) -> Route:
    """The route to the network that -n names, as `ip route show` prints it afterwards."""
    source = address_in(host, name, network)
    words: tuple[str, ...] = ("dev", name, "scope", "253", "src", source)
    if network.version == 6:
        words = ("dev", name, "metric", "1024")
    return Route(network.version, table, str(network), words, EXPLICIT)


def address_in(host: Host, name: str, network: Network) -> str:
    addresses = host.devices[name].addresses_of(network.version)
    for address in addresses:
        if address.ip in network:
            return address.text
    has = addresses[0].text if addresses else "none"
    raise Failure(f"{name} has {has}; expected an address in {network}")


def check_gateway(host: Host, name: str, gateway: IPAddress, network: Network | None) -> None:
    if any(address.ip == gateway for address in host.devices[name].addresses):
        raise Failure(f"gateway {gateway} is {name}'s own address; expected another by -g")
    networks = [network] if network else link_networks(host, gateway.version, name)
    reached = not networks or gateway.is_link_local or any(gateway in net for net in networks)
    if not reached:
        inside = " or ".join(map(str, networks))
        raise Failure(f"gateway {gateway} of {name} is outside; expected one in {inside}")


# --- deciding: rules ---


def plan_rules(
    host: Host, family: int, present: list[str], tables: dict[str, int], default: str
) -> list[Rule]:
    not_default = NOT_DEFAULT[family]
    no_eni = f"from all lookup {MAIN} {not_default} suppress_ifgroup {GROUP}"
    rules = [*rules_for_own_addresses(host, family), Rule(family, NO_ENI, no_eni)]
    own = main_device(host, family)
    for name in present:
        for address in host.devices[name].addresses_of(family):
            source = f"from {address.text} lookup"
            if name == own:
                rules.append(Rule(family, DETOUR, f"{source} {tables[name]} {not_default}"))
                rules.append(Rule(family, LIVE, f"{source} {MAIN} {not_default}"))
            rules.append(Rule(family, FROM, f"{source} {tables[name]}"))
    if default:
        rules += plan_default_rules(host, family, default, present, tables)
    return rules


def rules_for_own_addresses(host: Host, family: int) -> list[Rule]:
    """None, unless somebody has moved the kernel's rule for table local, which is the first one.

    With VRFs it is usual to put it behind theirs (kernel documentation, vrf.rst). Behind ours, what
    is sent to an address of this host would leave by a device.
    """
    for rule in host.rules:
        is_before = rule.priority < NO_ENI and rule.protocol != PROTOCOL
        if rule.family == family and is_before and rule.text == f"from all lookup {LOCAL}":
            return []
    return [Rule(family, OWN_ADDRESSES, f"from all lookup {LOCAL}")]


def plan_default_rules(
    host: Host, family: int, default: str, present: list[str], tables: dict[str, int]
) -> list[Rule]:
    table = tables[default]
    rules = []
    own = main_device(host, family)
    # The table of main's own device lacks most of main's routes. So BACK does not use its default
    # route, and SPECIFIC is asked next.
    suffix = f" {NOT_DEFAULT[family]}" if default == own else ""
    if own in present and own != default:
        for address in host.devices[own].addresses_of(family):
            rules.append(Rule(family, KEEP, f"from {address.text} lookup {MAIN}"))
    services = VPC_SERVICES[family]
    rules.append(Rule(family, BACK, f"from all iif {default} lookup {table}{suffix}"))
    rules.append(Rule(family, SERVICES, f"from all to {services} lookup {MAIN}"))
    rules.append(Rule(family, SPECIFIC, f"from all lookup {MAIN} {NOT_DEFAULT[family]}"))
    rules.append(Rule(family, DEFAULT, f"from all lookup {table}"))
    return rules


# --- deciding: the numbers of the tables ---


def choose_tables(host: Host, wish: Wish, devices: list[str]) -> dict[str, int]:
    """A number for each device, of a table that nobody else uses."""
    current = {name: current_table(host, name) for name in devices}
    tables: dict[str, int] = {}
    for name in devices:
        taken = filled_tables(host) | set(tables.values())
        taken.update(table for other, table in current.items() if other != name)
        wanted = wish.table if name == wish.device else ""
        tables[name] = choose_table(host, name, wanted, current[name], taken)
    return tables


def filled_tables(host: Host) -> set[int]:
    """The tables that hold a route of somebody else's."""
    tables = set(KERNEL_TABLES)
    for route in host.routes:
        if route.protocol not in OURS:
            tables.add(route.table)
    return tables


def tables_of_others_rules(host: Host) -> set[int]:
    """The tables that others' rules lead to. Such a rule may lead to a table of ours, as README's
    for published ports does. But a table that is not ours yet is theirs."""
    return {rule.table for rule in host.rules if rule.protocol != PROTOCOL}


def current_table(host: Host, name: str) -> int:
    """The table that earlier runs chose for the device; 0 where there is none."""
    for route in host.routes:
        if route.protocol in OURS and name in route.devices:
            return route.table
    selectors = [f"from {address.text}" for address in host.devices[name].addresses]
    selectors.append(f"from all iif {name}")
    for rule in host.rules:
        selector = rule.text.partition(" lookup ")[0]
        is_ours = rule.protocol == PROTOCOL and rule.priority in (FROM, FIRST_EDITION_FROM, BACK)
        if is_ours and selector in selectors:
            return rule.table
    return 0


def choose_table(host: Host, name: str, wanted: str, current: int, taken: set[int]) -> int:
    """The table asked for; else the one of earlier runs, or of that name; else a free one."""
    taken_or_led_to = taken | tables_of_others_rules(host)
    if wanted in host.names or wanted.isdecimal():
        table = host.names[wanted] if wanted in host.names else int(wanted)
        others = taken if table == current else taken_or_led_to
        if table > LARGEST_TABLE or not is_free(host, name, table, others):
            raise Failure(f"table {wanted} is reserved or somebody else's; choose another with -t")
        return table
    for table in (current, host.names.get(name, 0)):
        if is_free(host, name, table, taken):
            return table
    if is_free(host, name, eth_table(host, name), taken_or_led_to):
        return eth_table(host, name)
    taken_or_led_to.update(host.names.values())
    return next(table for table in itertools.count(FREE_TABLES) if table not in taken_or_led_to)


def is_free(host: Host, name: str, table: int, taken: set[int]) -> bool:
    """Whether the table is neither taken nor named after another device."""
    for label, number in host.names.items():
        if number == table and label != name and label in host.devices:
            return False
    return table not in taken


def eth_table(host: Host, name: str) -> int:
    """100+N for ethN, unless the number has a name; 0 where there is no such table."""
    if not re.fullmatch("eth(0|[1-9][0-9]{0,2})", name):
        return 0
    table = ETH_TABLES.start + int(name[len("eth") :])
    return table if table in ETH_TABLES and table not in host.names.values() else 0


# --- deciding: steps ---


def plan_groups(host: Host, members: set[str]) -> list[Step]:
    steps = []
    for name, device in host.devices.items():
        change = f"link set dev {name} group"
        if name in members and device.group != GROUP:
            steps.append(Step(4, f"{change} {GROUP}", f"{change} 0"))
        if name not in members and device.group == GROUP:
            steps.append(Step(4, f"{change} 0", f"{change} {GROUP}"))
    return steps


def plan_changes(host: Host, wish: Wish, routes: list[Route], rules: list[Rule]) -> list[Step]:
    """From the rules and routes of ours to these. Routes come before the rules that lead to them,
    and go after them: a packet in between meets the old way or the new one, never half a table."""
    old_routes = {}
    for route in host.routes:
        # What is in main is nobody's but main's, whatever its protocol.
        if route.protocol in OURS and route.table != MAIN:
            old_routes[route.key] = route
    old_rules = [rule for rule in host.rules if rule.protocol == PROTOCOL]

    steps = []
    for route in routes:
        steps += step_to(route, old_routes.pop(route.key, None), wish)
    for rule in rules:
        if rule not in old_rules:
            steps.append(Step(rule.family, rule.command("add"), rule.command("del")))
    for rule in reversed(old_rules):
        if rule not in rules:
            steps.append(Step(rule.family, rule.command("del"), rule.command("add")))
    for route in old_routes.values():
        steps.append(Step(route.family, route.command("del"), route.command("add")))
    return steps


def step_to(route: Route, old: Route | None, wish: Wish) -> list[Step]:
    """None or one. The run for a device fails without its default route and what -n says; a copy
    of a route may be more than `ip` understands."""
    is_copy = route.destination != "default" and route.protocol != EXPLICIT
    is_needed = not is_copy and wish.device in route.devices
    if old is None:
        return [Step(route.family, route.command("add"), route.command("del"), is_needed)]
    if not is_same(old, route):
        do, undo = route.command("replace"), old.command("replace")
        return [Step(route.family, do, undo, is_needed)]
    return []


def is_same(one: Route, other: Route) -> bool:
    """Where a single hop is onlink, `ip` prints that word behind the metric, not behind the hop."""
    if "nexthop" not in one.words and ("onlink" in one.words) == ("onlink" in other.words):
        one, other = without_onlink(one), without_onlink(other)
    return one == other


def without_onlink(route: Route) -> Route:
    return route._replace(words=tuple(word for word in route.words if word != "onlink"))


# --- acting ---


def apply(steps: list[Step], done: list[Step], verbose: bool) -> dict[str, str]:
    """Do the steps. Adds to done those that `ip` took; returns, by command, what it said of the
    others."""
    refused = {}
    for family, group in itertools.groupby(steps, key=lambda step: step.family):
        batch = list(group)
        done += batch  # before `ip` runs, so that an interrupted run takes them back, too
        commands = [step.do for step in batch]
        try:
            _, errors = ip(f"-{family} -force", commands, verbose)
        except Misread:
            errors = one_by_one(f"-{family}", commands, verbose)
        for number, error in errors.items():
            refused[batch[number].do] = error
            done.remove(batch[number])
    return refused


def one_by_one(flags: str, lines: list[str], verbose: bool) -> dict[int, str]:
    """A line that `ip` does not understand spoils nothing but itself. Those that it has done by
    now are refused; the next look finds them done. If this run fails after all, it does not take
    those back, but the next run does."""
    errors = {}
    for number, line in enumerate(lines):
        try:
            _, error = ip(flags, [line], verbose)
            if error:
                errors[number] = error[0]
        except Misread as misread:
            errors[number] = f"ip {flags} {line}: {misread}"
    return errors


def take_back(done: list[Step], verbose: bool) -> None:
    for family, group in itertools.groupby(reversed(done), key=lambda step: step.family):
        # What this cannot take back, the next run will.
        with contextlib.suppress(Failure, OSError):
            ip(f"-{family} -force", [step.undo for step in group], verbose)


def ip(flags: str, lines: list[str], verbose: bool = False) -> tuple[str, dict[int, str]]:
    """Run all lines by one `ip -batch`: its output, and what it said of each line that failed.
    Raises Failure where it does not say which line that was."""
    if verbose:
        for line in lines:
            write_line(f"{as_typed(flags)} {line}")
    return outcome(flags, lines, run_batch(flags, lines))


def as_typed(flags: str) -> str:
    """The beginning of a command as a person would type it, for messages."""
    return f"ip {flags}".replace(" -force", "")


def outcome(
    flags: str, lines: list[str], done: subprocess.CompletedProcess[str]
) -> tuple[str, dict[int, str]]:
    """What `ip -batch` has said, as ip() tells it. Raises Failure as ip() does."""
    errors = {}
    for words, number in re.findall(r"(.*?)Command failed -:(\d+)", done.stderr, re.DOTALL):
        line = lines[int(number) - 1]
        errors[int(number) - 1] = f"{as_typed(flags)} {line}: {' '.join(words.split())}"
    words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    if done.returncode == MISREAD:
        raise Misread(words)
    if done.returncode and not errors:
        raise Failure(f"{' '.join(done.args)}: {words}")
    return done.stdout, errors


def run_batch(flags: str, lines: list[str]) -> subprocess.CompletedProcess[str]:
    """Raises Failure, OSError."""
    command = ["ip", *flags.split(), "-batch", "-"]
    text = "".join(f"{line}\n" for line in lines)
    try:
        return subprocess.run(
            command,
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",  # a device's name may be any bytes
            timeout=IP_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"{' '.join(command)}: did not finish within {IP_SECONDS} s") from None


# --- what the kernel and the rt_tables files say ---


def read_host() -> Host:
    """Raises Failure, OSError."""
    # Without this file the kernel has no IPv6 (ipv6.disable=1), and `ip -6 rule` fails.
    families = (4, 6) if os.path.exists("/proc/net/if_inet6") else (4,)
    output = ask("-N -json", ["address show"])
    try:
        items = json.loads(output)
    except ValueError:
        raise Failure(f"`ip -json address show` says {output[:80]!r}; expected JSON") from None
    host = Host(read_devices(items), [], [], read_names(), families)
    for family in families:
        lines = ask(f"-{family} -N -o", ["rule show", "route show table all"])
        read_lines_of_ip(host, family, lines)
    return host


def read_lines_of_ip(host: Host, family: int, lines: str) -> None:
    """Add what the lines say to the host. An odd line spoils nothing but itself."""
    for line in lines.splitlines():
        with contextlib.suppress(ValueError, LookupError, StopIteration):
            read_line(host, family, line)


def ask(flags: str, lines: list[str]) -> str:
    """Raises Failure, OSError."""
    for _ in range(LOOKS):
        done = run_batch(flags, lines)
        # `ip` says so of a list that has changed meanwhile, in which something may be missing.
        if "Dump was interrupted" not in done.stderr:
            break
    else:
        raise Failure(f"ip {flags}: the host changes faster than it can be read")
    output, errors = outcome(flags, lines, done)
    for error in errors.values():
        raise Failure(error)
    return output


def read_devices(items: Any) -> dict[str, Device]:
    """What `ip -json address show` says. An odd item spoils nothing but itself."""
    devices = {}
    for item in items if isinstance(items, list) else []:
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            name = checked_text(item["ifname"])
            group = item["group"].replace("default", "0")
            devices[name] = Device(
                group=int(group) if group.isdecimal() else -1,
                is_up="UP" in item["flags"],
                # With -N, iproute2 6.1 says [1], which is ARPHRD_ETHER.
                is_ethernet=item["link_type"] in ("ether", "[1]") and not is_tunnel(name),
                is_hardware=os.path.exists(f"/sys/class/net/{name}/device"),
                addresses=tuple(sort_addresses(read_addresses(item.get("addr_info", [])))),
            )
    return devices


def is_tunnel(name: str) -> bool:
    """Whether it is a VPN's tap or an overlay, which the kernel calls Ethernet devices, too."""
    folder = f"/sys/class/net/{name}"
    kinds = {f"DEVTYPE={kind}" for kind in ("geneve", "l2tpeth", "vxlan")}
    uevent = {line.strip() for line in read_lines(f"{folder}/uevent")}
    return os.path.exists(f"{folder}/tun_flags") or not kinds.isdisjoint(uevent)


def read_addresses(items: list[Any]) -> Iterator[Address]:
    """Those that a packet can have as its source."""
    for item in items:
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            # A peer's network is not that of the address.
            length = item["prefixlen"] if "address" not in item else None
            local = checked_text(item["local"])
            text = local if length is None else f"{local}/{length}"
            network = ipaddress.ip_interface(text).network
            is_host = item["scope"] in ("254", "host")
            is_link_local = item["scope"] in ("253", "link") and network.is_link_local
            if is_host or is_link_local or "dadfailed" in item:
                continue
            label = item.get("label", "")
            is_global = item["scope"] in ("0", "global")
            yield Address(local, network, label, "dynamic" in item, "tentative" in item, is_global)


def sort_addresses(addresses: Iterable[Address]) -> list[Address]:
    """The kernel lists an address that is nobody's first choice as a source before the others."""
    return sorted(addresses, key=lambda address: not address.is_first_choice)


def checked_text(item: Any) -> str:
    if isinstance(item, str):
        return item
    raise TypeError


def read_line(host: Host, family: int, line: str) -> None:
    """Add a line of `ip rule` or of `ip route` to the host."""
    words = line.replace("\\", " ").split()  # with -o, a backslash is a line's end
    if re.fullmatch(r"\d+:", words[0]):
        host.rules.append(read_rule(family, words))
    elif value_of("table", words) != str(LOCAL):
        host.routes.append(read_route(family, words))


def read_rule(family: int, words: list[str]) -> Rule:
    priority, *words = words
    protocol = 0
    if words[-2] == "proto":
        protocol = int(words[-1])
        words = words[:-2]
    text = " ".join(word for word in words if word != "[detached]")
    return Rule(family, int(priority[:-1]), text, protocol)


def read_route(family: int, words: list[str]) -> Route:
    # With -N, `ip` prints the number of a type: blackhole is 6.
    is_usable = words[0] == "default" or "." in words[0] or ":" in words[0]
    if not is_usable:
        words = words[1:]
    table = int(value_of("table", words) or MAIN)
    protocol = int(value_of("proto", words) or 0)
    route = Route(family, table, words[0], without_state(words[1:]), protocol)
    is_plain = all(PLAIN_WORD.fullmatch(word) for word in words)
    if table == MAIN and is_usable and is_plain:
        _ = route.network, route.rank  # raises ValueError for what is no route
    return route._replace(is_usable=is_usable and is_plain)


def without_state(words: list[str]) -> tuple[str, ...]:
    kept = []
    rest = iter(words)
    for word in rest:
        if word in STATE_WITH_VALUE:
            next(rest)
        elif word == "pref" and words[words.index("pref") + 1] == "medium":
            next(rest)  # every IPv6 route has it, unless a router says otherwise
        elif word not in STATE:
            kept.append(word)
    return tuple(kept)


def value_of(key: str, words: Iterable[str]) -> str:
    """The word after the key; empty where there is none. `via` may be followed by its family."""
    rest = iter(words)
    for word in rest:
        if word == key:
            return next(rest, "")
    return ""


def read_names() -> dict[str, int]:
    """The numbers of the tables, by name."""
    names = {}
    for pattern in RT_TABLES:
        for path in sorted(glob.glob(pattern)):
            for line in read_lines(path):
                if match := re.match(r"\s*(0x[0-9a-fA-F]+|[0-9]+)\s+([^\s#]+)", line):
                    number, name = match.groups()
                    names[name] = int(number, 16 if "x" in number else 10)
    return names


def read_lines(path: str) -> list[str]:
    """No lines where the file cannot be read: the other files are of use without it."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readlines()
    except OSError:
        return []


def write_names(host: Host, wish: Wish, tables: dict[str, int]) -> list[str]:
    """Give the tables names, where both are free. A failure only costs the names."""
    for device, table in tables.items():
        path = f"{NAME_DIRECTORY}/{device}.conf"
        asked = wish.table if device == wish.device and not wish.table.isdecimal() else ""
        name = asked or device
        has_name = table in host.names.values()
        if host.names.get(name) == table or (has_name and not asked):
            continue
        if not may_write_name(host, path, device, name, table):
            continue
        try:
            write_file(path, f"{table} {name}\n")
        except OSError as error:
            return [f"cannot write {path}: {error.strerror}; table {table} works without a name"]
    return []


def may_write_name(host: Host, path: str, device: str, name: str, table: int) -> bool:
    """Whether the name is free, and the file is an earlier run's, or is not there."""
    if not os.path.exists(path):
        return name not in host.names
    words = " ".join(read_lines(path)).split()
    if len(words) != 2 or not words[0].isdecimal():
        return False
    number = int(words[0])
    if number == table:
        return True
    # An administrator may have a table of this name, too, such as the usual `101 eth1`.
    is_free_to_move = number >= FREE_TABLES or number not in filled_tables(host)
    return words[1] in (device, name) and is_free_to_move


def write_file(path: str, text: str) -> None:
    """The whole text or nothing, readable for everybody, whatever the umask."""
    for directory in (os.path.dirname(NAME_DIRECTORY), NAME_DIRECTORY):
        if not os.path.isdir(directory):
            os.mkdir(directory)
            os.chmod(directory, 0o755)
    with open(f"{path}.new", "w", encoding="ascii") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)


# --- locks ---


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One run at a time; raises Failure, OSError."""
    with open(LOCK, "a", encoding="ascii", opener=for_root_alone) as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while not try_lock(file.fileno()):
            if time.monotonic() > deadline:
                who = f"another run holds {LOCK} for {LOCK_SECONDS} s"
                raise Failure(f"{who}; see `fuser {LOCK}`")
            time.sleep(0.02)
        yield


@contextlib.contextmanager
def watch_lock() -> Iterator[None]:
    with open(WATCH_LOCK, "a", encoding="ascii", opener=for_root_alone) as file:
        if not try_lock(file.fileno()):
            raise Failure(f"another --watch is running; it holds {WATCH_LOCK}")
        yield


def for_root_alone(path: str, flags: int) -> int:
    """Whoever can open a lock can hold it."""
    return os.open(path, flags, 0o600)


def try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# --- the door bell of --watch ---


def open_bell() -> socket.socket:
    """The kernel writes a message to this socket at each change. Nobody reads what it says."""
    import socket  # here, because hooks do not need it, and it costs 3 ms

    bell = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    mask = 0
    for group in HEARD_GROUPS:
        mask |= 1 << (group - 1)
    bell.bind((0, mask))
    bell.setblocking(False)
    return bell


def silence(bell: socket.socket) -> bool:
    """Take all messages; whether there were any."""
    rang = False
    while True:
        try:
            bell.recv(65536)
        except BlockingIOError:
            return rang
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # so many that the kernel dropped some
                raise
        rang = True


def await_change(bell: socket.socket, worked: float, patience: float | None) -> None:
    """Return when something has changed and it is quiet again, or patience is at its end."""
    select.select([bell], [], [], patience)
    deadline = time.monotonic() + STORM_SECONDS
    while silence(bell):
        if time.monotonic() > deadline:
            time.sleep(min(worked * STORM_REST, LONGEST_REST))
            return
        time.sleep(QUIET_SECONDS)


class Fight:
    """Notices when somebody keeps undoing what we do, and slows us down."""

    def __init__(self) -> None:
        self.made: dict[str, float] = {}  # by command: when we did it last
        self.repeats: list[float] = []  # when we had to do something again, as far as it counts
        self.rounds = 0  # of the fight that is on

    def note(self, done: list[Step]) -> None:
        now = time.monotonic()
        if not self.is_on(now):
            self.rounds = 0
        if any(" del " in step.do for step in done):
            # A link went down, say, and the kernel has emptied the device's table. When it is up
            # again, nobody has undone anything.
            self.made.clear()
        # The clock begins at the boot, so that 0 would be a moment ago there.
        again = [step for step in done if now - self.made.get(step.do, -math.inf) < FIGHT_SECONDS]
        if again:
            self.repeats = [when for when in self.repeats if now - when < FIGHT_SECONDS]
            self.repeats.append(now)
            if self.rounds or len(self.repeats) >= FIGHT_REPEATS:
                self.rounds += 1
            if self.rounds == 1:
                command = f"ip -{again[0].family} {again[0].do}"
                say(f"another program keeps undoing `{command}`; from now on repaired less often")
        self.made.update({step.do: now for step in done})

    def is_on(self, now: float) -> bool:
        return self.rounds > 0 and now - self.repeats[-1] <= FIGHT_SECONDS

    def pause(self) -> float:
        if not self.is_on(time.monotonic()):
            return 0.0
        return float(min(2 ** (self.rounds - 1), SLOWEST_FIGHT))


# --- the command line ---


USAGE = """\
add_routes.py [-d DEVICE] [-g GATEWAY] [-n NETWORK] [-t TABLE] [-r] [--default]
                     [--dry-run] [-v]
       add_routes.py --watch [-d PATTERN]... [--default DEVICE] [--dry-run] [-v]"""


def gateway(text: str) -> IPAddress:
    """What -g takes. `ip` does not read an address with its interface, such as fe80::1%ens6."""
    if "%" in text:
        raise ValueError
    return ipaddress.ip_address(text)


def network(text: str) -> Network:
    """What -n takes; argparse says "invalid network value" for a ValueError."""
    found = ipaddress.ip_network(text)
    if "/" not in text or not 0 < found.prefixlen < found.max_prefixlen - 1:
        raise ValueError
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    description, examples, rest = (__doc__ or "").partition("Examples:\n")
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=USAGE,
        description=description,
        epilog=examples + rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-d", "--device", action="append", default=[],
        help="device, else ifupdown's $IFACE; with --watch a pattern, such as 'ens*'")  # fmt: skip
    add("-g", "--gateway", type=gateway,
        help="its gateway (default: main's by this device, or its subnet's base + 1)")  # fmt: skip
    add("-n", "--network", type=network,
        help="its network (default: those of its addresses)")  # fmt: skip
    add("-t", "--table", default="",
        help="its table, name or number (default: 100+N for ethN, or a free one)")  # fmt: skip
    add("-r", "--remove", action="store_true", help="remove what belongs to the device")
    add("--default", nargs="?", const=True,
        help="for packets without a source address, and forwarded ones, too")  # fmt: skip
    add("--watch", action="store_true", help="serve all hardware devices for ever")
    add("--dry-run", action="store_true", help="print the commands of `ip`, and change nothing")
    add("-v", "--verbose", action="store_true", help="print each command of `ip` that is run")
    options = parser.parse_args(argv)
    if options.watch:
        if options.default is True:
            parser.error("--watch --default names no device; expected --default DEVICE")
        if options.gateway or options.network or options.table or options.remove:
            parser.error("--watch takes none of -g, -n, -t and -r")
        return options
    if not options.device and os.environ.get("IFACE"):
        options.device = [os.environ["IFACE"]]
    if len(options.device) != 1:
        parser.error(f"{len(options.device) or 'no'} device(s); expected -d DEVICE, or $IFACE")
    if options.default not in (None, True):
        parser.error(f"--default {options.default}; expected a device there only with --watch")
    return options


def read_wish(options: argparse.Namespace) -> Wish:
    """Raises Failure."""
    if options.watch:
        default = options.default or ""
        if default:
            check_name(default, "device", LONGEST_DEVICE)
        patterns = tuple(options.device)
        return Wish(patterns=patterns, hardware=not patterns, default=default)
    name, _, alias = options.device[0].partition(":")
    check_name(name, "device", LONGEST_DEVICE)
    if options.table:
        check_name(options.table, "table", LONGEST_TABLE)
    if options.remove:
        return Wish(remove=options.device[0] if alias else name)
    return Wish(
        device=name,
        default=name if options.default else "",
        gateway=options.gateway,
        network=options.network,
        table=options.table,
        is_hook=os.environ.get("IFACE", "").partition(":")[0] == name,
    )


def check_name(name: str, what: str, longest: int) -> None:
    if not NAME.fullmatch(name) or len(name) > longest:
        allowed = f'at most {longest} letters, digits, "_", "." or "-"'
        raise Failure(f"{name!r} is not a {what} name; expected {allowed}")


def say(text: str) -> None:
    write_line(f"{PROGRAM}: {text}")


def write_line(text: str) -> None:
    # Nobody needs to read it: a closed stderr must not end --watch, nor a run half-way.
    if sys.stderr:
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"{text}\n".encode("utf-8", "backslashreplace"))


def error_text(error: Failure | OSError) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.device in (["lo"], ["--all"]):  # `ifup -a` calls with the latter
        return 0
    try:
        wish = read_wish(options)
        if options.dry_run:
            rehearse(wish)
            sys.stdout.flush()
        elif options.watch:
            watch(wish, options.verbose)
        else:
            for complaint in serve(wish, options.verbose).complaints:
                say(complaint)
    except (Failure, OSError) as error:
        say(error_text(error))
        if options.dry_run:
            # Perhaps nobody reads stdout. Python would complain when it flushes that at the exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except Exception as error:
        if options.verbose:
            raise
        say(f"unexpected {type(error).__name__}: {error} (-v shows where)")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
