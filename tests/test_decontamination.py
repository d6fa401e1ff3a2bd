"""Rows that share words with evaluation items are found as a plain search over all runs finds them, and reported."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from pathlib import Path

import pytest

from mixture.decontamination import ContaminationSearch, EvaluationItem, EvaluationItems, read_evaluation_items

REAL_DATA = os.environ.get("BATON_REAL_DATA")
VOCABULARY = [f"w{number}" for number in range(12)] + ["it's", "x_1", "Été", "naïve", "数学", "3.5", "\u2013", "“q”"]


def item(number: int, text: str) -> EvaluationItem:
    return EvaluationItem(Path("eval.jsonl"), number, tuple(word.encode() for word in re.findall(r"\w+", text.lower())))


def items_met(text: str, items: list[EvaluationItem], length: int) -> set[int]:
    """All runs of the text against all runs of every item."""
    words = [word.encode() for word in re.findall(r"\w+", text.lower())]
    held = {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}
    lines = {"".join(re.findall(r"\w+", line.lower())).encode() for line in text.split("\n")}
    return {
        index
        for index, one in enumerate(items)
        if any(one.words[start : start + length] in held for start in range(len(one.words) - length + 1))
        or (len(one.words) < length and b"".join(one.words) in lines)
    }


@pytest.mark.parametrize("length", [2, 3, 5, 8, 13])
def test_the_items_found_are_those_of_a_comparison_of_all_runs(length: int) -> None:
    chance = random.Random(length)
    phrases = [[chance.choice(VOCABULARY) for _ in range(length + chance.randrange(3))] for _ in range(30)]

    def text(parts: int) -> str:
        chosen: list[str] = []
        for _ in range(parts):
            phrase = chance.choice(phrases)
            cut = chance.randrange(len(phrase))
            chosen += chance.choice([phrase, phrase[cut:], phrase[:cut], [chance.choice(VOCABULARY)]])
        return "".join(word + chance.choice([" ", ", ", "\t", "  ", "\n", "\u00a0"]) for word in chosen)

    items = [item(number, text(chance.randrange(1, 4))) for number in range(1, 60)]
    items = [one for one in items if one.words]
    search = EvaluationItems(items, length)
    texts = [text(chance.randrange(1, 8)) for _ in range(600)]
    expected = [items_met(one, items, length) for one in texts]
    assert [search.met_by(one) for one in texts] == expected
    assert 60 < sum(map(bool, expected)) < 600, "the rows must be neither all clean nor all met"


def test_a_run_is_found_at_every_place_of_a_row_and_one_word_less_is_not() -> None:
    words = [f"word{number}" for number in range(40)]
    search = EvaluationItems([item(1, " ".join(words))], 13)
    for start in range(len(words) - 13 + 1):
        for before in range(14):
            row = ["other"] * before + words[start : start + 13] + ["more"] * 9
            assert search.met_by(" ".join(row)) == {0}
            del row[before + 6]
            assert search.met_by(" ".join(row)) == set()


def test_case_punctuation_and_spacing_do_not_hide_a_run() -> None:
    asked = "Write a function, to find the minimum cost path: reach (m, n) from (0, 0)!"
    search = EvaluationItems([item(1, asked)], 13)
    assert search.met_by("Sure.\nWRITE A FUNCTION TO FIND\n\nthe minimum \u2013 cost path reach m n from 0 0") == {0}
    assert search.met_by("write a function to find the maximum cost path reach m n from 0 0") == set()


def test_items_shorter_than_a_run_are_met_by_a_whole_line_only() -> None:
    search = EvaluationItems([item(1, "Who wrote Hamlet?"), item(2, "who wrote hamlet")], 13)
    assert search.met_by("Answer this.\n  who wrote  HAMLET\nShakespeare") == {0, 1}
    assert search.met_by("Tell me who wrote Hamlet?") == set()


def test_dropped_rows_are_counted_by_item_beside_what_shorter_runs_would_find() -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    items = [item(1, long), item(2, "red green blue"), item(3, long + " fifteen")]
    rows = [
        (70, f"see: {long}."),
        (71, "one two three four five six seven eight and then something else"),
        (72, "Red, green, blue"),
        (73, "nothing of all this"),
        (74, long + " fifteen"),
    ]
    found = ContaminationSearch(items).find(iter(rows))
    assert found.row_ids.tolist() == [70, 72, 74]
    assert (found.rows_read, found.rows_with_shorter_runs) == (5, 4)
    assert found.rows_by_item == {"eval.jsonl:1": 2, "eval.jsonl:3": 2, "eval.jsonl:2": 1}


def test_questions_are_read_from_every_kind_of_evaluation_file(tmp_path: Path) -> None:
    rows = [
        {"question": "Question one?", "answer": "no"},
        {"text": "Task two", "code": "x = 1"},
        {"instruction": "Do three", "input": "with this", "output": "done"},
        {"turns": ["Turn four", "and more"]},
        {"conversations": [{"from": "human", "value": "Five"}, {"from": "gpt", "value": "answer"}]},
        {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "Six"}]},
        {"prompt": "?!"},
        {"problem": "Eight", "solution": "8"},
    ]
    lines = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines + b"\n\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    expected = ["question one", "task two", "do three with this", "turn four and more", "five", "six", "eight"]
    for name in ("a.jsonl", "b.jsonl.gz", "c.json"):
        items = read_evaluation_items([tmp_path / name])
        assert [b" ".join(one.words).decode() for one in items] == expected
        assert [one.number for one in items] == [1, 2, 3, 4, 5, 6, 8], "the row without a word is left out"


def test_parquet_files_are_read_too(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"question": ["What is it?"], "idx": [1]}), tmp_path / "a.parquet")
    assert [str(one) for one in read_evaluation_items([tmp_path / "a.parquet"])] == ["a.parquet:1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"question": "q"}\n{"answer": "a"}\n',
            r"row 2: no question to look for in columns answer; one of",
        ),
        ("a.jsonl", b'{"question": "q"}\n{"answ', r"a\.jsonl cannot be read: .*"),
        ("a.jsonl.gz", gzip.compress(b'{"question": "q"}')[:-9], r"a\.jsonl\.gz cannot be read"),
        ("a.json", b'{"question": "q"}', "must hold a list of rows, got dict"),
        ("a.json", b'["q"]', "row 1: no question to look for in str"),
        ("a.txt", b"q", r"\.jsonl, \.json or \.parquet is read"),
        ("a.jsonl", None, "does not exist"),
    ],
)
def test_evaluation_files_that_cannot_be_used_are_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_evaluation_items([tmp_path / name])


def test_lengths_of_runs_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 words"):
        EvaluationItems([], 1)
    with pytest.raises(ValueError, match=r"reported_words \(8\) must not exceed words \(5\)"):
        ContaminationSearch([], words=5)


@pytest.mark.skipif(not REAL_DATA, reason="BATON_REAL_DATA does not name a folder with the original files")
@pytest.mark.parametrize("length", [8, 13])
def test_real_training_rows_meet_the_items_that_a_comparison_of_all_runs_finds(length: int) -> None:
    folder = Path(str(REAL_DATA))
    read = read_evaluation_items([folder / "mbpp.jsonl", folder / "gsm8k_test.jsonl"])
    items = [one for one in read if len(one.words) >= length]
    texts = [" ".join(row.values()) for row in json.loads((folder / "codealpaca_2k.json").read_text(encoding="utf-8"))]
    texts += [json.loads(line)["question"] for line in (folder / "gsm8k_train.jsonl").open(encoding="utf-8")]
    owners: dict[tuple[str, ...], set[int]] = {}
    for index, one in enumerate(items):
        words = [word.decode() for word in one.words]
        for start in range(len(words) - length + 1):
            owners.setdefault(tuple(words[start : start + length]), set()).add(index)
    search = EvaluationItems(items, length)
    rows_met = 0
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        runs = (tuple(words[start : start + length]) for start in range(len(words) - length + 1))
        expected = {index for run in runs for index in owners.get(run, ())}
        assert search.met_by(text) == expected
        rows_met += bool(expected)
    assert rows_met == {8: 119, 13: 4}[length]
