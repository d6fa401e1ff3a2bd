"""What can be known to be wrong with a distillation before anything is queued: teacher, cache, tokens, layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from distilling.config import StudentConfig, TeacherModelConfig
from distilling.identity import CacheIdentity, teacher_digest
from distilling.tokenizer_gate import Vocabulary, renders_alike, require_same_tokens
from jobs.config import PROJECT, RunConfig, TokenizerSource
from training.config import ModelConfig
from training.model_identity import WEIGHTS_SUFFIXES
from training.shard_folder import capture_progress, manifest_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Collect = Callable[..., Any]
"""collect(key, check, *arguments): what the check returns; its ValueError becomes a problem with the key's line."""


def require_weights(teacher: str) -> None:
    """Raise ValueError where a local teacher or target is only a config."""
    folder = Path(teacher)
    if folder.is_dir() and not any(file.suffix in WEIGHTS_SUFFIXES for file in folder.iterdir()):
        raise ValueError(f"the folder {folder} has no weights (*.safetensors), and nothing can be learned from it")


def find_cache(folder: str, config_folder: Path) -> str:
    """The folder of a finished cache, absolute.

    Raises:
        ValueError: it holds no cache, or an unfinished one.
    """
    tried = [base / Path(folder).expanduser() for base in (config_folder, PROJECT, Path.cwd())]
    found = next((path for path in tried if manifest_file(path).is_file()), None)
    if found is None:
        raise ValueError(f"no teacher's cache in {folder}; tried {', '.join(map(str, dict.fromkeys(tried)))}")
    progress = capture_progress(found)
    if progress.done != progress.total:
        raise ValueError(
            f"{found} has {progress.done} of {progress.total} shards; finish it with ./train.sh capture and the "
            "file that it was begun with"
        )
    return str(found.resolve())


def check_distillation(config: RunConfig, collect: Collect) -> None:
    """Collect everything that is wrong between teacher, student, tokenizer and cache, as far as local folders tell."""
    distillation = config.distillation
    assert distillation is not None
    if distillation.from_teacher is not None:
        key = "layers" if distillation.from_teacher.layers is not None else "every"
        teacher = distillation.teacher_model.name
        collect(f"distillation.from_teacher.{key}", check_depth, distillation.from_teacher, teacher)
    if distillation.teacher != "text":
        collect("distillation.teacher_model.name", check_tokens, config)
    collect("model.name", check_vocabulary_size, config)


def file_at_hand(model: str, name: str) -> Path | None:
    """A file of a model in a folder or in the hub's cache; None where it would have to be downloaded."""
    if Path(model).is_dir():
        file = Path(model) / name
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, name)
    except HFValidationError:  # a folder that is not there
        return None
    return Path(cached) if isinstance(cached, str) else None


def model_shape(model: str) -> dict[str, Any]:
    """The config.json of a model that is at hand; empty for any other."""
    file = file_at_hand(model, "config.json")
    if file is None:
        return {}
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def check_depth(student: StudentConfig, teacher: str) -> None:
    """Raise ValueError for layers that the teacher does not have."""
    depth = model_shape(teacher).get("num_hidden_layers")
    if depth is None:
        return
    if student.layers is not None and student.layers[-1] >= depth:
        raise ValueError(f"the teacher has {depth} layers, 0 to {depth - 1}, and no layer {student.layers[-1]}")
    if student.every is not None and student.every > depth:
        raise ValueError(
            f"the teacher has {depth} layers, so at most every {depth}th can be taken, got {student.every}"
        )


def check_cache(folder: str, teacher: TeacherModelConfig, temperature: float) -> None:
    """Raise ValueError where a finished cache is of another teacher, or cannot be read at the run's temperature."""
    manifest = orjson.loads(manifest_file(Path(folder)).read_bytes())
    identity = CacheIdentity(**manifest["identity"])
    if identity.teacher_digest != teacher_digest(teacher):
        raise ValueError(f"{folder} was made of another teacher: {identity.teacher}, and this is {teacher.name}")
    if temperature not in manifest["temperatures"]:
        kept = ", ".join(map(str, manifest["temperatures"]))
        raise ValueError(f"{folder} can be read at temperatures {kept}, and distillation.temperature is {temperature}")


def readers_of_tokens(config: RunConfig) -> list[TokenizerSource]:
    """The tokenizers that must agree with that of the data: the teacher's, and that of a student which has learned
    tokens already. The data's own is not among them."""
    model, distillation = config.model, config.distillation
    assert distillation is not None
    readers: list[TeacherModelConfig | ModelConfig] = [distillation.teacher_model]
    if not model.from_scratch and distillation.from_teacher is None:
        readers.append(model)
    sources = [
        TokenizerSource(name=one.name, revision=one.revision, trust_remote_code=one.trust_remote_code)
        for one in readers
    ]
    return [source for source in dict.fromkeys(sources) if source.name != config.tokenizer.name]


def check_tokens(config: RunConfig) -> None:
    """Raise ValueError where teacher or student mean other tokens by the ids of the data, as far as folders tell."""
    data = Vocabulary.of_folder(Path(config.tokenizer.name))
    for source in readers_of_tokens(config):
        other = Vocabulary.of_folder(Path(source.name))
        if data is not None and other is not None:
            require_same_tokens(data, other)


def check_tokens_in_full(config: RunConfig, report: Callable[[str], None]) -> None:
    """The same with the tokenizers themselves, wherever they lie; reports where they write conversations differently.

    Raises:
        ValueError: one of them means other tokens by the ids of the data.
    """
    data = load_tokenizer(config.tokenizer)
    for source in readers_of_tokens(config):
        other = load_tokenizer(source)
        found = require_same_tokens(
            Vocabulary.of_tokenizer(config.tokenizer.name, data), Vocabulary.of_tokenizer(source.name, other)
        )
        report(f"{config.tokenizer.name} and {source.name} share {found.same_id:,} tokens, and no id means two")
        if not renders_alike(data, other):
            report(f"their chat templates differ: conversations are written as {config.tokenizer.name} has it")


def load_tokenizer(source: TokenizerSource) -> PreTrainedTokenizerBase:
    """A tokenizer; ValueError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, KeyError) as error:
        raise ValueError(f"cannot load a tokenizer from {source.name!r}: {error}") from error


def check_vocabulary_size(config: RunConfig) -> None:
    """Raise ValueError where the data will hold ids that the student has no embedding for."""
    source = config.tokenizer.name
    vocabulary = Vocabulary.of_folder(Path(source))
    size = model_shape(config.model.name).get("vocab_size")
    if vocabulary is not None and size is not None and vocabulary.size > size:
        raise ValueError(
            f"{config.model.name} has embeddings for {size:,} tokens, and the tokenizer of {source} has ids up to "
            f"{vocabulary.size - 1:,}; take a student with a larger vocab_size, or distillation.teacher: text"
        )
