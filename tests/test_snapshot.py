"""What goes into a run's copy of the code, and what must not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from jobs import snapshot


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project with a commit, a change, a new file, an ignored one, a secret and a large one."""
    folder = tmp_path / "project with spaces"
    (folder / "datasets").mkdir(parents=True)
    (folder / "train.py").write_text("committed")
    (folder / ".gitignore").write_text("runs/\n")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    (folder / "train.py").write_text("changed")
    (folder / "datasets/new.py").write_text("untracked")
    (folder / "runs").mkdir()
    (folder / "runs/old.txt").write_text("ignored")
    (folder / ".env").write_text("HF_TOKEN=hf_secret")
    (folder / "large.bin").write_bytes(bytes(11 * 2**20))
    monkeypatch.setattr(snapshot, "PROJECT", folder)
    return folder


def copied(target: Path) -> set[str]:
    return {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}


def test_changed_and_untracked_files_come_along_and_ignored_secret_and_large_ones_do_not(project: Path) -> None:
    target = project.parent / "code"
    left_out = snapshot.snapshot_code(target, project / "datasets/new.py")
    assert copied(target) == {"train.py", ".gitignore", "datasets/new.py"}
    assert (target / "train.py").read_text() == "changed"
    assert left_out == ["large.bin"]


def test_a_project_that_is_no_git_checkout_is_copied_without_its_known_output(project: Path) -> None:
    subprocess.run(["rm", "-rf", str(project / ".git")], check=True)
    target = project.parent / "code"
    snapshot.snapshot_code(target, project / "datasets/new.py")
    assert copied(target) == {"train.py", ".gitignore", "datasets/new.py"}


def test_a_dataset_module_from_elsewhere_comes_along_with_its_neighbours(project: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.py").write_text("import neighbour")
    (elsewhere / "neighbour.py").write_text("")
    target = project.parent / "code"
    snapshot.snapshot_code(target, elsewhere / "mine.py")
    assert {"outside/mine.py", "outside/neighbour.py"} <= copied(target)
    assert snapshot.in_snapshot(elsewhere / "mine.py", target) == target / "outside/mine.py"
    assert snapshot.in_snapshot(project / "train.py", target) == target / "train.py"
    assert snapshot.in_snapshot(project / "large.bin", target) == project / "large.bin"


def test_the_manifest_names_the_commit_and_what_was_changed(project: Path) -> None:
    facts = snapshot.describe_environment()
    assert len(facts["git"]["commit"]) == 40
    assert " M train.py" in facts["git"]["changed_files"]
    assert facts["packages"]["torch"]
