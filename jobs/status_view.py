"""How a run stands, for people: a head, a row for each job, what failed jobs need; once, or again and again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jobs.job_rows import JobRow
from jobs.progress import RunWatcher
from jobs.status import RunStatus, SlurmGlances, clock, read_status
from training.run_folder import RunFolder

SECONDS_BETWEEN_DRAWINGS = 2.0
COLUMNS = ("block", "state", "job", "node", "step", "epoch", "loss", "time", "")
MAX_ERROR_LENGTH = 100


def show_status(status: RunStatus, console: Console) -> None:
    """Print one run: how far it is, then its jobs."""
    for part in rendered(status):
        console.print(part, highlight=False)


def watch_status(run: RunFolder, console: Console) -> None:
    """Show one run until it has ended: redrawn on a terminal, and as lines of what happens elsewhere."""
    slurm = SlurmGlances()
    if not console.is_terminal:
        show_status(read_status(run, slurm), console)
        RunWatcher(run, console).watch(lambda: read_status(run, slurm).is_over)
        show_status(read_status(run), console)
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while not (status := read_status(run, slurm)).is_over:
            live.update(Group(*rendered(status)), refresh=True)
            time.sleep(SECONDS_BETWEEN_DRAWINGS)
        live.update(Group(*rendered(status)), refresh=True)


def rendered(status: RunStatus) -> list[RenderableType]:
    """What is shown of a run, part by part."""
    parts: list[RenderableType] = [headline(status)]
    if status.slurm_silence is not None:
        parts.append(Text(f"  {status.slurm_silence}; this is what the run's files tell", style="yellow"))
    parts.append(Text("  " + ", ".join(numbers(status))))
    parts.append(Text(f"  newest valid checkpoint: {status.checkpoint or 'none yet'}"))
    parts += [Text(f"  not valid: {reason}") for reason in status.passed_over]
    if status.whole_epochs:
        parts.append(Text(f"  every row trained on exactly once in {status.whole_epochs} epochs"))
    parts += [Text.assemble("  ", ("wrong rows", "red"), f": {wrong.what}") for wrong in status.wrong_epochs]
    if status.jobs:
        parts.append(job_table(status.jobs))
    if status.blocks_not_queued:
        parts.append(Text(f"  still to come, not queued yet: {count(status.blocks_not_queued, 'block')}"))
    if status.evaluation:
        parts += [Text(line) for line in scores(status.evaluation)]
    return parts


def headline(status: RunStatus) -> Text:
    colour = {"halted": "red", "running": "green", "done": "green"}.get(status.state, "")
    return Text.assemble((status.name, "bold"), ": ", (status.state, colour), f"  {status.detail}")


def numbers(status: RunStatus) -> list[str]:
    """How far the run is, and how long the rest of the chain takes."""
    horizon = f" of {status.horizon_steps}" if status.horizon_steps else ""
    found = [f"step {status.step}{horizon}", f"epoch {status.epoch:.2f}"]
    if status.loss is not None:
        found.append(f"loss {status.loss:.4f}")
    if status.seconds_left is not None:
        gap = "" if status.gap_seconds is None else f", gaps of {clock(status.gap_seconds)} between blocks included"
        found.append(f"about {clock(status.seconds_left)} of training left{gap}")
    return found


def count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def job_table(jobs: Sequence[JobRow]) -> Table:
    """A row for each job."""
    table = Table(box=None, padding=(0, 2))
    for heading in COLUMNS:
        table.add_column(heading, no_wrap=bool(heading))
    for row in jobs:
        table.add_row(*(Text(cell) for cell in (*cells(row), remark(row))))
    return table


def cells(row: JobRow) -> list[str]:
    """The columns of a job but the last."""
    return [
        row.title,
        row.state,
        row.id or "-",
        row.node or "-",
        "-" if row.step is None else str(row.step),
        "-" if row.epoch is None else f"{row.epoch:.2f}",
        "-" if row.loss is None else f"{row.loss:.4f}",
        "-" if row.seconds is None else clock(row.seconds),
    ]


def remark(row: JobRow) -> str:
    """Why a job waits or failed, what to do, and how often it was put back into the queue."""
    parts = [f"requeued {row.restarts}x"] if row.restarts else []
    if row.diagnosis and row.state == "failed":
        parts.append(f"{row.diagnosis}: {row.advice}")
    elif row.error:
        parts.append(shortened(row.error))
    elif row.reason:
        parts.append(row.reason)
    return "; ".join(parts)


def shortened(text: str) -> str:
    return text if len(text) <= MAX_ERROR_LENGTH else f"{text[: MAX_ERROR_LENGTH - 3]}..."


def show_evaluation(evaluation: dict[str, Any], console: Console) -> None:
    """Print the scores of the evaluation, one a line."""
    for line in scores(evaluation):
        console.print(line, highlight=False, markup=False)


def scores(evaluation: dict[str, Any]) -> list[str]:
    """The scores of the trained model, one a line, and how others compare, or each source of a draft, a line each;
    then each task of lm-evaluation-harness."""
    own = [f"  {name}: {value:.4g}" for name, value in evaluation.items() if isinstance(value, int | float)]
    others = [
        *(accepted_by_source(evaluation) or compared_models(evaluation)),
        *evaluation.get("lm_eval", {}).items(),
    ]
    return own + [
        f"  {name}: " + ", ".join(f"{score.replace('_', ' ')} {value:.4g}" for score, value in found.items())
        for name, found in others
    ]


def compared_models(evaluation: dict[str, Any], category: str = "all") -> list[tuple[str, dict[str, float]]]:
    """What was measured of each model that the evaluation compares, over one category of the test split."""
    return [(model, found[category]) for model, found in evaluation.get("models", {}).items() if category in found]


def accepted_by_source(evaluation: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """The accepted guesses of a draft head, told and measured, over all sources and on each; none for other models."""
    measured = {"all": evaluation.get("acceptance_length"), **evaluation.get("acceptance_length_by_source", {})}
    return [
        (source, {**told, "acceptance_length": measured[source]} if measured.get(source) is not None else told)
        for source, told in evaluation.get("models", {}).get("draft", {}).items()
    ]


def show_runs(statuses: Sequence[RunStatus], console: Console) -> None:
    """Print a line for each run."""
    if not statuses:
        console.print("no runs yet; start one with ./train.sh configs/test.yaml", highlight=False)
        return
    table = Table(box=None, padding=(0, 2))
    for heading in ("run", "state", "step", "of", "loss", "left"):
        table.add_column(heading)
    for status in statuses:
        table.add_row(
            status.name,
            status.state,
            str(status.step),
            str(status.horizon_steps or "-"),
            f"{status.loss:.4f}" if status.loss is not None else "-",
            clock(status.seconds_left) if status.seconds_left is not None else "-",
        )
    console.print(table)
    for silence in {status.slurm_silence for status in statuses} - {None}:
        console.print(f"{silence}; this is what the runs' files tell", highlight=False, markup=False)
