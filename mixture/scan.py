"""Pass 1 of a mixture: every row of every source read once, in parallel, into an index of 48 bytes a kept row.

What the other parts code against:

    sources = [ScanSource(name="gsm8k", files=files, keep=keep, keep_key=key), ...]          # order is priority: first wins
    scan = scan_sources(sources, folder, workers=2, report=print)                 # resumable, done chunks are not re-read
    scan.sources["gsm8k"].read / .kept / .dropped / .text_bytes ...               # SourceCounts, before deduplication
    for rejection in scan.rejections(): ...                                       # file, line, reason, detail, excerpt
    for row_id, text in scan.texts(): ...                                         # kept rows again, for near duplicates
    unique = find_duplicates(scan, ..., also_dropped=row_ids)   # dedup.py: Available rows per (split, source)
    parts = scatter(unique, {("train", "gsm8k"): 32_000, ...}, ...)               # scatter.py: shuffled JSONL parts

A per-row filter, compiled once per source:

    Keep = Callable[[str, Row, Content], str | None]
    keep(text, row, content) -> None to keep the row, else the reason, or "reason: detail"

`text` is the plain text of the sample (turns joined by a newline, no role names), `row` the raw row (for a licence
column), `content` the canonical content (`messages`, `text`, ...). Reasons are counted, so they are few and constant
("too short", "licence not allowed"); what differs from row to row goes after ": ". Filters run in forked workers: they
need not be picklable, and what they change in memory is lost.

A row whose metadata holds `parent` belongs to that conversation: all rows of one parent go to the same split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mixture.formats import Content, Row

Keep = Callable[[str, Row, Content], "str | None"]
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ScanSource:
    """A source to scan: raw rows in local JSONL files, plain or .gz or .zst, in any format that formats.py knows."""

    name: str
    files: tuple[Path, ...]
    category: str | None = None
    keep: Keep | None = None
    keep_key: str = ""
    """Changes whenever `keep` does: a scan is taken up again only where sources, files and keep_key are the same."""


@dataclass(frozen=True, kw_only=True)
class SourceCounts:
    """What pass 1 found in one source."""

    read: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason; read = kept + the sum of these."""
    file_bytes: int
    text_bytes: int
    """UTF-8 bytes of the kept rows' plain text; tokens are estimated from them."""


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A row left out, the first ones of each chunk and reason."""

    source: str
    file: Path
    line: int
    reason: str
    detail: str
    excerpt: str


@dataclass(frozen=True)
class Scan:
    """A finished scan on disk."""

    folder: Path
    sources: dict[str, SourceCounts]

    def rejections(self) -> Iterator[Rejection]:
        """Rows left out, in the order of sources, files and lines; capped per chunk and reason."""
        raise NotImplementedError

    def texts(self, sources: Iterable[str] | None = None) -> Iterator[tuple[int, str]]:
        """(row id, plain text) of kept rows, in order; ids are the uint64 that `find_duplicates` takes back."""
        raise NotImplementedError


def scan_sources(sources: Sequence[ScanSource], folder: Path, *, workers: int, report: Report) -> Scan:
    """Scan all sources into `folder`, taking up what an earlier, killed scan had finished.

    ValueError: a file that is missing or cut off. Rows that cannot be read are counted and kept as rejections.
    """
    raise NotImplementedError
