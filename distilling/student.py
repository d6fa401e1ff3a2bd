"""The student: its forward pass returns the distillation loss, so that adapters, DDP and FSDP work unchanged."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from distilling.config import DistillationConfig
from distilling.divergences import DenseTeacher, LossSettings, distillation_loss
from distilling.hidden_states import PROJECTIONS, HiddenStates
from distilling.targets import SparseTargets
from training.losses import Head, check_logits, logit_shape, output_head, supervised_places

# Tensors are named by shape. B rows, T tokens, N supervised tokens, H hidden width, V vocabulary.


@dataclass
class DistillationOutput(ModelOutput):
    """What the student's forward pass returns when it is given labels."""

    loss: torch.Tensor | None = None
    """With its graph, divided by `num_items_in_batch`."""

    cross_entropy: torch.Tensor | None = None
    """Sum over the supervised tokens, as it is reported; so are the two others."""

    divergence: torch.Tensor | None = None
    hidden_states_distance: torch.Tensor | None = None


CROSS_ENTROPY = LossSettings(divergence="forward_kl", weight=0.0, temperature=1.0, skew=0.5, mixing=0.5)
"""The data alone: no teacher is asked."""


def loss_settings(config: DistillationConfig) -> LossSettings:
    """The part of the settings that shapes the loss of a token; the data's alone where no teacher is asked."""
    settings = LossSettings.of(config)
    return settings if config.teacher in ("cache", "live") else replace(settings, weight=0.0)


def use_distillation_loss(student: PreTrainedModel, *, vocabulary: int | None) -> None:
    """Makes the student's forward compute its loss against a teacher when it is given labels.

    `vocabulary`: the number of tokens that student and teacher share, the padding of either head left out; None where
    there is no teacher. Without labels the forward is the model's own.
    Raises ValueError for a model whose logits are not a (scaled, capped) linear head on its decoder's output.
    """
    check_logits(student)

    # The class's forward lends its signature: Trainer reads from it which columns the model takes.
    @functools.wraps(type(student).forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is None:
            return type(self).forward(self, *args, **kwargs)
        return _forward_with_loss(self, *args, vocabulary=vocabulary, **kwargs)

    student.forward = types.MethodType(forward, student)
    # Read by Trainer, which then passes num_items_in_batch.
    student.accepts_loss_kwargs = True


def _forward_with_loss(
    student: PreTrainedModel,
    *args: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor,
    settings: LossSettings,
    teacher: SparseTargets | DenseTeacher | None = None,
    token_weights: torch.Tensor | None = None,
    hidden_states: HiddenStates | None = None,
    vocabulary: int | None,
    **kwargs: Any,
) -> DistillationOutput:
    kwargs = {"use_cache": False, **kwargs, "output_hidden_states": hidden_states is not None}
    outputs = student.base_model(*args, **kwargs)
    places = supervised_places(labels)
    hidden_NH = outputs[0].flatten(0, 1).index_select(0, places.index)
    parts = distillation_loss(
        hidden_NH,
        sliced(output_head(student), vocabulary),
        places.targets,
        teacher,
        settings,
        token_weights_N=token_weights,
        shape=logit_shape(student),
    )
    num_items = num_items_in_batch.to(hidden_NH.device).clamp(min=1)
    loss = parts.loss / num_items
    distance = None
    if hidden_states is not None:
        distance = hidden_states.distance(outputs.hidden_states, places.index, getattr(student, PROJECTIONS, None))
        loss = loss + hidden_states.config.weight * distance / num_items
    return DistillationOutput(
        loss=loss,
        cross_entropy=parts.cross_entropy,
        divergence=parts.divergence,
        hidden_states_distance=None if distance is None else distance.detach(),
    )


def sliced(head: Head, vocabulary: int | None) -> Head:
    """The rows of a head that stand for tokens: models pad their heads to round sizes."""
    if vocabulary is None or vocabulary == len(head.weight):
        return head
    return Head(head.weight[:vocabulary], None if head.bias is None else head.bias[:vocabulary])
