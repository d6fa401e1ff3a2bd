"""Starting a run, or going on with it: make the run folder once, then submit the chain or run it here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import yaml

from jobs.capture_plan import gigabytes
from jobs.capturing import array_shape, is_captured, key_of_answers, key_of_cache, writes_answers
from jobs.chain import JobKind, Journal, jobs_needed
from jobs.config import PROJECT, RunConfig, read_resolved_config, resolved_values
from jobs.local import run_chain_here, sole_owner
from jobs.plan import Plan
from jobs.preflight import CheckedRun
from jobs.queue import QueuedJob, live_jobs, patiently
from jobs.snapshot import describe_environment, in_snapshot, read_manifest, snapshot_code, write_manifest
from jobs.submission import ChainSubmission, Outcome
from mixture.prepare import MIXTURE_MARKER, PreparedData, prepared_folder
from mixture.whole_files import write_whole
from settings.typed import changed_keys
from settings.yaml_tree import ConfigError, Problem
from training.checkpoints import Split, newest_valid, refusal_of_split
from training.run_folder import RunFolder
from training.schedule import Horizon

CHANGEABLE = (
    "cluster",
    "training.save_every",
    "evaluation.",
    "distillation.cache.tasks",
    "distillation.cache.gpus_per_task",
    *(
        f"{trainer}.answers.{key}"
        for trainer in ("distillation", "eagle3")
        for key in ("tasks", "gpus_per_task", "batch_size", "shard_rows")
    ),
    *(
        f"{section}.vllm.{key}"
        for section in ("finetuning.grpo", "finetuning.rloo", "distillation.answers", "eagle3.answers")
        for key in ("python", "gpu_memory_share")
    ),
    *(f"slurm.{key}" for key in ("partition", "time", "warning_s", "cpus_per_task", "mem", "account", "qos")),
    *(f"slurm.{key}" for key in ("constraint", "gpu_id", "setup", "extra")),
)
"""Settings that a run may change on the way: where it trains, when it saves, what it is scored on.
Its weights stay what they are."""

SPLIT_KEYS = ("training.batch_size", "training.gradient_accumulation", "slurm.nodes", "slurm.gpus_per_node")
"""Settings that split the rows of an optimizer step; they may change together where the steps stay the same."""

OTHER_COMMAND_S = 30.0
"""How long to wait for another command, or a job of the chain, that is making the run's folder or submitting."""


def open_run_folder(checked: CheckedRun, data_key: str, report: Callable[[str], None]) -> RunFolder:
    """The run's folder, made on the first call and compared on later ones.

    Raises:
        ConfigError: a run of that name has other settings or other data.
    """
    run = RunFolder(checked.config.folder)
    run.path.mkdir(parents=True, exist_ok=True)
    with sole_owner(run, patience_s=OTHER_COMMAND_S) if not run.manifest.exists() else nullcontext():
        if run.manifest.exists():
            compare_with_stored(run, checked, data_key)
        else:
            create_run_folder(run, checked, data_key, report)
    return run


def open_capture_folder(checked: CheckedRun, data_key: str, report: Callable[[str], None]) -> RunFolder:
    """The run's folder, for a chain of preparation and capture alone; running its file later adds the rest.

    Raises:
        ValueError: the whole run was started already.
        ConfigError: a run of that name has other settings or other data.
    """
    run = RunFolder(checked.config.folder)
    if run.manifest.exists() and not run.capture_only.exists():
        raise ValueError(
            f"run {run.path.name} was started as a whole and captures its teacher itself; run its file again to go on, "
            "or give the capture another --name"
        )
    run.path.mkdir(parents=True, exist_ok=True)
    run.capture_only.touch()
    return open_run_folder(checked, data_key, report)


def create_run_folder(run: RunFolder, checked: CheckedRun, data_key: str, report: Callable[[str], None]) -> None:
    """Snapshot code and settings; the manifest goes last, so an interrupted call is repeated in full."""
    shutil.rmtree(run.code, ignore_errors=True)
    too_large = snapshot_code(run.code, checked.module.path if checked.module else None)
    if too_large:
        report(f"left out of the code snapshot for their size: {', '.join(too_large)}")
    store_config(run, checked.config)
    facts = {
        **describe_environment(),
        "data_key": data_key,
        "cache_key": key_of_cache(checked.config, data_key),
        "answers_key": key_of_answers(checked.config, checked.rows),
        "module": module_facts(checked, run),
        "mixture": mixture_facts(checked, run),
        "world_size": checked.world_size,
        "working_folder": str(Path.cwd()),
        "project": str(PROJECT),
    }
    write_manifest(run.manifest, facts)


def module_facts(checked: CheckedRun, run: RunFolder) -> dict[str, str] | None:
    """Where jobs find the dataset module."""
    if checked.module is None:
        return None
    return {"path": str(in_snapshot(checked.module.path, run.code)), "function": checked.module.function}


def mixture_facts(checked: CheckedRun, run: RunFolder) -> dict[str, str] | None:
    """Where jobs find the mixture's recipe, if it has one, and its folder."""
    if checked.mixture is None:
        return None
    recipe = checked.config.dataset.mixture
    return {
        "recipe": str(in_snapshot(Path(recipe), run.code)) if recipe else "",
        "relative_to": str(checked.mixture.folder),
        "folder": str(checked.mixture.output_dir),
    }


def store_config(run: RunFolder, config: RunConfig) -> None:
    text = yaml.safe_dump(resolved_values(config), sort_keys=False, allow_unicode=True)
    header = f"# All settings of run {config.name}, defaults included; written by train.sh.\n"
    write_whole(run.config, (header + text).encode(), synced=True)


def compare_with_stored(run: RunFolder, checked: CheckedRun, data_key: str) -> None:
    """Refuse another training under the same name; take over settings that only ask for other machines."""
    # Through the settings of today: a key that has come since stands at its default.
    changes = changed_keys(resolved_values(read_resolved_config(run.config)), resolved_values(checked.config))
    refused = [change for change in changes if not change[0].startswith((*CHANGEABLE, *SPLIT_KEYS))]
    manifest = read_manifest(run.manifest)
    if not refused and manifest["data_key"] != data_key:
        refused.append(("the data (module, data files or tokenizer)", manifest["data_key"], data_key))
    if not refused and manifest["cache_key"] != key_of_cache(checked.config, data_key):
        refused.append(("the teacher", manifest["cache_key"], key_of_cache(checked.config, data_key)))
    if refused:
        described = ", ".join(f"{key}: {before!r} -> {after!r}" for key, before, after in refused)
        advice = (
            f"start another run with --name, or undo the change; only {', '.join(CHANGEABLE)} may change on the way"
        )
        raise ConfigError([Problem(f"run {run.path.name}", f"has other settings already ({described}); {advice}")])
    other_split = refusal_of_other_split(run, checked, manifest["world_size"])
    if other_split:
        raise ConfigError([Problem(f"run {run.path.name}", f"cannot go on as asked for: {other_split}")])
    if changes:
        store_config(run, checked.config)
    if manifest["world_size"] != checked.world_size:
        write_manifest(run.manifest, {**manifest, "world_size": checked.world_size})


def refusal_of_other_split(run: RunFolder, checked: CheckedRun, world_size: int) -> str | None:
    """Why the run cannot go on with its optimizer steps split in another way than before; None where it can."""
    before = Split.of(read_resolved_config(run.config).training, world_size=world_size)
    split = Split.of(checked.config.training, world_size=checked.world_size)
    if split == before:
        return None
    if jobs := queued_jobs(run, report=lambda line: None):
        ids = ", ".join(job.id for job in jobs)
        return f"jobs {ids} were submitted to split a step into {before}; ./train.sh stop {run.path.name} first"
    checkpoint, _ = newest_valid(run.checkpoints)
    return refusal_of_split(split, before=before, tied=checkpoint.tied_to_split if checkpoint else None)


def remaining_jobs(run: RunFolder, config: RunConfig, data_key: str) -> list[JobKind]:
    """The jobs that finish what is wanted of the run from where it stands."""
    checkpoint, _ = newest_valid(run.checkpoints)
    blocks_left = config.training.num_jobs
    if checkpoint is not None:
        blocks_left -= checkpoint.step // Horizon.of_chain(config.training, checkpoint).block_steps
    if writes_answers(config):  # what they are answers to is mixed first, if it is a mixture, and prepared last
        mixture = read_manifest(run.manifest)["mixture"]
        prepared = mixture is None or (Path(mixture["folder"]) / MIXTURE_MARKER).is_file()
    else:
        prepared = PreparedData.open(prepared_folder(config.data_folder, data_key)) is not None
    jobs = jobs_needed(
        prepared=prepared,
        captured=is_captured(run, config),
        blocks_left=blocks_left,
        evaluated=run.done.exists(),
    )
    return [kind for kind in jobs if kind in ("prepare", "capture")] if run.capture_only.exists() else jobs


def submit(run: RunFolder, checked: CheckedRun, plan: Plan, report: Callable[[str], None]) -> Outcome:
    """Submit what is missing of the chain, or finish a submission that was cut off.

    Raises:
        SlurmError: Slurm refused a job or does not answer.
        AlreadyRunningError: another process works on this run and did not finish.
    """
    with sole_owner(run, patience_s=OTHER_COMMAND_S):
        return submit_chain(run, checked.config, plan.data_key, report, by_user=True)


def submit_chain(
    run: RunFolder, config: RunConfig, data_key: str, report: Callable[[str], None], *, by_user: bool
) -> Outcome:
    """Bring the run's jobs in Slurm in line with what it needs; for the one process that owns the run."""
    submission = ChainSubmission(
        run=run,
        run_name=config.name,
        slurm=config.slurm,
        by_user=by_user,
        report=report,
        journal=Journal.open(run),
        capture=array_shape(config),
        spreads_evaluation=config.spreads_evaluation,
    )
    return submission.bring_about(lambda: remaining_jobs(run, config, data_key))


def refuse_full_disk(plan: Plan) -> None:
    """Raise ValueError where the teacher's cache, or the features of a draft's target, will not fit on their disk."""
    features = plan.draft.features if plan.draft else None
    if features is not None and not features.fit:
        raise ValueError(
            f"eagle3.features: the target's features will need about {gigabytes(features.missing_bytes or 0)}, and "
            f"{gigabytes(features.free_bytes)} are free there; free space, name another data_dir, or use "
            "eagle3.features: live"
        )
    capture = plan.capture
    if capture is not None and not capture.fits:
        raise ValueError(
            f"distillation.cache: {capture.folder} will need about {gigabytes(capture.cache_bytes or 0)}, and "
            f"{gigabytes(capture.free_bytes)} are free there; free space, name another data_dir, or keep less of each "
            "distribution (distillation.cache.kind: hybrid, or a smaller k)"
        )


def train_here(run: RunFolder, checked: CheckedRun, plan: Plan, watch: Callable[[Callable[[], bool]], None]) -> int:
    """Run what is missing of the chain on this machine; returns the exit code of its last job.

    Raises:
        AlreadyRunningError: another command trains this run right now.
    """
    with sole_owner(run):
        return run_chain_here(
            run,
            remaining_jobs(run, checked.config, plan.data_key),
            num_processes=checked.world_size,
            gpu_id=checked.config.slurm.gpu_id,
            watch=watch,
        )


def clear_halt(run: RunFolder, report: Callable[[str], None]) -> None:
    """Running a file again is the user's word that what halted the chain is mended."""
    run.record_event("started_by_user")
    for file in (run.halt, run.stop):
        if file.exists():
            report(f"going on after {file.name}: {file.read_text().strip()}")
            file.unlink()


def runs_in(folder: Path) -> list[RunFolder]:
    """Every run in a folder of runs, newest first."""
    if not folder.is_dir():
        return []
    found = [RunFolder(path) for path in folder.iterdir() if (path / "manifest.json").is_file()]
    return sorted(found, key=lambda run: run.manifest.stat().st_mtime, reverse=True)


def queued_jobs(run: RunFolder, report: Callable[[str], None]) -> list[QueuedJob]:
    """The run's jobs that are queued or running; waits for a controller that is away.

    Raises:
        SlurmError: it stayed away.
    """
    return patiently(lambda: live_jobs(Journal.open(run)), report)
