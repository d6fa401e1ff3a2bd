"""The prepare step: rows of a dataset module to JSONL, token shards and packs, done once for each data key."""

from __future__ import annotations

import ast
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile, load_rows, parse_module, score_function
from mixture.formats import Sample, canonical_sample, detect_format
from mixture.packing import best_fit_packs, single_packs
from mixture.render import OVER_LENGTH_DEFAULT, Objective, Renderer, generation_prompt
from mixture.shards import TokenWriter, write_packs

FORMAT_VERSION = 1
"""Raised whenever the same inputs give other token rows or other files, so that old folders are not taken for new."""

MARKER = "PREPARED"
SAMPLES_PER_BATCH = 512
SCORED_ROWS = 1000
REPORT_EVERY_SECONDS = 30
STALE_AFTER_SECONDS = 24 * 3600
TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe", ".py")

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PreparationRequest:
    """All that shapes prepared data."""

    dataset: DatasetConfig
    module: ModuleFile
    tokenizer: str
    revision: str | None = None
    trust_remote_code: bool = False
    objective: Objective
    seed: int


@dataclass(frozen=True, kw_only=True)
class SplitStats:
    """Counts of one split, after preparation."""

    samples: int
    """Rows that the module returned."""
    formats: dict[str, int]
    """Samples in each detected format."""
    rows: int
    """Token rows."""
    dropped: dict[str, int]
    """Rows left out, by reason."""
    longer_than_max_length: int
    """Samples over dataset.max_length, whatever the policy did with them."""
    tokens: int
    loss_tokens: int
    """Tokens that count in the loss; the first token of a row never does."""
    packs: int
    """Rows of training: packs, or token rows where packing is off."""


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A finished folder of prepared data."""

    folder: Path
    fingerprint: str
    splits: dict[str, SplitStats | None] = field(default_factory=dict)
    has_score: bool = False

    @classmethod
    def open(cls, folder: Path) -> PreparedData | None:
        """The data in a folder, or None where its preparation was never finished."""
        if not (folder / MARKER).is_file():
            return None
        stats = orjson.loads((folder / "stats.json").read_bytes())
        splits: dict[str, SplitStats | None] = {name: SplitStats(**split) for name, split in stats["splits"].items()}
        return cls(folder=folder, fingerprint=stats["fingerprint"], splits=splits, has_score=stats["has_score"])


# --- the key


def data_key(request: PreparationRequest) -> str:
    """16 hex digits over all that shapes the data: module and sibling files, keys, local data, tokenizer, objective."""
    dataset = asdict(request.dataset)
    dataset["over_length"] = request.dataset.over_length or OVER_LENGTH_DEFAULT[request.objective]
    dataset["file"] = None  # where the module lies does not matter, what it says does
    dataset["data_files"] = named_digests(request.dataset.data_files)
    parts = {
        "format": FORMAT_VERSION,
        "dataset": dataset,
        "module": [request.module.path.stem, request.module.function, module_digests(request.module.path)],
        "tokenizer": tokenizer_identity(request),
        "objective": request.objective,
        "seed": request.seed,
    }
    return xxhash.xxh3_64_hexdigest(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS, default=str))


def named_digests(data_files: Any) -> Any:
    """`data_files` with the content's digest in place of every path."""
    if isinstance(data_files, dict):
        return {split: named_digests(files) for split, files in data_files.items()}
    if isinstance(data_files, (list, tuple)):
        return [named_digests(file) for file in data_files]
    if data_files is None:
        return None
    path = Path(data_files).expanduser()
    if not path.is_file():
        raise ValueError(f"dataset.data_files: no file {data_files} (looked at {path.absolute()})")
    return [path.suffix, file_digest(path)]


def module_digests(path: Path) -> dict[str, str]:
    """Digests of a module and of the sibling files that it imports, directly or through one another."""
    digests: dict[str, str] = {}
    pending = [path]
    while pending:
        file = pending.pop()
        if file.stem in digests:
            continue
        digests[file.stem] = file_digest(file)
        names = {name.split(".")[0] for name in imported_names(parse_module(file))}
        pending += [sibling for name in sorted(names) if (sibling := path.parent / f"{name}.py").is_file()]
    return digests


def imported_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def tokenizer_identity(request: PreparationRequest) -> Any:
    """Digests of a local tokenizer's files, chat template included, or the hub id and revision."""
    folder = Path(request.tokenizer).expanduser()
    if not folder.is_dir():
        return [request.tokenizer, request.revision]
    files = sorted(
        file
        for pattern in ("*", "additional_chat_templates/*")
        for file in folder.glob(pattern)
        if file.suffix in TOKENIZER_SUFFIXES and not file.name.endswith(".index.json")
    )
    return {str(file.relative_to(folder)): file_digest(file) for file in files}


def file_digest(path: Path) -> str:
    """xxh3-128 of a file's content."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# --- preparing


def prepared_folder(data_dir: Path, key: str) -> Path:
    """Where prepared data of a key lies."""
    return data_dir / "prepared" / key


def prepare(request: PreparationRequest, data_dir: Path, report: Report) -> PreparedData:
    """The prepared data for a request, made now unless it is there. `report` gets progress, a short line at a time.

    Everything is written beside and renamed into place, so a killed run leaves nothing that looks finished, and of two
    runs at once one keeps its result and the other takes it. ValueError: the module, its rows or the tokenizer.
    """
    folder = prepared_folder(data_dir, data_key(request))
    done = PreparedData.open(folder)
    if done is not None:
        report(f"data {folder.name} is prepared already")
        return done
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    working = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir()
    try:
        write_prepared(request, working, report)
        adopt(working, folder, report)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    prepared = PreparedData.open(folder)
    assert prepared is not None
    return prepared


def remove_stale(folder: Path) -> None:
    """Remove what killed runs for the same key left behind: theirs if they ran on this machine, else after a day."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        host, _, process = left.name.removeprefix(f".{folder.name}.").rpartition(".")
        same_host = host == socket.gethostname() and process.isdigit()
        abandoned = time.time() - left.stat().st_mtime > STALE_AFTER_SECONDS
        if abandoned or (same_host and not Path("/proc", process).exists()):
            shutil.rmtree(left, ignore_errors=True)


def adopt(working: Path, folder: Path, report: Report) -> None:
    """Rename the finished working folder into place, or leave the place to a run that was faster."""
    if folder.exists() and PreparedData.open(folder) is None:
        shutil.rmtree(folder)  # no marker: half deleted by someone; renames never leave such a folder
    try:
        working.rename(folder)
    except OSError:
        if PreparedData.open(folder) is None:
            raise
        report(f"another run prepared {folder.name} meanwhile; using its data")


def write_prepared(request: PreparationRequest, folder: Path, report: Report) -> None:
    """Write all files of prepared data, the marker last."""
    tokenizer = load_tokenizer(request)
    has_score = score_function(request.module) is not None
    # Both before either is written: a missing test split should not cost the time of writing the train split.
    rows = {
        "train": load_rows(request.module, request.dataset, request.dataset.train_split, tokenizer, report),
        "test": load_rows(request.module, request.dataset, request.dataset.test_split, tokenizer, None),
    }
    splits: dict[str, SplitStats] = {}
    fingerprint = xxhash.xxh3_128()
    for name in rows:
        writer = SplitWriter(request, folder, name, tokenizer, report, keep_raw_rows=name == "test" and has_score)
        splits[name] = writer.write(rows[name])
        fingerprint.update(writer.digest)
        for line in summary(name, splits[name], request.dataset):
            report(line)
        if name == "train" and writer.renderer.never_ends_turns:
            report("warning: the chat template closes answers with no special token, so the model cannot learn to stop")
    stats = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint.hexdigest(),
        "has_score": has_score,
        "objective": request.objective,
        "tokenizer": request.tokenizer,
        "max_length": request.dataset.max_length,
        "splits": {name: asdict(split) for name, split in splits.items()},
    }
    write_synced(folder / "stats.json", orjson.dumps(stats, option=orjson.OPT_INDENT_2))
    write_synced(folder / MARKER, fingerprint.hexdigest().encode())


def load_tokenizer(request: PreparationRequest) -> Any:
    """The tokenizer of a request; ValueError where there is none under that name."""
    from transformers import AutoTokenizer

    folder = Path(request.tokenizer).expanduser()
    try:
        return AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else request.tokenizer,
            revision=request.revision,
            trust_remote_code=request.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model.tokenizer: cannot load a tokenizer from {request.tokenizer!r}: {error}") from error


class SplitWriter:
    """Writes one split: canonical JSONL, token shards, packs, and raw test rows for scoring."""

    def __init__(
        self,
        request: PreparationRequest,
        folder: Path,
        name: str,
        tokenizer: Any,
        report: Report,
        *,
        keep_raw_rows: bool,
    ) -> None:
        self.request = request
        self.folder = folder
        self.name = name
        self.report = report
        self.keep_raw_rows = keep_raw_rows
        self.digest = b""
        self.formats: Counter[str] = Counter()
        self.raw_rows: list[bytes] = []
        dataset = request.dataset
        self.renderer = Renderer(
            tokenizer, objective=request.objective, max_length=dataset.max_length, over_length=dataset.over_length
        )

    def write(self, rows: Iterable[dict[str, Any]]) -> SplitStats:
        """Write the split and return its counts; ValueError where nothing is left to train on."""

        loss_tokens = 0
        max_length = self.request.dataset.max_length
        samples_path = self.folder / f"{self.name}.jsonl"
        with samples_path.open("wb") as jsonl, TokenWriter(self.folder, self.name, max_length=max_length) as tokens:
            for samples in batches(self.samples(rows), SAMPLES_PER_BATCH):
                jsonl.writelines(orjson.dumps(sample.as_json(), option=orjson.OPT_APPEND_NEWLINE) for sample in samples)
                for row in self.renderer.token_rows(samples):
                    tokens.add(row)
                    loss_tokens += int(row.loss_mask[1:].sum())
        lengths = np.array(tokens.lengths, dtype=np.int32)
        if not self.formats:
            raise ValueError(f"split {self.name}: {self.request.module.path} returned 0 rows")
        if not len(lengths):
            raise ValueError(
                f"split {self.name}: none of {self.formats.total()} rows is left to learn from; dropped: "
                f"{counted(self.renderer.dropped)}"
            )
        packing = self.request.dataset.packing
        packs = best_fit_packs(lengths, max_length) if packing else single_packs(len(lengths))
        write_packs(self.folder, self.name, packs)
        self.write_raw_rows()
        self.digest = tokens.digest.digest() + packs.indices.tobytes() + packs.starts.tobytes()
        return SplitStats(
            samples=self.formats.total(),
            formats=dict(self.formats),
            rows=len(lengths),
            dropped=dict(self.renderer.dropped),
            longer_than_max_length=self.renderer.longer_than_max_length,
            tokens=int(lengths.sum(dtype=np.int64)),
            loss_tokens=loss_tokens,
            packs=len(packs),
        )

    def samples(self, rows: Iterable[dict[str, Any]]) -> Iterator[Sample]:
        """Canonical samples of the rows."""
        source = self.request.dataset.name or self.request.module.path.stem
        told = time.monotonic()
        for index, row in enumerate(rows):
            if time.monotonic() - told > REPORT_EVERY_SECONDS:
                told = time.monotonic()
                self.report(f"{self.name}: {index} rows read")
            try:
                self.formats[detect_format(row).name] += 1
                sample = canonical_sample(row, source=source, row_id=f"{source}-{self.name}-{index}")
            except ValueError as error:
                raise ValueError(f"{self.request.module.path}, {self.name} row {index}: {error}") from error
            if self.keep_raw_rows and index < SCORED_ROWS:
                self.keep_raw_row(row, sample)
            yield sample

    def keep_raw_row(self, row: dict[str, Any], sample: Sample) -> None:
        """Keep a raw row with what generation starts from; scoring is given up where a row cannot be kept."""
        prompt = generation_prompt(sample)
        if prompt is None:
            self.give_up_scoring(f"row {sample.id} holds no question to answer")
            return
        try:
            self.raw_rows.append(orjson.dumps({"row": row, **prompt}, option=orjson.OPT_APPEND_NEWLINE))
        except TypeError as error:
            self.give_up_scoring(f"row {sample.id} cannot be written as JSON ({error})")

    def give_up_scoring(self, reason: str) -> None:
        self.keep_raw_rows = False
        self.raw_rows = []
        self.report(f"{self.name}: answers will not be generated and scored: {reason}")

    def write_raw_rows(self) -> None:
        """Write test_rows.jsonl, if rows were kept."""
        if self.raw_rows:
            with (self.folder / f"{self.name}_rows.jsonl").open("wb") as file:
                file.writelines(self.raw_rows)


def batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch


def summary(name: str, stats: SplitStats, dataset: DatasetConfig) -> Iterator[str]:
    """What a user should know about a prepared split."""
    yield f"{name}: {stats.samples} rows ({counted(stats.formats)})"
    filled = stats.tokens / (stats.packs * dataset.max_length)
    packed = f" in {stats.packs} packs, {filled:.1%} full" if dataset.packing else ""
    yield f"{name}: {stats.tokens} tokens, {stats.loss_tokens / stats.tokens:.0%} with loss{packed}"
    if stats.longer_than_max_length:
        yield f"{name}: {stats.longer_than_max_length} rows were longer than max_length {dataset.max_length}"
    if stats.dropped:
        yield f"{name}: dropped {counted(stats.dropped)}"


def counted(counts: dict[str, int] | Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
