"""How a run stands: from its own files first, then from Slurm. Never needs accounting."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.chain import Journal
from jobs.job_rows import AT_WORK, CUT_OFF, TO_COME, JobRow, SlurmAnswer, read_job_rows
from jobs.queue import SlurmError, my_jobs
from settings.yaml_tree import read_config_file
from training.checkpoints import Checkpoint, NoValidCheckpointError, newest_valid
from training.run_folder import RunFolder

CUT_OFF_IN_WORDS = (
    "the submission was cut off before its jobs were released (unless a command is at it now); "
    "run the file again to finish it, nothing is submitted twice"
)
SECONDS_BETWEEN_QUESTIONS = 10.0


@dataclass(frozen=True, kw_only=True)
class WrongEpoch:
    """An epoch that ended without every row once."""

    epoch: int
    """Counted from 1."""

    rows_counted: int
    rows_expected: int
    what: str


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One run at one moment."""

    name: str
    state: str
    """done, halted, stopped, running, queued, or unfinished."""

    detail: str
    slurm_silence: str | None
    """What Slurm's commands said instead of an answer; then `jobs` holds what the run's files tell."""

    step: int
    horizon_steps: int | None
    epoch: float
    loss: float | None
    learning_rate: float | None
    tokens_per_s: float | None
    seconds_left: float | None
    """Of the whole chain: training at the last block's speed, and the gaps between blocks."""

    gap_seconds: float | None
    """Measured from the end of a block to the start of training in the next; None before the second block."""

    checkpoint: str | None
    passed_over: list[str]
    """Newer checkpoints that are not whole, and why."""

    whole_epochs: int
    """Epochs up to that checkpoint in which every row was trained on exactly once."""

    wrong_epochs: list[WrongEpoch]
    """Epochs up to that checkpoint in which it was not."""

    jobs: list[JobRow]
    blocks_not_queued: int | None
    """Blocks still to come that no job is queued for yet; None where their number is not known."""

    evaluation: dict[str, Any] | None

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.state not in ("running", "queued") and self.slurm_silence is None


class SlurmGlances:
    """What Slurm has of this user's jobs, asked for once and then at most every ten seconds, for any number of runs."""

    def __init__(self) -> None:
        self.answer: SlurmAnswer | None = None
        self.asked_at_s = 0.0

    def glance(self, run: RunFolder) -> SlurmAnswer:
        """The last answer; nothing where no job of the run was ever submitted."""
        if not run.chain.exists():
            return SlurmAnswer()
        if self.answer is None or time.monotonic() - self.asked_at_s > SECONDS_BETWEEN_QUESTIONS:
            self.answer = ask_slurm()
            self.asked_at_s = time.monotonic()
        return self.answer


def ask_slurm() -> SlurmAnswer:
    """One call, whether or not the controller answers it."""
    try:
        return SlurmAnswer(jobs=my_jobs())
    except (SlurmError, FileNotFoundError) as error:
        return SlurmAnswer(silence=str(error))


def read_status(run: RunFolder, slurm: SlurmGlances | None = None) -> RunStatus:
    """The state of a run from its folder and, where jobs were submitted, from squeue."""
    answer = (slurm or SlurmGlances()).glance(run)
    checkpoint, passed_over = newest_checkpoint(run)
    events = list(run.events())
    metrics = run.newest_metrics()
    last: dict[str, Any] = metrics[-1] if metrics else {}
    trained_to = last.get("horizon_steps") or (checkpoint.terms.horizon_steps if checkpoint else None)
    horizon = newest_horizon(events, trained_to)
    num_blocks = planned_blocks(run)
    block_steps = horizon // num_blocks if horizon and num_blocks else None
    finished_blocks = checkpoint.step // block_steps if checkpoint and block_steps else 0
    jobs = read_job_rows(
        events, metrics, Journal.open(run), answer,
        finished_blocks=finished_blocks, block_steps=block_steps, num_blocks=num_blocks,
    )  # fmt: skip
    state, detail = overall_state(run, jobs)
    is_going_on = state in ("running", "queued")
    step = max(last.get("step", 0), checkpoint.step if checkpoint else 0)
    gap_s = measured_gap(events)
    return RunStatus(
        name=run.path.name,
        state=state,
        detail=detail,
        slurm_silence=answer.silence,
        step=step,
        horizon_steps=horizon,
        epoch=last.get("epoch", 0.0),
        loss=last.get("loss"),
        learning_rate=last.get("lr"),
        tokens_per_s=last.get("tokens_per_s"),
        seconds_left=seconds_left(
            step, horizon, block_steps, seconds_per_step=training_pace(metrics, events), gap_s=gap_s
        )
        if is_going_on
        else None,
        gap_seconds=gap_s,
        checkpoint=checkpoint.path.name if checkpoint else None,
        passed_over=passed_over,
        whole_epochs=checkpoint.whole_epochs if checkpoint else 0,
        wrong_epochs=wrong_epochs(checkpoint) if checkpoint else [],
        jobs=jobs,
        blocks_not_queued=blocks_not_queued(jobs, finished_blocks, num_blocks) if is_going_on else None,
        evaluation=read_evaluation(run),
    )


def newest_checkpoint(run: RunFolder) -> tuple[Checkpoint | None, list[str]]:
    try:
        return newest_valid(run.checkpoints)
    except NoValidCheckpointError as error:
        return None, str(error).splitlines()


def newest_horizon(events: Iterable[dict[str, Any]], trained_to: int | None) -> int | None:
    """The steps of the whole chain: an extension may not have trained any of its own yet."""
    extended = [event["horizon_steps"] for event in events if event["event"] == "extended"]
    return max([*extended, trained_to or 0]) or None


def planned_blocks(run: RunFolder) -> int | None:
    """Blocks of the whole chain, extensions included, read without the checks that take most of the time."""
    if not run.config.exists():
        return None
    training = read_config_file(run.config).values["training"]
    return int(training["total_jobs"]) + sum(int(extension["jobs"]) for extension in training["extensions"])


def wrong_epochs(checkpoint: Checkpoint) -> list[WrongEpoch]:
    """What the checkpoint's ledger says against the chain."""
    ledger = checkpoint.ledger
    return [
        WrongEpoch(
            epoch=wrong.epoch + 1,
            rows_counted=wrong.rows,
            rows_expected=ledger.rows_per_epoch,
            what=ledger.describe(wrong),
        )
        for wrong in checkpoint.wrong_epochs
    ]


def overall_state(run: RunFolder, jobs: Sequence[JobRow]) -> tuple[str, str]:
    """The run's state in a word, and what a person should know about it."""
    stop = run.stop.read_text().strip() if run.stop.exists() else ""
    if run.done.exists():
        return "done", f"finished {run.done.read_text().strip()}"
    if any(row.state in AT_WORK for row in jobs):
        return "running", f"until it has saved: {stop}" if stop else ""
    if run.halt.exists():
        return "halted", run.halt.read_text().strip()
    if stop:
        return "stopped", f"{stop}; ./train.sh resume {run.path.name} goes on"
    if run.capture_only.exists() and not any(row.state in TO_COME for row in jobs):
        return "unfinished", "only the teacher's cache was asked for; run its file to train"
    if any(row.reason == CUT_OFF for row in jobs):
        return "queued", CUT_OFF_IN_WORDS
    if any(row.state in TO_COME for row in jobs):
        return "queued", ""
    return "unfinished", f"nothing of it is queued or running; ./train.sh resume {run.path.name} goes on"


def training_pace(metrics: Sequence[dict[str, Any]], events: Iterable[dict[str, Any]]) -> float | None:
    """Seconds per optimizer step lately, saves included, and starts of jobs and what a crash cost left out."""
    starts = [event["time"] for event in events if event["event"] == "job_start"]
    seconds, steps = 0.0, 0
    for before, after in itertools.pairwise(metrics):
        is_interrupted = any(before["time"] < start <= after["time"] for start in starts)
        if after["step"] > before["step"] and not is_interrupted:
            seconds += after["time"] - before["time"]
            steps += after["step"] - before["step"]
    return seconds / steps if steps else None


def measured_gap(events: Iterable[dict[str, Any]]) -> float | None:
    """Seconds from the last checkpoint of a block to the first step of the next: the median over the run."""
    committed: dict[int, float] = {}
    boundaries: set[int] = set()
    gaps = []
    for event in events:
        match event["event"]:
            case "checkpoint":
                committed[event["step"]] = event["time"]
            case "block_end":
                boundaries.add(event["step"])
            case "resumed" if event["step"] in boundaries & committed.keys():
                gaps.append(event["time"] - committed[event["step"]])
                boundaries.discard(event["step"])
    return statistics.median(gaps) if gaps else None


def seconds_left(
    step: int,
    horizon_steps: int | None,
    block_steps: int | None,
    *,
    seconds_per_step: float | None,
    gap_s: float | None,
) -> float | None:
    """Seconds until the last block ends; gaps count as nothing before one has been measured."""
    if horizon_steps is None or seconds_per_step is None:
        return None
    boundaries = -(-(horizon_steps - step) // block_steps) - 1 if block_steps else 0
    return (horizon_steps - step) * seconds_per_step + max(0, boundaries) * (gap_s or 0.0)


def blocks_not_queued(jobs: Sequence[JobRow], finished_blocks: int, num_blocks: int | None) -> int | None:
    if num_blocks is None:
        return None
    there = sum(row.kind == "block" and row.state in AT_WORK | TO_COME for row in jobs)
    return max(0, num_blocks - finished_blocks - there)


def read_evaluation(run: RunFolder) -> dict[str, Any] | None:
    import orjson

    return orjson.loads(run.evaluation.read_bytes()) if run.evaluation.exists() else None


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
