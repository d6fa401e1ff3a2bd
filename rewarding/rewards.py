"""What answers are worth: by a function of the dataset module, by a reward model, by a judge.

`reward(prompt_messages, answer, row) -> float` of a dataset module is given the turns before the answer, the answer as
text without control tokens, and the row as the module returned it. It runs in every training process, as the rest of
the module does. A chain equals one uninterrupted run only where the same arguments give the same reward.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from answering.generation import Ids, continuations
from mixture.dataset_modules import (
    REWARD_FUNCTION,
    SCORE_FUNCTION,
    ModuleFile,
    load_module,
    module_score,
    raise_located,
)
from mixture.formats import Message, Sample
from mixture.render import Renderer
from mixture.shards import TokenRow
from training.config import ModelConfig
from training.evaluation import autocast, to_device
from training.models import load_model_config, load_tokenizer, load_with_tokenizer, precision, stop_token_ids
from training.online_config import JUDGE_PROMPT, OnlineConfig, RewardSource
from training.preferences import answers_batch, build_reward_model, values_of_answers

SHOWN_CHARACTERS = 80
HIGHEST = 10.0
REPLY_TOKENS = 16
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
PLACE = re.compile(r"\{(prompt|answer)\}")
NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Answered:
    """A prompt with one answer to it."""

    sample_id: str
    messages: list[Message]
    row: dict[str, Any]
    answer: str


class Rewarding(Protocol):
    """One source of rewards."""

    def __call__(self, answered: Sequence[Answered]) -> list[float]:
        """The reward of each answer, before its weight. ValueError names the row whose reward is no finite number."""


@dataclass(frozen=True)
class Rewards:
    """All sources of rewards of a run, by the name that metrics have."""

    sources: dict[str, Rewarding]
    weights: dict[str, float]
    unread: Counter[str]
    """Replies of judges without a number, since they were last counted."""

    def of(self, answered: Sequence[Answered]) -> dict[str, torch.Tensor]:
        """The reward of each answer by each source, float64 [S]."""
        return {
            name: torch.tensor(source(answered) if answered else [], dtype=torch.float64)
            for name, source in self.sources.items()
        }

    def total(self, rewards: dict[str, torch.Tensor]) -> torch.Tensor:
        """Their weighted sum, [S]."""
        return sum((self.weights[name] * value for name, value in rewards.items()), torch.zeros(()))


def build_rewards(
    config: OnlineConfig, module: ModuleFile | None, device: torch.device, *, unprotected: bool
) -> Rewards:
    """The sources that a run names, with models on `device`. ValueError: a module without reward, no such model.

    `unprotected`: whether a module's `score` may run code where the machine cannot protect itself.
    """
    unread: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    sources: dict[str, Rewarding] = {}
    weights = {}
    for source in config.rewards:
        kinds[source.kind] += 1
        name = source.kind if kinds[source.kind] == 1 else f"{source.kind}_{kinds[source.kind]}"
        sources[name] = build_source(source, config, module, unread, device, unprotected=unprotected)
        weights[name] = source.weight
    return Rewards(sources, weights, unread)


def build_source(
    source: RewardSource,
    config: OnlineConfig,
    module: ModuleFile | None,
    unread: Counter[str],
    device: torch.device,
    *,
    unprotected: bool,
) -> Rewarding:
    key = f"finetuning.{config.section}.rewards"
    if source.kind == "module":
        return ModuleReward(*module_function(module, key, unprotected=unprotected))
    assert source.name is not None
    model = ModelConfig(name=source.name, revision=source.revision)
    if source.kind == "model":
        return ModelReward.load(model, key=key, device=device)
    return JudgeReward.load(source, model, unread, key=key, device=device)


# --- a function of the dataset module


def module_function(
    module: ModuleFile | None, key: str, *, unprotected: bool
) -> tuple[ModuleFile, Callable[[Answered], Any], str]:
    """The module, its function and the function's name; ValueError where there is none."""
    if module is None:
        raise ValueError(
            f"{key}: kind: module needs a single dataset module (dataset.name or dataset.file), and a mixture is "
            "trained on; use kind: model or kind: judge"
        )
    reward = getattr(load_module(module.path), REWARD_FUNCTION, None)
    if reward is not None:
        return module, lambda one: reward(one.messages, one.answer, one.row), REWARD_FUNCTION
    score = module_score(module, unprotected=unprotected)
    if score is not None:
        return module, lambda one: score.function(one.answer, one.row), SCORE_FUNCTION
    raise ValueError(
        f"{key}: {module.path} has no function reward; add reward(prompt_messages, answer, row) -> float to it, or "
        "score(prediction, row) -> float, or use kind: model or kind: judge"
    )


@dataclass(frozen=True)
class ModuleReward:
    """`reward`, or `score`, of the dataset module."""

    module: ModuleFile
    function: Callable[[Answered], Any]
    name: str

    def __call__(self, answered: Sequence[Answered]) -> list[float]:
        return [self.of_one(one) for one in answered]

    def of_one(self, one: Answered) -> float:
        about = f"in {self.name} for row {one.sample_id} and the answer {one.answer[:SHOWN_CHARACTERS]!r}"
        try:
            value = float(self.function(one))
        except Exception as error:
            raise_located(error, self.module.path, about)
        if not math.isfinite(value):
            raise ValueError(f"{self.module.path}: {value} {about}; return a finite number")
        return value


# --- a reward model


@dataclass(frozen=True)
class ModelReward:
    """A sequence classifier of one label, read as finetuning.objective: reward trains it."""

    network: Any
    renderer: Renderer
    key: str

    @classmethod
    def load(cls, model: ModelConfig, *, key: str, device: torch.device) -> ModelReward:
        architectures = load_model_config(model).architectures or []
        if not any(name.endswith("ForSequenceClassification") for name in architectures):
            raise ValueError(
                f"{key}: {model.name} is {', '.join(architectures) or 'no model that says its kind'}, and kind: model "
                "takes a sequence classifier of one label, as finetuning.objective: reward exports; to ask a chat "
                "model for its opinion use kind: judge"
            )
        network: Any = build_reward_model(model, seed=0).requires_grad_(False).eval().to(device, precision(model))
        renderer = Renderer(load_tokenizer(model), objective="sft", max_length=NO_LIMIT, over_length=None)
        return cls(network, renderer, key)

    def __call__(self, answered: Sequence[Answered]) -> list[float]:
        rows = [self.token_row(one) for one in answered]
        dtype = next(self.network.parameters()).dtype
        device = self.network.device
        with torch.no_grad(), autocast(device, dtype):
            values = values_of_answers(self.network, to_device(answers_batch(rows), device)).tolist()
        for one, value in zip(answered, values, strict=True):
            if not math.isfinite(value):
                raise ValueError(f"{self.key}: the reward model gives {value} for an answer to row {one.sample_id}")
        return values

    def token_row(self, one: Answered) -> TokenRow:
        messages = [*one.messages, {"role": "assistant", "content": one.answer}]
        sample = Sample(id=one.sample_id, source="", content={"messages": messages})
        (tokens,) = self.renderer.chats([sample])
        if tokens is None:
            raise ValueError(f"{self.key}: the reward model's chat template refuses row {one.sample_id}")
        return TokenRow(one.sample_id, *tokens, "")


# --- a judge


@dataclass(frozen=True)
class JudgeReward:
    """A chat model that is asked for a number; greedy, so that the same answer gets the same one."""

    network: Any
    tokenizer: Any
    renderer: Renderer
    question: str
    highest: float
    max_new_tokens: int
    stops: list[int]
    unread: Counter[str]
    key: str

    @classmethod
    def load(
        cls, source: RewardSource, model: ModelConfig, unread: Counter[str], *, key: str, device: torch.device
    ) -> JudgeReward:
        network, tokenizer = load_with_tokenizer(model, key=key, device=device)
        return cls(
            network,
            tokenizer,
            Renderer(tokenizer, objective="sft", max_length=NO_LIMIT, over_length=None),
            source.prompt or JUDGE_PROMPT,
            source.highest or HIGHEST,
            source.max_new_tokens or REPLY_TOKENS,
            stop_token_ids(network, tokenizer),
            unread,
            key,
        )

    def __call__(self, answered: Sequence[Answered]) -> list[float]:
        prompts = [self.prompt_ids(one) for one in answered]
        room = [self.max_new_tokens] * len(prompts)
        replies = continuations(self.network, prompts, stops=self.stops, room=room)
        return [self.value(self.tokenizer.decode(reply.ids, skip_special_tokens=True)) for reply in replies]

    def prompt_ids(self, one: Answered) -> Ids:
        """What the judge reads of one answer."""
        conversation = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in one.messages)
        parts = {"prompt": conversation, "answer": one.answer}
        text = PLACE.sub(lambda place: parts[place[1]], self.question)  # not str.format: texts may hold braces
        return self.renderer.prompt_ids([{"role": "user", "content": text}]).astype("int64")

    def value(self, reply: str) -> float:
        """The reward that a reply says, from 0 to 1."""
        found = NUMBER.search(reply)
        if found is None or not 0 <= float(found[0]) <= self.highest:
            self.unread["replies"] += 1
            return 0.0
        return float(found[0]) / self.highest
