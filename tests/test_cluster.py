"""The test cluster itself: what the other cluster tests take for granted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster

pytest_plugins = ["slurm_cluster"]
pytestmark = pytest.mark.cluster


def test_both_nodes_are_idle(slurm: SlurmCluster) -> None:
    nodes = slurm.run("sinfo", "--noheader", "--Node", "--partition=gpucluster", "--format=%N %T")
    assert nodes.splitlines() == ["node1 idle", "node2 idle"]


def test_srun_starts_a_task_on_each_node(slurm: SlurmCluster) -> None:
    printed = slurm.run("srun", "--nodes=2", "--ntasks=2", "bash", "-c", "echo $SLURM_PROCID $SLURMD_NODENAME")
    assert sorted(printed.splitlines()) == ["0 node1", "1 node2"]


def test_each_task_sees_its_own_gpu(slurm: SlurmCluster) -> None:
    command = ["srun", "--ntasks=2", "--nodes=1", "--gpus-per-task=1", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES"]
    assert sorted(slurm.run(*command).splitlines()) == ["0", "1"]


def test_the_queue_has_the_time_limit_that_the_kit_is_made_for(slurm: SlurmCluster) -> None:
    partitions = slurm.run("sinfo", "--noheader", "--format=%P %l")
    assert sorted(partitions.splitlines()) == ["gpucluster* 4:00:00", "urgent infinite"]


def test_a_job_of_the_urgent_partition_preempts_and_the_other_is_requeued(slurm: SlurmCluster) -> None:
    whole_cluster = ["--nodes=2", "--exclusive", "--output=/dev/null"]
    # A job that ends by itself during its grace counts as finished, not as preempted.
    stubborn = "--wrap=trap '' TERM; sleep 300"
    preempted = slurm.run("sbatch", "--parsable", "--requeue", *whole_cluster, stubborn)
    slurm.wait_for_state(preempted, "RUNNING")
    urgent = slurm.run("sbatch", "--parsable", "--partition=urgent", *whole_cluster, "--wrap=true")
    slurm.wait_for_state(urgent, "COMPLETED")
    slurm.wait_for_state(preempted, "RUNNING")
    assert "Restarts=1" in slurm.run("scontrol", "show", "job", preempted)


def test_accounting_knows_a_job_that_ended(slurm: SlurmCluster) -> None:
    job_id = slurm.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=exit 7")
    slurm.wait_for_state(job_id, "FAILED")
    deadline = time.monotonic() + 20
    while (
        row := slurm.run("sacct", "--noheader", "-X", "-P", "--format=State,ExitCode", "-j", job_id)
    ) != "FAILED|7:0":
        assert time.monotonic() < deadline, f"sacct says {row!r}"
        time.sleep(0.5)


def test_a_node_that_was_killed_is_back_for_the_next_test(slurm: SlurmCluster) -> None:
    slurm.daemon("kill", "node2")
    slurm.daemon("start", "node2")
    assert slurm.run("srun", "--nodelist=node2", "bash", "-c", "echo $SLURMD_NODENAME") == "node2"
