"""A run's YAML file as a tree of plain values that remembers on which line each key stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a run's settings: where, and what to do about it."""

    place: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


class ConfigError(ValueError):
    """Everything wrong with a run's settings, one line each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))


@dataclass
class ConfigTree:
    """Nested plain values, with the place in the file or on the command line that set each key."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Where the key was set; the nearest section above it, or the file, where it was not."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.source)

    def override(self, path: KeyPath, value: Any) -> None:
        """Set one key from the command line."""
        section = self.values
        for key in path[:-1]:
            if section.get(key) is None:
                section[key] = {}
            section = section[key]
            if not isinstance(section, dict):
                raise ConfigError(
                    [Problem(f"--{'.'.join(path)}", f"{key} is not a section, so it has no key below it")]
                )
        section[path[-1]] = value
        self.places[path] = f"--{'.'.join(path)}"


def read_config_file(path: Path) -> ConfigTree:
    """The tree of one YAML file.

    Raises:
        ConfigError: the file cannot be read, is no YAML mapping, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([Problem(str(path), f"no such file (working folder {Path.cwd()})")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(str(path), f"cannot be read: {error}")]) from None
    tree = ConfigTree(source=str(path))
    try:
        root = yaml.compose(text, Loader=PlainLoader)
    except yaml.YAMLError as error:
        raise ConfigError([yaml_problem(path, error)]) from None
    if root is None:
        raise ConfigError([Problem(str(path), "the file is empty; configs/test.yaml is a small example")])
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError([Problem(f"{path}:1", "expected `key: value` lines at the top level")])
    problems: list[Problem] = []
    tree.values = read_mapping(root, (), path, tree.places, problems)
    if problems:
        raise ConfigError(problems)
    return tree


def read_overrides(arguments: Sequence[str]) -> list[tuple[KeyPath, Any]]:
    """`--section.key value` and `--section.key=value` as key paths and values, read by the rules of the file."""
    overrides: list[tuple[KeyPath, Any]] = []
    remaining = list(arguments)
    while remaining:
        flag = remaining.pop(0)
        if not re.fullmatch(r"--[A-Za-z_][\w.-]*(=.*)?", flag, re.DOTALL):
            raise ConfigError([Problem(repr(flag), "expected --section.key VALUE, for example --training.lr 1e-4")])
        name, equals, text = flag[2:].partition("=")
        if not equals:
            if not remaining:
                raise ConfigError([Problem(flag, "a value is missing after it")])
            text = remaining.pop(0)
        overrides.append((tuple(name.split(".")), read_value(flag, text)))
    return overrides


class PlainLoader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: 1e-5 is a float, 12:00:00 a text (PyYAML: 43200), only true and false are booleans."""


PlainLoader.yaml_implicit_resolvers = {}
for tag, pattern, first_characters in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    PlainLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), list(first_characters)
    )


def read_mapping(
    node: yaml.MappingNode, path: KeyPath, file: Path, places: dict[KeyPath, str], problems: list[Problem]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = f"{file}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
            problems.append(Problem(place, "keys must be plain names"))
            continue
        key = key_node.value
        here = (*path, key)
        if key in values:
            problems.append(Problem(place, f"{'.'.join(here)} was already given at {places[here]}; keep one of them"))
            continue
        places[here] = place
        values[key] = read_node(value_node, here, file, places, problems)
    return values


def read_node(node: yaml.Node, path: KeyPath, file: Path, places: dict[KeyPath, str], problems: list[Problem]) -> Any:
    if isinstance(node, yaml.MappingNode):
        return read_mapping(node, path, file, places, problems)
    if isinstance(node, yaml.SequenceNode):
        return [read_node(item, (*path, str(number)), file, places, problems) for number, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    return read_scalar(node, f"{file}:{node.start_mark.line + 1}", problems)


def read_scalar(node: yaml.ScalarNode, place: str, problems: list[Problem]) -> Any:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    match kind:
        case "str":
            return node.value
        case "null":
            return None
        case "bool":
            return node.value.lower() == "true"
        case "int":
            return int(node.value, 0) if node.value.lower().startswith(("0x", "0o")) else int(node.value)
        case "float":
            return float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))
        case _:
            problems.append(Problem(place, f"the tag {node.tag} is not supported; write a plain value"))
            return None


def read_value(flag: str, text: str) -> Any:
    """A command-line value, read as YAML, so that [a, b] is a list and 1e-4 a number."""
    try:
        node = yaml.compose(text, Loader=PlainLoader)
    except yaml.YAMLError:
        return text
    problems: list[Problem] = []
    value = None if node is None else read_node(node, (), Path(flag), {}, problems)
    if problems:
        raise ConfigError(problems)
    return value


def yaml_problem(path: Path, error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    text = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    advice = " (indent with spaces, not tabs)" if "\\t" in text else ""
    return Problem(place, f"not valid YAML: {text}{f' {context}' if context else ''}{advice}")
