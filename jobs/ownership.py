"""Which job may write to a run: the one that holds the newest ticket, taken only from an owner that is dead."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from jobs.queue import SlurmError
from jobs.requeue import LIVE, ask_slurm
from training.owner import Owner, OwnerFacts, heart_beats, newest_ticket, read_ticket
from training.run_folder import RunFolder

PATIENCE_S = 90.0
"""A job that is just ending is gone before that."""

POLL_S = 2.0


class OwnedElsewhereError(RuntimeError):
    """Another job trains this run right now."""


def take_ownership(run: RunFolder, report: Callable[[str], None]) -> Owner:
    """This process as the run's owner, once the one before is gone.

    Raises:
        OwnedElsewhereError: it is alive and stays.
    """
    deadline = time.monotonic() + PATIENCE_S
    told = False
    while (ticket := newest_ticket(run.path)) is not None and is_alive(ticket):
        if time.monotonic() > deadline:
            raise OwnedElsewhereError(f"{read_ticket(ticket)} trains this run; this job leaves it alone")
        if not told:
            report(f"waiting for {read_ticket(ticket)}, which owns this run")
            told = True
        time.sleep(POLL_S)
    return Owner.take(run.path)


def is_alive(ticket: Path) -> bool:
    """Whether the owner behind a ticket may still write. A lost node cannot be asked, so Slurm's word counts first."""
    if ticket.suffix == ".released":
        return False
    owner, mine = read_ticket(ticket), OwnerFacts.of_this_process()
    if owner is None:
        return heart_beats(ticket)
    if owner.job is None:
        return process_lives(owner.process) if owner.host == mine.host else heart_beats(ticket)
    if owner.job == mine.job:
        return False  # an earlier start of this very job, which Slurm has taken off its node, or given up with it
    try:
        job = ask_slurm(owner.job)
    except (SlurmError, FileNotFoundError):
        return heart_beats(ticket)
    return job is not None and job.state in (*LIVE, "COMPLETING")


def process_lives(process: int) -> bool:
    """Whether a job that runs without Slurm is still there, as far as this machine can tell."""
    try:
        return b"jobs.job" in Path("/proc", str(process), "cmdline").read_bytes()
    except OSError:
        return False
