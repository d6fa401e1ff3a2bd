"""The target of a draft: a frozen model, read for three hidden states, its last ones, its embedding and its head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from drafting.config import NUM_FEATURES, Eagle3Config, feature_layers
from drafting.loss import Teacher
from drafting.vocabulary import DraftVocabulary, draft_vocabulary
from training.batches import Batch
from training.losses import output_head
from training.models import load_frozen_model, load_model_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from mixture.prepare import PreparedData
    from training.config import ModelConfig

# Tensors are named by shape. T tokens, H hidden width, F width of three hidden states, V its vocabulary, D draft
# vocabulary.


@dataclass(frozen=True)
class TargetStates:
    """What a target computed of some tokens."""

    features_1TF: torch.Tensor
    """The hidden states that enter the feature layers, the lowest layer first."""

    last_1TH: torch.Tensor
    """After the last norm: what the head turns into logits."""


@dataclass(frozen=True)
class Target:
    """A frozen model, the layers whose inputs a draft sees, and the tokens that the draft may guess.

    No module, so that no checkpoint takes it up.
    """

    network: PreTrainedModel
    layers: tuple[int, ...]
    vocabulary: DraftVocabulary

    def read(self, input_ids_1T: torch.Tensor, **arguments: Any) -> TargetStates:
        """Hidden states of tokens. `arguments`: positions, boundaries of packed samples, or a cache."""
        with torch.no_grad(), self.capturing() as features:
            outputs = self.network.base_model(
                input_ids=input_ids_1T, use_cache="past_key_values" in arguments, **arguments
            )
        return TargetStates(torch.cat([features[layer] for layer in self.layers], dim=-1), outputs.last_hidden_state)

    def read_batch(self, batch: Batch) -> TargetStates:
        """Hidden states of a batch of packed samples."""
        boundaries = {key: batch[key] for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")}
        return self.read(batch["input_ids"], position_ids=batch["position_ids"], **boundaries)

    @property
    def states_width(self) -> int:
        """Values of a token's states together."""
        return (NUM_FEATURES + 1) * int(self.network.config.get_text_config().hidden_size)

    @contextmanager
    def capturing(self) -> Iterator[dict[int, torch.Tensor]]:
        """Have the hidden states that enter the feature layers kept, by layer, and no others."""
        states: dict[int, torch.Tensor] = {}

        def keep(layer: int) -> Any:
            return lambda module, arguments: states.update({layer: arguments[0]})

        decoder = self.network.get_decoder()
        modules = [*decoder.layers, decoder.norm]
        hooks = [modules[layer].register_forward_pre_hook(keep(layer)) for layer in self.layers]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    def embed(self, input_ids_1T: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.network.get_input_embeddings()(input_ids_1T)

    def logits(self, last_1TH: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.nn.functional.linear(last_1TH.to(self.head_VH.dtype), self.head_VH)

    def teacher(self, states: TargetStates) -> Teacher:
        """What a draft is to guess behind each token of one row."""
        return Teacher(states.last_1TH[0], self.head_VH, self.draft_ids_D, self.draft_index_V)

    @property
    def device(self) -> torch.device:
        return self.head_VH.device

    @property
    def head_VH(self) -> torch.Tensor:
        return output_head(self.network).weight

    @cached_property
    def draft_ids_D(self) -> torch.Tensor:
        """The target's id of each draft token, on its device."""
        return torch.from_numpy(self.vocabulary.ids_D).to(self.device)

    @cached_property
    def draft_index_V(self) -> torch.Tensor:
        """The draft's id of each token, -1 outside of its vocabulary, on the target's device."""
        return torch.from_numpy(self.vocabulary.index_V).to(self.device)


def load_target(
    model: ModelConfig,
    prepared: PreparedData,
    config: Eagle3Config,
    device: torch.device,
    *,
    with_layers: bool = True,
) -> Target:
    """The run's model as a target, on a device, in the precision of its forward pass.

    Without its layers it is embedding and head, which a draft needs where all states come from a cache.
    ValueError for one without weights or without the layers that are asked for, and for data that suits no draft.
    """
    vocabulary, layers = tokens_and_layers(load_model_config(model).get_text_config(), prepared, config)
    network = load_frozen_model(
        model,
        attention=model.attention,
        layers=None if with_layers else 0,
        device=device,
        in_shards=config.shard_target and with_layers,
    )
    return Target(network, layers, vocabulary)


def tokens_and_layers(
    shape: PretrainedConfig, prepared: PreparedData, config: Eagle3Config
) -> tuple[DraftVocabulary, tuple[int, ...]]:
    """The tokens that the draft of a target may guess, and the layers whose inputs it sees; ValueError as above."""
    vocabulary = draft_vocabulary(
        prepared, target_size=shape.vocab_size, size=config.draft_vocabulary, min_coverage=config.min_coverage
    )
    return vocabulary, feature_layers(config.layers, depth=shape.num_hidden_layers)
