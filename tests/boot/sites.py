"""Where the hosts of the boot tests live, and how packets judge them."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lab import Lab, await_that, snippet
from lab.boot import Booted, boot
from lab.vm import Disk
from lab.vpc import Host, run

# Addresses of each family.
ENIS = ("10.0.1.22", "2001:db8:0:1::22")
CLIENTS = ("10.0.2.50", "2001:db8:0:2::50")
NEIGHBOURS = ("10.0.1.60", "2001:db8:0:1::60")
PRIMARY = ("10.0.1.10", "2001:db8:0:1::10")  # of the first host that boots
ENI, CLIENT, NEIGHBOUR = ENIS[0], CLIENTS[0], NEIGHBOURS[0]
SPARE = ("10.0.1.11", "2001:db8:0:1::11")  # of one that waits for the ENI
SECOND = "10.0.1.23"  # of another ENI
PACE = 0.2  # seconds between two pings of the client
# README's files of a NAT instance that runs add_routes.service, with a unit that needs the ENI.
NAT_FILES = {
    path: snippet(f"# {path}")
    for path in (
        "/etc/nftables.conf",
        "/etc/systemd/system/add_routes.service.d/default.conf",
        "/etc/systemd/system/pages.service",
    )
} | {"/etc/sysctl.d/nat.conf": "net.ipv4.ip_forward=1\n"}
ENABLE_NAT = "systemctl enable nftables pages.service"
DETACH_PATH = "/etc/systemd/system/eni.service.d/detach.conf"


class Pair(NamedTuple):
    """Who talks with whom: another host, by that address, and an address of the machine."""

    host: Host
    other: str
    address: str


class Site:
    """The lab with a client in another subnet and a neighbour in the instances' own.

    With ipv6, each has an address of that family, too.
    """

    def __init__(self, lab: Lab, directory: Path, ipv6: bool = False) -> None:
        self.lab, self.directory = lab, directory
        self.families = (0, 1) if ipv6 else (0,)  # indexes of the pairs above
        self.subnet = lab.add_subnet("10.0.1.0/24", cidr6="2001:db8:0:1::/64" if ipv6 else None)
        lab.add_subnet("10.0.2.0/24", cidr6="2001:db8:0:2::/64" if ipv6 else None)
        tags = {"FQDN": "web.example.com"}
        eni = self.own(ENIS)
        self.eni = lab.aws.create_eni(self.subnet, name="web", ip=ENI, ipv6=eni[1:], tags=tags)
        self.client = lab.add_host("client", *self.own(CLIENTS))
        self.neighbour = lab.add_host("neighbour", *self.own(NEIGHBOURS))
        # A private subnet, whose route table has the ENI as its default route, as EC2's can.
        lab.add_subnet("10.0.3.0/24")
        self.private = lab.add_host("private", "10.0.3.70")
        run("ip", "rule", "add", "iif", lab.vpc.bridge_of("10.0.3.1")[0], "lookup", "77")
        # On EC2 the VPC answers ARP, here the guest does: it may be starved for a while, and with
        # the kernel's three tries, one a second, it would be "unreachable" then.
        bridge = lab.vpc.bridge_of(ENI)[0]
        for family in ("ipv4", "ipv6"):
            neighbours = f"/proc/sys/net/{family}/neigh"
            Path(neighbours, bridge, "mcast_solicit").write_text("60")
            script = f"echo 60 >{neighbours}/eth0/mcast_solicit"
            run(*self.neighbour.command("sh", "-c", script))

    def own(self, pair: tuple[str, str]) -> list[str]:
        """Of a pair, the addresses of the families that there are here."""
        return [pair[family] for family in self.families]

    def boot(self, disk: Disk, **options: Any) -> Booted:
        return boot(self.lab, self.subnet, disk, self.directory, group="web", **options)

    def kill(self, machine: Booted) -> None:
        """Its power goes off; the group ends the instance, which takes long."""
        machine.vm.power_off()
        self.lab.aws.shutdown_delay = 600
        self.lab.aws.terminate(machine.instance)

    def add_detach_drop_in(self, machine: Booted) -> None:
        """From now on, eni.service gives the ENI back when it is stopped."""
        machine.write(DETACH_PATH, snippet(f"# {DETACH_PATH}"))
        machine.sh("systemctl daemon-reload")

    def await_active(self, machine: Booted) -> tuple[float, float]:
        """Wait until the ENI's address answers and eni.service is active; when each was.

        The client asks first, for each look into the guest slows its emulated processor.
        """
        machine.await_that(lambda: self.pings(self.client, ENI, 1))
        answered = machine.past()
        machine.await_sh("systemctl is-active eni.service", lambda s: s == "active")
        return answered, machine.past()

    def holder(self) -> str | None:
        model = self.lab.aws.eni(self.eni)
        return str(model.instance.id) if model.attachment_id else None

    def attaches(self) -> int:
        calls = [call.action for call in self.lab.aws.calls if call.status == 200]
        return calls.count("AttachNetworkInterface")

    def check(self, machine: Booted) -> None:
        """Both addresses are reached from both places, and the state file tells of it.

        The unit is active once the address is up; ifupdown calls add_routes.py just after.
        """
        for family in self.families:
            machine.await_that(partial(self.pings, self.client, ENIS[family], 1))
        self.check_pairs(machine, list(self.pairs(machine)))
        keys = [line.split("=")[0] for line in machine.sh("cat /etc/default/eni").splitlines()]
        assert " ".join(keys) == "FQDN IP GW DEVICE ASG_NAME INSTANCE_ID ENI_ID ATTACHMENT_ID"
        assert machine.sh(". /etc/default/eni; echo $IP $INSTANCE_ID").split() == [
            ENI,
            machine.instance.id,
        ]

    def check_pairs(self, machine: Booted, pairs: Sequence[Pair]) -> None:
        """The machine is reached, and calls."""
        for host, _, address in pairs:
            told = host.run("ping", "-c1", "-W60", address).stdout
            assert " 0% packet loss" in told, f"{host.name} does not reach {address}: {told}"
        assert self.seen(machine, pairs) == [pair.address for pair in pairs]

    def check_journal(self, machine: Booted, units: str, attached: str, most: int) -> None:
        """The units have told of the ENI, in few lines: at most so many for a try of eni.service.

        A slow guest tells more often that it waits, and may need more than one try.
        """
        journal = machine.sh(f"journalctl --no-pager --boot {units} --output cat")
        assert f"attached {self.eni} {attached}\n" in journal
        tries = len(re.findall("^Starting .*Attach the ENI", journal, re.M))
        lines = [line for line in journal.splitlines() if "eni_ctl.py: waiting, " not in line]
        assert len(lines) <= most * tries, journal

    def await_both(self, machine: Booted) -> None:
        """Wait until both addresses are reached, and call: after a restart of the network."""
        pairs = list(self.pairs(machine))
        for host, _, address in pairs:
            machine.await_that(partial(self.pings, host, address, 1))
        own = [pair.address for pair in pairs]
        machine.await_that(lambda: self.seen(machine, pairs) == own)

    def pairs(self, machine: Booted) -> Iterator[Pair]:
        """Both addresses with both other hosts, in each family."""
        for family in self.families:
            for host, own in ((self.client, CLIENTS), (self.neighbour, NEIGHBOURS)):
                for address in (machine.addresses[family], ENIS[family]):
                    yield Pair(host, own[family], address)

    def seen(self, machine: Booted, pairs: Iterable[Pair]) -> list[str]:
        """From which addresses the machine's calls come, as the others see it."""
        return machine.ask_each((pair.other, pair.address) for pair in pairs)

    def check_forwarding(self) -> None:
        """What a host in the private subnet asks for goes out by the ENI, under its address."""
        self.lab.vpc.set_source_check(self.lab.aws.eni(self.eni).mac_address, False)
        run("ip", "route", "replace", "default", "via", ENI, "table", "77")
        await_that(lambda: self.private.ask(CLIENT) == ENI, 600)

    def check_a_second_eni(self, machine: Booted) -> None:
        """An ENI of another name comes and goes by hand, and the first one works all the time."""
        eni = self.lab.aws.create_eni(self.subnet, name="vpn", ip=SECOND)
        machine.sh("eni_ctl.py -a -n vpn -o /run/vpn")
        machine.await_that(lambda: self.pings(self.client, SECOND, 1))
        machine.await_that(lambda: self.calls(machine, SECOND, CLIENT))
        self.check(machine)
        self.check_main(machine)
        machine.sh("eni_ctl.py -d -n vpn -o /run/vpn")
        assert self.lab.aws.eni(eni).mac_address not in machine.sh("ip link")
        self.check(machine)

    def check_without(self, machine: Booted) -> None:
        """Device, rules and table of the ENI are gone, the state file says so, the primary
        interface works."""
        assert self.lab.aws.eni(self.eni).mac_address not in machine.sh("ip link")
        shown = "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all"
        machine.await_sh(shown, lambda s: not any(address in s for address in ENIS))
        assert machine.sh(". /etc/default/eni; echo $DEVICE $ATTACHMENT_ID") == "null null\n"
        primary = [pair for pair in self.pairs(machine) if pair.address in machine.addresses]
        self.check_pairs(machine, primary)

    def check_main(self, machine: Booted) -> None:
        """Main's best default route of each family is the primary interface's; names resolve."""
        primary = machine.sh(f"grep -l {machine.instance.mac} /sys/class/net/*/address").split("/")
        for family in ("-4", "-6"):
            routes = machine.sh(f"ip -oneline {family} route show default").splitlines()
            best = min(routes, key=metric)
            assert f"dev {primary[4]} " in f"{best} ", routes
        assert machine.sh("getent ahostsv4 ec2.us-west-1.amazonaws.com")

    def pings_lost(self, machine: Booted, command: str) -> int:
        """What it costs when an administrator changes the network by that command: how many pings
        to the ENI were in vain until both addresses are reached again, at one every PACE."""
        ping = self.client.popen("ping", "-i", str(PACE), ENI)
        try:
            machine.sh(command)
            self.await_both(machine)
        finally:
            ping.send_signal(signal.SIGINT)  # it ends with a summary
            told, _ = ping.communicate()
        sent, received = re.findall(r"(\d+) (?:packets transmitted|received)", told)
        return int(sent) - int(received)

    def calls(self, machine: Booted, address: str, other: str) -> bool:
        """Whether the other host sees what the machine sends from the address as coming from it."""
        return machine.ask_each([(other, address)]) == [address]

    def await_ssh(self, machine: Booted) -> float:
        """Wait until the primary address greets the client as an SSH server does; when it did."""
        script = (
            "import socket, sys\n"
            "with socket.create_connection((sys.argv[1], 22), timeout=60) as server:\n"
            "    print(server.recv(80).decode())"
        )
        command = ["/usr/bin/python3", "-I", "-c", script, machine.addresses[0]]
        machine.await_that(lambda: self.client.run(*command).stdout.startswith("SSH-"))
        return machine.past()

    def fetches(self, address: str) -> bool:
        """Whether the client gets a web page from there."""
        script = "import sys, urllib.request as u; u.urlopen(f'http://{sys.argv[1]}/', timeout=60)"
        return self.client.run("/usr/bin/python3", "-I", "-c", script, address).returncode == 0

    def pings(self, host: Host, address: str, patience: int = 60) -> bool:
        return host.run("ping", "-c1", f"-W{patience}", address).returncode == 0


def metric(route: str) -> int:
    """Of a line of `ip route`: the less, the better. It is not said where it is 0."""
    found = re.search(r"metric (\d+)", route)
    return int(found[1]) if found else 0
