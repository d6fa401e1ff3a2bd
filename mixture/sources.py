"""Every source of a mixture as JSONL files on this machine, with where its rows come from on record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class WantedSource(Protocol):
    """What is read of a source in a recipe: mixture.recipe.SourceConfig has all of it."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str | list[str] | None:
        """Files, folders, globs or hf:// paths."""

    @property
    def hub(self) -> str | None:
        """ORG/NAME[:CONFIG][@REVISION] of a hub data set."""

    @property
    def file(self) -> str | list[str] | None:
        """Files inside the hub data set, as patterns; or, without `hub` and `path`, a dataset module's path."""

    @property
    def split(self) -> str | None: ...
    @property
    def fallback(self) -> Sequence[Any]: ...
    @property
    def licence(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the rows of a source come from, settled before anything is fetched; written to the lock file."""

    name: str
    place: str
    """Hub id with configuration, paths as written in the recipe, or the dataset module."""
    revision: str | None
    """Full commit hash on the hub; None for files on this machine."""
    split: str
    choice: int
    """0: the primary source, n: the nth fallback."""
    licence: str | None
    commercial_use: bool | None
    """None: not known."""
    download_bytes: int
    """What has yet to be fetched, 0 when all is here."""
    rows: int | None
    """Rows as published; None where nobody says."""


@dataclass(frozen=True, kw_only=True)
class OpenedSource:
    """A source that can be scanned."""

    origin: Origin
    files: tuple[Path, ...]
    """JSONL, uncompressed, in the order in which they are to be read; never to be written to."""


def open_sources(
    sources: Sequence[WantedSource],
    *,
    data_dir: Path,
    folders: Sequence[Path],
    project: Path,
    split: str = "train",
    max_rows: Mapping[str, int] | None = None,
    allow_non_commercial: bool = False,
    frozen: Mapping[str, Origin] | None = None,
    report: Callable[[str], None] = print,
) -> list[OpenedSource]:
    """The sources in their order, fetched side by side into `data_dir`/sources/KEY/ where they are not JSONL files here.

    `folders` are tried for relative paths, the recipe's own first. `max_rows` limits what is fetched of a source by
    name; files that are used in place stay whole. `frozen`, from a lock file, must be met exactly. ValueError: a
    missing file, module, split or permission, a licence that forbids commercial use, a hub that stays away.
    """
    raise NotImplementedError
