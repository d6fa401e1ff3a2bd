"""One writer for each run folder: numbered tickets, of which the newest owns the run.

A job that Slurm has given up may live on, on a node that lost its connection, and meet the job that replaced it. Before
it commits anything it looks for a newer ticket, and ends where there is one.

.owners/000012.json       job, restart, host, process of the owner; its modification time is the heartbeat
.owners/000012.released   the same once it has given the run up; the number stays taken, so no older one becomes newest
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import orjson

HEARTBEAT_EVERY_S = 10.0
HEARTBEAT_LOST_S = 60.0


class LostOwnershipError(RuntimeError):
    """Another job has taken over the run; this one must not write to it any more."""


@dataclass(frozen=True, kw_only=True)
class OwnerFacts:
    """Who holds a ticket."""

    job: str | None
    """Slurm's id; None without Slurm."""

    restart: int
    host: str
    process: int

    @classmethod
    def of_this_process(cls) -> OwnerFacts:
        return cls(
            job=os.environ.get("SLURM_JOB_ID"),
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            host=os.environ.get("SLURMD_NODENAME", os.uname().nodename),
            process=os.getpid(),
        )

    def __str__(self) -> str:
        process = f"process {self.process} on {self.host}"
        return process if self.job is None else f"job {self.job} ({process})"


class Owner:
    """This process as the owner of a run folder, until `release`. Make it with `take`."""

    def __init__(self, ticket: Path) -> None:
        self.ticket = ticket
        self.ended = threading.Event()
        threading.Thread(target=self.beat, daemon=True).start()

    @classmethod
    def take(cls, folder: Path) -> Owner:
        """A new ticket, which takes the run from whoever held it. `folder` is the run's."""
        tickets = folder / ".owners"
        tickets.mkdir(exist_ok=True)
        while True:
            ticket = tickets / f"{number_of(newest_ticket(folder)) + 1:06d}.json"
            try:
                descriptor = os.open(ticket, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                break
            except FileExistsError:
                continue
        with os.fdopen(descriptor, "wb") as file:
            file.write(orjson.dumps(OwnerFacts.of_this_process()))
            file.flush()
            os.fsync(file.fileno())
        for older in tickets.glob("0*.*"):
            if number_of(older) < number_of(ticket):
                older.unlink(missing_ok=True)
        return cls(ticket)

    def beat(self) -> None:
        while not self.ended.wait(HEARTBEAT_EVERY_S):
            try:
                os.utime(self.ticket)
            except FileNotFoundError:
                return

    def check(self) -> None:
        """Raise LostOwnershipError where another process has taken the run since."""
        newest = newest_ticket(self.ticket.parent.parent)
        if newest != self.ticket:
            who = read_ticket(newest) if newest else None
            raise LostOwnershipError(
                f"{who or 'another job'} has taken over this run; nothing more is written from here"
            )

    def release(self) -> None:
        """Give the run up; the next owner need not ask whether this one still lives."""
        self.ended.set()
        if newest_ticket(self.ticket.parent.parent) == self.ticket:
            self.ticket.rename(self.ticket.with_suffix(".released"))


def newest_ticket(folder: Path) -> Path | None:
    """The ticket of the run's last owner, if it ever had one. Its name tells whether it was given up."""
    return max((folder / ".owners").glob("0*.*"), key=number_of, default=None)


def number_of(ticket: Path | None) -> int:
    return int(ticket.stem) if ticket else 0


def read_ticket(ticket: Path) -> OwnerFacts | None:
    """Who holds a ticket; None where it was given up meanwhile, or its writer died while writing it."""
    try:
        return OwnerFacts(**orjson.loads(ticket.read_bytes()))
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None


def heart_beats(ticket: Path) -> bool:
    """Whether the ticket's owner was alive a moment ago, by the clock of the file system that both write to."""
    probe = ticket.with_name(f".now-{os.uname().nodename}-{os.getpid()}")
    probe.touch()
    try:
        return probe.stat().st_mtime - ticket.stat().st_mtime < HEARTBEAT_LOST_S
    except FileNotFoundError:
        return False
    finally:
        probe.unlink(missing_ok=True)
