"""The plan's learning rate is the one that transformers' schedulers give."""

from __future__ import annotations

import time
from typing import cast, get_args

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments, get_scheduler

from training.config import LearningRateSchedule, SaveInterval, TrainingConfig
from training.schedule import Horizon, learning_rate
from training.trainer import BlockSchedule


@pytest.mark.parametrize("schedule", get_args(LearningRateSchedule))
@pytest.mark.parametrize("warmup_steps", [0, 7])
def test_learning_rates_are_those_of_transformers(schedule: LearningRateSchedule, warmup_steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    reference = get_scheduler(schedule, optimizer, num_warmup_steps=warmup_steps, num_training_steps=50)
    for step in range(50):
        ours = learning_rate(step, peak=3e-4, schedule=schedule, warmup_steps=warmup_steps, total_steps=50)
        assert ours == pytest.approx(reference.get_last_lr()[0], rel=1e-12, abs=1e-18), step
        optimizer.step()
        reference.step()


def test_blocks_divide_the_horizon_and_a_block_begins_where_the_last_one_ended() -> None:
    training = TrainingConfig(lr=1.0, batch_size=2, gradient_accumulation=3, epochs_per_job=2, total_jobs=3)
    horizon = Horizon.of(training, num_rows=25, world_size=2)
    assert (horizon.steps_per_epoch, horizon.block_steps, horizon.total_steps, horizon.epochs) == (3, 6, 18, 6)
    assert [horizon.block_end(step) for step in (0, 5, 6, 11, 12, 17, 18)] == [6, 6, 12, 12, 18, 18, 18]
    assert [horizon.block_of(step) for step in (0, 5, 6, 17, 18)] == [1, 1, 2, 3, 3]


def test_a_save_is_due_after_the_steps_or_the_seconds_asked_for() -> None:
    def saves(interval: SaveInterval, *, steps: list[int], pause_s: float = 0.0) -> list[int]:
        schedule = BlockSchedule(
            block_end=9,
            save_interval=interval,
            log_every=4,
            stop_requested=lambda: False,
            keeps_random_states=False,
        )
        arguments, state, control = cast(TrainingArguments, None), TrainerState(), TrainerControl()
        schedule.on_train_begin(arguments, state, control)
        saved = []
        for state.global_step in steps:
            time.sleep(pause_s)
            schedule.on_step_end(arguments, state, control)
            if control.should_save:
                saved.append(state.global_step)
                schedule.on_save(arguments, state, control)
            assert control.should_log == (state.global_step in (1, 4, 8, 9) or control.should_save)
            assert control.should_training_stop == (state.global_step == 9)
        return saved

    steps = list(range(1, 10))
    assert saves(SaveInterval(), steps=steps) == [9]
    assert saves(SaveInterval(steps=3), steps=steps) == [3, 6, 9]
    assert saves(SaveInterval(seconds=1), steps=steps, pause_s=0.28) == [4, 8, 9]
