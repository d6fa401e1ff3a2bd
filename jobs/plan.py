"""What the chain will do, before it does it: blocks, steps, learning rates, tokens, GPU-hours, disk."""

from __future__ import annotations

from dataclasses import dataclass

from drafting.config import count_draft_parameters
from jobs.capture_plan import PlannedCapture, plan_capture
from jobs.capturing import folder_of_cache, has_capture, key_of_cache
from jobs.config import RunConfig
from jobs.distillation_checks import model_shape
from jobs.draft_plan import PlannedDraft, plan_draft
from jobs.preflight import CheckedRun, visible_gpus
from mixture.prepare import PreparedData, SplitStats, data_key, prepared_folder
from training.schedule import Horizon, chain_learning_rate


@dataclass(frozen=True, kw_only=True)
class PlannedBlock:
    """One block of the chain."""

    number: int
    epochs: tuple[int, int]
    """First and last epoch, counted from 1."""

    steps: tuple[int, int] | None
    """Optimizer steps done before and after it; None until the data is prepared."""

    learning_rates: tuple[float, float] | None
    """Learning rate of its first and last step."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole chain."""

    data_key: str
    prepared: PreparedData | None
    horizon: Horizon | None
    blocks: list[PlannedBlock]
    rows_per_step: int
    train_tokens: int | None
    """Tokens seen over all epochs."""

    max_gpu_hours: float | None
    """If every block uses its whole time limit; None without GPUs or limit."""

    num_parameters: int | None
    checkpoint_bytes: int | None
    """Disk for the checkpoints that are kept, plus one being written; None where the model's size is unknown."""

    capture: PlannedCapture | None
    """The teacher's cache; None where the chain makes none."""

    draft: PlannedDraft | None
    """What a draft head takes; None where another trainer runs."""


def plan_run(run: CheckedRun) -> Plan:
    """The plan for a checked run; sizes that depend on the data are None until it is prepared."""
    training = run.config.training
    key = data_key(run.preparation)
    prepared = PreparedData.open(prepared_folder(run.config.data_folder, key))
    train = prepared.splits["train"] if prepared else None
    horizon = Horizon.of(training, num_rows=train.packs, world_size=run.world_size) if train else None
    parameters = trained_parameters(run.config)
    slurm = run.config.slurm
    max_gpu_hours = None
    if run.cluster == "slurm" and slurm.gpus_per_node and slurm.time_limit_minutes:
        max_gpu_hours = training.num_jobs * slurm.nodes * slurm.gpus_per_node * slurm.time_limit_minutes / 60
    return Plan(
        data_key=key,
        prepared=prepared,
        horizon=horizon,
        blocks=[plan_block(run, horizon, number) for number in range(1, training.num_jobs + 1)],
        rows_per_step=training.batch_size * training.gradient_accumulation * run.world_size,
        train_tokens=train.tokens * horizon.epochs if train and horizon else None,
        max_gpu_hours=max_gpu_hours,
        num_parameters=parameters,
        checkpoint_bytes=checkpoint_bytes(run, parameters),
        capture=plan_of_cache(run.config, key, train),
        draft=plan_draft(
            run.config,
            prepared,
            target_parameters=count_parameters(run.config.model.name),
            world_size=run.world_size,
            device_type="cuda" if trains_on_gpus(run) else "cpu",
        ),
    )


def trains_on_gpus(run: CheckedRun) -> bool:
    return bool(run.config.slurm.gpus_per_node) if run.cluster == "slurm" else visible_gpus() > 0


def plan_of_cache(config: RunConfig, data_key: str, train: SplitStats | None) -> PlannedCapture | None:
    """What the teacher's cache of a run costs; None where the chain makes none."""
    distillation = config.distillation
    if distillation is None or not has_capture(config):
        return None
    folder = folder_of_cache(config, key_of_cache(config, data_key))
    assert folder is not None
    return plan_capture(
        folder,
        distillation.cache,
        tokens=train.tokens if train else None,
        positions=train.loss_tokens if train else None,
        epochs=config.training.num_jobs * config.training.epochs_per_job,
        teacher_parameters=count_parameters(distillation.teacher_model.name),
    )


def plan_block(run: CheckedRun, horizon: Horizon | None, number: int) -> PlannedBlock:
    training = run.config.training
    epochs = ((number - 1) * training.epochs_per_job + 1, number * training.epochs_per_job)
    if horizon is None:
        return PlannedBlock(number=number, epochs=epochs, steps=None, learning_rates=None)
    first, last = (number - 1) * horizon.block_steps, number * horizon.block_steps

    def rate(step: int) -> float:
        return chain_learning_rate(step, peak=training.lr, training=training, horizon=horizon)

    return PlannedBlock(number=number, epochs=epochs, steps=(first, last), learning_rates=(rate(first), rate(last - 1)))


def trained_parameters(config: RunConfig) -> int | None:
    """Parameters of what is trained, the base of an adapter included; None where config.json does not tell."""
    if config.eagle3 is None:
        return count_parameters(config.model.name)
    shape = model_shape(config.model.name)
    return count_draft_parameters(shape, draft_vocabulary=config.eagle3.draft_vocabulary) if shape else None


def count_parameters(model: str) -> int | None:
    """Parameters of a dense Llama-like model, from its config.json; None where that does not tell.

    Embeddings, attention with grouped keys and values, a gated feed-forward part, and norms.
    """
    shape = model_shape(model)
    try:
        hidden, layers, vocabulary = shape["hidden_size"], shape["num_hidden_layers"], shape["vocab_size"]
        heads, inner = shape["num_attention_heads"], shape["intermediate_size"]
    except KeyError:
        return None
    if "num_experts" in shape or "num_local_experts" in shape:
        return None
    head_size = shape.get("head_dim") or hidden // heads
    key_value_heads = shape.get("num_key_value_heads") or heads
    attention = hidden * head_size * (2 * heads + 2 * key_value_heads)
    embeddings = vocabulary * hidden * (1 if shape.get("tie_word_embeddings") else 2)
    return embeddings + layers * (attention + 3 * hidden * inner + 2 * hidden) + hidden


def checkpoint_bytes(run: CheckedRun, num_parameters: int | None) -> int | None:
    """Disk for all kept checkpoints of full training: fp32 weights and two AdamW moments, 12 bytes a parameter."""
    if num_parameters is None or run.config.model.peft:
        return None
    return 12 * num_parameters * (run.config.training.keep_checkpoints + 1)
