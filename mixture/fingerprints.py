"""Fingerprints of normalised text: what two rows must share to count as the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_digest, xxh3_128_digest

WHITESPACE_RANGES = ((9, 5), (28, 5))
"""What str.split takes as white space in ASCII: where each range begins, and how long it is."""
WIDE_WHITESPACE = tuple(char.encode() for char in "\x85\xa0\u1680\u205f\u3000")
"""What str.split takes as white space beyond ASCII, but for what GENERAL_PUNCTUATION matches."""
PUNCTUATION_START = b"\xe2\x80"
GENERAL_PUNCTUATION = re.compile(PUNCTUATION_START + b"[\x80-\x8a\xa8\xa9\xaf]")
"""U+2000 to U+200A, U+2028, U+2029 and U+202F in UTF-8; curly quotes begin alike."""
WHITESPACE = bytes(first + byte for first, count in WHITESPACE_RANGES for byte in range(count))
LOWER_AND_SPACE = bytes(32 if byte in WHITESPACE else byte + 32 if 65 <= byte <= 90 else byte for byte in range(256))
BEYOND_ASCII = 128
LONGER_CHARACTERS = np.array([0x80, 0x800, 0x10000], np.uint32)
"""The first characters that take two, three and four bytes of UTF-8."""
CAPITAL_SIGMA = "\u03a3"
"""The one letter whose lower case depends on its neighbours."""
MARK, GONE = 254, 255
"""Bytes that are in no UTF-8."""

Sizes = npt.NDArray[np.int64]


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
    pieces, text_bytes, prompt_bytes = encoded(texts, prompt_characters)
    lower = lower_beyond_ascii(apart(pieces))
    if lower is not None:
        content, prompt = digests(lower, text_bytes, prompt_bytes)
    else:
        lower_prompts = [len(text[:count].lower()) for text, count in zip(texts, prompt_characters, strict=True)]
        pieces, *sizes = encoded([text.lower() for text in texts], lower_prompts)
        lower = lower_beyond_ascii(apart(pieces))
        assert lower is not None, "lower case has no lower case of its own"
        content, prompt = digests(lower, *sizes)
    return Fingerprints(content, prompt, text_bytes, prompt_bytes)


def encoded(texts: Sequence[str], prompt_characters: Sequence[int]) -> tuple[list[bytes], Sizes, Sizes]:
    """Texts in UTF-8, their bytes, and those of their prompts."""
    pieces = list(map(str.encode, texts))
    characters = np.fromiter(map(len, texts), np.int64, len(texts))
    text_bytes = np.fromiter(map(len, pieces), np.int64, len(texts))
    prompt_bytes = np.fromiter(prompt_characters, np.int64, len(texts))
    for place in np.flatnonzero((text_bytes != characters) & (prompt_bytes > 0)).tolist():
        prompt_bytes[place] = len(texts[place][: prompt_characters[place]].encode())
    return pieces, text_bytes, prompt_bytes


def apart(pieces: Sequence[bytes]) -> bytes:
    """Texts joined with room for the marks that `digests` sets."""
    return b"\n%b\n\n" % b"\n\n\n".join(pieces)


def lower_beyond_ascii(text: bytes) -> bytes | None:
    """UTF-8 with characters beyond ASCII in lower case, or spaces for white space; every one as many bytes as before.

    None where that cannot be: the lower case of some letters takes more bytes or fewer, or depends on what is beside.
    """
    letters = np.frombuffer(text, np.uint8)
    is_wide = letters >= BEYOND_ASCII
    wide = letters[is_wide].tobytes()
    wide_lower = wide_lower_case(wide)
    if wide_lower is None or wide_lower == wide:
        return None if wide_lower is None else text
    letters = letters.copy()
    letters[is_wide] = np.frombuffer(wide_lower, np.uint8)
    return letters.tobytes()


def wide_lower_case(wide: bytes) -> bytes | None:
    """`lower_beyond_ascii` of these characters alone."""
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


def digests(text: bytes, sizes: Sizes, prompts: Sizes) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Digests of texts and their prompts, which lie `apart`, in lower case but for ASCII.

    A mark is set after each prompt and after each text; then one pass makes lower case and drops what white space is
    repeated, and the marks tell what was where. A text without a prompt begins with a mark.
    """
    letters = np.frombuffer(text, np.uint8).copy()
    starts = 1 + np.cumsum(sizes + 3) - (sizes + 3)
    letters[starts + np.where(prompts > 0, prompts, -1)] = MARK
    letters[starts + sizes + 1] = MARK
    spaces = is_whitespace(letters)
    repeated = spaces[1:] & spaces[:-1]
    letters[1:] |= np.negative(repeated.view(np.uint8))  # 255, which is GONE, or 0
    parts = letters.tobytes().translate(LOWER_AND_SPACE, bytes([GONE])).split(bytes([MARK]))
    before = list(map(bytes.strip, parts[0:-1:2]))
    after = map(bytes.strip, parts[1::2])
    whole = map(bytes.strip, map(b" ".join, zip(before, after, strict=True)))
    content = big_endian(map(xxh3_128_digest, whole)).reshape(-1, 2)
    return content, np.where(prompts > 0, big_endian(map(xxh3_64_digest, before)), np.uint64(0))


def is_whitespace(letters: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which bytes are white space in ASCII; bytes below a range wrap round to the far end."""
    (first, count), (second, second_count) = WHITESPACE_RANGES
    found = letters - np.uint8(first) < count
    found |= letters - np.uint8(second) < second_count
    return found


def big_endian(digests: Iterable[bytes]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)
