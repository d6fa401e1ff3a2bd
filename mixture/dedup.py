"""Exact duplicates across all sources, found by hash partitions in bounded memory, and the split by content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mixture.scan import Report, Scan


@dataclass(frozen=True, kw_only=True)
class Available:
    """What one source can give to one split, after duplicates are gone."""

    rows: int
    text_bytes: int
    short_prompts: int
    """Rows whose prompt is shorter than `short_prompt_bytes`, for a first stage of short prompts."""


@dataclass(frozen=True, kw_only=True)
class UniqueRows:
    """The rows of a scan that are left, and to which split each goes."""

    scan: Scan
    available: dict[tuple[str, str], Available]
    """By (split, source); split is `train` or `test`."""
    duplicates: dict[str, int]
    """Rows dropped as duplicates, by source."""
    state: Any = None


def find_duplicates(
    scan: Scan,
    *,
    exact: bool = True,
    test_share: float = 0.0,
    short_prompt_bytes: int = 0,
    also_dropped: npt.NDArray[np.uint64] | None = None,
    workers: int,
    report: Report,
) -> UniqueRows:
    """Drop all but one row of each normalised content, in favour of the source named first; then split by prompt.

    The split is a hash of the normalised prompt (of `metadata.parent` where there is one), so it never depends on
    order or on what else is in the mix, and equal rows never lie in both splits, whether `exact` is on or not.
    `also_dropped`: row ids of Scan.texts to leave out, near duplicates for instance.
    """
    raise NotImplementedError
