#!/usr/bin/python3
"""Mount what the lab needs, and run a command there: `enter.py lab CACHE COMMAND...`.

tests/lab/setup.sh starts this program in fresh namespaces. It makes, in a tmpfs of the lab's own:

    /mnt/checkout   this checkout, wherever it lies. The lab's hosts have a /root, /run and /etc of
                    their own; what they need of the checkout must not vanish behind those
    /mnt/cache      the cache of the virtual machines' images
    /mnt/tmp        temporary files

`enter.py mounts COMMAND...`, in a fresh mount namespace, only keeps its mounts to that.
Only the distribution's Python and its standard library are needed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
# From <sys/mount.h>, and from each architecture's <asm/unistd.h>.
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 4096, 16384, 1 << 18, 2
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
libc = ctypes.CDLL(None, use_errno=True)
# PID 1 stays a shell, because a shell collects the processes that lose their parents.
INIT = ["sh", "-c", '"$@"; exit $?', "sh", "tests/lab/in-own-network"]


def mount(source: str, target: str, kind: str | None = None, flags: int = 0) -> None:
    """mount(2). The program of that name would look for both paths from the root."""
    paths = os.fsencode(source), os.fsencode(target)
    check(libc.mount(*paths, kind.encode() if kind else None, flags, None), f"mount {target}")


def check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def keep_mounts_private() -> None:
    """Nothing that is mounted from now on is seen outside of this mount namespace.

    In a chroot, that takes a way out of it and back: its root may be no mount point, so that the
    mount that it lies in cannot be named in there. And to stay in it would be dangerous: nsenter
    leads to the namespace's root, and so would all that the lab's hosts do. So the chroot becomes
    that root.
    """
    inner = os.open("/", os.O_RDONLY)
    os.chroot("/mnt")  # the working directory stays, outside of this root, so ".." leads out
    os.fchdir(inner)
    while not os.path.samefile(".", ".."):
        os.chdir("..")
    os.chroot(".")
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    chrooted = not os.path.samestat(os.stat("/"), os.fstat(inner))
    os.fchdir(inner)
    os.close(inner)
    if chrooted:
        mount(".", "mnt", flags=MS_BIND | MS_REC)
        os.chdir("mnt")
        # The old root ends up on top of the new one (pivot_root(2)), and is taken away there.
        check(libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
        check(libc.umount2(b".", MNT_DETACH), "umount the old root")
        os.chdir("/")


def check_root() -> None:
    """The hosts are entered by nsenter: where that leads, this lab must be."""
    seen = ["nsenter", "--mount=/proc/self/ns/mnt", "--", "test", "-e", "/mnt/checkout/README.md"]
    if subprocess.run(seen).returncode:
        raise OSError(errno.EINVAL, "nsenter leads out of the lab")


def enter_lab(cache: str, command: list[str]) -> None:
    keep_mounts_private()
    mount("proc", "/proc", "proc")
    # Opened first, because either may lie below /mnt.
    places = {"checkout": os.open(TOP, os.O_RDONLY)}
    if os.path.isdir(cache):
        places["cache/eni_ctl-lab"] = os.open(cache, os.O_RDONLY)
    mount("lab", "/mnt", "tmpfs")
    os.mkdir("/mnt/tmp")
    for name, place in places.items():
        os.makedirs(f"/mnt/{name}")
        os.fchdir(place)
        os.close(place)
        mount(".", f"/mnt/{name}", flags=MS_BIND | MS_REC)
    os.chdir("/mnt/checkout")
    check_root()
    # A shell that starts something in the background has it ignore Ctrl-C, and so would all below.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    environment = {
        **os.environ,
        "ENI_LAB": "inside",
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        "TMPDIR": "/mnt/tmp",
        "XDG_CACHE_HOME": "/mnt/cache",
    }
    os.execvpe(INIT[0], [*INIT, *command], environment)


if __name__ == "__main__":
    try:
        if sys.argv[1] == "mounts":
            keep_mounts_private()
            os.chdir(TOP)
            os.execvp(sys.argv[2], sys.argv[2:])
        enter_lab(sys.argv[2], sys.argv[3:])
    except OSError as problem:
        raise SystemExit(problem.strerror) from None
