"""What the distillation trainer is given. No torch, so that jobs can build it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distilling.config import DistillationConfig
from training.run import TrainerRun


@dataclass(frozen=True, kw_only=True)
class DistillationRun(TrainerRun):
    """Everything that the distillation trainer reads."""

    distillation: DistillationConfig
    cache: Path | None
    """The folder of the teacher's cache, which is complete; None where `distillation.teacher` is no cache."""
