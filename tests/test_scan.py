"""Pass 1 of a mixture: every row is read once, kept or counted as left out, whatever is wrong with it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from mixture_sources import question_row, silent, three_sources, write_rows

from mixture import scan as scan_module
from mixture.fingerprints import fingerprints, normalised
from mixture.scan import Scan, ScanSource, scan_sources


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "CHUNK_BYTES", 5000)
    monkeypatch.setattr(scan_module, "BLOCK_BYTES", 1500)


def scan_lines(tmp_path: Path, content: bytes, **keys: object) -> Scan:
    """A scan of one file with this content."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    return scan_sources([ScanSource(name="s", files=(file,), **keys)], tmp_path / "scan", workers=1, report=silent)


def digest(folder: Path) -> str:
    """Over all index and count files."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".index", ".json"))
    return xxhash.xxh3_128_hexdigest(b"".join(file.read_bytes() for file in files))


def test_rows_are_counted_and_dropped_ones_named_by_reason(tmp_path, small_chunks):
    def keep(text, row, read):
        assert read(row)["messages"][0]["content"] == row["question"]
        assert text == row["question"] + "\n" + row["answer"]
        return f"too short: {len(text)} characters" if len(text) < 115 else None

    source = replace(three_sources(tmp_path)[0], keep=keep)
    scan = scan_sources([source], tmp_path / "scan", workers=1, report=silent)
    rows = [json.loads(line) for line in source.files[0].read_text().splitlines()]
    texts = [row["question"] + "\n" + row["answer"] for row in rows]
    long_texts = [text for text in texts if len(text) >= 115]
    assert 0 < len(long_texts) < 100
    counts = scan.sources["math"]
    assert (counts.read, counts.kept) == (100, len(long_texts))
    assert counts.dropped == {"too short": 100 - len(long_texts)}
    assert counts.text_bytes == sum(len(text.encode()) for text in long_texts)
    assert [text for _, text in scan.texts()] == long_texts
    short_lines = [number for number, text in enumerate(texts, 1) if len(text) < 115]
    assert {rejected.line for rejected in scan.rejections()} <= set(short_lines)
    assert next(scan.rejections()).detail == f"{len(texts[short_lines[0] - 1])} characters"


@pytest.mark.parametrize("chunk", [700, 5000, 1 << 20])
def test_every_line_belongs_to_one_chunk_wherever_chunks_end(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(scan_module, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(scan_module, "BLOCK_BYTES", 300)
    sources = three_sources(tmp_path)
    scan = scan_sources(sources, tmp_path / "scan", workers=1, report=silent)
    assert [(counts.read, counts.kept) for counts in scan.sources.values()] == [(100, 100), (200, 200), (100, 100)]
    texts = [text.split("\n")[0] for _, text in scan.texts(["math"])]
    assert texts == [question_row(number)["question"] for number in range(100)]
    ids = [row_id for row_id, _ in scan.texts()]
    assert ids == sorted(set(ids)) and len(ids) == 400


def test_the_index_is_the_same_for_any_number_of_workers(tmp_path, small_chunks):
    sources = three_sources(tmp_path)
    digests = set()
    for workers in (1, 2, 5):
        scan_sources(sources, tmp_path / f"scan{workers}", workers=workers, report=silent)
        digests.add(digest(tmp_path / f"scan{workers}"))
    assert len(digests) == 1


def test_finished_chunks_are_not_read_again(tmp_path, small_chunks):
    sources = three_sources(tmp_path)
    scan = scan_sources(sources, tmp_path / "scan", workers=1, report=silent)
    before = digest(scan.folder)
    scan_module.counts_file(scan.folder, scan.chunks[3]).unlink()
    reads: list[str] = []
    again = [
        replace(source, keep=lambda text, row, sample: reads.append(text)) for source in sources
    ]  # the same keep_key, so it stands for the same filter
    scan_sources(again, tmp_path / "scan", workers=1, report=silent)
    assert len(reads) == scan.counts[3].read
    assert digest(scan.folder) == before


def test_a_changed_file_or_filter_is_scanned_anew(tmp_path):
    sources = three_sources(tmp_path)
    scan_sources(sources, tmp_path / "scan", workers=1, report=silent)
    write_rows(sources[0].files[0], [question_row(7)])
    scan = scan_sources(sources, tmp_path / "scan", workers=1, report=silent)
    assert scan.sources["math"].read == 1
    none = [replace(source, keep=lambda text, row, sample: "no", keep_key="none") for source in sources]
    assert scan_sources(none, tmp_path / "scan", workers=1, report=silent).sources["chat"].kept == 0


def test_unreadable_rows_are_counted_with_file_and_line(tmp_path):
    good = json.dumps(question_row(1)).encode()
    lines = [
        good,
        b'{"question": "cut off',
        b'{"question": "\xff\xfe", "answer": "x"}',
        rb'{"question": "\ud800 alone", "answer": "x"}',
        b'{"question": "a\x00b", "answer": "x"}',
        b"",
        b"[1, 2]",
        b'{"question": null, "answer": null}',
        b'{"messages": [null, {"role": "user", "content": [null]}]}',
        b'{"question": {"deep": [null, {"er": null}]}, "answer": "x"}',
        b"[" * 100_000,
        rb'{"text": "an escaped \u0000 is a character like any other"}',
        good,
    ]
    scan = scan_lines(tmp_path, b"\n".join(lines))
    counts = scan.sources["s"]
    assert (counts.read, counts.kept) == (12, 3)
    assert counts.dropped == {
        "fits no known format": 3,
        "not a JSON object": 1,
        "not valid JSON": 4,
        "not valid UTF-8": 1,
    }
    rejected = list(scan.rejections())
    assert [item.line for item in rejected] == [2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert {item.file for item in rejected} == {tmp_path / "rows.jsonl"}
    assert rejected[1].detail == "invalid start byte at byte 14 of the line"
    assert rejected[0].excerpt == '{"question": "cut off'


def test_a_line_of_200_megabytes_is_counted_and_never_in_memory(tmp_path):
    code = (
        "import resource, sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path; from mixture_sources import silent, question_row\n"
        "from mixture.scan import ScanSource, scan_sources; import orjson\n"
        "from resource import RLIMIT_DATA, setrlimit\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "good = orjson.dumps(question_row(1)) + b'\\n'\n"
        "with (folder / 'rows.jsonl').open('wb') as file:\n"
        "    file.write(good + b'{\"text\": \"'); [file.write(b'x' * 1_000_000) for _ in range(200)]\n"
        "    file.write(b'\"}\\n' + good + b'y' * 10)\n"
        "setrlimit(RLIMIT_DATA, (150_000_000, 150_000_000))\n"
        "source = ScanSource(name='s', files=(folder / 'rows.jsonl',))\n"
        "scan = scan_sources([source], folder / 'scan', workers=1, report=silent)\n"
        "print(scan.sources['s'].dropped, [(item.reason, item.line) for item in scan.rejections()])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    (tmp_path / "rows.jsonl").unlink()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "{'line too long': 1, 'not valid JSON': 1} [('line too long', 2), ('not valid JSON', 4)]"
    )


@pytest.mark.parametrize("rows", [3, 1200])
def test_a_source_that_fits_no_format_shows_a_row_and_its_columns(tmp_path, rows):
    with pytest.raises(ValueError, match=r"(?s)source s: none of .*columns alpha, beta") as caught:
        scan_lines(tmp_path, b'{"alpha": "first value", "beta": 2}\n' * rows)
    assert "first value" in str(caught.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match=r"source s: cannot read .*absent\.jsonl: No such file"):
        missing = ScanSource(name="s", files=(tmp_path / "absent.jsonl",))
        scan_sources([missing], tmp_path / "scan", workers=1, report=silent)
    counts = scan_lines(tmp_path, b"").sources["s"]
    assert (counts.read, counts.kept, counts.file_bytes) == (0, 0, 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_filter_that_refuses_names_file_and_line(tmp_path, small_chunks, workers):
    def keep(text, row, read):
        if "Question 77:" in text:
            raise ValueError("no licence")

    source = replace(three_sources(tmp_path)[0], keep=keep)
    with pytest.raises(ValueError, match=r"math\.jsonl, line 78: no licence"):
        scan_sources([source], tmp_path / "scan", workers=workers, report=silent)


def test_a_worker_that_is_killed_is_an_error(tmp_path, small_chunks):
    def keep(text, row, read):
        import os
        import signal

        if "Question 77:" in text:
            os.kill(os.getpid(), signal.SIGKILL)

    source = replace(three_sources(tmp_path)[0], keep=keep)
    with pytest.raises(RuntimeError, match=r"scan: a worker was ended by SIGKILL \(out of memory\?\)"):
        scan_sources([source], tmp_path / "scan", workers=2, report=silent)


def test_fingerprints_are_those_of_each_normalised_text():
    numbers = random.Random(1)
    alphabet = "aB \n\t  xYéΣİ\u2019\u00a0\u3000\u2028\x1c\x00\u212a"

    def piece(longest: int) -> str:
        return "".join(numbers.choice(alphabet) for _ in range(numbers.randrange(longest)))

    for _ in range(500):
        prompts = [numbers.choice(["", piece(8)]) for _ in range(numbers.randrange(1, 8))]
        texts = [prompt + numbers.choice(["", "\n" + piece(8)]) for prompt in prompts]
        found = fingerprints(texts, [len(prompt) for prompt in prompts])
        for text, prompt, content, prompt_print in zip(texts, prompts, found.content, found.prompt, strict=True):
            whole = xxhash.xxh3_128_intdigest(normalised(text).encode())
            assert int(content[0]) << 64 | int(content[1]) == whole
            expected = xxhash.xxh3_64_intdigest(normalised(prompt).encode()) if prompt else 0
            assert prompt_print == np.uint64(expected)
