"""A job that was asked to stop: what Slurm means by it, and how the job goes on by itself where it shall.

Slurm does not say why it sends a signal, so the job asks. While it still counts as running it is being preempted, or
near its time limit, or somebody signalled it: it puts itself back into the queue under its own id, which all later jobs
of the chain wait for. In any other state Slurm has decided: to requeue a cancelled job would raise it from the dead.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jobs.queue import RefusedError, SlurmError, call
from training.run_folder import RunFolder, own_job_id

LIVE = ("RUNNING", "SIGNALING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING")
"""SIGNALING: for half a second around every signal."""

RESTART_AFTER_S = 5
"""Slurm lets a requeued job wait for two minutes, which its owner may shorten. Not to nothing: a start within the same
second as the requeue fails with "Job credential revoked"."""

ATTEMPTS = 6
PAUSE_S = 2.0
LINGER_S = 600.0

StopReason = Literal["preempted", "time limit", "signal", "cancelled", "stopped"]


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """What Slurm says of a job."""

    id: str
    state: str
    exit_code: int
    """As in a shell, or minus the number of the signal that ended it."""

    is_preempted: bool
    seconds_left: float | None
    """Until the time limit; None without one."""

    @property
    def is_live(self) -> bool:
        """Whether Slurm has not decided how it ends."""
        return self.state in LIVE

    def reason(self, warning_s: float) -> StopReason:
        """Why it was signalled, where the warning before the time limit comes up to `warning_s` before it."""
        if not self.is_live:
            return "cancelled"
        if self.is_preempted:
            return "preempted"
        return "time limit" if self.seconds_left is not None and self.seconds_left <= warning_s else "signal"


def read_job(description: str) -> SlurmJob:
    """The line that `scontrol show job -o` prints."""
    fields = dict(re.findall(r"(\w+)=(\S*)", description))
    status, _, signal_number = fields["ExitCode"].partition(":")
    return SlurmJob(
        id=fields["JobId"],
        state=fields["JobState"],
        exit_code=-int(signal_number) if int(signal_number or 0) else int(status),
        is_preempted=fields.get("PreemptTime", "None") not in ("None", "N/A", "Unknown", ""),
        seconds_left=seconds_until(fields.get("EndTime", "Unknown")),
    )


def seconds_until(moment: str) -> float | None:
    """Seconds from now until a time as Slurm prints it, in local time."""
    try:
        return time.mktime(time.strptime(moment, "%Y-%m-%dT%H:%M:%S")) - time.time()
    except ValueError:
        return None


def ask_slurm(job_id: str) -> SlurmJob | None:
    """A job as the controller knows it now; None where it knows no such job.

    Raises:
        SlurmError: it does not answer, which never means that there is no job.
        FileNotFoundError: there is no scontrol here, as in some containers.
    """
    try:
        return read_job(call("scontrol", "show", "job", "-o", job_id))
    except RefusedError as error:
        if "Invalid job id" in str(error):
            return None
        raise


def why_stopped(run: RunFolder, *, warning_s: float) -> StopReason:
    """Why this job was asked to stop, as far as it can tell."""
    job_id = own_job_id()
    if run.stop.exists():
        return "stopped"
    if job_id is None:
        return "signal"
    try:
        job = ask_slurm(job_id)
    except (SlurmError, FileNotFoundError):
        return "signal"
    return job.reason(warning_s) if job else "cancelled"


def requeue(job_id: str, report: Callable[[str], None]) -> bool:
    """Put this job back into the queue, to start again in seconds. Whether that was done: a cancelled job stays so.

    Slurm signals every process of a requeued job, the commands that this one starts included. SIGTERM is therefore
    blocked before, and stays so: the caller waits for its end next.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_S)
        try:
            job = ask_slurm(job_id)
        except SlurmError as error:
            report(f"Slurm does not answer: {error}")
            continue
        except FileNotFoundError:
            report("there is no scontrol here: this job ends, and the next one of the chain goes on")
            return False
        if job is None or not job.is_live:
            return False
        try:
            call("scontrol", "requeue", job_id)
        except SlurmError as error:
            report(f"scontrol requeue: {error}")
            continue
        with contextlib.suppress(SlurmError):  # then it starts in two minutes
            call("scontrol", "update", f"JobId={job_id}", f"StartTime=now+{RESTART_AFTER_S}seconds")
        return True
    return False


def wait_for_the_end() -> None:
    """Wait until Slurm ends this process: an exit before the job counts as requeued would decide the job's fate."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    time.sleep(LINGER_S)
