"""What training a draft head takes, before anything is queued: memory of a device, disk, and what is supervised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Group, RenderableType
from rich.text import Text

from drafting.memory import DraftMemory, draft_memory
from drafting.vocabulary import FIRST_GUESS
from jobs.capture_plan import gigabytes
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


def plan_draft(
    config: RunConfig,
    prepared: PreparedData | None,
    *,
    target_parameters: int | None,
    device_type: Literal["cuda", "cpu"],
) -> PlannedDraft | None:
    """What the draft of a run takes; None where the run trains none."""
    eagle3 = config.eagle3
    if eagle3 is None:
        return None
    tokens = config.training.batch_size * config.dataset.max_length

    def memory(recomputes_steps: bool) -> DraftMemory | None:
        if target_parameters is None:
            return None
        return draft_memory(
            model_shape(config.model.name),
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
        data_bytes=folder_bytes(prepared.folder) if prepared else None,
    )


def number_bytes(config: RunConfig, device_type: Literal["cuda", "cpu"]) -> int:
    """Of a number in the forward pass, as far as it can be told here: `auto` is bfloat16 on a GPU."""
    is_wide = config.model.dtype == "float32" or (config.model.dtype == "auto" and device_type == "cpu")
    return 4 if is_wide else 2


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


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
