"""Learning from rows with images: batches by the module's collator or ours, and answers about images that are scored.

A batch is what the processor makes of its rows, padded to the longest, and `labels`; rows are never packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mixture.dataset_modules import ModuleScore
from mixture.image_dialogues import runs
from mixture.image_preparation import CollateRows
from mixture.image_rows import ImageRow
from training.batches import IGNORED, Batch, PackedDataset
from training.config import EvaluationConfig
from training.distributed import Ranks
from training.evaluation import GenerationScore, to_device
from training.frozen_shards import in_step
from training.models import stop_token_ids
from training.sharding import computing_device


@dataclass(frozen=True)
class ImageCollate:
    """Packs of one row with images each to their batch; picklable where the module's collator is."""

    collate: CollateRows
    """Rows as the dataset module gave them to their batch, in tensors or NumPy arrays."""

    filler: ImageRow
    """Takes the place of a row where a process has none, so that all do the same; it teaches nothing."""

    def __call__(self, packs: Sequence[list[ImageRow]]) -> Batch:
        rows = [row for pack in packs for row in pack]
        batch = as_tensors(self.collate([row.read() for row in rows or [self.filler]]))
        labels = batch["labels"].clone()
        labels[:, 0] = IGNORED  # nothing stands before it that could predict it
        return {**batch, "labels": labels if rows else torch.full_like(labels, IGNORED)}


def as_tensors(batch: Any) -> Batch:
    """The batch in tensors whose memory is torch's own, and so aligned; see align_weights in training/models.py."""
    return {
        key: torch.as_tensor(value).clone() if isinstance(value, (np.ndarray, torch.Tensor)) else value
        for key, value in batch.items()
    }


def scored_answers_about_images(
    model: Any,
    processor: Any,
    rows: PackedDataset,
    collate: ImageCollate,
    score: ModuleScore,
    *,
    config: EvaluationConfig,
    ranks: Ranks,
) -> GenerationScore:
    """Answer the first `evaluation.limit` rows greedily, and score each answer by its row, as the module gave it.

    The question is all of a row that stands before its last answer.
    """
    count = min(config.limit, len(rows))
    model.eval()
    mine = []
    with in_step(model):
        for number in range(ranks.rank, count, ranks.world_size):
            pack = rows[number]
            question = question_of(collate([pack]))
            answer = generated_answer(model, processor, question, max_new_tokens=config.max_new_tokens)
            prompt = processor.tokenizer.decode(question["input_ids"][0], skip_special_tokens=True)
            value = float(score.function(answer, pack[0].read()))
            mine.append({"prompt": prompt.strip(), "prediction": answer, "score": value})
    return GenerationScore.of_shares(score.name, mine, rows=count)


def question_of(batch: Batch) -> Batch:
    """A batch of one row up to where its last answer begins."""
    answers = runs((batch["labels"][0] != IGNORED).numpy())
    assert answers, "rows without an answer are dropped when data is prepared"
    begin = answers[-1][0]
    per_token = batch["input_ids"].shape
    return {
        key: value[:, :begin] if isinstance(value, torch.Tensor) and value.shape[:2] == per_token else value
        for key, value in batch.items()
        if key != "labels"
    }


def generated_answer(model: Any, processor: Any, question: Batch, *, max_new_tokens: int) -> str:
    """What the model says, greedily, up to `max_new_tokens` or the end of its turn."""
    weight, device = next(model.parameters()), computing_device(model)
    inputs = {
        key: value.to(weight.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in to_device(question, device).items()
    }
    with torch.no_grad():
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stop_token_ids(model, processor),
            pad_token_id=processor.tokenizer.pad_token_id,
            synced_gpus=False,  # see in_step
        )
    answer: str = processor.tokenizer.decode(tokens[0, question["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()
