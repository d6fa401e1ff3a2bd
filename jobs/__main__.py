"""The command line: ./train.sh [VERB] FILE [--section.key value ...]."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from jobs import launch
from jobs.capture_plan import capture_lines
from jobs.capturing import answers_line, writes_answers
from jobs.config import PROJECT, resolved_values
from jobs.doctor import run_doctor
from jobs.draft_plan import draft_lines, supervised_preview
from jobs.drill import drill, show_drill
from jobs.exit_code import ExitCode
from jobs.extend import extend_parser, extend_run, with_stored_extensions
from jobs.garbage import collected_rarely
from jobs.local import AlreadyRunningError
from jobs.log_files import show_logs
from jobs.plan import Plan, plan_run
from jobs.preflight import CheckedRun, check_run, local_world_size
from jobs.progress import RunWatcher, console_for_messages
from jobs.queue import SlurmError
from jobs.report import write_report
from jobs.status import SECONDS_BETWEEN_QUESTIONS, SlurmGlances, read_status
from jobs.status_view import show_evaluation, show_runs, show_status, watch_status
from jobs.steering import cancel_run, resumed_run, stop_run
from mixture.recipe import read_mixture
from settings.yaml_tree import ConfigError, read_config_file, read_overrides
from training.checkpoints import NoValidCheckpointError
from training.run_folder import RunFolder

USAGE = """\
./train.sh [run] FILE       check, plan, then submit the chain (with Slurm) or train here (without)
./train.sh check FILE       find everything wrong with FILE before anything starts
./train.sh plan FILE        blocks, steps, learning rates, tokens, GPU-hours, disk
./train.sh prepare FILE     make the training data of a run, or a mixture of many sources, here and now
./train.sh capture FILE     a run's data with the teacher's cache or a model's answers, no more; --here makes them here
./train.sh check-dataset FILE   two rows of each split as the trainer will see them
./train.sh status [NAME]    how runs stand; --watch redraws, --json is for programs
./train.sh logs NAME        what the newest job printed; -f follows, --block N and --rank R pick
./train.sh stop NAME        have the running block save and end, and take waiting jobs out of the queue
./train.sh cancel NAME      end everything of a run now
./train.sh resume NAME      go on with a run that stopped; --slurm.time 08:00:00 and the like may change on the way
./train.sh extend NAME --jobs N --lr-policy POLICY   go on beyond the horizon; `extend --help` has the policies
./train.sh report NAME      report.html: curves over the whole chain, scores, settings
./train.sh drill FILE       prove on a small copy of a run, trained here, that faults cost it nothing
./train.sh doctor [FILE]    what this cluster does to jobs, and to the run of FILE; --on-node asks a node too
./train.sh datasets         the datasets that come along

--section.key VALUE overrides any key of FILE: --training.lr 1e-4 --dataset.data_files PATH --name NAME"""

console = console_for_messages()


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code."""
    try:
        verb, rest = split_verb(arguments)
        return VERBS[verb](rest)
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    except (ValueError, SlurmError, AlreadyRunningError, NoValidCheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def split_verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The verb and what follows it; a file name alone means `run`. ValueError for what is neither, but nearly one."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return "help", []
    if arguments[0] in VERBS:
        return arguments[0], list(arguments[1:])
    nearest = difflib.get_close_matches(arguments[0], VERBS, n=1)
    if nearest and not Path(arguments[0]).exists():
        raise ValueError(f"{arguments[0]} is no command and no file; did you mean {nearest[0]}?")
    return "run", list(arguments)


def help_command(arguments: list[str]) -> int:
    """Print the usage."""
    console.print(USAGE, highlight=False, markup=False)
    return 0


def run_command(arguments: list[str]) -> int:
    """Check and plan a run, then submit it or train it here."""
    parser = verb_parser("run", "check, plan, then submit the chain or train here")
    parser.add_argument("--dry-run", action="store_true", help="stop after the plan")
    parser.add_argument("--wait", action="store_true", help="stay and show progress of a submitted chain")
    parser.add_argument("--prepare-here", action="store_true", help="make the data here, not in the chain's first job")
    options, checked = parse_and_check(parser, arguments)
    checked = with_stored_extensions(checked)
    plan = plan_run(checked)
    if options.dry_run:
        show_plan(checked, plan)
        return 0
    launch.refuse_full_disk(plan)
    run = launch.open_run_folder(checked, plan.data_key, console.print)
    run.capture_only.unlink(missing_ok=True)
    if run.done.exists():
        console.print(f"run {run.path.name} is finished; its folder is {run.path}", highlight=False)
        show_status(read_status(run), console)
        return 0
    launch.clear_halt(run, console.print)
    if options.prepare_here or checked.cluster == "local":
        prepare_data(checked)
        plan = plan_run(checked)
    show_plan(checked, plan)
    if checked.cluster == "local":
        return train_here(run, checked, plan)
    return submit(run, checked, plan, wait=options.wait)


def capture_command(arguments: list[str]) -> int:
    """Make the data of a run and the teacher's cache or a model's answers, and nothing else."""
    parser = verb_parser("capture", "make the data, and the teacher's cache or the answers that a model writes; again "
                         "finishes what is missing")  # fmt: skip
    parser.add_argument("--here", action="store_true", help="on this machine, although there is Slurm")
    options, checked = parse_and_check(parser, arguments)
    plan = plan_run(checked)
    if plan.capture is None and not writes_answers(checked.config):
        raise ValueError(
            f"{options.file} has nothing to capture or to answer: that takes trainer: distillation with teacher: cache "
            "or text, or trainer: eagle3 with eagle3.answers"
        )
    if is_made(checked, plan):
        show_what_is_made(checked, plan)
        return 0
    launch.refuse_full_disk(plan)
    run = launch.open_capture_folder(checked, plan.data_key, tell)
    launch.clear_halt(run, tell)
    if checked.cluster == "slurm" and not options.here:
        show_capture(checked, plan)
        return submit(run, checked, plan, wait=False)
    prepare_data(checked)
    plan = plan_run(checked)
    show_capture(checked, plan)
    launch.refuse_full_disk(plan)
    checked = dataclasses.replace(checked, world_size=local_world_size(checked.config, []))
    code = launch.train_here(run, checked, plan, RunWatcher(run, console).watch)
    if code != ExitCode.DONE:
        print(f"error: the capture stopped with exit code {code}; details in {run.logs}", file=sys.stderr)
        return code
    plan = plan_run(checked)
    if not is_made(checked, plan):
        tell("others are at the last shards just now; run this again later")
        return ExitCode.STOPPED_EARLY
    show_what_is_made(checked, plan)
    return ExitCode.DONE


def is_made(checked: CheckedRun, plan: Plan) -> bool:
    """Whether the teacher's cache is complete, or the data prepared from the answers."""
    if writes_answers(checked.config):
        return plan.prepared is not None
    return plan.capture is not None and plan.capture.complete


def show_capture(checked: CheckedRun, plan: Plan) -> None:
    """Print what the teacher's cache costs, or how far the answers are."""
    for line in capture_lines(plan.capture) if plan.capture else []:
        tell(line)
    answers = checked.preparation.mixture
    if writes_answers(checked.config) and answers is not None:
        tell(answers_line(checked.config, answers))


def show_what_is_made(checked: CheckedRun, plan: Plan) -> None:
    """Print where the finished cache or the answers lie."""
    if plan.capture is not None:
        show_cache(plan.capture.folder)
    else:
        show_capture(checked, plan)


def show_cache(folder: Path) -> None:
    """Print where a teacher's cache lies and how well it stands for the teacher, by source."""
    from distilling.cache import fidelity  # torch

    tell(f"the teacher's cache is complete: {folder}")
    for source, sums in fidelity(folder).items():
        if not sums.positions:
            continue
        count = sums.positions
        tell(
            f"  {source}: {count:,} tokens, {sums.kept_mass / count:.2%} of the probability kept, the right token is "
            f"among the most probable at {sums.labels_in_top / count:.1%}; its loss {sums.nll / count:.4f}"
        )


def train_here(run: RunFolder, checked: CheckedRun, plan: Plan) -> int:
    code = launch.train_here(run, checked, plan, RunWatcher(run, console).watch)
    if code == ExitCode.DONE:
        console.print(f"finished: {run.path}; curves in report.html", highlight=False)
        show_evaluation(read_status(run).evaluation or {}, console)
    else:
        print(f"error: the chain stopped with exit code {code}; details in {run.logs}", file=sys.stderr)
    return code


def submit(run: RunFolder, checked: CheckedRun, plan: Plan, *, wait: bool) -> int:
    watcher = RunWatcher(run, console)
    outcome = launch.submit(run, checked, plan, tell)
    if outcome.untouched:
        tell(f"already queued: {', '.join(f'{job.kind} {job.id}' for job in outcome.queued)}")
    if outcome.limit:
        tell(
            f"Slurm takes no more jobs of yours now ({outcome.limit}): {len(outcome.queued)} of this chain are queued, "
            "and each of them submits the next ones when it starts"
        )
    console.print(
        f"watch it with: ./train.sh status {run.path.name}   ./train.sh logs {run.path.name}", highlight=False
    )
    if not wait:
        return 0
    watcher.watch(EmptyQueue(run).is_seen)
    status = read_status(run)
    show_status(status, console)
    return ExitCode.DONE if status.state == "done" else 1


class EmptyQueue:
    """Looks whether a run still has jobs, rarely: many people wait before one controller."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.asked_at_s = -math.inf

    def is_seen(self) -> bool:
        """Whether no job of the run is queued or running any more, as far as is known."""
        nearly_over = self.run.done.exists() or self.run.halt.exists()
        if time.monotonic() - self.asked_at_s < (1 if nearly_over else SECONDS_BETWEEN_QUESTIONS):
            return False
        self.asked_at_s = time.monotonic()
        return not launch.queued_jobs(self.run, tell)


def extend_command(arguments: list[str]) -> int:
    """Go on training a run beyond its horizon."""
    options = extend_parser().parse_args(arguments)
    run = find_run(options.name)
    return go_on(run, extend_run(run, jobs=options.jobs, lr_policy=options.lr_policy, report=tell))


def resume_command(arguments: list[str]) -> int:
    """Go on with a run from its own folder."""
    parser = run_parser("resume", "go on with a run that stopped, from its own folder; --section.key VALUE pairs may "
                        "change where it trains and when it saves")  # fmt: skip
    options, overrides = parser.parse_known_args(arguments)
    run = find_run(options.name)
    if run.done.exists():
        tell(f"run {run.path.name} is finished; ./train.sh extend {run.path.name} trains it further")
        return 0
    return go_on(run, resumed_run(run, overrides, tell))


def go_on(run: RunFolder, checked: CheckedRun) -> int:
    """Lift what ended a run, and submit or train what is missing of it."""
    plan = plan_run(checked)
    show_plan(checked, plan)
    launch.clear_halt(run, tell)
    return train_here(run, checked, plan) if checked.cluster == "local" else submit(run, checked, plan, wait=False)


def stop_command(arguments: list[str]) -> int:
    """Have a run save and end."""
    parser = run_parser("stop", "the running block saves a checkpoint and ends, and waiting jobs leave the queue")
    stop_run(find_run(parser.parse_args(arguments).name), tell)
    return 0


def cancel_command(arguments: list[str]) -> int:
    """End everything of a run now."""
    parser = run_parser("cancel", "end all jobs of a run now, without waiting for a checkpoint")
    cancel_run(find_run(parser.parse_args(arguments).name), tell)
    return 0


def check_command(arguments: list[str]) -> int:
    """Find everything wrong with a file."""
    parser = verb_parser("check", "find everything wrong with FILE before anything starts")
    parser.add_argument("--json", action="store_true", help="print the resolved settings as JSON")
    options, checked = parse_and_check(parser, arguments)
    if options.json:
        print_json(resolved_values(checked.config))
        return 0
    show_notes(checked)
    console.print(
        f"{options.file}: fine. Run {checked.config.name} trains {checked.config.model.name} on "
        f"{rows_of(checked)}, {'through Slurm' if checked.cluster == 'slurm' else 'on this machine'}.",
        highlight=False,
    )
    if checked.config.eagle3 is not None:
        plan = plan_run(checked)
        show_draft(plan)
        console.print(supervised_preview(checked.config, plan.prepared))
    return 0


def rows_of(checked: CheckedRun) -> str:
    """Where the rows come from, for people."""
    if checked.module is not None:
        return str(checked.module.path)
    return checked.config.dataset.mixture or " + ".join(checked.config.dataset.name_list)


def plan_command(arguments: list[str]) -> int:
    """Show what the chain will do."""
    parser = verb_parser("plan", "blocks, steps, learning rates, tokens, GPU-hours, disk")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    options, checked = parse_and_check(parser, arguments)
    checked = with_stored_extensions(checked)
    plan = plan_run(checked)
    if options.json:
        print_json(dataclasses.asdict(plan))
    else:
        show_plan(checked, plan)
    return 0


def prepare_command(arguments: list[str]) -> int:
    """Make the training data of a run, or a mixture from its recipe, here."""
    options, overrides = prepare_parser().parse_known_args(arguments)
    if is_recipe(options.file):
        return prepare_mixture(options, overrides)
    refuse_options_of_recipes(options)
    checked = check_run(options.file, overrides)
    if not options.dry_run:
        prepare_data(checked, options.workers)
    elif checked.mixture is not None:
        from mixture.mixer import run_mixture

        run_mixture(checked.mixture, checked.config.data_folder, tell, dry_run=True, workers=options.workers)
    else:
        show_plan(checked, plan_run(checked))
    return 0


def refuse_options_of_recipes(options: argparse.Namespace) -> None:
    """Raise ValueError where an option for recipes comes with a run."""
    of_recipes = {"--dataset": options.dataset, "--total-samples": options.total_samples,
                  "--output-dir": options.output_dir, "--data-dir": options.data_dir,
                  "--frozen": options.frozen}  # fmt: skip
    given = [name for name, value in of_recipes.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)}: for a recipe of a mixture, and {options.file} is a run; give its recipe to prepare, "
            "or change the recipe"
        )


def prepare_parser() -> argparse.ArgumentParser:
    """What `prepare` understands; much of it is for recipes only."""
    parser = verb_parser("prepare", "make the training data of a run, or a mixture of many sources, here and now")
    parser.add_argument("--dry-run", action="store_true", help="show counts, epochs, download and disk; make nothing")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    mixture = parser.add_argument_group("of a recipe")
    add = mixture.add_argument
    add("--dataset", metavar="NAME", help="only this source of the recipe, with the rows that it has in the whole")
    add("--total-samples", type=int, metavar="ROWS", help="rows of the whole mixture")
    add("--output-dir", type=Path, metavar="DIR", help="where the mixture goes (default: data/mixtures/KEY)")
    add("--data-dir", type=Path, metavar="DIR", help="where sources and mixtures are kept (default: data)")
    add("--frozen", type=Path, metavar="LOCK", help="a mixture.lock.json to be met in every source and count")
    return parser


def is_recipe(file: Path) -> bool:
    """Whether a file describes a mixture (`datasets:`) and not a run (`dataset:`)."""
    return file.is_file() and "datasets" in read_config_file(file).values


def prepare_mixture(options: argparse.Namespace, rest: list[str]) -> int:
    """Plan a mixture, and make it unless only the plan is asked for."""
    from mixture.mixer import run_mixture  # reading rows needs imports that no other verb waits for

    overrides = read_overrides(rest)
    if options.total_samples is not None:
        overrides.append((("total_samples",), options.total_samples))
    if options.output_dir is not None:
        overrides.append((("output_dir",), str(options.output_dir.resolve())))
    mixture = read_mixture(options.file, overrides)
    if options.dataset is not None:
        mixture = mixture.only(options.dataset)
    data_dir = options.data_dir or PROJECT / "data"
    run_mixture(mixture, data_dir, tell, dry_run=options.dry_run, workers=options.workers, frozen=options.frozen)
    return 0


def prepare_data(checked: CheckedRun, workers: int | None = None) -> None:
    from mixture.prepare import prepare  # the tokenizer's imports take seconds; check and plan do not need them

    if checked.mixture is not None:
        from mixture.mixer import run_mixture

        run_mixture(checked.mixture, checked.config.data_folder, tell, workers=workers)
    if not writes_answers(checked.config):  # else it is prepared once the teacher has answered
        prepare(checked.preparation, checked.config.data_folder, tell, workers=workers)


def tell(line: str) -> None:
    """One line of progress."""
    console.print(line, highlight=False, markup=False)


def check_dataset_command(arguments: list[str]) -> int:
    """Show two rows of each split as the trainer will see them."""
    from mixture.inspection import check_dataset, rendered_report

    _, checked = parse_and_check(verb_parser("check-dataset", "two rows of each split"), arguments)
    if checked.mixture is not None:
        raise ValueError("check-dataset shows rows of one dataset module; a mixture is made of several")
    console.print(rendered_report(check_dataset(checked.preparation)))
    return 0


def datasets_command(arguments: list[str]) -> int:
    """List the datasets that come along."""
    from mixture.inspection import list_datasets, rendered_listing

    parser = argparse.ArgumentParser(prog="./train.sh datasets")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    listings = list_datasets(PROJECT)
    if options.json:
        print_json([dataclasses.asdict(listing) for listing in listings])
    else:
        console.print(rendered_listing(listings))
    return 0


def status_command(arguments: list[str]) -> int:
    """Show one run, or a line for each."""
    parser = argparse.ArgumentParser(prog="./train.sh status")
    parser.add_argument("name", nargs="?", help="a run, or the path of its folder; all runs where it is left out")
    parser.add_argument("--watch", action="store_true", help="show it again and again until the run has ended")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(arguments)
    if options.watch and (options.json or not options.name):
        parser.error("--watch shows one run, as text")
    slurm = SlurmGlances()
    if options.watch:
        with contextlib.suppress(KeyboardInterrupt):
            watch_status(find_run(options.name), console)
    elif options.name:
        status = read_status(find_run(options.name), slurm)
        print_json(dataclasses.asdict(status)) if options.json else show_status(status, console)
    else:
        statuses = [read_status(run, slurm) for run in launch.runs_in(PROJECT / "runs")]
        print_json([dataclasses.asdict(status) for status in statuses]) if options.json else show_runs(
            statuses, console
        )
    return 0


def logs_command(arguments: list[str]) -> int:
    """Print what a run's jobs wrote, or follow it."""
    parser = run_parser("logs", "what the newest job of a run printed")
    parser.add_argument("-f", "--follow", action="store_true", help="go on, from job to job, until the run has ended")
    parser.add_argument("--block", type=int, metavar="N", help="the newest job that trained block N, from 1")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="which process of the job, from 0")
    options = parser.parse_args(arguments)
    with contextlib.suppress(KeyboardInterrupt):
        show_logs(find_run(options.name), rank=options.rank, block=options.block, follow=options.follow)
    return 0


def report_command(arguments: list[str]) -> int:
    """Write a run's report.html, at any time."""
    parser = run_parser("report", "write report.html, at any time")
    console.print(str(write_report(find_run(parser.parse_args(arguments).name))), highlight=False)
    return 0


def doctor_command(arguments: list[str]) -> int:
    """Say what this cluster, or this machine, will do to a run."""
    return run_doctor(arguments, console)


def drill_command(arguments: list[str]) -> int:
    """Prove on a small copy of a run that faults cost it nothing."""
    parser = verb_parser("drill", "train a small copy of the run here, hit it with faults, and compare")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and the progress as errors")
    options, overrides = parser.parse_known_args(arguments)
    result = drill(options.file, overrides, Console(stderr=True) if options.json else console)
    print_json(result.as_json()) if options.json else show_drill(result, console)
    return 0 if result.passed else 1


def find_run(name: str) -> RunFolder:
    """A run by name, or by the path of its folder."""
    for path in (PROJECT / "runs" / name, Path(name).resolve()):
        if (path / "manifest.json").is_file():
            return RunFolder(path)
    known = [run.path.name for run in launch.runs_in(PROJECT / "runs")]
    nearest = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean {nearest[0]}? " if nearest else ""
    raise ValueError(f"no run {name} in {PROJECT / 'runs'}; {meant}There are: {', '.join(known) or 'none'}")


def run_parser(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"./train.sh {verb}", description=description, allow_abbrev=False)
    parser.add_argument("name", help="a run, or the path of its folder")
    return parser


def verb_parser(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"./train.sh {verb}", description=description, allow_abbrev=False)
    parser.add_argument(
        "file", type=Path, help="the run's YAML file; further --section.key VALUE pairs override its keys"
    )
    return parser


def parse_and_check(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, CheckedRun]:
    options, overrides = parser.parse_known_args(arguments)
    return options, check_run(options.file, overrides)


def show_notes(checked: CheckedRun) -> None:
    for note in checked.notes:
        console.print(f"note: {note}", highlight=False)


def show_plan(checked: CheckedRun, plan: Plan) -> None:
    """Print the plan: the chain in one line, a row per block, then what it costs."""
    training = checked.config.training
    show_notes(checked)
    where = "Slurm" if checked.cluster == "slurm" else "this machine"
    console.print(
        f"run {checked.config.name} on {where}: {training.num_jobs} blocks of {training.epochs_per_job} epochs, "
        f"{plan.rows_per_step} rows a step ({training.batch_size} per device x {training.gradient_accumulation} "
        f"accumulated x {checked.world_size} processes)",
        highlight=False,
    )
    table = Table(box=None, padding=(0, 2))
    for heading in ("block", "epochs", "steps", "learning rate"):
        table.add_column(heading)
    for block in plan.blocks:
        steps = f"{block.steps[0]} - {block.steps[1]}" if block.steps else "known once the data is prepared"
        rates = f"{block.learning_rates[0]:.2e} - {block.learning_rates[1]:.2e}" if block.learning_rates else "-"
        table.add_row(str(block.number), f"{block.epochs[0]} - {block.epochs[1]}", steps, rates)
    console.print(table)
    costs = [f"data {plan.data_key}" + ("" if plan.prepared else " (not prepared yet)")]
    if plan.train_tokens is not None:
        costs.append(f"{plan.train_tokens:,} tokens")
    if plan.num_parameters is not None:
        costs.append(f"{plan.num_parameters / 1e6:,.1f} M parameters")
    if plan.checkpoint_bytes is not None:
        costs.append(f"{plan.checkpoint_bytes / 2**30:,.2f} GiB of checkpoints")
    if plan.max_gpu_hours is not None:
        costs.append(f"at most {plan.max_gpu_hours:,.1f} GPU-hours")
    console.print("; ".join(costs), highlight=False)
    show_capture(checked, plan)
    show_draft(plan)


def show_draft(plan: Plan) -> None:
    """Print what a draft head takes."""
    for line in draft_lines(plan.draft) if plan.draft else []:
        tell(line)


def print_json(value: Any) -> None:
    print(orjson.dumps(value, default=str, option=orjson.OPT_INDENT_2).decode())


VERBS = {
    "run": run_command,
    "check": check_command,
    "plan": plan_command,
    "prepare": prepare_command,
    "capture": capture_command,
    "check-dataset": check_dataset_command,
    "status": status_command,
    "logs": logs_command,
    "stop": stop_command,
    "cancel": cancel_command,
    "resume": resume_command,
    "extend": extend_command,
    "report": report_command,
    "drill": drill_command,
    "doctor": doctor_command,
    "datasets": datasets_command,
    "help": help_command,
}

if __name__ == "__main__":
    with collected_rarely():
        code = main(sys.argv[1:])
    sys.exit(code)
