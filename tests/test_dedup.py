"""One row of each content is left, in favour of the first source, and equal content never lies in both splits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mixture_sources import chat_row, question_row, silent, three_sources, write_rows

from mixture import dedup
from mixture import scan as scan_module
from mixture.dedup import UniqueRows, find_duplicates
from mixture.fingerprints import normalised
from mixture.scan import Scan, ScanSource, lines_of, row_ids, scan_sources


def scanned(tmp_path, sources) -> Scan:
    return scan_sources(sources, tmp_path / "scan", workers=1, report=silent)


def unique_of(scan: Scan, **keys) -> UniqueRows:
    return find_duplicates(scan, workers=1, report=silent, **keys)


def left(unique: UniqueRows) -> dict[str, list[tuple[str, str]]]:
    """(normalised text, source) of the rows in each split."""
    texts = dict(unique.scan.texts())
    found: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for chunk in unique.scan.chunks:
        rows = unique.rows(chunk)
        for row_id, in_test in zip(row_ids(chunk, rows).tolist(), unique.selection.in_test(rows), strict=True):
            found["test" if in_test else "train"].append((normalised(texts[row_id]), chunk.source.name))
    return found


@pytest.fixture(params=[(1 << 20, 1 << 18), (3000, 16)], ids=["one partition", "many partitions"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk_bytes, rows = request.param
    monkeypatch.setattr(scan_module, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(dedup, "ROWS_PER_PARTITION", rows)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_of_equal_rows_stays(tmp_path, sizes, workers):
    scan = scanned(tmp_path, three_sources(tmp_path))
    unique = find_duplicates(scan, workers=workers, report=silent)
    assert unique.duplicates == {"math": 0, "chat": 30, "code": 10}
    assert {place: available.rows for place, available in unique.available.items() if available.rows} == {
        ("train", "math"): 100,
        ("train", "chat"): 170,
        ("train", "code"): 90,
    }
    expected: dict[str, str] = {}
    for row_id, text in scan.texts():
        expected.setdefault(normalised(text), scan.chunks[row_id >> 32].source.name)
    assert left(unique)["train"] == list(expected.items())


def test_priority_is_the_order_of_sources(tmp_path, sizes):
    scan = scanned(tmp_path, three_sources(tmp_path)[::-1])
    assert unique_of(scan).duplicates == {"code": 0, "chat": 30, "math": 10}


def test_near_duplicates_found_elsewhere_are_left_out_before(tmp_path, sizes):
    scan = scanned(tmp_path, three_sources(tmp_path))
    first_chat = next(row_id for row_id, text in scan.texts(["chat"]))
    unique = unique_of(scan, also_dropped=np.array([first_chat], np.uint64))
    assert unique.duplicates["chat"] == 29, "its copy stays, as the only one"
    assert unique.available["train", "chat"].rows == 170


@pytest.mark.parametrize("exact", [True, False])
def test_train_and_test_share_no_content_and_no_prompt(tmp_path, sizes, exact):
    sources = three_sources(tmp_path)
    same_prompt = [question_row(number) | {"answer": f"another answer {number}"} for number in range(100)]
    sources.append(ScanSource(name="again", files=(write_rows(tmp_path / "again.jsonl", same_prompt),)))
    unique = unique_of(scanned(tmp_path, sources), exact=exact, test_share=0.3)
    rows = left(unique)
    texts = {split: {text for text, _ in rows[split]} for split in rows}
    prompts = {split: {text.partition("?")[0] for text, source in rows[split] if source != "code"} for split in rows}
    assert not texts["train"] & texts["test"]
    assert not {prompt for prompt in prompts["train"] & prompts["test"] if prompt.startswith("question")}
    assert 0.2 < len(texts["test"]) / (len(texts["test"]) + len(texts["train"])) < 0.4
    assert len(rows["train"]) + len(rows["test"]) == 500 - sum(unique.duplicates.values())
    assert exact == (sum(unique.duplicates.values()) == 40)


def test_the_split_of_a_row_does_not_depend_on_what_else_is_in_the_mix(tmp_path):
    sources = three_sources(tmp_path)
    alone = left(unique_of(scan_sources(sources[1:2], tmp_path / "one", workers=1, report=silent), test_share=0.2))
    among = left(unique_of(scan_sources(sources, tmp_path / "all", workers=1, report=silent), test_share=0.2))
    assert alone["test"] == [row for row in among["test"] if row[1] == "chat"]


def test_chunks_of_one_conversation_stay_together(tmp_path):
    rows = []
    for number in range(300):
        row = chat_row(number)
        rows.append({"id": str(number), "source": "x", "category": None, "metadata": {"parent": number // 3}} | row)
    file = write_rows(tmp_path / "chunks.jsonl", rows)
    scan = scanned(tmp_path, [ScanSource(name="s", files=(file,))])
    unique = unique_of(scan, test_share=0.5)
    (chunk,) = scan.chunks
    index = unique.rows(chunk)
    sides = unique.selection.in_test(index).reshape(100, 3)
    assert (sides == sides[:, :1]).all()
    assert 25 < sides[:, 0].sum() < 75
    assert len(list(lines_of(chunk, index))) == 300


def test_short_prompts_are_counted(tmp_path):
    sources = three_sources(tmp_path)
    unique = unique_of(scanned(tmp_path, sources), short_prompt_bytes=60)
    short = sum(len(question_row(number)["question"].encode()) < 60 for number in range(100))
    assert 0 < short < 100
    assert unique.available["train", "math"].short_prompts == short


def test_an_interrupted_search_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(dedup, "ROWS_PER_PARTITION", 16)
    scan = scanned(tmp_path, three_sources(tmp_path))
    whole = unique_of(scan, test_share=0.1)
    folder = dedup.unique_folder(scan, whole.key)
    for file in [*folder.glob("dropped-000[0-3].npy"), folder / "available.json"]:
        file.unlink()
    again = unique_of(scan, test_share=0.1)
    assert (again.available, again.duplicates) == (whole.available, whole.duplicates)
    assert left(again) == left(whole)


def test_other_settings_are_kept_apart(tmp_path):
    scan = scanned(tmp_path, three_sources(tmp_path))
    assert sum(unique_of(scan, exact=False).duplicates.values()) == 0
    assert sum(unique_of(scan).duplicates.values()) == 40


def test_a_source_whose_rows_are_all_taken_by_others_is_there_with_no_rows(tmp_path):
    first, *_ = three_sources(tmp_path)
    scan = scanned(tmp_path, [first, replace(first, name="copy")])
    unique = unique_of(scan)
    assert unique.available["train", "copy"].rows == 0
    assert unique.duplicates["copy"] == 100
