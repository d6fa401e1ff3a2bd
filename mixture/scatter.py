"""Pass 2 of a mixture: chosen rows read again, shuffled as a whole in bounded memory, written as JSONL parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixture.dedup import UniqueRows
from mixture.scan import Report


@dataclass(frozen=True, kw_only=True)
class ShortPromptsFirst:
    """A first stage of `share` of each source's rows, all with prompts under the `short_prompt_bytes` of dedup."""

    share: float


@dataclass(frozen=True, kw_only=True)
class WrittenPart:
    """One finished file of a mixture."""

    file: str
    """Relative to the output folder: `train-00000.jsonl`, or `math_reasoning/gsm8k.jsonl` by category."""
    split: str
    stage: int
    rows: dict[str, int]
    """By source."""
    bytes: int
    checksum: str
    """xxh3-128 of the file."""


@dataclass(frozen=True, kw_only=True)
class TextStats:
    """Characters of the written rows of one source in one split."""

    samples: int
    total_chars: int
    min_length: int
    max_length: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class WrittenMixture:
    """What scatter wrote."""

    parts: list[WrittenPart]
    stats: dict[tuple[str, str], TextStats]
    """By (split, source)."""


def scatter(
    unique: UniqueRows,
    rows: Mapping[tuple[str, str], int],
    output: Path,
    *,
    seed: int,
    stages: ShortPromptsFirst | None = None,
    layout: Literal["mixed", "categories"] = "mixed",
    compress: Literal["zstd"] | None = None,
    part_megabytes: int = 256,
    workers: int,
    report: Report,
) -> WrittenMixture:
    """Write exactly `rows[(split, source)]` rows of each, in a seeded global order, as JSONL parts under `output`.

    More rows than a source has: whole epochs, then a remainder without replacement, the first by keyed permutation.
    The same rows, seed and settings give the same bytes, whatever the number of workers and interruptions. Temporary
    disk: about the size of the output, under the scan's folder.
    """
    raise NotImplementedError
