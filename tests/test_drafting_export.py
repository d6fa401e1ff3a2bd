"""Exported drafts are what three engines read, and what they would stumble over is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drafting_models import TARGETS, target_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from drafting.export import export_draft, lint, load_exported
from drafting.model import PackedSamples, new_draft
from drafting.target import Target
from drafting.vocabulary import DraftVocabulary, most_frequent

LLAMA_3_ROTATION = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_target(
    family: str = "llama", *, draft_vocabulary: int = 20, layers: Any = (2, 3, 4), **changes: Any
) -> Target:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(target_config(family, **changes), dtype=torch.float32)
    vocabulary: DraftVocabulary = most_frequent(torch.arange(50).numpy(), size=draft_vocabulary)
    return Target(network.requires_grad_(False), layers, vocabulary)


def exported(target: Target, folder: Path) -> list[str]:
    draft = new_draft(target.network.config, target.head_VH[target.draft_ids_D], seed=1)
    shape = target.network.config.get_text_config()
    return export_draft(draft, shape, target.vocabulary, target.layers, folder, step=3, dtype=torch.float32)


@pytest.mark.parametrize("family", TARGETS)
def test_an_exported_draft_computes_what_the_trained_one_does(family: str, tmp_path: Path) -> None:
    target = make_target(family, rope_parameters=LLAMA_3_ROTATION)
    draft = new_draft(target.network.config, target.head_VH[target.draft_ids_D], seed=1)
    assert exported(target, tmp_path / "export") == []
    loaded, ids = load_exported(tmp_path / "export")
    assert torch.equal(ids, target.draft_ids_D)
    samples = PackedSamples(torch.arange(9)[None], torch.tensor([0, 9], dtype=torch.int32), 9)
    features, embeddings = torch.randn(1, 9, 72), torch.randn(1, 9, 24)
    with torch.no_grad():
        one, other = (model.logits(model.unroll(features, embeddings, samples, steps=3)) for model in (draft, loaded))
    assert torch.equal(one, other)


def test_the_files_are_in_the_format_of_the_engines(tmp_path: Path) -> None:
    assert exported(make_target(rope_parameters=LLAMA_3_ROTATION), tmp_path / "export") == []
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["vocab_size"], config["draft_vocab_size"], config["num_hidden_layers"]) == (50, 20, 1)
    assert (config["rope_theta"], config["max_position_embeddings"]) == (500000.0, 128)
    assert config["rope_scaling"] == {key: LLAMA_3_ROTATION[key] for key in LLAMA_3_ROTATION if key != "rope_theta"}
    assert config["rope_parameters"] == LLAMA_3_ROTATION
    assert config["tie_word_embeddings"] is False
    assert not any("layer_ids" in key or key == "eagle_config" for key in config)
    tensors = load_file(tmp_path / "export/model.safetensors")
    assert tensors["d2t"].dtype == torch.int64 and tensors["d2t"].tolist() == [30] * 20
    assert tensors["t2d"].dtype == torch.bool and tensors["t2d"].nonzero().squeeze(1).tolist() == list(range(30, 50))
    assert "embed_tokens.weight" not in tensors


def test_a_draft_of_the_whole_vocabulary_has_no_map(tmp_path: Path) -> None:
    assert exported(make_target(draft_vocabulary=50), tmp_path / "export") == []
    assert not load_file(tmp_path / "export/model.safetensors").keys() & {"d2t", "t2d"}
    assert load_exported(tmp_path / "export")[1].tolist() == list(range(50))


def test_layers_of_ones_own_are_named_and_said_to_be_unportable(tmp_path: Path) -> None:
    (problem,) = exported(make_target(layers=(1, 3, 5)), tmp_path / "export")
    assert problem.startswith("layers [1, 3, 5] are not 2, L // 2 and L - 3")
    assert json.loads((tmp_path / "export/config.json").read_text())["eagle_aux_hidden_state_layer_ids"] == [1, 3, 5]


def set_key(**values: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda config, tensors: config.update(values)


def set_tensor(**tensors: torch.Tensor) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda config, held: held.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (set_key(tie_word_embeddings=True), "tie_word_embeddings must be false"),
        (set_key(max_position_embeddings=64), "max_position_embeddings 64 is below the target's 128"),
        (set_key(rope_theta=10000.0), "rope_theta 10000.0 is not the 5000.0 that was trained"),
        (set_key(rope_scaling={"rope_type": "linear"}), "rope_scaling {'rope_type': 'linear'} is not the trained"),
        (set_key(norm_before_residual=True), "norm_before_residual is another architecture"),
        (set_key(eagle_config={}), "eagle_config numbers layers otherwise in SGLang"),
        (set_key(hidden_size=24, vocab_size=51), "vocab_size 51 is not the target's 50"),
        (set_key(torch_dtype="bfloat16"), "and config.json says bfloat16"),
        (set_tensor(fc__weight=torch.zeros(24, 48)), "fc.weight has shape (24, 48), not (24, 72)"),
        (set_tensor(midlayer__mlp__bias=torch.zeros(4)), "midlayer.mlp.bias is unknown to the format"),
        (set_tensor(d2t=torch.arange(20)), "d2t must hold offsets"),
        (set_tensor(d2t=torch.full((20,), 30, dtype=torch.int32)), "d2t must be int64 [20]"),
        (set_tensor(t2d=torch.zeros(49, dtype=torch.bool)), "t2d must be bool [50]"),
        (lambda config, tensors: tensors.pop("norm.weight"), "norm.weight is missing"),
        (lambda config, tensors: tensors.pop("d2t"), "d2t is missing"),
        (lambda config, tensors: config.pop("draft_vocab_size"), "draft_vocab_size is missing"),
    ],
)
def test_what_an_engine_would_stumble_over_is_said(
    damage: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], said: str, tmp_path: Path
) -> None:
    target = make_target()
    exported(target, tmp_path / "export")
    config_file, weights_file = tmp_path / "export/config.json", tmp_path / "export/model.safetensors"
    config, tensors = json.loads(config_file.read_text()), load_file(weights_file)
    damage(config, tensors)
    config_file.write_text(json.dumps(config))
    save_file(tensors, weights_file)
    assert any(said in problem for problem in lint(tmp_path / "export", target.network.config))


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="was not written by this kit"):
        exported(make_target(), tmp_path)


@pytest.mark.parametrize("family", TARGETS)
def test_features_are_what_enters_the_layers_as_transformers_tells_it(family: str) -> None:
    target = make_target(family, layers=(0, 2, 6))
    ids = torch.randint(0, 50, (1, 9))
    states = target.read(ids)
    expected = target.network(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(states.features_1TF, torch.cat([expected[0], expected[2], expected[6]], dim=-1))
    assert torch.equal(states.last_1TH, expected[7])
    torch.testing.assert_close(target.logits(states.last_1TH), target.network(input_ids=ids).logits)
    behind_the_last = make_target(family, layers=(0, 2, 7)).read(ids).features_1TF[..., -24:]
    torch.testing.assert_close(target.network.get_decoder().norm(behind_the_last), expected[7])
