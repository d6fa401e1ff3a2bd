"""Prompts of a batch, and the answers that a model writes to them, the same whenever and wherever a run is repeated.

A batch is that of training/batches.py over the rows of its prompts, and further

    prompts         list[TokenRow]   the rows themselves, from which answers are written

Once it is answered it is that of training/preferences.py over prompt and answer, S answers, prompt by prompt, N tokens
of answers:

    answer_tokens   list[int]        tokens of each answer, all of them with a label
    advantages      float [S]
    old             float [N] | absent   log-probabilities before the first update, where there are several
    reference       float [N] | absent   the same under the reference
    place           int              which micro-batch of the step it is
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from answering.generation import Continuation, Draws, continuations
from mixture.prompts import PromptRows
from mixture.shards import TokenRow
from rewarding.rewards import Answered
from training.batches import Batch, collate
from training.evaluation import autocast
from training.online_config import OnlineConfig
from training.preferences import answers_batch
from training.sharding import computing_device

PROMPTS = "prompts"
ADVANTAGES = "advantages"
OLD = "old"
PLACE = "place"


@dataclass(frozen=True)
class PromptCollate:
    """Prompts to their batch; picklable, since it may run in the data loader's processes."""

    def __call__(self, packs: Sequence[list[Any]]) -> Batch:
        return {**collate(packs), PROMPTS: [row for pack in packs for row in pack]}


@dataclass(frozen=True)
class Rollout:
    """One answer to a prompt."""

    prompt: TokenRow
    continuation: Continuation

    @property
    def row(self) -> TokenRow:
        """Prompt and answer, with a label on every token of the answer, the stop token too."""
        ids = np.concatenate([self.prompt.input_ids, self.continuation.ids]).astype(np.int32)
        mask = np.arange(len(ids)) >= len(self.prompt.input_ids)
        return TokenRow(self.prompt.sample_id, ids, mask, self.prompt.source)


@dataclass(frozen=True)
class Writer:
    """The model as it answers."""

    network: Any
    """The model itself, not what wraps it for training on several processes."""

    tokenizer: Any
    stops: list[int]
    precision: torch.dtype
    config: OnlineConfig
    max_length: int
    seed: int

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return computing_device(self.network)

    def write(self, prompts: Sequence[TokenRow], *, occasion: str, answers: int) -> list[Rollout]:
        """So many answers to each prompt, side by side in one batch, prompt by prompt.

        What is drawn is a function of seed, occasion (the optimizer step), sample and answer, so it depends neither on
        random states nor on which process asks.
        """
        if not prompts:
            return []
        asked = [prompt for prompt in prompts for _ in range(answers)]
        room = [min(self.config.max_new_tokens, self.max_length - len(prompt.input_ids)) for prompt in asked]
        assert min(room) > 0, "preparation drops prompts that fill max_length"
        numbers_BT = np.stack(
            [
                numbers_of(self.seed, occasion, prompt.sample_id, place % answers, max(room))
                for place, prompt in enumerate(asked)
            ]
        )
        with autocast(self.device, self.precision):
            written = continuations(
                self.network,
                [prompt.input_ids.astype(np.int64) for prompt in asked],
                stops=self.stops,
                room=room,
                draws=Draws(numbers_BT, self.config.temperature),
            )
        return [Rollout(prompt, continuation) for prompt, continuation in zip(asked, written, strict=True)]

    def answered(self, rollouts: Sequence[Rollout], rows: PromptRows) -> list[Answered]:
        """The answers as texts, with what a reward is told of their prompts."""
        known = {name: rows[name] for name in {rollout.prompt.sample_id for rollout in rollouts}}
        return [
            Answered(
                sample_id=(name := rollout.prompt.sample_id),
                messages=known[name].messages,
                row=known[name].row,
                answer=self.tokenizer.decode(rollout.continuation.ids, skip_special_tokens=True).strip(),
            )
            for rollout in rollouts
        ]


def numbers_of(seed: int, occasion: str, sample_id: str, answer: int, count: int) -> npt.NDArray[np.float64]:
    """What the tokens of one answer are drawn by; beginnings of it are the same for every `count`."""
    name = f"{seed} {occasion} {answer} {sample_id}".encode()
    return np.random.Generator(np.random.Philox(key=xxhash.xxh3_128_intdigest(name))).random(count)


def rollouts_batch(rollouts: Sequence[Rollout]) -> Batch:
    """The answers' batch, before it is known what they are worth."""
    return answers_batch([rollout.row for rollout in rollouts])
