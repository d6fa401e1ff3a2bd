"""One block of a chain, whatever is trained in it: resume, train to the next boundary, record its scores, export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from mixture.prepare import PreparedData
from mixture.whole_files import write_whole
from training.adapter_options import EXPERTS
from training.checkpoints import (
    Checkpoint,
    NoValidCheckpointError,
    ResumeTerms,
    Split,
    newest_valid,
    refuse_changed_terms,
)
from training.distributed import Ranks, failing_together, from_main, join_ranks
from training.export import is_exported, require_own_folder
from training.run import BlockResult, TrainerRun
from training.schedule import Horizon, first_horizon_steps, terms_before_extensions
from training.stopping import StopPoll

# torch and transformers take seconds to import, and a block with nothing left to do should not wait for them.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from training.batches import Collate, ComputeLoss, PackedDataset
    from training.evaluation import GenerationScore, HeldOutLoss
    from training.trainer import BeginStep, BlockTrainer, ExtraMetrics


@dataclass(frozen=True, kw_only=True)
class BlockStart:
    """Where a block begins, before any model is built."""

    prepared: PreparedData
    horizon: Horizon
    ranks: Ranks
    checkpoint: Checkpoint | None


def train_block(
    run: TrainerRun,
    *,
    build_trainer: Callable[[BlockStart], BlockTrainer],
    score_block: Callable[[BlockTrainer], dict[str, float]],
    export: Callable[[Checkpoint], None],
) -> BlockResult:
    """Train one block: from the newest valid checkpoint to the next boundary. Nothing left to do: returns at once.

    `score_block` is asked on all processes once the block's checkpoint is committed, `export` on the first one after
    the last block.
    """
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
        split = Split.of(run.training, world_size=ranks.world_size)
        changed = {"split_before": str(start.terms.split), "split": str(split)} if split != start.terms.split else {}
        run.folder.record_event("resumed", step=start.step, path=start.path.name, rejected=rejected, **changed)
    end = start
    if not start or start.step < horizon.total_steps:
        trainer = build_trainer(BlockStart(prepared=prepared, horizon=horizon, ranks=ranks, checkpoint=start))
        with run.stopping.deferred():
            end = trainer.train_block()
        if not end or end.step < trainer.schedule.block_end:
            return BlockResult(
                step=end.step if end else 0, horizon_steps=horizon.total_steps, finished=False, stopped=True
            )
        record_block_end(run, trainer, end, score_block(trainer))
    assert end is not None
    if end.step >= horizon.total_steps:
        # All wait: srun ends the step soon after its first process has left.
        with failing_together():
            if ranks.is_main:
                export(end)
                run.folder.record_event("exported", step=end.step, path=str(export_folder(run)))
    return BlockResult(step=end.step, horizon_steps=horizon.total_steps, finished=end.step >= horizon.total_steps)


def open_prepared(run: TrainerRun) -> PreparedData:
    """The run's data; ValueError where it was never prepared."""
    prepared = PreparedData.open(run.prepared)
    if prepared is None:
        raise ValueError(f"{run.prepared} holds no prepared data; the first job of the chain prepares it")
    return prepared


def num_train_rows(prepared: PreparedData) -> int:
    train = prepared.splits["train"]
    assert train is not None, "preparation fails where the train split has no rows"
    return train.packs


def make_trainer(
    run: TrainerRun,
    start: BlockStart,
    *,
    model: torch.nn.Module,
    rows: PackedDataset,
    compute_loss: ComputeLoss,
    objective: str,
    collate: Collate | None = None,
    extra_metrics: ExtraMetrics | None = None,
    begin_step: BeginStep | None = None,
    tied_to_split: str | None = None,
) -> BlockTrainer:
    """The trainer of a block. A checkpoint of another data, objective or schedule is refused.

    `objective` names all that shapes the loss; `extra_metrics` are logged beside it; `begin_step` counts what the
    loss is divided by, where that is not the supervised tokens; `tied_to_split` says what in the loss depends on the
    micro-batches that a step is split into, where anything does.
    """
    from training.adapters import adapter_steps
    from training.batches import collate as plain_collate
    from training.models import precision
    from training.trainer import BlockTrainer, training_arguments

    terms = resume_terms(run, start, model, objective)
    if run.model.peft and run.model.peft_method == EXPERTS:
        tied_to_split = f"model.peft_method: {EXPERTS} balances its experts over each micro-batch"
    return BlockTrainer(
        model,
        rows,
        compute_loss,
        collate=collate or plain_collate,
        extra_metrics=extra_metrics,
        begin_step=begin_step,
        has_adapter=run.model.peft,
        adapter=adapter_steps(
            model,
            run.model,
            horizon=start.horizon,
            first_horizon_steps=first_horizon_steps(start.horizon, run.training),
        ),
        precision=precision(run.model),
        config=run.training,
        arguments=training_arguments(
            run.training, folder=run.folder, horizon=start.horizon, seed=run.seed, precision=precision(run.model)
        ),
        horizon=start.horizon,
        terms=terms,
        tied_to_split=tied_to_split,
        folder=run.folder,
        ranks=start.ranks,
        start=start.checkpoint,
        owner=run.owner,
        stop_requested=StopPoll(run.stopping, run.folder.stop).is_requested,
    )


def resume_terms(run: TrainerRun, start: BlockStart, model: torch.nn.Module, objective: str) -> ResumeTerms:
    """What the next block must share with this one; ValueError where this one does not share it with the one before."""
    from training.models import parameters_hash

    terms = ResumeTerms(
        fingerprint=start.prepared.fingerprint,
        objective=objective,
        parameters=parameters_hash(model, run.model),
        **asdict(Split.of(run.training, world_size=start.ranks.world_size)),
        parallelism=run.training.parallelism,
        horizon_steps=start.horizon.total_steps,
        optimization=run.training.optimization,
    )
    if start.checkpoint:
        earlier = terms_before_extensions(terms, run.training, start.horizon, step=start.checkpoint.step)
        refuse_changed_terms(start.checkpoint, terms, before_extensions=earlier)
    return terms


def build_data(run: TrainerRun, split: str) -> PackedDataset:
    """The packs of a split, memory-mapped."""
    from mixture.image_rows import ImageRows
    from mixture.shards import TokenRows, read_packs
    from training.batches import PackedDataset

    rows = ImageRows if open_prepared(run).has_images else TokenRows
    return PackedDataset(rows.open(run.prepared, split), read_packs(run.prepared, split))


def record_block_end(run: TrainerRun, trainer: BlockTrainer, end: Checkpoint, scores: dict[str, float]) -> None:
    """Record where the block ended. The checkpoint is committed already, so nothing here can shift it."""
    if trainer.ranks.is_main:
        block = trainer.horizon.block_of(end.step - 1)
        run.folder.record_event("block_end", step=end.step, epoch=end.epoch, block=block, **scores)


def held_out_scores(
    run: TrainerRun, trainer: BlockTrainer, compute_loss: ComputeLoss, collate: Collate | None = None
) -> dict[str, float]:
    """The loss on the test split, where there is one."""
    result = loss_on_test_split(run, trainer.model, compute_loss, trainer.ranks, collate)
    return {"eval_loss": result.loss, "eval_perplexity": result.perplexity} if result else {}


def loss_on_test_split(
    run: TrainerRun, model: Any, compute_loss: ComputeLoss, ranks: Ranks, collate: Collate | None = None
) -> HeldOutLoss | None:
    """The loss on the test split; None where there is none."""
    from training.batches import collate as plain_collate
    from training.evaluation import held_out_loss
    from training.models import precision

    if not open_prepared(run).splits.get("test"):
        return None
    return held_out_loss(
        model,
        build_data(run, "test"),
        compute_loss,
        batch_size=run.evaluation.batch_size or run.training.batch_size,
        precision=precision(run.model),
        ranks=ranks,
        collate=collate or plain_collate,
    )


def export_folder(run: TrainerRun) -> Path:
    """Where the trained model goes."""
    return Path(run.model.checkpoint_dir).expanduser() if run.model.checkpoint_dir else run.folder.export


def export_trained(
    run: TrainerRun, model: Any, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, end: Checkpoint
) -> None:
    """Write the trained model, and the tokenizer or processor that it was trained with, as `from_pretrained` reads."""
    from training.models import export_model

    export_model(model, tokenizer, export_folder(run), step=end.step, config=run.model)


def scores_on_test_split(
    run: TrainerRun,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    compute_loss: ComputeLoss,
    checkpoint: Checkpoint,
    ranks: Ranks,
) -> dict[str, Any]:
    """What evaluation.json holds of any model: test loss, and answers where the dataset module scores them."""
    loss = loss_on_test_split(run, model, compute_loss, ranks)
    return scores_of_texts(run, model, tokenizer, checkpoint, ranks, loss=loss)


def scores_of_texts(
    run: TrainerRun,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint,
    ranks: Ranks,
    *,
    loss: HeldOutLoss | None = None,
) -> dict[str, Any]:
    """What evaluation.json holds of any model that writes: answers where the dataset module scores them, and tasks of
    lm-evaluation-harness where any are asked for. Turns the weights into the precision that answers are written in."""
    from training.evaluation import as_json

    generated = scored_answers(run, model, tokenizer, ranks)
    scores = as_json(loss, generated, step=checkpoint.step, epoch=checkpoint.epoch)
    return {**scores, **harness_scores(run, model, tokenizer, ranks)}


def scored_answers(
    run: TrainerRun, model: Any, tokenizer: PreTrainedTokenizerBase, ranks: Ranks
) -> GenerationScore | None:
    """Answers to the questions of the test split, scored by the dataset module; None where it scores none.

    Turns the weights into the precision that answers are written in.
    """
    from mixture.dataset_modules import module_score
    from training.evaluation import generation_score
    from training.models import precision
    from training.sharding import convert

    # Preparation keeps the questions of the test split where the module scores answers and its rows hold questions.
    questions_file = open_prepared(run).folder / "test_rows.jsonl"
    has_questions = run.evaluation.limit and questions_file.exists()
    if run.module is None or not has_questions:
        return None
    score = module_score(run.module, unprotected=run.evaluation.unprotected_code)
    if score is None:
        return None
    return generation_score(
        convert(model, precision(run.model)),
        tokenizer,
        questions_file,
        score,
        config=run.evaluation,
        batch_size=run.evaluation.batch_size or run.training.batch_size,
        ranks=ranks,
    )


def harness_scores(
    run: TrainerRun, model: Any, tokenizer: PreTrainedTokenizerBase, ranks: Ranks
) -> dict[str, dict[str, dict[str, float]]]:
    """The scores on tasks of lm-evaluation-harness as `lm_eval`, where any are asked for.

    Turns the weights into the precision that the tasks are answered in.
    """
    config = run.evaluation.lm_eval
    if config is None:
        return {}
    from training.harness import task_scores
    from training.models import precision
    from training.sharding import convert

    batch_size = config.batch_size or run.evaluation.batch_size or run.training.batch_size
    model = convert(model, precision(run.model)).eval()
    return {"lm_eval": task_scores(model, tokenizer, config, batch_size=batch_size, ranks=ranks)}


def checkpoint_to_evaluate(run: TrainerRun, ranks: Ranks) -> Checkpoint:
    """The newest valid checkpoint, the same on all processes, which have met by then."""
    join_ranks(run.folder.path, ranks)
    checkpoint, _ = from_main(newest_valid(run.folder.checkpoints))
    if checkpoint is None:
        raise NoValidCheckpointError(f"{run.folder.checkpoints} holds no checkpoint to evaluate")
    return checkpoint


def record_evaluation(run: TrainerRun, result: dict[str, Any], ranks: Ranks) -> None:
    """Write evaluation.json, and the scores into the run's events."""
    if ranks.is_main:
        write_whole(run.folder.evaluation, orjson.dumps(result, option=orjson.OPT_INDENT_2), synced=True)
        run.folder.record_event("evaluated", **{key: value for key, value in result.items() if key != "examples"})


def placed_to_ask(run: TrainerRun, model: torch.nn.Module) -> Any:
    """A model that is asked and not trained, from the CPU to the device of this process; with `training.parallelism:
    fsdp` in shards to those of all."""
    from training.frozen_shards import place_to_ask

    return place_to_ask(model, run.training, device_of_process())


def device_of_process() -> torch.device:
    """The device of this process."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
