"""A draft head trained by a whole chain on a real Slurm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_chains import TINY, folders, quick_train
from tiny_teachers import make_teacher

from jobs.config import PROJECT
from training.run_folder import RunFolder

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster

pytest_plugins = ["slurm_cluster"]
pytestmark = pytest.mark.cluster


def test_a_chain_writes_the_features_trains_two_blocks_on_them_and_measures_the_draft(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    target = make_teacher(tmp_path / "target")
    options = ["--model.name", str(target), "--eagle3.features", "cached", "--training.total_jobs", "2"]
    tiny = [*TINY, "--evaluation.limit", "2", "--evaluation.max_new_tokens", "8", "--dataset.max_length", "128"]
    answer = quick_train(str(PROJECT / "configs/eagle3_test.yaml"), *tiny, *options, *folders(tmp_path), "--wait")
    run = RunFolder(tmp_path / "runs/eagle3_test")
    logs = "\n".join(path.read_text() for path in run.logs.glob("*_log.out"))
    assert answer.returncode == 0, answer.stdout + answer.stderr + logs
    assert run.done.exists()
    assert [event["block"] for event in run.events() if event["event"] == "block_end"] == [1, 2]
    written_by = {event["job"] for event in run.events() if event["event"] == "captured"}
    assert len(written_by) == 1, "the second block finds what the first has written"
    assert "0 GB are to be written" in logs
    scores = json.loads(run.evaluation.read_text())
    assert scores["decoded_prompts"] == scores["identical_greedy_answers"] == 2
    assert "synthetic_dataset: simulated acceptance length" in answer.stdout
    assert "Accepted guesses by source" in (run.path / "report.html").read_text()
    assert (run.export / "model.safetensors").is_file()
