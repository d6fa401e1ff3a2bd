"""The teacher, loaded to be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from distilling.config import TeacherModelConfig
from training.attention import check_packable, register_varlen_attention
from training.batches import Batch
from training.config import ModelConfig
from training.evaluation import to_device
from training.losses import Head, LogitShape, check_logits, logit_shape, output_head
from training.models import load_with_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    is_packable: bool
    """Whether several samples may share a row of a batch."""

    @property
    def head(self) -> Head:
        return output_head(self.model)

    @property
    def logit_shape(self) -> LogitShape:
        return logit_shape(self.model)

    @property
    def vocabulary(self) -> int:
        """Logits that it gives, padding included."""
        return int(self.head.weight.shape[0])

    @torch.inference_mode()
    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """What the head is given for each token of a batch (training/batches.py), [tokens, width]."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if not self.is_packable:
            assert len(batch["cu_seq_lens_q"]) == 2, "one sample at a time"
            inputs = {"input_ids": batch["input_ids"]}
        hidden_BTH = self.model.base_model(**to_device(inputs, self.model.device), use_cache=False)[0]
        return hidden_BTH[0].to(self.head.weight.device)


def load_teacher(config: TeacherModelConfig, device: torch.device | None = None) -> Teacher:
    """The teacher on a device, or without one spread over all GPUs of this process, or on the CPU where it has none.

    ValueError where there is none under that name, or its logits are more than a linear head, a scale and a cap.
    """
    register_varlen_attention()
    model_config = ModelConfig(
        name=config.name,
        revision=config.revision,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    try:
        model, tokenizer = load_with_tokenizer(model_config, key="distillation.teacher_model", device=device)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"distillation.teacher_model: {config.name} does not fit into the memory of {device or 'all GPUs'}: "
            f"{error}\nAsk for a larger or for more GPUs, or set distillation.teacher_model.dtype: bfloat16; beside a "
            "student it needs more room than distillation.teacher: cache, which loads it alone"
        ) from error
    check_logits(model)
    return Teacher(model.eval().requires_grad_(False), tokenizer, use_packing(model))


def use_packing(model: PreTrainedModel) -> bool:
    """Let samples share rows where the model's attention can keep them apart; returns whether it can."""
    try:
        check_packable(model)
    except ValueError:
        return False
    model.set_attn_implementation("varlen")
    return True
