"""What the reference of preferences says of every answer, computed once and kept beside the prepared data."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import torch
import xxhash

from mixture.shards import TokenRow
from mixture.whole_files import whole_file
from training.batches import PackedDataset
from training.config import ModelConfig
from training.distributed import Ranks, failing_together, from_main
from training.evaluation import autocast, to_device
from training.frozen_shards import in_step
from training.model_identity import model_identity
from training.models import precision
from training.preferences import Reference, ReferencedRow, answers_batch, values_of_answers

FORMAT_VERSION = 1
SHARD_PACKS = 512
"""Packs whose values are written at once; a pass that was interrupted goes on after the last of them."""

REPORT_S = 30.0


def reference_folder(prepared: Path, model: ModelConfig, *, fingerprint: str, seed: int) -> Path:
    """Where the values of a reference lie: named by all that shapes them, the model, its arithmetic and the data."""
    parts = {
        "format": FORMAT_VERSION,
        "model": model_identity(model.name, model.revision),
        "adapters": [model_identity(adapter, None) for adapter in model.adapters],
        "four_bits": model.peft and model.peft_method == "qlora",
        "seed": seed if model.from_scratch else None,
        "precision": str(precision(model)),
        "data": fingerprint,
    }
    return prepared / f"reference-{xxhash.xxh3_64_hexdigest(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS))}"


def compute_reference(
    splits: dict[str, PackedDataset],
    folder: Path,
    shards_folder: Path,
    build: Callable[[], tuple[Reference, torch.device]],
    *,
    model_precision: torch.dtype,
    batch_size: int,
    ranks: Ranks,
) -> None:
    """Compute what is not in `folder` yet, each process its share of the shards. Returns once all is there.

    `build` makes the reference, where there is anything to compute; it is given up afterwards. `shards_folder` keeps
    what is done of an interrupted pass; it is no other run's, and removed at the end.
    """
    # As the first process sees it: another run may write the same values while the processes look.
    names = from_main([name for name in splits if not values_file(folder, name).exists()])
    missing = {name: splits[name] for name in names}
    if missing:
        shards = [
            Shard(shards_folder, name, packs, first)
            for name, packs in missing.items()
            for first in range(0, len(packs), SHARD_PACKS)
        ]
        with failing_together():
            write_shards(shards, build, model_precision=model_precision, batch_size=batch_size, ranks=ranks)
        with failing_together():
            if ranks.is_main:
                join_shards(shards, missing, folder)
    with failing_together():
        # Here, as a job may have been killed between the last value and this.
        if ranks.is_main and shards_folder.exists():
            shutil.rmtree(shards_folder)


def write_shards(
    shards: Sequence[Shard],
    build: Callable[[], tuple[Reference, torch.device]],
    *,
    model_precision: torch.dtype,
    batch_size: int,
    ranks: Ranks,
) -> None:
    """Write this process's share of the shards, but for those that are there."""
    shards[0].folder.mkdir(exist_ok=True)
    reference, device = build()
    told = time.monotonic()
    with torch.no_grad(), reference.network() as network, in_step(network), autocast(device, model_precision):
        for number in range(ranks.rank, len(shards), ranks.world_size):
            if not shards[number].path.exists():
                shards[number].write(network, device, batch_size)
            if ranks.is_main and time.monotonic() - told > REPORT_S:
                told = time.monotonic()
                print(f"reference: {number + 1} of {len(shards)} shards computed", flush=True)


def join_shards(shards: Sequence[Shard], splits: dict[str, PackedDataset], folder: Path) -> None:
    """Write the values of each split from its shards."""
    folder.mkdir(exist_ok=True)
    for name, packs in splits.items():
        own = [shard for shard in shards if shard.split == name]
        values = in_order_of_rows(packs, np.concatenate([np.load(shard.path) for shard in own]))
        with whole_file(values_file(folder, name), synced=True) as file:
            np.save(file, values)


@dataclass(frozen=True)
class Shard:
    """Some packs of a split, whose values are written together."""

    folder: Path
    split: str
    packs: PackedDataset
    first: int

    @property
    def path(self) -> Path:
        """Values of the packs' rows, in the order of the packs."""
        return self.folder / f"{self.split}-{self.first}.npy"

    def write(self, network: torch.nn.Module, device: torch.device, batch_size: int) -> None:
        """Ask the network about all rows of the packs."""
        numbers = range(self.first, min(self.first + SHARD_PACKS, len(self.packs)))
        values = [
            values_of_answers(network, to_device(answers_batch(rows), device)).cpu().numpy()
            for rows in batches(self.packs, numbers, batch_size)
        ]
        with whole_file(self.path, synced=True) as file:
            np.save(file, np.concatenate(values))


def batches(packs: PackedDataset, numbers: Sequence[int], batch_size: int) -> Iterator[list[TokenRow]]:
    for start in range(0, len(numbers), batch_size):
        yield [row for number in numbers[start : start + batch_size] for row in packs[number]]


def in_order_of_rows(packs: PackedDataset, in_packs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The values of rows in the order of the rows, from those in the order of the packs."""
    assert len(packs.rows) == len(packs.packs.indices) == len(in_packs)
    values = np.empty_like(in_packs)
    values[packs.packs.indices] = in_packs
    return values


def values_file(folder: Path, split: str) -> Path:
    """The log-probability of each row's answer under the reference, in nats, in the order of the rows."""
    return folder / f"{split}.npy"


class ReferencedPacks(PackedDataset):
    """The packs of a split, each row with what the reference says of it."""

    def __init__(self, packs: PackedDataset, folder: Path, split: str):
        super().__init__(packs.rows, packs.packs)
        self.values = np.load(values_file(folder, split))

    def __getitem__(self, index: int) -> list[Any]:
        numbers = self.packs[int(index)]
        return [ReferencedRow.of(self.rows[int(row)], float(self.values[int(row)])) for row in numbers]
