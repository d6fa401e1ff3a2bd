"""Answers of a draft's target as a Slurm array: its tasks share the shards, and the last one prepares the data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_chains import TINY, folders, queued_names, train_sh
from tiny_teachers import TEST_YAML, make_teacher

from jobs.chain import Journal
from jobs.plan import plan_run
from jobs.preflight import check_run
from training.run_folder import RunFolder
from training.shard_folder import capture_progress

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster

pytest_plugins = ["slurm_cluster"]
pytestmark = pytest.mark.cluster


def test_the_tasks_of_an_array_share_the_answers_and_prepare_the_data_once(slurm: SlurmCluster, tmp_path: Path) -> None:
    answers = "{tasks: 2, max_new_tokens: 12, temperature: 1, shard_rows: 4, batch_size: 2, keep_unfinished: true}"
    options = [
        *(*TINY, *folders(tmp_path), "--slurm.mem", "1000M", "--model.from_scratch", "false"),
        *("--model.name", str(make_teacher(tmp_path / "target")), "--trainer", "eagle3"),
        *("--eagle3.layers", "[0, 1, 2]", "--eagle3.answers", answers),
    ]
    answer = train_sh("capture", TEST_YAML, *options)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "by a Slurm array of 2 tasks" in answer.stdout
    deadline = time.monotonic() + 120
    while queued_names(slurm):
        assert time.monotonic() < deadline
        time.sleep(0.2)

    run, checked = RunFolder(tmp_path / "runs/test"), check_run(Path(TEST_YAML), options)
    logs = "\n".join(path.read_text() for path in run.logs.glob("*_log.out"))
    plan = plan_run(checked)
    assert plan.prepared is not None, logs
    assert checked.preparation.mixture is not None
    progress = capture_progress(checked.preparation.mixture)
    assert progress.done == progress.total
    [array] = Journal.open(run).jobs
    shards = {event["job"]: event["shards"] for event in run.events() if event["event"] == "captured"}
    assert set(shards) == {f"{array.id}_0", f"{array.id}_1"}, logs
    assert not run.halt.exists()
    assert f"answers {checked.preparation.mixture} are written" in train_sh("capture", TEST_YAML, *options).stdout
