"""The jobs of a run, a row each: what they did, from the run's events, and what Slurm has of them now."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jobs.chain import ChainJob, JobKind, Journal
from jobs.exit_code import ExitCode
from jobs.ownership import process_lives
from jobs.queue import QueuedJob

CUT_OFF = "held: its submission is not finished"
UNCONFIRMED = "as far as the run's files tell"

JobState = Literal[
    "waiting", "running", "suspended", "ending", "requeued",
    "done", "stopped early", "stopped", "cancelled", "failed", "ended without a word",
]  # fmt: skip
AT_WORK: frozenset[JobState] = frozenset({"running", "suspended", "ending"})
TO_COME: frozenset[JobState] = frozenset({"waiting", "requeued"})


@dataclass(frozen=True, kw_only=True)
class SlurmAnswer:
    """What Slurm has of the run's jobs, those that ended lately among them."""

    jobs: Sequence[QueuedJob] = ()
    silence: str | None = None
    """What its commands said instead, where the controller did not answer."""

    asked_at_s: float = field(default_factory=time.time)
    """Seconds since 1970; what a job has written since then is newer."""


@dataclass(frozen=True, kw_only=True)
class JobRow:
    """One job, however often Slurm has started it."""

    kind: JobKind
    id: str | None
    """Slurm's; None where the job ran without it."""

    state: JobState
    reason: str = ""
    """Why it waits, or why it ended early."""

    block: int | None = None
    """Number of the block that it trains, from 1; None for other jobs, and where it is not known."""

    node: str | None = None
    pid: int | None = None
    """Of its first process, on that node."""

    started: float | None = None
    """Of the last start, in seconds since 1970."""

    told_at: float | None = None
    """When it wrote its last event."""

    seconds: float | None = None
    """Since the last start, up to now or to its end."""

    start_step: int | None = None
    step: int | None = None
    epoch: float | None = None
    loss: float | None = None
    """At `step`."""

    restarts: int = 0
    error: str | None = None
    diagnosis: str | None = None
    advice: str | None = None
    """What the diagnosis says to do."""

    log: str | None = None
    """Name of its file in logs/, where it ran without Slurm."""

    @property
    def title(self) -> str:
        """Kind and number, for people."""
        return f"block {self.block}" if self.block is not None else self.kind


def read_job_rows(
    events: Iterable[dict[str, Any]],
    newest_metrics: Sequence[dict[str, Any]],
    journal: Journal,
    slurm: SlurmAnswer,
    *,
    finished_blocks: int,
    block_steps: int | None,
    num_blocks: int | None,
) -> list[JobRow]:
    """The jobs that have started, in the order of their starts, then those that wait, in the order of the chain."""
    rows = with_newest_metrics(started_jobs(events), newest_metrics)
    rows = [numbered(row, block_steps, num_blocks) for row in rows]
    found = [job for job in slurm.jobs if journal.owns(job.name)]
    by_id = {task.id: task for job in found for task in job.tasks or (job,)}
    rows = [with_slurms_word(row, by_id.get(row.id or ""), slurm) for row in rows]
    to_come = waiting_jobs(rows, journal, found, slurm.silence)
    return rows + number_those_to_come(rows, to_come, finished_blocks, num_blocks)


def started_jobs(events: Iterable[dict[str, Any]]) -> list[JobRow]:
    """A row for each job that has started, as its events tell."""
    rows: list[JobRow] = []
    places: dict[str, int] = {}
    for event in events:
        job_id = event["job"]
        if event["event"] == "job_start":
            row = JobRow(
                kind=event["kind"],
                id=job_id,
                state="running",
                node=event["host"],
                pid=event["pid"],
                started=event["time"],
                told_at=event["time"],
                start_step=event["step"],
                restarts=event["restart"],
                log=event.get("log"),
            )
            place = places.get(job_id) if job_id else None
            if place is None:
                if job_id:
                    places[job_id] = len(rows)
                rows.append(row)
            else:
                rows[place] = row
            continue
        place = places.get(job_id) if job_id else len(rows) - 1
        if place is not None and place >= 0:
            rows[place] = replace(rows[place], told_at=event["time"], **told_by(event, rows[place]))
    return rows


def told_by(event: dict[str, Any], row: JobRow) -> dict[str, Any]:
    """What an event changes in the row of its job."""
    match event["event"]:
        case "checkpoint":
            return {"step": event["step"], "epoch": event.get("epoch"), "loss": event.get("loss")}
        case "block_end":
            return {"block": event["block"]}
        case "error":
            return {"error": event["message"]}
        case "diagnosis":
            ended = {"state": "failed"} if row.state == "running" else {}
            return {"diagnosis": event["kind"], "advice": event["advice"], **ended}
        case "requeued":
            return {"state": "requeued"}
        case "job_end":
            state, reason = outcome(event)
            return {"state": state, "reason": reason, "seconds": event["seconds"], "step": event["step"]}
    return {}


def outcome(job_end: dict[str, Any]) -> tuple[JobState, str]:
    """How a job ended, and why where that needs words."""
    code, reason = job_end["exit_code"], job_end.get("reason", "")
    if code == ExitCode.DONE:
        return "done", ""
    if code != ExitCode.STOPPED_EARLY:
        return "failed", f"exit code {code}"
    if reason in ("stopped", "cancelled"):
        return reason, ""
    return "stopped early", reason


def with_newest_metrics(rows: list[JobRow], newest_metrics: Sequence[dict[str, Any]]) -> list[JobRow]:
    """The rows, the last block with what it logged since its newest checkpoint."""
    last = max((number for number, row in enumerate(rows) if row.kind == "block"), default=None)
    if last is None or not newest_metrics:
        return rows
    line, row = newest_metrics[-1], rows[last]
    if row.state == "running" and row.started is not None and line["time"] >= row.started:
        rows[last] = replace(row, step=line["step"], epoch=line["epoch"], loss=line["loss"])
    return rows


def numbered(row: JobRow, block_steps: int | None, num_blocks: int | None) -> JobRow:
    """The row with the number of the block that the job trains, which follows from where it started."""
    if row.kind != "block" or row.block is not None or row.start_step is None:
        return row
    if block_steps is None:
        return replace(row, block=1) if row.start_step == 0 else row
    number = row.start_step // block_steps + 1
    return replace(row, block=number) if num_blocks is None or number <= num_blocks else row


def with_slurms_word(row: JobRow, found: QueuedJob | None, slurm: SlurmAnswer) -> JobRow:
    """The row as it stands now: the events of a job that was killed do not know of it."""
    if row.id is None:
        is_lost = row.state == "running" and not process_lives(row.pid or 0)
        return replace(row, state="ended without a word") if is_lost else timed(row)
    if slurm.silence is not None:
        return replace(timed(row), reason=UNCONFIRMED) if row.state in ("running", "requeued") else row
    if row.told_at is not None and row.told_at > slurm.asked_at_s:
        return timed(row)
    if found is None or not found.is_live:
        return ended_in_slurm(row, found)
    if found.waits:
        return replace(
            row, state="waiting", reason=found.reason_in_words, restarts=row.restarts + 1, seconds=None, node=None
        )
    if row.state == "requeued" and not found.is_leaving:
        return replace(row, state="running", reason="starts again", restarts=row.restarts + 1)
    if row.state != "running":
        return row
    if found.is_leaving:
        return replace(timed(row), state="ending")
    return replace(timed(row), state="running" if found.state == "RUNNING" else "suspended")


def timed(row: JobRow) -> JobRow:
    """The row of a running job with the time since its start."""
    return replace(row, seconds=time.time() - row.started) if row.state == "running" and row.started else row


def ended_in_slurm(row: JobRow, found: QueuedJob | None) -> JobRow:
    """A job that Slurm no longer has queued or running, by its own events or, where it was killed, by Slurm's word."""
    if found is not None and found.state == "CANCELLED" and row.state in ("running", "requeued"):
        return replace(row, state="cancelled", reason="")
    if row.state not in ("running", "requeued"):
        return row
    if found is None:
        return replace(row, state="ended without a word")
    return replace(row, state="failed", reason=f"Slurm says {found.state.lower().replace('_', ' ')}")


def waiting_jobs(
    rows: Sequence[JobRow], journal: Journal, found: Sequence[QueuedJob], silence: str | None
) -> list[JobRow]:
    """The jobs of the chain that have not started yet, as far as their events tell."""
    started = {row.id for row in rows}
    if silence is not None:
        begun = {job_id.partition("_")[0] for job_id in started if job_id}
        last = max((number for number, job in enumerate(journal.jobs) if job.id in begun), default=-1)
        behind = [job for job in journal.jobs[last + 1 :] if job.id]
        return [JobRow(kind=job.kind, id=job.id, state="waiting", reason=UNCONFIRMED) for job in behind]
    # By name: a submission that was cut off may not have learned the id of its last job.
    live = {job.name: job for job in found if job.is_live}
    return [
        not_started(job, task)
        for job in journal.jobs
        if job.name in live
        for task in live[job.name].tasks or (live[job.name],)
        if task.is_live and task.id not in started
    ]


def not_started(job: ChainJob, found: QueuedJob) -> JobRow:
    if found.waits:
        reason = CUT_OFF if found.is_held and not job.released else found.reason_in_words
        return JobRow(kind=job.kind, id=found.id, state="waiting", reason=reason)
    return JobRow(kind=job.kind, id=found.id, state="running", reason="starts", node=found.nodes or None)


def number_those_to_come(
    rows: Sequence[JobRow], to_come: Sequence[JobRow], finished_blocks: int, num_blocks: int | None
) -> list[JobRow]:
    """The rows with the numbers of the blocks that they will train, if each before them trains one."""
    active = [row.block for row in rows if row.block is not None and row.state in AT_WORK | TO_COME]
    number = max([finished_blocks, *active])
    result = []
    for row in to_come:
        if row.kind == "block":
            number += 1
            row = replace(row, block=number if num_blocks is None or number <= num_blocks else None)
        result.append(row)
    return result
