"""What Slurm says of a run's jobs: which are queued or running, and why one waits."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from jobs.chain import Journal

PENDING_REASONS = {
    "Dependency": "waits for the job before it",
    "Priority": "other jobs come first",
    "Resources": "waits for free nodes",
    "DependencyNeverSatisfied": "the job it waits for has failed; run the file again",
    "JobHeldUser": "held by you (scontrol release)",
    "JobHeldAdmin": "held by an administrator",
    "BeginTime": "its start time has not come",
    "QOSMaxJobsPerUserLimit": "you have as many jobs running as your QOS allows",
    "AssocGrpGRES": "your account's GPUs are all in use",
    "ReqNodeNotAvail": "a node it needs is down or reserved",
    "PartitionTimeLimit": "asks for more time than the partition gives",
}


class SlurmError(RuntimeError):
    """Slurm refused a job, or did not answer."""


@dataclass(frozen=True)
class QueuedJob:
    """One job as squeue shows it."""

    id: str
    name: str
    state: str
    reason: str
    nodes: str
    elapsed: str

    @property
    def reason_in_words(self) -> str:
        """Why the job does not run yet, for people."""
        return PENDING_REASONS.get(self.reason, self.reason) if self.state == "PENDING" else ""


def live_jobs(journal: Journal) -> list[QueuedJob]:
    """The run's jobs that are queued or running.

    Raises:
        SlurmError: the controller does not answer; that never counts as "no such job".
    """
    names = {job.name for job in journal.jobs}
    if not names:
        return []
    command = ["squeue", "-h", "--me", "-o", "%i|%j|%T|%r|%N|%M"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        raise SlurmError(f"Slurm does not answer: {answer.stderr.strip()}")
    jobs = [QueuedJob(*line.split("|")) for line in answer.stdout.splitlines()]
    return [job for job in jobs if job.name in names]
