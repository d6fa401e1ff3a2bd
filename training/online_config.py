"""Learning from answers that the model writes itself and that are rewarded. No torch here, as in training/config.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from training.vllm_config import Engine, VllmConfig, unread_vllm

JUDGE_PROMPT = (
    "Here is a conversation and the answer that an assistant gave.\n\n{prompt}\n\nAnswer:\n{answer}\n\n"
    "How good is the answer, from 0 (useless) to 10 (perfect)? Reply with the number alone."
)


@dataclass(kw_only=True, frozen=True)
class RewardSource:
    """Where a reward comes from; several are added up."""

    kind: Literal["module", "model", "judge"] = "module"
    """`module`: `reward(prompt_messages, answer, row)` of the dataset module, or where it has none its
    `score(prediction, row)`. `model`: what finetuning.objective: reward exported. `judge`: a chat model that is asked
    for a number."""

    name: str | None = None
    """Folder or hub id of the model or the judge."""

    revision: str | None = None
    """Branch, tag or commit of it on the hub."""

    weight: float = 1.0
    """What its rewards are multiplied by."""

    prompt: str | None = None
    """What a judge is asked, with {prompt} and {answer}. Unset: how good the answer is, from 0 to 10."""

    highest: float | None = None
    """A judge's best number; rewards are its numbers divided by it, so from 0 to 1. Unset: 10. A reply without a
    number from 0 to `highest` is worth 0, and counted (`judge_unread` in metrics.jsonl)."""

    max_new_tokens: int | None = None
    """Longest reply of a judge. Unset: 16."""

    def __post_init__(self) -> None:
        problems = []
        if self.kind == "module" and (self.name or self.revision):
            problems.append("rewards: name and revision are those of a model or a judge; kind: module has none")
        if self.kind != "module" and not self.name:
            problems.append(f"rewards: kind: {self.kind} needs name, the folder or hub id of the model to ask")
        for key in ("prompt", "highest", "max_new_tokens"):
            if self.kind != "judge" and getattr(self, key) is not None:
                problems.append(f"rewards: {key} is read by kind: judge only, not by {self.kind}")
        if self.prompt is not None and not ("{prompt}" in self.prompt and "{answer}" in self.prompt):
            problems.append("rewards: prompt must hold {prompt} and {answer}, where the judge is to read them")
        if self.highest is not None and self.highest <= 0:
            problems.append(f"rewards: highest must be above 0, got {self.highest}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            problems.append(f"rewards: max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(kw_only=True, frozen=True)
class OnlineConfig:
    """What GRPO and RLOO share. An optimizer step asks the prompts of its micro-batches, `training.batch_size` each on
    every process, and learns from the answers. The mean reward is told on the first `evaluation.limit` test prompts."""

    section: ClassVar[str]

    group_size: int = 8
    """Answers to each prompt, which are compared with each other."""

    max_new_tokens: int = 256
    """Longest answer; one also ends where prompt and answer have `dataset.max_length` tokens."""

    temperature: float = 1.0
    """Of the answers' sampling, from the whole distribution; the loss is that of the same distribution."""

    rewards: list[RewardSource] = field(default_factory=lambda: [RewardSource()])
    """What answers are worth: the weighted sum of these. A dataset module's function runs its code."""

    iterations: int = 1
    """Updates of the weights from each step's answers, all inside one optimizer step of the chain."""

    epsilon: float = 0.2
    """How far below 1 the ratio of new to old probabilities still teaches; at the first iteration it is 1."""

    epsilon_high: float | None = None
    """How far above 1. Unset: `epsilon`."""

    beta: float = 0.0
    """Strength of the pull to the model that the chain began with; above 0 it is asked too."""

    engine: Engine = "transformers"
    """What writes the answers. `transformers`: the model that is trained, exactly as it is. `vllm`: a copy of it in
    vLLM, much faster on a GPU, which computes a little otherwise; the loss is corrected for that."""

    vllm: VllmConfig | None = None
    """Settings of the engine of this name."""

    def __post_init__(self) -> None:
        key = f"finetuning.{self.section}"
        problems = []
        if self.group_size < 2:
            problems.append(f"{key}.group_size must be at least 2, as answers are compared, got {self.group_size}")
        for name in ("max_new_tokens", "iterations"):
            if getattr(self, name) < 1:
                problems.append(f"{key}.{name} must be at least 1, got {getattr(self, name)}")
        if self.temperature <= 0:
            problems.append(f"{key}.temperature must be above 0, got {self.temperature}")
        if not 0 < self.epsilon < 1:
            problems.append(f"{key}.epsilon must be above 0 and below 1, got {self.epsilon}")
        if self.epsilon_high is not None and self.epsilon_high <= 0:
            problems.append(f"{key}.epsilon_high must be above 0, got {self.epsilon_high}")
        if self.beta < 0:
            problems.append(f"{key}.beta must not be negative, got {self.beta}")
        if not self.rewards:
            problems.append(f"{key}.rewards is empty: name at least one, as - kind: module")
        problems += unread_vllm(key, self.engine, self.vllm)
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def clip_high(self) -> float:
        """`epsilon_high`, or what it is where it is unset."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with the model as the chain began with it."""
        return self.beta > 0


@dataclass(kw_only=True, frozen=True)
class GrpoConfig(OnlineConfig):
    """Group relative policy optimisation, read where `finetuning.objective` is grpo."""

    section: ClassVar[str] = "grpo"

    loss: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = "grpo"
    """What a token weighs; each with its paper in rewarding/losses.py. `grpo`: every answer the same. `bnpo`, `dapo`:
    every token of the step the same. `dr_grpo`: one share of `max_new_tokens`, so that short answers weigh less."""

    scale: Literal["group", "none"] = "group"
    """Whether an answer's lead over its group is divided by the group's standard deviation."""


@dataclass(kw_only=True, frozen=True)
class RlooConfig(OnlineConfig):
    """REINFORCE with a leave-one-out baseline, read where `finetuning.objective` is rloo."""

    section: ClassVar[str] = "rloo"


ONLINE_CONFIGS: dict[str, type[GrpoConfig] | type[RlooConfig]] = {"grpo": GrpoConfig, "rloo": RlooConfig}
