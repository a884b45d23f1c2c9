"""What pip would install: both scripts as modules, with console scripts."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from lab import SCRIPTS, TOP

from eni_ctl import __version__

pytestmark = pytest.mark.usefixtures("inside")


def check(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_installs_both_scripts(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in (*SCRIPTS, "README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(TOP / name, source)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    check(*build, str(source))
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert wheel.name == f"eni_ctl-{__version__}-py3-none-any.whl"
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {*SCRIPTS, "README.md", "LICENSE", "pyproject.toml"} <= set(names)
    venv = tmp_path / "venv"
    check("/usr/bin/python3", "-m", "venv", "--system-site-packages", str(venv))
    check(venv / "bin/pip", "install", "--quiet", "--no-index", str(wheel))
    assert check(venv / "bin/eni_ctl", "--version") == f"eni_ctl.py {__version__}\n"
    assert "ifupdown" in check(venv / "bin/add_routes", "--help")
    where = [f"{name.removesuffix('.py')}.__file__" for name in SCRIPTS]
    code = f"import add_routes, eni_ctl; print({', '.join(where)})"
    for path in check(venv / "bin/python", "-I", "-c", code).split():
        assert Path(path).is_relative_to(venv)
