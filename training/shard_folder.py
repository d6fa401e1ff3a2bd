"""A folder that is made shard by shard: its manifest, its markers, and how much of it is there. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import orjson


def manifest_file(folder: Path) -> Path:
    return folder / "manifest.json"


def done_file(folder: Path, shard: int) -> Path:
    """The marker of a shard, written last: without it the shard does not exist."""
    return folder / f"shard-{shard:05d}.done"


@dataclass(frozen=True)
class CaptureProgress:
    """Shards that are there."""

    done: int
    total: int | None
    """None where no work has begun yet, so that nobody has counted them."""


def capture_progress(folder: Path) -> CaptureProgress:
    """How much of a folder is there, by its markers."""
    try:
        manifest = orjson.loads(manifest_file(folder).read_bytes())
    except FileNotFoundError:
        return CaptureProgress(done=0, total=None)
    total = int(manifest["shards"])
    present = {file.name for file in folder.glob("shard-*.done")}
    return CaptureProgress(sum(done_file(folder, shard).name in present for shard in range(total)), total)


def is_complete(folder: Path) -> bool:
    """Whether all shards of a folder are there."""
    progress = capture_progress(folder)
    return progress.done == progress.total
