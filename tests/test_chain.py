"""Which jobs a chain needs, and what a second call adds to those already queued."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.chain import ChainJob, Journal, jobs_needed, jobs_to_submit
from training.run_folder import RunFolder


def test_a_new_run_prepares_trains_each_block_and_evaluates() -> None:
    assert jobs_needed(prepared=False, blocks_left=2, evaluated=False) == ["prepare", "block", "block", "evaluate"]


def test_prepared_data_and_finished_blocks_need_no_job() -> None:
    assert jobs_needed(prepared=True, blocks_left=1, evaluated=False) == ["block", "evaluate"]
    assert jobs_needed(prepared=True, blocks_left=0, evaluated=True) == []


@pytest.mark.parametrize(
    ("needed", "queued", "missing"),
    [
        (["prepare", "block", "evaluate"], ["prepare", "block", "evaluate"], []),
        (["prepare", "block", "block", "evaluate"], ["prepare", "block"], ["block", "evaluate"]),
        (["block", "block", "evaluate"], [], ["block", "block", "evaluate"]),
        (["block", "evaluate"], ["block", "block", "evaluate"], []),
        # An evaluation in the queue would run before the blocks added behind it, so another one follows them.
        (["block", "block", "evaluate"], ["block", "evaluate"], ["block", "evaluate"]),
    ],
)
def test_a_second_call_adds_only_what_is_missing(needed: list, queued: list, missing: list) -> None:
    assert jobs_to_submit(needed, queued) == missing


def test_the_journal_remembers_jobs_and_never_gives_a_name_twice(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    journal = Journal.open(run)
    first = ChainJob(kind="block", name=journal.next_name("x", "block"))
    journal.record(first)
    again = Journal.open(run)
    assert again.run_id == journal.run_id
    assert again.jobs == [first]
    second = again.next_name("x", "block")
    assert second != first.name and second.startswith(f"baton-x-{journal.run_id}-block-")
