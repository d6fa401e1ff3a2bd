"""A capture keeps the teacher's distributions as they are, however it was cut short, moved or shared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distilling.cache import TeacherCache, fidelity, offset_check, positions_of
from distilling.capture import CaptureRequest, capture, counted, draw, rows_by_shard
from distilling.config import CacheConfig, TeacherModelConfig
from distilling.identity import CacheIdentity
from distilling.teacher import load_teacher
from mixture.prepare import PreparedData
from mixture.shards import TokenRow, TokenRows, TokenWriter
from training.models import told_of_full_memory
from training.shard_folder import capture_progress, is_complete

PROJECT = Path(__file__).parents[1]
SHARDS = 5

Request = Callable[..., CaptureRequest]


def save_teacher(folder: Path, tiny_model: Path, **config: Any) -> Path:
    """Random weights with sharp distributions, beside the tiny model's tokenizer."""
    shutil.copytree(tiny_model, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(60)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teachers") / "llama", tiny_model)


@pytest.fixture
def request_for(tmp_path: Path, llama: Path, prepared_sums: PreparedData) -> Request:
    """request_for("name", kind=..., ...): a request of about SHARDS shards of several batches."""
    train = prepared_sums.splits["train"]
    assert train is not None

    def make(name: str, *, teacher: Path = llama, seed: int = 1, **cache: Any) -> CaptureRequest:
        shard_tokens = -(-train.loss_tokens // SHARDS)
        return CaptureRequest(
            teacher=TeacherModelConfig(name=str(teacher)),
            cache=CacheConfig(**{"shard_tokens": shard_tokens, "batch_tokens": 128, "k": None, **cache}),
            prepared=prepared_sums.folder,
            folder=tmp_path / name,
            seed=seed,
        )

    return make


def run(request: CaptureRequest, stop_after: int | None = None) -> tuple[bool, list[str]]:
    """Capture here; `stop_after` looks at the stop request it comes."""
    lines: list[str] = []
    looks = iter(range(10_000))
    finished = capture(request, lines.append, stop_requested=lambda: next(looks) == (stop_after or -1))
    return finished, lines


def train_rows(request: CaptureRequest) -> list[TokenRow]:
    return list(TokenRows.open(request.prepared, "train"))


def tables(folder: Path) -> list[Any]:
    return [pq.read_table(file) for file in sorted(folder.glob("shard-*.parquet"))]


def log_softmax(model: torch.nn.Module, row: TokenRow) -> torch.Tensor:
    """log p of every token at the positions of a row, by the model's own logits."""
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(row.input_ids[None].astype(np.int64))).logits[0].double()
    return logits[torch.from_numpy(positions_of(row) - 1)].log_softmax(-1)


# --- what is kept


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_is_kept_is_what_the_teachers_own_forward_pass_says(
    family: str, llama: Path, request_for: Request, tiny_model: Path, tmp_path: Path
) -> None:
    teacher = llama
    if family == "gemma2":  # caps scores and logits, so its samples cannot share rows
        teacher = save_teacher(
            tmp_path / "teacher", tiny_model, model_type="gemma2", architectures=["Gemma2ForCausalLM"],
            final_logit_softcapping=20.0, attn_logit_softcapping=50.0, query_pre_attn_scalar=8,
        )  # fmt: skip
    request = request_for("cache", teacher=teacher, k=10, keep_tokens=["<|pad|>"])
    assert load_teacher(request.teacher).is_packable == (family == "llama")
    assert run(request)[0]
    cache = TeacherCache.open(request.folder)
    # The ends of text and of turns, and what was asked for.
    assert cache.manifest.keep_ids == [0, 2, 4]
    model = AutoModelForCausalLM.from_pretrained(teacher, attn_implementation="eager").eval()
    for row in train_rows(request):
        log_p = log_softmax(model, row)
        for temperature in cache.manifest.temperatures:
            at_temperature = (log_p / temperature).log_softmax(-1).numpy()
            targets = cache.targets(row, temperature=temperature)
            expected = np.take_along_axis(at_temperature, targets.ids_NS, 1)
            # float16 holds log p below 32 to a 128th.
            assert np.abs(targets.log_probabilities_NS - expected).max() < 0.01
            assert targets.log_tail_N is not None
            rest = np.exp(at_temperature)
            np.put_along_axis(rest, targets.ids_NS, 0, 1)
            assert np.allclose(targets.log_tail_N, np.log(rest.sum(1)), atol=1e-3)
        top = targets.ids_NS[:, :10]
        assert np.array_equal(np.sort(top, 1), np.sort(log_p.topk(10).indices.numpy(), 1))


@pytest.mark.parametrize(("proportional", "expected"), [(True, 3), (False, 8)])
def test_draws_average_to_the_distribution_of_the_tail(proportional: bool, expected: int) -> None:
    tries = 20_000
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2
    logits[[0, 7, 39]] = -torch.inf  # kept already
    p = logits.double().softmax(0).numpy()
    uniforms = torch.rand(tries, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    log_tail = torch.full((tries,), -1.0)  # 37 % of the mass
    draws, num_draws = draw(logits.expand(tries, -1), log_tail, uniforms, proportional=proportional)
    assert (num_draws == expected).all()
    ids, times, _, starts = counted(draws.numpy(), np.zeros(draws.shape, np.float32), num_draws.numpy())
    assert (np.add.reduceat(times, starts[:-1]) == expected).all()
    mean = np.bincount(ids, times / expected / tries, minlength=40)
    assert (np.abs(mean - p) <= 4.5 * np.sqrt(p / expected / tries)).all()
    assert (mean[[0, 7, 39]] == 0).all()


def test_a_position_whose_whole_mass_is_kept_has_no_draws() -> None:
    logits = torch.full((2, 5), -torch.inf)
    logits[1, 3] = 1.0
    log_tail = torch.tensor([-torch.inf, -2.0])
    draws, num_draws = draw(logits, log_tail, torch.full((2, 4), 0.5, dtype=torch.float64), proportional=False)
    ids, times, _, starts = counted(draws.numpy(), np.zeros((2, 4), np.float32), num_draws.numpy())
    assert (ids.tolist(), times.tolist(), starts.tolist()) == ([3], [4], [0, 0, 1])


def test_the_cache_says_what_it_was_made_of(llama: Path, request_for: Request, prepared_sums: PreparedData) -> None:
    request = request_for("cache")
    assert run(request)[0]
    cache = TeacherCache.open(request.folder)
    tokenizer = load_teacher(request.teacher).tokenizer
    cache.require(CacheIdentity.of(request.teacher, tokenizer, data_fingerprint=prepared_sums.fingerprint))
    assert (cache.manifest.dtype, cache.manifest.vocabulary, cache.manifest.shards) == ("float32", 4096, SHARDS)


def test_fidelity_is_that_of_the_teacher_by_source(llama: Path, request_for: Request) -> None:
    request = request_for("cache", k=10)
    assert run(request)[0]
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    (source,) = {row.source for row in train_rows(request)}
    found = fidelity(request.folder)[source]
    nll, mass, positions, hits = 0.0, 0.0, 0, 0
    for row in train_rows(request):
        log_p = log_softmax(model, row)
        labels = torch.from_numpy(row.input_ids[positions_of(row)].astype(np.int64))[:, None]
        top = log_p.topk(10).indices
        kept = torch.cat([top, labels, torch.tensor([[2, 4]]).expand(len(labels), -1)], 1)
        nll -= float(log_p.gather(1, labels).sum())
        mass += sum(float(log_p[place, ids.unique()].exp().sum()) for place, ids in enumerate(kept))
        positions += len(labels)
        hits += int((top == labels).sum())
    assert found.positions == positions
    assert found.labels_in_top == hits
    assert found.nll == pytest.approx(nll, rel=1e-4)
    assert found.kept_mass == pytest.approx(mass, rel=1e-4)
    assert found.keeps == 2 * positions


def test_a_sound_capture_is_in_step_and_sums_up_to_one(request_for: Request) -> None:
    for kind in ("topk", "sampled", "hybrid"):
        request = request_for(kind, kind=kind)
        assert run(request)[0]
        check = offset_check(TeacherCache.open(request.folder), train_rows(request))
        # A teacher of random weights knows nothing of the data, so which token is likelier says nothing here.
        assert check.drawn_labels == 0
        assert check.largest_mass_error < 0.005


# --- cut short, moved, shared

CHILD = """
import sys, time
from pathlib import Path
import orjson
from distilling.capture import CaptureRequest, capture
from distilling.config import CacheConfig, TeacherModelConfig
settings = orjson.loads(sys.argv[1])
request = CaptureRequest(
    teacher=TeacherModelConfig(**settings["teacher"]), cache=CacheConfig(**settings["cache"]),
    prepared=Path(settings["prepared"]), folder=Path(settings["folder"]), seed=settings["seed"],
)
looks, hang_at = 0, int(sys.argv[2])
def stop_requested():
    global looks
    looks += 1
    if looks == hang_at:
        print("hanging", flush=True)
        time.sleep(600)
    time.sleep(0.02)  # so that two of them meet
    return False
print(capture(request, lambda line: print(line, flush=True), stop_requested=stop_requested), flush=True)
"""


def start(request: CaptureRequest, hang_at: int = 0) -> subprocess.Popen[str]:
    """A capture in a process of its own; it hangs where it asks for the `hang_at`-th time whether to stop."""
    settings = orjson.dumps(request, default=str).decode()
    command = [sys.executable, "-c", CHILD, settings, str(hang_at)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(PROJECT)}, stdout=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen[str], wanted: str) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.strip())
        if line.strip() == wanted:
            return lines
    raise AssertionError(f"no {wanted!r} in {lines}")


@pytest.mark.chain
def test_a_capture_killed_inside_a_shard_goes_on_to_the_same_rows(request_for: Request) -> None:
    unbroken, broken = request_for("unbroken", kind="hybrid"), request_for("broken", kind="hybrid")
    assert run(unbroken)[0]
    child = start(broken, hang_at=5)
    try:
        read_until(child, "hanging")
    finally:
        child.kill()
        child.wait()
    assert list(broken.folder.glob("*.claim")), "killed with a claim in hand"
    assert list(broken.folder.glob(".shard-*")), "killed inside a shard"
    done = capture_progress(broken.folder).done
    assert 0 < done < SHARDS
    finished, lines = run(broken)
    assert finished and is_complete(broken.folder)
    assert len([line for line in lines if line.startswith("shards: ")]) == SHARDS - done
    assert tables(broken.folder) == tables(unbroken.folder)
    assert {file.suffix for file in broken.folder.iterdir()} == {".json", ".parquet", ".done"}


@pytest.mark.chain
def test_two_captures_at_once_share_the_shards_and_write_the_same_rows(request_for: Request) -> None:
    alone, shared = request_for("alone", kind="sampled"), request_for("shared", kind="sampled")
    assert run(alone)[0]
    children = [start(shared) for _ in range(2)]
    outputs = [child.communicate(timeout=120)[0].splitlines() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert "True" in (outputs[0][-1], outputs[1][-1])
    captured = [sum(line.startswith("shards: ") for line in output) for output in outputs]
    assert sum(captured) == SHARDS
    assert tables(shared.folder) == tables(alone.folder)
    assert not list(shared.folder.glob("*.claim"))


def test_a_stop_request_leaves_whole_shards_and_no_claim(request_for: Request) -> None:
    unbroken, stopped = request_for("unbroken"), request_for("stopped")
    assert run(unbroken)[0]
    assert run(stopped, stop_after=5)[0] is False
    assert 0 < capture_progress(stopped.folder).done < SHARDS
    assert {file.suffix for file in stopped.folder.iterdir()} == {".json", ".parquet", ".done"}
    assert run(stopped)[0]
    assert tables(stopped.folder) == tables(unbroken.folder)
    # Nothing is left to do: the teacher is not even loaded.
    assert run(replace(stopped, teacher=TeacherModelConfig(name="no such teacher"))) == (True, [])


def test_a_shard_that_lost_its_end_is_captured_again(request_for: Request) -> None:
    request = request_for("cache")
    assert run(request)[0]
    before = tables(request.folder)
    shard = request.folder / "shard-00002.parquet"
    os.truncate(shard, 100)
    assert run(request)[0]
    assert tables(request.folder) == before


def test_a_claim_counts_as_long_as_its_worker_lives(request_for: Request) -> None:
    request = request_for("cache")
    request.folder.mkdir()
    claim = request.folder / "shard-00001.claim"
    elsewhere = {"job": "7", "restart": 0, "host": "elsewhere", "process": 1}
    claim.write_bytes(orjson.dumps(elsewhere))
    assert run(request)[0] is False, "its heart has just beaten"
    assert capture_progress(request.folder).done == SHARDS - 1
    assert claim.exists()
    os.utime(claim, (time.time() - 100,) * 2)
    assert run(request)[0]
    assert not claim.exists()


# --- what is refused


def test_what_cannot_be_captured_is_refused_by_name(request_for: Request, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_tokens: '<tool>' is no token of the teacher"):
        run(request_for("unknown-token", keep_tokens=["<tool>"]))
    with pytest.raises(ValueError, match=r"distillation.teacher_model.name: .*'no/such'"):
        run(request_for("unknown-teacher", teacher=Path("no/such")))
    first = request_for("cache")
    assert run(first, stop_after=2)[0] is False
    with pytest.raises(ValueError, match=r"holds another cache(.|\n)*k: 64 and 8"):
        run(replace(first, cache=replace(first.cache, k=8)))


def test_a_sample_id_with_two_contents_is_refused_and_a_repeated_sample_is_captured_once(tmp_path: Path) -> None:
    def rows_of(*ids: tuple[str, list[int]]) -> TokenRows:
        shutil.rmtree(tmp_path / "tokens", ignore_errors=True)
        with TokenWriter(tmp_path, "train", max_length=64) as writer:
            for sample_id, tokens in ids:
                writer.add(TokenRow(sample_id, np.array(tokens, np.int32), np.ones(len(tokens), bool), "s"))
        return TokenRows.open(tmp_path, "train")

    repeated = rows_of(("a", [1, 2]), ("b", [1, 2]), ("a", [1, 2]), ("c", [3]))
    assert sorted(np.concatenate(rows_by_shard(repeated, 2)).tolist()) == [0, 1, 3]
    with pytest.raises(ValueError, match="sample id 'a' stands for different tokens"):
        rows_by_shard(rows_of(("a", [1, 2]), ("b", [1, 2]), ("a", [1, 3])), 2)


def test_a_full_device_is_told_with_what_to_do() -> None:
    advice = "batch_tokens(.|\n)*dtype: bfloat16(.|\n)*more GPUs"
    full_memory = told_of_full_memory(lower="distillation.cache.batch_tokens", key="distillation.teacher_model")
    with pytest.raises(ValueError, match=advice), full_memory:
        raise torch.OutOfMemoryError("CUDA out of memory")
