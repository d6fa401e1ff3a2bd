"""A mixture that is killed at random moments and started again ends with the bytes of an unbroken one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mixture_sources import three_sources

pytestmark = pytest.mark.chain

PROJECT = Path(__file__).parents[1]
KILLS = 10

SCRIPT = """
import sys
from pathlib import Path
from mixture_sources import silent, three_sources
from mixture import dedup, scan, scatter
from mixture.scan import ScanSource, scan_sources

scan.CHUNK_BYTES, scan.BLOCK_BYTES, dedup.ROWS_PER_PARTITION, scatter.BUCKET_BYTES = 60_000, 8000, 1000, 100_000
scatter.MEGABYTE = 100_000
folder, workers = Path(sys.argv[1]), int(sys.argv[2])
sources = [
    ScanSource(name=name, files=(folder.parent / "sources" / f"{name}.jsonl",)) for name in ("math", "chat", "code")
]
print("started", flush=True)
found = scan_sources(sources, folder / "scan", workers=workers, report=silent)
unique = dedup.find_duplicates(found, test_share=0.1, workers=workers, report=silent)
rows = {place: available.rows for place, available in unique.available.items()}
rows["train", "math"] = rows["train", "math"] * 5 // 2
scatter.scatter(unique, rows, folder / "out", seed=5, part_megabytes=2, workers=workers, report=silent)
"""


def start(folder: Path, workers: int) -> subprocess.Popen[bytes]:
    """The mixture's process, from when its imports are done."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(workers)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    process.stdout.close()
    return process


def output(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "out").iterdir())}


def finished_chunks(folder: Path) -> dict[str, int]:
    """When the chunks of pass 1 that are finished were written."""
    return {file.name: file.stat().st_mtime_ns for file in (folder / "scan").glob("[0-9]*.json")}


def test_ten_kills_at_random_moments_change_no_byte_and_nothing_finished_is_read_again(tmp_path):
    three_sources(tmp_path / "sources", scale=40)
    process = start(tmp_path / "unbroken", 1)
    began = time.monotonic()
    assert process.wait() == 0
    seconds = time.monotonic() - began
    expected = output(tmp_path / "unbroken")
    assert len(expected) > 5, "several parts, and parts.json"

    moments = random.Random(11)
    kills, finished = 0, 0
    while kills < KILLS or not finished:
        broken = tmp_path / f"broken-{finished}"
        before = finished_chunks(broken)
        process = start(broken, 1 + kills % 3)
        try:
            process.wait(timeout=moments.uniform(0.0, 0.25 if kills < KILLS else 60) * seconds)
            assert process.returncode == 0
            assert output(broken) == expected
            assert not list((broken / "scan").glob("scatter-*"))
            finished += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        assert finished_chunks(broken).items() >= before.items(), "a finished chunk was written again"
