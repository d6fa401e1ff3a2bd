"""Models learn from preferences: two blocks equal one run, in any micro-batches; what is wrong with rows is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from trained_runs import assert_identical, train_to_the_end, trained_weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import finetuning
from jobs.config import PROJECT, read_run_config
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.prepare import PreparationRequest, PreparedData, prepare
from mixture.shards import TokenRows, read_packs
from phases import preferences
from training import reference
from training.block import build_data
from training.checkpoints import newest_valid
from training.config import PREFERENCE_CONFIGS, DpoConfig, FinetuningConfig, LoraConfig
from training.distributed import Ranks
from training.preferences import PreferenceCollate
from training.run import FinetuningRun
from training.stopping import StopRequested

MakeRun = Callable[..., FinetuningRun]
OBJECTIVES = ("dpo", "kto", "orpo", "reward")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, PreparedData]:
    """24 training pairs and 6 test pairs, and the same for KTO."""
    data = tmp_path_factory.mktemp("data")

    def made(objective: Any) -> PreparedData:
        dataset = DatasetConfig(name="synthetic_preferences", max_length=256, module_keys={"num_rows": 30})
        module = ModuleFile(PROJECT / "datasets/synthetic_preferences.py")
        request = PreparationRequest(dataset=dataset, module=module, tokenizer=str(tiny_model), objective=objective)
        return prepare(request, data, lambda line: None)

    pairs, labelled = made("pairs"), made("labelled")
    return {"dpo": pairs, "orpo": pairs, "reward": pairs, "kto": labelled}


@pytest.fixture
def make_preference_run(make_run: MakeRun, prepared: dict[str, PreparedData]) -> MakeRun:
    def make(name: str, objective: str, *, settings: Any = None, **keys: Any) -> FinetuningRun:
        finetuning_config = FinetuningConfig(objective=objective, **({objective: settings} if settings else {}))
        run = make_run(name, **keys)
        return replace(run, module=None, prepared=prepared[objective].folder, finetuning=finetuning_config)

    return make


# --- the chain


@pytest.mark.chain
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_blocks_equal_one_uninterrupted_run_bit_for_bit(objective: str, make_preference_run: MakeRun) -> None:
    training = {"gradient_accumulation": 2, "max_grad_norm": 0.5}
    chain = make_preference_run("chain", objective, training={**training, "epochs_per_job": 1, "total_jobs": 2})
    whole = make_preference_run("whole", objective, training={**training, "epochs_per_job": 2, "total_jobs": 1})
    assert_identical(trained_weights(chain), trained_weights(whole))
    (first, last) = [event for event in chain.folder.events() if event["event"] == "block_end"]
    assert {"eval_loss", "eval_accuracy", "eval_margin"} <= last.keys()
    assert last["eval_loss"] < first["eval_loss"]


@pytest.mark.chain
def test_two_blocks_of_an_adapter_with_dropout_equal_one_run(make_preference_run: MakeRun, teacher: Path) -> None:
    model = {"name": str(teacher), "from_scratch": False, "peft": True, "lora": LoraConfig(r=4, dropout=0.2)}
    chain = make_preference_run("chain", "dpo", model=model, training={"epochs_per_job": 1, "total_jobs": 2})
    whole = make_preference_run("whole", "dpo", model=model, training={"epochs_per_job": 2, "total_jobs": 1})
    assert_identical(trained_weights(chain), trained_weights(whole))


# --- a reference that is asked beforehand


@pytest.mark.chain
@pytest.mark.parametrize(("objective", "peft"), [("dpo", False), ("kto", True)])
def test_a_reference_asked_beforehand_teaches_what_one_asked_along_the_way_does(
    objective: str, peft: bool, make_preference_run: MakeRun, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"name": str(teacher), "from_scratch": False, "peft": peft}
    settings = PREFERENCE_CONFIGS[objective](precompute_reference=True)  # type: ignore[call-arg]
    two_blocks = {"epochs_per_job": 1, "total_jobs": 2, "log_every": 1}
    chain = make_preference_run("chain", objective, settings=settings, model=model, training=two_blocks)
    finetuning.train(chain)
    assert len(list(chain.prepared.glob("reference-*/*.npy"))) == 2 and not list(chain.folder.path.glob("reference-*"))
    monkeypatch.setattr(preferences, "first_reference", None)  # nothing is left to ask it
    whole = make_preference_run(
        "whole",
        objective,
        settings=settings,
        model=model,
        training={**two_blocks, "epochs_per_job": 2, "total_jobs": 1},
    )
    assert_identical(trained_weights(chain), trained_weights(whole))
    scores = finetuning.evaluate(chain)
    monkeypatch.undo()
    along = make_preference_run("along", objective, model=model, training=two_blocks)
    train_to_the_end(along)
    for before, live in zip(chain.folder.metrics(), along.folder.metrics(), strict=True):
        assert before["loss"] == pytest.approx(live["loss"], rel=1e-4)
    assert scores["margin"] == pytest.approx(finetuning.evaluate(along)["margin"], rel=1e-3)


@pytest.mark.chain
def test_in_the_same_batches_what_the_reference_says_is_the_same_bit_for_bit(make_preference_run: MakeRun) -> None:
    settings = DpoConfig(precompute_reference=True)
    before = make_preference_run("before", "dpo", settings=settings, training={"batch_size": 1})
    live = make_preference_run("live", "dpo", training={"batch_size": 1})
    assert_identical(trained_weights(before), trained_weights(live))


def test_an_interrupted_pass_of_the_reference_goes_on_and_is_shared_by_processes(
    make_preference_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "SHARD_PACKS", 2)
    run = make_preference_run("run", "kto")
    splits = {name: build_data(run, name) for name in ("train", "test")}
    asked: list[Path] = []
    write = reference.Shard.write

    def counted(shard: reference.Shard, *arguments: Any) -> None:
        if len(asked) == 2:
            raise StopRequested
        asked.append(shard.path)
        write(shard, *arguments)

    def compute(name: str, ranks: Ranks) -> Path:
        reference.compute_reference(
            splits, tmp_path / name, run.folder.path / name,
            lambda: (preferences.first_reference(run), torch.device("cpu")),
            model_precision=torch.float32, batch_size=1, ranks=ranks,
        )  # fmt: skip
        return tmp_path / name

    monkeypatch.setattr(reference.Shard, "write", counted)
    with pytest.raises(StopRequested):
        compute("interrupted", Ranks())
    times = [path.stat().st_mtime_ns for path in asked]
    monkeypatch.setattr(reference.Shard, "write", write)
    monkeypatch.setattr(reference.shutil, "rmtree", lambda folder: None)  # as where the job is killed before it
    alone = compute("interrupted", Ranks())
    assert [path.stat().st_mtime_ns for path in asked] == times
    for rank in (1, 2, 0):
        shared = compute("shared", Ranks(rank=rank, world_size=3))
    for split, packs in splits.items():
        values = np.load(alone / f"{split}.npy")
        assert len(values) == len(packs.rows) and (values < 0).all()
        assert np.array_equal(values, np.load(shared / f"{split}.npy"))
    monkeypatch.undo()
    assert asked[0].exists()
    compute("interrupted", Ranks())
    assert not asked[0].parent.exists()


def test_values_of_another_model_or_arithmetic_are_not_taken(make_preference_run: MakeRun, teacher: Path) -> None:
    run = make_preference_run("run", "dpo")

    def folder(**keys: Any) -> Path:
        model = replace(run.model, **keys)
        return reference.reference_folder(run.prepared, model, fingerprint="f", seed=run.seed)

    changes: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}, {"name": str(teacher), "from_scratch": False}]
    assert len({folder(**keys) for keys in changes}) == 3
    assert folder() == folder(peft=False, checkpoint_dir="elsewhere")
    with pytest.raises(ValueError, match=r"finetuning\.dpo\.precompute_reference: simpo has no reference"):
        DpoConfig(loss="simpo", precompute_reference=True)


# --- reward models


def rewards_by(model: Any, run: FinetuningRun) -> list[float]:
    """The rewards of the test answers, each read alone, as users of the model read them."""
    rows = [row for pack in range(2) for row in build_data(run, "test")[pack]]
    with torch.no_grad():
        return [float(model.eval()(torch.tensor(row.input_ids[None].astype("int64"))).logits[0, 0]) for row in rows]


@pytest.mark.chain
def test_a_reward_model_of_adapters_resumes_exactly_and_loads_from_adapter_and_merged_whole(
    make_preference_run: MakeRun, teacher: Path
) -> None:
    base = {"name": str(teacher), "from_scratch": False, "peft": True, "lora": LoraConfig(r=4, dropout=0.2)}
    model = {**base, "merge_adapter": True}
    chain = make_preference_run("chain", "reward", model=model, training={"epochs_per_job": 1, "total_jobs": 2})
    whole = make_preference_run("whole", "reward", model=model, training={"epochs_per_job": 2, "total_jobs": 1})
    trained = trained_weights(chain)
    assert_identical(trained, trained_weights(whole))
    assert any(name.endswith("score.modules_to_save.default.weight") for name in trained)

    merged = AutoModelForSequenceClassification.from_pretrained(chain.folder.export / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(teacher, num_labels=1)
    adapted = PeftModel.from_pretrained(plain, chain.folder.export)
    ours = rewards_by(preferences.build_model(chain, newest_valid(chain.folder.checkpoints)[0]), chain)
    assert rewards_by(adapted, chain) == pytest.approx(ours, abs=1e-6)
    assert rewards_by(merged, chain) == pytest.approx(ours, abs=1e-5)
    assert finetuning.evaluate(chain)["accuracy"] > 0.5 and max(ours) - min(ours) > 0.1
    card = (chain.folder.export / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained(" in card and "num_labels=1, pad_token_id=" in card


@pytest.mark.chain
def test_a_reward_model_begins_with_adapters_that_were_trained_before(
    make_preference_run: MakeRun, teacher: Path
) -> None:
    lora = {"name": str(teacher), "from_scratch": False, "peft": True, "lora": LoraConfig(r=4)}
    writer = make_preference_run("writer", "dpo", model={**lora, "merge_adapter": True})
    finetuning.train(writer)
    beside = {"name": str(teacher), "from_scratch": False, "adapters": [str(writer.folder.export)]}
    found = preferences.build_model(make_preference_run("found", "reward", model=beside), None).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(writer.folder.export / "merged").state_dict()
    assert "score.weight" in found
    shared = [name for name in merged if name in found]
    assert len(shared) > 10 and max(float((found[name] - merged[name]).abs().max()) for name in shared) < 1e-6
    before = AutoModelForCausalLM.from_pretrained(teacher).state_dict()
    assert max(float((found[name] - before[name]).abs().max()) for name in shared) > 1e-4
    both = {**beside, "peft": True, "lora": LoraConfig(r=4), "merge_adapter": True}
    run = make_preference_run("both", "reward", model=both)
    finetuning.train(run)
    ours = rewards_by(preferences.build_model(run, newest_valid(run.folder.checkpoints)[0]), run)
    whole = AutoModelForSequenceClassification.from_pretrained(run.folder.export / "merged")
    assert rewards_by(whole, run) == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_and_packing_do_not_change_the_loss(
    objective: str, make_preference_run: MakeRun, tmp_path: Path
) -> None:
    run = make_preference_run("run", objective)
    packs = build_data(run, "train")
    rows = [row for pack in range(4) for row in packs[pack]]
    pairs = [rows[place : place + 2] for place in range(0, len(rows), 2)]
    gradients = [gradient(run, split) for split in ([pairs], [pairs[:3], pairs[3:]], [[], *([pair] for pair in pairs)])]
    assert gradients[0].abs().max() > 1e-4
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-7)


def gradient(run: FinetuningRun, micro_batches: list[Any]) -> torch.Tensor:
    """Of one optimizer step over these micro-batches, each a list of packs."""
    model = preferences.build_model(run, None)
    loss = preferences.build_loss(run, model)
    torch.manual_seed(5)
    for weight in model.parameters():  # away from the reference, where all log-ratios are 0
        weight.data += 0.05 * torch.randn_like(weight)
    batches = [PreferenceCollate()(packs) for packs in micro_batches]
    items = loss.begin_step(batches)
    for batch in batches:
        loss(model, batch, torch.tensor(items)).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def test_both_answers_of_a_pair_share_a_pack_and_follow_each_other(prepared: dict[str, PreparedData]) -> None:
    for objective in ("dpo", "kto"):
        folder = prepared[objective].folder
        rows, packs = TokenRows.open(folder, "train"), read_packs(folder, "train")
        assert sorted(np.concatenate(list(packs))) == list(range(len(rows)))
        for pack in packs:
            names = [rows[int(row)].sample_id.split("#") for row in pack]
            assert [name for name, _ in names[0::2]] == [name for name, _ in names[1::2]]
            second = "rejected" if objective == "dpo" else "mismatched"
            assert {role for _, role in names[1::2]} == {second}
        assert any(len(pack) > 2 for pack in packs)


def test_a_resume_with_another_loss_is_refused(make_preference_run: MakeRun) -> None:
    run = make_preference_run("run", "dpo", training={"total_jobs": 2})
    finetuning.train(run)
    other = FinetuningConfig(objective="dpo", dpo=DpoConfig(beta=0.2))
    with pytest.raises(ValueError, match="objective"):
        finetuning.train(replace(run, finetuning=other))


@pytest.mark.chain
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_evaluation_tells_accuracy_and_margin_by_source(objective: str, make_preference_run: MakeRun) -> None:
    run = make_preference_run("run", objective, training={"epochs_per_job": 4})
    train_to_the_end(run)
    result = finetuning.evaluate(run)
    assert json.loads(run.folder.evaluation.read_text()) == result
    by_source = result["models"][objective]
    assert by_source["all"] == by_source["synthetic_preferences"]
    assert by_source["all"]["count"] == (12 if objective == "kto" else 6)
    # Right answers and wrong ones begin unlike, so even this model tells them apart.
    assert result["accuracy"] > 0.9 and result["margin"] > 0


@pytest.mark.chain
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_examples_train_in_two_chained_blocks(objective: str, make_run: MakeRun, tmp_path: Path) -> None:
    config = read_run_config(PROJECT / f"configs/examples/{objective}.yaml", ["--dataset.num_rows", "30"])
    module = ModuleFile(PROJECT / "datasets/synthetic_preferences.py")
    model = make_run("unused").model
    request = PreparationRequest(
        dataset=config.dataset, module=module, tokenizer=model.name, objective=config.objective
    )
    training = replace(config.training, epochs_per_job=1, arguments={"report_to": "none"})
    run = replace(
        make_run("example"),
        prepared=prepare(request, tmp_path, lambda line: None).folder,
        finetuning=config.finetuning,
        training=training,
    )
    assert not finetuning.train(run).finished
    assert finetuning.train(run).finished
    assert "margin" in list(run.folder.metrics())[-1]


# --- rows that cannot be learned from


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("objective", "row", "said"),
    [
        ("pairs", {**PAIR, "rejected": "a"}, r"sample made-train-1: chosen and rejected are equal"),
        ("pairs", {**PAIR, "prompt": " "}, r"sample made-train-1: prompt is empty"),
        ("pairs", {**PAIR, "rejected": ""}, r"sample made-train-1: rejected is empty"),
        ("pairs", {"prompt": "q", "chosen": "a"}, r"made-train-1 holds prompt and lacks chosen, rejected"),
        ("labelled", {"prompt": "q", "completion": "a"}, r"made-train-1 holds label None: .* completion and label"),
        ("labelled", {"prompt": "q", "completion": "a", "label": "good"}, r"made-train-1 holds label 'good'"),
        ("labelled", {"prompt": "", "completion": "a", "label": True}, r"made-train-1: prompt is empty"),
        ("labelled", {"prompt": "q", "completion": "", "label": True}, r"made-train-1: completion is empty"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_named(
    objective: Any, row: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    module = tmp_path / "made.py"
    module.write_text(
        f"def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):\n    return [{PAIR!r}, {row!r}]\n"
    )
    request = PreparationRequest(
        dataset=DatasetConfig(name="made"), module=ModuleFile(module), tokenizer=str(tiny_model),
        objective=objective,
    )  # fmt: skip
    with pytest.raises(ValueError, match=said):
        prepare(request, tmp_path, lambda line: None)


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"prompt": [{"role": "user", "content": "q"}], "chosen": {"role": "assistant", "content": "a"},
         "rejected": [{"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
         "rejected": {"from": "gpt", "value": "b"}},
        {key: [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
         for key, answer in (("chosen", "a"), ("rejected", "b"))},
    ],
)  # fmt: skip
def test_all_forms_of_a_pair_give_the_same_rows(row: dict[str, Any], tiny_model: Path) -> None:
    from mixture.formats import canonical_sample
    from mixture.preferences import renderer_for
    from training.models import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for objective in ("pairs", "labelled"):
        renderer = renderer_for(objective, tokenizer, max_length=99, over_length=None, mask_rationale=False)  # type: ignore[arg-type]
        rows = renderer.token_rows([canonical_sample(row, source="s", row_id="r")])
        learned = [tokenizer.decode(row.input_ids[row.loss_mask]).strip() for row in rows]
        assert [answer[0] for answer in learned] == (["a", "b"] if objective == "pairs" else ["a", "b", "b", "a"])


def test_settings_of_another_objective_are_refused() -> None:
    with pytest.raises(ValueError, match=r"finetuning\.dpo is read only where .* is dpo, and it is sft"):
        FinetuningConfig(dpo=DpoConfig())
    with pytest.raises(
        ValueError, match=r"finetuning\.dpo\.label_smoothing is read by sigmoid and robust only, not by"
    ):
        DpoConfig(loss="ipo", label_smoothing=0.1)
