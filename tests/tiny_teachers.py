"""A teacher of random weights, and the options of a run that captures it, for tests of whole chains."""

from __future__ import annotations

import shutil
from pathlib import Path

from tiny_chains import TINY

from jobs.config import PROJECT

TINY_MODEL = PROJECT / "configs/models/tiny"
TEST_YAML = str(PROJECT / "configs/test.yaml")


def make_teacher(folder: Path) -> Path:
    """The tiny model with weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    set_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY_MODEL)).save_pretrained(folder)
    for file in TINY_MODEL.iterdir():
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


def taught_by(teacher: Path, *, shard_tokens: int = 48) -> list[str]:
    """Options that make configs/test.yaml a distillation, of dozens of shards."""
    return [
        *TINY,
        *("--trainer", "distillation", "--distillation.teacher_model.name", str(teacher)),
        *("--distillation.cache.shard_tokens", str(shard_tokens), "--distillation.cache.k", "4"),
    ]
