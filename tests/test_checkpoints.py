"""A checkpoint is whole or is not there: written beside, marker last, and checked before it is trusted."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import finetuning
from training import checkpoints
from training.checkpoints import (
    Checkpoint,
    NoValidCheckpointError,
    Progress,
    ResumeTerms,
    Split,
    newest_valid,
    refuse_changed_terms,
)
from training.ledger import EpochRows, Ledger
from training.run import FinetuningRun

MakeRun = Callable[..., FinetuningRun]

TERMS = ResumeTerms(
    fingerprint="f",
    objective="sft",
    parameters="p",
    batch_size=8,
    gradient_accumulation=1,
    world_size=2,
    parallelism="ddp",
    horizon_steps=100,
    optimization="lr 1e-05, cosine",
)


def write(folder: Path, step: int, *, keep: int = 2, size: int = 100, tied: str | None = None) -> Checkpoint:
    temporary = checkpoints.temporary_folder(folder, step, "job-1")
    (temporary / "shards").mkdir(parents=True)
    (temporary / "model.safetensors").write_bytes(bytes(size))
    (temporary / "shards" / "0.bin").write_bytes(b"abc")
    ledger = Ledger(rows_per_epoch=160).adding([EpochRows.of(0, np.arange(16 * step))])
    progress = Progress(
        step=step,
        epoch=step / 10,
        samples=16 * step,
        learning_rate=1e-5,
        terms=TERMS,
        ledger=ledger,
        tied_to_split=tied,
    )
    return checkpoints.commit(temporary, progress, keep=keep)


def test_a_committed_checkpoint_is_read_back_with_all_that_was_said_about_it(tmp_path: Path) -> None:
    written = write(tmp_path, 12)
    assert newest_valid(tmp_path) == (written, [])
    assert (written.step, written.epoch, written.samples, written.num_bytes) == (12, 1.2, 192, 103)
    assert written.terms == TERMS
    assert written.ledger.epochs[0].rows == 192
    assert written.path == tmp_path / "step_00000012"
    marker = json.loads((written.path / "marker.json").read_text())
    assert marker["files"] == {"model.safetensors": 100, "shards/0.bin": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000012"]


def test_there_is_no_checkpoint_before_the_first(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "missing") == (None, [])
    (tmp_path / "step_00000004.tmp-job-1").mkdir()
    assert newest_valid(tmp_path) == (None, [])


def make_look_old(path: Path) -> None:
    os.utime(path, (0, 0))


def remove_marker(path: Path) -> None:
    (path / "marker.json").unlink()


def truncate_marker(path: Path) -> None:
    (path / "marker.json").write_text('{"step": 2')


def empty_marker(path: Path) -> None:
    (path / "marker.json").write_text("{}")


def remove_file(path: Path) -> None:
    (path / "shards" / "0.bin").unlink()


def truncate_file(path: Path) -> None:
    (path / "model.safetensors").write_bytes(bytes(99))


def copy_of_another(path: Path) -> None:
    shutil.copy(path.parent / "step_00000001" / "marker.json", path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove_marker, "no marker.json: it was never finished"),
        (truncate_marker, "marker.json is not whole"),
        (empty_marker, "marker.json lacks what this version needs: 'files'"),
        (remove_file, "shards/0.bin is missing"),
        (truncate_file, "model.safetensors has 99 bytes, and had 100 when it was written"),
        (copy_of_another, "marker.json is that of step 1"),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over(
    damage: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    before = write(tmp_path, 1)
    damage(write(tmp_path, 2).path)
    newest, rejected = newest_valid(tmp_path)
    assert newest == before
    assert len(rejected) == 1 and rejected[0].startswith(f"step_00000002: {reason}")


def test_age_on_disk_says_nothing_about_which_is_newest(tmp_path: Path) -> None:
    write(tmp_path, 9)
    newest = write(tmp_path, 10)
    make_look_old(newest.path)
    assert newest_valid(tmp_path)[0] == newest


def test_damaged_checkpoints_only_are_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    remove_marker(write(tmp_path, 1).path)
    truncate_file(write(tmp_path, 2).path)
    with pytest.raises(NoValidCheckpointError, match=r"step_00000002: model.*\n.*step_00000001: no marker"):
        newest_valid(tmp_path)


def test_the_oldest_are_pruned_and_two_whole_ones_always_stay(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004", "step_00000005"]
    truncate_file(tmp_path / "step_00000005")
    write(tmp_path, 6, keep=1)
    whole = [path.name for path in checkpoints.checkpoint_folders(tmp_path) if checkpoints.is_whole(path)]
    assert whole == ["step_00000006", "step_00000004"]


def test_a_broken_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    truncate_file(write(tmp_path, 3).path)
    again = write(tmp_path, 3)
    assert newest_valid(tmp_path) == (again, [])


def test_leftovers_of_dead_writers_are_swept(tmp_path: Path) -> None:
    written = write(tmp_path, 3)
    left = checkpoints.temporary_folder(tmp_path, 4, "job-0")
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(10))
    assert checkpoints.sweep_unfinished(tmp_path) == [left.name]
    assert newest_valid(tmp_path) == (written, [])
    assert not left.exists()


@pytest.mark.parametrize("moment", ["sync", "write_marker"])
def test_a_writer_that_dies_at_any_moment_leaves_the_checkpoint_before(moment: str, tmp_path: Path) -> None:
    before = write(tmp_path, 1)
    program = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from training import checkpoints
import test_checkpoints
checkpoints.{moment} = lambda *arguments: os._exit(9)
test_checkpoints.write(Path({str(tmp_path)!r}), 2)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    assert newest_valid(tmp_path) == (before, [])


def test_changed_terms_are_refused_with_old_and_new_and_a_way_out(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 1)
    refuse_changed_terms(checkpoint, TERMS)
    with pytest.raises(ValueError) as refusal:
        refuse_changed_terms(checkpoint, replace(TERMS, world_size=4, fingerprint="g"))
    text = str(refusal.value)
    assert "8 rows x 1 micro-batch x 2 processes -> 32 = 8 rows x 1 micro-batch x 4 processes (restore " in text
    assert "fingerprint: f -> g (the prepared data changed" in text
    assert "batch_size: " not in text and "world_size: " not in text


def test_steps_may_be_split_otherwise_where_they_stay_the_same_and_nothing_ties_them(tmp_path: Path) -> None:
    other = replace(TERMS, batch_size=2, gradient_accumulation=8, world_size=1)
    free, tied = write(tmp_path, 1), write(tmp_path, 2, tied="dropout was drawn")
    refuse_changed_terms(free, other)
    refuse_changed_terms(free, replace(other, horizon_steps=9), before_extensions=[other])
    with pytest.raises(ValueError, match=r"8 rows x 1 .* 2 processes -> 2 rows x 8 .* 1 process .*: dropout was drawn"):
        refuse_changed_terms(tied, other)
    with pytest.raises(ValueError, match=r"16 = .* -> 8 = .* \(training.gradient_accumulation: 2 keeps them\)"):
        refuse_changed_terms(free, replace(TERMS, world_size=1))
    with pytest.raises(ValueError, match=r"\(restore training.batch_size, training.gradient_accumulation and"):
        refuse_changed_terms(free, replace(TERMS, world_size=3))


@pytest.mark.parametrize("tied", [None, "dropout was drawn"])
def test_another_split_has_one_remedy_however_many_of_its_keys_changed(tied: str | None, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 1, tied=tied)
    # Four times the steps, and extended since by half of them.
    other = replace(TERMS, batch_size=4, world_size=1, horizon_steps=400)
    extended = replace(other, horizon_steps=600, optimization="lr 1e-05, cosine, extended")
    with pytest.raises(ValueError) as refusal:
        refuse_changed_terms(checkpoint, extended, before_extensions=[other])
    (change,) = str(refusal.value).splitlines()[1:-1]
    steps = (
        "rows of an optimizer step: 16 = 8 rows x 1 micro-batch x 2 processes -> 4 = 4 rows x 1 micro-batch x 1 process"
    )
    kept = "training.gradient_accumulation: 4 keeps them"
    assert change.strip() == f"{steps} ({f'restore {checkpoints.SPLIT}' if tied else kept})"


def test_every_term_has_a_remedy() -> None:
    assert checkpoints.REMEDY.keys() | Split.__dataclass_fields__.keys() == ResumeTerms.__dataclass_fields__.keys()


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    checkpoints.require_free_disk(tmp_path, free // 2)
    with pytest.raises(OSError, match=r"a checkpoint needs about .* GB and the disk has .* GB free"):
        checkpoints.require_free_disk(tmp_path, 2 * free)


@pytest.mark.chain
def test_a_write_that_fails_leaves_the_checkpoint_before_and_nothing_else(make_run: MakeRun) -> None:
    run = make_run("run", training={"total_jobs": 2})
    first = finetuning.train(run)
    before = newest_valid(run.folder.checkpoints)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses to let any file grow beyond this, as a full disk would.
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        with pytest.raises(OSError, match="checkpoint of step 14 could not be written") as failure:
            finetuning.train(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"Newest whole checkpoint: step_{first.step:08d}" in str(failure.value)
    assert newest_valid(run.folder.checkpoints) == before
    assert not list(run.folder.checkpoints.glob("*.tmp-*"))
    assert finetuning.train(run).finished


def test_reading_checkpoints_needs_no_torch() -> None:
    program = "import sys, training.checkpoints, training.export, training.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent).returncode == 0
