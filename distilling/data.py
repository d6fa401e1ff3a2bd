"""The student's batches: packs of samples, with what the teacher said about each and how much each counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import torch

from distilling.config import DistillationConfig
from distilling.targets import RowTargets, SparseTargets
from mixture.prepare import PreparedData
from mixture.shards import TokenRow
from training.batches import Batch, PackedDataset, collate

if TYPE_CHECKING:
    from distilling.cache import TeacherCache

TARGETS = "teacher"
TOKEN_WEIGHTS = "token_weights"


@dataclass(frozen=True, slots=True)
class TaughtRow:
    """One tokenised sample and what the teacher's cache holds of it."""

    row: TokenRow
    targets: RowTargets


NO_TARGETS = RowTargets(
    np.empty((0, 1), np.int32), np.empty((0, 1), np.float32), np.empty((0, 1), np.float32), np.empty(0, np.float32)
)
"""What an empty batch learns, so that every process does the same."""


class TaughtPacks(PackedDataset):
    """The packs of a split, each sample with its targets."""

    def __init__(self, packs: PackedDataset, cache: TeacherCache, config: DistillationConfig, vocabulary: int):
        super().__init__(packs.rows, packs.packs)
        self.cache = cache
        self.vocabulary = vocabulary
        self.temperature = config.temperature
        self.tail = config.tail

    def __getitem__(self, index: int) -> list[Any]:
        return [TaughtRow(row, self.targets(row)) for row in super().__getitem__(index)]

    def targets(self, row: TokenRow) -> RowTargets:
        """What the student learns of a row, in the tokens that both have."""
        found = self.cache.targets(row, temperature=self.temperature, tail=self.tail)
        return found if self.cache.manifest.vocabulary <= self.vocabulary else found.below(self.vocabulary)


@dataclass(frozen=True)
class DistillationCollate:
    """Packs to their batch; picklable, since it may run in the data loader's processes."""

    source_weights: Mapping[str, float]
    """Weight of the tokens of a source where it is not 1."""

    has_targets: bool
    """Whether samples come with targets from a cache."""

    def __call__(self, packs: Sequence[list[Any]]) -> Batch:
        """The batch, with the teacher's targets in `teacher` and the weights of its supervised tokens, [N]."""
        samples = [sample for pack in packs for sample in pack]
        rows = [sample.row if isinstance(sample, TaughtRow) else sample for sample in samples]
        batch = collate([rows] if rows else [])
        if self.has_targets:
            batch[TARGETS] = SparseTargets.joined([sample.targets for sample in samples] or [NO_TARGETS])
        if self.source_weights:
            weights = [
                np.full(int(row.loss_mask[1:].sum()), self.source_weights.get(row.source, 1.0), dtype=np.float32)
                for row in rows
            ]
            batch[TOKEN_WEIGHTS] = torch.from_numpy(np.concatenate([np.empty(0, np.float32), *weights]))
        return batch


def source_categories(prepared: Path) -> dict[str, str]:
    """The category of each source; for data that is no mixture, the source itself."""
    data = PreparedData.open(prepared)
    assert data is not None
    sources = {source for split in data.splits.values() if split for source in split.sources}
    mixture = orjson.loads((prepared / "stats.json").read_bytes())["mixture"]
    summary = Path(mixture) / "download_summary.json" if mixture else None
    if summary is None or not summary.is_file():
        return {source: source for source in sources}
    categories = orjson.loads(summary.read_bytes())["categories"]
    found = {source: name for name, category in categories.items() for source in category["datasets"]}
    return {source: found.get(source, source) for source in sources}


def source_weights(weights: Mapping[str, float], categories: Mapping[str, str]) -> dict[str, float]:
    """The weight of each source that has one, by its own name or by its category's; ValueError for unknown names."""
    unknown = set(weights) - set(categories) - set(categories.values())
    if unknown:
        known = sorted({*categories, *categories.values()})
        raise ValueError(
            f"distillation.category_weights: the data has nothing named {', '.join(sorted(unknown))}; it has "
            f"{', '.join(known)}"
        )
    return {
        source: weights.get(source, weights.get(category, 1.0))
        for source, category in categories.items()
        if source in weights or category in weights
    }
