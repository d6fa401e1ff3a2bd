"""With `training.parallelism: fsdp`, models that are only asked lie in shards too, and say what whole ones say."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from image_models import FAMILIES
from ranks import OnRanks, started_ranks
from test_distributed import assert_same_losses, assert_same_weights

import distillation
import finetuning
from distilling.config import OnPolicyConfig
from distilling.run import DistillationRun
from jobs.config import PROJECT
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.prepare import PreparationRequest, prepare
from phases import preferences, texts
from training.block import placed_to_ask
from training.config import DpoConfig, EvaluationConfig, FinetuningConfig, LoraConfig
from training.distributed import Ranks, join_ranks
from training.evaluation import generate
from training.frozen_shards import in_step
from training.online_config import GrpoConfig
from training.reference import ReferencedPacks
from training.run import FinetuningRun, TrainerRun
from training.sharding import convert, own_part

MakeRun = Callable[..., FinetuningRun]
MakePreferences = Callable[..., FinetuningRun]
MakeDistillation = Callable[..., DistillationRun]

Run = TypeVar("Run", bound=TrainerRun)


@pytest.fixture(scope="module")
def on_two_ranks() -> Iterator[OnRanks]:
    with started_ranks(2) as run:
        yield run


@pytest.fixture
def make_preferences(make_run: MakeRun, tmp_path: Path) -> MakePreferences:
    """make_preferences("name", DpoConfig(...)): a run that learns from 13 pairs; 3 are held out."""
    request = PreparationRequest(
        dataset=DatasetConfig(name="synthetic_preferences", max_length=128, module_keys={"num_rows": 16}),
        module=ModuleFile(PROJECT / "datasets/synthetic_preferences.py"),
        tokenizer=make_run("unused").model.name, objective="pairs",
    )  # fmt: skip
    prepared = prepare(request, tmp_path, lambda line: None).folder

    def make(name: str, config: DpoConfig, **keys: Any) -> FinetuningRun:
        run = replace(make_run(name, **keys), module=None, prepared=prepared)
        return replace(run, finetuning=FinetuningConfig(objective="dpo", dpo=config))

    return make


def in_shards(run: Run) -> Run:
    return replace(run, training=replace(run.training, parallelism="fsdp"))


def evaluate_all(runs: list[TrainerRun]) -> list[dict[str, Any]]:
    return [trainer_of(run).evaluate(run) for run in runs]


def trainer_of(run: TrainerRun) -> Any:
    return distillation if isinstance(run, DistillationRun) else finetuning


def test_scores_of_models_in_shards_are_those_of_whole_ones(
    on_two_ranks: OnRanks, make_run: MakeRun, make_preferences: MakePreferences, make_distillation: MakeDistillation
) -> None:
    base = make_run("base", training={"epochs_per_job": 3})
    finetuning.train(base)
    trained = {"name": str(base.folder.export), "from_scratch": False}
    lora = make_run("lora", model={**trained, "peft": True, "lora": LoraConfig(r=2)})
    half = make_run("half", model={**trained, "dtype": "bfloat16"})
    dpo = make_preferences("dpo", DpoConfig(), model=trained)
    student = make_distillation("student", teacher="live", shard_teacher=True)
    adapted = make_distillation(
        "adapted", model={**trained, "peft": True}, teacher="live", control=str(base.folder.export)
    )
    for run in (lora, half, dpo, student, adapted):
        trainer_of(run).train(run)
    # Five questions, of which one process answers three and the other two.
    scoring = EvaluationConfig(limit=5, max_new_tokens=8, batch_size=1)
    runs = [replace(run, evaluation=scoring) for run in (base, lora, half, dpo, student, adapted)]
    whole, _ = on_two_ranks(evaluate_all, runs)
    in_parts, on_the_other = on_two_ranks(evaluate_all, [in_shards(run) for run in runs])
    assert in_parts == whole == on_the_other
    assert whole[0]["scored_rows"] == 5 and "accuracy" in whole[3]  # type: ignore[index]
    assert len(whole[-1]["models"]) == 4  # type: ignore[index]


def held_share(model: torch.nn.Module) -> float:
    """What this process holds of the model's weights."""
    weights = list(model.parameters())
    return sum(own_part(weight).numel() for weight in weights) / sum(weight.numel() for weight in weights)


def asked_by_one(run: FinetuningRun) -> tuple[float, float, int]:
    """What this process holds of a model's layers while one process writes answers, and of the model afterwards; and
    how often the first layer was asked here."""
    ranks = Ranks.of_environment()
    join_ranks(run.folder.path, ranks)
    model = convert(placed_to_ask(run, texts.build_model(run, None)), torch.bfloat16)
    layers, asked = model.get_decoder().layers, []
    layers[0].register_forward_pre_hook(lambda *arguments: asked.append(arguments))
    with in_step(model):
        if ranks.rank == 1:
            tokenizer, config = texts.build_tokenizer(run), EvaluationConfig(max_new_tokens=5)
            generate(model, tokenizer, ["What?"], config=config, batch_size=1)
        share_of_layers = held_share(layers)
    return share_of_layers, held_share(model), len(asked)


def test_a_process_holds_its_share_and_nothing_more_once_a_model_was_asked(
    on_two_ranks: OnRanks, make_run: MakeRun
) -> None:
    (*shares, asked), (*shares_of_other, asked_of_other) = on_two_ranks(asked_by_one, in_shards(make_run("run")))  # type: ignore[misc]
    assert shares == pytest.approx([0.5, 0.5], abs=0.05)
    assert [sum(both) for both in zip(shares, shares_of_other, strict=True)] == pytest.approx([1, 1])
    assert asked == asked_of_other > 2, "a process that asks nothing lends its part to one that does"


def values_of_references(runs: list[FinetuningRun]) -> tuple[list[Any], float]:
    """What the first model says of the training pairs by each run, and the share that is held under the last."""
    ranks = Ranks.of_environment()
    values = []
    for run in runs:
        join_ranks(run.folder.path, ranks)
        rows, _ = preferences.build_referenced_data(run, "train", ranks)
        assert isinstance(rows, ReferencedPacks)
        values.append(rows.values.tolist())
    reference = preferences.first_reference(runs[-1])
    with reference.network() as network:
        network(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    return values, held_share(network)


def test_a_reference_in_shards_says_what_a_whole_one_says(
    on_two_ranks: OnRanks, make_preferences: MakePreferences, tmp_path: Path
) -> None:
    whole = make_preferences("whole", DpoConfig(precompute_reference=True))
    copy = shutil.copytree(whole.prepared, tmp_path / "copy")
    spread = replace(in_shards(whole), prepared=copy)
    (values, share), (_, share_of_other) = on_two_ranks(values_of_references, [whole, spread])  # type: ignore[misc]
    assert values[0] == values[1] and len(set(values[0])) > 10
    assert share + share_of_other == pytest.approx(1) and share < 0.55


MIXED_MODULE = '''
"""Numbers that are to be said, every other one beside an image."""
from PIL import Image

def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):
    rows = [{"images": [Image.new("RGB", (20 + n, 24), (12 * n, 0, 99))] * ((n + 1) % 2),
             "messages": [{"role": "user", "content": f"Which is {n}?"},
                          {"role": "assistant", "content": f"It is {n}."}]} for n in range(16)]
    return rows[:13] if split == "train" else rows[13:]

def score(prediction, row):
    return float(len(prediction))
'''


@pytest.fixture(params=FAMILIES)
def make_mixed(request: pytest.FixtureRequest, make_run: MakeRun, tmp_path: Path) -> MakeRun:
    """make_mixed("name", ...): a run that learns from rows with and without images."""
    model = FAMILIES[request.param](tmp_path / "model")
    module = ModuleFile(tmp_path / "mixed.py")
    module.path.write_text(MIXED_MODULE)
    dataset = DatasetConfig(name="mixed", max_length=64)
    request = PreparationRequest(dataset=dataset, module=module, tokenizer=str(model), objective="sft")
    data = prepare(request, tmp_path, lambda line: None)

    def make(name: str, **keys: Any) -> FinetuningRun:
        run = make_run(name, **{"model": {"name": str(model)}, **keys})
        return replace(run, module=module, prepared=data.folder, dataset=dataset)

    return make


def train_all(runs: list[TrainerRun]) -> None:
    for run in runs:
        while not trainer_of(run).train(run).finished:
            pass


def test_a_model_in_shards_learns_from_rows_of_which_some_hold_images(
    on_two_ranks: OnRanks, make_mixed: MakeRun
) -> None:
    training = {"lr": 1e-2, "batch_size": 1, "log_every": 1, "epochs_per_job": 2}
    ddp, spread = (
        make_mixed("ddp", training=training),
        make_mixed("spread", training={**training, "parallelism": "fsdp"}),
    )
    per_job = {**training, "epochs_per_job": 1, "total_jobs": 2, "gradient_checkpointing": True}
    chain = make_mixed("chain", training={**per_job, "parallelism": "fsdp"})
    on_two_ranks(train_all, [ddp, spread, chain])
    assert_same_losses(spread, ddp)
    assert_same_losses(chain, ddp)
    assert_same_weights(chain, spread)
    # Below an adapter, what is read of texts has no gradient, and what is read of images has one.
    model = {"name": str(ddp.folder.export), "from_scratch": False, "peft": True, "train_vision": True}
    lora = make_mixed("lora", model=model, training={**training, "epochs_per_job": 1})
    lora_spread = in_shards(make_mixed("lora-spread", model=model, training={**training, "epochs_per_job": 1}))
    on_two_ranks(train_all, [lora, lora_spread])
    assert_same_losses(lora_spread, lora)
    whole, _ = on_two_ranks(evaluate_all, [ddp, lora])
    in_parts, on_the_other = on_two_ranks(evaluate_all, [in_shards(ddp), in_shards(lora)])
    assert in_parts == whole == on_the_other
    assert whole[0]["scored_rows"] == 3  # type: ignore[index]


@pytest.fixture
def make_online(make_run: MakeRun, tmp_path: Path) -> MakeRun:
    """make_online("name", ...): a run whose model answers 10 sums; 3 are held out."""
    module = ModuleFile(PROJECT / "datasets/synthetic_sums.py")
    dataset = DatasetConfig(name="synthetic_sums", max_length=64, module_keys={"num_rows": 13})
    tokenizer = make_run("unused").model.name
    request = PreparationRequest(dataset=dataset, module=module, tokenizer=tokenizer, objective="prompts")
    prepared = prepare(request, tmp_path, lambda line: None).folder
    grpo = FinetuningConfig(objective="grpo", grpo=GrpoConfig(group_size=3, max_new_tokens=6, beta=0.1))

    def make(name: str, **keys: Any) -> FinetuningRun:
        return replace(make_run(name, **keys), module=module, dataset=dataset, prepared=prepared, finetuning=grpo)

    return make


def test_a_model_in_shards_learns_from_answers_of_its_own(
    on_two_ranks: OnRanks, make_run: MakeRun, make_online: MakeRun, make_distillation: MakeDistillation
) -> None:
    base = make_run("base")
    finetuning.train(base)
    # Dropout, as a process that writes nothing while the other does may draw nothing either.
    lora = {"peft": True, "lora": LoraConfig(r=2, dropout=0.1)}
    keys = {"model": {"name": str(base.folder.export), "from_scratch": False, **lora}}
    policy = {"teacher": "live", "on_policy": OnPolicyConfig(share=0.5, max_new_tokens=6)}
    training = {"lr": 1e-2, "batch_size": 2, "log_every": 1, "total_jobs": 2}
    in_one = {**training, "epochs_per_job": 2, "total_jobs": 1}
    makers = {"online": partial(make_online, **keys), "distilled": partial(make_distillation, **keys, **policy)}
    for name, make in makers.items():
        ddp, spread = make(name, training=training), in_shards(make(f"{name}-spread", training=training))
        whole = in_shards(make(f"{name}-whole", training=in_one))
        on_two_ranks(train_all, [ddp, spread, whole])
        assert_same_losses(spread, ddp)
        assert_same_weights(spread, whole)
        in_whole, _ = on_two_ranks(evaluate_all, [ddp])
        in_parts, on_the_other = on_two_ranks(evaluate_all, [in_shards(ddp)])
        assert in_parts == in_whole == on_the_other
