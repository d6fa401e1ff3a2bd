"""What the jobs of a run print: which file it is in, and following it from job to job."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from jobs.job_rows import AT_WORK, TO_COME
from jobs.status import RunStatus, SlurmGlances, read_status
from training.run_folder import RunFolder

POLL_S = 0.5


def show_logs(run: RunFolder, *, rank: int, block: int | None, follow: bool) -> None:
    """Print the log of the run's newest job, or of the newest job that trained a block; follow it and what comes next.

    Raises:
        ValueError: there is no such log.
    """
    slurm = SlurmGlances()
    path = newest_log(run, rank) if block is None else log_of_block(read_status(run, slurm), run, rank, block)
    seen = {path, *logs_of_rank(run, rank)}
    offset = 0
    print(f"==> {path}", file=sys.stderr, flush=True)
    while True:
        # Before the log is read to its end: what a job wrote last is there once the job is gone.
        is_over = not follow or has_ended(read_status(run, slurm), block)
        offset = print_from(path, offset)
        newer = [log for log in logs_of_rank(run, rank) if log not in seen] if follow and block is None else []
        if newer:
            path, offset = newer[0], 0
            seen.add(path)
            print(f"==> {path}", file=sys.stderr, flush=True)
        elif is_over:
            return
        else:
            time.sleep(POLL_S)


def has_ended(status: RunStatus, block: int | None) -> bool:
    """Whether nothing more will be printed by the run, or by the jobs of a block."""
    if status.slurm_silence is not None or block is None:
        return status.is_over
    return not any(row.block == block and row.state in AT_WORK | TO_COME for row in status.jobs)


def print_from(path: Path, offset: int) -> int:
    """Print what a log holds after byte `offset`; returns where it ends now."""
    with path.open("rb") as log:
        log.seek(offset)
        sys.stdout.write(log.read().decode(errors="replace"))
        sys.stdout.flush()
        return log.tell()


def logs_of_rank(run: RunFolder, rank: int) -> list[Path]:
    """The logs that hold the words of a process, oldest first. Without Slurm the processes of a job share one."""
    found = [*run.logs.glob("*.log"), *run.logs.glob(f"*_{rank}_log.out")]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def newest_log(run: RunFolder, rank: int) -> Path:
    logs = logs_of_rank(run, rank)
    if not logs:
        others = sorted(path.name for path in run.logs.glob("*_log.out"))
        there = f"no log of process {rank}; there are {', '.join(others)}" if others else "no logs yet"
        raise ValueError(f"run {run.path.name} has {there}")
    return logs[-1]


def log_of_block(status: RunStatus, run: RunFolder, rank: int, block: int) -> Path:
    """The log of the newest job that trained the block."""
    rows = [row for row in status.jobs if row.block == block and row.started is not None]
    if not rows:
        started = sorted({row.block for row in status.jobs if row.started is not None and row.block is not None})
        there = f"it has trained {', '.join(map(str, started))}" if started else "no block of it has started yet"
        raise ValueError(f"run {run.path.name} has no job that trained block {block}; {there}")
    row = rows[-1]
    path = run.logs / (row.log or f"{row.id}_{rank}_log.out")
    if not path.exists():
        raise ValueError(f"{path} does not exist; processes of a job count from 0")
    return path
