"""Processes of a block meet without a fixed port, train one model together, and resume together."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from image_models import idefics3
from safetensors.torch import load_file

import distillation
import finetuning
from distilling.config import CacheConfig
from distilling.run import DistillationRun
from jobs.config import PROJECT
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.prepare import PreparationRequest, prepare
from training.checkpoints import newest_valid
from training.config import FinetuningConfig, LoraConfig
from training.distributed import Ranks, agree_on_any, failing_together, from_main, join_ranks, tasks_on_node
from training.ledger import Ledger
from training.run import FinetuningRun, TrainerRun

MakeRun = Callable[..., FinetuningRun]
MakeDistillation = Callable[..., DistillationRun]


OnThreeRanks = Callable[..., list[object]]

NUM_RANKS = 3
"""The sum of two numbers does not depend on their order, that of three does."""


@pytest.fixture(scope="module")
def on_three_ranks() -> Iterator[OnThreeRanks]:
    """on_three_ranks(function, ...): what it returns on each of three processes, which stay up."""
    context = multiprocessing.get_context("spawn")
    ranks = [ProcessPoolExecutor(1, mp_context=context) for _ in range(NUM_RANKS)]

    def run(function: Callable[..., object], *arguments: object) -> list[object]:
        futures = [pool.submit(as_rank, rank, function, *arguments) for rank, pool in enumerate(ranks)]
        return [future.result(timeout=200) for future in futures]

    yield run
    for pool in ranks:
        pool.shutdown()


def as_rank(rank: int, function: Callable[..., object], *arguments: object) -> object:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(NUM_RANKS), LOCAL_RANK=str(rank))
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


def test_processes_meet_through_the_run_folder_and_agree(on_three_ranks: OnThreeRanks, tmp_path: Path) -> None:
    (tmp_path / f".rendezvous-local-{os.getpid()}").write_text("127.0.0.1 1")  # left by a launch that was killed
    first, second, third = on_three_ranks(meet, tmp_path)
    assert first == ([True, False], "from 0", "RuntimeError")
    assert second == third == ([True, False], "from 0", "ArithmeticError")
    assert not list(tmp_path.glob(".rendezvous*"))


def train_all(runs: list[FinetuningRun]) -> None:
    for run in runs:
        while not finetuning.train(run).finished:
            pass


def test_three_ranks_resume_exactly_and_see_the_loss_that_one_rank_sees(
    on_three_ranks: OnThreeRanks, make_run: MakeRun
) -> None:
    training = {"lr": 1e-3, "batch_size": 2, "log_every": 1}
    one_rank = make_run("one-rank", training={**training, "batch_size": 6, "epochs_per_job": 2})
    whole = make_run("whole", training={**training, "epochs_per_job": 2})
    chain = make_run("chain", training={**training, "total_jobs": 2, "save_every": 3})
    train_all([one_rank])
    base = {"name": str(one_rank.folder.export), "from_scratch": False, "peft": True}
    adapter = {"model": {**base, "lora": LoraConfig(dropout=0.1)}}
    whole_adapter = make_run("whole-adapter", **adapter, training={**training, "epochs_per_job": 2})
    chain_adapter = make_run("chain-adapter", **adapter, training={**training, "total_jobs": 2})
    experts = {"model": {**base, "peft_method": "lora_moe", "lora": LoraConfig(r=2)}}
    whole_experts = make_run("whole-experts", **experts, training={**training, "epochs_per_job": 2})
    chain_experts = make_run("chain-experts", **experts, training={**training, "total_jobs": 2})
    on_three_ranks(train_all, [chain, whole, chain_adapter, whole_adapter, chain_experts, whole_experts])

    assert_same_weights(chain, whole)
    assert_same_weights(chain_experts, whole_experts)
    assert_same_weights(chain_adapter, whole_adapter)
    rows = 13
    assert rows % 6 == 1, "the last step of an epoch leaves two ranks without a row"
    one, three = list(one_rank.folder.metrics()), list(whole.folder.metrics())
    assert len(one) == len(three) == 2 * 3
    for line_of_one, line_of_three in zip(one, three, strict=True):
        assert line_of_three["loss"] == pytest.approx(line_of_one["loss"], abs=1e-5)
        assert line_of_three["grad_norm"] == pytest.approx(line_of_one["grad_norm"], rel=1e-4)
        # An empty batch is one token.
        assert 0 <= line_of_three["tokens"] - line_of_one["tokens"] <= 4
    end_of_one, end_of_three = (newest_valid(run.folder.checkpoints)[0] for run in (one_rank, whole))
    assert end_of_one is not None and end_of_three is not None
    assert end_of_one.samples == end_of_three.samples == 2 * rows
    end_of_chain, _ = newest_valid(chain.folder.checkpoints)
    assert end_of_chain is not None
    each_row_once = Ledger(rows_per_epoch=rows, whole_epochs=2)
    assert end_of_one.ledger == end_of_three.ledger == end_of_chain.ledger == each_row_once
    assert len(list(end_of_three.path.glob("rng_state_*.pth"))) == NUM_RANKS
    losses = [
        [event["eval_loss"] for event in run.folder.events() if event["event"] == "block_end"]
        for run in (one_rank, whole)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def distil_all(runs: list[DistillationRun]) -> None:
    for run in runs:
        while not distillation.train(run).finished:
            pass


def test_three_ranks_distil_exactly_and_see_the_loss_that_one_rank_sees(
    on_three_ranks: OnThreeRanks, make_distillation: MakeDistillation
) -> None:
    training = {"lr": 1e-3, "batch_size": 2, "log_every": 1}
    cached = {"teacher": "cache", "cache": CacheConfig(k=8)}
    one_rank = make_distillation("one-rank", **cached, training={**training, "batch_size": 6, "epochs_per_job": 2})
    whole = make_distillation("whole", **cached, training={**training, "epochs_per_job": 2})
    chain = make_distillation("chain", **cached, training={**training, "total_jobs": 2})
    distil_all([one_rank])
    on_three_ranks(distil_all, [chain, whole])

    assert_same_weights(chain, whole)
    for line_of_one, line_of_three in zip(one_rank.folder.metrics(), whole.folder.metrics(), strict=True):
        for part in ("loss", "cross_entropy", "divergence"):
            assert line_of_three[part] == pytest.approx(line_of_one[part], rel=1e-4)


@pytest.mark.parametrize(("objective", "prepared_for"), [("dpo", "pairs"), ("kto", "labelled"), ("reward", "pairs")])
def test_three_ranks_learn_preferences_exactly_and_as_one_rank_does(
    objective: Any, prepared_for: Any, on_three_ranks: OnThreeRanks, make_run: MakeRun, tmp_path: Path
) -> None:
    request = PreparationRequest(
        dataset=DatasetConfig(name="synthetic_preferences", max_length=128, module_keys={"num_rows": 16}),
        module=ModuleFile(PROJECT / "datasets/synthetic_preferences.py"),
        tokenizer=make_run("unused").model.name, objective=prepared_for,
    )  # fmt: skip
    prepared = prepare(request, tmp_path, lambda line: None).folder

    def preference_run(name: str, **training: Any) -> FinetuningRun:
        run = make_run(name, training={"lr": 1e-3, "batch_size": 1, "log_every": 1, **training})
        return replace(run, module=None, prepared=prepared, finetuning=FinetuningConfig(objective=objective))

    one_rank = preference_run("one-rank", batch_size=3, epochs_per_job=2)
    whole, chain = preference_run("whole", epochs_per_job=2), preference_run("chain", total_jobs=2)
    train_all([one_rank])
    on_three_ranks(train_all, [chain, whole])

    assert_same_weights(chain, whole)
    for line_of_one, line_of_three in zip(one_rank.folder.metrics(), whole.folder.metrics(), strict=True):
        for part in ("loss", "accuracy", "margin"):
            assert line_of_three[part] == pytest.approx(line_of_one[part], rel=1e-3, abs=1e-5)


def test_a_chain_begun_on_three_ranks_is_not_resumed_on_one(on_three_ranks: OnThreeRanks, make_run: MakeRun) -> None:
    run = make_run("run", training={"batch_size": 2, "total_jobs": 2})
    on_three_ranks(finetuning.train, run)
    with pytest.raises(ValueError, match="world_size: 3 -> 1"):
        finetuning.train(replace(run, training=replace(run.training, batch_size=6)))


def test_three_ranks_learn_from_images_as_one_rank_does(
    on_three_ranks: OnThreeRanks, make_run: MakeRun, tmp_path: Path
) -> None:
    model = idefics3(tmp_path / "model")
    module = ModuleFile(PROJECT / "datasets/synthetic_images.py")
    dataset = DatasetConfig(name="synthetic_images", max_length=64, module_keys={"num_rows": 16})
    request = PreparationRequest(dataset=dataset, module=module, tokenizer=str(model), objective="sft")
    data = prepare(request, tmp_path, lambda line: None)
    training = {"lr": 1e-3, "batch_size": 2, "log_every": 1}

    def run(name: str, **keys: Any) -> FinetuningRun:
        made = make_run(name, model={"name": str(model)}, training={**training, **keys})
        return replace(made, module=module, prepared=data.folder, dataset=dataset)

    one_rank = run("one-rank", batch_size=6, epochs_per_job=2)
    whole, chain = run("whole", epochs_per_job=2), run("chain", total_jobs=2)
    train_all([one_rank])
    on_three_ranks(train_all, [chain, whole])
    assert_same_weights(chain, whole)
    one, three = list(one_rank.folder.metrics()), list(whole.folder.metrics())
    assert [line["loss"] for line in three] == pytest.approx([line["loss"] for line in one], rel=1e-4)


def assert_same_weights(one: TrainerRun, other: TrainerRun) -> None:
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
