"""The distillation trainer: exact over blocks, the same from a cache as from a live teacher, whatever the batching."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trained_runs import assert_identical, final_weights, train_to_the_end

import distillation
import finetuning
from distilling.config import (
    CacheConfig,
    HiddenStatesConfig,
    OnPolicyConfig,
    StudentConfig,
    TeacherModelConfig,
)
from distilling.run import DistillationRun
from training.run import FinetuningRun

MakeRun = Callable[..., FinetuningRun]
MakeDistillation = Callable[..., DistillationRun]


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


SETTINGS: dict[str, dict[str, Any]] = {
    "cache": {"teacher": "cache", "temperature": 2.0, "cache": CacheConfig(k=8)},
    "hybrid cache": {"teacher": "cache", "cache": CacheConfig(kind="hybrid", k=4, draws=4)},
    "live": {"teacher": "live", "divergence": "reverse_kl"},
    "hidden states": {"teacher": "live", "hidden_states": HiddenStatesConfig(weight=0.5)},
    "on policy": {"teacher": "live", "on_policy": OnPolicyConfig(share=0.5, max_new_tokens=6)},
    "none": {"teacher": "none", "category_weights": {"sums": 0.5}},
}


@pytest.mark.chain
@pytest.mark.parametrize("kind", SETTINGS)
def test_three_blocks_equal_one_uninterrupted_run(kind: str, make_distillation: MakeDistillation) -> None:
    training = {"gradient_accumulation": 2, "save_every": 3}
    chain = make_distillation("chain", **SETTINGS[kind], training={**training, "total_jobs": 3})
    whole = make_distillation("whole", **SETTINGS[kind], training={**training, "epochs_per_job": 3})
    assert len(train_to_the_end(chain)) == 3 and len(train_to_the_end(whole)) == 1
    assert_identical(final_weights(chain), final_weights(whole))


def first_loss_and_gradients(run: DistillationRun, batches: list[list[int]]) -> dict[str, torch.Tensor]:
    """Loss (under "") and gradients of one optimizer step whose micro-batches hold these packs."""
    from distilling.data import DistillationCollate

    model = distillation.build_model(run, None)
    rows = distillation.build_data_with_targets(run)
    collate = DistillationCollate({}, has_targets=run.distillation.teacher == "cache")
    compute = distillation.loss_function(run, model, distillation.build_teacher(run), distillation.LossParts())
    made = [collate([rows[index] for index in batch]) for batch in batches]
    num_items = torch.tensor(sum(int((batch["labels"] != -100).sum()) for batch in made))
    loss = sum((compute(model, batch, num_items) for batch in made), torch.zeros(()))
    loss.backward()
    return {"": loss.detach()} | {name: weight.grad for name, weight in model.named_parameters()}


def test_a_cache_of_the_whole_vocabulary_teaches_what_a_live_teacher_does(make_distillation: MakeDistillation) -> None:
    cached = make_distillation("cached", teacher="cache", cache=CacheConfig(k=4096), weight=1.0, temperature=2.0)
    live = make_distillation("live", teacher="live", weight=1.0, temperature=2.0)
    packs = [[0, 1, 2, 3]]
    # The cache rounds log probabilities to float16.
    assert_close(first_loss_and_gradients(cached, packs), first_loss_and_gradients(live, packs), tolerance=1e-3)


@pytest.mark.parametrize("kind", ["cache", "live", "hidden states"])
def test_neither_micro_batches_nor_packing_change_the_loss(kind: str, make_distillation: MakeDistillation) -> None:
    run = make_distillation("run", **SETTINGS[kind])
    whole = first_loss_and_gradients(run, [[0, 1, 2, 3]])
    assert_close(first_loss_and_gradients(run, [[3], [0, 2], [1], []]), whole, tolerance=1e-5)
    unpacked = prepare_unpacked(run)
    alone = first_loss_and_gradients(unpacked, [[row] for row in rows_of_packs(run, [0, 1, 2, 3])])
    assert_close(alone, whole, tolerance=1e-5)


def rows_of_packs(run: DistillationRun, packs: list[int]) -> list[int]:
    from training.block import build_data

    packing = build_data(run, "train").packs
    return [int(row) for pack in packs for row in packing[pack]]


def prepare_unpacked(run: DistillationRun) -> DistillationRun:
    """The same rows, one in each pack; the cache knows them by their ids."""
    from mixture.prepare import PreparationRequest, prepare

    dataset = replace(run.dataset, packing=False)
    request = PreparationRequest(dataset=dataset, module=run.module, tokenizer=run.model.name, objective="sft")
    prepared = prepare(request, run.folder.path.parent / "unpacked", lambda line: None)
    return replace(run, prepared=prepared.folder, dataset=dataset)


def with_vocabulary(model: Path, folder: Path, vocabulary: int) -> Path:
    """The same model, with or without weights, with a head of another size; new rows are likely tokens."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(model, folder)
    if (model / "model.safetensors").exists():
        network = AutoModelForCausalLM.from_pretrained(model)
        old = network.config.vocab_size
        network.resize_token_embeddings(vocabulary)
        if vocabulary > old:
            network.get_output_embeddings().weight.data[old:] = network.get_output_embeddings().weight.data[5]
        network.save_pretrained(folder)
    else:
        config = json.loads((model / "config.json").read_text()) | {"vocab_size": vocabulary}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["cache", "live"])
@pytest.mark.parametrize("padded", ["teacher", "student"])
def test_the_padding_of_either_head_is_left_out(
    kind: str, padded: str, make_distillation: MakeDistillation, teacher: Path, student: Path, tmp_path: Path
) -> None:
    settings = {"teacher": kind, "weight": 1.0, "cache": CacheConfig(k=4096), "divergence": "forward_kl"}
    plain = make_distillation("plain", **settings)
    if padded == "teacher":
        model = TeacherModelConfig(name=str(with_vocabulary(teacher, tmp_path / "padded", 4160)))
        run = make_distillation("run", **{**settings, "cache": CacheConfig(k=4160), "teacher_model": model})
        found = first_loss_and_gradients(run, [[0, 1]])
        assert_close(found, first_loss_and_gradients(plain, [[0, 1]]), tolerance=2e-3)
    else:
        wide = with_vocabulary(student, tmp_path / "padded", 4160)
        run = make_distillation("run", **settings, model={"name": str(wide)})
        found = first_loss_and_gradients(run, [[0, 1]])
        assert torch.isfinite(found[""]) and not found["model.embed_tokens.weight"][4096:].any()


def test_a_batch_without_a_token_to_learn_gives_zero_and_a_graph(make_distillation: MakeDistillation) -> None:
    for kind in ("cache", "live"):
        found = first_loss_and_gradients(make_distillation(kind.replace(" ", "-"), **SETTINGS[kind]), [[]])
        assert found.pop("") == 0
        assert all(gradient is not None and not gradient.any() for gradient in found.values())


def test_sources_weigh_as_they_are_told_and_unknown_ones_are_refused(make_distillation: MakeDistillation) -> None:
    from distilling.data import source_weights

    categories = {"gsm8k": "math", "mbpp": "code", "code_alpaca": "code"}
    assert source_weights({"code": 2.0, "mbpp": 0.5}, categories) == {"mbpp": 0.5, "code_alpaca": 2.0}
    with pytest.raises(
        ValueError, match=r"category_weights: the data has nothing named maths; it has code, code_alpaca"
    ):
        source_weights({"maths": 2.0}, categories)
    run = make_distillation("run", teacher="none", category_weights={"sums": 0.5})
    train_to_the_end(run)
    losses = [line["loss"] for line in run.folder.metrics()]
    plain = make_distillation("plain", teacher="none")
    train_to_the_end(plain)
    assert losses[0] == pytest.approx(next(iter(plain.folder.metrics()))["loss"] / 2, rel=1e-4)


def test_the_parts_of_the_loss_are_logged_in_nats_a_token(make_distillation: MakeDistillation) -> None:
    run = make_distillation("run", teacher="live", weight=0.25, temperature=2.0, training={"log_every": 1})
    train_to_the_end(run)
    for line in run.folder.metrics():
        assert line["loss"] == pytest.approx(0.75 * line["cross_entropy"] + 0.25 * 4 * line["divergence"], rel=1e-4)


def test_a_student_of_all_layers_of_its_teacher_is_its_teacher(make_distillation: MakeDistillation) -> None:
    run = make_distillation("run", from_teacher=StudentConfig(every=1))
    found = first_loss_and_gradients(replace(run, distillation=replace(run.distillation, weight=1.0)), [[0]])
    assert found[""].abs() < 1e-5


@pytest.mark.chain
def test_a_student_cut_from_its_teacher_keeps_its_layers_through_a_chain(make_distillation: MakeDistillation) -> None:
    cut = StudentConfig(layers=[1])
    run = make_distillation("chain", from_teacher=cut, training={"total_jobs": 2})
    student = distillation.build_model(run, None).state_dict()
    teacher = load_file(Path(run.distillation.teacher_model.name) / "model.safetensors")
    assert torch.equal(
        student["model.layers.0.self_attn.q_proj.weight"], teacher["model.layers.1.self_attn.q_proj.weight"]
    )
    assert torch.equal(student["model.embed_tokens.weight"], teacher["model.embed_tokens.weight"])
    assert len(train_to_the_end(run)) == 2
    whole = make_distillation("whole", from_teacher=cut, training={"epochs_per_job": 2})
    train_to_the_end(whole)
    assert_identical(final_weights(run), final_weights(whole))
    assert json.loads((run.folder.export / "config.json").read_text())["num_hidden_layers"] == 1
    with pytest.raises(ValueError, match="there is no layer 2; the model has layers 0 to 1"):
        distillation.build_model(make_distillation("deep", from_teacher=StudentConfig(layers=[0, 2])), None)


@pytest.mark.chain
def test_an_adapter_learns_from_a_teacher_too(make_distillation: MakeDistillation, teacher: Path) -> None:
    model = {"name": str(teacher), "from_scratch": False, "peft": True}
    chain = make_distillation("chain", **SETTINGS["cache"], model=model, training={"total_jobs": 2})
    whole = make_distillation("whole", **SETTINGS["cache"], model=model, training={"epochs_per_job": 2})
    train_to_the_end(chain)
    train_to_the_end(whole)
    assert_identical(final_weights(chain), final_weights(whole))


def test_an_adapter_carries_no_map_between_widths(make_distillation: MakeDistillation, student: Path) -> None:
    whole = make_distillation("whole", teacher="none")
    train_to_the_end(whole)
    model = {"name": str(whole.folder.export), "from_scratch": False, "peft": True}
    run = make_distillation("run", **SETTINGS["hidden states"], model=model)
    with pytest.raises(ValueError, match=r"the student is 8 wide and the teacher 16(.|\n)*an adapter cannot carry"):
        distillation.build_model(run, None)


def test_a_block_of_other_settings_is_refused(make_distillation: MakeDistillation) -> None:
    run = make_distillation("run", teacher="live", training={"total_jobs": 2})
    distillation.train(run)
    with pytest.raises(ValueError, match="objective"):
        distillation.train(replace(run, distillation=replace(run.distillation, temperature=2.0)))
    with pytest.raises(ValueError, match=r"hidden_states\.layers: 3: 1 names a layer that is not there"):
        states = HiddenStatesConfig(weight=1.0, layers={3: 1})
        distillation.build_model(replace(run, distillation=replace(run.distillation, hidden_states=states)), None)


@pytest.mark.chain
def test_the_evaluation_compares_teacher_student_before_and_control(make_distillation: MakeDistillation) -> None:
    control = make_distillation("control", teacher="none")
    train_to_the_end(control)
    run = make_distillation("run", teacher="live", control="control", training={"epochs_per_job": 3})
    train_to_the_end(run)
    result = distillation.evaluate(run)
    models = result["models"]
    assert list(models) == ["teacher", "student", "student before", "control"]
    assert all(set(found) == {"all", "sums"} for found in models.values())
    teacher, student, before = (models[name]["all"] for name in ("teacher", "student", "student before"))
    assert teacher["divergence"] == pytest.approx(0, abs=1e-6) and teacher["agreement"] == 1
    assert 0 < student["divergence"] < before["divergence"]
    assert student["perplexity"] < before["perplexity"]
    assert student["loss"] == pytest.approx(result["loss"], rel=1e-4)
    assert all(0 <= found["all"]["calibration_error"] <= 1 for found in models.values())
    assert json.loads(run.folder.evaluation.read_text())["models"] == models


def test_a_cache_of_another_teacher_or_other_rows_is_refused_before_training(
    make_distillation: MakeDistillation, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_distillation("run", teacher="cache", cache=CacheConfig(k=4))
    assert run.cache is not None
    mine = replace(run.distillation.cache, folder=str(run.cache))
    named = replace(run, distillation=replace(run.distillation, cache=mine))
    distillation.build_data_with_targets(named)
    other = make_run("other-teacher", training={"lr": 1e-3})
    finetuning.train(other)
    teacher = TeacherModelConfig(name=str(other.folder.export))
    with pytest.raises(ValueError, match=r"does not belong to this run(.|\n)*teacher: .*teacher.* and .*other-teacher"):
        distillation.build_data_with_targets(
            replace(named, distillation=replace(named.distillation, teacher_model=teacher))
        )
