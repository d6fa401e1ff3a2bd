"""A tree of plain values as a dataclass: types, defaults and unknown keys checked, all problems at once."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from functools import cache
from typing import Any, Literal, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from settings.yaml_tree import ConfigTree, KeyPath, Problem

Config = TypeVar("Config")


def build(
    config_class: type[Config], values: dict[str, Any], path: KeyPath, tree: ConfigTree, problems: list[Problem]
) -> Config | None:
    """One section as its dataclass; what is wrong with it goes to `problems`, and None comes back."""
    fields = {item.name: item for item in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    annotations = typing.get_type_hints(config_class)
    before = len(problems)
    typed: dict[str, Any] = {}
    for key, value in values.items():
        here = (*path, key)
        if key not in fields:
            problems.append(
                Problem(
                    tree.place(here),
                    unknown_key(here, [name for name, item in fields.items() if not item.metadata.get("internal")]),
                )
            )
        elif (section_class := section_of(annotations[key])) is not None:
            if value is None and accepts_none(annotations[key]):
                typed[key] = None
            elif value is not None and not isinstance(value, dict):
                message = f"{'.'.join(here)} is a section: put its keys below it, got {value!r}"
                problems.append(Problem(tree.place(here), message))
            else:
                typed[key] = build(section_class, value or {}, here, tree, problems)
        else:
            try:
                typed[key] = check_type(annotations[key], value)
            except (TypeError, ValueError) as error:
                problems.append(Problem(tree.place(here), f"{'.'.join(here)}: {error}"))
    required = [key for key, item in fields.items() if is_required(item)]
    for key in required:
        section_class = section_of(annotations[key])
        if key not in values and section_class is not None:
            typed[key] = build(section_class, {}, (*path, key), tree, problems)
        elif key not in values:
            problems.append(Problem(tree.place(path), f"{'.'.join((*path, key))} is missing and has no default"))
    if any(typed.get(key) is None for key in required):
        return None
    # What a section says of a broken one below it would be guesswork; the whole file judges none of its sections.
    if path and any(typed[key] is None and values[key] is not None for key in typed.keys() & values.keys()):
        return None
    try:
        section = config_class(**typed)
    except ValueError as error:
        for line in str(error).splitlines():
            problems.append(Problem(tree.place(key_named_in(line, path, values)), line))
        return None
    return section if len(problems) == before else None


def section_of(annotation: Any) -> type | None:
    """The dataclass of a section, also of one that may be left out; None where the key holds a plain value."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    for candidate in typing.get_args(annotation) if is_union else (annotation,):
        if dataclasses.is_dataclass(candidate):
            return typing.cast(type, candidate)
    return None


def is_required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


@cache
def type_parser(annotation: Any, spelling: str) -> ArgumentParser:
    """A parser for one type. Unions are equal in any order, but the order decides, so it is part of the key."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=annotation)
    return parser


def check_type(annotation: Any, value: Any) -> Any:
    """The value, converted to its annotated type.

    Raises:
        TypeError: what was expected, and what was given.
        ValueError: a section in a list refuses its keys.
    """
    if value is None and not accepts_none(annotation):
        raise TypeError(f"expected {describe_type(annotation)}, got nothing")
    try:
        parser = type_parser(annotation, str(annotation))
        return parser.instantiate(parser.parse_object({"value": value})).value
    except ArgumentError:
        if typing.get_origin(annotation) is list and isinstance(value, list):
            check_items(typing.get_args(annotation)[0], value)
        hint = "; quote it to make it a text" if accepts_text(annotation) and isinstance(value, int | float) else ""
        raise TypeError(f"expected {describe_type(annotation)}, got {value!r}{hint}") from None


def check_items(annotation: Any, values: list[Any]) -> None:
    """Raise TypeError for the first key that is wrong in a list of sections; nothing for a list of plain values."""
    if not dataclasses.is_dataclass(annotation):
        return
    types_of_keys = typing.get_type_hints(annotation)
    known = [item.name for item in dataclasses.fields(annotation)]
    for number, item in enumerate(values, 1):
        for key, value in item.items() if isinstance(item, dict) else ():
            if key not in known:
                raise TypeError(f"item {number}: {unknown_key((key,), known)}")
            try:
                check_type(types_of_keys[key], value)
            except TypeError as error:
                raise TypeError(f"item {number}, {key}: {error}") from None


TYPE_WORDS: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Any: "anything",
}


def accepts_none(annotation: Any) -> bool:
    return annotation is Any or type(None) in typing.get_args(annotation)


def accepts_text(annotation: Any) -> bool:
    return annotation is str or str in typing.get_args(annotation)


def describe_type(annotation: Any) -> str:
    """The type in a user's words."""
    if annotation in TYPE_WORDS:
        return TYPE_WORDS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(argument) for argument in arguments if argument is not type(None))
    if origin is list:
        return f"a list of {'texts' if arguments == (str,) else 'values'}"
    return "a section of keys" if origin is dict else str(annotation)


def unknown_key(path: KeyPath, known: list[str]) -> str:
    """The message for a key nobody reads, with the nearest one that somebody does."""
    nearest = difflib.get_close_matches(path[-1], known, n=1)
    name = ".".join(path)
    if nearest:
        return f"unknown key {name}; did you mean {'.'.join((*path[:-1], nearest[0]))}?"
    return f"unknown key {name}; known here: {', '.join(sorted(known))}"


def key_named_in(message: str, path: KeyPath, values: dict[str, Any]) -> KeyPath:
    """The key that a dataclass complains about by its whole path, or by its section where that has several places."""
    for key in values:
        names = ".".join((*path, key)), ".".join((*path[-1:], key))
        if re.match(rf"({'|'.join(map(re.escape, names))})\b", message):
            return (*path, key)
    return path


def leaves(values: dict[str, Any], path: KeyPath = ()) -> typing.Iterator[tuple[KeyPath, Any]]:
    """Every key path that holds a plain value or a list, with that value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def changed_keys(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The settings that differ, as (key, before, after)."""
    old, new = dict(leaves(before)), dict(leaves(after))
    return [
        (".".join(path), old.get(path), new.get(path)) for path in sorted(old | new) if old.get(path) != new.get(path)
    ]
