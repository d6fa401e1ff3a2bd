"""Submitting the chain through submitit."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.chain import ChainJob, JobKind, Journal, jobs_to_submit
from jobs.config import SlurmConfig
from jobs.job import ChainStep
from jobs.queue import QueuedJob, SlurmError, live_jobs
from training.run_folder import RunFolder

BLOCKED_SIGNALS = ("TERM", "USR2")


def submit_chain(
    run: RunFolder, *, run_name: str, slurm: SlurmConfig, needed: list[JobKind], report: Callable[[str], None]
) -> list[ChainJob]:
    """Submit what the queue lacks of `needed`, each job after the one before; returns all queued jobs of the chain.

    Raises:
        SlurmError: sbatch refused a job. What was accepted stays queued and is in the journal, so that the same
            call later adds the rest and nothing twice.
    """
    journal = Journal.open(run)
    live = live_jobs(journal)
    adopt_unanswered(journal, live, run)
    queued = [job for job in journal.jobs if job.id in {job.id for job in live}]
    missing = jobs_to_submit(needed, [job.kind for job in queued])
    previous = queued[-1].id if queued else None
    for position, kind in enumerate(missing):
        job = ChainJob(kind=kind, name=journal.next_name(run_name, kind), after=previous)
        journal.record(job)
        try:
            job = replace(job, id=submit(job, run, slurm))
        except SlurmError as error:
            raise SlurmError(refusal(error, queued, missing[position:])) from None
        journal.record(job)
        report(f"submitted {kind} as job {job.id}" + (f", after {previous}" if previous else ""))
        queued.append(job)
        previous = job.id
    return queued


def refusal(error: Exception, queued: list[ChainJob], missing: list[JobKind]) -> str:
    kept = f"job{'s' if len(queued) > 1 else ''} {', '.join(str(job.id) for job in queued)} stay queued and will train"
    return (
        f"Slurm refused the next job ({missing[0]}): {error}. "
        f"{kept if queued else 'Nothing is queued'}; {len(missing)} more needed. "
        "Run the same command again to add the rest; nothing is submitted twice."
    )


def submit(job: ChainJob, run: RunFolder, slurm: SlurmConfig) -> str:
    """Submit one job; returns its id.

    Raises:
        SlurmError: with sbatch's own words.
    """
    import submitit

    run.logs.mkdir(parents=True, exist_ok=True)
    executor = submitit.SlurmExecutor(folder=run.logs, python=python_command())
    try:
        executor.update_parameters(**sbatch_parameters(job, run, slurm))
        return str(executor.submit(ChainStep(job.kind, str(run.path))).job_id)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise SlurmError(sbatch_words(str(error))) from None


def python_command() -> str:
    """The interpreter, started with the signals blocked that would kill it in the seconds before it handles them."""
    return shlex.join(["env", *(f"--block-signal={name}" for name in BLOCKED_SIGNALS), sys.executable])


def sbatch_words(message: str) -> str:
    """sbatch's own explanation out of submitit's report of the failed command."""
    lines = [line.strip() for line in message.splitlines() if "error:" in line]
    return "; ".join(line.partition("error:")[2].strip() for line in lines) or message.strip()


def sbatch_parameters(job: ChainJob, run: RunFolder, slurm: SlurmConfig) -> dict[str, Any]:
    """What submitit is told about one job. Preparation and evaluation are one process; a block is one per GPU."""
    nodes, tasks_per_node = (slurm.nodes, slurm.tasks_per_node) if job.kind == "block" else (1, 1)
    gpus_per_node = None if job.kind == "prepare" else slurm.gpus_per_node
    if job.kind == "evaluate" and slurm.gpus_per_node:
        gpus_per_node = 1
    options = {
        "partition": slurm.partition,
        "time": slurm.time_limit_minutes,
        "nodes": nodes,
        "ntasks_per_node": tasks_per_node,
        "gpus_per_node": gpus_per_node,
        "cpus_per_task": slurm.cpus_per_task,
        "mem": slurm.mem,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "job_name": job.name,
        # `afterany`, not `afterok`: blocks are index-free and check the run folder themselves, so a crashed block is
        # made good by the next one, and a halted chain ends its jobs one after another instead of pending for ever.
        "dependency": f"afterany:{job.after}" if job.after else None,
        "setup": setup_lines(run, slurm),
        "stderr_to_stdout": True,
        "signal_delay_s": slurm.warning_seconds,
        "srun_args": srun_arguments(slurm),
        "additional_parameters": {
            "requeue": True,
            "kill_on_invalid_dep": "yes",
            "chdir": str(run.code),
            **{name.replace("-", "_"): value for name, value in slurm.extra.items()},
        },
    }
    return {name: value for name, value in options.items() if value is not None} | time_limit(slurm)


def srun_arguments(slurm: SlurmConfig) -> list[str]:
    """One dead process ends the block; the cores of a task are named again because srun 22.05 - 23.02 forgets them."""
    cores = [f"--cpus-per-task={slurm.cpus_per_task}"] if slurm.cpus_per_task else []
    return ["--kill-on-bad-exit=1", *cores]


def time_limit(slurm: SlurmConfig) -> dict[str, Any]:
    """Without a limit of ours the partition's default holds; submitit would write its own five minutes."""
    return {} if slurm.time_limit_minutes is not None else {"time": None}


def setup_lines(run: RunFolder, slurm: SlurmConfig) -> list[str]:
    lines = [*slurm.setup, f"export PYTHONPATH={shlex.quote(str(run.code))}"]
    if slurm.gpu_id is not None:
        lines.append(f"export CUDA_VISIBLE_DEVICES={shlex.quote(str(slurm.gpu_id))}")
    return lines


def adopt_unanswered(journal: Journal, live: list[QueuedJob], run: RunFolder) -> None:
    """Find jobs whose submission was cut off after Slurm accepted them, by name, and give them what they wait for."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    ids = {job.name: job.id for job in live}
    for job in journal.jobs:
        if job.id is None and job.name in ids:
            paths = JobPaths(run.logs, job_id=ids[job.name])
            if not Path(paths.submitted_pickle).exists():
                DelayedSubmission(ChainStep(job.kind, str(run.path))).dump(paths.submitted_pickle)
            journal.record(replace(job, id=ids[job.name]))
