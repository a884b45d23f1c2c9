"""WireGuard: who calls the host at either address gets its answers, and reaches all addresses."""

from __future__ import annotations

import pytest
from lab import snippet
from lab.outcomes import Outcome, needs
from lab.wireguard import PORT, Tunnel
from lab.world import CLIENT, ETH0, PLACES, Call, MakeHost, Place, Subject, World

WALL = f"""
table ip wall {{
    chain input {{
        type filter hook input priority filter;
        ip saddr != ADDRESS udp dport {PORT} drop
    }}
}}
"""
FROM_THE_ENI = snippet("# After each start of wg0, for a tunnel that is opened from the ENI")
HERE, THERE = "10.9.0.1", "10.9.0.2"


def start(
    make_host: MakeHost, world: World, place: Place, default: bool = False
) -> tuple[Subject, Tunnel, Tunnel]:
    """A host and a client in another subnet, each with an end of a tunnel."""
    host = make_host(*(["--default", "eth1"] if default else []))
    host.up("eth0", *ETH0)
    host.up("eth1", *place, options=["--default"] if default else [])
    here, there = Tunnel(host, HERE), Tunnel(world.client, THERE)
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
