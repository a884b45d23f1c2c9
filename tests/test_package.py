"""What pip would install, and what one would unpack: the wheel and the source distribution."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from lab import SCRIPTS, TOP

from eni_ctl import __version__

pytestmark = pytest.mark.usefixtures("inside")
FILES = (*SCRIPTS, "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml")
FOLDERS = ("systemd", "tests")
# One that decides, one that compares files, one of the units, one that runs a script in the lab.
CHOICE = (
    "tests/eni_ctl/test_wait.py",
    "tests/eni_ctl/test_command_line.py::test_the_metadata_block_agrees_with_pyproject",
    "tests/boot/test_debian.py::test_the_units_are_as_tight_as_the_readme_says",
    "tests/eni_ctl/test_surroundings.py::test_the_status_of_a_name_that_nothing_has_says_so",
)


def check(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both distributions."""
    source = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(TOP / name, source)
    for name in FOLDERS:
        shutil.copytree(TOP / name, source / name)
    (source / "tests/compiled.pyc").touch()  # as an earlier run leaves them behind
    check(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    return source / "dist"


@pytest.fixture(scope="module")
def sdist(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    place = tmp_path_factory.mktemp("unpacked")
    check("tar", "-xf", built / f"eni_ctl-{__version__}.tar.gz", "-C", place)
    return place / f"eni_ctl-{__version__}"


@pytest.fixture(scope="module")
def venv(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment of the distribution's Python with the wheel in it."""
    place = tmp_path_factory.mktemp("venv")
    check("/usr/bin/python3", "-m", "venv", "--system-site-packages", place)
    wheel = built / f"eni_ctl-{__version__}-py3-none-any.whl"
    check(place / "bin/pip", "install", "--quiet", "--no-index", wheel)
    return place


def files_below(top: Path) -> set[str]:
    paths = [path for folder in FOLDERS for path in (top / folder).rglob("*")]
    return {path.relative_to(top).as_posix() for path in paths if path.is_file()}


def test_the_package_index_would_accept_both_distributions(built: Path) -> None:
    made = sorted(path for path in built.iterdir())
    assert len(made) == 2
    check(sys.executable, "-m", "twine", "check", "--strict", *made)


def test_the_wheel_installs_both_scripts_under_their_names(venv: Path) -> None:
    assert check(venv / "bin/eni_ctl.py", "--version") == f"eni_ctl.py {__version__}\n"
    assert "ifupdown" in check(venv / "bin/add_routes.py", "--help")
    for script in SCRIPTS:
        installed, own = ((top / script).read_text() for top in (venv / "bin", TOP))
        assert installed.startswith(f"#!{venv}/bin/python")
        assert installed.partition("\n")[2] == own.partition("\n")[2]


def test_the_wheel_brings_nothing_but_the_scripts(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(names) == [
        f"eni_ctl-{__version__}.data/scripts/{name}" for name in sorted(SCRIPTS)
    ]


def test_the_source_distribution_has_the_units_and_all_tests(sdist: Path) -> None:
    own = {file for file in files_below(TOP) if not file.endswith(".pyc")}
    assert files_below(sdist) == own
    for program in ("run", "demo", "bench"):
        assert (sdist / "tests" / program).stat().st_mode & 0o100


def test_the_tests_run_from_the_source_distribution(sdist: Path) -> None:
    done = check(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *CHOICE, cwd=sdist)
    assert f"rootdir: {sdist}\n" in done
    assert " passed" in done
