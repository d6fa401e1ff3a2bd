"""Processes of a block meet without a fixed port, train one model together, and resume together."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetuning
from training.checkpoints import newest_valid
from training.config import LoraConfig
from training.distributed import Ranks, agree_on_any, failing_together, from_main, join_ranks, tasks_on_node
from training.ledger import Ledger
from training.run import FinetuningRun

MakeRun = Callable[..., FinetuningRun]


OnTwoRanks = Callable[..., list[object]]


@pytest.fixture(scope="module")
def on_two_ranks() -> Iterator[OnTwoRanks]:
    """on_two_ranks(function, ...): what it returns on rank 0 and on rank 1 of two processes, which stay up."""
    context = multiprocessing.get_context("spawn")
    ranks = [ProcessPoolExecutor(1, mp_context=context) for _ in range(2)]

    def run(function: Callable[..., object], *arguments: object) -> list[object]:
        futures = [pool.submit(as_rank, rank, function, *arguments) for rank, pool in enumerate(ranks)]
        return [future.result(timeout=200) for future in futures]

    yield run
    for pool in ranks:
        pool.shutdown()


def as_rank(rank: int, function: Callable[..., object], *arguments: object) -> object:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    return function(*arguments)


def meet(folder: Path) -> tuple[list[bool], str, str]:
    ranks = Ranks.of_environment()
    join_ranks(folder, ranks)
    try:
        with failing_together():
            if not ranks.is_main:
                raise ArithmeticError("mine alone")
    except (ArithmeticError, RuntimeError) as error:
        failure = type(error).__name__
    return agree_on_any(ranks.rank == 1, False), from_main(f"from {ranks.rank}"), failure


def test_two_processes_meet_through_the_run_folder_and_agree(on_two_ranks: OnTwoRanks, tmp_path: Path) -> None:
    (tmp_path / f".rendezvous-local-{os.getpid()}").write_text("127.0.0.1 1")  # left by a launch that was killed
    first, second = on_two_ranks(meet, tmp_path)
    assert first == ([True, False], "from 0", "RuntimeError")
    assert second == ([True, False], "from 0", "ArithmeticError")
    assert not list(tmp_path.glob(".rendezvous*"))


def train_all(runs: list[FinetuningRun]) -> None:
    for run in runs:
        while not finetuning.train(run).finished:
            pass


def test_two_ranks_resume_exactly_and_see_the_loss_that_one_rank_sees(
    on_two_ranks: OnTwoRanks, make_run: MakeRun
) -> None:
    training = {"lr": 1e-3, "batch_size": 2, "log_every": 1}
    one_rank = make_run("one-rank", training={**training, "batch_size": 4, "epochs_per_job": 2})
    whole = make_run("whole", training={**training, "epochs_per_job": 2})
    chain = make_run("chain", training={**training, "total_jobs": 2, "save_every": 3})
    train_all([one_rank])
    base = {"name": str(one_rank.folder.export), "from_scratch": False, "peft": True}
    adapter = {"model": {**base, "lora": LoraConfig(dropout=0.1)}}
    whole_adapter = make_run("whole-adapter", **adapter, training={**training, "epochs_per_job": 2})
    chain_adapter = make_run("chain-adapter", **adapter, training={**training, "total_jobs": 2})
    on_two_ranks(train_all, [chain, whole, chain_adapter, whole_adapter])

    assert_same_weights(chain, whole)
    assert_same_weights(chain_adapter, whole_adapter)
    rows = 13
    assert rows % 4 == 1, "the last step of an epoch leaves rank 1 without a row"
    one, two = list(one_rank.folder.metrics()), list(whole.folder.metrics())
    assert len(one) == len(two) == 2 * 4
    for line_of_one, line_of_two in zip(one, two, strict=True):
        assert line_of_two["loss"] == pytest.approx(line_of_one["loss"], abs=1e-5)
        assert line_of_two["grad_norm"] == pytest.approx(line_of_one["grad_norm"], rel=1e-4)
        # An empty batch is one token.
        assert 0 <= line_of_two["tokens"] - line_of_one["tokens"] <= 2
    end_of_one, end_of_two = (newest_valid(run.folder.checkpoints)[0] for run in (one_rank, whole))
    assert end_of_one is not None and end_of_two is not None
    assert end_of_one.samples == end_of_two.samples == 2 * rows
    end_of_chain, _ = newest_valid(chain.folder.checkpoints)
    assert end_of_chain is not None
    each_row_once = Ledger(rows_per_epoch=rows, whole_epochs=2)
    assert end_of_one.ledger == end_of_two.ledger == end_of_chain.ledger == each_row_once
    assert sorted(path.name for path in end_of_two.path.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    losses = [
        [event["eval_loss"] for event in run.folder.events() if event["event"] == "block_end"]
        for run in (one_rank, whole)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_chain_begun_on_two_ranks_is_not_resumed_on_one(on_two_ranks: OnTwoRanks, make_run: MakeRun) -> None:
    run = make_run("run", training={"batch_size": 2, "total_jobs": 2})
    on_two_ranks(finetuning.train, run)
    with pytest.raises(ValueError, match="world_size: 2 -> 1"):
        finetuning.train(replace(run, training=replace(run.training, batch_size=4)))


def assert_same_weights(one: FinetuningRun, other: FinetuningRun) -> None:
    weights = []
    for run in (one, other):
        checkpoint, _ = newest_valid(run.folder.checkpoints)
        assert checkpoint is not None
        weights.append(load_file(next(checkpoint.path.glob("*model.safetensors"))))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_ranks_are_read_from_torchrun_or_from_an_srun_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    # A batch script sees these two and is still one process.
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert Ranks.of_environment() == Ranks()
    step = {"STEP_NUM_TASKS": "5", "PROCID": "4", "LOCALID": "0", "NODEID": "2", "STEP_TASKS_PER_NODE": "2(x2),1"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert Ranks.of_environment() == Ranks(rank=4, world_size=5, local_rank=0, local_world_size=1)
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    assert Ranks.of_environment() == Ranks(rank=3, world_size=4, local_rank=1, local_world_size=2)


@pytest.mark.parametrize(("text", "tasks"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,3(x2)", [1, 3, 3])])
def test_slurm_s_shorthand_for_tasks_per_node(text: str, tasks: list[int]) -> None:
    assert [tasks_on_node(text, node) for node in range(len(tasks))] == tasks
