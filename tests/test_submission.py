"""Submission of a chain under faults: whatever dies, every job is in Slurm once, in order, and free to start."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from submitit.core.utils import DelayedSubmission
from tiny_chains import TINY, checked_run, folders, quick_train

from jobs import launch, queue, submission
from jobs.chain import Journal
from jobs.config import PROJECT
from jobs.plan import plan_run
from jobs.queue import SlurmError
from jobs.status import read_status
from jobs.submission import Outcome
from jobs.top_up import top_up
from training.run_folder import RunFolder

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster

pytest_plugins = ["slurm_cluster"]
pytestmark = pytest.mark.cluster

NOT_NOW = [*TINY, "--slurm.extra.begin", "now+1hour"]
WHOLE_CHAIN = ["prepare", "block", "block", "block", "evaluate"]

# Stands in for one of Slurm's commands, and at its Nth call with this first argument kills the process that called.
TREACHEROUS = """#!/bin/bash
if [[ "$1" == {argument}* ]]; then echo call >>{calls}; fi
if [[ "$1" == {argument}* && $(wc -l <{calls}) == {number} ]]; then
  case {moment} in
    before) ;;
    halfway) {command} release "${{2%%,*}}" ;;
    after) {command} "$@" >/dev/null ;;
  esac
  kill -KILL $PPID
  exit 1
fi
exec {command} "$@"
"""


def start_run(tmp_path: Path) -> Callable[..., Outcome]:
    """submit(report): the submission of a new run, in this process."""
    checked = checked_run(tmp_path, *NOT_NOW)
    plan = plan_run(checked)
    run = launch.open_run_folder(checked, plan.data_key, print)
    return lambda report=print: launch.submit(run, checked, plan, report)


def command_line(tmp_path: Path) -> list[str]:
    return [str(PROJECT / "configs/test.yaml"), *NOT_NOW, *folders(tmp_path)]


def assert_whole(slurm: SlurmCluster, run: RunFolder, kinds: list[str] = WHOLE_CHAIN) -> None:
    """Every job is in Slurm exactly once, waits for the one before, is free to start, and finds its task."""
    journal = Journal.open(run)
    lines = slurm.run("squeue", "--noheader", "--format=%j|%i|%r|%E").splitlines()
    in_slurm = [line.split("|") for line in lines if journal.owns(line.partition("|")[0])]
    order = {job.name: position for position, job in enumerate(journal.jobs)}
    in_slurm.sort(key=lambda shown: order[shown[0]])
    jobs = [job for job in journal.jobs if job.name in {name for name, *_ in in_slurm}]
    assert [job.kind for job in jobs] == kinds
    assert [(job.name, job.id) for job in jobs] == [(name, job_id) for name, job_id, *_ in in_slurm]
    assert all(job.released for job in journal.jobs)
    assert not any(reason.startswith("JobHeld") for *_, reason, _ in in_slurm)
    waits_for = [dependency for *_, dependency in in_slurm]
    assert waits_for == ["(null)", *(f"afterany:{job.id}(unfulfilled)" for job in jobs[:-1])]
    for job in jobs:
        assert DelayedSubmission.load(run.logs / f"{job.id}_submitted.pkl").function.kind == job.kind


@pytest.mark.parametrize(
    ("command", "argument", "number", "moment"),
    [
        ("sbatch", "", 1, "before"),
        ("sbatch", "", 1, "after"),
        ("sbatch", "", 3, "before"),
        ("sbatch", "", 3, "after"),
        ("sbatch", "", 5, "after"),
        ("squeue", "", 1, "before"),
        ("scontrol", "release", 1, "before"),
        ("scontrol", "release", 1, "halfway"),
        ("scontrol", "release", 1, "after"),
    ],
)
def test_a_submitter_killed_at_any_point_is_made_good_by_the_next(
    slurm: SlurmCluster, tmp_path: Path, command: str, argument: str, number: int, moment: str
) -> None:
    wrapper = tmp_path / "bin" / command
    wrapper.parent.mkdir()
    calls = tmp_path / "calls"
    calls.touch()
    wrapper.write_text(
        TREACHEROUS.format(command=shutil.which(command), argument=argument, number=number, moment=moment, calls=calls)
    )
    wrapper.chmod(0o755)
    killed = quick_train(
        *command_line(tmp_path), environment={**os.environ, "PATH": f"{wrapper.parent}:{os.environ['PATH']}"}
    )
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    run = RunFolder(tmp_path / "runs/test")
    is_held = "JobHeldUser" in slurm.run("squeue", "--noheader", "--format=%r")
    assert ("run the file again to finish it" in read_status(run).detail) is is_held

    again = quick_train(*command_line(tmp_path))
    assert again.returncode == 0, again.stdout + again.stderr
    assert_whole(slurm, run)


@pytest.mark.parametrize(("at_line", "away_s"), [("submitted block", 0), ("submitted evaluate", 6), ("waiting", 0)])
def test_a_controller_that_forgets_accepted_jobs_gets_them_again(
    slurm: SlurmCluster, tmp_path: Path, at_line: str, away_s: float
) -> None:
    said: list[str] = []

    def kill_controller(line: str) -> None:
        if line.startswith(at_line) and not any(earlier.startswith(at_line) for earlier in said):
            slurm.daemon("kill", "controller")
            threading.Timer(away_s, slurm.daemon, ("start", "controller")).start()
        said.append(line)

    start_run(tmp_path)(kill_controller)
    assert any("has lost" in line for line in said), said
    assert_whole(slurm, RunFolder(tmp_path / "runs/test"))


def test_a_job_that_a_frozen_controller_takes_after_all_is_not_submitted_twice(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    said: list[str] = []

    def freeze_controller(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            slurm.daemon("freeze", "controller")
            threading.Timer(6, slurm.daemon, ("thaw", "controller")).start()  # sbatch gives up after 5 s

    start_run(tmp_path)(freeze_controller)
    assert sum("no answer to the submission" in line for line in said) == 1, said
    assert sum(line.startswith("submitted") for line in said) == 5
    assert_whole(slurm, RunFolder(tmp_path / "runs/test"))


def test_a_controller_that_stays_away_is_given_up_and_the_next_call_goes_on(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = start_run(tmp_path)
    monkeypatch.setattr(queue, "PATIENCE_S", 1.0)

    def stop_controller(line: str) -> None:
        if line.startswith("submitted block"):
            slurm.daemon("stop", "controller")

    with pytest.raises(SlurmError, match=r"gave up .* Run the same command again"):
        submit(stop_controller)
    slurm.daemon("start", "controller")
    monkeypatch.setattr(submission, "SETTLE_S", 0.2)
    submit()
    assert_whole(slurm, RunFolder(tmp_path / "runs/test"))


def test_two_calls_at_once_submit_one_chain(slurm: SlurmCluster, tmp_path: Path) -> None:
    command = [PROJECT / "train.sh", *command_line(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("already queued: prepare" in text for text in said) == 1
    assert_whole(slurm, RunFolder(tmp_path / "runs/test"))


def test_running_the_file_again_releases_what_was_held_by_hand_and_a_top_up_does_not(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "SETTLE_S", 0.2)
    submit = start_run(tmp_path)
    held = str(submit().queued[2].id)
    run = RunFolder(tmp_path / "runs/test")
    slurm.run("scontrol", "uhold", held)
    assert top_up(run, print).untouched
    assert slurm.run("squeue", "--noheader", f"--jobs={held}", "--format=%r") == "JobHeldUser"
    assert "held by you" in {row.reason.partition(";")[0] for row in read_status(run).jobs}
    assert not submit().untouched
    assert_whole(slurm, run)


def test_a_cancelled_block_is_made_up_for_before_the_evaluation(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "SETTLE_S", 0.2)
    submit = start_run(tmp_path)
    prepare, _, cancelled, last_block, evaluate = submit().queued
    slurm.run("scancel", str(cancelled.id))
    run = RunFolder(tmp_path / "runs/test")
    slurm.run("scontrol", "update", f"JobId={last_block.id}", f"Dependency=afterany:{prepare.id}")
    outcome = top_up(run, print)
    assert [job.kind for job in outcome.queued] == WHOLE_CHAIN
    assert outcome.queued[-1].id == evaluate.id
    assert_whole(slurm, run)


@pytest.fixture
def at_most_two_jobs(slurm: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster, with a limit on the jobs that its user may have queued or running."""
    if slurm.run("scontrol", "show", "config").find("AccountingStorageEnforce = associations,limits") < 0:
        pytest.skip("limits need accounting, and this test cluster was made without it")
    user = getpass.getuser()
    slurm.run("sacctmgr", "-i", "modify", "user", user, "set", "MaxSubmitJobs=2")
    yield slurm
    slurm.run("sacctmgr", "-i", "modify", "user", user, "set", "MaxSubmitJobs=-1")


def test_a_chain_longer_than_the_limit_on_jobs_tops_itself_up(at_most_two_jobs: SlurmCluster, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs/test")
    answer = quick_train(
        str(PROJECT / "configs/test.yaml"), *TINY, *folders(tmp_path), "--training.total_jobs", "1", "--wait",
    )  # fmt: skip
    logs = "\n".join(path.read_text() for path in run.logs.glob("*_log.out"))
    assert answer.returncode == 0, answer.stdout + answer.stderr + logs
    assert "no more jobs of yours now (AssocMaxSubmitJobLimit" in answer.stdout
    assert "2 of this chain are queued" in answer.stdout
    assert run.done.exists()
    starts = [event["kind"] for event in run.events() if event["event"] == "job_start"]
    assert starts == ["prepare", "block", "evaluate"]


def test_a_job_without_successor_waits_for_room_until_it_is_told_to_leave(
    at_most_two_jobs: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "SETTLE_S", 0.2)
    last = str(start_run(tmp_path)().queued[-1].id)
    command = [sys.executable, "-u", "-m", "jobs.top_up", str(tmp_path / "runs/test")]
    environment = os.environ | {"SLURM_JOB_ID": last}
    with subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "takes no more jobs of this user now (AssocMaxSubmitJobLimit" in process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        process.send_signal(signal.SIGUSR2)
        assert process.wait(timeout=5) == 0


def test_a_node_that_may_not_submit_says_so_in_one_line_and_harms_nothing(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "SETTLE_S", 0.2)
    evaluate = start_run(tmp_path)().queued[-1]
    slurm.run("scancel", str(evaluate.id))
    run = RunFolder(tmp_path / "runs/test")
    slurm.run("scontrol", "update", "partition=gpucluster", "AllocNodes=elsewhere")
    command = [sys.executable, "-m", "jobs.top_up", str(run.path)]
    try:
        answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    finally:
        slurm.run("scontrol", "update", "partition=gpucluster", "AllocNodes=ALL")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("top-up: Slurm refused the next job (evaluate)")
    assert len(answer.stdout.splitlines()) == 1
    assert_whole(slurm, run, WHOLE_CHAIN[:-1])
