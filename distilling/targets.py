"""What a student learns at each position, cut down to a few tokens of the teacher's distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

# Caches are checked on login nodes, which should not wait for torch.
if TYPE_CHECKING:
    import torch

# Tensors are named by shape. N supervised tokens, S tokens kept of each distribution.


@dataclass(frozen=True, slots=True)
class RowTargets:
    """The teacher's distributions at the supervised tokens of one sequence, in order, at one temperature."""

    ids_NS: npt.NDArray[np.int32]
    log_probabilities_NS: npt.NDArray[np.float32]
    """log p of each kept token, at the temperature that it is read at; -inf for filling, which stands for no token."""

    weights_NS: npt.NDArray[np.float32]
    """Weight of each token in the divergence: its probability where it is exact, its share of the draws where it was
    drawn, 0 for filling and for an id that is listed again."""

    log_tail_N: npt.NDArray[np.float32] | None
    """log of the mass outside of the kept tokens, as one more class; None where no class stands for it."""

    def below(self, vocabulary: int) -> RowTargets:
        """The same without ids from `vocabulary` on, which pad the teacher's head only; the rest is scaled up to 1."""
        beyond_NS = self.ids_NS >= vocabulary
        if not beyond_NS.any():
            return self
        weights_NS = np.where(beyond_NS, np.float32(0), self.weights_NS)
        mass_N = weights_NS.sum(axis=1)
        if self.log_tail_N is not None:
            mass_N += np.exp(self.log_tail_N)
        log_mass_N = np.log(mass_N)
        return RowTargets(
            np.where(beyond_NS, 0, self.ids_NS),
            np.where(beyond_NS, np.float32(-np.inf), self.log_probabilities_NS - log_mass_N[:, None]),
            weights_NS / mass_N[:, None],
            None if self.log_tail_N is None else self.log_tail_N - log_mass_N,
        )


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """`RowTargets` of a whole batch. The divergence is sum_S w (log p - log q), and r (log r - log r_q) of the tail."""

    ids_NS: torch.Tensor
    """int64."""

    log_probabilities_NS: torch.Tensor
    weights_NS: torch.Tensor
    log_tail_N: torch.Tensor | None

    @classmethod
    def joined(cls, rows: Sequence[RowTargets]) -> SparseTargets:
        """The targets of several sequences one after another; rows with fewer kept tokens are filled at weight 0."""
        import torch

        width = max(row.ids_NS.shape[1] for row in rows)
        has_tail = rows[0].log_tail_N is not None
        assert all((row.log_tail_N is not None) == has_tail for row in rows)
        tails = [row.log_tail_N for row in rows if row.log_tail_N is not None]
        return cls(
            torch.from_numpy(np.concatenate([widened(row.ids_NS, width) for row in rows]).astype(np.int64)),
            torch.from_numpy(np.concatenate([widened(row.log_probabilities_NS, width, -np.inf) for row in rows])),
            torch.from_numpy(np.concatenate([widened(row.weights_NS, width) for row in rows])),
            torch.from_numpy(np.concatenate(tails)) if has_tail else None,
        )

    def rows(self, chosen: slice) -> SparseTargets:
        """Those of some of the tokens."""
        tail = None if self.log_tail_N is None else self.log_tail_N[chosen]
        return SparseTargets(self.ids_NS[chosen], self.log_probabilities_NS[chosen], self.weights_NS[chosen], tail)

    def to(self, device: torch.device) -> SparseTargets:
        """The same targets on a device."""
        tail = None if self.log_tail_N is None else self.log_tail_N.to(device, non_blocking=True)
        return SparseTargets(
            self.ids_NS.to(device, non_blocking=True),
            self.log_probabilities_NS.to(device, non_blocking=True),
            self.weights_NS.to(device, non_blocking=True),
            tail,
        )


def widened(values_NS: npt.NDArray[np.generic], width: int, filling: float = 0) -> npt.NDArray[np.generic]:
    """The same values with filling behind, up to `width` columns."""
    return np.pad(values_NS, ((0, 0), (0, width - values_NS.shape[1])), constant_values=filling)
