"""WireGuard between the subject and a peer, by wireguard-go: not each kernel has its own."""

from __future__ import annotations

from lab.daemons import Daemon
from lab.vpc import Host

PORT = 51820


class Tunnel:
    """One end: the device wg0 of a host, with addresses of its own."""

    def __init__(self, host: Host, *addresses: str) -> None:
        self.host = host
        self.addresses = addresses
        self.daemon = Daemon(host, "wireguard-go", "--foreground", "wg0")
        self.write_key()

    def write_key(self) -> None:
        script = "umask 077; wg genkey >/run/wg.key; wg pubkey </run/wg.key"
        done = self.host.run("sh", "-c", script)
        assert done.returncode == 0, done.stderr
        self.public_key = done.stdout.strip()

    def is_there(self) -> bool:
        """Whether wireguard-go listens: an earlier one that was killed leaves its socket behind."""
        listening = " 00010000 .*/run/wireguard/wg0.sock$"  # a flag of <linux/net.h>
        return self.host.run("grep", "-q", listening, "/proc/net/unix").returncode == 0

    def connect(self, peer: Tunnel, allowed: str, endpoint: str = "") -> None:
        """What is allowed is routed into the tunnel, as wg-quick does."""
        words = ["listen-port", str(PORT), "private-key", "/run/wg.key", "peer", peer.public_key]
        words += ["allowed-ips", allowed]
        if endpoint:
            words += ["endpoint", f"{endpoint}:{PORT}"]
        done = self.host.run("wg", "set", "wg0", *words)
        assert done.returncode == 0, done.stderr
        for address in self.addresses:
            length = 128 if ":" in address else 32
            self.host.ip("addr", "replace", f"{address}/{length}", "dev", "wg0")
        self.host.ip("link", "set", "wg0", "up", "mtu", "1420")
        for prefix in allowed.split(","):
            self.host.ip("route", "replace", prefix, "dev", "wg0")
