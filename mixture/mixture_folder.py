"""The folder of a finished mixture: its marker, its lock file, statistics by source, and the summary of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import orjson

from mixture.image_files import FOLDER as IMAGES
from mixture.image_files import ImageCounts, ImageFolder
from mixture.mix import MixPlan, PlannedSource, Supply
from mixture.recipe import Mixture
from mixture.scatter import TextStats, WrittenPart
from mixture.sources import OpenedSource, Origin
from mixture.whole_files import remove_leftovers, whole_file, write_whole

MARKER = "MIXED"
"""Written last: the key and the parts, in order, and whether rows name images. A folder without it holds no mixture."""
MIXING = "MIXING"
"""Written first: the key of the mixture that is being made."""
LOCK = "mixture.lock.json"
SUMMARY = "download_summary.json"
REJECTED = "rejected.jsonl"
ATTRIBUTION = "ATTRIBUTION.md"

OWN_FILES = (
    *("train-[0-9]*.jsonl*", "test-[0-9]*.jsonl*", "*/*.jsonl", "*/*.jsonl.zst", "*/*.stats.json"),
    *("parts.json", "categories.json", LOCK, SUMMARY, REJECTED, ATTRIBUTION, "contamination.json", f"{IMAGES}/??/*"),
)
"""What a mixture's folder may hold of the mixture."""


@dataclass(frozen=True, kw_only=True)
class WrittenFiles:
    """What was written, in both layouts."""

    mixed: tuple[WrittenPart, ...] = ()
    categories: tuple[WrittenPart, ...] = ()
    stats: dict[tuple[str, str], TextStats]
    """By (split, source)."""

    @property
    def all(self) -> tuple[WrittenPart, ...]:
        return (*self.mixed, *self.categories)


# --- whose folder it is


def marker_key(folder: Path) -> str | None:
    """The key of the finished mixture in a folder, or None."""
    marker = folder / MARKER
    return str(orjson.loads(marker.read_bytes())["key"]) if marker.is_file() else None


def take_folder(folder: Path, key: str) -> None:
    """Make the folder ready for the mixture of a key; what an earlier one left there is removed.

    Raises:
        ValueError: the folder holds files, and none says that they are a mixture's.
    """
    mixing = folder / MIXING
    for place in [folder, *folder.glob("*")]:
        remove_leftovers(place)
    if mixing.is_file() and mixing.read_text() == key:
        return
    if folder.is_dir() and any(folder.iterdir()) and not mixing.is_file() and marker_key(folder) is None:
        raise ValueError(f"output_dir: {folder} holds files that are no mixture's; name a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(mixing, b"")  # whoever is interrupted now must not find a folder that seems to be somebody else's
    for pattern in (MARKER, *OWN_FILES):
        for file in folder.glob(pattern):
            file.unlink()
    write_whole(mixing, key.encode())


def finish_folder(folder: Path, key: str, parts: Sequence[WrittenPart], *, has_images: bool = False) -> None:
    """Say that the mixture is whole."""
    content = {"key": key, "parts": [asdict(part) for part in parts], **({"has_images": True} if has_images else {})}
    with whole_file(folder / MARKER, synced=True) as file:
        file.write(orjson.dumps(content, option=orjson.OPT_INDENT_2))
    for name in (MIXING, "parts.json", "categories.json"):  # what only an unfinished mixture needs
        (folder / name).unlink(missing_ok=True)


# --- statistics


def write_statistics(folder: Path, plan: MixPlan, written: WrittenFiles, images: ImageCounts | None) -> None:
    """SOURCE.stats.json beside each file of a category, and download_summary.json; with images also how many."""
    own_files = {(part.split, source): part.file for part in written.categories for source in part.rows}
    datasets = {}
    for source in plan.sources:
        file = own_files.get(("train", source.name))
        output_file = str((folder / file).absolute()) if file else str(folder.absolute())
        datasets[source.name] = source_statistics(source, written.stats.get(("train", source.name)), output_file)
        if images is not None:
            of_source = {"rows_with_images": images.rows[source.name], "images": images.images[source.name]}
            datasets[source.name] |= of_source
        if file:
            write_json(folder / f"{file.partition('.jsonl')[0]}.stats.json", datasets[source.name])
    categories: dict[str, dict[str, Any]] = {}
    for source in plan.sources:
        own = datasets[source.name]
        category = categories.setdefault(source.category or "other", {"samples": 0, "size_mb": 0.0, "datasets": []})
        category["samples"] += own["samples"]
        category["size_mb"] = round(category["size_mb"] + own["size_mb"], 2)
        category["datasets"].append(source.name)
    summary: dict[str, Any] = {
        "total_samples": sum(own["samples"] for own in datasets.values()),
        "total_size_mb": round(sum(own["size_mb"] for own in datasets.values()), 2),
        "categories": categories,
        "datasets": datasets,
    }
    if images is not None:
        sizes = list(ImageFolder(folder).sizes())
        summary["image_files"] = {"files": len(sizes), "size_mb": round(sum(sizes) / (1 << 20), 2)}
    write_json(folder / SUMMARY, summary)


def source_statistics(source: PlannedSource, stats: TextStats | None, output_file: str) -> dict[str, Any]:
    """Statistics of one source's training rows; lengths are characters, size_mb counts 1024 x 1024 bytes."""
    samples = stats.samples if stats else 0
    return {
        "samples": samples,
        "total_chars": stats.total_chars if stats else 0,
        "size_mb": round(stats.bytes / (1 << 20), 2) if stats else 0.0,
        "avg_length": round(stats.total_chars / samples) if stats else 0,
        "min_length": stats.min_length if stats else 0,
        "max_length": stats.max_length if stats else 0,
        "duplicates_removed": source.supply.dropped.get("duplicate", 0),
        "output_file": output_file,
    }


def write_json(path: Path, content: Any) -> None:
    """Write a value as indented JSON, whole."""
    write_whole(path, orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


# --- the lock file


def lock_record(
    key: str, mixture: Mixture, opened: Sequence[OpenedSource], plan: MixPlan, written: WrittenFiles
) -> dict[str, Any]:
    """All that decides a mixture, and all that came of it."""
    origins = {source.origin.name: source for source in opened}
    return {
        "key": key,
        "recipe": recipe_record(mixture),
        "sources": {
            source.name: {
                "origin": asdict(origins[source.name].origin),
                "files": [[file.name, file.stat().st_size] for file in origins[source.name].files],
                **{name: value for name, value in asdict(source).items() if name != "name"},
            }
            for source in plan.sources
        },
        "layouts": plan.layouts,
        "notes": list(plan.notes),
        "output": [asdict(part) for part in written.all],
    }


def recipe_record(mixture: Mixture) -> dict[str, Any]:
    """The recipe as plain values, without where it lies and where its result goes."""
    return {name: value for name, value in asdict(mixture).items() if name not in ("folder", "output_dir")}


def read_lock(path: Path) -> dict[str, Any]:
    """A lock file; ValueError where it is none."""
    try:
        lock: dict[str, Any] = orjson.loads(path.read_bytes())
        frozen_origins(lock)
        assert lock["output"]
    except FileNotFoundError:
        raise ValueError(f"--frozen: no file {path}; it is written beside a mixture, as {LOCK}") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"--frozen: {path} is no lock file of a mixture ({error!r})") from error
    return lock


def frozen_origins(lock: Mapping[str, Any]) -> dict[str, Origin]:
    """Where the sources of a lock file came from."""
    return {name: Origin(**source["origin"]) for name, source in lock["sources"].items()}


def check_frozen(now: Mapping[str, Any], frozen: Mapping[str, Any]) -> None:
    """ValueError names what differs from a lock file."""
    problems = []
    for key, value in now["recipe"].items():
        before = frozen["recipe"].get(key)
        if plain(value) != before:
            problems.append(f"recipe: {key} was {before!r}, is {plain(value)!r}")
    for name, source in now["sources"].items():
        before = frozen["sources"].get(name, {})
        for key in ("supply", "pool", "rows", "held_out_rows"):
            if plain(source[key]) != before.get(key):
                problems.append(f"{name}: {key} was {before.get(key)}, is {plain(source[key])}")
    checksums = {part["file"]: part["checksum"] for part in frozen["output"]}
    for part in now["output"]:
        if checksums.get(part["file"]) != part["checksum"]:
            problems.append(f"{part['file']}: checksum was {checksums.get(part['file'])}, is {part['checksum']}")
    if problems:
        raise ValueError("--frozen: the mixture is not the one of the lock file:\n" + "\n".join(problems))


def plain(value: Any) -> Any:
    """The value as it comes back from a JSON file."""
    return orjson.loads(orjson.dumps(value))


def locked_plan(lock: Mapping[str, Any]) -> MixPlan:
    """The plan of a lock file."""
    names = {item.name for item in fields(PlannedSource)}
    sources = tuple(
        PlannedSource(
            **{
                **{key: value for key, value in source.items() if key in names},
                "name": name,
                "supply": Supply(**source["supply"]),
            }
        )
        for name, source in lock["sources"].items()
    )
    return MixPlan(sources=sources, by=lock["recipe"]["by"], layouts=lock["layouts"], notes=tuple(lock["notes"]))
