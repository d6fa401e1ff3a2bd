"""./train.sh extend: go on training a run beyond the horizon that its learning rate was planned for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

from jobs.config import RunConfig, read_resolved_config
from jobs.job import open_run, stored_mixture
from jobs.launch import queued_jobs, store_config
from jobs.local import AlreadyRunningError, sole_owner
from jobs.ownership import is_alive
from jobs.preflight import CheckedRun, choose_cluster, local_world_size
from jobs.snapshot import read_manifest
from training.checkpoints import Checkpoint, newest_valid
from training.config import Extension, ExtensionPolicy, TrainingConfig
from training.owner import newest_ticket, read_ticket
from training.run_folder import RunFolder
from training.schedule import Horizon, chain_learning_rate

POLICIES: dict[ExtensionPolicy, str] = {
    "constant": "the added blocks train at the learning rate that the old horizon ends with",
    "rewarm": "a linear warmup leads back to training.lr, and training.lr_scheduler runs again over the added blocks",
    "stretch": "from here on training.lr_scheduler runs as if the horizon had been the longer one from the beginning",
}


def extend_parser() -> argparse.ArgumentParser:
    """The command line of the verb. There is no default policy: each one trains another model."""
    policies = "\n".join(f"  {name:10}{meaning}" for name, meaning in POLICIES.items())
    parser = argparse.ArgumentParser(
        prog="./train.sh extend",
        description=f"go on training a run beyond its horizon\n\nlearning rate policies:\n{policies}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", help="a run, or the path of its folder")
    parser.add_argument("--jobs", type=int, required=True, help="blocks to add, of training.epochs_per_job epochs each")
    parser.add_argument("--lr-policy", choices=list(POLICIES), required=True, help="how the learning rate goes on")
    return parser


def extend_run(run: RunFolder, *, jobs: int, lr_policy: ExtensionPolicy, report: Callable[[str], None]) -> CheckedRun:
    """Record the extension in the run's settings, take its DONE away, and return the longer run.

    Raises:
        ValueError: the extension makes no sense for this run.
        AlreadyRunningError: jobs of the run are queued or running, or another command works on it.
        SlurmError: jobs were submitted, and Slurm does not say whether they still are there.
    """
    with sole_owner(run):
        refuse_live_jobs(run, report)
        config = read_resolved_config(run.config)
        refuse_other_world_size(run, config)
        checkpoint, _ = newest_valid(run.checkpoints)
        if checkpoint is None:
            raise ValueError(
                f"run {run.path.name} has no checkpoint yet, so nothing of it can be extended; "
                "start it anew under another name with more training.total_jobs"
            )
        extension = plan_extension(config.training, checkpoint, jobs=jobs, lr_policy=lr_policy)
        training = replace(config.training, extensions=[*config.training.extensions, extension])
        # DONE goes first: a command that is cut off here has extended nothing, and can be given again.
        run.done.unlink(missing_ok=True)
        store_config(run, replace(config, training=training))
        record_extension(run, config.training, training, checkpoint, report)
    return stored_run(run)


def refuse_live_jobs(run: RunFolder, report: Callable[[str], None]) -> None:
    jobs = sorted(queued_jobs(run, report), key=lambda job: int(job.id))
    if jobs:
        named = ", ".join(f"{job.id} ({job.state.lower()})" for job in jobs)
        raise AlreadyRunningError(
            f"run {run.path.name} still has jobs: {named}. They train to the old horizon; extend it when they have "
            "ended, or end them first (scancel)"
        )
    owner = newest_ticket(run.path)
    if owner is not None and is_alive(owner):
        raise AlreadyRunningError(f"run {run.path.name} is being trained by {read_ticket(owner)}; extend it afterwards")


def refuse_other_world_size(run: RunFolder, config: RunConfig) -> None:
    """Raise ValueError where the chain could not go on here, before anything is recorded."""
    before, now = read_manifest(run.manifest)["world_size"], world_size(config)
    if before != now:
        raise ValueError(f"run {run.path.name} was trained by {before} processes, and here it would be {now}")


def world_size(config: RunConfig) -> int:
    return config.slurm.world_size if choose_cluster(config.cluster) == "slurm" else local_world_size(config, [])


def plan_extension(
    training: TrainingConfig, checkpoint: Checkpoint, *, jobs: int, lr_policy: ExtensionPolicy
) -> Extension:
    """What to record for a chain that has come as far as the checkpoint. Raises ValueError where it makes no sense."""
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {jobs}")
    horizon = Horizon.of_chain(training, checkpoint)
    end = horizon.total_steps
    if lr_policy == "constant" and not chain_learning_rate(end, peak=training.lr, training=training, horizon=horizon):
        raise ValueError(
            f"--lr-policy constant: the learning rate of this run ends at 0 ({training.optimization}), and nothing is "
            "learned at 0. Use rewarm to warm up to training.lr again, or stretch to follow the longer schedule"
        )
    added_steps = jobs * horizon.block_steps
    if lr_policy == "rewarm" and training.warmup_steps(added_steps) >= added_steps:
        raise ValueError(
            f"--lr-policy rewarm: the warmup of {training.warmup_steps(added_steps)} steps (training.warmup) is not "
            f"over before the {added_steps} added steps are; give more --jobs"
        )
    # Another schedule can begin at once; the others begin where the old one ends.
    return Extension(jobs=jobs, lr_policy=lr_policy, from_step=checkpoint.step if lr_policy == "stretch" else end)


def record_extension(
    run: RunFolder,
    before: TrainingConfig,
    after: TrainingConfig,
    checkpoint: Checkpoint,
    report: Callable[[str], None],
) -> None:
    """Tell the user and the run's events what was decided, and how the learning rate goes over the seam."""
    old, new = Horizon.of_chain(before, checkpoint), Horizon.of_chain(after, checkpoint)
    extension = after.extensions[-1]
    step = extension.from_step
    old_rate = chain_learning_rate(step, peak=before.lr, training=before, horizon=old)
    new_rate = chain_learning_rate(step, peak=after.lr, training=after, horizon=new)
    run.record_event(
        "extended",
        jobs=extension.jobs,
        lr_policy=extension.lr_policy,
        from_step=step,
        horizon_steps=new.total_steps,
        old_learning_rate=old_rate,
        new_learning_rate=new_rate,
    )
    report(
        f"run {run.path.name} is extended from {old.epochs} to {new.epochs} epochs, {old.total_steps} to "
        f"{new.total_steps} steps; {extension.lr_policy}: {POLICIES[extension.lr_policy]}"
    )
    jump = f"jumps by {new_rate - old_rate:+.2e}" if new_rate != old_rate else "does not jump"
    report(f"at step {step} the learning rate {jump}: {old_rate:.2e} before, {new_rate:.2e} after")


def stored_run(run: RunFolder) -> CheckedRun:
    """The run as its folder describes it: the stored settings, with code and data modules from the snapshot."""
    context = open_run(run)
    return CheckedRun(
        config=context.config,
        module=context.module,
        mixture=stored_mixture(context),
        cluster=choose_cluster(context.config.cluster),
        world_size=world_size(context.config),
        notes=[],
    )


def with_stored_extensions(checked: CheckedRun) -> CheckedRun:
    """The run with the extensions that its folder records, so that running its file again goes on with them."""
    stored = RunFolder(checked.config.folder).config
    if checked.config.training.extensions or not stored.exists():
        return checked
    training = replace(checked.config.training, extensions=read_resolved_config(stored).training.extensions)
    return replace(checked, config=replace(checked.config, training=training))
