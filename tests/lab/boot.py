"""Instances that are virtual machines: stock Debian in the lab's VPC, installed by the README."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from lab import TOP, Lab, addresses, snippet
from lab.aws import Instance
from lab.vm import POOL, Disk, Image, VirtualMachine, debian, install
from lab.vpc import ENDPOINT, MIRROR, MIRROR_NAME, PROBE, Vpc
from lab.wire import Answer, Handler, Listener, server_context

SOURCE = "/root/eni_ctl"  # where the guest has this project, to install from


# The first lines of README's install sections, by what sets up the network there.
INSTALL = {
    "ifupdown": "# Where ifupdown sets up the network",
    "netplan": "# Debian's and Ubuntu's cloud images",
    "cloud-ifupdown": "# Debian 11's cloud images, and where NetworkManager sets up the network",
    "networkmanager": "# Debian 11's cloud images, and where NetworkManager sets up the network",
}
# What Debian's cloud images have beyond their packages, as far as it matters here; and what saves
# the emulated processor a minute of making keys.
CLOUD_IMAGE = {
    "/etc/cloud/cloud.cfg.d/01_debian_cloud.cfg": "apt: {preserve_sources_list: true}\n",
    "/etc/cloud/cloud.cfg.d/90_dpkg.cfg": "datasource_list: [ Ec2, None ]\n",
    "/etc/cloud/cloud.cfg.d/99_lab.cfg": "ssh_genkeytypes: [ ed25519 ]\nlocale: false\n",
}
ENABLE_NETWORKD = """
systemctl enable systemd-networkd systemd-resolved
ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
"""
# ifupdown waits two minutes for udev to name the devices, and then begins without them. A guest
# that a busy machine starves needs longer.
IFUPDOWN = {
    "/etc/systemd/system/ifupdown-pre.service.d/patient.conf": (
        "[Service]\nExecStart=\nExecStart=/bin/udevadm settle --timeout=3600\nTimeoutSec=infinity\n"
    ),
}
# Debian 11's image has cloud-init leave the network alone, and a helper of udev's that writes a
# stanza for each device which ifupdown does not know. By DHCPv6, the helper's stanza gets an
# address where there is one (debian-cloud-images, config_space of bullseye's time).
TRY_DHCP = """\
#!/bin/sh
[ "$ADDRFAM$IF_TRY_DHCP" = inet61 ] || exit 0
ip link set dev "$IFACE" up
/lib/ifupdown/wait-for-ll6.sh
files="-pf /run/dhclient6.$IFACE.pid -lf /var/lib/dhcp/dhclient6.$IFACE.leases"
exec dhclient -6 -nw $files "$IFACE"
"""
HELPER = """\
#!/bin/sh
ifup --no-act "$INTERFACE" >/dev/null 2>&1 && exit
mkdir -p /run/network/interfaces.d
sed "s/[$]INTERFACE/$INTERFACE/" /etc/network/cloud-interfaces-template \\
    >"/run/network/interfaces.d/$INTERFACE"
systemctl --no-block start "ifup@$INTERFACE.service"
"""
CLOUD_IFUPDOWN = {
    "/etc/cloud/cloud.cfg.d/99-disable-network-config.cfg": "network: {config: disabled}\n",
    "/etc/network/interfaces": """\
source-directory /etc/network/interfaces.d
source-directory /run/network/interfaces.d
""",
    "/etc/network/cloud-interfaces-template": """\
auto $INTERFACE
allow-hotplug $INTERFACE
iface $INTERFACE inet dhcp
iface $INTERFACE inet6 manual
    try_dhcp 1
""",
    "/etc/network/cloud-ifupdown-helper": HELPER,
    "/etc/network/if-pre-up.d/cloud_inet6": TRY_DHCP,
    "/etc/udev/rules.d/75-cloud-ifupdown.rules": (
        'SUBSYSTEM=="net", ACTION=="add", ENV{INTERFACE}=="eth*|en*",'
        ' RUN+="/etc/network/cloud-ifupdown-helper"\n'
    ),
}
MAKE_EXECUTABLE = """
chmod +x /etc/network/cloud-ifupdown-helper /etc/network/if-pre-up.d/cloud_inet6
"""
# Debian 11's dhclient may stop to listen when a packet comes while it opens its socket, and then it
# hears no answer for ever (Ubuntu bug 1926139, "thread concurrency race leads to DHCPOFFER packets
# not being received"). Another process of it may hear. Debian 12's has no threads.
DHCLIENT = """\
#!/bin/sh
case " $* " in *" -r "* | *" -x "* | *" -6 "*) exec /sbin/dhclient.once "$@" ;; esac
for try in 1 2 3 4 5; do
    /sbin/dhclient.once -1 "$@" && exit
done
exit 1
"""
MEND_DHCLIENT = """
mv /sbin/dhclient /sbin/dhclient.once
install -m 755 /root/dhclient /sbin/dhclient
echo 'timeout 30;' >>/etc/dhcp/dhclient.conf
"""
# By network set-up: what such an image has, as texts by their path, and what is to be run in it.
SET_UP: dict[str, tuple[Mapping[str, str], str]] = {
    "ifupdown": (IFUPDOWN, ""),
    "netplan": (CLOUD_IMAGE, ENABLE_NETWORKD),
    "cloud-ifupdown": ({**CLOUD_IMAGE, **IFUPDOWN, **CLOUD_IFUPDOWN}, MAKE_EXECUTABLE),
    "networkmanager": ({}, ""),
}
SOURCES = "/etc/apt/sources.list"
CA = "/usr/local/share/ca-certificates/lab.crt"


def stock_disk(lab: Lab, image: Image, directory: Path) -> Disk:
    """A disk of a cloud image as it is; it installs packages from the mirror in the VPC.

    It has the lab's CA, as it would have that of a public web server.
    """
    directory.mkdir(exist_ok=True)
    source = f"deb [trusted=yes] https://{MIRROR_NAME}/debian ./\n"
    more, commands = SET_UP[image.network]
    files: dict[str, str | Path] = {**more, SOURCES: source, CA: lab.aws.ca}
    commands += f"\nrm -r /{POOL}\nupdate-ca-certificates\n"
    return install(debian(image), directory, files, commands)


def make_disk(
    lab: Lab,
    image: Image,
    directory: Path,
    configuration: Mapping[str, str],
    commands: str = "",
) -> Disk:
    """A disk of that image, with the README's install section run in it as written, then the
    commands. Configuration is texts by their path.

    Beyond that it has only the lab's CA, and with ifupdown the names of AWS's endpoints; elsewhere
    the resolver of the VPC has to tell them.
    """
    directory.mkdir(exist_ok=True)
    files: dict[str, str | Path] = {
        f"{SOURCE}/eni_ctl.py": TOP / "eni_ctl.py",
        f"{SOURCE}/add_routes.py": TOP / "add_routes.py",
        f"{SOURCE}/systemd": TOP / "systemd",
        SOURCES: f"deb [trusted=yes] file:/{POOL} ./\n",
        CA: lab.aws.ca,
    }
    more, before = SET_UP[image.network]
    files |= more
    if image.network == "ifupdown":
        names = "".join(f"{ENDPOINT} {name}\n" for name in lab.aws.host_names)
        files["/etc/hosts"] = f"127.0.0.1 localhost debian\n{names}"
    if image.release == "bullseye":
        files["/root/dhclient"] = DHCLIENT
        before += MEND_DHCLIENT
    readme = snippet(INSTALL[image.network])
    commands = f"cd {SOURCE}\n{before}\n{readme}\nupdate-ca-certificates\n{commands}"
    return install(debian(image), directory, {**files, **configuration}, commands)


class Mirror:
    """The user's own web server, with the files of a directory. As a context manager it stops."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.listener = Listener(MIRROR, 443, self.answer, server_context((MIRROR_NAME,)))

    def answer(self, connection: Handler, _: bytes) -> None:
        file = self.directory / unquote(connection.path).lstrip("/")
        connection.send(Answer(200, file.read_bytes()) if file.is_file() else Answer(404))

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.stop()


class Booted:
    """An EC2 instance as a virtual machine; times are seconds since its power went on."""

    def __init__(
        self, lab: Lab, instance: Instance, disk: Disk, directory: Path, options: str
    ) -> None:
        self.instance, self.vpc = instance, lab.vpc
        self.addresses = addresses(instance.primary)  # the primary one of each family
        if lab.vpc.dnsmasq is None:
            lab.vpc.start_dhcp(lab.aws.host_names)
        tap = lab.vpc.open_tap(instance.mac, self.addresses)
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

    def sh(self, command: str) -> str:
        """What a command prints in the guest. It must succeed."""
        done = self.vm.run(command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def write(self, path: str, text: str) -> None:
        done = self.vm.run(f'mkdir -p "$(dirname {path})" && cat > {path}', stdin=text)
        assert done.returncode == 0, f"{path}: {done.stderr}"

    def ask_each(self, calls: Iterable[tuple[str, str]]) -> list[str]:
        """As Host.ask, for each of these addresses and sources: our address as seen from there.

        One command for all, because each start of Python costs the emulated processor a second.
        """
        words = " ".join(f"{address} {source}" for address, source in calls)
        done = self.vm.run(f"python3 - ask-each {words}", stdin=PROBE.read_text())
        return done.stdout.splitlines()

    def await_sh(self, command: str, condition: Callable[[str], bool]) -> None:
        """Ask by a command until the answer is right.

        Each time costs the emulated processor a second, so the longer it takes, the rarer.
        """
        patient, began = self.vm.patience(), time.monotonic()
        while not condition(answer := self.vm.run(command).stdout.strip()):
            assert patient(), f"{command}: {answer}\n{self.journal()}"
            waited = time.monotonic() - began
            time.sleep(min(1 + waited / 10, 10))

    def await_that(self, condition: Callable[[], bool]) -> None:
        """Wait for what the guest brings about, without a look into it: that slows it."""
        patient = self.vm.patience()
        while not condition():
            assert patient(), self.journal()
            time.sleep(0.02)

    def eni_service_took(self) -> float:
        """From its start to being active, by systemd's clock."""
        named = ("InactiveExitTimestampMonotonic", "ActiveEnterTimestampMonotonic")  # microseconds
        start, end = (self.sh(f"systemctl show --value --property {name} eni") for name in named)
        return (int(end) - int(start)) / 1e6

    def reached_multi_user(self) -> float:
        """The kernel's start to multi-user.target, by the guest's clock."""
        name = "ActiveEnterTimestampMonotonic"  # microseconds
        return int(self.sh(f"systemctl show --value --property {name} multi-user.target")) / 1e6

    def is_active(self, unit: str) -> str:
        """systemd's word for the unit's state."""
        return self.vm.run(f"systemctl is-active {unit}").stdout.strip()

    def ordered_after(self, unit: str) -> set[str]:
        """The units that systemd starts only when this one has started, or has failed."""
        return set(self.sh(f"systemctl show --value --property Before {unit}").split())

    def journal(self) -> str:
        """For a test that fails: what the guest's network set-up and eni.service say, and what the
        VPC has seen of it."""
        units = "--unit networking --unit 'ifup@*' --unit systemd-networkd --unit eni"
        told = self.vm.run(f"journalctl --no-pager --boot {units}; ip addr; ip rule").stdout
        return f"{told}\nthe VPC:\n{self.vpc.account()}"


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
