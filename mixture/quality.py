"""Published quality heuristics for one text, with the thresholds of their papers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

QualityRule = Callable[[str, list[str]], "str | None"]
"""(text, its words) -> None, or the reason to drop it."""

GOPHER_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
LETTER = re.compile(r"[^\W\d_]")
PARAGRAPH_END = re.compile(r"\n{2,}")
SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?:\s|$)")
CLOSING_PUNCTUATION = (".", "!", "?", '"', "'", "…", "。", "！", "？", "”", "’")  # noqa: RUF001


def compile_quality(names: Sequence[str]) -> Callable[[str], str | None]:
    """A function that gives None for a text that passes all named heuristics, else the reason to drop it."""
    for name in names:
        if name not in QUALITY_RULES:
            raise ValueError(f"filters.quality: {name!r} is not known; known: {', '.join(QUALITY_RULES)}")
    rules = tuple(QUALITY_RULES[name] for name in names)

    def refusal(text: str) -> str | None:
        words = text.split()
        if not words:
            return "no words"
        for rule in rules:
            if reason := rule(text, words):
                return reason
        return None

    return refusal


def gopher_quality(text: str, words: list[str]) -> str | None:
    """Rae et al. 2021 (Gopher), appendix A.1.1, but for its bounds of 50 to 100,000 words: those are min/max_words.

    Mean word length 3 to 10 characters; at most one # and one ellipsis for ten words; at most 90 % of lines begin with
    a bullet and 30 % end with an ellipsis; 80 % of words hold a letter; two different words of `GOPHER_STOP_WORDS`,
    so it is for English. Words are what white space separates.
    """
    count = len(words)
    if not 3 <= sum(map(len, words)) / count <= 10:
        return "gopher mean word length"
    if text.count("#") > 0.1 * count or text.count("...") + text.count("…") > 0.1 * count:
        return "gopher symbols"
    lines = text.splitlines()
    if sum(line.lstrip().startswith(("•", "‣", "-", "*")) for line in lines) > 0.9 * len(lines):
        return "gopher bullets"
    if sum(line.rstrip().endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
        return "gopher ellipses"
    if sum(map(str.isalpha, words)) < 0.8 * count and sum(map(bool, map(LETTER.search, words))) < 0.8 * count:
        return "gopher words with letters"
    if len(GOPHER_STOP_WORDS.intersection(text.lower().split())) < 2:
        return "gopher stop words"
    return None


def gopher_repetition(text: str, words: list[str]) -> str | None:
    """Rae et al. 2021 (Gopher), table A1: lines, paragraphs and the most frequent 2-, 3- and 4-gram.

    Repeated lines or paragraphs are at most 30 % of them and 20 % of the characters; the most frequent 2-, 3- and
    4-gram cover at most 20, 18 and 16 % of the characters, where they come more than once. Of that table, the
    fractions of repeated 5- to 10-grams are left out: they take far longer than all the rest.
    """
    for unit, parts in (("lines", text.splitlines()), ("paragraphs", PARAGRAPH_END.split(text.strip()))):
        filled = [part for part in parts if part.strip()]
        repeated, characters = repetitions(filled)
        if repeated > 0.3 * len(filled) or characters > 0.2 * len(text):
            return f"gopher repeated {unit}"
    for length, share in ((2, 0.20), (3, 0.18), (4, 0.16)):
        if len(words) < length:
            break
        (most_frequent, times), *_ = Counter(zip(*(words[i:] for i in range(length)), strict=False)).most_common(1)
        if times > 1 and times * len(" ".join(most_frequent)) > share * len(text):
            return "gopher most frequent words"
    return None


def c4(text: str, words: list[str]) -> str | None:
    """Raffel et al. 2020 (T5), section 2.2: no `lorem ipsum`, no curly bracket, three sentences or more.

    For prose: the curly bracket is there to drop code. A sentence ends in . ! or ? before white space. The rules of
    that section that cut single lines out of a text, and its list of words, are left out.
    """
    if "{" in text:
        return "c4 curly bracket"
    if "lorem ipsum" in text.lower():
        return "c4 lorem ipsum"
    if len(SENTENCE_END.findall(text)) < 3:
        return "c4 sentences"
    return None


def fineweb(text: str, words: list[str]) -> str | None:
    """Penedo et al. 2024 (FineWeb), section 3.6: lines that end in punctuation, repeat, or are short.

    More than 12 % of lines end in punctuation; repeated lines hold less than 10 % of the characters; less than 67 % of
    lines are shorter than 30 characters. For pages of prose: answers of one short line do not pass.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if sum(line.rstrip().endswith(CLOSING_PUNCTUATION) for line in lines) <= 0.12 * len(lines):
        return "fineweb lines without punctuation"
    if repetitions(lines)[1] >= 0.1 * sum(map(len, lines)):
        return "fineweb repeated lines"
    if sum(len(line) < 30 for line in lines) >= 0.67 * len(lines):
        return "fineweb short lines"
    return None


QUALITY_RULES: dict[str, QualityRule] = {
    "gopher_quality": gopher_quality,
    "gopher_repetition": gopher_repetition,
    "c4": c4,
    "fineweb": fineweb,
}
"""What `filters.quality` may name."""


def repetitions(parts: list[str]) -> tuple[int, int]:
    """How many parts came before, and how many characters those hold."""
    unique = set(parts)
    if len(unique) == len(parts):
        return 0, 0
    return len(parts) - len(unique), sum(map(len, parts)) - sum(map(len, unique))
