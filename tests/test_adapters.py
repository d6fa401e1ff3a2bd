"""Every kind of adapter: exact over a resume, loss without logits, exports that peft reads, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetuning
from jobs.preflight import find_adapter
from training.adapter_options import (
    EXPERTS,
    LORA_FAMILY,
    NOT_MERGEABLE,
    REFUSED,
    adapter_method,
    adapter_problems,
    config_classes,
    is_prompt_method,
    method_names,
)
from training.adapters import load_adapter_state, save_adapter_state, trained_names
from training.batches import flat_batch
from training.checkpoints import newest_valid
from training.config import LoraConfig, ModelConfig
from training.models import build_model, export_model
from training.run import FinetuningRun
from training.schedule import Horizon, first_horizon_steps

MakeRun = Callable[..., FinetuningRun]

# Made for widths of thousands; the test model is 16 wide.
SMALLER: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 20},
    "waveft": {"n_frequency": 20},
    "frod": {"progressbar": False},
    "miss": {"r": 4},
    "psoft": {"r": 4},
    "road": {"group_size": 8},
    "shira": {"r": 2, "random_seed": 1},
    "vblora": {"vector_length": 8, "num_vectors": 8, "topk": 2},
    "trainable_tokens": {"token_indices": list(range(5, 200))},
    "prefix_tuning": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8},
    "p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "cartridge": {"num_virtual_tokens": 3},
    "lora": {"init_lora_weights": "pissa"},
    "rslora": {"init_lora_weights": "olora"},
}
METHODS = [name for name in method_names() if name not in ("qlora", EXPERTS)]


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights."""
    folder = tmp_path_factory.mktemp("base")
    build_model(ModelConfig(name=str(tiny_model), from_scratch=True), seed=5).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def with_an_output_head_of_its_own(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    build_model(ModelConfig(name=str(folder), from_scratch=True), seed=5).save_pretrained(folder)
    return folder


def test_trained_tokens_that_are_also_the_output_head_are_refused(base: Path) -> None:
    with pytest.raises(ValueError, match=r"model.adapter: trainable_tokens does not fit this model: the output head"):
        build_model(model_config("trainable_tokens", base), seed=1)


def batch(seed: int) -> dict[str, Any]:
    """Two samples of unequal length in one flat row, the first token of each unsupervised."""
    generator = np.random.default_rng(seed)
    ids = [generator.integers(5, 200, size=length) for length in (9, 5)]
    return flat_batch(ids, [np.ones(len(tokens), dtype=bool) for tokens in ids])


def train(model: Any, steps: range, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    for step in steps:
        torch.manual_seed(step)
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def model_config(method: str, base: Path, **keys: Any) -> ModelConfig:
    lora = LoraConfig(r=4, dropout=0.1)
    return ModelConfig(
        name=str(base), peft=True, peft_method=method, lora=lora, adapter=SMALLER.get(method, {}), **keys
    )


@pytest.mark.chain
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_goes_on_exactly_and_is_exported_whole(method: str, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    if method == "trainable_tokens":
        base = with_an_output_head_of_its_own(base, tmp_path / "untied")
    mergeable = not is_prompt_method(method) and method not in NOT_MERGEABLE
    config = model_config(method, base, merge_adapter=mergeable)
    whole, first = build_model(config, seed=3), build_model(config, seed=3)
    optimizers = [torch.optim.AdamW((p for p in m.parameters() if p.requires_grad), lr=1e-2) for m in (whole, first)]
    train(whole, range(4), optimizers[0])
    train(first, range(2), optimizers[1])
    save_adapter_state(first, tmp_path, names=trained_names(first), weights=None)
    second = build_model(config, seed=3, checkpoint=tmp_path)
    optimizer = torch.optim.AdamW((p for p in second.parameters() if p.requires_grad), lr=1e-2)
    optimizer.load_state_dict(optimizers[1].state_dict())
    train(second, range(2, 4), optimizer)
    for (name, one), (_, other) in zip(whole.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name

    plain = {"input_ids": batch(9)["input_ids"], "attention_mask": torch.ones(1, 14, dtype=torch.long)}
    untouched = AutoModelForCausalLM.from_pretrained(base)
    with torch.inference_mode():
        trained = whole.eval()(**plain).logits
        assert not torch.allclose(trained[:, -14:], untouched(**plain).logits, atol=1e-4), "it learned something"
        export_model(whole, AutoTokenizer.from_pretrained(base), tmp_path / "export", step=4, config=config)
        loaded = PeftModel.from_pretrained(untouched, tmp_path / "export").eval()
        torch.testing.assert_close(loaded(**plain).logits, trained, atol=1e-5, rtol=1e-5)
        if mergeable:
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / "export/merged")
            torch.testing.assert_close(merged(**plain).logits, trained, atol=1e-4, rtol=1e-4)
    card = (tmp_path / "export/README.md").read_text()
    assert f"Kind: {method}" in card and "PeftModel.from_pretrained" in card and str(base) in card


@pytest.mark.parametrize("method", [name for name in METHODS if is_prompt_method(name)])
def test_a_prompt_stands_before_every_sample_of_a_flat_batch(method: str, base: Path) -> None:
    model = build_model(model_config(method, base), seed=3).eval()
    flat = batch(1)
    alone = [
        model(input_ids=ids[None], attention_mask=torch.ones(1, len(ids)), labels=labels[None]).loss * (len(ids) - 1)
        for ids, labels in zip(flat["input_ids"][0].split([9, 5]), flat["labels"][0].split([9, 5]), strict=True)
    ]
    together = model(**flat, num_items_in_batch=torch.tensor(1.0)).loss
    torch.testing.assert_close(together, sum(alone), atol=1e-4, rtol=1e-5)


@pytest.mark.chain
def test_ranks_are_allocated_the_same_over_two_blocks_and_held_out_losses_are_plain(
    make_run: MakeRun, base: Path
) -> None:
    options = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 6}
    keys = {
        "model": {"name": str(base), "from_scratch": False, "peft": True, "peft_method": "adalora", "adapter": options}
    }
    training = {"gradient_accumulation": 2}
    chain = make_run("chain", **keys, training={**training, "total_jobs": 3})
    whole = make_run("whole", **keys, training={**training, "epochs_per_job": 3})
    while not finetuning.train(chain).finished:
        pass
    finetuning.train(whole)
    one, other = (newest_valid(run.folder.checkpoints)[0] for run in (chain, whole))
    assert one is not None and other is not None
    files = [(checkpoint.path / "trained_model.safetensors").read_bytes() for checkpoint in (one, other)]
    assert files[0] == files[1]
    config = json.loads((whole.folder.export / "adapter_config.json").read_text())
    assert config["total_step"] == one.step == 12
    assert sum(map(sum, config["rank_pattern"].values())) == options["target_r"] * len(config["rank_pattern"])
    (event,) = [event for event in whole.folder.events() if event["event"] == "block_end"]
    assert finetuning.evaluate(whole)["loss"] == pytest.approx(event["eval_loss"], abs=1e-5)


def test_a_chain_too_short_for_its_ranks_is_refused(make_run: MakeRun, base: Path) -> None:
    keys = {"name": str(base), "from_scratch": False, "peft": True, "peft_method": "adalora", "adapter": {"tinit": 90}}
    with pytest.raises(ValueError, match=r"model.adapter.tinit \(90\) and .* leave none of the chain's 7 optimizer"):
        finetuning.train(make_run("run", model=keys))


def test_an_extension_leaves_the_horizon_that_ranks_fall_in(make_run: MakeRun) -> None:
    from training.config import Extension

    run = make_run("run", training={"extensions": [Extension(jobs=2, lr_policy="constant", from_step=7)]})
    horizon = Horizon.of(run.training, num_rows=13, world_size=1)
    assert (horizon.total_steps, first_horizon_steps(horizon, run.training)) == (21, 7)


def test_every_method_of_peft_is_offered_or_refused_with_a_reason() -> None:
    assert set(config_classes()) - {*method_names()} == set(REFUSED)
    assert {"adalora", "ia3", "vera", "loha", "oft", "prefix_tuning", "ln_tuning", *LORA_FAMILY} <= {*method_names()}


def test_the_options_that_are_read_from_peft_s_sources_are_those_that_it_has() -> None:
    from dataclasses import fields

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for name in METHODS:
        config = PEFT_TYPE_TO_CONFIG_MAPPING["LORA" if name in LORA_FAMILY else name.upper()]
        assert set(adapter_method(name).options) <= {field.name for field in fields(config)}


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("adalroa", {}, "no adapter is called 'adalroa'; did you mean adalora?"),
        ("poly", {}, "model.peft_method: poly asks for the task of each row"),
        ("loha", {"rank": 3}, "model.adapter.rank: loha has no such option"),
        ("loha", {"rank_dropuot": 0.1}, "did you mean model.adapter.rank_dropout?"),
        ("vera", {"r": "much"}, "model.adapter.r: expected a whole number, got 'much'"),
        ("lora", {"r": 3}, "model.adapter.r is decided by model.lora.r; remove it"),
        ("lora", {"init_lora_weights": "eva"}, "looks at data"),
        ("lora", {"init_lora_weights": "pisa"}, "expected true or false or one of gaussian"),
        ("adalora", {"total_step": 9}, "is decided by the length of the chain"),
        ("prefix_tuning", {}, "model.adapter.num_virtual_tokens is missing"),
        ("lora_moe", {"r": 3}, "lora_moe is told by model.lora and model.experts"),
    ],
)
def test_what_an_adapter_cannot_be_is_told_before_the_queue(method: str, options: dict[str, Any], told: str) -> None:
    problems = adapter_problems(method, options, merge=False)
    assert len(problems) == 1 and told in problems[0], problems
    with pytest.raises(ValueError, match="model"):
        ModelConfig(name="x", peft=True, peft_method=method, adapter=options)


def test_a_fast_svd_of_any_number_of_iterations_is_an_initialisation() -> None:
    assert adapter_problems("lora", {"init_lora_weights": "pissa_niter_16"}, merge=False) == []


@pytest.mark.parametrize("method", ["prompt_tuning", "lily", EXPERTS])
def test_what_cannot_be_merged_is_refused_with_the_reason(method: str) -> None:
    assert (
        f"model.merge_adapter: {method} cannot be merged: "
        in adapter_problems(method, SMALLER.get(method, {}), merge=True)[-1]
    )


def test_an_adapter_that_fits_no_layer_is_refused_with_the_key_and_the_layers(base: Path) -> None:
    config = ModelConfig(name=str(base), peft=True, peft_method="loha", adapter={"target_modules": ["query"]})
    with pytest.raises(ValueError, match=r"model.adapter: loha does not fit this model: .*\n.*q_proj"):
        build_model(config, seed=1)


@pytest.mark.chain
@pytest.mark.parametrize("peft", [True, False])
def test_adapters_trained_before_are_merged_below_what_is_trained_next(
    peft: bool, base: Path, tmp_path: Path, make_run: MakeRun
) -> None:
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(base)
    for name, seed in (("first", 1), ("second", 2)):
        config = replace(model_config("lora", base), adapter={})
        model = build_model(config, seed=seed)
        train(model, range(seed, seed + 3), torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-2))
        export_model(model, tokenizer, tmp_path / name, step=3, config=config)
    adapters = [str(tmp_path / name) for name in ("first", "second")]
    keys = {"name": str(base), "from_scratch": False, "adapters": adapters, "peft": peft, "merge_adapter": peft}
    run = make_run("run", model=keys, training={"lr": 1e-9, "total_jobs": 2})
    finetuning.train(run)
    finetuning.train(run)
    expected = AutoModelForCausalLM.from_pretrained(base)
    for adapter in adapters:
        expected = PeftModel.from_pretrained(expected, adapter).merge_and_unload()
    whole = AutoModelForCausalLM.from_pretrained(run.folder.export / ("merged" if peft else ""))
    ids = {"input_ids": batch(9)["input_ids"]}
    torch.testing.assert_close(whole(**ids).logits, expected(**ids).logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_to_merge_must_be_there_and_of_a_kind_that_can_be_merged(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder nowhere with an adapter_config.json"):
        find_adapter("nowhere", tmp_path)
    config = model_config("prompt_tuning", base)
    export_model(
        build_model(config, seed=1), AutoTokenizer.from_pretrained(base), tmp_path / "p", step=1, config=config
    )
    with pytest.raises(ValueError, match=r"cannot be merged: it is of the kind prompt_tuning, and what it learns"):
        find_adapter("p", tmp_path)


def test_a_checkpoint_of_another_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    model = build_model(model_config("ia3", base), seed=1)
    save_adapter_state(model, tmp_path, names=trained_names(model), weights=None)
    with pytest.raises(ValueError, match=r"holds another adapter than model.peft_method makes"):
        load_adapter_state(build_model(model_config("loha", base), seed=1), tmp_path)
