"""Showing a run while it goes: a moving bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.run_folder import RunFolder, read_new_lines

POLL_S = 0.3
SECONDS_BETWEEN_PLAIN_LINES = 10.0


class RunWatcher:
    """Follows a run's events and metrics from where they stand now."""

    def __init__(self, run: RunFolder, console: Console) -> None:
        self.run = run
        self.console = console
        self.offsets = {name: size_of(run, name) for name in ("events.jsonl", "metrics.jsonl")}
        self.last_plain_line_s = 0.0

    def watch(self, ended: Callable[[], bool]) -> None:
        """Show what happens until `ended()` says that there is nothing left to watch."""
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("training", total=None, numbers="")
            while True:
                last_round = ended()
                for event in self.new_lines("events.jsonl"):
                    if text := describe_event(event):
                        self.console.print(text, highlight=False)
                for metrics in self.new_lines("metrics.jsonl"):
                    bar.update(
                        task, completed=metrics["step"], total=metrics["horizon_steps"], numbers=numbers_of(metrics)
                    )
                    self.print_plain(metrics)
                if last_round:
                    return
                time.sleep(POLL_S)

    def new_lines(self, name: str) -> list[dict[str, Any]]:
        lines, self.offsets[name] = read_new_lines(self.run.path / name, self.offsets[name])
        return lines

    def print_plain(self, metrics: dict[str, Any]) -> None:
        if self.console.is_terminal or time.time() - self.last_plain_line_s < SECONDS_BETWEEN_PLAIN_LINES:
            return
        self.last_plain_line_s = time.time()
        self.console.print(
            f"step {metrics['step']} of {metrics['horizon_steps']}  {numbers_of(metrics)}", highlight=False
        )


def size_of(run: RunFolder, name: str) -> int:
    path = run.path / name
    return path.stat().st_size if path.exists() else 0


def numbers_of(metrics: dict[str, Any]) -> str:
    """Loss, learning rate and speed in one short text."""
    parts = [f"loss {metrics['loss']:.4f}", f"lr {metrics['lr']:.2e}"]
    if "reward" in metrics:
        parts.insert(0, f"reward {metrics['reward']:.4f}")
    if metrics.get("tokens_per_s"):
        parts.append(f"{metrics['tokens_per_s']:,.0f} tokens/s")
    return "  ".join(parts)


def describe_event(event: dict[str, Any]) -> str | None:
    """The event as a line for people; None for those that only matter to programs."""
    match event["event"]:
        case "job_start":
            return f"{event['kind']} starts" + (f" as job {event['job']} on {event['host']}" if event["job"] else "")
        case "resumed":
            resumed = f"  resumed from step {event['step']}"
            if "split" not in event:
                return resumed
            return f"{resumed} with {event['split']} a step, before {event['split_before']}: sums round otherwise now"
        case "block_end":
            loss, reward = event.get("eval_loss"), event.get("eval_reward")
            told = f", test loss {loss:.4f}" if loss else f", test reward {reward:.4f}" if reward is not None else ""
            return f"  block {event['block']} ends at step {event['step']}{told}"
        case "job_end":
            outcome = "done" if event["exit_code"] == 0 else f"ended with exit code {event['exit_code']}"
            return f"{event['kind']} {outcome} after {event['seconds']:.0f} s"
        case "error":
            return f"error: {event['message']}"
    return None


def console_for_messages() -> Console:
    """Standard output; a log gets long lines whole and tables as wide as they need."""
    return Console() if sys.stdout.isatty() else Console(soft_wrap=True, width=160)
