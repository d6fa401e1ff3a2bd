"""What follows from a failed job: a diagnosis, a HALT file where another try would fail too, hosts to avoid.

A job that still can diagnoses itself. One that was killed is diagnosed by the next job of the chain to start.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jobs.capturing import shards_done
from jobs.chain import JobKind, Journal
from jobs.config import RunConfig, read_resolved_config
from jobs.exit_code import CRASHED, ExitCode
from jobs.queue import SlurmError, call, live_jobs
from jobs.requeue import SlurmJob, ask_slurm
from jobs.triage import (
    BlockTiming,
    Diagnosis,
    LogTail,
    diagnose,
    hosts_to_exclude,
    kinds_at_step,
    read_log_tail,
    record_diagnosis,
    time_last_block,
)
from mixture.whole_files import write_whole
from training.checkpoints import NoValidCheckpointError, newest_valid
from training.run import NonFiniteLossError
from training.run_folder import RunFolder, own_job_id


def exit_code_of(error: Exception) -> int:
    if isinstance(error, NoValidCheckpointError):
        return ExitCode.NO_VALID_CHECKPOINT
    if isinstance(error, NonFiniteLossError):
        return ExitCode.LOSS_NOT_FINITE
    return ExitCode.BAD_INPUT if isinstance(error, ValueError) else CRASHED


def report_failure(run: RunFolder, kind: JobKind, error: Exception) -> str:
    """The details into the log, and one line for the user at its end, which is returned."""
    traceback.print_exception(error)
    message = str(error).strip() or type(error).__name__
    reason = f"{kind}: {' '.join(line.strip() for line in message.splitlines())}"
    print(f"error: {reason}", file=sys.stderr, flush=True)
    return reason


def account_for_failure(
    run: RunFolder, kind: JobKind, error: Exception, reason: str, *, is_first_process: bool
) -> None:
    """Record why this job fails and act on it. Processes other than the first only halt what must not go on."""
    code = exit_code_of(error)
    if not is_first_process:
        if code in set(ExitCode) and ExitCode(code).halts:
            halt(run, reason)
        return
    run.record_event("error", kind=kind, exit_code=int(code), message=reason)
    tail = LogTail(text="".join(traceback.format_exception(error)))
    host = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    step = progress(run, kind)
    diagnosis = diagnose([tail], exit_code=code, hosts=[host], earlier=kinds_at_step(run.events(), step, kind))
    record_diagnosis(run, diagnosis, job=own_job_id(), job_kind=kind, step=step)
    act_on(run, diagnosis, reason)


def account_for_silent_end(run: RunFolder) -> None:
    """Diagnose each job that started before this one and ended without a word. For the first process of a job."""
    for start in silent_starts(run.events()):
        account_for_silent_job(run, start)


def account_for_silent_job(run: RunFolder, before: dict[str, Any]) -> None:
    """Diagnose a job by its start, unless it still runs."""
    job_id, starts_ago = before["job"], 0
    found: SlurmJob | None = None
    if job_id is not None:
        try:
            found = ask_slurm(job_id)
        except (SlurmError, FileNotFoundError):
            return
        if job_id == own_job_id():
            starts_ago, found = 1, None  # Slurm has put it back into the queue; its log goes on
        elif found is not None and found.is_live:
            return
    step = progress(run, before["kind"])
    logs = [read_log_tail(path, starts_ago=starts_ago) for path in logs_of(run, before)]
    diagnosis = diagnose(
        logs,
        exit_code=found.exit_code if found else None,
        slurm_state=found.state if found else None,
        hosts=[before["host"]],
        earlier=kinds_at_step(run.events(), step, before["kind"]),
        timing=block_timing(run, read_resolved_config(run.config)) if before["kind"] == "block" else None,
    )
    print(
        f"the job before ended without a word: {diagnosis.kind} ({diagnosis.evidence}); {diagnosis.advice}", flush=True
    )
    record_diagnosis(run, diagnosis, job=job_id, job_kind=before["kind"], step=step)
    act_on(run, diagnosis, f"{before['kind']}: {diagnosis.kind}: {diagnosis.evidence}")


def silent_starts(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last starts of jobs which neither their end nor a diagnosis of them nor the user's word followed."""
    starts: dict[str | None, dict[str, Any]] = {}
    for event in events:
        match event["event"]:
            case "job_start":
                starts[event["job"]] = event
            case "job_end" | "diagnosis":
                starts.pop(event["job"], None)
            case "started_by_user":
                starts.clear()
    return list(starts.values())


def logs_of(run: RunFolder, start: dict[str, Any]) -> list[Path]:
    """The logs of all processes of a job."""
    if start["job"] is not None:
        return sorted(run.logs.glob(f"{start['job']}_*_log.out"))
    return sorted(run.logs.glob(f"{start['kind']}-*.log"), key=lambda path: path.stat().st_mtime)[-1:]


def block_timing(run: RunFolder, config: RunConfig) -> BlockTiming | None:
    minutes = config.slurm.time_limit_minutes
    if minutes is None:
        return None
    return time_last_block(
        run,
        limit_s=minutes * 60.0,
        warning_s=config.slurm.warning_seconds,
        save_interval=config.training.save_interval,
        block_steps=None,
    )


def act_on(run: RunFolder, diagnosis: Diagnosis, reason: str) -> None:
    """End the chain where another try would fail too; keep later jobs off a host that is broken."""
    if diagnosis.action == "halt":
        halt(run, f"{reason}\n{diagnosis.advice}")
    hosts = hosts_to_exclude(run.events())
    if hosts and diagnosis.action == "other node" and run.chain.exists():
        exclude_from_queued(run, hosts)


def halt(run: RunFolder, words: str) -> None:
    write_whole(run.halt, f"{words}\n".encode(), synced=True)


def exclude_from_queued(run: RunFolder, hosts: list[str]) -> None:
    """Tell Slurm to start no waiting job of the chain on these hosts."""
    try:
        for job in live_jobs(Journal.open(run)):
            if job.waits:
                call("scontrol", "update", f"JobId={job.id}", f"ExcNodeList={','.join(hosts)}")
    except (SlurmError, FileNotFoundError) as error:
        print(f"cannot keep all queued jobs off {', '.join(hosts)}: {error}", flush=True)


def progress(run: RunFolder, kind: JobKind) -> int:
    """What jobs of a kind have done for good: shards of the teacher's cache, else optimizer steps."""
    return shards_done(run, read_resolved_config(run.config)) if kind == "capture" else newest_step(run)


def newest_step(run: RunFolder) -> int:
    """Optimizer steps that a resumed block would not have to repeat."""
    try:
        checkpoint, _ = newest_valid(run.checkpoints)
    except NoValidCheckpointError:
        return 0
    return checkpoint.step if checkpoint else 0
