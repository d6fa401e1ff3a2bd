"""The `dataset:` section of a run: which rows, which split, how long, packed or not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True, frozen=True)
class DatasetConfig:
    """The rows to train on, and how they become token rows. Any further key reaches the dataset module."""

    name: str | None = None
    """Module in datasets/, without .py. Only a label where `file` is given."""

    file: str | None = None
    """Path of a dataset module, PATH.py or PATH.py:FUNCTION. Relative paths are tried from the config's
    folder, datasets/, the project's folder and the working folder."""

    mixture: str | None = None
    """Recipe of a mixture (configs/mixtures/*.yaml), trained on instead of a module."""

    names: str | list[str] | None = None
    """Several modules of datasets/ at once, trained on instead of one: [gsm8k, mbpp], or gsm8k,mbpp."""

    sampling: Literal["concatenated", "interleaved"] = "concatenated"
    """How `names` are mixed: every row once, or equal parts of each, as many as the smallest has."""

    allow_non_commercial: bool = False
    """Take `names` whose licence forbids commercial use."""

    train_split: str = "train"
    """Split name passed to the module for training rows."""

    test_split: str = "test"
    """Split name passed to the module for held-out rows."""

    split_ratio: float | None = None
    """Share of rows that go to training where the module splits one set. Unset: the module's own default."""

    limit: int | None = None
    """Keep at most this many rows of each split, the first ones the module returns."""

    max_length: int = 1024
    """Longest row in tokens, and the length of a pack."""

    over_length: Literal["drop", "split", "truncate"] | None = None
    """What happens to longer rows; always counted. Unset: `split` for texts and pretraining, `drop` for
    conversations."""

    packing: bool = True
    """Put several samples into one row of `max_length` tokens, without attention across samples. Rows with images are
    padded and never packed."""

    mask_rationale: bool = False
    """Leave reasoning out of the loss and learn the answer alone, where samples mark it: `metadata.rationale`,
    [[start, end], ...] in characters of the last answer."""

    shard_size_mb: int = 2048
    """Largest size of a Parquet shard of token rows, and of an Arrow shard of rows with images, in MiB."""

    tokenizer_backend: Literal["auto", "huggingface", "fastokens", "gigatoken"] = "auto"
    """What reads the tokenizer.json. `auto` takes a faster reader where one is installed and gives Hugging Face's
    ids for the data's first rows."""

    data_files: str | list[str] | dict[str, Any] | None = None
    """Local files with the module's columns, read instead of the hub: a path, a list of paths, or
    {split: path or paths}."""

    module_keys: dict[str, Any] = field(default_factory=dict, metadata={"internal": True})
    """Every other key of `dataset:`, for the module to read. Filled by the config reader, not by the user."""

    def __post_init__(self) -> None:
        if not (self.name or self.file or self.mixture or self.names):
            raise ValueError(
                "dataset.name or dataset.file is required: a module in datasets/ or a path to one; or dataset.mixture, "
                "a recipe, or dataset.names, several modules"
            )
        if self.mixture and self.names:
            raise ValueError("dataset.mixture and dataset.names both say what to train on; keep one of them")
        if self.mixture or self.names:
            self.check_keys_of_modules()
        if self.split_ratio is not None and not 0 < self.split_ratio < 1:
            raise ValueError(f"dataset.split_ratio must lie between 0 and 1, got {self.split_ratio}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"dataset.limit must be at least 1, got {self.limit}")
        if self.shard_size_mb < 1:
            raise ValueError(f"dataset.shard_size_mb must be at least 1, got {self.shard_size_mb}")
        if self.max_length < 8:
            raise ValueError(f"dataset.max_length must be at least 8 tokens, got {self.max_length}")

    @property
    def name_list(self) -> list[str]:
        """`names` as a list."""
        names = self.names.split(",") if isinstance(self.names, str) else self.names or []
        return [name.strip() for name in names if name.strip()]

    def check_keys_of_modules(self) -> None:
        """Raise ValueError for keys that only a single module would read."""
        given = [key for key in ("split_ratio", "data_files") if getattr(self, key) is not None]
        given += list(self.module_keys)
        if given:
            instead = "the recipe" if self.mixture else "a recipe (dataset.mixture)"
            raise ValueError(f"dataset.{given[0]} is for a single dataset module; put it into {instead}")
