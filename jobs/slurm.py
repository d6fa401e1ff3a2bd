"""Submitting one job of the chain through submitit."""

from __future__ import annotations

import pickle
import shlex
import sys
from pathlib import Path
from typing import Any

from jobs.chain import ChainJob
from jobs.config import SlurmConfig
from jobs.job import BLOCKED_SIGNALS, ChainStep
from jobs.queue import SILENCE, NoAnswerError, RefusedError
from jobs.triage import hosts_to_exclude
from mixture.whole_files import write_whole
from training.run_folder import RunFolder


def submit(job: ChainJob, run: RunFolder, slurm: SlurmConfig) -> str:
    """Submit one job, held; returns its id, which for an array is that of the whole.

    Raises:
        RefusedError: with sbatch's own words.
        NoAnswerError: Slurm may have the job or not.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        steps = [ChainStep(job.kind, str(run.path))] * job.tasks
        return str(executor_for(job, run, slurm).submit_array(steps)[0].job_id).partition("_")[0]
    except FailedSubmissionError as error:
        raise NoAnswerError(str(error)) from None
    except FailedJobError as error:
        words = sbatch_words(str(error))
        raise (RefusedError(words) if words and not SILENCE.search(words) else NoAnswerError(words)) from None


def executor_for(job: ChainJob, run: RunFolder, slurm: SlurmConfig) -> Any:
    """submitit's executor for one job: a fresh one each time, because one of them waits 0.2 s between its jobs."""
    import submitit

    run.logs.mkdir(parents=True, exist_ok=True)
    executor = submitit.SlurmExecutor(folder=run.logs, python=python_command())
    executor.update_parameters(**sbatch_parameters(job, run, slurm))
    return executor


def python_command() -> str:
    """The interpreter, as every task of a job starts it."""
    return shlex.join(["env", *(f"--block-signal={name}" for name in BLOCKED_SIGNALS), sys.executable])


def sbatch_words(message: str) -> str:
    """sbatch's own explanation out of submitit's report of the failed command."""
    lines = [line.strip() for line in message.splitlines() if "error:" in line]
    return "; ".join(line.partition("error:")[2].strip() for line in lines) or message.strip()


def sbatch_parameters(job: ChainJob, run: RunFolder, slurm: SlurmConfig) -> dict[str, Any]:
    """What submitit is told about one job. A block is one process per GPU; most others are one process in all."""
    is_spread = job.kind == "block" or job.is_spread
    nodes, tasks_per_node = (slurm.nodes, slurm.tasks_per_node) if is_spread else (1, 1)
    gpus_per_node = None if job.kind == "prepare" else slurm.gpus_per_node
    if not is_spread and gpus_per_node:
        gpus_per_node = job.gpus
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
        "exclude": excluded_hosts(run, slurm) or None,
        "job_name": job.name,
        "dependency": dependency_on(job.after) or None,
        "setup": setup_lines(run, slurm),
        "stderr_to_stdout": True,
        "signal_delay_s": slurm.warning_seconds,
        "srun_args": srun_arguments(slurm),
        "additional_parameters": {
            "hold": True,
            "requeue": True,
            "kill_on_invalid_dep": "yes",
            "chdir": str(run.code),
            **{name.replace("-", "_"): value for name, value in slurm.extra.items() if name != "exclude"},
        },
    }
    return {name: value for name, value in options.items() if value is not None} | time_limit(slurm)


def excluded_hosts(run: RunFolder, slurm: SlurmConfig) -> str:
    """The hosts that the user excludes, and those that have failed this run."""
    return ",".join(filter(None, [str(slurm.extra.get("exclude", "")), *hosts_to_exclude(run.events())]))


def dependency_on(job_id: str | None) -> str:
    """How a job waits for the one before it; empty where there is none.

    `afterany`, not `afterok`: blocks are index-free and check the run folder themselves, so a crashed block is made
    good by the next one, and a halted chain ends its jobs one after another instead of pending for ever.
    """
    return f"afterany:{job_id}" if job_id else ""


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


def adopt(job: ChainJob, job_id: str, run: RunFolder, slurm: SlurmConfig) -> None:
    """Give a job that Slurm accepted although we never heard so the file in which submitit looks for its task.

    An older file may be there: a controller that lost its state gives ids out again.
    """
    from submitit.core.utils import DelayedSubmission, JobPaths

    executor = executor_for(job, run, slurm)
    submission = DelayedSubmission(ChainStep(job.kind, str(run.path)))
    submission.set_timeout(executor.parameters["time"], executor.max_num_timeout)
    for task_id in [job_id] if job.tasks == 1 else [f"{job_id}_{task}" for task in range(job.tasks)]:
        write_whole(Path(JobPaths(run.logs, job_id=task_id).submitted_pickle), pickle.dumps(submission), synced=True)
