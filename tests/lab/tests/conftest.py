"""The lab's AWS alone, at the loopback device, and what most of its tests want in it."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab.asking import ENDPOINT, ENI6, HOST, IMDS, IMDS6, PEER
from lab.aws import Aws, Instance


@pytest.fixture(scope="module")
def addresses() -> Iterator[None]:
    """The addresses of AWS and of the instances, on lo while these tests run."""
    routes = subprocess.check_output(["ip", "-json", "route", "show", "default"])
    assert not json.loads(routes or "[]"), "run this in a network namespace of its own"
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    present = subprocess.check_output(["ip", "-oneline", "addr"], text=True)
    ours = [
        f"{address}/{128 if ':' in address else 32}"
        for address in (ENDPOINT, IMDS, IMDS6, HOST, PEER, "10.0.1.77", "10.0.1.50", ENI6)
        if f" {address}/" not in present
    ]
    for address in ours:
        # With duplicate address detection, an address cannot be bound yet for some milliseconds.
        at_once = ["nodad"] if ":" in address else []
        subprocess.run(["ip", "addr", "add", address, "dev", "lo", *at_once], check=True)
    yield
    for address in ours:
        subprocess.run(["ip", "addr", "del", address, "dev", "lo"], check=True)


@pytest.fixture
def aws(addresses: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Aws]:
    real = socket.getaddrinfo

    def resolve(host: Any, *args: Any, **kwargs: Any) -> Any:  # as /etc/hosts would
        known = isinstance(host, str) and host.endswith(".amazonaws.com")
        return real(ENDPOINT if known else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with Aws(ca_dir=tmp_path, imds=(IMDS, IMDS6)) as lab:
        yield lab


@pytest.fixture
def subnet(aws: Aws) -> str:
    return aws.add_subnet("10.0.1.0/24", "us-west-1a", "2001:db8:0:1::/64")


@pytest.fixture
def host(aws: Aws, subnet: str) -> Instance:
    return aws.launch(subnet, ip=HOST, group="web")


@pytest.fixture
def eni(aws: Aws, subnet: str) -> str:
    return aws.create_eni(subnet, name="web", ip="10.0.1.50")
