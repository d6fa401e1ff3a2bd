"""Further updates of the weights from the same answers, inside one optimizer step of the chain."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rewarding.online import OnlineLoss
from training.run import NonFiniteLossError
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
            norm = trainer.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
            # float16 has a scaler, which skips updates whose gradients overflowed. What the trainer looks at before it
            # saves are loss and gradient of the first iteration.
            if trainer.accelerator.scaler is None and not bool(norm.isfinite()):
                raise NonFiniteLossError(
                    f"the norm of the gradient is {norm.item()} at iteration {self.loss.iteration + 1} of step "
                    f"{state.global_step + 1}. The newest checkpoint is from before. Try fewer iterations "
                    f"(finetuning.{self.loss.config.section}.iterations), a lower training.lr, or model.dtype: float32."
                )
