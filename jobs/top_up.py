"""Keeping a chain supplied from inside its jobs: `python -m jobs.top_up RUN_FOLDER` submits what it still lacks.

On clusters that limit the jobs of a user, the rest of a chain follows this way; and where a block ended before its
boundary, the block that makes up for it.

Start it as a child of the job. It takes seconds, but where a limit leaves nothing behind this job it goes on trying;
SIGTERM or SIGUSR2 ends that, never a submission half way, so a job that ends sends one and waits.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from jobs.config import read_resolved_config
from jobs.failures import newest_step
from jobs.launch import submit_chain
from jobs.local import AlreadyRunningError, sole_owner
from jobs.queue import RefusedError, SlurmError
from jobs.snapshot import read_manifest
from jobs.standstill import stands_still
from jobs.submission import Outcome
from training.checkpoints import NoValidCheckpointError
from training.run_folder import RunFolder, own_job_id

OF_THE_JOB = ("SLURM", "SUBMITIT_", "PMI")
OF_THE_PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

SIGNALS_TO_LEAVE = (signal.SIGTERM, signal.SIGUSR2)

PATIENCE_S = 900.0
SECONDS_BETWEEN_TRIES = 60.0


def outside_of_job(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what Slurm and submitit set for this job, which sbatch would take for options."""
    return {
        name: value
        for name, value in environment.items()
        if name == "SLURM_CONF" or not (name.startswith(OF_THE_JOB) or name in OF_THE_PROCESS)
    }


def top_up(run: RunFolder, report: Callable[[str], None]) -> Outcome:
    """Submit what the chain lacks beyond the jobs queued or running, this one among them.

    Raises:
        RefusedError: Slurm takes no job from here.
        SlurmError: it does not answer.
        AlreadyRunningError: another process kept submitting for this run.
        NoValidCheckpointError: there are checkpoints, and none to go on from.
    """
    config = read_resolved_config(run.config)
    data_key = read_manifest(run.manifest)["data_key"]
    with sole_owner(run, patience_s=PATIENCE_S):
        return submit_chain(run, config, data_key, report, by_user=False)


def reason_to_add_nothing(run: RunFolder) -> str | None:
    """Why the chain is to get no further jobs, where that is so."""
    for file in (run.done, run.stop, run.halt):
        if file.exists():
            return f"the run has a {file.name} file"
    if not run.chain.exists():
        return "the run was not submitted through Slurm"
    if shutil.which("sbatch") is None:
        return "this node has no sbatch; what is queued trains on, then run the file again where there is one"
    step = newest_step(run)
    if stands_still(run.events(), step):
        return f"the last blocks made no new checkpoint after step {step}; see logs/"
    return None


def main(arguments: list[str]) -> int:
    """Top up the chain of one run; at a limit with nothing behind this job, try until there is room."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_TO_LEAVE)
    run = RunFolder(Path(*arguments))
    own_id = (own_job_id() or "").partition("_")[0]
    environment = outside_of_job(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    while True:
        reason = reason_to_add_nothing(run)
        if reason is not None:
            tell(f"adds nothing: {reason}")
            return 0
        try:
            outcome = top_up(run, tell)
        except RefusedError as error:
            tell(str(error))
            return 0
        except (SlurmError, AlreadyRunningError, NoValidCheckpointError) as error:
            tell(f"error: {error}")
            return 1
        if outcome.limit is None:
            return 0
        tell(
            f"Slurm takes no more jobs of this user now ({outcome.limit}); {len(outcome.queued)} of the chain are there"
        )
        has_successor = outcome.queued[-1].id != own_id
        if has_successor or signal.sigtimedwait(SIGNALS_TO_LEAVE, SECONDS_BETWEEN_TRIES) is not None:
            return 0


def tell(line: str) -> None:
    """One line into the job's log."""
    print(f"top-up: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
