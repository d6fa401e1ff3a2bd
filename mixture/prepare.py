"""The prepare step: a dataset module's rows or a mixture to token shards and packs, done once for each data key."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import orjson
import pyarrow
import xxhash

from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile, load_rows, parse_module, score_function
from mixture.formats import NoExchangeError, Sample, canonical_sample, detect_format
from mixture.image_rows import without_decoding
from mixture.packing import packs_of_units, single_packs, staged_packs
from mixture.preferences import ROWS_PER_UNIT, is_preference, renderer_for
from mixture.processors import find_processor
from mixture.prompts import PromptWriter
from mixture.render import OVER_LENGTH_DEFAULT, Objective, generation_prompt
from mixture.shards import TokenWriter, write_packs
from mixture.tokenising import NOTHING, LineBatch, SourceStats, Tokenising, line_batches, read_samples
from mixture.whole_files import write_whole
from mixture.workers import default_workers

if TYPE_CHECKING:
    from mixture.image_preparation import RowToWrite

FORMAT_VERSION = 2
"""Raised whenever the same inputs give other token rows or other files, so that old folders are not taken for new."""

MARKER = "PREPARED"
MIXTURE_MARKER = "MIXED"
SCORED_ROWS = 1000
READ_BYTES = 1 << 20
REPORT_EVERY_SECONDS = 30
STALE_AFTER_SECONDS = 24 * 3600
TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe", ".py")

MIXTURE_KEY = re.compile("[0-9a-f]{16}")

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PreparationRequest:
    """All that shapes prepared data: rows of a dataset module, or of a mixture."""

    dataset: DatasetConfig
    module: ModuleFile | None = None
    mixture: Path | None = None
    """Folder of a finished mixture, read instead of a module; beside a module, instead of its training rows alone."""
    tokenizer: str
    revision: str | None = None
    trust_remote_code: bool = False
    objective: Objective

    def __post_init__(self) -> None:
        if self.module is None and self.mixture is None:
            raise ValueError("data is prepared from a dataset module or from a mixture: name one of them")


@dataclass(frozen=True, kw_only=True)
class SplitStats:
    """Counts of one split, after preparation."""

    samples: int
    """Rows that the module returned or the mixture holds."""
    formats: dict[str, int]
    """Samples in each detected format; for a mixture, by what they hold."""
    rows: int
    """Token rows."""
    dropped: dict[str, int]
    """Rows left out, by reason."""
    longer_than_max_length: int
    """Samples over dataset.max_length, whatever the policy did with them."""
    rationale_tokens: int
    """Tokens of rationales that `dataset.mask_rationale` took out of the loss, those of dropped samples among them."""
    tokens: int
    loss_tokens: int
    """Tokens that count in the loss; the first token of a row never does."""
    packs: int
    """Rows of training: packs, or token rows where packing is off."""
    stages: list[int]
    """The first pack of each stage."""
    sources: dict[str, SourceStats]
    """By source, after whatever was dropped, split or truncated."""

    @classmethod
    def from_json(cls, stats: dict[str, Any]) -> SplitStats:
        sources = {name: SourceStats(**source) for name, source in stats["sources"].items()}
        return cls(**{**stats, "sources": sources})


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A finished folder of prepared data."""

    folder: Path
    fingerprint: str
    splits: dict[str, SplitStats | None] = field(default_factory=dict)
    """`train`, and `test` where there is one."""
    has_score: bool = False
    has_images: bool = False
    """Whether its rows are those of mixture/image_rows.py, for a processor, and not token rows."""

    @classmethod
    def open(cls, folder: Path) -> PreparedData | None:
        """The data in a folder, or None where its preparation was never finished."""
        if not (folder / MARKER).is_file():
            return None
        stats = orjson.loads((folder / "stats.json").read_bytes())
        splits: dict[str, SplitStats | None] = {
            name: SplitStats.from_json(split) for name, split in stats["splits"].items()
        }
        return cls(
            folder=folder,
            fingerprint=stats["fingerprint"],
            splits=splits,
            has_score=stats["has_score"],
            has_images=stats.get("has_images", False),
        )


# --- the key


def data_key(request: PreparationRequest) -> str:
    """16 hex digits over all that shapes the data: module and sibling files, keys, local data, tokenizer, objective."""
    dataset = asdict(request.dataset)
    dataset["over_length"] = request.dataset.over_length or OVER_LENGTH_DEFAULT[request.objective]
    dataset["file"] = None  # where the module lies does not matter, what it says does
    dataset["data_files"] = named_digests(request.dataset.data_files)
    del dataset["tokenizer_backend"]  # all give the same ids
    parts = {
        "format": FORMAT_VERSION,
        "dataset": dataset,
        "rows": rows_identity(request),
        "tokenizer": tokenizer_identity(request),
        "objective": request.objective,
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


def rows_identity(request: PreparationRequest) -> Any:
    """What the rows of a request are: those of its module, of its mixture, or of both."""
    identities = [module_identity(request.module)] if request.module else []
    identities += [mixture_identity(request.mixture)] if request.mixture else []
    return identities[0] if len(identities) == 1 else identities


def module_identity(module: ModuleFile) -> Any:
    """A module's name and the text of all that it is made of."""
    return [module.path.stem, module.function, module_digests(module.path)]


def mixture_identity(mixture: Path) -> Any:
    """A mixture's key: its folder's name, or what its marker says where the folder has another name."""
    if MIXTURE_KEY.fullmatch(mixture.name):
        return ["mixture", mixture.name]
    return ["mixture", orjson.loads(mixture_marker(mixture).read_bytes())["key"]]


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
    return text_file_digests(folder) if folder.is_dir() else [request.tokenizer, request.revision]


def text_file_digests(folder: Path) -> dict[str, str]:
    """Digests of the files beside a model's weights: tokenizer, chat templates, configs, code."""
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


def prepare(request: PreparationRequest, data_dir: Path, report: Report, *, workers: int | None = None) -> PreparedData:
    """The prepared data for a request, made now unless it is there. `report` gets progress, a short line at a time.

    `workers`: processes that make tokens, by default one for each core; their number changes nothing that is written.
    Everything is written beside and renamed into place, so a killed run leaves nothing that looks finished, and of two
    runs at once one keeps its result and the other takes it. ValueError: the module, the mixture, rows or tokenizer.
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
        write_prepared(request, working, report, workers or default_workers())
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


def write_prepared(request: PreparationRequest, folder: Path, report: Report, workers: int) -> None:
    """Write all files of prepared data, the marker last."""
    processor = load_processor(request)
    dataset = request.dataset
    if request.objective == "prompts":
        dataset = replace(dataset, packing=False)  # what is packed are answers, once they are written
    # All splits before any is written: a missing test split should not cost the time of writing the train split.
    rows = rows_of_module(request, processor, report)
    has_images = rows.hold_images if rows else mixture_has_images(request, processor)
    if has_images:
        dataset = replace(dataset, packing=False)
        splits = write_image_splits(request, rows, processor, folder, workers)
    else:
        tokenizer = getattr(processor, "tokenizer", processor)
        splits = write_token_splits(replace(request, dataset=dataset), rows, tokenizer, folder, report, workers)
    written: dict[str, SplitStats] = {}
    fingerprint = xxhash.xxh3_128()
    for split in splits:
        written[split.name] = split.stats
        fingerprint.update(split.digest)
        for line in summary(split.name, split.stats, dataset):
            report(line)
    stats = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint.hexdigest(),
        "has_score": request.module is not None and score_function(request.module) is not None,
        "has_images": has_images,
        "objective": request.objective,
        "tokenizer": request.tokenizer,
        "mixture": str(request.mixture) if request.mixture else None,
        "max_length": dataset.max_length,
        "splits": {name: asdict(split) for name, split in written.items()},
    }
    write_whole(folder / "stats.json", orjson.dumps(stats, option=orjson.OPT_INDENT_2), synced=True)
    write_whole(folder / MARKER, fingerprint.hexdigest().encode(), synced=True)


@dataclass(frozen=True)
class WrittenSplit:
    """A split on disk: its counts, and a digest of all that is read in training."""

    name: str
    stats: SplitStats
    digest: bytes


def write_token_splits(
    request: PreparationRequest, rows: RowsOfModule | None, tokenizer: Any, folder: Path, report: Report, workers: int
) -> Iterator[WrittenSplit]:
    """Write texts and conversations as token shards and packs."""
    dataset = request.dataset
    inputs = input_splits(request, rows, folder, report)
    renderer = renderer_for(
        request.objective,
        tokenizer,
        max_length=dataset.max_length,
        over_length=dataset.over_length,
        mask_rationale=dataset.mask_rationale,
    )
    tokenising = Tokenising(renderer, dataset.tokenizer_backend, workers, report)
    rows_per_unit = ROWS_PER_UNIT if is_preference(request.objective) else 1
    for name, split in inputs.items():
        writer = SplitWriter(dataset, folder, name, report, rows_per_unit=rows_per_unit)
        stats = writer.write(split, tokenising)
        yield WrittenSplit(name, stats, writer.digest)
        if name == "train" and writer.never_ends_turns:
            report("warning: the chat template closes answers with no special token, so the model cannot learn to stop")


def write_image_splits(
    request: PreparationRequest, rows: RowsOfModule | None, processor: Any, folder: Path, workers: int
) -> Iterator[WrittenSplit]:
    """Write rows with images, each a pack of its own."""
    from mixture.image_preparation import ImageSplitWriter, check_settings

    check_settings(request.objective, request.dataset)
    with ImageSplitWriter(request, processor, folder, workers) as writer:
        for name, split in image_splits(request, rows, reads_files=not writer.counter.is_own).items():
            found = writer.write(split, name)
            samples = found.formats.total()
            if not samples:
                raise ValueError(f"split {name}: {rows.module.path if rows else request.mixture} returned 0 rows")
            if not found.rows:
                raise nothing_left(name, samples, found.dropped)
            packs = single_packs(found.rows, found.stages)
            write_packs(folder, name, packs)
            stats = SplitStats(
                samples=samples,
                formats=dict(found.formats),
                rows=found.rows,
                dropped=found.dropped,
                longer_than_max_length=found.longer_than_max_length,
                rationale_tokens=0,
                tokens=sum(source.tokens for source in found.sources.values()),
                loss_tokens=sum(source.loss_tokens for source in found.sources.values()),
                packs=found.rows,
                stages=found.stages,
                sources=found.sources,
            )
            # Only where there are several stages: rows in one had no more than their own digest before.
            yield WrittenSplit(name, stats, found.digest + (packs.stages.tobytes() if len(packs.stages) > 1 else b""))


def image_splits(
    request: PreparationRequest, rows: RowsOfModule | None, *, reads_files: bool
) -> dict[str, Iterator[RowToWrite]]:
    """The rows with images of each split, of a module or of a mixture."""
    from mixture.image_preparation import mixture_rows, module_rows

    if rows is None:
        assert request.mixture is not None
        return {
            name: mixture_rows(split.samples(), request.mixture)
            for name, split in mixture_splits(request, folder=request.mixture).items()
        }
    assert request.mixture is None, "answers are written to texts only, so no mixture of them stands beside images"
    return {
        name: module_rows(split, rows.module, name, rows.source, reads_files=reads_files)
        for name, split in (("train", rows.train), ("test", rows.test))
    }


def nothing_left(name: str, samples: int, dropped: dict[str, int] | Counter[str]) -> ValueError:
    return ValueError(f"split {name}: none of {samples} rows is left to learn from; dropped: {counted(dropped)}")


def load_processor(request: PreparationRequest) -> Any:
    """The processor of an image-text model, or the tokenizer of any other; ValueError where it cannot be loaded."""
    tokenizer = load_tokenizer(request)
    processor = find_processor(
        local_or_hub(request), revision=request.revision, trust_remote_code=request.trust_remote_code
    )
    return tokenizer if processor is None else processor


def local_or_hub(request: PreparationRequest) -> str:
    """The tokenizer's folder with its home folder expanded, or its hub id."""
    folder = Path(request.tokenizer).expanduser()
    return str(folder) if folder.is_dir() else request.tokenizer


def load_tokenizer(request: PreparationRequest) -> Any:
    """The tokenizer of a request; ValueError where there is none under that name."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            local_or_hub(request), revision=request.revision, trust_remote_code=request.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model.tokenizer: cannot load a tokenizer from {request.tokenizer!r}: {error}") from error


class SplitInput(Protocol):
    """The canonical samples of a split, as JSON lines."""

    formats: Counter[str]
    """Samples read so far, by format; empty where that is not known."""
    dropped: Counter[str]
    """Rows left out so far, before they became samples, by reason."""

    def batches(self) -> Iterator[LineBatch]: ...

    def finish(self) -> None:
        """Write what is kept beside the tokens, once all batches are read."""


class SplitWriter:
    """Writes token shards and packs of one split, and counts them. Rows of a unit are adjacent and share a pack."""

    def __init__(
        self, dataset: DatasetConfig, folder: Path, name: str, report: Report, *, rows_per_unit: int = 1
    ) -> None:
        self.dataset = dataset
        self.folder = folder
        self.name = name
        self.report = report
        self.rows_per_unit = rows_per_unit
        self.digest = b""
        self.never_ends_turns = False

    def write(self, split: SplitInput, tokenising: Tokenising) -> SplitStats:
        """Write the split and return its counts; ValueError where nothing is left to train on."""
        kinds: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        sources: dict[str, SourceStats] = {}
        samples = longer_than_max_length = rationale_tokens = 0
        stage_starts = [0]
        stage = 0
        told = time.monotonic()
        max_length = self.dataset.max_length
        with TokenWriter(
            self.folder, self.name, max_length=max_length, shard_size_mb=self.dataset.shard_size_mb
        ) as tokens:
            for batch in tokenising.run(split.batches()):
                if batch.stage != stage and stage_starts[-1] != len(tokens.lengths):
                    stage_starts.append(len(tokens.lengths))
                stage = batch.stage
                tokens.extend(batch.rows)
                samples += batch.samples
                kinds += batch.kinds
                dropped += batch.dropped
                longer_than_max_length += batch.longer_than_max_length
                rationale_tokens += batch.rationale_tokens
                self.never_ends_turns |= batch.never_ends_turns
                for source, stats in batch.sources.items():
                    sources[source] = sources.get(source, NOTHING) + stats
                if time.monotonic() - told > REPORT_EVERY_SECONDS:
                    told = time.monotonic()
                    self.report(f"{self.name}: {samples} rows, {sum(s.tokens for s in sources.values())} tokens")
        dropped += split.dropped
        samples += split.dropped.total()
        if not samples:
            raise ValueError(f"split {self.name}: {split} returned 0 rows")
        if self.dataset.mask_rationale and self.name == "train" and not rationale_tokens:
            raise ValueError(
                f"dataset.mask_rationale: none of {samples} rows marks a rationale, so there is nothing to mask; leave "
                "the key out, or have the dataset module return a column `rationale`, [[start, end], ...] in "
                "characters of the answer"
            )
        lengths = np.array(tokens.lengths, dtype=np.int32)
        if not len(lengths):
            raise nothing_left(self.name, samples, dropped)
        if stage_starts[-1] == len(lengths) > 0:
            stage_starts.pop()  # nothing is left of the last stage
        units = lengths.reshape(-1, self.rows_per_unit).sum(1, dtype=np.int32)
        unit_starts = [start // self.rows_per_unit for start in stage_starts]
        if self.dataset.packing:
            packs = staged_packs(units, max_length, unit_starts)
        else:
            packs = single_packs(len(units), unit_starts)
        packs = packs_of_units(packs, self.rows_per_unit)
        write_packs(self.folder, self.name, packs)
        split.finish()
        self.digest = tokens.digest + b"".join(part.tobytes() for part in (packs.indices, packs.starts, packs.stages))
        return SplitStats(
            samples=samples,
            formats=dict(split.formats or kinds),
            rows=len(lengths),
            dropped=dict(dropped),
            longer_than_max_length=longer_than_max_length,
            rationale_tokens=rationale_tokens,
            tokens=int(lengths.sum(dtype=np.int64)),
            loss_tokens=sum(stats.loss_tokens for stats in sources.values()),
            packs=len(packs),
            stages=packs.stages.tolist(),
            sources=sources,
        )


def input_splits(
    request: PreparationRequest, rows: RowsOfModule | None, folder: Path, report: Report
) -> Mapping[str, SplitInput]:
    """The splits of a request; a module writes its rows to `folder` while they are read."""
    if rows is None:
        return mixture_splits(request, folder)
    splits = module_splits(rows, folder, report, has_prompts=request.objective == "prompts")
    return splits if request.mixture is None else {**splits, "train": mixture_splits(request, folder)["train"]}


# --- rows of a dataset module


@dataclass(frozen=True, kw_only=True)
class RowsOfModule:
    """Both splits of a dataset module, as it returned them."""

    module: ModuleFile
    source: str
    train: Iterable[Any]
    test: Iterable[Any]
    hold_images: bool


def rows_of_module(request: PreparationRequest, processor: Any, report: Report) -> RowsOfModule | None:
    """What the dataset module of a request returns for both splits, and whether a processor is to read it; or None."""
    from mixture.image_preparation import has_images

    module, dataset = request.module, request.dataset
    if module is None:
        return None
    train = load_rows(module, dataset, dataset.train_split, processor, report)
    test = load_rows(module, dataset, dataset.test_split, processor, None)
    first, train = with_first(train)
    return RowsOfModule(
        module=module,
        source=dataset.name or module.path.stem,
        train=train,
        test=test,
        hold_images=first is not None and has_images(first, module, processor),
    )


def with_first(rows: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first row, or None, and all rows; those that can be read only once are not read twice."""
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        return without_decoding(rows)[0][0], rows
    iterator = iter(rows)
    head = list(islice(iterator, 1))
    return (head[0] if head else None), chain(head, iterator)


def module_splits(rows: RowsOfModule, folder: Path, report: Report, *, has_prompts: bool) -> dict[str, SplitInput]:
    """Both splits of a dataset module with texts and conversations."""
    has_score = score_function(rows.module) is not None
    return {
        split: ModuleRows(
            of_split,
            rows.module.path,
            folder,
            split,
            rows.source,
            report,
            keep_raw_rows=has_score and split == "test" and not has_prompts,
            prompts=PromptWriter(folder, split) if has_prompts else None,
        )
        for split, of_split in (("train", rows.train), ("test", rows.test))
    }


class ModuleRows:
    """Rows of one split of a module: written as canonical JSONL while they are read, raw test rows kept for scoring."""

    def __init__(
        self,
        rows: Iterable[Any],
        module: Path,
        folder: Path,
        name: str,
        source: str,
        report: Report,
        *,
        keep_raw_rows: bool,
        prompts: PromptWriter | None = None,
    ) -> None:
        self.rows = rows
        self.module = module
        self.folder = folder
        self.name = name
        self.source = source
        self.report = report
        self.keep_raw_rows = keep_raw_rows
        self.prompts = prompts
        self.formats: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.raw_rows: list[bytes] = []

    def __str__(self) -> str:
        return str(self.module)

    def batches(self) -> Iterator[LineBatch]:
        with (self.folder / f"{self.name}.jsonl").open("wb") as jsonl:
            for batch in line_batches(self.lines(), f"{self.module}, {self.name}"):
                jsonl.writelines(batch.lines)
                yield batch

    def lines(self) -> Iterator[bytes]:
        """Canonical samples of the rows, as JSON."""
        for index, row in enumerate(self.rows):
            try:
                self.formats[detect_format(row).name] += 1
                sample = canonical_sample(row, source=self.source, row_id=f"{self.source}-{self.name}-{index}")
                line = orjson.dumps(sample.as_json(), option=orjson.OPT_APPEND_NEWLINE)
                if self.prompts:
                    self.prompts.add(sample.id, sample.content, row)
            except NoExchangeError:
                self.dropped["no question with an answer"] += 1
                continue
            except (ValueError, TypeError) as error:  # TypeError: what JSON cannot hold
                raise ValueError(f"{self.module}, {self.name} row {index}: {error}") from error
            if self.keep_raw_rows and index < SCORED_ROWS:
                self.keep_raw_row(row, sample)
            yield line

    def keep_raw_row(self, row: Any, sample: Sample) -> None:
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

    def finish(self) -> None:
        if self.prompts:
            self.prompts.finish()
        if self.raw_rows:
            with (self.folder / f"{self.name}_rows.jsonl").open("wb") as file:
                file.writelines(self.raw_rows)


# --- parts of a mixture


@dataclass(frozen=True)
class MixturePart:
    """One JSONL file of a mixture."""

    path: Path
    split: str
    stage: int


def mixture_marker(mixture: Path) -> Path:
    """The file that says that a mixture is finished; ValueError where it is not."""
    marker = mixture / MIXTURE_MARKER
    if not marker.is_file():
        raise ValueError(f"{mixture} is no finished mixture: there is no {MIXTURE_MARKER} in it; prepare it first")
    return marker


def mixture_parts(mixture: Path) -> list[MixturePart]:
    """The parts of a finished mixture, in order."""
    parts = orjson.loads(mixture_marker(mixture).read_bytes())["parts"]
    return [MixturePart(mixture / part["file"], part["split"], part["stage"]) for part in parts]


def mixture_has_images(request: PreparationRequest, processor: Any) -> bool:
    """Whether the rows of a mixture name images; ValueError where they do and the model reads none."""
    assert request.mixture is not None
    if not orjson.loads(mixture_marker(request.mixture).read_bytes()).get("has_images", False):
        return False
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(
            f"{request.mixture}: rows of the mixture hold images, and model.name has a {type(processor).__name__}, "
            "which reads text only; name an image-text model, whose folder has a processor, or leave those sources out"
        )
    return True


def mixture_splits(request: PreparationRequest, folder: Path) -> dict[str, MixtureRows]:
    """The splits of a mixture: `train`, and its `test` or `validation` split as `test`; prompts go to `folder`."""
    assert request.mixture is not None
    parts = mixture_parts(request.mixture)
    test = [part for part in parts if part.split == "test"] or [part for part in parts if part.split == "validation"]
    splits = {"train": [part for part in parts if part.split == "train"], "test": test}
    if not splits["train"]:
        raise ValueError(f"the mixture {request.mixture} has no rows to train on")
    limit = request.dataset.limit
    has_prompts = request.objective == "prompts"
    return {
        name: MixtureRows(chosen, request.mixture, limit, PromptWriter(folder, name) if has_prompts else None)
        for name, chosen in splits.items()
        if chosen
    }


class MixtureRows:
    """Samples of one split of a mixture, read from its parts; at most `limit` of them."""

    def __init__(
        self, parts: list[MixturePart], mixture: Path, limit: int | None, prompts: PromptWriter | None = None
    ) -> None:
        self.parts = parts
        self.prompts = prompts
        self.mixture = mixture
        self.limit = limit
        self.formats: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    def __str__(self) -> str:
        return f"the mixture {self.mixture}"

    def batches(self) -> Iterator[LineBatch]:
        remaining = self.limit
        for stage, parts in groupby(self.parts, key=lambda part: part.stage):
            for part in parts:
                for batch in line_batches(islice(lines_of(part.path), remaining), str(part.path), stage):
                    remaining = None if remaining is None else remaining - len(batch.lines)
                    if self.prompts:
                        self.prompts.extend(read_samples(batch))
                    yield batch

    def samples(self) -> Iterator[tuple[dict[str, Any], int]]:
        """The samples as they are written, each with its stage."""
        for batch in self.batches():
            yield from ((orjson.loads(line), batch.stage) for line in batch.lines)

    def finish(self) -> None:
        """Write the index of prompts; all other samples stay in the mixture."""
        if self.prompts:
            self.prompts.finish()


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a JSONL file, plain or compressed by zstd."""
    if path.suffix != ".zst":
        with path.open("rb") as file:
            yield from file
        return
    with io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), READ_BYTES) as file:
        yield from file


def summary(name: str, stats: SplitStats, dataset: DatasetConfig) -> Iterator[str]:
    """What a user should know about a prepared split."""
    yield f"{name}: {stats.samples} rows ({counted(stats.formats)})"
    filled = stats.tokens / (stats.packs * dataset.max_length)
    packed = f" in {stats.packs} packs, {filled:.1%} full" if dataset.packing else ""
    # Prompts have no loss: what is learned from is still to be written.
    taught = f", {stats.loss_tokens / stats.tokens:.0%} with loss" if stats.loss_tokens else ""
    yield f"{name}: {stats.tokens} tokens{taught}{packed}"
    if dataset.mask_rationale:
        yield f"{name}: {stats.rationale_tokens} tokens of rationales left out of the loss"
    if len(stats.sources) > 1:
        for source, part in sorted(stats.sources.items(), key=lambda item: -item[1].tokens):
            yield (
                f"{name}: {source} {part.samples} rows ({part.samples / stats.samples:.1%}), {part.tokens} tokens "
                f"({part.tokens / stats.tokens:.1%})" + (f", {part.loss_tokens} with loss" if taught else "")
            )
    if stats.longer_than_max_length:
        yield f"{name}: {stats.longer_than_max_length} rows were longer than max_length {dataset.max_length}"
    if stats.dropped:
        yield f"{name}: dropped {counted(stats.dropped)}"


def counted(counts: dict[str, int] | Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())
