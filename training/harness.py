"""Scores on tasks of lm-evaluation-harness, of a model in memory and on all processes of the job."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from training.config import LmEvalConfig
from training.distributed import Ranks, from_main, gather_on_all
from training.frozen_shards import in_step

TaskScores = dict[str, dict[str, float]]
"""Of each task and group its metrics: `acc`, or `exact_match, strict-match` where answers are read in several ways."""


def task_scores(model: Any, tokenizer: Any, config: LmEvalConfig, *, batch_size: int, ranks: Ranks) -> TaskScores:
    """The scores of the model on all tasks that are named; the same on every process. Sets the random states.

    ValueError: a task that the harness does not know, or fewer questions than processes.
    """
    if config.limit is not None and config.limit < ranks.world_size:
        raise ValueError(
            f"evaluation.lm_eval.limit is {config.limit}, fewer than the {ranks.world_size} processes that share the "
            "questions of a task; raise it"
        )
    manager = TaskManager(include_path=config.include_path)
    require_tasks(config.tasks, manager.all_tasks)
    found = simple_evaluate(
        ModelOnRanks(model, tokenizer, batch_size=batch_size, ranks=ranks),
        tasks=list(config.tasks),
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        apply_chat_template=config.apply_chat_template,
        task_manager=manager,
        log_samples=False,
    )
    return from_main(readable(found["results"]) if found else {})


class ModelOnRanks(HFLM):
    """The model as the harness asks it. Each process answers its share of the questions."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int, ranks: Ranks) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        self._rank = ranks.rank
        self._world_size = ranks.world_size

    def _loglikelihood_tokens(self, *arguments: Any, **options: Any) -> list[tuple[float, bool]]:
        """As many batches as the share of this process takes."""
        with in_step(self.model):
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(*arguments, **options)
        return found

    def generate_until(self, *arguments: Any, **options: Any) -> list[str]:
        """As many tokens as the share of this process takes."""
        with in_step(self.model):
            written: list[str] = super().generate_until(*arguments, **options)
        return written

    def _model_generate(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """The tokens of a batch, without an exchange of who is done: see in_step."""
        tokens: torch.Tensor = super()._model_generate(*arguments, synced_gpus=False, **options)
        return tokens

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """A number of every process, by rank."""
        return torch.tensor(gather_on_all(tensor.item()))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Every process's object, by rank, on the process `dst`."""
        objects = gather_on_all(obj)
        return objects if self._rank == dst else None

    def barrier(self) -> None:
        """Wait for all processes."""
        gather_on_all(None)


def require_tasks(wanted: list[str], known: list[str]) -> None:
    """Raise ValueError for tasks that the harness does not have."""
    missing = [name for name in wanted if name not in known]
    if missing:
        close = {name: difflib.get_close_matches(name, known, n=3) for name in missing}
        told = "; ".join(f"{name} (did you mean {', '.join(near)}?)" if near else name for name, near in close.items())
        raise ValueError(
            f"evaluation.lm_eval.tasks: lm-evaluation-harness has no task {told}. `lm-eval ls tasks` lists them; "
            "those of your own are read from evaluation.lm_eval.include_path"
        )


def readable(results: dict[str, dict[str, Any]]) -> TaskScores:
    """Numbers alone; of `acc,none` the name alone."""
    scores: TaskScores = {}
    for task, found in results.items():
        metrics = {key.removesuffix(",none").replace(",", ", "): value for key, value in found.items() if "," in key}
        scores[task] = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    return scores
