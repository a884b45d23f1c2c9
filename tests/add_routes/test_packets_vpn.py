"""WireGuard: who calls the host at either address gets its answers, and reaches all addresses; what
the host forwards for a VPN leaves by the ENI; and tunnels that take all traffic."""

from __future__ import annotations

import pytest
from lab import snippet
from lab.outcomes import Outcome, needs
from lab.wireguard import PORT, Tunnel
from lab.world import (
    CLIENT,
    CONTAINER,
    ETH0,
    FAMILIES,
    INTERNET,
    PLACES,
    Call,
    MakeHost,
    Peer,
    Place,
    Subject,
    World,
    device_mac,
    forward,
    of_family,
)

WALL = f"""
table ip wall {{
    chain input {{
        type filter hook input priority filter;
        ip saddr != ADDRESS udp dport {PORT} drop
    }}
}}
"""
FROM_THE_ENI = snippet("# After each start of wg0, for a tunnel that is opened from the ENI")
FOR_A_GATEWAY = snippet("# At each boot, for a VPN that this host forwards for")
FOR_THE_REST = snippet("# In /etc/wireguard/wg0.conf, for a tunnel that takes all the rest")
HERE, THERE = "10.9.0.1", "10.9.0.2"
HERE6, THERE6 = "fd00:9::1", "fd00:9::2"
# The [Interface] section that wg-quick reads, but for its key; and who is at the other end.
INTERFACE = f"[Interface]\nAddress = {HERE}/32\nPrivateKey = "
PEER = "[Peer]\nAllowedIPs = 0.0.0.0/0, ::/0\nPublicKey = "
# OpenVPN's redirect-gateway (its manual, "def1" and "ipv6").
HALVES = ("0.0.0.0/1", "128.0.0.0/1", "::/3", "2000::/4", "3000::/4", "fc00::/7")


def start(
    make_host: MakeHost, world: World, place: Place, default: bool = False
) -> tuple[Subject, Tunnel, Tunnel]:
    """A host and a client in another subnet, each with an end of a tunnel."""
    host = make_host(*(["--default", "eth1"] if default else []))
    host.up("eth0", *ETH0)
    host.up("eth1", *place, options=["--default"] if default else [])
    here, there = Tunnel(host, HERE, HERE6), Tunnel(world.client, THERE, THERE6)
    host.daemon(here.daemon)
    host.daemon(there.daemon)
    for tunnel in (here, there):
        host.awaits(tunnel.is_there)
    return host, here, there


@pytest.mark.parametrize("default", [False, True], ids=["without default", "with default"])
@pytest.mark.parametrize("called", ["eth0", "the ENI"])
@PLACES
def test_a_tunnel_to_an_address_carries_calls(
    make_host: MakeHost, world: World, place: Place, called: str, default: bool
) -> None:
    host, here, there = start(make_host, world, place, default)
    here.connect(there, THERE)
    there.connect(here, HERE, endpoint=ETH0[0] if called == "eth0" else place[0])
    calls = [Call(world.client, HERE, THERE, THERE), Call(host, THERE, HERE, HERE)]
    # Through the tunnel, the client is reached from all addresses of the host.
    calls += [Call(world.client, HERE, None, THERE), *host.talks(*ETH0, *place)]
    host.settles(calls)


@PLACES
def test_both_addresses_call_through_a_tunnel(
    make_host: MakeHost, world: World, place: Place
) -> None:
    """The client's own network is behind the tunnel, and it sends the replies back by it."""
    host, here, there = start(make_host, world, place)
    pod = world.add_pod(world.client, "192.0.2.5")
    here.connect(there, f"{THERE},192.0.2.0/24")
    there.connect(here, f"{HERE},{place[0]},{ETH0[0]}", endpoint=ETH0[0])
    # What the tunnel itself is made of must not go by the tunnel.
    udp = "17"  # a minimal Debian has no /etc/protocols
    world.client.ip("rule", "add", "pref", "10", "ipproto", udp, "lookup", "200")
    world.client.ip("route", "replace", "default", "via", "10.0.2.1", "table", "200")
    try:
        calls = [Call(host, "192.0.2.5", source, source) for source in (ETH0[0], place[0], HERE)]
        calls += [Call(pod, address, None, "192.0.2.5") for address in (ETH0[0], place[0], HERE)]
        host.settles(calls)
    finally:
        world.client.ip("rule", "del", "pref", "10")


@needs(hooks=Outcome.SNIPPET, watch=Outcome.SNIPPET)
@PLACES
def test_a_tunnel_that_the_host_opens_comes_from_the_enis_address(
    make_host: MakeHost, world: World, place: Place
) -> None:
    """The other end's firewall knows that address alone."""
    host, here, there = start(make_host, world, place)
    here.connect(there, THERE, endpoint=CLIENT[0])
    there.connect(here, HERE)
    world.client.nft(WALL.replace("ADDRESS", place[0]))

    host.settles([Call(host, THERE, HERE, HERE)], lambda: host.run_lines(FROM_THE_ENI))
    world.client.nft("delete table ip wall")


@needs(hooks=Outcome.SNIPPET, watch=Outcome.SNIPPET)
@pytest.mark.parametrize("default", [False, True], ids=["without default", "with default"])
@FAMILIES
@PLACES
def test_a_vpn_and_all_subnets_reach_each_other_through_the_host(
    make_host: MakeHost, world: World, place: Place, family: int, default: bool
) -> None:
    """The VPC sends what is for the VPN to the ENI, and sees its clients' own addresses."""
    host, here, there = start(make_host, world, place, default)
    forward(host)
    world.vpc.set_source_check(device_mac("eth1"), False)
    (vpn_client,) = of_family(family, [THERE, THERE6])
    (eni,) = of_family(family, place)
    world.route_in_vpc(vpn_client, eni)
    calls = []
    for peer in (world.neighbour, world.eni_neighbour, world.internet):
        (address,) = of_family(family, peer.addresses)
        calls.append(Call(world.client, address, vpn_client, vpn_client))
        calls.append(Call(peer, vpn_client, None, address))
    reached = {call.address for call in calls} - {vpn_client}
    here.connect(there, f"{THERE},{THERE6}")
    there.connect(here, ",".join([HERE, HERE6, *sorted(reached)]), endpoint=place[0])
    host.settles(calls, lambda: host.run_lines(FOR_A_GATEWAY))


@PLACES
def test_a_tunnel_that_took_all_traffic_leaves_no_harm_when_wg_quick_ends_it(
    make_host: MakeHost, world: World, place: Place
) -> None:
    """It deletes all rules that look like its own."""
    host, _ = start_with_a_container(make_host, place)
    configure_wg_quick(host, "")
    calls = host.talks(*ETH0, *place)
    calls += [Call(host, CONTAINER[0], address, address) for address in (ETH0[0], place[0])]
    host.works(calls)
    host.ok("wg-quick", "up", "wg0")
    host.ok("wg-quick", "down", "wg0")
    host.settles(calls)


@PLACES
def test_a_tunnel_takes_all_but_what_has_an_address_of_the_hosts(
    make_host: MakeHost, world: World, place: Place
) -> None:
    host, _ = start_with_a_container(make_host, place)
    configure_wg_quick(host, FOR_THE_REST)
    host.ok("wg-quick", "up", "wg0")
    for address in INTERNET:
        assert "dev wg0 table 51820" in host.ok("ip", "route", "get", address)
    host.settles(host.talks(*ETH0, *place))
    host.ok("wg-quick", "down", "wg0")
    for family in ("-4", "-6"):
        assert not {"20040:", "20050:"}.intersection(host.ip(family, "rule").split())


@PLACES
def test_a_vpn_that_takes_all_traffic_by_halves_leaves_the_hosts_addresses_alone(
    make_host: MakeHost, world: World, place: Place
) -> None:
    """Its own end is what this container is here: a device that is none of ours."""
    host, container = start_with_a_container(make_host, place)
    gateway = {4: container.addresses[0], 6: container.addresses[1]}
    for half in HALVES:
        host.ip("route", "add", half, "via", gateway[6 if ":" in half else 4])
    for family, address in zip((4, 6), INTERNET):
        assert f"via {gateway[family]} " in host.ok("ip", "route", "get", address)
    host.settles(host.talks(*ETH0, *place))


def start_with_a_container(make_host: MakeHost, place: Place) -> tuple[Subject, Peer]:
    host = make_host()
    host.up("eth0", *ETH0)
    host.up("eth1", *place)
    return host, host.add_container(*CONTAINER)


def configure_wg_quick(host: Subject, more: str) -> None:
    """A tunnel that takes all traffic, to an end that is not there."""
    own, other = host.ok("wg", "genkey"), host.ok("sh", "-c", "wg genkey | wg pubkey")
    host.write("/etc/wireguard/wg0.conf", f"{INTERFACE}{own}{more}{PEER}{other}", 0o600)
