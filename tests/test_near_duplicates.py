"""Near duplicates are those that exact Jaccard similarity finds, within what signatures can tell."""

from __future__ import annotations

import builtins
import importlib.util
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mixture_sources import silent, write_rows

import mixture.near_duplicates
import mixture.scan
from mixture.near_duplicates import band_rows, find_near_duplicates, near_earlier, sign_chunk
from mixture.scan import Chunk, Scan, ScanSource, scan_sources

NONE = np.empty(0, np.uint64)
needs_rensa = pytest.mark.skipif(importlib.util.find_spec("rensa") is None, reason="rensa is not installed")


def scanned(folder: Path, *sources: list[str]) -> Scan:
    named = [
        ScanSource(
            name=f"source{number}", files=(write_rows(folder / f"{number}.jsonl", [{"text": text} for text in texts]),)
        )
        for number, texts in enumerate(sources)
    ]
    return scan_sources(named, folder / "scan", workers=1, report=silent)


def found_in(folder: Path, *sources: list[str], similarity: float = 0.8, workers: int = 1) -> list[tuple[int, int]]:
    """Near duplicates among the sources, as (source, number of the row in it)."""
    scan = scanned(folder, *sources)
    found = find_near_duplicates(scan, NONE, similarity=similarity, workers=workers, report=silent)
    places = [divmod(row_id, 1 << 32) for row_id in found.tolist()]
    starts = [chunk.source.name for chunk in scan.chunks]
    lines = scan.first_rows
    return [(int(starts[chunk].removeprefix("source")), lines[chunk] + line) for chunk, line in places]


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
    dropped = {row for _, row in found_in(tmp_path, texts, similarity=similarity)}
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
    assert found == [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3)]


@needs_rensa
def test_case_punctuation_and_spacing_do_not_count(tmp_path: Path) -> None:
    texts = [
        "To be, or not to be: that is the question",
        "to be or not to be - THAT is\n\nthe question!",
        "Yes",
        "yes.",
    ]
    assert found_in(tmp_path, texts) == [(0, 1), (0, 3)]


@needs_rensa
def test_rows_without_words_are_never_duplicates(tmp_path: Path) -> None:
    assert found_in(tmp_path, ["?!", "...", "?!"], []) == []


@needs_rensa
def test_the_same_rows_give_the_same_answer_in_any_batches_chunks_and_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(2)
    base = [words_of(chance, 60) for _ in range(30)]
    texts = [" ".join(words[: chance.randrange(45, 61)]) for words in base * 6]
    whole = found_in(tmp_path, texts, texts[:20])
    assert len(whole) > 40
    monkeypatch.setattr(mixture.near_duplicates, "BATCH_WORDS", 100)
    monkeypatch.setattr(mixture.near_duplicates, "ROWS_COMPARED_AT_ONCE", 3)
    monkeypatch.setattr(mixture.scan, "CHUNK_BYTES", 10_000)
    assert found_in(tmp_path, texts, texts[:20], workers=3) == whole
    left = [file.name for folder in (tmp_path / "scan").glob("near-*") for file in folder.iterdir()]
    assert left == ["dropped.npy"], "signatures are gone at the end"


@needs_rensa
def test_rows_that_are_gone_already_are_no_reason_to_drop_others(tmp_path: Path) -> None:
    words = words_of(random.Random(4), 60)
    texts = [" ".join(words), " ".join([*words, "end"]), " ".join([*words, "another end"])]
    scan = scanned(tmp_path, texts)
    gone = np.array([0, 2], np.uint64)
    assert find_near_duplicates(scan, NONE, similarity=0.8, workers=1, report=silent).tolist() == [1, 2]
    assert find_near_duplicates(scan, gone, similarity=0.8, workers=1, report=silent).tolist() == []


@needs_rensa
def test_a_search_cut_off_goes_on_with_the_chunks_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sign(scan: Scan, gone: Any, folder: Path, minhash: Any, chunk: Chunk) -> None:
        signed.append(chunk.number)
        if signed == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        sign_chunk(scan, gone, folder, minhash, chunk)

    signed: list[int] = []
    monkeypatch.setattr(mixture.scan, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(mixture.near_duplicates, "sign_chunk", sign)
    chance = random.Random(6)
    scan = scanned(tmp_path, [" ".join(words_of(chance, 60)) for _ in range(20)] * 2)
    with pytest.raises(KeyboardInterrupt):
        find_near_duplicates(scan, NONE, similarity=0.8, workers=1, report=silent)
    found = find_near_duplicates(scan, NONE, similarity=0.8, workers=1, report=silent)
    assert len(found) == 20
    assert signed == [0, 1, 2, 3, *range(3, len(scan.chunks))]
    again = find_near_duplicates(scan, NONE, similarity=0.8, workers=1, report=silent)
    assert again.tolist() == found.tolist() and signed[-1] == len(scan.chunks) - 1, "the answer is kept"


@needs_rensa
def test_signatures_start_no_threads_that_a_forked_worker_would_wait_for(tmp_path: Path) -> None:
    threads = Path("/proc/self/task")
    before = len(list(threads.iterdir()))
    texts = [f"row {number} has these words" for number in range(5000)]
    assert found_in(tmp_path, texts) == []
    assert len(list(threads.iterdir())) == before


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
