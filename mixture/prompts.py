"""Prompts that a model answers while it learns: their token rows, and the raw rows beside them for the reward.

SPLIT_rows.jsonl    a line for each prompt: `id`, `prompt_messages`, and `row` as the dataset module returned it, or, of
                    a mixture, the canonical sample
SPLIT_rows.npy      uint64 [prompts, 2], sorted: a hash of the id, and where its line begins
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from mixture.formats import Content, Message, Sample
from mixture.render import OverLength, RefusedByTemplateError, Renderer
from mixture.shards import TokenRow

# --- token rows


class PromptRenderer(Renderer):
    """Turns samples into token rows up to where the answer begins; those without room for an answer are dropped."""

    never_ends_turns = False

    def __init__(self, tokenizer: Any, *, max_length: int, over_length: OverLength | None) -> None:
        if over_length in ("split", "truncate"):
            raise ValueError(f"dataset.over_length: a prompt cannot be cut, so {over_length} is refused; use drop")
        super().__init__(tokenizer, objective="sft", max_length=max_length, over_length="drop")

    def token_rows(self, samples: Sequence[Sample]) -> list[TokenRow]:
        """A row for each prompt, without loss. ValueError names the sample that has none."""
        rows = []
        for sample in samples:
            messages = prompt_of(sample.id, sample.content)
            try:
                ids = self.prompt_ids(messages)
            except RefusedByTemplateError as error:
                self.dropped[f"refused by the chat template: {error}"] += 1
                continue
            except ValueError as error:
                raise ValueError(f"sample {sample.id}: {error}") from error
            if len(ids) >= self.max_length:
                self.longer_than_max_length += 1
                self.dropped["no room for an answer within max_length"] += 1
                continue
            rows.append(TokenRow(sample.id, ids.astype(np.int32), np.zeros(len(ids), np.bool_), sample.source))
        return rows


def prompt_of(sample_id: str, content: Content) -> list[Message]:
    """The turns before the answer of a sample, which may hold none; ValueError where nothing is asked."""
    if "prompt" in content:
        prompt = content["prompt"]
        turns: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    elif "messages" in content:
        turns = list(content["messages"])
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
    else:
        raise ValueError(
            f"sample {sample_id} holds {', '.join(content)} and no prompt, which this finetuning.objective answers; "
            "return prompt, messages, or question and answer from the dataset module"
        )
    if not any(turn["content"].strip() for turn in turns if turn["role"] != "system"):
        raise ValueError(f"sample {sample_id}: prompt is empty; leave the row out in the dataset module")
    return turns


# --- raw rows


@dataclass(frozen=True)
class PromptRow:
    """What a reward is told of a prompt."""

    messages: list[Message]
    row: dict[str, Any]


class PromptWriter:
    """Writes the raw rows of one split and their index: 16 bytes a row in memory."""

    def __init__(self, folder: Path, split: str) -> None:
        self.path = rows_file(folder, split)
        self.index = array("Q")
        self.file = self.path.open("wb")
        self.position = 0

    def add(self, sample_id: str, content: Content, row: Any) -> None:
        """Append a row; ValueError where nothing is asked in it, TypeError where JSON cannot hold it."""
        line = {"id": sample_id, "prompt_messages": prompt_of(sample_id, content), "row": row}
        self.index.extend((xxhash.xxh3_64_intdigest(sample_id.encode()), self.position))
        self.position += self.file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def extend(self, samples: Sequence[Sample]) -> None:
        """Append canonical samples, each its own row."""
        for sample in samples:
            self.add(sample.id, sample.content, sample.as_json())

    def finish(self) -> None:
        """Write the index; ValueError where two different rows have one id."""
        self.file.close()
        entries = np.frombuffer(self.index, np.uint64).reshape(-1, 2)
        entries = entries[np.lexsort((entries[:, 1], entries[:, 0]))]
        self.require_one_row_an_id(entries)
        np.save(index_file(self.path), entries)

    def require_one_row_an_id(self, entries: npt.NDArray[np.uint64]) -> None:
        repeated = np.flatnonzero(entries[1:, 0] == entries[:-1, 0])
        with self.path.open("rb") as file:
            for place in repeated.tolist():
                lines = []
                for entry in (place, place + 1):
                    file.seek(int(entries[entry, 1]))
                    lines.append(file.readline())
                if lines[0] != lines[1]:
                    sample_id = orjson.loads(lines[1])["id"]
                    raise ValueError(
                        f"two different rows have the id {sample_id!r}, so a reward could not tell them apart; give "
                        "each row its own id, or leave ids out"
                    )


class PromptRows:
    """The raw rows of a split by sample id, read from mapped files: memory stays flat."""

    def __init__(self, prepared_folder: Path, split: str) -> None:
        self.path = rows_file(prepared_folder, split)
        self.index = np.load(index_file(self.path), mmap_mode="r")
        with self.path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getitem__(self, sample_id: str) -> PromptRow:
        wanted = np.uint64(xxhash.xxh3_64_intdigest(sample_id.encode()))
        place = int(np.searchsorted(self.index[:, 0], wanted))
        if place == len(self.index) or self.index[place, 0] != wanted:
            raise KeyError(f"{self.path} holds no row {sample_id!r}")
        start = int(self.index[place, 1])
        line = orjson.loads(self.data[start : self.data.find(b"\n", start)])
        return PromptRow(line["prompt_messages"], line["row"])


def rows_file(folder: Path, split: str) -> Path:
    return folder / f"{split}_rows.jsonl"


def index_file(rows: Path) -> Path:
    return rows.with_suffix(".npy")
