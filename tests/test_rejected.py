"""rejected.jsonl holds a few rows of each source and reason, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixture.rejected import write_rejected
from mixture.scan import Rejection


def rejection(source: str, reason: str, line: int) -> Rejection:
    row = f'{{"text": "row {line}, été"'
    return Rejection(source=source, file=Path("a.jsonl"), line=line, reason=reason, detail="why", excerpt=row)


def test_the_first_rows_of_each_source_and_reason_are_written(tmp_path: Path) -> None:
    rejections = [
        rejection(source, reason, line)
        for line in range(1, 6)
        for source, reason in (("one", "empty"), ("one", "too few words"), ("two", "empty"))
    ]
    assert write_rejected(tmp_path / "rejected.jsonl", rejections, rows_per_reason=2) == 6
    rows = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["source"], row["reason"], row["line"]) for row in rows] == [
        ("one", "empty", 1),
        ("one", "too few words", 1),
        ("two", "empty", 1),
        ("one", "empty", 2),
        ("one", "too few words", 2),
        ("two", "empty", 2),
    ]
    assert rows[0] == {
        "source": "one",
        "file": "a.jsonl",
        "line": 1,
        "reason": "empty",
        "detail": "why",
        "row": '{"text": "row 1, été"',
    }


def test_nothing_left_out_gives_an_empty_file(tmp_path: Path) -> None:
    assert write_rejected(tmp_path / "rejected.jsonl", []) == 0
    assert (tmp_path / "rejected.jsonl").read_bytes() == b""


def test_a_file_that_could_not_be_finished_is_not_there(tmp_path: Path) -> None:
    def broken() -> Iterator[Rejection]:
        yield rejection("one", "empty", 1)
        raise ValueError("cut off")

    with pytest.raises(ValueError, match="cut off"):
        write_rejected(tmp_path / "rejected.jsonl", broken())
    assert list(tmp_path.iterdir()) == []
