"""The kinds of adapter that the installed peft offers, and what each takes, known without importing torch.

`model.peft_method` is one of the LoRA family, told by `model.lora`, or a method of peft by peft's own name
(`adalora`, `ia3`, `prefix_tuning`, ...). `model.adapter` takes the fields of that method's config class, whose names
and types are read from peft's sources: importing peft imports torch, and that takes seconds.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal

from settings.typed import check_type

LORA_FAMILY = ("lora", "rslora", "dora", "qlora")
"""Methods that are peft's LoRA, told by `model.lora`."""

EXPERTS = "lora_moe"
"""Several LoRA adapters and a router between them: training/lora_experts.py."""

REFUSED = {
    "adamss": "needs scikit-learn and estimates of its own between the steps",
    "adaption_prompt": "replaces attention itself, which would no longer keep packed samples apart",
    "cpt": "replaces the loss by its own",
    "multitask_prompt_tuning": "asks for the task of each row, which rows do not tell",
    "poly": "asks for the task of each row, which rows do not tell",
    "shadow": "trains a second model beside the first, which the chunked loss does not see",
    "xlora": f"mixes adapters that were trained before; {EXPERTS} trains experts and their router together",
}
"""Methods of peft that cannot be trained here, and why."""

NOT_MERGEABLE = {
    "beft": "it adds biases, for which most models have no place",
    "glora": "it changes biases that the base does not have",
    "lily": "its updates depend on the input",
    "peanut": "its updates are no linear maps",
    "pvera": "its updates are drawn at random",
    EXPERTS: "which experts act differs from token to token, so no one matrix stands for them",
}
"""Methods whose update cannot become part of the base's weights, and why."""

DECIDED_ELSEWHERE = {
    "task_type": "the trainer",
    "peft_type": "model.peft_method",
    "auto_mapping": "the trainer",
    "peft_version": "the installed peft",
    "base_model_name_or_path": "model.name",
    "revision": "model.revision",
    "inference_mode": "the trainer",
    "total_step": "the length of the chain",
    "num_layers": "the model",
    "token_dim": "the model",
    "num_attention_heads": "the model",
    "num_transformer_submodules": "the model",
}
"""Fields of peft's config classes that other keys of a run decide, and which."""

DECIDED_BY_LORA = {
    "r": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "target_modules": "model.lora.target_modules",
    "modules_to_save": "model.lora.modules_to_save",
    "use_dora": "model.peft_method: dora",
    "use_rslora": "model.peft_method: rslora",
}

INITIALISED_FROM_DATA = ("corda", "eva", "lora_ga", "loftq")
REQUIRED = {"trainable_tokens": "token_indices"}
OWN_TARGETS = ("ia3", "ln_tuning", "trainable_tokens")
"""Methods for which peft knows better layers than every linear one."""


@dataclass(frozen=True)
class AdapterMethod:
    """A kind of adapter: its options with their types, and whether it puts tokens or keys before the text."""

    name: str
    options: Mapping[str, Any]
    is_prompt: bool

    @property
    def required(self) -> str | None:
        """The option that has no default."""
        return "num_virtual_tokens" if self.is_prompt else REQUIRED.get(self.name)


def adapter_problems(name: str, options: Mapping[str, Any], *, merge: bool) -> list[str]:
    """What is wrong with `model.peft_method`, `model.adapter` and `model.merge_adapter`, each a line with its key."""
    if name == EXPERTS:
        problems = [
            f"model.adapter.{key}: {EXPERTS} is told by model.lora and model.experts; leave model.adapter out"
            for key in options
        ]
        return problems + (merge_problems(name) if merge else [])
    if name in REFUSED:
        return [f"model.peft_method: {name} {REFUSED[name]}; choose another"]
    if name not in method_names():
        nearest = get_close_matches(name, method_names(), n=1)
        advice = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(method_names())}"
        return [f"model.peft_method: no adapter is called {name!r}; {advice}"]
    if name in LORA_FAMILY and not options:
        return []
    method = adapter_method(name)
    problems = [problem for key, value in options.items() if (problem := option_problem(method, key, value))]
    if method.required and method.required not in options:
        problems.append(f"model.adapter.{method.required} is missing, and {name} has no default for it")
    return problems + (merge_problems(name) if merge else [])


def option_problem(method: AdapterMethod, key: str, value: Any) -> str | None:
    """What is wrong with one option; None where nothing is."""
    place = f"model.adapter.{key}"
    decided = DECIDED_ELSEWHERE | (DECIDED_BY_LORA if method.name in LORA_FAMILY else {})
    if key in decided:
        return f"{place} is decided by {decided[key]}; remove it"
    if key not in method.options:
        nearest = get_close_matches(key, method.options, n=1)
        known = ", ".join(sorted(set(method.options) - set(decided)))
        advice = f"did you mean model.adapter.{nearest[0]}?" if nearest else f"it takes {known}"
        return f"{place}: {method.name} has no such option; {advice}"
    if key == "init_lora_weights" and isinstance(value, str):
        if value in INITIALISED_FROM_DATA:
            return f"{place}: {value} looks at data or a quantised base before training begins, which no block does"
        if re.fullmatch(r"pissa_niter_\d+", value):
            return None
    try:
        check_type(method.options[key], value)
    except (TypeError, ValueError) as error:
        return f"{place}: {error}"
    return None


def merge_problems(name: str) -> list[str]:
    reason = not_mergeable(name)
    return [f"model.merge_adapter: {name} cannot be merged: {reason}; leave it out"] if reason else []


def not_mergeable(name: str) -> str | None:
    """Why adapters of this method cannot become part of the base's weights; None where they can."""
    return (
        "what it learns stands before the text, not in the weights"
        if is_prompt_method(name)
        else NOT_MERGEABLE.get(name)
    )


def is_prompt_method(name: str) -> bool:
    """Whether the method puts virtual tokens, or keys and values, before every sample."""
    return name not in (*LORA_FAMILY, EXPERTS) and adapter_method(name).is_prompt


@cache
def method_names() -> tuple[str, ...]:
    """Every value of `model.peft_method`."""
    return tuple(sorted({*LORA_FAMILY, EXPERTS, *config_classes()} - set(REFUSED)))


@cache
def adapter_method(name: str) -> AdapterMethod:
    """The method of this name, one of `method_names` but the experts."""
    folder, class_name = config_classes()["lora" if name in LORA_FAMILY else name]
    classes: dict[str, ast.ClassDef] = {}
    for file in ("config.py", "tuners/lycoris_utils.py", "tuners/lora/config.py", "tuners/prompt_tuning/config.py"):
        classes |= classes_of(peft_folder() / file)
    classes |= classes_of(folder / "config.py")
    line = lineage(class_name, classes)
    options: dict[str, Any] = {}
    for ancestor in reversed(line):
        for item in ancestor.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                options[item.target.id] = type_of(item.annotation)
    # What only an object of another class could hold cannot be written in a YAML file.
    options = {key: kind for key, kind in options.items() if kind not in (Foreign, Foreign | None)}
    return AdapterMethod(name, options, is_prompt=any(ancestor.name == "PromptLearningConfig" for ancestor in line))


@cache
def config_classes() -> dict[str, tuple[Path, str]]:
    """Of every method that peft registers, its folder and the name of its config class."""
    found = {}
    for file in sorted(peft_folder().glob("tuners/*/__init__.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "register_peft_method":
                given = {item.arg: item.value for item in node.keywords}
                name, config = given["name"], given["config_cls"]
                assert isinstance(name, ast.Constant) and isinstance(config, ast.Name), file
                found[str(name.value)] = (file.parent, config.id)
    return found


def peft_folder() -> Path:
    package = importlib.util.find_spec("peft")
    assert package is not None and package.submodule_search_locations, "peft is in requirements.lock"
    return Path(package.submodule_search_locations[0])


@cache
def classes_of(file: Path) -> dict[str, ast.ClassDef]:
    return {
        node.name: node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)
    }


def lineage(class_name: str, classes: Mapping[str, ast.ClassDef]) -> list[ast.ClassDef]:
    """The class and those that it inherits from, as far as peft defines them."""
    if class_name not in classes:
        return []
    found = classes[class_name]
    bases = [base.id for base in found.bases if isinstance(base, ast.Name)]
    return [found, *(ancestor for base in bases for ancestor in lineage(base, classes))]


class Foreign:
    """Stands for a class that only peft or torch knows."""


KNOWN_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "list": list, "dict": dict, "Any": Any}


def type_of(annotation: ast.expr) -> Any:
    """The type that an annotation spells, with `Foreign` for what is not plain; tuples are lists, as in YAML."""
    match annotation:
        case ast.Constant(value=None):
            return None
        case ast.Name(id=name):
            return KNOWN_TYPES.get(name, list if name in ("tuple", "set") else Foreign)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return union_of([left, right])
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            return Literal[ast.literal_eval(choices)]
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return type_of(inner) | None
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=members)):
            return union_of(members)
        case ast.Subscript(value=ast.Name(id="list" | "List" | "set" | "Sequence"), slice=inner):
            return list if type_of(inner) in (Foreign, list) else list[type_of(inner)]  # type: ignore[misc]
        case ast.Subscript(value=ast.Name(id=name)):
            return KNOWN_TYPES.get(name.lower(), list if name.lower() == "tuple" else Foreign)
    return Foreign


def union_of(members: list[ast.expr]) -> Any:
    kinds = [kind for member in members if (kind := type_of(member)) is not Foreign]
    return functools.reduce(operator.or_, kinds) if kinds else Foreign
