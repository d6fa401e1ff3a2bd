"""What training a draft head takes, before anything is queued: memory of a device, disk, and what is supervised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.text import Text

from drafting.config import FEATURES_FOLDER, NUM_FEATURES, Eagle3Config, embedding_parameters
from drafting.memory import DraftMemory, draft_memory
from drafting.vocabulary import FIRST_GUESS
from jobs.capture_plan import free_bytes, gigabytes
from jobs.config import RunConfig
from jobs.distillation_checks import file_at_hand, model_shape
from mixture.prepare import PreparedData
from mixture.shards import TokenRow, TokenRows

ROWS_SHOWN = 2
TOKENS_SHOWN = 1000


@dataclass(frozen=True, kw_only=True)
class PlannedDraft:
    """What a draft takes of each device and of the disk, beside its checkpoints."""

    steps: int
    tokens: int
    """Of a full micro-batch."""

    memory: DraftMemory | None
    """None where the target's config.json is not at hand."""

    memory_recomputed: DraftMemory | None
    """With training.gradient_checkpointing."""

    data_bytes: int | None
    """Of the prepared data; None until there is some."""

    features: PlannedFeatures | None
    """The target's cached features; None where a live target gives them, or its config.json is not at hand."""


@dataclass(frozen=True, kw_only=True)
class PlannedFeatures:
    """The target's hidden states of all data, as they lie on the disk."""

    token_bytes: int
    missing_bytes: int | None
    """Still to be written; None until the data is prepared, and where features of some target lie there already."""

    free_bytes: int

    @property
    def fit(self) -> bool:
        return self.missing_bytes is None or self.missing_bytes <= self.free_bytes


def plan_draft(
    config: RunConfig,
    prepared: PreparedData | None,
    *,
    target_parameters: int | None,
    world_size: int,
    device_type: Literal["cuda", "cpu"],
) -> PlannedDraft | None:
    """What the draft of a run takes on each of its `world_size` devices; None where the run trains none."""
    eagle3 = config.eagle3
    if eagle3 is None:
        return None
    tokens = config.training.batch_size * config.dataset.max_length
    shape = model_shape(config.model.name)
    if target_parameters is not None:
        target_parameters = parameters_on_device(shape, target_parameters, eagle3, world_size=world_size)

    def memory(recomputes_steps: bool) -> DraftMemory | None:
        if target_parameters is None:
            return None
        return draft_memory(
            shape,
            target_parameters=target_parameters,
            draft_vocabulary=eagle3.draft_vocabulary,
            steps=eagle3.steps,
            tokens=tokens,
            number_bytes=number_bytes(config, device_type),
            recomputes_steps=recomputes_steps,
            device_type=device_type,
        )

    return PlannedDraft(
        steps=eagle3.steps,
        tokens=tokens,
        memory=memory(config.training.gradient_checkpointing),
        memory_recomputed=memory(True),
        data_bytes=data_bytes(prepared.folder) if prepared else None,
        features=plan_features(config, shape, prepared, number_bytes(config, device_type)),
    )


def parameters_on_device(
    shape: Mapping[str, Any], target_parameters: int, eagle3: Eagle3Config, *, world_size: int
) -> int:
    """Parameters of the target that a device holds while a draft is trained."""
    on_all = embedding_parameters(shape)
    in_layers = target_parameters - on_all
    if eagle3.features == "cached":
        return on_all
    if not eagle3.shard_target or world_size == 1:
        return target_parameters
    # Beside its share the layer that computes, and the next one, which is gathered meanwhile.
    return on_all + in_layers // world_size + 2 * in_layers // shape["num_hidden_layers"]


def number_bytes(config: RunConfig, device_type: Literal["cuda", "cpu"]) -> int:
    """Of a number in the forward pass, as far as it can be told here: `auto` is bfloat16 on a GPU."""
    is_wide = config.model.dtype == "float32" or (config.model.dtype == "auto" and device_type == "cpu")
    return 4 if is_wide else 2


def data_bytes(prepared: Path) -> int:
    """Disk of prepared data, without the features that lie beside them."""
    files = [file for file in prepared.rglob("*") if file.is_file() and FEATURES_FOLDER not in file.parts]
    return sum(file.stat().st_size for file in files)


def plan_features(
    config: RunConfig, shape: Mapping[str, Any], prepared: PreparedData | None, bytes_of_number: int
) -> PlannedFeatures | None:
    """What cached features take of the disk."""
    assert config.eagle3 is not None
    if config.eagle3.features == "live" or not shape:
        return None
    token_bytes = (NUM_FEATURES + 1) * shape["hidden_size"] * bytes_of_number
    missing = None
    if prepared is not None:
        has_some = (prepared.folder / FEATURES_FOLDER).is_dir()
        tokens = sum(split.tokens for split in prepared.splits.values() if split)
        # Whether those that are there are of this target is known to the block, which reads its weights.
        missing = None if has_some else tokens * token_bytes
    return PlannedFeatures(token_bytes=token_bytes, missing_bytes=missing, free_bytes=free_bytes(config.data_folder))


def draft_lines(plan: PlannedDraft) -> list[str]:
    """The plan for people."""
    lines = []
    if plan.memory is None or plan.memory_recomputed is None:
        lines.append("memory: told once the target's config.json is at hand, in its folder or in the hub's cache")
    else:
        lines.append(
            f"memory of each device, at {plan.tokens:,} tokens and {plan.steps} steps: about "
            f"{gigabytes(plan.memory.total)} (target {gigabytes(plan.memory.target)}, draft with gradients and "
            f"optimizer {gigabytes(plan.memory.draft)}, activations {gigabytes(plan.memory.activations)}, logits "
            f"{gigabytes(plan.memory.logits)})"
        )
        if plan.memory_recomputed.total < plan.memory.total:
            lines.append(
                f"  {gigabytes(plan.memory_recomputed.total)} with training.gradient_checkpointing; fewer tokens "
                "(training.batch_size, dataset.max_length) take less too"
            )
    if plan.features is not None:
        size = "" if plan.features.missing_bytes is None else f": {gigabytes(plan.features.missing_bytes)}"
        lines.append(
            f"target's features on the disk, {plan.features.token_bytes:,} bytes a token{size}; "
            f"{gigabytes(plan.features.free_bytes)} are free there, as far as no quota says less"
        )
    if plan.data_bytes is not None:
        lines.append(f"prepared data: {gigabytes(plan.data_bytes)}")
    return lines


def supervised_preview(config: RunConfig, prepared: PreparedData | None) -> RenderableType:
    """The first rows of the prepared data: what the draft learns to guess is green, all else dimmed."""
    if prepared is None:
        return Text("what is supervised is shown here once the data is prepared: ./train.sh prepare FILE")
    tokenizer_file = file_at_hand(config.tokenizer.name, "tokenizer.json")
    if tokenizer_file is None:
        return Text(f"what is supervised is shown where {config.tokenizer.name} has its tokenizer.json at hand")
    from tokenizers import Tokenizer

    from mixture.inspection import decoded_segments, marked_text

    tokenizer = Tokenizer.from_file(str(tokenizer_file))

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    parts: list[RenderableType] = []
    rows = TokenRows.open(prepared.folder, "train")
    for number in range(min(ROWS_SHOWN, len(rows))):
        row = rows[number]
        guessed = guessed_part(row)
        share = guessed.loss_mask.mean()
        parts.append(Text(f"\ntrain row {number} of {row.source}: {len(row.input_ids)} tokens, {share:.0%} guessed"))
        parts.append(marked_text(decoded_segments(decode, first_tokens(guessed))))
    return Group(*parts)


def guessed_part(row: TokenRow) -> TokenRow:
    """The row with the tokens that a draft learns to guess as its loss mask."""
    mask = row.loss_mask.copy()
    mask[:FIRST_GUESS] = False
    return replace(row, loss_mask=mask)


def first_tokens(row: TokenRow) -> TokenRow:
    """As much of a row as a screen should show."""
    return replace(row, input_ids=row.input_ids[:TOKENS_SHOWN], loss_mask=row.loss_mask[:TOKENS_SHOWN])
