"""Evaluation items looked for in all rows of a scan: chunks in parallel, and none twice.

Files in the scan's folder, contaminated-KEY/: NNNNNN.json, what one chunk holds of the items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from mixture.decontamination import Contamination, ContaminationSearch, read_evaluation_items
from mixture.scan import Chunk, Scan
from mixture.whole_files import remove_leftovers, write_whole
from mixture.workers import Report, run_tasks

FORMAT_VERSION = 1
"""Raised whenever the same rows and items give other finds."""


def find_contaminated_rows(
    scan: Scan, evaluation_files: Sequence[Path], *, workers: int, report: Report
) -> dict[str, Contamination]:
    """Rows that share text with evaluation files, by source.

    ValueError: an evaluation file that is missing, of an unknown kind, or without questions.
    """
    search = ContaminationSearch(read_evaluation_items(evaluation_files))
    items = [[str(item), *map(bytes.hex, item.words)] for item in search.items]
    key = xxhash.xxh3_64_hexdigest(orjson.dumps([FORMAT_VERSION, search.words, search.reported_words, items]))
    folder = scan.folder / f"contaminated-{key}"
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)
    missing = [chunk for chunk in scan.chunks if not chunk_file(folder, chunk).exists()]
    if missing:
        report(f"looking for {len(search.items):,} evaluation items")
        search.dropping, search.reporting  # noqa: B018 - built once, before workers share them
    task = partial(search_chunk, scan, search, folder)
    run_tasks(task, missing, workers=workers, label="evaluation items", report=report)
    return {name: source_contamination(scan, folder, name) for name in scan.sources}


def chunk_file(folder: Path, chunk: Chunk) -> Path:
    return folder / f"{chunk.number:06d}.json"


def search_chunk(scan: Scan, search: ContaminationSearch, folder: Path, chunk: Chunk) -> None:
    """Write what one chunk holds."""
    found = search.find(scan.chunk_texts(chunk))
    record = {
        "row_ids": found.row_ids.tolist(),
        "rows_read": found.rows_read,
        "rows_with_shorter_runs": found.rows_with_shorter_runs,
        "rows_by_item": found.rows_by_item,
    }
    write_whole(chunk_file(folder, chunk), orjson.dumps(record))


def source_contamination(scan: Scan, folder: Path, name: str) -> Contamination:
    """What all chunks of a source hold."""
    files = [chunk_file(folder, chunk) for chunk in scan.chunks if chunk.source.name == name]
    records: list[dict[str, Any]] = [orjson.loads(file.read_bytes()) for file in files]
    by_item: Counter[str] = Counter()
    for record in records:
        by_item.update(record["rows_by_item"])
    ordered = sorted(by_item.items(), key=lambda pair: -pair[1])
    return Contamination(
        row_ids=np.array([row_id for record in records for row_id in record["row_ids"]], np.uint64),
        rows_read=sum(record["rows_read"] for record in records),
        rows_with_shorter_runs=sum(record["rows_with_shorter_runs"] for record in records),
        rows_by_item=dict(ordered),
    )
