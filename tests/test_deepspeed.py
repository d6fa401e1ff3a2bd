"""DeepSpeed's ZeRO on two processes without a GPU, where its package is installed or lies on PYTHONPATH."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

import finetuning
from training.checkpoints import newest_valid
from training.config import DeepspeedConfig, LoraConfig
from training.ledger import Ledger
from training.run import FinetuningRun

MakeRun = Callable[..., FinetuningRun]

pytestmark = [
    pytest.mark.chain,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="the package deepspeed is not installed"),
]


def as_rank(rank: int, runs: list[FinetuningRun], has_little_room: bool = False) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    import deepspeed
    from accelerate.state import DistributedType, PartialState

    # accelerate looks for GPUs only where DeepSpeed trains.
    PartialState._prepare_backend = lambda *arguments: ("gloo", DistributedType.MULTI_CPU)  # type: ignore[method-assign]
    # A faster way for processes of one node to talk, which takes minutes to compile.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if has_little_room:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    for run in runs:
        while not finetuning.train(run).finished:
            pass


def train_on_two_ranks(runs: list[FinetuningRun]) -> None:
    context = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, mp_context=context) for _ in range(2)]
    for future in [pool.submit(as_rank, rank, runs) for rank, pool in enumerate(pools)]:
        future.result(timeout=200)
    for pool in pools:
        pool.shutdown()


def test_a_chain_under_zero_resumes_exactly_and_learns_as_ddp_does(make_run: MakeRun) -> None:
    training = {"lr": 1e-3, "batch_size": 2, "gradient_accumulation": 2, "log_every": 1}
    base = make_run("base", training=training)
    finetuning.train(base)
    lora = {"name": str(base.folder.export), "from_scratch": False, "peft": True, "lora": LoraConfig(dropout=0.1)}
    pairs = []
    offloaded = DeepspeedConfig(stage=1, offload_optimizer=True)
    kinds = {"full": ({}, DeepspeedConfig()), "lora": (lora, DeepspeedConfig()), "offloaded": ({}, offloaded)}
    for kind, (model, config) in kinds.items():
        zero = {**training, "parallelism": "deepspeed", "deepspeed": config}
        ddp = make_run(f"{kind}-ddp", model=model, training={**training, "epochs_per_job": 2})
        whole = make_run(f"{kind}-whole", model=model, training={**zero, "epochs_per_job": 2})
        chain = make_run(f"{kind}-chain", model=model, training={**zero, "total_jobs": 2})
        pairs.append((ddp, whole, chain))
    train_on_two_ranks([run for runs in pairs for run in runs])
    for ddp, whole, chain in pairs:
        for line, line_of_ddp in zip(whole.folder.metrics(), ddp.folder.metrics(), strict=True):
            assert line["loss"] == pytest.approx(line_of_ddp["loss"], rel=1e-5)
            assert line["grad_norm"] == pytest.approx(line_of_ddp["grad_norm"], rel=1e-3)
        weights, weights_of_chain = weights_of(whole), weights_of(chain)
        assert all(torch.equal(weights[name], weights_of_chain[name]) for name in weights)


def test_what_one_process_cannot_write_fails_on_both(make_run: MakeRun) -> None:
    run = make_run("run", training={"parallelism": "deepspeed"})
    context = multiprocessing.get_context("spawn")
    for without_room in (0, 1):
        pools = [ProcessPoolExecutor(1, mp_context=context) for _ in range(2)]
        for future in [pool.submit(as_rank, rank, [run], rank == without_room) for rank, pool in enumerate(pools)]:
            with pytest.raises(OSError, match="the checkpoint of step 4 could not be written"):
                future.result(timeout=100)
        for pool in pools:
            pool.shutdown()
    assert newest_valid(run.folder.checkpoints) == (None, [])


def weights_of(run: FinetuningRun) -> dict[str, torch.Tensor]:
    checkpoint, _ = newest_valid(run.folder.checkpoints)
    assert checkpoint is not None and checkpoint.ledger == Ledger(rows_per_epoch=13, whole_epochs=2)
    assert checkpoint.tied_to_split is not None
    return load_file(next(checkpoint.path.glob("*model.safetensors")))
