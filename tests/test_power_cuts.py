"""Twenty power cuts at random moments, many of them while a checkpoint is written, cost steps and change nothing."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

import pytest
import torch
from test_exact_resume import assert_every_row_once_in_each_epoch
from trained_runs import assert_identical, final_weights, processes_that_start_fast, train_to_the_end

from training.run import FinetuningRun

pytestmark = pytest.mark.chain

MakeRun = Callable[..., FinetuningRun]

CUTS = 20
SAVE_EVERY = 3
LONGEST_LIFE = 9
"""Optimizer steps, or a few more."""


def train_in_this_process(run: FinetuningRun) -> None:
    torch.set_num_threads(1)
    train_to_the_end(run)


def is_saving(run: FinetuningRun) -> bool:
    return any(run.folder.checkpoints.glob("step_*.tmp-*"))


def wait_for_the_moment(run: FinetuningRun, dice: random.Random, alive: Callable[[], bool]) -> None:
    """Some steps into training; every other time on into the next save."""
    lines = len(list(run.folder.metrics())) + dice.randrange(1, LONGEST_LIFE)
    while alive() and len(list(run.folder.metrics())) < lines:
        time.sleep(0.002)
    if dice.random() < 0.5:
        while alive() and not is_saving(run):
            time.sleep(0.0005)
    time.sleep(dice.random() * 0.02)


def newest_logged_step(run: FinetuningRun) -> int:
    return max((line["step"] for line in run.folder.metrics()), default=0)


def test_a_run_that_loses_power_twenty_times_ends_with_the_same_weights(make_run: MakeRun) -> None:
    training = {"lr": 1e-3, "batch_size": 1, "log_every": 1, "epochs_per_job": 25}
    whole, cut = make_run("whole", training=training), make_run("cut", training={**training, "save_every": SAVE_EVERY})
    context, dice = processes_that_start_fast(), random.Random(7)
    cut_in_a_save = 0
    reached = []
    for _ in range(CUTS):
        process = context.Process(target=train_in_this_process, args=(cut,))
        process.start()
        wait_for_the_moment(cut, dice, process.is_alive)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run must be longer, it ended before its power was cut"
        cut_in_a_save += is_saving(cut)
        reached.append(newest_logged_step(cut))
    assert cut_in_a_save >= 3

    train_to_the_end(cut)
    train_to_the_end(whole)
    assert_identical(final_weights(cut), final_weights(whole))
    assert_every_row_once_in_each_epoch(cut)
    resumed = [event["step"] for event in cut.folder.events() if event["event"] == "resumed"]
    assert resumed == sorted(resumed)
    assert all(before - step <= SAVE_EVERY for before, step in zip(reached[-len(resumed) :], resumed, strict=True))
    assert not is_saving(cut)
