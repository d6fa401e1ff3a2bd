"""Fingerprints of normalised text: what two rows must share to count as the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest, xxh3_128_digest

WHITESPACE = bytes([*range(9, 14), *range(28, 33)])
"""What str.split takes as white space in ASCII."""
WIDE_WHITESPACE = "\x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""What str.split takes as white space beyond ASCII."""
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
    repeated = np.flatnonzero(spaces[1:] & spaces[:-1])
    if len(repeated):
        kept = np.ones(len(joined), np.bool_)
        kept[repeated + 1] = False
        joined = np.frombuffer(joined, np.uint8)[kept].tobytes()
        starts = starts - np.searchsorted(repeated, starts - 1)
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
    pieces: list[str] = [""]
    for text, characters in zip(texts, prompt_characters, strict=True):
        if text.isascii():
            prompt_bytes, size = characters, len(text)
        else:
            prompt_bytes, text = len(lower_case(text[:characters]).encode()), lower_case(text)
            size = len(text.encode())
        before = prompt_bytes + 1 if characters else 0
        lengths.append(before)
        lengths.append(size + 1 - before)
        pieces.append(text)
    pieces.append("")
    return "\n".join(pieces).encode().translate(LOWER_AND_SPACE), np.cumsum(lengths)


def lower_case(text: str) -> str:
    """The text in lower case, with white space beyond ASCII as plain spaces."""
    lower = text.lower()
    for space in WIDE_WHITESPACE:
        if space in lower:
            lower = lower.replace(space, " ")
    return lower
