"""What finetuning asks of a phase. Each module beside this one is a phase."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from training.block import BlockStart
from training.checkpoints import Checkpoint
from training.distributed import Ranks
from training.run import FinetuningRun

if TYPE_CHECKING:
    from training.trainer import BlockTrainer


class Phase(Protocol):
    """One kind of rows, and how they are learned."""

    def build_trainer(self, run: FinetuningRun, start: BlockStart) -> BlockTrainer:
        """The trainer of a block."""

    def block_scores(self, run: FinetuningRun, trainer: BlockTrainer) -> dict[str, float]:
        """What is told of a block's end."""

    def scores(self, run: FinetuningRun, checkpoint: Checkpoint, ranks: Ranks) -> dict[str, Any]:
        """What evaluation.json holds."""

    def export(self, run: FinetuningRun, end: Checkpoint) -> None:
        """Write the trained model where `from_pretrained` can read it."""
