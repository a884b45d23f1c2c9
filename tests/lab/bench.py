"""What the scripts cost on a simulated instance, beside the least that would do: tests/bench.

All run on the distribution's Python, in turns, so that a slower minute is slower for all. CPU and
peak memory are those of the program and what it starts, as the kernel accounts for them; a median
of several runs. The simulated AWS is another process. Absolute times are this machine's; what is
meant to be read are the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lab import Lab, Machine, await_that
from lab.vpc import run

# Starts a command from a small process: from a large one, the kernel would count that one's memory.
MEASURE = """
import json, os, sys, time
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
start = time.monotonic()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet)
_, status, used = os.wait4(pid, 0)
wall = time.monotonic() - start
print(json.dumps([used.ru_utime + used.ru_stime, wall, used.ru_maxrss * 1024, status]))
"""
# What eni_ctl.py asks, and nothing else: it neither waits, nor checks, nor writes a state file.
BARE = """
import boto3, requests

imds = requests.Session()
imds.trust_env = False
base = "http://169.254.169.254/latest/"
ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "300"}
token = imds.put(base + "api/token", headers=ttl, timeout=2).text
def get(path):
    headers = {"X-aws-ec2-metadata-token": token}
    return imds.get(base + "meta-data/" + path, headers=headers, timeout=2).text
instance, zone = get("instance-id"), get("placement/availability-zone")
session = boto3.session.Session(region_name=get("placement/region"))
groups = session.client("autoscaling").describe_auto_scaling_instances(InstanceIds=[instance])
name = groups["AutoScalingInstances"][0]["AutoScalingGroupName"]
ec2 = session.client("ec2")
named = [{"Name": "tag:Name", "Values": [name]}]
eni = ec2.describe_network_interfaces(Filters=named)["NetworkInterfaces"][0]
ec2.attach_network_interface(
    NetworkInterfaceId=eni["NetworkInterfaceId"], InstanceId=instance, DeviceIndex=1
)
"""
# The same three calls from a shell, without the requests to IMDS.
SHELL = """
set -e
name=$(/usr/bin/aws autoscaling describe-auto-scaling-instances --instance-ids "$1" \\
    --query 'AutoScalingInstances[0].AutoScalingGroupName' --output text)
eni=$(/usr/bin/aws ec2 describe-network-interfaces --filters "Name=tag:Name,Values=$name" \\
    --query 'NetworkInterfaces[0].NetworkInterfaceId' --output text)
exec /usr/bin/aws ec2 attach-network-interface --network-interface-id "$eni" \\
    --instance-id "$1" --device-index 1
"""
PYTHON, SH = "/usr/bin/python3", "/bin/sh"
ENI_CTL, ADD_ROUTES = "/usr/local/sbin/eni_ctl.py", "/usr/local/sbin/add_routes.py"


class Cost(NamedTuple):
    cpu: float  # seconds
    wall: float
    memory: float  # bytes


class Contender(NamedTuple):
    command: list[str]
    prepare: Callable[[], object] = lambda: None


def measure(machine: Machine, command: list[str]) -> Cost:
    """Run a command on the machine. Exits where it fails."""
    done = machine.run(PYTHON, "-IS", "-c", MEASURE, *command)
    cost = json.loads(done.stdout)
    if cost.pop():
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return Cost(*cost)


def compare(machine: Machine, runs: int, contenders: Mapping[str, Contender]) -> dict[str, Cost]:
    """The medians of several runs of each, taken in turns after one that is not counted."""
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for _ in range(runs + 1):
        for name, contender in contenders.items():
            contender.prepare()
            costs[name].append(measure(machine, contender.command))
    return {name: Cost(*map(statistics.median, zip(*all[1:]))) for name, all in costs.items()}


def tell(title: str, costs: Mapping[str, Cost], *beside: str) -> None:
    """A table; beside: whose costs the others' are compared with."""
    head = "".join(f"   x {name}: CPU, wall, MiB" for name in beside)
    print(f"\n{title:42}  CPU ms  wall ms  peak MiB{head}")
    for name, cost in costs.items():
        row = f"{name:42}{cost.cpu * 1e3:8.1f}{cost.wall * 1e3:9.1f}{cost.memory / 2**20:10.1f}"
        for other in beside:
            ratios = "  ".join(f"{own / its:5.2f}" for own, its in zip(cost, costs[other]))
            row += f"{ratios:>{len(other) + 22}}"
        print(row, flush=True)


def bench_attach(lab: Lab, machine: Machine, eni_id: str, runs: int) -> None:
    machine.write("/root/bare.py", BARE)
    machine.write("/root/shell.sh", SHELL)
    machine.environment["AWS_DEFAULT_REGION"] = lab.region
    lab_eni = lab.aws.lab_eni(eni_id)

    def free() -> None:
        if lab_eni.model.attachment_id:
            await_that(lambda: lab_eni.attachment_status == "attached")
            lab.aws.detach(lab_eni)
            await_that(lambda: not lab_eni.model.attachment_id)

    instance = machine.instance.id
    contenders = {
        "bare boto3": Contender([PYTHON, "/root/bare.py"], free),
        "three aws": Contender([SH, "/root/shell.sh", instance], free),
        "eni_ctl.py -a": Contender([ENI_CTL, "-a"], free),
        "eni_ctl.py -a, is attached already": Contender([ENI_CTL, "-a"]),
    }
    tell("attach", compare(machine, runs, contenders), "bare boto3", "three aws")
    free()


def bench_usage(machine: Machine, runs: int) -> None:
    contenders = {
        "python3 -c pass": Contender([PYTHON, "-c", "pass"]),
        "eni_ctl.py --help": Contender([ENI_CTL, "--help"]),
        "add_routes.py --help": Contender([ADD_ROUTES, "--help"]),
    }
    tell("usage", compare(machine, runs, contenders), "python3 -c pass")


def bench_routes(machine: Machine, runs: int, count: int) -> None:
    """The routes of an ENI with so many addresses, beside eth0."""
    machine.ip("link", "add", "eth9", "type", "veth", "peer", "name", "peer9")
    lines = ["link set eth9 up", "link set peer9 up"]
    lines += [f"addr add 10.0.9.{100 + n}/24 dev eth9" for n in range(count)]
    run(*machine.command("ip", "-batch", "-"), stdin="\n".join(lines))
    remove = [ADD_ROUTES, "-d", "eth9", "-r"]
    planned = machine.run(ADD_ROUTES, "-d", "eth9", "--dry-run").stdout
    machine.write("/root/routes.sh", f"set -e\n{planned}")
    contenders = {
        "python3 -IS -c pass": Contender([PYTHON, "-IS", "-c", "pass"]),
        "the same `ip` commands": Contender([SH, "/root/routes.sh"], lambda: machine.run(*remove)),
        "add_routes.py": Contender([ADD_ROUTES, "-d", "eth9"], lambda: machine.run(*remove)),
        "add_routes.py, no change": Contender([ADD_ROUTES, "-d", "eth9"]),
    }
    title = f"routes of {count}, {len(planned.splitlines())} commands"
    tell(title, compare(machine, runs, contenders), "python3 -IS -c pass")
    machine.ip("link", "delete", "eth9")


def bench_waits(lab: Lab, machine: Machine, eni_id: str, runs: int) -> None:
    """How soon what eni_ctl.py waits for is noticed."""
    lab_eni = lab.aws.lab_eni(eni_id)
    other = lab.aws.launch(lab_eni.model.subnet.id, group="web")
    hook, times = lab.aws.plug, [0.0]

    def plug(instance_id: str, eni: Any) -> None:
        if instance_id == machine.instance.id:
            hook(instance_id, eni)  # until the device is there and has its address
        times.append(time.monotonic())

    def unplug(instance_id: str, eni: Any) -> None:
        if instance_id == machine.instance.id:
            lab.unplug(instance_id, eni)
        times.append(time.monotonic())

    lab.aws.plug, lab.aws.unplug = plug, unplug
    lab.aws.attach_delay = 2.0  # so long that it waits for the device by then
    noticed: dict[str, list[float]] = {"the ENI's release, to the attach call": []}
    noticed["the device's address, to the end of the run"] = []
    for _ in range(runs):
        lab.aws.attach(lab_eni, other, 1)
        await_that(lambda: lab_eni.attachment_status == "attached")
        lab.aws.calls.clear()
        process = machine.start_eni_ctl("-a")
        await_that(lambda: len(lab.aws.calls) > 4)
        lab.aws.detach(lab_eni)
        await_that(lambda: any(call.action.startswith("Attach") for call in lab.aws.calls))
        noticed["the ENI's release, to the attach call"].append(time.monotonic() - times[-1])
        process.communicate(timeout=60)
        end = time.monotonic()
        noticed["the device's address, to the end of the run"].append(end - times[-1])
        lab.aws.detach(lab_eni)
        await_that(lambda: not lab_eni.model.attachment_id)
    print(f"\n{'noticed after':42}  median s   max s")
    for what, seconds in noticed.items():
        print(f"{what:44}{statistics.median(seconds):8.2f}{max(seconds):8.2f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each (default 7)")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as directory, Lab(Path(directory)) as lab:
        subnet = lab.add_subnet("10.0.1.0/24")
        eni_id = lab.aws.create_eni(subnet, name="web", ip="10.0.1.22")
        machine = lab.launch(subnet, group="web", ip="10.0.1.10")
        lab.aws.attach_delay = lab.aws.detach_delay = 0.0
        bench_attach(lab, machine, eni_id, runs)
        bench_usage(machine, runs)
        bench_routes(machine, runs, 1)
        bench_routes(machine, runs, 50)
        bench_waits(lab, machine, eni_id, runs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
