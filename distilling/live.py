"""A teacher beside the student: what it has to say about each batch as it comes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distilling.config import HiddenStatesConfig
from distilling.divergences import DenseTeacher
from distilling.hidden_states import HiddenStates
from distilling.student import sliced
from distilling.teacher import Teacher
from training.batches import Batch
from training.losses import supervised_places


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that runs beside the student."""

    teacher: Teacher
    vocabulary: int
    """The number of tokens that it shares with the student."""

    hidden_states: HiddenStatesConfig
    layers: dict[int, int]
    """Student layer to teacher layer, where hidden states are matched."""

    def __post_init__(self) -> None:
        if not self.teacher.is_packable:
            raise ValueError(
                "distillation.teacher: live: the attention of this teacher cannot keep packed samples apart; use "
                "teacher: cache, which shows it one sample at a time"
            )

    @torch.no_grad()
    def of_batch(self, batch: Batch) -> tuple[DenseTeacher, HiddenStates | None]:
        """The teacher's distributions, and where they are matched its hidden states, at the supervised tokens."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        index = supervised_places(batch["labels"]).index
        outputs = self.teacher.model.base_model(**inputs, use_cache=False, output_hidden_states=bool(self.layers))
        dense = DenseTeacher(
            outputs[0].flatten(0, 1).index_select(0, index),
            sliced(self.teacher.head, self.vocabulary),
            self.teacher.logit_shape,
        )
        if not self.layers:
            return dense, None
        states = {layer: outputs.hidden_states[layer].flatten(0, 1)[index] for layer in set(self.layers.values())}
        return dense, HiddenStates(self.hidden_states, self.layers, states)
