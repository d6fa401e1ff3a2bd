"""What can be known to be wrong with a run that learns from rewards, before anything is queued."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixture.dataset_modules import REWARD_FUNCTION, SCORE_FUNCTION, ModuleFile, defined_names, parse_module
from training.adapter_options import EXPERTS, is_prompt_method, not_mergeable
from training.config import FinetuningConfig, ModelConfig, TrainingConfig
from training.online_config import OnlineConfig, RewardSource

FindModel = Callable[[str, str | None, Path], str]


def online_contradictions(
    online: OnlineConfig, model: ModelConfig, training: TrainingConfig, *, packing: Any
) -> dict[str, str]:
    """Messages by key of what cannot be said beside a phase whose answers the model writes itself.

    `packing` is what the file says of `dataset.packing`, None where it says nothing.
    """
    messages = {}
    if packing:
        messages["dataset.packing"] = (
            f"dataset.packing: finetuning.objective {online.section} asks one prompt a row, and packs the answers "
            "itself; leave the key out"
        )
    if training.parallelism == "deepspeed":
        messages["training.parallelism"] = (
            "training.parallelism: a model that deepspeed spreads over processes cannot write answers here, which "
            f"finetuning.objective {online.section} needs; use ddp or fsdp"
        )
    if model.peft and (model.peft_method in (EXPERTS, "adalora") or is_prompt_method(model.peft_method)):
        messages["model.peft_method"] = (
            f"model.peft_method: {model.peft_method} does not learn from rewards; use lora, or "
            "finetuning.objective: sft"
        )
    if online.engine == "vllm":
        reason = not_mergeable(model.peft_method) if model.peft else None
        if model.peft and model.peft_method == "qlora":
            reason = "its base is held in 4 bits"
        if training.parallelism == "fsdp":
            messages[f"finetuning.{online.section}.engine"] = (
                f"finetuning.{online.section}.engine: vllm is given the whole of the model's weights, which "
                "training.parallelism: fsdp keeps in shards; use ddp, or engine: transformers"
            )
        elif reason:
            messages[f"finetuning.{online.section}.engine"] = (
                f"finetuning.{online.section}.engine: vllm is given the adapter as a part of the model's weights, and "
                f"{model.peft_method} cannot be: {reason}; use engine: transformers"
            )
    if model.peft and online.has_reference and "init_lora_weights" in model.adapter:
        messages["model.adapter"] = (
            "model.adapter.init_lora_weights: the reference is the model with its adapter off, and other first weights "
            f"change the model below; leave it out, or set finetuning.{online.section}.beta: 0"
        )
    return messages


def find_rewards(
    finetuning: FinetuningConfig,
    module: ModuleFile | None,
    is_mixture: bool,
    config_folder: Path,
    find_model: FindModel,
    collect: Callable[..., Any],
) -> FinetuningConfig:
    """The section with the paths of reward models and judges absolute; what is missing is collected."""
    online = finetuning.online
    if online is None:
        return finetuning
    key = f"finetuning.{online.section}.rewards"
    sources = []
    for source in online.rewards:
        if source.kind != "module":
            found = collect(key, find_asked_model, source, config_folder, find_model)
            source = replace(source, name=found or source.name)
        elif is_mixture:
            collect(key, refuse_mixture)
        elif module is not None:
            collect(key, require_reward, module)
        sources.append(source)
    changed: dict[str, Any] = {online.section: replace(online, rewards=sources)}
    return replace(finetuning, **changed)


def refuse_mixture() -> None:
    raise ValueError(
        "kind: module needs a single dataset module (dataset.name or dataset.file), and a mixture is trained on; use "
        "kind: model or kind: judge"
    )


def require_reward(module: ModuleFile) -> None:
    """Raise ValueError unless the module's text defines what rewards answers."""
    names, complete = defined_names(parse_module(module.path).body)
    if complete and not any(name in names for name in (REWARD_FUNCTION, SCORE_FUNCTION)):
        raise ValueError(
            f"{module.path} has no function reward; add reward(prompt_messages, answer, row) -> float to it, or "
            "score(prediction, row) -> float, or use kind: model or kind: judge"
        )


def find_asked_model(source: RewardSource, config_folder: Path, find_model: FindModel) -> str:
    """The folder or hub id of a reward model or judge; ValueError: it is not there, or of the other kind."""
    assert source.name is not None
    name = find_model(source.name, source.revision, config_folder)
    file = Path(name) / "config.json"
    architectures = json.loads(file.read_text(encoding="utf-8")).get("architectures") if file.is_file() else None
    is_classifier = any(one.endswith("ForSequenceClassification") for one in architectures or [])
    if architectures and is_classifier != (source.kind == "model"):
        other = "judge" if source.kind == "model" else "model"
        raise ValueError(
            f"kind: {source.kind} cannot be {', '.join(architectures)} ({name}): `model` takes what "
            f"finetuning.objective: reward exports, `judge` a chat model; is it kind: {other}?"
        )
    return name
