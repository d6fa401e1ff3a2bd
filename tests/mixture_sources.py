"""Small sources that tests of the mixture share, in three formats, with duplicates planted inside and across them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mixture.scan import ScanSource

WORDS = ["the", "quick", "brown", "fox", "Señor", "Über", "reads", "ten", "old", "books", "about", "trains", "a"]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def sentence(numbers: random.Random, words: int) -> str:
    return " ".join(numbers.choice(WORDS) for _ in range(words))


def question_row(number: int) -> dict[str, Any]:
    numbers = random.Random(number)
    return {"question": f"Question {number}: {sentence(numbers, 8)}?", "answer": sentence(numbers, 12)}


def chat_row(number: int) -> dict[str, Any]:
    numbers = random.Random(-number - 1)
    turns = [f"Chat {number}: {sentence(numbers, 6)}", sentence(numbers, 20), "And then?", sentence(numbers, 9)]
    roles = ["user", "assistant", "user", "assistant"]
    return {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]}


def code_row(number: int) -> dict[str, Any]:
    numbers = random.Random(number + 10_000_000)
    lines = [f"def function_{number}(x):", *(f"    {sentence(numbers, 7)}" for _ in range(8))]
    return {"text": "\n".join(lines), "path": f"src/{number}.py", "stars": number % 7}


def three_sources(folder: Path, scale: int = 1) -> list[ScanSource]:
    """Per 100 x scale: 100 questions, 200 chats (30 repeated), 100 texts of which 10 repeat a question in capitals."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = [question_row(number) for number in range(100 * scale)]
    chats = [chat_row(number) for number in range(170 * scale)] + [chat_row(number) for number in range(30 * scale)]
    copies = [
        {"text": f"  {row['question'].upper()}\n\n {row['answer']} ", "path": "copy", "stars": 0}
        for row in questions[: 10 * scale]
    ]
    texts = [code_row(number) for number in range(90 * scale)] + copies
    return [
        ScanSource(name="math", files=(write_rows(folder / "math.jsonl", questions),), category="reasoning"),
        ScanSource(name="chat", files=(write_rows(folder / "chat.jsonl", chats),), category="chat"),
        ScanSource(name="code", files=(write_rows(folder / "code.jsonl", texts),), category="code"),
    ]


def silent(line: str) -> None:
    """A report that goes nowhere."""
