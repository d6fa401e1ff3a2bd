"""A teacher's cache is named by all that shapes it, gives back what was captured, and refuses what is not its own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from distilling.cache import (
    LEGEND,
    Fidelity,
    KeptRow,
    Manifest,
    TeacherCache,
    fidelity,
    mark_done,
    offset_check,
    positions_of,
    sample_hash,
    write_shard,
)
from distilling.config import CacheConfig, TeacherModelConfig
from distilling.identity import (
    CacheIdentity,
    cache_folder,
    cache_key,
    shard_file,
)
from distilling.targets import RowTargets
from mixture.shards import TokenRow
from training.model_identity import model_identity
from training.shard_folder import CaptureProgress, capture_progress, done_file, is_complete, manifest_file

# --- what a cache belongs to


def key_of(teacher: Path | str, cache: CacheConfig | None = None, *, data_key: str = "data", seed: int = 1) -> str:
    return cache_key(TeacherModelConfig(name=str(teacher)), cache or CacheConfig(), data_key=data_key, seed=seed)


@pytest.fixture
def teacher_folder(tmp_path: Path, tiny_model: Path) -> Path:
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_model, folder)
    save_file({"weight": np.zeros(300_000, np.float32)}, folder / "model.safetensors")
    return folder


def test_a_key_names_the_teacher_by_what_it_holds_and_not_by_where_it_lies(teacher_folder: Path) -> None:
    moved = teacher_folder.with_name("moved")
    shutil.copytree(teacher_folder, moved)
    assert key_of(moved) == key_of(teacher_folder)
    save_file({"weight": np.full(300_000, 1e-3, np.float32)}, moved / "model.safetensors")
    retrained = key_of(moved)
    assert retrained != key_of(teacher_folder)
    template = moved / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert key_of(moved) != retrained
    assert key_of("org/teacher") != key_of("org/other")


def test_a_key_changes_with_all_that_shapes_a_cache_and_with_nothing_else(teacher_folder: Path) -> None:
    usual = key_of(teacher_folder)
    for other in (
        {"k": 8}, {"kind": "hybrid"}, {"temperatures": [1.0]}, {"keep_tokens": ["<|end|>"]}, {"shard_tokens": 99},
    ):  # fmt: skip
        assert key_of(teacher_folder, CacheConfig(**other)) != usual, other
    assert key_of(teacher_folder, data_key="other") != usual
    assert key_of(teacher_folder, CacheConfig(k=64, tasks=8, batch_tokens=1, folder="elsewhere")) == usual
    # A topk cache draws nothing.
    assert key_of(teacher_folder, seed=2) == usual
    sampled = CacheConfig(kind="sampled")
    assert key_of(teacher_folder, sampled, seed=2) != key_of(teacher_folder, sampled)
    # Draws are read at temperature 1 whatever is listed.
    assert key_of(teacher_folder, replace(sampled, temperatures=[2.0])) == key_of(teacher_folder, sampled)


def test_a_teacher_of_tens_of_gigabytes_is_told_apart_without_being_read(teacher_folder: Path) -> None:
    weights = teacher_folder / "model.safetensors"
    os.truncate(weights, 40 << 30)
    before = time.process_time()
    identity = model_identity(str(teacher_folder), None)
    assert time.process_time() - before < 0.5
    os.truncate(weights, (40 << 30) + 1)
    assert model_identity(str(teacher_folder), None) != identity


def test_a_cache_is_complete_when_all_its_shards_are_marked(tmp_path: Path) -> None:
    folder = cache_folder(tmp_path, "key")
    assert capture_progress(folder) == CaptureProgress(done=0, total=None)
    assert not is_complete(folder)
    folder.mkdir(parents=True)
    manifest_file(folder).write_text('{"shards": 2}')
    done_file(folder, 1).touch()
    assert capture_progress(folder) == CaptureProgress(done=1, total=2)
    assert not is_complete(folder)
    done_file(folder, 0).touch()
    assert is_complete(folder)


def test_what_a_login_node_asks_of_caches_needs_no_torch() -> None:
    program = "import sys, distilling.cache; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


# --- what is written and read, against distributions in float64

VOCABULARY = 70_000  # more than 16 bits
KEEP_IDS = [2, 69_999]
TEMPERATURES = [1.0, 1.5, 4.0]
IDENTITY = CacheIdentity(
    teacher="t", teacher_digest="1", vocabulary_digest="2", chat_template_digest="3", data_fingerprint="4"
)

Logits = npt.NDArray[np.float64]


def manifest_of(kind: str = "topk", **changes: Any) -> Manifest:
    plain: dict[str, Any] = {
        "identity": IDENTITY,
        "dtype": "float32",
        "vocabulary": VOCABULARY,
        "kind": kind,
        "k": {"topk": 20, "sampled": 0, "hybrid": 4}[kind],
        "draws": {"topk": 0, "sampled": 12, "hybrid": 3}[kind],
        "temperatures": TEMPERATURES if kind == "topk" else [1.0],
        "keep_ids": KEEP_IDS,
        "seed": 1,
        "shards": 3,
        "positions_per_row": 300.0,
    }
    return Manifest(**{**plain, **changes})


def token_rows(count: int, longest: int = 16) -> list[TokenRow]:
    generator = np.random.default_rng(5)
    rows = []
    for number in range(count):
        length = int(generator.integers(2, longest))
        ids = generator.integers(0, VOCABULARY, length).astype(np.int32)
        rows.append(TokenRow(f"row-{number}-é", ids, generator.random(length) < 0.6, "odd" if number % 2 else "even"))
    rows[0].loss_mask[:] = False
    return rows


def logits_of(row: TokenRow) -> Logits:
    """Peaked distributions; the label is among the likely tokens at every other position."""
    generator = np.random.default_rng(sample_hash(row.sample_id))
    logits = generator.normal(0, 1.5, (len(positions_of(row)), VOCABULARY))
    logits[np.arange(0, len(logits), 2), row.input_ids[positions_of(row)][::2]] += 8
    logits[1::2, 2] += 7
    return logits


def log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kept_of(row: TokenRow, logits: Logits, manifest: Manifest, seed: int = 0) -> KeptRow:
    """What a cache keeps, computed the plain way."""
    generator = np.random.default_rng(seed)
    labels = row.input_ids[positions_of(row)]
    count = len(labels)
    log_p = log_softmax(logits)
    top = np.argsort(-logits, axis=1, kind="stable")[:, : manifest.k]
    rest = np.ones(logits.shape, bool)
    rest[
        np.arange(count)[:, None], np.concatenate([top, np.tile(manifest.keep_ids, (count, 1)), labels[:, None]], 1)
    ] = 0
    lse = np.stack([np.log(np.exp(logits / t).sum(1)) for t in manifest.temperatures], 1)
    tails = [np.log((np.exp(logits / t) * rest).sum(1)) for t in manifest.temperatures]
    drawn: list[npt.NDArray[Any]] = []
    counts: list[npt.NDArray[Any]] = []
    for position in range(count if manifest.draws else 0):
        p = np.exp(log_p[position]) * rest[position]
        ids, times = np.unique(generator.choice(VOCABULARY, manifest.draws, p=p / p.sum()), return_counts=True)
        drawn.append(ids)
        counts.append(times)
    lengths = [len(ids) for ids in drawn] or [0] * count
    flat = np.concatenate([np.empty(0, int), *drawn])
    return KeptRow(
        topk_NK=top,
        topk_logp_NK=np.take_along_axis(log_p, top, 1),
        label_logp_N=log_p[np.arange(count), labels],
        keep_logp_NM=log_p[:, manifest.keep_ids],
        lse_NT=lse.astype(np.float32),
        log_tail_NT=(np.stack(tails, 1) - lse).astype(np.float32),
        drawn_D=flat,
        drawn_count_D=np.concatenate([np.empty(0, int), *counts]),
        drawn_logp_D=log_p[np.repeat(np.arange(count), lengths), flat],
        drawn_starts=np.concatenate([[0], np.cumsum(lengths, dtype=int)]),
    )


def write_cache(folder: Path, manifest: Manifest, rows: Sequence[TokenRow], kept: Sequence[KeptRow]) -> TeacherCache:
    folder.mkdir(exist_ok=True)
    manifest.write(folder)
    by_id = dict(sorted((row.sample_id, (row, kept_row)) for row, kept_row in zip(rows, kept, strict=True)))
    for shard in range(manifest.shards):
        mine = [pair for sample_id, pair in by_id.items() if sample_hash(sample_id) % manifest.shards == shard]
        count = write_shard(folder, shard, manifest, mine)
        mark_done(folder, shard, rows=count, fidelity={"odd": Fidelity(positions=count)})
    return TeacherCache.open(folder)


ROWS = token_rows(12)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TeacherCache]:
    """One of each kind, of the same rows."""
    logits = [logits_of(row) for row in ROWS]
    written = {}
    for kind in ("topk", "sampled", "hybrid"):
        manifest = manifest_of(kind)
        kept = [kept_of(row, its, manifest) for row, its in zip(ROWS, logits, strict=True)]
        written[kind] = write_cache(tmp_path_factory.mktemp("caches") / kind, manifest, ROWS, kept)
    return written


@pytest.fixture(params=["topk", "sampled", "hybrid"])
def cache(request: pytest.FixtureRequest, caches: dict[str, TeacherCache]) -> TeacherCache:
    return caches[request.param]


@pytest.fixture
def topk_cache(tmp_path: Path, caches: dict[str, TeacherCache]) -> TeacherCache:
    """A copy of it, to be broken."""
    return TeacherCache.open(Path(shutil.copytree(caches["topk"].folder, tmp_path / "cache")))


def test_what_is_read_is_the_teachers_distribution(cache: TeacherCache) -> None:
    for row in ROWS:
        targets = cache.targets(row, temperature=1.0)
        log_p = log_softmax(logits_of(row))
        assert targets.ids_NS.dtype == np.int32 and targets.weights_NS.dtype == np.float32
        assert len(targets.ids_NS) == len(log_p)
        listed = targets.weights_NS > 0
        expected = np.take_along_axis(log_p, targets.ids_NS, 1)
        # float16 keeps 11 bits.
        assert np.allclose(targets.log_probabilities_NS[listed], expected[listed], rtol=2**-11, atol=1e-6)
        exact = cache.manifest.k + len(KEEP_IDS) + 1
        for position, ids in enumerate(targets.ids_NS):
            weighed = ids[listed[position]]
            assert len(set(weighed)) == len(weighed), "an id that is listed twice has its weight once"
            always = {*KEEP_IDS, int(row.input_ids[positions_of(row)[position]])}
            assert always <= set(ids[:exact][listed[position, :exact]])
        mass = targets.weights_NS.sum(1) + (0 if targets.log_tail_N is None else np.exp(targets.log_tail_N))
        assert np.allclose(mass, 1, atol=2e-3)


def test_any_kept_temperature_is_read_exactly(topk_cache: TeacherCache) -> None:
    for row in ROWS:
        for temperature in TEMPERATURES:
            log_p = log_softmax(logits_of(row) / temperature)
            targets = topk_cache.targets(row, temperature=temperature)
            assert targets.log_tail_N is not None
            listed = targets.weights_NS > 0
            expected = np.take_along_axis(log_p, targets.ids_NS, 1)
            # What float16 has rounded off the log p at temperature 1, and nothing else.
            assert np.abs(targets.log_probabilities_NS - expected).max(initial=0) < 2**-7 / temperature + 1e-5
            assert np.array_equal(targets.weights_NS[listed], np.exp(targets.log_probabilities_NS[listed]))
            rest = np.exp(log_p)
            np.put_along_axis(rest, targets.ids_NS, 0, 1)
            assert np.allclose(targets.log_tail_N, np.log(rest.sum(1)), atol=1e-5)
            scaled = topk_cache.targets(row, temperature=temperature, tail="renormalised")
            assert scaled.log_tail_N is None
            assert np.allclose(scaled.weights_NS.sum(1), 1, atol=1e-5)
            assert np.allclose(np.exp(scaled.log_probabilities_NS[listed]), scaled.weights_NS[listed], rtol=1e-5)
    with pytest.raises(ValueError, match=r"distillation.temperature: 1.7 is not among .*\(1.0, 1.5, 4.0\)"):
        topk_cache.targets(ROWS[1], temperature=1.7)


@pytest.mark.parametrize("kind", ["sampled", "hybrid"])
def test_over_many_draws_the_weights_average_to_the_teachers_distribution(kind: str, tmp_path: Path) -> None:
    tries = 300
    row = TokenRow("row", np.array([7, 3, 2], np.int32), np.array([True, True, True]), "s")
    rows = [replace(row, sample_id=f"{number:03d}") for number in range(tries)]
    manifest = manifest_of(kind)
    logits = np.full((2, VOCABULARY), -30.0)
    logits[:, :40] = np.random.default_rng(0).normal(0, 1.5, (2, 40))
    kept = [kept_of(row, logits, manifest, seed) for seed, row in enumerate(rows)]
    cache = write_cache(tmp_path / "cache", manifest, rows, kept)
    mean = np.zeros((2, VOCABULARY))
    for row in rows:
        targets = cache.targets(row, temperature=1.0)
        assert targets.log_tail_N is None
        np.add.at(mean, (np.arange(2)[:, None], targets.ids_NS), targets.weights_NS / tries)
    p = np.exp(log_softmax(logits))
    deviation = np.sqrt(p / manifest.draws / tries)
    assert (np.abs(mean - p) < 4.5 * deviation + 1e-3 * p).all()
    with pytest.raises(ValueError, match="renormalised is for topk caches"):
        cache.targets(row, temperature=1.0, tail="renormalised")


def test_every_column_is_explained(cache: TeacherCache) -> None:
    schema = pq.read_schema(shard_file(cache.folder, 0))
    assert set(schema.names) <= set(LEGEND)
    assert ("tail_lo" in schema.names) == (cache.manifest.kind != "topk")
    ids = pq.read_table(shard_file(cache.folder, 0)).column("sample_id").to_pylist()
    assert ids == sorted(ids)


# --- one cache, many readers


def same(first: RowTargets, second: RowTargets) -> bool:
    names = ("ids_NS", "log_probabilities_NS", "weights_NS", "log_tail_N")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)


def read_all(cache: TeacherCache) -> list[RowTargets]:
    return [cache.targets(row, temperature=1.0) for row in ROWS]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_what_their_parent_reads(cache: TeacherCache, method: str) -> None:
    expected = read_all(cache)
    with multiprocessing.get_context(method).Pool(1) as pool:
        for targets, own in zip(pool.apply(read_all, (cache,)), expected, strict=True):
            assert same(targets, own)
    assert len(pickle.dumps(cache)) < 2000


def test_few_open_files_serve_all_shards(topk_cache: TeacherCache, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_all(TeacherCache.open(topk_cache.folder))
    monkeypatch.setattr("distilling.cache.OPEN_SHARDS", 1)
    assert all(same(targets, own) for targets, own in zip(read_all(topk_cache), expected, strict=True))
    assert len(topk_cache.files) == 1


# --- what is refused


def test_a_row_that_is_not_there_or_has_other_tokens_is_refused(topk_cache: TeacherCache) -> None:
    row = ROWS[3]
    with pytest.raises(ValueError, match="has no sample 'stranger'"):
        topk_cache.targets(replace(row, sample_id="stranger"), temperature=1.0)
    for changed in (replace(row, input_ids=row.input_ids + 1), replace(row, loss_mask=~row.loss_mask)):
        with pytest.raises(ValueError, match=f"sample {row.sample_id!r} has other tokens here"):
            topk_cache.targets(changed, temperature=1.0)


def test_a_cache_that_is_not_whole_is_refused_by_the_name_of_the_file(topk_cache: TeacherCache) -> None:
    folder = topk_cache.folder
    shard, done = shard_file(folder, 1), done_file(folder, 2)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"shard-00001.parquet has {len(content) - 1} bytes .*train.sh capture"):
        TeacherCache.open(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.parquet is missing; .*train.sh capture"):
        TeacherCache.open(folder)
    shard.write_bytes(content)
    done.unlink()
    with pytest.raises(ValueError, match=r"shard-00002.parquet was not finished.*train.sh capture"):
        TeacherCache.open(folder)
    manifest = manifest_file(folder)
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 99'))
    with pytest.raises(ValueError, match=r"manifest.json has format version 99, and this is 2; .*train.sh capture"):
        TeacherCache.open(folder)
    manifest.unlink()
    with pytest.raises(ValueError, match=r"holds no teacher's cache: there is no manifest.json"):
        TeacherCache.open(folder)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    manifest = manifest_of()
    kept = [kept_of(row, logits_of(row), manifest) for row in ROWS[:3]]
    kept[2].topk_NK[0, 5] = VOCABULARY
    cache = write_cache(tmp_path / "cache", manifest, ROWS[:3], kept)
    cache.targets(ROWS[1], temperature=1.0)
    with pytest.raises(ValueError, match=rf"shard-0000\d.parquet: sample 'row-2-é' holds token {VOCABULARY}, and"):
        cache.targets(ROWS[2], temperature=1.0)


def test_a_cache_of_another_teacher_tokenizer_template_or_data_is_refused(topk_cache: TeacherCache) -> None:
    topk_cache.require(replace(IDENTITY, teacher="the same, moved"))
    for key, words in {
        "teacher_digest": r"teacher: t \(1\) and t \(9\)",
        "vocabulary_digest": r"vocabulary of the tokenizer: \(2\) and \(9\)",
        "chat_template_digest": r"chat template: \(3\) and \(9\)",
    }.items():
        with pytest.raises(ValueError, match=words):
            topk_cache.require(replace(IDENTITY, **{key: "9"}))
    topk_cache.require(replace(IDENTITY, data_fingerprint="9"))  # its rows are what matters
    topk_cache.require_rows(row.sample_id for row in ROWS)
    with pytest.raises(ValueError, match=r"made of other data: it lacks 2 of the rows to train on, 'a' among them"):
        topk_cache.require_rows([ROWS[0].sample_id, "a", "b"])


def test_the_identity_tells_tokenizers_and_templates_apart(teacher_folder: Path) -> None:
    from transformers import AutoTokenizer

    def identity() -> CacheIdentity:
        tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
        return CacheIdentity.of(TeacherModelConfig(name="org/teacher"), tokenizer, data_fingerprint="4")

    before = identity()
    assert identity() == before
    template = teacher_folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    (words,) = before.differences(identity())
    assert words.startswith("chat template: (")
    tokenizer = teacher_folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|im_end|>", "<|turn_end|>"))
    assert len(before.differences(identity())) == 2


# --- out of step


def shifted(kept: KeptRow) -> KeptRow:
    """The distributions of every position given to the one before it."""
    arrays = {name: np.roll(getattr(kept, name), -1, 0) for name in KeptRow.__slots__ if not name.startswith("drawn")}
    lengths = np.diff(kept.drawn_starts)
    first = int(lengths[0]) if len(lengths) else 0
    return replace(
        kept,
        **arrays,
        drawn_D=np.roll(kept.drawn_D, -first),
        drawn_count_D=np.roll(kept.drawn_count_D, -first),
        drawn_logp_D=np.roll(kept.drawn_logp_D, -first),
        drawn_starts=np.concatenate([[0], np.cumsum(np.roll(lengths, -1), dtype=int)]),
    )


@pytest.mark.parametrize("kind", ["topk", "sampled", "hybrid"])
def test_a_cache_that_is_shifted_by_one_is_found_out(kind: str, tmp_path: Path) -> None:
    rows = [replace(row, loss_mask=np.ones_like(row.loss_mask)) for row in token_rows(20, longest=12)]
    manifest = manifest_of(kind)

    def knowing(row: TokenRow) -> Logits:
        """A teacher that finds every token likely where it is, and at times the one before it too."""
        logits = np.random.default_rng(0).normal(0, 1, (len(row.input_ids) - 1, VOCABULARY))
        places = np.arange(len(logits))
        logits[places, row.input_ids[1:]] += 10
        logits[places[::3], row.input_ids[:-1][::3]] += 10
        return logits

    kept = [kept_of(row, knowing(row), manifest) for row in rows]
    sound = offset_check(write_cache(tmp_path / "sound", manifest, rows, kept), rows)
    assert sound.problems == []
    assert sound.positions == sum(len(row.input_ids) - 1 for row in rows)
    broken = [shifted(kept_row) for kept_row in kept]
    problems = offset_check(write_cache(tmp_path / "shifted", manifest, rows, broken), rows).problems
    assert any("out of step" in problem for problem in problems)


def test_fidelity_is_summed_up_over_shards(topk_cache: TeacherCache) -> None:
    assert fidelity(topk_cache.folder) == {"odd": Fidelity(positions=len(ROWS))}
