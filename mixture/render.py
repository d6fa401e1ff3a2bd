"""Canonical samples to token rows: the chat template is applied here, and the loss mask is exact or refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from mixture.formats import Message, Sample
from mixture.rationales import marked_text, placed_spans, rationale_spans, shifted_by_breaks
from mixture.shards import TokenRow
from mixture.tokenizers import (
    MAKERS,
    BackendChoice,
    ByteLengths,
    ControlTokens,
    EncodeBatch,
    FlatIds,
    Ids,
    Span,
    TokenizerBackend,
    choose_backend,
    offsets_backend,
    span_mask,
)

Objective = Literal["sft", "pretrain", "mixed", "pairs", "labelled", "prompts"]
"""What counts in the loss: assistant turns, every token, or the former in conversations and the latter in texts; or
answers that are compared or labelled (mixture/preferences.py), or that are still to be written (mixture/prompts.py)."""

OverLength = Literal["drop", "split", "truncate"]
Mask = npt.NDArray[np.bool_]

OVER_LENGTH_DEFAULT: dict[Objective, OverLength | None] = {
    "sft": "drop",
    "pretrain": "split",
    "mixed": None,
    "pairs": "drop",
    "labelled": "drop",
    "prompts": "drop",
}
"""None: conversations are dropped, and texts split."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Marks are single characters that no tokenizer, template or trimming rule treats specially. The second range is for
# conversations that hold characters of the first.
MARKS_IN_RANGE = 6400
MARK_RANGES = {first: re.compile(f"([{chr(first)}-{chr(first + MARKS_IN_RANGE - 1)}])") for first in (0xE000, 0xF0000)}


class RefusedByTemplateError(ValueError):
    """The chat template itself raised an error for a conversation."""


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as the template writes it, and the character spans of what the assistant says."""

    text: str
    spans: list[Span]


class ChatTemplate:
    """Renders conversations and finds the assistant's spans in any template, verified against the real text.

    A span is an assistant's turn as the model has to write it: everything after the generation prompt, up to and with
    the end-of-turn token. Templates with `{% generation %}` blocks say themselves where spans are. For all others the
    conversation is rendered a second time with marks around each assistant's content; taking the marks out must give
    the real text again, to the character, or the template is refused with a ValueError.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = chat_template_of(tokenizer)
        self.has_generation_blocks = bool(GENERATION_BLOCK.search(self.template))
        special = {str(token.content) for token in tokenizer.added_tokens_decoder.values()} | {tokenizer.eos_token}
        if tokenizer.bos_token != tokenizer.eos_token:
            special.discard(tokenizer.bos_token)  # opens a turn, never closes one
        longest_first = sorted((token for token in special if token), key=len, reverse=True)
        self.special_token = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.headers: list[str] = []
        self.lead, self.end_of_turn, self.end_of_earlier_turn = "", "", ""
        try:
            self.probe()
        except RefusedByTemplateError as error:
            raise ValueError(f"the chat template cannot render a question and an answer: {error}") from error

    def probe(self) -> None:
        """Learn from one exchange, and from the same one with a second question, what stands around the content.

        `headers`: what opens an assistant's turn and is given to the model, as in the generation prompt and as in
        earlier turns; `lead`: what the model writes between header and content (a blank, an empty reasoning block);
        `end_of_turn`, `end_of_earlier_turn`: the token that closes the last turn and earlier ones, or "".
        """
        opening, closing = map(chr, (min(MARK_RANGES), min(MARK_RANGES) + 1))
        question = {"role": "user", "content": "question"}
        answer = {"role": "assistant", "content": f"{opening}answer{closing}"}
        if self.has_generation_blocks:
            chat = self.rendered_with_blocks([question, answer])
            if not any("answer" in chat.text[start:end] for start, end in chat.spans):
                raise ValueError("the chat template's {% generation %} blocks do not hold the assistant's content")
            return
        asked = self.render([question])
        prompt = self.render([question], add_generation_prompt=True)
        answered = self.render([question, answer])
        followed = self.render([question, answer, question])
        if any(text.count(mark) != 1 for text in (answered, followed) for mark in (opening, closing)):
            raise ValueError("the chat template does not write the assistant's content exactly once")
        before, before_followed = answered[: answered.index(opening)], followed[: followed.index(opening)]
        given = common_prefix(prompt, before)
        header = given[len(common_prefix(asked, given)) :]
        earlier_header = before_followed[len(common_prefix(asked, before_followed)) :]
        self.headers = [text for text in dict.fromkeys((header, earlier_header)) if text.strip()]
        self.lead = before[len(given) :]
        if not header and self.lead.strip():
            self.lead = ""  # the template writes no generation prompt, so this is the header, not the model's part
        after, after_followed = answered[answered.index(closing) + 1 :], followed[followed.index(closing) + 1 :]
        end, earlier_end = self.special_token.match(after.lstrip()), self.special_token.match(after_followed)
        self.end_of_turn = end[0] if end else ""
        self.end_of_earlier_turn = earlier_end[0] if earlier_end else ""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise RefusedByTemplateError(str(error)) from error

    def rendered_together(self, conversations: Sequence[Sequence[Message]]) -> list[RenderedChat]:
        """Several conversations, as `rendered` gives each; faster. ValueError: one of them, without telling which."""
        if self.has_generation_blocks:
            return [self.rendered_with_blocks(messages) for messages in conversations]
        first_marks = [unused_marks(messages) for messages in conversations]
        marked = [marked_messages(*pair, "outside") for pair in zip(conversations, first_marks, strict=True)]
        texts = self.render_together([*conversations, *marked])
        chats: list[RenderedChat] = []
        for index, messages in enumerate(conversations):
            text = texts[index]
            pieces = MarkedText.split(texts[len(conversations) + index], first_marks[index])
            if pieces is not None and "".join(pieces.pieces) == text:
                chats.append(RenderedChat(text, self.spans(messages, text, pieces)))
            else:
                chats.append(self.rendered(messages))
        return chats

    def render_together(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """The texts of several conversations."""
        try:
            texts: list[str] = self.tokenizer.apply_chat_template([*map(list, conversations)], tokenize=False)
        except TemplateError as error:
            raise RefusedByTemplateError(str(error)) from error
        return texts

    def rendered(self, messages: Sequence[Message]) -> RenderedChat:
        """The text of a conversation and the verified spans of its assistant turns."""
        if self.has_generation_blocks:
            return self.rendered_with_blocks(messages)
        text = self.render(messages)
        # Templates that trim content move outer marks inward; templates that cut reasoning off drop the opening mark.
        for placement in ("outside", "inside", "closing"):
            marked = self.marked_pieces(messages, placement)
            if marked is not None and "".join(marked.pieces) == text:
                return RenderedChat(text, self.spans(messages, text, marked))
        raise ValueError(
            "the chat template changes the assistant's content in a way that cannot be traced, so the loss mask would "
            "be wrong; mark the assistant's part of the template with {% generation %} ... {% endgeneration %}. "
            f"Conversation: {str(list(messages))[:300]}"
        )

    def rendered_with_blocks(self, messages: Sequence[Message]) -> RenderedChat:
        """Spans from the template's own `{% generation %}` blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise RefusedByTemplateError(str(error)) from error
        if texts[0] != self.render(messages):
            raise ValueError("the chat template renders differently when its {% generation %} blocks are tracked")
        return RenderedChat(texts[0], [(int(start), int(end)) for start, end in spans[0]])

    def marked_pieces(self, messages: Sequence[Message], placement: str) -> MarkedText | None:
        """The conversation rendered with marks and split at them; None where the template refuses the marked text."""
        first_mark = unused_marks(messages)
        marked = marked_messages(messages, first_mark, placement)
        try:
            text = self.render(marked)
        except RefusedByTemplateError:
            return None
        return MarkedText.split(text, first_mark)

    def spans(self, messages: Sequence[Message], text: str, marked: MarkedText) -> list[Span]:
        """The span of each spoken turn, from the places of its marks in the real text."""
        spans: list[Span] = []
        previous_end = 0
        for turn, message in enumerate(messages):
            if not is_spoken(message):
                continue
            opening, closing = marked.places.get(2 * turn), marked.places.get(2 * turn + 1)
            if closing is None:
                raise ValueError(f"the chat template leaves out the assistant's turn {turn}: {str(message)[:200]}")
            if opening is not None:
                start = self.with_lead(text, previous_end, opening)
            else:
                start = self.after_header(text, previous_end, closing, turn)
            end = self.after_end_of_turn(text, closing, anywhere=bool(message.get("tool_calls")))
            spans.append((start, end))
            previous_end = end
        return spans

    def with_lead(self, text: str, start: int, opening: int) -> int:
        """Where the model begins to write: at the content's opening mark, or before the lead and blanks ahead of it."""
        for header in self.headers or [""]:
            for front in (header + self.lead, header):
                place = text.rfind(front, start, opening) if front else -1
                if place >= 0 and not text[place + len(front) : opening].strip():
                    return place + len(header)
        return opening

    def after_header(self, text: str, start: int, end: int, turn: int) -> int:
        """Where an assistant's turn begins that ends at `end`, from the one header in front of it."""
        for header in self.headers:
            if text.count(header, start, end) == 1:
                return text.index(header, start, end) + len(header)
        raise ValueError(
            f"the chat template does not show where the assistant's turn {turn} begins; mark it with "
            "{% generation %} ... {% endgeneration %} in the template"
        )

    def after_end_of_turn(self, text: str, closing: int, *, anywhere: bool) -> int:
        """The place behind the end-of-turn token that follows the content, or behind the content where none does."""
        if anywhere and self.end_of_turn:  # tool calls stand between content and end of turn
            place = text.find(self.end_of_turn, closing)
            return closing if place < 0 else place + len(self.end_of_turn)
        blanks = len(text[closing:]) - len(text[closing:].lstrip())
        if self.end_of_turn and text.startswith(self.end_of_turn, closing + blanks):
            return closing + blanks + len(self.end_of_turn)
        return closing + len(self.end_of_earlier_turn) * text.startswith(self.end_of_earlier_turn, closing)


@dataclass(frozen=True)
class MarkedText:
    """A text split at its marks: the pieces between them, and the place of each mark in the joined pieces."""

    pieces: list[str]
    places: dict[int, int]

    @classmethod
    def split(cls, text: str, first_mark: int) -> MarkedText | None:
        """Split at marks from `first_mark` on; None where a mark occurs twice."""
        parts = MARK_RANGES[first_mark].split(text)
        places: dict[int, int] = {}
        length = 0
        for piece, mark in zip(parts[::2], [*parts[1::2], ""], strict=True):
            length += len(piece)
            if mark:
                if ord(mark) - first_mark in places:
                    return None
                places[ord(mark) - first_mark] = length
        return cls(parts[::2], places)


def chat_template_of(tokenizer: Any) -> str:
    """The tokenizer's chat template; ValueError says what to do where it has none."""
    if not tokenizer.chat_template:
        raise ValueError(
            "the rows are conversations, but the tokenizer has no chat template: name the instruct variant's tokenizer "
            "in model.tokenizer, or add a chat_template to the tokenizer's folder"
        )
    template: str = tokenizer.get_chat_template()
    return template


def common_prefix(first: str, second: str) -> str:
    """The longest text that both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return first[: next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))]


def is_spoken(message: Message) -> bool:
    """Whether the assistant says something in this turn."""
    return message["role"] == "assistant" and bool(message["content"].strip() or has_more_than_content(message))


def has_more_than_content(message: Message) -> bool:
    """Whether the turn also holds reasoning or tool calls, which the template writes outside the content."""
    return any(message.get(key) for key in (*REASONING_KEYS, "tool_calls"))


def marked_messages(messages: Sequence[Message], first_mark: int, placement: str) -> list[Message]:
    """The conversation with marks around the content of every spoken turn."""
    marked: list[Message] = []
    for turn, message in enumerate(messages):
        content = message["content"]
        if not is_spoken(message):
            marked.append(message)
            continue
        opening, closing = chr(first_mark + 2 * turn), chr(first_mark + 2 * turn + 1)
        if placement == "closing" or has_more_than_content(message):
            opening = ""
        core = content if placement == "outside" else content.strip()
        start = content.index(core)
        content = content[:start] + opening + core + closing + content[start + len(core) :]
        marked.append({**message, "content": content})
    return marked


def unused_marks(messages: Sequence[Message]) -> int:
    """The first code point of a range of marks that the conversation does not use."""
    if 2 * len(messages) > MARKS_IN_RANGE:
        raise ValueError(f"a conversation of {len(messages)} turns; at most {MARKS_IN_RANGE // 2} are supported")
    text = "".join(
        value if isinstance(value, str) else str(value) for message in messages for value in message.values()
    )
    for first, marks in MARK_RANGES.items():
        if text.isascii() or not marks.search(text):
            return first
    raise ValueError("a conversation uses private-use characters of every range that is needed to find its turns")


# --- tokens


class Renderer:
    """Turns canonical samples into token rows for one objective, and counts what was dropped or shortened.

    Control tokens that stand literally in a sample's text become ordinary tokens; those of the template stay.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        objective: Objective,
        max_length: int,
        over_length: OverLength | None,
        mask_rationale: bool = False,
        backend: TokenizerBackend = "huggingface",
    ) -> None:
        self.tokenizer = tokenizer
        self.objective = objective
        self.max_length = max_length
        self.over_length = over_length or OVER_LENGTH_DEFAULT[objective]
        self.mask_rationale = mask_rationale
        self.backend = backend
        self.encoders: dict[TokenizerBackend, EncodeBatch] = {}
        self.dropped: Counter[str] = Counter()
        self.longer_than_max_length = 0
        self.rationale_tokens = 0

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    @cached_property
    def with_offsets(self) -> Any:
        return offsets_backend(self.tokenizer)

    @cached_property
    def byte_lengths(self) -> ByteLengths | None:
        return ByteLengths.of_backend(self.with_offsets)

    @cached_property
    def control_tokens(self) -> ControlTokens:
        return ControlTokens(self.with_offsets)

    def encoded(self, texts: list[str]) -> FlatIds:
        """Ids by the chosen backend; no tokens are added."""
        if self.backend not in self.encoders:
            self.encoders[self.backend] = MAKERS[self.backend](self.with_offsets)
        return self.encoders[self.backend](texts)

    def choose_backend(self, wanted: TokenizerBackend, samples: Sequence[Sample]) -> BackendChoice:
        """The backend to render with, by the ids of these samples."""
        contents = [sample.content for sample in samples]
        texts = [content["text"] for content in contents if "text" in content]
        conversations = [content["messages"] for content in contents if "messages" in content]
        if not (texts or conversations):
            return BackendChoice("huggingface")
        if not self.tokenizer.is_fast:
            return BackendChoice("huggingface", ("tokenizer_backend huggingface: the tokenizer has no tokenizer.json",))
        needs_places = self.objective == "mixed" or (self.objective == "sft" and not texts)
        if needs_places and self.byte_lengths is None:
            reason = "loss masks need the places of tokens, which fast readers tell for byte-level tokenizers only"
            return BackendChoice("huggingface", (f"tokenizer_backend huggingface: {reason}",))
        for messages in conversations:
            try:
                texts.append(self.template.render(messages))
            except RefusedByTemplateError:
                continue  # counted as dropped when its tokens are made
        return choose_backend(wanted, self.with_offsets, texts)

    @property
    def never_ends_turns(self) -> bool:
        """Whether conversations were rendered by a template that closes the assistant's turns with no special token."""
        template = self.__dict__.get("template")
        return template is not None and not template.has_generation_blocks and not template.end_of_turn

    def token_rows(self, samples: Sequence[Sample]) -> list[TokenRow]:
        """Token rows of the samples, in order. ValueError names the sample that does not suit the objective."""
        tokens: list[tuple[Ids, Mask] | None] = [None] * len(samples)
        for kind, render in (("input_ids", self.given), ("messages", self.chats), ("text", self.texts)):
            chosen = [index for index, sample in enumerate(samples) if kind in sample.content]
            for index, row in zip(chosen, render([samples[index] for index in chosen]), strict=True):
                tokens[index] = row
        if self.mask_rationale:
            self.clear_rationales(samples, tokens)
        rows: list[TokenRow] = []
        for sample, pair in zip(samples, tokens, strict=True):
            if not sample.content.keys() & {"input_ids", "messages", "text"}:
                raise ValueError(
                    f"sample {sample.id} holds {', '.join(sample.content)}, which the objective {self.objective} does "
                    "not train on; return messages (or prompt and completion) from the dataset module"
                )
            if pair is not None:
                rows += self.fitted(sample, *pair)
        return rows

    def given(self, samples: list[Sample]) -> Iterable[tuple[Ids, Mask]]:
        """Rows that came tokenised."""
        for sample in samples:
            yield np.array(sample.content["input_ids"], np.int32), np.array(sample.content["loss_mask"], np.bool_)

    def texts(self, samples: list[Sample]) -> Iterable[tuple[Ids, Mask]]:
        """Plain texts, closed by the end-of-text token, with loss everywhere."""
        if not samples:
            return
        if self.objective == "sft":
            raise ValueError(
                f"sample {samples[0].id} is plain text, but the objective sft learns from assistant turns: set "
                "finetuning.objective: pretrain (or mixed, beside conversations), or return messages from the module"
            )
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ValueError("the tokenizer has no eos_token, so texts cannot be told apart: set one in its folder")
        texts = [sample.content["text"] for sample in samples]
        for ids in self.encoded_texts(texts) if self.backend == "huggingface" else self.fast_texts(texts):
            closed = ids if len(ids) and ids[-1] == end else np.append(ids, np.int32(end))
            yield closed, np.ones(len(closed), np.bool_)

    def encoded_texts(self, texts: list[str]) -> list[Ids]:
        """Ids of plain texts, with what the tokenizer puts around them."""
        lists = self.tokenizer(texts, split_special_tokens=True)["input_ids"] if texts else []
        return [np.array(ids, np.int32) for ids in lists]

    def fast_texts(self, texts: list[str]) -> Iterator[Ids]:
        """The same as `encoded_texts`, by the fast backend where no control token stands in the text."""
        before, after = self.around_texts
        literal = [bool(self.control_tokens.pattern.search(text)) for text in texts]
        exceptions = iter(self.encoded_texts(list(compress(texts, literal))))
        encoded = self.encoded([text for text, found in zip(texts, literal, strict=True) if not found])
        others = iter(range(len(encoded)))
        for found in literal:
            yield next(exceptions) if found else np.concatenate((before, encoded[next(others)], after))

    @cached_property
    def around_texts(self) -> tuple[Ids, Ids]:
        """Tokens that the tokenizer puts before and after every text."""
        whole = self.tokenizer("a")["input_ids"]
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        start = next(start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
        return np.array(whole[:start], np.int32), np.array(whole[start + len(bare) :], np.int32)

    def chats(self, samples: list[Sample]) -> Iterator[tuple[Ids, Mask] | None]:
        """Conversations; None where the chat template refuses one."""
        if not samples:
            return
        literal = [self.control_tokens.occur(sample.content["messages"]) for sample in samples]
        exceptions = iter([self.chat_with_control_tokens(sample) for sample in compress(samples, literal)])
        chats = self.rendered_chats([sample for sample, found in zip(samples, literal, strict=True) if not found])
        pairs = iter(self.masked([chat for chat in chats if chat is not None]))
        others = (None if chat is None else next(pairs) for chat in chats)
        for found in literal:
            yield next(exceptions) if found else next(others)

    def rendered_chats(self, samples: Sequence[Sample]) -> list[RenderedChat | None]:
        """Rendered conversations, together where possible; halved where one of them is refused."""
        conversations = [sample.content["messages"] for sample in samples]
        if len(samples) < 2:
            return [self.rendered(sample, messages) for sample, messages in zip(samples, conversations, strict=True)]
        try:
            if self.objective == "pretrain":
                return [RenderedChat(text, []) for text in self.template.render_together(conversations)]
            return [*self.template.rendered_together(conversations)]
        except ValueError:
            half = len(samples) // 2
            return self.rendered_chats(samples[:half]) + self.rendered_chats(samples[half:])

    def rendered(self, sample: Sample, messages: Sequence[Message]) -> RenderedChat | None:
        """The rendered conversation; None, counted, where the template refuses it."""
        try:
            if self.objective == "pretrain":
                return RenderedChat(self.template.render(messages), [])
            return self.template.rendered(messages)
        except RefusedByTemplateError as error:
            self.dropped[f"refused by the chat template: {error}"] += 1
            return None
        except ValueError as error:
            raise ValueError(f"sample {sample.id}: {error}") from error

    def masked(self, chats: Sequence[RenderedChat]) -> list[tuple[Ids, Mask]]:
        """Ids and masks of rendered conversations; the template has written all special tokens already."""
        texts = [chat.text for chat in chats]
        if self.objective == "pretrain":
            encoded = self.encoded(texts)
            return [(encoded[row], np.ones(len(encoded[row]), np.bool_)) for row in range(len(chats))]
        return self.masked_by_spans(chats)

    def masked_by_spans(self, chats: Sequence[RenderedChat]) -> list[tuple[Ids, Mask]]:
        """Ids of rendered texts, and which of them lie in their spans."""
        if self.byte_lengths is None:
            return self.masked_by_offsets(chats)
        texts = [chat.text for chat in chats]
        encoded = self.encoded(texts)
        masks = self.byte_lengths.masks(encoded, texts, [chat.spans for chat in chats])
        inexact = iter(self.masked_by_offsets([chat for chat, mask in zip(chats, masks, strict=True) if mask is None]))
        return [next(inexact) if mask is None else (encoded[row], mask) for row, mask in enumerate(masks)]

    def masked_by_offsets(self, chats: Sequence[RenderedChat]) -> list[tuple[Ids, Mask]]:
        """Ids and masks, by the places that Hugging Face's tokenizer tells for each token."""
        encodings = self.with_offsets.encode_batch([chat.text for chat in chats], add_special_tokens=False)
        return [
            (np.array(encoding.ids, np.int32), span_mask(np.array(encoding.offsets).reshape(-1, 2), chat.spans))
            for encoding, chat in zip(encodings, chats, strict=True)
        ]

    def chat_with_control_tokens(self, sample: Sample) -> tuple[Ids, Mask] | None:
        """A conversation whose content holds control tokens, which become ordinary ones."""
        try:
            messages = self.control_tokens.broken(sample.content["messages"])
        except ValueError as error:
            raise ValueError(f"sample {sample.id}: {error}") from error
        chat = self.rendered(sample, messages)
        if chat is None:
            return None
        ids, mask = self.control_tokens.encoded(chat.text, chat.spans)
        return ids, np.ones(len(ids), np.bool_) if self.objective == "pretrain" else mask

    def prompt_ids(self, messages: Sequence[Message]) -> Ids:
        """Ids of a conversation up to where the assistant's next turn begins.

        ValueError: there is no chat template, or, as RefusedByTemplateError, it refuses the conversation.
        """
        if not self.control_tokens.occur(messages):
            return self.encoded([self.template.render(messages, add_generation_prompt=True)])[0]
        broken = self.control_tokens.broken(messages)
        return self.control_tokens.encoded(self.template.render(broken, add_generation_prompt=True), [])[0]

    def clear_rationales(self, samples: Sequence[Sample], tokens: list[tuple[Ids, Mask] | None]) -> None:
        """Take the loss off the tokens that lie inside a rationale; ValueError names the sample that has none there."""
        for index, sample in enumerate(samples):
            row = tokens[index]
            if row is None or not (spans := rationale_spans(sample)):
                continue
            try:
                inside = self.inside_rationale(sample, spans, len(row[0]))
            except ValueError as error:
                raise ValueError(f"sample {sample.id}: {error}") from error
            ids, mask = row
            self.rationale_tokens += int((mask & inside)[1:].sum())
            tokens[index] = ids, mask & ~inside

    def inside_rationale(self, sample: Sample, spans: Sequence[Span], num_tokens: int) -> Mask:
        """The tokens of a sample that lie inside spans of its last answer or text."""
        if "messages" in sample.content:
            return self.inside_answer(sample, spans)
        inside = self.inside_text(sample.content["text"], spans)
        first = len(self.around_texts[0])
        return np.pad(inside, (first, num_tokens - first - len(inside)))

    def inside_answer(self, sample: Sample, spans: Sequence[Span]) -> Mask:
        """The tokens of a conversation that lie inside spans of its last answer."""
        has_control_tokens = self.control_tokens.occur(sample.content["messages"])
        if has_control_tokens:
            messages = self.control_tokens.broken(sample.content["messages"])
            sample = replace(sample, content={"messages": messages})
            spans = shifted_by_breaks(marked_text(sample), spans)
        chat = self.template.rendered(sample.content["messages"])
        placed = placed_spans(chat.text, chat.spans[-1], marked_text(sample), spans)
        return self.inside(chat.text, placed, has_control_tokens)

    def inside_text(self, text: str, spans: Sequence[Span]) -> Mask:
        """The tokens of a plain text, without those that stand around it, that lie inside spans of it."""
        turn: list[Message] = [{"role": "user", "content": text}]
        has_control_tokens = self.control_tokens.occur(turn)
        if has_control_tokens:
            text = self.control_tokens.broken(turn)[0]["content"]
            spans = shifted_by_breaks(text, spans)
        return self.inside(text, spans, has_control_tokens)

    def inside(self, text: str, spans: Sequence[Span], has_control_tokens: bool) -> Mask:
        """The tokens of a rendered text that lie inside its spans; broken control tokens are read as plain text."""
        if has_control_tokens:
            return self.control_tokens.encoded(text, spans)[1]
        ((_, inside),) = self.masked_by_spans([RenderedChat(text, list(spans))])
        return inside

    def fitted(self, sample: Sample, ids: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_]) -> Iterable[TokenRow]:
        """The row, or its pieces by the over-length policy; rows without anything to learn are dropped and counted."""
        pieces = [(sample.id, ids, mask)]
        if len(ids) > self.max_length:
            self.longer_than_max_length += 1
            starts = range(0, len(ids), self.max_length)
            pieces = [
                (f"{sample.id}#{piece}", ids[start : start + self.max_length], mask[start : start + self.max_length])
                for piece, start in enumerate(starts)
            ]
            over_length = self.over_length or ("split" if "text" in sample.content else "drop")
            if over_length == "drop":
                self.dropped["longer than max_length"] += 1
                return
            if over_length == "truncate":
                pieces = [(sample.id, *pieces[0][1:])]
        for sample_id, piece_ids, piece_mask in pieces:
            if not piece_mask[1:].any():  # the first token of a row is never predicted
                self.dropped["no token to learn from"] += 1
                continue
            yield TokenRow(sample_id, piece_ids, piece_mask, sample.source)


def generation_prompt(sample: Sample) -> dict[str, Any] | None:
    """What generation starts from, as `prompt_messages` or `prompt`; None for samples that hold no question."""
    content = sample.content
    if "messages" in content:
        turns = [turn for turn, message in enumerate(content["messages"]) if message["role"] == "assistant"]
        return {"prompt_messages": content["messages"][: turns[-1]]} if turns and turns[-1] else None
    if isinstance(content.get("prompt"), str):
        return {"prompt": content["prompt"]}
    return {"prompt_messages": content["prompt"]} if "prompt" in content else None
