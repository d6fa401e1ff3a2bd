"""Proof that every row was trained on exactly once in each epoch, whatever happened to the jobs. No torch here.

What counts is what optimizer steps consumed, not what the sampler should have given: the numbers of the rows travel
with the batches, and are counted once a step is completed. An epoch is right when as many rows as the split has were
counted, and a hash over their numbers, which does not depend on their order, is that of each row once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mixture.mixed_bits import mixed_bits

HASH_MODULUS = 1 << 64
ROWS_PER_CHUNK = 1 << 20

RowNumbers = npt.NDArray[np.int64]


class WrongRowsError(ValueError):
    """An epoch ended and its rows were not each trained on once."""


@dataclass(frozen=True, kw_only=True)
class EpochRows:
    """The rows of one epoch that optimizer steps consumed."""

    epoch: int
    """Counted from 0."""

    rows: int = 0
    hash: int = 0
    """Sum of the mixed row numbers modulo 2^64."""

    def __add__(self, more: EpochRows) -> EpochRows:
        assert self.epoch == more.epoch
        return EpochRows(epoch=self.epoch, rows=self.rows + more.rows, hash=(self.hash + more.hash) % HASH_MODULUS)

    @classmethod
    def of(cls, epoch: int, numbers: RowNumbers) -> EpochRows:
        """These rows of an epoch."""
        # Row 0 would add nothing.
        mixed = mixed_bits(numbers.astype(np.uint64) + np.uint64(1))
        return cls(epoch=epoch, rows=len(numbers), hash=int(mixed.sum(dtype=np.uint64)))


@cache
def whole_epoch_hash(num_rows: int) -> int:
    """The hash of an epoch in which each of `num_rows` rows was consumed once."""
    whole = EpochRows(epoch=0)
    for first in range(0, num_rows, ROWS_PER_CHUNK):
        whole += EpochRows.of(0, np.arange(first, min(first + ROWS_PER_CHUNK, num_rows)))
    return whole.hash


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The rows that a chain consumed, up to one optimizer step."""

    rows_per_epoch: int
    whole_epochs: int = 0
    """So many first epochs had every row once."""

    epochs: tuple[EpochRows, ...] = ()
    """Those after them that have begun: in a healthy chain at most one, which is under way."""

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> Ledger:
        """A ledger from its plain values. Raises TypeError and KeyError where they are another thing's."""
        return cls(**{**values, "epochs": tuple(EpochRows(**epoch) for epoch in values["epochs"])})

    def adding(self, counted: Iterable[EpochRows]) -> Ledger:
        """This ledger with more rows; whole epochs are folded into their number."""
        epochs = {epoch.epoch: epoch for epoch in self.epochs}
        for more in counted:
            epochs[more.epoch] = epochs.get(more.epoch, EpochRows(epoch=more.epoch)) + more
        whole = self.whole_epochs
        while whole in epochs and self.is_whole(epochs[whole]):
            del epochs[whole]
            whole += 1
        return Ledger(
            rows_per_epoch=self.rows_per_epoch,
            whole_epochs=whole,
            epochs=tuple(epochs[epoch] for epoch in sorted(epochs)),
        )

    def is_whole(self, epoch: EpochRows) -> bool:
        """Whether every row was consumed once in this epoch."""
        return epoch.rows == self.rows_per_epoch and epoch.hash == whole_epoch_hash(self.rows_per_epoch)

    def wrong_epochs(self, finished: int) -> list[EpochRows]:
        """Those of the first `finished` epochs in which not every row was consumed once."""
        counted = {epoch.epoch: epoch for epoch in self.epochs}
        ended = (counted.get(epoch, EpochRows(epoch=epoch)) for epoch in range(self.whole_epochs, finished))
        return [epoch for epoch in ended if not self.is_whole(epoch)]

    def describe(self, wrong: EpochRows) -> str:
        """What is wrong with an epoch, in words. Epochs are numbered from 1 for people."""
        if wrong.rows != self.rows_per_epoch:
            return f"epoch {wrong.epoch + 1} trained on {wrong.rows} rows instead of {self.rows_per_epoch}"
        return f"epoch {wrong.epoch + 1} trained on {wrong.rows} rows as it should, but on some of them more than once"


def refuse_wrong_rows(ledger: Ledger, wrong: Sequence[EpochRows]) -> None:
    """Raise WrongRowsError where there are wrong epochs, naming each."""
    if wrong:
        raise WrongRowsError(
            f"{'; '.join(ledger.describe(epoch) for epoch in wrong)}. Each row counts once in an epoch, so the data or "
            "its order was changed or damaged since the chain began. The checkpoint is kept. Run the file again to go "
            "on with it all the same, or move the checkpoints from after the damage away."
        )


@dataclass
class RowCounter:
    """Counts the rows of one process: those of a step that is given up half-way never count."""

    under_way: EpochRows | None = None
    counted: dict[int, EpochRows] = field(default_factory=dict)

    def begin_step(self, epoch: int, numbers: Sequence[RowNumbers]) -> None:
        """An optimizer step of this epoch begins, on these rows in its micro-batches."""
        self.under_way = EpochRows.of(epoch, np.concatenate(numbers))

    def complete_step(self) -> None:
        """The step is completed: its rows count."""
        step = self.under_way
        assert step is not None, "no step has begun"
        self.counted[step.epoch] = self.counted.get(step.epoch, EpochRows(epoch=step.epoch)) + step
        self.under_way = None

    def take(self) -> list[EpochRows]:
        """What was counted since the last call."""
        counted = list(self.counted.values())
        self.counted.clear()
        return counted
