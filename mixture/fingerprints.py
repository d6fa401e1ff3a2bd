"""Fingerprints of normalised text: what two rows must share to count as the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_digest, xxh3_128_digest

WHITESPACE = bytes([*range(9, 14), *range(28, 33)])
"""What str.split takes as white space in ASCII."""
WIDE_WHITESPACE = tuple(char.encode() for char in "\x85\xa0\u1680\u205f\u3000")
"""What str.split takes as white space beyond ASCII, but for what GENERAL_PUNCTUATION matches."""
PUNCTUATION_START = b"\xe2\x80"
GENERAL_PUNCTUATION = re.compile(PUNCTUATION_START + b"[\x80-\x8a\xa8\xa9\xaf]")
"""U+2000 to U+200A, U+2028, U+2029 and U+202F in UTF-8; curly quotes begin alike."""
LOWER_AND_SPACE = bytes(32 if byte in WHITESPACE else byte + 32 if 65 <= byte <= 90 else byte for byte in range(256))
SPACE = 32
BEYOND_ASCII = 128
LONGER_CHARACTERS = np.array([0x80, 0x800, 0x10000], np.uint32)
"""The first characters that take two, three and four bytes of UTF-8."""
CAPITAL_SIGMA = "\u03a3"
"""The one letter whose lower case depends on its neighbours."""
NO_PROMPT = bytes(8)


def normalised(text: str) -> str:
    """Lower case, every run of white space one space, none at the ends."""
    return " ".join(text.lower().split())


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints of some texts and their sizes, in order."""

    content: npt.NDArray[np.uint64]
    """xxh3-128 of the normalised text, [texts, 2]: high and low half."""
    prompt: npt.NDArray[np.uint64]
    """xxh3-64 of the normalised prompt, [texts]; 0 where there is none."""
    text_bytes: npt.NDArray[np.int64]
    """Of the text as it is, in UTF-8, [texts]."""
    prompt_bytes: npt.NDArray[np.int64]
    """Of the prompt as it is."""


def fingerprints(texts: Sequence[str], prompt_characters: Sequence[int]) -> Fingerprints:
    """Fingerprints of texts and of the prompts that they begin with (0 characters: no prompt).

    All texts are normalised in one go over their bytes, several times faster than `normalised` on each. A prompt must
    be followed by white space or end its text.
    """
    pieces = [text.encode() for text in texts]
    prompts = prompt_sizes(texts, pieces, prompt_characters)
    sizes = list(map(len, pieces))
    text_bytes, prompt_bytes = np.array(sizes, np.int64), np.array(prompts, np.int64)
    joined = lower_case(between_newlines(pieces))
    if joined is None:
        lower = [text.lower() for text in texts]
        characters = [len(text[:count].lower()) for text, count in zip(texts, prompt_characters, strict=True)]
        pieces = [text.encode() for text in lower]
        prompts = prompt_sizes(lower, pieces, characters)
        sizes = list(map(len, pieces))
        joined = lower_case(between_newlines(pieces))
        assert joined is not None, "lower case has no lower case of its own"
    content, prompt = digests(joined, sizes, prompts)
    return Fingerprints(content, prompt, text_bytes, prompt_bytes)


def prompt_sizes(texts: Sequence[str], pieces: Sequence[bytes], prompt_characters: Sequence[int]) -> list[int]:
    """UTF-8 bytes of the first characters of each text."""
    return [
        count if len(piece) == len(text) else len(text[:count].encode())
        for text, piece, count in zip(texts, pieces, prompt_characters, strict=True)
    ]


def between_newlines(pieces: Sequence[bytes]) -> bytes:
    return b"\n".join([b"", *pieces, b""])


def lower_case(text: bytes) -> bytes | None:
    """UTF-8 in lower case with spaces for all white space, every character as many bytes as before.

    None where that cannot be: the lower case of some letters takes more bytes or fewer, or depends on what is beside.
    """
    lower = text.translate(LOWER_AND_SPACE)
    if lower.isascii():
        return lower
    letters = np.frombuffer(lower, np.uint8).copy()
    is_wide = letters >= BEYOND_ASCII
    wide = letters[is_wide].tobytes()
    wide_lower = wide_lower_case(wide)
    if wide_lower is None:
        return None
    if wide_lower == wide:
        return lower
    letters[is_wide] = np.frombuffer(wide_lower, np.uint8)
    return letters.tobytes()


def wide_lower_case(wide: bytes) -> bytes | None:
    """`lower_case` of characters beyond ASCII."""
    text = wide.decode()
    lower = text.lower()
    if lower != text:
        if CAPITAL_SIGMA in text or not np.array_equal(character_sizes(text), character_sizes(lower)):
            return None
        wide = lower.encode()
    for space in WIDE_WHITESPACE:
        if space in wide:
            wide = wide.replace(space, b" " * len(space))
    return GENERAL_PUNCTUATION.sub(b"   ", wide) if PUNCTUATION_START in wide else wide


def character_sizes(text: str) -> npt.NDArray[np.intp]:
    """UTF-8 bytes of each character, less one."""
    return np.searchsorted(LONGER_CHARACTERS, np.frombuffer(text.encode("utf-32-le"), np.uint32), side="right")


def digests(
    joined: bytes, sizes: Sequence[int], prompts: Sequence[int]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Digests of texts and their prompts, given as bytes with a space around each and only spaces as white space."""
    bounds = np.empty((len(sizes), 2), np.int64)  # where each text begins, and what follows its prompt
    bounds[:, 0] = 1 + np.cumsum([0, *sizes[:-1]]) + np.arange(len(sizes))
    bounds[:, 1] = bounds[:, 0] + [size + 1 if size else 0 for size in prompts]
    starts = np.append(bounds.ravel(), len(joined))
    spaces = np.frombuffer(joined, np.uint8) == SPACE
    repeated = spaces[1:] & spaces[:-1]
    places = np.flatnonzero(repeated)
    if len(places):
        kept = np.ones(len(joined), np.bool_)
        np.logical_not(repeated, out=kept[1:])
        joined = np.frombuffer(joined, np.uint8)[kept].tobytes()
        starts = starts - np.searchsorted(places, starts - 1)
    edges = starts.tolist()
    content, prompt = [], []
    for first, middle, last, size in zip(edges[0:-1:2], edges[1::2], edges[2::2], prompts, strict=True):
        content.append(xxh3_128_digest(joined[first : last - 1]))
        prompt.append(xxh3_64_digest(joined[first : middle - 1]) if size else NO_PROMPT)
    return big_endian(content).reshape(-1, 2), big_endian(prompt)


def big_endian(digests: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)
