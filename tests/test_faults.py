"""Real faults on a real Slurm: whatever hits the chain, it ends with the weights of a run that nothing hit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_chains import quick_train
from trained_runs import assert_identical

from jobs.chain import Journal
from jobs.config import PROJECT
from training.checkpoints import newest_valid
from training.run_folder import RunFolder

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster

pytest_plugins = ["slurm_cluster"]
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]

SETTINGS = {
    "dataset.name": "synthetic_dataset",
    "dataset.num_rows": "200",
    "dataset.packing": "false",
    "training.batch_size": "2",
    "training.epochs_per_job": "1",
    "training.total_jobs": "2",
    "training.log_every": "1",
    "training.arguments.report_to": "none",
    "evaluation.limit": "0",
    "slurm.time": "10",
    "slurm.mem": "1500M",
}
TWO_NODES = {"slurm.nodes": "2", "slurm.gpus_per_node": "2", "slurm.cpus_per_task": "1", "dataset.num_rows": "400"}


@dataclass(frozen=True)
class Chain:
    """A run that was submitted, as tests watch it."""

    run: RunFolder
    slurm: SlurmCluster
    arguments: list[str]

    def submit(self) -> None:
        """Start the chain, or go on with it."""
        answer = quick_train(*self.arguments)
        assert answer.returncode == 0, answer.stdout + answer.stderr

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.run.events() if event["event"] == name]

    def wait_for(self, what: str, condition: Any, timeout_s: float = 150) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert not self.run.halt.exists(), self.run.halt.read_text()
            assert time.monotonic() < deadline, f"no {what} after {timeout_s} s\n{self.report()}"
            time.sleep(0.1)

    def wait_for_step(self, step: int) -> None:
        """Return while the optimizer step runs, or soon after."""
        self.wait_for(f"step {step}", lambda: any(line["step"] >= step for line in self.run.metrics()))

    def wait_until_trained(self, timeout_s: float = 200) -> None:
        """Return once the last block has ended; the evaluation is not waited for."""
        self.wait_for("end", self.is_trained, timeout_s)

    def is_trained(self) -> bool:
        checkpoint, _ = newest_valid(self.run.checkpoints)
        if checkpoint is None or checkpoint.step < checkpoint.terms.horizon_steps:
            return False
        return any(end["step"] == checkpoint.step and end["exit_code"] == 0 for end in self.events("job_end"))

    def report(self) -> str:
        logs = [f"== {path.name}\n{path.read_text()[-1500:]}" for path in self.run.logs.glob("*.out")]
        events = [str(event) for event in self.run.events()]
        return "\n".join([*events, *logs, self.slurm.run("squeue", "--states=all", "--format=%i %j %T %r %E")])

    def running_job(self) -> str:
        (job,) = [start["job"] for start in self.events("job_start")][-1:]
        return str(job)

    def weights(self) -> dict[str, torch.Tensor]:
        """Of the end of training, with each row trained on once in every epoch."""
        checkpoint, _ = newest_valid(self.run.checkpoints)
        assert checkpoint is not None and checkpoint.step == checkpoint.terms.horizon_steps
        assert checkpoint.ledger.whole_epochs == 2 and not checkpoint.ledger.epochs
        return load_file(checkpoint.path / "model.safetensors")

    def repeated_steps(self) -> int:
        """Optimizer steps done more than once: work that a fault has cost."""
        counts = Counter(line["step"] for line in self.run.metrics())
        return sum(counts.values()) - len(counts)


def new_chain(slurm: SlurmCluster, folder: Path, **changes: str) -> Chain:
    """A chain of two blocks; all share the prepared data, which lies beside the cluster."""
    settings = {**SETTINGS, "runs_dir": str(folder / "runs"), "data_dir": str(slurm.folder / "data"), **changes}
    arguments = [str(PROJECT / "configs/test.yaml")]
    arguments += [word for key, value in settings.items() for word in (f"--{key}", value)]
    return Chain(RunFolder(folder / "runs/test"), slurm, arguments)


def uninterrupted(slurm: SlurmCluster, folder: Path, **changes: str) -> dict[str, torch.Tensor]:
    """The weights after the same epochs in one block."""
    one_block = {"training.epochs_per_job": "2", "training.total_jobs": "1"}
    chain = new_chain(slurm, folder, **{**changes, **one_block})
    chain.submit()
    chain.wait_until_trained()
    return chain.weights()


@pytest.fixture(scope="module")
def reference(slurm_for_session: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Of one process."""
    with pointed_at(slurm_for_session):
        return uninterrupted(slurm_for_session, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def reference_on_two_nodes(
    slurm_for_session: SlurmCluster, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """Of two nodes with two processes each."""
    with pointed_at(slurm_for_session):
        return uninterrupted(slurm_for_session, tmp_path_factory.mktemp("whole_on_two_nodes"), **TWO_NODES)


@contextlib.contextmanager
def pointed_at(cluster: SlurmCluster) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SLURM_CONF", str(cluster.folder / "slurm.conf"))
        yield


def preempt(slurm: SlurmCluster, chain: Chain) -> None:
    """An urgent job takes all nodes, and the chain's job is back in the queue, or running again, when this returns."""
    requeued = len(chain.events("requeued"))
    urgent = slurm.run(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--mem=100", "--time=1"),
        *("--output=/dev/null", "--wrap=sleep 1"),
    )
    slurm.wait_for_state(urgent, "COMPLETED", timeout_s=90)
    assert len(chain.events("requeued")) == requeued + 1, chain.report()


def test_a_chain_that_is_preempted_twice_loses_nothing(
    slurm: SlurmCluster, tmp_path: Path, reference: dict[str, torch.Tensor]
) -> None:
    chain = new_chain(slurm, tmp_path)
    chain.submit()
    for step in (20, 100):
        chain.wait_for_step(step)
        preempt(slurm, chain)
    chain.wait_until_trained()
    assert_identical(chain.weights(), reference)
    assert chain.repeated_steps() == 0
    assert [event["reason"] for event in chain.events("stop_signal")] == ["preempted", "preempted"]


def test_two_nodes_leave_at_the_same_step_when_preempted(
    slurm: SlurmCluster, tmp_path: Path, reference_on_two_nodes: dict[str, torch.Tensor]
) -> None:
    chain = new_chain(slurm, tmp_path, **TWO_NODES)
    chain.submit()
    chain.wait_for_step(30)
    preempt(slurm, chain)
    chain.wait_until_trained()
    assert_identical(chain.weights(), reference_on_two_nodes)
    assert chain.repeated_steps() == 0


def test_a_signal_while_python_still_imports_costs_nothing_but_time(
    slurm: SlurmCluster, tmp_path: Path, reference: dict[str, torch.Tensor]
) -> None:
    chain = new_chain(slurm, tmp_path)
    chain.submit()
    job = block_jobs(chain)[0]
    slurm.wait_for_state(job, "RUNNING", timeout_s=90)
    for _ in range(3):
        with contextlib.suppress(AssertionError):  # the job is between two starts
            slurm.run("scancel", "--signal=USR2", job)
        time.sleep(1)
    chain.wait_until_trained()
    assert_identical(chain.weights(), reference)
    assert chain.repeated_steps() == 0


def block_jobs(chain: Chain) -> list[str]:
    """Ids of the submitted blocks, in order."""
    return [str(job.id) for job in Journal.open(chain.run).jobs if job.kind == "block"]


def test_a_block_that_meets_its_time_limit_goes_on_by_itself(
    slurm: SlurmCluster, tmp_path: Path, reference: dict[str, torch.Tensor]
) -> None:
    chain = new_chain(slurm, tmp_path, **{"slurm.warning_s": "30"})
    chain.submit()
    job = block_jobs(chain)[0]
    chain.wait_for_step(10)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    slurm.run("scancel", "--signal=STOP", job)  # holds the block up until its warning comes
    chain.wait_for("requeue", lambda: chain.events("requeued"))
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    chain.wait_until_trained()
    assert_identical(chain.weights(), reference)
    assert chain.repeated_steps() == 0
    assert [event["reason"] for event in chain.events("stop_signal")] == ["time limit"]


def processes_of(run: RunFolder) -> list[int]:
    """The Python processes of the run's job, all ranks."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if b"submitit.core._submit" in words and os.fsencode(run.logs) in words and words[0] != b"srun":
                    found.append(int(folder.name))
    return sorted(found)


def test_a_killed_rank_costs_the_steps_since_the_last_save_and_the_chain_makes_up_for_the_block(
    slurm: SlurmCluster, tmp_path: Path, reference_on_two_nodes: dict[str, torch.Tensor]
) -> None:
    chain = new_chain(slurm, tmp_path, **{**TWO_NODES, "training.save_every": "10"})
    chain.submit()
    chain.wait_for_step(25)
    os.kill(processes_of(chain.run)[-1], signal.SIGKILL)
    chain.wait_until_trained(timeout_s=300)
    assert_identical(chain.weights(), reference_on_two_nodes)
    assert chain.repeated_steps() <= 10
    assert len(block_jobs(chain)) == 3  # the lost one was added behind the others


def node_of(slurm: SlurmCluster, job: str) -> str:
    return slurm.run("squeue", "--noheader", "--format=%N", f"--jobs={job}")


def test_a_lost_node_is_made_good_elsewhere(
    slurm: SlurmCluster, tmp_path: Path, reference: dict[str, torch.Tensor]
) -> None:
    chain = new_chain(slurm, tmp_path, **{"training.save_every": "10"})
    chain.submit()
    chain.wait_for_step(25)
    node = node_of(slurm, chain.running_job())
    slurm.daemon("kill", node)
    for process in [*step_daemons(node), *processes_of(chain.run)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    chain.wait_for("second start", lambda: len(chain.events("job_start")) >= 2 + prepared_here(chain))
    slurm.daemon("start", node)
    chain.wait_until_trained()
    assert_identical(chain.weights(), reference)
    assert chain.repeated_steps() <= 10


def prepared_here(chain: Chain) -> int:
    """Jobs of the chain before its first block."""
    return sum(job.kind == "prepare" for job in Journal.open(chain.run).jobs)


def step_daemons(node: str) -> list[int]:
    """The slurmstepd processes of a node: the daemon of each job and step, without which it counts as dead."""
    answer = subprocess.run(["pgrep", "-f", f"slurmstepd.*{node}|slurmstepd: \\["], capture_output=True, text=True)
    return [int(word) for word in answer.stdout.split()]


def test_a_job_that_lives_on_after_its_node_was_given_up_writes_nothing_more(
    slurm: SlurmCluster, tmp_path: Path, reference: dict[str, torch.Tensor]
) -> None:
    chain = new_chain(slurm, tmp_path, **{"training.save_every": "10"})
    chain.submit()
    chain.wait_for_step(25)
    first_job = chain.running_job()
    zombies = processes_of(chain.run)
    for process in zombies:
        os.kill(process, signal.SIGSTOP)  # a node that hangs
    node = node_of(slurm, first_job)
    slurm.daemon("kill", node)
    starts = len(chain.events("job_start"))
    chain.wait_for("second start", lambda: len(chain.events("job_start")) > starts)
    chain.wait_for("a checkpoint of it", lambda: chain.events("checkpoint")[-1]["time"] > last_start(chain))
    for process in zombies:
        os.kill(process, signal.SIGCONT)
    chain.wait_for("end of the old ones", lambda: not any(is_there(process) for process in zombies))
    log = "".join(path.read_text() for path in chain.run.logs.glob(f"{first_job}_0_log.out"))
    assert "has taken over this run; nothing more is written from here" in log
    slurm.daemon("start", node)
    chain.wait_until_trained()
    assert_identical(chain.weights(), reference)


def last_start(chain: Chain) -> float:
    return float(chain.events("job_start")[-1]["time"])


def is_there(process: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_controller_that_dies_during_training_and_comes_back_changes_nothing(
    slurm: SlurmCluster, tmp_path: Path, reference: dict[str, torch.Tensor]
) -> None:
    chain = new_chain(slurm, tmp_path)
    chain.submit()
    chain.wait_for_step(20)
    slurm.daemon("kill", "controller")
    chain.wait_for_step(40)
    slurm.daemon("start", "controller")
    chain.wait_until_trained()
    assert_identical(chain.weights(), reference)
    assert chain.repeated_steps() == 0


@pytest.mark.parametrize("cancelled_first", [True, False])
def test_a_chain_that_is_cancelled_while_it_is_preempted_stays_cancelled(
    slurm: SlurmCluster, tmp_path: Path, reference: dict[str, torch.Tensor], cancelled_first: bool
) -> None:
    chain = new_chain(slurm, tmp_path)
    chain.submit()
    chain.wait_for_step(20)
    jobs = [str(job.id) for job in Journal.open(chain.run).jobs]
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--mem=100", "--time=1"]
    urgent += ["--output=/dev/null", "--wrap=sleep 1"]
    if cancelled_first:
        slurm.run("scancel", *reversed(jobs))
        slurm.run(*urgent)
    else:
        slurm.run(*urgent)
        chain.wait_for("stop", lambda: chain.events("stop_signal"))
        slurm.run("scancel", *reversed(jobs))
    for job in jobs:
        slurm.wait_for_state(job, "CANCELLED", "COMPLETED", timeout_s=60)
    time.sleep(8)  # longer than a requeued job waits
    assert slurm.run("squeue", "--noheader", "--partition=gpucluster") == ""
    assert not chain.run.done.exists()

    chain.submit()
    chain.wait_until_trained()
    assert_identical(chain.weights(), reference)
    assert chain.repeated_steps() == 0
