"""Rows with images of a dataset module, made ready for training: each collated once to count its tokens, then stored.

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
from mixture.image_dialogues import DialogueCollator, NotForDialogueError
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
from mixture.tokenising import end_with_parent

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
            "rows with images are learned by trainer: finetuning with finetuning.objective: sft alone; leave the "
            "images out of the rows, or change the objective"
        )
    if dataset.over_length in ("split", "truncate"):
        raise ValueError(
            f"dataset.over_length: {dataset.over_length} would cut images in two; rows with images can only be dropped"
        )
    if dataset.mask_rationale:
        raise ValueError("dataset.mask_rationale: rows with images mark no rationale; leave the key out")


@dataclass(frozen=True, kw_only=True)
class ImageSplit:
    """What was written of one split."""

    samples: int
    rows: int
    dropped: dict[str, int]
    longer_than_max_length: int
    tokens: int
    loss_tokens: int
    digest: bytes


class ImageSplitWriter:
    """Writes the splits of a module's rows with images; a context manager."""

    def __init__(self, request: PreparationRequest, processor: Any, folder: Path, workers: int) -> None:
        assert request.module is not None, "rows with images come from a dataset module"
        self.request = request
        self.module = request.module
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

    def write(self, rows: Iterable[Any], split: str, source: str) -> ImageSplit:
        """Write the rows; ValueError names the row that cannot be learned from, and its key."""
        dropped: Counter[str] = Counter()
        samples = longer = tokens = loss_tokens = 0
        with (
            ImageRowWriter(self.folder, split, shard_size_mb=self.dataset.shard_size_mb) as writer,
            (self.folder / f"{split}.jsonl").open("wb") as jsonl,
        ):
            for number, (content, counts) in enumerate(self.counted(self.encoded(rows, split), split)):
                samples += 1
                if isinstance(counts, str):
                    dropped[counts] += 1
                    continue
                if counts.tokens > self.dataset.max_length:
                    longer += 1
                    dropped["longer than max_length"] += 1
                    continue
                if not counts.loss_tokens:
                    dropped["no token to learn from"] += 1
                    continue
                sample_id = f"{source}-{split}-{number}"
                writer.add(ImageRow(sample_id, source, content, counts.tokens, counts.loss_tokens))
                jsonl.write(content.text + b"\n")
                tokens += counts.tokens
                loss_tokens += counts.loss_tokens
        return ImageSplit(
            samples=samples,
            rows=writer.rows,
            dropped=dict(dropped),
            longer_than_max_length=longer,
            tokens=tokens,
            loss_tokens=loss_tokens,
            digest=writer.digest,
        )

    def encoded(self, rows: Iterable[Any], split: str) -> Iterator[EncodedRow]:
        """The rows as they are stored."""
        rows, decodes = without_decoding(rows)
        encoder = RowEncoder(features_are_images=decodes, reads_files=not self.counter.is_own)
        columns: list[str] = []
        for number, row in enumerate(rows):
            with naming(self.module, split, number):
                if number == 0:
                    columns = [key for key, value in row.items() if holds_image(value)]
                require_columns(row, columns)
                content = encoder.encoded(row)
            yield content

    def counted(self, rows: Iterator[EncodedRow], split: str) -> Iterator[tuple[EncodedRow, TokenCounts | str]]:
        """Each row, in order, with its tokens or the reason to leave it out; the first ones here, many by workers."""
        number = 0
        for number, content in enumerate(islice(rows, ROWS_COUNTED_HERE)):
            with naming(self.module, split, number):
                counts = self.counter(content)
            yield content, counts
        following = list(islice(rows, 1))
        rest = enumerate(chain(following, rows), number + 1)
        if not following:
            return
        if self.workers == 1:
            for number, content in rest:
                with naming(self.module, split, number):
                    counts = self.counter(content)
                yield content, counts
            return
        yield from self.counted_by_workers(rest, split)

    def counted_by_workers(
        self, rows: Iterator[tuple[int, EncodedRow]], split: str
    ) -> Iterator[tuple[EncodedRow, TokenCounts | str]]:
        if self.executor is None:
            # Fresh processes: modules and processors bring torch, whose threads do not survive a fork.
            context = multiprocessing.get_context("spawn")
            self.executor = ProcessPoolExecutor(self.workers, context, start_worker, (self.request, os.getpid()))
        pending: deque[tuple[int, EncodedRow, Future[TokenCounts | str]]] = deque()

        def oldest() -> tuple[EncodedRow, TokenCounts | str]:
            number, content, counts = pending.popleft()
            with naming(self.module, split, number):
                return content, counts.result()

        try:
            for number, content in rows:
                pending.append((number, content, self.executor.submit(count_in_worker, content)))
                if len(pending) > ROWS_AHEAD * self.workers:
                    yield oldest()
            while pending:
                yield oldest()
        except BrokenProcessPool as error:
            raise RuntimeError("a worker that reads images was ended from outside (out of memory?)") from error


@contextmanager
def naming(module: ModuleFile, split: str, number: int) -> Iterator[None]:
    """Names the row in the error of what is done with it."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{module.path}, {split} row {number}: {error}") from error


class TokenCounter:
    """Counts the tokens of stored rows, as the collator makes them of each row alone."""

    def __init__(self, module: ModuleFile, processor: Any, dataset: DatasetConfig) -> None:
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
            if self.is_own:
                raise_located(error, self.module.path, f"in the result of {COLLATOR_FUNCTION}")
            raise


counter_of_worker: TokenCounter | None = None


def start_worker(request: PreparationRequest, parent: int) -> None:
    """Set a worker up: it ends with its parent, and makes its own collator."""
    from mixture.prepare import load_processor

    global counter_of_worker
    end_with_parent(parent)
    assert request.module is not None
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
