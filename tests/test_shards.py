"""Token rows come back from disk as they went in, in flat memory, and in workers."""

import multiprocessing
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mixture.packing import best_fit_packs, staged_packs
from mixture.shards import SCHEMA, TokenBatch, TokenRow, TokenRows, TokenWriter, read_packs, write_packs


def made_rows(count, longest=40):
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, longest + 1, size=count)
    return [
        TokenRow(
            f"row-{index}-é",
            generator.integers(0, 1 << 20, length).astype(np.int32),
            generator.random(length) < 0.5,
            "odd" if index % 2 else "even",
        )
        for index, length in enumerate(lengths)
    ]


def write(folder, rows, split="train", max_length=1 << 20, **keys):
    """Write rows in batches of 16, the fewest a batch may have."""
    with TokenWriter(folder, split, max_length=max_length, **keys) as writer:
        for row in rows:
            writer.add(row)
    return writer


def assert_same(first, second):
    assert (first.sample_id, first.source) == (second.sample_id, second.source)
    assert first.input_ids.dtype == np.int32 and first.loss_mask.dtype == np.bool_
    assert np.array_equal(first.input_ids, second.input_ids) and np.array_equal(first.loss_mask, second.loss_mask)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
def test_rows_come_back_as_they_went_in_over_any_number_of_batches(tmp_path, count):
    rows = made_rows(count)
    writer = write(tmp_path, rows)
    read = TokenRows.open(tmp_path, "train")
    assert len(read) == count
    for first, second in zip(read, rows, strict=True):
        assert_same(first, second)
    assert_same(read[-1], rows[-1])
    assert read.lengths().tolist() == list(writer.lengths) == [len(row.input_ids) for row in rows]


def test_a_row_that_is_not_there_is_an_index_error(tmp_path):
    write(tmp_path, made_rows(3))
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"row {3 if index == 3 else -1} of 3"):
            TokenRows.open(tmp_path, "train")[index]


def test_a_split_that_was_not_prepared_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test\.arrow"):
        TokenRows.open(tmp_path, "test")


def test_parquet_shards_hold_the_same_rows_and_the_documented_columns(tmp_path, monkeypatch):
    monkeypatch.setattr("mixture.shards.MEGABYTE", 6_000)
    rows = made_rows(200)
    write(tmp_path, rows, shard_size_mb=1)
    shards = sorted((tmp_path / "tokens").glob("train-*.parquet"))
    assert len(shards) > 2 and shards[0].name == "train-00000.parquet"
    assert all(shard.stat().st_size < 10_000 for shard in shards)  # a batch and the footer over the limit at most
    tables = [pq.read_table(shard) for shard in shards]
    assert all(table.schema.equals(SCHEMA) for table in tables)
    columns = [record for table in tables for record in table.to_pylist()]
    for record, row in zip(columns, rows, strict=True):
        assert record["sample_id"] == row.sample_id and record["source"] == row.source
        assert record["input_ids"] == row.input_ids.tolist() and record["loss_mask"] == row.loss_mask.tolist()


def test_rows_travel_to_worker_processes(tmp_path):
    rows = made_rows(50)
    write(tmp_path, rows)
    read = TokenRows.open(tmp_path, "train")
    assert_same(pickle.loads(pickle.dumps(read))[40], rows[40])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert_same(pool.apply(TokenRows.__getitem__, (read, 40)), rows[40])


def test_the_digest_changes_with_any_token_mask_or_boundary(tmp_path):
    def digest(*rows):
        return write(
            tmp_path, [TokenRow("s", np.array(ids, np.int32), np.array(m, bool), "s") for ids, m in rows]
        ).digest

    base = digest(([1, 2], [0, 1]), ([3], [1]))
    assert base == digest(([1, 2], [0, 1]), ([3], [1]))
    assert base != digest(([1, 2], [1, 1]), ([3], [1]))
    assert base != digest(([1, 4], [0, 1]), ([3], [1]))
    assert base != digest(([1], [0]), ([2, 3], [1, 1]))


def test_how_rows_are_divided_over_calls_changes_no_byte(tmp_path):
    rows = made_rows(100)
    one_by_one = write(tmp_path / "a", rows)
    with TokenWriter(tmp_path / "b", "train", max_length=1 << 20) as writer:
        for first, last in ((0, 3), (3, 3), (3, 60), (60, 100)):
            writer.extend(TokenBatch.of_rows(rows[first:last]))
    assert one_by_one.digest == writer.digest and one_by_one.lengths == writer.lengths
    for name in ("train.arrow", "train-00000.parquet"):
        assert (tmp_path / "a/tokens" / name).read_bytes() == (tmp_path / "b/tokens" / name).read_bytes()


def test_stages_of_packs_come_back(tmp_path):
    packs = staged_packs(np.random.default_rng(0).integers(1, 100, 500), 128, [0, 200, 450])
    write_packs(tmp_path, "train", packs)
    assert read_packs(tmp_path, "train").stages.tolist() == packs.stages.tolist()
    assert len(packs.stages) == 3


def test_packs_come_back_as_they_went_in(tmp_path):
    packs = best_fit_packs(np.random.default_rng(0).integers(1, 100, 500), 128)
    write_packs(tmp_path, "train", packs)
    read = read_packs(tmp_path, "train")
    assert len(read) == len(packs) and read[0].dtype == np.int32
    assert all(np.array_equal(first, second) for first, second in zip(read, packs, strict=True))


READ_ALL = """
import resource, sys
from pathlib import Path
from mixture.shards import TokenRows
rows = TokenRows.open(Path(sys.argv[1]), "train")
rows[0]
before = int(open("/proc/self/statm").read().split()[1]) - int(open("/proc/self/statm").read().split()[2])
total = sum(int(row.input_ids[0]) for row in rows)
after = int(open("/proc/self/statm").read().split()[1]) - int(open("/proc/self/statm").read().split()[2])
print((after - before) * resource.getpagesize())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory use from /proc")
def test_reading_every_row_keeps_private_memory_flat(tmp_path):
    rows = [TokenRow(str(index), np.full(1000, index, np.int32), np.ones(1000, bool), "s") for index in range(20_000)]
    write(tmp_path, rows, max_length=1000)
    command = [sys.executable, "-c", READ_ALL, str(tmp_path)]
    grown = int(
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    )
    assert grown < 8 << 20  # of 80 MB of tokens


def test_writing_holds_one_batch_in_memory(tmp_path):
    writer = TokenWriter(tmp_path, "train", max_length=1 << 16)
    row = TokenRow("s", np.zeros(1 << 16, np.int32), np.ones(1 << 16, bool), "s")
    held = []
    for _ in range(100):
        writer.add(row)
        held.append(len(writer.pending))
    writer.close()
    assert max(held) * (1 << 16) <= 1 << 21
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
