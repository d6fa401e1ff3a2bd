"""Lines of canonical samples to token rows, in forked workers and in order: the same rows for any number of them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np
import orjson

from mixture.formats import CONTENT_KEYS, Sample, with_messages
from mixture.render import Renderer
from mixture.shards import TokenBatch
from mixture.tokenizers import BackendChoice, TokenizerBackend

SAMPLES_PER_BATCH = 512
BYTES_PER_BATCH = 4 << 20
BATCHES_COMPARED = 4
"""A tokenizer backend is compared on the rows of this many batches; data with no more than that is done without one."""

BATCHES_AHEAD = 3
"""For each worker: enough that none waits, few enough that memory stays flat."""

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class LineBatch:
    """Canonical samples, one JSON object a line, all of one stage."""

    lines: list[bytes]
    place: str
    """Where the first of them comes from, for messages."""
    stage: int = 0


@dataclass(frozen=True, kw_only=True)
class SourceStats:
    """What one source has after packing, truncation and whatever else rows are dropped for."""

    samples: int
    rows: int
    tokens: int
    loss_tokens: int
    """Tokens that count in the loss; the first token of a row never does."""

    def __add__(self, other: SourceStats) -> SourceStats:
        return SourceStats(
            samples=self.samples + other.samples,
            rows=self.rows + other.rows,
            tokens=self.tokens + other.tokens,
            loss_tokens=self.loss_tokens + other.loss_tokens,
        )


NOTHING = SourceStats(samples=0, rows=0, tokens=0, loss_tokens=0)


@dataclass(frozen=True, kw_only=True)
class TokenisedBatch:
    """The token rows of a LineBatch, and what is to be counted."""

    rows: TokenBatch
    stage: int
    samples: int
    kinds: Counter[str]
    """Samples by what they hold: messages, text, input_ids."""
    dropped: Counter[str]
    longer_than_max_length: int
    rationale_tokens: int
    never_ends_turns: bool
    sources: dict[str, SourceStats] = field(default_factory=dict)


def line_batches(lines: Iterable[bytes], place: str, stage: int = 0) -> Iterator[LineBatch]:
    """Lines in batches of bounded size, which depends on nothing but the lines."""
    batch: list[bytes] = []
    size = done = 0
    for line in lines:
        batch.append(line)
        size += len(line)
        if len(batch) == SAMPLES_PER_BATCH or size >= BYTES_PER_BATCH:
            yield LineBatch(batch, f"{place}, row {done}", stage)
            done += len(batch)
            batch, size = [], 0
    if batch:
        yield LineBatch(batch, f"{place}, row {done}", stage)


def tokenised(renderer: Renderer, batch: LineBatch) -> TokenisedBatch:
    """The token rows of a batch. ValueError names the sample, or the lines of which one is no sample."""
    samples = read_samples(batch)
    renderer.dropped = Counter()
    renderer.longer_than_max_length = 0
    renderer.rationale_tokens = 0
    rows = TokenBatch.of_rows(renderer.token_rows(samples))
    return TokenisedBatch(
        rows=rows,
        stage=batch.stage,
        samples=len(samples),
        kinds=Counter(next(iter(sample.content)) for sample in samples),
        dropped=renderer.dropped,
        longer_than_max_length=renderer.longer_than_max_length,
        rationale_tokens=renderer.rationale_tokens,
        never_ends_turns=renderer.never_ends_turns,
        sources=source_stats(samples, rows),
    )


def backend_for(renderer: Renderer, wanted: TokenizerBackend, batches: Sequence[LineBatch]) -> BackendChoice:
    """The tokenizer backend to use, by the ids it gives for these rows."""
    return renderer.choose_backend(wanted, [sample for batch in batches for sample in read_samples(batch)])


def read_samples(batch: LineBatch) -> list[Sample]:
    """The samples of a batch."""
    try:
        rows = [with_messages(orjson.loads(line)) for line in batch.lines]
        return [
            Sample(
                id=row["id"],
                source=row["source"],
                content={key: row[key] for key in CONTENT_KEYS if key in row},
                metadata=row.get("metadata") or {},
            )
            for row in rows
        ]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{batch.place} or one of the {len(batch.lines)} from there on is no canonical sample: "
            f"{type(error).__name__} {error}"
        ) from error


def source_stats(samples: Sequence[Sample], rows: TokenBatch) -> dict[str, SourceStats]:
    """Counts by source, in order of appearance."""
    stats = {
        source: SourceStats(samples=count, rows=0, tokens=0, loss_tokens=0)
        for source, count in Counter(sample.source for sample in samples).items()
    }
    counted = np.concatenate(([0], np.cumsum(rows.loss_mask)))[rows.starts]
    losses = np.diff(counted) - rows.loss_mask[rows.starts[:-1]]
    for source, tokens, loss_tokens in zip(rows.sources, np.diff(rows.starts).tolist(), losses.tolist(), strict=True):
        stats[source] += SourceStats(samples=0, rows=1, tokens=tokens, loss_tokens=loss_tokens)
    return stats


# --- workers


@dataclass
class Tokenising:
    """Tokenises the batches of one split after another, with a backend that is chosen on the first rows.

    `wanted`: the backend asked for; `choice`: the one that is used, None until it is known.
    """

    renderer: Renderer
    wanted: TokenizerBackend
    workers: int
    report: Callable[[str], None]
    choice: BackendChoice | None = None

    def run(self, batches: Iterable[LineBatch]) -> Iterator[TokenisedBatch]:
        """The token rows of every batch, in order.

        ValueError from any worker is raised as it is; RuntimeError: a worker was killed.
        """
        remaining = iter(batches)
        first = list(islice(remaining, BATCHES_COMPARED + 1))
        everything = chain(first, remaining)
        is_small = len(first) <= BATCHES_COMPARED
        if is_small or self.workers == 1:
            # Few rows are not worth a comparison that nobody asked for.
            if self.choice is None and (self.wanted != "auto" or not is_small):
                self.choose(backend_for(self.renderer, self.wanted, first[:BATCHES_COMPARED]))
            self.renderer.backend = self.choice.name if self.choice else "huggingface"
            yield from (tokenised(self.renderer, batch) for batch in everything)
            return
        yield from self.run_in_workers(first[:BATCHES_COMPARED], everything)

    def choose(self, choice: BackendChoice) -> BackendChoice:
        self.choice = choice
        for line in choice.lines:
            self.report(line)
        return choice

    def run_in_workers(self, compared: Sequence[LineBatch], batches: Iterable[LineBatch]) -> Iterator[TokenisedBatch]:
        """The token rows of every batch, in order, by forked workers."""
        prepare_to_fork(self.renderer)
        context = multiprocessing.get_context("fork")
        executor = ProcessPoolExecutor(self.workers, context, start_worker, (self.renderer, os.getpid()))
        try:
            # Compared in a worker: threads that the backends start here would not be there after the fork.
            choice = self.choice or self.choose(executor.submit(backend_in_worker, self.wanted, compared).result())
            pending: deque[Future[TokenisedBatch]] = deque()
            for batch in batches:
                pending.append(executor.submit(tokenised_in_worker, choice.name, batch))
                if len(pending) > BATCHES_AHEAD * self.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError("a worker that makes tokens was ended from outside (out of memory?)") from error
        finally:
            executor.shutdown(cancel_futures=True)


def prepare_to_fork(renderer: Renderer) -> None:
    """Make what all workers read, so that they share its memory."""
    if renderer.tokenizer.is_fast:
        _ = renderer.byte_lengths, renderer.control_tokens


renderer_of_worker: Renderer | None = None


def start_worker(renderer: Renderer, parent: int) -> None:
    """Set a worker up: it ends with its parent, whatever ends that, and uses one core."""
    global renderer_of_worker
    renderer_of_worker = renderer
    end_with_parent(parent)


def end_with_parent(parent: int) -> None:
    """Have this worker end with its parent, whatever ends that, and leave other cores to other workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def backend_in_worker(wanted: TokenizerBackend, batches: Sequence[LineBatch]) -> BackendChoice:
    assert renderer_of_worker is not None
    return backend_for(renderer_of_worker, wanted, batches)


def tokenised_in_worker(backend: TokenizerBackend, batch: LineBatch) -> TokenisedBatch:
    assert renderer_of_worker is not None
    renderer_of_worker.backend = backend
    return tokenised(renderer_of_worker, batch)
