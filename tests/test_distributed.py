"""Processes of a block meet without a fixed port, train one model together, and resume together."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from image_models import idefics3
from ranks import OnRanks, started_ranks
from safetensors.torch import load_file
from test_harness import TASKS, needs_lm_eval, write_tasks
from transformers import AutoModelForCausalLM

import distillation
import finetuning
from distilling.config import CacheConfig, OnPolicyConfig
from distilling.run import DistillationRun
from jobs.config import PROJECT
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.prepare import PreparationRequest, prepare
from phases import texts
from training.checkpoints import newest_valid
from training.config import EvaluationConfig, FinetuningConfig, FsdpConfig, KtoConfig, LmEvalConfig, LoraConfig
from training.distributed import Ranks, agree_on_any, failing_together, from_main, join_ranks, tasks_on_node
from training.ledger import Ledger
from training.online_config import GrpoConfig, RlooConfig
from training.run import FinetuningRun, TrainerRun
from training.run_folder import RunFolder
from training.sharding import own_part, shard, whole_weights

pytestmark = pytest.mark.chain

MakeRun = Callable[..., FinetuningRun]
MakeDistillation = Callable[..., DistillationRun]


NUM_RANKS = 3
"""The sum of two numbers does not depend on their order, that of three does."""


@pytest.fixture(scope="module")
def on_three_ranks() -> Iterator[OnRanks]:
    """on_three_ranks(function, ...): what it returns on each of three processes, which stay up."""
    with started_ranks(NUM_RANKS) as run:
        yield run


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


def test_processes_meet_through_the_run_folder_and_agree(on_three_ranks: OnRanks, tmp_path: Path) -> None:
    launcher, *_ = on_three_ranks(os.getppid)
    (tmp_path / f".rendezvous-local-{launcher}").write_text("127.0.0.1 1")  # left by a launch that was killed
    first, second, third = on_three_ranks(meet, tmp_path)
    assert first == ([True, False], "from 0", "RuntimeError")
    assert second == third == ([True, False], "from 0", "ArithmeticError")
    assert not list(tmp_path.glob(".rendezvous*"))


def train_all(runs: list[FinetuningRun]) -> None:
    for run in runs:
        while not finetuning.train(run).finished:
            pass


def test_three_ranks_resume_exactly_and_see_the_loss_that_one_rank_sees(
    on_three_ranks: OnRanks, make_run: MakeRun
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


def distil_and_evaluate(runs: list[DistillationRun]) -> list[int]:
    """The weights of the teacher's decoder layers that this process holds for each run, once it was asked."""
    distil_all(runs)
    held = []
    for run in runs:
        distillation.evaluate(run)
        teacher = distillation.load_teacher(run).model
        teacher.base_model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
        held.append(sum(own_part(weight).numel() for weight in teacher.get_decoder().layers.parameters()))
    return held


def test_three_ranks_distil_exactly_and_see_the_loss_that_one_rank_sees(
    on_three_ranks: OnRanks, make_distillation: MakeDistillation
) -> None:
    training = {"lr": 1e-3, "batch_size": 1, "gradient_accumulation": 2, "log_every": 1}
    one_rank_training = {**training, "batch_size": 6, "gradient_accumulation": 1, "epochs_per_job": 2}
    cached = {"teacher": "cache", "cache": CacheConfig(k=8)}
    one_rank = make_distillation("one-rank", **cached, training=one_rank_training)
    whole = make_distillation("whole", **cached, training={**training, "epochs_per_job": 2})
    chain = make_distillation("chain", **cached, training={**training, "total_jobs": 2})
    spread = make_distillation("spread", **cached, training={**training, "total_jobs": 2, "parallelism": "fsdp"})
    distil_all([one_rank])
    on_three_ranks(distil_all, [chain, whole, spread])

    assert_same_weights(chain, whole)
    for of_one, of_three, of_spread in zip(
        *(list(run.folder.metrics()) for run in (one_rank, whole, spread)), strict=True
    ):
        for part in ("loss", "cross_entropy", "divergence"):
            assert of_three[part] == pytest.approx(of_one[part], rel=1e-4)
            assert of_spread[part] == pytest.approx(of_three[part], rel=1e-5)


def test_a_live_teacher_in_shards_says_what_a_whole_one_says(
    on_three_ranks: OnRanks, make_distillation: MakeDistillation
) -> None:
    settings: dict[str, Any] = {"training": {"lr": 1e-3, "batch_size": 1}, "on_policy": OnPolicyConfig(share=0.5)}
    whole = make_distillation("whole", **settings)
    sharded = make_distillation("sharded", shard_teacher=True, **settings)
    held = on_three_ranks(distil_and_evaluate, [whole, sharded])
    assert_same_weights(whole, sharded)
    evaluations = [json.loads(run.folder.evaluation.read_text()) for run in (whole, sharded)]
    assert evaluations[0] == evaluations[1]
    assert "divergence" in evaluations[0]["models"]["student"]["all"]
    (all_of_it, *_), parts = zip(*held, strict=True)
    assert sum(parts) == all_of_it and max(parts) < 0.4 * all_of_it, "a third, but for what three do not divide"


@pytest.mark.parametrize(("objective", "prepared_for"), [("dpo", "pairs"), ("kto", "labelled"), ("reward", "pairs")])
def test_three_ranks_learn_preferences_exactly_and_as_one_rank_does(
    objective: Any, prepared_for: Any, on_three_ranks: OnRanks, make_run: MakeRun, tmp_path: Path
) -> None:
    request = PreparationRequest(
        dataset=DatasetConfig(name="synthetic_preferences", max_length=128, module_keys={"num_rows": 16}),
        module=ModuleFile(PROJECT / "datasets/synthetic_preferences.py"),
        tokenizer=make_run("unused").model.name, objective=prepared_for,
    )  # fmt: skip
    prepared = prepare(request, tmp_path, lambda line: None).folder

    def preference_run(name: str, config: FinetuningConfig, **training: Any) -> FinetuningRun:
        run = make_run(name, training={"lr": 1e-3, "batch_size": 1, "log_every": 1, **training})
        return replace(run, module=None, prepared=prepared, finetuning=config)

    live = FinetuningConfig(objective=objective)
    beforehand = replace(live, kto=KtoConfig(precompute_reference=True)) if objective == "kto" else live
    twice = {"gradient_accumulation": 2}
    one_rank = preference_run("one-rank", live, batch_size=6, epochs_per_job=2)
    whole = preference_run("whole", beforehand, epochs_per_job=2, **twice)
    chain = preference_run("chain", beforehand, total_jobs=2, **twice)
    spread = preference_run("spread", live, total_jobs=2, parallelism="fsdp", **twice)
    train_all([one_rank])
    on_three_ranks(train_all, [chain, whole, spread])

    assert_same_weights(chain, whole)
    for of_one, of_three, of_spread in zip(
        *(list(run.folder.metrics()) for run in (one_rank, whole, spread)), strict=True
    ):
        for part in ("loss", "accuracy", "margin"):
            assert of_three[part] == pytest.approx(of_one[part], rel=1e-3, abs=1e-5)
            assert of_spread[part] == pytest.approx(of_three[part], rel=1e-3, abs=1e-5)


def evaluated(run: FinetuningRun) -> dict[str, Any]:
    return finetuning.evaluate(run)["lm_eval"]


@needs_lm_eval
def test_three_ranks_share_the_questions_of_a_harness_and_all_learn_its_scores(
    on_three_ranks: OnRanks, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run("run", training={"epochs_per_job": 3})
    finetuning.train(run)
    tasks = LmEvalConfig(tasks=list(TASKS), include_path=str(write_tasks(tmp_path / "tasks")), limit=5)
    run = replace(run, evaluation=EvaluationConfig(limit=0, lm_eval=tasks))
    spread = replace(run, training=replace(run.training, parallelism="fsdp"))
    assert on_three_ranks(evaluated, run) == on_three_ranks(evaluated, spread) == [evaluated(run)] * NUM_RANKS


@pytest.mark.parametrize(
    "settings",
    [
        GrpoConfig(group_size=4, max_new_tokens=4, loss="dapo", beta=0.1, iterations=2),
        RlooConfig(group_size=4, max_new_tokens=4, beta=0.1),
    ],
    ids=["grpo", "rloo"],
)
def test_three_ranks_learn_from_rewards_exactly_and_as_one_rank_does(
    settings: Any, on_three_ranks: OnRanks, make_run: MakeRun, tmp_path: Path
) -> None:
    module = ModuleFile(PROJECT / "datasets/synthetic_sums.py")
    request = PreparationRequest(
        dataset=DatasetConfig(name="synthetic_sums", max_length=64, module_keys={"num_rows": 13}),
        module=module, tokenizer=make_run("unused").model.name, objective="prompts",
    )  # fmt: skip
    prepared = prepare(request, tmp_path, lambda line: None).folder

    def online_run(name: str, **training: Any) -> FinetuningRun:
        run = make_run(name, training={"lr": 1e-3, "batch_size": 2, "log_every": 1, **training})
        config = FinetuningConfig(objective=settings.section, **{settings.section: settings})
        return replace(run, module=module, dataset=request.dataset, prepared=prepared, finetuning=config)

    one_rank = online_run("one-rank", gradient_accumulation=3, epochs_per_job=2)
    whole, chain = online_run("whole", epochs_per_job=2), online_run("chain", total_jobs=2)
    whole_spread = online_run("whole-spread", epochs_per_job=2, parallelism="fsdp")
    chain_spread = online_run("chain-spread", total_jobs=2, parallelism="fsdp")
    train_all([one_rank])
    on_three_ranks(train_all, [chain, whole, chain_spread, whole_spread])

    assert_same_weights(chain, whole)
    assert_same_weights(chain_spread, whole_spread)
    one, three, spread = (list(run.folder.metrics()) for run in (one_rank, whole, whole_spread))
    assert len(one) == len(three) == 4, "the last step of an epoch leaves one rank without a prompt"
    for of_one, of_three, of_spread in zip(one, three, spread, strict=True):
        for part in ("loss", "grad_norm", "reward", "reward_std", "answer_tokens", "entropy", "kl"):
            assert of_three[part] == pytest.approx(of_one[part], rel=1e-3, abs=1e-5), part
            assert of_spread[part] == pytest.approx(of_three[part], rel=1e-3, abs=1e-5), part


def test_a_model_in_shards_resumes_exactly_and_learns_as_whole_ones_do(
    on_three_ranks: OnRanks, make_run: MakeRun
) -> None:
    training = {"lr": 1e-3, "batch_size": 1, "gradient_accumulation": 2, "log_every": 1, "epochs_per_job": 2}
    spread = {**training, "parallelism": "fsdp", "gradient_checkpointing": True, "save_every": 2, "keep_checkpoints": 9}
    one_rank = make_run("one-rank", training={**training, "batch_size": 3})
    train_all([one_rank])
    base = {"name": str(one_rank.folder.export), "from_scratch": False, "peft": True, "peft_method": "dora"}
    adapter = {**base, "lora": LoraConfig(r=4, dropout=0.1, modules_to_save=["lm_head"])}
    full, full_spread = make_run("full", training=training), make_run("full-spread", training=spread)
    dora = make_run("dora", model=adapter, training=training)
    dora_spread = make_run("dora-spread", model=adapter, training=spread)
    on_three_ranks(train_all, [full, full_spread, dora, dora_spread])
    assert_same_losses(full_spread, full)
    assert_same_losses(dora_spread, dora)
    assert_exports_its_checkpoint(full_spread)

    for run in (full_spread, dora_spread):
        shutil.copytree(run.folder.path, run.folder.path.with_name(f"{run.folder.path.name}-whole"))
        for step in (4, 6):
            shutil.rmtree(run.folder.checkpoints / f"step_{step:08d}")
    on_three_ranks(train_all, [full_spread, dora_spread])  # from step 2, in mid-epoch
    for run in (full_spread, dora_spread):
        whole = RunFolder(run.folder.path.with_name(f"{run.folder.path.name}-whole"))
        assert_same_weights(run, replace(run, folder=whole))


def shares_of_a_model(run: FinetuningRun) -> tuple[int, int]:
    ranks = Ranks.of_environment()
    join_ranks(run.folder.path, ranks)
    model = texts.build_model(run, None)
    shard(model, FsdpConfig(), device=torch.device("cpu"), precision=torch.float32)
    mine = sum(own_part(weight).numel() for weight in model.parameters())
    gathered = whole_weights(model, only_trained=False)
    assert bool(gathered) == ranks.is_main, "no process but the first holds the whole model"
    return mine, sum(weight.numel() for weight in model.parameters())


def test_each_process_holds_its_share_of_a_model_in_shards(on_three_ranks: OnRanks, make_run: MakeRun) -> None:
    shares = on_three_ranks(shares_of_a_model, make_run("run"))
    (whole,) = {whole for _, whole in shares}  # type: ignore[attr-defined]
    assert sum(mine for mine, _ in shares) == whole  # type: ignore[misc]
    assert all(mine < 0.4 * whole for mine, _ in shares)  # type: ignore[misc]


def train_with_little_room(run: FinetuningRun, rank: int) -> str:
    """Train where one process cannot write a file of more than 20 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if Ranks.of_environment().rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        train_all([run])
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "it wrote all"


def train_until_killed(run: FinetuningRun) -> None:
    """Train where the kernel kills the second process in the middle of the file with its part of the optimizer."""
    if Ranks.of_environment().rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    train_all([run])


def test_shards_that_one_process_cannot_write_or_dies_over_cost_only_the_newest_checkpoint(
    on_three_ranks: OnRanks, make_run: MakeRun
) -> None:
    training = {"lr": 1e-3, "batch_size": 2, "parallelism": "fsdp"}
    run = make_run("run", training={**training, "total_jobs": 2})
    whole = make_run("whole", training={**training, "epochs_per_job": 2})
    on_three_ranks(finetuning.train, run)
    for rank in (0, 1):  # the first writes the weights too
        for told in on_three_ranks(train_with_little_room, run, rank):
            assert "the checkpoint of step 6 could not be written" in str(told)
            assert "Newest whole checkpoint: step_00000003" in str(told)
    start, rejected = newest_valid(run.folder.checkpoints)
    assert start is not None and start.step == 3 and not rejected
    with started_ranks(NUM_RANKS) as doomed:
        with pytest.raises(OSError, match="step 6 could not be written"):
            doomed(train_until_killed, run)
        with pytest.raises(BrokenProcessPool):
            doomed(os.getpid)
    assert newest_valid(run.folder.checkpoints) == (start, [])
    on_three_ranks(train_all, [run, whole])
    assert_same_weights(run, whole)


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_a_chain_goes_on_over_other_processes_where_its_steps_stay_the_same(
    parallelism: str, on_three_ranks: OnRanks, make_run: MakeRun
) -> None:
    training = {"lr": 1e-3, "batch_size": 2, "log_every": 1, "parallelism": parallelism}
    whole = make_run("whole", training={**training, "epochs_per_job": 2})
    over_three = {**training, "total_jobs": 2, "save_every": 2}
    over_one = {**over_three, "gradient_accumulation": 3}
    on_three_ranks(train_all, [whole])
    to_one, from_one = make_run("to-one", training=over_three), make_run("from-one", training=over_one)
    on_three_ranks(finetuning.train, to_one)
    finetuning.train(from_one)
    for run in (to_one, from_one):
        shutil.rmtree(run.folder.checkpoints / "step_00000003")  # to go on from step 2, in mid-epoch
        keep_metrics(run, steps=2)
    train_all([make_run("to-one", training=over_one)])
    on_three_ranks(train_all, [make_run("from-one", training=over_three)])

    for run in (to_one, from_one):
        assert_same_losses(run, whole)
        end, _ = newest_valid(run.folder.checkpoints)
        assert end is not None and end.ledger == Ledger(rows_per_epoch=13, whole_epochs=2)
    resumed = next(event for event in to_one.folder.events() if event["event"] == "resumed")
    assert resumed["step"] == 2
    assert resumed["split_before"] == "2 rows x 1 micro-batch x 3 processes"
    assert resumed["split"] == "2 rows x 3 micro-batches x 1 process"


def keep_metrics(run: TrainerRun, *, steps: int) -> None:
    lines = run.folder.path.joinpath("metrics.jsonl").read_text().splitlines(keepends=True)
    run.folder.path.joinpath("metrics.jsonl").write_text("".join(lines[:steps]))


def test_a_chain_does_not_go_on_over_other_processes_where_its_steps_would_change(
    on_three_ranks: OnRanks, make_run: MakeRun
) -> None:
    training = {"batch_size": 2, "total_jobs": 2}
    plain = make_run("plain", training=training)
    train_all([replace(plain, training=replace(plain.training, total_jobs=1), folder=make_run("base").folder)])
    base = {"name": str(make_run("base").folder.export), "from_scratch": False, "peft": True}
    dropout = make_run("dropout", model={**base, "lora": LoraConfig(dropout=0.1)}, training=training)
    experts = make_run("experts", model={**base, "peft_method": "lora_moe"}, training=training)
    for run in (plain, dropout, experts):
        on_three_ranks(finetuning.train, run)
    split = {"batch_size": 2, "gradient_accumulation": 3}
    with pytest.raises(ValueError, match=r"1 micro-batch x 3 processes -> 2 = ") as refusal:
        finetuning.train(plain)
    assert "training.gradient_accumulation: 3 keeps them" in str(refusal.value)
    for run, why in ((dropout, "random numbers were drawn, as dropout does"), (experts, "balances its experts")):
        with pytest.raises(ValueError, match=why):
            finetuning.train(replace(run, training=replace(run.training, **split)))


def test_three_ranks_learn_from_images_as_one_rank_does(
    on_three_ranks: OnRanks, make_run: MakeRun, tmp_path: Path
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


def assert_same_losses(one: TrainerRun, other: TrainerRun) -> None:
    for line, line_of_other in zip(one.folder.metrics(), other.folder.metrics(), strict=True):
        assert line["loss"] == pytest.approx(line_of_other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(line_of_other["grad_norm"], rel=1e-4)


def assert_exports_its_checkpoint(run: TrainerRun) -> None:
    checkpoint, _ = newest_valid(run.folder.checkpoints)
    assert checkpoint is not None
    trained = load_file(checkpoint.path / "model.safetensors")
    exported = AutoModelForCausalLM.from_pretrained(run.folder.export).state_dict()
    assert all(torch.equal(exported[name], weight) for name, weight in trained.items())


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
