"""Pass 2 of a mixture: exact counts in one global shuffle, the same bytes for any number of workers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from mixture_sources import question_row, silent, three_sources

from mixture import scan as scan_module
from mixture import scatter as scatter_module
from mixture.dedup import UniqueRows, find_duplicates
from mixture.formats import canonical_row
from mixture.scan import scan_sources
from mixture.scatter import ShortPromptsFirst, lowest, scatter

ROWS = {("train", "math"): 250, ("train", "chat"): 60, ("train", "code"): 90}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "CHUNK_BYTES", 6000)
    monkeypatch.setattr(scatter_module, "BUCKET_BYTES", 9000)


@pytest.fixture
def unique(tmp_path) -> UniqueRows:
    return unique_rows(tmp_path)


def unique_rows(tmp_path: Path, **keys) -> UniqueRows:
    scan = scan_sources(three_sources(tmp_path / "sources"), tmp_path / "scan", workers=1, report=silent)
    return find_duplicates(scan, workers=1, report=silent, **keys)


def written_rows(folder: Path, pattern: str = "train-*.jsonl") -> list[dict]:
    return [json.loads(line) for file in sorted(folder.glob(pattern)) for line in file.read_text().splitlines()]


def test_counts_are_exact_and_repeats_are_whole_epochs_and_a_remainder(tmp_path, unique):
    written = scatter(unique, ROWS, tmp_path / "out", seed=1, workers=1, report=silent)
    rows = written_rows(tmp_path / "out")
    assert Counter(row["source"] for row in rows) == {"math": 250, "chat": 60, "code": 90}
    repeats = Counter(Counter(row["id"] for row in rows if row["source"] == "math").values())
    assert repeats == {2: 50, 3: 50}
    assert max(Counter(row["id"] for row in rows if row["source"] != "math").values()) == 1
    assert {place: stats.samples for place, stats in written.stats.items()} == ROWS


def test_rows_are_canonical_samples_under_the_source_s_name(tmp_path, unique):
    scatter(unique, ROWS, tmp_path / "out", seed=1, workers=1, report=silent)
    row = next(row for row in written_rows(tmp_path / "out") if row["id"] == "math_00000042")
    assert row == canonical_row(question_row(42), "math", "math_00000042", "reasoning")


def test_statistics_are_those_of_the_files(tmp_path, unique):
    written = scatter(unique, ROWS, tmp_path / "out", seed=1, part_megabytes=1, workers=1, report=silent)
    for part in written.parts:
        content = (tmp_path / "out" / part.file).read_bytes()
        assert (part.bytes, part.checksum) == (len(content), xxhash.xxh3_128_hexdigest(content))
        assert dict(Counter(json.loads(line)["source"] for line in content.splitlines())) == part.rows
    rows = [row for row in written_rows(tmp_path / "out") if row["source"] == "code"]
    lengths = [len(row["text"]) for row in rows]
    stats = written.stats["train", "code"]
    assert (stats.total_chars, stats.min_length, stats.max_length) == (sum(lengths), min(lengths), max(lengths))


@pytest.mark.chain
@pytest.mark.parametrize("layout", ["mixed", "categories"])
def test_bytes_are_the_same_for_any_workers_and_chunks(tmp_path, monkeypatch, layout):
    checksums = set()
    for workers, chunk, bucket in ((1, 6000, 9000), (4, 6000, 2000), (2, 1 << 20, 1 << 20)):
        monkeypatch.setattr(scan_module, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(scatter_module, "BUCKET_BYTES", bucket)
        folder = tmp_path / f"{workers}"
        folder.mkdir()
        written = scatter(
            unique_rows(folder, test_share=0.1),
            ROWS | {("test", "chat"): 5},
            folder / "out",
            seed=1,
            layout=layout,
            workers=workers,
            report=silent,
        )
        checksums.add(tuple((part.file, part.checksum) for part in written.parts))
    assert len(checksums) == 1


def test_the_shuffle_is_global_and_changes_with_the_seed(tmp_path, unique):
    orders = []
    for seed in (1, 2):
        scatter(
            unique,
            {("train", "math"): 100, ("train", "chat"): 170},
            tmp_path / str(seed),
            seed=seed,
            workers=1,
            report=silent,
        )
        orders.append([row["id"] for row in written_rows(tmp_path / str(seed))])
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    positions = [position for position, row in enumerate(orders[0]) if row.startswith("math")]
    numbers = [int(row.split("_")[1]) for row in orders[0] if row.startswith("math")]
    assert abs(np.corrcoef(positions, numbers)[0, 1]) < 0.3
    assert abs(np.mean(positions) - 134.5) < 30


def test_a_smaller_draw_is_part_of_a_larger_one(tmp_path, unique):
    ids = []
    for count in (30, 60):
        scatter(unique, {("train", "chat"): count}, tmp_path / str(count), seed=1, workers=1, report=silent)
        ids.append({row["id"] for row in written_rows(tmp_path / str(count))})
    assert ids[0] < ids[1]


def test_a_cap_on_distinct_rows_repeats_those_alone(tmp_path, unique):
    place = ("train", "chat")
    scatter(unique, {place: 50}, tmp_path / "out", seed=1, distinct={place: 20}, workers=1, report=silent)
    repeats = Counter(row["id"] for row in written_rows(tmp_path / "out"))
    assert Counter(repeats.values()) == {2: 10, 3: 10}


def test_parts_have_about_the_size_asked_for(tmp_path, unique, monkeypatch):
    monkeypatch.setattr(scatter_module, "MEGABYTE", 1000)
    written = scatter(unique, ROWS, tmp_path / "out", seed=1, part_megabytes=20, workers=2, report=silent)
    total = sum(part.bytes for part in written.parts)
    assert len(written.parts) == -(-total // 20_000) > 3
    assert [part.file for part in written.parts][:2] == ["train-00000.jsonl", "train-00001.jsonl"]
    whole = scatter(unique, ROWS, tmp_path / "whole", seed=1, workers=1, report=silent)
    parts = b"".join((tmp_path / "out" / part.file).read_bytes() for part in written.parts)
    assert parts == (tmp_path / "whole" / whole.parts[0].file).read_bytes()


def test_short_prompts_come_first_in_a_stage_of_their_own(tmp_path):
    unique = unique_rows(tmp_path, short_prompt_bytes=60)
    stages = ShortPromptsFirst(share=0.3)
    written = scatter(unique, ROWS, tmp_path / "out", seed=1, stages=stages, workers=2, report=silent)
    assert [(part.file, part.stage) for part in written.parts] == [("train-00000.jsonl", 0), ("train-00001.jsonl", 1)]
    assert written.parts[0].rows == {"math": 75, "chat": 18, "code": 27}
    early = [row for row in written_rows(tmp_path / "out", "train-00000.jsonl") if row["source"] != "code"]
    assert max(len(row["messages"][0]["content"].encode()) for row in early) < 60
    assert Counter(row["source"] for row in written_rows(tmp_path / "out")) == {"math": 250, "chat": 60, "code": 90}


def test_by_category_every_source_has_a_file_with_labelled_text(tmp_path):
    unique = unique_rows(tmp_path, test_share=0.2)
    rows = {("train", "math"): 30, ("train", "chat"): 10, ("test", "chat"): 7}
    written = scatter(unique, rows, tmp_path / "out", seed=1, layout="categories", workers=1, report=silent)
    assert [part.file for part in written.parts] == [
        "reasoning/math.jsonl",
        "chat/chat.jsonl",
        "chat/chat.test.jsonl",
    ]
    row = json.loads((tmp_path / "out/reasoning/math.jsonl").read_text().splitlines()[0])
    original = question_row(int(row["id"].split("_")[1]))
    assert row["text"] == f"user: {original['question']}\nassistant: {original['answer']}"
    assert row["messages"][1] == {"role": "assistant", "content": original["answer"]}
    assert (row["source"], row["category"]) == ("math", "reasoning")


def test_compressed_parts_hold_the_same_rows(tmp_path, unique):
    plain = scatter(unique, ROWS, tmp_path / "plain", seed=1, workers=1, report=silent)
    small = scatter(unique, ROWS, tmp_path / "small", seed=1, compress="zstd", workers=1, report=silent)
    assert [part.file for part in small.parts] == ["train-00000.jsonl.zst"]
    assert (tmp_path / "small" / small.parts[0].file).stat().st_size == small.parts[0].bytes < plain.parts[0].bytes / 2
    content = pa.CompressedInputStream(str(tmp_path / "small/train-00000.jsonl.zst"), "zstd").read()
    assert content == (tmp_path / "plain/train-00000.jsonl").read_bytes()


def test_what_is_written_is_not_written_again(tmp_path, unique):
    first = scatter(unique, ROWS, tmp_path / "out", seed=1, workers=1, report=silent)
    before = (tmp_path / "out/train-00000.jsonl").stat().st_mtime_ns
    assert scatter(unique, ROWS, tmp_path / "out", seed=1, workers=1, report=silent) == first
    assert (tmp_path / "out/train-00000.jsonl").stat().st_mtime_ns == before
    assert not list(unique.scan.folder.glob("scatter-*")), "the temporary copy is gone"


def test_a_temporary_copy_that_its_writer_was_killed_before_removing_goes_with_the_next_call(
    tmp_path, unique, monkeypatch
):
    with monkeypatch.context() as killed:
        killed.setattr(scatter_module, "shutil", None)
        with pytest.raises(AttributeError):
            scatter(unique, ROWS, tmp_path / "out", seed=1, workers=1, report=silent)
    assert list(unique.scan.folder.glob("scatter-*"))
    scatter(unique, ROWS, tmp_path / "out", seed=1, workers=1, report=silent)
    assert not list(unique.scan.folder.glob("scatter-*"))


def test_rows_asked_of_a_source_that_has_none_are_an_error(tmp_path, unique):
    with pytest.raises(ValueError, match="5 rows asked of test/math, which has none after filters and duplicates"):
        scatter(unique, {("test", "math"): 5}, tmp_path / "out", seed=1, workers=1, report=silent)
    with pytest.raises(
        ValueError, match=r"5 rows asked of train/other, which is not in the mixture; known: .*train/math"
    ):
        scatter(unique, {("train", "other"): 5}, tmp_path / "out", seed=1, workers=1, report=silent)


def test_a_full_disk_is_an_error_and_what_was_done_is_kept(tmp_path):
    code = (
        "import resource, signal, sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path; import test_scatter as t\n"
        f"folder = Path({str(tmp_path)!r}); unique = t.unique_rows(folder)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "try:\n    t.scatter(unique, t.ROWS, folder / 'out', seed=1, workers=2, report=t.silent)\n"
        "except OSError as error:\n    print('OSError', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert done.returncode == 0, done.stderr
    assert "the disk is full: make room in" in done.stdout
    assert not list((tmp_path / "out").iterdir())
    unique = unique_rows(tmp_path)
    written = scatter(unique, ROWS, tmp_path / "out", seed=1, workers=1, report=silent)
    other = scatter(unique, ROWS, tmp_path / "other", seed=1, workers=1, report=silent)
    assert written == other


def test_a_mixture_larger_than_the_disk_is_refused_before_it_starts(tmp_path, unique):
    with pytest.raises(ValueError, match=r"needs about .* TB more on the disk of .*, which has .* make room"):
        scatter(unique, {("train", "math"): 10**13}, tmp_path / "out", seed=1, workers=1, report=silent)


@pytest.mark.parametrize(
    ("count", "total"), [(0, 5), (1, 5), (5, 5), (1, 100_000), (77_777, 100_000), (99_999, 100_000)]
)
def test_the_limit_of_the_lowest_keys_is_exact(count, total):
    keys = np.random.default_rng(3).integers(0, 2**64, total, np.uint64, endpoint=False)
    limit = lowest(lambda: np.array_split(keys, 7), count, total)
    assert limit is None if count == 0 else np.count_nonzero(keys <= np.uint64(limit)) == count
