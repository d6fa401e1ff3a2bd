"""The plain text of rows."""

from __future__ import annotations

from typing import Any

import pytest

from mixture.formats import read_content
from mixture.plain_text import plain_text, text_reader

TURNS = [{"role": "user", "content": "Ü?"}, {"role": "assistant", "content": "a"}]
ROWS: list[dict[str, Any]] = [
    {"text": "Ü", "stars": 3},
    {"content": "c"},
    {"text": None, "content": "c"},
    {"text": "t", "code": None},
    {"text": "t", "code": "c"},
    {"text": "t", "code": "c", "test_list": ["assert 1"]},
    {"question": "Ü?", "answer": "a"},
    {"question": "", "answer": "a"},
    {"question": "q", "answer": ["a", "b"]},
    {"question": "q", "answer": "a", "system": "s"},
    {"question": "q", "answer": "a", "system": None},
    {"question": "q", "answer": None, "response": "r"},
    {"answer": "a", "query": "q"},
    {"instruction": "i", "output": "o"},
    {"instruction": "i", "output": "o", "input": "more"},
    {"instruction": "i", "response": "r", "history": [["q", "a"]]},
    {"prompt": "p", "completion": "c"},
    {"prompt": TURNS[:1], "completion": "c"},
    {"prompt": "p", "chosen": "c", "rejected": "r"},
    {"prompt": "p", "chosen": TURNS[1:], "rejected": "r"},
    {"prompt": "p"},
    {"messages": TURNS},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"input_ids": [1, 2]},
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_text_that_is_read_from_a_row_is_that_of_its_content(row: dict[str, Any]) -> None:
    assert text_reader(tuple(row), "auto")(row) == plain_text(read_content(row, "auto"))


@pytest.mark.parametrize("row", [{"question": 1, "answer": "a"}, {"text": 1}, {"colour": "red"}, {}], ids=str)
def test_a_row_without_text_is_refused_as_by_its_format(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as expected:
        read_content(row, "auto")
    with pytest.raises(ValueError) as found:
        text_reader(tuple(row), "auto")(row)
    assert str(found.value) == str(expected.value)
