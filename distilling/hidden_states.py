"""Hidden states of the student drawn towards the teacher's, layer by layer, through projections if widths differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.functional import cosine_similarity, mse_loss
from transformers import PreTrainedModel

from distilling.config import HiddenStatesConfig

# Tensors are named by shape. N supervised tokens, B rows, T tokens, H and J widths of student and teacher.

PROJECTIONS = "hidden_state_projections"
"""Attribute of the student that holds the projections, so that they are trained and saved with it."""


@dataclass(frozen=True)
class HiddenStates:
    """The teacher's states at the supervised tokens of a batch, for each pair of layers that is matched."""

    config: HiddenStatesConfig
    layers: dict[int, int]
    """Student layer to teacher layer, counted from 1."""

    teacher_NJ: dict[int, torch.Tensor]
    """By teacher layer."""

    def distance(
        self, student_BTH: Sequence[torch.Tensor], places_N: torch.Tensor, projections: nn.ModuleDict | None
    ) -> torch.Tensor:
        """The distance of the states, summed over the tokens and averaged over the pairs of layers."""
        total = torch.zeros((), device=places_N.device)
        for layer, teacher_layer in self.layers.items():
            states_NH = student_BTH[layer].flatten(0, 1).index_select(0, places_N)
            if projections is not None:
                states_NH = projections[str(layer)](states_NH)
            teacher_NJ = self.teacher_NJ[teacher_layer].to(states_NH.dtype)
            if self.config.distance == "cosine":
                total = total + (1 - cosine_similarity(states_NH.float(), teacher_NJ.float())).sum()
            else:
                total = total + mse_loss(states_NH.float(), teacher_NJ.float(), reduction="none").mean(1).sum()
        return total / len(self.layers)


def matched_layers(config: HiddenStatesConfig, *, student_layers: int, teacher_layers: int) -> dict[int, int]:
    """Student layer to teacher layer, counted from 1; ValueError where a layer does not exist."""
    if not config.layers:
        return {layer: round(layer * teacher_layers / student_layers) for layer in range(1, student_layers + 1)}
    for layer, teacher_layer in config.layers.items():
        if not (1 <= layer <= student_layers and 1 <= teacher_layer <= teacher_layers):
            raise ValueError(
                f"distillation.hidden_states.layers: {layer}: {teacher_layer} names a layer that is not there; the "
                f"student has layers 1 to {student_layers}, the teacher 1 to {teacher_layers}"
            )
    return dict(config.layers)


def add_projections(student: PreTrainedModel, layers: dict[int, int], *, teacher_width: int, has_adapter: bool) -> None:
    """Give the student a trained linear map for each matched layer, where its width is not the teacher's.

    ValueError for a student with an adapter, whose checkpoints hold the adapter alone.
    """
    width = student.config.get_text_config().hidden_size
    if width == teacher_width:
        return
    if has_adapter:
        raise ValueError(
            f"distillation.hidden_states: the student is {width} wide and the teacher {teacher_width}, so a map "
            "between them would be trained, which an adapter cannot carry; set model.peft: false, or "
            "distillation.hidden_states.weight: 0"
        )
    projections = nn.ModuleDict({str(layer): nn.Linear(width, teacher_width, bias=False) for layer in layers})
    student.add_module(PROJECTIONS, projections)


def load_projections(student: PreTrainedModel, checkpoint: Path) -> None:
    """Take the projections from a checkpoint of the student, whose own weights were read before."""
    projections = getattr(student, PROJECTIONS, None)
    if projections is None:
        return
    weights: dict[str, torch.Tensor] = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(f"{PROJECTIONS}.")]  # noqa: SIM118  # no mapping
            weights |= {name.removeprefix(f"{PROJECTIONS}."): file.get_tensor(name) for name in names}
    projections.load_state_dict(weights)
