"""add_routes.py, called by the real ifupdown as the README says, judged by packets.

The VPC drops what leaves by another interface than the one that owns its source address.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
from lab import Lab, Machine, await_that, nat_interfaces, snippet
from lab.vpc import OUTER_LIMIT, Host, run

INTERFACES = snippet("# /etc/network/interfaces")
INTERFACES6 = snippet("# IPv6, below in the same file")
NAT_INTERFACES = nat_interfaces()
NFTABLES = snippet("# /etc/nftables.conf")
ETH0, ETH0_6 = "10.0.1.10", "2001:db8:0:1::10"
CLIENT, CLIENT_6 = "10.0.2.50", "2001:db8:0:2::50"
NEIGHBOUR, NEIGHBOUR_6 = "10.0.1.60", "2001:db8:0:1::60"
# Where the ENI is: its subnet, its IPv4 and its IPv6 address.
SAME = ("10.0.1.0/24", "10.0.1.22", "2001:db8:0:1::22")
OTHER = ("10.0.3.0/24", "10.0.3.22", "2001:db8:0:3::22")
LARGE = ("10.0.16.0/20", "10.0.22.7", "2001:db8:0:4::22")
PLACES = pytest.mark.parametrize("place", [SAME, OTHER, LARGE], ids=["same", "other", "large"])


@dataclasses.dataclass
class World:
    """An instance, a neighbour in eth0's subnet, a client in another; subnets by CIDR."""

    lab: Lab
    machine: Machine
    client: Host
    neighbour: Host
    subnets: dict[str, str]

    def attach(
        self, place: tuple[str, str, str], index: int = 1, secondary: tuple[str, ...] = ()
    ) -> str:
        """Attach an ENI with the place's addresses and wait until the network is set up."""
        subnet, ip, ip6 = place
        eni = self.lab.aws.create_eni(
            self.subnets[subnet], name="web", ip=ip, ipv6=[ip6], secondary=secondary
        )
        self.machine.appeared.clear()
        self.lab.aws.attach(self.lab.aws.lab_eni(eni), self.machine.instance, index)
        assert self.machine.appeared.wait(OUTER_LIMIT)
        self.machine.await_network()
        return eni

    def routing(self) -> str:
        """All rules and routes of the instance."""
        return self.rules_and_routes() + self.machine.ip("-6", "route", "show", "table", "all")

    def rules_and_routes(self) -> str:
        """The same, but for IPv6 routes: routers advertise at times of their own."""
        ask = ["-4 -d rule", "-6 -d rule", "-4 route show table all"]
        return "".join(self.machine.ip(*words.split()) for words in ask)

    def main(self) -> str:
        return self.machine.ip("route") + self.machine.ip("-6", "route")

    def await_router(self, device: str) -> None:
        """Wait until a router has advertised itself there, and let add_routes.py know of it."""
        ask = ["-6", "route", "show", "default", "dev", device]
        await_that(lambda: self.machine.ip(*ask) != "")
        assert self.machine.run("add_routes.py", "-d", device).returncode == 0

    def answers(self, *own: str) -> list[str]:
        """What of the instance's addresses does not work, with client and neighbour, in and out."""
        wrong = []
        for peer in (self.client, self.neighbour):
            v4, v6 = (CLIENT, CLIENT_6) if peer is self.client else (NEIGHBOUR, NEIGHBOUR_6)
            for address in own:
                there = v6 if ":" in address else v4
                if peer.ask(address) != there:
                    wrong.append(f"{peer.name} -> {address}")
                if self.machine.ask(there, address) != address:
                    wrong.append(f"{address} -> {peer.name}")
        return wrong


@pytest.fixture
def make_world(lab: Lab) -> Callable[..., World]:
    def make(interfaces: str = INTERFACES) -> World:
        prefixes = {"10.0.1.0/24": 1, "10.0.2.0/24": 2, "10.0.3.0/24": 3, "10.0.16.0/20": 4}
        subnets = {
            cidr: lab.add_subnet(cidr, cidr6=f"2001:db8:0:{number}::/64")
            for cidr, number in prefixes.items()
        }
        machine = lab.launch(
            subnets["10.0.1.0/24"], interfaces, group="web", ip=ETH0, ipv6=[ETH0_6]
        )
        machine.serve()
        client = lab.add_host("client", CLIENT, CLIENT_6)
        neighbour = lab.add_host("neighbour", NEIGHBOUR, NEIGHBOUR_6)
        return World(lab, machine, client, neighbour, subnets)

    return make


def without_routes(interfaces: str) -> str:
    """The stanzas as they would be without add_routes.py."""
    lines = [line for line in interfaces.splitlines() if "add_routes" not in line]
    assert len(lines) < len(interfaces.splitlines())
    return "\n".join(lines) + "\n"


@PLACES
def test_both_addresses_answer_and_reach_out(
    make_world: Callable[..., World], place: tuple[str, str, str]
) -> None:
    world = make_world()
    main = world.main()
    world.attach(place)
    world.machine.run("ip", "route", "del", "default", "dev", "eth1")  # none: dhclient adds none
    assert world.answers(ETH0, place[1]) == []
    assert main.splitlines()[0] == world.main().splitlines()[0]


@PLACES
def test_without_add_routes_the_eni_is_of_no_use(
    make_world: Callable[..., World], place: tuple[str, str, str]
) -> None:
    world = make_world(without_routes(INTERFACES))
    world.attach(place)
    assert f"client -> {place[1]}" in world.answers(ETH0, place[1])


@PLACES
def test_both_ipv6_addresses_answer_and_reach_out(
    make_world: Callable[..., World], place: tuple[str, str, str]
) -> None:
    world = make_world(INTERFACES + INTERFACES6)
    world.attach(place)
    assert world.answers(ETH0, place[1], ETH0_6, place[2]) == []
    world.await_router("eth1")
    ask = ["-6", "route", "show", "default", "dev", "eth1", "table"]
    learnt, used = (gateways(world.machine.ip(*ask, table)) for table in ("main", "eth1"))
    assert len(used) == 1
    assert used <= learnt


def gateways(routes: str) -> set[str]:
    return set(re.findall(r"via (\S+)", routes))


def test_without_router_advertisements_the_vpcs_own_router_is_used(
    make_world: Callable[..., World],
) -> None:
    world = make_world(INTERFACES + INTERFACES6.replace("dhcp\n", "dhcp\n    accept_ra 0\n"))
    world.machine.ip("-6", "route", "replace", "default", "via", "fe80:ec2::1", "dev", "eth0")
    # Before ifupdown comes to the stanza, the one for IPv4 has brought the device up.
    world.machine.run("sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/default/accept_ra")
    world.attach(OTHER)
    assert "via" not in world.machine.ip("-6", "route", "show", "dev", "eth1")
    assert world.answers(ETH0_6, OTHER[2]) == []
    assert "via fe80:ec2::1 dev eth1" in world.machine.ip("-6", "route", "show", "table", "eth1")


def test_without_add_routes_the_enis_ipv6_is_of_no_use(make_world: Callable[..., World]) -> None:
    world = make_world(without_routes(INTERFACES + INTERFACES6))
    world.attach(OTHER)
    assert f"client -> {OTHER[2]}" in world.answers(OTHER[2])


def test_main_is_left_alone_and_further_runs_change_nothing(
    make_world: Callable[..., World],
) -> None:
    world = make_world(INTERFACES + INTERFACES6)
    world.attach(SAME)
    for device in ("eth0", "eth1"):
        world.await_router(device)
    routing = world.routing()
    for device in ("eth0", "eth1", "eth0"):
        done = world.machine.run("add_routes.py", "-d", device)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert strip_clocks(world.routing()) == strip_clocks(routing)
    main = strip_clocks(world.main())
    for device in ("eth0", "eth1"):
        assert world.machine.run("add_routes.py", "-d", device, "-r").returncode == 0
    assert strip_clocks(world.main()) == main
    assert world.machine.ip("rule").count("\n") == 3
    assert " 77 " not in world.machine.ip("-N", "route", "show", "table", "all")


def strip_clocks(text: str) -> str:
    """Without the seconds that a route from a router advertisement or DHCPv6 has left."""
    words = text.split(" ")
    return " ".join(
        word for number, word in enumerate(words) if number == 0 or words[number - 1] != "expires"
    )


@PLACES
def test_a_bridge_with_containers_is_reached_from_both_addresses(
    make_world: Callable[..., World], place: tuple[str, str, str]
) -> None:
    world = make_world()
    world.attach(place)
    container = Host("container")
    world.lab.hosts.append(container)
    machine = world.machine
    for line in (
        "link add br0 type bridge",
        "addr add 172.17.0.1/16 dev br0",
        f"link add c0 type veth peer name eth0 netns {container.init.pid}",
        "link set c0 master br0 up",
        "link set br0 up",
    ):
        machine.ip(*line.split())
    container.ip("addr", "add", "172.17.0.2/16", "dev", "eth0")
    container.ip("link", "set", "eth0", "up")
    container.ip("route", "add", "default", "via", "172.17.0.1")
    container.serve()
    for address in (ETH0, place[1]):
        assert machine.ask("172.17.0.2", address) == address
        assert container.ask(address) == "172.17.0.2"


def test_a_static_route_by_eth0_is_kept_for_eth0s_address_only(
    make_world: Callable[..., World],
) -> None:
    world = make_world()
    world.machine.ip("route", "add", "198.51.100.0/24", "via", NEIGHBOUR, "dev", "eth0")
    world.attach(OTHER)
    assert world.machine.run("add_routes.py", "-d", "eth0").returncode == 0
    for address, route in (
        (ETH0, f"via {NEIGHBOUR} dev eth0"),
        (OTHER[1], "via 10.0.3.1 dev eth1"),
    ):
        assert route in world.machine.ip("route", "get", "198.51.100.1", "from", address)


def test_all_addresses_of_an_eni_answer_and_cost_no_more_processes(
    make_world: Callable[..., World],
) -> None:
    world = make_world()
    addresses = [f"10.0.3.{100 + number}" for number in range(50)]
    world.attach(("10.0.3.0/24", addresses[0], OTHER[2]), secondary=tuple(addresses[1:]))
    wrapper = '#!/bin/sh\necho >> /run/count\nexec /usr/sbin/ip "$@"\n'
    world.machine.write("/usr/local/sbin/ip", wrapper, 0o755)

    def first_run() -> int:
        """How many programs it starts."""
        assert world.machine.run("add_routes.py", "-d", "eth1", "-r").returncode == 0
        world.machine.run("rm", "/run/count")
        assert world.machine.run("add_routes.py", "-d", "eth1").returncode == 0
        return world.machine.read("/run/count").count("\n")

    processes = first_run()
    assert 0 < processes < 9
    more = "\n".join(f"addr add {address}/24 dev eth1" for address in addresses[1:])
    run(*world.machine.command("/usr/sbin/ip", "-batch", "-"), stdin=more)
    assert first_run() == processes
    for address in addresses:
        assert world.client.ask(address) == CLIENT


def test_an_address_that_went_leaves_no_rule(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.attach(OTHER, secondary=("10.0.3.23", "10.0.3.24"))
    world.machine.ip("addr", "add", "10.0.3.23/24", "dev", "eth1")
    assert world.machine.run("add_routes.py", "-d", "eth1").returncode == 0
    assert "from 10.0.3.23 " in world.machine.ip("rule")
    world.machine.ip("addr", "del", "10.0.3.23/24", "dev", "eth1")
    world.machine.ip("addr", "add", "10.0.3.24/24", "dev", "eth1")
    assert world.machine.run("add_routes.py", "-d", "eth1").returncode == 0
    assert "from 10.0.3.23 " not in world.machine.ip("rule")
    assert world.client.ask("10.0.3.24") == CLIENT


@pytest.mark.parametrize("pulled", [False, True], ids=["ifdown", "pulled, then ifdown"])
def test_a_device_that_goes_leaves_nothing(make_world: Callable[..., World], pulled: bool) -> None:
    world = make_world(INTERFACES + INTERFACES6)
    before = world.rules_and_routes()
    eni = world.attach(SAME)
    assert "eth1" in world.routing()
    if pulled:
        world.lab.vpc.unplug(world.lab.aws.eni(eni).mac_address)
    world.machine.run("ifdown", "eth1")
    after = world.routing()
    assert "10.0.1.22" not in after
    assert world.machine.ip("rule", "show", "table", "101") == ""
    assert world.rules_and_routes() == before
    assert world.answers(ETH0) == []


def test_eth10_has_a_table_of_its_own(make_world: Callable[..., World]) -> None:
    world = make_world(INTERFACES + INTERFACES.split("\n\n")[2].replace("eth1", "eth10"))
    world.machine.device_names = ["eth1", "eth10"]
    world.attach(SAME)
    world.attach(OTHER, 2)
    assert world.answers(ETH0, SAME[1], OTHER[1]) == []
    assert "default via 10.0.3.1 dev eth10" in world.machine.ip("route", "show", "table", "110")


def test_devices_with_other_names_work(make_world: Callable[..., World]) -> None:
    world = make_world(INTERFACES + INTERFACES.split("\n\n")[2].replace("eth1", "enp0s6"))
    world.machine.device_names = ["enp0s6"]
    world.attach(SAME)
    assert world.answers(ETH0, SAME[1]) == []
    assert world.machine.ip("route", "show", "table", "enp0s6").startswith("default via 10.0.1.1")


def test_eth0_keeps_the_default_route_even_where_eth1_came_up_first(
    make_world: Callable[..., World],
) -> None:
    """As after a reboot: the ENI is there from the start."""
    world = make_world()
    eni = world.attach(SAME)
    for command in ("ifdown eth0", "ifdown eth1", "ifup eth1", "ifup eth0"):
        log = world.machine.run("sh", "-c", f"{command} >/run/log 2>&1 || cat /run/log")
        assert log.stdout == ""
    assert world.machine.ask(CLIENT) == ETH0
    world.lab.vpc.unplug(world.lab.aws.eni(eni).mac_address)
    assert world.machine.ask(CLIENT) == ETH0


@pytest.mark.parametrize("ipv6", ["", INTERFACES6], ids=["IPv4", "and IPv6"])
def test_default_sends_what_is_unbound_by_the_eni_until_it_is_pulled(
    make_world: Callable[..., World], ipv6: str
) -> None:
    """The hook of the ENI's stanza for IPv6 comes after the one for IPv4, and has no --default."""
    world = make_world(NAT_INTERFACES + ipv6)
    eni = world.attach(OTHER)
    machine = world.machine
    assert machine.ask(CLIENT) == OTHER[1]
    assert world.answers(ETH0, OTHER[1]) == []
    assert "dev eth0" in machine.ip("route", "get", "169.254.169.254")
    assert "dev eth0" in machine.ip("route", "get", NEIGHBOUR)
    world.lab.vpc.unplug(world.lab.aws.eni(eni).mac_address)
    assert machine.ask(CLIENT) == ETH0


def test_a_nat_instance_by_the_readme_forwards_by_its_eni(
    make_world: Callable[..., World],
) -> None:
    world = make_world(NAT_INTERFACES)
    eni = world.attach(OTHER)
    machine, lab = world.machine, world.lab
    machine.write("/etc/nftables.conf", NFTABLES)
    assert machine.run("nft", "-f", "/etc/nftables.conf").returncode == 0
    machine.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    # A host that reaches the world by the NAT instance: here, eth0 of the instance is its gateway.
    lab.vpc.set_source_check(machine.instance.mac, False)
    lab.vpc.set_source_check(lab.aws.eni(eni).mac_address, False)
    private = lab.add_host("private", "10.0.1.70", "2001:db8:0:1::70")
    private.ip("route", "replace", "default", "via", ETH0)
    assert private.ask(CLIENT) == OTHER[1]
