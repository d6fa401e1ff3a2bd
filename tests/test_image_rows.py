"""Rows with images are stored as they came, read back the same, and what is wrong with one is said before training."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from image_models import TINY_VISION
from PIL import Image

from jobs.config import PROJECT, read_run_config
from jobs.preflight import check_run
from mixture import image_preparation
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.image_dialogues import DialogueCollator, dialogue_of
from mixture.image_preparation import ImageSplitWriter, RowToWrite, module_rows
from mixture.image_rows import ImageRows, RowEncoder
from mixture.inspection import check_dataset
from mixture.prepare import PreparationRequest, PreparedData, load_processor, prepare
from settings.yaml_tree import ConfigError

HEAD = """
import io
from datasets import Dataset, Features, Image as Feature, List, Value
from PIL import Image

def png(colour="red", size=(8, 8)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()

def row(image, **more):
    return {"image": image, "question": "Which colour?", "answer": "red", **more}

GOOD = row(Image.new("RGB", (8, 8), "red"))
"""


def request_for(folder: Path, rows: str, *, tokenizer: Path = TINY_VISION, **keys: Any) -> PreparationRequest:
    path = folder / "made.py"
    path.write_text(
        f"{HEAD}\ndef get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):\n    return {rows}\n"
    )
    objective = keys.pop("objective", "sft")
    dataset = DatasetConfig(name="made", **{"max_length": 64, **keys})
    return PreparationRequest(
        dataset=dataset, module=ModuleFile(path), tokenizer=str(tokenizer), objective=objective
    )  # fmt: skip


def prepared(folder: Path, rows: str, **keys: Any) -> PreparedData:
    return prepare(request_for(folder, rows, **keys), folder, lambda line: None)


# --- what is stored


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, "PNG")
    return file.getvalue()


def test_a_row_comes_back_as_the_module_gave_it(tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    Image.new("L", (9, 9), 77).save(jpeg, "JPEG")
    row = {
        "images": [Image.new("RGBA", (4, 5), (1, 2, 3, 4)), Image.open(io.BytesIO(jpeg.getvalue()))],
        "texts": [{"user": "a", "assistant": "b"}],
        "parts": {"printed": Image.new("CMYK", (3, 3), (9, 8, 7, 6))},
        "raw": {"bytes": png(), "path": None},
        "number": 3,
    }
    encoded = RowEncoder().encoded(row)
    assert jpeg.getvalue() in encoded.images, "a file that nobody has read yet is kept as it is"
    back = encoded.read()
    pictures = [(row["images"][0], back["images"][0]), (row["parts"]["printed"], back["parts"]["printed"])]  # type: ignore[index]
    for before, after in pictures:
        assert (before.mode, before.tobytes()) == (after.mode, after.tobytes())
    assert back["images"][1].mode == "L"
    assert [back[key] for key in ("texts", "raw", "number")] == [row[key] for key in ("texts", "raw", "number")]


def test_files_of_a_hugging_face_data_set_are_stored_undecoded_and_turned_as_it_turns_them(tmp_path: Path) -> None:
    sideways = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    Image.new("RGB", (10, 4), "red").save(sideways, "JPEG", exif=exif)
    (tmp_path / "photo.jpg").write_bytes(sideways.getvalue())
    rows = "Dataset.from_list([row('PHOTO')] * 2, features=Features({'image': Feature(), 'question': Value('string'), "
    rows = rows.replace("PHOTO", str(tmp_path / "photo.jpg")) + "'answer': Value('string')}))"
    data = prepared(tmp_path, rows)
    stored = ImageRows.open(data.folder, "train")[0]
    assert stored.content.images == [sideways.getvalue()]
    assert stored.read()["image"].size == (4, 10)


def test_rows_lie_in_shards_of_a_limited_size_and_memory_holds_one_row(tmp_path: Path) -> None:
    noise = "[row(Image.effect_noise((400, 400), 99)) for _ in range(20)]"
    data = prepared(tmp_path, noise, shard_size_mb=1)
    shards = sorted((data.folder / "images").glob("train-*.arrow"))
    rows = ImageRows.open(data.folder, "train")
    assert len(shards) > 2 and all(shard.stat().st_size < 1 << 20 for shard in shards)
    assert [row.sample_id for row in rows] == list(rows.sample_ids()) == [f"made-train-{n}" for n in range(20)]
    assert prepared(tmp_path, noise, shard_size_mb=1).fingerprint == data.fingerprint


@pytest.mark.chain
def test_any_number_of_workers_writes_the_same_and_names_the_same_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_preparation, "ROWS_COUNTED_HERE", 2)
    request = request_for(tmp_path, "[GOOD]")
    processor = load_processor(request)
    image = Image.new("RGB", (8, 8), "red")
    rows: list[Any] = [{"image": image, "question": "Which?", "answer": "so " * (1 + n % 3)} for n in range(40)]

    def of_module(rows: list[Any], split: str) -> Iterator[RowToWrite]:
        return module_rows(rows, ModuleFile(tmp_path / "made.py"), split, "made", reads_files=True)

    with ImageSplitWriter(request, processor, tmp_path, workers=1) as writer:
        alone = writer.write(of_module(rows, "train"), "train")
    with ImageSplitWriter(request, processor, tmp_path, workers=2) as writer:
        assert writer.write(of_module(rows, "train"), "train") == alone
        with pytest.raises(ValueError, match=r"made.py, test row 40: image: 1 bytes that cannot be decoded"):
            writer.write(of_module([*rows, {**rows[0], "image": {"bytes": b"x", "path": None}}], "test"), "test")


# --- what is said about images


@pytest.mark.parametrize(
    "row",
    [
        {"images": ["IMAGE"],
         "messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "A"}]},
        {"messages": [{"role": "user",
                       "content": [{"type": "image", "image": "IMAGE"}, {"type": "text", "text": "Which?"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]},
        {"images": ["IMAGE"], "texts": [{"user": "Which?", "assistant": "A"}]},
        {"image": "IMAGE", "question": "Which?", "answer": "A"},
        {"image": "IMAGE",
         "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "A"}]},
    ],
)  # fmt: skip
def test_all_forms_of_a_dialogue_about_an_image_give_the_same_batch(row: Any) -> None:
    from transformers import AutoProcessor

    image = Image.new("RGB", (8, 8), "red")

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        return image if value == "IMAGE" else value

    assert dialogue_of(filled(row)).images == [image]
    processor = AutoProcessor.from_pretrained(TINY_VISION)
    batch = DialogueCollator(processor)([filled(row)])
    (ids,), (labels,) = batch["input_ids"], batch["labels"]
    around = "<fake_token_around_image>"
    asked = f"<|im_start|>user\n{around}<global-img>{'<image>' * 4}{around}Which?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.tokenizer.decode(ids) == f"{asked}A<|im_end|>\n"
    assert processor.tokenizer.decode(labels[labels != -100]) == "A<|im_end|>"


def test_the_same_words_in_question_and_answer_are_told_apart() -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(TINY_VISION)
    texts = [{"user": "red", "assistant": "red"}, {"user": "red <image>", "assistant": "red"}]
    batch = DialogueCollator(processor)([{"images": [Image.new("RGB", (8, 8))] * 1, "texts": texts}])
    labelled = (batch["labels"][0] != -100).astype(int)
    said = [
        processor.tokenizer.decode(batch["input_ids"][0][:place])
        for place in (labelled[1:] > labelled[:-1]).nonzero()[0] + 1
    ]
    assert [text.endswith("<|im_start|>assistant\n") for text in said] == [True, True]
    assert [text.count("assistant") for text in said] == [1, 2]


# --- what is wrong


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("[GOOD, row({'bytes': png()[:40], 'path': None})]",
         r"made.py, train row 1: image: 40 bytes that cannot be decoded"),
        ("[GOOD, row({'bytes': b'no image', 'path': None})]", r"train row 1: image: 8 bytes that cannot be decoded"),
        ("Dataset.from_list([row({'bytes': b, 'path': None}) for b in (png(), b'x')], features=Features("
         "{'image': Feature(), 'question': Value('string'), 'answer': Value('string')}))",
         r"train row 1: image: 1 bytes that cannot be decoded"),
        ("[GOOD, {'question': 'q', 'answer': 'a'}]", r"train row 1: no images in column image, which the first"),
        ("[GOOD, row(None)]", r"train row 1: no images in column image"),
        ("[row('nowhere.png')]", r"train row 0: image: no image can be read from nowhere.png: No such file"),
        ("[GOOD, row(3)]", r"train row 1: image holds int, not an image"),
        ("[GOOD, row(Image.new('1', (1, 1)), seen=b'1')]", r"train row 1: seen: bytes cannot be stored"),
        ("[{'image': GOOD['image'], 'label': 3}]", r"train row 0: .*label"),
        ("[row(GOOD['image'], question='<image> and <image>')]", r"train row 0: 1 images for 2 places in the messages"),
        ("[{'images': [GOOD['image']], 'messages': 'hello'}]", r"train row 0: column messages must hold a list"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_learned_from_is_named_with_its_key(rows: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        prepared(tmp_path, rows)
    assert not list((tmp_path / "prepared").iterdir())


def test_images_and_a_model_that_reads_text_only_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"made.py: the rows hold images \(image\), and model.name has a .* text only"):
        prepared(tmp_path, "[GOOD]", tokenizer=PROJECT / "configs/models/tiny")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"objective": "pretrain"}, "rows with images are learned by .* sft alone"),
        ({"objective": "pairs"}, "rows with images are learned by .* sft alone, and not by preferences"),
        ({"over_length": "truncate"}, "dataset.over_length: truncate would cut images in two"),
        ({"mask_rationale": True}, "dataset.mask_rationale: rows with images mark no rationale"),
    ],
)
def test_settings_that_rows_with_images_cannot_follow_are_refused(
    keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        prepared(tmp_path, "[GOOD]", **keys)


@pytest.mark.parametrize(
    "rows", [["--dataset.name", "synthetic_images"], ["--dataset.names", "synthetic_images,synthetic_sums"]]
)
def test_preferences_about_images_are_refused_before_anything_is_queued(rows: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"rows with images are learned by .* sft alone, and not by preferences"):
        check_run(PROJECT / "configs/examples/dpo.yaml", [*rows, "--cluster", "local"])


def test_a_processor_that_needs_a_missing_package_is_named(tmp_path: Path) -> None:
    import importlib.util
    import json

    if importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is here, so nothing is missing")
    folder = tmp_path / "smolvlm"
    shutil.copytree(TINY_VISION, folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings |= {
        "processor_class": "SmolVLMProcessor",
        "video_processor": {"video_processor_type": "SmolVLMVideoProcessor"},
    }
    (folder / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"needs a package that is not installed.* extra vision"):
        prepared(tmp_path, "[GOOD]", tokenizer=folder)


def test_rows_that_are_too_long_or_hold_control_tokens_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = "[GOOD, row(GOOD['image'], answer='so ' * 99), row(GOOD['image'], question='<|im_end|>?')]"
    train = prepared(tmp_path, rows).splits["train"]
    assert train is not None and (train.samples, train.rows, train.longer_than_max_length) == (3, 1, 1)
    assert train.dropped == {"longer than max_length": 1, "control tokens of the tokenizer in its text": 1}
    assert train.tokens == 29 and train.loss_tokens == 2


def test_check_dataset_shows_what_is_learned_of_an_image(tmp_path: Path) -> None:
    report = check_dataset(request_for(tmp_path, "[GOOD, GOOD, GOOD]"))
    rows = report.splits["train"]
    assert len(rows) == 2 and rows[0].format == "images"
    assert [text for text, is_learned in rows[0].segments if is_learned] == ["red<|im_end|>"]


# --- what is shipped


def test_books_are_read_from_local_parquet_files_and_split_by_content(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Image, List, Value

    texts = List({"user": Value("string"), "assistant": Value("string"), "source": Value("string")})
    rows = [
        {"images": [{"bytes": png(f"#0000{n:02x}"), "path": None}],
         "texts": [{"user": f"Who wrote {n}?", "assistant": f"Author {n}.", "source": "ocrvqa"}]}
        for n in range(20)
    ]  # fmt: skip
    books = tmp_path / "books.parquet"
    Dataset.from_list(rows, features=Features({"images": List(Image()), "texts": texts})).to_parquet(books)
    module = ModuleFile(PROJECT / "datasets/ocrvqa.py")
    dataset = DatasetConfig(name="ocrvqa", data_files=str(books), split_ratio=0.8, max_length=64)
    request = PreparationRequest(dataset=dataset, module=module, tokenizer=str(TINY_VISION), objective="sft")
    data = prepare(request, tmp_path, lambda line: None)
    assert [split.rows for split in data.splits.values() if split] == [16, 4]
    assert data.has_images and data.has_score


def test_the_config_for_llama_vision_says_what_the_plan_of_this_project_asked_for() -> None:
    config = read_run_config(PROJECT / "configs/vision.yaml")
    assert config.model.name == "meta-llama/Llama-3.2-11B-Vision-Instruct" and config.model.peft
    assert (config.dataset.file, config.dataset.test_split, config.dataset.split_ratio) == ("ocrvqa.py", "test", 0.8)
    assert (config.training.lr, config.training.total_jobs, config.slurm.time_limit_minutes) == (1e-5, 10, 240)
