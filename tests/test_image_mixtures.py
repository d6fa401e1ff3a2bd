"""Mixtures with images: rows that a person can read, images kept as they came and once, and what is wrong with them."""

from __future__ import annotations

import io
import json
import multiprocessing
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dataset_hub import played_hub
from image_models import TINY_VISION
from mixture_sources import question_row, write_rows
from PIL import Image

from jobs.config import PROJECT
from mixture.config import DatasetConfig
from mixture.image_files import image_names
from mixture.image_rows import ImageRows
from mixture.mixer import DatasetMixer, MixtureResult, run_mixture
from mixture.prepare import PreparationRequest, PreparedData, prepare
from mixture.recipe import read_mixture
from mixture.render import Objective

BOOKS = '''
from PIL import Image

def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):
    """20 covers, each with two questions in rows of their own; every fourth row is there twice."""
    rows = [{"images": [Image.new("RGB", (9, 9), (number // 2, 0, 0))], "title": f"Book {number // 2}",
             "texts": [{"user": ("Who wrote it?", "When?")[number % 2], "assistant": f"A{number // 2}"}]}
            for number in range(40)]
    return rows + rows[::4]
'''

THREE = """
total: 60
split: {test: 0.2}
datasets:
  shapes: {mix_ratio: 0.4, file: SHAPES}
  books: {mix_ratio: 0.3, file: books.py}
  chat: {mix_ratio: 0.3, path: chat.jsonl}
""".replace("SHAPES", str(PROJECT / "datasets/synthetic_images.py"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two modules with images, and a set of questions and answers."""
    (tmp_path / "books.py").write_text(BOOKS)
    write_rows(tmp_path / "chat.jsonl", [question_row(number) for number in range(60)])
    return tmp_path


def mix(folder: Path, recipe: str, data: str = "data", told: list[str] | None = None, **options: Any) -> MixtureResult:
    (folder / "mix.yaml").write_text(recipe)
    report = (told if told is not None else []).append
    return run_mixture(read_mixture(folder / "mix.yaml"), folder / data, report, **{"workers": 1, **options})


def rows_of(result: MixtureResult, split: str = "train") -> list[dict[str, Any]]:
    assert result.folder is not None
    return [json.loads(line) for file in sorted(result.folder.glob(f"{split}-*")) for line in file.open()]


def prepared(result: MixtureResult, tokenizer: Path = TINY_VISION, objective: Objective = "sft") -> PreparedData:
    assert result.folder is not None
    dataset = DatasetConfig(name="mixture", max_length=128)
    request = PreparationRequest(
        dataset=dataset, mixture=result.folder, tokenizer=str(tokenizer), objective=objective
    )  # fmt: skip
    return prepare(request, result.folder.parent.parent, lambda line: None)


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, "PNG")
    return file.getvalue()


def jpeg(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, "JPEG")
    return file.getvalue()


# --- what is written


def test_rows_name_their_images_which_are_stored_once_beside_them(folder: Path) -> None:
    told: list[str] = []
    result = mix(folder, THREE, told=told)
    assert result.folder is not None
    rows = rows_of(result)
    assert Counter(row["source"] for row in rows) == {"shapes": 24, "books": 18, "chat": 18}
    book = next(row for row in rows if row["source"] == "books")
    question, answer = book["messages"]
    assert [part["type"] for part in question["content"]] == ["image", "text"]
    assert book["metadata"] == {"title": f"Book {answer['content'][1:]}"}
    assert all(isinstance(row["messages"][0]["content"], str) for row in rows if row["source"] == "chat")

    named = {
        name for split in ("train", "test") for row in rows_of(result, split) for name in image_names(row["messages"])
    }
    files = {str(file.relative_to(result.folder)): file for file in result.folder.glob("images/*/*")}
    assert files.keys() == named
    assert all(file.samefile(folder / "data/sources" / name) for name, file in files.items()), "no copies"
    summary = json.loads((result.folder / "download_summary.json").read_text())
    assert summary["datasets"]["books"]["images"] == summary["datasets"]["books"]["rows_with_images"] == 18
    assert summary["image_files"]["files"] == len(files) < 24 + 18 + len(rows_of(result, "test"))
    assert "note: books: its rows hold 50 images, whose tokens depend on the model and are not counted" in told


def test_rows_are_equal_where_text_and_images_are_and_those_of_one_image_share_a_split(folder: Path) -> None:
    result = mix(folder, "split: {test: 0.4}\ndatasets: {books: {file: books.py}}")
    (books,) = result.plan.sources
    assert (books.supply.read, books.supply.dropped) == (50, {"duplicate": 10})
    train, test = (
        {name for row in rows_of(result, split) for name in image_names(row["messages"])} for split in ("train", "test")
    )
    assert train and test and not train & test
    assert len(rows_of(result)) == 2 * len(train)


@pytest.mark.chain
def test_workers_and_kills_change_no_byte(folder: Path) -> None:
    unbroken = mix(folder, THREE, "whole", workers=2)
    mixture = read_mixture(folder / "mix.yaml")
    whole = files_of(folder / "whole/mixtures")
    context = multiprocessing.get_context("fork")
    finished = 0
    for files in (3, 60, 200, 290):  # in the first source, between the sources, while images are brought
        process = context.Process(target=run_mixture, args=(mixture, folder / "killed", str))
        process.start()
        while process.is_alive() and sum(1 for _ in (folder / "killed").rglob("*")) < files:
            time.sleep(0.0005)
        process.kill()
        process.join()
        finished += process.exitcode == 0
    assert finished < 4
    again = mix(folder, THREE, "killed")
    assert again.key == unbroken.key
    assert files_of(folder / "killed/mixtures") == whole


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of the mixture in a folder; lock file and summary tell where they lie."""
    files = [file for file in folder.rglob("*") if file.is_file() and "scans" not in file.parts]
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in files
        if file.suffix in (".jsonl", ".png") or file.name == "MIXED"
    }


def test_both_layouts_and_a_joined_file_have_the_images(folder: Path) -> None:
    recipe = THREE.replace("total: 60", "total: 60\nlayout: both\ncompress: zstd")
    result = mix(folder, recipe)
    assert result.folder is not None
    assert {part.file for part in result.parts} >= {"train-00000.jsonl.zst", "other/books.jsonl.zst"}
    assert list(result.folder.glob("images/*/*"))
    joined = Path(
        DatasetMixer(folder / "mix.yaml").prepare_dataset(folder / "out/train.jsonl", cache_dir=folder / "data")
    )
    names = [name for line in joined.open() for name in image_names(json.loads(line)["messages"])]
    assert names and all((joined.parent / name).is_file() for name in names)


def test_another_mixture_in_the_same_folder_leaves_no_image_of_the_first(folder: Path) -> None:
    out = f"output_dir: {folder / 'out'}\n"
    mix(folder, out + THREE)
    assert list((folder / "out").glob("images/*/*"))
    texts = mix(folder, out + "datasets: {chat: {path: chat.jsonl}}")
    assert not list((folder / "out").glob("images/*/*"))
    assert not prepared(texts, PROJECT / "configs/models/tiny").has_images


# --- sources


def rows_from(folder: Path, recipe: str) -> list[dict[str, Any]]:
    result = mix(folder, f"split: {{train: 1}}\ndatasets: {{mine: {recipe}}}")
    return sorted(rows_of(result), key=lambda row: row["id"])


def stored(folder: Path, row: dict[str, Any]) -> list[bytes]:
    return [(folder / "data/sources" / name).read_bytes() for name in image_names(row["messages"])]


def test_local_rows_name_images_by_paths_in_any_form(folder: Path) -> None:
    mine = folder / "mine"
    mine.mkdir()
    (mine / "a.png").write_bytes(png())
    (mine / "b.JPG").write_bytes(jpeg())
    parts = [{"type": "text", "text": "Compare "}, {"type": "image", "image": "a.png"}, {"type": "image"}]
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "A"}]
    write_rows(
        mine / "rows.jsonl",
        [
            {"image": "a.png", "conversations": turns, "parent": "p"},
            {"question": "No image?", "answer": "None.", "image": None},
            {"images": [str(mine / "b.JPG")], "question": "Which?", "answer": "B"},
            {"messages": [{"role": "user", "content": parts[:2]}, {"role": "assistant", "content": "C"}]},
        ],
    )
    rows = rows_from(folder, "{path: mine/rows.jsonl}")
    assert [stored(folder, row) for row in rows] == [[png()], [], [jpeg()], [png()]]
    content = [row["messages"][0]["content"] for row in rows]
    assert content[1] == "No image?"
    assert [[part["type"] for part in parts] for parts in (content[0], content[2], content[3])] == [
        ["image", "text"],
        ["image", "text"],
        ["text", "image"],
    ]


def test_files_with_images_and_without_are_one_source(folder: Path) -> None:
    (folder / "a.png").write_bytes(png())
    write_rows(folder / "rows.jsonl", [{"image": "a.png", "question": "Which?", "answer": "A"}])
    rows = rows_from(folder, "{path: [rows.jsonl, chat.jsonl]}")
    assert len(rows) == 61 and [bool(stored(folder, row)) for row in rows[:2]] == [True, False]


def test_a_folder_of_images_with_metadata_is_a_source(folder: Path) -> None:
    write_rows(
        folder / "metadata.jsonl",
        [
            {"file_name": f"{number}.png", "question": "Which colour?", "answer": colour}
            for number, colour in enumerate(("red", "blue"))
        ],
    )
    for number, colour in enumerate(("red", "blue")):
        (folder / f"{number}.png").write_bytes(png(colour))
    assert [stored(folder, row) for row in rows_from(folder, "{path: metadata.jsonl}")] == [[png("red")], [png("blue")]]


def test_images_in_parquet_files_are_kept_as_they_are_here_and_on_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Feature

    texts = List({"user": Value("string"), "assistant": Value("string")})
    rows = [{"images": [{"bytes": jpeg(), "path": None}], "texts": [{"user": "Which?", "assistant": "A"}]},
            {"images": [], "texts": [{"user": "None?", "assistant": "No"}]}]  # fmt: skip
    Dataset.from_list(rows, features=Features({"images": List(Feature()), "texts": texts})).to_parquet(
        folder / "a.parquet"
    )
    local = rows_from(folder, "{path: a.parquet}")
    assert [stored(folder, row) for row in local] == [[jpeg()], []]
    with played_hub(folder / "hub", monkeypatch, folder / "cache") as hub:
        hub.write("org/covers/train.parquet", (folder / "a.parquet").read_bytes())
        assert [row["messages"] for row in rows_from(folder, "{hub: org/covers, file: train.parquet}")] == [
            row["messages"] for row in local
        ]


# --- what is wrong


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "nowhere.png", "question": "q", "answer": "a"},
         r"rows.jsonl, row 1: image: no image can be read from .*nowhere.png: No such file"),
        ({"image": "text.png", "question": "q", "answer": "a"},
         r"rows.jsonl, row 1: 4 bytes that cannot be decoded as an image"),
        ({"question": "<image>q", "answer": "a"}, "row 1: a place for an image in its text, and no image"),
        (["image.png"], r"rows.jsonl, row 1: not a JSON object: \[.image.png.\]"),
        ({"image": {"bytes": "iVBOR", "path": None}, "question": "q", "answer": "a"},
         "row 1: an image's bytes are of type str; give a path, or a Parquet file"),
        ({"image": "a.png", "label": 3}, "row 1: .*label"),
        ({"image": "a.png", "question": "q", "answer": "a", "mask": {"bytes": "", "path": ""}},
         "row 1: column mask holds an image; they are read from image, images and messages alone"),
    ],
)  # fmt: skip
def test_a_row_whose_images_cannot_be_had_is_named(folder: Path, row: dict[str, Any], said: str) -> None:
    (folder / "a.png").write_bytes(png())
    (folder / "text.png").write_bytes(b"text")
    write_rows(folder / "rows.jsonl", [{"image": "a.png", "question": "q", "answer": "a"}, row])
    with pytest.raises(ValueError, match=said):
        rows_from(folder, "{path: rows.jsonl}")


def test_what_cannot_be_trained_on_is_told_with_its_source_and_row(folder: Path) -> None:
    result = mix(folder, THREE)
    assert result.folder is not None
    with pytest.raises(ValueError, match=r"rows of the mixture hold images, and model.name has a .* reads text only"):
        prepared(result, PROJECT / "configs/models/tiny")
    with pytest.raises(ValueError, match=r"rows with images are learned by .* sft alone"):
        prepared(result, objective="pretrain")
    row = next(row for row in rows_of(result) if row["source"] == "books")
    (file,) = (result.folder / name for name in image_names(row["messages"]))
    content = file.read_bytes()
    where = r"row books_\d+ of books: "
    file.unlink()
    with pytest.raises(ValueError, match=where + rf"no image can be read from {file}: No such file"):
        prepared(result)
    file.write_bytes(content[:-20])
    with pytest.raises(ValueError, match=where + rf"{file} has changed since it was stored"):
        prepared(result)
    write_rows(folder / "notes.jsonl", [{"text": f"Note {number}, plain text"} for number in range(9)])
    texts = mix(folder, THREE.replace("chat.jsonl", "notes.jsonl"))
    with pytest.raises(
        ValueError, match="of chat: it is no conversation, which rows beside images must be: leave chat"
    ):
        prepared(texts)
    with pytest.raises(
        ValueError, match=r"datasets\.books\.format: rows with images are read as they are; leave it out"
    ):
        mix(folder, THREE.replace("books.py", "books.py, format: messages"))


def test_an_image_that_ends_too_early_is_told_before_training(folder: Path) -> None:
    (folder / "a.png").write_bytes(png()[:-30])
    write_rows(folder / "rows.jsonl", [{"image": "a.png", "question": "q", "answer": "a"}])
    result = mix(folder, "split: {train: 1}\ndatasets: {mine: {path: rows.jsonl}}")
    with pytest.raises(ValueError, match=r"row mine_00000000 of mine: messages\[0\].* cannot be decoded as an image"):
        prepared(result)


# --- prepared


def test_rows_with_and_without_images_are_prepared_in_one_order_with_their_stages(folder: Path) -> None:
    result = mix(folder, "short_prompts_first: {tokens: 6, share: 0.5}\n" + THREE)
    data = prepared(result)
    train, test = data.splits["train"], data.splits["test"]
    assert train is not None and test is not None and data.has_images
    assert train.formats == {"rows with images": 42, "rows without images": 18}
    assert {name: source.rows for name, source in train.sources.items()} == {"shapes": 24, "books": 18, "chat": 18}
    assert train.stages == [0, sum(result.parts[0].rows.values())]
    assert [row.sample_id for row in ImageRows.open(data.folder, "train")] == [row["id"] for row in rows_of(result)]
    assert test.rows == len(rows_of(result, "test"))


def test_a_text_that_speaks_of_an_image_and_has_none_is_left_out_and_counted(folder: Path) -> None:
    answers = ("<image/>", "<image>")
    write_rows(folder / "chat.jsonl", [{"question": "An image in SVG?", "answer": answer} for answer in answers])
    result = mix(folder, "split: {train: 1}\ndatasets: {books: {file: books.py}, chat: {path: chat.jsonl}}")
    train = prepared(result).splits["train"]
    assert train is not None and (train.samples, train.rows) == (42, 41)
    assert train.dropped == {"a place for an image in its text, and no image": 1}
