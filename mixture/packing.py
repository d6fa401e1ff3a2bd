"""Best-fit decreasing: several samples in each row of fixed length, over the whole data set or stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

WINDOW = 20_000
"""Samples packed together inside a stage: packs are as full as over the whole stage, to a tenth of a percent."""


@dataclass(frozen=True)
class Packs:
    """Which samples share a row: pack i holds `indices[starts[i]:starts[i + 1]]`, int32 sample indices.

    `stages`: the first pack of each stage; packs are trained in the order of stages, in any order inside one.
    """

    indices: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    stages: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, pack: int) -> npt.NDArray[np.int32]:
        if not 0 <= pack < len(self):
            raise IndexError(f"pack {pack} of {len(self)}")
        return self.indices[self.starts[pack] : self.starts[pack + 1]]

    def __iter__(self) -> Iterator[npt.NDArray[np.int32]]:
        return (self[pack] for pack in range(len(self)))


def single_packs(count: int, stages: Sequence[int] = (0,)) -> Packs:
    """One sample in each pack, for runs without packing."""
    return Packs(np.arange(count, dtype=np.int32), np.arange(count + 1, dtype=np.int64), np.array(stages, np.int64))


def packs_of_units(units: Packs, rows_per_unit: int) -> Packs:
    """Packs of samples, from packs of units that are `rows_per_unit` samples in a row each."""
    rows = np.arange(rows_per_unit, dtype=np.int32)
    indices = (units.indices[:, None] * np.int32(rows_per_unit) + rows).ravel()
    return Packs(indices, units.starts * rows_per_unit, units.stages)


def staged_packs(
    lengths: npt.NDArray[np.integer], capacity: int, stages: Sequence[int], *, window: int = WINDOW
) -> Packs:
    """Packs that never cross a stage, in the order of the samples to within `window` of them.

    `stages`: the first sample of each stage, ascending from 0. A single stage is packed as a whole. ValueError as in
    `best_fit_packs`.
    """
    if len(stages) == 1:
        return best_fit_packs(lengths, capacity)
    indices, starts, firsts = [np.empty(0, np.int32)], [np.zeros(1, np.int64)], []
    packed = samples = 0
    for first, end in zip(stages, [*stages[1:], len(lengths)], strict=True):
        firsts.append(packed)
        for begin in range(first, end, window):
            packs = best_fit_packs(lengths[begin : min(begin + window, end)], capacity)
            indices.append(packs.indices + np.int32(begin))
            starts.append(packs.starts[1:] + samples)
            samples += len(packs.indices)
            packed += len(packs)
    return Packs(np.concatenate(indices), np.concatenate(starts), np.array(firsts, np.int64))


def best_fit_packs(lengths: npt.NDArray[np.integer], capacity: int) -> Packs:
    """Packs of at most `capacity` tokens, by best-fit decreasing over all samples at once.

    Longest samples first, each into the fullest pack with room, else into a new one; the same packs for the same
    lengths on every machine. `lengths`: tokens of each sample, 1 to `capacity`, else ValueError. About a second for a
    million samples: equal lengths and equally full packs are treated together, since best fit cannot tell them apart.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and (lengths.min() < 1 or lengths.max() > capacity):
        raise ValueError(f"sample lengths must lie in [1, {capacity}], got {lengths.min()} to {lengths.max()}")
    order = np.argsort(-lengths, kind="stable")  # equal lengths stay in data set order
    pack_of = np.empty(len(lengths), dtype=np.int64)
    rooms = PacksByRoom(capacity)
    distinct, counts = np.unique(lengths, return_counts=True)
    first = 0
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        pack_of[order[first : first + count]] = rooms.place(length, count)
        first += count
    members = np.argsort(pack_of, kind="stable").astype(np.int32)
    starts = np.concatenate(([0], np.cumsum(np.bincount(pack_of, minlength=rooms.opened)))).astype(np.int64)
    return Packs(members, starts)


class PacksByRoom:
    """Open packs in one list for each number of free tokens, with a bit set for every list that is not empty."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.opened = 0
        self.packs: list[list[int]] = [[] for _ in range(capacity + 1)]
        self.filled_rooms = 0

    def place(self, length: int, count: int) -> list[int]:
        """Place `count` samples of `length` tokens; returns their packs."""
        placed: list[int] = []
        while count > 0:
            candidates = self.filled_rooms >> length
            if candidates:
                room = length + (candidates & -candidates).bit_length() - 1
            else:
                room = self.capacity
                self.open(-(-count // (room // length)))
            # A pack that took one sample is now fuller than its peers, so best fit keeps filling it first.
            each = min(room // length, count)
            chosen = self.move(room, min(len(self.packs[room]), count // each), room - each * length)
            placed += [pack for pack in chosen for _ in range(each)]
            count -= len(chosen) * each
        return placed

    def open(self, count: int) -> None:
        """Open `count` empty packs."""
        self.packs[self.capacity] += range(self.opened, self.opened + count)
        self.opened += count
        self.filled_rooms |= 1 << self.capacity

    def move(self, room: int, count: int, to_room: int) -> list[int]:
        """Move `count` packs from one list to another and return them."""
        moved = self.packs[room][-count:]
        del self.packs[room][-count:]
        self.packs[to_room] += moved
        self.filled_rooms |= 1 << to_room
        if not self.packs[room]:
            self.filled_rooms &= ~(1 << room)
        return moved
