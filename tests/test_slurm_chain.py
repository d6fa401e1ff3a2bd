"""Whole chains on a real Slurm: they finish, they are never submitted twice, and a refusal leaves nothing lost."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_chains import TINY, checked_run, folders, queued_names, quick_train, train_sh

from jobs import launch, submission
from jobs.chain import Journal
from jobs.config import PROJECT
from jobs.plan import plan_run
from jobs.queue import SlurmError
from jobs.status import read_status
from training.run_folder import RunFolder

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster

pytest_plugins = ["slurm_cluster"]
pytestmark = pytest.mark.cluster


@pytest.fixture
def waiting_partition(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The cluster, with a partition that takes jobs and starts none; submissions trust the controller to live."""
    monkeypatch.setattr(submission, "SETTLE_S", 0.2)
    slurm.run("scontrol", "update", "partition=gpucluster", "state=DOWN")
    yield slurm
    slurm.run("scontrol", "update", "partition=gpucluster", "state=UP")


def test_a_chain_over_two_nodes_finishes_and_learns(slurm: SlurmCluster, tmp_path: Path) -> None:
    arguments = [str(PROJECT / "configs/test.yaml"), *TINY, *folders(tmp_path)]
    arguments += ["--slurm.nodes", "2", "--training.total_jobs", "2", "--training.parallelism", "fsdp"]
    answer = train_sh(*arguments, "--wait")
    logs = "\n".join(path.read_text() for path in (tmp_path / "runs/test/logs").glob("*_log.out"))
    assert answer.returncode == 0, answer.stdout + answer.stderr + logs
    run = RunFolder(tmp_path / "runs/test")
    assert run.done.exists()
    assert json.loads(run.evaluation.read_text())["loss"] > 0
    evaluate = Journal.open(run).jobs[-1].id
    parts = sorted(path.name for path in run.logs.glob(f"{evaluate}_*_log.out"))
    assert parts == [f"{evaluate}_0_log.out", f"{evaluate}_1_log.out"], "what is scored lies in shards on both nodes"
    ends = [event for event in run.events() if event["event"] == "block_end"]
    assert [end["block"] for end in ends] == [1, 2]
    assert ends[-1]["eval_loss"] < ends[0]["eval_loss"]
    assert {event["host"] for event in run.events() if event["job"]} <= {"node1", "node2"}
    assert train_sh(*arguments).stdout.startswith("run test is finished")


def test_a_block_has_one_process_for_each_gpu_it_asked_for(slurm: SlurmCluster, tmp_path: Path) -> None:
    arguments = [str(PROJECT / "configs/test.yaml"), *TINY, *folders(tmp_path), "--training.total_jobs", "1"]
    answer = quick_train(*arguments, "--slurm.gpus_per_node", "2", "--slurm.cpus_per_task", "1", "--wait")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    run = RunFolder(tmp_path / "runs/test")
    logs = sorted(path.name for path in run.logs.glob("*_log.out"))
    prepare, block, evaluate = (job.id for job in Journal.open(run).jobs)
    assert logs == sorted([f"{prepare}_0_log.out", f"{block}_0_log.out", f"{block}_1_log.out", f"{evaluate}_0_log.out"])
    gpus = {job: slurm.run("scontrol", "show", "job", str(job)) for job in (prepare, block, evaluate)}
    assert "TresPerNode" not in gpus[prepare]
    assert "TresPerNode=gres:gpu:2" in gpus[block]
    assert "TresPerNode=gres:gpu:1" in gpus[evaluate]


def test_a_second_call_names_the_queued_jobs_and_submits_nothing(
    waiting_partition: SlurmCluster, tmp_path: Path
) -> None:
    arguments = [str(PROJECT / "configs/test.yaml"), *TINY, *folders(tmp_path)]
    first = quick_train(*arguments)
    assert first.returncode == 0, first.stderr
    before = queued_names(waiting_partition)
    assert len(before) == 5  # prepare, three blocks, evaluate
    second = quick_train(*arguments)
    assert "already queued: prepare" in second.stdout
    assert queued_names(waiting_partition) == before


def test_a_run_with_queued_jobs_is_not_extended(waiting_partition: SlurmCluster, tmp_path: Path) -> None:
    checked = checked_run(tmp_path)
    plan = plan_run(checked)
    run = launch.open_run_folder(checked, plan.data_key, print)
    jobs = launch.submit(run, checked, plan, print).queued
    settings = run.config.read_text()
    answer = quick_train("extend", str(run.path), "--jobs", "1", "--lr-policy", "rewarm")
    assert answer.returncode == 64
    assert f"run test still has jobs: {jobs[0].id} (pending), {jobs[1].id} (pending)" in answer.stderr
    assert run.config.read_text() == settings


def test_every_job_waits_for_the_one_before(waiting_partition: SlurmCluster, tmp_path: Path) -> None:
    checked = checked_run(tmp_path)
    plan = plan_run(checked)
    run = launch.open_run_folder(checked, plan.data_key, print)
    jobs = launch.submit(run, checked, plan, print).queued
    assert [job.kind for job in jobs] == ["prepare", "block", "block", "block", "evaluate"]
    for before, job in itertools.pairwise(jobs):
        shown = waiting_partition.run("squeue", "--noheader", f"--jobs={job.id}", "--format=%E")
        assert shown.startswith(f"afterany:{before.id}")
    assert {row.state for row in read_status(run).jobs} == {"waiting"}


def test_a_refusal_half_way_keeps_and_names_what_was_accepted(waiting_partition: SlurmCluster, tmp_path: Path) -> None:
    checked = checked_run(tmp_path)
    plan = plan_run(checked)
    run = launch.open_run_folder(checked, plan.data_key, print)

    def close_partition_after_two(line: str) -> None:
        if len(queued_names(waiting_partition)) == 2:
            waiting_partition.run("scontrol", "update", "partition=gpucluster", "state=INACTIVE")

    with pytest.raises(SlurmError) as raised:
        launch.submit(run, checked, plan, close_partition_after_two)
    accepted = [job for job in Journal.open(run).jobs if job.id]
    assert len(accepted) == 2
    assert f"jobs {accepted[0].id}, {accepted[1].id} stay queued" in str(raised.value)
    assert "3 more needed" in str(raised.value)

    waiting_partition.run("scontrol", "update", "partition=gpucluster", "state=DOWN")
    jobs = launch.submit(run, checked, plan, print).queued
    assert [job.kind for job in jobs] == ["prepare", "block", "block", "block", "evaluate"]
    assert queued_names(waiting_partition) == sorted(job.name for job in jobs)
    assert jobs[2].after == accepted[1].id


def test_a_submission_killed_after_sbatch_answered_is_found_again(
    waiting_partition: SlurmCluster, tmp_path: Path
) -> None:
    wrapper = tmp_path / "bin/sbatch"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@" && kill -9 $PPID\n')
    wrapper.chmod(0o755)
    arguments = [str(PROJECT / "configs/test.yaml"), *TINY, *folders(tmp_path)]
    killed = quick_train(*arguments, environment={**os.environ, "PATH": f"{wrapper.parent}:{os.environ['PATH']}"})
    assert killed.returncode == -9
    assert len(queued_names(waiting_partition)) == 1

    again = quick_train(*arguments)
    assert again.returncode == 0, again.stderr
    names = queued_names(waiting_partition)
    assert len(names) == len(set(names)) == 5
    journal = json.loads((tmp_path / "runs/test/chain.json").read_text())
    assert all(job["id"] for job in journal["jobs"])
    first = journal["jobs"][0]
    assert (tmp_path / "runs/test/logs" / f"{first['id']}_submitted.pkl").exists()


def test_bad_data_halts_the_whole_chain_with_its_reason(slurm: SlurmCluster, tmp_path: Path) -> None:
    module = tmp_path / "empty.py"
    module.write_text("def get_custom_dataset(dataset_config, processor, split):\n    return []\n")
    answer = quick_train(
        str(PROJECT / "configs/test.yaml"), *TINY[4:], *folders(tmp_path), "--dataset.name", "empty",
        "--dataset.file", str(module), "--training.total_jobs", "1", "--wait",
    )  # fmt: skip
    run = RunFolder(tmp_path / "runs/test")
    assert answer.returncode == 1
    assert "0 rows" in run.halt.read_text()
    assert [event["exit_code"] for event in run.events() if event["event"] == "job_end"] == [64, 64, 64]
    assert "test: halted" in answer.stdout


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["--slurm.partition", "nowhere"], "slurm.partition nowhere does not exist; there are gpucluster, urgent"),
        (["--slurm.partition", "gpucluster", "--slurm.time", "08:00:00"], "allows 240 min"),
    ],
)
def test_what_the_cluster_can_never_give_is_told_before_the_queue(
    slurm: SlurmCluster, tmp_path: Path, overrides: list[str], told: str
) -> None:
    answer = quick_train("check", str(PROJECT / "configs/test.yaml"), *TINY, *folders(tmp_path), *overrides)
    assert answer.returncode == 64
    assert told in answer.stderr
