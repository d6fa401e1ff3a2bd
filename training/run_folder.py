"""The run folder: where everything about one run lies, and the logs that its jobs append to.

config.yaml     resolved config              events.jsonl   what every job did
manifest.json   versions, git state, data    metrics.jsonl  loss and speed, a line per logging step
code/           snapshot the jobs run        logs/          one file per job
chain.json      journal of submissions       checkpoints/   resume points
evaluation.json scores of the last job       export/        the trained model
DONE            the chain has finished       HALT           a job found an error that a retry cannot cure
STOP            the user asked the chain to end
CAPTURE         only the teacher's cache is wanted of the run so far
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

NEWEST_METRICS_BYTES = 64 * 1024


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run, and its append-only logs."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def chain(self) -> Path:
        return self.path / "chain.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def done(self) -> Path:
        return self.path / "DONE"

    @property
    def halt(self) -> Path:
        return self.path / "HALT"

    @property
    def stop(self) -> Path:
        return self.path / "STOP"

    @property
    def capture_only(self) -> Path:
        return self.path / "CAPTURE"

    def record_event(self, event: str, **details: Any) -> None:
        """Append one line to events.jsonl: time, job, what happened."""
        host = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
        job = {"job": own_job_id(), "host": host}
        append_line(self.path / "events.jsonl", {"time": time.time(), "event": event, **job, **details})

    def record_metrics(self, **metrics: Any) -> None:
        """Append one line to metrics.jsonl. After a crash a step can appear twice; the last line counts."""
        append_line(self.path / "metrics.jsonl", {"time": time.time(), **metrics})

    def events(self) -> Iterator[dict[str, Any]]:
        """The events so far, oldest first."""
        return read_lines(self.path / "events.jsonl")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The metrics so far, oldest first."""
        return read_lines(self.path / "metrics.jsonl")

    def newest_metrics(self) -> list[dict[str, Any]]:
        """The last few hundred metrics, oldest first, whatever the length of the run."""
        return read_last_lines(self.path / "metrics.jsonl", max_bytes=NEWEST_METRICS_BYTES)


def own_job_id() -> str | None:
    """Slurm's id of the job that this process belongs to, as 12_3 for a task of an array; None outside of Slurm.

    Slurm has a plain id for each task too, but that of the last one is the whole array's.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON line with a single write, so that lines of several jobs never mix."""
    descriptor = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        os.write(descriptor, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines of a log; a torn last line of a killed writer is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                yield orjson.loads(line)
            except orjson.JSONDecodeError:
                continue


def read_last_lines(path: Path, *, max_bytes: int) -> list[dict[str, Any]]:
    """The whole JSON lines within the last `max_bytes` of a log."""
    if not path.exists():
        return []
    offset = max(0, path.stat().st_size - max_bytes)
    with path.open("rb") as file:
        file.seek(max(0, offset - 1))
        content = file.read()
    if offset:  # a line that began before is left out
        content = content[content.find(b"\n") + 1 :]
    whole = content[: content.rfind(b"\n") + 1]
    return [orjson.loads(line) for line in whole.splitlines()]


def read_new_lines(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines that were appended after byte `offset`, and the offset to go on from."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return [orjson.loads(line) for line in whole.splitlines()], offset + len(whole)
