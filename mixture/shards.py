"""Token rows on disk: Parquet shards for other tools, and one memory-mapped Arrow file a split for training."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from mixture.packing import Packs

SCHEMA = pa.schema(
    [
        # The sample the row was made from; pieces of a split sample end in #0, #1, ...
        pa.field("sample_id", pa.string(), nullable=False),
        # Tokens, special ones included, at most dataset.max_length of them.
        pa.field("input_ids", pa.large_list(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        # Per token: whether predicting it counts in the loss. The first token is never predicted, whatever it says.
        pa.field("loss_mask", pa.large_list(pa.field("item", pa.bool_(), nullable=False)), nullable=False),
        # The data set the sample comes from.
        pa.field("source", pa.string(), nullable=False),
    ]
)
"""Columns of the token shards, one row a sample. Parquet and Arrow files hold the same rows in the same order."""

ROWS_PER_BATCH = b"rows_per_batch"
TOKENS_PER_BATCH = 1 << 21
MEGABYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One tokenised sample."""

    sample_id: str
    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    source: str


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Several rows in flat arrays: row i has `input_ids[starts[i]:starts[i + 1]]`, and `loss_mask` alike."""

    sample_ids: list[str]
    sources: list[str]
    starts: npt.NDArray[np.int64]
    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]

    @classmethod
    def of_rows(cls, rows: Sequence[TokenRow]) -> TokenBatch:
        return cls(
            [row.sample_id for row in rows],
            [row.source for row in rows],
            np.cumsum([0, *(len(row.input_ids) for row in rows)]),
            np.concatenate([np.empty(0, np.int32), *(row.input_ids for row in rows)]),
            np.concatenate([np.empty(0, np.bool_), *(row.loss_mask for row in rows)]),
        )

    @classmethod
    def joined(cls, batches: Sequence[TokenBatch]) -> TokenBatch:
        """The rows of several batches, of which there is at least one."""
        return cls(
            [sample_id for batch in batches for sample_id in batch.sample_ids],
            [source for batch in batches for source in batch.sources],
            np.cumsum(np.concatenate([[0], *(np.diff(batch.starts) for batch in batches)])),
            np.concatenate([batch.input_ids for batch in batches]),
            np.concatenate([batch.loss_mask for batch in batches]),
        )

    def __len__(self) -> int:
        return len(self.sample_ids)

    def part(self, first: int, last: int) -> TokenBatch:
        """Rows `first` to `last`, the last not included, copied so that the others can be forgotten."""
        tokens = slice(self.starts[first], self.starts[last])
        return TokenBatch(
            self.sample_ids[first:last],
            self.sources[first:last],
            self.starts[first : last + 1] - self.starts[first],
            self.input_ids[tokens].copy(),
            self.loss_mask[tokens].copy(),
        )


# --- where the files of a split lie


def arrow_file(prepared_folder: Path, split: str) -> Path:
    return prepared_folder / "tokens" / f"{split}.arrow"


def parquet_file(prepared_folder: Path, split: str, shard: int) -> Path:
    return prepared_folder / "tokens" / f"{split}-{shard:05d}.parquet"


def packing_file(prepared_folder: Path, split: str) -> Path:
    return prepared_folder / "packing" / f"{split}.parquet"


# --- writing


class TokenWriter:
    """Writes the token rows of one split in bounded memory; a context manager.

    `lengths` (int32, tokens of each row) and `digest` (over tokens, masks and lengths) cover what was added. A Parquet
    shard is closed before it would pass `shard_size_mb`; no shard holds less than one batch of rows.
    """

    def __init__(self, prepared_folder: Path, split: str, *, max_length: int, shard_size_mb: int = 2048) -> None:
        self.folder = prepared_folder
        self.split = split
        self.shard_bytes = shard_size_mb * MEGABYTE
        # A fixed number of rows in each batch lets a reader find row i without an index.
        self.rows_per_batch = max(16, min(4096, TOKENS_PER_BATCH // max_length))
        self.lengths = array("i")
        self.digests = [xxhash.xxh3_128() for _ in range(3)]
        self.pending: list[TokenBatch] = []
        self.pending_rows = 0
        self.shards = 0
        self.batch_bytes = 0
        self.shard_file: BinaryIO | None = None
        self.parquet: pq.ParquetWriter | None = None
        path = arrow_file(prepared_folder, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        schema = SCHEMA.with_metadata({ROWS_PER_BATCH: str(self.rows_per_batch).encode()})
        self.arrow = pa.ipc.new_file(str(path), schema)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    @property
    def digest(self) -> bytes:
        return b"".join(digest.digest() for digest in self.digests)

    def add(self, row: TokenRow) -> None:
        """Append a row."""
        self.extend(TokenBatch.of_rows([row]))

    def extend(self, rows: TokenBatch) -> None:
        """Append rows; how they are divided over calls changes nothing that is written."""
        lengths = np.diff(rows.starts).astype("<i4")
        self.lengths.frombytes(lengths.astype(np.int32).tobytes())
        for digest, values in zip(self.digests, (lengths, rows.input_ids, rows.loss_mask), strict=True):
            digest.update(np.ascontiguousarray(values).tobytes())
        self.pending.append(rows)
        self.pending_rows += len(rows)
        if self.pending_rows >= self.rows_per_batch:
            self.write_full_batches()

    def write_full_batches(self) -> None:
        """Write the pending rows as far as they fill batches."""
        joined = TokenBatch.joined(self.pending)
        full = len(joined) - len(joined) % self.rows_per_batch
        for first in range(0, full, self.rows_per_batch):
            self.write_batch(joined.part(first, first + self.rows_per_batch))
        self.pending = [joined.part(full, len(joined))]
        self.pending_rows = len(joined) - full

    def write_batch(self, rows: TokenBatch) -> None:
        """Write rows as one Arrow batch and one Parquet row group."""
        batch = record_batch(rows)
        self.arrow.write_batch(batch)
        if self.shard_file is not None and self.shard_file.tell() + self.batch_bytes > self.shard_bytes:
            self.close_shard()
        if self.shard_file is None:
            self.shard_file = parquet_file(self.folder, self.split, self.shards).open("wb")
            self.parquet = pq.ParquetWriter(self.shard_file, SCHEMA, compression="zstd")
        assert self.parquet is not None
        before = self.shard_file.tell()
        self.parquet.write_batch(batch)
        self.batch_bytes = self.shard_file.tell() - before  # the next one is about as large

    def close_shard(self) -> None:
        """Finish the current Parquet file; the next batch opens another."""
        if self.parquet is not None and self.shard_file is not None:
            self.parquet.close()
            self.shard_file.close()
            self.parquet = self.shard_file = None
            self.shards += 1

    def close(self) -> None:
        """Write what is pending and finish all files."""
        if self.pending_rows:
            self.write_batch(TokenBatch.joined(self.pending))
            self.pending, self.pending_rows = [], 0
        self.close_shard()
        self.arrow.close()


def record_batch(rows: TokenBatch) -> pa.RecordBatch:
    """Rows as one Arrow record batch of SCHEMA."""
    tokens = pa.array(rows.input_ids, pa.int32())
    masks = pa.array(rows.loss_mask, pa.bool_())
    types = [field.type for field in SCHEMA]
    columns = [
        pa.array(rows.sample_ids, types[0]),
        pa.LargeListArray.from_arrays(rows.starts, tokens, types[1]),
        pa.LargeListArray.from_arrays(rows.starts, masks, types[2]),
        pa.array(rows.sources, types[3]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def write_packs(prepared_folder: Path, split: str, packs: Packs) -> None:
    """Write packs as Parquet: one row a pack, `samples` its sample indices, `stage` the stage it belongs to."""
    path = packing_file(prepared_folder, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = pa.LargeListArray.from_arrays(packs.starts, packs.indices)
    stages = np.repeat(np.arange(len(packs.stages), dtype=np.int32), np.diff([*packs.stages, len(packs)]))
    pq.write_table(pa.table({"samples": samples, "stage": stages}), path, compression="zstd")


# --- reading


class TokenRows(Sequence[TokenRow]):
    """The token rows of one split, read from a memory-mapped file: memory stays flat however large it is. Picklable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self.rows_per_batch = int(self.reader.schema.metadata[ROWS_PER_BATCH])
        self.batches: list[BatchView | None] = [None] * self.reader.num_record_batches
        full = self.rows_per_batch * (len(self.batches) - 1)
        self.length = full + self.reader.get_batch(len(self.batches) - 1).num_rows if self.batches else 0

    @classmethod
    def open(cls, prepared_folder: Path, split: str) -> TokenRows:
        """The rows of `split` (`train` or `test`) in a prepared folder; FileNotFoundError if it has no such split."""
        return cls(arrow_file(Path(prepared_folder), split))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        """Row `index`: an int, counted from the end if negative. The arrays are views of the file; do not write."""
        if index < 0:
            index += self.length
        if not 0 <= index < self.length:
            raise IndexError(f"row {index} of {self.length}")
        batch, row = divmod(index, self.rows_per_batch)
        view = self.batches[batch]
        if view is None:
            view = self.batches[batch] = BatchView(self.reader.get_batch(batch))
        return view.row(row)

    def __iter__(self) -> Iterator[TokenRow]:
        return (self[index] for index in range(self.length))

    def __reduce__(self) -> tuple[type[TokenRows], tuple[Path]]:
        return TokenRows, (self.path,)

    def sample_ids(self) -> Iterator[str]:
        """The sample id of each row, at a fraction of the cost of the rows."""
        for batch in range(len(self.batches)):
            yield from self.reader.get_batch(batch).column(0).to_pylist()

    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each row, int32 [rows]."""
        counts = [np.diff(list_offsets(self.reader.get_batch(batch).column(1))) for batch in range(len(self.batches))]
        return np.concatenate(counts or [np.empty(0)]).astype(np.int32)


class BatchView:
    """NumPy views of one record batch, so that reading a row costs no Arrow calls for its tokens."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.sample_ids, tokens, masks, self.sources = batch.columns
        self.starts = list_offsets(tokens)
        self.tokens = np.frombuffer(tokens.values.buffers()[1], dtype=np.int32)
        self.mask_bits = np.frombuffer(masks.values.buffers()[1], dtype=np.uint8)

    def row(self, index: int) -> TokenRow:
        """The row at `index` of the batch."""
        first, last = int(self.starts[index]), int(self.starts[index + 1])
        bits = np.unpackbits(self.mask_bits[first >> 3 : (last + 7) >> 3], bitorder="little")
        mask = bits[first & 7 : (first & 7) + last - first].view(np.bool_)
        return TokenRow(self.sample_ids[index].as_py(), self.tokens[first:last], mask, self.sources[index].as_py())


def list_offsets(column: pa.LargeListArray) -> npt.NDArray[np.int64]:
    return np.frombuffer(column.buffers()[1], dtype=np.int64)[: len(column) + 1]


def read_packs(prepared_folder: Path, split: str) -> Packs:
    """The packs of one split: 4 bytes a sample and 8 bytes a pack in memory."""
    table = pq.read_table(packing_file(Path(prepared_folder), split))
    samples = table.column("samples").combine_chunks()
    changes = np.flatnonzero(np.diff(table.column("stage").to_numpy())) + 1
    return Packs(samples.values.to_numpy(), samples.offsets.to_numpy(), np.concatenate(([0], changes)))
