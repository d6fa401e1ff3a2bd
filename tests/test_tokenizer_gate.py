"""Teacher and student must mean the same by every id: what passes, and what is said where they do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distilling.tokenizer_gate import Vocabulary, overlap, renders_alike, require_same_tokens
from jobs.config import PROJECT

TINY = PROJECT / "configs/models/tiny"


def vocabulary(ids: dict[str, int], name: str = "x") -> Vocabulary:
    return Vocabulary(name=name, ids=ids, sample=list(ids))


def changed_tokenizer(folder: Path, change) -> Path:
    """The tiny tokenizer with its tokenizer.json changed."""
    shutil.copytree(TINY, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("model", ["tiny", "small"])
def test_tokenizer_json_tells_the_same_map_as_the_tokenizer(model: str) -> None:
    folder = PROJECT / "configs/models" / model
    read = Vocabulary.of_folder(folder)
    assert read is not None
    assert read.ids == AutoTokenizer.from_pretrained(folder).get_vocab()


def test_a_folder_without_tokenizer_json_is_left_to_the_first_job(tmp_path: Path) -> None:
    assert Vocabulary.of_folder(tmp_path) is None


def test_the_same_map_and_one_that_is_longer_at_its_end_pass() -> None:
    short, long = vocabulary({"a": 0, "b": 1}), vocabulary({"a": 0, "b": 1, "<new>": 2})
    assert overlap(short, short).agrees
    assert require_same_tokens(short, long).only_second == 1
    assert require_same_tokens(long, short).only_first == 1


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"b": 0, "a": 1}, "'a' is 0 and 1"),
        ({"a": 0, "c": 1}, "1 is 'b' and 'c'"),
        ({"x": 5, "y": 6}, "0 tokens in both, 0 of them with the same id"),
    ],
)
def test_an_id_that_means_two_things_is_refused_with_the_overlap_and_a_way_out(other: dict, told: str) -> None:
    with pytest.raises(ValueError, match="do not read the same tokens") as raised:
        require_same_tokens(vocabulary({"a": 0, "b": 1}, "teacher"), vocabulary(other, "student"))
    assert told in str(raised.value)
    assert "distillation.teacher: text" in str(raised.value)


def test_two_real_tokenizers_with_exchanged_ids_are_told_how_much_of_a_text_differs(tmp_path: Path) -> None:
    def exchange(content: dict) -> None:
        ids = content["model"]["vocab"]
        ids["e"], ids["t"] = ids["t"], ids["e"]

    first, second = (Vocabulary.of_folder(folder) for folder in (TINY, changed_tokenizer(tmp_path / "m", exchange)))
    assert first is not None and second is not None
    with pytest.raises(ValueError, match=r"of a sample text, \d\d% of the first one's tokens mean the same"):
        require_same_tokens(first, second)


def test_templates_are_compared_by_what_they_write(tmp_path: Path) -> None:
    tiny, same, other = (AutoTokenizer.from_pretrained(TINY) for _ in range(3))
    same.chat_template = "{# the same #}" + tiny.chat_template
    other.chat_template = tiny.chat_template + "!"
    assert renders_alike(tiny, same)
    assert not renders_alike(tiny, other)
    other.chat_template = None
    assert not renders_alike(tiny, other)
