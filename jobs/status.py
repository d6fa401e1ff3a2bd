"""How a run stands: from its own files first, then from Slurm. Never needs accounting."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.chain import Journal
from jobs.ownership import process_lives
from jobs.queue import QueuedJob, SlurmError, live_jobs
from training.checkpoints import Checkpoint, NoValidCheckpointError, newest_valid
from training.run_folder import RunFolder

CUT_OFF = "held: its submission is not finished"
CUT_OFF_IN_WORDS = (
    "the submission was cut off before its jobs were released (unless a command is at it now); "
    "run the file again to finish it, nothing is submitted twice"
)


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
    """done, halted, running, queued, or unfinished."""

    detail: str
    step: int
    horizon_steps: int | None
    epoch: float
    loss: float | None
    learning_rate: float | None
    tokens_per_s: float | None
    seconds_left: float | None
    """Of training, at the last block's speed."""

    checkpoint: str | None
    passed_over: list[str]
    """Newer checkpoints that are not whole, and why."""

    whole_epochs: int
    """Epochs up to that checkpoint in which every row was trained on exactly once."""

    wrong_epochs: list[WrongEpoch]
    """Epochs up to that checkpoint in which it was not."""

    jobs: list[dict[str, Any]]
    evaluation: dict[str, Any] | None


def read_status(run: RunFolder) -> RunStatus:
    """The state of a run from its folder and, where jobs were submitted, from squeue."""
    queued, answer = ask_slurm(run)
    checkpoint, passed_over = newest_checkpoint(run)
    metrics = list(run.metrics())
    last: dict[str, Any] = metrics[-1] if metrics else {}
    jobs = job_table(run, queued)
    state, detail = overall_state(run, jobs, answer)
    step = max(last.get("step", 0), checkpoint.step if checkpoint else 0)
    horizon = newest_horizon(run, last.get("horizon_steps") or (checkpoint.terms.horizon_steps if checkpoint else None))
    return RunStatus(
        name=run.path.name,
        state=state,
        detail=detail,
        step=step,
        horizon_steps=horizon,
        epoch=last.get("epoch", 0.0),
        loss=last.get("loss"),
        learning_rate=last.get("lr"),
        tokens_per_s=last.get("tokens_per_s"),
        seconds_left=seconds_left(metrics, horizon) if state == "running" else None,
        checkpoint=checkpoint.path.name if checkpoint else None,
        passed_over=passed_over,
        whole_epochs=checkpoint.whole_epochs if checkpoint else 0,
        wrong_epochs=wrong_epochs(checkpoint) if checkpoint else [],
        jobs=jobs,
        evaluation=read_evaluation(run),
    )


def ask_slurm(run: RunFolder) -> tuple[list[QueuedJob], str | None]:
    """The run's queued jobs, and what Slurm said instead where it did not answer."""
    if not run.chain.exists():
        return [], None
    try:
        return live_jobs(Journal.open(run)), None
    except (SlurmError, FileNotFoundError) as error:
        return [], str(error)


def newest_checkpoint(run: RunFolder) -> tuple[Checkpoint | None, list[str]]:
    try:
        return newest_valid(run.checkpoints)
    except NoValidCheckpointError as error:
        return None, str(error).splitlines()


def newest_horizon(run: RunFolder, trained_to: int | None) -> int | None:
    """The steps of the whole chain: an extension may not have trained any of its own yet."""
    extended = [event["horizon_steps"] for event in run.events() if event["event"] == "extended"]
    return max([*extended, trained_to or 0]) or None


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


def job_table(run: RunFolder, queued: list[QueuedJob]) -> list[dict[str, Any]]:
    """A row per job: those that ran, from the events, then those that Slurm still holds."""
    rows: list[dict[str, Any]] = []
    for event in run.events():
        match event["event"]:
            case "job_start":
                rows.append(
                    {"kind": event["kind"], "id": event["job"], "node": event["host"], "state": "running",
                     "pid": event["pid"], "started": event["time"]}
                )  # fmt: skip
            case "job_end" if rows:
                state = "done" if event["exit_code"] == 0 else f"exit code {event['exit_code']}"
                rows[-1] |= {"state": state, "seconds": event["seconds"], "step": event["step"]}
            case "error" if rows:
                rows[-1]["error"] = event["message"]
    shown = {row["id"]: row for row in rows if row["id"] and row["state"] == "running"}
    known = {job.name: job for job in Journal.open(run).jobs} if queued else {}
    for job in queued:
        if job.id in shown:
            shown[job.id]["elapsed"] = job.elapsed
        elif job.name in known:
            entry = known[job.name]
            reason = CUT_OFF if job.is_held and not entry.released else job.reason_in_words
            rows.append({"kind": entry.kind, "id": job.id, "state": job.state.lower(), "reason": reason})
    live = {job.id for job in queued}
    for row in rows:
        if row["state"] == "running" and not (row["id"] in live if row["id"] else process_lives(row["pid"])):
            row["state"] = "ended without a word"
    return rows


def overall_state(run: RunFolder, jobs: list[dict[str, Any]], slurm_silence: str | None) -> tuple[str, str]:
    if run.done.exists():
        return "done", f"finished {run.done.read_text().strip()}"
    if any(row["state"] == "running" for row in jobs):
        return "running", ""
    if run.halt.exists():
        return "halted", run.halt.read_text().strip()
    if any(row.get("reason") == CUT_OFF for row in jobs):
        return "queued", CUT_OFF_IN_WORDS
    if any("reason" in row for row in jobs):
        return "queued", ""
    return "unfinished", slurm_silence or "nothing is queued; run the file again to go on"


def seconds_left(metrics: list[dict[str, Any]], horizon_steps: int | None) -> float | None:
    """Training time left at the speed of the last block."""
    block = [line for line in metrics if line.get("block") == metrics[-1].get("block")] if metrics else []
    if not horizon_steps or len(block) < 2 or block[-1]["step"] <= block[0]["step"]:
        return None
    seconds_per_step = (block[-1]["time"] - block[0]["time"]) / (block[-1]["step"] - block[0]["step"])
    return float(seconds_per_step * (horizon_steps - block[-1]["step"]))


def read_evaluation(run: RunFolder) -> dict[str, Any] | None:
    import orjson

    return orjson.loads(run.evaluation.read_bytes()) if run.evaluation.exists() else None


def show_status(status: RunStatus, console: Console) -> None:
    """Print one run: how far it is, then its jobs."""
    horizon = f" of {status.horizon_steps}" if status.horizon_steps else ""
    console.print(f"[bold]{status.name}[/]: {status.state}  {status.detail}", highlight=False)
    numbers = [f"step {status.step}{horizon}", f"epoch {status.epoch:.2f}"]
    if status.loss is not None:
        numbers.append(f"loss {status.loss:.4f}")
    if status.seconds_left is not None:
        numbers.append(f"about {clock(status.seconds_left)} of training left")
    console.print("  " + ", ".join(numbers), highlight=False)
    console.print(f"  newest valid checkpoint: {status.checkpoint or 'none yet'}", highlight=False)
    for reason in status.passed_over:
        console.print(f"  not valid: {reason}", highlight=False)
    if status.whole_epochs:
        console.print(f"  every row trained on exactly once in {status.whole_epochs} epochs", highlight=False)
    for wrong in status.wrong_epochs:
        console.print(f"  [red]wrong rows[/]: {wrong.what}", highlight=False)
    if status.jobs:
        table = Table(box=None, padding=(0, 2))
        for heading in ("job", "id", "state", "node", "time", "step", ""):
            table.add_column(heading)
        for row in status.jobs:
            seconds = row.get("seconds") or (time.time() - row["started"] if row["state"] == "running" else None)
            table.add_row(
                row["kind"],
                row["id"] or "-",
                row["state"],
                row.get("node", "-"),
                clock(seconds) if seconds is not None else "-",
                str(row["step"]) if row.get("step") is not None else "-",
                shortened(row.get("error") or row.get("reason") or ""),
            )
        console.print(table)
    if status.evaluation:
        show_evaluation(status.evaluation, console)


def shortened(text: str, max_length: int = 60) -> str:
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


def show_evaluation(evaluation: dict[str, Any], console: Console) -> None:
    """Print the scores of the evaluation, one a line."""
    for name, value in evaluation.items():
        if isinstance(value, int | float):
            console.print(f"  {name}: {value:.4g}", highlight=False)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
