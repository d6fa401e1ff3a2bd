"""What a model writes after a prompt: batches padded on the left, greedy or drawn by the random numbers of a key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Tensors are named by shape. B prompts, P tokens of the longest prompt, T new tokens, V vocabulary.

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after one prompt."""

    ids: Ids
    """Its tokens, the stop token included."""

    is_finished: bool
    """Whether it ended with a stop token, and not for want of room."""

    log_probabilities: npt.NDArray[np.float32] | None = None
    """Of each token as it was drawn, in nats, where another engine wrote it."""


@dataclass(frozen=True)
class Draws:
    """How tokens are drawn: each continuation by the random numbers of its own key, at a temperature."""

    keys: Sequence[int]
    """Below 2^128; see `draw_key`."""

    temperature: float

    def numbers(self, count: int) -> npt.NDArray[np.float64]:
        """Of the first so many places of each continuation, in [0, 1), [B, count]; the same for every `count`."""
        return np.stack([np.random.Generator(np.random.Philox(key=key)).random(count) for key in self.keys])


def draw_key(*occasion: object) -> int:
    """The key of what is drawn at an occasion: named alike it is the same whenever and wherever it is drawn."""
    return xxhash.xxh3_128_intdigest(" ".join(map(str, occasion)).encode())


@torch.no_grad()
def continuations(
    network: PreTrainedModel | PeftModel,
    prompts: Sequence[Ids],
    *,
    stops: Sequence[int],
    room: Sequence[int],
    draws: Draws | None = None,
) -> list[Continuation]:
    """The continuations of prompts, together in one batch: each up to a stop token or its `room` in tokens.

    Of the model's own settings for generation none is used: greedy without `draws`, else from its whole distribution.
    """
    longest = max(map(len, prompts))
    device = network.get_input_embeddings().weight.device
    input_ids_BP = torch.full((len(prompts), longest), stops[0], dtype=torch.int64)
    attention_BP = torch.zeros_like(input_ids_BP)
    for row, prompt in enumerate(prompts):
        input_ids_BP[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        attention_BP[row, longest - len(prompt) :] = 1
    settings = GenerationConfig(
        max_new_tokens=max(room),
        do_sample=False,
        use_cache=True,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
    )
    with writing(network, settings):
        written_BT = network.generate(
            input_ids=input_ids_BP.to(device),
            attention_mask=attention_BP.to(device),
            logits_processor=LogitsProcessorList([DrawnToken(draws, max(room))] if draws else []),
            synced_gpus=False,  # see in_step in training/frozen_shards.py
        )
    new_tokens = written_BT[:, longest:].cpu().numpy()
    return [cut(ids[:limit], stops) for ids, limit in zip(new_tokens, room, strict=True)]


def cut(ids: Ids, stops: Sequence[int]) -> Continuation:
    """The tokens up to the first stop token."""
    ends = np.flatnonzero(np.isin(ids, stops))
    return Continuation(ids[: ends[0] + 1], True) if len(ends) else Continuation(ids, False)


@contextmanager
def writing(network: PreTrainedModel | PeftModel, settings: GenerationConfig) -> Iterator[None]:
    """The model as it writes: without dropout, with these settings alone; as it was afterwards."""
    was_training, own = network.training, network.generation_config
    network.eval()
    network.generation_config = settings
    try:
        yield
    finally:
        network.generation_config = own
        network.train(was_training)


class DrawnToken(LogitsProcessor):
    """Leaves one token to choose of each row: the one that its number falls on, in the cumulated probabilities."""

    def __init__(self, draws: Draws, places: int) -> None:
        self.temperature = draws.temperature
        self.numbers_BT = torch.from_numpy(draws.numbers(places))
        self.place = 0

    def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        # In float64: over 100,000 tokens a running sum in float32 would lose the small ones.
        cumulated_BV = (scores_BV.double() / self.temperature).softmax(1).cumsum(1)
        numbers_B = self.numbers_BT[:, self.place].to(scores_BV.device)
        self.place += 1
        points_B = numbers_B * cumulated_BV[:, -1]
        chosen_B1 = torch.searchsorted(cumulated_BV, points_B[:, None], right=True)
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, chosen_B1.clamp_(max=scores_BV.shape[1] - 1), 0)
