"""What answers belong to: the key that names their folder. No torch here."""

from __future__ import annotations

from pathlib import Path

import orjson
import xxhash

from answering.config import AnswersConfig
from training.config import ModelConfig
from training.model_identity import model_identity
from training.vllm_config import shaping_settings

FORMAT_VERSION = 1
"""Raised whenever the same request gives other answers, so that old ones are not taken for new."""


def answers_key(writer: ModelConfig, answers: AnswersConfig, *, data_key: str, seed: int) -> str:
    """16 hex digits over all that shapes the answers that a model writes: the model, the rows, and how it writes."""
    parts = {
        "format": FORMAT_VERSION,
        "writer": model_identity(writer.name, writer.revision),
        "dtype": writer.dtype,
        "data": data_key,
        "max_new_tokens": answers.max_new_tokens,
        "temperature": answers.temperature,
        "keep_unfinished": answers.keep_unfinished,
        "seed": seed if answers.temperature else None,
    }
    parts |= shaping_settings(answers.engine, answers.vllm)
    return xxhash.xxh3_64_hexdigest(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS))


def answers_folder(data_dir: Path, key: str) -> Path:
    """Where the answers of a key lie."""
    return data_dir / "answers" / key
