"""The chain of one run: which jobs it needs, which were submitted, and how far training has come."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mixture.whole_files import write_whole
from training.run_folder import RunFolder

JobKind = Literal["prepare", "block", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class ChainJob:
    """One job of the chain. Blocks carry no number: each one trains from the newest checkpoint to the next boundary."""

    kind: JobKind
    name: str
    """Job name, unique over all submissions of all runs, so that a job can be found by it."""

    id: str | None = None
    """Slurm's id; None while the submission's answer is outstanding."""

    after: str | None = None
    """Id of the job that this one waits for."""


@dataclass
class Journal:
    """chain.json: every submission of a run, written before and after each sbatch."""

    path: Path
    run_id: str
    jobs: list[ChainJob] = field(default_factory=list)

    @classmethod
    def open(cls, run: RunFolder) -> Journal:
        """The run's journal; a new one where nothing was submitted yet."""
        if not run.chain.exists():
            return cls(run.chain, uuid.uuid4().hex[:8])
        content = json.loads(run.chain.read_text(encoding="utf-8"))
        return cls(run.chain, content["run_id"], [ChainJob(**job) for job in content["jobs"]])

    def record(self, job: ChainJob) -> None:
        """Add a job, or replace what is known of the job of that name."""
        self.jobs = [known for known in self.jobs if known.name != job.name] + [job]
        content: dict[str, Any] = {"run_id": self.run_id, "jobs": [asdict(job) for job in self.jobs]}
        write_whole(self.path, json.dumps(content, indent=2).encode() + b"\n", synced=True)

    def next_name(self, run_name: str, kind: JobKind) -> str:
        """A job name that this run has not used yet."""
        count = sum(job.kind == kind for job in self.jobs) + 1
        return f"baton-{run_name}-{self.run_id}-{kind}-{count}"


def jobs_needed(*, prepared: bool, blocks_left: int, evaluated: bool) -> list[JobKind]:
    """The jobs that an empty queue would need to finish the run, in order."""
    preparation: list[JobKind] = [] if prepared else ["prepare"]
    blocks: list[JobKind] = ["block"] * blocks_left
    evaluation: list[JobKind] = [] if evaluated else ["evaluate"]
    return preparation + blocks + evaluation


def jobs_to_submit(needed: list[JobKind], queued: Collection[JobKind]) -> list[JobKind]:
    """What to add behind the jobs that are queued or running already.

    An evaluation that would run before blocks still missing is followed by another one after them.
    """
    missing: list[JobKind] = []
    waiting = list(queued)
    for kind in needed:
        if kind in waiting and not (kind == "evaluate" and missing):
            waiting.remove(kind)
        else:
            missing.append(kind)
    return missing
