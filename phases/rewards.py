"""Rewards: the model answers prompts itself and learns from what its answers are worth (grpo, rloo)."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from phases.preferences import build_judging_model, build_reference, objective_in_words
from phases.texts import build_tokenizer
from training.block import (
    BlockStart,
    build_data,
    device_of_process,
    export_trained,
    make_trainer,
    open_prepared,
    placed_to_ask,
    scores_of_texts,
)
from training.checkpoints import Checkpoint
from training.distributed import Ranks
from training.run import FinetuningRun
from training.vllm_config import VllmConfig, shaping_settings

if TYPE_CHECKING:
    import torch

    from answering.vllm_engine import VllmEngine
    from rewarding.online import OnlineLoss
    from rewarding.rewards import Rewards
    from rewarding.rollouts import Writer
    from training.online_config import OnlineConfig
    from training.trainer import BlockTrainer


def build_trainer(run: FinetuningRun, start: BlockStart) -> BlockTrainer:
    from rewarding.iterations import FurtherIterations
    from rewarding.rollouts import PromptCollate

    model = build_model(run, start.checkpoint)
    writer = build_writer(run, model, start.ranks, build_engine(run))
    loss = build_loss(run, writer, step=start.checkpoint.step if start.checkpoint else 0)
    trainer = make_trainer(
        run,
        start,
        model=model,
        rows=build_data(run, "train"),
        compute_loss=loss,
        objective=objective(run),
        collate=PromptCollate(),
        extra_metrics=loss,
        begin_step=loss.begin_step,
    )
    trainer.add_callback(FurtherIterations(trainer, loss))
    return trainer


def settings_of(run: FinetuningRun) -> OnlineConfig:
    assert run.finetuning.online is not None
    return run.finetuning.online


def objective(run: FinetuningRun) -> str:
    """All that shapes the loss, in words: a checkpoint is resumed under these settings only."""
    settings = settings_of(run)
    shaping = {name: value for name, value in asdict(settings).items() if name not in ("engine", "vllm")}
    shaping |= shaping_settings(settings.engine, settings.vllm)
    return objective_in_words(run, {**shaping, "max_length": run.dataset.max_length})


def build_model(run: FinetuningRun, start: Checkpoint | None) -> torch.nn.Module:
    """The model as the chain left it, or as it begins. Its forward pass returns what it says of the answers."""
    return build_judging_model(run, start, temperature=settings_of(run).temperature)


def build_loss(run: FinetuningRun, writer: Writer, *, step: int) -> OnlineLoss:
    """`compute_loss`, after `step` optimizer steps of the chain: what answers and what rewards."""
    from mixture.prompts import PromptRows
    from rewarding.online import OnlineLoss

    config = settings_of(run)
    return OnlineLoss(
        config,
        writer,
        build_rewards(run),
        PromptRows(run.prepared, "train"),
        build_reference(run, writer.network, temperature=config.temperature) if config.has_reference else None,
        step,
    )


def build_rewards(run: FinetuningRun) -> Rewards:
    """What says what answers are worth."""
    from rewarding import rewards

    unprotected = run.evaluation.unprotected_code
    return rewards.build_rewards(settings_of(run), run.module, device_of_process(), unprotected=unprotected)


def build_engine(run: FinetuningRun) -> VllmEngine | None:
    """What writes in the model's place, beside it on the device of this process; None where it writes itself."""
    settings = settings_of(run)
    if settings.engine == "transformers":
        return None
    from answering.vllm_engine import VllmEngine
    from training.models import precision

    return VllmEngine(
        settings.vllm or VllmConfig(),
        key=f"finetuning.{settings.section}.vllm",
        dtype=precision(run.model),
        max_length=run.dataset.max_length,
        device=device_of_process(),
        trust_remote_code=run.model.trust_remote_code,
    )


def build_writer(run: FinetuningRun, model: Any, ranks: Ranks, engine: VllmEngine | None) -> Writer:
    """The model as it answers prompts."""
    from rewarding.rollouts import Writer
    from training.models import precision, stop_token_ids

    tokenizer = build_tokenizer(run)
    return Writer(
        network=model,
        tokenizer=tokenizer,
        stops=stop_token_ids(model, tokenizer),
        precision=precision(run.model),
        config=settings_of(run),
        max_length=run.dataset.max_length,
        seed=run.seed,
        ranks=ranks,
        engine=engine,
    )


# --- scores


def block_scores(run: FinetuningRun, trainer: BlockTrainer) -> dict[str, float]:
    """Mean reward on the test split."""
    if not has_held_out_prompts(run):
        return {}
    loss: Any = trainer.loss
    by_source, _ = held_out_rewards(run, loss.writer, loss.rewards, trainer.ranks)
    return {"eval_reward": by_source["all"]["reward"]}


def scores(run: FinetuningRun, checkpoint: Checkpoint, ranks: Ranks) -> dict[str, Any]:
    """Mean rewards before and after, by source in `models`, and answers where the module scores."""
    found: dict[str, Any] = {}
    model = placed_to_ask(run, build_model(run, checkpoint))
    if has_held_out_prompts(run):
        rewards, engine = build_rewards(run), build_engine(run)
        first = build_writer(run, placed_to_ask(run, build_model(run, None)), ranks, engine)
        before, _ = held_out_rewards(run, first, rewards, ranks)
        del first  # two models at once are enough
        after, examples = held_out_rewards(run, build_writer(run, model, ranks, engine), rewards, ranks)
        models = {run.finetuning.objective: after, "before": before}
        found = {**after["all"], "reward_before": before["all"]["reward"], "examples": examples, "models": models}
    # Last, as it turns the weights into the precision that answers are written in.
    return {**scores_of_texts(run, model, build_tokenizer(run), checkpoint, ranks), **found}


def has_held_out_prompts(run: FinetuningRun) -> bool:
    """Whether there are prompts to tell the mean reward on, and it is wanted."""
    return bool(run.evaluation.limit and open_prepared(run).splits.get("test"))


def held_out_rewards(
    run: FinetuningRun, writer: Writer, rewards: Rewards, ranks: Ranks
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Mean rewards on the test split, of all and by source, and the first few answers."""
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


def export(run: FinetuningRun, end: Checkpoint) -> None:
    export_trained(run, build_model(run, end), build_tokenizer(run), end)
