"""What the EAGLE-3 trainer is given. No torch, so that jobs can build it."""

from __future__ import annotations

from dataclasses import dataclass

from drafting.config import Eagle3Config
from training.config import ModelConfig
from training.run import TrainerRun


@dataclass(frozen=True, kw_only=True)
class Eagle3Run(TrainerRun):
    """Everything that the EAGLE-3 trainer reads. ValueError where `model` cannot be a target."""

    eagle3: Eagle3Config

    def __post_init__(self) -> None:
        problems = target_problems(self.model)
        if problems:
            raise ValueError("\n".join(problems))


def target_problems(model: ModelConfig) -> list[str]:
    """What keeps a model from being the target of a draft."""
    problems = []
    if model.from_scratch:
        problems.append("model.from_scratch: the target of a draft needs trained weights")
    if model.peft:
        problems.append("model.peft: the target of a draft is frozen and its draft is trained in full; leave it out")
    if model.tokenizer is not None:
        problems.append(
            f"model.tokenizer: the target is served with its own tokenizer and chat template, not those of "
            f"{model.tokenizer}; leave it out"
        )
    return problems
