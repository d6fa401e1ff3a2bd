"""Faults for the blocks of a chain that runs here: how each is dealt out, and what the run's events say of it.

All are real but one. A full disk cannot be had without being root, so a limit on the size of files stands for it
(RLIMIT_FSIZE): the kernel fails the block's own write of a checkpoint, with EFBIG instead of ENOSPC, and nothing else
on the machine suffers.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jobs.failures import newest_step
from training.checkpoints import files_under, newest_valid, unfinished_folders
from training.run_folder import RunFolder
from training.schedule import Horizon

Fault = Literal[
    "SIGTERM", "half-written checkpoint", "SIGUSR2", "SIGKILL in a step", "SIGKILL while saving", "full disk"
]

FAULTS: tuple[Fault, ...] = (
    "SIGTERM",
    "half-written checkpoint",
    "SIGUSR2",
    "SIGKILL in a step",
    "SIGKILL while saving",
    "full disk",
)
"""In the order in which they are dealt out. The second hits what the first has left, between two blocks."""

POLL_S = 0.005
"""A small model saves in some 30 ms, and the moment must not be missed."""


@dataclass(frozen=True, kw_only=True)
class Strike:
    """One fault as it was dealt out; whether it had an effect is for the events to say."""

    fault: Fault
    block_started_s: float
    at_s: float
    step: int
    """Optimizer steps done when it hit."""

    done_step: int
    """Optimizer steps done when the block had ended."""

    kept_step: int
    """Of them, those that the newest whole checkpoint holds."""

    damaged: tuple[str, ...] = ()
    """Folders of half-written checkpoints that it has left behind."""


@dataclass(frozen=True, kw_only=True)
class FaultOutcome:
    """What one fault has cost."""

    fault: Fault
    step: int | None = None
    """Optimizer steps done when it hit."""

    steps_again: int | None = None
    """Optimizer steps that had to be done a second time."""

    seconds_to_checkpoint: float | None = None
    """From the signal until a checkpoint of that moment was committed; None where nothing can be saved."""

    seconds_to_training: float | None = None
    """Until the next optimizer step was done."""

    not_hit: str | None = None
    """Why the fault proves nothing; None where it hit."""


class FaultDealer:
    """Deals faults out to the blocks of a run, one in each start of a block."""

    def __init__(
        self, run: RunFolder, faults: Sequence[Fault], horizon: Horizon, report: Callable[[str], None]
    ) -> None:
        self.run = run
        self.pending = list(faults)
        self.horizon = horizon
        self.report = report
        self.strikes: list[Strike] = []

    def watch(self, ended: Callable[[], bool]) -> None:
        """Watch a block until it has ended, and hit it with the next fault once it is well under way."""
        started_s, strike = time.time(), None
        while not ended():
            if self.pending and strike is None and self.is_due(self.pending[0], started_s):
                strike = self.strike(self.pending[0], started_s)
            time.sleep(POLL_S)
        if strike is None:
            return
        self.pending.pop(0)
        left = tuple(path.name for path in unfinished_folders(self.run.checkpoints))
        strike = replace(strike, done_step=self.last_step(), kept_step=newest_step(self.run), damaged=left)
        self.strikes.append(strike)
        self.report(f"  {strike.fault} at step {strike.step}; the newest checkpoint is of step {strike.kept_step}")

    def is_due(self, fault: Fault, started_s: float) -> bool:
        """Whether this start of a block has saved, and gone on from there, and is where the fault can hit it."""
        saved = [event["step"] for event in self.run.events() if is_checkpoint(event) and event["time"] >= started_s]
        if not saved or saved[-1] % self.horizon.block_steps == 0:
            return False
        match fault:
            case "half-written checkpoint":
                return False  # hits between blocks
            case "SIGKILL while saving":
                return self.is_saving()
            case "full disk":
                return True
        step = self.last_step()
        in_epoch = self.horizon.steps_per_epoch == 1 or step % self.horizon.steps_per_epoch != 0
        return step > saved[-1] and in_epoch

    def strike(self, fault: Fault, started_s: float) -> Strike | None:
        """Hit all processes of the block; None where the moment has just passed."""
        processes = processes_of(self.run)
        step, at_s = self.last_step(), time.time()
        match fault:
            case "SIGTERM" | "SIGUSR2":
                send(processes, signal.Signals[fault])
            case "SIGKILL in a step" | "SIGKILL while saving":
                hold(processes)  # a held process does not move on between the look and the blow
                if self.is_saving() != (fault == "SIGKILL while saving"):
                    send(processes, signal.SIGCONT)
                    return None
                send(processes, signal.SIGKILL)
            case "full disk":
                limit_files(processes, self.largest_file().stat().st_size // 2)
        return Strike(
            fault=fault, block_started_s=started_s, at_s=at_s, step=step, done_step=step, kept_step=step
        )  # fmt: skip

    def strike_between_blocks(self) -> None:
        """Cut the newest checkpoint, where that is what comes next."""
        if self.pending[:1] != ["half-written checkpoint"]:
            return
        fault = self.pending.pop(0)
        at_s, step, file = time.time(), newest_step(self.run), self.largest_file()
        cut_in_half(file)
        name = file.relative_to(self.run.checkpoints).parts[0]
        strike = Strike(
            fault=fault, block_started_s=at_s, at_s=at_s, step=step, done_step=step, kept_step=newest_step(self.run),
            damaged=(name,),
        )  # fmt: skip
        self.strikes.append(strike)
        self.report(f"  {fault} {name}: {file.name} is cut in half")

    def last_step(self) -> int:
        """The optimizer step of the newest line of metrics."""
        return max((line["step"] for line in list(self.run.metrics())[-1:]), default=0)

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written, and has begun to be."""
        with suppress(FileNotFoundError):  # renamed into place under the look
            return any(files_under(folder) for folder in unfinished_folders(self.run.checkpoints))
        return False

    def largest_file(self) -> Path:
        """Of the newest checkpoint."""
        checkpoint, _ = newest_valid(self.run.checkpoints)
        assert checkpoint is not None, "faults hit only what has saved"
        return max(files_under(checkpoint.path), key=lambda path: path.stat().st_size)


def is_checkpoint(event: dict[str, Any]) -> bool:
    return bool(event["event"] == "checkpoint")


def cut_in_half(file: Path) -> None:
    """As a file system may leave it that has lost power."""
    os.truncate(file, file.stat().st_size // 2)


def processes_of(run: RunFolder) -> list[int]:
    """The processes of the run's block: children of this one. Data loading workers are children of theirs."""
    return [
        int(folder.name)
        for folder in Path("/proc").iterdir()
        if folder.name.isdigit() and parent_of(folder) == os.getpid() and os.fsencode(run.path) in words_of(folder)
    ]


def parent_of(process: Path) -> int | None:
    stat = stat_of(process)
    return int(stat[1]) if stat else None


def words_of(process: Path) -> list[bytes]:
    """The command line of a process, by its folder in /proc."""
    try:
        return (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def stat_of(process: Path) -> list[str]:
    """State, parent and what else /proc tells; nothing where the process is gone."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def send(processes: Sequence[int], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):  # it has ended meanwhile, which the events will show
            os.kill(process, number)


def hold(processes: Sequence[int]) -> None:
    """Stop processes where they are; returns when they do stand still."""
    send(processes, signal.SIGSTOP)
    while any(stat[:1] not in (["T"], ["Z"], []) for stat in map(stat_of, map(folder_of, processes))):
        time.sleep(0.001)


def folder_of(process: int) -> Path:
    return Path("/proc", str(process))


def limit_files(processes: Sequence[int], num_bytes: int) -> None:
    """Have every write of the processes fail that would make a file longer than that."""
    for process in processes:
        with suppress(ProcessLookupError):
            _, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
            resource.prlimit(process, resource.RLIMIT_FSIZE, (num_bytes, hard))


def outcome_of(strike: Strike, events: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]]) -> FaultOutcome:
    """What the run's events and metrics say of a fault."""
    starts = [event["time"] for event in events if event["event"] == "job_start" and event["time"] > strike.at_s]
    next_start_s, after_that_s = [*starts, float("inf"), float("inf")][:2]
    hit = [event for event in events if strike.block_started_s <= event["time"] < next_start_s]
    resumed = [event for event in events if next_start_s <= event["time"] < after_that_s]
    is_signal = strike.fault in ("SIGTERM", "SIGUSR2")
    saved_s = [event["time"] for event in hit if is_checkpoint(event) and event["time"] >= strike.at_s and is_signal]
    trained_s = [line["time"] for line in metrics if line["time"] >= next_start_s]
    return FaultOutcome(
        fault=strike.fault,
        step=strike.step,
        steps_again=strike.done_step - strike.kept_step,
        seconds_to_checkpoint=round(saved_s[0] - strike.at_s, 3) if saved_s else None,
        seconds_to_training=round(trained_s[0] - strike.at_s, 3) if trained_s else None,
        not_hit=why_not_hit(strike, hit, resumed),
    )


def why_not_hit(strike: Strike, hit: Sequence[dict[str, Any]], resumed: Sequence[dict[str, Any]]) -> str | None:
    """Why a fault proves nothing, from the events of the block it was meant for and of the next start."""
    ended_by_itself = any(event["event"] in ("job_end", "error") for event in hit)
    match strike.fault:
        case "SIGTERM" | "SIGUSR2":
            stopped = any(event["event"] == "stop_signal" and event["signal"] == strike.fault for event in hit)
            return None if stopped else "the block did not end by the signal"
        case "SIGKILL in a step":
            return "the block had ended by itself" if ended_by_itself else None
        case "SIGKILL while saving":
            if ended_by_itself or not strike.damaged:
                return "no half-written checkpoint was left behind"
            return None
        case "half-written checkpoint":
            passed_over = [reason for event in resumed if event["event"] == "resumed" for reason in event["rejected"]]
            told = any(reason.startswith(strike.damaged) for reason in passed_over)
            return None if told else "the next block did not say that it passed the damaged checkpoint over"
        case "full disk":
            failed = any(event["event"] == "error" and "could not be written" in event["message"] for event in hit)
            return None if failed else "the block did not fail to save"
