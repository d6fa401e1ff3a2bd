"""What a job does before it trains, and what its exit code tells the chain."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs import launch
from jobs.config import PROJECT
from jobs.exit_code import ExitCode
from jobs.job import run_job
from jobs.local import run_job_here
from jobs.plan import plan_run
from jobs.preflight import check_run
from jobs.standstill import starts_that_count
from training.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that was started and has done nothing yet."""
    monkeypatch.chdir(tmp_path)
    folders = ["--runs_dir", str(tmp_path / "runs"), "--data_dir", str(tmp_path / "data"), "--cluster", "local"]
    checked = check_run(PROJECT / "configs/test.yaml", folders)
    return launch.open_run_folder(checked, plan_run(checked).data_key, print)


def crash(run: RunFolder, *, step: int) -> None:
    """A block that starts at a step and ends without a word, as one that is killed does."""
    run.record_event("job_start", kind="block", pid=1, restart=0, step=step)


def test_a_halted_chain_ends_its_jobs_one_after_another(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run.halt.write_text("the loss is not finite\n")
    assert run_job("block", run) == ExitCode.BAD_INPUT
    assert "the chain was halted: the loss is not finite" in capsys.readouterr().err


def test_a_stopped_chain_leaves_without_an_error(run: RunFolder) -> None:
    run.stop.touch()
    assert run_job("block", run) == ExitCode.STOPPED_EARLY
    assert not run.halt.exists()


def test_a_job_that_runs_here_in_an_allocation_is_not_the_job_of_the_allocation(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_PROCID": "3", "SLURMD_NODENAME": "n1"}.items():
        monkeypatch.setenv(name, value)
    run.stop.touch()
    assert run_job_here(run, "block", 1, None, lambda ended: None) == ExitCode.STOPPED_EARLY
    (start,) = [event for event in run.events() if event["event"] == "job_start"]
    assert start["job"] is None
    assert start["host"] == os.uname().nodename


def test_a_block_without_prepared_data_halts_the_chain_and_says_why(run: RunFolder) -> None:
    assert run_job("block", run) == ExitCode.BAD_INPUT
    assert "is not prepared" in run.halt.read_text()


def test_two_blocks_without_a_new_checkpoint_halt_the_chain(run: RunFolder) -> None:
    crash(run, step=0)
    crash(run, step=0)
    assert run_job("block", run) == ExitCode.BAD_INPUT
    assert "2 blocks in a row made no new checkpoint after step 0" in run.halt.read_text()


def test_being_taken_off_its_node_is_not_a_blocks_fault_and_meeting_the_time_limit_is(run: RunFolder) -> None:
    for reason in ("preempted", "time limit", "preempted", "cancelled"):
        crash(run, step=0)
        run.record_event("job_end", kind="block", exit_code=75, seconds=1.0, step=0, reason=reason)
    assert starts_that_count(run.events()) == [0]


@pytest.mark.parametrize("steps", [[10, 0], [0]])
def test_crashes_that_get_further_do_not(run: RunFolder, steps: list[int]) -> None:
    for step in steps:
        crash(run, step=step)
    run_job("block", run)
    assert "no new checkpoint" not in run.halt.read_text()


def test_running_the_file_again_forgets_earlier_crashes(run: RunFolder) -> None:
    crash(run, step=0)
    crash(run, step=0)
    launch.clear_halt(run, print)
    run_job("block", run)
    assert "no new checkpoint" not in run.halt.read_text()


def test_an_evaluation_before_the_end_of_training_is_no_error_of_the_user(run: RunFolder) -> None:
    assert run_job("evaluate", run) == ExitCode.STOPPED_EARLY
    assert not run.done.exists() and not run.halt.exists()


def test_dataset_modules_start_in_the_folder_the_user_submitted_from(run: RunFolder) -> None:
    here = Path.cwd()
    os.chdir("/")
    run_job("block", run)
    assert Path.cwd() == here
