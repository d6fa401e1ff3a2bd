"""Pass 1 of a mixture: every row of every source read once, in parallel, into an index of 48 bytes a kept row.

What the other parts code against:

    sources = [ScanSource(name="gsm8k", files=files, keep=keep, keep_key=key)]  # order is priority: the first wins
    scan = scan_sources(sources, folder, workers=2, report=print)  # resumable: finished chunks are not read again
    scan.sources["gsm8k"].read / .kept / .dropped / .text_bytes    # SourceCounts, before deduplication
    for rejection in scan.rejections(): ...                        # file, line, reason, detail, excerpt
    for row_id, text in scan.texts(): ...                          # kept rows again, for near duplicates
    unique = find_duplicates(scan, also_dropped=row_ids, ...)      # dedup.py: Available by (split, source)
    scatter(unique, {("train", "gsm8k"): 32_000}, output, ...)     # scatter.py: shuffled JSONL parts

A filter, compiled once per source and called on every row:

    Keep = Callable[[str, Row, Reader], str | None]
    keep(text, row, read) -> None to keep the row, else the reason, or "reason: detail"

`text` is the plain text of the sample (turns joined by a newline, no role names), `row` the raw row (for a licence
column); `read(row)` gives the canonical content (`messages`, `text`, ...). Reasons are counted, so they are few and
constant ("too short", "licence not allowed"); what differs from row to row goes after ": ". Filters run in forked
workers: they need not be picklable, and what they change in memory is lost.

A row with `parent`, in a column or in its metadata, belongs to that conversation: all rows of one parent go to the same
split; without a parent, so do all rows about the same images. Rows are the same where both text and images are.

Files in the folder: NNNNNN.index, the rows of a chunk as INDEX; NNNNNN.json, its counts, written last; plan.json.
"""

from __future__ import annotations

import io
import mmap
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from mixture.fingerprints import fingerprints
from mixture.formats import Content, Row, read_content
from mixture.image_files import image_names
from mixture.plain_text import text_reader
from mixture.whole_files import remove_leftovers, whole_file, write_whole
from mixture.workers import Report, run_tasks

FORMAT_VERSION = 1
"""Raised whenever the same rows give another index."""

CHUNK_BYTES = 16 << 20
BLOCK_BYTES = 96 << 10
"""Rows that are fingerprinted together: few enough for a core's own cache, and for memory that is used again rather
than taken from the system and given back for every block."""
MAX_LINE_BYTES = 32 << 20
REJECTIONS_PER_REASON = 20
"""Kept of each chunk."""
EXCERPT_BYTES = 400
MISFITS_TO_GIVE_UP = 1000

NO_FORMAT = "fits no known format"
NOT_JSON = "not valid JSON"

Reader = Callable[[Row], Content]
Keep = Callable[[str, Row, Reader], "str | None"]
Index = npt.NDArray[Any]

INDEX = np.dtype(
    [
        ("high", "<u8"),  # fingerprint of the content
        ("low", "<u8"),
        ("group", "<u8"),  # what decides the split: the prompt, or the parent conversation
        ("offset", "<u4"),  # of the line in the chunk
        ("size", "<u4"),  # of the line
        ("line", "<u4"),  # number in the chunk
        ("characters", "<u4"),
        ("text_bytes", "<u4"),
        ("prompt_bytes", "<u4"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class ScanSource:
    """A source to scan: raw rows in local JSONL files, in any format that formats.py knows."""

    name: str
    files: tuple[Path, ...]
    category: str | None = None
    format: str = "auto"
    """Name of a format of formats.py where it is not to be detected."""
    keep: Keep | None = None
    keep_key: str = ""
    """Changes whenever `keep` does: a scan is taken up again only where sources, files and keep_key are the same."""
    has_images: bool = False
    """Whether its rows name images, see image_files.py."""


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
    images: int = 0
    """Named in the kept rows."""


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A row left out, the first ones of each chunk and reason."""

    source: str
    file: Path
    line: int
    reason: str
    detail: str
    excerpt: str


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A byte range of one file; the lines that begin in it are its own."""

    number: int
    """Position among all chunks, which is the order of priority."""
    source: ScanSource
    file: Path
    file_number: int
    """Among the source's files."""
    start: int
    end: int


@dataclass(frozen=True)
class ChunkCounts:
    """What one chunk held."""

    lines: int
    read: int
    kept: int
    dropped: dict[str, int]
    text_bytes: int
    rejections: list[dict[str, Any]]
    images: int = 0


@dataclass(frozen=True)
class Scan:
    """A finished scan on disk."""

    folder: Path
    key: str
    chunks: tuple[Chunk, ...]

    @cached_property
    def counts(self) -> list[ChunkCounts]:
        """Counts of each chunk."""
        return [ChunkCounts(**orjson.loads(counts_file(self.folder, chunk).read_bytes())) for chunk in self.chunks]

    @cached_property
    def first_lines(self) -> list[int]:
        """Number in its file, from 1, of each chunk's first line."""
        numbers: list[int] = []
        next_line = 1
        for chunk, counts in zip(self.chunks, self.counts, strict=True):
            next_line = 1 if chunk.start == 0 else next_line
            numbers.append(next_line)
            next_line += counts.lines
        return numbers

    @cached_property
    def first_rows(self) -> list[int]:
        """Number in its source, from 0, of each chunk's first line."""
        numbers: list[int] = []
        lines: Counter[str] = Counter()
        for chunk, counts in zip(self.chunks, self.counts, strict=True):
            numbers.append(lines[chunk.source.name])
            lines[chunk.source.name] += counts.lines
        return numbers

    @cached_property
    def sources(self) -> dict[str, SourceCounts]:
        """Counts of each source, by name, in order of priority."""
        names = dict.fromkeys(chunk.source.name for chunk in self.chunks)
        return {name: self.source_counts(name) for name in names}

    def source_counts(self, name: str) -> SourceCounts:
        """Counts of one source over its chunks."""
        own = [(chunk, self.counts[chunk.number]) for chunk in self.chunks if chunk.source.name == name]
        dropped: Counter[str] = Counter()
        for _, counts in own:
            dropped.update(counts.dropped)
        return SourceCounts(
            read=sum(counts.read for _, counts in own),
            kept=sum(counts.kept for _, counts in own),
            dropped=dict(sorted(dropped.items())),
            file_bytes=sum(chunk.end - chunk.start for chunk, _ in own),
            text_bytes=sum(counts.text_bytes for _, counts in own),
            images=sum(counts.images for _, counts in own),
        )

    def index(self, chunk: Chunk) -> Index:
        """The kept rows of a chunk, in order, as INDEX."""
        return np.fromfile(index_file(self.folder, chunk), INDEX)

    def rejections(self) -> Iterator[Rejection]:
        """Rows left out, in the order of sources, files and lines; the first ones of each chunk and reason."""
        for chunk, counts, first_line in zip(self.chunks, self.counts, self.first_lines, strict=True):
            for rejected in counts.rejections:
                yield Rejection(
                    source=chunk.source.name,
                    file=chunk.file,
                    line=first_line + rejected["line"],
                    reason=rejected["reason"],
                    detail=rejected["detail"],
                    excerpt=rejected["excerpt"],
                )

    def texts(self, sources: Iterable[str] | None = None) -> Iterator[tuple[int, str]]:
        """(row id, plain text) of kept rows, in order; ids are the uint64 that `find_duplicates` takes back."""
        wanted = None if sources is None else set(sources)
        for chunk in self.chunks:
            if wanted is None or chunk.source.name in wanted:
                yield from self.chunk_texts(chunk)

    def chunk_texts(self, chunk: Chunk) -> Iterator[tuple[int, str]]:
        """The same of one chunk."""
        index = self.index(chunk)
        for row_id, line in zip(row_ids(chunk, index).tolist(), lines_of(chunk, index), strict=True):
            row = orjson.loads(line)
            yield row_id, text_reader(tuple(row), chunk.source.format)(row)[0]


def row_ids(chunk: Chunk, index: Index) -> npt.NDArray[np.uint64]:
    """Ids of a chunk's rows: ascending in the order of sources, files and lines."""
    return index["line"].astype(np.uint64) + np.uint64(chunk.number << 32)


def index_file(folder: Path, chunk: Chunk) -> Path:
    return folder / f"{chunk.number:06d}.index"


def counts_file(folder: Path, chunk: Chunk) -> Path:
    return folder / f"{chunk.number:06d}.json"


# --- scanning


def scan_sources(sources: Sequence[ScanSource], folder: Path, *, workers: int, report: Report) -> Scan:
    """Scan all sources into `folder`, taking up what an earlier, killed scan had finished.

    ValueError: a file that is missing, or a source in which no row fits a known format. Other rows that
    cannot be read are counted and kept as rejections.
    """
    key = scan_key(sources)
    forget_other_scan(folder, key)
    remove_leftovers(folder)
    files = [(source, number, file) for source in sources for number, file in enumerate(source.files)]
    chunks: list[Chunk] = []
    for source, number, file in files:
        chunks += file_chunks(source, number, file, first=len(chunks))
    scan = Scan(folder, key, tuple(chunks))
    missing = [chunk for chunk in chunks if not counts_file(folder, chunk).exists()]
    if 0 < len(missing) < len(chunks):
        report(f"scan: {len(chunks) - len(missing)} of {len(chunks)} chunks are there already")
    run_tasks(partial(scan_chunk, folder), missing, workers=workers, label="scan", report=report)
    for source in sources:
        check_any_row_fits(scan, source)
    return scan


def scan_key(sources: Sequence[ScanSource]) -> str:
    """16 hex digits over all that shapes the index: names, formats, filters, and the files' sizes and times."""
    parts: list[Any] = [FORMAT_VERSION, CHUNK_BYTES, MAX_LINE_BYTES]
    for source in sources:
        files = [[str(file), *size_and_time(source, file)] for file in source.files]
        parts.append([source.name, source.format, source.keep_key, files, *(["images"] if source.has_images else [])])
    return xxhash.xxh3_64_hexdigest(orjson.dumps(parts))


def size_and_time(source: ScanSource, file: Path) -> tuple[int, int]:
    """Size and time of last change of a file; ValueError where there is none."""
    try:
        status = file.stat()
    except OSError as error:
        raise ValueError(f"source {source.name}: cannot read {file}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def forget_other_scan(folder: Path, key: str) -> None:
    """Empty the folder where it holds a scan of other files or filters."""
    plan = folder / "plan.json"
    if plan.exists() and orjson.loads(plan.read_bytes()) == key:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_whole(plan, orjson.dumps(key))


def file_chunks(source: ScanSource, number: int, file: Path, *, first: int) -> list[Chunk]:
    """The chunks of one file; an empty file has one, with no rows."""
    size = file.stat().st_size
    return [
        Chunk(
            number=first + position,
            source=source,
            file=file,
            file_number=number,
            start=start,
            end=min(start + CHUNK_BYTES, size),
        )
        for position, start in enumerate(range(0, max(size, 1), CHUNK_BYTES))
    ]


def check_any_row_fits(scan: Scan, source: ScanSource) -> None:
    """ValueError with a row and its columns where all rows of a source fit no known format."""
    counts = scan.sources[source.name]
    if counts.read and counts.dropped.get(NO_FORMAT) == counts.read:
        first = next(item for item in scan.rejections() if item.source == source.name)
        raise ValueError(f"source {source.name}: none of {counts.read} rows {NO_FORMAT}.\n{first.file}: {first.detail}")


# --- one chunk


def scan_chunk(folder: Path, chunk: Chunk) -> None:
    """Write the index and the counts of a chunk."""
    reader = ChunkReader(chunk)
    with whole_file(index_file(folder, chunk)) as output:
        for lines, first_offset in blocks(chunk):
            if isinstance(lines, int):
                reader.skip_line(lines)
            else:
                output.write(reader.read_block(lines, first_offset).tobytes())
    write_whole(counts_file(folder, chunk), orjson.dumps(asdict(reader.counts())))


def blocks(chunk: Chunk) -> Iterator[tuple[list[bytes] | int, int]]:
    """The chunk's lines, about BLOCK_BYTES at a time, with the offset of the first from the chunk's start.

    Every line ends in a newline, also where the last one of the file does not. A line longer than MAX_LINE_BYTES comes
    as its size, and is never in memory.
    """
    if chunk.end == 0:
        return
    with chunk.file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        size = len(data)
        position = chunk.start
        if chunk.start:
            newline = data.find(b"\n", chunk.start - 1)
            position = size if newline < 0 else newline + 1
        while position < chunk.end:
            newline = data.rfind(b"\n", position, min(position + BLOCK_BYTES, chunk.end))
            if newline < 0:
                newline = data.find(b"\n", position)
            end = size if newline < 0 else newline + 1
            if end - position > MAX_LINE_BYTES:
                yield end - position, position - chunk.start
            else:
                lines = io.BytesIO(data[position:end]).readlines()  # half the time of bytes.split
                if newline < 0:
                    lines[-1] += b"\n"
                yield lines, position - chunk.start
            position = end


class ChunkReader:
    """Reads the rows of one chunk and counts what becomes of them."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.lines = 0
        self.read = 0
        self.kept = 0
        self.text_bytes = 0
        self.dropped: Counter[str] = Counter()
        self.rejections: list[dict[str, Any]] = []
        self.images = 0

    def read_block(self, lines: Sequence[bytes], first_offset: int) -> Index:
        """The index rows of the lines that are kept."""
        source = self.chunk.source
        keep, row_format, loads = source.keep, source.format, orjson.loads
        read = partial(read_content, format_name=row_format)
        texts: list[str] = []
        prompts: list[int] = []
        kept: list[int] = []
        parents: list[tuple[int, int]] = []
        for place, line in enumerate(lines):
            try:
                row = loads(line)
            except orjson.JSONDecodeError:
                if line.strip():
                    self.reject(place, unreadable(line), line)
                continue
            if type(row) is not dict:
                self.reject(place, f"not a JSON object: {type(row).__name__}", line)
                continue
            try:
                text, prompt = text_reader(tuple(row), row_format)(row)
            except ValueError as error:
                self.reject(place, f"{NO_FORMAT}: {error}", line)
                continue
            if keep is not None:
                try:
                    reason = keep(text, row, read)
                except ValueError as error:
                    number = line_number(self.chunk, first_offset + sum(map(len, lines[:place])))
                    raise ValueError(f"{self.chunk.file}, line {number}: {error}") from error
                if reason is not None:
                    self.reject(place, reason, line)
                    continue
            if ("parent" in row or "metadata" in row) and (parent := parent_of(row)) is not None:
                parents.append((len(texts), xxhash.xxh3_64_intdigest(str(parent).encode())))
            texts.append(text)
            prompts.append(prompt)
            kept.append(place)
        index = self.index(texts, prompts, parents)
        if source.has_images:
            self.add_images(index, [lines[place] for place in kept], {row for row, _ in parents})
        sizes = np.fromiter(map(len, lines), np.int64, len(lines))
        index["offset"] = (first_offset + np.cumsum(sizes) - sizes)[kept]
        index["size"] = sizes[kept] - 1
        index["line"] = np.fromiter(kept, np.int64, len(kept)) + self.lines
        self.lines += len(lines)
        return index

    def index(self, texts: list[str], prompts: list[int], parents: list[tuple[int, int]]) -> Index:
        """Index rows of kept texts, but for the places of their lines."""
        index = np.zeros(len(texts), INDEX)
        if not texts:
            return index
        found = fingerprints(texts, prompts)
        index["high"], index["low"] = found.content[:, 0], found.content[:, 1]
        index["group"] = np.where(found.prompt_bytes > 0, found.prompt, found.content[:, 1])
        for row, parent in parents:
            index["group"][row] = parent
        index["characters"] = np.fromiter(map(len, texts), np.uint32, len(texts))
        index["text_bytes"] = found.text_bytes
        index["prompt_bytes"] = found.prompt_bytes
        self.kept += len(texts)
        self.text_bytes += int(found.text_bytes.sum())
        return index

    def add_images(self, index: Index, lines: Sequence[bytes], with_parent: set[int]) -> None:
        """Make the images that lines name a part of what makes index rows equal, and let them decide the split."""
        for row, line in enumerate(lines):
            names = image_names(orjson.loads(line).get("image_messages", ()))
            if names:
                digest = xxhash.xxh3_128_intdigest("\n".join(names).encode())
                index["high"][row] ^= np.uint64(digest >> 64)
                index["low"][row] ^= np.uint64(digest & (1 << 64) - 1)
                if row not in with_parent:
                    index["group"][row] = np.uint64(digest >> 64)
                self.images += len(names)

    def skip_line(self, size: int) -> None:
        """Leave out a line that is too long to be read."""
        self.reject(0, f"line too long: {size} bytes, at most {MAX_LINE_BYTES}", b"")
        self.lines += 1

    def reject(self, place: int, why: str, line: bytes) -> None:
        """Count a row that is left out, given its place in the block, and keep the first ones of each reason."""
        number = self.lines + place
        reason, _, detail = why.partition(": ")
        self.dropped[reason] += 1
        if self.dropped[reason] <= REJECTIONS_PER_REASON:
            excerpt = line.removesuffix(b"\n")[:EXCERPT_BYTES].decode(errors="replace")
            self.rejections.append({"line": number, "reason": reason, "detail": detail, "excerpt": excerpt})
        if reason == NO_FORMAT and self.dropped[reason] == number + 1 == MISFITS_TO_GIVE_UP and self.chunk.start == 0:
            source = self.chunk.source.name
            raise ValueError(f"source {source}: none of the first {number + 1} rows {NO_FORMAT}.\n{detail}")

    def counts(self) -> ChunkCounts:
        """Counts of the whole chunk."""
        dropped = dict(sorted(self.dropped.items()))
        read = self.kept + self.dropped.total()
        return ChunkCounts(self.lines, read, self.kept, dropped, self.text_bytes, self.rejections, self.images)


def line_number(chunk: Chunk, offset: int) -> int:
    """Number in its file, from 1, of the line at an offset of the chunk; reads the file up to there."""
    with chunk.file.open("rb") as file:
        left, lines = chunk.start + offset, 1
        while left:
            block = file.read(min(left, 1 << 20))
            left -= len(block)
            lines += block.count(b"\n")
    return lines


def parent_of(row: Row) -> Any:
    """The conversation that a row was cut from, where it names one."""
    metadata = row.get("metadata")
    return row.get("parent") if metadata is None or type(metadata) is not dict else metadata.get("parent")


def unreadable(line: bytes) -> str:
    """Why a line is no JSON."""
    line = line.removesuffix(b"\n")
    try:
        line.decode()
        orjson.loads(line)
    except UnicodeDecodeError as wrong:
        return f"not valid UTF-8: {wrong.reason} at byte {wrong.start} of the line"
    except orjson.JSONDecodeError as error:
        return f"{NOT_JSON}: {error}"
    raise AssertionError("a line is valid JSON without its newline, and not with it")


def lines_of(chunk: Chunk, index: Index) -> Iterator[bytes]:
    """The raw lines of index rows."""
    if not len(index):
        return
    with chunk.file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        starts = (index["offset"].astype(np.int64) + chunk.start).tolist()
        for start, size in zip(starts, index["size"].tolist(), strict=True):
            yield data[start : start + size]
