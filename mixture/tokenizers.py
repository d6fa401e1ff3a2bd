"""Texts to token ids: Hugging Face's tokenizer, or a faster reader of its tokenizer.json that gives the same ids."""

from __future__ import annotations

import importlib.util
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress, pairwise
from typing import Any, Literal
from unicodedata import is_normalized

import numpy as np
import numpy.typing as npt
import orjson

from mixture.formats import Message

TokenizerBackend = Literal["auto", "huggingface", "fastokens", "gigatoken"]
Ids = npt.NDArray[np.int32]
Span = tuple[int, int]
EncodeBatch = Callable[[list[str]], "FlatIds"]

FAST_BACKENDS: tuple[TokenizerBackend, ...] = ("fastokens", "gigatoken")
"""In the order in which `auto` tries them: the one that is fast from the first row on comes first."""

BREAK = "\U000f2000"
"""Stands inside the control tokens of a content while it is rendered, so that they are not taken for the template's."""

FIRST_STAND_IN = 0xF2001
"""The template's control tokens are characters from here on while their namesakes in content are read as text."""

STAND_INS = re.compile("[\U000f2000-\U000ffffd]")
REASONING_TOKENS = {"<think>", "</think>", "[THINK]", "[/THINK]"}
"""Control tokens of some tokenizers that an assistant's content holds on purpose."""


@dataclass(frozen=True)
class FlatIds:
    """The ids of several texts: text i has `ids[starts[i]:starts[i + 1]]`."""

    ids: Ids
    starts: npt.NDArray[np.int64]

    @classmethod
    def of_lists(cls, lists: Sequence[Sequence[int]]) -> FlatIds:
        starts = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(ids) for ids in lists], out=starts[1:])
        ids = np.fromiter(chain.from_iterable(lists), np.int32, count=int(starts[-1]))
        return cls(ids, starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Ids:
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        return self.ids[self.starts[index] : self.starts[index + 1]]

    def same_as(self, other: FlatIds) -> bool:
        return np.array_equal(self.starts, other.starts) and np.array_equal(self.ids, other.ids)


# --- the tokenizer.json alone: no tokens are added, all that stand in the text are read


def offsets_backend(tokenizer: Any) -> Any:
    """A copy of the fast tokenizer whose offsets cover every character of a token, blanks included."""
    from tokenizers import Tokenizer

    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} cannot tell which characters a token covers, so assistant turns cannot be "
            "masked: use a tokenizer with a tokenizer.json"
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None  # byte-level ones may trim blanks from offsets; the template adds special tokens
    probe = "A probe:  two blanks,\n\nan é and 12,345 numbers. "
    if backend.encode(probe, add_special_tokens=False).ids != tokenizer.encode(probe, add_special_tokens=False):
        raise ValueError(f"{type(tokenizer).__name__} changes tokens after its tokenizer.json; masks would be wrong")
    return backend


def huggingface_encode(backend: Any) -> EncodeBatch:
    """Ids by Hugging Face's `tokenizers`."""

    def encode(texts: list[str]) -> FlatIds:
        return FlatIds.of_lists([encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)])

    return encode


def fastokens_encode(backend: Any) -> EncodeBatch:
    """Ids by `fastokens`."""
    from fastokens import Tokenizer

    fast = Tokenizer.from_json_str(backend.to_str())

    def encode(texts: list[str]) -> FlatIds:
        ids, starts = fast.encode_batch_flat(texts, add_special_tokens=False)
        return FlatIds(
            np.frombuffer(ids, np.uint32).astype(np.int32), np.frombuffer(starts, np.uint64).astype(np.int64)
        )

    return encode


def gigatoken_encode(backend: Any) -> EncodeBatch:
    """Ids by `gigatoken`."""
    import awkward
    from gigatoken import Tokenizer

    fast = Tokenizer.from_json(backend.to_str()).backend

    def encode(texts: list[str]) -> FlatIds:
        # Its threads do not survive a fork; several processes are what makes this parallel.
        ids = fast.encode_batch(texts, parallel=False)
        starts = np.concatenate(([0], np.cumsum(awkward.to_numpy(awkward.num(ids)))))
        return FlatIds(awkward.to_numpy(awkward.flatten(ids)).astype(np.int32), starts.astype(np.int64))

    return encode


MAKERS: dict[TokenizerBackend, Callable[[Any], EncodeBatch]] = {
    "huggingface": huggingface_encode,
    "fastokens": fastokens_encode,
    "gigatoken": gigatoken_encode,
}


@dataclass(frozen=True)
class BackendChoice:
    """The backend to use, and what to tell about how it was found."""

    name: TokenizerBackend
    lines: tuple[str, ...] = ()


def choose_backend(wanted: TokenizerBackend, backend: Any, texts: list[str]) -> BackendChoice:
    """The fastest installed backend that gives Hugging Face's ids for every one of `texts`, a sample of the data.

    `backend`: the Hugging Face one, see `offsets_backend`. ValueError: a backend is asked for by name and not there.
    """
    if wanted == "huggingface":
        return BackendChoice(wanted)
    if wanted != "auto" and not is_installed(wanted):
        raise ValueError(
            f"dataset.tokenizer_backend: {wanted} is not installed; install the extra fast-tokenizers, or set "
            "huggingface or auto"
        )
    candidates = FAST_BACKENDS if wanted == "auto" else (wanted,)
    lines: list[str] = []
    expected: FlatIds | None = None
    for name in candidates:
        if not is_installed(name):
            continue
        expected = expected or huggingface_encode(backend)(texts)
        difference = first_difference(MAKERS[name], backend, texts, expected)
        if difference is None:
            lines.append(f"tokenizer_backend {name}: the same ids as Hugging Face for {len(texts)} rows of this data")
            return BackendChoice(name, tuple(lines))
        lines.append(f"tokenizer_backend {name} is not used: {difference}")
    if lines:
        lines.append("tokenizer_backend huggingface")
    return BackendChoice("huggingface", tuple(lines))


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def first_difference(
    make: Callable[[Any], EncodeBatch], backend: Any, texts: list[str], expected: FlatIds
) -> str | None:
    """Where a fast backend departs from Hugging Face's ids, or None if nowhere."""
    try:
        given = make(backend)(texts)
    except Exception as error:  # a tokenizer.json that it cannot read is a reason not to use it, whatever it raises
        return f"{type(error).__name__}: {str(error)[:200]}"
    if given.same_as(expected):
        return None
    row = next(row for row in range(len(texts)) if not np.array_equal(given[row], expected[row]))
    return f"row {row} of the sample has other ids than Hugging Face gives"


# --- where the tokens of a text lie


@dataclass(frozen=True)
class ByteLengths:
    """UTF-8 bytes of every token of a byte-level tokenizer, int32 [vocabulary]: places without asking for offsets."""

    of_token: npt.NDArray[np.int32]

    @classmethod
    def of_backend(cls, backend: Any) -> ByteLengths | None:
        """The lengths; None for tokenizers whose tokens are not slices of the text's bytes."""
        settings = orjson.loads(backend.to_str())
        if not is_byte_level(settings.get("pre_tokenizer")) or not keeps_text(settings.get("normalizer")):
            return None
        vocabulary = backend.get_vocab(with_added_tokens=True)
        lengths = np.zeros(max(vocabulary.values()) + 1, np.int32)
        for token, number in vocabulary.items():
            lengths[number] = len(token)  # byte-level tokens are written with one character a byte
        for number, token in backend.get_added_tokens_decoder().items():
            lengths[number] = len(token.content.encode())
        return cls(lengths)

    def masks(
        self, encoded: FlatIds, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[npt.NDArray[np.bool_] | None]:
        """True for tokens inside a span of characters, text by text; None where ids are not the bytes of their text."""
        lengths = self.of_token[encoded.ids]
        ends = np.cumsum(lengths)
        bases = np.concatenate(([0], ends))[encoded.starts]
        exact = [bool(size == byte_size(text)) for size, text in zip(np.diff(bases), texts, strict=True)]
        bounds: list[int] = []
        for row in compress(range(len(texts)), exact):
            places = [place for span in spans[row] for place in span]
            bounds += [int(bases[row]) + place for place in byte_places(texts[row], places)]
        mask = np.zeros(len(encoded.ids), np.bool_)
        firsts = np.searchsorted(ends - lengths, bounds[::2], side="left")
        for first, last in zip(firsts, np.searchsorted(ends, bounds[1::2], side="right"), strict=True):
            mask[first:last] = True
        rows = [mask[first:last] for first, last in pairwise(encoded.starts)]
        return [row if fits else None for row, fits in zip(rows, exact, strict=True)]


def byte_size(text: str) -> int:
    """UTF-8 bytes of a text as the tokenizer reads it; -1 where a normalizer changes it."""
    if text.isascii():
        return len(text)
    return len(text.encode()) if is_normalized("NFC", text) else -1


def byte_places(text: str, places: Sequence[int]) -> list[int]:
    """Places in characters, in ascending order, as places in UTF-8 bytes."""
    if text.isascii():
        return list(places)
    found: list[int] = []
    last = size = 0
    for place in places:
        size += len(text[last:place].encode())
        last = place
        found.append(size)
    return found


def is_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether the pre-tokenizer cuts text into pieces that are bytes of it, with nothing added."""
    if pre_tokenizer is None:
        return False
    if pre_tokenizer["type"] == "Sequence":
        *cutting, last = pre_tokenizer["pretokenizers"]
        cuts = all(step["type"] in ("Split", "Digits") and step.get("behavior") != "Removed" for step in cutting)
        return cuts and is_byte_level(last)
    return bool(pre_tokenizer["type"] == "ByteLevel" and not pre_tokenizer["add_prefix_space"])


def keeps_text(normalizer: dict[str, Any] | None) -> bool:
    """Whether the normalizer leaves text that is in form NFC as it is."""
    if normalizer is not None and normalizer["type"] == "Sequence":
        return all(keeps_text(step) for step in normalizer["normalizers"])
    return normalizer is None or normalizer["type"] == "NFC"


# --- control tokens that stand in the content of a conversation


class ControlTokens:
    """Reads control tokens as plain text where they stand in content, and as themselves where the template wrote them.

    `broken` puts a mark into each control token of a content before it is rendered: in the rendered text, broken ones
    are the content's and whole ones the template's. `encoded` replaces the template's by stand-ins, characters that a
    second backend knows as tokens with the same rules; to that backend the control tokens themselves are plain text.
    """

    def __init__(self, backend: Any) -> None:
        added = backend.get_added_tokens_decoder()
        self.original = backend
        self.special = {token.content: token for token in added.values() if token.special and len(token.content) > 1}
        self.pattern = re.compile(longest_of(set(self.special)) or r"(?!)")
        self.in_answers = re.compile(longest_of(set(self.special) - REASONING_TOKENS) or r"(?!)")
        self.stand_ins = {content: chr(FIRST_STAND_IN + place) for place, content in enumerate(self.special)}
        self.backend: Any = None
        self.real_ids: npt.NDArray[np.int32] = np.empty(0, np.int32)

    def occur(self, messages: Sequence[Message]) -> bool:
        """Whether the conversation's content holds control tokens."""
        for message in messages:
            pattern = self.pattern_for(message)
            for key, value in message.items():
                if key != "role" and (pattern.search(value) if isinstance(value, str) else nested(pattern, value)):
                    return True
        return False

    def pattern_for(self, message: Message) -> re.Pattern[str]:
        return self.in_answers if message["role"] == "assistant" else self.pattern

    def broken(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation with a mark in each control token of its content; ValueError where the mark is in use."""
        if any(nested(STAND_INS, value) for message in messages for value in message.values()):
            raise ValueError("a conversation holds control tokens, and the characters that are needed to tell them")
        return [
            {
                key: value if key == "role" else broken_up(self.pattern_for(message), value)
                for key, value in message.items()
            }
            for message in messages
        ]

    def encoded(self, text: str, spans: Sequence[Span]) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Ids of a rendered text with broken control tokens, and which of them lie in its spans."""
        if self.backend is None:
            self.make_backend(text)
        pieces: list[str] = []
        places = [0]
        shifts = [0]
        last = 0
        for match in re.finditer(f"{self.pattern.pattern}|{BREAK}", text):
            stand_in = self.stand_ins.get(match[0], "")
            pieces += [text[last : match.start()], stand_in]
            last = match.end()
            places.append(last)
            shifts.append(shifts[-1] + len(stand_in) - len(match[0]))
        pieces.append(text[last:])

        def moved(place: int) -> int:
            return place + shifts[bisect_right(places, place) - 1]

        encoding = self.backend.encode("".join(pieces), add_special_tokens=False)
        ids = self.real_ids[np.array(encoding.ids, np.int64)]
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return ids, span_mask(offsets, [(moved(first), moved(last)) for first, last in spans])

    def make_backend(self, text: str) -> None:
        """Make the second backend, and see that it gives the first one's ids for a text without broken tokens."""
        from tokenizers import AddedToken, Tokenizer

        self.backend = Tokenizer.from_str(self.original.to_str())
        self.backend.encode_special_tokens = True
        for content, token in self.special.items():
            rules = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
            stand_in = AddedToken(self.stand_ins[content], normalized=token.normalized, special=False, **rules)
            self.backend.add_tokens([stand_in])
        self.real_ids = np.arange(max(self.backend.get_vocab(with_added_tokens=True).values()) + 1, dtype=np.int32)
        for content, character in self.stand_ins.items():
            self.real_ids[self.backend.token_to_id(character)] = self.original.token_to_id(content)
        plain = text.replace(BREAK, " ")  # a blank in each broken token leaves nothing to tell apart
        if self.encoded(plain, [])[0].tolist() != self.original.encode(plain, add_special_tokens=False).ids:
            raise ValueError("this tokenizer gives other ids where control tokens in content are read as plain text")


def longest_of(words: set[str]) -> str:
    """A pattern for the longest word that fits, by the beginnings that words share: some tokenizers have thousands."""
    tails: dict[str, set[str]] = {}
    for word in words - {""}:
        tails.setdefault(word[0], set()).add(word[1:])
    options = "|".join(re.escape(first) + longest_of(rest) for first, rest in sorted(tails.items()))
    if "" in words and options:
        return f"(?:{options})?"
    return f"(?:{options})" if len(tails) > 1 else options


def nested(pattern: re.Pattern[str], value: Any) -> bool:
    """Whether a text inside a value of lists and dicts matches."""
    if isinstance(value, str):
        return bool(pattern.search(value))
    if isinstance(value, Mapping):
        return any(nested(pattern, item) for item in value.values())
    return isinstance(value, list) and any(nested(pattern, item) for item in value)


def broken_up(pattern: re.Pattern[str], value: Any) -> Any:
    """The value with a mark after the first character of every match in its texts."""
    if isinstance(value, str):
        return pattern.sub(lambda match: match[0][0] + BREAK + match[0][1:], value)
    if isinstance(value, Mapping):
        return {key: broken_up(pattern, item) for key, item in value.items()}
    return [broken_up(pattern, item) for item in value] if isinstance(value, list) else value


# --- masks


def span_mask(offsets: npt.NDArray[np.int64], spans: Sequence[Span]) -> npt.NDArray[np.bool_]:
    """True for tokens that lie inside a span; `offsets` [tokens, 2] are character ranges, empty ones never inside."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    mask = np.zeros(len(offsets), np.bool_)
    for first, last in spans:
        mask |= (starts >= first) & (ends <= last) & (ends > starts)
    return mask
