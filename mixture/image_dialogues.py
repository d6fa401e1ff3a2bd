"""Dialogues about images, and batches of them by any processor, with loss on what the assistant says. No torch.

A row holds its images in `images` or `image`, and what is said about them in one of

    messages    [{role, content}], content a text or parts [{type: image | text, ...}]; an image part may hold its image
    texts       [{user, assistant}]
    any other format of mixture/formats.py that becomes messages: question and answer, conversations, ...

`<image>` in a text is a place for an image; images without a place stand before the first question.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mixture.formats import Message, canonical_sample, read_turns
from mixture.image_rows import IMAGE_COLUMNS, Row, holds_image
from mixture.render import ChatTemplate, RefusedByTemplateError
from mixture.tokenizers import ControlTokens, offsets_backend, span_mask

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

IGNORED = -100
PLACE = "\U000f1f00"
"""Stands for an image in the content of a message."""

PLACE_IN_TEXT = "<image>"
HEADER_TOKENS = 3
"""Tokens before an answer that are looked for together with it."""

GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


class NotForDialogueError(ValueError):
    """A row that is well formed and cannot be learned from, with the reason as its text."""


# --- rows


@dataclass(frozen=True)
class Dialogue:
    """Messages whose contents are texts, with a `PLACE` for each of the images in order."""

    messages: list[Message]
    images: list[Any]


def dialogue_of(row: Row) -> Dialogue:
    """The dialogue that a row holds; ValueError names the column that is missing or does not fit."""
    images = images_of(row)
    messages = messages_of(row, images)
    places = sum(message["content"].count(PLACE) for message in messages)
    if places == 0 and images:
        first = next((turn for turn, message in enumerate(messages) if message["role"] == "user"), None)
        if first is None:
            raise ValueError(f"{len(images)} images and no user's turn to put them before")
        content = PLACE * len(images) + messages[first]["content"]
        messages = [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]
        places = len(images)
    if places and not images:
        raise NotForDialogueError("a place for an image in its text, and no image")
    if places != len(images):
        raise ValueError(f"{len(images)} images for {places} places in the messages; give each place its image")
    return Dialogue(messages, images)


def images_of(row: Row) -> list[Any]:
    """The images in the columns for them, in order."""
    images: list[Any] = []
    for column in IMAGE_COLUMNS:
        if column not in row:
            continue
        value = row[column]
        if value is None:
            raise ValueError(f"column {column} is empty; leave the row out in the dataset module")
        found = list(value) if isinstance(value, (list, tuple)) else [value]
        for place, image in enumerate(found):
            if not holds_image(image):
                where = f"{column}[{place}]" if isinstance(value, (list, tuple)) else column
                raise ValueError(f"{where} holds {type(image).__name__}, not an image")
        images += found
    return images


def messages_of(row: Row, images: list[Any]) -> list[Message]:
    """What is said in a row. Images that stand in the messages themselves are appended to `images`."""
    if row.get("messages") is not None:
        turns = row["messages"]
        if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in turns):
            raise ValueError("column messages must hold a list of turns, dicts with role and content")
        return read_turns([{**turn, "content": text_of(turn.get("content"), images)} for turn in turns], "messages")
    if row.get("texts") is not None:
        return [
            {"role": role, "content": with_places(str(turn[role]).strip())}
            for turn in row["texts"]
            for role in ("user", "assistant")
        ]
    others = {key: value for key, value in row.items() if key not in IMAGE_COLUMNS}
    content = canonical_sample(others, source="", row_id="").content
    if "messages" not in content:
        raise ValueError(
            f"a row with images and {', '.join(others)}; it needs messages, texts, or question and answer beside them"
        )
    return [{**message, "content": with_places(message["content"])} for message in content["messages"]]


def text_of(content: Any, images: list[Any]) -> Any:
    """A content as one text with places for images; what is no list of parts passes as it is."""
    if isinstance(content, str):
        return with_places(content)
    if not isinstance(content, (list, tuple)):
        return content
    pieces: list[str] = []
    for part in content:
        if isinstance(part, Mapping) and (part.get("type") == "image" or holds_image(part.get("image"))):
            pieces.append(PLACE)
            images += [part["image"]] if holds_image(part.get("image")) else []
            continue
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise ValueError(f"messages hold a part that is neither text nor image: {str(part)[:80]}")
        pieces.append(text)
    return "".join(pieces)


def with_places(text: str) -> str:
    """The text with places for its images."""
    return re.sub(rf"{PLACE_IN_TEXT}\n?", PLACE, text)


# --- batches


class ProcessorTemplate:
    """A processor's chat template as ChatTemplate reads one: contents are texts with places."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.eos_token, self.bos_token = self.tokenizer.eos_token, self.tokenizer.bos_token
        self.added_tokens_decoder = self.tokenizer.added_tokens_decoder
        self.chat_template = processor.chat_template or self.tokenizer.chat_template

    def get_chat_template(self) -> str:
        """The template without the tags that tell the assistant's part: they would need contents without parts."""
        return GENERATION_TAG.sub("", self.chat_template)

    def apply_chat_template(
        self, conversation: Sequence[Any], *, tokenize: bool, add_generation_prompt: bool = False
    ) -> Any:
        """The text of a conversation, or of each of several."""
        assert not tokenize
        if conversation and isinstance(conversation[0], list):
            return [self.apply_chat_template(each, tokenize=False) for each in conversation]
        return self.processor.apply_chat_template(
            [self.with_parts(message) for message in conversation],
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def with_parts(self, message: Message) -> Message:
        """The message with its content as parts; a system's stays a text where the template writes it so."""
        if message["role"] == "system" and self.takes_system_text:
            return message
        pieces = re.split(f"({PLACE})", message["content"])
        parts = [{"type": "image"} if piece == PLACE else {"type": "text", "text": piece} for piece in pieces if piece]
        return {**message, "content": parts}

    @cached_property
    def takes_system_text(self) -> bool:
        question = {"role": "user", "content": [{"type": "text", "text": "a"}]}
        probe = [{"role": "system", "content": "probe"}, question]
        text = self.processor.apply_chat_template(probe, chat_template=self.chat_template, tokenize=False)
        return "probe" in text


class DialogueCollator:
    """Rows with images to a batch of NumPy arrays, padded on the right: what the processor makes, and `labels`.

    Labels are the tokens that the assistant says, and -100 elsewhere.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        adapter = ProcessorTemplate(processor)
        self.template = ChatTemplate(adapter)
        self.backend = offsets_backend(processor.tokenizer)
        self.control_tokens = ControlTokens(self.backend)
        names = [getattr(processor, "image_token", None), getattr(processor.tokenizer, "boi_token", None)]
        self.image_tokens = [processor.tokenizer.convert_tokens_to_ids(name) for name in names if name]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The batch of rows as a dataset module gives them. ValueError: a row that holds no dialogue."""
        dialogues = [dialogue_of(row) for row in rows]
        for dialogue in dialogues:
            if self.control_tokens.occur(dialogue.messages):
                raise NotForDialogueError("control tokens of the tokenizer in its text")
        chats = [self.rendered(dialogue) for dialogue in dialogues]
        images = [[rgb(image) for image in dialogue.images] for dialogue in dialogues]
        batch = dict(
            self.processor(
                text=[chat.text for chat in chats],
                images=images if any(images) else None,
                padding=True,
                padding_side="right",
                add_special_tokens=False,  # the template has written them
                return_tensors="np",
            )
        )
        labels = np.full_like(batch["input_ids"], IGNORED)
        for row, chat in enumerate(chats):
            encoding = self.backend.encode(chat.text, add_special_tokens=False)
            ids = np.array(encoding.ids)
            mask = span_mask(np.array(encoding.offsets).reshape(-1, 2), chat.spans)
            tokens = batch["input_ids"][row][batch["attention_mask"][row] == 1]
            said = self.expanded(ids, mask, tokens)
            labels[row, : len(tokens)][said] = tokens[said]
        return {**batch, "labels": labels}

    def rendered(self, dialogue: Dialogue) -> Any:
        try:
            return self.template.rendered(dialogue.messages)
        except RefusedByTemplateError as error:
            raise NotForDialogueError(f"refused by the chat template: {error}") from error

    def expanded(self, ids: Ids, mask: Mask, tokens: Ids) -> Mask:
        """The mask of `ids` over `tokens`, which are the same with each image written out."""
        found = np.zeros(len(tokens), np.bool_)
        end = len(tokens)
        # From the end, and each answer with the tokens before it: the same words may stand in a question.
        for first, last in reversed(runs(mask)):
            before = ids[max(first - HEADER_TOKENS, 0) : first]
            places = np.flatnonzero(np.isin(before, self.image_tokens))
            header = len(before) - (places[-1] + 1 if len(places) else 0)
            place = last_place(tokens[:end], ids[first - header : last])
            if place is None:
                raise ValueError("the processor changes the tokens of the assistant's answer, so it cannot be found")
            found[place + header : place + header + last - first] = True
            end = place + header
        return found


def rgb(image: Any) -> Any:
    """An image in the colours that vision models read; a dict of its bytes is decoded."""
    if isinstance(image, Mapping):
        from mixture.image_rows import decoded

        image = decoded(image["bytes"], "feature", "image")
    return image.convert("RGB")


def runs(mask: Mask) -> list[tuple[int, int]]:
    """First and last place, the last not included, of each run of true values."""
    changes = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return list(zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True))


def last_place(tokens: Ids, pattern: Ids) -> int | None:
    """Where the pattern begins in the tokens for the last time; None where nowhere."""
    if len(pattern) > len(tokens):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(pattern))
    places = np.flatnonzero((windows == pattern).all(1))
    return int(places[-1]) if len(places) else None
