"""Prompts of a batch, and the answers that a model writes to them, the same whenever and wherever a run is repeated.

A batch is that of training/batches.py over the rows of its prompts, and further

    prompts         list[TokenRow]   the rows themselves, from which answers are written

Once it is answered it is that of training/preferences.py over prompt and answer, S answers, prompt by prompt, N tokens
of answers:

    answer_tokens   list[int]        tokens of each answer, all of them with a label
    advantages      float [S]
    old             float [N] | absent   log-probabilities before the first update, where there are several
    reference       float [N] | absent   the same under the reference
    drawn           float [N] | absent   the same as they were drawn, where another engine drew them
    place           int              which micro-batch of the step it is
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from answering.generation import Continuation, Draws, continuations, draw_key
from answering.vllm_engine import VllmEngine
from mixture.prompts import PromptRows
from mixture.shards import TokenRow
from rewarding.rewards import Answered
from training.batches import Batch, collate
from training.current_weights import current_weights
from training.distributed import Ranks
from training.evaluation import autocast
from training.online_config import OnlineConfig
from training.preferences import answers_batch
from training.sharding import computing_device

PROMPTS = "prompts"
ADVANTAGES = "advantages"
OLD = "old"
DRAWN = "drawn"
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
    ranks: Ranks
    engine: VllmEngine | None = None
    """What writes in the place of the network, by its weights."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return computing_device(self.network)

    def begin(self) -> None:
        """Write from now on by the network's weights as they are now; all processes of a block do so together."""
        if self.engine is not None:
            with current_weights(self.network, self.ranks, self.precision) as folder:
                self.engine.load(str(folder))

    def write(self, batches: Sequence[Sequence[TokenRow]], *, occasion: str, answers: int) -> list[list[Rollout]]:
        """So many answers to each prompt of each batch, prompt by prompt.

        The network writes those of one batch side by side, vLLM those of all. What is drawn is a function of seed,
        occasion (the optimizer step), sample and answer, so it depends neither on random states nor on which process
        asks.
        """
        asked = [[prompt for prompt in batch for _ in range(answers)] for batch in batches]
        keys = [
            [draw_key(self.seed, occasion, place % answers, prompt.sample_id) for place, prompt in enumerate(batch)]
            for batch in asked
        ]
        if self.engine is None:
            return [self.written(batch, own) for batch, own in zip(asked, keys, strict=True)]
        everything = iter(self.written(list(chain(*asked)), list(chain(*keys))))
        return [list(islice(everything, len(batch))) for batch in asked]

    def written(self, asked: Sequence[TokenRow], keys: Sequence[int]) -> list[Rollout]:
        """An answer to each prompt, together in one batch."""
        if not asked:
            return []
        prompts = [prompt.input_ids.astype(np.int64) for prompt in asked]
        room = [min(self.config.max_new_tokens, self.max_length - len(prompt)) for prompt in prompts]
        assert min(room) > 0, "preparation drops prompts that fill max_length"
        draws = Draws(keys, self.config.temperature)
        if self.engine is not None:
            written = self.engine.continuations(prompts, stops=self.stops, room=room, draws=draws)
        else:
            with autocast(self.device, self.precision):
                written = continuations(self.network, prompts, stops=self.stops, room=room, draws=draws)
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


def rollouts_batch(rollouts: Sequence[Rollout], *, drawn_elsewhere: bool) -> Batch:
    """The answers' batch, before it is known what they are worth; a process without answers has the same entries."""
    batch = answers_batch([rollout.row for rollout in rollouts])
    if drawn_elsewhere:
        drawn = [one for rollout in rollouts if (one := rollout.continuation.log_probabilities) is not None]
        batch[DRAWN] = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.float32), *drawn]))
    return batch
