"""Models learn from rewards of their own answers: two blocks equal one run, whoever asks; what is wrong is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import finetuning
from jobs.config import PROJECT, read_run_config
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.prepare import PreparationRequest, PreparedData, prepare
from training.checkpoints import newest_valid
from training.config import FinetuningConfig, LoraConfig
from training.online_config import GrpoConfig, RewardSource, RlooConfig
from training.run import FinetuningRun

MakeRun = Callable[..., FinetuningRun]
SUMS = ModuleFile(PROJECT / "datasets/synthetic_sums.py")


def prepared_prompts(model: Path, data: Path, module: ModuleFile = SUMS, **keys: Any) -> PreparedData:
    dataset = DatasetConfig(name=module.path.stem, max_length=64, module_keys=keys)
    request = PreparationRequest(dataset=dataset, module=module, tokenizer=str(model), objective="prompts")
    return prepare(request, data, lambda line: None)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> PreparedData:
    """12 training prompts and 3 test prompts."""
    return prepared_prompts(tiny_model, tmp_path_factory.mktemp("data"), num_rows=15)


@pytest.fixture
def make_online_run(make_run: MakeRun, prepared: PreparedData) -> MakeRun:
    def make(name: str, settings: GrpoConfig | RlooConfig, **keys: Any) -> FinetuningRun:
        run = make_run(name, **keys)
        config = FinetuningConfig(objective=settings.section, **{settings.section: settings})
        dataset = replace(run.dataset, max_length=64)
        return replace(run, module=SUMS, prepared=prepared.folder, finetuning=config, dataset=dataset)

    return make


def train_to_the_end(run: FinetuningRun) -> dict[str, torch.Tensor]:
    while not finetuning.train(run).finished:
        pass
    return newest_weights(run)


def newest_weights(run: FinetuningRun) -> dict[str, torch.Tensor]:
    checkpoint, rejected = newest_valid(run.folder.checkpoints)
    assert checkpoint is not None and not rejected
    return load_file(next(checkpoint.path.glob("*model.safetensors")))


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


SHORT: dict[str, Any] = {"group_size": 4, "max_new_tokens": 6}


# --- the chain


@pytest.mark.parametrize(
    "settings",
    [
        GrpoConfig(**SHORT),
        GrpoConfig(**SHORT, loss="dapo", beta=0.1, iterations=2, temperature=0.8),
        RlooConfig(**SHORT, beta=0.1),
    ],
    ids=["grpo", "dapo with a reference and two iterations", "rloo with a reference"],
)
def test_two_blocks_equal_one_uninterrupted_run_bit_for_bit(
    settings: GrpoConfig | RlooConfig, make_online_run: MakeRun
) -> None:
    training = {"gradient_accumulation": 2, "log_every": 1}
    chain = make_online_run("chain", settings, training={**training, "epochs_per_job": 1, "total_jobs": 2})
    whole = make_online_run("whole", settings, training={**training, "epochs_per_job": 2, "total_jobs": 1})
    assert largest_difference(train_to_the_end(chain), train_to_the_end(whole)) == 0
    lines = [list(run.folder.metrics()) for run in (chain, whole)]
    assert [line["reward"] for line in lines[0]] == [line["reward"] for line in lines[1]]
    assert {"reward", "reward_module", "reward_std", "zero_std_share", "answer_tokens", "cut_share", "entropy"} < set(
        lines[0][0]
    )
    assert ("kl" in lines[0][0]) == bool(settings.beta)
    assert all("eval_reward" in event for event in chain.folder.events() if event["event"] == "block_end")


def test_two_blocks_of_an_adapter_with_dropout_equal_one_run(make_online_run: MakeRun, teacher: Path) -> None:
    model = {"name": str(teacher), "from_scratch": False, "peft": True, "lora": LoraConfig(r=4, dropout=0.2)}
    settings = GrpoConfig(**SHORT, beta=0.1)
    chain = make_online_run("chain", settings, model=model, training={"epochs_per_job": 1, "total_jobs": 2})
    whole = make_online_run("whole", settings, model=model, training={"epochs_per_job": 2, "total_jobs": 1})
    assert largest_difference(train_to_the_end(chain), train_to_the_end(whole)) == 0


def test_a_stop_between_micro_batches_changes_nothing(make_online_run: MakeRun) -> None:
    """The step is abandoned, and its answers are written again by the same numbers."""
    training = {"gradient_accumulation": 3, "epochs_per_job": 2}
    run, whole = (make_online_run(name, GrpoConfig(**SHORT), training=training) for name in ("run", "whole"))
    from training.block import train_block

    def build(start: Any) -> Any:
        trainer = finetuning.build_trainer(run, start)
        asked = iter([False] * 4 + [True] * 99)  # after each of the micro-batches of a step
        trainer.schedule.stop_requested = lambda: next(asked)
        return trainer

    stopped = train_block(run, build_trainer=build, score_block=lambda trainer: {}, export=lambda end: None)
    assert stopped.stopped and 0 < stopped.step < stopped.horizon_steps
    assert largest_difference(train_to_the_end(run), train_to_the_end(whole)) == 0


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dapo", "dr_grpo", "rloo"])
def test_micro_batches_do_not_change_the_loss(loss: Any, make_online_run: MakeRun) -> None:
    settings = RlooConfig(**SHORT) if loss == "rloo" else GrpoConfig(**SHORT, loss=loss, beta=0.1)
    run = make_online_run("run", settings)
    packs = finetuning.build_data(run, "train")
    rows = [packs[pack] for pack in range(6)]
    gradients = [gradient(run, split) for split in ([rows], [rows[:2], rows[2:]], [[], *([row] for row in rows)])]
    assert gradients[0].abs().max() > 1e-5
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-7)


def gradient(run: FinetuningRun, micro_batches: list[Any]) -> torch.Tensor:
    """Of one optimizer step over these micro-batches, each a list of packs of one prompt."""
    from rewarding.rollouts import PromptCollate

    model = finetuning.build_model(run, None)
    loss = finetuning.online_loss(run, model, step=0)
    batches = [PromptCollate()(packs) for packs in micro_batches]
    items = loss.begin_step(batches)
    for batch in batches:
        loss(model, batch, torch.tensor(items)).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def test_a_resume_with_another_reward_is_refused(make_online_run: MakeRun) -> None:
    run = make_online_run("run", GrpoConfig(**SHORT), training={"total_jobs": 2})
    finetuning.train(run)
    other = GrpoConfig(**SHORT, rewards=[RewardSource(weight=2.0)])
    with pytest.raises(ValueError, match="objective"):
        finetuning.train(replace(run, finetuning=FinetuningConfig(objective="grpo", grpo=other)))


def test_evaluation_tells_the_mean_reward_before_and_after(make_online_run: MakeRun) -> None:
    settings = GrpoConfig(group_size=8, max_new_tokens=2)
    run = make_online_run("run", settings, training={"epochs_per_job": 10, "batch_size": 4, "lr": 1e-2})
    train_to_the_end(run)
    result = finetuning.evaluate(run)
    assert json.loads(run.folder.evaluation.read_text()) == result
    assert result["models"]["grpo"]["all"] == result["models"]["grpo"]["synthetic_sums"]
    assert result["count"] == 3
    assert result["reward"] == result["models"]["grpo"]["all"]["reward"] == pytest.approx(result["reward_module"])
    assert result["reward_before"] == result["models"]["before"]["all"]["reward"]
    assert result["reward"] > 1.3 * result["reward_before"]
    (end,) = [event for event in run.folder.events() if event["event"] == "block_end"]
    assert end["eval_reward"] == pytest.approx(result["reward"])
    assert "score" in result, "the module's score is told too"


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_the_examples_train_in_two_chained_blocks(objective: str, make_run: MakeRun, tmp_path: Path) -> None:
    config = read_run_config(PROJECT / f"configs/examples/{objective}.yaml", ["--dataset.num_rows", "20"])
    model = make_run("unused").model
    request = PreparationRequest(dataset=config.dataset, module=SUMS, tokenizer=model.name, objective=config.objective)
    run = replace(
        make_run("example"),
        module=SUMS,
        dataset=config.dataset,
        prepared=prepare(request, tmp_path, lambda line: None).folder,
        finetuning=config.finetuning,
        training=replace(config.training, arguments={"report_to": "none"}),
    )
    assert not finetuning.train(run).finished
    assert finetuning.train(run).finished
    assert "reward" in list(run.folder.metrics())[-1]
