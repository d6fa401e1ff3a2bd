"""Rows that share a run of words with evaluation items, found exactly, with a report by source and by item."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

DEFAULT_WORDS = 13
"""Length of a shared run that drops a row; GPT-3's (Brown et al. 2020, appendix C)."""

REPORTED_WORDS = 8
"""Shorter runs that are counted beside, never dropped: 8 words find more leaks and many more false alarms."""

QUESTION_COLUMNS = (
    "question",
    "problem",
    "prompt",
    "instruction",
    "query",
    "turns",
    "messages",
    "conversations",
    "text",
)
"""Columns that hold an evaluation item's question; the first that is filled counts. Answers are not looked for."""

NOT_A_WORD = re.compile(r"[^\w\n]")
LOWERED_ASCII = bytes(ord(NOT_A_WORD.sub(" ", chr(code).lower())) for code in range(128)) + bytes(range(128, 256))


@dataclass(frozen=True)
class EvaluationItem:
    """One question of an evaluation file."""

    file: Path
    number: int
    """1-based: the row of the file."""
    words: tuple[bytes, ...]

    def __str__(self) -> str:
        return f"{self.file.name}:{self.number}"


@dataclass(frozen=True, kw_only=True)
class Contamination:
    """Rows of one source that share words with evaluation items."""

    row_ids: npt.NDArray[np.uint64]
    """Rows that share a run of `words` words, or a line that is a whole shorter item: to be dropped."""
    rows_read: int
    rows_with_shorter_runs: int
    """Rows that share a run of `reported_words` words, those in `row_ids` among them."""
    rows_by_item: dict[str, int] = field(default_factory=dict)
    """Dropped rows by item (FILE:ROW), most first; a row that meets several items counts for each."""


class EvaluationItems:
    """Evaluation items, searchable for runs of words that a text shares with them.

    Of a text, only every (words // 2)-th position is looked up, by a block of words so long that each run of `words`
    words holds one such block whole; runs are compared only around blocks that are known. No shared run is missed.
    Items shorter than a run are met by a line that equals them, white space aside. Takes about 150 bytes of memory
    for each word of the items.
    """

    def __init__(self, items: Iterable[EvaluationItem], words: int = DEFAULT_WORDS) -> None:
        if words < 2:
            raise ValueError(f"a shared run must have at least 2 words, got {words}")
        self.items = tuple(items)
        self.words = words
        self.step = words // 2
        self.block_words = words - self.step + 1
        self.blocks = {block for item in self.items for block in runs(item.words, self.block_words)}
        self.short_items: dict[bytes, list[int]] = {}
        hashes: list[int] = []
        owners: list[int] = []
        for index, item in enumerate(self.items):
            if len(item.words) < words:
                self.short_items.setdefault(b"".join(item.words), []).append(index)
            for run in set(runs(item.words, words)):
                hashes.append(run_hash(run))
                owners.append(index)
        order = np.argsort(np.array(hashes, dtype=np.uint64), kind="stable")
        self.run_hashes = np.array(hashes, dtype=np.uint64)[order]
        self.run_owners = np.array(owners, dtype=np.int64)[order]

    def met_by(self, text: str) -> set[int]:
        """Indices of the items with which the text shares a run, or which are one of its lines."""
        return self.met_by_normalised(normalised_lines(text))

    def met_by_normalised(self, lines: bytes) -> set[int]:
        """`met_by` for a text that has gone through `normalised_lines`."""
        words = lines.split()
        met: set[int] = set()
        columns = (words[offset :: self.step] for offset in range(self.block_words))
        if not self.blocks.isdisjoint(zip(*columns, strict=False)):
            for start in range(0, len(words) - self.block_words + 1, self.step):
                if tuple(words[start : start + self.block_words]) in self.blocks:
                    met.update(self.owners_around(words, start))
        if self.short_items:
            whole_lines = lines.replace(b" ", b"").split(b"\n")
            if not self.short_items.keys().isdisjoint(whole_lines):
                met.update(index for line in whole_lines for index in self.short_items.get(line, ()))
        return met

    def owners_around(self, words: list[bytes], block: int) -> Iterator[int]:
        """Items that own a run of words which holds the block starting at word `block`."""
        first = max(0, block + self.block_words - self.words)
        for run in runs(words[first : block + self.words], self.words):
            digest = np.uint64(run_hash(run))
            at = int(np.searchsorted(self.run_hashes, digest))
            while at < len(self.run_hashes) and self.run_hashes[at] == digest:
                yield int(self.run_owners[at])
                at += 1


@dataclass(frozen=True)
class ContaminationSearch:
    """Evaluation items ready to be looked for, built once for all sources."""

    items: Sequence[EvaluationItem]
    words: int = DEFAULT_WORDS
    reported_words: int = REPORTED_WORDS

    def __post_init__(self) -> None:
        if self.reported_words > self.words:
            raise ValueError(f"reported_words ({self.reported_words}) must not exceed words ({self.words})")

    @cached_property
    def dropping(self) -> EvaluationItems:
        return EvaluationItems(self.items, self.words)

    @cached_property
    def reporting(self) -> EvaluationItems:
        return EvaluationItems(self.items, self.reported_words)

    def find(self, texts: Iterable[tuple[int, str]]) -> Contamination:
        """Rows of (row id, text) of one source to drop, and how many a shorter run would find."""
        row_ids: list[int] = []
        rows_by_item: Counter[int] = Counter()
        rows_read = rows_with_shorter_runs = 0
        for row_id, text in texts:
            rows_read += 1
            lines = normalised_lines(text)
            # A longer shared run holds a shorter one, and a line that equals an item shares every run of it.
            if not self.reporting.met_by_normalised(lines):
                continue
            rows_with_shorter_runs += 1
            if met := self.dropping.met_by_normalised(lines):
                row_ids.append(row_id)
                rows_by_item.update(met)
        by_item = sorted(rows_by_item.items(), key=lambda pair: (-pair[1], pair[0]))
        return Contamination(
            row_ids=np.array(row_ids, dtype=np.uint64),
            rows_read=rows_read,
            rows_with_shorter_runs=rows_with_shorter_runs,
            rows_by_item={str(self.items[index]): count for index, count in by_item},
        )


def runs(words: Sequence[bytes], length: int) -> Iterator[tuple[bytes, ...]]:
    """Every run of `length` consecutive words."""
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def run_hash(run: tuple[bytes, ...]) -> int:
    """64 bits of a run of words."""
    return xxhash.xxh3_64_intdigest(b" ".join(run))


def normalised_lines(text: str) -> bytes:
    """The text in lower case with spaces for punctuation, in UTF-8: what is left are words, spaces and line ends."""
    if text.isascii():
        return text.encode().translate(LOWERED_ASCII)
    return NOT_A_WORD.sub(" ", text.lower()).encode("utf-8", "surrogatepass")


def read_evaluation_items(paths: Iterable[Path]) -> list[EvaluationItem]:
    """The questions of evaluation files: .jsonl, .json (a list of rows), both also as .gz, or .parquet.

    ValueError names a file that is missing, of another kind, or whose rows have no column of QUESTION_COLUMNS.
    """
    return [item for path in paths for item in read_file_items(path)]


def read_file_items(path: Path) -> Iterator[EvaluationItem]:
    """The questions of one evaluation file; rows whose question has no words are left out."""
    for number, row in enumerate(evaluation_rows(path), start=1):
        question = question_text(row) if isinstance(row, Mapping) else None
        if question is None:
            held = f"columns {', '.join(map(str, row))}" if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(
                f"{path}, row {number}: no question to look for in {held}; one of {', '.join(QUESTION_COLUMNS)} is "
                "needed"
            )
        if words := tuple(normalised_lines(question).split()):
            yield EvaluationItem(path, number, words)


def evaluation_rows(path: Path) -> Iterable[Any]:
    """The rows of an evaluation file."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in (".jsonl", ".json", ".parquet"):
        raise ValueError(f"evaluation file {path}: .jsonl, .json or .parquet is read, also .jsonl.gz and .json.gz")
    if not path.is_file():
        raise ValueError(f"evaluation file {path} does not exist")
    if suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = (
            [orjson.loads(line) for line in data.splitlines() if line.strip()]
            if suffix == ".jsonl"
            else orjson.loads(data)
        )
    except (orjson.JSONDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"evaluation file {path} cannot be read: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"evaluation file {path} must hold a list of rows, got {type(rows).__name__}")
    return rows


def question_text(row: Mapping[str, Any]) -> str | None:
    """The question of an evaluation row; of a conversation, what the user says."""
    for column in QUESTION_COLUMNS:
        value = row.get(column)
        if isinstance(value, str) and value:
            return f"{value}\n{row['input']}" if column == "instruction" and row.get("input") else value
        if isinstance(value, list) and value:
            return "\n".join(user_texts(value))
    return None


def user_texts(turns: Iterable[Any]) -> Iterator[str]:
    """What the user says in turns given as texts, {role, content} or {from, value}."""
    for turn in turns:
        if isinstance(turn, str):
            yield turn
        elif isinstance(turn, Mapping) and (turn.get("role") or turn.get("from")) in ("user", "human", "prompter"):
            yield str(turn.get("content") or turn.get("value") or "")
