"""Tasks run by forked workers, so that a Python loop uses all cores and whatever is killed leaves no strays."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Task = TypeVar("Task")
Report = Callable[[str], None]

REPORT_EVERY_SECONDS = 10.0


def default_workers() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[Task], None], tasks: Sequence[Task], *, workers: int, label: str, report: Report
) -> None:
    """Call `function` on every task, in `workers` processes; results go to files, an exception is raised here.

    Workers are forked, so neither function nor tasks need to be picklable. They take tasks in order, and end by
    themselves when the process that started them is gone.
    """
    if workers <= 1 or len(tasks) <= 1:
        run_here(function, tasks, label, report)
        return
    context = multiprocessing.get_context("fork")
    taken = context.Value("q", 0)
    receiver, sender = context.Pipe(duplex=False)
    processes = [
        context.Process(target=work, args=(function, tasks, taken, sender, os.getpid()), daemon=True)
        for _ in range(min(workers, len(tasks)))
    ]
    for process in processes:
        process.start()
    try:
        wait_for(processes, receiver, taken, len(tasks), label, report)
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_here(function: Callable[[Task], None], tasks: Sequence[Task], label: str, report: Report) -> None:
    """The tasks one after another, in this process."""
    told = time.monotonic()
    for number, task in enumerate(tasks):
        with uncollected():
            function(task)
        if time.monotonic() - told > REPORT_EVERY_SECONDS:
            told = time.monotonic()
            report(f"{label}: {number + 1} of {len(tasks)}")


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the search for reference cycles: rows hold none, and among so many it takes a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def work(function: Callable[[Task], None], tasks: Sequence[Task], taken: Any, errors: Connection, parent: int) -> None:
    """A worker: take the next task until none is left, another worker failed, or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends its workers
    while os.getppid() == parent:
        with taken.get_lock():
            number, taken.value = taken.value, taken.value + 1
        if number >= len(tasks):
            return
        try:
            with uncollected():
                function(tasks[number])
        except Exception as error:
            errors.send((type(error), error.args, str(error), traceback.format_exc()))
            os._exit(1)


def wait_for(processes: Sequence[Any], errors: Connection, taken: Any, count: int, label: str, report: Report) -> None:
    """Return when all workers are done; raise what one of them raised, or RuntimeError where one was killed."""
    running = list(processes)
    told = time.monotonic()
    while running:
        wait([process.sentinel for process in running], timeout=REPORT_EVERY_SECONDS)
        for process in [process for process in running if process.exitcode is not None]:
            running.remove(process)
            if process.exitcode != 0:
                raise_failure(process.exitcode, errors, label)
        if running and time.monotonic() - told > REPORT_EVERY_SECONDS:
            told = time.monotonic()
            report(f"{label}: {min(taken.value, count)} of {count}")


def raise_failure(exitcode: int, errors: Connection, label: str) -> None:
    """Raise a worker's exception as its own type, so that users see the same with one worker and with many."""
    if errors.poll():
        kind, arguments, message, trace = errors.recv()
        if issubclass(kind, OSError):
            raise kind(*arguments)
        if issubclass(kind, ValueError):
            raise ValueError(message)
        raise RuntimeError(f"{label} failed in a worker:\n{trace}")
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        raise RuntimeError(
            f"{label}: a worker was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        )
    raise RuntimeError(f"{label}: a worker ended with exit code {exitcode}")
