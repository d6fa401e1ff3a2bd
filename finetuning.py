"""Finetune a language model on texts, images, preferences or rewards: one block of a chain, and its scores.

train(run)      resume the newest valid checkpoint, train to the next boundary, commit a checkpoint
evaluate(run)   score the newest valid checkpoint on the test split
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from training.block import (
    BlockStart,
    build_data,
    checkpoint_to_evaluate,
    device_of_process,
    export_folder,
    export_trained,
    harness_scores,
    held_out_scores,
    loss_on_test_split,
    make_trainer,
    open_prepared,
    record_evaluation,
    scored_answers,
    scores_on_test_split,
    train_block,
)
from training.checkpoints import Checkpoint
from training.distributed import Ranks
from training.run import BlockResult, FinetuningRun

# torch and transformers take seconds to import, and a block with nothing left to do should not wait for them.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from rewarding.online import OnlineLoss
    from rewarding.rewards import Rewards
    from rewarding.rollouts import Writer
    from training.batches import PackedDataset
    from training.preferences import PreferenceCollate, PreferenceLoss, Reference
    from training.trainer import BlockTrainer
    from training.vision import ImageCollate


def train(run: FinetuningRun) -> BlockResult:
    """Train one block: from the newest valid checkpoint to the next boundary. Nothing left to do: returns at once."""
    return train_block(
        run,
        build_trainer=lambda start: build_trainer(run, start),
        score_block=lambda trainer: block_scores(run, trainer),
        export=lambda end: export(run, end),
    )


def build_trainer(run: FinetuningRun, start: BlockStart) -> BlockTrainer:
    if run.finetuning.preference is not None:
        return build_preference_trainer(run, start)
    model = build_model(run, start.checkpoint)
    if run.finetuning.online is not None:
        return build_online_trainer(run, start, model)
    if start.prepared.has_images:
        return make_trainer(
            with_unused_parameters(run),
            start,
            model=model,
            rows=build_data(run, "train"),
            compute_loss=compute_loss,
            objective=run.finetuning.objective,
            collate=image_collate(run),
        )
    return make_trainer(
        run,
        start,
        model=model,
        rows=build_data(run, "train"),
        compute_loss=compute_loss,
        objective=run.finetuning.objective,
    )


def build_preference_trainer(run: FinetuningRun, start: BlockStart) -> BlockTrainer:
    # The rows come first: the reference that may have to be asked about them is gone before the policy is there.
    rows, collate = preference_data(run, "train", start.ranks)
    model = build_model(run, start.checkpoint)
    loss = preference_loss(run, model)
    return make_trainer(
        run,
        start,
        model=model,
        rows=rows,
        compute_loss=loss,
        objective=objective(run),
        collate=collate,
        extra_metrics=loss.take,
        begin_step=loss.begin_step,
    )


def with_unused_parameters(run: FinetuningRun) -> FinetuningRun:
    """The run, told that some batches leave a part of the model out: texts without images, and the heads of vision
    towers that the language model does not read."""
    arguments = {"ddp_find_unused_parameters": True, **run.training.arguments}
    return replace(run, training=replace(run.training, arguments=arguments))


def image_collate(run: FinetuningRun) -> ImageCollate:
    """What makes batches of rows with images: the dataset module's collator, or ours where it has none."""
    from mixture.image_preparation import collator_for
    from training.models import load_processor
    from training.vision import ImageCollate

    collate, _ = collator_for(run.module, load_processor(run.model), run.dataset)
    return ImageCollate(collate, filler=build_data(run, "train")[0][0])


def build_online_trainer(run: FinetuningRun, start: BlockStart, model: torch.nn.Module) -> BlockTrainer:
    """The trainer of a block in which the model answers prompts itself."""
    from rewarding.iterations import FurtherIterations
    from rewarding.rollouts import PromptCollate

    loss = online_loss(run, model, step=start.checkpoint.step if start.checkpoint else 0)
    trainer = make_trainer(
        run,
        start,
        model=model,
        rows=build_data(run, "train"),
        compute_loss=loss,
        objective=objective(run),
        collate=PromptCollate(),
        extra_metrics=loss.take,
        begin_step=loss.begin_step,
    )
    trainer.add_callback(FurtherIterations(trainer, loss))
    return trainer


def objective(run: FinetuningRun) -> str:
    """All that shapes the loss of preferences or rewards, in words: a checkpoint is resumed under them only."""
    config = run.finetuning.preference or run.finetuning.online
    assert config is not None
    settings = {**asdict(config), "start": [run.model.name, run.model.revision]}
    if run.finetuning.online is not None:
        settings["max_length"] = run.dataset.max_length
    return f"{run.finetuning.objective} {json.dumps(settings, sort_keys=True)}"


def build_model(run: FinetuningRun, start: Checkpoint | None) -> torch.nn.Module:
    """The model as the chain left it, or as it begins. Its forward pass returns the loss: see `compute_loss`; for
    preferences and rewards, what it says of the answers."""
    from training import models

    checkpoint = start.path if start else None
    if run.finetuning.objective == "reward":
        from training.preferences import build_reward_model

        return build_reward_model(run.model, seed=run.seed, checkpoint=checkpoint)
    reads_images = open_prepared(run).has_images
    model = models.build_model(run.model, seed=run.seed, checkpoint=checkpoint, reads_images=reads_images)
    online = run.finetuning.online
    if run.finetuning.preference is not None or online is not None:
        from training.adapters import is_adapter
        from training.preferences import use_log_probabilities

        network: Any = model.get_base_model() if is_adapter(model) else model
        use_log_probabilities(network, temperature=online.temperature if online else 1.0)
    return model


def build_tokenizer(run: FinetuningRun) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer, or for rows with images the processor, that made the data."""
    from training.models import load_processor, load_tokenizer

    return load_processor(run.model) if open_prepared(run).has_images else load_tokenizer(run.model)


def compute_loss(model: torch.nn.Module, batch: dict[str, Any], num_items: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the supervised tokens, summed over the batch and divided by `num_items`.

    The forward pass computes it, in chunks that never hold the logits of all tokens (training/losses.py); being part
    of the model, it works unchanged under adapters and sharding.
    `num_items` counts the supervised tokens of an optimizer step over micro-batches and ranks, so that neither changes
    the loss.
    """
    return model(**batch, num_items_in_batch=num_items).loss


def preference_loss(run: FinetuningRun, model: torch.nn.Module) -> PreferenceLoss:
    """`compute_loss` of preferences, and the reference that it compares with."""
    from training.models import precision
    from training.preferences import PreferenceLoss

    config = run.finetuning.preference
    assert config is not None
    reference = None
    if config.has_reference and not config.precompute_reference:
        reference = build_reference(run, model)
    return PreferenceLoss(config, reference, model, precision(run.model))


def build_reference(run: FinetuningRun, model: torch.nn.Module) -> Reference:
    """The model as the chain began with it: this one with its adapters off, or a frozen copy."""
    from training.adapters import is_adapter
    from training.preferences import Reference

    return Reference(None, model) if is_adapter(model) else first_reference(run)


def first_reference(run: FinetuningRun) -> Reference:
    """The model as the chain begins with it, frozen, on the device of this process."""
    from training.adapters import is_adapter
    from training.models import precision
    from training.preferences import Reference

    model = build_model(run, None).requires_grad_(False).eval().to(device_of_process())
    return Reference(None, model) if is_adapter(model) else Reference(model.to(precision(run.model)), model)


def preference_data(run: FinetuningRun, split: str, ranks: Ranks) -> tuple[PackedDataset, PreferenceCollate]:
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


def online_loss(run: FinetuningRun, model: torch.nn.Module, *, step: int) -> OnlineLoss:
    """`compute_loss` of rewards, after `step` optimizer steps of the chain: what answers and what rewards."""
    from mixture.prompts import PromptRows
    from rewarding.online import OnlineLoss
    from rewarding.rewards import build_rewards

    config = run.finetuning.online
    assert config is not None
    return OnlineLoss(
        config,
        build_writer(run, model),
        build_rewards(config, run.module, device_of_process()),
        PromptRows(run.prepared, "train"),
        build_reference(run, model) if config.has_reference else None,
        step,
    )


def build_writer(run: FinetuningRun, model: Any) -> Writer:
    """The model as it answers prompts."""
    from rewarding.rollouts import Writer
    from training.models import precision, stop_token_ids

    config, tokenizer = run.finetuning.online, build_tokenizer(run)
    assert config is not None
    return Writer(
        network=model,
        tokenizer=tokenizer,
        stops=stop_token_ids(model, tokenizer),
        precision=precision(run.model),
        config=config,
        max_length=run.dataset.max_length,
        seed=run.seed,
    )


def export(run: FinetuningRun, end: Checkpoint) -> None:
    """Write the trained model where `from_pretrained` can read it."""
    model: Any = build_model(run, end)
    if run.finetuning.objective != "reward":
        export_trained(run, model, build_tokenizer(run), end)
        return
    from training.preferences import export_reward_model

    export_reward_model(model, build_tokenizer(run), export_folder(run), step=end.step, config=run.model)


# --- scores


def block_scores(run: FinetuningRun, trainer: BlockTrainer) -> dict[str, float]:
    """What is told of a block's end: the loss on the test split, of preferences also accuracy and margin; where the
    model answers itself, the mean reward."""
    if run.finetuning.online is not None:
        if not has_held_out_prompts(run):
            return {}
        loss: Any = trainer.loss
        by_source, _ = held_out_rewards(run, loss.writer, loss.rewards, trainer.ranks)
        return {"eval_reward": by_source["all"]["reward"]}
    if run.finetuning.preference is None:
        collate = image_collate(run) if open_prepared(run).has_images else None
        return held_out_scores(run, trainer, compute_loss, collate)
    if not open_prepared(run).splits.get("test"):
        return {}
    found = held_out_preferences(run, trainer.loss, trainer.ranks)["all"]
    return {f"eval_{name}": found[name] for name in ("loss", "accuracy", "margin")}


def held_out_preferences(run: FinetuningRun, loss: Any, ranks: Ranks) -> dict[str, dict[str, float]]:
    from training import preferences

    rows, collate = preference_data(run, "test", ranks)
    return preferences.held_out_preferences(
        loss,
        rows,
        collate,
        batch_size=run.evaluation.batch_size or run.training.batch_size,
        ranks=ranks,
    )


def evaluate(run: FinetuningRun) -> dict[str, Any]:
    """Score the newest valid checkpoint and write evaluation.json: test loss, and answers where the module scores.

    Of preferences also accuracy and margin, and all of them by source, in `models`; where the model answers itself,
    the mean reward before and after, instead of a loss.
    """
    ranks = Ranks.of_environment()
    checkpoint = checkpoint_to_evaluate(run, ranks)
    if run.finetuning.online is not None:
        result = reward_scores(run, checkpoint, ranks)
        record_evaluation(run, result, ranks)
        return result
    model = build_model(run, checkpoint).to(device_of_process())
    if open_prepared(run).has_images:
        result = scores_on_images(run, model, checkpoint, ranks)
    elif run.finetuning.preference is None:
        result = scores_on_test_split(run, model, build_tokenizer(run), compute_loss, checkpoint, ranks)
    else:
        result = preference_scores(run, model, checkpoint, ranks)
    record_evaluation(run, result, ranks)
    return result


def scores_on_images(run: FinetuningRun, model: Any, checkpoint: Checkpoint, ranks: Ranks) -> dict[str, Any]:
    """What evaluation.json holds of a model that learned from rows with images."""
    from mixture.dataset_modules import module_score
    from training.evaluation import as_json
    from training.models import load_processor, precision
    from training.vision import scored_answers_about_images

    assert run.module is not None, "rows with images come from a dataset module"
    collate = image_collate(run)
    loss = loss_on_test_split(run, model, compute_loss, ranks, collate)
    score = module_score(run.module, unprotected=run.evaluation.unprotected_code)
    generated = None
    if score and run.evaluation.limit:
        generated = scored_answers_about_images(
            model.to(precision(run.model)),
            load_processor(run.model),
            build_data(run, "test"),
            collate,
            score,
            config=run.evaluation,
            ranks=ranks,
        )
    return as_json(loss, generated, step=checkpoint.step, epoch=checkpoint.epoch)


def preference_scores(run: FinetuningRun, model: Any, checkpoint: Checkpoint, ranks: Ranks) -> dict[str, Any]:
    """What evaluation.json holds of a model that learned from preferences."""
    from training.evaluation import as_json

    scores: dict[str, Any] = {}
    if open_prepared(run).splits.get("test"):
        by_source = held_out_preferences(run, preference_loss(run, model), ranks)
        scores = {**by_source["all"], "models": {run.finetuning.objective: by_source}}
    # Last, as it turns the weights into the precision that answers are written in.
    is_writer = run.finetuning.objective != "reward"
    tokenizer = build_tokenizer(run)
    generated = scored_answers(run, model, tokenizer, ranks) if is_writer else None
    scores |= harness_scores(run, model, tokenizer, ranks) if is_writer else {}
    return {**as_json(None, generated, step=checkpoint.step, epoch=checkpoint.epoch), **scores}


def reward_scores(run: FinetuningRun, checkpoint: Checkpoint, ranks: Ranks) -> dict[str, Any]:
    """What evaluation.json holds of a model that answered prompts itself: mean rewards before and after, by source."""
    from rewarding.rewards import build_rewards
    from training.evaluation import as_json

    config = run.finetuning.online
    assert config is not None
    scores: dict[str, Any] = {}
    model: Any = build_model(run, checkpoint).to(device_of_process())
    if has_held_out_prompts(run):
        rewards = build_rewards(config, run.module, device_of_process())
        first = build_writer(run, build_model(run, None).to(device_of_process()))
        before, _ = held_out_rewards(run, first, rewards, ranks)
        del first  # two models at once are enough
        after, examples = held_out_rewards(run, build_writer(run, model), rewards, ranks)
        models = {run.finetuning.objective: after, "before": before}
        scores = {**after["all"], "reward_before": before["all"]["reward"], "examples": examples, "models": models}
    # Last, as it turns the weights into the precision that answers are written in.
    generated = scored_answers(run, model, build_tokenizer(run), ranks)
    return {**as_json(None, generated, step=checkpoint.step, epoch=checkpoint.epoch), **scores}


def has_held_out_prompts(run: FinetuningRun) -> bool:
    """Whether there are prompts to tell the mean reward on, and it is wanted."""
    return bool(run.evaluation.limit and open_prepared(run).splits.get("test"))


def held_out_rewards(
    run: FinetuningRun, writer: Writer, rewards: Rewards, ranks: Ranks
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    from mixture.prompts import PromptRows
    from rewarding import online

    return online.held_out_rewards(
        writer,
        rewards,
        build_data(run, "test"),
        PromptRows(run.prepared, "test"),
        limit=run.evaluation.limit,
        batch_size=run.evaluation.batch_size or run.training.batch_size,
        ranks=ranks,
    )
