"""How many guesses of a draft a target would accept, told from the true tokens, without decoding anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from training.batches import IGNORED

# Tensors are named by shape. I steps, T tokens.

DEFINITION = (
    "1 + the sum over depths k of the share of positions whose first k guesses are all the target's most probable "
    "token, each guessed behind the true tokens; of positions whose next k tokens are all supervised; a token outside "
    "of the draft vocabulary is a miss"
)
"""What `simulated_acceptance_length` means. The 1 is the token that the target adds itself."""


@dataclass(frozen=True)
class Acceptance:
    """Counts of positions by depth; those of several batches can be added."""

    counts_3I: torch.Tensor
    """int64: positions whose guesses up to this depth are all supervised; those of them whose earlier guesses all hit;
    those of them whose guess at this depth hit too."""

    @classmethod
    def none(cls, steps: int, device: torch.device | str = "cpu") -> Acceptance:
        return cls(torch.zeros(3, steps, dtype=torch.int64, device=device))

    @classmethod
    def of_hits(cls, hits_IT: torch.Tensor, supervised_IT: torch.Tensor) -> Acceptance:
        supervised = supervised_IT.cumprod(0).bool()
        all_hit = hits_IT.cumprod(0).bool() & supervised
        reached = supervised & torch.cat([torch.ones_like(all_hit[:1]), all_hit[:-1]])
        return cls(torch.stack([supervised.sum(1), reached.sum(1), all_hit.sum(1)]))

    def __add__(self, other: Acceptance) -> Acceptance:
        return Acceptance(self.counts_3I + other.counts_3I)

    @property
    def joint(self) -> list[float]:
        """The share of positions whose guesses up to each depth all hit."""
        supervised, _, hit = self.counts_3I.tolist()
        return [one / max(of, 1) for one, of in zip(hit, supervised, strict=True)]

    @property
    def conditional(self) -> list[float]:
        """The share of hits at each depth, of the positions where all earlier guesses hit (n-alpha)."""
        _, reached, hit = self.counts_3I.tolist()
        return [one / max(of, 1) for one, of in zip(hit, reached, strict=True)]

    @property
    def simulated_length(self) -> float:
        """Tokens for each pass of the target; see DEFINITION."""
        return 1 + sum(self.joint)

    def as_json(self) -> dict[str, float]:
        by_depth = {f"acceptance_{depth}": share for depth, share in enumerate(self.conditional, start=1)}
        return {"simulated_acceptance_length": self.simulated_length, **by_depth}


def supervised_at_steps(labels_T: torch.Tensor, positions_T: torch.Tensor, *, steps: int) -> torch.Tensor:
    """Whether index p counts at step i, [I, T]: the token p + 2 + i is supervised and in the same sample as p."""
    supervised = torch.zeros(steps, len(labels_T), dtype=torch.bool, device=labels_T.device)
    for step in range(min(steps, max(len(labels_T) - 2, 0))):
        ahead = 2 + step
        supervised[step, :-ahead] = (labels_T[ahead:] != IGNORED) & (
            positions_T[ahead:] == positions_T[:-ahead] + ahead
        )
    return supervised
