"""Rows of the hub come as JSONL, with patience and only once; a server on this machine plays the hub."""

from __future__ import annotations

import email.utils
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet
import pytest
from dataset_hub import COMMIT, TOKEN, DatasetHub, Fault, played_hub, point_clients_at
from huggingface_hub import close_session
from rich.console import Console

import mixture.fetch
from mixture.fetch import FetchDisplay, HubUnavailableError, fetch_split, pinned, wait_seconds
from mixture.hub import HubSource

ROWS = [{"question": f"{number} + 1?", "answer": str(number + 1)} for number in range(50)]


def parquet(rows: list[dict[str, object]]) -> bytes:
    file = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=10)
    return file.getvalue()


def jsonl(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DatasetHub]:
    """A hub with one data set in Parquet and one in JSON; waits are short."""
    monkeypatch.setattr(mixture.fetch, "FIRST_WAIT_SECONDS", 0.01)
    # The client's own waits, a minute in all, are not waited out.
    clock = SimpleNamespace(sleep=lambda seconds: None, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    with played_hub(tmp_path / "hub", monkeypatch, tmp_path / "cache") as hub:
        hub.write("org/sums/data/train-00000-of-00002.parquet", parquet(ROWS[:20]))
        hub.write("org/sums/data/train-00001-of-00002.parquet", parquet(ROWS[20:40]))
        hub.write("org/sums/data/test-00000-of-00001.parquet", parquet(ROWS[40:]))
        hub.write("org/lines/rows.json", json.dumps(ROWS, indent=1))
        hub.write("org/lines/rows.jsonl", jsonl(ROWS))
        yield hub


def source(name: str = "org/sums", **fields: object) -> HubSource:
    given = {"revision": COMMIT, "licence": "MIT", "commercial_use": True, "format": "question/answer", **fields}
    return HubSource(id=name, **given)  # type: ignore[arg-type]


def fetch(wanted: HubSource, folder: Path, split: str = "train", **options: object) -> list[str]:
    """Fetch a split and give back what was reported."""
    told: list[str] = []
    with FetchDisplay(told.append, Console(file=io.StringIO())) as display:
        fetch_split(wanted, split, folder, display.task("sums"), **options)  # type: ignore[arg-type]
    return told


def rows_in(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for part in sorted(folder.glob("part-*")) for line in part.read_text().splitlines()]


def test_a_split_comes_as_one_part_for_each_file_and_is_not_asked_for_again(hub: DatasetHub, tmp_path: Path) -> None:
    wanted = source(files={"train": "data/train-*.parquet"})
    told = fetch(wanted, tmp_path / "out")
    assert rows_in(tmp_path / "out") == ROWS[:40]
    assert [path.name for path in sorted((tmp_path / "out").glob("part-*"))] == ["part-00000.jsonl", "part-00001.jsonl"]
    assert any("fetching 2 files" in line and "of org/sums" in line for line in told)
    hub.asked_for.clear()
    fetch(wanted, tmp_path / "out")
    assert hub.asked_for == []


def test_without_file_patterns_the_files_are_those_that_datasets_chooses(hub: DatasetHub, tmp_path: Path) -> None:
    fetch(source(splits={"validation": "test"}), tmp_path / "out", split="validation")
    assert rows_in(tmp_path / "out") == ROWS[40:]
    with pytest.raises(ValueError, match="org/sums on the hub has no split 'dev', only train, test"):
        fetch(source(), tmp_path / "other", split="dev")


def test_json_arrays_and_lines_of_the_hub_are_read_and_patterns_keep_their_order(
    hub: DatasetHub, tmp_path: Path
) -> None:
    fetch(source("org/lines", files={"train": ["rows.jsonl", "rows.json"]}), tmp_path / "out")
    assert rows_in(tmp_path / "out") == [*ROWS, *ROWS]


def test_a_hub_that_is_busy_or_broken_is_asked_again(hub: DatasetHub, tmp_path: Path) -> None:
    hub.faults = [
        Fault("api/datasets/org/lines/tree", 429, headers={"Retry-After": "30"}),
        Fault("resolve", 503, times=2),
        Fault("resolve", 500, times=2),
    ]
    fetch(source("org/lines", files={"train": "rows.jsonl"}), tmp_path / "out")
    assert rows_in(tmp_path / "out") == ROWS and not any(fault.times for fault in hub.faults)


def test_calls_that_the_hubs_client_makes_only_once_are_made_again_as_the_hub_asks(
    hub: DatasetHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(mixture.fetch.time, "sleep", waits.append)
    told: list[str] = []
    hub.faults = [
        Fault("api/datasets/org/sums", 503, times=2),
        Fault("api/datasets/org/sums", 429, headers={"Retry-After": "90"}),
    ]
    with FetchDisplay(told.append, Console(file=io.StringIO())) as display:
        assert pinned(source(revision="main"), display.task("sums")).revision == COMMIT
    assert waits == [0.01, 0.02, 90.0]
    assert told == [
        "sums: the hub answers 503; trying again in 0 s",
        "sums: the hub answers 503; trying again in 0 s",
        "sums: the hub answers 429; trying again in 90 s",
    ]


def test_waits_double_unless_the_hub_asks_for_one_in_seconds_or_as_a_date() -> None:
    def answer(**headers: str) -> Exception:
        error = Exception()
        error.response = SimpleNamespace(status_code=429, headers=headers)  # type: ignore[attr-defined]
        return error

    first = mixture.fetch.FIRST_WAIT_SECONDS
    assert [wait_seconds(answer(), attempt) for attempt in (1, 2, 3)] == [first, 2 * first, 4 * first]
    assert wait_seconds(answer(**{"Retry-After": "7"}), 1) == 7.0
    soon = email.utils.formatdate(time.time() + 20, usegmt=True)
    assert 17 < wait_seconds(answer(**{"Retry-After": soon}), 1) <= 20
    assert wait_seconds(answer(**{"Retry-After": "86400"}), 1) == mixture.fetch.LONGEST_WAIT_SECONDS


def test_a_fetch_cut_off_goes_on_with_the_files_it_lacks(hub: DatasetHub, tmp_path: Path) -> None:
    wanted = source(files={"train": "data/train-*.parquet"})
    hub.faults = [Fault("train-00001-of-00002.parquet", 404, times=100, headers={"X-Error-Code": "EntryNotFound"})]
    with pytest.raises(ValueError, match="the hub has no such file"):
        fetch(wanted, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part-00000.jsonl"]
    hub.faults.clear()
    hub.asked_for.clear()
    fetch(wanted, tmp_path / "out")
    assert rows_in(tmp_path / "out") == ROWS[:40]
    assert not any("train-00000-of" in line for line in hub.asked_for)


def test_no_more_files_are_begun_than_the_wanted_rows_need(hub: DatasetHub, tmp_path: Path) -> None:
    fetch(source(files={"train": "data/train-*.parquet"}), tmp_path / "out", max_rows=12)
    assert rows_in(tmp_path / "out") == ROWS[:12]
    assert not any("train-00001-of" in line for line in hub.downloads())


def test_of_wide_files_only_the_wanted_columns_are_fetched(hub: DatasetHub, tmp_path: Path) -> None:
    wide = [{"question": f"{number}?", "page": os.urandom(100_000).hex()} for number in range(20)]
    hub.write("org/wide/rows.parquet", parquet(wide))
    size = (hub.folder / "org/wide/rows.parquet").stat().st_size
    fetch(source("org/wide", files={"train": "rows.parquet"}, columns=["question"]), tmp_path / "out")
    assert rows_in(tmp_path / "out") == [{"question": row["question"]} for row in wide]
    assert hub.bytes_sent < size / 2
    with pytest.raises(ValueError, match="has no column answer, only question, page"):
        fetch(source("org/wide", files={"train": "rows.parquet"}, columns=["answer"]), tmp_path / "other")


def test_rows_are_written_as_the_dataset_module_reads_them(hub: DatasetHub, tmp_path: Path) -> None:
    def read_rows(rows):  # type: ignore[no-untyped-def]
        for row in rows:
            if int(row["answer"]) % 2:
                yield {"text": row["question"]}
                yield {"text": row["answer"]}

    fetch(source("org/lines", files={"train": "rows.jsonl"}), tmp_path / "out", read_rows=read_rows)
    assert rows_in(tmp_path / "out")[:4] == [{"text": "0 + 1?"}, {"text": "1"}, {"text": "2 + 1?"}, {"text": "3"}]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            source("org/missing", files={"train": "*"}),
            "org/missing: the hub has no data set of that id, or it is private",
        ),
        (source(revision="0" * 40, files={"train": "*"}), "org/sums has no revision 0000"),
        (source(files={"train": "train/*.parquet"}), "the hub has no such file or folder"),
        (source(files={"train": "*.csv"}), "org/sums at .* has no files for split train"),
    ],
)
def test_what_the_hub_does_not_have_is_told_at_once(
    hub: DatasetHub, tmp_path: Path, wanted: HubSource, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fetch(wanted, tmp_path / "out")
    assert len(hub.asked_for) == 1


@pytest.mark.parametrize("columns", [None, ["question"]])
def test_a_gated_set_says_how_to_be_let_in_and_no_token_is_told_or_written(
    hub: DatasetHub, tmp_path: Path, columns: list[str] | None, caplog: pytest.LogCaptureFixture
) -> None:
    hub.gated.add("org/sums")
    with pytest.raises(ValueError) as raised:
        fetch(source(files={"train": "data/train-*.parquet"}, columns=columns), tmp_path / "out")
    assert "org/sums is gated (the token that is set has no access): accept its terms at https://" in str(raised.value)
    assert "then set HF_TOKEN or run `hf auth login`" in str(raised.value)
    written = [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN in text for text in [str(raised.value), caplog.text, *written])


def test_a_hub_that_is_down_is_told_after_all_attempts(
    hub: DatasetHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_clients_at("http://127.0.0.1:9", monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(mixture.fetch, "PATIENCE_SECONDS", 0.2)
    wanted = source(files={"train": "data/train-*.parquet"})
    with pytest.raises(
        HubUnavailableError, match=r"org/sums: the hub does not answer \(ConnectError\), for 0 s; try again"
    ):
        fetch(wanted, tmp_path / "out")


@pytest.mark.parametrize("fields", [{"files": {"train": "data/train-*.parquet"}}, {}, {"revision": None}])
def test_where_fetching_is_forbidden_that_is_told_at_once(
    hub: DatasetHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, object]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    close_session()
    told = r"org/sums at .* is not here, and HF_HUB_OFFLINE is set: fetch it where there is a network"
    with FetchDisplay(lambda line: None) as display, pytest.raises(ValueError, match=told):
        task = display.task("sums")
        fetch_split(pinned(source(**fields), task), "train", tmp_path / "out", task)
    assert hub.asked_for == []
    close_session()


def test_a_branch_is_pinned_to_its_commit_and_the_licence_is_asked_for(hub: DatasetHub) -> None:
    hub.licences["org/sums"] = "cc-by-4.0"
    with FetchDisplay(print) as display:
        found = pinned(source(revision=None, licence=None), display.task("sums"))
        assert (found.revision, found.licence) == (COMMIT, "cc-by-4.0")
        hub.asked_for.clear()
        assert pinned(source(), display.task("sums")) == source()
    assert hub.asked_for == []


def test_on_a_terminal_one_bar_a_source_is_drawn(hub: DatasetHub, tmp_path: Path) -> None:
    screen = io.StringIO()
    with FetchDisplay(lambda line: None, Console(file=screen, force_terminal=True, width=100)) as display:
        fetch_split(source("org/lines", files={"train": "rows.jsonl"}), "train", tmp_path / "out", display.task("sums"))
    assert "sums" in screen.getvalue() and "━" in screen.getvalue()
