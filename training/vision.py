"""Learning from rows with images: batches by the module's collator or ours, and answers about images that are scored.

A batch is what the processor makes of its rows, padded to the longest, and `labels`; rows are never packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
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


def let_texts_pass(network: torch.nn.Module) -> None:
    """Have rows without images skip the layers that look at images, as they do in a batch without any.

    Llama 3.2 Vision would have them look at blank images where rows with images stand beside them.
    """
    from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

    for layer in network.modules():
        if isinstance(layer, MllamaCrossAttentionDecoderLayer):
            layer.register_forward_hook(unchanged_without_images, with_kwargs=True)


def unchanged_without_images(
    layer: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: torch.Tensor
) -> torch.Tensor:
    """What a layer that looks at images gives: for rows without images, what it was given."""
    sees_image = keywords["full_text_row_masked_out_mask"]  # [rows, 1, tokens, 1], or None in a batch without images
    if sees_image is None:
        return output
    return torch.where(sees_image.flatten(1).any(1)[:, None, None], output, arguments[0])


def scored_answers_about_images(
    model: Any,
    processor: Any,
    rows: PackedDataset,
    collate: ImageCollate,
    score: ModuleScore,
    *,
    config: EvaluationConfig,
    batch_size: int,
    ranks: Ranks,
) -> GenerationScore:
    """Answer the first `evaluation.limit` rows greedily, and score each answer by its row, as the module gave it.

    The question is all of a row that stands before its last answer.
    """
    count = min(config.limit, len(rows))
    model.eval()
    found: dict[int, dict[str, Any]] = {}
    with in_step(model):
        for numbers in alike(rows, range(ranks.rank, count, ranks.world_size), batch_size):
            packs = [rows[number] for number in numbers]
            questions = questions_of(collate(packs), pad_token_id=processor.tokenizer.pad_token_id)
            answers = generated_answers(model, processor, questions, max_new_tokens=config.max_new_tokens)
            texts = texts_of(questions, processor)
            for number, pack, question, answer in zip(numbers, packs, texts, answers, strict=True):
                value = float(score.function(answer, pack[0].read()))
                found[number] = {"prompt": question, "prediction": answer, "score": value}
    return GenerationScore.of_shares(score.name, [found[number] for number in sorted(found)], rows=count)


def alike(rows: PackedDataset, numbers: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """The numbers of rows in batches: with equally many images, as models see those that pad them, and of like length,
    so that little of a batch is padding."""
    kinds = {}
    for number in numbers:
        (row,) = rows[number]
        kinds[number] = (len(row.content.images), row.tokens)
    for _, same in groupby(sorted(numbers, key=kinds.__getitem__), key=lambda number: kinds[number][0]):
        while some := list(islice(same, batch_size)):
            yield some


def questions_of(batch: Batch, *, pad_token_id: int) -> Batch:
    """A batch with each row up to where its last answer begins, padded on the left."""
    tokens = batch["input_ids"]
    batch = {"attention_mask": torch.ones_like(tokens), **batch}
    bounds = []
    for attended, labels in zip(batch["attention_mask"], batch["labels"], strict=True):
        answers = runs((labels != IGNORED).numpy())
        assert answers, "rows without an answer are dropped when data is prepared"
        bounds.append((int(attended.nonzero()[0]), answers[-1][0]))
    length = max(end - begin for begin, end in bounds)

    def to_the_right(key: str, value: torch.Tensor) -> torch.Tensor:
        padded = value.new_full((len(value), length, *value.shape[2:]), pad_token_id if key == "input_ids" else 0)
        for row, (begin, end) in enumerate(bounds):
            padded[row, length - (end - begin) :] = value[row, begin:end]
        return padded

    return {
        key: to_the_right(key, value) if isinstance(value, torch.Tensor) and value.shape[:2] == tokens.shape else value
        for key, value in batch.items()
        if key != "labels"
    }


def texts_of(questions: Batch, processor: Any) -> list[str]:
    """What each question says, without its images."""
    pairs = zip(questions["input_ids"], questions["attention_mask"].bool(), strict=True)
    return [processor.tokenizer.decode(tokens[mask], skip_special_tokens=True).strip() for tokens, mask in pairs]


def generated_answers(model: Any, processor: Any, questions: Batch, *, max_new_tokens: int) -> list[str]:
    """What the model says to each question, greedily, up to `max_new_tokens` or the end of its turn."""
    weight, device = next(model.parameters()), computing_device(model)
    inputs = {
        key: value.to(weight.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in to_device(questions, device).items()
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
    written = tokens[:, questions["input_ids"].shape[1] :]
    return [answer.strip() for answer in processor.tokenizer.batch_decode(written, skip_special_tokens=True)]
