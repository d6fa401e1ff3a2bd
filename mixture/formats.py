"""Rows in the formats that data sets come in, turned into canonical samples. Turns are kept, never flattened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mixture.html_markdown import is_chat_html, markdown

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
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Spellings of roles, in lower case, and what they mean."""

CANONICAL_ROLES = tuple(dict.fromkeys(ROLES.values()))

FOLLOWS = {"user": (None, "system", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
"""Roles after which each role may speak; None: at the start."""

PLAIN_TYPES = (str, int, float, bool)
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
    notes: Callable[[Row, Content], dict[str, Any]] | None = None
    """What else is worth keeping as metadata, such as how much was cut."""
    is_text: bool = False
    """Whether the columns of most rows hold text. Joined by newlines they are the plain text of such a row, and the
    first of several is the prompt, where none of `also_reads` is there."""


@dataclass(frozen=True)
class Candidate:
    """A format that fits rows of one set of columns, where its own columns are not null."""

    format: Format
    other_columns: tuple[str, ...]
    """Columns that the format does not read; plain values in them are kept as metadata, and spans of a rationale."""


def canonical_sample(row: Row, *, source: str, row_id: str) -> Sample:
    """The canonical sample of a row in any known format; ValueError shows the row where it fits none.

    `source` names the data set and `row_id` the row, where the row itself does not: rows that already are canonical
    samples keep theirs.
    """
    head, content = canonical_parts(row, source, row_id, None, "auto")
    return Sample(content=content, **head)


def canonical_row(
    row: Row, source: str, row_id: str, category: str | None = None, format_name: str = "auto"
) -> dict[str, Any]:
    """A canonical sample as the plain dict that is written, for when every row of a large source goes through it.

    `category` is that of the source, `format_name` a name from FORMATS where "auto" is not wanted. ValueError as from
    `canonical_sample`.
    """
    head, content = canonical_parts(row, source, row_id, category, format_name)
    head.update(content)
    return head


def with_messages(sample: dict[str, Any]) -> dict[str, Any]:
    """A written canonical sample, with `messages` again where a recipe's `turns: conversations` spelled them so."""
    if "conversations" not in sample:
        return sample
    rest = {key: value for key, value in sample.items() if key != "conversations"}
    return {**rest, "messages": read_turns(sample["conversations"], "conversations")}


class NoExchangeError(ValueError):
    """A conversation without one question and its answer: well formed, and nothing to learn from."""


def canonical_parts(
    row: Row, source: str, row_id: str, category: str | None, format_name: str
) -> tuple[dict[str, Any], Content]:
    """Id, source, category and metadata of a canonical sample, and its content."""
    candidate = fitting(row, format_name)
    row_format = candidate.format
    try:
        content = row_format.read(row)
    except NoExchangeError:
        raise
    except ValueError as error:
        raise ValueError(f"row {row_id}, format {row_format.name}: {error}\n  {shown(row)}") from error
    get = row.get
    own_source, own_metadata, own_id, own_category = get("source"), get("metadata"), get("id"), get("category")
    if own_metadata is not None and isinstance(own_source, str) and isinstance(own_metadata, Mapping):
        source, metadata = own_source, dict(own_metadata)
    else:
        metadata = {}
        for name in candidate.other_columns:
            if isinstance(value := row[name], PLAIN_TYPES) or (name == "rationale" and value is not None):
                metadata[name] = value
        if row_format.notes is not None:
            metadata.update(row_format.notes(row, content))
    head = {
        "id": row_id if own_id is None or own_id == "" else str(own_id),
        "source": source,
        "category": own_category if isinstance(own_category, str) else category,
        "metadata": metadata,
    }
    return head, content


def detect_format(row: Row) -> Format:
    """The first format of FORMATS that fits; ValueError names the columns where none does."""
    return fitting(row, "auto").format


def fitting(row: Row, format_name: str) -> Candidate:
    """The first candidate whose columns are all filled in the row."""
    if type(row) is not dict and not isinstance(row, Mapping):
        raise ValueError(f"a row must be a dict of columns, got {type(row).__name__}: {str(row)[:SHOWN_CHARACTERS]}")
    for candidate in candidates_for(tuple(row), format_name):
        for column in candidate.format.columns:
            if row[column] is None:
                break
        else:
            return candidate
    raise ValueError(unknown_format(row, format_name))


def read_content(row: Row, format_name: str) -> Content:
    """The content of a row's canonical sample; ValueError where it cannot be read."""
    return fitting(row, format_name).format.read(row)


@lru_cache(maxsize=4096)
def candidates_for(columns: tuple[str, ...], format_name: str) -> tuple[Candidate, ...]:
    """The formats that rows with these columns may have, best first."""
    if format_name != "auto" and format_name not in FORMAT_NAMES:
        raise ValueError(f"unknown format {format_name!r}; known: auto, {', '.join(FORMAT_NAMES)}")
    return tuple(
        Candidate(known, other_columns(columns, known))
        for known in FORMATS
        if format_name in ("auto", known.name) and set(known.columns) <= set(columns)
    )


def other_columns(columns: tuple[str, ...], row_format: Format) -> tuple[str, ...]:
    """Columns that the format does not read and that are no part of a sample's head."""
    used = {*row_format.columns, *row_format.also_reads, "id", "category"}
    return tuple(column for column in columns if isinstance(column, str) and column not in used)


def unknown_format(row: Row, format_name: str) -> str:
    """What to say of a row that fits nothing: its columns, the row, what is known, what to do."""
    wanted = [known for known in FORMATS if format_name in ("auto", known.name)]
    known = "; ".join(f"{known.name} ({', '.join(known.columns)})" for known in wanted)
    fits = "no known format" if format_name == "auto" else f"not the format {format_name} that is asked for"
    return (
        f"a row with columns {', '.join(map(str, row))} fits {fits}.\n  {shown(row)}\n"
        f"Known formats: {known}.\nRename the columns in the dataset module, or return `messages`."
    )


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
    """`prompt`, `chosen`, `rejected`: texts, messages, or one message each.

    Where both answers repeat the prompt as their first turns, those turns become the prompt.
    """
    prompt, chosen, rejected = (text_or_messages(row[key], key) for key in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen[0]["role"] != "assistant":
        shared, chosen, rejected = without_shared_turns(chosen, rejected)
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        if shared[-1]["content"] != asked:
            raise ValueError("chosen and rejected begin with turns that do not end in the prompt")
        prompt = shared
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def read_implicit_preference(row: Row) -> Content:
    """`chosen` and `rejected` as whole conversations; the turns that both begin with are the prompt."""
    chosen, rejected = (text_or_messages(row[key], key) for key in ("chosen", "rejected"))
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError(
            "chosen and rejected without a prompt column must be lists of turns, to tell prompt from answer"
        )
    prompt, chosen, rejected = without_shared_turns(chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def read_sharegpt_preference(row: Row) -> Content:
    """ShareGPT turns as the prompt, with one `chosen` and one `rejected` answer."""
    return {
        "prompt": sharegpt_turns(row),
        "chosen": text_or_messages(row["chosen"], "chosen"),
        "rejected": text_or_messages(row["rejected"], "rejected"),
    }


def read_messages(row: Row) -> Content:
    """`messages`: [{role, content}]."""
    return {"messages": read_turns(row["messages"], "messages")}


def read_image_messages(row: Row) -> Content:
    """`image_messages`: [{role, content}] as image_sources.py writes them, contents being parts where images stand."""
    return {"messages": row["image_messages"]}


def read_sharegpt(row: Row) -> Content:
    """`conversations`: [{from, value}], with an optional `system` column.

    Answers before the first question, and all from the first turn that is out of turn, are cut off.
    """
    return {"messages": exchanges_in_turn(sharegpt_turns(row))}


def turns_cut(row: Row, content: Content) -> dict[str, Any]:
    """How many turns of a conversation were cut off, if any."""
    cut = len(row["conversations"]) + len(system_turn(row)) - len(content["messages"])
    return {"turns_cut": cut} if cut else {}


def read_alpaca(row: Row) -> Content:
    """`instruction`, `output`, optional `input`, `system` and `history` [[question, answer]]."""
    return {"messages": instruction_turns(row, text(row, "output"))}


def read_alpaca_response(row: Row) -> Content:
    """As Alpaca, with the answer in `response`."""
    return {"messages": instruction_turns(row, text(row, "response"))}


def instruction_turns(row: Row, answer: str) -> list[Message]:
    question = text(row, "instruction")
    if row.get("input"):
        question = f"{question}\n\n{text(row, 'input')}"
    turns = [turn for pair in row.get("history") or () for turn in exchange(str(pair[0]), str(pair[1]))]
    return [*system_turn(row), *turns, *exchange(question, answer)]


def pair_reader(question: str, answer: str) -> Callable[[Row], Content]:
    """Reads rows that hold one question and one answer in the columns of these names, optionally a system turn."""

    def read(row: Row) -> Content:
        asked, answered = row[question], row[answer]
        if not (isinstance(asked, str) and isinstance(answered, str)):
            raise ValueError(
                f"column {question} holds {type(asked).__name__} and column {answer} holds "
                f"{type(answered).__name__}, expected text"
            )
        return {"messages": [*system_turn(row), *exchange(asked, answered)]}

    return read


def read_question_answer(row: Row) -> Content:
    """`question` and `answer`; of several answers that are equally right, the first."""
    answer = row["answer"]
    if not isinstance(answer, str):
        if not isinstance(answer, list) or not answer or not all(isinstance(one, str) for one in answer):
            raise ValueError(f"column answer holds {type(answer).__name__}, expected text or a list of texts")
        answer = answer[0]
    return {"messages": [*system_turn(row), *exchange(text(row, "question"), answer)]}


def all_answers(row: Row, content: Content) -> dict[str, Any]:
    """All answers, where a row has several."""
    return {} if isinstance(row["answer"], str) else {"answers": list(row["answer"])}


def read_prompt_completion(row: Row) -> Content:
    """`prompt` and `completion`: texts, or messages."""
    prompt = text_or_messages(row["prompt"], "prompt")
    completion = text_or_messages(row["completion"], "completion")
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    return {"messages": [*before, *after]}


def read_programming_task(row: Row) -> Content:
    """MBPP: a task in `text` (`prompt` in its sanitised form), its solution in `code`, tests in `test_list`."""
    tests = row.get("test_list") or []
    task = text(row, "prompt" if row.get("text") is None else "text")
    if len(tests):
        task = f"{task}\n\nYour code should pass these tests:\n\n" + "\n".join(map(str, tests))
    return {"messages": exchange(task, text(row, "code"))}


def read_text(row: Row) -> Content:
    """Plain `text`."""
    return {"text": text(row, "text")}


def read_text_content(row: Row) -> Content:
    """Plain text in `content`, as in collections of source code."""
    return {"text": text(row, "content")}


def read_prompt(row: Row) -> Content:
    """`prompt` alone: a text, or messages."""
    return {"prompt": text_or_messages(row["prompt"], "prompt")}


SYSTEM = ("system", "system_prompt")
FORMATS = (
    Format("tokenised", ("input_ids", "loss_mask"), read_token_mask),
    Format("tokenised", ("input_ids",), read_tokens, ("labels", "attention_mask")),
    Format("preference", ("prompt", "chosen", "rejected"), read_preference, is_text=True),
    Format("sharegpt preference", ("conversations", "chosen", "rejected"), read_sharegpt_preference, SYSTEM),
    Format("preference", ("chosen", "rejected"), read_implicit_preference),
    Format("messages about images", ("image_messages",), read_image_messages),
    Format("messages", ("messages",), read_messages),
    Format("sharegpt", ("conversations",), read_sharegpt, SYSTEM, turns_cut),
    Format("alpaca", ("instruction", "output"), read_alpaca, ("input", "history", *SYSTEM), is_text=True),
    Format("alpaca", ("instruction", "response"), read_alpaca_response, ("input", "history", *SYSTEM), is_text=True),
    Format("query/answer", ("query", "answer"), pair_reader("query", "answer"), SYSTEM, is_text=True),
    Format("question/answer", ("question", "answer"), read_question_answer, SYSTEM, all_answers, is_text=True),
    Format("question/response", ("question", "response"), pair_reader("question", "response"), SYSTEM, is_text=True),
    Format("problem/solution", ("problem", "solution"), pair_reader("problem", "solution"), SYSTEM, is_text=True),
    Format("prompt/completion", ("prompt", "completion"), read_prompt_completion, is_text=True),
    Format("programming task", ("text", "code"), read_programming_task, ("test_list",), is_text=True),
    Format("programming task", ("prompt", "code"), read_programming_task, ("test_list",), is_text=True),
    Format("text", ("text",), read_text, is_text=True),
    Format("text", ("content",), read_text_content, is_text=True),
    Format("prompt", ("prompt",), read_prompt),
)
"""Known formats; the first that fits a row is taken, so the more specific ones come first."""

FORMAT_NAMES = tuple(dict.fromkeys(known.name for known in FORMATS))


# --- pieces that the formats share


def exchange(question: str, answer: str) -> list[Message]:
    """A user's turn and the assistant's."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def system_turn(row: Row) -> list[Message]:
    """The system turn of a row with a filled `system` or `system_prompt` column, else nothing."""
    if "system" in row or "system_prompt" in row:
        for column in SYSTEM:
            if row.get(column):
                return [{"role": "system", "content": text(row, column)}]
    return []


def sharegpt_turns(row: Row) -> list[Message]:
    """All turns of a ShareGPT row."""
    return [*system_turn(row), *read_turns(row["conversations"], "conversations")]


def exchanges_in_turn(messages: list[Message]) -> list[Message]:
    """The system turn and whole exchanges of a conversation, up to the first turn that is out of turn.

    ValueError: not one question with its answer is left.
    """
    roles = [turn["role"] for turn in messages]
    system = messages[:1] if roles[0] == "system" else []
    first = roles.index("user") if "user" in roles else len(roles)
    previous, answered = None, first
    for place, role in enumerate(roles[first:], first):
        if previous not in FOLLOWS.get(role, ()):
            break
        previous = role
        if role == "assistant":
            answered = place + 1
    if answered == first:
        raise NoExchangeError(f"no question with an answer: the turns are {', '.join(roles)}")
    return [*system, *messages[first:answered]]


def without_shared_turns(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], ...]:
    """The turns that both conversations begin with, and what is left of each; ValueError: nothing is shared or left."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not 0 < shared < min(len(chosen), len(rejected)):
        raise ValueError(f"chosen and rejected share their first {shared} turns, of {len(chosen)} and {len(rejected)}")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def text_or_messages(value: Any, column: str) -> str | list[Message]:
    """A column that holds a text, one turn, or a list of turns."""
    if isinstance(value, str):
        return value
    return read_turns([value] if isinstance(value, Mapping) else value, column)


def read_turns(turns: Any, column: str) -> list[Message]:
    """Turns as [{role, content, ...}], from {role, content} or {from, value}; further filled keys are kept."""
    if type(turns) is not list and (isinstance(turns, (str, Mapping)) or not hasattr(turns, "__iter__")):
        raise ValueError(f"column {column} must hold a list of turns, got {type(turns).__name__}")
    messages: list[Message] = []
    for turn in turns:
        # A turn that is canonical already is taken as it is: most are, and the general way costs several times as much.
        if (
            type(turn) is dict
            and len(turn) == 2
            and turn.get("role") in CANONICAL_ROLES
            and type(content := turn.get("content")) is str
            and (content[:1] > "<" or not is_chat_html(content))
        ):
            messages.append(turn)
        else:
            messages.append(read_turn(turn, column, len(messages)))
    if not messages:
        raise ValueError(f"column {column} holds no turns")
    return messages


def read_turn(turn: Any, column: str, index: int) -> Message:
    """One turn; ValueError names the place where its role or content cannot be read."""
    if type(turn) is not dict and not isinstance(turn, Mapping):
        raise ValueError(f"{column}[{index}] must be a dict with role and content, got {type(turn).__name__}")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    name, content = turn.get(role_key), turn.get(content_key)
    role = ROLES.get(name) if type(name) is str else None
    if role is None:
        role = ROLES.get(str(name).strip().lower())
    if role is None:
        raise ValueError(f"{column}[{index}] has {role_key} {name!r}; known: {', '.join(ROLES)}")
    if content is None and turn.get("tool_calls"):
        content = ""
    if type(content) is list:
        content = joined_parts(content, f"{column}[{index}]")
    if not isinstance(content, str):
        raise ValueError(f"{column}[{index}] has {content_key} of type {type(content).__name__}, expected text")
    if role == "assistant" and is_chat_html(content):
        content = markdown(content)
    message = {"role": role, "content": content}
    if len(turn) > 2:
        message.update(
            {key: value for key, value in turn.items() if key not in (role_key, content_key) and value is not None}
        )
    return message


def joined_parts(parts: list[Any], where: str) -> str:
    """The text of a content given as parts, [{type: text, text}]; ValueError for images and other parts."""
    texts = []
    for part in parts:
        piece = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(piece, str):
            raise ValueError(f"{where} has a content part that is not text: {str(part)[:80]}")
        texts.append(piece)
    return "".join(texts)


def text(row: Row, column: str) -> str:
    """A column that must hold text."""
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column} holds {type(value).__name__}, expected text")
    return value
