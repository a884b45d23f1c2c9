"""The whole story, step by step, on the simulated AWS. Run by tests/demo."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


def interrupted(*_: object) -> None:
    """Ctrl-C: leave at once. All that runs here ends with the lab's namespaces."""
    # Not by print(), which must not be called again where the signal came in the middle of one.
    os.write(sys.stdout.fileno(), b"\ntests/demo: interrupted; nothing is left behind\n")
    os._exit(128 + signal.SIGINT)


# Before what takes a second or two to load.
signal.signal(signal.SIGINT, interrupted)

from lab import Lab, Machine, snippet  # noqa: E402
from lab.vpc import PROBE, Host  # noqa: E402

NAME, ENI, CLIENT = "web", "10.0.1.22", "10.0.2.50"
FIRST, SECOND = "10.0.1.143", "10.0.1.87"  # the addresses that the hosts come with
GREETING = """\
This is {instance}, a simulated instance in the Auto Scaling group {name}. The scripts are in
/usr/local/sbin, and the network interface {eni} waits to be attached. Try:

    eni_ctl.py -s            what there is
    eni_ctl.py -a            attach, as at boot
    cat /etc/default/eni     what other programs are told
    ip rule                  what add_routes.py has set up; ip route show table eth1
    ping -c 1 -I {address} {client}    a client in another subnet, called by the ENI's address
    eni_ctl.py -d            detach

What does not work here: systemctl and journalctl (no systemd runs), and the internet.
Leave with exit; nothing is left behind.
"""


class Watch:
    """A client that asks an address again and again; it says when answers stop and when they
    start again."""

    def __init__(self, client: Host, address: str) -> None:
        self.process = client.popen("/usr/bin/python3", str(PROBE), "watch", address)
        self.wait_for("answers")

    def wait_for(self, word: str) -> float:
        """Wait until it says so; the seconds for which the address was silent before."""
        assert self.process.stdout
        for line in self.process.stdout:
            said, seconds = line.split()
            if said == word:
                return float(seconds)
        raise RuntimeError("the client has ended")


def step(title: str) -> None:
    print(f"\n# {title}", flush=True)


def do(machine: Machine, command: str) -> None:
    """Show a command and what it prints, as it comes. Exits where it fails.

    The command writes to a pipe, not to our terminal: so nothing of it comes after the line with
    which Ctrl-C ends the demo.
    """
    print(f"{machine.instance.id}# {command}", flush=True)
    process = subprocess.Popen(
        machine.command("sh", "-c", command),
        env=machine.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    for line in process.stdout:
        print(line, end="", flush=True)
    if code := process.wait():
        raise SystemExit(f"exit code {code}")


def report(what: str, holds: bool) -> None:
    print(f"{what}: {'yes' if holds else 'NO'}", flush=True)
    if not holds:
        raise SystemExit(1)


def launch(lab: Lab, subnet: str, address: str) -> Machine:
    """An instance of the group, with its network set up as the README says."""
    interfaces = snippet("# /etc/network/interfaces")
    machine = lab.launch(subnet, interfaces, group=NAME, ip=address)
    machine.serve()
    return machine


def show_attach(machine: Machine, client: Host) -> None:
    step(f"An instance in the Auto Scaling group {NAME}. At boot, eni.service runs this:")
    do(machine, "eni_ctl.py -a")
    machine.await_network()
    step("The state file tells other programs:")
    do(machine, "cat /etc/default/eni")
    step("ifupdown has called add_routes.py for both devices. What there is, in EC2 and here:")
    do(machine, "eni_ctl.py -s")
    do(machine, "ip rule")
    do(machine, "ip route show table eth0; ip route show table eth1")
    step(f"A client in another subnet ({CLIENT}) reaches both addresses:")
    for address in (FIRST, ENI):
        report(f"client connects to {address}", client.ask(address) == CLIENT)
    step("What starts here leaves by the interface that owns its source address, and arrives:")
    for address in (FIRST, ENI):
        do(machine, f"ip route get {CLIENT} from {address} | head -1")
        report(f"client is called by {address}", machine.ask(CLIENT, address) == address)


def show_failover(lab: Lab, subnet: str, machine: Machine, client: Host) -> Machine:
    step(f"The client keeps asking {ENI}. Now the host dies: its power goes off.")
    watch = Watch(client, ENI)
    machine.stop()
    watch.wait_for("silent")
    print(f"client has no answer from {ENI}", flush=True)
    step(f"The group {NAME} gives {machine.instance.id} up, and starts a replacement.")
    lab.aws.shutdown_delay = 600  # EC2's own shutdown of the dead host takes its time
    lab.terminate(machine)
    replacement = launch(lab, subnet, SECOND)
    print(f"{machine.instance.id}  {machine.instance.life_cycle}", flush=True)
    print(f"{replacement.instance.id}  {replacement.instance.life_cycle}, {SECOND}", flush=True)
    step("The replacement boots, and eni.service runs the same as before:")
    do(replacement, "eni_ctl.py -a")
    silence = watch.wait_for("answers")
    replacement.await_network()
    print(f"client is answered from {ENI} again: it was silent for {silence:.1f} s", flush=True)
    print("(a real group takes a minute or more to see that a host is dead, and a boot its time)")
    return replacement


def show_detach(machine: Machine) -> None:
    step("Give the network interface back; device, rule and table go with it:")
    do(machine, "eni_ctl.py -d")
    machine.await_network()
    do(machine, "grep -E 'DEVICE|ATTACHMENT' /etc/default/eni")
    do(machine, "ip rule; ip route show table 101")


def shell(machine: Machine, eni: str) -> int:
    """A prompt on the machine, with a terminal of its own: a shell that shares ours could not give
    it to what it starts, because our terminal's session began outside of these namespaces."""
    words = {"instance": machine.instance.id, "name": NAME, "eni": eni}
    print(GREETING.format(**words, address=ENI, client=CLIENT), flush=True)
    machine.write("/root/.bashrc", f"PS1='{machine.instance.id}# '\n")
    terminal = {name: os.environ[name] for name in ("TERM", "LANG") if name in os.environ}
    environment = {**machine.environment, **terminal, "HOME": "/root", "SHELL": "/bin/bash"}
    command = machine.command("bash", "-c", "cd; exec bash")
    if sys.stdin.isatty():
        command = ["script", "--quiet", "--return", "--command", shlex.join(command), "/dev/null"]
    return subprocess.run(command, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/demo", description=__doc__)
    parser.add_argument("--shell", action="store_true", help="a prompt on the simulated instance")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, Lab(Path(directory)) as lab:
        subnet = lab.add_subnet("10.0.1.0/24")
        lab.add_subnet("10.0.2.0/24")
        eni = lab.aws.create_eni(subnet, name=NAME, ip=ENI, tags={"FQDN": "web.example.com"})
        machine = launch(lab, subnet, FIRST)
        client = lab.add_host("client", CLIENT)
        if options.shell:
            return shell(machine, eni)
        show_attach(machine, client)
        replacement = show_failover(lab, subnet, machine, client)
        show_detach(replacement)
        calls = [call.action for call in lab.aws.calls]
        step(f"AWS was asked {len(calls)} times in all: {', '.join(dict.fromkeys(calls))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
