"""Preferences: which of two answers is the better one, or which answers are good (dpo, kto, orpo, reward)."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from phases import texts
from phases.texts import build_tokenizer
from training.block import (
    BlockStart,
    build_data,
    device_of_process,
    export_folder,
    export_trained,
    make_trainer,
    open_prepared,
    placed_to_ask,
    scores_of_texts,
)
from training.checkpoints import Checkpoint
from training.distributed import Ranks
from training.run import FinetuningRun

if TYPE_CHECKING:
    import torch

    from training.batches import PackedDataset
    from training.preferences import PreferenceCollate, PreferenceLoss, Reference
    from training.trainer import BlockTrainer


def build_trainer(run: FinetuningRun, start: BlockStart) -> BlockTrainer:
    # The rows come first: the reference that may have to be asked about them is gone before the policy is there.
    rows, collate = build_referenced_data(run, "train", start.ranks)
    model = build_model(run, start.checkpoint)
    loss = build_loss(run, model)
    return make_trainer(
        run,
        start,
        model=model,
        rows=rows,
        compute_loss=loss,
        objective=objective(run),
        collate=collate,
        extra_metrics=loss,
        begin_step=loss.begin_step,
    )


def objective(run: FinetuningRun) -> str:
    """All that shapes the loss, in words: a checkpoint is resumed under these settings only."""
    assert run.finetuning.preference is not None
    return objective_in_words(run, asdict(run.finetuning.preference))


def objective_in_words(run: FinetuningRun, settings: dict[str, Any]) -> str:
    """The objective, its settings and the model that the chain began with, which some losses compare with."""
    settings = {**settings, "start": [run.model.name, run.model.revision]}
    return f"{run.finetuning.objective} {json.dumps(settings, sort_keys=True)}"


def build_model(run: FinetuningRun, start: Checkpoint | None) -> torch.nn.Module:
    """The model as the chain left it, or as it begins. Its forward pass returns what it says of the answers."""
    if run.finetuning.objective == "reward":
        from training.preferences import build_reward_model

        return build_reward_model(run.model, seed=run.seed, checkpoint=start.path if start else None)
    return build_judging_model(run, start)


def build_judging_model(run: FinetuningRun, start: Checkpoint | None, *, temperature: float = 1.0) -> torch.nn.Module:
    """The model; its forward pass returns the log-probabilities of answers, at a temperature."""
    from training.adapters import is_adapter
    from training.preferences import use_log_probabilities

    model: Any = texts.build_model(run, start)
    network = model.get_base_model() if is_adapter(model) else model
    use_log_probabilities(network, temperature=temperature)
    return model


def build_loss(run: FinetuningRun, model: torch.nn.Module) -> PreferenceLoss:
    """`compute_loss`, and the reference that it compares with."""
    from training.models import precision
    from training.preferences import PreferenceLoss

    config = run.finetuning.preference
    assert config is not None
    reference = None
    if config.has_reference and not config.precompute_reference:
        reference = build_reference(run, model)
    return PreferenceLoss(config, reference, model, precision(run.model))


def build_reference(run: FinetuningRun, model: torch.nn.Module, *, temperature: float = 1.0) -> Reference:
    """The model as the chain began with it: this one with its adapters off, or a frozen copy."""
    from training.adapters import is_adapter
    from training.preferences import Reference

    return Reference(None, model) if is_adapter(model) else first_reference(run, temperature=temperature)


def first_reference(run: FinetuningRun, *, temperature: float = 1.0) -> Reference:
    """The model as the chain begins with it, frozen, on the device of this process or in shards on those of all."""
    from training.adapters import is_adapter
    from training.models import precision
    from training.preferences import Reference

    model: Any = build_judging_model(run, None, temperature=temperature)
    if is_adapter(model):
        return Reference(None, placed_to_ask(run, model))
    frozen = placed_to_ask(run, model.to(precision(run.model)))
    return Reference(frozen, frozen)


def build_referenced_data(run: FinetuningRun, split: str, ranks: Ranks) -> tuple[PackedDataset, PreferenceCollate]:
    """The packs of a split and what makes batches of them. Where the reference is asked beforehand, its values are
    with them, computed now if they were not yet."""
    from training.preferences import PreferenceCollate

    assert run.finetuning.preference is not None
    rows = build_data(run, split)
    if not run.finetuning.preference.precompute_reference:
        return rows, PreferenceCollate()
    from training.models import precision
    from training.reference import ReferencedPacks, compute_reference, reference_folder

    prepared = open_prepared(run)
    folder = reference_folder(run.prepared, run.model, fingerprint=prepared.fingerprint, seed=run.seed)
    compute_reference(
        {name: build_data(run, name) for name, stats in prepared.splits.items() if stats},
        folder,
        run.folder.path / folder.name,
        lambda: (first_reference(run), device_of_process()),
        model_precision=precision(run.model),
        batch_size=run.training.batch_size,
        ranks=ranks,
    )
    return ReferencedPacks(rows, folder, split), PreferenceCollate(has_reference=True)


# --- scores


def block_scores(run: FinetuningRun, trainer: BlockTrainer) -> dict[str, float]:
    """Loss, accuracy and margin on the test split."""
    if not open_prepared(run).splits.get("test"):
        return {}
    found = held_out_preferences(run, trainer.loss, trainer.ranks)["all"]
    return {f"eval_{name}": found[name] for name in ("loss", "accuracy", "margin")}


def held_out_preferences(run: FinetuningRun, loss: Any, ranks: Ranks) -> dict[str, dict[str, float]]:
    """Loss, accuracy and margin on the test split, of all and by source."""
    from training import preferences

    rows, collate = build_referenced_data(run, "test", ranks)
    return preferences.held_out_preferences(
        loss,
        rows,
        collate,
        batch_size=run.evaluation.batch_size or run.training.batch_size,
        ranks=ranks,
    )


def scores(run: FinetuningRun, checkpoint: Checkpoint, ranks: Ranks) -> dict[str, Any]:
    """Loss, accuracy and margin, by source in `models`, and answers where the module scores."""
    model = placed_to_ask(run, build_model(run, checkpoint))
    found: dict[str, Any] = {}
    if open_prepared(run).splits.get("test"):
        by_source = held_out_preferences(run, build_loss(run, model), ranks)
        found = {**by_source["all"], "models": {run.finetuning.objective: by_source}}
    if run.finetuning.objective == "reward":
        return {"step": checkpoint.step, "epoch": checkpoint.epoch, **found}
    # Last, as it turns the weights into the precision that answers are written in.
    return {**scores_of_texts(run, model, build_tokenizer(run), checkpoint, ranks), **found}


def export(run: FinetuningRun, end: Checkpoint) -> None:
    model: Any = build_model(run, end)
    if run.finetuning.objective != "reward":
        export_trained(run, model, build_tokenizer(run), end)
        return
    from training.preferences import export_reward_model

    export_reward_model(model, build_tokenizer(run), export_folder(run), step=end.step, config=run.model)
