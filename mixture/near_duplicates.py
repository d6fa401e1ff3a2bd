"""Rows whose text is nearly that of an earlier row, by MinHash signatures on disk and bands of them.

Files in the scan's folder, near-KEY/: NNNNNN.signatures, the rows of one chunk as SIGNED, and signatures, those of all,
until there is dropped.npy, the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from mixture.decontamination import normalised_lines
from mixture.dedup import RowIds, save_array
from mixture.scan import Chunk, Scan
from mixture.whole_files import join_files, remove_leftovers, whole_file
from mixture.workers import Report, run_tasks

FORMAT_VERSION = 1
"""Raised whenever the same rows give another answer."""

SHINGLE_WORDS = 5
"""Texts are compared by their runs of five words, as FineWeb's are."""

SIGNATURE_LENGTH = 128
"""Minima in a signature: a similarity of 0.8 is estimated to within 0.035 (one standard deviation)."""

CANDIDATE_CHANCE = 0.9
"""Pairs exactly as similar as asked are compared with at least this chance, more similar ones almost surely."""

MOST_WORDS = 50_000
"""Of longer texts the beginning is compared, so that one row cannot fill the memory."""

BATCH_WORDS = 200_000
BATCH_ROWS = 128
"""From 256 rows a call rensa starts threads, on which a process that is forked later would wait for ever."""
ROWS_COMPARED_AT_ONCE = 8192
SEED = 1
INSTALL = "pip install 'baton[near-duplicates]'  (or: pip install rensa)"

SIGNED = np.dtype([("id", "<u8"), ("minima", "<u4", (SIGNATURE_LENGTH,))])


def find_near_duplicates(scan: Scan, gone: RowIds, *, similarity: float, workers: int, report: Report) -> RowIds:
    """Ids of rows that are at least as similar as asked to an earlier row; `gone`, sorted ids, are left out before.

    Similarity is Jaccard's of the sets of five-word runs, case and punctuation aside, estimated from MinHash
    signatures; of rows that are similar in a chain the first stays. Sources come in the order of their priority. The
    same rows give the same answer for any number of workers. Takes about 80 bytes of memory a row, and 520 bytes on
    disk, twice while they are put together, freed at the end. ValueError: rensa is not installed.
    """
    minhash = signature_class()
    settings = [FORMAT_VERSION, scan.key, similarity, MOST_WORDS]
    folder = scan.folder / f"near-{xxhash.xxh3_64_hexdigest(orjson.dumps(settings) + gone.tobytes())}"
    answer = folder / "dropped.npy"
    if not answer.exists():
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder)
        report("looking for near duplicates")
        task = partial(sign_chunk, scan, gone, folder, minhash)
        missing = [chunk for chunk in scan.chunks if not chunk_file(folder, chunk).exists()]
        run_tasks(task, missing, workers=workers, label="near duplicates", report=report)
        files = [chunk_file(folder, chunk) for chunk in scan.chunks]
        together = folder / "signatures"
        join_files(files, together)
        # An empty file cannot be mapped.
        rows = np.memmap(together, SIGNED, mode="r") if together.stat().st_size else np.empty(0, SIGNED)
        save_array(answer, rows["id"][near_earlier(rows["minima"], similarity)])
        for file in [*files, together]:
            file.unlink()
    return np.asarray(np.load(answer), np.uint64)


def chunk_file(folder: Path, chunk: Chunk) -> Path:
    return folder / f"{chunk.number:06d}.signatures"


def signature_class() -> Any:
    """rensa's MinHash; ValueError with the command that installs it."""
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise ValueError(f"dedup.near needs MinHash signatures: {INSTALL}") from error
    return RMinHash


def sign_chunk(scan: Scan, gone: RowIds, folder: Path, minhash: Any, chunk: Chunk) -> None:
    """Write the signatures of one chunk's rows, without those that are gone; of rows about images, whose texts are
    often alike, none."""
    first, end = np.searchsorted(gone, np.array([chunk.number << 32, (chunk.number + 1) << 32], np.uint64))
    own = set(gone[first:end].tolist())
    chunk_texts = iter(()) if chunk.source.has_images else scan.chunk_texts(chunk)
    texts = ((row_id, text) for row_id, text in chunk_texts if row_id not in own)
    with whole_file(chunk_file(folder, chunk)) as file:
        for batch in batches(texts):
            rows = np.empty(len(batch), SIGNED)
            rows["id"] = [row_id for row_id, _ in batch]
            rows["minima"] = minhash.digests_from_token_sets([runs for _, runs in batch], SIGNATURE_LENGTH, SEED)
            file.write(rows.tobytes())


def batches(texts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, list[bytes]]]]:
    """(row id, shingles) in lists of BATCH_ROWS rows or about BATCH_WORDS words. Texts without words are left out."""
    batch: list[tuple[int, list[bytes]]] = []
    words_in_batch = 0
    for row_id, text in texts:
        words = normalised_lines(text).split(None, MOST_WORDS)[:MOST_WORDS]
        if not words:
            continue
        batch.append((row_id, shingles(words)))
        words_in_batch += len(words)
        if words_in_batch >= BATCH_WORDS or len(batch) == BATCH_ROWS:
            yield batch
            batch, words_in_batch = [], 0
    if batch:
        yield batch


def shingles(words: list[bytes]) -> list[bytes]:
    """All runs of SHINGLE_WORDS words; of a shorter text, all its words as one."""
    runs = zip(*(words[offset:] for offset in range(SHINGLE_WORDS)), strict=False)
    return list(map(b" ".join, runs)) or [b" ".join(words)]


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
