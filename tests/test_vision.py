"""Models learn from images: two blocks equal one run, in any micro-batches, with the module's collator or ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from image_models import FAMILIES
from trained_runs import assert_identical, train_to_the_end, trained_weights

import finetuning
from jobs import launch
from jobs.config import PROJECT
from jobs.exit_code import ExitCode
from jobs.job import run_job
from jobs.plan import plan_run
from jobs.preflight import check_run
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile, ModuleScore
from mixture.mixer import run_mixture
from mixture.prepare import PreparationRequest, PreparedData, prepare
from mixture.recipe import Mixture, SourceConfig
from phases import images
from training.block import build_data
from training.checkpoints import newest_valid
from training.config import EvaluationConfig, LmEvalConfig, LoraConfig
from training.distributed import Ranks
from training.evaluation import GenerationScore
from training.run import FinetuningRun
from training.run_folder import RunFolder
from training.vision import scored_answers_about_images

pytestmark = pytest.mark.chain

MakeRun = Callable[..., FinetuningRun]

COOKBOOK_MODULE = '''
"""Written as llama-cookbook wants it: rows of a Hugging Face data set with PIL images, and a collator of its own."""
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PilImage

TEXTS = List({"user": Value("string"), "assistant": Value("string")})

def get_custom_dataset(dataset_config, processor, split, split_ratio=0.9):
    rows = [{"images": [PilImage.new("RGB", (20 + n, 24), (10 * n, 0, 99))],
             "texts": [{"user": f"Is it {n}?", "assistant": "It is" + " so" * n}]} for n in range(13)]
    dataset = Dataset.from_list(rows, features=Features({"images": List(Image()), "texts": TEXTS}))
    return dataset.train_test_split(test_size=1 - split_ratio, shuffle=True, seed=42)[split]

class Collator:
    def __init__(self, processor):
        self.processor = processor
        self.processor.tokenizer.padding_side = "right"

    def __call__(self, samples):
        dialogs, images = [], []
        for sample in samples:
            (image,) = sample["images"]
            assert isinstance(image, PilImage.Image)
            turn = sample["texts"][0]
            question = [{"type": "image"}, {"type": "text", "text": turn["user"].strip()}]
            answer = [{"type": "text", "text": turn["assistant"].strip()}]
            dialogs.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
            images.append([image.convert("RGB")])
        text = self.processor.apply_chat_template(dialogs)
        batch = self.processor(images=images, text=text, padding=True, return_tensors="pt")
        labels = batch["input_ids"].clone()
        begin = self.processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
        for row, ids in zip(labels, batch["input_ids"]):
            row[: (ids == begin).nonzero()[-1] + 3] = -100
        labels[batch["attention_mask"] == 0] = -100
        batch["labels"] = labels
        return batch

def get_data_collator(processor):
    return Collator(processor)

def score(prediction, row):
    assert isinstance(row["images"][0], PilImage.Image)
    return float(prediction == row["texts"][0]["assistant"])
'''


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = FAMILIES[request.param](tmp_path_factory.mktemp("vision") / request.param)
    return folder


SHAPES = ModuleFile(PROJECT / "datasets/synthetic_images.py")


def prepared(model: Path, module: ModuleFile, data: Path, **keys: Any) -> PreparedData:
    dataset = DatasetConfig(name=module.path.stem, max_length=64, **keys)
    request = PreparationRequest(dataset=dataset, module=module, tokenizer=str(model), objective="sft")
    return prepare(request, data, lambda line: None)


@pytest.fixture(scope="module")
def shapes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """13 training rows and 3 test rows."""
    return prepared(model, SHAPES, tmp_path_factory.mktemp("data"), module_keys={"num_rows": 16})


@pytest.fixture
def make_image_run(make_run: MakeRun, model: Path, shapes: PreparedData) -> MakeRun:
    def make(name: str, *, data: PreparedData = shapes, module: ModuleFile = SHAPES, **keys: Any) -> FinetuningRun:
        keys["model"] = {"name": str(model), **keys.get("model", {})}
        run = make_run(name, **keys)
        return replace(run, module=module, prepared=data.folder, dataset=DatasetConfig(name="images", max_length=64))

    return make


# --- the chain


def test_two_blocks_equal_one_uninterrupted_run_bit_for_bit(make_image_run: MakeRun) -> None:
    training = {"gradient_accumulation": 2, "max_grad_norm": 0.5}
    chain = make_image_run("chain", training={**training, "epochs_per_job": 1, "total_jobs": 2})
    whole = make_image_run("whole", training={**training, "epochs_per_job": 2, "total_jobs": 1})
    assert_identical(trained_weights(chain), trained_weights(whole))
    first, last = [event for event in chain.folder.events() if event["event"] == "block_end"]
    assert last["eval_loss"] < first["eval_loss"]


def test_an_adapter_leaves_the_vision_tower_alone_unless_asked(make_image_run: MakeRun) -> None:
    base = make_image_run("base")
    finetuning.train(base)
    keys = {"name": str(base.folder.export), "from_scratch": False, "peft": True, "merge_adapter": True}
    for name, train_vision in (("text", None), ("all", True)):
        keys |= {"lora": LoraConfig(r=2), "train_vision": train_vision}
        run = make_image_run(name, model=keys, training={"total_jobs": 2})
        trained = [weight for weight in trained_weights(run) if "lora" in weight]
        assert trained and any("vision" in weight for weight in trained) == (train_vision is True)
    for exclude in (["q_proj"], r".*\.q_proj"):
        more = {**keys, "train_vision": False, "merge_adapter": False, "adapter": {"exclude_modules": exclude}}
        weights = images.build_model(make_image_run("excluded", model=more), None).state_dict()
        adapted = {name.split(".lora_")[0] for name in weights if "lora" in name}
        assert any(name.endswith("k_proj") for name in adapted)
        assert not any("vision" in name or name.endswith("q_proj") for name in adapted)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    for folder in (base.folder.export, run.folder.export / "merged"):
        exported = AutoModelForImageTextToText.from_pretrained(folder)
        end_of_turn = AutoProcessor.from_pretrained(folder).tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert end_of_turn in exported.generation_config.eos_token_id


def test_a_vision_tower_can_be_kept_as_it_is(make_image_run: MakeRun) -> None:
    run = make_image_run("run", model={"train_vision": False})
    before = images.build_model(run, None).state_dict()
    train_to_the_end(run)
    after = images.build_model(run, newest_valid(run.folder.checkpoints)[0]).state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and not any("vision_model" in name for name in changed)


def test_what_rows_with_images_cannot_follow_is_refused(make_image_run: MakeRun) -> None:
    with pytest.raises(ValueError, match=r"training\.parallelism: deepspeed sums .* use ddp, or fsdp"):
        finetuning.train(make_image_run("run", training={"parallelism": "deepspeed"}))
    run = make_image_run("run")
    run = replace(run, evaluation=replace(run.evaluation, lm_eval=LmEvalConfig(tasks=["arc_easy"])))
    with pytest.raises(ValueError, match=r"evaluation\.lm_eval: .* the rows hold images; leave it out"):
        finetuning.train(run)


def test_processes_that_read_ahead_change_no_loss_and_no_weight(make_image_run: MakeRun) -> None:
    shared = {"total_jobs": 2, "log_every": 1}
    here = make_image_run("here", training=shared)
    ahead = make_image_run(
        "ahead", training={**shared, "arguments": {"report_to": "none", "dataloader_num_workers": 2}}
    )
    assert_identical(trained_weights(ahead), trained_weights(here))
    losses = [[line["loss"] for line in run.folder.metrics() if "loss" in line] for run in (ahead, here)]
    assert losses[0] == losses[1] and len(losses[0]) > 4


def test_two_blocks_on_a_mixture_of_images_and_texts_equal_one_uninterrupted_run(
    make_image_run: MakeRun, model: Path, tmp_path: Path
) -> None:
    shapes = [
        SourceConfig(name=name, file=str(SHAPES.path), options={"num_rows": 9, "seed": seed})
        for seed, name in enumerate(("some", "others"))
    ]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(f'{{"question": "Is it {number}?", "answer": "So it is."}}\n' for number in range(6)))
    sources = (*shapes, SourceConfig(name="chat", path=str(chat)))
    mixture = run_mixture(Mixture(name="mix", sources=sources, held_out=0.2), tmp_path, lambda line: None, workers=1)
    dataset = DatasetConfig(name="mixture", max_length=64)
    request = PreparationRequest(
        dataset=dataset, mixture=mixture.folder, tokenizer=str(model), objective="sft"
    )  # fmt: skip
    data = prepare(request, tmp_path, lambda line: None)
    train = data.splits["train"]
    assert train is not None and data.splits["test"] is not None and set(train.sources) == {"some", "others", "chat"}

    def run(name: str, **training: Any) -> FinetuningRun:
        training |= {"batch_size": 3, "gradient_accumulation": 2}
        return replace(make_image_run(name, data=data, training=training), module=None)

    chain = run("chain", epochs_per_job=1, total_jobs=2)
    assert_identical(trained_weights(chain), trained_weights(run("whole", epochs_per_job=2, total_jobs=1)))
    assert finetuning.evaluate(chain)["loss"] > 0
    packs = [build_data(chain, "train")[number] for number in range(4)]
    assert {bool(pack[0].content.images) for pack in packs} == {True, False}
    torch.testing.assert_close(
        gradient(chain, [[pack] for pack in packs]), gradient(chain, [packs]), rtol=1e-3, atol=1e-6
    )


# --- the loss


def gradient(run: FinetuningRun, micro_batches: list[Any]) -> torch.Tensor:
    """Of one optimizer step over these micro-batches, each a list of packs."""
    network = images.build_model(run, None)
    batches = [images.image_collate(run)(packs) for packs in micro_batches]
    items = torch.tensor(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches))
    for batch in batches:
        images.compute_loss(network, batch, items).backward()
    return torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None])


def test_micro_batches_and_padding_do_not_change_the_loss(make_image_run: MakeRun) -> None:
    run = make_image_run("run")
    packs = [build_data(run, "train")[number] for number in range(4)]
    whole = gradient(run, [packs])
    assert whole.abs().max() > 1e-4
    for split in ([packs[:1], packs[1:]], [[], *([pack] for pack in packs)]):
        torch.testing.assert_close(gradient(run, split), whole, rtol=1e-3, atol=1e-6)


def test_only_what_the_assistant_says_is_learned(make_image_run: MakeRun) -> None:
    run = make_image_run("run")
    processor = images.build_processor(run)
    data = build_data(run, "train")
    batch = images.image_collate(run)([data[number] for number in range(len(data))])
    for number, labels in enumerate(batch["labels"]):
        said = processor.tokenizer.decode(labels[labels != -100])
        assert said == data[number][0].read()["messages"][-1]["content"] + "<|im_end|>"
    assert int((batch["labels"] != -100).sum()) == sum(data[number][0].loss_tokens for number in range(len(data)))


# --- answers

SEVERAL_IMAGES = """
from PIL import Image

def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):
    return [{"images": [Image.effect_noise((20 + 30 * (n % 2), 20), 99) for _ in range(1 + n % 3 // 2)],
             "messages": [{"role": "user", "content": "How many?" + " And now?" * (n % 4)},
                          {"role": "assistant", "content": "Two"}]} for n in range(11)]
"""


def test_answers_in_batches_are_those_of_one_row_after_another(
    model: Path, make_image_run: MakeRun, tmp_path: Path
) -> None:
    module = ModuleFile(tmp_path / "several.py")
    module.path.write_text(SEVERAL_IMAGES)
    run = make_image_run("run", data=prepared(model, module, tmp_path), module=module)
    network, rows, collate = images.build_model(run, None), build_data(run, "test"), images.image_collate(run)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim > 1 or weight.numel() == 1 else None
    batch_sizes: list[int] = []

    def noting(packs: list[Any]) -> dict[str, Any]:
        batch_sizes.append(len(packs))
        return collate(packs)

    def answers(batch_size: int) -> GenerationScore:
        return scored_answers_about_images(
            network,
            images.build_processor(run),
            rows,
            noting,  # type: ignore[arg-type]
            ModuleScore(lambda prediction, row: float(len(row["images"]))),
            config=EvaluationConfig(limit=10, max_new_tokens=8),
            batch_size=batch_size,
            ranks=Ranks(),
        )

    one_by_one, in_batches = answers(1), answers(4)
    assert batch_sizes == [1] * 10 + [4, 3, 3]
    assert len({example["prediction"] for example in one_by_one.examples}) > 3
    assert in_batches == one_by_one
    assert [example["prompt"].count("And now?") for example in in_batches.examples] == [n % 4 for n in range(10)]


# --- modules written for llama-cookbook


def test_a_module_written_for_llama_cookbook_runs_unchanged(
    model: Path, make_image_run: MakeRun, tmp_path: Path
) -> None:
    module = ModuleFile(tmp_path / "cookbook.py")
    module.path.write_text(COOKBOOK_MODULE)
    data = prepared(model, module, tmp_path / "data", limit=8, split_ratio=0.7)
    assert data.has_images and data.splits["train"].rows == 8
    run = make_image_run("run", data=data, module=module, training={"total_jobs": 2})
    train_to_the_end(run)
    result = finetuning.evaluate(run)
    assert json.loads(run.folder.evaluation.read_text()) == result
    assert result["scored_rows"] == 4 and result["examples"][0]["prompt"].count("Is it")
    assert "It is" not in result["examples"][0]["prompt"]


# --- the example


def test_the_example_trains_in_two_chained_blocks_and_answers_questions(tmp_path: Path) -> None:
    folders = ["--runs_dir", str(tmp_path / "runs"), "--data_dir", str(tmp_path / "data"), "--cluster", "local"]
    small = ["--dataset.num_rows", "30", "--training.epochs_per_job", "1", "--evaluation.limit", "4"]
    checked = check_run(PROJECT / "configs/examples/vision.yaml", [*folders, *small])
    run: RunFolder = launch.open_run_folder(checked, plan_run(checked).data_key, print)
    for kind in ("prepare", "block", "block", "evaluate"):
        assert run_job(kind, run) == ExitCode.DONE  # type: ignore[arg-type]
    result = json.loads(run.evaluation.read_text())
    assert result["scored_rows"] == 4 and "colour" in str(result["examples"])


def test_the_example_of_a_mixture_trains_on_rows_with_images_and_without(tmp_path: Path) -> None:
    folders = ["--runs_dir", str(tmp_path / "runs"), "--data_dir", str(tmp_path / "data"), "--cluster", "local"]
    small = ["--training.epochs_per_job", "1", "--training.total_jobs", "1", "--dataset.limit", "24"]
    checked = check_run(PROJECT / "configs/examples/vision_mixture.yaml", [*folders, *small])
    run: RunFolder = launch.open_run_folder(checked, plan_run(checked).data_key, print)
    for kind in ("prepare", "block", "evaluate"):
        assert run_job(kind, run) == ExitCode.DONE  # type: ignore[arg-type]
    data = PreparedData.open(next((tmp_path / "data/prepared").iterdir()))
    assert data is not None and data.splits["train"] is not None
    assert data.splits["train"].formats.keys() == {"rows with images", "rows without images"}
    assert json.loads(run.evaluation.read_text())["loss"] < 9
