"""A chain of blocks gives the weights of one uninterrupted run, bit for bit."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetuning
from training.checkpoints import newest_valid
from training.run import BlockResult, FinetuningRun

MakeRun = Callable[..., FinetuningRun]


def train_to_the_end(run: FinetuningRun) -> list[BlockResult]:
    results = [finetuning.train(run)]
    while not results[-1].finished:
        results.append(finetuning.train(run))
    return results


def final_weights(run: FinetuningRun) -> dict[str, torch.Tensor]:
    checkpoint, rejected = newest_valid(run.folder.checkpoints)
    assert checkpoint is not None and not rejected
    return load_file(next(checkpoint.path.glob("*model.safetensors")))


def assert_identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture
def base_model(make_run: MakeRun, tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with weights, for adapters to stand on."""
    run = make_run("base", training={"lr": 1e-3})
    finetuning.train(run)
    return run.folder.export


KINDS = {
    "full": {},
    "lora": {"peft": True, "lora": {"dropout": 0.2, "r": 4}},
    "dora": {"peft": True, "peft_method": "dora", "lora": {"r": 4, "modules_to_save": ["lm_head"]}},
}


def model_keys(kind: str, base: Path) -> dict[str, object]:
    from training.config import LoraConfig

    keys = dict(KINDS[kind])
    if kind != "full":
        keys |= {"name": str(base), "from_scratch": False, "lora": LoraConfig(**keys["lora"])}  # type: ignore[arg-type]
    return keys


@pytest.mark.parametrize("kind", KINDS)
def test_four_blocks_equal_one_uninterrupted_run(kind: str, make_run: MakeRun, base_model: Path) -> None:
    keys = model_keys(kind, base_model)
    training = {"gradient_accumulation": 2, "save_every": 3, "max_grad_norm": 0.5, "weight_decay": 0.1}
    chain = make_run("chain", model=keys, training={**training, "epochs_per_job": 1, "total_jobs": 4})
    whole = make_run("whole", model=keys, training={**training, "epochs_per_job": 4, "total_jobs": 1})
    assert len(train_to_the_end(chain)) == 4
    assert len(train_to_the_end(whole)) == 1
    assert_identical(final_weights(chain), final_weights(whole))
