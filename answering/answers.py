"""Answers that a model writes: every assistant turn of the training rows anew, as text to learn from.

Sequence-level distillation (arXiv:1606.07947), and what a draft head meets where it is served. A conversation is
answered turn by turn, each written turn being read in the next. What is written is a function of the request alone:
draws are seeded by sample and turn, and a batch holds rows of one shard only, so work that was killed, moved or spread
over many workers gives the answers of unbroken work.

manifest.json          whose answers they are, and how many shards
rows/00017.jsonl       the rows of a shard as they were, rows/test.jsonl the test split; until all is answered
train-00017.jsonl      the answered rows of a shard
shard-00017.done       its counts; written last

A finished folder is that of a mixture (mixture/mixture_folder.py): the same ids, sources and categories, and the test
split as it was.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from answering.config import AnswersConfig
from answering.generation import Continuation, Draws, Ids, continuations, draw_key
from answering.identity import answers_key
from answering.vllm_engine import VllmEngine
from mixture.formats import CONTENT_KEYS, Message, with_messages
from mixture.mixture_folder import MARKER, finish_folder
from mixture.prepare import (
    PreparationRequest,
    SplitInput,
    data_key,
    file_digest,
    input_splits,
    load_processor,
    remove_stale,
    rows_of_module,
)
from mixture.rationales import RATIONALE
from mixture.render import RefusedByTemplateError, Renderer
from mixture.scatter import WrittenPart
from mixture.tokenizers import REASONING_TOKENS
from mixture.whole_files import join_files, remove_leftovers, whole_file, write_whole
from training.claims import Claim, InterruptedShardError, work_on_shards
from training.config import ModelConfig
from training.models import (
    load_generation_config,
    load_tokenizer,
    load_with_tokenizer,
    precision,
    stop_token_ids,
    stops_of,
    told_of_full_memory,
)
from training.shard_folder import done_file, manifest_file
from training.vllm_config import VllmConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPORT_EVERY_S = 30.0
TEST_ROWS = "test.jsonl"

Report = Callable[[str], None]
StopRequested = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class AnswersRequest:
    """All that shapes answers, and where they go."""

    writer: ModelConfig
    """The model that answers, with its own tokenizer and chat template."""

    writer_key: str
    """The section of the settings that names it, for messages."""

    answers: AnswersConfig
    rows: PreparationRequest
    """The rows that are answered: a dataset module's, or a mixture's."""

    folder: Path
    seed: int
    """Of the draws."""

    @property
    def key(self) -> str:
        return answers_key(self.writer, self.answers, data_key=data_key(self.rows), seed=self.seed)


def write_answers(request: AnswersRequest, report: Report, *, stop_requested: StopRequested) -> bool:
    """Answer the shards that nobody has answered or is at. Any number of processes may do so side by side.

    Returns whether all is answered; if not, this one was asked to stop, or others are still at the last shards.
    ValueError: the model, the rows, or a folder that holds other answers.
    """
    if (request.folder / MARKER).is_file():
        return True
    request.folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(request.folder)
    manifest = agreed_manifest(request, report)
    if unfinished(request.folder, manifest):
        Writer(request, manifest, *load_writer(request), report, stop_requested).run()
    return not unfinished(request.folder, manifest) and finish(request.folder, manifest, report)


Continue = Callable[..., list[Continuation]]
"""The continuations of prompts, as answering.generation.continuations gives those of a network."""


def load_writer(request: AnswersRequest) -> tuple[Continue, list[int], PreTrainedTokenizerBase]:
    """What writes, the tokens that end what it writes, and its tokenizer."""
    writer, key, answers = request.writer, request.writer_key, request.answers
    if answers.engine == "transformers":
        with told_of_full_memory(lower="answers.batch_size", key=key):
            network, tokenizer = load_with_tokenizer(writer, key=key)
        return partial(continuations, network), stop_token_ids(network, tokenizer), tokenizer
    engine = VllmEngine(
        answers.vllm or VllmConfig(),
        key="answers.vllm",
        dtype=precision(writer),
        max_length=request.rows.dataset.max_length,
        revision=writer.revision,
        trust_remote_code=writer.trust_remote_code,
    )
    engine.load(writer.name)
    tokenizer = load_tokenizer(writer, key=key)
    return engine.continuations, stops_of(load_generation_config(writer), tokenizer), tokenizer


# --- the rows


@dataclass(frozen=True)
class AnswersManifest:
    """What all workers write by."""

    key: str
    shards: int
    stages: list[int]
    """The stage of the mixture that each shard belongs to."""


def agreed_manifest(request: AnswersRequest, report: Report) -> AnswersManifest:
    """The manifest of the folder, made with its rows where there is none; ValueError where it is that of others."""
    path, key = manifest_file(request.folder), request.key
    if not path.is_file():
        stages = write_rows(request, report)
        made = AnswersManifest(key, len(stages), stages)
        write_whole(path, orjson.dumps(asdict(made), option=orjson.OPT_INDENT_2), synced=True)
    found = AnswersManifest(**orjson.loads(path.read_bytes()))
    if found.key != key:
        raise ValueError(
            f"{request.folder} holds other answers (key {found.key}, asked for are those of {key}): of another model, "
            "of other rows or by other settings of `answers`; remove it, or name another folder"
        )
    return found


def write_rows(request: AnswersRequest, report: Report) -> list[int]:
    """Write the rows in shards, as they are, and the test split; returns the stage of each shard."""
    rows = rows_folder(request.folder)
    working = rows.with_name(f".{rows.name}.{socket.gethostname()}.{os.getpid()}")
    shutil.rmtree(working, ignore_errors=True)
    (working / rows.name).mkdir(parents=True)
    try:
        stages = write_splits(request, working, working / rows.name, report)
        try:
            (working / rows.name).rename(rows)
        except OSError:
            if not rows.is_dir():
                raise
            # Another worker was faster, with the same rows.
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return stages


def write_splits(request: AnswersRequest, working: Path, rows: Path, report: Report) -> list[int]:
    """Write the files of a rows folder; returns the stage of each shard."""
    given = rows_of_module(request.rows, load_processor(request.rows), report)
    if given is not None and given.hold_images:
        raise ValueError(f"{given.module.path}: the rows hold images, and answers are written to texts only")
    splits = input_splits(request.rows, given, working, report)
    stages: list[int] = []
    for stage, lines in groupby(staged_lines(splits["train"], request.rows), key=itemgetter(0)):
        while shard := list(islice(lines, request.answers.shard_rows)):
            write_whole(rows / f"{len(stages):05d}.jsonl", b"".join(line for _, line in shard))
            stages.append(stage)
    if not stages:
        raise ValueError(f"there are no rows to answer: {splits['train']} returned none")
    if "test" in splits:
        with (rows / TEST_ROWS).open("wb") as file:
            file.writelines(line for batch in splits["test"].batches() for line in batch.lines)
    return stages


def rows_folder(folder: Path) -> Path:
    return folder / "rows"


def staged_lines(split: SplitInput, request: PreparationRequest) -> Iterator[tuple[int, bytes]]:
    """The lines of a split with their stages; ValueError for one that nobody can answer and learn from."""
    for batch in split.batches():
        for line in batch.lines:
            require_usable(orjson.loads(line), request)
            yield batch.stage, line


def require_usable(row: dict[str, Any], request: PreparationRequest) -> None:
    """Raise ValueError for rows that hold nothing to answer and that the run cannot learn from as they are."""
    if "input_ids" in row:
        raise ValueError(f"sample {row['id']} came tokenised, and answers are written to text; return messages")
    if "text" in row and request.objective == "sft":
        raise ValueError(
            f"sample {row['id']} is plain text, which holds no question to answer; return messages or a prompt from "
            "the dataset module, or learn the rows as they are"
        )


# --- one conversation


@dataclass
class Conversation:
    """A row on its way to other answers."""

    row: dict[str, Any]
    turns: list[Message]
    """As they were; a prompt alone is followed by an empty answer."""

    written: list[Message] = field(default_factory=list)
    """Turns so far, the next one to write not included."""

    answers: int = 0
    ended: str | None = None
    """Why nothing more is written, where turns are left."""

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Conversation:
        """The conversation of a canonical sample with `messages` or a `prompt`."""
        if "messages" in row:
            turns = row["messages"]
        else:
            prompt = row["prompt"]
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            turns = [*asked, {"role": "assistant", "content": ""}]
        conversation = cls(row, turns)
        if any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns):
            conversation.ended = "call tools, whose results belong to the calls as they were"
        conversation.advance()
        return conversation

    @property
    def is_open(self) -> bool:
        """Whether a turn is left to write."""
        return self.ended is None and len(self.written) < len(self.turns)

    def advance(self) -> None:
        """Take over turns as they were, up to the next answer to a user."""
        for turn in self.turns[len(self.written) :]:
            asked = any(earlier["role"] == "user" for earlier in self.written)
            if turn["role"] == "assistant" and asked:
                return
            self.written.append(turn)

    def answer(self, text: str) -> None:
        """Write the next turn; an empty one ends the conversation before it."""
        if not text:
            self.ended = "have an empty answer"
            return
        self.written.append({"role": "assistant", "content": text})
        self.answers += 1
        self.advance()

    def sample(self) -> dict[str, Any] | None:
        """The canonical sample, up to the last answer; None where nothing was answered."""
        if not self.answers:
            return None
        last = max(place for place, turn in enumerate(self.written) if turn["role"] == "assistant")
        head = {key: value for key, value in self.row.items() if key not in CONTENT_KEYS}
        metadata = {key: value for key, value in (self.row.get("metadata") or {}).items() if key != RATIONALE}
        return {**head, "metadata": metadata, "messages": self.written[: last + 1]}


# --- the work


@dataclass(frozen=True)
class AnsweredShard:
    """What came of one shard."""

    part: WrittenPart
    answers: int
    counts: dict[str, int]
    """Rows that are not answered in full, by what is the matter with them."""


class Writer:
    """Takes one shard after another until none is left."""

    def __init__(
        self,
        request: AnswersRequest,
        manifest: AnswersManifest,
        write: Continue,
        stops: list[int],
        tokenizer: PreTrainedTokenizerBase,
        report: Report,
        stop_requested: StopRequested,
    ) -> None:
        self.request = request
        self.manifest = manifest
        self.write = write
        self.stops = stops
        self.tokenizer = tokenizer
        self.report = report
        self.stop_requested = stop_requested
        self.dropped_ids = {
            number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content not in REASONING_TOKENS
        }
        self.renderer = Renderer(
            tokenizer, objective="sft", max_length=request.rows.dataset.max_length, over_length=None
        )
        self.began_s = self.told_s = time.monotonic()
        self.tokens = 0

    def run(self) -> None:
        """Write shards until none is left that nobody is at."""
        folder = self.request.folder
        work_on_shards(
            unfinished(folder, self.manifest),
            self.write_shard,
            done_file=partial(done_file, folder),
            is_done=partial(is_done, folder),
            stop_requested=self.stop_requested,
        )

    def write_shard(self, shard: int, claim: Claim) -> None:
        """Write the answered rows of one shard and its marker."""
        lines = (rows_folder(self.request.folder) / f"{shard:05d}.jsonl").read_bytes().splitlines()
        rows = [with_messages(orjson.loads(line)) for line in lines]
        conversations = {
            number: Conversation.of_row(row) for number, row in enumerate(rows) if row.keys() & {"messages", "prompt"}
        }
        self.write_turns(list(conversations.values()), claim, f"shard {shard}")
        counts = Counter(conversation.ended for conversation in conversations.values() if conversation.ended)
        counts["are plain text and stay as they are"] = len(rows) - len(conversations)
        answered = {number: conversation.sample() for number, conversation in conversations.items()}
        kept = [sample for number, row in enumerate(rows) if (sample := answered.get(number, row)) is not None]
        counts["are left out"] = len(rows) - len(kept)
        path = part_file(self.request.folder, shard)
        with whole_file(path, synced=True) as file:
            file.writelines(orjson.dumps(sample, option=orjson.OPT_APPEND_NEWLINE) for sample in kept)
        answers = sum(conversation.answers for conversation in conversations.values())
        part = written_part(path, "train", self.manifest.stages[shard], kept)
        record = AnsweredShard(part, answers, {reason: count for reason, count in counts.items() if count})
        write_whole(done_file(self.request.folder, shard), orjson.dumps(asdict(record)), synced=True)
        self.tell("", every_s=0)

    def write_turns(self, conversations: list[Conversation], claim: Claim, what: str) -> None:
        """Write the next turn of every conversation that has one, then the next, until none has."""
        turn = 0
        while asked := [
            (conversation, prompt)
            for conversation in conversations
            if conversation.is_open and (prompt := self.prompt(conversation)) is not None
        ]:
            # Prompts of like length share a batch, so that little of it is padding.
            asked.sort(key=lambda pair: len(pair[1]))
            done = 0
            for batch in batched(asked, self.request.answers.side_by_side):
                if self.stop_requested() or not claim.is_held():
                    raise InterruptedShardError
                self.write_batch([conversation for conversation, _ in batch], [prompt for _, prompt in batch])
                done += len(batch)
                self.tell(f"{what}, turn {turn + 1}, {done} of {len(asked)} rows; ", every_s=REPORT_EVERY_S)
            turn += 1
        if not claim.is_held():
            raise InterruptedShardError

    def prompt(self, conversation: Conversation) -> Ids | None:
        """What the next turn is written after; None, and the conversation ended, where there can be none."""
        try:
            ids = self.renderer.prompt_ids(conversation.written)
        except RefusedByTemplateError as error:
            conversation.ended = f"are refused by the chat template ({error})"
            return None
        except ValueError as error:
            raise ValueError(f"sample {conversation.row['id']}: {error}") from error
        if len(ids) >= self.request.rows.dataset.max_length:
            conversation.ended = "have a question that fills dataset.max_length"
            return None
        return ids.astype(np.int64)

    def write_batch(self, conversations: Sequence[Conversation], prompts: Sequence[Ids]) -> None:
        """Write the next turn of each conversation."""
        answers, max_length = self.request.answers, self.request.rows.dataset.max_length
        room = [min(answers.max_new_tokens, max_length - len(prompt)) for prompt in prompts]
        draws = None
        if answers.temperature:
            # The answers so far are the number of the turn.
            keys = [draw_key(self.request.seed, one.answers, one.row["id"]) for one in conversations]
            draws = Draws(keys, answers.temperature)
        with told_of_full_memory(lower="answers.batch_size", key=self.request.writer_key):
            written = self.write(prompts, stops=self.stops, room=room, draws=draws)
        for conversation, answer in zip(conversations, written, strict=True):
            self.tokens += len(answer.ids)
            if answer.is_finished or answers.keep_unfinished:
                conversation.answer(self.text(answer))
            if not answer.is_finished and conversation.ended is None:
                conversation.ended = "have an answer that comes to no end"

    def text(self, answer: Continuation) -> str:
        """An answer without control tokens, those around its reasoning aside."""
        ids = [number for number in answer.ids.tolist() if number not in self.dropped_ids]
        text: str = self.tokenizer.decode(ids)
        return text.strip()

    def tell(self, what: str, *, every_s: float) -> None:
        """A line of progress: everybody's shards, and this worker's speed."""
        now = time.monotonic()
        if now - self.told_s < every_s:
            return
        self.told_s = now
        done = self.manifest.shards - len(unfinished(self.request.folder, self.manifest))
        speed = self.tokens / (now - self.began_s)
        self.report(f"{what}shards: {done} of {self.manifest.shards} answered, {speed:,.0f} tokens/s")


def batched(pairs: Sequence[tuple[Conversation, Ids]], size: int) -> Iterator[Sequence[tuple[Conversation, Ids]]]:
    for first in range(0, len(pairs), size):
        yield pairs[first : first + size]


# --- the folder


def part_file(folder: Path, shard: int) -> Path:
    return folder / f"train-{shard:05d}.jsonl"


def written_part(path: Path, split: str, stage: int, rows: Iterable[dict[str, Any]]) -> WrittenPart:
    """What a mixture's marker says of a file."""
    return WrittenPart(
        file=path.name,
        split=split,
        stage=stage,
        rows=dict(Counter(row["source"] for row in rows)),
        bytes=path.stat().st_size,
        checksum=file_digest(path),
    )


def unfinished(folder: Path, manifest: AnswersManifest) -> list[int]:
    """Shards that are not there, or not whole."""
    return [shard for shard in range(manifest.shards) if not is_done(folder, shard)]


def is_done(folder: Path, shard: int) -> bool:
    """Whether a shard is there with all of its bytes."""
    try:
        return part_file(folder, shard).stat().st_size == answered_shard(folder, shard).part.bytes
    except FileNotFoundError:
        return False


def answered_shard(folder: Path, shard: int) -> AnsweredShard:
    record = orjson.loads(done_file(folder, shard).read_bytes())
    return AnsweredShard(WrittenPart(**record["part"]), record["answers"], record["counts"])


def finish(folder: Path, manifest: AnswersManifest, report: Report) -> bool:
    """Make the folder a finished mixture; False where another worker is just doing so.

    ValueError: not one row is answered.
    """
    claim = Claim.take(folder / "finish.claim")
    if claim is None:
        return False
    try:
        if not (folder / MARKER).is_file():
            shards = [answered_shard(folder, shard) for shard in range(manifest.shards)]
            for line in told(shards):
                report(line)
            finish_folder(folder, manifest.key, [*(shard.part for shard in shards), *test_parts(folder)])
        remove_stale(rows_folder(folder))
        shutil.rmtree(rows_folder(folder), ignore_errors=True)
    finally:
        claim.release()
    return True


def told(shards: Sequence[AnsweredShard]) -> Iterator[str]:
    """What a user should know of answers; ValueError where there are none."""
    counts = sum((Counter(shard.counts) for shard in shards), Counter[str]())
    rows = sum(sum(shard.part.rows.values()) for shard in shards)
    matters = [f"{count} rows {reason}" for reason, count in counts.items()]
    if not rows:
        raise ValueError(f"none of the rows was answered: {', '.join(matters)}")
    yield f"answers: {sum(shard.answers for shard in shards)} written in {rows} rows"
    yield from (f"answers: {matter}" for matter in matters)


def test_parts(folder: Path) -> list[WrittenPart]:
    """The test split as it was, if there is one."""
    rows = rows_folder(folder) / TEST_ROWS
    if not rows.is_file() or not rows.stat().st_size:
        return []
    path = folder / "test-00000.jsonl"
    join_files([rows], path)
    with path.open("rb") as file:
        return [written_part(path, "test", 0, map(orjson.loads, file))]
