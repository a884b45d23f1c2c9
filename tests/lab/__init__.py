"""A region of AWS and a VPC on one machine, for the scripts as they are.

    lab.aws.Aws    EC2, Auto Scaling, IAM and IMDS: moto, made as strict as the real ones
    lab.vpc.Vpc    router, subnets and the source check; lab.vpc.Host is a machine in it
    Lab            both together: instances that are hosts, ENIs that are devices

All of it lives in the namespaces that tests/lab/setup.sh makes (enter_lab).
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from lab.aws import Aws, Instance
from lab.vpc import ENDPOINT, ENDPOINT6, IMDS, OUTER_LIMIT, V6_ROUTER, Host, Vpc

TOP = Path(__file__).parents[2]
README = (TOP / "README.md").read_text()
SCRIPTS = ("eni_ctl.py", "add_routes.py")


class Machine(Host):
    """An EC2 instance: the host, and what AWS knows of it."""

    def __init__(self, instance: Instance, aws: Aws) -> None:
        super().__init__(instance.id)
        self.instance = instance
        self.environment["AWS_CA_BUNDLE"] = str(aws.ca)
        names = "".join(f"{ENDPOINT} {name}\n" for name in aws.host_names)
        names += "".join(f"{ENDPOINT6} {name}\n" for name in aws.host_names6)
        self.write("/etc/hosts", f"127.0.0.1 localhost\n{names}")
        self.run("rm", "-f", "/etc/resolv.conf")
        self.write("/etc/resolv.conf", "nameserver 127.0.0.1\n")  # nobody: an error at once
        for script in SCRIPTS:
            source = TOP / script
            if source.exists():
                self.write(f"/usr/local/sbin/{script}", source.read_text(), 0o755)
        self.device_names = [f"eth{n}" for n in range(1, 32)]  # for what is plugged in later
        self.device_of: dict[str, str] = {}  # MAC address: device
        self.configures = True  # whether its network set-up cares for new devices
        self.ifupdown = False  # whether that set-up is ifupdown's
        self.hotplugs: list[subprocess.Popen[bytes]] = []  # ifup's runs for new devices
        self.appeared = threading.Event()  # set when an ENI's device is there

    def eni_ctl(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run eni_ctl.py as an administrator would."""
        return self.run("eni_ctl.py", *arguments, environment=environment)

    def start_eni_ctl(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return self.popen("eni_ctl.py", *arguments, environment=environment)

    def start_ifupdown(self, interfaces: str) -> None:
        """Boot the network: ifupdown, as configured by the text of /etc/network/interfaces."""
        self.ifupdown = True
        self.write("/etc/network/interfaces", interfaces)
        self.run("mkdir", "-p", "/run/network")
        self.run("mount", "-t", "tmpfs", "lab", "/etc/network/interfaces.d")
        self.hotplug("ifup", "--verbose", "--all")
        self.await_network()

    def hotplug(self, *arguments: str) -> None:
        """What udev starts when a device comes or goes: ifup or ifdown."""
        log = self.root / "ifup.log"  # not a pipe: dhclient stays, and would hold it open
        with log.open("ab") as file:
            command = self.command(*arguments)
            self.hotplugs.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env=self.environment,
                )
            )

    def await_network(self) -> None:
        """Wait until all devices that came or went are set up: ifupdown has done its work, and
        the kernel has found that no IPv6 address is in use by another (tentative ones are mute)."""
        for process in self.hotplugs:
            code = process.wait(OUTER_LIMIT)
            assert code == 0, (self.root / "ifup.log").read_text()
        self.hotplugs.clear()
        await_that(lambda: not self.ip("-6", "addr", "show", "tentative"))

    def plug(self, vpc: Vpc, eni: Any) -> None:
        """An ENI's device appears, and the host's set-up configures it."""
        device = self.device_names.pop(0)
        self.device_of[eni.mac_address] = device
        vpc.plug(self, device, eni.mac_address, addresses(eni))
        if self.ifupdown:
            self.hotplug("ifup", "--verbose", "--allow=hotplug", device)
        elif self.configures:
            vpc.configure(self, device, addresses(eni))
        self.appeared.set()

    def unplug(self, vpc: Vpc, eni: Any) -> None:
        """An ENI's device goes."""
        vpc.unplug(eni.mac_address)
        device = self.device_of.pop(eni.mac_address, None)
        if device:
            self.device_names.insert(0, device)
            if self.ifupdown:
                self.hotplug("ifdown", "--verbose", "--allow=hotplug", device)

    def state(self, path: str = "/etc/default/eni") -> dict[str, str]:
        """The state file, as bash reads it."""
        keys = "FQDN IP GW DEVICE ASG_NAME INSTANCE_ID ENI_ID ATTACHMENT_ID"
        script = f'. "$1"; for key in {keys}; do printf "%s=%s\\0" $key "${{!key?}}"; done'
        done = self.run("bash", "-c", script, "bash", path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)


class Pluggable(Protocol):
    """What an instance runs on: namespaces (Machine) or qemu (lab.boot.Booted)."""

    def plug(self, vpc: Vpc, eni: Any) -> None: ...
    def unplug(self, vpc: Vpc, eni: Any) -> None: ...
    def stop(self) -> None: ...


class Lab:
    """One region with its VPC. Close it, or use it as a context manager."""

    def __init__(self, directory: Path, region: str = "us-west-1") -> None:
        self.region = region
        self.vpc = Vpc()
        self.aws = Aws(
            region=region, endpoint=ENDPOINT, endpoint6=ENDPOINT6, imds=IMDS, ca_dir=directory
        )
        self.aws.plug, self.aws.unplug = self.plug, self.unplug
        self.machines: dict[str, Pluggable] = {}
        self.hosts: list[Host] = []
        self.aws.start()

    def add_subnet(self, cidr: str, zone: str = "a", cidr6: str | None = None) -> str:
        """A subnet in the region's zone of that letter; its id."""
        self.vpc.add_subnet(cidr, cidr6)
        return self.aws.add_subnet(cidr, f"{self.region}{zone}", cidr6)

    def launch(self, subnet: str, interfaces: str | None = None, **options: Any) -> Machine:
        """A running instance with eth0 up: by ifupdown with that /etc/network/interfaces, or just
        so. Other options are those of Aws.launch()."""
        return self.power_on(self.aws.launch(subnet, **options), interfaces)

    def power_on(self, instance: Instance, interfaces: str | None = None) -> Machine:
        """The host of an instance that AWS knows already."""
        self.machines[instance.id] = machine = Machine(instance, self.aws)
        eni = instance.primary
        self.vpc.plug(machine, "eth0", eni.mac_address, addresses(eni))
        if interfaces is not None:
            if self.vpc.dnsmasq is None:
                self.vpc.start_dhcp()
            machine.start_ifupdown(interfaces)
            return machine
        self.vpc.configure(machine, "eth0", addresses(eni))
        self.vpc.add_default_route(machine, "eth0", instance.ip)
        return machine

    def add_host(self, name: str, *owned: str) -> Host:
        """A machine that is no instance, a neighbour or a client; it answers probes."""
        host = Host(name)
        self.hosts.append(host)
        self.vpc.plug(host, "eth0", f"06:00:00:00:00:{len(self.hosts):02x}", owned)
        self.vpc.configure(host, "eth0", owned)
        self.vpc.add_default_route(host, "eth0", owned[0])
        host.ip("-6", "route", "add", "default", "via", V6_ROUTER, "dev", "eth0")
        host.serve()
        return host

    def plug(self, instance_id: str, eni: Any) -> None:
        """AWS has attached an ENI: its device appears."""
        self.machines[instance_id].plug(self.vpc, eni)

    def unplug(self, instance_id: str, eni: Any) -> None:
        """AWS has detached an ENI: its device goes."""
        if instance_id in self.machines:
            self.machines[instance_id].unplug(self.vpc, eni)

    def terminate(self, machine: Machine) -> None:
        """The group ends the instance: it runs on until AWS has shut it down."""
        self.aws.terminate(machine.instance)

    def close(self) -> None:
        with contextlib.ExitStack() as last_first:  # all of it, even if some of it fails
            last_first.callback(self.vpc.close)
            for host in self.hosts:
                last_first.callback(host.stop)
            for machine in self.machines.values():
                last_first.callback(machine.stop)
            self.aws.stop()

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def await_that(condition: Callable[[], bool], seconds: float = OUTER_LIMIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def snippet(first_line: str) -> str:
    """The code block of README.md that begins with that line, so that what it says is tried.

    README has the names of a Nitro instance; the lab's devices have those of the kernel.
    """
    blocks = re.findall(r"^```\w*\n(.*?)^```$", README, re.M | re.S)
    (found,) = [block for block in blocks if block.startswith(f"{first_line}\n")]
    return str(found).replace("ens5", "eth0").replace("ens6", "eth1")


def nat_interfaces() -> str:
    """README's /etc/network/interfaces, with its stanza for the ENI of a NAT instance."""
    interfaces = snippet("# /etc/network/interfaces")
    stanza = snippet("# The ENI's stanza in /etc/network/interfaces, for a NAT instance")
    before, begin, _ = interfaces.partition("allow-hotplug eth1\n")
    assert begin in stanza
    return before + stanza


def scoped_policy() -> dict[str, Any]:
    """README's policy with conditions, in the name of the group web."""
    blocks = re.findall(r"^```json\n(.*?)^```$", README, re.M | re.S)
    policies = [json.loads(block) for block in blocks if '"Statement"' in block]
    return next(dict(policy) for policy in policies if "Condition" in json.dumps(policy))


def files_of_readme(folder: str) -> dict[str, str]:
    """The code blocks of README.md that begin with the path of a file below the folder, as a
    comment, by those paths."""
    blocks = re.findall(rf"^```\w*\n(# ({folder}/\S+)\n.*?)^```$", README, re.M | re.S)
    return {path: text for text, path in blocks}


def addresses(eni: Any) -> Sequence[str]:
    """All private addresses of an ENI, the primary one first."""
    return [*(item["PrivateIpAddress"] for item in eni.private_ip_addresses), *eni.ipv6_addresses]
