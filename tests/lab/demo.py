"""The main job, step by step, on the simulated AWS. Run by tests/demo."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from lab import Lab, Machine, snippet
from lab.vpc import Host

NAME, OWN, ENI, CLIENT = "web", "10.0.1.143", "10.0.1.22", "10.0.2.50"


def step(title: str) -> None:
    print(f"\n# {title}", flush=True)


def do(machine: Machine, command: str) -> None:
    """Show a command and what it prints. Exits where it fails."""
    print(f"$ {command}", flush=True)
    done = machine.run("sh", "-c", command)
    sys.stdout.write(done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}")


def demonstrate(lab: Lab, machine: Machine, client: Host) -> None:
    step(f"An instance in the Auto Scaling group {NAME}. At boot, eni.service runs this:")
    do(machine, "eni_ctl.py -a")
    machine.await_network()
    step("The state file tells other programs:")
    do(machine, "cat /etc/default/eni")
    step("ifupdown has called add_routes.py for both devices. What is so, in EC2 and here:")
    do(machine, "eni_ctl.py -s")
    do(machine, "ip rule")
    do(machine, "ip route show table eth0; ip route show table eth1")
    step(f"A client in another subnet ({CLIENT}) reaches both addresses:")
    for address in (OWN, ENI):
        report(f"client connects to {address}", client.ask(address) == CLIENT)
    step("What starts here leaves by the interface that owns its source address, and arrives:")
    for address in (OWN, ENI):
        do(machine, f"ip route get {CLIENT} from {address} | head -1")
        report(f"client is called by {address}", machine.ask(CLIENT, address) == address)
    step("Give the network interface back; device, rule and table go with it:")
    do(machine, "eni_ctl.py -d")
    machine.await_network()
    do(machine, "grep -E 'DEVICE|ATTACHMENT' /etc/default/eni")
    do(machine, "ip rule; ip route show table 101")
    calls = [call.action for call in lab.aws.calls]
    step(f"AWS was asked {len(calls)} times in all: {', '.join(dict.fromkeys(calls))}")


def report(what: str, holds: bool) -> None:
    print(f"{what}: {'yes' if holds else 'NO'}", flush=True)
    if not holds:
        raise SystemExit(1)


def shell(machine: Machine) -> int:
    print(
        f"This is {machine.instance.id}, an instance in the group {NAME}, with the scripts in "
        "/usr/local/sbin.\nTry: eni_ctl.py -a, eni_ctl.py -s, ip rule, eni_ctl.py -d. "
        "Leave with exit.",
        flush=True,
    )
    machine.write("/root/.profile", f"PS1='{machine.instance.id}# '\n")
    terminal = {name: os.environ[name] for name in ("TERM", "LANG") if name in os.environ}
    environment = {**machine.environment, **terminal, "HOME": "/root", "ENV": "/root/.profile"}
    command = machine.command("sh", "-c", "cd; exec sh -i")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for what runs at the prompt
    return subprocess.run(command, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/demo", description=__doc__)
    parser.add_argument("--shell", action="store_true", help="a prompt on the simulated instance")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, Lab(Path(directory)) as lab:
        subnet = lab.add_subnet("10.0.1.0/24")
        lab.add_subnet("10.0.2.0/24")
        lab.aws.create_eni(subnet, name=NAME, ip=ENI, tags={"FQDN": "web.example.com"})
        interfaces = snippet("# /etc/network/interfaces")
        machine = lab.launch(subnet, interfaces, group=NAME, ip=OWN)
        machine.serve()
        client = lab.add_host("client", CLIENT)
        if options.shell:
            return shell(machine)
        demonstrate(lab, machine, client)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
