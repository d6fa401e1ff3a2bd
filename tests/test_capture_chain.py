"""Capturing a teacher on a machine without Slurm: data, cache, nothing twice, nothing lost to whatever ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_chains import folders, train_sh
from tiny_teachers import TEST_YAML, make_teacher, taught_by

from jobs import launch
from jobs.config import PROJECT
from jobs.exit_code import ExitCode
from jobs.plan import plan_run
from jobs.preflight import CheckedRun, check_run
from mixture.prepare import prepare
from settings.yaml_tree import ConfigError
from training.run_folder import RunFolder
from training.shard_folder import capture_progress, is_complete

pytestmark = pytest.mark.chain


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def here(folder: Path, teacher: Path, **options: int) -> list[str]:
    return [*taught_by(teacher, **options), *folders(folder), "--cluster", "local"]


def planned(folder: Path, teacher: Path, *overrides: str, **options: int) -> tuple[CheckedRun, Path]:
    """The run, and where its cache lies or will lie."""
    checked = check_run(PROJECT / "configs/test.yaml", [*here(folder, teacher, **options), *overrides])
    plan = plan_run(checked)
    assert plan.capture is not None
    return checked, plan.capture.folder


def content_of(cache: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in cache.iterdir()}


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A folder in which `./train.sh capture` was run."""
    folder = tmp_path_factory.mktemp("captured")
    answer = train_sh("capture", TEST_YAML, *here(folder, teacher))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "the teacher's cache is complete" in answer.stdout
    assert "of the probability kept" in answer.stdout
    return folder


def test_a_capture_prepares_and_captures_and_trains_nothing(captured: Path, teacher: Path) -> None:
    _, cache = planned(captured, teacher)
    assert is_complete(cache)
    run = RunFolder(captured / "runs/test")
    assert [event["kind"] for event in run.events() if event["event"] == "job_start"] == ["capture"]
    assert not run.checkpoints.exists()


def test_a_second_capture_has_nothing_to_do(captured: Path, teacher: Path) -> None:
    _, cache = planned(captured, teacher)
    before, events = content_of(cache), len(list(RunFolder(captured / "runs/test").events()))
    answer = train_sh("capture", TEST_YAML, *here(captured, teacher))
    assert answer.returncode == 0
    assert f"the teacher's cache is complete: {cache}" in answer.stdout
    assert content_of(cache) == before
    assert len(list(RunFolder(captured / "runs/test").events())) == events


def test_the_run_itself_needs_no_capture_any_more(captured: Path, teacher: Path) -> None:
    checked, _ = planned(captured, teacher)
    run = RunFolder(captured / "runs/test")
    key = plan_run(checked).data_key
    assert launch.remaining_jobs(run, checked.config, key) == []
    run.capture_only.rename(run.path / "aside")
    try:
        assert launch.remaining_jobs(run, checked.config, key) == ["block", "block", "block", "evaluate"]
    finally:
        (run.path / "aside").rename(run.capture_only)


def start_run(folder: Path, teacher: Path, **options: int) -> tuple[RunFolder, Path]:
    """A run whose data is prepared, before its first capture."""
    checked, cache = planned(folder, teacher, **options)
    prepare(checked.preparation, checked.config.data_folder, lambda line: None)
    return launch.open_capture_folder(checked, plan_run(checked).data_key, print), cache


def start_capture(run: RunFolder, *, rank: int = 0) -> subprocess.Popen[bytes]:
    """One process of a capture job that runs here."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    environment = os.environ | {"PYTHONPATH": str(run.code)} | ranks
    return subprocess.Popen([sys.executable, "-m", "jobs.job", "capture", str(run.path)], cwd=run.code, env=environment)


def wait_for_shards(cache: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    while capture_progress(cache).done < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)])
def test_two_workers_finish_what_one_that_is_ended_half_way_began_and_it_is_the_same_cache(
    captured: Path, teacher: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run, cache = start_run(tmp_path, teacher)
    process = start_capture(run)
    wait_for_shards(cache, 2)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    done = capture_progress(cache).done
    assert done >= 2 and not is_complete(cache)
    kept = {file.name: file.stat().st_mtime_ns for file in cache.glob("*.done")}

    workers = [start_capture(run, rank=rank) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [ExitCode.DONE] * 2
    assert is_complete(cache)
    assert {name: (cache / name).stat().st_mtime_ns for name in kept} == kept
    _, whole = planned(captured, teacher)
    shards = {name: content for name, content in content_of(cache).items() if name.startswith("shard-")}
    assert shards == {name: content for name, content in content_of(whole).items() if name.startswith("shard-")}


def test_a_block_captures_what_is_missing_before_it_trains(teacher: Path, tmp_path: Path) -> None:
    run, cache = start_run(tmp_path, teacher)
    run.capture_only.unlink()
    environment = os.environ | {"PYTHONPATH": str(run.code)}
    command = [sys.executable, "-m", "jobs.job", "block", str(run.path)]
    answer = subprocess.run(command, cwd=run.code, env=environment, capture_output=True, text=True, timeout=180)
    assert "capturing what is missing before training" in answer.stdout
    assert is_complete(cache), answer.stdout + answer.stderr


def test_a_stopped_capture_says_so_and_halts_nothing(teacher: Path, tmp_path: Path) -> None:
    run, cache = start_run(tmp_path, teacher)
    run.stop.touch()
    assert start_capture(run).wait(timeout=60) == ExitCode.STOPPED_EARLY
    assert not run.halt.exists() and capture_progress(cache).done == 0


def test_the_plan_tells_what_the_cache_costs_once_the_data_is_prepared(captured: Path, teacher: Path) -> None:
    answer = train_sh("plan", TEST_YAML, *here(captured, teacher), "--name", "other")
    assert answer.returncode == 0, answer.stderr
    assert "tokens with loss, about" in answer.stdout
    assert "H100" in answer.stdout and "live" in answer.stdout


def test_the_doctor_compares_tokens_and_asks_the_teacher_again(captured: Path, teacher: Path) -> None:
    answer = train_sh("doctor", TEST_YAML, *here(captured, teacher), "--json")
    found = {finding["about"]: finding for finding in json.loads(answer.stdout)}
    assert found["tokens"]["level"] == found["chat template"]["level"] == "fine"
    # Random weights with tied embeddings repeat what they read.
    assert "the token before a position is likelier there than its own" in found["cache offset and mass"]["found"]
    assert found["teacher asked again"]["level"] == "fine"
    assert "in float32 is" in found["teacher asked again"]["found"]


def test_the_doctor_says_what_is_not_captured_yet(teacher: Path, tmp_path: Path) -> None:
    answer = train_sh("doctor", TEST_YAML, *here(tmp_path, teacher), "--json")
    assert "nothing captured yet" in [finding["found"] for finding in json.loads(answer.stdout)]


# What is refused before anything starts


def problems_of(folder: Path, teacher: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        planned(folder, teacher, *overrides)
    return str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["--distillation.teacher_model.name", "configs/models/none"], "no folder configs/models/none"),
        (["--distillation.teacher_model.name", "configs/models/tiny"], "has no weights (*.safetensors)"),
        (["--distillation.cache.folder", "nowhere"], "no teacher's cache in nowhere"),
    ],
)
def test_what_cannot_be_captured_is_told_at_once(
    teacher: Path, tmp_path: Path, overrides: list[str], told: str
) -> None:
    problems = problems_of(tmp_path, teacher, "--model.from_scratch", "false", *overrides)
    assert told in problems
    assert problems.startswith(f"{overrides[0]}: {overrides[0].removeprefix('--')}: ")


def test_a_student_with_other_tokens_is_told_with_a_way_out(teacher: Path, tmp_path: Path) -> None:
    student = make_teacher(tmp_path / "student")
    content = json.loads((student / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["e"], ids["t"] = ids["t"], ids["e"]
    (student / "tokenizer.json").write_text(json.dumps(content))
    own_weights = ["--model.name", str(student), "--model.from_scratch", "false"]
    assert "do not read the same tokens" in problems_of(tmp_path, teacher, *own_weights)
    checked = check_run(PROJECT / "configs/test.yaml", [*here(tmp_path, teacher), "--model.name", str(student)])
    assert checked.config.tokenizer.name == str(teacher)  # a student of random weights has no tokens of its own
    by_text = [*here(tmp_path, teacher), *own_weights, "--distillation.teacher", "text"]
    assert check_run(PROJECT / "configs/test.yaml", by_text).config.tokenizer.name == str(student)


def test_layers_that_the_teacher_does_not_have_are_told(teacher: Path, tmp_path: Path) -> None:
    cut = [
        "--model.from_scratch",
        "false",
        "--model.name",
        str(teacher),
        "--distillation.from_teacher.layers",
        "[0, 99]",
    ]
    assert "and no layer 99" in problems_of(tmp_path, teacher, *cut)


def test_a_student_without_an_embedding_for_every_token_is_told(teacher: Path, tmp_path: Path) -> None:
    small = make_teacher(tmp_path / "small")
    text = (small / "config.json").read_text()
    (small / "config.json").write_text(text.replace('"vocab_size": ', '"vocab_size": 3, "was": '))
    assert "has embeddings for 3 tokens" in problems_of(tmp_path, teacher, "--model.name", str(small))


def test_a_cache_made_before_is_read_where_it_is_of_this_teacher(captured: Path, teacher: Path, tmp_path: Path) -> None:
    _, cache = planned(captured, teacher)
    overrides = [*here(tmp_path, teacher), "--distillation.cache.folder", str(cache)]
    checked = check_run(PROJECT / "configs/test.yaml", overrides)
    assert plan_run(checked).capture is None
    other = make_teacher(tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-5:] = b"other"
    (other / "model.safetensors").write_bytes(weights)
    told = problems_of(tmp_path, other, "--distillation.cache.folder", str(cache))
    assert "was made of another teacher" in told
    (cache / "shard-00000.done").rename(tmp_path / "aside")
    try:
        assert "shards; finish it with ./train.sh capture" in problems_of(
            tmp_path, teacher, "--distillation.cache.folder", str(cache)
        )
    finally:
        (tmp_path / "aside").rename(cache / "shard-00000.done")


def test_a_cache_that_does_not_fit_on_the_disk_is_refused(captured: Path, teacher: Path) -> None:
    answer = train_sh("capture", TEST_YAML, *here(captured, teacher, shard_tokens=65), "--name", "big", *HUGE)
    assert answer.returncode == 64
    assert "are free there; free space, name another data_dir" in answer.stderr


HUGE = ["--distillation.cache.kind", "topk", "--distillation.cache.k", "4000000000"]
