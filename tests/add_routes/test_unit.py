"""systemd/add_routes.service: whether what it leaves to the program is enough.

What systemd itself says of the unit is in tests/boot.
"""

from __future__ import annotations

import re
import subprocess

from lab import TOP, await_that
from lab.kernel import SCRIPT, Kernel
from lab.vpc import OUTER_LIMIT

UNIT = TOP / "systemd/add_routes.service"


def test_it_needs_no_capability_but_the_one_that_the_unit_leaves_it(kernel: Kernel) -> None:
    (left,) = re.findall("^CapabilityBoundingSet=CAP_(.+)$", UNIT.read_text(), re.M)
    drop = ["setpriv", f"--bounding-set=-all,+{left.lower()}", "--inh-caps=-all", "--no-new-privs"]
    process = subprocess.Popen(kernel.command(*drop, SCRIPT, "--watch", "-d", "eth*"))
    await_that(lambda: "20030: from 10.0.1.22 lookup 101" in kernel.rules())
    await_that(lambda: "101 eth1" in kernel.run("cat", NAME).stdout)
    assert kernel.run("stat", "-c", "%a", NAME).stdout == "644\n"
    process.terminate()
    assert process.wait(OUTER_LIMIT) == 0


NAME = "/etc/iproute2/rt_tables.d/eth1.conf"
