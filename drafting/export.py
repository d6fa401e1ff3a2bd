"""The exported draft: the files that vLLM, SGLang and TensorRT-LLM read, and what they would stumble over."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PretrainedConfig

from drafting.config import NUM_FEATURES, default_layers
from drafting.model import DraftModel
from drafting.vocabulary import DraftVocabulary
from training.export import replacing

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "draft_vocab_size",
    "torch_dtype",
)


def export_draft(
    draft: DraftModel,
    target: PretrainedConfig,
    vocabulary: DraftVocabulary,
    layers: Sequence[int],
    folder: Path,
    *,
    step: int,
    dtype: torch.dtype,
) -> list[str]:
    """Write config.json and model.safetensors, whole or not at all; what engines would stumble over, one line each."""
    with replacing(folder, step=step) as temporary:
        tensors = {name: tensor.detach().to(dtype).cpu().contiguous() for name, tensor in draft.state_dict().items()}
        if len(vocabulary) < vocabulary.target_size:  # engines have no room for a map where none is needed
            tensors["d2t"] = torch.from_numpy(vocabulary.offsets_D)
            tensors["t2d"] = torch.from_numpy(vocabulary.is_draft_token_V)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        config = exported_config(draft.config, layers, depth=target.num_hidden_layers, dtype=dtype)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        problems = lint(temporary, target)
    return problems


def exported_config(config: LlamaConfig, layers: Sequence[int], *, depth: int, dtype: torch.dtype) -> dict[str, Any]:
    """config.json: the rotation both as engines of today and as those of yesterday read it; layers only if unusual."""
    rotation = dict(config.rope_parameters)
    theta = rotation.pop("rope_theta")
    values = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": config.hidden_act,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": theta,
        "rope_scaling": None if rotation["rope_type"] == "default" else rotation,
        "rope_parameters": config.rope_parameters,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    if tuple(layers) != default_layers(depth):
        values["eagle_aux_hidden_state_layer_ids"] = list(layers)
    return values


def load_exported(folder: Path) -> tuple[DraftModel, torch.Tensor]:
    """An exported draft as it was written, and the target's id of each of its tokens, int64 [D]."""
    config = LlamaConfig(**json.loads((folder / CONFIG).read_text()))
    draft = DraftModel(config)
    tensors = load_file(folder / WEIGHTS)
    ids_D = torch.arange(config.draft_vocab_size) + tensors.pop("d2t", torch.tensor(0))
    tensors.pop("t2d", None)
    draft.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
    return draft, ids_D


# --- what engines would stumble over


def lint(folder: Path, target: PretrainedConfig) -> list[str]:
    """What vLLM, SGLang or TensorRT-LLM would refuse or, worse, read otherwise than it was trained; one line each."""
    config = json.loads((folder / CONFIG).read_text())
    missing = [key for key in SHAPE_KEYS if config.get(key) is None]
    if missing:
        return [f"{key} is missing from config.json, and no engine guesses it rightly" for key in missing]
    tensors = load_file(folder / WEIGHTS)
    return [*config_problems(config, target), *shape_problems(config, tensors), *map_problems(config, tensors)]


def config_problems(config: dict[str, Any], target: PretrainedConfig) -> list[str]:
    problems = []
    if config.get("architectures") != ["LlamaForCausalLMEagle3"] or config.get("model_type") != "llama":
        problems.append("architectures must be [LlamaForCausalLMEagle3] and model_type llama")
    if config.get("num_hidden_layers") != 1:
        problems.append(f"num_hidden_layers must be 1, got {config.get('num_hidden_layers')}")
    if config.get("tie_word_embeddings") is not False:
        problems.append("tie_word_embeddings must be false: SGLang refuses a tied draft head")
    if config.get("max_position_embeddings", 0) < target.max_position_embeddings:
        problems.append(
            f"max_position_embeddings {config.get('max_position_embeddings')} is below the target's "
            f"{target.max_position_embeddings}: SGLang refuses it, and guesses beyond it are worthless elsewhere"
        )
    for key, wanted in (("hidden_size", target.hidden_size), ("vocab_size", target.vocab_size)):
        if config.get(key) != wanted:
            problems.append(f"{key} {config.get(key)} is not the target's {wanted}")
    theta = target.rope_parameters["rope_theta"]
    if config.get("rope_theta") != theta:
        problems.append(f"rope_theta {config.get('rope_theta')} is not the {theta} that was trained")
    if config.get("rope_parameters") != target.rope_parameters:
        problems.append(f"rope_parameters {config.get('rope_parameters')} are not the trained {target.rope_parameters}")
    scaling = {key: value for key, value in target.rope_parameters.items() if key != "rope_theta"}
    if config.get("rope_scaling") != (None if scaling.get("rope_type") == "default" else scaling):
        problems.append(f"rope_scaling {config.get('rope_scaling')} is not the trained {scaling}")
    for key in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        if config.get(key):
            problems.append(f"{key} is another architecture, and SGLang would ignore it in silence")
    if "eagle_config" in config:
        problems.append("eagle_config numbers layers otherwise in SGLang than in vLLM; leave it out")
    if "eagle_aux_hidden_state_layer_ids" in config:
        problems.append(
            f"layers {config['eagle_aux_hidden_state_layer_ids']} are not 2, L // 2 and L - 3 of the target's "
            f"{target.num_hidden_layers}: vLLM reads them from config.json, and SGLang and TensorRT-LLM need to be told"
        )
    return problems


def shape_problems(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> list[str]:
    width, middle = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config["head_dim"] * config[count] for count in ("num_attention_heads", "num_key_value_heads"))
    expected: dict[str, tuple[int, ...]] = {
        "fc.weight": (width, NUM_FEATURES * width),
        "midlayer.self_attn.q_proj.weight": (queries, 2 * width),
        "midlayer.self_attn.k_proj.weight": (keys, 2 * width),
        "midlayer.self_attn.v_proj.weight": (keys, 2 * width),
        "midlayer.self_attn.o_proj.weight": (width, queries),
        "midlayer.mlp.gate_proj.weight": (middle, width),
        "midlayer.mlp.up_proj.weight": (middle, width),
        "midlayer.mlp.down_proj.weight": (width, middle),
        **{f"midlayer.{norm}.weight": (width,) for norm in ("hidden_norm", "input_layernorm")},
        "midlayer.post_attention_layernorm.weight": (width,),
        "norm.weight": (width,),
        "lm_head.weight": (config["draft_vocab_size"], width),
    }
    weights = {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    problems = [f"{name} is missing" for name in expected if name not in weights]
    for name, tensor in weights.items():
        if name not in expected:
            problems.append(f"{name} is unknown to the format, and SGLang would skip it in silence")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, not {expected[name]}")
        if str(tensor.dtype).removeprefix("torch.") != config["torch_dtype"]:
            problems.append(f"{name} is {tensor.dtype}, and config.json says {config['torch_dtype']}")
    return problems


def map_problems(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> list[str]:
    draft_size, target_size = config["draft_vocab_size"], config["vocab_size"]
    if draft_size == target_size:
        return [f"{name} has no place in a draft of the whole vocabulary" for name in ("d2t", "t2d") if name in tensors]
    missing = [f"{name} is missing" for name in ("d2t", "t2d") if name not in tensors]
    if missing:
        return missing
    offsets, known = tensors["d2t"], tensors["t2d"]
    problems = []
    if offsets.dtype != torch.int64 or tuple(offsets.shape) != (draft_size,):
        problems.append(f"d2t must be int64 [{draft_size}], got {offsets.dtype} {list(offsets.shape)}")
    if known.dtype != torch.bool or tuple(known.shape) != (target_size,):
        problems.append(f"t2d must be bool [{target_size}], got {known.dtype} {list(known.shape)}")
    if not problems:
        ids = offsets.numpy() + np.arange(draft_size)
        if not np.array_equal(ids, np.flatnonzero(known.numpy())):
            problems.append("d2t must hold offsets: draft id + d2t is not the list of tokens that t2d marks")
    return problems
