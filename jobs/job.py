"""What runs inside a job, and what its exit code tells the chain: prepare, capture or answer, train a block, evaluate.

A job that is asked to stop saves what it must and puts itself back into the queue (requeue.py). What cannot go on that
way is made good by the next block, and every job sees to it that enough blocks follow it (top_up.py).
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast, get_args

from distilling.run import DistillationRun
from drafting.run import Eagle3Run
from jobs.capturing import (
    answer_what_is_missing,
    answers_request,
    capture_before_training,
    capture_request,
    capture_what_is_missing,
    folder_of_cache,
    is_captured,
    writes_answers,
)
from jobs.chain import JobKind, Journal
from jobs.config import RunConfig, read_resolved_config
from jobs.distillation_checks import check_tokens_in_full
from jobs.exit_code import ExitCode
from jobs.failures import account_for_failure, account_for_silent_end, exit_code_of, newest_step, report_failure
from jobs.garbage import collected_rarely
from jobs.local import LOG_NAME
from jobs.ownership import OwnedElsewhereError, take_ownership
from jobs.preflight import rows_request
from jobs.queue import SlurmError, call, live_jobs
from jobs.report import write_report
from jobs.requeue import StopReason, requeue, wait_for_the_end, why_stopped
from jobs.snapshot import in_snapshot, read_manifest
from jobs.standstill import MAX_STARTS_WITHOUT_PROGRESS, stands_still
from mixture.dataset_modules import ModuleFile
from mixture.prepare import PreparationRequest, PreparedData, prepare, prepared_folder
from mixture.recipe import Mixture
from mixture.whole_files import write_whole
from training.checkpoints import newest_valid
from training.owner import LostOwnershipError
from training.run import FinetuningRun
from training.run_folder import RunFolder, own_job_id
from training.schedule import Horizon
from training.stopping import StopRequested, StopSignals, ignore_stop_signals

BLOCKED_SIGNALS = ("TERM", "USR2")
"""For processes that take seconds until they handle these; they would kill them before."""

WARNING_MARGIN_S = 60
"""Slurm checks time limits every 30 s, so a warning comes up to that much earlier than asked; and clocks differ."""


@dataclass(frozen=True)
class ChainStep:
    """The callable that submitit pickles; it holds names only, so the snapshot's code is what runs."""

    kind: JobKind
    folder: str

    def __call__(self) -> None:
        """Run the job and leave with its exit code."""
        code = enter_job(self.kind, RunFolder(Path(self.folder)))
        if code:
            sys.exit(code)


def enter_job(kind: JobKind, run: RunFolder) -> int:
    """A job as a process of its own: its signals are ours from here to the end of the process."""
    signals = StopSignals()
    signals.install()
    with collected_rarely():
        code = run_job(kind, run, signals)
    ignore_stop_signals()
    return code


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """A run as its jobs see it: the stored settings, with code and model files taken from the snapshot."""

    run: RunFolder
    config: RunConfig
    module: ModuleFile | None
    mixture: dict[str, str] | None
    """Where recipe and result of a mixture lie, as the manifest has it."""

    prepared: Path
    cache: Path | None
    """Where the teacher's cache lies; None where the run reads none."""

    working_folder: Path
    """Where the user submitted from, and where relative paths in dataset modules start."""


def run_job(kind: JobKind, run: RunFolder, signals: StopSignals | None = None) -> int:
    """Do one job of the chain and record how it went; returns its exit code."""
    signals = signals or StopSignals()
    started = time.time()
    top_up = None
    if is_first_process():
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if is_first_task():
            account_for_silent_end(run)
        run.record_event(
            "job_start", kind=kind, pid=os.getpid(), restart=restart, step=newest_step(run),
            log=os.environ.get(LOG_NAME),
        )  # fmt: skip
    try:
        signals.arm()
        top_up = start_top_up(run)
        code, reason = enter(kind, run, signals), None
        signals.disarm()
    except StopRequested:
        code, reason = ExitCode.STOPPED_EARLY, stop_reason(run, signals)
    except Exception as error:
        if signals.received:  # most likely the end of another process that got the signal too
            print(f"stopping: {error}", file=sys.stderr, flush=True)
            code, reason = ExitCode.STOPPED_EARLY, stop_reason(run, signals)
        else:
            code, reason = exit_code_of(error), None
            words = report_failure(run, kind, error)
            account_for_failure(run, kind, error, words, is_first_process=is_first_process())
    if is_first_process():
        record_end(run, kind, code, started, reason)
    if reason in ("preempted", "time limit", "signal") and "SLURM_JOB_ID" in os.environ:
        go_on_later(run)
    if top_up:
        top_up.terminate()  # it finishes a submission, and gives up waiting for room
        top_up.wait()
    return int(code)


def start_top_up(run: RunFolder) -> subprocess.Popen[bytes] | None:
    """On Slurm, submit what the chain will lack after this job, beside its work."""
    if "SLURM_JOB_ID" not in os.environ or not is_first_process() or not is_first_task():
        return None
    blocked = [f"--block-signal={name}" for name in BLOCKED_SIGNALS]
    return subprocess.Popen(["env", *blocked, sys.executable, "-u", "-m", "jobs.top_up", str(run.path)])


def stop_reason(run: RunFolder, signals: StopSignals) -> StopReason:
    """Why the job was asked to stop; asked of Slurm by the first process, for the others it does not matter."""
    if not is_first_process():
        return "signal"
    config = read_resolved_config(run.config)
    reason = why_stopped(run, warning_s=config.slurm.warning_seconds + WARNING_MARGIN_S)
    assert signals.received is not None and signals.received_at_s is not None
    run.record_event(
        "stop_signal",
        signal=signals.received.name,
        reason=reason,
        received_at=signals.received_at_s,
        seconds=round(time.time() - signals.received_at_s, 3),
    )
    return reason


def record_end(run: RunFolder, kind: JobKind, code: int, started: float, reason: StopReason | None) -> None:
    step = newest_step(run) if kind in ("block", "evaluate") else None
    details = {"reason": reason} if reason else {}
    run.record_event(
        "job_end", kind=kind, exit_code=int(code), seconds=round(time.time() - started, 1), step=step, **details
    )
    if kind == "evaluate" and reason is None:
        write_report(run)


def go_on_later(run: RunFolder) -> None:
    """Put the job back into the queue and wait to be ended; returns where Slurm does not have it."""
    if not is_first_process():
        wait_for_the_end()
    elif (job_id := own_job_id()) and requeue(job_id, report):
        run.record_event("requeued")
        wait_for_the_end()


def enter(kind: JobKind, run: RunFolder, signals: StopSignals) -> int:
    if run.done.exists():
        print("the run is finished; nothing to do")
        return ExitCode.DONE
    if run.halt.exists():
        print(f"error: the chain was halted: {run.halt.read_text().strip()}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    if run.stop.exists():
        print("the chain was stopped on request; nothing to do")
        return ExitCode.STOPPED_EARLY
    if kind == "block" and is_first_process():
        refuse_standstill(run)
    context = open_run(run)
    os.chdir(context.working_folder)
    match kind:
        case "prepare":
            return prepare_data(context)
        case "capture":
            return capture_or_answer(context, signals)
        case "block":
            return train_block(context, signals)
        case "evaluate":
            return evaluate_run(context, signals)


def open_run(run: RunFolder) -> JobContext:
    """The run's stored settings, pointed at its snapshot."""
    config = read_resolved_config(run.config)
    manifest = read_manifest(run.manifest)
    module = manifest["module"]
    model = replace(
        config.model,
        name=snapshot_name(config.model.name, run.code),
        tokenizer=snapshot_name(config.model.tokenizer, run.code) if config.model.tokenizer else None,
    )
    distillation = config.distillation
    if distillation is not None:
        teacher = distillation.teacher_model
        teacher = replace(teacher, name=snapshot_name(teacher.name, run.code))
        distillation = replace(distillation, teacher_model=teacher)
    return JobContext(
        run=run,
        config=replace(config, model=model, distillation=distillation),
        module=ModuleFile(Path(module["path"]), module["function"]) if module else None,
        mixture=manifest["mixture"],
        prepared=prepared_folder(config.data_folder, manifest["data_key"]),
        cache=folder_of_cache(config, manifest["cache_key"]),
        working_folder=existing_folder(Path(manifest["working_folder"]), run.code),
    )


def snapshot_name(name: str, code: Path) -> str:
    """A model folder of the project as the snapshot holds it; hub ids and other folders stay as they are."""
    return str(in_snapshot(Path(name), code)) if Path(name).is_absolute() else name


def existing_folder(folder: Path, otherwise: Path) -> Path:
    """The folder, where this node sees it."""
    return folder if folder.is_dir() else otherwise


def prepare_data(context: JobContext) -> int:
    """Prepare the data, unless another run has done so already; where a model answers it first, mix it only."""
    distillation = context.config.distillation
    if distillation is not None and distillation.teacher != "text":
        check_tokens_in_full(context.config, report)
    mixture = stored_mixture(context)
    if mixture:
        make_mixture(context, mixture)
    if not writes_answers(context.config):
        prepare(rows_of_run(context), context.config.data_folder, report)
    return ExitCode.DONE


def rows_of_run(context: JobContext) -> PreparationRequest:
    """The rows of the run as they are."""
    mixture = stored_mixture(context)
    return rows_request(context.config, context.module, mixture.output_dir if mixture else None)


def stored_mixture(context: JobContext) -> Mixture | None:
    """The mixture that the run trains on, from the recipe in the snapshot; None where it trains on one module."""
    if not context.mixture:
        return None
    from jobs.mixing import mixture_of

    facts, dataset = context.mixture, context.config.dataset
    mixture = mixture_of(replace(dataset, mixture=facts["recipe"] or None), seed=context.config.seed)
    assert mixture is not None
    return replace(mixture, folder=Path(facts["relative_to"]), output_dir=Path(facts["folder"]))


def make_mixture(context: JobContext, mixture: Mixture) -> None:
    """Mix what the run trains on, unless it is there already."""
    from mixture.mixer import run_mixture

    run_mixture(mixture, context.config.data_folder, report)


def report(line: str) -> None:
    """Progress, into the job's log."""
    print(line, flush=True)


def capture_or_answer(context: JobContext, signals: StopSignals) -> int:
    """Do what is missing of the work before training, and nobody else does."""
    if not writes_answers(context.config):
        require_prepared(context)
    if is_captured(context.run, context.config):
        report("nothing is left to capture or to answer")
        return ExitCode.DONE
    complete = work_before_training(context, signals)
    if not complete and context.run.stop.exists():
        return ExitCode.STOPPED_EARLY
    report(f"the work before training {'is complete' if complete else 'is finished by others'}")
    return ExitCode.DONE


def work_before_training(context: JobContext, signals: StopSignals) -> bool:
    """Capture the teacher's cache, or write answers and prepare the data from them; returns whether all is done."""
    if not writes_answers(context.config):
        assert context.cache is not None
        request = capture_request(context.config, context.prepared, context.cache)
        report(f"teacher's cache: {context.cache}")
        return capture_what_is_missing(request, context.run, signals, report)
    answers = answers_request(context.config, rows_of_run(context))
    report(f"answers of {answers.writer.name}: {answers.folder}")
    complete = answer_what_is_missing(answers, context.run, signals, report)
    if complete:
        prepare(replace(answers.rows, mixture=answers.folder), context.config.data_folder, report)
    return complete


def train_block(context: JobContext, signals: StopSignals) -> int:
    """Train from the newest checkpoint to the next boundary."""
    if not writes_answers(context.config):
        require_prepared(context)
    if not is_captured(context.run, context.config):
        what = "answering" if writes_answers(context.config) else "capturing"
        report(f"{what} what is missing before training")
        work = partial(work_before_training, context, signals)
        if not capture_before_training(work, partial(is_captured, context.run, context.config), context.run):
            return ExitCode.STOPPED_EARLY
    trainer, trainer_run = trainer_of(context.config), run_of_trainer(context, signals)
    try:
        owner = take_ownership(context.run, report) if is_first_process() else None
    except OwnedElsewhereError as error:
        report(str(error))
        return ExitCode.STOPPED_EARLY
    try:
        result = trainer.train(replace(trainer_run, owner=owner))
    except LostOwnershipError as error:
        report(str(error))
        return ExitCode.STOPPED_EARLY
    finally:
        if owner:
            owner.release()
    if is_first_process():
        report(f"block ends at step {result.step} of {result.horizon_steps}")
    return ExitCode.STOPPED_EARLY if result.stopped else ExitCode.DONE


def evaluate_run(context: JobContext, signals: StopSignals) -> int:
    """Score the trained model, on all processes of the job, and mark the run as done."""
    if not training_finished(context):
        print("training has not reached its end yet: more blocks are needed before this job", file=sys.stderr)
        return ExitCode.STOPPED_EARLY
    require_prepared(context)
    trainer_of(context.config).evaluate(run_of_trainer(context, signals))
    if not is_first_process():
        return ExitCode.DONE
    write_whole(context.run.done, time.strftime("%Y-%m-%dT%H:%M:%S%z\n").encode(), synced=True)
    context.run.record_event("done")
    cancel_what_waits(context.run)
    return ExitCode.DONE


def cancel_what_waits(run: RunFolder) -> None:
    """A finished chain leaves nothing in the queue: a top-up may have counted a block too many."""
    if not run.chain.exists():
        return
    try:
        waiting = [job.id for job in live_jobs(Journal.open(run)) if job.waits]
        if waiting:
            call("scancel", *waiting)
    except (SlurmError, FileNotFoundError) as error:  # those that start will see DONE and end at once
        report(f"cannot look for jobs that are not needed any more: {error}")


def require_prepared(context: JobContext) -> None:
    if PreparedData.open(context.prepared) is None:
        raise ValueError(f"the data in {context.prepared} is not prepared: the prepare job did not finish, see logs/")


def trainer_of(config: RunConfig) -> ModuleType:
    """The trainer that the run names: a module at the root with `train` and `evaluate`."""
    return importlib.import_module(config.trainer)  # torch and transformers: seconds, and not all jobs need them


def run_of_trainer(context: JobContext, signals: StopSignals) -> FinetuningRun | DistillationRun | Eagle3Run:
    """What the run's trainer is given."""
    config = context.config
    shared: dict[str, Any] = {
        "folder": context.run,
        "prepared": context.prepared,
        "module": context.module,
        "seed": config.seed,
        "dataset": config.dataset,
        "model": config.model,
        "training": config.training,
        "evaluation": config.evaluation,
        "stopping": signals,
    }
    if config.distillation is not None:
        return DistillationRun(**shared, distillation=config.distillation, cache=context.cache)
    if config.eagle3 is not None:
        return Eagle3Run(**shared, eagle3=config.eagle3)
    return FinetuningRun(**shared, finetuning=config.finetuning)


def training_finished(context: JobContext) -> bool:
    """Whether the newest valid checkpoint is the end of the horizon, which may have been extended since."""
    checkpoint, _ = newest_valid(context.run.checkpoints)
    training = context.config.training
    return checkpoint is not None and checkpoint.step >= Horizon.of_chain(training, checkpoint).total_steps


def refuse_standstill(run: RunFolder) -> None:
    """Raise ValueError where the last blocks all started from where this one does, so that it would end like them."""
    step = newest_step(run)
    earlier = list(run.events())
    while earlier and earlier.pop()["event"] != "job_start":  # this block's own start, and what came with it
        pass
    if stands_still(earlier, step):
        raise ValueError(
            f"{MAX_STARTS_WITHOUT_PROGRESS} blocks in a row made no new checkpoint after step {step}; see logs/. "
            "Where they met the time limit, ask for more slurm.time or save more often (training.save_every)"
        )


def is_first_process() -> bool:
    """Whether this is the process of its job that writes to the run folder."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def is_first_task() -> bool:
    """Whether this is no array, or the task of it that looks after the chain for all of them."""
    return os.environ.get("SLURM_ARRAY_TASK_ID", "0") == "0"


def main(arguments: list[str]) -> int:
    """`python -m jobs.job KIND RUN_FOLDER`: a job of a chain that runs here."""
    kind, folder = arguments
    assert kind in get_args(JobKind), kind
    return enter_job(cast(JobKind, kind), RunFolder(Path(folder)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
