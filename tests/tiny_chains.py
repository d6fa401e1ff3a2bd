"""Chains of the smallest model on a few made-up rows, for tests that submit them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.config import PROJECT
from jobs.preflight import CheckedRun, check_run

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster

TINY = [
    *("--dataset.name", "synthetic_dataset", "--dataset.num_rows", "60"),
    *("--training.epochs_per_job", "1", "--training.batch_size", "2", "--training.log_every", "1"),
    *("--slurm.time", "10", "--slurm.mem", "1500M", "--evaluation.limit", "0"),
]

# The real command line, except that it trusts the controller to live for the seconds after a submission.
QUICK_TRAIN = """
import sys
from jobs import __main__, submission
submission.SETTLE_S = 0.2
sys.exit(__main__.main(sys.argv[1:]))
"""


def train_sh(*arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Run ./train.sh as a user does."""
    command = [str(PROJECT / "train.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def quick_train(*arguments: str, environment: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    """What ./train.sh runs, without the 6 s in which a chain that was submitted is stored."""
    command = [sys.executable, "-c", QUICK_TRAIN, *arguments]
    environment = {**environment, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def folders(tmp_path: Path) -> list[str]:
    """Options that keep runs and data below `tmp_path`."""
    return ["--runs_dir", str(tmp_path / "runs"), "--data_dir", str(tmp_path / "data")]


def checked_run(tmp_path: Path, *overrides: str) -> CheckedRun:
    """The run of configs/test.yaml: prepare, three blocks, evaluate."""
    return check_run(PROJECT / "configs/test.yaml", [*TINY, *folders(tmp_path), *overrides])


def queued_names(slurm: SlurmCluster) -> list[str]:
    """Names of all jobs that are queued or running."""
    return sorted(slurm.run("squeue", "--noheader", "--format=%j").split())
