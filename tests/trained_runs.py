"""Runs of any trainer, trained to the end, the weights that they end with, and processes to train them in."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

import torch
from safetensors.torch import load_file

import distillation
import eagle3
import finetuning
from distilling.run import DistillationRun
from drafting.run import Eagle3Run
from training.checkpoints import newest_valid
from training.run import BlockResult, FinetuningRun, TrainerRun

TRAINERS = {FinetuningRun: finetuning, DistillationRun: distillation, Eagle3Run: eagle3}

Weights = dict[str, torch.Tensor]


def train_to_the_end(run: TrainerRun) -> list[BlockResult]:
    """Train all blocks that are left; where each of them ended."""
    trainer = TRAINERS[type(run)]
    results = [trainer.train(run)]
    while not results[-1].finished:
        results.append(trainer.train(run))
    return results


def final_weights(run: TrainerRun) -> Weights:
    """What the newest checkpoint holds; none must be damaged, and each epoch have had every row once."""
    checkpoint, rejected = newest_valid(run.folder.checkpoints)
    assert checkpoint is not None and not rejected
    assert checkpoint.ledger.whole_epochs == int(checkpoint.epoch)
    return load_file(next(checkpoint.path.glob("*model.safetensors")))


def trained_weights(run: TrainerRun) -> Weights:
    """What a run ends with, once it is trained to the end."""
    train_to_the_end(run)
    return final_weights(run)


def assert_identical(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def processes_that_start_fast() -> ForkServerContext:
    """Processes forked from one that has imported everything: each would begin with 5 s of imports."""
    context = multiprocessing.get_context("forkserver")
    trainers = [trainer.__name__ for trainer in TRAINERS.values()]
    context.set_forkserver_preload([*trainers, "training.trainer", "training.evaluation", "training.models", "peft"])
    return context
