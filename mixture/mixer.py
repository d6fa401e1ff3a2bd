"""From a recipe to a finished mixture: fetch, scan, solve, shuffle, write; resumable, and the same bytes every time."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from mixture.config import DatasetConfig
from mixture.contaminated_rows import find_contaminated_rows
from mixture.dataset_modules import load_rows, resolve_module
from mixture.decontamination import Contamination
from mixture.dedup import UniqueRows, find_duplicates
from mixture.filters import compile_keep, keep_key
from mixture.image_files import ImageCounts, ImageFolder, take_images
from mixture.mix import MixPlan, Supply, render_plan, size, solve
from mixture.mixture_folder import (
    ATTRIBUTION,
    LOCK,
    REJECTED,
    WrittenFiles,
    check_frozen,
    finish_folder,
    frozen_origins,
    lock_record,
    locked_plan,
    marker_key,
    plain,
    read_lock,
    recipe_record,
    take_folder,
    write_json,
    write_statistics,
)
from mixture.near_duplicates import find_near_duplicates
from mixture.recipe import Mixture, SourceConfig, read_mixture
from mixture.rejected import write_rejected
from mixture.row_files import json_lines
from mixture.scan import FORMAT_VERSION as scan_version
from mixture.scan import Scan, ScanSource, scan_key, scan_sources
from mixture.scatter import FORMAT_VERSION as scatter_version
from mixture.scatter import ShortPromptsFirst, TextStats, WrittenMixture, WrittenPart, scatter
from mixture.sources import OpenedSource, download_sizes, open_sources, wanted_places, write_attribution
from mixture.whole_files import join_files
from mixture.workers import default_workers
from settings.yaml_tree import ConfigError, read_config_file

PROJECT = Path(__file__).resolve().parent.parent
"""Folder of datasets/."""

FORMAT_VERSION = 1
"""Raised whenever the same recipe and sources give another mixture."""

BYTES_PER_TOKEN = 4.0
"""Taken where no tokenizer is named; about right for English prose with a vocabulary of 32,000 to 128,000."""
SAMPLED_ROWS = 1000
SAMPLED_CHARACTERS = 4_000_000
FETCH_MARGIN = 1.2
"""Rows fetched of a large source, over those needed: filters and duplicates take some."""
FETCH_ROUNDS = 6
TOKENS_PER_ROW = 100
"""Few sources have shorter rows; where one has, more is fetched in a second round."""

Report = Callable[[str], None]
RowIds = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class MixtureResult:
    """A planned mixture, and where it lies once it is made."""

    key: str | None
    folder: Path | None
    """None after a dry run."""
    plan: MixPlan
    parts: tuple[WrittenPart, ...] = ()
    """Its files, in the order of training."""


@dataclass(frozen=True, kw_only=True)
class PassOne:
    """All that is known of a mixture's sources before anything is written."""

    opened: list[OpenedSource]
    scan: Scan
    unique: UniqueRows
    supplies: dict[str, Supply]
    contamination: dict[str, Contamination]


def run_mixture(
    mixture: Mixture,
    data_dir: Path,
    report: Report,
    *,
    dry_run: bool = False,
    workers: int | None = None,
    frozen: Path | None = None,
) -> MixtureResult:
    """The mixture of a recipe, made now unless it is there, in `data_dir`/mixtures/KEY or the recipe's output_dir.

    Its plan goes to `report`. `dry_run` stops there and fetches nothing: what is not on this machine is estimated.
    Killed at any moment and started again, it goes on where it was; the same recipe and sources give the same bytes
    for any number of workers. `frozen`, a lock file, must be met in every source, count and checksum.

    Raises:
        ValueError: the recipe, a source, or a share that no number of rows can meet.
    """
    count = workers or default_workers()
    lock = None if frozen is None else read_lock(frozen)
    if lock is not None:
        check_frozen({"recipe": recipe_record(mixture), "sources": {}, "output": []}, lock)
    if dry_run:
        plan = dry_plan(mixture, data_dir, report, count)
        tell(render_plan(plan), report)
        return MixtureResult(key=None, folder=None, plan=plan)
    folder, key = Path(), ""
    for opened in opened_sources(mixture, data_dir, report, count, lock):
        key = mixture_key(mixture, opened)
        folder = mixture.output_dir or data_dir / "mixtures" / key
        if marker_key(folder) == key:
            return finished(folder, key, lock, report)
    with exclusive(data_dir / "mixtures" / f".{key}.lock"):
        if marker_key(folder) == key:
            return finished(folder, key, lock, report)
        first = pass_one(mixture, opened, data_dir, report, count)
        plan = planned(mixture, first)
        tell(render_plan(plan), report)
        make(mixture, key, folder, first, plan, lock, report, count)
    return finished(folder, key, None, report)


def tell(text: str, report: Report) -> None:
    for line in text.splitlines():
        report(line)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One process at a time; others wait. The lock goes with the process that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def mixture_key(mixture: Mixture, opened: Sequence[OpenedSource]) -> str:
    """16 hex digits over the recipe, the content of its sources and the version of this code."""
    record = recipe_record(mixture)
    evaluation_files = [content_digest(evaluation_path(mixture, text)) for text in mixture.decontaminate]
    origins = [[source.origin.revision, source.origin.split, source.origin.max_rows] for source in opened]
    versions = [FORMAT_VERSION, scan_version, scatter_version]
    parts = [versions, {**record, "name": None, "metadata": None, "decontaminate": evaluation_files}, origins]
    return xxhash.xxh3_64_hexdigest(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS))


def content_digest(path: Path) -> str:
    try:
        return xxhash.xxh3_128_hexdigest(path.read_bytes())
    except OSError as error:
        raise ValueError(f"decontaminate: cannot read {path}: {error.strerror}") from error


def finished(folder: Path, key: str, lock: Mapping[str, Any] | None, report: Report) -> MixtureResult:
    """The mixture that lies in a folder."""
    record = orjson.loads((folder / LOCK).read_bytes())
    if lock is not None:
        check_frozen(record, lock)
    parts = tuple(WrittenPart(**part) for part in record["output"])
    report(f"mixture {key}: {sum(sum(part.rows.values()) for part in parts if is_main(part)):,} rows in {folder}")
    return MixtureResult(key=key, folder=folder, plan=locked_plan(record), parts=parts)


def is_main(part: WrittenPart) -> bool:
    return part.split == "train" and "/" not in part.file


# --- sources


def opened_sources(
    mixture: Mixture, data_dir: Path, report: Report, workers: int, lock: Mapping[str, Any] | None
) -> Iterator[list[OpenedSource]]:
    """The sources with as many rows as the mixture may need; opened again with more where too few of them are left.

    Only sources of the hub are limited. The last ones yielded are those to use.
    """
    frozen = None if lock is None else frozen_origins(lock)
    needs = needs_of(mixture)
    limits = fetch_limits(mixture, needs)
    if frozen is not None:
        limits = {name: origin.max_rows for name, origin in frozen.items() if origin.max_rows is not None}
    for _ in range(FETCH_ROUNDS):
        opened = open_sources(
            mixture.sources,
            data_dir=data_dir,
            folders=folders(mixture),
            project=PROJECT,
            max_rows=limits,
            allow_non_commercial=mixture.allow_non_commercial,
            frozen=frozen,
            report=report,
        )
        yield opened
        cut = [source.origin for source in opened if was_cut(source)]
        if frozen is not None or not cut:
            return
        supplies = pass_one(mixture, opened, data_dir, report, workers).supplies
        met = {origin.name: needs[origin.name].met_by(supplies[origin.name]) for origin in cut}
        if all(part >= 1 for part in met.values()):
            return
        for name, part in met.items():
            if part < 1:
                report(f"{name}: what is left of {limits[name]:,} rows is {part:.0%} of what is needed: fetching more")
                limits[name] = round(limits[name] * min(8.0, FETCH_MARGIN / max(part, 0.01)))


def was_cut(source: OpenedSource) -> bool:
    """Whether there is more of the source than was fetched."""
    origin = source.origin
    return origin.max_rows is not None and origin.rows is not None and origin.rows >= origin.max_rows


def folders(mixture: Mixture) -> list[Path]:
    """Where relative paths of a recipe start."""
    return [mixture.folder, PROJECT, Path.cwd()]


@dataclass(frozen=True, kw_only=True)
class Need:
    """Of a source, what a mixture can use at most, in rows or in tokens or in both."""

    rows: int | None = None
    tokens: int | None = None

    @property
    def likely_rows(self) -> int:
        """Rows to begin with."""
        bounds = [self.rows, None if self.tokens is None else self.tokens // TOKENS_PER_ROW + 1]
        return min(bound for bound in bounds if bound is not None)

    def met_by(self, supply: Supply) -> float:
        """How much of the need is there; from 1 on it is met."""
        parts = [(supply.rows, self.rows), (supply.tokens, self.tokens)]
        return max(has / wanted for has, wanted in parts if wanted is not None)


def needs_of(mixture: Mixture) -> dict[str, Need]:
    """What the mixture can use of each source, where its recipe says so."""
    total = mixture.total
    needs = {}
    for source in mixture.sources:
        rows, tokens = source.max_samples, None
        if total is not None and source.share is not None:
            # A share that counts something else than the total could at most be all of it.
            if total.rows is not None:
                wanted = round(total.rows * source.share) + 1 if mixture.by == "rows" else total.rows
                rows = wanted if rows is None else min(rows, wanted)
            if total.tokens is not None:
                tokens = round(total.tokens * source.share) + 1 if mixture.by == "tokens" else total.tokens
        if rows is not None or tokens is not None:
            needs[source.name] = Need(rows=rows, tokens=tokens)
    return needs


def fetch_limits(mixture: Mixture, needs: Mapping[str, Need]) -> dict[str, int]:
    """Rows to fetch first of each source, with a margin for what filters, duplicates and the held-out split take."""
    margin = FETCH_MARGIN / (1 - mixture.held_out)
    return {name: round(need.likely_rows * margin) + 100 for name, need in needs.items()}


# --- pass 1


def pass_one(mixture: Mixture, opened: Sequence[OpenedSource], data_dir: Path, report: Report, workers: int) -> PassOne:
    """Every row of every source read once: what is kept, what is dropped and why."""
    scan = scanned(mixture, opened, data_dir, report, workers)
    bytes_per_token = token_sizes(mixture, scan)
    mean_size = sum(bytes_per_token.values()) / len(bytes_per_token)
    stage = mixture.short_prompts_first
    selection: dict[str, Any] = {
        "exact": mixture.dedup.exact,
        "test_share": mixture.held_out,
        "short_prompt_bytes": 0 if stage is None else round(stage.tokens * mean_size),
        "workers": workers,
        "report": report,
    }
    contamination: dict[str, Contamination] = {}
    if mixture.decontaminate:
        files = [evaluation_path(mixture, text) for text in mixture.decontaminate]
        contamination = find_contaminated_rows(scan, files, workers=workers, report=report)
    dropped = {"contaminated": concatenated(found.row_ids for found in contamination.values())}
    duplicates: Mapping[str, int] | None = None
    if mixture.dedup.near:
        exact = find_duplicates(scan, also_dropped=dropped["contaminated"], **selection)
        duplicates = exact.duplicates
        gone = np.sort(concatenated(exact.dropped))
        near = find_near_duplicates(scan, gone, similarity=mixture.dedup.similarity, workers=workers, report=report)
        dropped |= {"duplicate": np.setdiff1d(gone, dropped["contaminated"]), "near duplicate": near}
    unique = find_duplicates(scan, also_dropped=np.unique(concatenated(dropped.values())), **selection)
    by_source = {reason: rows_by_source(scan, ids) for reason, ids in dropped.items()}
    by_source["duplicate"] = dict(unique.duplicates if duplicates is None else duplicates)
    return PassOne(
        opened=list(opened),
        scan=scan,
        unique=unique,
        supplies={
            source.name: found_supply(source, scan, unique, by_source, bytes_per_token[source.name])
            for source in mixture.sources
        },
        contamination=contamination,
    )


def scanned(mixture: Mixture, opened: Sequence[OpenedSource], data_dir: Path, report: Report, workers: int) -> Scan:
    """The scan of the sources, in the order of their priority."""
    by_name = {source.origin.name: source for source in opened}
    sources = [scan_source(source, by_name[source.name]) for source in by_priority(mixture)]
    folder = data_dir / "mixtures" / "scans" / scan_key(sources)
    with exclusive(folder.parent / f".{folder.name}.lock"):
        return scan_sources(sources, folder, workers=workers, report=report)


def by_priority(mixture: Mixture) -> list[SourceConfig]:
    """Sources in the order in which they keep rows that others have too."""
    order = {name: number for number, name in enumerate(mixture.dedup.priority)}
    return sorted(mixture.sources, key=lambda source: order.get(source.name, len(order)))


def scan_source(source: SourceConfig, opened: OpenedSource) -> ScanSource:
    """What is scanned of a source. ValueError: a format is given for rows with images, which are messages by now."""
    licence = opened.origin.licence
    if opened.images is not None and source.format != "auto":
        raise ValueError(f"datasets.{source.name}.format: rows with images are read as they are; leave it out")
    return ScanSource(
        name=source.name,
        files=opened.files,
        category=source.category,
        format=source.format,
        keep=compile_keep(source.filters, source_licence=licence),
        keep_key=keep_key(source.filters, source_licence=licence),
        has_images=opened.images is not None,
    )


def token_sizes(mixture: Mixture, scan: Scan) -> dict[str, float]:
    """Mean bytes of a token in each source's text, measured on its first rows where the recipe names a tokenizer."""
    if mixture.tokenizer is None:
        return dict.fromkeys(scan.sources, BYTES_PER_TOKEN)
    from transformers import AutoTokenizer

    here = [folder / mixture.tokenizer for folder in folders(mixture) if (folder / mixture.tokenizer).is_dir()]
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(here[0]) if here else mixture.tokenizer)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer: cannot load a tokenizer from {mixture.tokenizer!r}: {error}") from error
    sizes = {}
    for name in scan.sources:
        rows = [text for _, text in islice(scan.texts([name]), SAMPLED_ROWS)]
        texts = [text[: SAMPLED_CHARACTERS // SAMPLED_ROWS] for text in rows] or ["none"]
        tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
        sizes[name] = sum(len(text.encode(errors="replace")) for text in texts) / max(1, tokens)
    return sizes


def found_supply(
    source: SourceConfig, scan: Scan, unique: UniqueRows, by_source: Mapping[str, Mapping[str, int]], token_bytes: float
) -> Supply:
    """What is left of one source, and what became of the rest."""
    counts = scan.sources[source.name]
    train, test = (unique.available.get((split, source.name)) for split in ("train", "test"))
    lost = {reason: rows[source.name] for reason, rows in by_source.items() if rows.get(source.name)}
    return Supply(
        read=counts.read,
        dropped={**counts.dropped, **lost},
        rows=train.rows if train else 0,
        tokens=max(train.text_bytes / token_bytes, train.rows) if train else 0,
        held_out_rows=test.rows if test else 0,
        text_bytes=train.text_bytes if train else 0,
        short_prompts=train.short_prompts if train else 0,
    )


def evaluation_path(mixture: Mixture, text: str) -> Path:
    """An evaluation file of the recipe."""
    tried = [folder / Path(text).expanduser() for folder in folders(mixture)]
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        raise ValueError(f"decontaminate: no file {text}; looked for {', '.join(map(str, tried))}")
    return path


def concatenated(arrays: Iterable[RowIds]) -> RowIds:
    return np.concatenate([np.empty(0, np.uint64), *arrays]).astype(np.uint64)


def rows_by_source(scan: Scan, row_ids: RowIds) -> dict[str, int]:
    """How many of the rows belong to each source."""
    in_chunk = np.bincount((row_ids >> np.uint64(32)).astype(np.int64), minlength=len(scan.chunks))
    counts = dict.fromkeys(scan.sources, 0)
    for chunk in scan.chunks:
        counts[chunk.source.name] += int(in_chunk[chunk.number])
    return counts


# --- the plan


def planned(mixture: Mixture, first: PassOne) -> MixPlan:
    """The plan of a mixture whose sources are here."""
    plan = solve(first.supplies, mixture)
    return replace(
        plan,
        notes=(
            *plan.notes,
            *stage_notes(mixture, plan),
            *contamination_notes(first),
            *image_notes(first),
            token_note(mixture),
        ),
    )


def token_note(mixture: Mixture) -> str:
    """How tokens were counted."""
    if mixture.tokenizer is None:
        return f"tokens are estimated as {BYTES_PER_TOKEN:g} bytes of text each; `tokenizer` measures them"
    return f"tokens are estimated from those that {mixture.tokenizer} makes of each source's first rows"


def stage_notes(mixture: Mixture, plan: MixPlan) -> list[str]:
    """Sources that have too few short prompts for their first stage."""
    stage = mixture.short_prompts_first
    if stage is None:
        return []
    notes = []
    for source in plan.sources:
        wanted = round(source.rows * stage.share)
        has = round(source.rows * source.supply.short_prompts / source.supply.rows)
        if has < wanted:
            notes.append(
                f"{source.name}: about {has:,} of its rows have a prompt under {stage.tokens} tokens, so it gives the "
                f"first stage no more, though its share of it would be {wanted:,}"
            )
    return notes


def contamination_notes(first: PassOne) -> list[str]:
    """Evaluation items that rows of a source hold."""
    return [
        f"{name}: {len(found.row_ids):,} rows hold one of {len(found.rows_by_item):,} evaluation items; "
        f"{found.rows_with_shorter_runs:,} share a shorter run of words, which is no reason to drop them"
        for name, found in first.contamination.items()
        if found.rows_with_shorter_runs
    ]


def image_notes(first: PassOne) -> list[str]:
    """Sources with images, and that these are not among the tokens."""
    return [
        f"{name}: its rows hold {counts.images:,} images, whose tokens depend on the model and are not counted"
        for name, counts in first.scan.sources.items()
        if counts.images
    ]


def dry_plan(mixture: Mixture, data_dir: Path, report: Report, workers: int) -> MixPlan:
    """The plan without fetching: exact for what is on this machine, estimated for what is not."""
    needs = needs_of(mixture)
    limits = fetch_limits(mixture, needs)
    places: dict[str, Any] = {"data_dir": data_dir, "folders": folders(mixture), "project": PROJECT, "report": report}
    sizes = download_sizes(mixture.sources, max_rows=limits, **places)
    away = [source for source in mixture.sources if sizes[source.name]]
    here = [source for source in mixture.sources if not sizes[source.name]]
    supplies = {
        source.name: estimated_supply(mixture, source, needs.get(source.name), sizes[source.name]) for source in away
    }
    notes: list[str] = []
    if here:
        part = replace(mixture, sources=tuple(here))
        opened = open_sources(here, max_rows=limits, allow_non_commercial=mixture.allow_non_commercial, **places)
        first = pass_one(part, opened, data_dir, report, workers)
        supplies |= first.supplies
        notes = [*contamination_notes(first), *image_notes(first)]
    plan = solve(supplies, mixture)
    notes += stage_notes(mixture, plan) if not away else []
    notes += [
        f"{source.name}: not on this machine, so its rows are those that it is published with, its tokens a guess from "
        f"{size(sizes[source.name])}, and what filters and duplicates take is not known"
        for source in away
    ]
    return replace(plan, notes=(*plan.notes, *notes, token_note(mixture)))


def estimated_supply(mixture: Mixture, source: SourceConfig, need: Need | None, download_bytes: int) -> Supply:
    """What a source that is not here may hold: its published rows, else as many as are needed."""
    place = wanted_places(source, "train", folders(mixture), PROJECT)[0]
    published = None if place.hub is None else place.hub.rows.get(place.split)
    read = published or (need.likely_rows if need else 0)
    if not read:
        raise ValueError(
            f"datasets.{source.name}: how many rows it has is not known before it is fetched; set its max_samples, or "
            "run without --dry-run"
        )
    rows = max(1, round(read * (1 - mixture.held_out)))
    return Supply(
        read=read,
        rows=rows,
        tokens=max(download_bytes * 2 / BYTES_PER_TOKEN, rows),
        held_out_rows=read - rows,
        download_bytes=download_bytes,
        text_bytes=download_bytes * 2,
        short_prompts=rows,
    )


# --- writing


def make(
    mixture: Mixture,
    key: str,
    folder: Path,
    first: PassOne,
    plan: MixPlan,
    lock: Mapping[str, Any] | None,
    report: Report,
    workers: int,
) -> None:
    """Write all files of a mixture, and its marker last."""
    if lock is not None:
        check_frozen(plain(lock_record(key, mixture, first.opened, plan, WrittenFiles(stats={}))), lock)
    take_folder(folder, key)
    written = write_rows(mixture, folder, first, plan, report, workers)
    images = bring_images(first.opened, folder, written)
    write_statistics(folder, plan, written, images)
    write_rejected(folder / REJECTED, first.scan.rejections())
    write_attribution(folder / ATTRIBUTION, [source.origin for source in first.opened])
    if first.contamination:
        items = {name: found.rows_by_item for name, found in first.contamination.items()}
        write_json(folder / "contamination.json", items)
    record = plain(lock_record(key, mixture, first.opened, plan, written))
    if lock is not None:
        check_frozen(record, lock)
    write_json(folder / LOCK, record)
    finish_folder(folder, key, written.mixed or written.categories, has_images=images is not None)


def write_rows(
    mixture: Mixture, folder: Path, first: PassOne, plan: MixPlan, report: Report, workers: int
) -> WrittenFiles:
    """The rows, in the layouts of the recipe. Categories first: the other layout's parts.json would hide theirs."""
    rows = {("train", source.name): source.rows for source in plan.sources}
    rows |= {("test", source.name): source.held_out_rows for source in plan.sources}
    stage = mixture.short_prompts_first
    shared: dict[str, Any] = {
        "seed": mixture.seed,
        "distinct": {("train", source.name): source.pool for source in plan.sources},
        "turns": mixture.turns,
        "compress": mixture.compress,
        "part_megabytes": mixture.part_megabytes,
        "workers": workers,
        "report": report,
    }
    categories = mixed = WrittenMixture(parts=[], stats={})
    if mixture.layout != "mixed":
        done = folder / "categories.json"
        if done.is_file():
            categories = read_categories(done)
        else:
            categories = scatter(first.unique, rows, folder, layout="categories", **shared)
            (folder / "parts.json").rename(done)
    if mixture.layout != "categories":
        stages = None if stage is None else ShortPromptsFirst(share=stage.share)
        mixed = scatter(first.unique, rows, folder, stages=stages, layout="mixed", **shared)
    return WrittenFiles(
        mixed=tuple(mixed.parts), categories=tuple(categories.parts), stats=categories.stats or mixed.stats
    )


def bring_images(opened: Sequence[OpenedSource], folder: Path, written: WrittenFiles) -> ImageCounts | None:
    """Put the images that the rows name beside them, and count those of training; None where no source has any."""
    from_sources = next((source.images for source in opened if source.images is not None), None)
    if from_sources is None:
        return None
    counts = {}
    for split in ("test", "train"):
        files = [folder / part.file for part in written.mixed or written.categories if part.split == split]
        lines = (line for file in files for line in json_lines(file))
        counts[split] = take_images(lines, ImageFolder(folder), from_sources)
    return counts["train"]


def read_categories(path: Path) -> WrittenMixture:
    """What the category layout holds, from the record that scatter wrote."""
    record = orjson.loads(path.read_bytes())
    return WrittenMixture(
        parts=[WrittenPart(**part) for part in record["parts"]],
        stats={(split, source): TextStats(**stats) for split, source, stats in record["stats"]},
    )


# --- as a library


class DatasetMixer:
    """A recipe as a library object: check it, and write one JSONL file for each split."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def from_yaml(cls, yaml_path: str | Path) -> DatasetMixer:
        """The mixer of a YAML file; ConfigError where there is no such file or it is no YAML mapping."""
        read_config_file(Path(yaml_path))
        return cls(Path(yaml_path))

    @property
    def mixture(self) -> Mixture:
        """The recipe; ConfigError with all that is wrong with it."""
        return read_mixture(self.path)

    def validate_mixture(self) -> dict[str, Any]:
        """`is_valid`, `total_ratio` as written, `ratios` by dataset, and `problems` in words."""
        values = read_config_file(self.path).values
        try:
            mixture = self.mixture
        except ConfigError as error:
            total = written_ratio(values)
            return {"is_valid": False, "total_ratio": total, "ratios": {}, "problems": list(map(str, error.problems))}
        ratios = {source.name: source.share for source in mixture.sources}
        return {"is_valid": True, "total_ratio": written_ratio(values), "ratios": ratios, "problems": []}

    def prepare_dataset(
        self, output_file: str | Path, split: str = "train", cache_dir: str | Path | None = None
    ) -> str:
        """The path of one JSONL file with the `train` or `validation` split, mixed now unless it was before.

        `cache_dir` holds what is fetched and mixed, ./data where unset. Both splits come from one mixture, so no row
        is in both. ValueError: an unknown split, or a mixture that holds nothing out.
        """
        names = {"train": "train", "validation": "test", "val": "test", "test": "test"}
        if split not in names:
            raise ValueError(f"split must be train or validation, got {split!r}")
        mixture = replace(self.mixture, output_dir=None, layout="mixed", compress=None)
        result = run_mixture(mixture, Path(cache_dir or "data"), print)
        parts = [part for part in result.parts if part.split == names[split]]
        if not parts:
            raise ValueError(
                f"{self.path}: nothing is held out for {split}; set split: {{validation: 0.05}} "
                f"(it is {mixture.held_out:g} of {result.plan.rows:,} rows now)"
            )
        assert result.folder is not None
        output = Path(output_file)
        output.parent.mkdir(parents=True, exist_ok=True)
        files = [result.folder / part.file for part in parts]
        join_files(files, output)
        if ImageFolder(result.folder).has_any:
            lines = (line for file in files for line in json_lines(file))
            take_images(lines, ImageFolder(output.parent), ImageFolder(result.folder))
        return str(output_file)


def written_ratio(values: Mapping[str, Any]) -> float:
    """The sum of the ratios in a recipe, whatever else is wrong with it; 0 where it has none."""
    ratios: Iterable[Any] = (values.get("category_ratios") or {}).values()
    if not values.get("category_ratios"):
        entries = values.get("datasets") or []
        listed = entries.values() if isinstance(entries, dict) else entries
        ratios = [entry.get("mix_ratio") for entry in listed if isinstance(entry, dict)]
    return round(sum(ratio for ratio in ratios if isinstance(ratio, int | float)), 9)


def get_dataset(name: str, with_validation: bool = False, **keys: Any) -> Any:
    """The training rows of a module in datasets/ as a Hugging Face Dataset.

    `with_validation` gives a DatasetDict of `train` and `validation`, the module's test split. Further keys reach the
    module as those of `dataset:` do, for example data_files.
    """
    from datasets import Dataset, DatasetDict

    known = {"data_files", "limit", "split_ratio"}
    own = {key: value for key, value in keys.items() if key in known}
    config = DatasetConfig(
        name=name, module_keys={key: value for key, value in keys.items() if key not in known}, **own
    )
    module = resolve_module(config, config_folder=Path.cwd(), project=PROJECT)

    def rows(split: Literal["train", "test"]) -> Any:
        loaded = load_rows(module, config, split, None)
        return loaded if isinstance(loaded, Dataset) else Dataset.from_list(list(loaded))

    if not with_validation:
        return rows("train")
    return DatasetDict({"train": rows("train"), "validation": rows("test")})
