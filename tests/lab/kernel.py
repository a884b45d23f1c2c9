"""A host's network namespace, with its own kernel state and nobody behind its devices."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lab import await_that
from lab.vpc import OUTER_LIMIT

SCRIPT = str(Path(__file__).parents[2] / "add_routes.py")
# Its own network, its own /run and no rt_tables.d, until it ends.
NAMESPACE = """
mount --make-rprivate / && mount -t tmpfs run /run && mount -t tmpfs etc /etc/iproute2 &&
printf '255 local\\n254 main\\n253 default\\n' > /etc/iproute2/rt_tables && ip link set lo up &&
echo ready && exec sleep infinity
"""
# Stands before the real `ip`, counts its runs, and at one of them does something else.
FAKE_IP = """#!/bin/sh
echo >> "$CALLS"
if [ $(wc -l < "$CALLS") = "$AT" ]; then {action}; fi
exec {ip} "$@"
"""


class Kernel:
    """A host's network namespace."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-ec", NAMESPACE],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "-t", str(self.process.pid), "-n", "-m", *words]

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=OUTER_LIMIT,
            check=False,
        )

    def sh(self, script: str) -> str:
        done = self.run("sh", "-ec", script)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, words: str) -> Any:
        return json.loads(self.sh(f"ip -N -json {words}") or "[]")

    def add_routes(self, arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(SCRIPT, *arguments.split(), **environment)

    def serve(self, *calls: str) -> None:
        for arguments in calls:
            done = self.add_routes(arguments)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def add_device(self, device: str, *addresses: str) -> None:
        """A veth whose other end is up too; no duplicate address detection, to save its second.

        The kernel needs a moment all the same until IPv6 addresses have their routes.
        """
        self.sh(f"ip link add {device} type veth peer name {device}p")
        conf = "/proc/sys/net/ipv6/conf"
        self.sh(f"echo 0 > {conf}/{device}/accept_dad; echo 1 > {conf}/{device}p/disable_ipv6")
        self.sh(f"ip link set {device}p up; ip link set {device} up")
        for address in addresses:
            self.sh(f"ip address add {address} dev {device}")
        own = [ipaddress.ip_interface(address).ip for address in addresses]
        await_that(lambda: self.has_ipv6_routes(device, [ip for ip in own if ip.version == 6]))

    def has_ipv6_routes(self, device: str, addresses: Iterable[ipaddress.IPv6Address]) -> bool:
        if self.sh(f"ip -6 address show dev {device} tentative"):
            return False
        routes = self.sh(f"ip -6 route show table local dev {device}")
        expected = ["multicast ff00::/8 ", "local fe80::", *(f"local {ip} " for ip in addresses)]
        return all(route in routes for route in expected)

    def state(self) -> list[str]:
        """Rules and routes, as `ip` lists them, and each device's interface group.

        Of a device only that, because the kernel notices a lost carrier some time later.
        """
        words = ["ip -N -4 -d rule", "ip -N -6 -d rule", "ip -N -4 -d route show table all"]
        words += ["ip -N -6 -d route show table all"]
        lines = "".join(self.sh(line) for line in words).splitlines()
        links = json.loads(self.sh("ip -json link"))
        return sorted([*lines, *(f"{link['ifname']} group {link['group']}" for link in links)])

    def rules(self) -> list[str]:
        """What is ours of both families, without pref and protocol."""
        lines = (self.sh("ip -N -4 rule") + self.sh("ip -N -6 rule")).splitlines()
        ours = [line.removesuffix(" proto 77") for line in lines if line.endswith(" proto 77")]
        return [line.replace("\t", " ") for line in ours]

    def table(self, number: int, family: int = 4) -> list[str]:
        """The table's routes that are ours."""
        lines = self.sh(f"ip -N -{family} route show table {number} proto 77").splitlines()
        return [line.strip() for line in lines]

    def device_to(self, destination: str, source: str = "", more: str = "") -> str:
        """The device by which the kernel would send; `ip route get` judges."""
        words = f"route get {destination} {f'from {source}' if source else ''} {more}"
        found = self.json(f"{'-6 ' if ':' in destination else ''}{words}")
        return str(found[0]["dev"])

    def fake_ip(self, action: str, at: int = 0) -> dict[str, str]:
        """The environment in which the run number `at` of `ip` is the action."""
        (self.directory / "calls").write_text("")
        real = shutil.which("ip")
        assert real is not None
        fake = self.directory / "ip"
        fake.write_text(FAKE_IP.format(ip=real, action=action))
        fake.chmod(0o755)
        path = f"{self.directory}:{os.environ['PATH']}"
        return {"PATH": path, "CALLS": str(self.directory / "calls"), "AT": str(at)}

    def calls(self) -> int:
        return len((self.directory / "calls").read_text().splitlines())
