"""The published quality heuristics give what their rules, counted plainly, give."""

from __future__ import annotations

import random
import re

import pytest

from mixture.quality import QUALITY_RULES, compile_quality

PROSE = (
    "The harbour town wakes long before the sun, and the boats have already left by the time the market opens.\n"
    "Fishermen return with baskets of herring, which they sell to cooks that have walked down from the hills.\n"
    "By noon the quay is quiet again. Only gulls remain, quarrelling with one another over scraps of bread."
)


@pytest.mark.parametrize("name", QUALITY_RULES)
def test_plain_prose_passes(name: str) -> None:
    assert compile_quality([name])(PROSE) is None
    assert compile_quality(list(QUALITY_RULES))(PROSE) is None


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("gopher_quality", "a b c d e the of", "gopher mean word length"),
        ("gopher_quality", "incomprehensibilities the antidisestablishmentarianism of", "gopher mean word length"),
        ("gopher_quality", "The ## sign is used ### to mark headings that have levels", "gopher symbols"),
        ("gopher_quality", "the dog... of the house and… there is more of that", "gopher symbols"),
        ("gopher_quality", "- the first of them\n* one that is next\n• have another", "gopher bullets"),
        (
            "gopher_quality",
            "the cat of that house is here today with the dog and also all of us…\nNo more.",
            "gopher ellipses",
        ),
        ("gopher_quality", "the 1234 of 5678 910 and more", "gopher words with letters"),
        ("gopher_quality", "Bananas grow quickly near warm rivers", "gopher stop words"),
        ("gopher_quality", "The the THE bananas grow quickly", "gopher stop words"),
        ("gopher_repetition", "same line\nsame line\nother words here\n", "gopher repeated lines"),
        (
            "gopher_repetition",
            "one two\nthree four\n\none two\nthree four\n\none two\nthree four",
            "gopher repeated lines",
        ),
        ("gopher_repetition", "very much very much very much and nothing", "gopher most frequent words"),
        ("c4", "Click. Here. Now. function() { return 1 }", "c4 curly bracket"),
        ("c4", "Lorem ipsum dolor. Sit amet. Consectetur. Yes.", "c4 lorem ipsum"),
        ("c4", "One sentence. Two (sentences.)", "c4 sentences"),
        (
            "fineweb",
            "no punctuation here at all but many words\nand another line of that kind",
            "fineweb lines without punctuation",
        ),
        ("fineweb", PROSE + "\n" + PROSE.splitlines()[0], "fineweb repeated lines"),
        ("fineweb", "Short.\nLines.\nOnly.", "fineweb short lines"),
        ("c4", " \n\t", "no words"),
    ],
)
def test_texts_are_dropped_for_the_rule_that_they_break(name: str, text: str, reason: str) -> None:
    assert compile_quality([name])(text) == reason


def test_paragraphs_that_repeat_are_found_where_lines_are_few() -> None:
    paragraph = "A first line of some length that stands alone"
    text = "\n\n".join(f"{paragraph} {number}\nand its second line {number}" for number in (1, 2, 3, 4, 1, 2))
    assert compile_quality(["gopher_repetition"])(text) == "gopher repeated lines"
    assert compile_quality(["gopher_repetition"])("\n\n".join([PROSE, "The end has come."])) is None


def test_repeated_lines_and_frequent_words_are_those_of_a_plain_count() -> None:
    chance = random.Random(7)
    for _ in range(300):
        lines = [" ".join(chance.choices(["aa", "bbb", "c", "dd"], k=chance.randrange(6))) for _ in range(8)]
        text = "\n".join(lines)
        if text.split():
            assert compile_quality(["gopher_repetition"])(text) == plain_repetition(text)


def plain_repetition(text: str) -> str | None:
    for unit, parts in (("lines", text.splitlines()), ("paragraphs", re.split(r"\n\n+", text.strip()))):
        filled = [part for part in parts if part.strip()]
        before = [part for at, part in enumerate(filled) if part in filled[:at]]
        if len(before) > 0.3 * len(filled) or sum(map(len, before)) > 0.2 * len(text):
            return f"gopher repeated {unit}"
    words = text.split()
    for length, share in ((2, 0.2), (3, 0.18), (4, 0.16)):
        runs = [" ".join(words[at : at + length]) for at in range(len(words) - length + 1)]
        if not runs:
            break
        most_frequent = max(runs, key=lambda run: (runs.count(run), -runs.index(run)))
        times = runs.count(most_frequent)
        if times > 1 and times * len(most_frequent) > share * len(text):
            return "gopher most frequent words"
    return None


def test_an_unknown_set_of_rules_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"filters\.quality: 'gofer' is not known; known: gopher_quality, gopher_rep"):
        compile_quality(["gofer"])
