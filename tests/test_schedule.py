"""The plan's learning rate is the one that transformers' schedulers give."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from transformers import get_scheduler

from training.config import LearningRateSchedule, TrainingConfig
from training.schedule import Horizon, learning_rate


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
