"""The one command on a machine without Slurm: it finishes, says where it stands, goes on, and loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.config import PROJECT
from training.checkpoints import newest_valid
from training.run_folder import RunFolder

pytestmark = pytest.mark.chain

RunCommand = Callable[..., subprocess.CompletedProcess[str]]
TEST_YAML = str(PROJECT / "configs/test.yaml")


def train_sh(*arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    command = [str(PROJECT / "train.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def here(folder: Path) -> list[str]:
    return ["--cluster", "local", "--runs_dir", str(folder / "runs"), "--data_dir", str(folder / "data")]


@pytest.fixture(scope="module")
def finished(project_copy: Path) -> RunFolder:
    """configs/test.yaml, trained as the README says."""
    return RunFolder(project_copy / "runs/test")


def test_the_first_command_of_the_readme_learns_and_evaluates(finished: RunFolder) -> None:
    assert finished.done.exists()
    losses = [line["loss"] for line in finished.metrics()]
    assert losses[-1] < losses[0] / 2
    evaluation = json.loads(finished.evaluation.read_text())
    assert evaluation["perplexity"] > 1
    assert (finished.export / "model.safetensors").exists()
    assert [event["block"] for event in finished.events() if event["event"] == "block_end"] == [1, 2, 3]
    assert "<svg" in (finished.path / "report.html").read_text()


def test_the_run_folder_tells_what_was_run(finished: RunFolder) -> None:
    manifest = json.loads(finished.manifest.read_text())
    assert manifest["packages"]["torch"]
    assert Path(manifest["module"]["path"]) == finished.code / "datasets/test_dataset.py"
    assert (finished.code / "jobs/job.py").exists()
    assert not (finished.code / ".venv").exists()
    assert not (finished.code / "runs").exists()
    assert "batch_size: 4" in finished.config.read_text()


def test_a_finished_run_says_so_and_trains_no_more(finished: RunFolder, in_copy: RunCommand) -> None:
    before = finished.evaluation.stat().st_mtime_ns
    answer = in_copy("./train.sh configs/test.yaml")
    assert answer.returncode == 0
    assert "run test is finished" in answer.stdout
    assert finished.evaluation.stat().st_mtime_ns == before


def test_a_run_made_before_a_setting_existed_is_still_the_same_run(finished: RunFolder, in_copy: RunCommand) -> None:
    stored = finished.config.read_text()
    older = stored.replace("  mask_rationale: false\n", "")
    assert older != stored
    finished.config.write_text(older)
    answer = in_copy("./train.sh configs/test.yaml")
    finished.config.write_text(stored)
    assert answer.returncode == 0
    assert "run test is finished" in answer.stdout


def test_other_settings_under_the_same_name_are_refused_with_what_changed(
    finished: RunFolder, in_copy: RunCommand
) -> None:
    answer = in_copy("./train.sh configs/test.yaml", "--training.lr", "1e-4")
    assert answer.returncode == 64
    assert "training.lr: 0.003 -> 0.0001" in answer.stderr
    assert "--name" in answer.stderr


def test_status_and_logs_show_the_run(finished: RunFolder) -> None:
    status = json.loads(train_sh("status", str(finished.path), "--json").stdout)
    assert status["state"] == "done"
    assert status["step"] == status["horizon_steps"]
    assert [job["kind"] for job in status["jobs"]] == ["block", "block", "block", "evaluate"]
    assert "evaluate" in train_sh("status", str(finished.path)).stdout
    assert train_sh("logs", str(finished.path)).returncode == 0


def test_a_dry_run_shows_the_plan_and_leaves_nothing(tmp_path: Path) -> None:
    answer = train_sh(TEST_YAML, *here(tmp_path), "--dry-run")
    assert answer.returncode == 0
    assert "3 blocks of 4 epochs" in answer.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_killed_command_goes_on_where_it_was_and_runs_only_once_at_a_time(tmp_path: Path) -> None:
    arguments = [TEST_YAML, *here(tmp_path), "--training.total_jobs", "2", "--training.epochs_per_job", "1"]
    run = RunFolder(tmp_path / "runs/test")
    first = subprocess.Popen([PROJECT / "train.sh", *arguments], stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: any(event["event"] == "block_end" for event in run.events()), seconds=120)
    rival = train_sh(*arguments)
    assert "is being worked on by process" in rival.stderr
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not run.done.exists()

    status = json.loads(train_sh("status", str(run.path), "--json").stdout)
    assert status["state"] == "unfinished"
    second = train_sh(*arguments)
    assert second.returncode == 0, second.stdout + second.stderr
    resumed = [event["step"] for event in run.events() if event["event"] == "resumed"]
    assert resumed and resumed[0] > 0
    assert run.done.exists()


def wait_for(condition, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened for {seconds} s"
        time.sleep(0.1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB: room for the code and one checkpoint of the tiny model, not for two."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a full disk needs a small one, and mounting one failed: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def final_weights(run: RunFolder) -> bytes:
    checkpoint, passed_over = newest_valid(run.checkpoints)
    assert checkpoint is not None and passed_over == []
    assert checkpoint.step == checkpoint.terms.horizon_steps and not checkpoint.wrong_epochs
    return (checkpoint.path / "model.safetensors").read_bytes()


def test_a_full_disk_while_saving_changes_nothing(small_disk: Path, finished: RunFolder) -> None:
    folder = small_disk
    two_blocks = ["--training.epochs_per_job", "6", "--training.total_jobs", "2"]  # with the same end as three of 4
    answer = train_sh(TEST_YAML, *here(folder), *two_blocks)
    run = RunFolder(folder / "runs/test")
    assert answer.returncode not in (0, 64)
    assert "on that disk" in answer.stdout or "the disk has" in answer.stdout
    checkpoint, passed_over = newest_valid(run.checkpoints)
    assert checkpoint is not None and passed_over == []
    assert not [path for path in run.checkpoints.iterdir() if "tmp" in path.name]

    subprocess.run(["mount", "-o", "remount,size=256m", folder], check=True)
    again = train_sh(TEST_YAML, *here(folder), *two_blocks)
    assert again.returncode == 0, again.stdout + again.stderr
    assert run.done.exists()
    assert final_weights(run) == final_weights(finished)
