"""Instances that are virtual machines: stock Debian in the lab's VPC, installed by the README."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lab import TOP, Lab, addresses, snippet
from lab.aws import Instance
from lab.vm import Disk, VirtualMachine, debian, install
from lab.vpc import ENDPOINT, PROBE, Vpc

SOURCE = "/root/eni_ctl"  # where the guest has this project, to install from


def make_disk(
    lab: Lab, release: str, directory: Path, configuration: Mapping[str, str], commands: str = ""
) -> Disk:
    """A disk of that release, with the README's install section run in it as written, then the
    commands. Configuration is texts by their path.

    Beyond that it has only the lab's CA and the names of AWS's endpoints.
    """
    directory.mkdir(exist_ok=True)
    names = "".join(f"{ENDPOINT} {name}\n" for name in lab.aws.host_names)
    files: dict[str, str | Path] = {
        f"{SOURCE}/eni_ctl.py": TOP / "eni_ctl.py",
        f"{SOURCE}/add_routes.py": TOP / "add_routes.py",
        f"{SOURCE}/systemd": TOP / "systemd",
        "/etc/hosts": f"127.0.0.1 localhost debian\n{names}",
        "/usr/local/share/ca-certificates/lab.crt": lab.aws.ca,
        **configuration,
    }
    commands = f"cd {SOURCE}\n{snippet(INSTALL)}\nupdate-ca-certificates\n{commands}"
    return install(debian(release), directory, files, commands)


INSTALL = "apt-get install -y python3-boto3 python3-requests ifupdown isc-dhcp-client iproute2"


class Booted:
    """An EC2 instance as a virtual machine; times are seconds since its power went on."""

    def __init__(
        self, lab: Lab, instance: Instance, disk: Disk, directory: Path, options: str
    ) -> None:
        self.instance = instance
        if lab.vpc.dnsmasq is None:
            lab.vpc.start_dhcp()
        tap = lab.vpc.open_tap(instance.mac, addresses(instance.primary))
        self.start = time.monotonic()
        self.plugged = self.unplugged = 0.0  # the ENI's NIC, last
        self.vm = VirtualMachine(instance.id, disk, directory, [(instance.mac, tap)], options)

    def plug(self, vpc: Vpc, eni: Any) -> None:
        tap = vpc.open_tap(eni.mac_address, addresses(eni))
        self.vm.plug(eni.mac_address, tap)
        self.plugged = self.past()

    def unplug(self, vpc: Vpc, eni: Any) -> None:
        if self.vm.qemu.poll() is None:
            self.vm.unplug(eni.mac_address)
        vpc.unplug(eni.mac_address)
        self.unplugged = self.past()

    def stop(self) -> None:
        self.vm.power_off()

    def past(self) -> float:
        return time.monotonic() - self.start

    def sh(self, command: str, timeout: float = 90) -> str:
        """What a command prints in the guest. It must succeed."""
        done = self.vm.run(command, timeout)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def write(self, path: str, text: str) -> None:
        done = self.vm.run(f'mkdir -p "$(dirname {path})" && cat > {path}', stdin=text)
        assert done.returncode == 0, f"{path}: {done.stderr}"

    def ask(self, address: str, source: str) -> str:
        """As Host.ask: our address as the host at address sees it."""
        command = f"python3 - ask {address} {source}"
        return self.vm.run(command, stdin=PROBE.read_text()).stdout.strip()

    def await_sh(self, command: str, condition: Callable[[str], bool], timeout: float) -> None:
        """Ask by a command until the answer is right."""
        deadline = time.monotonic() + timeout
        while not condition(answer := self.vm.run(command, timeout).stdout.strip()):
            assert time.monotonic() < deadline, f"{command}: {answer}\n{self.journal()}"
            time.sleep(1)  # each time costs the emulated processor half a second

    def eni_service_took(self) -> float:
        """From its start to being active, by systemd's clock."""
        named = ("InactiveExitTimestampMonotonic", "ActiveEnterTimestampMonotonic")  # microseconds
        start, end = (self.sh(f"systemctl show --value --property {name} eni") for name in named)
        return (int(end) - int(start)) / 1e6

    def journal(self) -> str:
        """For a test that fails: what the guest's network set-up and eni.service say."""
        units = "--unit networking --unit 'ifup@*' --unit eni"
        return self.vm.run(f"journalctl --no-pager --boot {units}; ip addr; ip rule").stdout


def boot(
    lab: Lab,
    subnet: str,
    disk: Disk,
    directory: Path,
    options: str = "net.ifnames=0",
    **launch: Any,
) -> Booted:
    """A new instance whose power goes on; launch is as for Aws.launch()."""
    instance = lab.aws.launch(subnet, **launch)
    machine = Booted(lab, instance, disk, directory, options)
    lab.machines[instance.id] = machine
    return machine
