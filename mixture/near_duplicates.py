"""Rows whose text is nearly that of an earlier row, by MinHash signatures on disk and bands of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mixture.decontamination import normalised_lines

SHINGLE_WORDS = 5
"""Texts are compared by their runs of five words, as FineWeb's are."""

SIGNATURE_LENGTH = 128
"""Minima in a signature: a similarity of 0.8 is estimated to within 0.035 (one standard deviation)."""

CANDIDATE_CHANCE = 0.9
"""Pairs exactly as similar as asked are compared with at least this chance, more similar ones almost surely."""

MOST_WORDS = 50_000
"""Of longer texts the beginning is compared, so that one row cannot fill the memory."""

BATCH_WORDS = 200_000
ROWS_COMPARED_AT_ONCE = 8192
SEED = 1
INSTALL = "pip install 'baton[near-duplicates]'  (or: pip install rensa)"


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """Rows to leave out because an earlier row is nearly the same."""

    row_ids: npt.NDArray[np.uint64]
    rows_by_source: dict[str, int]


def find_near_duplicates(
    sources: Iterable[tuple[str, Iterable[tuple[int, str]]]], *, similarity: float, scratch_folder: Path
) -> NearDuplicates:
    """Rows of (source, its (row id, text)) that are at least as similar as asked to an earlier row.

    Similarity is Jaccard's of the sets of five-word runs, case and punctuation aside, estimated from MinHash
    signatures; of rows that are similar in a chain the first stays. Sources come in the order of their priority. The
    same rows give the same answer. Takes about 80 bytes of memory a row, and 512 bytes on disk in `scratch_folder`,
    freed at the end. ValueError: rensa is not installed.
    """
    minhash = signature_class()
    row_ids: list[npt.NDArray[np.uint64]] = []
    names: list[str] = []
    rows_in_source: list[int] = []
    with tempfile.TemporaryFile(dir=scratch_folder) as file:
        for name, texts in sources:
            ids = [write_signatures(batch, minhash, file) for batch in batches(texts)]
            row_ids += ids
            names.append(name)
            rows_in_source.append(sum(map(len, ids)))
        file.flush()
        total = sum(rows_in_source)
        signatures = np.memmap(file, dtype=np.uint32, mode="r", shape=(total, SIGNATURE_LENGTH)) if total else None
        dropped = np.zeros(total, dtype=np.bool_) if signatures is None else near_earlier(signatures, similarity)
    every_id = np.concatenate([np.empty(0, dtype=np.uint64), *row_ids])
    counts = [int(part.sum()) for part in np.split(dropped, np.cumsum(rows_in_source)[:-1])] if names else []
    return NearDuplicates(row_ids=every_id[dropped], rows_by_source=dict(zip(names, counts, strict=True)))


def signature_class() -> Any:
    """rensa's MinHash; ValueError with the command that installs it."""
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise ValueError(f"dedup.near needs MinHash signatures: {INSTALL}") from error
    return RMinHash


def batches(texts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, list[bytes]]]]:
    """(row id, shingles) in lists of about BATCH_WORDS words. Texts without words are left out."""
    batch: list[tuple[int, list[bytes]]] = []
    words_in_batch = 0
    for row_id, text in texts:
        words = normalised_lines(text).split(None, MOST_WORDS)[:MOST_WORDS]
        if not words:
            continue
        batch.append((row_id, shingles(words)))
        words_in_batch += len(words)
        if words_in_batch >= BATCH_WORDS:
            yield batch
            batch, words_in_batch = [], 0
    if batch:
        yield batch


def shingles(words: list[bytes]) -> list[bytes]:
    """All runs of SHINGLE_WORDS words; of a shorter text, all its words as one."""
    runs = zip(*(words[offset:] for offset in range(SHINGLE_WORDS)), strict=False)
    return list(map(b" ".join, runs)) or [b" ".join(words)]


def write_signatures(batch: list[tuple[int, list[bytes]]], minhash: Any, file: BinaryIO) -> npt.NDArray[np.uint64]:
    """Append a batch's signatures, SIGNATURE_LENGTH uint32 a row; its row ids."""
    digests = minhash.digests_from_token_sets([tokens for _, tokens in batch], SIGNATURE_LENGTH, SEED)
    file.write(np.array(digests, dtype=np.uint32).tobytes())
    return np.array([row_id for row_id, _ in batch], dtype=np.uint64)


def near_earlier(signatures: npt.NDArray[np.uint32], similarity: float) -> npt.NDArray[np.bool_]:
    """Which rows are as similar as asked to an earlier row that shares a band of their signatures.

    Bands are looked at in turn, without the rows that earlier bands dropped.
    """
    dropped = np.zeros(len(signatures), dtype=np.bool_)
    rows_in_band = band_rows(similarity)
    for start in range(0, SIGNATURE_LENGTH, rows_in_band):
        for bucket in buckets(signatures[:, start : start + rows_in_band], dropped):
            drop_within(bucket, signatures, similarity, dropped)
    return dropped


def band_rows(similarity: float) -> int:
    """Minima in a band: the most that still make pairs of that similarity candidates with CANDIDATE_CHANCE."""
    for rows in (16, 8, 4, 2):
        if 1 - (1 - similarity**rows) ** (SIGNATURE_LENGTH // rows) >= CANDIDATE_CHANCE:
            return rows
    return 1


def buckets(band: npt.NDArray[np.uint32], dropped: npt.NDArray[np.bool_]) -> Iterator[npt.NDArray[np.intp]]:
    """Ascending indices of rows, not dropped yet, whose signatures agree in the band; two or more each."""
    keys = np.zeros(len(band), dtype=np.uint64)
    for column in np.ascontiguousarray(band).T:
        keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    left = np.flatnonzero(~dropped)
    order = left[np.argsort(keys[left], kind="stable")]
    starts = np.concatenate([[0], np.flatnonzero(np.diff(keys[order])) + 1, [len(order)]])
    for first in np.flatnonzero(np.diff(starts) > 1):
        yield order[starts[first] : starts[first + 1]]


def drop_within(
    bucket: npt.NDArray[np.intp],
    signatures: npt.NDArray[np.uint32],
    similarity: float,
    dropped: npt.NDArray[np.bool_],
) -> None:
    """Mark the rows of a bucket that are as similar as asked to an earlier one of it that is not marked."""
    while len(bucket) > 1:
        first, others = signatures[bucket[0]], bucket[1:]
        parts = [others[at : at + ROWS_COMPARED_AT_ONCE] for at in range(0, len(others), ROWS_COMPARED_AT_ONCE)]
        agreeing = np.concatenate([(signatures[part] == first).mean(axis=1) for part in parts])
        dropped[others[agreeing >= similarity]] = True
        bucket = others[agreeing < similarity]
