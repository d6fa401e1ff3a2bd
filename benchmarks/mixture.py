"""Mix three sources by ratio, with this project's mixer and with its peers, side by side.

The work, the same for all: read 1.5 GB of JSON lines in three schemas, turn rows into text, keep 50 to 100,000
characters and at least 8 words, drop duplicates across sources by a 128-bit hash of the lower-cased text with its white
space collapsed, draw rows at 20/50/30 (the first source repeats), shuffle them as a whole, write JSON lines.

Each engine is a process of its own; what counts are CPU-seconds of its whole process tree, which say more than wall
time on a machine that does other things too. Memory is the highest sum of anonymous memory of the tree. A peer that is
not installed is skipped: pip install polars duckdb.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

SEED = 7
SHARES = {"code": 0.2, "chat": 0.5, "math": 0.3}
PRIORITY = ("math", "chat", "code")
BYTES = {"code": 0.48, "chat": 0.35, "math": 0.17}
ROWS_PER_MEGABYTE = 275
"""Rows of the mix for each megabyte of input, so that code is drawn about 1.3 times."""
MIN_CHARACTERS, MAX_CHARACTERS, MIN_WORDS = 50, 100_000, 8
DUPLICATES, DISGUISED, SHORT, EMPTY = 0.08, 0.02, 0.04, 0.005
REMEMBERED_ROWS = 3000
SHUFFLE_BUFFER = 10_000
SAMPLE_EVERY_SECONDS = 0.02
DUCKDB_MEMORY = "2GB"


@dataclass(frozen=True)
class Work:
    """What an engine is given."""

    data: Path
    output: Path
    rows: int
    workers: int

    @property
    def counts(self) -> dict[str, int]:
        """Rows to draw from each source."""
        return {source: round(self.rows * share) for source, share in SHARES.items()}

    def file(self, source: str) -> str:
        return str(self.data / f"{source}.jsonl")


@dataclass(frozen=True)
class Figures:
    """What one run cost, and what it wrote."""

    engine: str
    cpu_seconds: float
    wall_seconds: float
    anonymous_megabytes: float
    rows: dict[str, int]


# --- the engines


def mixer(work: Work) -> None:
    """This project: mixture/scan.py, dedup.py, scatter.py."""
    from mixture.dedup import find_duplicates
    from mixture.scan import ScanSource, scan_sources
    from mixture.scatter import scatter

    def keep(text: str, row: Any, read: Any) -> str | None:
        if not MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
            return "length"
        return None if len(text.split(None, MIN_WORDS - 1)) == MIN_WORDS else "few words"

    sources = [ScanSource(name=name, files=(Path(work.file(name)),), category=name, keep=keep) for name in PRIORITY]
    scan = scan_sources(sources, work.output / "scan", workers=work.workers, report=print)
    unique = find_duplicates(scan, workers=work.workers, report=print)
    rows = {("train", source): count for source, count in work.counts.items()}
    scatter(unique, rows, work.output / "out", seed=SEED, workers=work.workers, report=print)


def polars(work: Work) -> None:
    """Polars, lazily up to the unique rows, then two samples."""
    import polars as pl

    texts = {
        "code": pl.col("text"),
        "chat": pl.col("messages").list.eval(pl.element().struct.field("content")).list.join("\n"),
        "math": pl.concat_str(["question", "answer"], separator="\n"),
    }
    frames = [
        pl.scan_ndjson(work.file(source))
        .select(text=texts[source])
        .with_row_index("number")
        .with_columns(source=pl.lit(source))
        for source in PRIORITY
    ]
    normal = pl.col("text").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
    unique = (
        pl.concat(frames)
        .filter(
            pl.col("text").str.len_chars().is_between(MIN_CHARACTERS, MAX_CHARACTERS),
            pl.col("text").str.contains(rf"(?:\S+\s+){{{MIN_WORDS - 1}}}\S"),
        )
        .with_columns(high=normal.hash(1), low=normal.hash(2))
        .unique(["high", "low"], keep="first", maintain_order=True)
        .drop("high", "low")
        .collect()
    )
    drawn = []
    for source, count in work.counts.items():
        own = unique.filter(pl.col("source") == source)
        epochs, rest = divmod(count, own.height)
        drawn += [own] * epochs + [own.sample(rest, shuffle=True, seed=SEED)]
    identifier = pl.concat_str([pl.col("source"), pl.col("number").cast(pl.String)], separator="_")
    mix = pl.concat(drawn).sample(fraction=1.0, shuffle=True, seed=SEED)
    mix.select("text", id=identifier, source="source", category="source").write_ndjson(work.output / "mix.jsonl")


def duckdb(work: Work) -> None:
    """DuckDB, in SQL."""
    import duckdb

    texts = {
        "code": "text",
        "chat": "array_to_string(list_transform(messages, lambda turn: turn.content), chr(10))",
        "math": "question || chr(10) || answer",
    }
    columns = {
        "code": "{text: 'VARCHAR'}",
        "chat": "{messages: 'STRUCT(role VARCHAR, content VARCHAR)[]'}",
        "math": "{question: 'VARCHAR', answer: 'VARCHAR'}",
    }
    database = duckdb.connect(str(work.output / "work.db"))
    database.execute(f"SET memory_limit = '{DUCKDB_MEMORY}'; SET threads = {work.workers}")
    database.execute("SET preserve_insertion_order = false")
    read = " UNION ALL ".join(
        f"SELECT {texts[source]} AS text, '{source}' AS source, {place} AS priority FROM read_json("
        f"'{work.file(source)}', format = 'newline_delimited', columns = {columns[source]})"
        for place, source in enumerate(PRIORITY)
    )
    database.execute(
        f"""CREATE TABLE kept AS SELECT *, md5_number(trim(regexp_replace(lower(text), '\\s+', ' ', 'g'))) AS digest
        FROM ({read}) WHERE length(text) BETWEEN {MIN_CHARACTERS} AND {MAX_CHARACTERS}
        AND regexp_matches(text, '(\\S+\\s+){{{MIN_WORDS - 1}}}\\S')"""
    )
    database.execute(
        """CREATE TABLE chosen AS SELECT min_by(rowid, priority) AS row, min_by(source, priority) AS source
        FROM kept GROUP BY digest"""
    )
    draws = []
    for source, count in work.counts.items():
        available = database.execute("SELECT count(*) FROM chosen WHERE source = ?", [source]).fetchall()[0][0]
        epochs, rest = divmod(count, available)
        own = f"SELECT row FROM chosen WHERE source = '{source}'"
        draws += [own] * epochs + [f"(SELECT row FROM ({own}) ORDER BY hash(row, {SEED}) LIMIT {rest})"]
    database.execute(f"CREATE TABLE drawn AS {' UNION ALL '.join(draws)}")
    database.execute(
        f"""COPY (SELECT text, source || '_' || row AS id, source, source AS category
        FROM drawn JOIN kept ON kept.rowid = drawn.row ORDER BY hash(row, random()))
        TO '{work.output / "mix.jsonl"}' (FORMAT json)"""
    )


def row_text(row: dict[str, Any]) -> str:
    """The text of a row in any of the three schemas."""
    if "messages" in row:
        return "\n".join(turn["content"] for turn in row["messages"])
    return row["text"] if "text" in row else row["question"] + "\n" + row["answer"]


def long_enough(text: str) -> bool:
    return MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS and len(text.split(None, MIN_WORDS - 1)) == MIN_WORDS


def datasets(work: Work) -> None:
    """Hugging Face datasets: map, filter, select, concatenate, shuffle, to_json."""
    import xxhash
    from datasets import Dataset, concatenate_datasets, load_dataset

    seen: set[bytes] = set()
    drawn: list[Dataset] = []
    for source in PRIORITY:

        def sample(row: dict[str, Any], number: int, source: str = source) -> dict[str, Any]:
            text = row_text(row)
            digest = xxhash.xxh3_128_digest(" ".join(text.lower().split()).encode())
            return {"text": text, "id": f"{source}_{number}", "source": source, "category": source, "digest": digest}

        rows = load_dataset("json", data_files=work.file(source), split="train", cache_dir=str(work.output / "cache"))
        rows = rows.map(sample, with_indices=True, remove_columns=rows.column_names)
        rows = rows.filter(lambda text: long_enough(text), input_columns="text")
        first = []
        for batch in rows.select_columns("digest").iter(10_000):
            for digest in batch["digest"]:
                first.append(digest not in seen)
                seen.add(digest)
        rows = rows.remove_columns("digest").select([number for number, is_first in enumerate(first) if is_first])
        epochs, rest = divmod(work.counts[source], len(rows))
        drawn += [rows] * epochs + [rows.shuffle(seed=SEED).select(range(rest))]
    concatenate_datasets(drawn).shuffle(seed=SEED).to_json(str(work.output / "mix.jsonl"), lines=True)


def streaming(work: Work) -> None:
    """Hugging Face datasets, streamed: ratios are met on average only, and the shuffle sees a buffer."""
    import orjson
    import xxhash
    from datasets import interleave_datasets, load_dataset

    owners: dict[bytes, str] = {}
    streams = []
    for source in SHARES:

        def sample(row: dict[str, Any], number: int, source: str = source) -> dict[str, Any]:
            return {"text": row_text(row), "id": f"{source}_{number}", "source": source, "category": source}

        def is_first(row: dict[str, Any]) -> bool:
            # An owner, not a set of what was seen: the stream starts again where a source repeats.
            digest = xxhash.xxh3_128_digest(" ".join(row["text"].lower().split()).encode())
            return owners.setdefault(digest, row["id"]) == row["id"]

        stream = load_dataset("json", data_files=work.file(source), split="train", streaming=True)
        columns = {"code": ["path", "license", "stars"], "chat": ["messages"], "math": ["question", "answer"]}
        stream = stream.map(sample, with_indices=True, remove_columns=columns[source])
        stream = stream.filter(lambda row: long_enough(row["text"]))
        streams.append(stream.filter(is_first))
    mix = interleave_datasets(streams, list(SHARES.values()), seed=SEED, stopping_strategy="all_exhausted")
    with (work.output / "mix.jsonl").open("wb") as output:
        for row in mix.shuffle(seed=SEED, buffer_size=SHUFFLE_BUFFER).take(work.rows):
            output.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))


ENGINES: dict[str, Callable[[Work], None]] = {
    "mixer": mixer,
    "polars": polars,
    "duckdb": duckdb,
    "datasets": datasets,
    "streaming": streaming,
}
NEEDS = {"mixer": "orjson", "polars": "polars", "duckdb": "duckdb", "datasets": "datasets", "streaming": "datasets"}


# --- the data


class Texts:
    """Texts that rows are made of: conversations and documents."""

    def __init__(self, paths: list[Path]) -> None:
        self.conversations: list[tuple[str, str]] = []
        self.problems: list[tuple[str, str]] = []
        self.documents: list[str] = []
        files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        for file in files:
            self.add(file)
        if not self.documents or not self.conversations:
            self.add_standard_library()
        if not self.problems:
            self.problems = [word_problem(random.Random(number)) for number in range(5000)]

    def add(self, file: Path) -> None:
        """Take the rows of a JSON file, or a text file as a document."""
        if file.suffix in (".json", ".jsonl"):
            for row in json_rows(file):
                if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
                    self.problems.append((row["question"], row["answer"]))
                elif row.get("instruction") and row.get("output"):
                    question = f"{row['instruction']}\n\n{row.get('input') or ''}".strip()
                    self.conversations.append((question, row["output"]))
        elif file.suffix in (".py", ".txt", ".md", ".js", ".c", ".rs", ".go") and file.is_file():
            self.documents.append(file.read_text(errors="replace"))

    def add_standard_library(self) -> None:
        """Take Python's own library: its sources are the documents, its docstrings the conversations."""
        for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*/*.py"))[:900]:
            source = file.read_text(errors="replace")
            self.documents.append(source)
            try:
                tree = ast.parse(source)
            except (SyntaxError, ValueError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (about := ast.get_docstring(node)):
                    self.conversations.append((f"What does {node.name} of {file.stem} do, and how is it used?", about))


def json_rows(file: Path) -> list[dict[str, Any]]:
    """The objects in a JSON or JSONL file."""
    content = file.read_text()
    rows = [json.loads(line) for line in content.splitlines()] if file.suffix == ".jsonl" else json.loads(content)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def word_problem(numbers: random.Random) -> tuple[str, str]:
    a, b, c = (numbers.randrange(2, 90) for _ in range(3))
    name = numbers.choice(["Ada", "Emmy", "Kurt", "Alan", "Sofia", "Carl"])
    thing = numbers.choice(["apples", "pencils", "stamps", "marbles", "books"])
    question = (
        f"{name} has {a} {thing}, buys {b} bags with {c} {thing} in each, and then gives half of all of them to a "
        f"friend who had none before. How many {thing} does {name} have in the end, rounded down?"
    )
    return (
        question,
        f"The bags hold {b} * {c} = {b * c}.\nTogether {a} + {b * c} = {a + b * c}.\n#### {(a + b * c) // 2}",
    )


NUMBER = re.compile(r"\d+")


class RowMaker:
    """Rows of the three schemas, every one different, but for those that are repeated on purpose."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.random = random.Random(SEED)
        self.words = [word for question, _ in texts.conversations[:2000] for word in question.split()]

    def varied(self, text: str) -> str:
        """The text with other numbers, and some words that come from elsewhere."""
        text = NUMBER.sub(lambda found: str(self.random.randrange(10 ** len(found[0][:6]))), text)
        words = text.split(" ")
        for _ in range(1 + len(words) // 40):
            words[self.random.randrange(len(words))] = self.random.choice(self.words)
        return " ".join(words)

    def code(self, number: int) -> dict[str, Any]:
        document = self.random.choice(self.texts.documents)
        start = self.random.randrange(max(1, len(document) - 4000))
        text = self.varied(document[start : start + int(self.random.lognormvariate(8.8, 0.9))])
        return {"text": text, "path": f"src/{number}.py", "license": "mit", "stars": self.random.randrange(1000)}

    def chat(self, number: int) -> dict[str, Any]:
        turns = []
        for _ in range(self.random.choice((1, 2, 3))):
            question, answer = self.random.choice(self.texts.conversations)
            turns += [{"role": "user", "content": self.varied(question)}]
            turns += [{"role": "assistant", "content": self.varied(answer)}]
        return {"messages": turns}

    def math(self, number: int) -> dict[str, Any]:
        question, answer = self.random.choice(self.texts.problems)
        return {"question": self.varied(question), "answer": self.varied(answer)}

    def rows(self, source: str) -> Iterator[dict[str, Any]]:
        """Endless rows: most new, some repeated, some repeated in other case and spacing, some short, some empty."""
        make = {"code": self.code, "chat": self.chat, "math": self.math}[source]
        remembered: list[dict[str, Any]] = []
        number = 0
        while True:
            number += 1
            dice = self.random.random()
            if dice < DUPLICATES and remembered:
                yield self.random.choice(remembered)
            elif dice < DUPLICATES + DISGUISED and remembered:
                yield changed(self.random.choice(remembered), lambda text: "  " + text.upper().replace(" ", "\n") + " ")
            elif dice < DUPLICATES + DISGUISED + SHORT:
                yield changed(make(number), lambda text: text[:9])
            elif dice < DUPLICATES + DISGUISED + SHORT + EMPTY:
                yield changed(make(number), lambda text: "")
            else:
                row = make(number)
                if len(remembered) < REMEMBERED_ROWS:
                    remembered.append(row)
                else:
                    remembered[self.random.randrange(REMEMBERED_ROWS)] = row
                yield row


def changed(row: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The row with every text changed."""
    if "messages" in row:
        return {"messages": [turn | {"content": change(turn["content"])} for turn in row["messages"]]}
    return row | {key: change(row[key]) for key in ("text", "question", "answer") if key in row}


def generate(folder: Path, megabytes: int, texts: Texts) -> None:
    """Write the three sources."""
    folder.mkdir(parents=True)
    maker = RowMaker(texts)
    for source, share in BYTES.items():
        left = megabytes * 1e6 * share
        with (folder / f"{source}.jsonl").open("w") as file:
            for row in maker.rows(source):
                left -= file.write(json.dumps(row, ensure_ascii=False) + "\n")
                if left <= 0:
                    break


# --- measuring


def measure(engine: str, work: Work) -> Figures:
    """Run one engine in a process of its own and read what it cost."""
    shutil.rmtree(work.output, ignore_errors=True)
    work.output.mkdir(parents=True)
    environment = os.environ | {
        "POLARS_MAX_THREADS": str(work.workers),
        "OMP_NUM_THREADS": str(work.workers),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(work.output / "cache"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, __file__, "--engine", engine, "--data", str(work.data), "--output", str(work.output)]
    command += ["--rows", str(work.rows), "--workers", str(work.workers)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak: list[int] = [0]
    sampler = threading.Thread(target=sample_memory, args=(process, peak))
    sampler.start()
    assert process.stderr is not None
    errors = process.stderr.read().decode(errors="replace")
    process.wait()
    wall = time.monotonic() - began
    sampler.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode != 0:
        raise RuntimeError(errors.strip().splitlines()[-1] if errors.strip() else f"exit code {process.returncode}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Figures(engine, cpu, wall, peak[0] / 1000, rows_written(work.output))


def sample_memory(process: subprocess.Popen[bytes], peak: list[int]) -> None:
    """Keep the highest sum of anonymous memory of a process and all below it, in kB."""
    while process.poll() is None:
        peak[0] = max(peak[0], sum(anonymous_kilobytes(number) for number in process_tree(process.pid)))
        time.sleep(SAMPLE_EVERY_SECONDS)


def process_tree(number: int) -> Iterator[int]:
    """A process and its descendants."""
    yield number
    try:
        children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from process_tree(int(child))


def anonymous_kilobytes(number: int) -> int:
    try:
        status = Path(f"/proc/{number}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+)", status)
    return int(found[1]) if found else 0


def rows_written(output: Path) -> dict[str, int]:
    """Rows of each source in what an engine wrote."""
    found: Counter[str] = Counter()
    for file in [*output.glob("mix.jsonl"), *output.glob("out/train-*.jsonl")]:
        with file.open("rb") as lines:
            for line in lines:
                found[re.findall(rb'"source": ?"(\w+)"', line)[-1].decode()] += 1
    return dict(sorted(found.items()))


def report(figures: list[Figures], megabytes: float) -> None:
    """Print the table; ratios are to this project with one worker."""
    own = figures[0]
    print(f"\n{'':16}{'CPU s':>8}{'MB/CPU-s':>10}{'x mixer':>9}{'wall s':>8}{'anon MB':>9}   rows")
    for run in figures:
        rows = ", ".join(f"{source} {count}" for source, count in run.rows.items())
        print(
            f"{run.engine:16}{run.cpu_seconds:8.1f}{megabytes / run.cpu_seconds:10.1f}"
            f"{run.cpu_seconds / own.cpu_seconds:9.2f}{run.wall_seconds:8.1f}{run.anonymous_megabytes:9.0f}   {rows}"
        )


def main() -> None:
    """Generate the data, run every engine, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1500, help="size of the input (default: 1500)")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="files and folders to make rows of")
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"default: {','.join(ENGINES)}")
    parser.add_argument("--repetitions", type=int, default=1, help="interleaved; the cheapest of each engine counts")
    parser.add_argument("--folder", type=Path, help="where data and results go (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON as well")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        ENGINES[arguments.engine](Work(arguments.data, arguments.output, arguments.rows, arguments.workers))
        return
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="mixture-benchmark-"))
    try:
        run_all(arguments, folder)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


def entries(engines: list[str]) -> Iterator[tuple[str, str, int]]:
    """Name, engine and workers of each line of the table, for the engines that are installed."""
    for engine in engines:
        if importlib.util.find_spec(NEEDS[engine]) is None:
            print(f"{engine}: skipped, {NEEDS[engine]} is not installed", flush=True)
        elif engine == "mixer":
            yield from ((f"mixer, {workers} workers", engine, workers) for workers in (1, 2))
        else:
            yield engine, engine, 2


def run_all(arguments: argparse.Namespace, folder: Path) -> None:
    """Every engine on the same data; this project with one worker and with two. Of repetitions the cheapest counts."""
    data = folder / f"data-{arguments.megabytes}"
    if not data.exists():
        print(f"writing {arguments.megabytes} MB into {data}", flush=True)
        generate(data.with_name("unfinished"), arguments.megabytes, Texts(arguments.texts))
        data.with_name("unfinished").rename(data)
    rows = arguments.megabytes * ROWS_PER_MEGABYTE
    megabytes = sum(file.stat().st_size for file in data.iterdir()) / 1e6
    best: dict[str, Figures] = {}
    for _ in range(arguments.repetitions):
        for name, engine, workers in entries(arguments.engines.split(",")):
            try:
                run = measure(engine, Work(data, folder / "output", rows, workers))
            except RuntimeError as error:
                print(f"{name}: failed: {error}", flush=True)
                continue
            run = replace(run, engine=name)
            best[name] = min(best.get(name, run), run, key=lambda run: run.cpu_seconds)
            print(f"{name}: {run.cpu_seconds:.1f} CPU-s, {run.wall_seconds:.1f} s", flush=True)
    figures = list(best.values())
    shutil.rmtree(folder / "output", ignore_errors=True)
    report(figures, megabytes)
    if arguments.json:
        print(json.dumps([asdict(run) for run in figures]))


if __name__ == "__main__":
    main()
