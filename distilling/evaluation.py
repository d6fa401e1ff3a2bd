"""Students beside their teacher on held-out data: divergence, agreement, perplexity and calibration, by category."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel

from distilling.student import sliced
from training.batches import PackedDataset, collate, even_shares
from training.chunks import tokens_per_chunk
from training.distributed import Ranks, gather_on_all
from training.evaluation import autocast, to_device
from training.frozen_shards import gathered_ends
from training.losses import logit_shape, output_head, shape_logits, supervised_places
from training.sharding import computing_device, network_of

# Tensors are named by shape. N tokens of a chunk, H hidden width, V vocabulary.

NUM_BINS = 15
ALL = "all"


@dataclass
class Sums:
    """Over the supervised tokens of one category, of one model."""

    tokens: int = 0
    cross_entropy: float = 0.0
    divergence: float = 0.0
    agreements: int = 0
    bins: np.ndarray = field(default_factory=lambda: np.zeros((NUM_BINS, 3)))
    """By confidence of the likeliest token: tokens, summed confidence, how many were right."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.tokens + other.tokens,
            self.cross_entropy + other.cross_entropy,
            self.divergence + other.divergence,
            self.agreements + other.agreements,
            self.bins + other.bins,
        )

    def scores(self, *, has_teacher: bool) -> dict[str, float]:
        """Means. `calibration_error` is the expected calibration error of the likeliest token (arXiv:1706.04599)."""
        loss = self.cross_entropy / self.tokens
        gaps = np.abs(self.bins[:, 1] - self.bins[:, 2]).sum()
        found = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf,
                 "calibration_error": float(gaps / self.tokens), "tokens": self.tokens}  # fmt: skip
        if has_teacher:
            found |= {"divergence": self.divergence / self.tokens, "agreement": self.agreements / self.tokens}
        return found


Scores = dict[str, dict[str, dict[str, float]]]
"""Model, then category, then what was measured; divergence is KL(teacher || model) at temperature 1, in nats."""


def compare(
    models: Mapping[str, PreTrainedModel],
    teacher: PreTrainedModel | None,
    rows: PackedDataset,
    *,
    vocabulary: int | None,
    categories: Mapping[str, str],
    batch_size: int,
    precision: torch.dtype,
    ranks: Ranks,
) -> Scores:
    """The scores of each model, and of the teacher, on all supervised tokens of `rows`; the same on every process.

    `vocabulary`: the tokens that all heads have; `categories`: the category of each source.
    """
    names = sorted(set(categories.values()))
    numbers = {source: names.index(category) for source, category in categories.items()}
    everyone = {**({"teacher": teacher} if teacher else {}), **models}
    sums = {name: [Sums() for _ in names] for name in everyone}
    device = computing_device(next(iter(models.values())))
    with torch.no_grad(), ExitStack() as stack:
        for network in everyone.values():
            network.eval()
            stack.enter_context(gathered_ends(network))
        for share in even_shares(len(rows), batch_size=batch_size, rank=ranks.rank, world_size=ranks.world_size):
            samples = [sample for index in share for sample in rows[index]]
            # Models in shards are asked by all processes equally often, so also where one has no samples.
            batch = to_device(collate([samples] if samples else []), device)
            groups = [numbers[row.source] for row in samples for _ in range(int(row.loss_mask[1:].sum()))]
            with autocast(device, precision):
                add_batch(sums, everyone, batch, torch.tensor(groups, dtype=torch.int64, device=device), vocabulary)
    shares = gather_on_all(sums)
    totals = {name: [sum_of([share[name][group] for share in shares]) for group in range(len(names))] for name in sums}
    return {
        name: {
            category: found.scores(has_teacher=teacher is not None)
            for category, found in {ALL: sum_of(by_group), **dict(zip(names, by_group, strict=True))}.items()
            if found.tokens
        }
        for name, by_group in totals.items()
    }


def sum_of(sums: list[Sums]) -> Sums:
    """All of them together."""
    return sum(sums, Sums())


def add_batch(
    sums: dict[str, list[Sums]],
    models: Mapping[str, Any],
    batch: dict[str, Any],
    groups_N: torch.Tensor,
    vocabulary: int | None,
) -> None:
    """Add the supervised tokens of a batch to the sums of each model; a teacher comes first."""
    places = supervised_places(batch["labels"])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden_states = {
        name: network_of(network).base_model(**inputs, use_cache=False)[0].flatten(0, 1).index_select(0, places.index)
        for name, network in models.items()
    }
    heads = {name: sliced(output_head(network), vocabulary) for name, network in models.items()}
    chunk_tokens = tokens_per_chunk(*next(iter(heads.values())).weight.shape, device_type=places.index.device.type)
    for first in range(0, len(places.index), chunk_tokens):
        chunk = slice(first, first + chunk_tokens)
        teacher_NV: torch.Tensor | None = None
        for name, network in models.items():
            head = heads[name]
            hidden_NH = hidden_states[name][chunk].to(head.weight.dtype)
            logits_NV = shape_logits(linear(hidden_NH, *head), logit_shape(network))
            log_q_NV = torch.log_softmax(logits_NV, dim=-1, dtype=torch.float32)
            if name == "teacher":
                teacher_NV = log_q_NV
            add_tokens(sums[name], log_q_NV, places.targets[chunk], groups_N[chunk], teacher_NV)


def add_tokens(
    sums: list[Sums],
    log_q_NV: torch.Tensor,
    targets_N: torch.Tensor,
    groups_N: torch.Tensor,
    teacher_NV: torch.Tensor | None,
) -> None:
    """Add tokens to the sums of their categories."""
    loss_N = -log_q_NV.gather(1, targets_N[:, None]).squeeze(1).double()
    confidence_N, likeliest_N = log_q_NV.max(-1)
    confidence_N = confidence_N.double().exp()
    right_N = (likeliest_N == targets_N).double()
    bins_N = (confidence_N * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    divergence_N, agrees_N = torch.zeros_like(loss_N), torch.zeros_like(loss_N)
    if teacher_NV is not None:
        divergence_N = (teacher_NV.exp() * (teacher_NV - log_q_NV)).sum(-1).double()
        agrees_N = (teacher_NV.argmax(-1) == likeliest_N).double()
    for group in groups_N.unique().tolist():
        mine = groups_N == group
        of_bins = torch.stack([torch.ones_like(confidence_N), confidence_N, right_N], dim=1)[mine]
        bins = torch.zeros(NUM_BINS, 3, dtype=torch.float64, device=bins_N.device).index_add_(0, bins_N[mine], of_bins)
        sums[group] += Sums(
            int(mine.sum()),
            float(loss_N[mine].sum()),
            float(divergence_N[mine].sum()),
            int(agrees_N[mine].sum()),
            bins.cpu().numpy(),
        )
