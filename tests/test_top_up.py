"""When a job may add to its chain, and what it must not pass on to the jobs that it adds."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.top_up import outside_of_job, reason_to_add_nothing
from training.run_folder import RunFolder


def test_nothing_of_the_job_reaches_what_it_submits_but_where_slurm_is() -> None:
    of_the_job = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "SUBMITIT_EXECUTOR": "slurm", "RANK": "0"}
    of_the_user = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "physics", "HF_TOKEN": "x", "PATH": "/bin"}
    assert outside_of_job(of_the_job | of_the_user) == of_the_user


@pytest.mark.parametrize("name", ["DONE", "STOP", "HALT"])
def test_a_run_that_has_ended_gets_no_further_jobs(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("so it is\n")
    assert reason_to_add_nothing(RunFolder(tmp_path)) == f"the run has a {name} file"


def test_a_run_that_trains_without_slurm_gets_no_jobs(tmp_path: Path) -> None:
    assert reason_to_add_nothing(RunFolder(tmp_path)) == "the run was not submitted through Slurm"


def test_a_node_without_sbatch_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    run.chain.write_text("{}")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "this node has no sbatch" in str(reason_to_add_nothing(run))


def test_blocks_that_get_no_further_are_not_added_for_ever(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.chain.write_text("{}")
    for _ in range(2):
        assert "no new checkpoint" not in str(reason_to_add_nothing(run))
        run.record_event("job_start", kind="block", step=0)
    assert reason_to_add_nothing(run) == "the last blocks made no new checkpoint after step 0; see logs/"
    run.record_event("started_by_user")
    assert "no new checkpoint" not in str(reason_to_add_nothing(run))
