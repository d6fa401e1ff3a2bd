"""Keeping a chain supplied from inside its jobs: `python -m jobs.top_up RUN_FOLDER` submits what it still lacks.

On clusters that limit the jobs of a user, the rest of a chain follows this way; and where a block ended before its
boundary, the block that makes up for it. Start it as a child of the job, and let it end before the job does.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from jobs.chain import Journal
from jobs.config import read_resolved_config
from jobs.failures import newest_step
from jobs.launch import remaining_jobs
from jobs.local import AlreadyRunningError, sole_owner
from jobs.queue import RefusedError, SlurmError
from jobs.snapshot import read_manifest
from jobs.standstill import stands_still
from jobs.submission import ChainSubmission, Outcome
from mixture.prepare import PreparedData, prepared_folder
from training.checkpoints import NoValidCheckpointError
from training.run_folder import RunFolder

OF_THE_JOB = ("SLURM", "SUBMITIT_", "PMI")
OF_THE_PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

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
    data = prepared_folder(config.data_folder, read_manifest(run.manifest)["data_key"])
    with sole_owner(run, patience_s=PATIENCE_S):
        needed = remaining_jobs(run, config.training, prepared=PreparedData.open(data) is not None)
        submission = ChainSubmission(
            run=run, run_name=config.name, slurm=config.slurm, by_user=False, report=report, journal=Journal.open(run)
        )
        return submission.bring_about(needed)


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
    run = RunFolder(Path(*arguments))
    own_id = os.environ.get("SLURM_JOB_ID")
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
        if outcome.queued[-1].id != own_id:
            return 0
        time.sleep(SECONDS_BETWEEN_TRIES)


def tell(line: str) -> None:
    """One line into the job's log."""
    print(f"top-up: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
