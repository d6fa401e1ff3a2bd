"""Finetune a language model on texts, images, preferences or rewards: one block of a chain, and its scores.

train(run)      resume the newest valid checkpoint, train to the next boundary, commit a checkpoint
evaluate(run)   score the newest valid checkpoint on the test split
"""

from __future__ import annotations

from typing import Any

from phases.phase import Phase
from training.block import checkpoint_to_evaluate, open_prepared, record_evaluation, train_block
from training.distributed import Ranks
from training.run import BlockResult, FinetuningRun


def train(run: FinetuningRun) -> BlockResult:
    """Train one block: from the newest valid checkpoint to the next boundary. Nothing left to do: returns at once."""
    return train_block(
        run,
        build_trainer=lambda start: phase_of(run).build_trainer(run, start),
        score_block=lambda trainer: phase_of(run).block_scores(run, trainer),
        export=lambda end: phase_of(run).export(run, end),
    )


def evaluate(run: FinetuningRun) -> dict[str, Any]:
    """Score the newest valid checkpoint and write evaluation.json; its phase says what is in there."""
    ranks = Ranks.of_environment()
    checkpoint = checkpoint_to_evaluate(run, ranks)
    result = phase_of(run).scores(run, checkpoint, ranks)
    record_evaluation(run, result, ranks)
    return result


def phase_of(run: FinetuningRun) -> Phase:
    """The module that learns the rows of this run."""
    from phases import images, preferences, rewards, texts

    if run.finetuning.online is not None:
        return rewards
    if run.finetuning.preference is not None:
        return preferences
    return images if open_prepared(run).has_images else texts
