"""Whether two models read the same tokens, so that one can learn the other's distributions. No torch.

A distribution is over token ids, so both models must mean the same token by each id. Equal sizes do not show that, and
different ones do not exclude it: an output layer may be wider than its tokenizer, and is then cut to the smaller.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_TEXT = (
    "The committee's report, published on 14 March 2019, found that 37.5% of cities had no plan at all. "
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n"
    "Let x = 12; then 3x + 4 = 40. L'été, 東京, Straße, привет!"
)
NUM_EXAMPLES = 4

PROBE = [
    [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}],
    [
        {"role": "system", "content": "System"},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
        {"role": "assistant", "content": "Four"},
    ],
]
"""Conversations that two chat templates are compared on; a template that knows no system message skips the second."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The map of a tokenizer from tokens to ids."""

    name: str
    ids: dict[str, int]
    sample: list[str]
    """The tokens of SAMPLE_TEXT; empty where they were not looked for yet."""

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values()) + 1

    @classmethod
    def of_tokenizer(cls, name: str, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        return cls(name=name, ids=tokenizer.get_vocab(), sample=tokenizer.tokenize(SAMPLE_TEXT))

    @classmethod
    def of_folder(cls, folder: Path) -> Vocabulary | None:
        """Read from tokenizer.json, in a fraction of a second; None where a folder has none."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            return None
        content = orjson.loads(file.read_bytes())
        vocabulary = content["model"].get("vocab") or {}
        if isinstance(vocabulary, list):  # Unigram: pieces with their scores, in the order of their ids
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        return cls(name=str(folder), ids={**vocabulary, **added}, sample=[])

    def with_sample(self) -> Vocabulary:
        """The same with the tokens of SAMPLE_TEXT, which take a moment longer."""
        file = Path(self.name) / "tokenizer.json"
        if self.sample or not file.is_file():
            return self
        from tokenizers import Tokenizer

        return replace(self, sample=Tokenizer.from_file(str(file)).encode(SAMPLE_TEXT, add_special_tokens=False).tokens)


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What two vocabularies have in common."""

    shared: int
    same_id: int
    only_first: int
    only_second: int
    conflicts: list[str]
    """Tokens with another id in the other, or whose id is another token there, a few of them with both ids."""

    @property
    def agrees(self) -> bool:
        """Whether no id means two things: the tokens that only one has lie beyond the other's end."""
        return not self.conflicts and self.same_id > 0


def overlap(first: Vocabulary, second: Vocabulary) -> Overlap:
    """Compare two maps token by token and id by id."""
    shared = first.ids.keys() & second.ids.keys()
    moved = [token for token in shared if first.ids[token] != second.ids[token]]
    of_second = {number: token for token, number in second.ids.items()}
    renamed = [
        token
        for token, number in first.ids.items()
        if token not in second.ids and number in of_second and of_second[number] not in first.ids
    ]
    named = [f"{token!r} is {first.ids[token]} and {second.ids[token]}" for token in sorted(moved)[:NUM_EXAMPLES]]
    named += [
        f"{first.ids[token]} is {token!r} and {of_second[first.ids[token]]!r}"
        for token in sorted(renamed)[: NUM_EXAMPLES - len(named)]
    ]
    return Overlap(
        shared=len(shared),
        same_id=len(shared) - len(moved),
        only_first=len(first.ids) - len(shared),
        only_second=len(second.ids) - len(shared),
        conflicts=named,
    )


def require_same_tokens(first: Vocabulary, second: Vocabulary) -> Overlap:
    """What two vocabularies have in common, where logits can be learned over them.

    Raises:
        ValueError: an id means different tokens; with a table of the overlap, and what to do instead.
    """
    found = overlap(first, second)
    if not found.agrees:
        raise ValueError("\n".join([*overlap_table(first.with_sample(), second, found), ADVICE]))
    return found


ADVICE = (
    "Distributions over different tokens cannot be compared; `distillation.teacher: text` has the student learn from "
    "answers that the teacher writes, which needs no common tokens"
)


def overlap_table(first: Vocabulary, second: Vocabulary, found: Overlap) -> list[str]:
    """The overlap in lines for people."""
    lines = [
        f"{first.name} and {second.name} do not read the same tokens:",
        f"  {found.shared:,} tokens in both, {found.same_id:,} of them with the same id;",
        f"  {found.only_first:,} only in the first, {found.only_second:,} only in the second;",
    ]
    if found.conflicts:
        lines.append(f"  for example {', '.join(found.conflicts)};")
    if first.sample:
        same = sum(first.ids.get(token) == second.ids.get(token, -1) for token in first.sample)
        lines.append(f"  of a sample text, {same / len(first.sample):.0%} of the first one's tokens mean the same.")
    return lines


def renders_alike(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two chat templates write conversations the same way; a tokenizer without one differs from one with."""
    return [rendered(first, messages) for messages in PROBE] == [rendered(second, messages) for messages in PROBE]


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> Any:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:  # a template may refuse a role, and so may the other
        return type(error).__name__
