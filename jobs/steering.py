"""./train.sh stop, cancel and resume: ending a run from outside, and going on with it from its own folder.

A STOP file goes before anything else: no job of the run requeues itself, starts work or is submitted while it is there.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from jobs.chain import Journal
from jobs.config import read_resolved_config
from jobs.extend import stored_run, world_size
from jobs.job_rows import AT_WORK, JobRow
from jobs.launch import compare_with_stored, queued_jobs
from jobs.local import AlreadyRunningError, owner_of
from jobs.preflight import CheckedRun, check_partition, choose_cluster
from jobs.queue import QueuedJob, SlurmError, call, live_jobs, patiently
from jobs.status import read_status
from mixture.prepare import data_key
from mixture.whole_files import write_whole
from settings.yaml_tree import ConfigError, Problem
from training.run_folder import RunFolder

Report = Callable[[str], None]

POLL_S = 1.0
LEAVING_PATIENCE_S = 60.0
"""After that, jobs that Slurm still cleans up behind, and commands that still submit, are left to themselves."""

MAX_NAMED = 6

GRACE_S = 5.0
"""What processes of a run here have between being told to end and being ended."""


def stop_run(run: RunFolder, report: Report) -> None:
    """Have the running block save a checkpoint and end, and take the waiting jobs out of the queue.

    Raises:
        SlurmError: the controller does not answer; what starts ends by itself all the same.
    """
    if is_finished(run, report):
        return
    ask_to_stop(run, "stopped")
    at_work = [row for row in read_status(run).jobs if row.state in AT_WORK]
    for row in at_work:
        tell_to_stop(row, run, report)
    cancel_waiting(run, report)
    if not at_work:
        owner = owner_of(run)
        still = f"{owner} starts nothing more" if owner else "nothing is running"
        report(f"of run {run.path.name} {still}; ./train.sh resume {run.path.name} goes on with it")


def cancel_run(run: RunFolder, report: Report) -> None:
    """End all jobs and processes of the run now; returns once none is left.

    Raises:
        SlurmError: the controller does not answer.
    """
    if is_finished(run, report):
        return
    ask_to_stop(run, "cancelled")
    had_processes = end_processes(run, report)
    had_jobs = cancel_all(run, report)
    if had_processes or had_jobs:
        report(f"nothing of run {run.path.name} is left; ./train.sh resume {run.path.name} goes on with it")
    else:
        report(f"nothing of run {run.path.name} was queued or running")


def is_finished(run: RunFolder, report: Report) -> bool:
    """Whether the run is finished, which is said too."""
    if run.done.exists():
        report(f"run {run.path.name} is finished; there is nothing to end")
    return run.done.exists()


def ask_to_stop(run: RunFolder, word: Literal["stopped", "cancelled"]) -> None:
    """Write the STOP file, which says who ended the run."""
    moment = time.strftime("%Y-%m-%d %H:%M:%S")
    write_whole(run.stop, f"{word} by {getpass.getuser()} on {os.uname().nodename}, {moment}\n".encode(), synced=True)


def tell_to_stop(row: JobRow, run: RunFolder, report: Report) -> None:
    """Have a job at work end. Blocks and captures look for the STOP file all the time, other jobs want a signal."""
    name = f"{row.title} (job {row.id})" if row.id else f"{row.title} (process {row.pid} on {row.node})"
    if row.kind == "block":
        report(f"{name} saves a checkpoint and ends; ./train.sh status {run.path.name} tells when it has")
    elif row.kind == "capture":
        report(f"{name} keeps the shards that it has finished and ends")
    elif row.id:
        report(f"{name} is told to end")
        tell_slurm(report, "scancel", "--signal=TERM", row.id)
    elif row.pid in processes_of(run):
        report(f"{name} is told to end")
        os.kill(row.pid, signal.SIGTERM)
    else:
        report(f"{name} ends the chain when it is through: from here it cannot be told")


def cancel_waiting(run: RunFolder, report: Report) -> None:
    """Cancel the jobs that wait until none is left and nobody submits more."""
    for jobs, submitter in looks(run, report):
        waiting = [job for job in jobs if job.waits or any(task.waits for task in job.tasks)]
        if waiting:
            report(f"cancelling the waiting {named(waiting)}")
            tell_slurm(report, "scancel", "--state=PENDING", *last_first(waiting))
        elif submitter is None:
            return


def cancel_all(run: RunFolder, report: Report) -> bool:
    """Cancel all jobs in one call, last first, again until none is left; returns whether there were any.

    A job may have put itself back into the queue in the moment before the call, and a top-up may have added some.
    """
    told: set[str] = set()
    for jobs, submitter in looks(run, report):
        to_cancel = [job for job in jobs if not job.is_leaving or job.id not in told]
        if to_cancel:
            report(f"cancelling {named(to_cancel)}")
            tell_slurm(report, "scancel", *last_first(to_cancel))
            told |= {job.id for job in to_cancel}
        elif not jobs and submitter is None:
            break
    return bool(told)


def looks(run: RunFolder, report: Report) -> Iterator[tuple[list[QueuedJob], str | None]]:
    """The run's live jobs, and which command may be adding some, again and again for as long as it is worth waiting."""
    deadline_s = time.monotonic() + LEAVING_PATIENCE_S
    while run.chain.exists():
        submitter = owner_of(run)  # asked first: what it has submitted before it left is seen below
        jobs = patiently(lambda: live_jobs(Journal.open(run)), report)
        yield jobs, submitter
        if time.monotonic() > deadline_s:
            still = f"Slurm still has {named(jobs)}" if jobs else f"{submitter} still works on this run"
            report(f"{still}; the STOP file keeps it from starting anything")
            return
        time.sleep(POLL_S)


def named(jobs: Sequence[QueuedJob]) -> str:
    """Some jobs for people: each of a few, the ends of many."""
    words = [f"{job.id} ({job.state.lower()})" for job in jobs]
    if len(words) > MAX_NAMED:
        return f"{len(words)} jobs, {words[0]} to {words[-1]}"
    return f"jobs {', '.join(words)}"


def last_first(jobs: Sequence[QueuedJob]) -> list[str]:
    """Ids in the order in which no job becomes free to start because the one before it was cancelled."""
    return [job.id for job in sorted(jobs, key=lambda job: int(job.id), reverse=True)]


def tell_slurm(report: Report, *command: str) -> None:
    """Have Slurm do something. Whether it did is seen by the next look, so a refusal is only passed on."""
    try:
        call(*command)
    except SlurmError as error:
        report(f"{command[0]}: {error}")


def end_processes(run: RunFolder, report: Report) -> bool:
    """End the run's jobs on this machine that run without Slurm; returns whether there were any."""
    deadline_s = time.monotonic() + GRACE_S
    ended: set[int] = set()
    while processes := processes_of(run):
        is_late = time.monotonic() > deadline_s
        for process in processes:
            if process not in ended or is_late:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL if is_late else signal.SIGTERM)
        if processes - ended:
            report(f"ending the processes {', '.join(map(str, sorted(processes - ended)))}")
        ended |= processes
        time.sleep(0.2)
    return bool(ended)


def processes_of(run: RunFolder) -> set[int]:
    """The run's jobs on this machine that run without Slurm, all ranks."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"jobs.job" in words and os.fsencode(run.path) in words:
                found.add(int(folder.name))
    return found


def resumed_run(run: RunFolder, overrides: Sequence[str], report: Report) -> CheckedRun:
    """The run as its folder describes it, with settings that a run may change on the way changed and stored.

    Raises:
        ConfigError: an override that would make another training of it, or that the cluster can never give.
        AlreadyRunningError: the run is being worked on, or has jobs that would not see the change.
    """
    owner = owner_of(run)
    if owner is not None:
        raise AlreadyRunningError(f"run {run.path.name} is being worked on by {owner}")
    stored = stored_run(run)
    if not overrides:
        return stored
    config = read_resolved_config(run.config, overrides)
    changed = replace(
        stored, config=config, cluster=choose_cluster(config.cluster), world_size=world_size(config)
    )  # fmt: skip
    if changed.cluster == "slurm":
        try:
            check_partition(config.slurm.partition, config.slurm.time_limit_minutes)
        except ValueError as error:
            raise ConfigError([Problem(f"run {run.path.name}", str(error))]) from None
    refuse_queued_jobs(run, report)
    compare_with_stored(run, changed, data_key(stored.preparation))
    return stored_run(run)


def refuse_queued_jobs(run: RunFolder, report: Report) -> None:
    """Raise AlreadyRunningError where jobs were submitted with the settings before."""
    jobs = queued_jobs(run, report)
    if jobs:
        raise AlreadyRunningError(
            f"run {run.path.name} still has {named(jobs)}, submitted with the settings before; "
            f"./train.sh stop {run.path.name} first"
        )
