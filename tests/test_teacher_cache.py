"""A teacher's cache is named by all that shapes it, gives back what was captured, and refuses what is not its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from distilling.config import CacheConfig, TeacherModelConfig
from distilling.identity import (
    CaptureProgress,
    cache_folder,
    cache_key,
    capture_progress,
    done_file,
    is_complete,
    manifest_file,
    teacher_identity,
)

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
    identity = teacher_identity(TeacherModelConfig(name=str(teacher_folder)))
    assert time.process_time() - before < 0.5
    os.truncate(weights, (40 << 30) + 1)
    assert teacher_identity(TeacherModelConfig(name=str(teacher_folder))) != identity


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
    program = "import sys, distilling.config, distilling.identity; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
