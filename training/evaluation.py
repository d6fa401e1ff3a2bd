"""Scores on held-out data: loss and perplexity on the whole test split, and generated answers scored by the module."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import torch

from mixture.dataset_modules import ModuleScore
from training.batches import Collate, ComputeLoss, PackedDataset, collate, even_shares
from training.config import EvaluationConfig
from training.distributed import Ranks, gather_on_all, sum_over_ranks
from training.frozen_shards import in_step
from training.models import stop_token_ids
from training.sharding import computing_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_EXAMPLES = 10
REPORT_S = 10.0
MAX_SCORE_THREADS = 16


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean over every supervised token of the split."""

    loss: float
    perplexity: float
    tokens: int


@dataclass(frozen=True)
class GenerationScore:
    """Mean score of greedy answers, and the first few answers."""

    name: str
    score: float
    rows: int
    examples: list[dict[str, Any]]

    @classmethod
    def of_shares(cls, name: str, mine: list[dict[str, Any]], *, rows: int) -> GenerationScore:
        """Of the answers of all processes, each with its `score`; they took the rows in turns, `mine` is this one's."""
        shares = gather_on_all(mine)
        everyone: list[dict[str, Any]] = [shares[row % len(shares)][row // len(shares)] for row in range(rows)]
        mean = sum(answer["score"] for answer in everyone) / rows
        return cls(name=name, score=mean, rows=rows, examples=everyone[:NUM_EXAMPLES])


def held_out_loss(
    model: torch.nn.Module,
    rows: PackedDataset,
    compute_loss: ComputeLoss,
    *,
    batch_size: int,
    precision: torch.dtype,
    ranks: Ranks,
    collate: Collate = collate,
) -> HeldOutLoss:
    """Loss on all of `rows`, spread over the processes. Leaves random states and the model's mode as they were."""
    device = computing_device(model)
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    with torch.no_grad(), autocast(device, precision):
        for share in even_shares(len(rows), batch_size=batch_size, rank=ranks.rank, world_size=ranks.world_size):
            batch = collate([rows[index] for index in share])
            tokens += int((batch["labels"] != -100).sum())
            # Divided by one item, the loss is a sum over tokens.
            total += compute_loss(model, to_device(batch, device), torch.ones((), device=device))
    model.train(was_training)
    loss_sum, token_sum = sum_over_ranks(total.item(), float(tokens))
    if token_sum == 0:
        raise ValueError("the test split has no token to learn, so it has no loss; check the roles of its messages")
    loss = loss_sum / token_sum
    return HeldOutLoss(loss=loss, perplexity=math.exp(loss) if loss < 700 else math.inf, tokens=int(token_sum))


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def autocast(device: torch.device, precision: torch.dtype) -> Any:
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, dtype=precision)


def generation_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions_file: Path,
    score: ModuleScore,
    *,
    config: EvaluationConfig,
    batch_size: int,
    ranks: Ranks,
) -> GenerationScore:
    """Answer the first `evaluation.limit` questions of the test split greedily, and score each answer by its row."""
    questions = read_questions(questions_file, limit=config.limit)
    mine = questions[ranks.rank :: ranks.world_size]
    prompts = [prompt_text(question, tokenizer) for question in mine]
    answers = written_answers(model, tokenizer, prompts, config=config, batch_size=batch_size)
    with in_step(model):
        judged = judge(score, answers, [question["row"] for question in mine], ranks)
    scored = [
        {"prompt": prompt, "prediction": answer, "score": value}
        for prompt, (answer, value) in zip(prompts, judged, strict=True)
    ]
    return GenerationScore.of_shares(score.name, scored, rows=len(questions))


def judge(
    score: ModuleScore, answers: Iterable[tuple[int, str]], rows: Sequence[dict[str, Any]], ranks: Ranks
) -> list[tuple[str, float]]:
    """Each answer with its score, in the order of the rows. `answers` come in any order, each with its row's number.

    Where the module's score may run in threads, answers are judged while the next ones are written.
    """
    found: dict[int, tuple[str, Future[float]]] = {}
    started = told = time.monotonic()

    def report() -> None:
        done = [future.result() for _, future in found.values() if future.done()]  # or the error of one
        seconds = time.monotonic() - started
        print(f"answers: {len(found)} of {len(rows)} written, {len(done)} scored, {seconds:.0f} s", flush=True)

    # The processors that this process may use; its job shares them among the processes of a node.
    processors = len(os.sched_getaffinity(0)) // ranks.local_world_size
    with ThreadPoolExecutor(max(1, min(processors, MAX_SCORE_THREADS))) as pool:
        for number, answer in answers:
            found[number] = answer, (pool.submit if score.in_threads else call)(score.function, answer, rows[number])
            if ranks.is_main and time.monotonic() - told > REPORT_S:
                told = time.monotonic()
                report()
        judged = [(found[number][0], float(found[number][1].result())) for number in range(len(rows))]
    if ranks.is_main:
        report()
    return judged


def call(function: Callable[..., float], *arguments: Any) -> Future[float]:
    """The result of calling the function here and now."""
    future: Future[float] = Future()
    future.set_result(function(*arguments))
    return future


def read_questions(path: Path, *, limit: int) -> list[dict[str, Any]]:
    """The first lines of test_rows.jsonl: the raw row in `row`, its question in `prompt_messages` or `prompt`."""
    with path.open("rb") as file:
        return [orjson.loads(line) for line in islice(file, limit)]


def prompt_text(question: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model sees before it answers."""
    turns = question.get("prompt_messages") or [{"role": "user", "content": question["prompt"]}]
    if tokenizer.chat_template is None:
        return "\n".join(turn["content"] for turn in turns) + "\n"
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    config: EvaluationConfig,
    batch_size: int,
) -> list[str]:
    """Greedy continuations, in the order of the prompts, up to `max_new_tokens` or the end of the turn."""
    answers = dict(written_answers(model, tokenizer, prompts, config=config, batch_size=batch_size))
    return [answers[number] for number in range(len(prompts))]


def written_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    config: EvaluationConfig,
    batch_size: int,
) -> Iterator[tuple[int, str]]:
    """Greedy continuations as they are written, each with the number of its prompt: short prompts first."""
    device = computing_device(model)
    stops = stop_token_ids(model, tokenizer)
    model.eval()
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[number] for number in numbers],
            padding=True,
            padding_side="left",
            # The chat template has put the control tokens there already.
            add_special_tokens=tokenizer.chat_template is None,
            return_tensors="pt",
        ).to(device)
        with torch.no_grad():
            tokens = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=config.max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
                synced_gpus=False,  # see in_step
            )
        texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        yield from ((number, text.strip()) for number, text in zip(numbers, texts, strict=True))


def as_json(loss: HeldOutLoss | None, generated: GenerationScore | None, *, step: int, epoch: float) -> dict[str, Any]:
    """What evaluation.json holds."""
    result: dict[str, Any] = {"step": step, "epoch": epoch}
    if loss:
        result |= asdict(loss)
    if generated:
        result |= {generated.name: generated.score, "scored_rows": generated.rows, "examples": generated.examples}
    return result
