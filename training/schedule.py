"""Where blocks begin and end, and the learning rate over the whole chain: arithmetic that plan and trainer share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from training.config import LearningRateSchedule, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """The optimizer steps of the whole chain; fixed before the first block, so every block sees one schedule."""

    steps_per_epoch: int
    epochs_per_job: int
    total_jobs: int

    @classmethod
    def of(cls, training: TrainingConfig, *, num_rows: int, world_size: int) -> Horizon:
        """The horizon for `num_rows` rows (packs, where packed) over `world_size` processes."""
        rows_per_step = training.batch_size * training.gradient_accumulation * world_size
        return cls(
            steps_per_epoch=math.ceil(num_rows / rows_per_step),
            epochs_per_job=training.epochs_per_job,
            total_jobs=training.total_jobs,
        )

    @property
    def epochs(self) -> int:
        return self.epochs_per_job * self.total_jobs

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def block_steps(self) -> int:
        return self.steps_per_epoch * self.epochs_per_job

    def block_of(self, step: int) -> int:
        """Number, from 1, of the block that takes the optimizer step after `step`."""
        return min(step // self.block_steps + 1, self.total_jobs)

    def block_end(self, step: int) -> int:
        """The boundary that a block starting after `step` trains to."""
        return self.block_of(step) * self.block_steps


def learning_rate(
    step: int, *, peak: float, schedule: LearningRateSchedule, warmup_steps: int, total_steps: int
) -> float:
    """The learning rate of the optimizer step after `step`, as transformers' schedulers compute it."""
    if schedule != "constant" and step < warmup_steps:
        return peak * step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match schedule:
        case "constant" | "constant_with_warmup":
            return peak
        case "linear":
            return peak * max(0.0, 1.0 - progress)
        case "cosine":
            return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
        case "inverse_sqrt":
            timescale = warmup_steps or 10_000
            return peak / math.sqrt((step - warmup_steps + timescale) / timescale)
