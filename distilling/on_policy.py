"""Learning on policy: micro-batches whose answers the student writes itself, for a live teacher to score.

Generalised knowledge distillation, arXiv:2306.13649.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from answering.generation import Draws, Ids, continuations
from distilling.config import OnPolicyConfig
from training.batches import IGNORED, Batch, flat_batch
from training.evaluation import to_device

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Mask = npt.NDArray[np.bool_]


def students_answers(
    network: PreTrainedModel | PeftModel, stops: Sequence[int], batch: Batch, config: OnPolicyConfig, max_length: int
) -> Batch:
    """The batch with answers that the student writes now, in the same layout (training/batches.py).

    Of each sample its tokens up to the first supervised one are the prompt, and of what is written after it every
    token is supervised, the stop token too. An answer ends after `max_new_tokens`, and where its sample has
    `max_length` tokens. Samples without supervised tokens stay as they are. What is drawn depends on torch's global
    random state on the CPU, which checkpoints save. `stops`: see training.models.stop_token_ids.
    """
    samples = samples_of(batch)
    asked = [number for number, (_, mask) in enumerate(samples) if mask.any()]
    if not asked:
        return batch
    prompts = [samples[number][0][: int(np.argmax(samples[number][1]))] for number in asked]
    room = [min(config.max_new_tokens, max_length - len(prompt)) for prompt in prompts]
    assert min(room) > 0, "a sample is never longer than max_length, and its prompt is shorter"
    keys = torch.randint(2**63 - 1, (len(prompts),)).tolist()
    answers = continuations(network, prompts, stops=stops, room=room, draws=Draws(keys, config.temperature))
    for number, prompt, answer in zip(asked, prompts, answers, strict=True):
        ids = np.concatenate([prompt, answer.ids])
        samples[number] = ids, np.arange(len(ids)) >= len(prompt)
    written = flat_batch([ids for ids, _ in samples], [mask for _, mask in samples])
    return to_device(written, batch["input_ids"].device)


def samples_of(batch: Batch) -> list[tuple[Ids, Mask]]:
    """Tokens of each sample of a batch, and which of them are supervised."""
    ids = batch["input_ids"][0].cpu().numpy()
    mask = batch["labels"][0].cpu().numpy() != IGNORED
    starts = batch["cu_seq_lens_q"].tolist()
    return [(ids[first:last], mask[first:last]) for first, last in pairwise(starts)]
