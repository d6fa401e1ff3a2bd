"""Asking Slurm and telling it what to do: one call, or with patience until a controller that is away is back."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from jobs.chain import Journal

HELD_BY_USER = "JobHeldUser"
PENDING_REASONS = {
    "Dependency": "waits for the job before it",
    "Priority": "other jobs come first",
    "Resources": "waits for free nodes",
    "DependencyNeverSatisfied": "the job it waits for has failed; run the file again",
    HELD_BY_USER: "held by you; scontrol release, or run the file again",
    "JobHeldAdmin": "held by an administrator",
    "BeginTime": "its start time has not come; after a requeue that takes some seconds",
    "QOSMaxJobsPerUserLimit": "you have as many jobs running as your QOS allows",
    "AssocGrpGRES": "your account's GPUs are all in use",
    "ReqNodeNotAvail": "a node it needs is down or reserved",
    "PartitionTimeLimit": "asks for more time than the partition gives",
    "PartitionDown": "its partition starts no jobs now",
    "PartitionInactive": "its partition takes and starts no jobs now",
    "Reservation": "waits for its reservation",
    "Licenses": "waits for a licence",
    "BadConstraints": "no node can ever give what it asks for",
    "JobHoldMaxRequeue": "held after too many failed starts; scontrol release",
}

SILENCE = re.compile(
    r"unable to contact|connection|timed out|zero bytes|message (send|receive)|unexpected message|header lengths"
    r"|standby|authentication (error|credential)|munge|unable to create job record",
    re.IGNORECASE,
)
"""Words of Slurm's commands when the controller did not answer, so that nobody knows what it has done."""

SUBMIT_LIMIT = re.compile(r"(Max|Grp)Submit|resource temporarily unavailable", re.IGNORECASE)
"""Words of sbatch at a limit on submitted jobs: of user, account or QOS, or (after two minutes) of the controller."""

LIVE_STATES = frozenset(
    """PENDING CONFIGURING RUNNING SUSPENDED STOPPED SIGNALING STAGE_OUT COMPLETING RESIZING REQUEUED REQUEUE_HOLD
    REQUEUE_FED SPECIAL_EXIT RESV_DEL_HOLD""".split()  # noqa: SIM905
)
PATIENCE_S = 600.0
SECONDS_BETWEEN_CALLS = 1.0
SECONDS_BETWEEN_WORDS = 30.0

Answer = TypeVar("Answer")


class SlurmError(RuntimeError):
    """Slurm refused a job, or did not answer."""


class RefusedError(SlurmError):
    """Slurm answered, and would not do it."""

    @property
    def is_limit(self) -> bool:
        """Whether it takes more such jobs once others have left."""
        return SUBMIT_LIMIT.search(str(self)) is not None


class NoAnswerError(SlurmError):
    """The controller did not answer. That never means that there is no such job, or that a request was not obeyed."""


@dataclass(frozen=True)
class QueuedJob:
    """One job as squeue shows it."""

    id: str
    name: str
    state: str
    reason: str
    nodes: str
    elapsed: str
    dependency: str
    tasks: tuple[QueuedJob, ...] = ()
    """The tasks of an array, with ids like 12_3; its other values are those of the task that is furthest."""

    @property
    def is_live(self) -> bool:
        """Whether the job is queued or running."""
        return self.state in LIVE_STATES

    @property
    def is_leaving(self) -> bool:
        """Whether its processes have ended and Slurm is cleaning up."""
        return self.state == "COMPLETING"

    @property
    def waits(self) -> bool:
        """Whether the job has not started."""
        return self.state == "PENDING"

    @property
    def is_held(self) -> bool:
        """Whether the job waits for `scontrol release`."""
        return self.waits and self.reason == HELD_BY_USER

    @property
    def dependencies(self) -> list[str]:
        """What it still waits for, as sbatch was told, for example `afterany:12`."""
        if self.dependency == "(null)":
            return []
        return [part.partition("(")[0].removesuffix("_*") for part in self.dependency.split(",")]

    @property
    def reason_in_words(self) -> str:
        """Why the job does not run yet, for people."""
        if not self.waits:
            return ""
        if re.match(r"Nodes.required", self.reason):
            return PENDING_REASONS["ReqNodeNotAvail"]
        if re.match(r"QOS|Assoc", self.reason) and self.reason not in PENDING_REASONS:
            return f"at a limit of your account or QOS ({self.reason})"
        return PENDING_REASONS.get(self.reason.partition(",")[0], self.reason)


def call(*command: str) -> str:
    """What one of Slurm's commands prints.

    Raises:
        NoAnswerError: the controller did not answer.
        RefusedError: it did, and refused, in its own words.
    """
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        words = "; ".join(answer.stderr.split("\n")).strip("; ")
        raise NoAnswerError(words) if SILENCE.search(words) else RefusedError(words)
    return answer.stdout


def known_jobs(journal: Journal) -> list[QueuedJob]:
    """The run's jobs in Slurm, found by name; those that ended stay known for some minutes (MinJobAge).

    Raises:
        NoAnswerError: the controller does not answer.
    """
    return [job for job in my_jobs() if journal.owns(job.name)] if journal.jobs else []


def my_jobs() -> list[QueuedJob]:
    """All jobs of this user in Slurm, those that ended lately among them.

    Raises:
        NoAnswerError: the controller does not answer.
    """
    try:
        listing = call("squeue", "-h", "--me", "--array", "-t", "all", "-o", "%i|%j|%T|%r|%N|%M|%E")
    except SlurmError as error:
        raise NoAnswerError(f"Slurm does not answer: {error}") from None
    lines = [line.split("|") for line in listing.splitlines() if line.count("|") == 6]
    return folded(
        QueuedJob(id=job_id, name=name, state=state, reason=reason, nodes=nodes, elapsed=elapsed, dependency=dependency)
        for job_id, name, state, reason, nodes, elapsed, dependency in lines
    )


def folded(lines: Iterable[QueuedJob]) -> list[QueuedJob]:
    """The jobs of a listing with a line for each task, every array as one job."""
    by_job: dict[str, list[QueuedJob]] = {}
    for line in lines:
        by_job.setdefault(line.id.partition("_")[0], []).append(line)
    return [
        replace(min(tasks, key=distance_from_work), id=job_id, tasks=tuple(tasks)) if "_" in tasks[0].id else tasks[0]
        for job_id, tasks in by_job.items()
    ]


def distance_from_work(task: QueuedJob) -> int:
    """How little a task says of its array: one at work counts before one that leaves, that waits, that has ended."""
    places = [
        task.is_live and not (task.is_leaving or task.waits),
        task.is_leaving,
        task.waits,
        task.state != "CANCELLED",
    ]
    return next((place for place, holds in enumerate(places) if holds), len(places))


def live_jobs(journal: Journal) -> list[QueuedJob]:
    """The run's jobs that are queued or running.

    Raises:
        NoAnswerError: the controller does not answer; that never counts as "no such job".
    """
    return [job for job in known_jobs(journal) if job.is_live]


def patiently(ask: Callable[[], Answer], report: Callable[[str], None]) -> Answer:
    """The answer to `ask`, asked again while the controller is away; a line of progress every half minute.

    Raises:
        SlurmError: there was no answer for ten minutes.
    """
    started = time.monotonic()
    next_words = started
    while True:
        try:
            return ask()
        except NoAnswerError as error:
            waited_s = time.monotonic() - started
            if waited_s > PATIENCE_S:
                raise SlurmError(
                    f"{error}; gave up after {waited_s / 60:.0f} min. Run the same command again once Slurm is back; "
                    "it finishes what was begun and submits nothing twice."
                ) from None
            if time.monotonic() >= next_words:
                report(f"{error}; waiting for it, {PATIENCE_S / 60:.0f} min at most")
                next_words = time.monotonic() + SECONDS_BETWEEN_WORDS
        time.sleep(SECONDS_BETWEEN_CALLS)
