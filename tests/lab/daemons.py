"""Programs that change a host's network behind add_routes.py's back: the real ones.

Each runs on a host of lab.world, or on one of its peers, and ends with it.
"""

from __future__ import annotations

import signal
import subprocess

from lab import await_that
from lab.vpc import OUTER_LIMIT, V6_ROUTER, Host, Vpc, run

# A lease ends after 20 seconds, whatever the server says: so the test need not wait for hours. On a
# busy machine, a renewal may take many of them.
DHCLIENT = """
timeout 2;
retry 1;
reboot 1;
initial-interval 1;
backoff-cutoff 1;
supersede dhcp-lease-time 20;
supersede dhcp-renewal-time 2;
supersede dhcp-rebinding-time 15;
request subnet-mask, broadcast-address, routers;
"""

KEEPALIVED = """
global_defs {{
    vrrp_version 3
}}
vrrp_instance virtual {{
    interface {device}
    virtual_router_id 51
    priority 100
    advert_int 0.1
    unicast_src_ip {source}
    unicast_peer {{
        {peer}
    }}
    virtual_ipaddress {{
        {address} dev {device}
    }}
}}
"""

NETWORK = """
[Match]
Name={device}

[Network]
{addresses}
IPv6AcceptRA=no
DHCP=no

{routes}
"""
ROUTE = """
[Route]
Gateway={gateway}
Metric={metric}
"""

RADVD = """
interface eth0 {{
    AdvSendAdvert on;
    MinRtrAdvInterval 3;
    MaxRtrAdvInterval 4;
    AdvDefaultLifetime 30;
    AdvDefaultPreference {preference};
}};
"""


class Daemon:
    """A program in the foreground; what it says goes to a file."""

    def __init__(self, host: Host, *command: str) -> None:
        self.name = command[0].rpartition("/")[2]
        self.log = host.root / f"{self.name}.log"
        with self.log.open("a") as file:
            self.process = subprocess.Popen(
                host.command(*command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=host.environment,
            )

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(OUTER_LIMIT)


def start_dhclient(host: Host, device: str, metric: int = 0) -> Daemon:
    host.write("/etc/dhcp/dhclient.conf", DHCLIENT)
    files = ["-lf", f"/run/dhclient.{device}.leases", "-pf", f"/run/dhclient.{device}.pid"]
    command = ["dhclient", "-4", "-d", "-v", "-cf", "/etc/dhcp/dhclient.conf", *files, device]
    return Daemon(host, "env", f"IF_METRIC={metric or ''}", *command)


def start_keepalived(host: Host, device: str, source: str, peer: str, address: str) -> Daemon:
    """It takes the virtual address after a moment, because nobody else has it."""
    words = KEEPALIVED.format(device=device, source=source, peer=peer, address=address)
    host.write("/etc/keepalived/keepalived.conf", words)
    return Daemon(host, "keepalived", "--dont-fork", "--log-console", "--vrrp")


def start_radvd(router: Host, preference: str) -> Daemon:
    """It advertises itself as a default router; when it ends it says that it is none any more."""
    router.write("/etc/radvd.conf", RADVD.format(preference=preference))
    words = ["--nodaemon", "--config", "/etc/radvd.conf", "--pidfile", "/run/radvd.pid"]
    return Daemon(router, "radvd", *words, "--username", "root")


class Networkd:
    """systemd-networkd, with a message bus for networkctl."""

    def __init__(self, host: Host, vpc: Vpc, devices: dict[str, tuple[str, str]]) -> None:
        self.host = host
        self.devices = devices
        for device, addresses in devices.items():
            host.write(f"/etc/systemd/network/80-{device}.network", network(vpc, device, addresses))
        run(*host.command("mkdir", "-p", "/run/dbus", "/run/systemd"))
        # networkd becomes this user, and keeps here what networkctl shows.
        who = ["-o", "systemd-network", "-g", "systemd-network"]
        run(*host.command("install", "-d", *who, "/run/systemd/netif"))
        # Where /sys cannot be written to, networkd does not wait for udev: there is none here.
        run(*host.command("mount", "-o", "remount,bind,ro", "/sys"))
        self.bus = Daemon(host, "dbus-daemon", "--system", "--nofork", "--nopidfile")
        await_that(lambda: host.exists("/run/dbus/system_bus_socket"))
        self.start()

    def start(self) -> None:
        self.process = Daemon(self.host, "/lib/systemd/systemd-networkd")

    def restart(self) -> None:
        """As `systemctl restart systemd-networkd` does."""
        self.process.end()
        self.forget_states()
        self.start()

    def reconfigure(self, device: str) -> None:
        self.forget_states()
        self.networkctl("reconfigure", device)

    def networkctl(self, *words: str) -> None:
        run(*self.host.command("networkctl", *words))

    def forget_states(self) -> None:
        """So that what networkctl shows is no older than this."""
        run(*self.host.command("find", "/run/systemd/netif/links", "-type", "f", "-delete"))

    def await_configured(self, *devices: str) -> None:
        await_that(lambda: all(map(self.is_configured, devices or self.devices)))

    def is_configured(self, device: str) -> bool:
        done = self.host.run("networkctl", "status", device)
        return "State: routable (configured)" in done.stdout


def network(vpc: Vpc, device: str, addresses: tuple[str, str]) -> str:
    """The text of a .network file; as in systemd/80-eni.network, the ENI's routes come second."""
    lines = []
    routes = []
    for address in addresses:
        _, length = vpc.bridge_of(address)
        lines.append(f"Address={address}/{length}")
        gateway = V6_ROUTER if ":" in address else vpc.router_of(address)
        routes.append(ROUTE.format(gateway=gateway, metric=100 if device == "eth0" else 2000))
    return NETWORK.format(device=device, addresses="\n".join(lines), routes="".join(routes))
