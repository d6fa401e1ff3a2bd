"""Fingerprints of normalised text: what two rows must share to count as the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest, xxh3_128_digest

WHITESPACE = bytes([*range(9, 14), *range(28, 33)])
"""What str.split takes as white space in ASCII."""
WIDE_WHITESPACE = tuple(char.encode() for char in "\x85\xa0\u1680\u205f\u3000")
"""What str.split takes as white space beyond ASCII, but for what GENERAL_PUNCTUATION matches."""
PUNCTUATION_START = b"\xe2\x80"
GENERAL_PUNCTUATION = re.compile(PUNCTUATION_START + b"[\x80-\x8a\xa8\xa9\xaf]")
"""U+2000 to U+200A, U+2028, U+2029 and U+202F in UTF-8; curly quotes begin alike."""
LOWER_AND_SPACE = bytes(32 if byte in WHITESPACE else byte + 32 if 65 <= byte <= 90 else byte for byte in range(256))
SPACE = 32


def normalised(text: str) -> str:
    """Lower case, every run of white space one space, none at the ends."""
    return " ".join(text.lower().split())


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints of some texts, in order."""

    content: npt.NDArray[np.uint64]
    """xxh3-128 of the normalised text, [texts, 2]: high and low half."""
    prompt: npt.NDArray[np.uint64]
    """xxh3-64 of the normalised prompt, [texts]; 0 where there is none."""


def fingerprints(texts: Sequence[str], prompt_characters: Sequence[int]) -> Fingerprints:
    """Fingerprints of texts and of the prompts that they begin with (0 characters: no prompt).

    All texts are normalised in one go over their bytes, several times faster than `normalised` on each. A prompt must
    be followed by white space or end its text.
    """
    joined, starts = joined_lower_case(texts, prompt_characters)
    spaces = np.frombuffer(joined, np.uint8) == SPACE
    repeated = spaces[1:] & spaces[:-1]
    places = np.flatnonzero(repeated)
    if len(places):
        kept = np.ones(len(joined), np.bool_)
        np.logical_not(repeated, out=kept[1:])
        joined = np.frombuffer(joined, np.uint8)[kept].tobytes()
        starts = starts - np.searchsorted(places, starts - 1)
    bounds = starts.tolist()
    rows = zip(bounds[0:-1:2], bounds[1::2], bounds[2::2], prompt_characters, strict=True)
    content, prompt = [], []
    for first, middle, last, characters in rows:
        content.append(xxh3_128_digest(joined[first : last - 1]))
        prompt.append(xxh3_64_intdigest(joined[first : middle - 1]) if characters else 0)
    halves = np.frombuffer(b"".join(content), ">u8").astype(np.uint64).reshape(-1, 2)
    return Fingerprints(halves, np.array(prompt, np.uint64))


def joined_lower_case(texts: Sequence[str], prompt_characters: Sequence[int]) -> tuple[bytes, npt.NDArray[np.int64]]:
    """All texts as UTF-8 in lower case, a space for all white space and around each text, and where each one's
    prompt and rest begin: [2 x texts + 1]. A text without a prompt begins with its rest."""
    lengths = [1]
    pieces = [b""]
    for text, characters in zip(texts, prompt_characters, strict=True):
        if text.isascii():
            piece, before = text.encode(), characters
        else:
            prompt, rest = lower_case(text[:characters]), lower_case(text[characters:])
            piece, before = prompt + rest, len(prompt)
        if before:
            before += 1
        lengths.append(before)
        lengths.append(len(piece) + 1 - before)
        pieces.append(piece)
    pieces.append(b"")
    return b"\n".join(pieces).translate(LOWER_AND_SPACE), np.cumsum(lengths)


def lower_case(text: str) -> bytes:
    """The text in lower case, as UTF-8, with white space beyond ASCII as plain spaces."""
    lower = text.lower().encode()
    for space in WIDE_WHITESPACE:
        lower = lower.replace(space, b" ")
    return GENERAL_PUNCTUATION.sub(b" ", lower) if PUNCTUATION_START in lower else lower
