"""What the EAGLE-3 trainer is given. No torch, so that jobs can build it."""

from __future__ import annotations

from dataclasses import dataclass

from drafting.config import Eagle3Config, target_problems
from training.run import TrainerRun


@dataclass(frozen=True, kw_only=True)
class Eagle3Run(TrainerRun):
    """Everything that the EAGLE-3 trainer reads. ValueError where `model` cannot be a target, or be trained for so."""

    eagle3: Eagle3Config

    def __post_init__(self) -> None:
        problems = target_problems(self.model, self.training)
        if problems:
            raise ValueError("\n".join(problems))
