"""The ledger shows whether every row was trained on exactly once in each epoch, and says where it was not."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pytest
import torch

import finetuning
from jobs.status import read_status
from training import batches
from training.checkpoints import Checkpoint, newest_valid
from training.ledger import ROWS_PER_CHUNK, EpochRows, Ledger, RowCounter, WrongRowsError, whole_epoch_hash
from training.run import FinetuningRun
from training.stopping import StopRequested, StopSignals
from training.trainer import BlockTrainer

MakeRun = Callable[..., FinetuningRun]
ROWS = 13


def count(*steps: list[list[int]], epoch: int = 0) -> list[EpochRows]:
    """What a process counted over steps, each a list of micro-batches of row numbers."""
    counter = RowCounter()
    for step in steps:
        counter.begin_step(epoch, [np.array(batch, dtype=np.int64) for batch in step])
        counter.complete_step()
    return counter.take()


def newest(run: FinetuningRun) -> Checkpoint:
    checkpoint, _ = newest_valid(run.folder.checkpoints)
    assert checkpoint is not None
    return checkpoint


def test_each_row_once_is_whole_in_any_order_over_any_ranks_steps_and_checkpoints() -> None:
    whole = Ledger(rows_per_epoch=7).adding(count([[0, 1, 2, 3, 4, 5, 6]]))
    first_rank, second_rank = count([[6], [0]], [[3], []]), count([[2, 5], [4]])
    two_ranks = Ledger(rows_per_epoch=7).adding(first_rank).adding([*second_rank, *count([[1], []])])
    assert two_ranks == whole == Ledger(rows_per_epoch=7, whole_epochs=1)
    assert whole.wrong_epochs(finished=1) == []


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([0, 1, 2, 3, 4], "epoch 1 trained on 5 rows instead of 6"),
        ([0, 1, 2, 3, 4, 5, 5], "epoch 1 trained on 7 rows instead of 6"),
        ([0, 1, 2, 3, 4, 4], "epoch 1 trained on 6 rows as it should, but on some of them more than once"),
        ([0, 1, 2, 3, 4, 6], "epoch 1 trained on 6 rows as it should, but on some of them more than once"),
        ([1, 1, 2, 3, 4, 4], "epoch 1 trained on 6 rows as it should, but on some of them more than once"),
    ],
)
def test_a_row_left_out_or_repeated_is_found(rows: list[int], said: str) -> None:
    ledger = Ledger(rows_per_epoch=6).adding(count([rows]))
    assert ledger.wrong_epochs(finished=0) == []  # it might not have ended yet
    (wrong,) = ledger.wrong_epochs(finished=1)
    assert ledger.describe(wrong) == said


def test_an_epoch_without_any_row_is_found_and_later_ones_are_still_judged() -> None:
    ledger = Ledger(rows_per_epoch=2).adding(
        [*count([[1, 0]], epoch=0), *count([[0, 1]], epoch=2), *count([[1]], epoch=3)]
    )
    assert ledger.whole_epochs == 1
    assert [(wrong.epoch, wrong.rows) for wrong in ledger.wrong_epochs(finished=4)] == [(1, 0), (3, 1)]


def test_the_hash_of_a_whole_epoch_does_not_depend_on_how_it_is_summed() -> None:
    num_rows = ROWS_PER_CHUNK + 3
    assert whole_epoch_hash(num_rows) == EpochRows.of(0, np.random.default_rng(1).permutation(num_rows)).hash
    # Pinned: another hash would make every chain under way look wrong.
    assert whole_epoch_hash(3) == 5816308355828433759


def test_a_step_that_was_given_up_half_way_does_not_count() -> None:
    counter = RowCounter()
    counter.begin_step(0, [np.array([0, 1])])
    counter.complete_step()
    counter.begin_step(0, [np.array([2, 3])])
    assert counter.take() == count([[0, 1]])
    assert counter.take() == []


def test_a_ledger_is_the_same_after_json() -> None:
    ledger = Ledger(rows_per_epoch=9).adding([*count([list(range(9))]), *count([[4, 8]], epoch=1)])
    assert ledger.epochs[0].hash > 2**32
    assert Ledger.of_json(orjson.loads(orjson.dumps(dataclasses.asdict(ledger)))) == ledger


@pytest.mark.chain
def test_a_chain_with_accumulation_workers_and_a_short_last_step_is_whole(make_run: MakeRun) -> None:
    arguments = {"report_to": "none", "dataloader_num_workers": 1}
    training = {"gradient_accumulation": 2, "save_every": 3, "total_jobs": 2, "arguments": arguments}
    run = make_run("run", training=training)
    assert ROWS % 4 == 1, "the last step of an epoch has one micro-batch of one row"
    while not finetuning.train(run).finished:
        pass
    assert newest(run).ledger == Ledger(rows_per_epoch=ROWS, whole_epochs=2)
    counted = [
        (event["step"], event["whole_epochs"]) for event in run.folder.events() if event["event"] == "checkpoint"
    ]
    assert counted == [(3, 0), (4, 1), (6, 1), (8, 2)]


@pytest.mark.chain
def test_rows_of_a_step_that_a_job_gave_up_are_counted_by_the_next_job_only(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("run", training={"gradient_accumulation": 2, "batch_size": 1})
    train_micro_batch = BlockTrainer.training_step
    micro_batches = 0

    def stop_in_the_third_step(*arguments: Any) -> torch.Tensor:
        nonlocal micro_batches
        micro_batches += 1
        if micro_batches == 5:
            run.stopping.received = signal.SIGTERM
        return train_micro_batch(*arguments)

    monkeypatch.setattr(BlockTrainer, "training_step", stop_in_the_third_step)
    with pytest.raises(StopRequested):
        finetuning.train(run)
    assert micro_batches == 5
    assert newest(run).step == 2
    assert [epoch.rows for epoch in newest(run).ledger.epochs] == [4]
    finetuning.train(dataclasses.replace(run, stopping=StopSignals()))
    assert newest(run).ledger == Ledger(rows_per_epoch=ROWS, whole_epochs=1)


def repeat_a_row(order: np.ndarray) -> np.ndarray:
    return np.concatenate([order[:4], order[:1], order[5:]])


def leave_out_a_row(order: np.ndarray) -> np.ndarray:
    return order[:-1]


@pytest.mark.chain
@pytest.mark.parametrize(
    ("damage", "rows", "said"),
    [(repeat_a_row, 13, "on some of them more than once"), (leave_out_a_row, 12, "12 rows instead of 13")],
)
def test_an_order_that_gives_a_row_twice_or_not_at_all_ends_the_block_and_is_told(
    damage: Callable[[np.ndarray], np.ndarray], rows: int, said: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    right_order = batches.epoch_order

    def wrong_in_the_second_epoch(num_rows: int, *, epoch: int, **keys: Any) -> np.ndarray:
        order = right_order(num_rows, epoch=epoch, **keys)
        return damage(order) if epoch == 1 else order

    monkeypatch.setattr(batches, "epoch_order", wrong_in_the_second_epoch)
    run = make_run("run", training={"epochs_per_job": 3, "batch_size": 5, "save_every": 4})
    with pytest.raises(WrongRowsError, match=f"epoch 2 trained on .*{said}"):
        finetuning.train(run)
    assert newest(run).step == 8, "the first checkpoint after the epoch's end at step 6"
    (event,) = [event for event in run.folder.events() if event["event"] == "wrong_rows"]
    assert event["epochs"] == [{"epoch": 2, "rows": rows}] and event["rows_per_epoch"] == ROWS
    status = read_status(run.folder)
    assert status.whole_epochs == 1
    assert [(wrong.epoch, wrong.rows_counted, wrong.rows_expected) for wrong in status.wrong_epochs] == [
        (2, rows, ROWS)
    ]

    # Running the file again is the user's word that the chain may go on; what was wrong stays on record.
    assert finetuning.train(run).finished
    assert (newest(run).whole_epochs, len(newest(run).wrong_epochs)) == (2, 1)
