"""Capturing a teacher as a Slurm array: submitted once, whatever happens to the submission or to its tasks."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from tiny_chains import folders, queued_names, quick_train
from tiny_teachers import TEST_YAML, make_teacher, taught_by

from jobs import launch, submission
from jobs.chain import Journal
from jobs.config import PROJECT
from jobs.plan import plan_run
from jobs.preflight import CheckedRun, check_run
from jobs.queue import known_jobs
from jobs.status import read_status
from jobs.steering import cancel_run
from jobs.top_up import top_up
from training.run_folder import RunFolder
from training.shard_folder import capture_progress, is_complete

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster

pytest_plugins = ["slurm_cluster"]
pytestmark = pytest.mark.cluster

NOT_NOW = ["--slurm.extra.begin", "now+1hour"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def options(folder: Path, teacher: Path, *overrides: str) -> list[str]:
    return [
        *taught_by(teacher),
        *folders(folder),
        "--distillation.cache.tasks",
        "3",
        "--slurm.mem",
        "1000M",
        "--training.total_jobs",
        "2",
        *overrides,
    ]


def checked_run(folder: Path, teacher: Path, *overrides: str) -> CheckedRun:
    return check_run(PROJECT / "configs/test.yaml", options(folder, teacher, *overrides))


def cache_of(checked: CheckedRun) -> Path:
    capture = plan_run(checked).capture
    assert capture is not None
    return capture.folder


def wait_until(condition: Callable[[], object], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened for {seconds} s"
        time.sleep(0.2)


def starts_of(run: RunFolder) -> dict[str, dict[str, Any]]:
    """The last start of each task that captures."""
    starts = [event for event in run.events() if event["event"] == "job_start" and event["kind"] == "capture"]
    return {event["job"]: event for event in starts}


def logs_of(run: RunFolder) -> str:
    return "\n".join(path.read_text() for path in run.logs.glob("*_log.out"))


def test_an_array_shares_the_shards_and_makes_up_for_tasks_that_are_killed_or_preempted(
    slurm: SlurmCluster, teacher: Path, tmp_path: Path
) -> None:
    checked = checked_run(tmp_path, teacher, "--distillation.cache.shard_tokens", "32")
    cache, run = cache_of(checked), RunFolder(tmp_path / "runs/test")
    arguments = ["capture", TEST_YAML, *options(tmp_path, teacher, "--distillation.cache.shard_tokens", "32")]
    answer = quick_train(*arguments)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "of 3 tasks, after" in answer.stdout
    array = next(job for job in Journal.open(run).jobs if job.kind == "capture")

    wait_until(lambda: set(starts_of(run)) == {f"{array.id}_{task}" for task in range(3)})
    wait_until(lambda: capture_progress(cache).done >= 2)
    os.kill(starts_of(run)[f"{array.id}_1"]["pid"], signal.SIGKILL)
    slurm.run("scancel", "--signal=TERM", f"{array.id}_2")
    wait_until(lambda: not queued_names(slurm))
    assert is_complete(cache), logs_of(run)
    assert [job.kind for job in Journal.open(run).jobs] == ["prepare", "capture"]
    assert {event["job"] for event in run.events() if event["event"] == "requeued"} == {f"{array.id}_2"}
    ended = [event["job"] for event in run.events() if event["event"] == "job_end" and event["kind"] == "capture"]
    assert sorted(ended) == [f"{array.id}_0", f"{array.id}_2", f"{array.id}_2"]
    shown = {row.id: row.state for row in read_status(run).jobs if row.kind == "capture"}
    assert shown == {f"{array.id}_0": "done", f"{array.id}_1": "failed", f"{array.id}_2": "done"}
    assert not run.halt.exists()
    assert "the teacher's cache is complete" in quick_train(*arguments).stdout

    # The rest of the chain: blocks that learn from it, and their evaluation.
    answer = quick_train("run", *arguments[1:])
    assert answer.returncode == 0, answer.stdout + answer.stderr
    wait_until(run.done.exists, seconds=240)
    assert [job.kind for job in Journal.open(run).jobs] == ["prepare", "capture", "block", "block", "evaluate"]
    assert set(orjson.loads(run.evaluation.read_bytes())["models"]) == {"teacher", "student", "student before"}


def submitted_array(slurm: SlurmCluster, run: RunFolder) -> list[str]:
    """Ids of the run's array tasks in Slurm, which must be of one array, all free to start."""
    lines = slurm.run("squeue", "--noheader", "--array", "--format=%i|%j|%r").splitlines()
    tasks = [line.split("|") for line in lines if "capture" in line]
    assert not any(reason.startswith("JobHeld") for *_, reason in tasks)
    assert all(Journal.open(run).owns(name) for _, name, _ in tasks)
    return sorted(job_id for job_id, *_ in tasks)


def test_a_submission_cut_off_around_the_array_makes_no_second_one(
    slurm: SlurmCluster, teacher: Path, tmp_path: Path
) -> None:
    wrapper = tmp_path / "bin/sbatch"
    wrapper.parent.mkdir()
    sbatch = shutil.which("sbatch")
    wrapper.write_text(f'#!/bin/sh\n{sbatch} "$@"; grep -q -- --array "$1" && kill -9 $PPID\n')
    wrapper.chmod(0o755)
    arguments = [TEST_YAML, *options(tmp_path, teacher, *NOT_NOW)]
    killed = quick_train(*arguments, environment={**os.environ, "PATH": f"{wrapper.parent}:{os.environ['PATH']}"})
    assert killed.returncode == -9, killed.stdout + killed.stderr
    run = RunFolder(tmp_path / "runs/test")
    assert "run the file again to finish it" in read_status(run).detail

    again = quick_train(*arguments)
    assert again.returncode == 0, again.stderr
    jobs = Journal.open(run).jobs
    assert [job.kind for job in jobs] == ["prepare", "capture", "block", "block", "evaluate"]
    assert submitted_array(slurm, run) == [f"{jobs[1].id}_{task}" for task in range(3)]
    assert all((run.logs / f"{jobs[1].id}_{task}_submitted.pkl").exists() for task in range(3))
    waits_for = slurm.run("squeue", "--noheader", f"--jobs={jobs[2].id}", "--format=%E")
    assert waits_for == f"afterany:{jobs[1].id}_*(unfulfilled)"
    third = quick_train(*arguments)
    assert "already queued: prepare" in third.stdout


def test_an_array_in_the_queue_is_topped_up_by_nothing_shown_whole_and_cancelled_whole(
    slurm: SlurmCluster, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "SETTLE_S", 0.2)
    checked = checked_run(tmp_path, teacher, *NOT_NOW)
    plan = plan_run(checked)
    run = launch.open_run_folder(checked, plan.data_key, print)
    array = launch.submit(run, checked, plan, print).queued[1]
    assert top_up(run, print).untouched
    slurm.run("scancel", f"{array.id}_1")
    assert top_up(run, print).untouched  # the others capture its shards too
    rows = [row for row in read_status(run).jobs if row.kind == "capture"]
    assert [row.id for row in rows] == [f"{array.id}_0", f"{array.id}_2"]
    cancel_run(run, print)
    assert not [job for job in known_jobs(Journal.open(run)) if job.is_live]
