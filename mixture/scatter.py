"""Pass 2 of a mixture: chosen rows read again, shuffled as a whole in bounded memory, written as JSONL parts.

Every occurrence of a row has a random 64-bit key, a hash of its place, its epoch and the seed; the output is in the
order of the keys, so nothing depends on which worker did what. First every chunk is written anew, its chosen rows in
the order of their keys; then each part takes its range of keys from all chunks, a bucket that fits in memory at a time.

Files in the scan's folder, scatter-KEY/: NNNNNN.rows, the rows of a chunk; NNNNNN.npy, their keys and where they start;
NNNNNN.json, their counts. In the output folder: the parts, and parts.json, written last.
"""

from __future__ import annotations

import mmap
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from mixture.dedup import UniqueRows, save_array
from mixture.formats import Content, canonical_row
from mixture.mix import size
from mixture.mixed_bits import mixed_bits
from mixture.plain_text import flat, turns_text
from mixture.scan import Chunk, Index, lines_of
from mixture.whole_files import remove_leftovers, whole_file, write_whole
from mixture.workers import Report, run_tasks

FORMAT_VERSION = 1
"""Raised whenever the same rows give other bytes."""

BUCKET_BYTES = 32 << 20
"""Rows that are put in order in memory."""
LINES_PER_WRITE = 64
MEGABYTE = 1 << 20
SPLITS = ("train", "test")
Layout = Literal["mixed", "categories"]
Turns = Literal["messages", "conversations"]
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}
"""`from` of a conversation's turns, as ShareGPT spells them."""
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class ShortPromptsFirst:
    """A first stage of `share` of each source's rows, all with prompts under the `short_prompt_bytes` of dedup."""

    share: float


@dataclass(frozen=True, kw_only=True)
class WrittenPart:
    """One finished file of a mixture."""

    file: str
    """Relative to the output folder: `train-00000.jsonl`, or `math_reasoning/gsm8k.jsonl` by category."""
    split: str
    stage: int
    rows: dict[str, int]
    """By source."""
    bytes: int
    checksum: str
    """xxh3-128 of the file."""


@dataclass(frozen=True, kw_only=True)
class TextStats:
    """Characters of the written rows of one source in one split."""

    samples: int
    total_chars: int
    min_length: int
    max_length: int
    bytes: int
    """Of their lines, not compressed."""


@dataclass(frozen=True, kw_only=True)
class WrittenMixture:
    """What scatter wrote."""

    parts: list[WrittenPart]
    stats: dict[tuple[str, str], TextStats]
    """By (split, source)."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How often the rows of one source and split occur."""

    epochs: int
    """Occurrences of every row of the pool."""
    pool_key: int
    """Rows whose selection key is not above this are the pool."""
    last_key: int | None
    """Rows whose selection key is not above this occur once more."""
    last_short_key: int | None = None
    """Occurrences with a short prompt whose stage key is not above this form the first stage."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that are shuffled together into files of their own, one after the other."""

    split: str
    stage: int
    stem: str


@dataclass(frozen=True, kw_only=True)
class ChunkRows:
    """The written rows of one chunk, mapped from their files: in the order of their groups, and of keys in a group."""

    keys: Keys
    starts: Keys
    """Of each row in `data`, and the end of the last."""
    group_starts: list[int]
    """First row of each group, and the number of rows."""
    data: memoryview


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file to write: a range of keys of a group, in buckets."""

    file: str
    group: int
    first_keys: list[int]
    """Of each bucket, and the end of the last."""


def scatter(
    unique: UniqueRows,
    rows: Mapping[tuple[str, str], int],
    output: Path,
    *,
    seed: int,
    distinct: Mapping[tuple[str, str], int] | None = None,
    stages: ShortPromptsFirst | None = None,
    layout: Layout = "mixed",
    turns: Turns = "messages",
    compress: Literal["zstd"] | None = None,
    part_megabytes: int = 256,
    workers: int,
    report: Report,
) -> WrittenMixture:
    """Write exactly `rows[(split, source)]` rows of each, in a seeded global order, as JSONL parts under `output`.

    More rows than a source has: whole epochs, then a remainder without replacement, the first by keyed permutation.
    `distinct`: draw from at most this many different rows, where it is fewer than there are.
    The same rows, seed and settings give the same bytes, whatever the number of workers and interruptions. Temporary
    disk: about the size of the output, under the scan's folder.
    """
    order = Order(
        unique, dict(rows), dict(distinct or {}), seed, stages, layout, turns, compress, part_megabytes * MEGABYTE
    )
    output.mkdir(parents=True, exist_ok=True)
    done = read_written(output, order.key)
    if done is not None:
        if order.folder.exists():  # whoever wrote the mixture was killed before removing it
            shutil.rmtree(order.folder)
        return done
    order.folder.mkdir(exist_ok=True)
    remove_leftovers(output)
    remove_leftovers(order.folder)
    check_room(order, output)
    chunks = [chunk for chunk in order.chunks if not order.counts_file(chunk).exists()]
    if 0 < len(chunks) < len(order.chunks):
        report(f"shuffle: {len(order.chunks) - len(chunks)} of {len(order.chunks)} chunks are there already")
    order.find_draws()
    run_tasks(partial(scatter_chunk, order), chunks, workers=workers, label="shuffle", report=report)
    counts = [orjson.loads(order.counts_file(chunk).read_bytes()) for chunk in order.chunks]
    parts = list(order.parts(group_bytes(counts)))
    missing = [part for part in parts if not order.part_file(part).exists()]
    run_tasks(partial(write_part, order, output), missing, workers=workers, label="write", report=report)
    written = WrittenMixture(
        parts=[WrittenPart(**orjson.loads(order.part_file(part).read_bytes())) for part in parts],
        stats=text_stats(order, counts),
    )
    check_counts(order, written)
    write_written(output, order.key, written)
    shutil.rmtree(order.folder)
    return written


# --- the order of all rows


def salt(*parts: Any) -> np.uint64:
    return np.uint64(xxhash.xxh3_64_intdigest(orjson.dumps(parts)))


class Order:
    """Which rows occur how often, in which group, and under which key."""

    def __init__(
        self,
        unique: UniqueRows,
        rows: dict[tuple[str, str], int],
        distinct: dict[tuple[str, str], int],
        seed: int,
        stages: ShortPromptsFirst | None,
        layout: Layout,
        turns: Turns,
        compress: str | None,
        part_bytes: int,
    ) -> None:
        self.unique = unique
        self.scan = unique.scan
        self.rows = {place: count for place, count in rows.items() if count}
        self.distinct = {place: count for place, count in distinct.items() if place in self.rows}
        self.seed = seed
        self.stages = stages
        self.layout: Layout = layout
        self.turns: Turns = turns
        self.compress = compress
        self.part_bytes = part_bytes
        self.draws: dict[tuple[str, str], Draw] = {}
        self.opened: dict[int, ChunkRows] = {}
        wanted = [sorted(self.rows.items()), sorted(self.distinct.items())]
        settings = [FORMAT_VERSION, unique.key, wanted, seed, layout, turns, compress, part_bytes]
        stage = None if stages is None else stages.share
        categories = sorted((chunk.source.name, chunk.source.category) for chunk in self.scan.chunks)
        self.key = f"{salt(settings, stage, dict(categories)):016x}"
        self.folder = self.scan.folder / f"scatter-{self.key}"
        self.check_rows()
        drawn = {source for _, source in self.rows}
        self.chunks = [chunk for chunk in self.scan.chunks if chunk.source.name in drawn]

    def check_rows(self) -> None:
        """ValueError where rows are asked of a source that has none."""
        for (split, source), count in self.rows.items():
            available = self.unique.available.get((split, source))
            if available is None:
                known = ", ".join(f"{split}/{name}" for split, name in self.unique.available)
                raise ValueError(f"{count} rows asked of {split}/{source}, which is not in the mixture; known: {known}")
            if self.distinct.get((split, source), 1) < 1:
                raise ValueError(f"at most 0 distinct rows of {split}/{source}, but {count} rows of it: ask for none")
            if not available.rows:
                raise ValueError(f"{count} rows asked of {split}/{source}, which has none after filters and duplicates")

    def rows_file(self, chunk: Chunk) -> Path:
        return self.folder / f"{chunk.number:06d}.rows"

    def table_file(self, chunk: Chunk) -> Path:
        return self.folder / f"{chunk.number:06d}.npy"

    def counts_file(self, chunk: Chunk) -> Path:
        return self.folder / f"{chunk.number:06d}.json"

    def written_rows(self, chunk: Chunk) -> ChunkRows:
        """The rows that a chunk gave; its files stay mapped, as every bucket takes some from every chunk."""
        if chunk.number not in self.opened:
            keys, starts = np.load(self.table_file(chunk), mmap_mode="r")
            group_rows = orjson.loads(self.counts_file(chunk).read_bytes())["group_rows"]
            data = memoryview(b"")
            if starts[-1]:
                with self.rows_file(chunk).open("rb") as file:
                    data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self.opened[chunk.number] = ChunkRows(
                keys=keys[:-1], starts=starts, group_starts=[0, *accumulate(group_rows)], data=data
            )
        return self.opened[chunk.number]

    def part_file(self, part: Part) -> Path:
        return self.folder / f"part-{part.file.replace('/', '-')}.json"

    @cached_property
    def groups(self) -> list[Group]:
        """Groups in the order of their files."""
        splits = [split for split in SPLITS if any(place[0] == split for place in self.rows)]
        if self.layout == "mixed":
            stages = (0, 1) if self.stages else (0,)
            return [Group(split=s, stage=n, stem=s) for s in splits for n in (stages if s == "train" else (0,))]
        return [Group(split=s, stage=0, stem=self.stem(s, source)) for s in splits for source in self.drawn(s)]

    def drawn(self, split: str) -> list[str]:
        """Sources that give rows to a split."""
        return [source for source in self.scan.sources if (split, source) in self.rows]

    def stem(self, split: str, source: str) -> str:
        category = next(chunk.source.category for chunk in self.scan.chunks if chunk.source.name == source)
        return f"{category or 'other'}/{source}" + ("" if split == "train" else f".{split}")

    def group_number(self, split: str, stage: int, source: str) -> int:
        stem = split if self.layout == "mixed" else self.stem(split, source)
        return self.groups.index(Group(split=split, stage=stage, stem=stem))

    # --- keys

    def place_keys(self, chunk: Chunk, index: Index) -> Keys:
        """A number for each row that no other row of its source has, and no seed changes."""
        place = index["offset"].astype(np.uint64) + np.uint64(chunk.start + (chunk.file_number << 40))
        return mixed_bits(place + salt("place", chunk.source.name))

    def selection_keys(self, chunk: Chunk, index: Index) -> Keys:
        """Decide which rows a remainder takes: those with the lowest."""
        return mixed_bits(self.place_keys(chunk, index) + salt("selection", self.seed))

    def occurrence_keys(self, purpose: str, places: Keys, epochs: Keys) -> Keys:
        """A key for each epoch of each row."""
        return mixed_bits(mixed_bits(places + salt(purpose, self.seed)) + epochs * np.uint64(0x9E3779B97F4A7C15))

    # --- how often

    def find_draws(self) -> None:
        """Settle epochs and remainders of each split and source; once, before workers share them."""
        draws: dict[tuple[str, str], Draw] = {}
        for (split, source), count in self.rows.items():
            available = self.unique.available[split, source].rows
            pool = min(self.distinct.get((split, source), available), available)
            epochs, remainder = divmod(count, pool)
            keys = partial(self.all_selection_keys, split, source)
            pool_key = lowest(keys, pool, available)
            assert pool_key is not None
            draws[split, source] = Draw(epochs=epochs, pool_key=pool_key, last_key=lowest(keys, remainder, available))
        if self.stages and self.layout == "mixed":
            for source in self.drawn("train"):
                draw = draws["train", source]
                keys = partial(self.all_short_keys, source, draw)
                short = sum(len(batch) for batch in keys())
                wanted = min(round(self.rows["train", source] * self.stages.share), short)
                draws["train", source] = replace(draw, last_short_key=lowest(keys, wanted, short))
        self.draws = draws

    def split_rows(self, split: str, chunk: Chunk) -> Index:
        rows = self.unique.rows(chunk)
        in_test = self.unique.selection.in_test(rows)
        return rows[in_test if split == "test" else ~in_test]

    def all_selection_keys(self, split: str, source: str) -> Iterator[Keys]:
        for chunk in self.chunks:
            if chunk.source.name == source:
                yield self.selection_keys(chunk, self.split_rows(split, chunk))

    def all_short_keys(self, source: str, draw: Draw) -> Iterator[Keys]:
        """Stage keys of all training occurrences of a source that have a short prompt."""
        for chunk in self.chunks:
            if chunk.source.name == source:
                rows = self.split_rows("train", chunk)
                rows = rows[self.is_short(rows)]
                which, epochs = self.occurrences(draw, chunk, rows)
                yield self.occurrence_keys("stage", self.place_keys(chunk, rows)[which], epochs)

    def is_short(self, rows: Index) -> npt.NDArray[np.bool_]:
        return rows["prompt_bytes"] < self.unique.selection.short_prompt_bytes

    def occurrences(self, draw: Draw, chunk: Chunk, rows: Index) -> tuple[npt.NDArray[np.int64], Keys]:
        """For each occurrence, the position of its row among `rows`, and its epoch."""
        keys = self.selection_keys(chunk, rows)
        copies = draw.epochs * (keys <= np.uint64(draw.pool_key)).astype(np.int64)
        if draw.last_key is not None:
            copies += keys <= np.uint64(draw.last_key)
        which = np.repeat(np.arange(len(rows)), copies)
        firsts = np.repeat(np.cumsum(copies) - copies, copies)
        return which, (np.arange(len(which)) - firsts).astype(np.uint64)

    # --- parts

    def parts(self, sizes: Counter[int]) -> Iterator[Part]:
        """The files to write, given the bytes of each group; by category one for each source, whatever its size."""
        numbers: Counter[str] = Counter()
        for number, group in enumerate(self.groups):
            size = sizes[number]
            if not size:
                continue
            files = -(-size // self.part_bytes) if self.layout == "mixed" else 1
            buckets = -(-size // (files * BUCKET_BYTES))
            first_keys = [(bucket << 64) // (files * buckets) for bucket in range(files * buckets + 1)]
            for file in range(files):
                name = f"{group.stem}-{numbers[group.stem]:05d}" if self.layout == "mixed" else group.stem
                numbers[group.stem] += 1
                suffix = ".jsonl.zst" if self.compress else ".jsonl"
                own = first_keys[file * buckets : (file + 1) * buckets + 1]
                yield Part(file=name + suffix, group=number, first_keys=own)


def lowest(keys: Callable[[], Iterable[Keys]], count: int, total: int) -> int | None:
    """The `count`-th lowest of `total` keys, in memory that does not grow with them; None for no keys at all.

    The keys are uniform, so all but a few lie clearly below or above; only those near the limit are sorted.
    """
    if not count:
        return None
    if count == total:
        return (1 << 64) - 1
    slack = 8.0 * total**0.5 + 16
    while True:
        low, high = (
            np.uint64(min(max(edge / total, 0.0), 1 - 2.0**-53) * 2.0**64) for edge in (count - slack, count + slack)
        )
        if count + slack >= total:
            high = np.uint64((1 << 64) - 1)
        below, near = 0, []
        for batch in keys():
            below += int(np.count_nonzero(batch < low))
            near.append(batch[(batch >= low) & (batch <= high)])
        sorted_keys = np.sort(np.concatenate(near))
        if below < count <= below + len(sorted_keys):
            return int(sorted_keys[count - below - 1])
        slack *= 8


# --- chunks


def scatter_chunk(order: Order, chunk: Chunk) -> None:
    """Write the chosen rows of one chunk in the order of their groups and keys, once for each occurrence."""
    rows = order.unique.rows(chunk)
    in_test = order.unique.selection.in_test(rows)
    tables = []
    for split in SPLITS:
        draw = order.draws.get((split, chunk.source.name))
        if draw is not None:
            own = np.flatnonzero(in_test if split == "test" else ~in_test)
            tables.append(occurrence_table(order, split, draw, chunk, rows, own))
    which = np.concatenate([table[0] for table in tables])
    groups = np.concatenate([table[1] for table in tables])
    keys = np.concatenate([table[2] for table in tables])
    sorting = np.lexsort((keys, groups))
    which, groups, keys = which[sorting], groups[sorting], keys[sorting]
    used, positions = np.unique(which, return_inverse=True)
    data, bounds = bytearray(), [0]
    for line in output_lines(order, chunk, rows[used]):
        data += line
        bounds.append(len(data))
    starts, ends = np.array(bounds[:-1], np.uint64)[positions], np.array(bounds[1:], np.uint64)[positions]
    sizes = ends - starts
    table = np.zeros((2, len(which) + 1), np.uint64)
    table[0, :-1] = keys
    np.cumsum(sizes, out=table[1, 1:])
    with whole_file(order.rows_file(chunk)) as file:
        file.writelines(joined(map(memoryview(data).__getitem__, map(slice, starts.tolist(), ends.tolist()))))
    save_array(order.table_file(chunk), table)
    counts = chunk_counts(order, chunk, groups, rows["characters"][which], sizes)
    write_whole(order.counts_file(chunk), orjson.dumps(counts))


def occurrence_table(
    order: Order, split: str, draw: Draw, chunk: Chunk, rows: Index, own: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32], Keys]:
    """For each occurrence of the chunk's rows `own`, those of one split: its row, its group and its key."""
    name = chunk.source.name
    which, epochs = order.occurrences(draw, chunk, rows[own])
    places = order.place_keys(chunk, rows[own])[which]
    groups = np.full(len(which), order.group_number(split, 0, name), np.uint32)
    if order.stages and order.layout == "mixed" and split == "train":
        groups[:] = order.group_number(split, 1, name)
        if draw.last_short_key is not None:
            is_early = order.occurrence_keys("stage", places, epochs) <= np.uint64(draw.last_short_key)
            groups[is_early & order.is_short(rows[own])[which]] = order.group_number(split, 0, name)
    return own[which], groups, order.occurrence_keys("shuffle", places, epochs)


def output_lines(order: Order, chunk: Chunk, rows: Index) -> Iterator[bytes]:
    """The lines to write for some rows of a chunk: canonical samples."""
    source = chunk.source
    name, category, row_format = source.name, source.category, source.format
    first = order.scan.first_rows[chunk.number]
    for number, line in zip(rows["line"].tolist(), lines_of(chunk, rows), strict=True):
        sample = canonical_row(orjson.loads(line), name, f"{name}_{first + number:08d}", category, row_format)
        sample["source"] = name
        if category is not None:
            sample["category"] = category
        if order.layout == "categories":
            sample = {"text": labelled_text(sample), **sample}
        if order.turns == "conversations" and "messages" in sample:
            sample = as_conversation(sample)
        yield orjson.dumps(sample, option=orjson.OPT_APPEND_NEWLINE)


def as_conversation(sample: Content) -> dict[str, Any]:
    """A sample with `conversations` [{from, value}] in place of its messages; ValueError where these hold more."""
    conversation = []
    for number, turn in enumerate(sample["messages"]):
        more = [key for key in turn if key not in ("role", "content")]
        if more or not isinstance(turn["content"], str):
            what = f"has {', '.join(more)}" if more else "is not plain text"
            raise ValueError(
                f"turns: conversations has no place for all of sample {sample['id']} of {sample['source']}, whose turn "
                f"{number} {what}; set turns: messages, or filter such rows out"
            )
        conversation.append({"from": SPEAKERS[turn["role"]], "value": turn["content"]})
    rest = {key: value for key, value in sample.items() if key != "messages"}
    return {**rest, "conversations": conversation}


def labelled_text(sample: Content) -> str:
    """A sample as one text, every turn after its role: `user: ...\nassistant: ...`."""
    if "text" in sample:
        return sample["text"]
    turns: list[Content] = sample.get("messages") or []
    labelled = [(turn["role"], turns_text([turn])[0]) for turn in turns]
    labelled += [(key, flat(sample[key])) for key in ("prompt", "chosen", "rejected") if key in sample]
    return "\n".join(f"{label}: {text}" for label, text in labelled)


def chunk_counts(
    order: Order, chunk: Chunk, groups: npt.NDArray[np.uint32], characters: npt.NDArray[np.uint32], sizes: Keys
) -> dict[str, Any]:
    """What a chunk gives: rows and bytes by group, and characters by split."""
    stats = {}
    for split in SPLITS:
        numbers = [number for number, group in enumerate(order.groups) if group.split == split]
        own = np.isin(groups, numbers)
        lengths = characters[own]
        if len(lengths):
            stats[split] = {
                "samples": len(lengths),
                "total_chars": int(lengths.sum(dtype=np.int64)),
                "min_length": int(lengths.min()),
                "max_length": int(lengths.max()),
                "bytes": int(sizes[own].sum()),
            }
    count = len(order.groups)
    return {
        "source": chunk.source.name,
        "group_rows": np.bincount(groups, minlength=count).tolist(),
        "group_bytes": np.bincount(groups, weights=sizes, minlength=count).astype(np.int64).tolist(),
        "stats": stats,
    }


def group_bytes(counts: Sequence[dict[str, Any]]) -> Counter[int]:
    """Bytes of each group over all chunks."""
    sizes: Counter[int] = Counter()
    for chunk in counts:
        sizes.update(dict(enumerate(chunk["group_bytes"])))
    return sizes


def text_stats(order: Order, counts: Sequence[dict[str, Any]]) -> dict[tuple[str, str], TextStats]:
    """Characters by split and source."""
    found: dict[tuple[str, str], list[dict[str, int]]] = defaultdict(list)
    for chunk in counts:
        for split, stats in chunk["stats"].items():
            found[split, chunk["source"]].append(stats)
    return {
        place: TextStats(
            samples=sum(stats["samples"] for stats in found[place]),
            total_chars=sum(stats["total_chars"] for stats in found[place]),
            min_length=min(stats["min_length"] for stats in found[place]),
            max_length=max(stats["max_length"] for stats in found[place]),
            bytes=sum(stats["bytes"] for stats in found[place]),
        )
        for place in sorted(order.rows)
    }


# --- parts


def write_part(order: Order, output: Path, part: Part) -> None:
    """Write one file, a bucket at a time, and then what it holds."""
    path = output / part.file
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: Counter[str] = Counter()
    with whole_file(path, synced=True) as file:
        hashed = HashedFile(file)
        with compressed(hashed, order.compress) as stream:
            for first, end in zip(part.first_keys, part.first_keys[1:], strict=False):
                for lines in bucket(order, part.group, first, end, rows):
                    stream.write(lines)
    group = order.groups[part.group]
    written = WrittenPart(
        file=part.file,
        split=group.split,
        stage=group.stage,
        rows=dict(sorted(rows.items())),
        bytes=hashed.bytes,
        checksum=hashed.digest.hexdigest(),
    )
    write_whole(order.part_file(part), orjson.dumps(asdict(written)))


def bucket(order: Order, group: int, first: int, end: int, rows: Counter[str]) -> Iterator[bytes]:
    """The lines of one range of keys, in the order of the keys; counts them by source into `rows`."""
    keys: list[Keys] = []
    lines: list[memoryview] = []
    for chunk in order.chunks:
        written = order.written_rows(chunk)
        start, stop = written.group_starts[group : group + 2]
        group_keys = written.keys[start:stop]
        low = start + int(np.searchsorted(group_keys, np.uint64(first)))
        high = stop if end == 1 << 64 else start + int(np.searchsorted(group_keys, np.uint64(end)))
        if low < high:
            rows[chunk.source.name] += high - low
            keys.append(written.keys[low:high])
            starts = written.starts[low : high + 1].tolist()
            lines += [written.data[begin:finish] for begin, finish in pairwise(starts)]
    if lines:
        order_of_keys = np.argsort(np.concatenate(keys), kind="stable")
        yield from joined(map(lines.__getitem__, order_of_keys.tolist()))


def joined(lines: Iterator[memoryview]) -> Iterator[bytes]:
    """Lines, some at a time, so that writing them takes few calls and little memory."""
    while some := b"".join(islice(lines, LINES_PER_WRITE)):
        yield some


class HashedFile:
    """A file that knows the size and the checksum of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = xxhash.xxh3_128()
        self.bytes = 0
        self.closed = False

    def write(self, content: bytes) -> int:
        """Write and count."""
        self.digest.update(content)
        self.bytes += len(content)
        self.file.write(content)
        return len(content)

    def flush(self) -> None:
        """Part of the interface of a file."""

    def close(self) -> None:
        """Leaves the file open: who opened it closes it."""

    def writable(self) -> bool:
        return True


@contextmanager
def compressed(file: HashedFile, compress: str | None) -> Iterator[Any]:
    """The file itself, or a stream that compresses into it."""
    if compress is None:
        yield file
        return
    import pyarrow as pa

    with pa.CompressedOutputStream(pa.PythonFile(file, mode="w"), compress) as stream:
        yield stream


# --- what was written


def check_room(order: Order, output: Path) -> None:
    """ValueError where a disk has clearly too little room for what of the output, and its temporary copy, is missing.

    How small a compressed output will be is not known, so it is not counted.
    """
    whole = 0
    for place, count in order.rows.items():
        available = order.unique.available[place]
        whole += count * available.text_bytes // available.rows
    copied = sum(file.stat().st_size for file in order.folder.glob("*.rows"))
    written = sum(orjson.loads(file.read_bytes())["bytes"] for file in order.folder.glob("part-*.json"))
    needed: Counter[int] = Counter()
    missing = {order.folder: whole - copied, output: 0 if order.compress else whole - written}
    for folder, count in missing.items():
        disk = folder.stat().st_dev
        needed[disk] += max(0, count)
        free = shutil.disk_usage(folder).free
        if needed[disk] > free:
            raise ValueError(
                f"the mixture needs about {size(needed[disk])} more on the disk of {folder}, which has {size(free)}: "
                "make room, or ask for fewer rows"
            )


def check_counts(order: Order, written: WrittenMixture) -> None:
    """Every count that was asked for is met, in the stats and in the parts."""
    in_parts: Counter[tuple[str, str]] = Counter()
    for part in written.parts:
        in_parts.update({(part.split, source): rows for source, rows in part.rows.items()})
    assert dict(in_parts) == order.rows, f"{dict(in_parts)} rows written, {order.rows} asked for"
    assert {place: stats.samples for place, stats in written.stats.items()} == order.rows


def write_written(output: Path, key: str, written: WrittenMixture) -> None:
    """Write parts.json."""
    stats = [[*place, asdict(stats)] for place, stats in written.stats.items()]
    content = {"key": key, "parts": [asdict(part) for part in written.parts], "stats": stats}
    write_whole(output / "parts.json", orjson.dumps(content, option=orjson.OPT_INDENT_2))


def read_written(output: Path, key: str) -> WrittenMixture | None:
    """What parts.json tells, where all parts of the same mixture are there."""
    file = output / "parts.json"
    content: dict[str, Any] = orjson.loads(file.read_bytes()) if file.exists() else {}
    if content.get("key") != key:
        return None
    parts = [WrittenPart(**part) for part in content["parts"]]
    if not all((output / part.file).exists() for part in parts):
        return None
    stats = {(split, source): TextStats(**fields) for split, source, fields in content["stats"]}
    return WrittenMixture(parts=parts, stats=stats)
