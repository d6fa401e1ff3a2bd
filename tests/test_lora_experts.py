"""LoRA experts: their mathematics, their balance, experts that wake over time, exact resume, exports, refusals."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetuning
from training.batches import flat_batch
from training.checkpoints import newest_valid
from training.config import LoraConfig, LoraExpertsConfig, ModelConfig
from training.lora_experts import ExpertLinear, ExpertsShape, Routing, balance, expert_layers
from training.models import build_model, export_model
from training.run import FinetuningRun

MakeRun = Callable[..., FinetuningRun]


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights."""
    folder = tmp_path_factory.mktemp("base")
    build_model(ModelConfig(name=str(tiny_model), from_scratch=True), seed=5).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def experts_model(base: Path, **experts: Any) -> dict[str, Any]:
    return {
        "name": str(base),
        "from_scratch": False,
        "peft": True,
        "peft_method": "lora_moe",
        "lora": LoraConfig(r=2, alpha=4, dropout=0.1),
        "experts": LoraExpertsConfig(**experts),
    }


def shape(**keys: Any) -> ExpertsShape:
    defaults = {"num_experts": 5, "top_k": 2, "r": 3, "alpha": 6, "dropout": 0.0, "target_modules": "all-linear"}
    return ExpertsShape(**{**defaults, **keys})


def expert_layer(*, num_awake: int = 5) -> ExpertLinear:
    torch.manual_seed(1)
    layer = ExpertLinear(nn.Linear(7, 4).requires_grad_(False), shape(), Routing(num_awake)).double()
    nn.init.normal_(layer.lora_B)
    nn.init.normal_(layer.router)
    return layer


def token_by_token(layer: ExpertLinear, inputs: torch.Tensor, *, num_awake: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and balance by the equations, with a loop over tokens and their experts."""
    outputs, probabilities, work = [], [], torch.zeros(num_awake, dtype=torch.float64)
    for token in inputs:
        p = torch.softmax(layer.router[:num_awake] @ token, 0)
        best = sorted(range(num_awake), key=lambda expert: -p[expert].item())[:2]
        total = sum(p[expert] for expert in best)
        update = sum(p[e] / total * (layer.lora_B[e] @ (layer.lora_A[e] @ token)) for e in best)
        outputs.append(layer.base_layer(token) + 6 / 3 * update)
        probabilities.append(p)
        work[best] += 1
    mean = torch.stack(probabilities).mean(0)
    return torch.stack(outputs), num_awake * (work / work.sum() * mean).sum()


@pytest.mark.parametrize("num_awake", [5, 3])
def test_a_layer_and_its_balance_are_those_of_the_equations_and_so_are_their_gradients(num_awake: int) -> None:
    layer = expert_layer(num_awake=num_awake)
    inputs = torch.randn(11, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    outputs, expected = layer(inputs[None])[0], token_by_token(layer, inputs, num_awake=num_awake)
    balanced = balance(*layer.take_routing())
    torch.testing.assert_close(outputs, expected[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(balanced, expected[1], atol=1e-12, rtol=1e-12)
    trained = [layer.lora_A, layer.lora_B, layer.router]
    ours = torch.autograd.grad(outputs.square().sum() + balanced, trained)
    theirs = torch.autograd.grad(expected[0].square().sum() + expected[1], trained)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)
    assert all(gradient[:num_awake].abs().sum() > 0 for gradient in ours)
    assert all(not gradient[num_awake:].any() for gradient in ours), "experts that sleep get no gradient"


def test_balance_is_1_where_all_work_alike_and_the_number_of_experts_where_one_does_all() -> None:
    even, one = torch.full((4,), 0.25), torch.tensor([1.0, 0, 0, 0])
    assert balance(even, even) == 1
    assert balance(one, one) == 4


def test_padding_takes_no_part_in_the_balance_and_packing_changes_nothing(base: Path) -> None:
    model = build_model(ModelConfig(**experts_model(base, num=5)), seed=1).train()
    for layer in expert_layers(model):
        layer.shape = replace(layer.shape, dropout=0.0)
    samples = [np.arange(5, 14), np.arange(30, 35)]
    rows = torch.zeros(2, 9, dtype=torch.long)
    mask = torch.zeros(2, 9, dtype=torch.long)
    for row, sample in enumerate(samples):
        rows[row, : len(sample)], mask[row, : len(sample)] = torch.from_numpy(sample), 1
    model(input_ids=rows, attention_mask=mask)
    padded = [layer.take_routing() for layer in expert_layers(model)]
    model(**flat_batch(samples, [np.ones(len(sample), dtype=bool) for sample in samples]))
    for (share, probability), layer in zip(padded, expert_layers(model), strict=True):
        packed_share, packed_probability = layer.take_routing()
        torch.testing.assert_close(share, packed_share)
        torch.testing.assert_close(probability, packed_probability, atol=1e-5, rtol=1e-5)


def test_recomputed_activations_give_the_routers_the_same_gradients(base: Path) -> None:
    gradients = []
    for recompute in (False, True):
        model = build_model(ModelConfig(**experts_model(base)), seed=1).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in expert_layers(model):
            layer.shape = replace(layer.shape, dropout=0.0)
        loss = model(**flat_batch([np.arange(5, 14)], [np.ones(9, dtype=bool)])).loss
        balances = [balance(*layer.take_routing()) for layer in expert_layers(model)]
        (loss + torch.stack(balances).mean()).backward()
        gradients.append([layer.router.grad for layer in expert_layers(model)])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and plain.abs().sum() > 0
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.chain
def test_experts_and_routers_learn_and_their_load_becomes_even(make_run: MakeRun, base: Path) -> None:
    begun = build_model(ModelConfig(**experts_model(base)), seed=1)
    before = {name: weight for name, weight in begun.named_parameters() if weight.requires_grad}
    balances = {}
    for coefficient in (0.0, 1.0):
        run = make_run(
            f"balance-{coefficient}",
            model=experts_model(base, num=4, top_k=1, balance_coefficient=coefficient),
            training={"epochs_per_job": 6, "log_every": 1},
        )
        finetuning.train(run)
        lines = list(run.folder.metrics())
        shares = [lines[-1][f"expert_{number}"] for number in (1, 2, 3, 4)]
        assert sum(shares) == pytest.approx(1)
        balances[coefficient] = lines[-1]["expert_balance"]
    assert 1 <= balances[1.0] < balances[0.0]
    checkpoint, _ = newest_valid(run.folder.checkpoints)
    assert checkpoint is not None
    after = dict(build_model(run.model, seed=9, checkpoint=checkpoint.path).named_parameters())
    assert all(not torch.equal(weight, after[name]) for name, weight in before.items())


@pytest.mark.chain
def test_experts_that_wake_over_time_are_the_same_over_four_blocks(make_run: MakeRun, base: Path) -> None:
    model = experts_model(base, num=2, top_k=2, grow_every_epochs=1, max_num=4)
    training = {"gradient_accumulation": 2, "save_every": 3, "log_every": 1}
    chain = make_run("chain", model=model, training={**training, "total_jobs": 4})
    whole = make_run("whole", model=model, training={**training, "epochs_per_job": 4})
    while not finetuning.train(chain).finished:
        pass
    finetuning.train(whole)
    ends = [newest_valid(run.folder.checkpoints)[0] for run in (chain, whole)]
    assert all(ends)
    one, other = ((end.path / "trained_model.safetensors").read_bytes() for end in ends if end)
    assert one == other
    awake = {
        int(np.ceil(line["epoch"])): sum(line[f"expert_{number}"] > 0 for number in (1, 2, 3, 4))
        for line in whole.folder.metrics()
    }
    assert awake == {1: 2, 2: 3, 3: 4, 4: 4}
    blocks = [event["eval_loss"] for event in chain.folder.events() if event["event"] == "block_end"]
    assert finetuning.evaluate(chain)["loss"] == pytest.approx(blocks[-1], abs=1e-6)


def test_an_export_answers_as_the_trained_model_without_this_project(base: Path, tmp_path: Path) -> None:
    config = ModelConfig(**experts_model(base, num=3, grow_every_epochs=1, max_num=5))
    model = build_model(config, seed=1).eval()
    for layer in expert_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    ids = torch.arange(5, 15)[None]
    expected = model(input_ids=ids).logits
    export_model(model, AutoTokenizer.from_pretrained(base), tmp_path / "export", step=1, config=config)
    assert json.loads((tmp_path / "export/adapter_config.json").read_text())["num_experts"] == 3, "the others slept on"
    assert "load_lora_experts(model, FOLDER)" in (tmp_path / "export/README.md").read_text()
    source = tmp_path / "export/lora_experts.py"
    assert "import training" not in source.read_text() and "from training" not in source.read_text()
    spec = importlib.util.spec_from_file_location("exported_lora_experts", source)
    assert spec is not None and spec.loader is not None
    exported = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = exported
    spec.loader.exec_module(exported)
    loaded = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-3)
    exported.load_lora_experts(loaded, tmp_path / "export")
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_layers_that_the_model_does_not_have_are_refused(base: Path) -> None:
    config = ModelConfig(**{**experts_model(base), "lora": LoraConfig(target_modules=["query"])})
    with pytest.raises(ValueError, match=r"model.lora: lora_moe does not fit this model: .*'query'.*\n.*q_proj"):
        build_model(config, seed=1)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"num": 2, "top_k": 3}, r"top_k must be from 1 to model.experts.num \(2\), got 3"),
        ({"grow_every_epochs": 1}, "need each other"),
        ({"grow_every_epochs": 1, "max_num": 2}, r"max_num must be at least num \(4\), got 2"),
        ({"balance_coefficient": -1.0}, "must not be negative"),
    ],
)
def test_experts_that_cannot_be_are_refused(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LoraExpertsConfig(**keys)
