"""Where a dataset module's rows come from: a pinned hub data set, or local files with the same columns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from mixture.config import DatasetConfig
from mixture.image_rows import without_decoding

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """What a dataset module says about its data, as the module-level constant SOURCE, in literal values only.

    `./train.sh datasets` reads it without running the module.
    """

    id: str | None
    """Hub id. None: the rows are made by the module itself."""
    revision: str | None = None
    """Full commit hash on the hub. None: the newest, settled and recorded when it is fetched."""
    config: str | None = None
    """Configuration of the hub data set."""
    licence: str | None
    """Licence by its SPDX name, with what a user must know about it. None: none is stated."""
    commercial_use: bool | None
    """Whether the licence allows commercial use. None: not known, or it differs from row to row."""
    format: str
    """Row format, by its name in mixture.formats; `images` for what mixture/image_dialogues.py reads."""
    rows: dict[str, int | None] = field(default_factory=dict)
    """The splits, by the names to ask for them with, and their rows; None where the number is not known."""
    splits: dict[str, str] = field(default_factory=dict)
    """Names on the hub of those splits that have another one there."""
    files: dict[str, str | list[str]] | None = None
    """Files to read of each split, by its name on the hub, as patterns: where the hub's own choice is wrong."""
    columns: list[str] | None = None
    """Columns to read of Parquet files; in a mixture, nothing else is fetched. None: all."""
    gated: bool = False
    """Whether one must accept terms on the hub first, and show a token."""
    options: dict[str, str] = field(default_factory=dict)
    """Keys that a user may set, with their defaults; `{key}` in `config` and `files` stands for the value."""
    fallback: list[dict[str, Any]] = field(default_factory=list)
    """What to read instead where this cannot be had, in order: the fields that differ."""

    def candidates(self, options: Mapping[str, Any] | None = None) -> list[HubSource]:
        """This source and its fallbacks, with the user's options filled in."""
        values = {key: str((options or {}).get(key) or default) for key, default in self.options.items()}
        return [
            replace(source, config=filled(source.config, values), files=filled(source.files, values), fallback=[])
            for source in (self, *(replace(self, **fields) for fields in self.fallback))
        ]

    def split_on_hub(self, split: str) -> str:
        """The name that a split has on the hub; ValueError names the splits where there is none of that name."""
        if self.rows and split not in self.rows:
            raise ValueError(
                f"{self.id} on the hub has no split {split!r}, only {', '.join(self.rows)}: "
                "set dataset.train_split or dataset.test_split, in a mixture the source's split"
            )
        return self.splits.get(split, split)


ReadRows = Callable[[Iterable[dict[str, Any]]], Iterable[dict[str, Any]]]


@dataclass(frozen=True)
class HubRows:
    """A dataset module's `get_custom_dataset` in one line: the rows of a HubSource, or of `dataset.data_files`.

    `read_rows` turns the rows as they are stored into rows of a known format; it may leave rows out or make several
    of one. A mixture asks it for the same rows without loading a split whole.
    """

    source: HubSource
    read_rows: ReadRows | None = None
    is_in_split: Callable[[dict[str, Any], str], bool] | None = None
    """Divides a single local file as the authors do: whether a row belongs to a split."""

    def __call__(self, dataset_config: Any, processor: Any, split: str, split_ratio: float = 0.9) -> Any:
        data_files = dataset_config.get("data_files")
        is_in_split = self.is_in_split
        if is_in_split is not None and isinstance(data_files, str):
            return read_files([data_files]).filter(lambda row: is_in_split(row, split))
        return load_source(self.source, dataset_config, split, split_ratio, self.read_rows)


def filled(value: Any, options: Mapping[str, str]) -> Any:
    """The value with each `{key}` in its texts replaced."""
    if isinstance(value, str):
        for key, text in options.items():
            value = value.replace(f"{{{key}}}", text)
        return value
    if isinstance(value, Mapping):
        return {key: filled(item, options) for key, item in value.items()}
    return [filled(item, options) for item in value] if isinstance(value, list) else value


def load_source(
    source: HubSource, dataset_config: Any, split: str, split_ratio: float = 0.9, read_rows: ReadRows | None = None
) -> Any:
    """The rows of one split as a Hugging Face Dataset, from `dataset.data_files` if set, else from the hub.

    Where there is one set of rows for both splits, `split_ratio` of the distinct rows go to `dataset.train_split` and
    the others to `dataset.test_split`, chosen by the hash of the row: the same on every machine, equal rows together.
    ValueError: a missing file or split, or a `dataset.split_ratio` where there is nothing to split.
    """
    data_files = dataset_config.get("data_files")
    if data_files and not isinstance(data_files, Mapping):
        return split_part(converted(read_files(as_list(data_files)), read_rows), dataset_config, split, split_ratio)
    if not data_files and len(source.rows) == 1:
        rows = read_hub(source, next(iter(source.rows)), dataset_config)
        return split_part(converted(rows, read_rows), dataset_config, split, split_ratio)
    if data_files and split not in data_files:
        raise ValueError(
            f"dataset.data_files has no split {split!r}, only {', '.join(data_files)}: "
            "set dataset.train_split or dataset.test_split"
        )
    if not data_files:
        source.split_on_hub(split)
    if dataset_config.get("split_ratio") is not None:
        raise ValueError(
            "dataset.split_ratio has no effect: the data has its own splits "
            f"{', '.join(data_files or source.rows)}; remove the key"
        )
    rows = read_files(as_list(data_files[split])) if data_files else read_hub(source, split, dataset_config)
    return converted(rows, read_rows)


def converted(rows: Any, read_rows: ReadRows | None) -> Any:
    """The rows of a Dataset as the module reads them, in a Dataset again."""
    if read_rows is None:
        return rows

    def convert(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        stored = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        read = list(read_rows(stored))
        columns = dict.fromkeys(column for row in read for column in row)
        return {column: [row.get(column) for row in read] for column in columns}

    return rows.map(convert, batched=True, remove_columns=rows.column_names)


def read_hub(source: HubSource, split: str, options: Any = None) -> Any:
    """One split from the hub, at the pinned revision, or else from the first fallback that can be had."""
    failures: list[str] = []
    for candidate in source.candidates(options):
        try:
            rows = load_files(candidate, split) if candidate.files else load_config(candidate, split)
        except Exception as error:
            if candidate.gated:
                raise ValueError(
                    f"{candidate.id} is gated: accept its terms at https://huggingface.co/datasets/{candidate.id}, "
                    f"then set HF_TOKEN or run `hf auth login` ({type(error).__name__}: {error})"
                ) from error
            if not source.fallback:
                raise
            failures.append(f"{candidate.id}: {type(error).__name__}: {error}")
            continue
        if failures:
            warnings.warn(f"reading {candidate.id} instead of: {'; '.join(failures)}", stacklevel=2)
        return rows
    raise ValueError("none of the sources can be had: " + "; ".join(failures))


def load_config(source: HubSource, split: str) -> Any:
    """One split of a data set whose files the hub chooses."""
    from datasets import load_dataset

    return load_dataset(source.id, source.config, split=source.split_on_hub(split), revision=source.revision)


def load_files(source: HubSource, split: str) -> Any:
    """One split of a data set as the files that the source names for it."""
    from datasets import load_dataset

    assert source.files is not None
    files = as_list(source.files[source.split_on_hub(split)])
    head = f"hf://datasets/{source.id}" + (f"@{source.revision}" if source.revision else "")
    return load_dataset(READERS[Path(files[0]).suffix], data_files=[f"{head}/{file}" for file in files], split="train")


def read_files(files: list[str]) -> Any:
    """Local files of one kind, told by their ending, one after another."""
    from datasets import load_dataset

    paths = [Path(file).expanduser() for file in files]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"dataset.data_files: no file {path} (looked at {path.absolute()})")
    endings = {path.suffix for path in paths}
    if len(endings) != 1 or not endings <= READERS.keys():
        raise ValueError(
            f"dataset.data_files: endings {', '.join(sorted(endings))}; give files of one kind: {', '.join(READERS)}"
        )
    return load_dataset(READERS[endings.pop()], data_files=[str(path) for path in paths], split="train")


def as_list(files: Any) -> list[str]:
    """A path or a list of paths, as a list."""
    return [str(files)] if isinstance(files, (str, Path)) else [str(file) for file in files]


def split_part(rows: Any, dataset_config: Any, split: str, split_ratio: float) -> Any:
    """The train or test part of one set of rows, disjoint by content."""
    names = (dataset_config.train_split, dataset_config.test_split)
    if split not in names or names[0] == names[1]:
        raise ValueError(
            f"the data has one set of rows, divided into {names[0]!r} and {names[1]!r}; no split {split!r}"
        )
    hashes = row_hashes(rows)
    distinct = np.unique(hashes)
    if len(distinct) < 2:
        raise ValueError(f"the data has {len(distinct)} distinct rows, too few to divide into train and test")
    train_count = min(max(round(split_ratio * len(distinct)), 1), len(distinct) - 1)
    in_train = hashes < distinct[train_count]
    return rows.select(np.flatnonzero(in_train if split == names[0] else ~in_train))


def row_hashes(rows: Any) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each row's content."""
    option = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS
    files, _ = without_decoding(rows)  # an image is as equal as its file
    return np.array(
        [xxhash.xxh3_64_intdigest(orjson.dumps(row, option=option, default=plain_value)) for row in files], np.uint64
    )


def plain_value(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(value) if isinstance(value, bytes) else str(value)


def absolute_data_files(config: DatasetConfig, *, config_folder: Path, project: Path) -> DatasetConfig:
    """The config with every path of `data_files` absolute; ValueError lists the tried paths of a missing one."""

    def absolute(files: Any) -> Any:
        if isinstance(files, Mapping):
            return {split: absolute(paths) for split, paths in files.items()}
        if isinstance(files, (list, tuple)):
            return [absolute(path) for path in files]
        path = Path(files).expanduser()
        tried = [path] if path.is_absolute() else [folder / path for folder in (config_folder, project, Path.cwd())]
        for candidate in tried:
            if candidate.is_file():
                return str(candidate.resolve())
        looked = "\n".join(f"  {candidate}" for candidate in dict.fromkeys(tried))
        raise ValueError(f"dataset.data_files: no file {files}. Looked for:\n{looked}")

    return config if config.data_files is None else replace(config, data_files=absolute(config.data_files))
