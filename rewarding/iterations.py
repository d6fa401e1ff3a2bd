"""Further updates of the weights from the same answers, inside one optimizer step of the chain."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rewarding.online import OnlineLoss
from training.trainer import BlockTrainer


class FurtherIterations(TrainerCallback):
    """Makes all updates of a step but the last, which is the trainer's own.

    A step of the chain holds all updates from its answers, so nothing of them has to be kept between steps: a chain
    that is stopped after any step goes on bit for bit.
    """

    def __init__(self, trainer: BlockTrainer, loss: OnlineLoss) -> None:
        self.trainer = trainer
        self.loss = loss

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are there and clipped: take the step, and make those of the next iteration."""
        trainer, model = self.trainer, self.trainer.model_wrapped
        items = torch.tensor(self.loss.items, device=args.device)
        for _ in range(self.loss.config.iterations - 1):
            trainer.optimizer.step()
            self.loss.iteration += 1
            model.zero_grad()
            for batch in self.loss.batches:
                trainer.training_step(model, batch, items)
            if args.max_grad_norm > 0:
                trainer.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
