"""Exact duplicates across all sources, found by hash partitions in bounded memory, and the split by content.

Files in the scan's folder, unique-KEY/: NNNNNN.entries, the fingerprints of some chunks sorted by partition, and
starts-NNNNNN.npy, where each partition begins; dropped-NNNN.npy, ids of the duplicates in one partition;
available.json, what is left, written last.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from mixture.scan import Chunk, Index, Scan, row_ids
from mixture.whole_files import remove_leftovers, whole_file, write_whole
from mixture.workers import Report, run_tasks

ROWS_PER_PARTITION = 1 << 18
"""A partition, and the rows of the chunks that are partitioned together, are sorted in memory."""
ENTRIES_PER_WRITE = 1 << 14

RowIds = npt.NDArray[np.uint64]

ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("id", "<u8"), ("group", "<u8")])


@dataclass(frozen=True, kw_only=True)
class Available:
    """What one source can give to one split, after duplicates are gone."""

    rows: int
    text_bytes: int
    short_prompts: int
    """Rows whose prompt is shorter than `short_prompt_bytes`, for a first stage of short prompts."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """All that shapes which rows are left."""

    exact: bool
    test_share: float
    short_prompt_bytes: int
    also_dropped: RowIds

    @property
    def first_train_group(self) -> int:
        """Rows whose group lies below this go to the test split."""
        return round(self.test_share * 2.0**64)

    def key(self, scan: Scan) -> str:
        """16 hex digits over the scan and the selection."""
        parts = [scan.key, self.exact, self.test_share, self.short_prompt_bytes, ROWS_PER_PARTITION]
        return xxhash.xxh3_64_hexdigest(orjson.dumps(parts) + self.also_dropped.tobytes())

    def in_test(self, rows: Index) -> npt.NDArray[np.bool_]:
        """Which rows go to the test split."""
        if self.test_share <= 0:
            return np.zeros(len(rows), np.bool_)
        return rows["group"] < np.uint64(self.first_train_group)


@dataclass(frozen=True, kw_only=True)
class UniqueRows:
    """The rows of a scan that are left, and to which split each goes."""

    scan: Scan
    key: str
    selection: Selection
    available: dict[tuple[str, str], Available]
    """By (split, source); split is `train` or `test`."""
    duplicates: dict[str, int]
    """Rows dropped as duplicates, by source."""

    @cached_property
    def dropped(self) -> list[RowIds]:
        """Ids of dropped rows: sorted arrays, mapped from their files."""
        files = sorted(unique_folder(self.scan, self.key).glob("dropped-*.npy"))
        return [self.selection.also_dropped, *(np.load(file, mmap_mode="r") for file in files)]

    def rows(self, chunk: Chunk) -> Index:
        """The index rows of a chunk that are left."""
        return without(chunk, self.scan.index(chunk), self.dropped)


def without(chunk: Chunk, index: Index, dropped: Sequence[RowIds]) -> Index:
    """Index rows of a chunk whose ids are in none of the sorted arrays."""
    limits = np.array([chunk.number << 32, (chunk.number + 1) << 32], np.uint64)
    own = [ids[slice(*np.searchsorted(ids, limits))] for ids in dropped]
    gone = np.concatenate(own) if own else np.empty(0, np.uint64)
    return index[np.isin(row_ids(chunk, index), gone, invert=True)] if len(gone) else index


def unique_folder(scan: Scan, key: str) -> Path:
    return scan.folder / f"unique-{key}"


def find_duplicates(
    scan: Scan,
    *,
    exact: bool = True,
    test_share: float = 0.0,
    short_prompt_bytes: int = 0,
    also_dropped: RowIds | None = None,
    workers: int,
    report: Report,
) -> UniqueRows:
    """Drop all but one row of each normalised content, in favour of the source named first; then split by prompt.

    The split is a hash of the normalised prompt (of `metadata.parent` where there is one), so it never depends on
    order or on what else is in the mix, and equal rows never lie in both splits, whether `exact` is on or not.
    `also_dropped`: row ids of Scan.texts to leave out, near duplicates for instance.
    """
    ids = np.sort(np.asarray([] if also_dropped is None else also_dropped, np.uint64))
    selection = Selection(exact=exact, test_share=test_share, short_prompt_bytes=short_prompt_bytes, also_dropped=ids)
    key = selection.key(scan)
    folder = unique_folder(scan, key)
    folder.mkdir(exist_ok=True)
    summary = folder / "available.json"
    if not summary.exists():
        remove_leftovers(folder)
        if exact or test_share > 0:
            drop_duplicates(scan, selection, folder, workers, report)
        unique = UniqueRows(scan=scan, key=key, selection=selection, available={}, duplicates={})
        write_whole(summary, orjson.dumps(count_available(unique)))
    counts = orjson.loads(summary.read_bytes())
    return UniqueRows(
        scan=scan,
        key=key,
        selection=selection,
        available={(split, source): Available(**fields) for split, source, fields in counts["available"]},
        duplicates=counts["duplicates"],
    )


# --- hash partitions


def drop_duplicates(scan: Scan, selection: Selection, folder: Path, workers: int, report: Report) -> None:
    """Write the ids of duplicates, a file for each partition of the fingerprints."""
    kept = sum(counts.kept for counts in scan.counts)
    bits = max(0, (kept // ROWS_PER_PARTITION).bit_length())
    groups = list(chunk_groups(scan))
    tasks = [(number, chunks) for number, chunks in enumerate(groups) if not entries_file(folder, number).exists()]
    run_tasks(
        partial(partition_chunks, scan, selection, folder, bits),
        tasks,
        workers=workers,
        label="partitioning fingerprints",
        report=report,
    )
    partitions = [number for number in range(1 << bits) if not (folder / f"dropped-{number:04d}.npy").exists()]
    run_tasks(
        partial(drop_in_partition, selection, folder, len(groups)),
        partitions,
        workers=workers,
        label="finding duplicates",
        report=report,
    )
    for number in range(len(groups)):
        entries_file(folder, number).unlink()
        starts_file(folder, number).unlink()


def chunk_groups(scan: Scan) -> Iterator[list[Chunk]]:
    """Consecutive chunks of about ROWS_PER_PARTITION rows."""
    group: list[Chunk] = []
    rows = 0
    for chunk, counts in zip(scan.chunks, scan.counts, strict=True):
        if group and rows + counts.kept > ROWS_PER_PARTITION:
            yield group
            group, rows = [], 0
        group.append(chunk)
        rows += counts.kept
    yield group


def entries_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.entries"


def starts_file(folder: Path, number: int) -> Path:
    return folder / f"starts-{number:06d}.npy"


def partition_chunks(
    scan: Scan, selection: Selection, folder: Path, bits: int, task: tuple[int, Sequence[Chunk]]
) -> None:
    """Write the entries of some chunks, sorted by partition (the fingerprint's top bits) and then by row id."""
    number, chunks = task
    entries = np.empty(sum(scan.counts[chunk.number].kept for chunk in chunks), ENTRY)
    count = 0
    for chunk in chunks:
        own = entries_of(scan, selection, chunk)
        entries[count : count + len(own)] = own
        count += len(own)
    entries = entries[:count]
    partitions = (entries["high"] >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(count, int)
    order = np.argsort(partitions, kind="stable")
    starts = np.concatenate(([0], np.cumsum(np.bincount(partitions, minlength=1 << bits))))
    save_array(starts_file(folder, number), starts)
    with whole_file(entries_file(folder, number)) as file:
        for first in range(0, count, ENTRIES_PER_WRITE):
            file.write(entries[order[first : first + ENTRIES_PER_WRITE]].tobytes())


def entries_of(scan: Scan, selection: Selection, chunk: Chunk) -> Index:
    """The rows of a chunk as ENTRY, without those that are dropped anyway."""
    rows = without(chunk, scan.index(chunk), [selection.also_dropped])
    entries = np.empty(len(rows), ENTRY)
    for name in ("high", "low", "group"):
        entries[name] = rows[name]
    entries["id"] = row_ids(chunk, rows)
    return entries


def drop_in_partition(selection: Selection, folder: Path, groups: int, partition: int) -> None:
    """Write the sorted ids of the rows to drop in one partition."""
    bounds = [np.load(starts_file(folder, number))[partition : partition + 2].tolist() for number in range(groups)]
    entries = np.empty(sum(end - start for start, end in bounds), ENTRY)
    count = 0
    for number, (start, end) in enumerate(bounds):
        entries[count : count + end - start] = np.fromfile(
            entries_file(folder, number), ENTRY, count=end - start, offset=start * ENTRY.itemsize
        )
        count += end - start
    save_array(folder / f"dropped-{partition:04d}.npy", np.sort(duplicate_ids(entries, selection)))


def duplicate_ids(entries: Index, selection: Selection) -> RowIds:
    """Ids of all but the first of equal rows; where duplicates stay, of those in test that train has as well."""
    order = np.lexsort((entries["low"], entries["high"]))  # stable, so the lowest id of equal rows comes first
    is_first = np.zeros(len(entries), np.bool_)
    is_first[:1] = True
    for half in ("high", "low"):
        values = entries[half][order]
        is_first[1:] |= values[1:] != values[:-1]
    if selection.exact:
        return entries["id"][order[~is_first]]
    in_test = selection.in_test(entries)[order]
    runs = np.cumsum(is_first) - 1
    in_train_too = np.bincount(runs, weights=~in_test) > 0
    return entries["id"][order[in_test & in_train_too[runs]]] if len(entries) else entries["id"]


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array whole."""
    content = io.BytesIO()  # into a file itself, NumPy writes past Python and cannot say that the disk is full
    np.save(content, array)
    with whole_file(path) as file:
        file.write(content.getbuffer())


# --- what is left


def count_available(unique: UniqueRows) -> dict[str, Any]:
    """Rows, bytes and short prompts by split and source, and duplicates by source."""
    totals: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    duplicates = dict.fromkeys((chunk.source.name for chunk in unique.scan.chunks), 0)
    for chunk in unique.scan.chunks:
        name = chunk.source.name
        rows = unique.rows(chunk)
        also = len(without(chunk, unique.scan.index(chunk), [unique.selection.also_dropped]))
        duplicates[name] += also - len(rows)
        in_test = unique.selection.in_test(rows)
        for split, own in (("train", rows[~in_test]), ("test", rows[in_test])):
            short = own["prompt_bytes"] < unique.selection.short_prompt_bytes
            totals[split, name].update(
                rows=len(own),
                text_bytes=int(own["text_bytes"].sum(dtype=np.int64)),
                short_prompts=int(np.count_nonzero(short)),
            )
    available = [
        (split, source, asdict(Available(**dict(counts)))) for (split, source), counts in sorted(totals.items())
    ]
    return {"available": available, "duplicates": duplicates}
