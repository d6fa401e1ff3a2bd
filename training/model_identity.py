"""Which model it is: digests of its files, or its hub id and revision. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import xxhash

from mixture.prepare import text_file_digests

WEIGHTS_SUFFIXES = (".safetensors", ".bin")
SAMPLED_BLOCKS = 64
BLOCK_BYTES = 64 << 10


def model_identity(name: str, revision: str | None) -> Any:
    """Digests of a local model's files, or the hub id and revision.

    Of weights only samples are read, milliseconds for any size: training moves all of them, so it moves the samples.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return [name, revision]
    weights = sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS_SUFFIXES)
    return {**text_file_digests(folder), **{file.name: sampled_digest(file) for file in weights}}


def model_digest(name: str, revision: str | None) -> str:
    """16 hex digits over `model_identity`."""
    return xxhash.xxh3_64_hexdigest(orjson.dumps(model_identity(name, revision), option=orjson.OPT_SORT_KEYS))


def sampled_digest(path: Path) -> str:
    """xxh3-128 of a weights file's size, its safetensors header, and evenly spaced blocks of it."""
    size = path.stat().st_size
    digest = xxhash.xxh3_128(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            header_bytes = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header_bytes, size)))
        for block in range(SAMPLED_BLOCKS):
            file.seek(max(size - BLOCK_BYTES, 0) * block // (SAMPLED_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
