"""Small drafts and targets for tests: a few thousand random parameters, of all families that a draft is made for."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from drafting.model import DraftModel, PackedSamples, draft_config

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

TARGETS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    # As in many sizes of it, the heads together are wider than the model.
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 10}),
    "mistral": (MistralConfig, {"tie_word_embeddings": False, "sliding_window": None, "num_key_value_heads": 4}),
}


def target_config(family: str = "llama", **changes: Any) -> PretrainedConfig:
    config_class, keys = TARGETS[family]
    return config_class(**{**SHAPE, **keys, **changes})


def random_draft(config: PretrainedConfig, *, draft_vocabulary: int = 20, seed: int = 0) -> DraftModel:
    """In float64, with norms that are not 1."""
    torch.manual_seed(seed)
    draft = DraftModel(draft_config(config, draft_vocabulary=draft_vocabulary)).double()
    for name, parameter in draft.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return draft


def packed(*lengths: int) -> PackedSamples:
    return PackedSamples(
        torch.cat([torch.arange(length) for length in lengths])[None],
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        max(lengths),
    )
