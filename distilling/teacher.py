"""The teacher, loaded to be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from distilling.config import TeacherModelConfig
from training.attention import check_packable
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


def load_teacher(config: TeacherModelConfig, device: torch.device | None = None, *, in_shards: bool = False) -> Teacher:
    """The teacher on a device, or without one spread over all GPUs of this process, or on the CPU where it has none.

    `in_shards`: its layers shared out over the processes of the block (training/frozen_shards.py).
    ValueError where there is none under that name, or its logits are more than a linear head, a scale and a cap.
    """
    model_config = ModelConfig(
        name=config.name,
        revision=config.revision,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    key = "distillation.teacher_model"
    try:
        model, tokenizer = load_with_tokenizer(model_config, key=key, device=device, in_shards=in_shards)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{key}: {config.name} does not fit into the memory of {device or 'all GPUs'}: {error}\n"
            f"Ask for a larger GPU, set {key}.dtype: bfloat16, share it out over the GPUs of a block with "
            "distillation.shard_teacher: true, or use distillation.teacher: cache, which loads it before the student"
        ) from error
    check_logits(model)
    return Teacher(model, tokenizer, use_packing(model))


def use_packing(model: PreTrainedModel) -> bool:
    """Let samples share rows where the model's attention can keep them apart; returns whether it can."""
    try:
        check_packable(model)
    except ValueError:
        return False
    model.set_attn_implementation("varlen")
    return True
