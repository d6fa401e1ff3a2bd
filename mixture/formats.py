"""Rows in the formats that data sets come in, turned into canonical samples. Turns are kept, never flattened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
Message = dict[str, Any]
Content = dict[str, Any]
"""The part of a canonical sample that its format decides: one of CONTENT_KEYS' groups."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Spellings of roles, in lower case, and what they mean."""

CONTENT_KEYS = ("messages", "text", "prompt", "chosen", "rejected", "input_ids", "loss_mask")
SHOWN_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A canonical sample: one JSON object a line in train.jsonl.

    `content` holds `messages` [{role, content}], or `text`, or `prompt` + `chosen` + `rejected`, or `prompt`, or, for
    rows that came tokenised, `input_ids` + `loss_mask`.
    """

    id: str
    source: str
    content: Content
    category: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The object that is written."""
        head = {"id": self.id, "source": self.source, "category": self.category, "metadata": self.metadata}
        return {**head, **self.content}


@dataclass(frozen=True)
class Format:
    """A row format: fits a row where none of `columns` is missing or null, and reads it with `read`."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Content]
    also_reads: tuple[str, ...] = ()

    def fits(self, row: Row) -> bool:
        """Whether the row has every column of this format."""
        return all(row.get(column) is not None for column in self.columns)


def canonical_sample(row: Row, *, source: str, row_id: str) -> Sample:
    """The canonical sample of a row in any known format; ValueError shows the row where it fits none.

    `source` names the data set and `row_id` the row, where the row itself does not: rows that already are canonical
    samples keep theirs.
    """
    row_format = detect_format(row)
    try:
        content = row_format.read(row)
    except ValueError as error:
        raise ValueError(f"row {row_id}, format {row_format.name}: {error}\n  {shown(row)}") from error
    is_canonical = isinstance(row.get("metadata"), Mapping) and isinstance(row.get("source"), str)
    return Sample(
        id=str(row["id"]) if row.get("id") not in (None, "") else row_id,
        source=row["source"] if is_canonical else source,
        category=row["category"] if isinstance(row.get("category"), str) else None,
        metadata=dict(row["metadata"]) if is_canonical else other_columns(row, row_format),
        content=content,
    )


def detect_format(row: Row) -> Format:
    """The first format of FORMATS that fits; ValueError names the columns where none does."""
    if not isinstance(row, Mapping):
        raise ValueError(f"a row must be a dict of columns, got {type(row).__name__}: {str(row)[:SHOWN_CHARACTERS]}")
    for row_format in FORMATS:
        if row_format.fits(row):
            return row_format
    known = "; ".join(f"{known.name} ({', '.join(known.columns)})" for known in FORMATS)
    raise ValueError(
        f"a row with columns {', '.join(map(str, row))} fits no known format.\n  {shown(row)}\n"
        f"Known formats: {known}.\nRename the columns in the dataset module, or return `messages`."
    )


def other_columns(row: Row, row_format: Format) -> dict[str, Any]:
    """Plain values of the columns that the format does not read, kept as metadata."""
    used = {*row_format.columns, *row_format.also_reads, "id", "category"}
    plain = (str, int, float, bool)
    return {str(key): value for key, value in row.items() if key not in used and isinstance(value, plain)}


def shown(row: Row) -> str:
    """The row, shortened for a message."""
    return "{" + ", ".join(f"{key}: {shortened(repr(value))}" for key, value in row.items()) + "}"


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS // 4 else text[: SHOWN_CHARACTERS // 4] + "…"


# --- one small function a format, in the order in which they are tried


def read_tokens(row: Row) -> Content:
    """`input_ids`, with `labels` (-100: no loss) and `attention_mask` (0: padding, removed) where present."""
    ids = [int(token) for token in row["input_ids"]]
    labels = ids if row.get("labels") is None else [int(label) for label in row["labels"]]
    attention = [1] * len(ids) if row.get("attention_mask") is None else list(row["attention_mask"])
    if not len(ids) == len(labels) == len(attention):
        raise ValueError(f"{len(ids)} input_ids, {len(labels)} labels, {len(attention)} attention_mask: must agree")
    for token, label in zip(ids, labels, strict=True):
        if label not in (-100, token):
            raise ValueError(f"label {label} at a token {token}: labels must be -100 or the token itself, unshifted")
    kept = [position for position, attended in enumerate(attention) if attended]
    mask = [labels[position] != -100 for position in kept]
    return {"input_ids": [ids[position] for position in kept], "loss_mask": mask}


def read_token_mask(row: Row) -> Content:
    """`input_ids` and `loss_mask`, the form that canonical samples keep tokens in."""
    if len(row["input_ids"]) != len(row["loss_mask"]):
        raise ValueError(f"{len(row['input_ids'])} input_ids, {len(row['loss_mask'])} loss_mask: must agree")
    return {"input_ids": [int(i) for i in row["input_ids"]], "loss_mask": [bool(m) for m in row["loss_mask"]]}


def read_preference(row: Row) -> Content:
    """`prompt`, `chosen`, `rejected`: texts, messages, or one message each."""
    return {key: text_or_messages(row[key], key) for key in ("prompt", "chosen", "rejected")}


def read_sharegpt_preference(row: Row) -> Content:
    """ShareGPT turns as the prompt, with one `chosen` and one `rejected` answer."""
    return {
        "prompt": sharegpt_messages(row),
        "chosen": text_or_messages(row["chosen"], "chosen"),
        "rejected": text_or_messages(row["rejected"], "rejected"),
    }


def read_messages(row: Row) -> Content:
    """`messages`: [{role, content}]."""
    return {"messages": read_turns(row["messages"], "messages")}


def read_sharegpt(row: Row) -> Content:
    """`conversations`: [{from, value}], with an optional `system` column."""
    return {"messages": sharegpt_messages(row)}


def read_alpaca(row: Row) -> Content:
    """`instruction`, `output`, optional `input`, `system` and `history` [[question, answer]]."""
    question = text(row, "instruction")
    if row.get("input"):
        question = f"{question}\n\n{text(row, 'input')}"
    turns = [turn for pair in row.get("history") or [] for turn in exchange(str(pair[0]), str(pair[1]))]
    return {"messages": [*system_turn(row), *turns, *exchange(question, text(row, "output"))]}


def read_query_answer(row: Row) -> Content:
    """`query` and `answer`."""
    return {"messages": [*system_turn(row), *exchange(text(row, "query"), text(row, "answer"))]}


def read_question_answer(row: Row) -> Content:
    """`question` and `answer`."""
    return {"messages": [*system_turn(row), *exchange(text(row, "question"), text(row, "answer"))]}


def read_prompt_completion(row: Row) -> Content:
    """`prompt` and `completion`: texts, or messages."""
    prompt = text_or_messages(row["prompt"], "prompt")
    completion = text_or_messages(row["completion"], "completion")
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    return {"messages": [*before, *after]}


def read_programming_task(row: Row) -> Content:
    """MBPP: a task in `text`, its solution in `code`, optional tests in `test_list` that the task shows."""
    tests = row.get("test_list") or []
    task = text(row, "text")
    if tests:
        task = f"{task}\n\nYour code should pass these tests:\n\n" + "\n".join(map(str, tests))
    return {"messages": exchange(task, text(row, "code"))}


def read_text(row: Row) -> Content:
    """Plain `text`."""
    return {"text": text(row, "text")}


def read_prompt(row: Row) -> Content:
    """`prompt` alone: a text, or messages."""
    return {"prompt": text_or_messages(row["prompt"], "prompt")}


FORMATS = (
    Format("tokenised", ("input_ids", "loss_mask"), read_token_mask),
    Format("tokenised", ("input_ids",), read_tokens, ("labels", "attention_mask")),
    Format("preference", ("prompt", "chosen", "rejected"), read_preference),
    Format("sharegpt preference", ("conversations", "chosen", "rejected"), read_sharegpt_preference, ("system",)),
    Format("messages", ("messages",), read_messages),
    Format("sharegpt", ("conversations",), read_sharegpt, ("system",)),
    Format("alpaca", ("instruction", "output"), read_alpaca, ("input", "system", "history")),
    Format("query/answer", ("query", "answer"), read_query_answer, ("system",)),
    Format("question/answer", ("question", "answer"), read_question_answer, ("system",)),
    Format("prompt/completion", ("prompt", "completion"), read_prompt_completion),
    Format("programming task", ("text", "code"), read_programming_task, ("test_list",)),
    Format("text", ("text",), read_text),
    Format("prompt", ("prompt",), read_prompt),
)
"""Known formats; the first that fits a row is taken, so the more specific ones come first."""


# --- pieces that the formats share


def exchange(question: str, answer: str) -> list[Message]:
    """A user's turn and the assistant's."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def system_turn(row: Row) -> list[Message]:
    """The system turn of a row with a filled `system` column, else nothing."""
    return [{"role": "system", "content": text(row, "system")}] if row.get("system") else []


def sharegpt_messages(row: Row) -> list[Message]:
    """Turns of a ShareGPT row."""
    return [*system_turn(row), *read_turns(row["conversations"], "conversations")]


def text_or_messages(value: Any, column: str) -> str | list[Message]:
    """A column that holds a text, one turn, or a list of turns."""
    if isinstance(value, str):
        return value
    return read_turns([value] if isinstance(value, Mapping) else value, column)


def read_turns(turns: Any, column: str) -> list[Message]:
    """Turns as [{role, content, ...}], from {role, content} or {from, value}; further filled keys are kept."""
    if isinstance(turns, (str, Mapping)) or not hasattr(turns, "__iter__"):
        raise ValueError(f"column {column} must hold a list of turns, got {type(turns).__name__}")
    messages = [read_turn(turn, f"{column}[{index}]") for index, turn in enumerate(turns)]
    if not messages:
        raise ValueError(f"column {column} holds no turns")
    return messages


def read_turn(turn: Any, where: str) -> Message:
    """One turn; ValueError names the place where its role or content cannot be read."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} must be a dict with role and content, got {type(turn).__name__}")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    role = ROLES.get(str(turn.get(role_key)).strip().lower())
    if role is None:
        raise ValueError(f"{where} has {role_key} {turn.get(role_key)!r}; known: {', '.join(ROLES)}")
    content = turn.get(content_key)
    if content is None and turn.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = joined_parts(content, where)
    if not isinstance(content, str):
        raise ValueError(f"{where} has {content_key} of type {type(content).__name__}, expected text")
    kept = {key: value for key, value in turn.items() if key not in (role_key, content_key) and value is not None}
    return {"role": role, "content": content, **kept}


def joined_parts(parts: list[Any], where: str) -> str:
    """The text of a content given as [{type: text, text}]."""
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise ValueError(f"{where} has a content part that is not text: {str(part)[:80]}")
    return "".join(part["text"] for part in parts)


def text(row: Row, column: str) -> str:
    """A column that must hold text."""
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column} holds {type(value).__name__}, expected text")
    return value
