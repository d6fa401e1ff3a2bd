"""Rationales: reasoning that leads to an answer, marked as spans of characters so that the loss can leave it out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from mixture.formats import Sample
from mixture.tokenizers import BREAK, Span

RATIONALE = "rationale"
"""Where a sample's metadata holds the spans, [[start, end], ...], in characters of its last answer, or of its text."""

BOXED = re.compile(r"\\f?box(?:ed)?\b")
SENTENCE_END = re.compile(r"[.!?](?:\s*(?:\$\$?|\\\]|\\\)))*\s+|\n\s*\n")


# --- what dataset modules mark


def before(text: str, mark: str) -> list[list[int]] | None:
    """The span of all that stands before the last `mark`; None where nothing does."""
    place = text.rfind(mark)
    return [[0, place]] if place > 0 else None


def before_boxed_answer(solution: str) -> list[list[int]] | None:
    r"""The span of all that stands before the sentence of the last \boxed{...}; None where nothing does."""
    boxes = [box.start() for box in BOXED.finditer(solution)]
    ends = [end.end() for end in SENTENCE_END.finditer(solution, 0, boxes[-1])] if boxes else []
    return [[0, ends[-1]]] if ends else None


# --- where marked spans lie in a rendered text


def rationale_spans(sample: Sample) -> list[Span]:
    """The spans that a sample marks, empty ones left out; ValueError where they are no spans of its last answer."""
    marked = sample.metadata.get(RATIONALE)
    if marked is None:
        return []
    length = len(marked_text(sample))
    try:
        spans = [(int(start), int(end)) for start, end in marked]
    except (TypeError, ValueError):
        raise ValueError(
            f"sample {sample.id}: metadata.{RATIONALE} must be [[start, end], ...], characters of its answer, "
            f"got {str(marked)[:80]}"
        ) from None
    bounds = [0, *(place for span in spans for place in span), length]
    if any(first > second for first, second in pairwise(bounds)):
        raise ValueError(
            f"sample {sample.id}: metadata.{RATIONALE} must rise and stay inside the {length} characters of the last "
            f"answer, got {str(marked)[:80]}"
        )
    return [(start, end) for start, end in spans if start < end]


def marked_text(sample: Sample) -> str:
    """The text that a sample's spans count the characters of."""
    if "text" in sample.content:
        text: str = sample.content["text"]
        return text
    for message in reversed(sample.content.get("messages", ())):
        if message["role"] == "assistant":
            content: str = message["content"]
            return content
    raise ValueError(
        f"sample {sample.id} has metadata.{RATIONALE}, and neither an answer nor a text that it could be a part of; "
        "rows that come tokenised must leave their rationales out of `labels` themselves"
    )


def placed_spans(rendered: str, turn: Span, content: str, spans: Sequence[Span]) -> list[Span]:
    """The spans of a content as places in the rendered text, in which it lies somewhere inside `turn`.

    ValueError: the content is not there, to the character but for blanks around it, exactly once.
    """
    core = content.strip()
    if rendered.count(core, *turn) != 1:
        raise ValueError(
            "the chat template does not write the last answer as it is and once, so its rationale cannot be placed"
        )
    trimmed = len(content) - len(content.lstrip())
    shift = rendered.index(core, *turn) - trimmed
    # Blanks around the content may be gone; what is marked of them then lies outside of the turn.
    return [(max(start + shift, turn[0]), min(end + shift, turn[1])) for start, end in spans]


def shifted_by_breaks(broken: str, spans: Sequence[Span]) -> list[Span]:
    """Spans of a text as spans of the same text with breaks in it."""
    places = [place for place, character in enumerate(broken) if character != BREAK] + [len(broken)]
    return [(places[start], places[end]) for start, end in spans]
