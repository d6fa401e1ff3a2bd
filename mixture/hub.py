"""Where a dataset module's rows come from: a pinned hub data set, or local files with the same columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from mixture.config import DatasetConfig

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """What a dataset module says about its data, as the module-level constant SOURCE, in literal values only.

    `./train.sh datasets` reads it without running the module.
    """

    id: str | None
    """Hub id. None: the rows are made by the module itself."""
    revision: str | None = None
    """Full commit hash on the hub."""
    config: str | None = None
    """Configuration of the hub data set."""
    licence: str
    """Licence by its SPDX name, with what a user must know about it."""
    commercial_use: bool
    """Whether the licence allows commercial use."""
    format: str
    """Row format, by its name in mixture.formats."""
    rows: dict[str, int] = field(default_factory=dict)
    """Rows in each split on the hub."""
    files: dict[str, str] | None = None
    """Files to read of each split, where the hub's own choice is wrong."""


def load_source(source: HubSource, dataset_config: Any, split: str, split_ratio: float = 0.9) -> Any:
    """The rows of one split as a Hugging Face Dataset, from `dataset.data_files` if set, else from the hub.

    Where there is one set of rows for both splits, `split_ratio` of the distinct rows go to `dataset.train_split` and
    the others to `dataset.test_split`, chosen by the hash of the row: the same on every machine, equal rows together.
    ValueError: a missing file or split, or a `dataset.split_ratio` where there is nothing to split.
    """
    data_files = dataset_config.get("data_files")
    if data_files and not isinstance(data_files, Mapping):
        return split_part(read_files(as_list(data_files)), dataset_config, split, split_ratio)
    if not data_files and len(source.rows) == 1:
        return split_part(read_hub(source, *source.rows), dataset_config, split, split_ratio)
    present = data_files or source.rows
    if split not in present:
        place = "dataset.data_files" if data_files else f"{source.id} on the hub"
        raise ValueError(
            f"{place} has no split {split!r}, only {', '.join(present)}: set dataset.train_split or dataset.test_split"
        )
    if dataset_config.get("split_ratio") is not None:
        raise ValueError(
            f"dataset.split_ratio has no effect: the data has its own splits {', '.join(present)}; remove the key"
        )
    return read_files(as_list(data_files[split])) if data_files else read_hub(source, split)


def read_hub(source: HubSource, split: str) -> Any:
    """One split from the hub, at the pinned revision."""
    from datasets import load_dataset

    assert source.id is not None
    return load_dataset(source.id, source.config, split=split, revision=source.revision, data_files=source.files)


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
    return np.array(
        [xxhash.xxh3_64_intdigest(orjson.dumps(row, option=option, default=str)) for row in rows], np.uint64
    )


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
