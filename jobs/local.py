"""Running the chain on this machine: the same jobs, one after another, as child processes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from jobs.capturing import array_shape
from jobs.chain import JobKind
from jobs.config import RunConfig, read_resolved_config
from jobs.exit_code import ExitCode
from jobs.failures import progress
from training.run_folder import RunFolder

LOG_NAME = "BATON_LOG_NAME"
"""Tells a job that runs here which file in logs/ it writes to; on Slurm its id says so."""


class AlreadyRunningError(RuntimeError):
    """Another process works on this run."""


@contextmanager
def sole_owner(run: RunFolder, *, patience_s: float = 0.0) -> Iterator[None]:
    """Hold the run folder's lock, so that two commands never submit or train the same run at once.

    Raises:
        AlreadyRunningError: names the process that holds it, and still does after `patience_s`.
    """
    deadline_s = time.monotonic() + patience_s
    with (run.path / ".lock").open("a+") as lock:
        while not locked(lock):
            if time.monotonic() > deadline_s:
                lock.seek(0)
                raise AlreadyRunningError(f"run {run.path.name} is being worked on by {lock.read().strip()}")
            time.sleep(0.2)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
        yield


def owner_of(run: RunFolder) -> str | None:
    """Which command trains or submits this run right now, as `process 12 on host`; None where none does."""
    path = run.path / ".lock"
    if not path.exists():
        return None
    with path.open("a+") as lock:
        if locked(lock):
            return None
        lock.seek(0)
        return lock.read().strip()


def locked(lock: TextIO) -> bool:
    """Whether the file's lock is ours now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def run_chain_here(
    run: RunFolder,
    jobs: list[JobKind],
    *,
    num_processes: int,
    gpu_id: int | str | None,
    watch: Callable[[Callable[[], bool]], None],
) -> int:
    """Run the jobs in order; returns the exit code of the first that failed for good, else 0.

    A job that crashed is run again as long as each try gets further. `watch` shows progress until its argument
    says that the job has ended.
    """
    for kind in jobs:
        step = progress(run, kind)
        code = run_job_here(run, kind, num_processes, gpu_id, watch)
        while code not in set(ExitCode) and progress(run, kind) > step:
            step = progress(run, kind)
            code = run_job_here(run, kind, num_processes, gpu_id, watch)
        if code != ExitCode.DONE:
            return code
    return ExitCode.DONE


def run_job_here(
    run: RunFolder,
    kind: JobKind,
    num_processes: int,
    gpu_id: int | str | None,
    watch: Callable[[Callable[[], bool]], None],
) -> int:
    """Run one job as one process per GPU, its output in logs/; returns its exit code."""
    run.logs.mkdir(parents=True, exist_ok=True)
    config = read_resolved_config(run.config)
    processes_of = {"capture": captures_here(config, num_processes), "block": num_processes}
    if config.spreads_evaluation:
        processes_of["evaluate"] = num_processes
    world_size = processes_of.get(kind, 1)
    log = run.logs / f"{kind}-{len(list(run.logs.glob(f'{kind}-*.log'))) + 1}.log"
    processes = [start_process(run, kind, rank, world_size, gpu_id, log) for rank in range(world_size)]
    try:
        watch(lambda: any(process.poll() is not None for process in processes))
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        codes = wait_for_all(processes)
    return next((code for code in codes if code), 0)


def start_process(
    run: RunFolder, kind: JobKind, rank: int, world_size: int, gpu_id: int | str | None, log: Path
) -> subprocess.Popen[bytes]:
    # In an allocation (salloc) these would have the job take itself for that one, and put it back into the queue.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment[LOG_NAME] = log.name
    environment["PYTHONPATH"] = os.pathsep.join([str(run.code), *filter(None, [os.environ.get("PYTHONPATH")])])
    if world_size > 1:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    if gpu_id is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu_id)
    if kind == "capture" and world_size > 1:  # a teacher is spread over all GPUs that its process sees
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible_devices(environment)[rank::world_size])
    command = [sys.executable, "-u", "-m", "jobs.job", kind, str(run.path)]
    with log.open("ab") as output:
        return subprocess.Popen(command, cwd=run.code, env=environment, stdout=output, stderr=subprocess.STDOUT)


def captures_here(config: RunConfig, num_gpus: int) -> int:
    """Processes that capture side by side, each with as many GPUs as the teacher needs."""
    return max(1, num_gpus // array_shape(config).gpus)


def visible_devices(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that processes of this environment may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device.strip() for device in chosen.split(",") if device.strip() not in ("", "-1")]
    devices = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*")]
    return [str(number) for number in range(sum(device.isdigit() for device in devices))]


def wait_for_all(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes of all processes; when one fails the others, which may wait for it for ever, are ended."""
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            for process in processes:
                process.terminate()
        time.sleep(0.05)
    return [process.wait() for process in processes]
