"""Containers behind a bridge of the host, with published ports as Docker makes them."""

from __future__ import annotations

import pytest
from lab import snippet
from lab.caller import ECHO
from lab.outcomes import Outcome, needs
from lab.world import (
    CONTAINER,
    ETH0,
    FAMILIES,
    INTERNET,
    OTHER,
    PLACES,
    SAME,
    Call,
    MakeHost,
    Place,
    Subject,
    World,
    of_family,
)

SNIPPET = needs(hooks=Outcome.SNIPPET, watch=Outcome.SNIPPET)
PUBLISHED = 8080
# As Docker does: the container's port at any address of the host, and the host's own addresses
# for what containers send elsewhere.
DOCKER = f"""
table FAMILY docker {{
    chain prerouting {{
        type nat hook prerouting priority dstnat;
        fib daddr type local tcp dport {PUBLISHED} dnat to CONTAINER
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat;
        FAMILY saddr ADDRESS oifname != "br*" masquerade
    }}
}}
"""
CONNMARK = snippet("# /etc/nftables.conf, for published ports")
RULES = snippet("# At each boot, for published ports")


def run_docker(host: Subject) -> None:
    for family, address in zip(("ip", "ip6"), CONTAINER):
        place = f"{address}:{ECHO}" if family == "ip" else f"[{address}]:{ECHO}"
        rules = DOCKER.replace("FAMILY", family).replace("CONTAINER", place)
        host.nft(rules.replace("ADDRESS", address))


def use_snippet(host: Subject) -> None:
    host.nft(CONNMARK)
    host.run_lines(RULES)


def start(make_host: MakeHost, place: Place, default: bool) -> Subject:
    """A host with both devices up, and a container."""
    host = make_host(*(["--default", "eth1"] if default else []))
    host.up("eth0", *ETH0)
    host.up("eth1", *place, options=["--default"] if default else [])
    host.works(host.talks(*ETH0, *place))
    host.add_container(*CONTAINER)
    return host


@PLACES
@FAMILIES
def test_containers_talk_with_both_addresses(
    make_host: MakeHost, place: Place, family: int
) -> None:
    host = start(make_host, place, default=False)
    host.settles(host.talks(*of_family(family, [*ETH0, *place]), peers=host.extra))


DEFAULT = pytest.mark.parametrize("default", [False, True], ids=["without default", "with default"])


@DEFAULT
@PLACES
@FAMILIES
def test_containers_call_everybody(
    make_host: MakeHost, world: World, place: Place, family: int, default: bool
) -> None:
    host = start(make_host, place, default)
    run_docker(host)
    (container,) = host.extra
    (eth0,) = of_family(family, ETH0)
    (eni,) = of_family(family, place)
    calls = host.talks(eth0, eni)
    for peer in (world.client, world.internet):
        (theirs,) = of_family(family, peer.addresses)
        calls.append(Call(container, theirs, None, eni if default else eth0))
    host.settles(calls)


def published(host: Subject, family: int, *addresses: str) -> list[Call]:
    """Everybody calls the published port at these addresses."""
    calls = []
    for address in of_family(family, addresses):
        for peer in host.world.all:
            (theirs,) = of_family(family, peer.addresses)
            calls.append(Call(peer, address, None, theirs, port=PUBLISHED))
    return calls


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(SAME, id="same subnet"),
        # The container's reply to the ENI's neighbour follows main, by the ENI.
        pytest.param(OTHER, id="other subnet", marks=SNIPPET),
    ],
)
@FAMILIES
def test_a_published_port_is_reached_at_eth0(
    make_host: MakeHost, place: Place, family: int
) -> None:
    host = start(make_host, place, default=False)
    run_docker(host)
    host.settles(published(host, family, *ETH0), lambda: use_snippet(host))


@SNIPPET
@PLACES
@FAMILIES
def test_a_published_port_is_reached_at_eth0_beside_default(
    make_host: MakeHost, place: Place, family: int
) -> None:
    host = start(make_host, place, default=True)
    run_docker(host)
    host.settles(published(host, family, *ETH0), lambda: use_snippet(host))


@SNIPPET
@DEFAULT
@PLACES
@FAMILIES
def test_a_published_port_is_reached_at_the_eni(
    make_host: MakeHost, place: Place, family: int, default: bool
) -> None:
    host = start(make_host, place, default)
    run_docker(host)
    calls = [*published(host, family, *place), *host.talks(*ETH0, *place)]
    host.settles(calls, lambda: use_snippet(host))


@DEFAULT
@PLACES
def test_with_the_snippet_everything_else_goes_on(
    make_host: MakeHost, world: World, place: Place, default: bool
) -> None:
    host = start(make_host, place, default)
    run_docker(host)
    use_snippet(host)
    (container,) = host.extra
    calls = [
        *published(host, 4, *ETH0, *place),
        *host.talks(*ETH0, *place),
        *host.talks(*ETH0, *place, peers=host.extra),
        Call(container, INTERNET[0], None, place[0] if default else ETH0[0]),
        Call(container, INTERNET[1], None, place[1] if default else ETH0[1]),
    ]
    host.settles(calls)
