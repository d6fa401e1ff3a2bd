"""Finetune a language model, in full or through adapters: one block of a chain, and the scores after the last.

train(run)      resume the newest valid checkpoint, train to the next boundary, commit a checkpoint
evaluate(run)   score the newest valid checkpoint on the test split
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from mixture.prepare import PreparedData
from mixture.whole_files import write_whole
from training.checkpoints import Checkpoint, NoValidCheckpointError, ResumeTerms, newest_valid, refuse_changed_terms
from training.distributed import Ranks, failing_together, from_main, join_ranks
from training.export import is_exported, require_own_folder
from training.run import BlockResult, FinetuningRun
from training.schedule import Horizon, terms_before_extensions
from training.stopping import StopPoll

# torch and transformers take seconds to import, and a block with nothing left to do should not wait for them.
if TYPE_CHECKING:
    import torch

    from training.batches import PackedDataset
    from training.trainer import BlockTrainer


def train(run: FinetuningRun) -> BlockResult:
    """Train one block: from the newest valid checkpoint to the next boundary. Nothing left to do: returns at once."""
    ranks = Ranks.of_environment()
    prepared = open_prepared(run)
    horizon = Horizon.of(run.training, num_rows=num_train_rows(prepared), world_size=ranks.world_size)
    start, rejected = newest_valid(run.folder.checkpoints)
    if start and start.step > horizon.total_steps:
        raise ValueError(
            f"{start.path} lies beyond the horizon of {horizon.total_steps} steps; restore training.total_jobs and "
            "training.extensions"
        )
    if start and start.step >= horizon.total_steps and is_exported(export_folder(run), step=start.step):
        return BlockResult(step=start.step, horizon_steps=horizon.total_steps, finished=True)

    require_own_folder(export_folder(run))
    join_ranks(run.folder.path, ranks)
    start, rejected = from_main((start, rejected))
    if ranks.is_main and start:
        run.folder.record_event("resumed", step=start.step, path=start.path.name, rejected=rejected)
    end = start
    if not start or start.step < horizon.total_steps:
        trainer = build_trainer(run, prepared, horizon, ranks, start)
        with run.stopping.deferred():
            end = trainer.train_block()
        if not end or end.step < trainer.schedule.block_end:
            return BlockResult(
                step=end.step if end else 0, horizon_steps=horizon.total_steps, finished=False, stopped=True
            )
        record_block_end(run, prepared, trainer, end)
    assert end is not None
    if end.step >= horizon.total_steps:
        # All wait: srun ends the step soon after its first process has left.
        with failing_together():
            if ranks.is_main:
                export(run, end)
    return BlockResult(step=end.step, horizon_steps=horizon.total_steps, finished=end.step >= horizon.total_steps)


def open_prepared(run: FinetuningRun) -> PreparedData:
    prepared = PreparedData.open(run.prepared)
    if prepared is None:
        raise ValueError(f"{run.prepared} holds no prepared data; the first job of the chain prepares it")
    return prepared


def num_train_rows(prepared: PreparedData) -> int:
    train = prepared.splits["train"]
    assert train is not None, "preparation fails where the train split has no rows"
    return train.packs


def build_trainer(
    run: FinetuningRun, prepared: PreparedData, horizon: Horizon, ranks: Ranks, start: Checkpoint | None
) -> BlockTrainer:
    from training.models import parameters_hash, precision
    from training.trainer import BlockTrainer, training_arguments

    model = build_model(run, start)
    terms = ResumeTerms(
        fingerprint=prepared.fingerprint,
        objective=run.finetuning.objective,
        parameters=parameters_hash(model, run.model),
        batch_size=run.training.batch_size,
        gradient_accumulation=run.training.gradient_accumulation,
        world_size=ranks.world_size,
        horizon_steps=horizon.total_steps,
        optimization=run.training.optimization,
    )
    if start:
        earlier = terms_before_extensions(terms, run.training, horizon, step=start.step)
        refuse_changed_terms(start, terms, before_extensions=earlier)
    return BlockTrainer(
        model,
        build_data(run, "train"),
        compute_loss,
        config=run.training,
        arguments=training_arguments(
            run.training, folder=run.folder, horizon=horizon, seed=run.seed, precision=precision(run.model)
        ),
        horizon=horizon,
        terms=terms,
        folder=run.folder,
        ranks=ranks,
        start=start,
        owner=run.owner,
        stop_requested=StopPoll(run.stopping, run.folder.stop).is_requested,
    )


def build_model(run: FinetuningRun, start: Checkpoint | None) -> torch.nn.Module:
    """The model as the chain left it, or as it begins. Its forward pass returns the loss: see `compute_loss`."""
    from training import models

    return models.build_model(run.model, seed=run.seed, checkpoint=start.path if start else None)


def build_data(run: FinetuningRun, split: str) -> PackedDataset:
    """The packs of a split, memory-mapped."""
    from mixture.shards import TokenRows, read_packs
    from training.batches import PackedDataset

    return PackedDataset(TokenRows.open(run.prepared, split), read_packs(run.prepared, split))


def compute_loss(model: torch.nn.Module, batch: dict[str, Any], num_items: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the supervised tokens, summed over the batch and divided by `num_items`.

    The forward pass computes it, in chunks that never hold the logits of all tokens (training/losses.py); being part
    of the model, it works unchanged under adapters and sharding.
    `num_items` counts the supervised tokens of an optimizer step over micro-batches and ranks, so that neither changes
    the loss.
    """
    return model(**batch, num_items_in_batch=num_items).loss


def record_block_end(run: FinetuningRun, prepared: PreparedData, trainer: BlockTrainer, end: Checkpoint) -> None:
    """Record the test loss where the block ended. The checkpoint is committed already, so nothing here can shift it."""
    from training.evaluation import held_out_loss
    from training.models import precision

    scores: dict[str, float] = {}
    if prepared.splits.get("test"):
        result = held_out_loss(
            trainer.model,
            build_data(run, "test"),
            compute_loss,
            batch_size=run.evaluation.batch_size or run.training.batch_size,
            precision=precision(run.model),
            ranks=trainer.ranks,
        )
        scores = {"eval_loss": result.loss, "eval_perplexity": result.perplexity}
    if trainer.ranks.is_main:
        block = trainer.horizon.block_of(end.step - 1)
        run.folder.record_event("block_end", step=end.step, epoch=end.epoch, block=block, **scores)


def export_folder(run: FinetuningRun) -> Path:
    return Path(run.model.checkpoint_dir).expanduser() if run.model.checkpoint_dir else run.folder.export


def export(run: FinetuningRun, end: Checkpoint) -> None:
    """Write the trained model where `from_pretrained` can read it."""
    from training.models import export_model, load_tokenizer, precision

    export_model(
        build_model(run, end),
        load_tokenizer(run.model),
        export_folder(run),
        step=end.step,
        dtype=precision(run.model),
        merge_adapter=run.model.merge_adapter,
    )
    run.folder.record_event("exported", step=end.step, path=str(export_folder(run)))


def evaluate(run: FinetuningRun) -> dict[str, Any]:
    """Score the newest valid checkpoint and write evaluation.json: test loss, and answers where the module scores."""
    from mixture.dataset_modules import score_function
    from training.evaluation import as_json, generation_score, held_out_loss
    from training.models import load_tokenizer, precision

    ranks = Ranks.of_environment()
    prepared = open_prepared(run)
    join_ranks(run.folder.path, ranks)
    checkpoint, _ = from_main(newest_valid(run.folder.checkpoints))
    if checkpoint is None:
        raise NoValidCheckpointError(f"{run.folder.checkpoints} holds no checkpoint to evaluate")
    model = build_model(run, checkpoint).to(device_of(ranks))
    batch_size = run.evaluation.batch_size or run.training.batch_size
    loss = None
    if prepared.splits.get("test"):
        loss = held_out_loss(
            model,
            build_data(run, "test"),
            compute_loss,
            batch_size=batch_size,
            precision=precision(run.model),
            ranks=ranks,
        )
    generated = None
    # Preparation keeps the questions of the test split where the module scores answers and its rows hold questions.
    questions_file = prepared.folder / "test_rows.jsonl"
    score = score_function(run.module) if run.module and run.evaluation.limit and questions_file.exists() else None
    if score:
        generated = generation_score(
            model.to(precision(run.model)),
            load_tokenizer(run.model),
            questions_file,
            score,
            config=run.evaluation,
            batch_size=batch_size,
            ranks=ranks,
        )
    result = as_json(loss, generated, step=checkpoint.step, epoch=checkpoint.epoch)
    if ranks.is_main:
        write_whole(run.folder.evaluation, orjson.dumps(result, option=orjson.OPT_INDENT_2), synced=True)
        run.folder.record_event("evaluated", **{key: value for key, value in result.items() if key != "examples"})
    return result


def device_of(ranks: Ranks) -> torch.device:
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
