"""`./train.sh extend` goes on with a run beyond its horizon, or says why it does not and leaves the run alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import launch
from jobs.__main__ import main
from jobs.config import PROJECT, read_resolved_config
from jobs.extend import extend_run, plan_extension, with_stored_extensions
from jobs.job import ExitCode, run_job
from jobs.local import AlreadyRunningError, sole_owner
from jobs.plan import Plan, plan_run
from jobs.preflight import check_run
from jobs.status import read_status
from mixture.prepare import prepare
from training.checkpoints import Checkpoint, ResumeTerms, newest_valid
from training.config import Extension, TrainingConfig
from training.export import is_exported
from training.ledger import Ledger
from training.run_folder import RunFolder

TEST_YAML = str(PROJECT / "configs/test.yaml")
TINY = [
    *("--dataset.name", "synthetic_dataset", "--dataset.num_rows", "60", "--cluster", "local"),
    *("--training.total_jobs", "1", "--training.epochs_per_job", "2", "--evaluation.limit", "0"),
    *("--training.warmup", "0.25", "--training.log_every", "1"),
]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)  # jobs go to where they were submitted from
    return ["--runs_dir", str(tmp_path / "runs"), "--data_dir", str(tmp_path / "data")]


def begun_run(arguments: list[str]) -> tuple[RunFolder, Plan]:
    """A run with its data prepared, of which no job has run."""
    checked = check_run(Path(arguments[0]), arguments[1:])
    prepare(checked.preparation, checked.config.data_folder, print)
    plan = plan_run(checked)
    return launch.open_run_folder(checked, plan.data_key, print), plan


def newest(run: RunFolder) -> Checkpoint:
    checkpoint, _ = newest_valid(run.checkpoints)
    assert checkpoint is not None
    return checkpoint


def told(error: str, *arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command is refused with these words."""
    capsys.readouterr()
    assert main(arguments) == 64
    assert error in capsys.readouterr().err


@pytest.mark.chain
def test_a_finished_run_goes_on_as_chosen_and_is_evaluated_and_exported_again(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [TEST_YAML, *TINY, *folders]
    run, _ = begun_run(arguments)
    assert (run_job("block", run), run_job("evaluate", run)) == (0, 0)
    end = newest(run)
    assert run.done.exists() and end.learning_rate == 0
    settings = run.config.read_text()

    extend = ["extend", str(run.path), "--jobs"]
    told("--jobs must be at least 1, got 0", *extend, "0", "--lr-policy", "rewarm", capsys=capsys)
    told("Use rewarm to warm up", *extend, "1", "--lr-policy", "constant", capsys=capsys)
    with sole_owner(run):
        told("is being worked on by process", *extend, "1", "--lr-policy", "rewarm", capsys=capsys)
    with pytest.raises(SystemExit):
        main([*extend, "1"])
    assert "the following arguments are required: --lr-policy" in capsys.readouterr().err
    assert run.done.exists() and run.config.read_text() == settings

    assert main([*extend, "1", "--lr-policy", "rewarm"]) == 0
    seen = capsys.readouterr().out
    assert f"extended from 2 to 4 epochs, {end.step} to {2 * end.step} steps; rewarm: a linear warmup" in seen
    assert f"at step {end.step} the learning rate does not jump: 0.00e+00 before, 0.00e+00 after" in seen
    assert newest(run).step == 2 * end.step and run.done.exists()
    assert json.loads(run.evaluation.read_text())["step"] == 2 * end.step
    assert is_exported(run.export, step=2 * end.step)
    events = [event["event"] for event in run.events()]
    assert events.count("extended") == 1 and events.count("exported") == events.count("done") == 2
    rates = [line["lr"] for line in run.metrics()]
    assert rates[end.step :] == pytest.approx(rates[: end.step])
    status = read_status(run)
    assert (status.horizon_steps, status.whole_epochs, status.wrong_epochs) == (2 * end.step, 4, [])

    # The file knows nothing of the extension; the run does.
    assert main(arguments) == 0
    assert "run test is finished" in capsys.readouterr().out
    recorded = Extension(jobs=1, lr_policy="rewarm", from_step=end.step)
    assert read_resolved_config(run.config).training.extensions == [recorded]


@pytest.mark.chain
def test_an_extended_run_is_not_finished_before_its_longer_horizon(folders: list[str]) -> None:
    arguments = [TEST_YAML, *TINY, *folders]
    run, plan = begun_run(arguments)
    assert plan.horizon is not None
    end = plan.horizon.total_steps
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        extend_run(run, jobs=2, lr_policy="stretch", report=print)
    assert run_job("block", run) == 0
    with job_that_owns(run), pytest.raises(AlreadyRunningError, match="run test is being trained by process"):
        extend_run(run, jobs=2, lr_policy="stretch", report=print)

    said: list[str] = []
    extended = extend_run(run, jobs=2, lr_policy="stretch", report=said.append)
    assert f"at step {end} the learning rate jumps by +2.91e-03" in said[1]
    longer = plan_run(extended)
    assert (longer.data_key, longer.prepared) == (plan.data_key, plan.prepared)
    assert [block.steps for block in longer.blocks] == [(0, end), (end, 2 * end), (2 * end, 3 * end)]
    assert launch.remaining_jobs(run, extended.config, longer.data_key) == ["block", "block", "evaluate"]
    assert read_status(run).horizon_steps == 3 * end
    assert run_job("evaluate", run) == ExitCode.STOPPED_EARLY and not run.done.exists()

    from_file = with_stored_extensions(check_run(Path(TEST_YAML), arguments[1:]))
    assert launch.open_run_folder(from_file, plan.data_key, print) == run
    assert plan_run(from_file).blocks == longer.blocks


@contextmanager
def job_that_owns(run: RunFolder) -> Iterator[None]:
    """A process that trains the run here although the command that started it has gone."""
    program = "import sys; from training.owner import *; Owner.take(Path(sys.argv[2])); print(flush=True); input()"
    command = [sys.executable, "-c", program, "jobs.job", str(run.path)]
    with subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


def checkpoint_at(step: int) -> Checkpoint:
    """Of a chain of 10 steps an epoch."""
    terms = ResumeTerms(
        fingerprint="f",
        objective="sft",
        parameters="p",
        batch_size=4,
        gradient_accumulation=1,
        world_size=2,
        parallelism="ddp",
        horizon_steps=20,
        optimization="lr 0.001, cosine",
    )
    return Checkpoint(
        step=step,
        epoch=step / 10,
        samples=8 * step,
        learning_rate=0.0,
        terms=terms,
        ledger=Ledger(rows_per_epoch=80),
        tied_to_split=None,
        path=Path(),
        num_bytes=0,
    )


def test_stretching_begins_at_once_and_other_policies_where_the_old_horizon_ends() -> None:
    training = TrainingConfig(lr=1e-3, batch_size=4, total_jobs=2, lr_scheduler="inverse_sqrt")
    assert plan_extension(training, checkpoint_at(13), jobs=1, lr_policy="stretch").from_step == 13
    assert plan_extension(training, checkpoint_at(13), jobs=1, lr_policy="rewarm").from_step == 20
    constant = plan_extension(training, checkpoint_at(13), jobs=3, lr_policy="constant")
    assert constant == Extension(jobs=3, lr_policy="constant", from_step=20)
    again = plan_extension(replace(training, extensions=[constant]), checkpoint_at(13), jobs=1, lr_policy="rewarm")
    assert again.from_step == 50


def test_a_warmup_that_the_added_blocks_do_not_hold_is_refused() -> None:
    training = TrainingConfig(lr=1e-3, batch_size=4, total_jobs=20, warmup=15)
    assert plan_extension(training, checkpoint_at(200), jobs=2, lr_policy="rewarm").jobs == 2
    with pytest.raises(ValueError, match=r"the warmup of 15 steps .* is not over before the 10 added steps are"):
        plan_extension(training, checkpoint_at(200), jobs=1, lr_policy="rewarm")
