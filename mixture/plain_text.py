"""The plain text of rows: what filters look at, what duplicates are found by, and how much of it is the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

from mixture.formats import Content, Row, candidates_for, read_content

TextReader = Callable[[Row], tuple[str, int]]


@lru_cache(maxsize=4096)
def text_reader(columns: tuple[str, ...], format_name: str) -> TextReader:
    """What gives `plain_text` of rows with these columns; where it can, without making their content first.

    It raises ValueError where a row cannot be read.
    """

    def from_content(row: Row) -> tuple[str, int]:
        return plain_text(read_content(row, format_name))

    candidates = candidates_for(columns, format_name)
    if candidates and candidates[0].format.is_text and not set(candidates[0].format.also_reads) & set(columns):
        return joined_columns(candidates[0].format.columns, from_content)
    return from_content


def joined_columns(names: Sequence[str], otherwise: TextReader) -> TextReader:
    """Reads the text in some columns, the prompt in the first of several; where one holds no text, `otherwise` does."""
    values_of = itemgetter(*names)

    def one(row: Row) -> tuple[str, int]:
        text = values_of(row)
        return (text, 0) if type(text) is str else otherwise(row)

    def several(row: Row) -> tuple[str, int]:
        texts = values_of(row)
        try:
            return "\n".join(texts), len(texts[0])
        except TypeError:
            return otherwise(row)

    return one if len(names) == 1 else several


def plain_text(content: Content) -> tuple[str, int]:
    """The text of a sample, and how many characters of it are the prompt: all before the first answer.

    Turns are joined by a newline. A plain text has no prompt.
    """
    messages = content.get("messages")
    if messages is not None:
        return turns_text(messages)
    text = content.get("text")
    if text is not None:
        return text, 0
    if "input_ids" in content:
        return " ".join(map(str, content["input_ids"])), 0
    asked = flat(content["prompt"])
    answers = [flat(content[key]) for key in ("chosen", "rejected") if key in content]
    return "\n".join([asked, *answers]), len(asked)


def turns_text(messages: Sequence[Content]) -> tuple[str, int]:
    """Contents of turns, joined by a newline, and how many characters come before the first answer."""
    contents = [message["content"] for message in messages]
    try:
        text = "\n".join(contents)
    except TypeError:  # contents given as parts, or none
        contents = [content if isinstance(content, str) else parts_text(content) for content in contents]
        text = "\n".join(contents)
    if len(messages) > 1 and messages[1]["role"] == "assistant" != messages[0]["role"]:
        return text, len(contents[0])
    prompt = -1
    for message, content in zip(messages, contents, strict=True):
        if message["role"] == "assistant":
            break
        prompt += len(content) + 1
    return text, max(prompt, 0)


def flat(value: Any) -> str:
    """A text, or the contents of messages."""
    return value if isinstance(value, str) else turns_text(value)[0]


def parts_text(content: Any) -> str:
    """The texts in a content given as parts, images and the like left out."""
    return "".join(part.get("text") or "" for part in content or [])
