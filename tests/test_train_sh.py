"""train.sh: where it can be started from, and every way in which a first use can go wrong.

The project in these tests is a copy of train.sh, a `jobs` package that prints how it was started, and a lock that
holds one tiny wheel; so nothing is downloaded.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.chain

TRAIN_SH = Path(__file__).parent.parent / "train.sh"
STAMP = "baton-requirements.lock"
JOBS_MAIN = """
import json, os, sys
try:
    import baton_probe
    version = baton_probe.version
except ImportError:
    version = None
seen = {"arguments": sys.argv[1:], "folder": os.getcwd(), "file": __file__, "path": sys.path, "version": version}
print(json.dumps(seen))
sys.exit(64 if "--fail" in sys.argv else 0)
"""


def write_wheel(folder: Path, version: str) -> Path:
    wheel = folder / f"baton_probe-{version}-py3-none-any.whl"
    info = f"baton_probe-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("baton_probe.py", f"version = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: baton-probe\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"baton_probe.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return wheel


def write_project(folder: Path, version: str = "1.0") -> Path:
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs/__init__.py").touch()
    (folder / "jobs/__main__.py").write_text(JOBS_MAIN)
    (folder / "train.sh").write_text(TRAIN_SH.read_text())
    (folder / "train.sh").chmod(0o755)
    write_lock(folder, version)
    return folder


def write_lock(project: Path, version: str) -> None:
    wheel = write_wheel(project, version)
    (project / "requirements.lock").write_text(f"baton-probe @ {wheel.as_uri()}\n")


def environment(**changes: str) -> dict[str, str]:
    """Return this environment without what would change train.sh, and with a Python that is known to be there."""
    unset = ("BATON_PYTHON", "BATON_VENV", "PYTHONPATH", "PYTHONSAFEPATH")
    return {k: v for k, v in os.environ.items() if k not in unset} | {"BATON_PYTHON": sys.executable} | changes


def train(script: Path, *arguments: str, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [script, *arguments], cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=120
    )


def started(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return how the program saw its own start: the last line it printed."""
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after its first use, in a folder with a space in its name."""
    folder = write_project(tmp_path_factory.mktemp("train") / "my project")
    assert started(train(folder / "train.sh", cwd=folder))["version"] == "1.0"
    return folder


def test_works_from_another_folder_and_does_not_leave_it(project: Path, tmp_path: Path) -> None:
    seen = started(train(project / "train.sh", "configs/a b.yaml", "--training.lr", "1e-5", "", cwd=tmp_path))
    assert seen["arguments"] == ["configs/a b.yaml", "--training.lr", "1e-5", ""]
    assert seen["folder"] == str(tmp_path)
    assert seen["file"] == str(project / "jobs/__main__.py")


def test_works_through_a_symlink(project: Path, tmp_path: Path) -> None:
    (tmp_path / "first").symlink_to(project / "train.sh")
    (tmp_path / "second").symlink_to("first")
    assert started(train(tmp_path / "second", cwd=tmp_path))["file"] == str(project / "jobs/__main__.py")


def test_is_quiet_once_installed_and_hands_on_the_exit_status(project: Path) -> None:
    done = train(project / "train.sh", "--fail", cwd=project)
    assert done.returncode == 64
    assert done.stderr == ""


def test_keeps_the_python_path_of_the_user(project: Path, tmp_path: Path) -> None:
    seen = started(train(project / "train.sh", cwd=project, PYTHONPATH="/one:/two"))
    assert [p for p in seen["path"] if p in (str(project), "/one", "/two")] == [str(project), "/one", "/two"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH came with Python 3.11")
def test_another_checkout_in_the_current_folder_is_not_run_instead(project: Path, tmp_path: Path) -> None:
    other = write_project(tmp_path / "other")
    assert started(train(project / "train.sh", cwd=other))["file"] == str(project / "jobs/__main__.py")


def test_costs_less_than_50_ms_once_installed(project: Path) -> None:
    def fastest_s(command: list[str], **changes: str) -> float:
        times_s = []
        for _ in range(10):
            start = time.perf_counter()
            subprocess.run(command, cwd=project, env=environment(**changes), stdout=subprocess.DEVNULL, check=True)
            times_s.append(time.perf_counter() - start)
        return min(times_s)

    python_only = [str(project / ".venv/bin/python"), "-m", "jobs"]
    assert fastest_s([str(project / "train.sh")]) - fastest_s(python_only, PYTHONPATH=str(project)) < 0.05


def test_the_environment_can_be_elsewhere(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project")
    venv = tmp_path / "shared disk" / "venv"
    assert started(train(project / "train.sh", cwd=tmp_path, BATON_VENV=str(venv)))["version"] == "1.0"
    assert not (project / ".venv").exists()


def test_a_changed_lock_updates_the_environment_without_making_it_again(project: Path, tmp_path: Path) -> None:
    project = shutil.copytree(project, tmp_path / "project", symlinks=True)
    write_lock(project, "2.0")
    done = train(project / "train.sh", cwd=tmp_path)
    assert started(done)["version"] == "2.0"
    assert "baton: installing" in done.stderr
    assert "baton: making" not in done.stderr


def test_a_first_use_killed_while_it_installs_is_done_again_from_the_start(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project")
    first = subprocess.Popen(
        [project / "train.sh"],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert first.stderr is not None
    for line in first.stderr:
        if "baton: installing" in line:
            os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    leftover = project / ".venv/lib/half a package"
    leftover.touch()
    done = train(project / "train.sh", cwd=tmp_path)
    assert started(done)["version"] == "1.0"
    assert "baton: making" in done.stderr
    assert not leftover.exists()


def test_an_environment_whose_python_is_gone_is_made_again(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project")
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/python").symlink_to("/no/such/python")
    (project / ".venv/pyvenv.cfg").touch()
    (project / ".venv" / STAMP).write_text((project / "requirements.lock").read_text())
    assert started(train(project / "train.sh", cwd=tmp_path))["version"] == "1.0"


def test_two_first_uses_at_once_install_once(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project")
    both = [
        subprocess.Popen(
            [project / "train.sh"],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=120) for process in both]
    errors = "".join(error for _, error in printed)
    assert [process.returncode for process in both] == [0, 0], errors
    assert [json.loads(out)["version"] for out, _ in printed] == ["1.0", "1.0"]
    assert errors.count("baton: installing") == 1
    assert errors.count("waiting for it") == 1


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project")
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    done = train(project / "train.sh", cwd=tmp_path, BATON_VENV=str(home))
    assert done.returncode == 1
    assert "BATON_VENV must name a new folder" in done.stderr
    assert [p.name for p in home.iterdir()] == ["thesis.tex"]


def test_a_failed_installation_says_what_to_do_and_is_tried_again(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project")
    good = (project / "requirements.lock").read_text()
    (project / "requirements.lock").write_text("baton-probe-that-nobody-has==1.0\n")
    done = train(project / "train.sh", cwd=tmp_path, PIP_NO_INDEX="1")
    assert done.returncode == 1
    assert "pip could not install requirements.lock" in done.stderr
    assert "login node" in done.stderr
    (project / "requirements.lock").write_text(good)
    assert started(train(project / "train.sh", cwd=tmp_path))["version"] == "1.0"


@pytest.fixture
def fake_python(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a Python under a given name into a folder `bin`, this one after running a line that changes it."""

    def write(name: str, change: str) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        code = f"import sys; {change}; exec(sys.argv.pop(1))"
        path.write_text(
            f'#!/bin/sh\n[ "$1" = -c ] || exec {shlex.quote(sys.executable)} "$@"\n'
            f'exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} "$2"\n'
        )
        path.chmod(0o755)
        return path

    return write


TOO_OLD = "sys.version_info = (3, 6, 8)"
WITHOUT_ENSUREPIP = "sys.modules['ensurepip'] = None"


def test_says_which_pythons_were_found_when_all_are_too_old(
    tmp_path: Path, fake_python: Callable[[str, str], Path]
) -> None:
    project = write_project(tmp_path / "project")
    names = ["python3", "python3.13", "python3.12", "python3.11", "python3.10"]
    for name in names:
        folder = fake_python(name, TOO_OLD).parent
    done = train(project / "train.sh", cwd=tmp_path, PATH=f"{folder}:{os.environ['PATH']}", BATON_PYTHON="")
    assert done.returncode == 1
    for name in names:
        assert f"{name}: is Python 3.6, too old" in done.stderr
    assert "apt install python3" in done.stderr


def test_takes_the_next_python_when_the_first_is_too_old(
    tmp_path: Path, fake_python: Callable[[str, str], Path]
) -> None:
    project = write_project(tmp_path / "project")
    folder = fake_python("python3", TOO_OLD).parent
    fake_python("python3.13", "pass")
    done = train(project / "train.sh", cwd=tmp_path, PATH=f"{folder}:{os.environ['PATH']}", BATON_PYTHON="")
    assert started(done)["version"] == "1.0"


def test_a_python_that_the_user_named_is_not_replaced_by_another(
    tmp_path: Path, fake_python: Callable[[str, str], Path]
) -> None:
    project = write_project(tmp_path / "project")
    named = fake_python("python3.11", WITHOUT_ENSUREPIP)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    done = train(project / "train.sh", cwd=tmp_path, BATON_PYTHON=str(named))
    assert done.returncode == 1
    assert f"{named}: is Python {version} without ensurepip" in done.stderr
    assert f"apt install python{version}-venv" in done.stderr
    missing = train(project / "train.sh", cwd=tmp_path, BATON_PYTHON="/no/such/python")
    assert "/no/such/python: not found" in missing.stderr
