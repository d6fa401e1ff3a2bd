"""`./train.sh stop`, `cancel`, `resume` on a real Slurm and of a run here: what is told to end ends, and goes on."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_chains import checked_run, queued_names, quick_train, train_sh

from jobs import launch, submission
from jobs.config import PROJECT, read_resolved_config
from jobs.local import owner_of
from jobs.plan import plan_run
from jobs.queue import SlurmError
from jobs.status import read_status
from jobs.steering import processes_of, stop_run
from training.checkpoints import newest_valid
from training.run_folder import RunFolder

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster

pytest_plugins = ["slurm_cluster"]
pytestmark = pytest.mark.timeout(420)

TEST_YAML = str(PROJECT / "configs/test.yaml")
SETTINGS = [
    *("--dataset.name", "synthetic_dataset", "--dataset.num_rows", "400", "--dataset.packing", "false"),
    *("--training.batch_size", "2", "--training.epochs_per_job", "2", "--training.total_jobs", "1"),
    *("--training.log_every", "1", "--training.arguments.report_to", "none", "--evaluation.limit", "0"),
    *("--slurm.time", "10", "--slurm.mem", "1500M"),
]
REQUEUE_S = 8
"""Longer than a requeued job waits before it starts again."""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared once, by the chain that comes first."""
    return tmp_path_factory.mktemp("data")


def folders(tmp_path: Path, data_dir: Path) -> list[str]:
    return ["--runs_dir", str(tmp_path / "runs"), "--data_dir", str(data_dir)]


def succeeds(*arguments: str) -> str:
    """What a command says that has to succeed."""
    answer = quick_train(*arguments)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def wait_for(what: str, condition: Callable[[], bool], run: RunFolder, timeout_s: float = 150) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {timeout_s} s\n{report(run)}"
        time.sleep(0.1)


def report(run: RunFolder) -> str:
    logs = [f"== {path.name}\n{path.read_text()[-1500:]}" for path in run.logs.glob("*.out")]
    return "\n".join([*map(str, run.events()), *logs])


def wait_for_steps(run: RunFolder, more: int) -> None:
    """Return while a block trains that has made so many more steps than were made before."""
    before = newest_step(run)
    wait_for("steps", lambda: newest_step(run) >= before + more, run)


def newest_step(run: RunFolder) -> int:
    return max((line["step"] for line in run.newest_metrics()), default=0)


def saved_step(run: RunFolder) -> int:
    checkpoint, _ = newest_valid(run.checkpoints)
    return checkpoint.step if checkpoint else 0


def repeated_steps(run: RunFolder) -> int:
    counts = Counter(line["step"] for line in run.metrics())
    return sum(counts.values()) - len(counts)


@pytest.mark.cluster
def test_a_stopped_block_has_saved_the_step_it_reached_and_resume_finishes_the_run(
    slurm: SlurmCluster, tmp_path: Path, data_dir: Path
) -> None:
    run = RunFolder(tmp_path / "runs/test")
    succeeds(TEST_YAML, *SETTINGS, *folders(tmp_path, data_dir))
    wait_for_steps(run, 20)
    said = succeeds("stop", str(run.path))
    assert "saves a checkpoint and ends" in said and "cancelling the waiting jobs" in said
    wait_for("end of the block", lambda: queued_names(slurm) == [], run)
    assert saved_step(run) == newest_step(run) >= 20
    assert not any(event["event"] == "requeued" for event in run.events())
    status = read_status(run)
    assert (status.state, status.jobs[-1].title, status.jobs[-1].state) == ("stopped", "block 1", "stopped early")

    refused = train_sh("resume", str(run.path), "--training.lr", "1")
    assert refused.returncode == 64 and "training.lr: 0.003 -> 1.0" in refused.stderr and run.stop.exists()
    refused = train_sh("resume", str(run.path), "--slurm.time", "08:00:00")
    assert refused.returncode == 64 and "gpucluster allows 240 min" in refused.stderr

    said = succeeds("resume", str(run.path), "--slurm.time", "12", "--training.save_every", "100")
    assert "going on after STOP: stopped by " in said
    assert set(slurm.run("squeue", "--noheader", "--format=%l").split()) == {"12:00"}
    with subprocess.Popen([PROJECT / "train.sh", "logs", run.path, "-f"], stdout=subprocess.PIPE, text=True) as logs:
        wait_for("end", run.done.exists, run)
        followed, _ = logs.communicate(timeout=60)
    assert "block ends at step 320 of 320" in followed
    assert repeated_steps(run) == 0
    assert read_resolved_config(run.config).training.save_every == 100
    assert "step 320/320" in succeeds("logs", str(run.path), "--block", "1")
    for verb in ("stop", "cancel", "resume"):
        assert "run test is finished" in succeeds(verb, str(run.path))


@pytest.mark.cluster
def test_a_cancelled_run_stays_cancelled_in_a_block_and_right_after_a_preemption(
    slurm: SlurmCluster, tmp_path: Path, data_dir: Path
) -> None:
    run = RunFolder(tmp_path / "runs/test")
    succeeds(TEST_YAML, *SETTINGS, *folders(tmp_path, data_dir))
    wait_for_steps(run, 10)
    assert "nothing of run test is left" in succeeds("cancel", str(run.path))
    stays_cancelled(slurm, run)

    succeeds("resume", str(run.path))
    wait_for_steps(run, 10)
    slurm.run(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--mem=100", "--time=1"),
        *("--output=/dev/null", "--wrap=sleep 1"),
    )
    wait_for("requeue", lambda: any(event["event"] == "requeued" for event in run.events()), run)
    succeeds("cancel", str(run.path))
    stays_cancelled(slurm, run)
    assert "was queued or running" in succeeds("cancel", str(run.path))


def stays_cancelled(slurm: SlurmCluster, run: RunFolder) -> None:
    starts = sum(event["event"] == "job_start" for event in run.events())
    deadline = time.monotonic() + REQUEUE_S
    while time.monotonic() < deadline:
        assert slurm.run("squeue", "--noheader", "--partition=gpucluster") == ""
        time.sleep(1)
    assert sum(event["event"] == "job_start" for event in run.events()) == starts
    assert read_status(run).state == "stopped" and "cancelled by " in read_status(run).detail


@pytest.mark.cluster
def test_a_job_that_prepares_data_ends_when_the_run_is_stopped(slurm: SlurmCluster, tmp_path: Path) -> None:
    module = tmp_path / "slow.py"
    begun = tmp_path / "begun"
    module.write_text(
        "import pathlib, time\n"
        "def get_custom_dataset(dataset_config, processor, split):\n"
        f"    pathlib.Path({str(begun)!r}).touch()\n"
        "    time.sleep(300)\n"
    )
    run = RunFolder(tmp_path / "runs/test")
    dataset = ["--dataset.name", "slow", "--dataset.file", str(module)]
    succeeds(TEST_YAML, *SETTINGS[4:], *folders(tmp_path, tmp_path / "data"), *dataset, "--dataset.packing", "false")
    wait_for("prepare", begun.exists, run)
    assert "is told to end" in succeeds("stop", str(run.path))
    wait_for("end of it", lambda: queued_names(slurm) == [], run, timeout_s=30)
    assert [(row.kind, row.state) for row in read_status(run).jobs] == [("prepare", "stopped")]
    assert not run.halt.exists()


@pytest.fixture
def waiting_partition(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The cluster, with a partition that takes jobs and starts none; submissions trust the controller to live."""
    monkeypatch.setattr(submission, "SETTLE_S", 0.2)
    slurm.run("scontrol", "update", "partition=gpucluster", "state=DOWN")
    yield slurm
    slurm.run("scontrol", "update", "partition=gpucluster", "state=UP")


@pytest.mark.cluster
def test_status_tells_what_the_files_tell_while_the_controller_is_away(
    waiting_partition: SlurmCluster, tmp_path: Path
) -> None:
    checked = checked_run(tmp_path)
    plan = plan_run(checked)
    run = launch.open_run_folder(checked, plan.data_key, print)
    launch.submit(run, checked, plan, print)
    titles = ["prepare", "block 1", "block 2", "block 3", "evaluate"]
    status = read_status(run)
    assert ([row.title for row in status.jobs], status.blocks_not_queued) == (titles, 0)
    waiting_partition.daemon("kill", "controller")
    try:
        answer = json.loads(succeeds("status", str(run.path), "--json"))
        shown = succeeds("status", str(run.path))
    finally:
        waiting_partition.daemon("start", "controller")
    assert (answer["state"], [row["state"] for row in answer["jobs"]]) == ("queued", ["waiting"] * 5)
    assert "Slurm does not answer" in answer["slurm_silence"]
    assert "this is what the run's files tell" in shown


@pytest.mark.cluster
def test_a_run_that_is_stopped_while_it_is_submitted_leaves_no_job(
    waiting_partition: SlurmCluster, tmp_path: Path
) -> None:
    checked = checked_run(tmp_path)
    plan = plan_run(checked)
    run = launch.open_run_folder(checked, plan.data_key, print)
    stopping = threading.Thread(target=stop_run, args=(run, print))

    def stop_after_two(line: str) -> None:
        if len(queued_names(waiting_partition)) == 2 and not stopping.is_alive():
            stopping.start()
            wait_for("STOP file", run.stop.exists, run)

    with pytest.raises(SlurmError, match="nothing more is submitted: stopped by"):
        launch.submit(run, checked, plan, stop_after_two)
    stopping.join()
    assert queued_names(waiting_partition) == []


@pytest.mark.chain
def test_a_run_here_is_cancelled_at_once_stopped_with_a_checkpoint_and_resumed(tmp_path: Path, data_dir: Path) -> None:
    run = RunFolder(tmp_path / "runs/test")
    command = [TEST_YAML, *SETTINGS, *folders(tmp_path, data_dir), "--cluster", "local", "--dataset.num_rows", "200"]
    with started(*command) as first:
        wait_for_steps(run, 10)
        started_s = time.monotonic()
        succeeds("cancel", str(run.path))
        assert time.monotonic() - started_s < 15 and processes_of(run) == set()
        assert first.wait(timeout=20) != 0
    assert not run.done.exists()

    with started("resume", str(run.path)) as second:
        wait_for("lock", lambda: owner_of(run) is not None, run)
        rival = train_sh("resume", str(run.path))
        assert rival.returncode == 64 and "is being worked on by process" in rival.stderr
        wait_for_steps(run, 10)
        assert "saves a checkpoint and ends" in succeeds("stop", str(run.path))
        assert second.wait(timeout=60) == 75
    stopped_at = saved_step(run)
    assert stopped_at == [line["step"] for line in run.metrics()][-1]
    assert read_status(run).state == "stopped"

    succeeds("resume", str(run.path))
    assert run.done.exists()
    assert [event["step"] for event in run.events() if event["event"] == "resumed"][-1] == stopped_at


def started(*arguments: str) -> subprocess.Popen[bytes]:
    """./train.sh in the background."""
    return subprocess.Popen([PROJECT / "train.sh", *arguments], stdout=subprocess.DEVNULL)
