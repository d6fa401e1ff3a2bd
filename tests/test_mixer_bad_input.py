"""Sources that are broken, away or too large for the disk, through the whole mixer: told, or counted row by row."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from dataset_hub import Fault, played_hub, point_clients_at
from mixture_sources import chat_row, code_row, question_row, write_rows

import mixture.fetch
from mixture import scan, scatter
from mixture.fetch import HubUnavailableError
from mixture.mixer import MixtureResult, run_mixture
from mixture.recipe import read_mixture

needs_rensa = pytest.mark.skipif(importlib.util.find_spec("rensa") is None, reason="rensa is not installed")
PROJECT = Path(__file__).parents[1]

TWO_SOURCES = """
datasets:
  - {name: math, mix_ratio: 0.6, max_samples: 300, path: math.jsonl}
  - {name: chat, mix_ratio: 0.4, max_samples: 100, path: chat.jsonl}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two good sources."""
    write_rows(tmp_path / "math.jsonl", [question_row(number) for number in range(400)])
    write_rows(tmp_path / "chat.jsonl", [chat_row(number) for number in range(100)])
    return tmp_path


def mix(folder: Path, recipe: str = TWO_SOURCES, data: Path | None = None) -> MixtureResult:
    path = folder / "mix.yaml"
    path.write_text(recipe)
    return run_mixture(read_mixture(path), data or folder / "data", lambda line: None, workers=2)


def output(result: MixtureResult) -> dict[str, bytes]:
    """The files of a mixture, without what names its folder."""
    assert result.folder is not None
    files = [file for file in sorted(result.folder.rglob("*")) if file.is_file()]
    place = str(result.folder.parent.parent).encode()
    return {str(file.relative_to(result.folder)): file.read_bytes().replace(place, b"") for file in files}


# --- rows


def test_rows_that_cannot_be_read_are_counted_and_those_that_can_are_written_as_they_are(folder: Path) -> None:
    bad = {
        rb'{"question": "\ud800 alone", "answer": "x"}': "not valid JSON",
        b'{"question": "a raw \x00", "answer": "x"}': "not valid JSON",
        b'{"question": "\xff\xfe", "answer": "x"}': "not valid UTF-8",
        b'{"question": "cut off': "not valid JSON",
        b'{"question": null, "answer": null}': "fits no known format",
        b'{"messages": [null, {"role": "user", "content": [null]}]}': "fits no known format",
        b'{"question": {"deep": [null, {"deeper": null}]}, "answer": "x"}': "fits no known format",
        b"[null]": "not a JSON object",
        b"null": "not a JSON object",
        b"[" * 100_000: "not valid JSON",
    }
    good = (
        rb'{"question": "an escaped \u0000", "answer": "a pair \ud83d\ude00", "more": {"deep": [null, {"er": null}]}}'
    )
    path = folder / "math.jsonl"
    path.write_bytes(b"\n".join([*bad, good, b"", path.read_bytes()]))
    result = mix(folder)
    math = result.plan.sources[0].supply
    assert math.dropped == Counter(bad.values())
    assert math.read == len(bad) + 401
    files = output(result)
    rejected = [json.loads(line) for line in files["rejected.jsonl"].splitlines()]
    assert {row["line"]: row["reason"] for row in rejected} == dict(enumerate(bad.values(), start=1))
    rows = [json.loads(line) for line in files["train-00000.jsonl"].splitlines()]
    assert Counter(row["source"] for row in rows) == {"math": 240, "chat": 160}

    path.write_bytes(good + b"\n")
    recipe = "datasets: [{name: math, path: math.jsonl}]\nsplit: {train: 1}"
    (row,) = [json.loads(line) for line in output(mix(folder, recipe))["train-00000.jsonl"].splitlines()]
    assert [turn["content"] for turn in row["messages"]] == ["an escaped \0", "a pair 😀"]


def test_a_line_of_200_megabytes_is_counted_in_little_memory(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from resource import RLIMIT_DATA, setrlimit\n"
        "from mixture.mixer import run_mixture; from mixture.recipe import read_mixture\n"
        "folder = Path(sys.argv[1])\n"
        "with (folder / 'chat.jsonl').open('ab') as file:\n"
        '    file.write(b\'{"text": "\'); [file.write(b"x" * 1_000_000) for _ in range(200)]; file.write(b\'"}\\n\')\n'
        "setrlimit(RLIMIT_DATA, (150_000_000, 150_000_000))\n"
        "mixture = read_mixture(folder / 'mix.yaml')\n"
        "result = run_mixture(mixture, folder / 'data', lambda line: None, workers=1)\n"
        "print(result.plan.rows, result.plan.sources[1].supply.dropped)\n"
    )
    (folder / "mix.yaml").write_text(TWO_SOURCES)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, cwd=PROJECT)
    (folder / "chat.jsonl").unlink()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "400 {'line too long': 1}"


# --- files and recipes


def test_a_truncated_gzip_file_is_named_and_used_once_it_is_whole(folder: Path) -> None:
    whole = gzip.compress((folder / "chat.jsonl").read_bytes())
    packed = folder / "chat.jsonl.gz"
    recipe = TWO_SOURCES.replace("chat.jsonl", "chat.jsonl.gz")
    packed.write_bytes(whole[: len(whole) // 2])
    for _ in range(2):  # what the first call left is not taken for the file
        with pytest.raises(ValueError, match=r"chat\.jsonl\.gz: damaged or cut off: Compressed file ended"):
            mix(folder, recipe)
    packed.write_bytes(whole)
    assert mix(folder, recipe).plan.rows == 400


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (TWO_SOURCES.replace("0.4", "0.5"), r"mix\.yaml:\d+: mix_ratio must sum to 1, got 1\.1"),
        (
            "total_samples: 100\ncategory_ratios: {maths: 0.5, chat: 0.5}\ndatasets:\n"
            "  math: {enabled: true, category: maths, allocation: 1.0, path: math.jsonl}\n"
            "  chat: {enabled: false, category: chat, allocation: 1.0, path: chat.jsonl}\n",
            r"no dataset of chat is enabled, which has 0\.5 of the mix: enable chat, or set chat: 0 and",
        ),
    ],
)
def test_a_recipe_that_does_not_add_up_says_where_and_what_to_do(folder: Path, recipe: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mix(folder, recipe)
    assert not (folder / "data").exists()


# --- the hub

FAR = """
datasets:
  - {name: far, mix_ratio: 0.6, max_samples: 60, hub: org/far, file: rows.jsonl}
  - {name: chat, mix_ratio: 0.4, max_samples: 40, path: chat.jsonl}
"""


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of this project are short, those inside the hub's client are not waited out."""
    monkeypatch.setattr(mixture.fetch, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(mixture.fetch, "PATIENCE_SECONDS", 0.2)
    clock = SimpleNamespace(sleep=lambda seconds: None, time=mixture.fetch.time.time)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)


def test_a_hub_that_is_busy_is_asked_again_and_one_that_stays_away_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, no_waiting: None
) -> None:
    with played_hub(folder / "hub", monkeypatch, folder / "cache") as hub:
        hub.write("org/far/rows.jsonl", "".join(json.dumps(code_row(number)) + "\n" for number in range(200)))
        hub.faults = [Fault("resolve", 429, times=10**6, headers={"Retry-After": "0"})]
        with pytest.raises(HubUnavailableError, match=r"org/far: the hub answers 429, for \d+ s; try again later"):
            mix(folder, FAR)
        assert not list((folder / "data").rglob("FETCHED.json")) and not list((folder / "data").rglob("MIXED"))
        hub.faults = [Fault("api/datasets/org/far", 429, headers={"Retry-After": "0"}), Fault("resolve", 503)]
        result = mix(folder, FAR)
        assert not any(fault.times for fault in hub.faults)
        assert {source.name: source.rows for source in result.plan.sources} == {"far": 60, "chat": 40}

        point_clients_at("http://127.0.0.1:9", monkeypatch, folder / "another-cache")
        assert mix(folder, FAR) == result, "what is here needs no hub"
        with pytest.raises(
            HubUnavailableError, match=r"org/far: the hub does not answer \(\w+\), for \d+ s; try again"
        ):
            mix(folder, FAR, data=folder / "elsewhere")
        assert not list((folder / "elsewhere").rglob("MIXED"))


# --- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, to be made larger or smaller."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a full disk needs a small one, and mounting one failed: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.chain
@pytest.mark.parametrize("more", ["", "compress: zstd", pytest.param("dedup: {near: true}", marks=needs_rensa)])
def test_a_disk_that_fills_again_and_again_loses_nothing(
    folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    monkeypatch.setattr(scan, "CHUNK_BYTES", 40_000)
    monkeypatch.setattr(scatter, "BUCKET_BYTES", 100_000)
    (folder / "code.json").write_text(json.dumps([code_row(number) for number in range(600)]))
    recipe = f"""
category_ratios: {{maths: 0.5, code: 0.5}}
total_samples: 1000
{more}
datasets:
  math: {{category: maths, allocation: 1.0, path: math.jsonl}}
  code: {{category: code, allocation: 1.0, path: code.json}}
"""
    unbroken = output(mix(folder, recipe, data=folder / "whole"))
    told: list[str] = []
    result = None
    for kilobytes in range(80, 20_000, 80):
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", small_disk], check=True)
        try:
            result = mix(folder, recipe, data=small_disk / "data")
            break
        except (OSError, ValueError) as error:
            told.append(str(error).replace(str(small_disk), ""))
        assert not list(small_disk.rglob("MIXED")), "nothing half-written is taken for done"
    assert result is not None
    assert output(result) == unbroken
    assert all("make room" in line for line in told)
    for step in ("/data/sources/", "/data/mixtures/scans/", "/near-" if "near" in more else "/scatter-"):
        assert any(step in line for line in told), told
