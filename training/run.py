"""What a trainer is given: one run's folder, prepared data and settings. No torch, so that jobs can build it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from training.config import EvaluationConfig, FinetuningConfig, ModelConfig, TrainingConfig
from training.owner import Owner
from training.run_folder import RunFolder
from training.stopping import StopSignals


@dataclass(frozen=True, kw_only=True)
class TrainerRun:
    """What every trainer reads; each has a dataclass of its own with its section beside this."""

    folder: RunFolder
    prepared: Path
    module: ModuleFile | None
    """The dataset module, for its `score`; None where a mixture is trained on."""

    seed: int
    dataset: DatasetConfig
    model: ModelConfig
    training: TrainingConfig
    evaluation: EvaluationConfig

    stopping: StopSignals = field(default_factory=StopSignals)
    """Requests to stop that this process has got."""

    owner: Owner | None = None
    """Of the run folder, in its first process; asked before anything is committed."""


@dataclass(frozen=True, kw_only=True)
class FinetuningRun(TrainerRun):
    """Everything that the finetuning trainer reads."""

    finetuning: FinetuningConfig


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """Where a block ended. `step` below the block's boundary means that it was asked to stop."""

    step: int
    horizon_steps: int
    finished: bool
    stopped: bool = False
    """The user asked the chain to stop, and the block ended before its boundary."""


class NonFiniteLossError(ArithmeticError):
    """Loss or gradient is not finite. No checkpoint holds the damage: both are looked at before every save."""
