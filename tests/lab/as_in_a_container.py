#!/usr/bin/python3
"""Run a command where namespaces are forbidden: `as_in_a_container.py COMMAND...`.

A seccomp filter answers unshare(2) with EPERM, as the default profile of Docker does for containers
without CAP_SYS_ADMIN (moby, profiles/seccomp/default.json).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

# From <linux/prctl.h>, <linux/seccomp.h> and <linux/filter.h>.
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
UNSHARE = {"x86_64": 272, "aarch64": 97}  # from each architecture's <asm/unistd.h>


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def forbid_unshare() -> None:
    number = UNSHARE[os.uname().machine]
    instructions = [
        struct.pack("HBBI", LOAD, 0, 0, 0),  # the system call's number
        struct.pack("HBBI", EQUAL, 0, 1, number),
        struct.pack("HBBI", RETURN, 0, 0, ERRNO | errno.EPERM),
        struct.pack("HBBI", RETURN, 0, 0, ALLOW),
    ]
    program = Program(len(instructions), b"".join(instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*call):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forbid_unshare()
    os.execvp(sys.argv[1], sys.argv[1:])
