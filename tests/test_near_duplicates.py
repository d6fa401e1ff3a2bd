"""Near duplicates are those that exact Jaccard similarity finds, within what signatures can tell."""

from __future__ import annotations

import builtins
import importlib.util
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mixture.near_duplicates
from mixture.near_duplicates import NearDuplicates, band_rows, find_near_duplicates, near_earlier

needs_rensa = pytest.mark.skipif(importlib.util.find_spec("rensa") is None, reason="rensa is not installed")


def found_in(folder: Path, *sources: list[str], similarity: float = 0.8) -> NearDuplicates:
    """Near duplicates of the sources, whose row ids count on by ten."""
    ids = iter(range(0, 10**9, 10))
    named = [(f"source{number}", [(next(ids), text) for text in texts]) for number, texts in enumerate(sources)]
    return find_near_duplicates(named, similarity=similarity, scratch_folder=folder)


def words_of(chance: random.Random, count: int) -> list[str]:
    return [f"w{chance.randrange(10**6)}" for _ in range(count)]


def jaccard(one: str, other: str) -> float:
    first, second = ({tuple(text.split()[at : at + 5]) for at in range(len(text.split()) - 4)} for text in (one, other))
    return len(first & second) / len(first | second)


@needs_rensa
@pytest.mark.parametrize("similarity", [0.6, 0.8, 0.9])
def test_rows_clearly_more_or_less_similar_than_asked_are_told_apart(tmp_path: Path, similarity: float) -> None:
    chance = random.Random(11)
    originals = [words_of(chance, 120) for _ in range(60)]
    altered = []
    for words in originals:
        places = chance.sample(range(120), chance.randrange(0, 16))
        altered.append([f"new{at}" if at in places else word for at, word in enumerate(words)])
    texts = [" ".join(words) for words in originals + altered]
    exact = [jaccard(texts[at], texts[60 + at]) for at in range(60)]
    dropped = set((found_in(tmp_path, texts, similarity=similarity).row_ids // 10).tolist())
    assert all(60 + at in dropped for at in range(60) if exact[at] >= similarity + 0.12)
    assert not any(60 + at in dropped for at in range(60) if exact[at] <= similarity - 0.12)
    assert dropped <= set(range(60, 120)), "the earlier row of each pair stays"
    assert 5 < len(dropped) < 55


@needs_rensa
def test_the_source_that_comes_first_keeps_its_row(tmp_path: Path) -> None:
    chance = random.Random(5)
    shared, own = [" ".join(words_of(chance, 80)) for _ in range(4)], [" ".join(words_of(chance, 80)) for _ in range(3)]
    nearly = [f"{text} and a little more" for text in shared]
    found = found_in(tmp_path, own + shared[:2], nearly, [*shared, "a new one of only nine words in this row"])
    assert found.rows_by_source == {"source0": 0, "source1": 2, "source2": 4}
    assert found.row_ids.tolist() == [50, 60, 90, 100, 110, 120]
    assert found.row_ids.dtype == np.uint64


@needs_rensa
def test_case_punctuation_and_spacing_do_not_count(tmp_path: Path) -> None:
    texts = [
        "To be, or not to be: that is the question",
        "to be or not to be - THAT is\n\nthe question!",
        "Yes",
        "yes.",
    ]
    assert found_in(tmp_path, texts).row_ids.tolist() == [10, 30]


@needs_rensa
def test_rows_without_words_are_never_duplicates(tmp_path: Path) -> None:
    found = found_in(tmp_path, ["", "?!", "..."], [])
    assert found.row_ids.tolist() == [] and found.rows_by_source == {"source0": 0, "source1": 0}
    assert found_in(tmp_path).rows_by_source == {}


@needs_rensa
def test_the_same_rows_give_the_same_answer_however_they_are_batched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(2)
    base = [words_of(chance, 60) for _ in range(30)]
    texts = [" ".join(words[: chance.randrange(45, 61)]) for words in base * 6]
    whole = found_in(tmp_path, texts)
    monkeypatch.setattr(mixture.near_duplicates, "BATCH_WORDS", 100)
    monkeypatch.setattr(mixture.near_duplicates, "ROWS_COMPARED_AT_ONCE", 3)
    assert found_in(tmp_path, texts).row_ids.tolist() == whole.row_ids.tolist()
    assert len(whole.row_ids) > 20
    assert list(tmp_path.iterdir()) == [], "signatures on disk are gone at the end"


def test_bands_make_pairs_of_the_asked_similarity_candidates() -> None:
    for similarity in (0.1, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0):
        rows = band_rows(similarity)
        chance_of_a_shared_band = 1 - (1 - similarity**rows) ** (128 // rows)
        assert 128 % rows == 0 and chance_of_a_shared_band >= 0.9
    assert band_rows(0.8) == 8


def test_rows_that_share_a_band_alone_are_not_similar() -> None:
    signatures = np.random.default_rng(0).integers(0, 2**32, (6, 128), dtype=np.uint32)
    signatures[1, :8] = signatures[0, :8]
    signatures[4] = signatures[2]
    signatures[4, 60:80] = 7
    signatures[5] = signatures[0]
    assert near_earlier(signatures, 0.8).tolist() == [False, False, False, False, True, True]


def test_a_missing_library_is_an_error_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_rensa(name: str, *rest: Any) -> Any:
        if name == "rensa":
            raise ImportError(name)
        return real_import(name, *rest)

    real_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_rensa)
    with pytest.raises(ValueError, match=r"dedup\.near needs .* pip install 'baton\[near-duplicates\]'"):
        found_in(tmp_path, ["x"])
