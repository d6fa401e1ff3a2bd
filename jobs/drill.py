"""./train.sh drill: whether faults cost a chain nothing, shown on a small copy of a run before the run is trusted.

The copy keeps all that shapes the training: model, adapters, dtype, objective, packing, batch, schedule, optimizer. It
is cut to a few rows and trained twice: once in one piece, and once as a chain of blocks that are hit by one fault after
another (jobs/faults.py). Both must end with the same weights, bit for bit, and every row must have been trained on once
in each epoch.

All runs on this machine, also where Slurm is, through the code that any chain runs through; a config that needs GPUs
needs them here (with Slurm: salloc first). On the disk of `runs_dir` the drill takes twice the room of the run's own
checkpoints, and a third time where weights differ. A mixture is made in full, since the run needs it too.
"""

from __future__ import annotations

import filecmp
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs import launch
from jobs.exit_code import ExitCode
from jobs.faults import FAULTS, Fault, FaultDealer, FaultOutcome, outcome_of
from jobs.local import run_chain_here
from jobs.plan import plan_run
from jobs.preflight import CheckedRun, check_run
from jobs.progress import RunWatcher
from jobs.snapshot import read_manifest
from training.checkpoints import Checkpoint, NoValidCheckpointError, newest_valid
from training.run_folder import RunFolder
from training.schedule import Horizon

STEPS_PER_EPOCH = 5
NUM_BLOCKS = 2
BLOCK_STEPS = 16
"""Each fault takes the chain 3 to 8 steps further: it hits once a start of a block has saved and gone on from there."""


@dataclass(frozen=True, kw_only=True)
class WeightDifference:
    """Where two trainings part."""

    tensor: str
    """The first that differs."""

    num_tensors: int
    """How many differ."""

    largest: float
    """Largest absolute difference of two weights; not finite where one of them has other tensors."""

    def __str__(self) -> str:
        more = f" and {self.num_tensors - 1} more tensors" if self.num_tensors > 1 else ""
        return f"{self.tensor}{more}, largest difference {self.largest:.3g}"


@dataclass(frozen=True, kw_only=True)
class DrillResult:
    """What became of the chain."""

    run: str
    blocks: int
    steps: int
    epochs: int
    rows: int
    """Rows of an epoch; packs, where packed."""

    processes: int
    seconds: float
    faults: list[FaultOutcome]
    stuck: str | None
    """Why the chain did not reach its end; then neither weights nor rows can be compared."""

    difference: WeightDifference | None
    """Between the chain and the uninterrupted training."""

    own_difference: WeightDifference | None
    """Between two uninterrupted trainings; looked for only where the chain differs."""

    wrong_rows: list[str]
    """What is wrong in the chain's ledger of rows."""

    folder: str | None
    """Where everything lies; None where it was removed, because the drill was passed."""

    @property
    def problems(self) -> list[str]:
        """Why the drill was not passed."""
        found = [f"{fault.fault}: {fault.not_hit}" for fault in self.faults if fault.not_hit]
        if self.stuck:
            found.append(f"the chain does not go on: {self.stuck}")
        if self.own_difference:
            found.append(
                "your settings are not reproducible on this device even without faults: two uninterrupted trainings "
                f"differ in {self.own_difference}, and the chain in {self.difference}"
            )
        elif self.difference:
            found.append(
                f"the chain's weights differ in {self.difference}, and two uninterrupted trainings are identical"
            )
        return found + self.wrong_rows

    @property
    def passed(self) -> bool:
        """Whether all faults hit, and none had a consequence."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {"passed": self.passed, "problems": self.problems, **asdict(self)}


def drill(file: Path, overrides: Sequence[str], console: Console, *, faults: Sequence[Fault] = FAULTS) -> DrillResult:
    """The result for the run that `file` describes; progress goes to the console.

    Raises:
        ConfigError: something is wrong with the settings.
        ValueError: the small copy cannot be prepared, or does not train even where nothing hits it.
    """
    started_s = time.monotonic()
    checked = check_run(file, [*overrides, "--cluster", "local"])
    runs_dir = checked.config.folder.parent
    runs_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".drill-{checked.config.name}-", dir=runs_dir))
    try:
        result = Drill(checked, folder, console).carry_out(faults)
    except BaseException:
        console.print(f"kept: {folder}", highlight=False)
        raise
    result = replace(result, seconds=round(time.monotonic() - started_s, 1))
    if not result.passed:
        return replace(result, folder=str(folder))
    shutil.rmtree(folder)
    return result


class Drill:
    """One drill in a folder of its own."""

    def __init__(self, checked: CheckedRun, folder: Path, console: Console) -> None:
        self.folder = folder
        self.console = console
        self.copy = self.small_copy(checked)
        horizon = plan_run(self.copy).horizon
        assert horizon is not None, "the copy's data is prepared"
        self.horizon = horizon

    def tell(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    def small_copy(self, checked: CheckedRun) -> CheckedRun:
        """The run on few rows, its data prepared; everything that shapes an optimizer step is the user's."""
        config = checked.config
        if checked.mixture is not None:
            from mixture.mixer import run_mixture

            run_mixture(checked.mixture, config.data_folder, self.tell)
        for note in checked.notes:
            self.tell(f"note: {note}")
        training = replace(
            config.training,
            extensions=[],
            log_every=1,
            arguments={**config.training.arguments, "report_to": "none"},
        )
        small = replace(
            config,
            runs_dir=str(self.folder),
            data_dir=str(self.folder / "data"),
            training=training,
            model=replace(config.model, checkpoint_dir=None),  # the copy must not overwrite the user's export
            evaluation=replace(config.evaluation, limit=0),
        )
        copy, steps_per_epoch = self.with_few_rows(replace(checked, config=small))
        epochs_per_job = math.ceil(BLOCK_STEPS / steps_per_epoch)
        training = replace(
            training,
            epochs_per_job=epochs_per_job,
            total_jobs=NUM_BLOCKS,
            save_every=save_interval_steps(steps_per_epoch),
        )
        return replace(copy, config=replace(copy.config, training=training))

    def with_few_rows(self, copy: CheckedRun) -> tuple[CheckedRun, int]:
        """The copy limited to some STEPS_PER_EPOCH optimizer steps an epoch, as far as its rows allow; prepared.

        How many rows become one pack is known only once they are tokens, so the limit is found by trying.
        """
        from mixture.prepare import prepare

        training = copy.config.training
        limit = training.batch_size * training.gradient_accumulation * copy.world_size * STEPS_PER_EPOCH
        limit = min(limit, copy.config.dataset.limit or limit)
        tried: set[int] = set()
        while True:
            tried.add(limit)
            dataset = replace(copy.config.dataset, limit=limit)
            limited = replace(copy, config=replace(copy.config, dataset=dataset))
            prepared = prepare(limited.rows, limited.config.data_folder, self.tell)
            train = prepared.splits["train"]
            assert train is not None, "preparation fails where the train split has no rows"
            steps = Horizon.of(training, num_rows=train.packs, world_size=copy.world_size).steps_per_epoch
            wanted = max(1, math.ceil(limit * STEPS_PER_EPOCH / steps))
            wanted = min(wanted, copy.config.dataset.limit or wanted)
            enough = STEPS_PER_EPOCH <= steps <= 2 * STEPS_PER_EPOCH
            used_up = train.samples < limit and wanted > limit
            if enough or used_up or wanted in tried:
                return limited, steps
            limit = wanted

    def carry_out(self, faults: Sequence[Fault]) -> DrillResult:
        """Train both ways and compare."""
        self.tell(
            f"drill: {NUM_BLOCKS} blocks of {self.horizon.block_steps} steps, {self.horizon.steps_per_epoch} an epoch, "
            f"by {self.copy.world_size} process{'es' if self.copy.world_size > 1 else ''}, in {self.folder}"
        )
        whole = self.train_uninterrupted("uninterrupted")
        self.tell(f"as a chain, hit by {len(faults)} faults")
        run = self.new_run("chain", blocks=NUM_BLOCKS)
        dealer = FaultDealer(run, faults, self.horizon, self.tell)
        stuck = self.train_chain(run, dealer)
        events, metrics = list(run.events()), list(run.metrics())
        outcomes = [outcome_of(strike, events, metrics) for strike in dealer.strikes]
        outcomes += [FaultOutcome(fault=fault, not_hit="the chain ended before") for fault in dealer.pending]
        difference = own_difference = None
        wrong_rows: list[str] = []
        if stuck is None:
            end = newest(run)
            difference = weight_difference(whole.path, end.path)
            wrong_rows = ledger_problems(end, self.horizon)
        if difference:
            self.tell(f"the weights differ ({difference}); does this machine reproduce itself at all?")
            own_difference = weight_difference(whole.path, self.train_uninterrupted("uninterrupted_again").path)
        return DrillResult(
            run=self.copy.config.name, blocks=NUM_BLOCKS, steps=self.horizon.total_steps, epochs=self.horizon.epochs,
            rows=whole.ledger.rows_per_epoch, processes=self.copy.world_size, seconds=0.0, faults=outcomes,
            stuck=stuck, difference=difference, own_difference=own_difference, wrong_rows=wrong_rows, folder=None,
        )  # fmt: skip

    def new_run(self, name: str, *, blocks: int) -> RunFolder:
        """A run of all the copy's epochs in so many blocks."""
        epochs_per_job = self.horizon.epochs // blocks
        training = replace(self.copy.config.training, epochs_per_job=epochs_per_job, total_jobs=blocks)
        checked = replace(self.copy, config=replace(self.copy.config, name=name, training=training))
        return launch.open_run_folder(checked, plan_run(checked).data_key, self.tell)

    def train_uninterrupted(self, name: str) -> Checkpoint:
        """The end of a training in one piece, which nothing hits."""
        self.tell(f"{name.replace('_', ' ')}, in one piece")
        run = self.new_run(name, blocks=1)
        code = self.run_blocks(run, 1, RunWatcher(run, self.console).watch)
        if code != ExitCode.DONE:
            raise ValueError(f"the small copy does not train even where nothing hits it: {last_error(run, code)}")
        return newest(run)

    def train_chain(self, run: RunFolder, dealer: FaultDealer) -> str | None:
        """Run the chain to its end, starting it again after each fault as its user would; why that is not possible."""
        while True:
            strikes = len(dealer.strikes)
            launch.clear_halt(run, self.tell)
            try:
                code = self.run_blocks(run, self.blocks_left(run), dealer.watch)
            except NoValidCheckpointError as error:
                return str(error)
            if code == ExitCode.DONE:
                return None
            if len(dealer.strikes) == strikes:
                return last_error(run, code)  # it ended, and no fault did it
            dealer.strike_between_blocks()

    def blocks_left(self, run: RunFolder) -> int:
        data_key = read_manifest(run.manifest)["data_key"]
        return launch.remaining_jobs(run, self.copy.config, data_key).count("block")

    def run_blocks(self, run: RunFolder, blocks: int, watch: Callable[[Callable[[], bool]], None]) -> int:
        """Run blocks as any chain here does; returns the exit code of the last."""
        gpu_id = self.copy.config.slurm.gpu_id
        return run_chain_here(run, ["block"] * blocks, num_processes=self.copy.world_size, gpu_id=gpu_id, watch=watch)


def save_interval_steps(steps_per_epoch: int) -> int:
    """So few that saves come between faults, and no divisor of an epoch, so that most resumes begin in mid-epoch."""
    return 4 if steps_per_epoch % 3 == 0 else 3


def newest(run: RunFolder) -> Checkpoint:
    checkpoint, _ = newest_valid(run.checkpoints)
    assert checkpoint is not None, "a block that is done has committed a checkpoint"
    return checkpoint


def last_error(run: RunFolder, code: int) -> str:
    """What a run's jobs said last, and where to read more."""
    errors = [event["message"] for event in run.events() if event["event"] == "error"]
    said = errors[-1] if errors else "no job said why"
    return f"exit code {int(code)}: {said}; see {run.logs}"


def weight_difference(one: Path, other: Path) -> WeightDifference | None:
    """Where the weights in two checkpoints differ; None where they are identical, bit for bit.

    Raises:
        ValueError: the checkpoints keep weights in another format.
    """
    names = sorted({path.name for folder in (one, other) for path in folder.glob("*.safetensors")})
    if not names:
        raise ValueError(
            f"{one} holds no *.safetensors, and only those can be compared: leave out DeepSpeed for a drill"
        )
    differing = [name for name in names if not same_bytes(one / name, other / name)]
    return tensor_difference(one, other, differing) if differing else None


def same_bytes(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and filecmp.cmp(one, other, shallow=False)


def tensor_difference(one: Path, other: Path, files: Sequence[str]) -> WeightDifference | None:
    """The same, tensor by tensor, for files that are not the same in every byte."""
    import torch  # seconds, for drills that fail
    from safetensors import safe_open

    first, num_tensors, largest = "", 0, 0.0
    for file in files:
        if not ((one / file).exists() and (other / file).exists()):
            return WeightDifference(tensor=f"all of {file}", num_tensors=1, largest=math.inf)
        with safe_open(one / file, framework="pt") as left, safe_open(other / file, framework="pt") as right:
            for name in sorted({*left.keys(), *right.keys()}):
                if name not in left.keys() or name not in right.keys():  # noqa: SIM118
                    difference = math.inf
                else:
                    a, b = left.get_tensor(name).reshape(-1), right.get_tensor(name).reshape(-1)
                    if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                        continue
                    difference = float((a.double() - b.double()).abs().max())
                first, num_tensors, largest = first or name, num_tensors + 1, max(largest, difference)
    return WeightDifference(tensor=first, num_tensors=num_tensors, largest=largest) if first else None


def ledger_problems(end: Checkpoint, horizon: Horizon) -> list[str]:
    """What a finished chain trained on other than every row once in each epoch."""
    problems = [end.ledger.describe(epoch) for epoch in end.wrong_epochs]
    if end.finished_epochs != horizon.epochs:
        problems.append(f"{end.finished_epochs} epochs were finished instead of {horizon.epochs}")
    return problems


def show_drill(result: DrillResult, console: Console) -> None:
    """A row for each fault, then weights, rows and the verdict."""

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    table = Table(box=None, padding=(0, 2))
    for heading in ("fault", "at step", "steps done again", "saved after", "training again after"):
        table.add_column(heading)
    for fault in result.faults:
        if fault.not_hit:
            table.add_row(fault.fault, "not hit")
            continue
        table.add_row(
            fault.fault, str(fault.step), str(fault.steps_again), in_seconds(fault.seconds_to_checkpoint),
            in_seconds(fault.seconds_to_training),
        )  # fmt: skip
    console.print(table)
    if result.stuck is None:
        line(f"weights after step {result.steps}: {result.difference or 'identical, bit for bit'}")
        rows = "; ".join(result.wrong_rows) or f"each of {result.rows} once in each of {result.epochs} epochs"
        line(f"rows trained on: {rows}")
    for problem in result.problems:
        line(f"problem: {problem}")
    if result.passed:
        line(f"pass, in {result.seconds:.0f} s: {len(result.faults)} faults cost nothing but time")
    else:
        line(f"fail, in {result.seconds:.0f} s; everything is kept in {result.folder}")


def in_seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"
