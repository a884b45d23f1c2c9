"""A VPC on one machine: subnets, their router, hosts in namespaces, and the source check.

The current network namespace is the router: it has the first address of each subnet and
fe80:ec2::1, the addresses of IMDS, of AWS's API endpoints and of a web server. A subnet is a
bridge. A host is a network and a mount namespace of its own, joined to bridges by veth pairs whose
inner ends have the MAC addresses of its network interfaces. What a VPC does that a plain network
does not: a frame whose source (IPv4, ARP or IPv6) is not an address of the interface it comes from
is dropped, here by nftables on each bridge port. And its router redirects nobody.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

ENDPOINT = "203.0.113.10"  # AWS's API; RFC 5737's documentation network
ENDPOINT6 = "2001:db8:ffff::10"  # and RFC 3849's
MIRROR, MIRROR_NAME = "203.0.113.20", "mirror.example.com"  # a web server of the user's own
IMDS = ("169.254.169.254", "fd00:ec2::254")
V6_ROUTER = "fe80:ec2::1"
RESOLVER = "10.0.0.2"  # the VPC's second address; DHCP tells of it
# In a tmpfs, mounted by tests/lab/setup.sh over a directory that each Debian host has.
WORK = Path("/mnt/lab")
LEASES = WORK / "leases"
PROBE = Path(__file__).with_name("probe.py")
# Seconds for what ends by itself, however busy this machine is: more than the 300 that eni_ctl.py
# gives itself. What a test is about has bounds of its own.
OUTER_LIMIT = 400.0
# How long DHCP's leases hold: longer than any test. A dnsmasq that was started again (see unplug)
# refuses to renew those of the one before, and the client then gives its address up for a while.
LEASE = "12h"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

SOURCE_CHECK = """
table bridge vpc {
    set port4 { type ifname . ether_addr . ipv4_addr; }
    set port6 { type ifname . ether_addr . ipv6_addr; }
    set unchecked { type ifname; }
    chain source_check {
        type filter hook prerouting priority filter; policy drop;
        iifname @unchecked ether type != arp accept
        iifname @unchecked arp operation request accept comment "but the VPC knows who is where"
        iifname . ether saddr . arp saddr ip @port4 accept
        iifname . ether saddr . ip saddr @port4 accept
        iifname . ether saddr . ip6 saddr @port6 accept
        arp saddr ip 0.0.0.0 accept comment "address probe"
        ip saddr 0.0.0.0 udp sport 68 accept comment "DHCP"
        ip6 saddr { ::, fe80::/10 } accept
        counter name dropped
    }
    chain router {
        type filter hook output priority filter;
        icmp type redirect drop comment "a host that believed one would go on sending there"
        icmpv6 type nd-redirect drop
    }
    counter dropped { }
}
"""

# What a host needs of its own: a root home without the developer's settings, its own /run, and
# /etc, /usr/local and /var/lib to write to, on top of this machine's. Of /etc, it has neither this
# machine's defaults nor its routing tables. Where the lab's root is an ordinary user, only
# directories made here are its own: those that are written to.
HOST = """
set -e
cd "$1"
for dir in etc/default etc/network etc/iproute2/rt_tables.d usr/local/sbin var/lib/dhcp; do
    mkdir -p "upper/$dir"
done
for dir in etc usr/local var/lib; do
    mkdir -p "work/$dir"
    mount -t overlay lab -o "lowerdir=/$dir,upperdir=$1/upper/$dir,workdir=$1/work/$dir" "/$dir"
done
for dir in /etc/default /etc/iproute2/rt_tables.d /run /root; do
    mount -t tmpfs -o mode=755 lab $dir
done
mount -t sysfs sysfs /sys
printf %s "$2" > /run/this-host
ip link set lo up
echo up
exec sleep infinity
"""


def run(*command: str, stdin: str = "") -> str:
    """What the command prints. Raises RuntimeError with its error text."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=OUTER_LIMIT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()} {stdin.strip()}")
    return done.stdout


class Host:
    """A machine in the VPC: its own network, mounts and files; programs are those of this one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.root = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=WORK))
        self.environment = {"PATH": PATH}
        self.init = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", HOST, "sh", str(self.root), name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.init.stdout
        if self.init.stdout.readline() != "up\n":
            raise RuntimeError(f"the namespaces of host {name} could not be made")
        network = f"/proc/{self.init.pid}/ns/net"
        self.network = os.readlink(network)
        # As long as it is open, no other host's gets the number that this one is known by.
        self.network_file = os.open(network, os.O_RDONLY)
        # What is written to the host must not go elsewhere, by whatever mistake in its mounts.
        if run(*self.command("cat", "/run/this-host")) != name:
            raise RuntimeError(f"host {name} has no files of its own")

    def command(self, *command: str) -> list[str]:
        """The command line that runs a command on this host."""
        enter = ["nsenter", "--target", str(self.init.pid), "--net", "--mount", "--wd=/", "--"]
        return [*enter, *command]

    def popen(
        self, *command: str, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command on this host, in an environment as bare as at boot."""
        return subprocess.Popen(
            self.command(*command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.environment, **(environment or {})},
        )

    def run(
        self, *command: str, environment: dict[str, str] | None = None, timeout: float = OUTER_LIMIT
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host to its end; its exit code is the caller's business."""
        process = self.popen(*command, environment=environment)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{command} on {self.name} hangs: {out}{err}") from None
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def ip(self, *arguments: str) -> str:
        return run(*self.command("ip", *arguments))

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Put a new file on this host: those of this machine may not be ours to write to."""
        script = 'mkdir -p "${1%/*}"; rm -f "$1" 2>&1; cat > "$1" && chmod "$2" "$1"'
        run(*self.command("sh", "-c", script), "sh", path, f"{mode:o}", stdin=text)

    def read(self, path: str) -> str:
        return run(*self.command("cat", path))

    def exists(self, path: str) -> bool:
        return self.run("test", "-e", path).returncode == 0

    def devices(self) -> list[str]:
        """Its network devices, but lo."""
        return sorted(set(run(*self.command("ls", "/sys/class/net")).split()) - {"lo"})

    def serve(self) -> None:
        """Answer the probes of other hosts (tests/lab/probe.py)."""
        server = self.popen("/usr/bin/python3", str(PROBE), "serve")
        assert server.stdout
        assert server.stdout.readline() == "ready\n"

    def ask(self, address: str, source: str | None = None) -> str:
        """Our address as the host at address sees it; empty where no connection comes about."""
        bound = [source] if source else []
        return self.run("/usr/bin/python3", str(PROBE), "ask", address, *bound).stdout.strip()

    def processes(self) -> list[int]:
        """All that runs on it: what is in its network namespace."""
        found = []
        for process in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it ended while we looked, or is just ending
                if os.readlink(f"/proc/{process}/ns/net") == self.network:
                    found.append(int(process))
        return found

    def stop(self) -> None:
        """Power off. To do so again changes nothing."""
        if self.init.returncode is not None:
            return
        while processes := self.processes():  # one may have started another meanwhile
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.01)  # until the kernel has ended them
        os.close(self.network_file)
        self.init.communicate()


class Vpc:
    """The router, its subnets, and what is plugged into them."""

    def __init__(self) -> None:
        self.bridges: dict[ipaddress.IPv4Network, str] = {}
        self.prefixes6: dict[str, ipaddress.IPv6Network] = {}
        self.ports: dict[str, str] = {}  # MAC address of the inner end: name of the outer end
        self.count = 0
        self.leases: dict[str, str] = {}  # MAC address: dnsmasq's line
        self.dnsmasq: subprocess.Popen[str] | None = None
        self.names: Sequence[str] = ()  # that its resolver knows
        self.dnsmasq_log: deque[str] = deque(maxlen=200)  # its last lines
        self.lock = threading.RLock()  # a plug comes from a thread of the simulated AWS
        own = (f"{ENDPOINT}/32", f"{MIRROR}/32", f"{IMDS[0]}/32", f"{RESOLVER}/32")
        addresses = [f"addr add {address} dev lo" for address in own]
        own6 = (f"{ENDPOINT6}/128", f"{IMDS[1]}/128")
        addresses += [f"addr add {address} dev lo nodad" for address in own6]
        addresses.append("link set lo up")
        run("ip", "-batch", "-", stdin="\n".join(addresses))
        for switch in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            Path("/proc/sys/net", switch).write_text("1")
        run("nft", "-f", "-", stdin=SOURCE_CHECK)

    def add_subnet(self, cidr: str, cidr6: str | None = None) -> None:
        """A subnet of the VPC; its router has the first address."""
        network = ipaddress.IPv4Network(cidr)
        bridge = self.bridges[network] = f"subnet{len(self.bridges)}"
        # A fixed MAC address: a bridge's own changes with its ports, and ARP caches go stale.
        lines = [
            f"link add {bridge} address 0e:00:00:00:00:{len(self.bridges):02x} type bridge",
            # One link-local address, or advertisements would come from either.
            f"link set {bridge} addrgenmode none up",
            f"addr add {network[1]}/{network.prefixlen} dev {bridge}",
            f"addr add {V6_ROUTER}/10 dev {bridge} nodad",  # reaches all of fe80::/10
        ]
        if cidr6:
            self.prefixes6[bridge] = network6 = ipaddress.IPv6Network(cidr6)
            lines.append(f"addr add {network6[1]}/{network6.prefixlen} dev {bridge} nodad")
        run("ip", "-batch", "-", stdin="\n".join(lines))

    def bridge_of(self, address: str) -> tuple[str, int]:
        """The bridge and prefix length of the subnet that an address is in."""
        for network, bridge in self.bridges.items():
            if ipaddress.ip_address(address) in network:
                return bridge, network.prefixlen
        for bridge, network6 in self.prefixes6.items():
            if ipaddress.ip_address(address) in network6:
                return bridge, network6.prefixlen
        raise ValueError(f"{address} is in no subnet of {self.bridges}")

    def open_port(self, mac: str, addresses: Iterable[str], link: str) -> str:
        """The subnet's end of a network interface with these addresses, made by the `ip` command
        line link, in which PORT stands for its name."""
        owned = list(addresses)
        with self.lock:
            self.count += 1
            port = self.ports[mac] = f"port{self.count}"
        self.own(mac, *owned)
        self.lease(mac, owned)
        bridge, _ = self.bridge_of(owned[0])
        lines = [link.replace("PORT", port), f"link set {port} master {bridge} up"]
        run("ip", "-batch", "-", stdin="\n".join(lines))
        return port

    def own(self, mac: str, *addresses: str) -> None:
        """The interface may send from these addresses, too."""
        self.change_owned("add", mac, addresses)

    def disown(self, mac: str, *addresses: str) -> None:
        """It may no longer."""
        self.change_owned("delete", mac, addresses)

    def change_owned(self, verb: str, mac: str, addresses: Sequence[str]) -> None:
        lines = []
        for address in addresses:
            ports = "port6" if ":" in address else "port4"
            item = f"{self.ports[mac]} . {mac} . {address}"
            lines.append(f"{verb} element bridge vpc {ports} {{ {item} }}")
        run("nft", "-f", "-", stdin="\n".join(lines))

    def plug(self, host: Host, device: str, mac: str, addresses: Iterable[str]) -> None:
        """A network interface with these addresses appears on the host as a device, still down."""
        inner = f"name {device} address {mac} netns {host.init.pid}"
        self.open_port(mac, addresses, f"link add PORT type veth peer {inner}")

    def open_tap(self, mac: str, addresses: Iterable[str]) -> str:
        """The tap for a virtual machine's NIC with these addresses."""
        return self.open_port(mac, addresses, "tuntap add PORT mode tap")

    def unplug(self, mac: str) -> None:
        """The network interface goes, and its device with it. No matter if its host went first."""
        with self.lock:
            port = self.ports.pop(mac, None)
        if self.dnsmasq and "[" in self.leases.get(mac, ""):
            # In a VPC, an IPv6 address is that of the interface. dnsmasq keeps it for the DHCPv6
            # client that had it, which the interface's next host is not; it has to forget.
            with self.lock:
                self.stop_dhcp()
                self.start_dhcp(self.names)
        if port:
            done = subprocess.run(["ip", "link", "delete", port], capture_output=True, text=True)
            # It went before `ip` looked for it, or just after.
            gone = re.search("Cannot find device|No such device", done.stderr)
            if done.returncode and not gone:
                raise RuntimeError(f"ip link delete {port}: {done.stderr}")

    def lease(self, mac: str, addresses: Sequence[str]) -> None:
        """What DHCP gives to the interface: its primary address of each family."""
        v4 = [address for address in addresses if ":" not in address][:1]
        v6 = [f"[{address}]" for address in addresses if ":" in address][:1]
        with self.lock:
            self.leases[mac] = ",".join([mac, *v4, *v6, LEASE])
            if self.dnsmasq:
                LEASES.write_text("".join(f"{line}\n" for line in self.leases.values()))
                self.dnsmasq.send_signal(signal.SIGHUP)

    def start_dhcp(self, names: Sequence[str] = ()) -> None:
        """DHCPv4, router advertisements and DHCPv6 on all subnets that there are by now; and, where
        the API has names, the resolver, which knows no others."""
        self.names = names
        ranges = [f"--dhcp-range={n[0]},static,{n.netmask},{LEASE}" for n in self.bridges]
        for network6 in self.prefixes6.values():
            ranges.append(f"--dhcp-range={network6[0]},static,{network6.prefixlen},{LEASE}")
        LEASES.write_text("".join(f"{line}\n" for line in self.leases.values()))
        files = ["--conf-file=/dev/null", f"--dhcp-hostsfile={LEASES}", "--leasefile-ro"]
        files.append(f"--pid-file={WORK}/dnsmasq.pid")
        dns = ["--port=0"]
        if names:
            dns = [f"--dhcp-option=option:dns-server,{RESOLVER}", "--no-resolv", "--no-hosts"]
            dns += [f"--address=/{name}/{ENDPOINT}" for name in names]
            dns.append(f"--address=/{MIRROR_NAME}/{MIRROR}")
        # As who we are: another user could not read our file, and there may be no other.
        plain = ["--user=", "--group=", "--no-ping", "--enable-ra", "--log-dhcp"]
        command = ["dnsmasq", "--keep-in-foreground", "--log-facility=-"]
        with self.lock:
            while said := self.start_dnsmasq([*command, *plain, *dns, *files, *ranges]):
                # It has looked at a port that went meanwhile, which ends it.
                if "No such device" not in said:
                    raise RuntimeError(f"dnsmasq ended: {said}")

    def start_dnsmasq(self, command: Sequence[str]) -> str:
        """Start it, and wait until it has read the leases. If it ended before: what it said."""
        self.dnsmasq = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        assert self.dnsmasq.stderr
        said = ""
        for line in self.dnsmasq.stderr:
            said += line
            if f"read {LEASES}" in line:
                follow = partial(self.dnsmasq_log.extend, self.dnsmasq.stderr)
                threading.Thread(target=follow, daemon=True).start()
                return ""
        status = self.dnsmasq.wait()
        self.dnsmasq = None
        return f"{said.strip()} (exit status {status})"

    def stop_dhcp(self) -> None:
        """DHCP is out of order."""
        with self.lock:
            if self.dnsmasq:
                self.dnsmasq.kill()
                self.dnsmasq.wait()
                self.dnsmasq = None

    def account(self) -> str:
        """For a test that fails: what went through each port, and what DHCP did."""
        dhcp = "".join(self.dnsmasq_log)
        return run("ip", "-statistics", "link") + run("nft", "list", "counters") + dhcp

    def set_source_check(self, mac: str, on: bool) -> None:
        """The interface's source/destination check, which a NAT instance switches off."""
        verb = "delete" if on else "add"
        run("nft", f"{verb} element bridge vpc unchecked {{ {self.ports[mac]} }}")

    def configure(self, host: Host, device: str, addresses: Sequence[str]) -> None:
        """Bring a device up with its addresses, as a network set-up on the host would."""
        lines = [f"link set {device} up"]
        for address in addresses:
            _, prefix = self.bridge_of(address)
            lines.append(f"addr add {address}/{prefix} dev {device}")
            lines[-1] += " nodad" if ":" in address else ""
        run(*host.command("ip", "-batch", "-"), stdin="\n".join(lines))

    def add_default_route(self, host: Host, device: str, address: str) -> None:
        host.ip("route", "add", "default", "via", self.router_of(address), "dev", device)

    def router_of(self, address: str) -> str:
        """The router's address in the subnet that an IPv4 address is in."""
        _, prefix = self.bridge_of(address)
        return str(ipaddress.ip_interface(f"{address}/{prefix}").network[1])

    def close(self) -> None:
        """Take the router's own devices and addresses away, so that another Vpc can be made."""
        with contextlib.ExitStack() as last_first:  # all of it, even if some of it fails
            last_first.callback(run, "nft", "delete table bridge vpc")
            last_first.callback(run, "ip", "addr", "flush", "dev", "lo")
            for bridge in self.bridges.values():
                last_first.callback(run, "ip", "link", "delete", bridge)
            for mac in list(self.ports):
                last_first.callback(self.unplug, mac)
            last_first.callback(self.stop_dhcp)


def in_lab() -> bool:
    """Whether this process runs in the namespaces that tests/lab/setup.sh makes."""
    return os.path.ismount(WORK) and os.environ.get("ENI_LAB") == "inside"
