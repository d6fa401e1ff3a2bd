"""Finetune a language model, in full or through adapters: one block of a chain, and the scores after the last.

train(run)      resume the newest valid checkpoint, train to the next boundary, commit a checkpoint
evaluate(run)   score the newest valid checkpoint on the test split
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.block import (
    BlockStart,
    build_data,
    checkpoint_to_evaluate,
    device_of_process,
    export_trained,
    held_out_scores,
    make_trainer,
    record_evaluation,
    scores_on_test_split,
    train_block,
)
from training.checkpoints import Checkpoint
from training.distributed import Ranks
from training.run import BlockResult, FinetuningRun

# torch and transformers take seconds to import, and a block with nothing left to do should not wait for them.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from training.trainer import BlockTrainer


def train(run: FinetuningRun) -> BlockResult:
    """Train one block: from the newest valid checkpoint to the next boundary. Nothing left to do: returns at once."""
    return train_block(
        run,
        build_trainer=lambda start: build_trainer(run, start),
        score_block=lambda trainer: held_out_scores(run, trainer, compute_loss),
        export=lambda end: export_trained(run, build_model(run, end), build_tokenizer(run), end),
    )


def build_trainer(run: FinetuningRun, start: BlockStart) -> BlockTrainer:
    return make_trainer(
        run,
        start,
        model=build_model(run, start.checkpoint),
        rows=build_data(run, "train"),
        compute_loss=compute_loss,
        objective=run.finetuning.objective,
    )


def build_model(run: FinetuningRun, start: Checkpoint | None) -> torch.nn.Module:
    """The model as the chain left it, or as it begins. Its forward pass returns the loss: see `compute_loss`."""
    from training import models

    return models.build_model(run.model, seed=run.seed, checkpoint=start.path if start else None)


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


def evaluate(run: FinetuningRun) -> dict[str, Any]:
    """Score the newest valid checkpoint and write evaluation.json: test loss, and answers where the module scores."""
    ranks = Ranks.of_environment()
    checkpoint = checkpoint_to_evaluate(run, ranks)
    model = build_model(run, checkpoint).to(device_of_process())
    result = scores_on_test_split(run, model, build_tokenizer(run), compute_loss, checkpoint, ranks)
    record_evaluation(run, result, ranks)
    return result
