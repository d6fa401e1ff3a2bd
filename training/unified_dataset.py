"""One PyTorch data set over prepared JSONL for every training phase; a line is tokenised when it is asked for."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import orjson
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mixture.formats import Sample, canonical_sample
from mixture.preferences import as_messages, last_turns
from mixture.render import Renderer, generation_prompt

Phase = Literal["pretrain", "sft", "dpo", "ppo", "rlaif"]
Shifted = tuple[Tensor, Tensor, Tensor]
Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

SCANNED_BYTES = 1 << 24


class UnifiedDataset(Dataset[Any]):
    """The rows of one JSONL file as padded tensors, ready for a DataLoader's own collate function.

    - `pretrain`, `sft`: (X, Y, loss_mask), each int64 [max_length - 1]. Y is X one token later; loss_mask is 1 where Y
      counts: everywhere but padding, or in assistant turns only.
    - `dpo`: a dict with `chosen_ids`, `rejected_ids`, their `_attention_mask`, and `chosen_mask`, `rejected_mask`,
      1 in the answers; each int64 [max_length].
    - `ppo`, `rlaif`: a dict with `input_ids` and `attention_mask`, int64 [max_length]: all before the answer, padded on
      the left as generation needs it.

    Rows are in any format of mixture/formats.py. Longer ones are cut: prompts of `ppo` and `rlaif` at the left, all
    others at the right. Memory is 8 bytes a row; the file is mapped, and may be shared by loader processes.

    Raises:
        ValueError: no such file or phase, an empty or compressed file, a row that does not suit the phase.
    """

    def __init__(
        self, data_path: str | Path, tokenizer: Any, max_length: int = 512, phase: Phase | str = "pretrain"
    ) -> None:
        if phase not in get_args(Phase):
            raise ValueError(f"phase must be one of {', '.join(get_args(Phase))}, got {phase!r}")
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}")
        self.data_path = Path(data_path)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.phase = phase
        self.pad_id: int = next(
            (value for value in (tokenizer.pad_token_id, tokenizer.eos_token_id) if value is not None), 0
        )
        self.starts = line_starts(self.data_path)
        self.renderer = Renderer(
            tokenizer,
            objective="pretrain" if phase == "pretrain" else "sft",
            max_length=max_length,
            over_length="truncate",
        )
        self.data: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "data": None}  # a map cannot be pickled; every process opens its own

    def __getitem__(self, index: int) -> Shifted | dict[str, Tensor]:
        """The tensors of one row."""
        sample = self.sample(index)
        if self.phase in ("pretrain", "sft"):
            return self.shifted(sample)
        return self.preference(sample) if self.phase == "dpo" else self.prompt(sample)

    def sample(self, index: int) -> Sample:
        """One row as a canonical sample."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {self.data_path}, which has {len(self)}")
        index %= len(self)
        if self.data is None:
            with self.data_path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        line = self.data[int(self.starts[index]) : int(self.starts[index + 1])]
        try:
            return canonical_sample(orjson.loads(line), source=self.data_path.stem, row_id=str(index))
        except ValueError as error:
            raise ValueError(f"{self.data_path}, row {index}: {error}") from error

    def shifted(self, sample: Sample) -> Shifted:
        """X, Y and loss mask of a text or a conversation."""
        ids, counts = self.rendered(sample, sample.content)
        tokens, real = self.padded(ids), self.padded_mask(np.ones(len(ids), np.bool_))
        loss = self.padded_mask(counts) & real
        return tokens[:-1], tokens[1:], loss[1:]

    def preference(self, sample: Sample) -> dict[str, Tensor]:
        """Both answers to a prompt."""
        if "chosen" not in sample.content:
            raise unsuited(sample, self.phase, "prompt, chosen and rejected")
        tensors = {}
        for name in ("chosen", "rejected"):
            prompt = as_messages(sample.content["prompt"], "user")
            answer = as_messages(sample.content[name], "assistant")
            ids, counts = self.rendered(sample, {"messages": [*prompt, *answer]})
            tensors[f"{name}_ids"] = self.padded(ids)
            tensors[f"{name}_attention_mask"] = self.padded_mask(np.ones(len(ids), np.bool_))
            tensors[f"{name}_mask"] = self.padded_mask(last_turns(counts, answer))
        return tensors

    def prompt(self, sample: Sample) -> dict[str, Tensor]:
        """What an answer is generated from."""
        content = sample.content
        if "messages" in content and content["messages"][-1]["role"] == "user":
            content = {"prompt": content["messages"]}
        start = generation_prompt(Sample(id=sample.id, source=sample.source, content=content))
        if start is None:
            raise unsuited(sample, self.phase, "a prompt, or messages with a question")
        messages = as_messages(start.get("prompt", start.get("prompt_messages")), "user")
        text = self.renderer.template.render(messages, add_generation_prompt=True)
        ids = np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)[-self.max_length :]
        room = self.max_length - len(ids)
        return {
            "input_ids": torch.from_numpy(np.concatenate([np.full(room, self.pad_id, np.int64), ids])),
            "attention_mask": torch.from_numpy(np.repeat(np.array([0, 1], np.int64), [room, len(ids)])),
        }

    def rendered(self, sample: Sample, content: dict[str, Any]) -> tuple[Ids, Mask]:
        """Token ids, and which of them the model is to write."""
        sample = Sample(id=sample.id, source=sample.source, content=content)
        for kind, render in (
            ("input_ids", self.renderer.given),
            ("messages", self.renderer.chats),
            ("text", self.renderer.texts),
        ):
            if kind in content:
                (pair,) = render([sample])
                if pair is None:
                    reason = ", ".join(self.renderer.dropped)
                    raise ValueError(f"{self.data_path}, sample {sample.id}: {reason}")
                return pair
        raise unsuited(sample, self.phase, "messages" if self.phase == "sft" else "text or messages")

    def padded(self, ids: Ids) -> Tensor:
        """The first max_length ids, padded on the right."""
        tokens = np.full(self.max_length, self.pad_id, np.int64)
        tokens[: len(ids)] = ids[: self.max_length]
        return torch.from_numpy(tokens)

    def padded_mask(self, mask: Mask) -> Tensor:
        """The mask of the first max_length tokens, 0 for padding."""
        values = np.zeros(self.max_length, np.int64)
        values[: len(mask)] = mask[: self.max_length]
        return torch.from_numpy(values)


def line_starts(path: Path) -> npt.NDArray[np.int64]:
    """Where each line that is not empty begins, and the end of the last; read once, a block at a time."""
    if path.suffix in (".zst", ".gz"):
        raise ValueError(f"{path} is compressed, so its lines cannot be read in any order; decompress it first")
    if not path.is_file():
        raise ValueError(f"data_path: no file {path}; DatasetMixer.prepare_dataset writes one")
    ends: list[npt.NDArray[np.int64]] = []
    position = 0
    with path.open("rb") as file:
        while block := file.read(SCANNED_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1 + position)
            position += len(block)
    starts = np.concatenate([np.zeros(1, np.int64), *ends])
    if starts[-1] != position:
        starts = np.append(starts, position)
    if len(starts) < 2:
        raise ValueError(f"{path} holds no rows")
    return starts


def unsuited(sample: Sample, phase: str, needed: str) -> ValueError:
    return ValueError(f"sample {sample.id} holds {', '.join(sample.content)}; the phase {phase} needs {needed}")
