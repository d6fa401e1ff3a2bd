"""The teacher's cache on disk: what is kept of its distribution at every position that the student learns. No torch.

manifest.json         what the cache was made of and what it keeps
shard-00017.parquet   the rows whose sample ids hash to 17, sorted by sample id; one row a sequence
shard-00017.done      rows, bytes, digest and fidelity of the shard; written last

A position is a token of the row that counts in the loss and is not its first; its distribution is the one that
predicts this token. Rows are found by sample id, so any order, packing and number of processes reads the same cache.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from distilling.config import CacheKind
from distilling.identity import FORMAT_VERSION, CacheIdentity, shard_file
from distilling.targets import RowTargets
from mixture.prepare import file_digest
from mixture.shards import TokenRow
from mixture.whole_files import whole_file, write_whole
from training.shard_folder import done_file, manifest_file

# Arrays are named by shape. N positions of a row, K most probable tokens, M tokens that are always kept,
# T temperatures, D different tokens drawn at all positions of a row together, S tokens given to the student.

Array = npt.NDArray[Any]

LARGEST_VOCABULARY = 1 << 24
"""Ids are kept in 24 bits."""

LOWEST_LOG = -60_000.0
"""Stands for the log of nothing, in float16 too."""

LEGEND: dict[str, str] = {
    "sample_id": "the token row's sample id",
    "row_digest": "8 bytes, xxh3 of the row's input_ids (int32) and loss_mask (a byte each)",
    "n_tokens": "tokens of the row",
    "input_ids": "int32 [tokens]",
    "loss_mask": "bits [tokens], the first token in the lowest bit of the first byte",
    "topk_lo": "uint16 [N, K], lower 16 bits of the ids of the most probable tokens, most probable first",
    "topk_hi": "uint8 [N, K], upper 8 bits of them",
    "topk_logp": "float16 [N, K], log p of them at temperature 1",
    "label_logp": "float16 [N], log p of the token that follows in the row",
    "keep_logp": "float16 [N, M], log p of the manifest's keep_ids",
    "lse": "float32 [N, T], log of the sum of exp(logit / temperature) over the whole vocabulary",
    "log_tail": "float32 [N, T], log of the mass outside of most probable tokens, keep_ids and label, summed as it is",
    "tail_lo": "uint16 [D], lower 16 bits of the ids drawn from that mass at temperature 1",
    "tail_hi": "uint8 [D], upper 8 bits of them",
    "tail_count": "uint8 [D], how often each was drawn",
    "tail_logp": "float16 [D], log p of them",
    "tail_offset": "uint32 [N + 1], position i has the drawn tokens from its offset up to the next",
}
"""Columns of a shard, and what their bytes are, little-endian. Parts that a cache does not keep have no column."""

DTYPES: dict[str, Any] = {
    "topk_lo": np.uint16,
    "topk_hi": np.uint8,
    "topk_logp": np.float16,
    "label_logp": np.float16,
    "keep_logp": np.float16,
    "lse": np.float32,
    "log_tail": np.float32,
    "tail_lo": np.uint16,
    "tail_hi": np.uint8,
    "tail_count": np.uint8,
    "tail_logp": np.float16,
    "tail_offset": np.uint32,
}
"""Elements of the columns that are arrays over positions."""

TOKEN_TYPES: dict[str, pa.DataType] = {
    "sample_id": pa.string(),
    "row_digest": pa.binary(8),
    "n_tokens": pa.int32(),
    "input_ids": pa.large_binary(),
    "loss_mask": pa.large_binary(),
}

# Measured (benchmarks/teacher_cache.py): the upper bits of ids shrink to next to nothing at a tenth of the speed of
# short rows. Under zstd all columns together would take a fifth less on the disk and be read a third slower.
COMPRESSED = ("topk_hi", "tail_hi", "input_ids", "loss_mask")

POSITIONS_PER_GROUP = 256
"""Of a row group, about. Fewer read a short row faster and make a shard slower to open."""

OPEN_SHARDS = 64
"""Files that a reader holds open; each costs a few MB for the places of its row groups."""

MAKE_AGAIN = "`./train.sh capture` makes it again"


# --- what a cache holds


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a cache was made of and what it keeps of each position."""

    identity: CacheIdentity
    dtype: str
    """The teacher's arithmetic."""

    vocabulary: int
    """Logits of the teacher, padding included: ids are below."""

    kind: CacheKind
    k: int
    draws: int
    temperatures: list[float]
    """1 is the first, and all that the cache can be read at."""

    keep_ids: list[int]
    """Tokens that are kept at every position."""

    seed: int
    shards: int
    positions_per_row: float
    """On average; row groups are cut by it."""

    format_version: int = FORMAT_VERSION
    writer: str = ""
    """Versions of the software that wrote it."""

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a folder, or None where none is there. ValueError for one of another format."""
        path = manifest_file(folder)
        try:
            content = orjson.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        if content.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {content.get('format_version')}, and this is {FORMAT_VERSION}; {MAKE_AGAIN}"
            )
        return cls(**{**content, "identity": CacheIdentity(**content["identity"])})

    def write(self, folder: Path) -> None:
        content = orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2)
        write_whole(manifest_file(folder), content, synced=True)

    def differences(self, other: Manifest) -> list[str]:
        """What differs from another one, in words with both values, this one's first."""
        plain = [field.name for field in fields(self) if field.name not in ("identity", "writer")]
        return self.identity.differences(other.identity) + [
            f"{name}: {getattr(self, name)} and {getattr(other, name)}"
            for name in plain
            if getattr(self, name) != getattr(other, name)
        ]

    @cached_property
    def columns(self) -> list[str]:
        """Columns that are arrays over positions, as far as this cache keeps them."""
        kept = {"topk": self.k, "tail": self.draws, "keep": len(self.keep_ids)}
        return [name for name in DTYPES if name == "log_tail" or kept.get(name.partition("_")[0], 1)]

    @property
    def schema(self) -> pa.Schema:
        types = TOKEN_TYPES | dict.fromkeys(self.columns, pa.large_binary())
        return pa.schema([pa.field(name, type, nullable=False) for name, type in types.items()])

    @property
    def rows_per_group(self) -> int:
        return max(1, round(POSITIONS_PER_GROUP / max(self.positions_per_row, 1)))


def num_shards(loss_tokens: int, shard_tokens: int) -> int:
    """Shards of a cache of so many positions."""
    return max(1, math.ceil(loss_tokens / shard_tokens))


def sample_hash(sample_id: str) -> int:
    return xxhash.xxh3_64_intdigest(sample_id.encode())


def row_digest(row: TokenRow) -> bytes:
    """8 bytes over a row's tokens and which of them count in the loss."""
    digest = xxhash.xxh3_64(np.ascontiguousarray(row.input_ids, np.int32).tobytes())
    digest.update(np.ascontiguousarray(row.loss_mask, np.bool_).tobytes())
    return digest.digest()


def positions_of(row: TokenRow) -> npt.NDArray[np.int64]:
    """Places of the row's tokens that are learned; each is predicted at the place before it."""
    return np.flatnonzero(row.loss_mask[1:]) + 1


@dataclass(frozen=True, slots=True)
class KeptRow:
    """What is kept of the teacher's distributions at the positions of one row."""

    topk_NK: npt.NDArray[np.integer]
    topk_logp_NK: npt.NDArray[np.floating]
    label_logp_N: npt.NDArray[np.floating]
    keep_logp_NM: npt.NDArray[np.floating]
    lse_NT: npt.NDArray[np.float32]
    log_tail_NT: npt.NDArray[np.float32]
    drawn_D: npt.NDArray[np.integer]
    drawn_count_D: npt.NDArray[np.integer]
    drawn_logp_D: npt.NDArray[np.floating]
    drawn_starts: npt.NDArray[np.integer]
    """N + 1 of them: position i has drawn tokens `starts[i]` to `starts[i + 1]`."""

    @property
    def drawn_lengths_N(self) -> npt.NDArray[np.int64]:
        """Different tokens drawn at each position."""
        starts = self.drawn_starts.astype(np.int64)
        return starts[1:] - starts[:-1]

    def arrays(self) -> dict[str, Array]:
        """By the names of their columns."""
        return {
            "topk_lo": self.topk_NK & 0xFFFF,
            "topk_hi": self.topk_NK >> 16,
            "topk_logp": self.topk_logp_NK,
            "label_logp": self.label_logp_N,
            "keep_logp": self.keep_logp_NM,
            "lse": self.lse_NT,
            "log_tail": self.log_tail_NT,
            "tail_lo": self.drawn_D & 0xFFFF,
            "tail_hi": self.drawn_D >> 16,
            "tail_count": self.drawn_count_D,
            "tail_logp": self.drawn_logp_D,
            "tail_offset": self.drawn_starts,
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array], manifest: Manifest) -> KeptRow:
        """From the flat arrays of the columns that a cache keeps."""
        count = len(arrays["label_logp"])
        nothing = np.empty(0, np.float16)
        starts = arrays.get("tail_offset")
        return cls(
            topk_NK=joined_ids(arrays, "topk").reshape(count, manifest.k),
            topk_logp_NK=arrays.get("topk_logp", nothing).reshape(count, manifest.k),
            label_logp_N=arrays["label_logp"],
            keep_logp_NM=arrays.get("keep_logp", nothing).reshape(count, len(manifest.keep_ids)),
            lse_NT=arrays["lse"].reshape(count, len(manifest.temperatures)),
            log_tail_NT=arrays["log_tail"].reshape(count, len(manifest.temperatures)),
            drawn_D=joined_ids(arrays, "tail"),
            drawn_count_D=arrays.get("tail_count", np.empty(0, np.uint8)),
            drawn_logp_D=arrays.get("tail_logp", nothing),
            drawn_starts=np.zeros(count + 1, np.uint32) if starts is None else starts,
        )


def joined_ids(arrays: Mapping[str, Array], name: str) -> npt.NDArray[np.int32]:
    """Ids from their lower and upper bits; none where the cache does not keep them."""
    if f"{name}_lo" not in arrays:
        return np.empty(0, np.int32)
    ids: npt.NDArray[np.int32] = arrays[f"{name}_hi"].astype(np.int32)
    ids <<= 16
    ids |= arrays[f"{name}_lo"]
    return ids


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How well what is kept stands for the teacher, and the teacher for the data; sums over positions."""

    positions: int = 0
    kept_mass: float = 0.0
    """Probability of most probable tokens, keep_ids and label together."""

    nll: float = 0.0
    """Of the data under the teacher, in nats."""

    labels_in_top: int = 0
    """Positions whose label is among the K most probable tokens."""

    keeps_in_top: int = 0
    """Positions times keep_ids that are there without being asked for."""

    keeps: int = 0
    """Positions times keep_ids."""

    def __add__(self, other: Fidelity) -> Fidelity:
        mine, its = asdict(self), asdict(other)
        return Fidelity(**{name: mine[name] + its[name] for name in mine})


# --- writing


def write_shard(folder: Path, shard: int, manifest: Manifest, rows: Iterable[tuple[TokenRow, KeptRow]]) -> int:
    """Write a shard's rows, sorted by sample id as they come, whole or not at all; returns how many."""
    count = 0
    compression = {name: "zstd" if name in COMPRESSED else "none" for name in manifest.schema.names}
    with (
        whole_file(shard_file(folder, shard), synced=True) as file,
        pq.ParquetWriter(
            file, manifest.schema, compression=compression, use_dictionary=False, write_statistics=["sample_id"]
        ) as parquet,
    ):
        for group in groups_of(rows, manifest.rows_per_group):
            parquet.write_table(group_table(group, manifest), row_group_size=len(group))
            count += len(group)
    return count


def groups_of(rows: Iterable[tuple[TokenRow, KeptRow]], size: int) -> Iterator[list[tuple[TokenRow, KeptRow]]]:
    rows = iter(rows)
    while group := list(islice(rows, size)):
        yield group


def group_table(group: list[tuple[TokenRow, KeptRow]], manifest: Manifest) -> pa.Table:
    """The columns of a row group."""
    tokens = [row for row, _ in group]
    kept = [kept.arrays() for _, kept in group]
    columns: dict[str, list[Any]] = {
        "sample_id": [row.sample_id for row in tokens],
        "row_digest": [row_digest(row) for row in tokens],
        "n_tokens": [len(row.input_ids) for row in tokens],
        "input_ids": [row.input_ids.astype("<i4").tobytes() for row in tokens],
        "loss_mask": [np.packbits(row.loss_mask, bitorder="little").tobytes() for row in tokens],
    }
    for name in manifest.columns:
        columns[name] = [arrays[name].astype(DTYPES[name]).tobytes() for arrays in kept]
    return pa.table(columns, schema=manifest.schema)


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What the marker of a finished shard says."""

    rows: int
    bytes: int
    digest: str
    fidelity: dict[str, Fidelity]
    """By source."""

    @classmethod
    def read(cls, path: Path) -> ShardRecord | None:
        """The record in a marker; None where the shard is not finished."""
        try:
            content = orjson.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        fidelity = {source: Fidelity(**sums) for source, sums in content["fidelity"].items()}
        return cls(**{**content, "fidelity": fidelity})


def mark_done(folder: Path, shard: int, *, rows: int, fidelity: dict[str, Fidelity]) -> None:
    """Write the marker of a shard that lies in its place."""
    path = shard_file(folder, shard)
    record = ShardRecord(rows=rows, bytes=path.stat().st_size, digest=file_digest(path), fidelity=fidelity)
    content = orjson.dumps(asdict(record), option=orjson.OPT_INDENT_2)
    write_whole(done_file(folder, shard), content, synced=True)


def is_done(folder: Path, shard: int) -> bool:
    """Whether a shard is marked and has the size that its marker says."""
    record = ShardRecord.read(done_file(folder, shard))
    path = shard_file(folder, shard)
    return record is not None and path.is_file() and path.stat().st_size == record.bytes


def fidelity(folder: Path) -> dict[str, Fidelity]:
    """The fidelity of the finished shards of a cache, by source."""
    total: dict[str, Fidelity] = {}
    for path in sorted(folder.glob("shard-*.done")):
        record = ShardRecord.read(path)
        assert record is not None
        for source, sums in record.fidelity.items():
            total[source] = total.get(source, Fidelity()) + sums
    return dict(sorted(total.items()))


# --- reading


class TeacherCache:
    """A finished cache. Picklable, and safe to read in forked workers; each keeps its own files open."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.places: dict[int, RowPlaces] = {}
        self.files: OrderedDict[int, pq.ParquetFile] = OrderedDict()

    @classmethod
    def open(cls, folder: Path) -> TeacherCache:
        """The cache in a folder. ValueError names the file that is missing, cut short or of another format."""
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest is None:
            raise ValueError(f"{folder} holds no teacher's cache: there is no manifest.json; {MAKE_AGAIN}")
        for shard in range(manifest.shards):
            path, record = shard_file(folder, shard), ShardRecord.read(done_file(folder, shard))
            if record is None:
                raise ValueError(f"{path} was not finished: there is no {path.stem}.done; {MAKE_AGAIN}")
            if not path.is_file():
                raise ValueError(f"{path} is missing; {MAKE_AGAIN}")
            if path.stat().st_size != record.bytes:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes and was written with {record.bytes}; {MAKE_AGAIN}"
                )
        return cls(folder, manifest)

    def __reduce__(self) -> tuple[type[TeacherCache], tuple[Path, Manifest]]:
        return TeacherCache, (self.folder, self.manifest)

    def require(self, identity: CacheIdentity) -> None:
        """Raise ValueError where the cache was made of another teacher, tokenizer or chat template.

        Of other data it may be, as far as it holds the rows that are asked for: see `require_rows`.
        """
        own = self.manifest.identity
        differences = own.differences(replace(identity, data_fingerprint=own.data_fingerprint))
        if differences:
            raise ValueError(
                f"the teacher's cache in {self.folder} does not belong to this run. Of the cache, and of the run:\n  "
                + "\n  ".join(differences)
                + "\nLeave distillation.cache.folder unset, and `./train.sh capture` makes one for it"
            )

    def require_rows(self, sample_ids: Iterable[str]) -> None:
        """Raise ValueError where the cache lacks one of these rows, before the first of them is trained on."""
        lacking = [sample_id for sample_id in sample_ids if not self.holds(sample_id)]
        if lacking:
            raise ValueError(
                f"the teacher's cache in {self.folder} was made of other data: it lacks {len(lacking)} of the rows to "
                f"train on, {lacking[0]!r} among them. Leave distillation.cache.folder unset, and `./train.sh capture` "
                "makes one for them"
            )

    def holds(self, sample_id: str) -> bool:
        """Whether there is a row of this sample."""
        hashed = sample_hash(sample_id)
        shard = hashed % self.manifest.shards
        self.file(shard)
        return self.places[shard].find(hashed) is not None

    def targets(
        self, row: TokenRow, *, temperature: float, tail: Literal["bucket", "renormalised"] = "bucket"
    ) -> RowTargets:
        """What the student learns at the positions of a row, in order.

        Exact are the most probable tokens, those that are always kept, and the label. Drawn tokens stand for the rest
        without bias, in place of `tail`. ValueError: the cache has not this row or temperature, or is damaged.
        """
        kept = self.kept(row)
        step = self.step_of(temperature)
        exact = self.exact_tokens(row, kept, step)
        if self.manifest.draws:
            if tail != "bucket":
                raise ValueError(
                    f"distillation.tail: {tail} is for topk caches; the draws of {self.folder} stand for the tail"
                )
            return with_draws(exact, kept)
        if tail == "bucket":
            return RowTargets(*exact, kept.log_tail_NT[:, step])
        return renormalised(*exact)

    def kept(self, row: TokenRow) -> KeptRow:
        """What the cache holds of a row. ValueError where it has no such row, or holds ids beyond the vocabulary."""
        hashed = sample_hash(row.sample_id)
        shard = hashed % self.manifest.shards
        file = self.file(shard)
        place = self.places[shard].find(hashed)
        if place is None:
            raise ValueError(
                f"the teacher's cache in {self.folder} has no sample {row.sample_id!r}: it was made of other data; "
                "leave distillation.cache.folder unset, and `./train.sh capture` makes one for it"
            )
        group, within = divmod(place, self.manifest.rows_per_group)
        names = ["row_digest", *self.manifest.columns]
        columns = file.read_row_group(group, columns=names, use_threads=False).columns
        digest, *values = [column.chunk(0)[within] for column in columns]
        if digest.as_py() != row_digest(row):
            raise ValueError(
                f"sample {row.sample_id!r} has other tokens here than in the teacher's cache in {self.folder}; prepare "
                f"the data as they were then, or remove {self.folder} and let `./train.sh capture` make it again"
            )
        arrays = {
            name: np.frombuffer(value.as_buffer(), DTYPES[name])
            for name, value in zip(self.manifest.columns, values, strict=True)
        }
        kept = KeptRow.of_arrays(arrays, self.manifest)
        largest = max(kept.topk_NK.max(initial=0), kept.drawn_D.max(initial=0))
        if largest >= self.manifest.vocabulary:
            raise ValueError(
                f"{shard_file(self.folder, shard)}: sample {row.sample_id!r} holds token {largest}, and the teacher "
                f"has {self.manifest.vocabulary}; {MAKE_AGAIN} once the file is removed"
            )
        return kept

    def file(self, shard: int) -> pq.ParquetFile:
        """An open shard; the one that was not used for longest is closed for it."""
        file = self.files.pop(shard, None)
        if file is None:
            file = pq.ParquetFile(shard_file(self.folder, shard), memory_map=True)
            if len(self.files) == OPEN_SHARDS:
                self.files.popitem(last=False)
        self.files[shard] = file
        if shard not in self.places:
            self.places[shard] = RowPlaces(file.read(columns=["sample_id"], use_threads=False).column(0).to_pylist())
        return file

    def step_of(self, temperature: float) -> int:
        """The place of a temperature among those that the cache keeps."""
        if temperature not in self.manifest.temperatures:
            kept = ", ".join(map(str, self.manifest.temperatures))
            raise ValueError(
                f"distillation.temperature: {temperature} is not among those that {self.folder} was made for ({kept}); "
                "use one of them, or add it to distillation.cache.temperatures and capture again"
            )
        return self.manifest.temperatures.index(temperature)

    def exact_tokens(self, row: TokenRow, kept: KeptRow, step: int) -> tuple[Array, Array, Array]:
        """Ids, log p at a temperature, and weights of the tokens of known probability; those listed twice weigh 0."""
        labels_N1 = row.input_ids[positions_of(row), None]
        count, k = kept.topk_NK.shape
        keep_ids = self.manifest.keep_ids
        ids_NS = np.empty((count, k + len(keep_ids) + 1), np.int32)
        ids_NS[:, :k] = kept.topk_NK
        ids_NS[:, k:-1] = keep_ids
        ids_NS[:, -1:] = labels_N1
        log_p_NS = np.empty(ids_NS.shape, np.float32)
        log_p_NS[:, :k] = kept.topk_logp_NK
        log_p_NS[:, k:-1] = kept.keep_logp_NM
        log_p_NS[:, -1] = kept.label_logp_N
        if step:
            # log p = logit - lse, so the logits are known, and with them every temperature that has its own sum.
            log_p_NS += kept.lse_NT[:, :1]
            log_p_NS /= np.float32(self.manifest.temperatures[step])
            log_p_NS -= kept.lse_NT[:, step, None]
        weights_NS = np.exp(log_p_NS)
        weights_NS[:, k:][(ids_NS[:, k:, None] == ids_NS[:, None, :k]).any(axis=2)] = 0
        weights_NS[(ids_NS[:, k:-1] == labels_N1).any(axis=1), -1] = 0
        return ids_NS, log_p_NS, weights_NS


class RowPlaces:
    """Where the rows of a shard are, 12 bytes a row."""

    def __init__(self, sample_ids: list[str]) -> None:
        hashes = np.fromiter(map(sample_hash, sample_ids), np.uint64, len(sample_ids))
        self.rows = np.argsort(hashes).astype(np.uint32)
        self.hashes = hashes[self.rows]

    def find(self, hashed: int) -> int | None:
        """The row of a sample id's hash."""
        place = int(np.searchsorted(self.hashes, np.uint64(hashed)))
        found = place < len(self.hashes) and int(self.hashes[place]) == hashed
        return int(self.rows[place]) if found else None


def renormalised(ids_NS: Array, log_p_NS: Array, weights_NS: Array) -> RowTargets:
    """The kept tokens alone, scaled up to a whole distribution."""
    mass_N1 = weights_NS.sum(axis=1, keepdims=True)
    return RowTargets(ids_NS, log_p_NS - np.log(mass_N1), weights_NS / mass_N1, None)


def with_draws(exact: tuple[Array, Array, Array], kept: KeptRow) -> RowTargets:
    """Exact tokens and behind them the drawn ones, which share the mass of the tail by how often each was drawn."""
    count, width = exact[0].shape
    starts, lengths = kept.drawn_starts.astype(np.int64), kept.drawn_lengths_N
    most = int(lengths.max(initial=0))
    ids, log_p, weights = (
        np.concatenate([known, np.full((count, most), filling, known.dtype)], axis=1)
        for known, filling in zip(exact, (0, -np.inf, 0), strict=True)
    )
    position_D = np.repeat(np.arange(count), lengths)
    column_D = width + np.arange(len(position_D)) - np.repeat(starts[:-1], lengths)
    draws_N = np.bincount(position_D, kept.drawn_count_D, minlength=count)
    tail_N = np.exp(kept.log_tail_NT[:, 0])
    ids[position_D, column_D] = kept.drawn_D
    log_p[position_D, column_D] = kept.drawn_logp_D
    weights[position_D, column_D] = tail_N[position_D] * kept.drawn_count_D / draws_N[position_D]
    return RowTargets(ids, log_p, weights, None)


# --- looking for a cache that is out of step


MASS_TOLERANCE = 0.01
"""float16 keeps a log p of 8 to a 256th; over the kept tokens of a position that averages out far below this."""


@dataclass(frozen=True, kw_only=True)
class OffsetCheck:
    """Whether the distributions of a cache belong to the tokens that they are read for."""

    positions: int
    rates: dict[int, float]
    """Share of the positions where the token before (-1), the token itself (0) or the one after (1) is among the most
    probable tokens; empty for a cache that keeps none."""

    drawn_labels: int
    """Positions whose own token is among the drawn ones, which are drawn from all others."""

    largest_mass_error: float
    """Farthest that the probabilities of a position are from summing up to 1."""

    @property
    def problems(self) -> list[str]:
        """What is wrong, in words; none for a sound cache of a teacher that knows such data."""
        problems = []
        if self.positions and self.rates:
            other = max((-1, 1), key=lambda offset: self.rates[offset])
            rates = f"{self.rates[other]:.1%} of positions, and {self.rates[0]:.1%}"
            noise = math.sqrt(2 * self.rates[other] * (1 - self.rates[other]) / self.positions)
            side = "after" if other > 0 else "before"
            if self.rates[other] > self.rates[0]:
                problems.append(f"the token {side} a position is likelier there than its own ({rates}): out of step")
            elif self.rates[0] - self.rates[other] <= 2 * noise:
                problems.append(f"the token {side} a position is as likely there as its own ({rates}): no use to learn")
        if self.drawn_labels:
            problems.append(
                f"{self.drawn_labels} of {self.positions} positions have drawn their own token, which is never drawn: "
                "out of step"
            )
        if self.largest_mass_error > MASS_TOLERANCE:
            problems.append(f"the probabilities of a position are {self.largest_mass_error:.3g} away from summing to 1")
        return problems


def offset_check(cache: TeacherCache, rows: Iterable[TokenRow]) -> OffsetCheck:
    """Look for the tokens around each position among its likely ones, and sum up its probabilities."""
    hits = dict.fromkeys((-1, 0, 1), 0)
    positions, drawn_labels, largest_error = 0, 0, 0.0
    for row in rows:
        places = positions_of(row)
        kept, targets = cache.kept(row), cache.targets(row, temperature=1.0)
        for offset in hits:
            tokens_N = row.input_ids[np.minimum(places + offset, len(row.input_ids) - 1)]
            hits[offset] += int((kept.topk_NK == tokens_N[:, None]).any(axis=1).sum())
        labels_D = np.repeat(row.input_ids[places], kept.drawn_lengths_N)
        drawn_labels += int((kept.drawn_D == labels_D).sum())
        mass_N = targets.weights_NS.sum(axis=1)
        if targets.log_tail_N is not None:
            mass_N = mass_N + np.exp(targets.log_tail_N)
        positions += len(places)
        largest_error = max(largest_error, float(np.abs(mass_N - 1).max(initial=0)))
    rates = {offset: count / max(positions, 1) for offset, count in hits.items()}
    return OffsetCheck(
        positions=positions,
        rates=rates if cache.manifest.k else {},
        drawn_labels=drawn_labels,
        largest_mass_error=largest_error,
    )
