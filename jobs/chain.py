"""The chain of one run: which jobs it needs, which were submitted, and how far training has come."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mixture.whole_files import write_whole
from training.run_folder import RunFolder

JobKind = Literal["prepare", "capture", "block", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class ArrayShape:
    """How many tasks a job has, and how many GPUs each of them."""

    tasks: int = 1
    gpus: int = 1


ONE_JOB = ArrayShape()


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

    released: bool = False
    """Whether it may start; until its whole submission is known to have arrived it is held."""

    tasks: int = 1
    """Tasks of the Slurm array that it is, which do the same work side by side; 1: no array."""

    gpus: int = 1
    """Of each task; a block has those that the settings give it."""

    is_spread: bool = False
    """Whether it is a process per GPU on all nodes of the run, as a block always is; others are one process in all."""


@dataclass
class Journal:
    """chain.json: the jobs of a run in their order, written before and after each sbatch.

    Jobs that are not released yet, at its end, belong to a submission that goes on or was cut off.
    """

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

    def owns(self, job_name: str) -> bool:
        """Whether a job of this name belongs to the run, even one that the journal forgot."""
        return re.fullmatch(rf"baton-.*-{self.run_id}-[a-z]+-\d+", job_name) is not None

    def record(self, *jobs: ChainJob) -> None:
        """Replace what is known of the jobs of these names."""
        known = {job.name: job for job in jobs}
        self.write([known.get(job.name, job) for job in self.jobs])

    def plan(self, jobs: Sequence[ChainJob]) -> None:
        """Make these the jobs that are to be submitted and released, in this order, behind those released already."""
        self.write([job for job in self.jobs if job.released] + list(jobs))

    def write(self, jobs: list[ChainJob]) -> None:
        if jobs != self.jobs:
            content: dict[str, Any] = {"run_id": self.run_id, "jobs": [asdict(job) for job in jobs]}
            write_whole(self.path, json.dumps(content, indent=2).encode() + b"\n", synced=True)
            self.jobs = jobs

    def plan_of(
        self,
        kinds: Sequence[JobKind],
        run_name: str,
        capture: ArrayShape = ONE_JOB,
        *,
        spreads_evaluation: bool = False,
    ) -> list[ChainJob]:
        """A job for each kind, in order: one that is not released yet where there is one, else a new one."""
        spare = [job for job in self.jobs if not job.released]
        plan: list[ChainJob] = []
        for kind in kinds:
            job = next((job for job in spare if job.kind == kind), None)
            if job is None:
                name = next_name(self.run_id, run_name, kind, [*self.jobs, *plan])
                shape = capture if kind == "capture" else ONE_JOB
                is_spread = kind == "evaluate" and spreads_evaluation
                job = ChainJob(kind=kind, name=name, tasks=shape.tasks, gpus=shape.gpus, is_spread=is_spread)
            else:
                spare.remove(job)
            plan.append(job)
        return plan


def next_name(run_id: str, run_name: str, kind: JobKind, jobs: Sequence[ChainJob]) -> str:
    """A job name that none of these jobs has."""
    numbers = [int(job.name.rpartition("-")[2]) for job in jobs if job.kind == kind]
    return f"baton-{run_name}-{run_id}-{kind}-{max(numbers, default=0) + 1}"


def jobs_needed(*, prepared: bool, captured: bool, blocks_left: int, evaluated: bool) -> list[JobKind]:
    """The jobs that an empty queue would need to finish the run, in order."""
    preparation: list[JobKind] = [] if prepared else ["prepare"]
    if not captured:
        preparation.append("capture")
    blocks: list[JobKind] = ["block"] * blocks_left
    evaluation: list[JobKind] = [] if evaluated else ["evaluate"]
    return preparation + blocks + evaluation


def jobs_to_submit(needed: list[JobKind], queued: list[JobKind]) -> list[JobKind]:
    """What to add behind the jobs that are queued or running already.

    An evaluation that would run before blocks, queued or still missing, is followed by another one after them. Nothing
    is captured behind blocks: they capture what is missing themselves before they train.
    """
    missing: list[JobKind] = []
    waiting = list(queued)
    for kind in needed:
        if kind == "capture" and "block" in queued:
            continue
        in_place = kind in waiting if kind != "evaluate" else not missing and queued[-1:] == ["evaluate"]
        if in_place:
            waiting.remove(kind)
        else:
            missing.append(kind)
    return missing


def ending_jobs(events: Iterable[dict[str, Any]]) -> set[str]:
    """Ids of the jobs that have done all they will do, though some may not have left yet."""
    ending: set[str] = set()
    for event in events:
        match event["event"]:
            case "job_start":  # again under the same id, where Slurm requeued it
                ending.discard(event["job"])
            case "block_end" | "job_end":
                ending.add(event["job"])
    return ending
