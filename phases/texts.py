"""Texts and conversations: cross entropy of the tokens that a model is to write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.block import (
    BlockStart,
    build_data,
    export_trained,
    held_out_scores,
    make_trainer,
    placed_to_ask,
    scores_on_test_split,
)
from training.checkpoints import Checkpoint
from training.distributed import Ranks
from training.run import FinetuningRun

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from training.trainer import BlockTrainer


def build_trainer(run: FinetuningRun, start: BlockStart) -> BlockTrainer:
    return make_trainer(
        run,
        start,
        model=build_model(run, start.checkpoint),
        rows=build_data(run, "train"),
        compute_loss=compute_loss,
        objective=run.finetuning.objective,
    )


def build_model(run: FinetuningRun, start: Checkpoint | None, *, reads_images: bool = False) -> torch.nn.Module:
    """The model as the chain left it, or as it begins. Its forward pass returns the loss: see `compute_loss`."""
    from training import models

    checkpoint = start.path if start else None
    return models.build_model(run.model, seed=run.seed, checkpoint=checkpoint, reads_images=reads_images)


def build_tokenizer(run: FinetuningRun) -> PreTrainedTokenizerBase:
    """The tokenizer that made the data."""
    from training.models import load_tokenizer

    return load_tokenizer(run.model)


def compute_loss(model: torch.nn.Module, batch: dict[str, Any], num_items: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the supervised tokens, summed over the batch and divided by `num_items`.

    The forward pass computes it, in chunks that never hold the logits of all tokens (training/losses.py); being part
    of the model, it works unchanged under adapters and sharding.
    `num_items` counts the supervised tokens of an optimizer step over micro-batches and ranks, so that neither changes
    the loss.
    """
    return model(**batch, num_items_in_batch=num_items).loss


def block_scores(run: FinetuningRun, trainer: BlockTrainer) -> dict[str, float]:
    """Loss and perplexity on the test split."""
    return held_out_scores(run, trainer, compute_loss)


def scores(run: FinetuningRun, checkpoint: Checkpoint, ranks: Ranks) -> dict[str, Any]:
    """Test loss, and answers where the module scores."""
    model = placed_to_ask(run, build_model(run, checkpoint))
    return scores_on_test_split(run, model, build_tokenizer(run), compute_loss, checkpoint, ranks)


def export(run: FinetuningRun, end: Checkpoint) -> None:
    export_trained(run, build_model(run, end), build_tokenizer(run), end)
