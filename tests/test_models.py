"""Models are built as asked, or refused with the key to change; exports are what from_pretrained reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetuning
from training.config import FsdpConfig, LoraConfig, ModelConfig
from training.models import build_model, load_tokenizer, parameters_hash, stop_token_ids
from training.run import FinetuningRun
from training.sharding import wrapped_modules

MakeRun = Callable[..., FinetuningRun]


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with random weights, in bfloat16."""
    folder = tmp_path_factory.mktemp("base")
    build_model(ModelConfig(name=str(tiny_model), from_scratch=True), seed=5).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(5, 15)[None]}


def test_random_weights_are_decided_by_the_seed(tiny_model: Path) -> None:
    config = ModelConfig(name=str(tiny_model), from_scratch=True)
    one, same, other = (build_model(config, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_loaded_weights_begin_where_new_ones_do_so_that_sums_round_the_same(tiny_model: Path, tmp_path: Path) -> None:
    config = ModelConfig(name=str(tiny_model), from_scratch=True)
    build_model(config, seed=5).save_pretrained(tmp_path)
    loaded = build_model(config, seed=5, checkpoint=tmp_path)
    assert {weight.data_ptr() % 64 for weight in loaded.parameters()} == {0}
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_full_finetuning_keeps_float32_weights_whatever_the_model_was_stored_in(base: Path) -> None:
    model = build_model(ModelConfig(name=str(base), dtype="bfloat16"), seed=1)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_is_float32_on_a_frozen_base_in_the_forward_s_precision(method: str, base: Path) -> None:
    config = ModelConfig(name=str(base), dtype="bfloat16", peft=True, peft_method=method, lora=LoraConfig(r=2))  # type: ignore[arg-type]
    model = build_model(config, seed=1)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}
    # 7 linear layers in each of 2 blocks; DoRA adds a magnitude to each pair of matrices.
    assert len(trained) == 14 * (3 if method == "dora" else 2)
    assert not any("lm_head" in name for name in trained)


def test_qlora_without_a_gpu_is_refused(base: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(ValueError, match="peft_method: qlora needs a CUDA device"):
        build_model(ModelConfig(name=str(base), peft=True, peft_method="qlora"), seed=1)


def test_an_unknown_model_is_refused_with_what_was_tried(tmp_path: Path) -> None:
    for load in (lambda config: build_model(config, seed=1), load_tokenizer):
        with pytest.raises(ValueError, match=r"model.name: no .* found under .*/missing.*\n?.*which does not exist"):
            load(ModelConfig(name=str(tmp_path / "missing")))


def test_a_model_without_weights_is_refused_with_the_way_to_random_ones(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"set model\.from_scratch: true"):
        build_model(ModelConfig(name=str(tiny_model)), seed=1)


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text()) | {"vocab_size": 4000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelConfig(name=str(tmp_path), tokenizer=str(tiny_model), from_scratch=True)
    with pytest.raises(ValueError, match=r"has 4096 tokens and .* embeds 4000"):
        build_model(model, seed=1)


def test_a_vision_tower_that_rows_of_texts_do_not_train_is_refused(base: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.train_vision: the rows hold no images"):
        build_model(ModelConfig(name=str(base), train_vision=True), seed=0)


def test_a_class_to_be_spread_that_the_model_does_not_have_is_refused(base: Path) -> None:
    network = build_model(ModelConfig(name=str(base)), seed=0)
    layers = wrapped_modules(network, FsdpConfig())
    assert wrapped_modules(network, FsdpConfig(wrap=["LlamaDecoderLayer"])) == layers
    with pytest.raises(ValueError, match=r"training\.fsdp\.wrap: .* has no module of the class Block; .*LlamaDecoder"):
        wrapped_modules(network, FsdpConfig(wrap=["LlamaDecoderLayer", "Block"]))


def test_unknown_adapter_layers_are_refused_with_the_layers_there_are(base: Path) -> None:
    config = ModelConfig(name=str(base), peft=True, lora=LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"model.lora: .*\n.*q_proj"):
        build_model(config, seed=1)


def test_the_hash_of_what_is_trained_covers_shapes_and_adapter_settings(base: Path) -> None:
    def hash_of(**lora: object) -> str:
        config = ModelConfig(name=str(base), peft=True, lora=LoraConfig(**lora))  # type: ignore[arg-type]
        return parameters_hash(build_model(config, seed=1), config)

    assert hash_of(r=2) == hash_of(r=2)
    assert len({hash_of(r=2), hash_of(r=3), hash_of(r=2, alpha=8), hash_of(r=2, target_modules=["q_proj"])}) == 4


def test_answers_stop_at_the_end_of_a_turn(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    stops = tokenizer.convert_ids_to_tokens(stop_token_ids(model, tokenizer))
    assert set(stops) == {"<|end|>", "<|im_end|>"}


def test_a_full_export_is_the_trained_model_with_its_tokenizer(make_run: MakeRun) -> None:
    run = make_run("run")
    end = finetuning.train(run)
    exported = AutoModelForCausalLM.from_pretrained(run.folder.export)
    trained = AutoModelForCausalLM.from_pretrained(run.folder.checkpoints / f"step_{end.step:08d}")
    assert torch.equal(exported(**batch()).logits, trained(**batch()).logits)
    assert AutoTokenizer.from_pretrained(run.folder.export).chat_template
    generation = json.loads((run.folder.export / "generation_config.json").read_text())
    assert sorted(generation["eos_token_id"]) == [2, 4]
    assert "varlen" not in (run.folder.export / "config.json").read_text()
    assert json.loads((run.folder.export / "config.json").read_text())["use_cache"]


def test_a_merged_export_answers_as_base_and_adapter_do(make_run: MakeRun, base: Path) -> None:
    from peft import PeftModel

    keys = {"name": str(base), "from_scratch": False, "peft": True, "merge_adapter": True, "lora": LoraConfig(r=4)}
    run = make_run("run", model={**keys, "dtype": "float32"}, training={"epochs_per_job": 3})
    finetuning.train(run)
    merged = AutoModelForCausalLM.from_pretrained(run.folder.export / "merged")
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = whole(**batch()).logits
    adapted = PeftModel.from_pretrained(whole, run.folder.export)
    torch.testing.assert_close(merged(**batch()).logits, adapted(**batch()).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, adapted(**batch()).logits, atol=1e-3)


def test_an_export_never_takes_a_folder_that_is_not_ours(make_run: MakeRun, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    run = make_run("run", model={"checkpoint_dir": str(precious)})
    with pytest.raises(ValueError, match=r"model.checkpoint_dir: .*precious exists and was not written by this kit"):
        finetuning.train(run)
    assert not run.folder.checkpoints.exists(), "refused before any training"
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]


def test_an_export_replaces_an_older_one_of_ours(make_run: MakeRun, tmp_path: Path) -> None:
    folder = tmp_path / "finetuned" / "model"
    for name in ("first", "second"):
        finetuning.train(make_run(name, model={"checkpoint_dir": str(folder)}))
    assert {path.name for path in folder.parent.iterdir()} == {"model"}
    assert (folder / "model.safetensors").exists()
