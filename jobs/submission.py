"""Submitting what a chain lacks, so that nothing that happens to us or to Slurm loses, doubles or reorders a job.

Every job is submitted held: a dependency on a job that the controller has forgotten counts as satisfied. The call looks
what Slurm has, changes what differs from the plan, waits until the controller has stored it, and looks again. Jobs are
released when a look has found nothing to change. The same call after an interruption finishes what was begun.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from jobs.chain import ONE_JOB, ArrayShape, ChainJob, JobKind, Journal, ending_jobs, jobs_to_submit
from jobs.config import SlurmConfig
from jobs.queue import NoAnswerError, QueuedJob, RefusedError, SlurmError, call, known_jobs, patiently
from jobs.slurm import adopt, dependency_on, submit
from training.run_folder import RunFolder

SETTLE_S = 6.0
"""The controller stores its state up to 5 s after a change; what it was told later dies with it."""

AFTER_SILENCE_S = 3.0
"""A controller that answers again works off what waited at its door, perhaps a submission among it."""

AFTER_REFUSAL_S = 1.0
MAX_TRIES = 5
MAX_ROUNDS = 20
RUN_AGAIN = "Run the same command again: it finishes what was begun and submits nothing twice."


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a submission ended."""

    queued: list[ChainJob]
    """All jobs of the chain that are queued or running, in order."""

    untouched: bool
    """Whether everything was in place already."""

    limit: str | None
    """The limit on submitted jobs that keeps the rest out for now, in Slurm's words."""


@dataclass(kw_only=True)
class ChainSubmission:
    """One call that brings the run's jobs in Slurm in line with what the run needs."""

    run: RunFolder
    run_name: str
    slurm: SlurmConfig
    by_user: bool
    """Whether a person asked for it, who then wants jobs that were held by hand to go on too."""

    report: Callable[[str], None]
    journal: Journal
    capture: ArrayShape = ONE_JOB
    """The array that captures the teacher."""

    spreads_evaluation: bool = False
    """Whether the evaluation has as many processes as a block."""

    untouched: bool = True
    changed_at_s: float = field(default_factory=time.monotonic)
    """When Slurm was last told something; at first now, since a call before this one may just have been cut off."""

    refused: RefusedError | None = None
    room: int | None = None
    """How many jobs of the plan Slurm took before it refused one."""

    def bring_about(self, needed: Callable[[], list[JobKind]]) -> Outcome:
        """Submit what the queue lacks of `needed()`, each job after the one before; return once all may start.

        What is needed is asked before every look, since jobs end meanwhile.

        Raises:
            RefusedError: Slurm does not want a job; what it accepted before is released and in the journal.
            SlurmError: the controller stayed away, or somebody ends the run meanwhile.
        """
        for _ in range(MAX_ROUNDS):
            self.refuse_where_stopped()
            kinds_needed = needed()
            jobs = self.look()
            queued = [job for job in self.journal.jobs if job.released and is_live(job, jobs)]
            kinds = jobs_to_submit(kinds_needed, self.kinds_to_come(queued, jobs))
            if self.take_back_evaluation(kinds, queued, jobs):
                continue
            plan = self.plan(kinds, jobs)
            changed = (
                self.cancel_surplus(queued + plan, jobs)
                or self.submit_missing(queued, plan)
                or self.mend_dependencies(queued + plan, jobs)
                or (plan and self.settle())
                or self.release(queued + plan, jobs)
            )
            if not changed:
                self.journal.record(*(replace(job, released=True) for job in plan))
                return self.outcome(queued + plan, missing=kinds[len(plan) :])
        raise SlurmError(f"Slurm does not have the chain as it should be, even after {MAX_ROUNDS} looks. {RUN_AGAIN}")

    def refuse_where_stopped(self) -> None:
        """Raise SlurmError where somebody ends the run: what it has in the queue is theirs to cancel."""
        if self.run.stop.exists():
            raise SlurmError(f"nothing more is submitted: {self.run.stop.read_text().strip()}")

    def look(self) -> dict[str, QueuedJob]:
        """The run's jobs in Slurm by id, those that ended lately among them; the journal learns what it missed."""
        jobs = {job.id: job for job in patiently(lambda: known_jobs(self.journal), self.report)}
        for job in self.journal.jobs:
            found = None if job.released else own_job(job, jobs)
            if found is not None:
                if found.id != job.id:
                    adopt(job, found.id, self.run, self.slurm)
                self.journal.record(replace(job, id=found.id, released=not found.waits))
        return jobs

    def kinds_to_come(self, queued: list[ChainJob], jobs: dict[str, QueuedJob]) -> list[JobKind]:
        """What the queue will still do. A job whose work is done may stay in it for some time."""
        ending = ending_jobs(self.run.events())
        shown = [(job, jobs[str(job.id)]) for job in queued]
        return [
            job.kind
            for job, found in shown
            if any(task.waits or not (task.is_leaving or task.id in ending) for task in live_tasks(found))
        ]

    def take_back_evaluation(self, kinds: list[JobKind], queued: list[ChainJob], jobs: dict[str, QueuedJob]) -> bool:
        """Hold an evaluation that waits where blocks are still missing, so that it can come after them."""
        last = queued[-1] if queued else None
        if last is None or last.kind != "evaluate" or "block" not in kinds or not jobs[str(last.id)].waits:
            return False
        self.journal.record(replace(last, released=False))
        self.tell("scontrol", "uhold", str(last.id))
        return True

    def plan(self, kinds: list[JobKind], jobs: dict[str, QueuedJob]) -> list[ChainJob]:
        """The jobs to submit and release, journalled before anything is done; with ids where Slurm has them."""
        plan = self.journal.plan_of(kinds, self.run_name, self.capture, spreads_evaluation=self.spreads_evaluation)
        lost = [job for job in plan if job.id is not None and not is_live(job, jobs)]
        if lost:
            self.report(f"Slurm has lost {len(lost)} of the jobs that it accepted; submitting them again")
            self.refused = self.room = None
        plan = [replace(job, id=None, after=None) if job in lost else job for job in plan][: self.room]
        self.journal.plan(plan)
        return plan

    def cancel_surplus(self, order: list[ChainJob], jobs: dict[str, QueuedJob]) -> bool:
        """Cancel what waits under the run's names without a place in its order: doubles, and what is not needed now."""
        wanted = {job.id for job in order}
        surplus = [job.id for job in jobs.values() if job.waits and job.id not in wanted]
        if surplus:
            self.report(f"cancelling what was never released and is not needed: {', '.join(surplus)}")
            self.tell("scancel", *surplus)
            self.refused = self.room = None
        return bool(surplus)

    def submit_missing(self, queued: list[ChainJob], plan: list[ChainJob]) -> bool:
        """Submit each planned job that Slurm does not have; returns whether there was any."""
        previous = queued[-1].id if queued else None
        for accepted, planned in enumerate(plan):
            job = planned
            if job.id is None:
                self.refuse_where_stopped()
                try:
                    job = self.submit_surely(replace(job, after=previous))
                except RefusedError as error:
                    self.refused, self.room = error, accepted
                    return True
                self.journal.record(job)
                side_by_side = f" of {job.tasks} tasks" if job.tasks > 1 else ""
                after = f", after {previous}" if previous else ""
                self.report(f"submitted {job.kind} as job {job.id}{side_by_side}{after}")
            previous = job.id
        return any(job.id is None for job in plan)

    def submit_surely(self, job: ChainJob) -> ChainJob:
        """Submit one job, once, although Slurm may not answer; returns it with its id.

        Raises:
            RefusedError: Slurm does not want it.
            SlurmError: the controller stayed away.
        """
        self.untouched = False
        for _ in range(MAX_TRIES):
            try:
                return replace(job, id=submit(job, self.run, self.slurm))
            except NoAnswerError as error:
                self.report(f"no answer to the submission of {job.name} ({error}); finding out whether Slurm has it")
            finally:
                self.changed_at_s = time.monotonic()
            patiently(lambda: known_jobs(self.journal), self.report)
            time.sleep(AFTER_SILENCE_S)
            jobs = patiently(lambda: known_jobs(self.journal), self.report)
            found = own_job(job, {job.id: job for job in jobs})
            if found is not None:
                adopt(job, found.id, self.run, self.slurm)
                return replace(job, id=found.id)
        raise SlurmError(f"Slurm answered none of {MAX_TRIES} submissions of {job.name}. {RUN_AGAIN}")

    def mend_dependencies(self, order: list[ChainJob], jobs: dict[str, QueuedJob]) -> bool:
        """Have each waiting job wait for the one before it; returns whether one did not."""
        wrong = [
            (job, before)
            for before, job in itertools.pairwise([None, *order])
            if job is not None and jobs[str(job.id)].waits and not waits_for(jobs[str(job.id)], job, before)
        ]
        for job, before in wrong:
            after = before.id if before else None
            self.tell("scontrol", "update", f"JobId={job.id}", f"Dependency={dependency_on(after)}")
            self.journal.record(replace(job, after=after))
            self.changed_at_s = time.monotonic()
        return bool(wrong)

    def settle(self) -> bool:
        """Wait until the controller has stored what it was told; returns whether it had to be waited for."""
        rest_s = self.changed_at_s + SETTLE_S - time.monotonic()
        if rest_s <= 0:
            return False
        self.report(f"waiting {rest_s:.0f} s until Slurm has stored the jobs for sure; then they are released")
        time.sleep(rest_s)
        return True

    def release(self, order: list[ChainJob], jobs: dict[str, QueuedJob]) -> bool:
        """Release what is held, last first, so that the chain is whole when its first job starts.

        A controller that dies within seconds forgets this too, and holds the whole chain. A person sees that in the
        status and need not wait for it now; nobody is there to look after what a job submitted.
        """
        held = [str(job.id) for job in order if jobs[str(job.id)].is_held and (self.by_user or not job.released)]
        if held:
            self.tell("scontrol", "release", ",".join(reversed(held)))
            if not self.by_user:
                self.changed_at_s = time.monotonic()
        return bool(held)

    def tell(self, *command: str) -> None:
        """Have Slurm do something. Whether it did is seen by the next look, so a refusal is only passed on."""
        self.untouched = False
        try:
            call(*command)
        except SlurmError as error:
            self.report(f"{' '.join(command[:2])}: {error}")
            time.sleep(AFTER_REFUSAL_S)

    def outcome(self, queued: list[ChainJob], missing: list[JobKind]) -> Outcome:
        if self.refused is not None and not (self.refused.is_limit and queued):
            raise RefusedError(refusal(self.refused, queued, missing))
        limit = str(self.refused) if self.refused is not None else None
        return Outcome(queued=queued, untouched=self.untouched, limit=limit)


def own_job(job: ChainJob, jobs: dict[str, QueuedJob]) -> QueuedJob | None:
    """A job in Slurm by its name: that of the journalled id unless it was cancelled, else the first that is live.

    An id without our name is not ours: a controller that lost its state gives ids out again.
    """
    named = [found for found in jobs.values() if found.name == job.name]
    same = [found for found in named if found.id == job.id and found.state != "CANCELLED"]
    return min(same or [found for found in named if found.is_live], key=lambda found: int(found.id), default=None)


def is_live(job: ChainJob, jobs: dict[str, QueuedJob]) -> bool:
    """Whether Slurm has this very job queued or running."""
    found = jobs.get(str(job.id))
    return found is not None and found.name == job.name and found.is_live


def live_tasks(found: QueuedJob) -> list[QueuedJob]:
    """What is queued or running of a job: the tasks of an array, else the job itself."""
    return [task for task in found.tasks or (found,) if task.is_live]


def waits_for(found: QueuedJob, job: ChainJob, before: ChainJob | None) -> bool:
    """Whether a job's dependency is right; a first job that was released waits for whatever its user wants."""
    if before is None:
        return job.released or not found.dependencies
    return dependency_on(before.id) in found.dependencies


def refusal(error: Exception, queued: list[ChainJob], missing: list[JobKind]) -> str:
    kept = f"job{'s' if len(queued) > 1 else ''} {', '.join(str(job.id) for job in queued)} stay queued and will train"
    return (
        f"Slurm refused the next job ({missing[0]}): {error}. "
        f"{kept if queued else 'Nothing is queued'}; {len(missing)} more needed. "
        "Run the file again to add the rest; nothing is submitted twice."
    )
