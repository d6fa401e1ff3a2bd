"""Rows with images of a module or a mixture, made ready for training: each collated once to count its tokens, then
stored.

Collating a row here tells before any GPU is asked for what training would trip over: images that do not decode,
columns that are missing, answers that teach nothing, rows that are too long.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from mixture.config import DatasetConfig
from mixture.dataset_modules import COLLATOR_FUNCTION, ModuleFile, data_collator, load_module, raise_located
from mixture.formats import with_messages
from mixture.image_dialogues import DialogueCollator, NotForDialogueError
from mixture.image_files import ImageFolder, is_image_part
from mixture.image_rows import (
    EncodedRow,
    ImageRow,
    ImageRowWriter,
    Row,
    RowEncoder,
    holds_image,
    without_decoding,
)
from mixture.render import Objective
from mixture.tokenising import NOTHING, SourceStats, end_with_parent

if TYPE_CHECKING:
    from mixture.prepare import PreparationRequest

ROWS_COUNTED_HERE = 500
"""Fewer are counted sooner than workers have started."""

ROWS_AHEAD = 8
"""For each worker: enough that none waits, few enough that memory stays flat."""

CollateRows = Callable[[Sequence[Row]], Any]


def has_images(first_row: Any, module: ModuleFile, processor: Any) -> bool:
    """Whether rows that begin like this are learned with a processor: they hold images, or bring a collator for it.

    ValueError where they hold images and the model reads none.
    """
    reads_images = getattr(processor, "image_processor", None) is not None
    if not isinstance(first_row, dict) and not hasattr(first_row, "keys"):
        return False
    if holds_image(first_row):
        if not reads_images:
            columns = ", ".join(str(key) for key, value in first_row.items() if holds_image(value))
            raise ValueError(
                f"{module.path}: the rows hold images ({columns}), and model.name has a {type(processor).__name__}, "
                "which reads text only; name an image-text model, whose folder has a processor"
            )
        return True
    return reads_images and (
        "image" in first_row or "images" in first_row or hasattr(load_module(module.path), COLLATOR_FUNCTION)
    )


def collator_for(module: ModuleFile | None, processor: Any, dataset: DatasetConfig) -> tuple[CollateRows, bool]:
    """What makes batches of rows: the module's own collator, or ours; and whether it is the module's."""
    own = data_collator(module, processor, dataset) if module else None
    return (own, True) if own is not None else (DialogueCollator(processor), False)


def check_settings(objective: Objective, dataset: DatasetConfig) -> None:
    """Raise ValueError for settings that rows with images cannot follow."""
    if objective != "sft":
        raise ValueError(
            "rows with images are learned by trainer: finetuning with finetuning.objective: sft alone, and not by "
            "preferences, rewards or a teacher; leave the images out of the rows, or change the objective"
        )
    if dataset.over_length in ("split", "truncate"):
        raise ValueError(
            f"dataset.over_length: {dataset.over_length} would cut images in two; rows with images can only be dropped"
        )
    if dataset.mask_rationale:
        raise ValueError("dataset.mask_rationale: rows with images mark no rationale; leave the key out")


# --- rows


@dataclass(frozen=True, kw_only=True)
class RowToWrite:
    """A row as it is stored, and what it is called."""

    sample_id: str
    source: str
    content: EncodedRow
    stage: int = 0
    place: str
    """Where it comes from, for errors."""


def module_rows(
    rows: Iterable[Any], module: ModuleFile, split: str, source: str, *, reads_files: bool
) -> Iterator[RowToWrite]:
    """The rows of a module's split; ValueError names the one that cannot be stored, and its key."""
    rows, decodes = without_decoding(rows)
    encoder = RowEncoder(features_are_images=decodes, reads_files=reads_files)
    columns: list[str] = []
    for number, row in enumerate(rows):
        place = f"{module.path}, {split} row {number}"
        with naming(place):
            if number == 0:
                columns = [key for key, value in row.items() if holds_image(value)]
            require_columns(row, columns)
            content = encoder.encoded(row)
        yield RowToWrite(sample_id=f"{source}-{split}-{number}", source=source, content=content, place=place)


def mixture_rows(samples: Iterable[tuple[Row, int]], mixture: Path) -> Iterator[RowToWrite]:
    """Canonical samples, each with its stage, and the images that they name; ValueError says which cannot be had."""
    encoder = RowEncoder(features_are_images=True)
    images = ImageFolder(mixture)
    for sample, stage in samples:
        sample = with_messages(dict(sample))
        source = sample["source"]
        place = f"{mixture}, row {sample['id']} of {source}"
        with naming(place):
            if "messages" not in sample:
                raise ValueError(
                    f"it is no conversation, which rows beside images must be: leave {source} out of the mixture"
                )
            turns = [with_images(turn, images) for turn in sample["messages"]]
            content = encoder.encoded({**sample, "messages": turns})
        yield RowToWrite(sample_id=sample["id"], source=source, content=content, stage=stage, place=place)


def with_images(turn: Row, images: ImageFolder) -> Row:
    """The turn with the files of the images that its parts name."""
    if isinstance(turn["content"], str):
        return turn
    parts = [
        {**part, "image": {"bytes": images.read(part["image"]), "path": None}} if is_image_part(part) else part
        for part in turn["content"]
    ]
    return {**turn, "content": parts}


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Names the row in the error of what is done with it."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: {error}") from error


# --- splits


@dataclass(frozen=True, kw_only=True)
class ImageSplit:
    """What was written of one split."""

    formats: Counter[str]
    rows: int
    dropped: dict[str, int]
    longer_than_max_length: int
    stages: list[int]
    """The first row of each stage."""
    sources: dict[str, SourceStats]
    digest: bytes


class ImageSplitWriter:
    """Writes the splits of rows with images; a context manager."""

    def __init__(self, request: PreparationRequest, processor: Any, folder: Path, workers: int) -> None:
        self.request = request
        self.dataset = request.dataset
        self.folder = folder
        self.workers = workers
        self.counter = TokenCounter(request.module, processor, request.dataset)
        self.executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> ImageSplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)

    def write(self, rows: Iterator[RowToWrite], split: str) -> ImageSplit:
        """Write the rows; ValueError names the row that cannot be learned from, and its key."""
        formats: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        sources: dict[str, SourceStats] = {}
        stages = [0]
        stage = longer = 0
        with (
            ImageRowWriter(self.folder, split, shard_size_mb=self.dataset.shard_size_mb) as writer,
            (self.folder / f"{split}.jsonl").open("wb") as jsonl,
        ):
            for row, counts in self.counted(rows):
                formats["rows with images" if row.content.images else "rows without images"] += 1
                if row.stage != stage and stages[-1] != writer.rows:
                    stages.append(writer.rows)
                stage = row.stage
                if isinstance(counts, str):
                    dropped[counts] += 1
                elif counts.tokens > self.dataset.max_length:
                    longer += 1
                    dropped["longer than max_length"] += 1
                elif not counts.loss_tokens:
                    dropped["no token to learn from"] += 1
                else:
                    writer.add(ImageRow(row.sample_id, row.source, row.content, counts.tokens, counts.loss_tokens))
                    jsonl.write(row.content.text + b"\n")
                    own = SourceStats(samples=1, rows=1, tokens=counts.tokens, loss_tokens=counts.loss_tokens)
                    sources[row.source] = sources.get(row.source, NOTHING) + own
        if stages[-1] == writer.rows > 0:
            stages.pop()  # nothing is left of the last stage
        return ImageSplit(
            formats=formats,
            rows=writer.rows,
            dropped=dict(dropped),
            longer_than_max_length=longer,
            stages=stages,
            sources=sources,
            digest=writer.digest,
        )

    def counted(self, rows: Iterator[RowToWrite]) -> Iterator[tuple[RowToWrite, TokenCounts | str]]:
        """Each row, in order, with its tokens or the reason to leave it out; the first ones here, many by workers."""
        yield from map(self.counted_here, islice(rows, ROWS_COUNTED_HERE))
        following = list(islice(rows, 1))
        if not following:
            return
        rest = chain(following, rows)
        yield from map(self.counted_here, rest) if self.workers == 1 else self.counted_by_workers(rest)

    def counted_here(self, row: RowToWrite) -> tuple[RowToWrite, TokenCounts | str]:
        with naming(row.place):
            return row, self.counter(row.content)

    def counted_by_workers(self, rows: Iterator[RowToWrite]) -> Iterator[tuple[RowToWrite, TokenCounts | str]]:
        if self.executor is None:
            # Fresh processes: modules and processors bring torch, whose threads do not survive a fork.
            context = multiprocessing.get_context("spawn")
            self.executor = ProcessPoolExecutor(self.workers, context, start_worker, (self.request, os.getpid()))
        pending: deque[tuple[RowToWrite, Future[TokenCounts | str]]] = deque()

        def oldest() -> tuple[RowToWrite, TokenCounts | str]:
            row, counts = pending.popleft()
            with naming(row.place):
                return row, counts.result()

        try:
            for row in rows:
                pending.append((row, self.executor.submit(count_in_worker, row.content)))
                if len(pending) > ROWS_AHEAD * self.workers:
                    yield oldest()
            while pending:
                yield oldest()
        except BrokenProcessPool as error:
            raise RuntimeError("a worker that reads images was ended from outside (out of memory?)") from error


class TokenCounter:
    """Counts the tokens of stored rows, as the collator makes them of each row alone."""

    def __init__(self, module: ModuleFile | None, processor: Any, dataset: DatasetConfig) -> None:
        self.module = module
        self.collate, self.is_own = collator_for(module, processor, dataset)

    def __call__(self, content: EncodedRow) -> TokenCounts | str:
        """The counts, or the reason to leave the row out; ValueError where it cannot be learned from."""
        row = content.read()
        try:
            return token_counts(self.collate([row]))
        except NotForDialogueError as error:
            return str(error)
        except Exception as error:
            if self.is_own and self.module is not None:
                raise_located(error, self.module.path, f"in the result of {COLLATOR_FUNCTION}")
            raise


counter_of_worker: TokenCounter | None = None


def start_worker(request: PreparationRequest, parent: int) -> None:
    """Set a worker up: it ends with its parent, and makes its own collator."""
    from mixture.prepare import load_processor

    global counter_of_worker
    end_with_parent(parent)
    counter_of_worker = TokenCounter(request.module, load_processor(request), request.dataset)


def count_in_worker(content: EncodedRow) -> TokenCounts | str:
    assert counter_of_worker is not None
    return counter_of_worker(content)


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a row without padding, and those that count in the loss; the first never does."""

    tokens: int
    loss_tokens: int


def token_counts(batch: Any) -> TokenCounts:
    """Counts of a batch of one row; ValueError where it holds no tokens or labels."""
    missing = [key for key in ("input_ids", "labels") if key not in batch]
    if missing:
        raise ValueError(f"the batch of {COLLATOR_FUNCTION} has no {', '.join(missing)}, only {', '.join(batch)}")
    mask = batch.get("attention_mask")
    tokens = np.asarray(batch["input_ids"]).size if mask is None else int(np.asarray(mask).sum())
    return TokenCounts(tokens, int((np.asarray(batch["labels"])[:, 1:] != -100).sum()))


def require_columns(row: Row, columns: Sequence[str]) -> None:
    """Raise ValueError where a row lacks the images that the first one has."""
    for column in columns:
        if row.get(column) is None:
            raise ValueError(f"no images in column {column}, which the first row has; leave the row out in the module")
