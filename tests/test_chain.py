"""Which jobs a chain needs, and what a second call adds to those already queued."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.chain import ArrayShape, Journal, ending_jobs, jobs_needed, jobs_to_submit
from training.run_folder import RunFolder


def test_a_new_run_prepares_trains_each_block_and_evaluates() -> None:
    assert jobs_needed(prepared=False, captured=True, blocks_left=2, evaluated=False) == [
        "prepare",
        "block",
        "block",
        "evaluate",
    ]


def test_a_teacher_is_captured_between_preparation_and_training() -> None:
    assert jobs_needed(prepared=False, captured=False, blocks_left=1, evaluated=False) == [
        "prepare",
        "capture",
        "block",
        "evaluate",
    ]


def test_only_the_capture_is_an_array(tmp_path: Path) -> None:
    journal = Journal.open(RunFolder(tmp_path))
    journal.plan(journal.plan_of(["prepare", "capture", "block"], "x", ArrayShape(tasks=3, gpus=2)))
    assert [(job.tasks, job.gpus) for job in Journal.open(RunFolder(tmp_path)).jobs] == [(1, 1), (3, 2), (1, 1)]
    assert journal.owns(journal.jobs[1].name)


def test_prepared_data_and_finished_blocks_need_no_job() -> None:
    assert jobs_needed(prepared=True, captured=True, blocks_left=1, evaluated=False) == ["block", "evaluate"]
    assert jobs_needed(prepared=True, captured=True, blocks_left=0, evaluated=True) == []


@pytest.mark.parametrize(
    ("needed", "queued", "missing"),
    [
        (["prepare", "block", "evaluate"], ["prepare", "block", "evaluate"], []),
        (["prepare", "block", "block", "evaluate"], ["prepare", "block"], ["block", "evaluate"]),
        (["block", "block", "evaluate"], [], ["block", "block", "evaluate"]),
        (["block", "evaluate"], ["block", "block", "evaluate"], []),
        (["prepare", "capture", "block", "evaluate"], ["prepare"], ["capture", "block", "evaluate"]),
        (["capture", "block", "evaluate"], ["capture", "block", "evaluate"], []),
        # Blocks capture what is missing themselves.
        (["capture", "block", "evaluate"], ["block", "evaluate"], []),
        # An evaluation in the queue would run before the blocks added behind it, so another one follows them.
        (["block", "block", "evaluate"], ["block", "evaluate"], ["block", "evaluate"]),
        (["block", "evaluate"], ["evaluate"], ["block", "evaluate"]),
        # Blocks were added and the submission was cut off before the evaluation behind them.
        (["block", "block", "evaluate"], ["block", "evaluate", "block"], ["evaluate"]),
    ],
)
def test_a_second_call_adds_only_what_is_missing(needed: list, queued: list, missing: list) -> None:
    assert jobs_to_submit(needed, queued) == missing


def test_the_journal_remembers_jobs_and_never_gives_a_name_twice(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    journal = Journal.open(run)
    journal.plan(journal.plan_of(["block", "block", "evaluate"], "x"))
    again = Journal.open(run)
    assert again.run_id == journal.run_id
    assert again.jobs == journal.jobs
    assert [job.name.partition(journal.run_id)[2] for job in again.jobs] == ["-block-1", "-block-2", "-evaluate-1"]
    again.record(*(replace(job, id="7", released=True) for job in again.jobs[:1]))
    again.plan(again.plan_of(["block", "evaluate"], "x"))
    third = again.plan_of(["block", "block"], "x")[1]
    assert third.name.endswith("-block-3")


def test_a_plan_takes_up_jobs_not_released_yet_and_keeps_released_ones_before_them(tmp_path: Path) -> None:
    journal = Journal.open(RunFolder(tmp_path))
    prepare, block, evaluate = journal.plan_of(["prepare", "block", "evaluate"], "x")
    journal.plan([prepare, block, evaluate])
    prepare = replace(prepare, id="5", released=True)
    evaluate = replace(evaluate, id="7")
    journal.record(prepare, evaluate)
    plan = journal.plan_of(["block", "block", "evaluate"], "x")
    assert (plan[0], plan[2]) == (block, evaluate)
    journal.plan(plan)
    assert journal.jobs == [prepare, *plan]


def test_a_journal_knows_its_jobs_by_name(tmp_path: Path) -> None:
    journal = Journal.open(RunFolder(tmp_path))
    assert journal.owns(f"baton-my-run-{journal.run_id}-block-12")
    assert not journal.owns("baton-my-run-00000000-block-12")


def test_a_job_is_ending_once_its_block_is_saved_until_slurm_starts_it_again() -> None:
    started = {"event": "job_start", "job": "5"}
    saved = {"event": "block_end", "job": "5"}
    assert ending_jobs([started]) == set()
    assert ending_jobs([started, saved, {"event": "job_end", "job": "5"}]) == {"5"}
    assert ending_jobs([started, saved, started]) == set()
