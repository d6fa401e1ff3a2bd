"""Every source of a mixture is opened as JSONL, with its origin on record and its licence respected."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from dataset_hub import COMMIT, DatasetHub, Fault, played_hub

import mixture.fetch
from mixture.fetch import HubUnavailableError
from mixture.recipe import FallbackConfig, SourceConfig
from mixture.row_files import array_lines, json_lines
from mixture.sources import OpenedSource, Origin, download_sizes, open_sources, write_attribution

PROJECT = Path(__file__).parents[1]
ROWS = [{"question": f"{number} + 1? é\n", "answer": str(number + 1)} for number in range(40)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@dataclass
class Opener:
    """Opens sources in a folder, and keeps what is reported."""

    folder: Path
    project: Path = PROJECT
    told: list[str] = field(default_factory=list)

    def __call__(self, *sources: SourceConfig, **options: object) -> list[OpenedSource]:
        return open_sources(
            sources,
            data_dir=self.folder / "data",
            folders=[self.folder / "recipes", self.folder],
            project=self.project,
            report=self.told.append,
            **options,  # type: ignore[arg-type]
        )

    def one(self, **fields: object) -> OpenedSource:
        return self(SourceConfig(name="mine", **fields))[0]  # type: ignore[arg-type]


@pytest.fixture
def opener(tmp_path: Path) -> Opener:
    return Opener(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DatasetHub]:
    monkeypatch.setattr(mixture.fetch, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(mixture.fetch, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with played_hub(tmp_path / "hub", monkeypatch, tmp_path / "cache") as hub:
        for name in ("org/first", "org/second", "org/third"):
            hub.write(f"{name}/train.jsonl", json.dumps({"text": name}) + "\n")
        yield hub


def rows(opened: OpenedSource) -> list[dict[str, object]]:
    return [json.loads(line) for file in opened.files for line in file.read_text().splitlines()]


# --- files


def test_jsonl_is_used_where_it_is(opener: Opener, tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.ndjson", "lines.json"):
        path = tmp_path / name
        path.write_bytes(LINES)
        assert opener.one(path=str(path)).files == (path,)
    assert not (tmp_path / "data").exists()


def table() -> pa.Table:
    return pa.Table.from_pylist(ROWS)


WRITERS = {
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, ensure_ascii=False)),
    "indented.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "marked.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES),
    "rows.parquet": lambda path: pa.parquet.write_table(table(), path),
    "rows.csv": lambda path: pa.csv.write_csv(table(), path),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES)),
    "rows.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES)),
    "rows.jsonl.zst": lambda path: path.write_bytes(pa.compress(LINES, codec="zstd", asbytes=True)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_other_kind_of_file_is_converted_once(opener: Opener, tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    first = opener.one(path=name)
    assert rows(first) == ROWS
    assert first.files[0].parent.parent == tmp_path / "data/sources"
    stamp = first.files[0].stat().st_mtime_ns
    assert opener.one(path=name).files[0].stat().st_mtime_ns == stamp
    os.utime(tmp_path / name, ns=(1, 1))
    assert opener.one(path=name).files != first.files


def test_each_line_of_text_that_is_not_blank_is_a_row(opener: Opener, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Once\r\n\n  upon a time \n")
    assert rows(opener.one(path="book.txt")) == [{"text": "Once"}, {"text": "  upon a time "}]


def test_values_that_json_does_not_know_are_written_as_text(opener: Opener, tmp_path: Path) -> None:
    import datetime
    import decimal

    row = {"text": "a", "day": datetime.date(2026, 1, 2), "price": decimal.Decimal("1.50"), "raw": b"\x00\xff"}
    pa.parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert rows(opener.one(path="rows.parquet")) == [{"text": "a", "day": "2026-01-02", "price": "1.50", "raw": "AP8="}]


def test_folders_globs_and_lists_are_read_in_a_fixed_order(opener: Opener, tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a.jsonl", "b/1.jsonl.gz", ".hidden/3.jsonl", "notes.md"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"text": name}).encode() + b"\n"
        (tmp_path / "set" / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert [row["text"] for row in rows(opener.one(path="set"))] == ["a.jsonl", "b/1.jsonl.gz", "b/2.jsonl"]
    assert [row["text"] for row in rows(opener.one(path="set/**/*.jsonl*"))][-2:] == ["b/1.jsonl.gz", "b/2.jsonl"]
    listed = opener.one(path=["set/b/2.jsonl", "set/a.jsonl"])
    assert [row["text"] for row in rows(listed)] == ["b/2.jsonl", "a.jsonl"]
    with pytest.raises(ValueError, match=r"mine: path names .*a\.jsonl more than once"):
        opener.one(path=["set", "set/a.jsonl"])


def test_a_folder_with_the_same_name_in_two_forms_is_refused(opener: Opener, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    with pytest.raises(ValueError, match=r"holds rows\.json and rows\.jsonl, maybe the same rows twice: name one"):
        opener.one(path=".")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl.gz",
            gzip.compress(os.urandom(9000))[:4000],
            r"a\.jsonl\.gz: damaged or cut off: Compressed file ended",
        ),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: damaged or cut off: Not a gzipped file"),
        ("a.jsonl.xz", lzma.compress(os.urandom(9000))[:4000], "damaged or cut off"),
        ("a.jsonl.bz2", bz2.compress(os.urandom(9000))[:4000], "damaged or cut off"),
        (
            "a.jsonl.zst",
            pa.compress(os.urandom(9000), codec="zstd", asbytes=True)[:4000],
            "damaged or cut off: Truncated",
        ),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: damaged, or no Parquet file"),
        ("a.json", b'[{"text": "a"}, {"text"', r"a\.json: JSON array: .* in or after '\{\"text\"'"),
        ("a.json", b'[{"text": "a"}, ', "the JSON array does not end"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "'{' between two elements of the JSON array"),
        ("a.json", b'[{"text": "a"}] []', "holds something after the JSON array"),
        ("a.json", b'{\n "data": [\n {}]}', "holds one JSON object over several lines, not rows"),
        ("a.json", b"[" * 100_000, "nested too deeply|in or after"),
        ("a.csv", b"a,a\n1,2\n", "its first line must name the columns, each once"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv: line 3 has 1 values for 2 columns"),
        ("a.csv", b"a,b\n1,\xff\n", "not UTF-8"),
        ("a.txt", b"good\n\xff\n", r"a\.txt: line 2: not UTF-8"),
        ("a.xml", b"<rows/>", "a file of unknown kind; known endings: .jsonl, .ndjson, .json, .parquet"),
    ],
)
def test_a_damaged_file_is_told_and_leaves_nothing_that_looks_done(
    opener: Opener, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        opener.one(path=name)
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_bytes_that_are_no_utf8_and_lone_surrogates_stay_in_their_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"text": "good"}, {"text": "\xff bad"}, {"text": "\\ud800"}]')
    assert list(json_lines(path)) == [b'{"text": "good"}\n', b'{"text": "\xff bad"}\n', b'{"text": "\\ud800"}\n']


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_a_json_array_is_cut_into_the_same_rows_wherever_its_blocks_end(size: int) -> None:
    values = [{"a": 'x"]}{[\\\n é\u2028'}, [1, [2, {"b": None}]], 12345, -1.5e-7, True, "text", {}, [], None]
    for text in (json.dumps(values), json.dumps(values, indent=2, ensure_ascii=False), " [ ] ", "[]"):
        blocks = [text.encode()[place : place + size] for place in range(0, len(text.encode()), size)]
        lines = list(array_lines(iter(blocks)))
        assert [json.loads(line) for line in lines] == json.loads(text)
        assert all(line.count(b"\n") == 1 for line in lines)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak of memory from")
def test_a_large_json_array_is_converted_in_little_memory(tmp_path: Path) -> None:
    row = json.dumps({"text": "x" * 10_000})
    with (tmp_path / "big.json").open("w") as file:
        file.write("[" + ",\n".join([row] * 15_000) + "]")  # 150 MB
    program = (
        "import re, sys; from pathlib import Path; from mixture.row_files import json_lines, write_lines\n"
        "write_lines(json_lines(Path(sys.argv[1])), Path(sys.argv[2]))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "big.json"), str(tmp_path / "big.jsonl")]
    answer = subprocess.run(arguments, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert int(answer.stdout) < 120_000  # kB
    with (tmp_path / "big.jsonl").open("rb") as file:
        assert sum(1 for _ in file) == 15_000


def test_a_path_that_is_not_there_names_where_it_was_looked_for(opener: Opener, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mine: no file with rows at absent/\*\.jsonl") as raised:
        opener.one(path="absent/*.jsonl")
    assert str(tmp_path / "recipes/absent") in str(raised.value)


# --- dataset modules


def test_a_dataset_module_without_a_hub_is_run_and_its_rows_kept(opener: Opener) -> None:
    train, again = opener(SourceConfig(name="synthetic_dataset"), SourceConfig(name="synthetic_dataset"))
    test = opener(SourceConfig(name="synthetic_dataset"), split="test")[0]
    assert (len(rows(train)), len(rows(test))) == (800, 200)
    assert train.files == again.files and not {json.dumps(row) for row in rows(train)} & set(
        map(json.dumps, rows(test))
    )
    assert train.origin.licence == "CC0-1.0" and train.origin.place == "synthetic_dataset.py"


def test_a_name_that_is_no_module_says_what_else_could_be_given(opener: Opener) -> None:
    with pytest.raises(ValueError, match=r"gsm9k: no path, hub or file is given, and .*did you mean gsm8k\?"):
        opener(SourceConfig(name="gsm9k"))


MODULE = """
from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="org/first", files={"train": "{part}.jsonl"}, licence="MIT", commercial_use=True, format="text",
    rows={"train": 1}, options={"part": "train"}, fallback=[
        {"id": "org/second", "files": {"train": "train.jsonl"}, "licence": "CC-BY-SA-4.0"},
        {"id": "org/third", "files": {"train": "train.jsonl"}, "licence": "CC-BY-NC-4.0", "commercial_use": False},
    ])

def read_rows(rows):
    for row in rows:
        yield {"text": "read " + row["text"]}

get_custom_dataset = HubRows(SOURCE, read_rows)
"""


@pytest.fixture
def project(tmp_path: Path, opener: Opener) -> Path:
    """A project whose only dataset module has a chain of three places on the hub."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets/chain.py").write_text(MODULE)
    opener.project = tmp_path
    return tmp_path


def test_a_module_of_the_hub_is_fetched_as_it_reads_its_rows(opener: Opener, project: Path, hub: DatasetHub) -> None:
    opened = opener(SourceConfig(name="chain"))[0]
    assert rows(opened) == [{"text": "read org/first"}]
    assert opened.origin == Origin(
        name="chain",
        place="org/first",
        revision=COMMIT,
        split="train",
        licence="MIT",
        commercial_use=True,
        rows=1,
    )
    hub.asked_for.clear()
    assert opener(SourceConfig(name="chain")) == [opened] and hub.asked_for == []


@pytest.mark.parametrize("failing", [["org/first"], ["org/first", "org/second"]])
def test_a_place_that_cannot_be_had_gives_way_to_the_next_and_stays_chosen(
    opener: Opener, project: Path, hub: DatasetHub, failing: list[str]
) -> None:
    hub.gated.add("org/first")
    hub.faults = [Fault(name, 503, times=1000) for name in failing[1:]]
    opened = opener(SourceConfig(name="chain"), allow_non_commercial=True)[0]
    used = ["org/first", "org/second", "org/third"][len(failing)]
    assert rows(opened) == [{"text": f"read {used}"}] and opened.origin.choice == len(failing)
    assert any("org/first is gated" in line and "trying the next of 3 places" in line for line in opener.told)
    assert f"chain: used fallback {len(failing)}: {used}" in opener.told
    hub.gated.clear()
    hub.faults.clear()
    hub.asked_for.clear()
    assert opener(SourceConfig(name="chain"), allow_non_commercial=True) == [opened] and hub.asked_for == []


def test_when_no_place_can_be_had_all_reasons_are_told(opener: Opener, project: Path, hub: DatasetHub) -> None:
    hub.gated |= {"org/first", "org/second", "org/third"}
    with pytest.raises(ValueError, match="none of its 3 places can be had") as raised:
        opener(SourceConfig(name="chain"), allow_non_commercial=True)
    assert all(f"org/{name} is gated" in str(raised.value) for name in ("first", "second", "third"))
    hub.gated.clear()
    hub.faults = [Fault("org/", 503, times=10_000)]
    with pytest.raises(HubUnavailableError, match="org/second: the hub answers 503, for"):
        opener(SourceConfig(name="chain"), allow_non_commercial=True)


def test_a_fallback_for_no_commerce_is_refused_as_well(opener: Opener, project: Path, hub: DatasetHub) -> None:
    hub.gated |= {"org/first", "org/second"}
    with pytest.raises(ValueError, match=r"allow_non_commercial: true if yours is none:\n  chain: CC-BY-NC-4\.0"):
        opener(SourceConfig(name="chain"))


def test_options_reach_the_module_or_are_refused(opener: Opener, project: Path, hub: DatasetHub) -> None:
    hub.write("org/first/other.jsonl", '{"text": "other"}\n')
    assert rows(opener(SourceConfig(name="chain", options={"part": "other"}))[0]) == [{"text": "read other"}]
    (project / "datasets/counted.py").write_text(
        "def get_custom_dataset(dataset_config, processor, split):\n"
        "    return [{'text': str(number)} for number in range(dataset_config.count)]\n"
    )
    for count in (2, 3):
        assert len(rows(opener(SourceConfig(name="counted", options={"count": count}))[0])) == count
    with pytest.raises(ValueError, match="chain: chain has no option language; known: part"):
        opener(SourceConfig(name="chain", options={"language": "go"}))
    with pytest.raises(ValueError, match="mine: options are for dataset modules; path and hub take none"):
        opener.one(hub="org/first", options={"language": "go"})


# --- the hub


def test_hub_data_sets_and_hf_paths_are_named_in_the_recipe(opener: Opener, hub: DatasetHub) -> None:
    hub.licences["org/first"] = "apache-2.0"
    first, second = opener(
        SourceConfig(name="one", hub="org/first", file="train.jsonl"),
        SourceConfig(name="two", path=f"hf://datasets/org/second@{COMMIT}/train.jsonl", licence="MIT"),
    )
    assert (rows(first), rows(second)) == ([{"text": "org/first"}], [{"text": "org/second"}])
    assert (first.origin.revision, first.origin.licence) == (COMMIT, "apache-2.0")
    assert (second.origin.revision, second.origin.licence) == (COMMIT, "MIT")
    with pytest.raises(ValueError, match=r"mine: hub 'first' is not of the form ORG/NAME\[:CONFIG\]\[@REVISION\]"):
        opener.one(hub="first")
    with pytest.raises(ValueError, match="all of one data set in one source"):
        opener.one(path=["hf://datasets/org/first/a.jsonl", "hf://datasets/org/second/a.jsonl"])


def test_a_recipes_own_fallbacks_are_tried_in_their_order(opener: Opener, hub: DatasetHub, tmp_path: Path) -> None:
    (tmp_path / "here.jsonl").write_text('{"text": "here"}\n')
    places = [FallbackConfig(hub="org/missing"), FallbackConfig(path="here.jsonl", licence="MIT")]
    opened = opener.one(hub="org/gone", fallback=places)
    assert rows(opened) == [{"text": "here"}] and opened.origin.choice == 2 and opened.origin.licence == "MIT"


def test_the_size_of_a_download_is_known_before_it(opener: Opener, hub: DatasetHub, tmp_path: Path) -> None:
    (tmp_path / "here.jsonl").write_text("{}\n")
    sources = [SourceConfig(name="far", hub="org/first", file="*.jsonl"), SourceConfig(name="near", path="here.jsonl")]
    where = {"data_dir": tmp_path / "data", "folders": [tmp_path], "project": PROJECT, "report": opener.told.append}
    size = (hub.folder / "org/first/train.jsonl").stat().st_size
    assert download_sizes(sources, **where) == {"far": size, "near": 0} and hub.downloads() == []  # type: ignore[arg-type]
    opener(*sources)
    assert download_sizes(sources, **where) == {"far": 0, "near": 0}  # type: ignore[arg-type]


# --- licences, lock files


@pytest.mark.parametrize("licence", ["CC-BY-NC-4.0", "cc-by-nc-sa-4.0", "Creative Commons NonCommercial"])
def test_rows_that_forbid_commercial_use_are_refused_unless_allowed(
    opener: Opener, tmp_path: Path, licence: str
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    with pytest.raises(ValueError, match="these sources do not allow commercial use"):
        opener.one(path="rows.jsonl", licence=licence)
    wanted = SourceConfig(name="mine", path="rows.jsonl", licence=licence)
    assert opener(wanted, allow_non_commercial=True)[0].origin.commercial_use is False


def test_a_licence_that_only_the_hub_states_is_respected_before_anything_is_fetched(
    opener: Opener, hub: DatasetHub
) -> None:
    hub.licences["org/first"] = "cc-by-nc-4.0"
    with pytest.raises(ValueError, match=r"mine: cc-by-nc-4\.0"):
        opener.one(hub="org/first", file="train.jsonl")
    assert hub.downloads() == []


def test_attribution_names_each_source_and_what_its_licence_asks_for(tmp_path: Path) -> None:
    one = Origin(name="b", place="org/b", revision=COMMIT, split="train", licence="CC-BY-SA-4.0", commercial_use=True)
    two = replace(one, name="a", place="/data/a.jsonl", licence=None, commercial_use=None)
    write_attribution(tmp_path / "ATTRIBUTION.md", [one, two])
    text = (tmp_path / "ATTRIBUTION.md").read_text()
    assert text.index("## a") < text.index("## b") and COMMIT in text
    assert "- share alike:" in text.partition("## b")[2] and "share alike" not in text.partition("## b")[0]
    assert "none stated: ask the authors" in text


def test_frozen_takes_the_place_and_commit_of_the_lock_file_and_nothing_else(
    opener: Opener, project: Path, hub: DatasetHub, tmp_path: Path
) -> None:
    hub.gated.add("org/first")
    wanted = SourceConfig(name="chain")
    opened = opener(wanted)[0]
    lock = {"chain": opened.origin}

    hub.gated.clear()
    other = Opener(tmp_path / "elsewhere", project)
    assert other(wanted, frozen=lock)[0].origin == opened.origin
    hub.gated.add("org/second")
    with pytest.raises(ValueError, match="org/second is gated"):
        Opener(tmp_path / "third", project)(wanted, frozen=lock)
    with pytest.raises(ValueError, match="chain: split was test when the lock was written and is train now"):
        opener(wanted, frozen={"chain": replace(opened.origin, split="test")})


def test_frozen_notices_files_that_have_changed(opener: Opener, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES)
    wanted = SourceConfig(name="mine", path="rows.jsonl")
    lock = {"mine": opener(wanted)[0].origin}
    assert opener(wanted, frozen=lock)
    path.write_bytes(LINES.replace(b"answer", b"Answer", 1))
    with pytest.raises(ValueError, match=r"mine: revision was .* when the lock was written and is .* now"):
        opener(wanted, frozen=lock)
    with pytest.raises(ValueError, match="other is not in the lock file, which has mine: run once without --frozen"):
        opener(SourceConfig(name="other", path="rows.jsonl"), frozen=lock)
