"""What a teacher's cache takes on disk, and what reading it at random rows costs, beside other layouts.

    python benchmarks/teacher_cache.py
    python benchmarks/teacher_cache.py --repetitions 5 --json

Tokens are read for each second of one core (CPU seconds, page cache warm), through `TeacherCache.targets`: ids,
probabilities and weights, ready for the loss; and of short rows for each second of the clock by two processes at once.
The distributions are made up: ids by Zipf's law below 150,000, sorted log probabilities. `nested lists` is the layout
of DistillKit's caches, list<list<uint8>> in groups of 32 rows, holding the same bytes of the most probable tokens and
no more; they are read and not taken apart.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from distilling import cache as cache_module  # noqa: E402
from distilling.cache import DTYPES, KeptRow, Manifest, TeacherCache, mark_done, sample_hash, write_shard  # noqa: E402
from distilling.identity import CacheIdentity, shard_file  # noqa: E402
from mixture.shards import TokenRow  # noqa: E402

if TYPE_CHECKING:
    from distilling.config import CacheKind

VOCABULARY = 150_000
KEEP_IDS = [1, 2, 3]
TEMPERATURES = [1.0, 1.5, 2.0, 3.0, 4.0]
ROW_TOKENS = {"long": 4096, "short": 100}
SHARDS = 2
READ_TOKENS = 200_000
NUM_READS = 6000
"""Of each of two processes that read at once."""
PEER_GROUP_ROWS = 32
IDENTITY = CacheIdentity(
    teacher="", teacher_digest="", vocabulary_digest="", chat_template_digest="", data_fingerprint=""
)


@dataclass(frozen=True)
class Layout:
    """A way to lay out one kind of cache."""

    kind: CacheKind
    compressed: tuple[str, ...] | None = None
    """Columns under zstd; None: those that the project compresses."""


LAYOUTS = {
    "topk 64": Layout("topk"),
    "topk 64, all zstd": Layout("topk", tuple(DTYPES)),
    "topk 64, no zstd": Layout("topk", ()),
    "hybrid 16 + 8": Layout("hybrid"),
    "sampled 50": Layout("sampled"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON, behind the table")
    options = parser.parse_args()
    figures = cache_section(options)
    if options.json:
        print(json.dumps(figures, indent=2))


def cache_section(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes a token and tokens read a second of every layout, for long and short rows; and the speed of a capture."""
    figures: dict[str, Any] = {}
    for length, tokens in ROW_TOKENS.items():
        for name, layout in LAYOUTS.items():
            print(f"cache: {name}, {length} rows", file=sys.stderr, flush=True)
            figures[f"{name}, {length} rows"] = measure_layout(layout, tokens, options.repetitions)
        figures[f"nested lists 64, {length} rows"] = measure_nested_lists(tokens, options.repetitions)
    for name in ("topk 64", "hybrid 16 + 8", "sampled 50"):
        speed = measure_two_processes(LAYOUTS[name])
        figures[f"{name}, short rows"]["million_tokens_per_s_of_two_processes"] = speed
        print(f"two processes, {name}, short rows: {speed:.3f} Mtoken/s")
    for name, figure in figures.items():
        print(f"{name:34}{figure['bytes_per_token']:>6.0f} B/token{figure['million_tokens_per_s']:>8.3f} Mtoken/s")
    figures["capture"] = measure_capture()
    print(
        "capture of the small model: " + ", ".join(f"{key} {value:,.0f}" for key, value in figures["capture"].items())
    )
    return figures


# --- made-up caches


def manifest_of(kind: CacheKind, row_tokens: int) -> Manifest:
    return Manifest(
        identity=IDENTITY,
        dtype="float32",
        vocabulary=VOCABULARY,
        kind=kind,
        k={"topk": 64, "hybrid": 16, "sampled": 0}[kind],
        draws={"topk": 0, "hybrid": 8, "sampled": 50}[kind],
        temperatures=TEMPERATURES if kind == "topk" else [1.0],
        keep_ids=KEEP_IDS,
        seed=0,
        shards=SHARDS,
        positions_per_row=row_tokens,
    )


def token_rows(row_tokens: int) -> list[TokenRow]:
    generator = np.random.default_rng(0)
    return [
        TokenRow(f"sample-{number:07d}", zipf(generator, (row_tokens + 1,)), np.ones(row_tokens + 1, bool), "s")
        for number in range(max(60, READ_TOKENS // row_tokens))
    ]


def zipf(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (generator.zipf(1.2, shape) % VOCABULARY).astype(np.int32)


def kept_row(generator: np.random.Generator, manifest: Manifest, count: int) -> KeptRow:
    """Distributions of the sharpness of a good teacher's; a sampled tail has 17 different tokens on average."""
    temperatures, k = len(manifest.temperatures), manifest.k
    lengths = generator.integers(1, 34, count) if manifest.kind == "sampled" else np.full(count, manifest.draws)
    drawn = int(lengths.sum())
    return KeptRow(
        topk_NK=zipf(generator, (count, k)),
        topk_logp_NK=np.sort(-generator.gamma(3, 3, (count, k)), axis=1)[:, ::-1],
        label_logp_N=-generator.gamma(1, 2, count),
        keep_logp_NM=-generator.gamma(9, 2, (count, len(KEEP_IDS))),
        lse_NT=generator.normal(30, 3, (count, temperatures)).astype(np.float32),
        log_tail_NT=generator.normal(-3, 1, (count, temperatures)).astype(np.float32),
        drawn_D=zipf(generator, (drawn,)),
        drawn_count_D=generator.geometric(0.5, drawn),
        drawn_logp_D=-generator.gamma(3, 3, drawn),
        drawn_starts=np.concatenate([[0], np.cumsum(lengths)]),
    )


def write_cache(folder: Path, manifest: Manifest, rows: list[TokenRow]) -> None:
    manifest.write(folder)
    generator = np.random.default_rng(1)
    for shard in range(SHARDS):
        mine = [row for row in rows if sample_hash(row.sample_id) % SHARDS == shard]
        pairs = ((row, kept_row(generator, manifest, len(row.input_ids) - 1)) for row in mine)
        mark_done(folder, shard, rows=write_shard(folder, shard, manifest, pairs), fidelity={})


# --- measuring


def measure_layout(layout: Layout, row_tokens: int, repetitions: int) -> dict[str, float]:
    manifest, rows = manifest_of(layout.kind, row_tokens), token_rows(row_tokens)
    with temporary_folder() as folder:
        compressed = cache_module.COMPRESSED if layout.compressed is None else layout.compressed
        with patch.object(cache_module, "COMPRESSED", compressed):
            write_cache(folder, manifest, rows)
        cache = TeacherCache.open(folder)
        size = sum(shard_file(folder, shard).stat().st_size for shard in range(SHARDS))
        speed = tokens_per_s(lambda number: cache.targets(rows[number], temperature=1.0), rows, repetitions)
    return {"bytes_per_token": size / len(rows) / row_tokens, "million_tokens_per_s": speed / 1e6}


def measure_two_processes(layout: Layout) -> float:
    """Million tokens a second of the clock, of short random rows that two processes read at once."""
    manifest, rows = manifest_of(layout.kind, ROW_TOKENS["short"]), token_rows(ROW_TOKENS["short"])
    context = multiprocessing.get_context("fork")
    both_are_warm, seconds = context.Barrier(2), context.Queue()
    with temporary_folder() as folder:
        write_cache(folder, manifest, rows)

        def read(seed: int) -> None:
            cache = TeacherCache.open(folder)
            chosen = np.random.default_rng(seed).integers(0, len(rows), NUM_READS).tolist()
            for number in chosen[: NUM_READS // 10]:
                cache.targets(rows[number], temperature=1.0)
            both_are_warm.wait()
            began = time.perf_counter()
            for number in chosen:
                cache.targets(rows[number], temperature=1.0)
            seconds.put(time.perf_counter() - began)

        readers = [context.Process(target=read, args=(seed,)) for seed in range(2)]
        for reader in readers:
            reader.start()
        slowest_s = max(seconds.get() for _ in readers)
        for reader in readers:
            reader.join()
    return 2 * NUM_READS * ROW_TOKENS["short"] / slowest_s / 1e6


def measure_nested_lists(row_tokens: int, repetitions: int) -> dict[str, float]:
    """The most probable tokens alone, as lists of bytes."""
    manifest, rows = manifest_of("topk", row_tokens), token_rows(row_tokens)
    generator = np.random.default_rng(1)
    with temporary_folder() as folder:
        file = folder / "nested.parquet"
        writer = pq.ParquetWriter(file, pa.schema([("logits", pa.list_(pa.list_(pa.uint8())))]))
        for first in range(0, len(rows), PEER_GROUP_ROWS):
            group = [nested(generator, manifest, row_tokens) for _ in rows[first : first + PEER_GROUP_ROWS]]
            tokens = pa.concat_arrays(group)
            column = pa.ListArray.from_arrays(pa.array(np.arange(len(group) + 1) * row_tokens, pa.int32()), tokens)
            writer.write_table(pa.table({"logits": column}))
        writer.close()
        parquet = pq.ParquetFile(file, memory_map=True)

        def read(number: int) -> np.ndarray:
            group, within = divmod(number, PEER_GROUP_ROWS)
            column = parquet.read_row_group(group, use_threads=False).column(0).chunk(0)
            return column[within].values.flatten().to_numpy()

        speed = tokens_per_s(read, rows, repetitions, share=0.1)
        size = file.stat().st_size
    return {"bytes_per_token": size / len(rows) / row_tokens, "million_tokens_per_s": speed / 1e6}


def nested(generator: np.random.Generator, manifest: Manifest, row_tokens: int) -> pa.ListArray:
    """A row's bytes, a list for each token."""
    arrays = kept_row(generator, manifest, row_tokens).arrays()
    columns = [arrays[name].astype(DTYPES[name]) for name in ("topk_lo", "topk_hi", "topk_logp")]
    by_token = np.concatenate([np.ascontiguousarray(column).view(np.uint8) for column in columns], axis=1)
    starts = pa.array(np.arange(row_tokens + 1) * by_token.shape[1], pa.int32())
    return pa.ListArray.from_arrays(starts, pa.array(by_token.ravel()))


def tokens_per_s(read: Callable[[int], object], rows: list[TokenRow], repetitions: int, *, share: float = 1.0) -> float:
    """Tokens for each CPU second of random rows, at the best of the repetitions; the first reads are not counted."""
    order = np.random.default_rng(2).permutation(len(rows))[: max(3, int(len(rows) * share))].tolist()
    for number in order:
        read(number)
    seconds = []
    for _ in range(repetitions):
        began = time.process_time()
        for number in order:
            read(number)
        seconds.append(time.process_time() - began)
    return sum(len(rows[number].input_ids) - 1 for number in order) / min(seconds)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def measure_capture() -> dict[str, float]:
    """Tokens a second of capturing random weights of the small model's shape, and of its decoder alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from distilling.capture import kept_of
    from distilling.config import TeacherModelConfig
    from distilling.teacher import load_teacher
    from training.batches import flat_batch

    with temporary_folder() as folder:
        shutil.copytree(PROJECT / "configs/models/small", folder, dirs_exist_ok=True)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
        teacher = load_teacher(TeacherModelConfig(name=str(folder)))
    generator = np.random.default_rng(0)
    rows = [
        TokenRow(f"{number}", generator.integers(0, 4096, 512).astype(np.int32), np.ones(512, bool), "s")
        for number in range(8)
    ]
    batch = flat_batch([row.input_ids for row in rows], [row.loss_mask for row in rows])
    works: dict[str, Callable[[], object]] = {"decoder alone": lambda: teacher.hidden_states(batch)}
    for kind in ("topk", "hybrid", "sampled"):
        manifest = replace(manifest_of(kind, 512), vocabulary=teacher.vocabulary)
        works[kind] = lambda manifest=manifest: kept_of(teacher, rows, manifest)
    figures = {}
    for name, work in works.items():
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        figures[name] = sum(len(row.input_ids) for row in rows) / min(seconds)
    return figures


if __name__ == "__main__":
    main()
