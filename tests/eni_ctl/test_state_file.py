"""The state file: what bash, dash and systemd read back, and how it is replaced."""

from __future__ import annotations

import re
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lab import Lab, Machine
from lab.watching import last_line

from eni_ctl import quote_for_shell

HOSTILE = [
    "$(touch /tmp/owned)",
    "`touch /tmp/owned`",
    "; touch /tmp/owned",
    "a'b\"c\\d$e`f",
    "'",
    '"',
    "\\",
    "two\nlines\nDEVICE=evil",
    "tab\there",
    " leading and trailing ",
    "ünïcødé ✓ 漢字",
    "~root",
    "a=b # no comment",
    "*?[a-z]",
    "!history",
    "",
]
KEYS = ["FQDN", "IP", "GW", "DEVICE", "ASG_NAME", "INSTANCE_ID", "ENI_ID", "ATTACHMENT_ID"]


def read_by_shell(shell: str, path: Path) -> str:
    """FQDN as the shell has it after reading the file."""
    script = '. "$1"; printf "%s." "$FQDN"'
    done = subprocess.run([shell, "-c", script, shell, path], capture_output=True, check=True)
    assert done.stderr == b""
    return done.stdout.decode()[:-1]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_tag_is_read_back_and_never_run(
    lab: Lab, subnet: str, tmp_path: Path, value: str
) -> None:
    lab.aws.create_eni(subnet, name=f"web{value}", tags={"FQDN": value})
    machine = lab.launch(subnet, group=f"web{value}")
    owned = Path("/tmp/owned")
    assert not owned.exists()
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    text = machine.read("/etc/default/eni")
    assert re.findall(r"^([A-Z_]+)=", text.replace("\nDEVICE=evil", ""), re.M) == KEYS
    file = tmp_path / "eni"
    file.write_text(text)
    for reader in READERS.values():
        assert reader(file) == value
    assert machine.state()["ASG_NAME"] == f"web{value}"
    assert not owned.exists()


# Reads the file named by its argument as a service manager does before it starts a service: by
# systemd's own parser and its own weeding of bad variables, from the library its programs share.
READ_BY_SYSTEMD = """
import ctypes, glob, os, sys
(library,) = glob.glob("/usr/lib/*/systemd/libsystemd-shared-*.so")
systemd = ctypes.CDLL(library)
systemd.strv_env_clean_with_callback.restype = ctypes.POINTER(ctypes.c_char_p)
variables = ctypes.POINTER(ctypes.c_char_p)()
code = systemd.load_env_file(None, os.fsencode(sys.argv[1]), ctypes.byref(variables))
if code < 0:
    sys.exit(f"systemd refuses the file: {os.strerror(-code)}")
for variable in systemd.strv_env_clean_with_callback(variables, None, None):
    if variable is None:
        break
    sys.stdout.buffer.write(variable + b"\\0")
"""


def read_by_systemd(path: Path) -> str:
    command = ["/usr/bin/python3", "-c", READ_BY_SYSTEMD, str(path)]
    done = subprocess.run(command, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    variables = done.stdout.decode().split("\0")
    return dict(variable.split("=", 1) for variable in variables if variable)["FQDN"]


READERS = {
    "bash": lambda path: read_by_shell("bash", path),
    "dash": lambda path: read_by_shell("dash", path),
    "systemd": read_by_systemd,
}


def readable(value: str) -> str:
    """What can be kept: neither control characters nor Unicode's noncharacters."""
    return "".join(c for c in value if c in "\t\n" or not (c < " " or c == "\x7f" or is_none(c)))


def is_none(c: str) -> bool:
    """Whether Unicode says that this is no character, and systemd that it is not UTF-8."""
    return "\ufdd0" <= c <= "\ufdef" or c.encode("utf-32-le")[:2] in (b"\xfe\xff", b"\xff\xff")


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=60, deadline=None)
@given(value=st.text(st.characters(codec="utf-8"), max_size=40))
@example(value="x\ufdd0\uffff\U0001fffe\x00\x1b\x7f\r\x85")
def test_any_value_in_the_state_file_is_read_back_by_each_reader(
    tmp_path_factory: pytest.TempPathFactory, reader: str, value: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "eni"
    path.write_text(f"FQDN={quote_for_shell(value)}\nIP=10.0.1.22\n", newline="")
    assert READERS[reader](path) == readable(value)


def test_the_state_file_is_replaced_whole_and_readable_by_all(machine: Machine) -> None:
    machine.write("/etc/default/eni", "old\n", 0o600)
    machine.write("/etc/default/eni.new", "left by a run that was killed\n", 0o600)
    done = machine.run("sh", "-c", "umask 077; exec eni_ctl.py -a")
    assert done.returncode == 0, done.stderr
    assert machine.run("ls", "/etc/default").stdout.count("eni") == 1
    mode = int(machine.run("stat", "-c", "%f", "/etc/default/eni").stdout, 16)
    assert stat.S_IMODE(mode) == 0o644
    assert machine.read("/etc/default/eni").splitlines()[1:4] == [
        "IP=10.0.1.22",
        "GW=10.0.1.1",
        "DEVICE=eth1",
    ]


def test_a_state_file_that_is_a_symbolic_link_stays_one(machine: Machine) -> None:
    machine.run("ln", "-s", "/run/eni.env", "/etc/default/eni")
    assert machine.eni_ctl("-a").returncode == 0
    assert machine.run("readlink", "/etc/default/eni").stdout == "/run/eni.env\n"
    assert machine.state("/run/eni.env")["IP"] == "10.0.1.22"


def test_the_state_file_can_have_another_path(machine: Machine) -> None:
    assert machine.eni_ctl("-a", "-o", "/run/eni.env").returncode == 0
    assert machine.state("/run/eni.env")["IP"] == "10.0.1.22"
    assert not machine.exists("/etc/default/eni")


@pytest.mark.parametrize(
    ("spoil", "path", "words"),
    [
        ("true", "/run/none/eni", "No such file or directory"),
        ("mount -t tmpfs -o ro lab /etc/default", "/etc/default/eni", "Read-only file system"),
        (
            "mount -t tmpfs -o size=4k lab /etc/default; "
            "cat /dev/zero > /etc/default/big 2>/dev/null || true",
            "/etc/default/eni",
            "No space left on device",
        ),
    ],
)
def test_a_state_file_that_cannot_be_written_is_a_failure_but_the_eni_is_attached(
    machine: Machine, spoil: str, path: str, words: str
) -> None:
    machine.run("sh", "-c", spoil)
    done = machine.eni_ctl("-a", "-o", path)
    assert done.returncode == 1
    last = last_line(done)
    assert last == f"eni_ctl.py: cannot write the state file {path}: {words}"
    assert machine.devices() == ["eth0", "eth1"]
    assert not machine.exists(f"{path}.new")
