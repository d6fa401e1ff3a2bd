"""Where blocks begin and end, and the learning rate over the whole chain: arithmetic that plan and trainer share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from training.checkpoints import Checkpoint, ResumeTerms
from training.config import LearningRateSchedule, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """The optimizer steps of the whole chain; fixed before the first block, so every block sees one schedule."""

    steps_per_epoch: int
    epochs_per_job: int
    total_jobs: int

    @classmethod
    def of(cls, training: TrainingConfig, *, num_rows: int, world_size: int) -> Horizon:
        """The horizon for `num_rows` rows (packs, where packed) over `world_size` processes, extensions included.

        Raises ValueError where an extension does not begin where it should.
        """
        rows_per_step = training.batch_size * training.gradient_accumulation * world_size
        horizon = cls(
            steps_per_epoch=math.ceil(num_rows / rows_per_step),
            epochs_per_job=training.epochs_per_job,
            total_jobs=training.num_jobs,
        )
        for number, extension in enumerate(training.extensions):
            old_end = horizon.before_extension(training, number).total_steps
            earliest = 0 if extension.lr_policy == "stretch" else old_end
            if not earliest <= extension.from_step <= old_end:
                raise ValueError(
                    f"training.extensions: `{extension}` does not fit a horizon that ended after {old_end} steps; "
                    "leave what ./train.sh extend wrote as it is, with the batch size and processes it was made for"
                )
        return horizon

    @classmethod
    def of_chain(cls, training: TrainingConfig, checkpoint: Checkpoint) -> Horizon:
        """The horizon of a chain under way, which may have been extended since it wrote the checkpoint."""
        split = checkpoint.terms.split
        as_split = replace(training, batch_size=split.batch_size, gradient_accumulation=split.gradient_accumulation)
        return cls.of(as_split, num_rows=checkpoint.ledger.rows_per_epoch, world_size=split.world_size)

    def before_extension(self, training: TrainingConfig, number: int) -> Horizon:
        """This horizon as it was before that extension of the training, counted from 0."""
        return replace(self, total_jobs=training.before_extension(number).num_jobs)

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


def first_horizon_steps(horizon: Horizon, training: TrainingConfig) -> int:
    """The optimizer steps of the chain as it was planned, before any extension."""
    return horizon.before_extension(training, 0).total_steps if training.extensions else horizon.total_steps


def terms_before_extensions(
    terms: ResumeTerms, training: TrainingConfig, horizon: Horizon, *, step: int
) -> list[ResumeTerms]:
    """What the terms were before each extension that leaves the first `step` optimizer steps as they were."""
    earlier = []
    for number in reversed(range(len(training.extensions))):
        if training.extensions[number].from_step < step:
            break
        earlier.append(
            replace(
                terms,
                horizon_steps=horizon.before_extension(training, number).total_steps,
                optimization=training.before_extension(number).optimization,
            )
        )
    return earlier


def chain_learning_rate(step: int, *, peak: float, training: TrainingConfig, horizon: Horizon) -> float:
    """The learning rate of the optimizer step after `step`, whatever extensions the chain has had."""
    total_steps = horizon.total_steps
    if not training.extensions:
        return scheduled_rate(step, peak=peak, training=training, total_steps=total_steps)
    last = len(training.extensions) - 1
    extension = training.extensions[last]
    before, shorter = training.before_extension(last), horizon.before_extension(training, last)
    if step < extension.from_step:
        return chain_learning_rate(step, peak=peak, training=before, horizon=shorter)
    if extension.lr_policy == "stretch":
        return scheduled_rate(step, peak=peak, training=training, total_steps=total_steps)
    old_end = chain_learning_rate(extension.from_step, peak=peak, training=before, horizon=shorter)
    if extension.lr_policy == "constant":
        return old_end
    return rewarmed_rate(
        step - extension.from_step,
        old_end=old_end,
        peak=peak,
        training=training,
        added_steps=total_steps - extension.from_step,
    )


def rewarmed_rate(step: int, *, old_end: float, peak: float, training: TrainingConfig, added_steps: int) -> float:
    """The schedule begun anew for `added_steps` steps, with a warmup from the rate that the old horizon ended with."""
    warmup_steps = training.warmup_steps(added_steps)
    if step < warmup_steps:
        return old_end + (peak - old_end) * step / warmup_steps
    return scheduled_rate(step, peak=peak, training=training, total_steps=added_steps)


def scheduled_rate(step: int, *, peak: float, training: TrainingConfig, total_steps: int) -> float:
    """The learning rate of the training's own schedule, over a horizon of `total_steps`."""
    return learning_rate(
        step,
        peak=peak,
        schedule=training.lr_scheduler,
        warmup_steps=training.warmup_steps(total_steps),
        total_steps=total_steps,
    )


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
