"""Preferences to token rows: two rows a unit, which packing keeps together.

An answer's row is its whole conversation, with loss on the answer alone. Rows are named by what they are:

    pairs       ID#chosen, ID#rejected
    labelled    ID#desirable or ID#undesirable, then ID#mismatched: the same prompt with the answer of another sample
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from mixture.formats import Message, Sample
from mixture.prompts import PromptRenderer
from mixture.render import Mask, Objective, OverLength, Renderer
from mixture.shards import TokenRow

Role = Literal["chosen", "rejected", "desirable", "undesirable", "mismatched"]
Answer = tuple[Role, list[Message], list[Message]]
"""What it is, its prompt, and itself."""

ROWS_PER_UNIT = 2


def is_preference(objective: Objective) -> bool:
    """Whether rows come in units of two."""
    return objective in ("pairs", "labelled")


def role_of(row: TokenRow) -> str:
    """What the row of an answer is."""
    return row.sample_id.rpartition("#")[2]


def renderer_for(
    objective: Objective, tokenizer: Any, *, max_length: int, over_length: OverLength | None, mask_rationale: bool
) -> Renderer:
    """The renderer of an objective. ValueError for settings that its rows cannot follow."""
    if objective == "prompts":
        if mask_rationale:
            raise ValueError("dataset.mask_rationale: prompts have no rationale; leave the key out")
        return PromptRenderer(tokenizer, max_length=max_length, over_length=over_length)
    if not is_preference(objective):
        return Renderer(
            tokenizer,
            objective=objective,
            max_length=max_length,
            over_length=over_length,
            mask_rationale=mask_rationale,
        )
    if over_length == "split":
        raise ValueError("dataset.over_length: the answers of a preference cannot be split; use drop or truncate")
    if mask_rationale:
        raise ValueError("dataset.mask_rationale: preferences have no rationale; leave the key out")
    return PreferenceRenderer(tokenizer, objective=objective, max_length=max_length, over_length=over_length)


class PreferenceRenderer(Renderer):
    """Turns preferences into units of two token rows that fit into `max_length` together.

    Longer units are dropped, or by `truncate` each row is cut to half of `max_length`; both are counted.
    """

    def __init__(
        self, tokenizer: Any, *, objective: Objective, max_length: int, over_length: OverLength | None
    ) -> None:
        super().__init__(tokenizer, objective="sft", max_length=max_length, over_length=over_length)
        self.is_labelled = objective == "labelled"

    def token_rows(self, samples: Sequence[Sample]) -> list[TokenRow]:
        """Units of rows, in order. ValueError names the sample and the key that is wrong."""
        units = labelled_units(samples) if self.is_labelled else [(sample, pair_of(sample)) for sample in samples]
        chats = [
            Sample(id=sample.id, source=sample.source, content={"messages": [*prompt, *answer]})
            for sample, answers in units
            for _, prompt, answer in answers
        ]
        rendered = list(self.chats(chats))
        rows: list[TokenRow] = []
        for number, (sample, answers) in enumerate(units):
            pairs = rendered[ROWS_PER_UNIT * number : ROWS_PER_UNIT * (number + 1)]
            if any(pair is None for pair in pairs):
                continue  # the template refused it, and it was counted
            rows += self.fitted_unit(
                [
                    TokenRow(f"{sample.id}#{role}", pair[0], last_turns(pair[1], answer), sample.source)
                    for (role, _, answer), pair in zip(answers, pairs, strict=True)
                    if pair is not None
                ]
            )
        return rows

    def fitted_unit(self, rows: list[TokenRow]) -> list[TokenRow]:
        """The rows of a unit by the over-length policy, or none."""
        if sum(len(row.input_ids) for row in rows) > self.max_length:
            self.longer_than_max_length += 1
            if self.over_length == "drop":
                self.dropped["longer than max_length, both answers together"] += 1
                return []
            half = self.max_length // 2
            rows = [TokenRow(row.sample_id, row.input_ids[:half], row.loss_mask[:half], row.source) for row in rows]
        if not all(row.loss_mask[1:].any() for row in rows):
            self.dropped["no token of an answer to learn from"] += 1
            return []
        return rows


def pair_of(sample: Sample) -> list[Answer]:
    """Both answers of a preference; ValueError where it is none."""
    missing = [key for key in ("prompt", "chosen", "rejected") if key not in sample.content]
    if missing:
        raise ValueError(
            f"sample {sample.id} holds {', '.join(sample.content)} and lacks {', '.join(missing)}: this "
            "finetuning.objective learns from pairs; return prompt, chosen and rejected from the dataset module"
        )
    prompt = as_messages(sample.content["prompt"], "user")
    require_text(sample, "prompt", prompt)
    answers = {key: as_messages(sample.content[key], "assistant") for key in ("chosen", "rejected")}
    for key, answer in answers.items():
        require_text(sample, key, answer)
    if answers["chosen"] == answers["rejected"]:
        raise ValueError(
            f"sample {sample.id}: chosen and rejected are equal, so neither is better: "
            f"{str(answers['chosen'][-1]['content'])[:80]!r}; leave the row out in the dataset module"
        )
    return [("chosen", prompt, answers["chosen"]), ("rejected", prompt, answers["rejected"])]


def labelled_units(samples: Sequence[Sample]) -> list[tuple[Sample, list[Answer]]]:
    """Every labelled answer, each with the answer of the next one to its own prompt."""
    answers = [(sample, answer) for sample in samples for answer in labelled_answers(sample)]
    return [
        (sample, [(role, prompt, answer), ("mismatched", prompt, answers[(number + 1) % len(answers)][1][2])])
        for number, (sample, (role, prompt, answer)) in enumerate(answers)
    ]


def labelled_answers(sample: Sample) -> Iterable[Answer]:
    """The labelled answers of a sample: its own, or both of a pair; ValueError where it has none."""
    if "chosen" in sample.content:
        (_, prompt, chosen), (_, _, rejected) = pair_of(sample)
        return [("desirable", prompt, chosen), ("undesirable", prompt, rejected)]
    label = sample.metadata.get("label")
    if "messages" not in sample.content or label not in (True, False):
        found = f"label {label!r}" if "messages" in sample.content else ", ".join(sample.content)
        raise ValueError(
            f"sample {sample.id} holds {found}: finetuning.objective kto learns from prompt, completion and label "
            "(true or false), from messages and label, or from prompt, chosen and rejected"
        )
    messages = sample.content["messages"]
    turns = [turn for turn, message in enumerate(messages) if message["role"] != "assistant"]
    answer = turns[-1] + 1 if turns else 0
    require_text(sample, "prompt", messages[:answer])
    require_text(sample, "completion", messages[answer:])
    return [("desirable" if label else "undesirable", messages[:answer], messages[answer:])]


def require_text(sample: Sample, key: str, messages: Sequence[Message]) -> None:
    """Raise ValueError where nothing is said."""
    if not any(message["content"].strip() or message.get("tool_calls") for message in messages):
        raise ValueError(f"sample {sample.id}: {key} is empty; leave the row out in the dataset module")


def as_messages(value: str | Sequence[Message] | None, role: str) -> list[Message]:
    """Turns as they are; a plain text as one turn of the role."""
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value or [])


def last_turns(mask: Mask, answer: Sequence[Message]) -> Mask:
    """Only those runs of the mask that the answer's assistant turns make up, the last ones."""
    turns = sum(message["role"] == "assistant" for message in answer)
    begins = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0) == 1)
    kept = mask.copy()
    if len(begins):
        kept[: begins[-turns:][0]] = False
    return kept
