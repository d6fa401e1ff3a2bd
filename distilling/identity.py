"""What a teacher's cache belongs to: the key that names its folder. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import xxhash

from distilling.config import CacheConfig, TeacherModelConfig
from training.model_identity import model_digest, model_identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 2
"""Raised whenever the same request gives other files, so that old caches are not taken for new."""


# --- the key


def cache_key(teacher: TeacherModelConfig, cache: CacheConfig, *, data_key: str, seed: int) -> str:
    """16 hex digits over all that shapes a cache: the teacher, the prepared data, and what is kept of each position."""
    parts = {
        "format": FORMAT_VERSION,
        "teacher": model_identity(teacher.name, teacher.revision),
        "dtype": teacher.dtype,
        "data": data_key,
        "kind": cache.kind,
        "k": cache.top_tokens,
        "draws": cache.num_draws,
        "temperatures": kept_temperatures(cache),
        "keep_tokens": cache.keep_tokens,
        "shard_tokens": cache.shard_tokens,
        "seed": seed if cache.num_draws else None,
    }
    return xxhash.xxh3_64_hexdigest(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS))


def kept_temperatures(cache: CacheConfig) -> list[float]:
    """Temperatures that a cache keeps its sums at: 1, where the kept tokens are, and those that it is to be read at."""
    return sorted({1.0, *cache.temperatures}) if cache.kind == "topk" else [1.0]


def teacher_digest(teacher: TeacherModelConfig) -> str:
    """16 hex digits over the identity of a teacher."""
    return model_digest(teacher.name, teacher.revision)


# --- what a cache was made of


@dataclass(frozen=True, kw_only=True)
class CacheIdentity:
    """What a cache was made of; it serves only runs that are made of the same."""

    teacher: str
    """Name and revision, for messages: a teacher that was moved is the same one."""

    teacher_digest: str
    vocabulary_digest: str
    """Of the tokenizer's map from tokens to ids."""

    chat_template_digest: str
    data_fingerprint: str

    @classmethod
    def of(
        cls, teacher: TeacherModelConfig, tokenizer: PreTrainedTokenizerBase, *, data_fingerprint: str
    ) -> CacheIdentity:
        """The identity of a cache that this teacher makes of data that this tokenizer has made."""
        vocabulary = orjson.dumps(tokenizer.get_vocab(), option=orjson.OPT_SORT_KEYS)
        template = orjson.dumps(tokenizer.chat_template, option=orjson.OPT_SORT_KEYS)
        return cls(
            teacher=teacher.name if teacher.revision is None else f"{teacher.name} at {teacher.revision}",
            teacher_digest=teacher_digest(teacher),
            vocabulary_digest=xxhash.xxh3_64_hexdigest(vocabulary),
            chat_template_digest=xxhash.xxh3_64_hexdigest(template),
            data_fingerprint=data_fingerprint,
        )

    def differences(self, other: CacheIdentity) -> list[str]:
        """What differs from another one, in words with both values, this one's first."""
        mine, its = asdict(self), asdict(other)
        words = {
            "teacher_digest": "teacher",
            "vocabulary_digest": "vocabulary of the tokenizer",
            "chat_template_digest": "chat template",
            "data_fingerprint": "prepared data",
        }
        found = []
        for key, word in words.items():
            if mine[key] != its[key]:
                name, its_name = (f"{self.teacher} ", f"{other.teacher} ") if word == "teacher" else ("", "")
                found.append(f"{word}: {name}({mine[key]}) and {its_name}({its[key]})")
        return found


# --- the folder


def cache_folder(data_dir: Path, key: str) -> Path:
    """Where the cache of a key lies."""
    return data_dir / "teacher" / key


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.parquet"
