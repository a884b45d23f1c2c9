"""Debian virtual machines for the boot tests, in three steps, each with what it alone needs:

1. debian(image): a root tree of Debian's packages, by mmdebstrap. Needs root and the network; a
   minute, then cached until the recipe below changes. `vm.py` does it from a shell for all images,
   before the lab leaves this machine's network.
2. install(tree, ...): a disk for one session: the tree, and in it the given files and commands
   (README's install section, the lab's CA, /etc/hosts). Needs root; some seconds.
3. VirtualMachine(name, disk, ...): qemu, its NICs on the VPC's taps. What it writes to its disk
   lasts as long as itself, over a reboot too, so any number of machines start from one disk.

On this machine: qemu-system-x86, mmdebstrap, apt-utils, e2fsprogs, util-linux.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eni_ctl-lab"
RELEASES = ("bullseye", "bookworm", "trixie")


class Image(NamedTuple):
    """A Debian release, and what sets up its network, a key of NETWORK_PACKAGES."""

    release: str
    network: str = "ifupdown"

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.release}-{self.network}"


IMAGES = (
    *map(Image, RELEASES),
    Image("bookworm", "netplan"),
    Image("trixie", "netplan"),
    Image("bullseye", "cloud-ifupdown"),
    Image("bookworm", "networkmanager"),
)

PACKAGES = (
    "linux-image-cloud-amd64,systemd-sysv,udev,iproute2,nftables,ca-certificates,openssh-server,"
    "qemu-guest-agent"  # by which the tests run commands
)
NETWORK_PACKAGES = {
    # As the administrator of a host without cloud-init has it.
    "ifupdown": "ifupdown,isc-dhcp-client,python3-boto3,python3-requests",
    # As Debian's own images for EC2 are: those of Debian 12 and 13, and that of 11. They lack
    # what README's install section installs.
    "netplan": "cloud-init,e2fsprogs,netplan.io,systemd-resolved,libnss-resolve,dbus",
    "cloud-ifupdown": "cloud-init,ifupdown,isc-dhcp-client,dbus",
    "networkmanager": "network-manager,dbus",
}
# What README installs, and the image has not, lies here as packages, with an index. So the tests
# can install it, without a network: from here, or from a mirror in the VPC.
POOL = "srv/pool"
WANTED = "python3-boto3 python3-requests curl"
MAKE_POOL = f"""
set -e
mkdir -p "$1/{POOL}/partial"
APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get install -qq --download-only --no-install-recommends \\
    -o Dir::Cache::archives="$1/{POOL}" {WANTED}
rm -r "$1/{POOL}/partial" "$1/{POOL}/lock"
cd "$1/{POOL}"
apt-ftparchive packages . >Packages
""".strip()
OPTIONS = (
    f"--customize-hook={MAKE_POOL}",
    "--variant=minbase",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    # mmdebstrap leaves the building machine's name and name servers behind.
    '--customize-hook=rm -f "$1/etc/resolv.conf" && echo debian >"$1/etc/hostname"',
    # They would look for a mirror while the tests measure.
    '--customize-hook=chroot "$1" systemctl mask apt-daily.timer apt-daily-upgrade.timer',
    "--format=directory",
)
DISK_SIZE = "2G"  # sparse
TREE_SIZE = 700  # MiB, with some room

# For so many NICs at once: q35 hot-plugs only into an empty pcie-root-port (qemu's docs/pcie.txt).
PORTS = 4
MEMORY = "512M"
# Debian 12's qemu 7.2: 2 of 8 starts of Linux 6.12 ended in a double fault at a cmpxchg16b, with it
# switched off none of 9 did. And a start after a reboot took up to 60 s of CPU where the first took
# 18, with the default buffer for translated code; with a small one it took 28.
ACCELERATOR = {
    "kvm": ["-accel", "kvm", "-cpu", "host"],
    "tcg": ["-accel", "tcg,tb-size=128", "-cpu", "qemu64,-cx16"],
}

# no_timer_check: Debian 11's and 13's kernels panicked ("IO-APIC + timer doesn't work!") in guests
# that got too little of a processor, so that their timer did not tick often enough in a moment.
# Under KVM, as on EC2, the kernel leaves that check out by itself (linux, arch/x86/kernel/kvm.c).
KERNEL = "root=/dev/nvme0n1 rw console=ttyS0 quiet systemd.show_status=true no_timer_check"

# How long to wait for a guest. Its own processor time tells whether it gets anywhere: a boot takes
# some 60 s of it, with cloud-init 150, however busy this machine is. The clock is only for a guest
# that does nothing.
PROCESSOR_TIME = 600.0  # seconds
CLOCK_TIME = 1800.0


@dataclass(frozen=True)
class Disk:
    kernel: Path
    root: Path


def mirror() -> str:
    """The archive that this machine's apt uses; it has the other releases beside this one."""
    query = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    query += ["Identifier: Packages", "Label: Debian", "Component: main"]
    found = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()
    if not found:
        raise SystemExit("apt has no index of Debian's main archive: run apt-get update")
    return found[0]


def recipe(image: Image) -> list[str]:
    """mmdebstrap's options."""
    return [*OPTIONS, f"--include={PACKAGES},{NETWORK_PACKAGES[image.network]}"]


def tree_of(image: Image) -> Path:
    """Where an image's root tree is, or will be. Only a whole one ever has this name."""
    key = hashlib.sha256("\n".join(recipe(image)).encode()).hexdigest()[:12]
    return CACHE / f"{image.name}-{key}"


def debian(image: Image) -> Path:
    """The root tree of an image, cached."""
    tree = tree_of(image)
    if not tree.is_dir():
        with (CACHE / f"{image.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another run of the tests may make it, too
            if not tree.is_dir():
                make_tree(image, tree)
    return tree


def make_tree(image: Image, tree: Path) -> None:
    """In the place of those that an older recipe has made."""
    print(f"making the root tree of {image.name} in {CACHE} (450 MiB, a minute)", file=sys.stderr)
    for stale in CACHE.glob(f"{image.name}-*"):
        remove_tree(stale)
    partial = Path(tempfile.mkdtemp(prefix=f"{image.name}-partial-", dir=CACHE))
    partial.chmod(0o755)
    try:
        # A mount namespace: what mmdebstrap mounts in the tree cannot outlive it.
        command = ["unshare", "--mount", "mmdebstrap", "--mode=root", "--quiet", *recipe(image)]
        if subprocess.run([*command, image.release, str(partial), mirror()]).returncode:
            raise SystemExit(
                f"mmdebstrap could not make {image.name}: is a package mirror in reach?"
            )
        partial.rename(tree)
    except BaseException:
        remove_tree(partial)
        raise


def remove_tree(path: Path) -> None:
    subprocess.run(["rm", "-rf", "--one-file-system", str(path)], check=True)


# An overlay: the cached tree stays as it is. Run in a mount namespace: nothing stays mounted.
# systemctl needs /proc to see that it is in a chroot.
INSTALL = """
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t tmpfs tmpfs "$work"
mkdir "$work/upper" "$work/work" "$work/root"
mount -t overlay -o "lowerdir=$tree,upperdir=$work/upper,workdir=$work/work" overlay "$work/root"
cp -a "$files/." "$work/root/"
mount -t proc proc "$work/root/proc"
chroot "$work/root" env -i HOME=/root PATH="$PATH" DEBIAN_FRONTEND=noninteractive \\
    sh -euxc "$commands"
umount "$work/root/proc"
mke2fs -q -t ext4 -d "$work/root" "$disk" "$size"
"""


def install(
    tree: Path, directory: Path, files: Mapping[str, str | Path], commands: str = ":"
) -> Disk:
    """A disk in directory, made of a root tree, files, and shell commands run in it as root.

    Files are by their path in the guest: a text, or a file or directory to copy with its modes.
    What the commands say is in directory/install.log.
    """
    disk = Disk(kernel=next(tree.glob("boot/vmlinuz-*")), root=directory / "root.ext4")
    log = directory / "install.log"
    with tempfile.TemporaryDirectory() as scratch:
        work, staged = Path(scratch, "work"), Path(scratch, "files")
        for path in (work, staged):
            path.mkdir(mode=0o755)
        for name, content in files.items():
            target = staged / name.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                target.write_text(content)
            elif content.is_dir():
                shutil.copytree(content, target, symlinks=True)
            else:
                shutil.copy(content, target)
        given = {"tree": tree, "work": work, "files": staged, "disk": disk.root, "size": DISK_SIZE}
        environment = {name: str(value) for name, value in given.items()} | {"commands": commands}
        with log.open("w") as output:
            made = subprocess.run(
                ["unshare", "--mount", "sh", "-euc", INSTALL],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
    if made.returncode:
        raise RuntimeError(f"installing in {tree.name} failed:\n{log.read_text()[-2000:]}")
    return disk


class Channel:
    """JSON objects, one a line: what qemu's monitor and its guest agent both speak.

    Any thread may use it: the simulated AWS plugs from one of its own.
    """

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self.lock = threading.Lock()
        self.buffer = b""
        self.events: list[dict[str, Any]] = []
        self.ids = itertools.count(1)

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next object, with the lock held; an event is noted as well."""
        while b"\n" not in self.buffer:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionError("qemu has ended")
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self.events.append(message)
        return message

    def call(self, command: str, /, *, timeout: float = CLOCK_TIME, **arguments: object) -> Any:
        deadline = time.monotonic() + timeout
        with self.lock:
            request = {"execute": command, "arguments": arguments, "id": next(self.ids)}
            self.socket.sendall(json.dumps(request).encode() + b"\n")
            # Other answers are to calls that have timed out.
            while (answer := self.receive(deadline)).get("id") != request["id"]:
                pass
        if "error" in answer:
            raise RuntimeError(f"{command} {arguments}: {answer['error']['desc']}")
        return answer["return"]

    def forget(self, name: str) -> None:
        """Drop the events of that name that have come so far."""
        self.call("query-status")  # reads all that came before its answer
        self.events = [event for event in self.events if event["event"] != name]

    def wait_event(self, name: str, **data: object) -> None:
        deadline = time.monotonic() + CLOCK_TIME
        while True:
            with self.lock:
                for event in self.events:
                    if event["event"] == name and data.items() <= event.get("data", {}).items():
                        self.events.remove(event)
                        return
                # In short turns: another thread may have a call to make meanwhile.
                with contextlib.suppress(TimeoutError):
                    self.receive(min(deadline, time.monotonic() + 0.1))
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {name} {data} from qemu within {CLOCK_TIME:.0f} s")


@cache
def accelerator(kernel: Path) -> str:
    """kvm if a kernel really starts under it; it can be there and fail at once."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    command = "timeout 10 qemu-system-x86_64 -machine q35,accel=kvm -cpu host -nodefaults"
    command += f" -display none -serial stdio -kernel {kernel} -append earlyprintk=ttyS0"
    with subprocess.Popen(
        command.split(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as qemu:
        assert qemu.stdout
        works = False
        for line in qemu.stdout:
            works = b"Linux version" in line
            if works or b"KVM internal error" in line:
                break
        qemu.terminate()
    return "kvm" if works else "tcg"


def netdev(port: str, tap: str) -> dict[str, Any]:
    """The outer end of the NIC in that port, a tap in this network namespace, as qemu wants it."""
    return {
        "type": "tap",
        "id": f"net-{port}",
        "ifname": tap,
        "script": "no",
        "downscript": "no",
    }


def nic(port: str, mac: str) -> dict[str, Any]:
    """The NIC itself, as qemu wants it."""
    return {
        "driver": "virtio-net-pci",
        "id": f"nic-{port}",
        "netdev": f"net-{port}",
        "mac": mac,
        "bus": port,
        # No boot over the network, so no need for the package that has the code for it.
        "romfile": "",
    }


def as_option(properties: Mapping[str, str]) -> str:
    """Properties as qemu's command line wants them; the first may have no name there."""
    first, *others = properties.items()
    return ",".join([first[1], *(f"{name}={value}" for name, value in others)])


class VirtualMachine:
    """A running machine; as a context manager it is switched off at the end.

    nics are (MAC address, tap) pairs, there from the start; the taps are the VPC's. There is no
    initrd: the cloud kernels have NVMe and ext4 built in.
    """

    def __init__(
        self,
        name: str,
        disk: Disk,
        directory: Path,
        nics: Sequence[tuple[str, str]] = (),
        options: str = "net.ifnames=0",
    ) -> None:
        self.name = name
        self.mac_in: dict[str, str | None] = {f"port{n}": None for n in range(PORTS)}
        self.console, self.log = directory / f"{name}.console", directory / f"{name}.qemu"
        monitor, qemu_monitor = socket.socketpair()
        agent, qemu_agent = socket.socketpair()
        self.monitor, self.agent = Channel(monitor), Channel(agent)
        # By which a guest can tell that it is on EC2 (User Guide, "Identify EC2 instances").
        uuid = f"ec2{str(uuid4())[3:]}"
        words = f"""
            -name {name} -machine q35 -m {MEMORY}
            -smbios type=1,uuid={uuid},serial={uuid}
            -nodefaults -display none -serial file:{self.console}
            -kernel {disk.kernel}
            -drive file={disk.root},if=none,id=root,format=raw,snapshot=on
            -device nvme,serial=root,drive=root
            -chardev socket,id=monitor,fd={qemu_monitor.fileno()} -mon monitor,mode=control
            -chardev socket,id=agent,fd={qemu_agent.fileno()} -device virtio-serial-pci
            -device virtserialport,chardev=agent,name=org.qemu.guest_agent.0
        """.split()
        words += ACCELERATOR[accelerator(disk.kernel)]
        for number, port in enumerate(self.mac_in, 1):
            words += ["-device", f"pcie-root-port,id={port},chassis={number},slot={number}"]
        # EC2 starts an instance with its primary interface, so this is no hot-plug.
        for port, (mac, tap) in zip(self.mac_in, nics, strict=False):
            words += ["-netdev", as_option(netdev(port, tap))]
            words += ["-device", as_option(nic(port, mac))]
            self.mac_in[port] = mac
        kernel = f"{KERNEL} {options}"
        with qemu_monitor, qemu_agent, self.log.open("wb") as log:
            self.qemu = subprocess.Popen(
                ["qemu-system-x86_64", *words, "-append", kernel],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(qemu_monitor.fileno(), qemu_agent.fileno()),
            )
        try:
            self.monitor.call("qmp_capabilities")
        except BaseException as error:
            self.power_off()
            raise RuntimeError(f"{name} did not start: {self.log.read_text()}") from error

    def plug(self, mac: str, tap: str) -> None:
        """A NIC appears while the machine runs; its other end is a tap, as in netdev()."""
        port = next(port for port, other in self.mac_in.items() if other is None)
        self.monitor.call("netdev_add", **netdev(port, tap))
        self.monitor.call("device_add", **nic(port, mac))
        self.mac_in[port] = mac

    def unplug(self, mac: str) -> None:
        """The NIC goes, as soon as the guest has let go of it; the tap can be deleted then."""
        port = next(port for port, other in self.mac_in.items() if other == mac)
        self.monitor.call("device_del", id=f"nic-{port}")
        self.monitor.wait_event("DEVICE_DELETED", device=f"nic-{port}")
        self.monitor.call("netdev_del", id=f"net-{port}")
        self.mac_in[port] = None

    def processor_time(self) -> float:
        """Seconds of processor time that qemu has used."""
        _, _, fields = Path(f"/proc/{self.qemu.pid}/stat").read_text().rpartition(")")
        user, system = fields.split()[11:13]  # utime and stime: 14 and 15 in proc(5)
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def patience(self) -> Callable[[], bool]:
        """A condition that is true as long as there is hope that the guest gets somewhere."""
        processor = self.processor_time() + PROCESSOR_TIME
        clock = time.monotonic() + CLOCK_TIME

        def lasts() -> bool:
            if self.qemu.poll() is not None:
                return False
            return self.processor_time() < processor and time.monotonic() < clock

        return lasts

    def run(self, command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a shell command as root, once the guest has got as far as its agent."""
        patient = self.patience()
        while True:
            # A ping that meets the agent of a system that is going down is lost: ask again.
            with contextlib.suppress(TimeoutError):
                self.agent.call("guest-ping", timeout=2)
                break
            if not patient():
                shown = self.console.read_text(errors="replace")[-2000:]
                raise TimeoutError(f"{self.name} has no guest agent; its console:\n{shown}")
        options: dict[str, Any] = {"input-data": base64.b64encode(stdin.encode()).decode()}
        options |= {"path": "/bin/sh", "arg": ["-c", command], "capture-output": True}
        pid = self.agent.call("guest-exec", **options)["pid"]
        ask = partial(self.agent.call, "guest-exec-status", pid=pid)
        pause = 0.1
        while not (status := ask())["exited"]:
            if not patient():
                raise TimeoutError(f"{self.name} still runs {command}")
            time.sleep(pause)  # the agent tells only when asked, and that slows what it runs
            pause = min(2 * pause, 1.0)
        out, err = (
            base64.b64decode(status.get(name, "")).decode(errors="replace")
            for name in ("out-data", "err-data")
        )
        code = status["exitcode"] if "exitcode" in status else -status["signal"]
        return subprocess.CompletedProcess(command, code, out, err)

    def reboot(self) -> None:
        """As an administrator does it; returns when the new start begins."""
        self.monitor.forget("RESET")  # of an earlier reboot: qemu tells it twice
        options = {"path": "systemctl", "arg": ["--no-block", "reboot"]}
        # The agent may be gone before it has told.
        with contextlib.suppress(TimeoutError):
            self.agent.call("guest-exec", timeout=10, **options)
        self.monitor.wait_event("RESET", guest=True)

    def power_off(self) -> None:
        """As a host dies: nothing in it gets to do anything."""
        self.qemu.kill()
        self.qemu.wait()
        self.monitor.socket.close()
        self.agent.socket.close()

    def __enter__(self) -> VirtualMachine:
        return self

    def __exit__(self, *_: object) -> None:
        self.power_off()


def main() -> None:
    """All images, one for each processor at a time: dpkg, and Python's compiler, use but one."""
    CACHE.mkdir(parents=True, exist_ok=True)
    need_disk(TREE_SIZE * sum(not tree_of(image).is_dir() for image in IMAGES))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = [pool.submit(debian, image) for image in IMAGES]
        try:
            for tree in made:
                print(tree.result())
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, or Ctrl-C, begin no other


def need_disk(needed: int) -> None:
    """Exit unless there are so many MiB for images."""
    free = shutil.disk_usage(CACHE).free >> 20
    if free < needed:
        raise SystemExit(
            f"not enough disk: the virtual machines' images need {needed} MiB, "
            f"and {CACHE} has {free} MiB"
        )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted while the virtual machines' images were made") from None
