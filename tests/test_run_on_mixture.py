"""From the command line: a mixture made of a recipe, and a chain that trains on it."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from jobs.config import PROJECT
from training.run_folder import RunFolder

pytestmark = pytest.mark.chain

TEST_YAML = str(PROJECT / "configs/test.yaml")
RECIPE = """
metadata:
  phase: "sft"
datasets:
  - name: sums
    path: sums.jsonl
    mix_ratio: 0.6
    max_samples: 50
  - name: greetings
    path: greetings.jsonl
    mix_ratio: 0.4
    max_samples: 30
split: {test: 0.1}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two sources of question and answer, and a recipe that needs some rows of one twice."""
    sums = [{"question": f"What is {i} plus {i}?", "answer": f"{2 * i}"} for i in range(100)]
    greetings = [{"question": f"Say hello to guest {i}.", "answer": f"Hello, guest {i}!"} for i in range(60)]
    for name, rows in (("sums", sums), ("greetings", greetings)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE)
    return path


def train_sh(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(PROJECT / "train.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def sources(folder: Path) -> Counter[str]:
    return Counter(json.loads(line)["source"] for path in folder.glob("train-*.jsonl") for line in path.open())


def test_a_recipe_is_planned_then_mixed_exactly_as_planned(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["prepare", str(recipe), "--data-dir", str(tmp_path / "data"), "--output-dir", str(output)]
    dry = train_sh("prepare", "--dry-run", *arguments[1:])
    assert dry.returncode == 0, dry.stderr
    assert not output.exists()
    made = train_sh(*arguments)
    assert made.returncode == 0, made.stderr
    assert sources(output) == {"sums": 48, "greetings": 32}
    again = train_sh(*arguments)
    assert "80 rows in" in again.stdout and "held out" not in again.stdout


def test_one_source_and_another_total_can_be_asked_for(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["prepare", str(recipe), "--data-dir", str(tmp_path / "data"), "--output-dir", str(output)]
    answer = train_sh(*arguments, "--dataset", "sums", "--total-samples", "40")
    assert answer.returncode == 0, answer.stderr
    assert set(sources(output)) == {"sums"}
    wrong = train_sh(*arguments, "--dataset", "sumz")
    assert wrong.returncode == 64
    assert "did you mean sums?" in wrong.stderr


def test_a_wrong_recipe_is_told_with_its_line(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("mix_ratio: 0.4", "mix_ratio: 0.5"))
    answer = train_sh("prepare", str(recipe), "--dry-run")
    assert answer.returncode == 64
    assert "1.1" in answer.stderr and str(recipe) in answer.stderr


def test_a_chain_trains_on_a_mixture_and_a_second_run_reuses_it(recipe: Path, tmp_path: Path) -> None:
    folders = ["--runs_dir", str(tmp_path / "runs"), "--data_dir", str(tmp_path / "data"), "--cluster", "local"]
    short = ["--training.total_jobs", "1", "--training.epochs_per_job", "1"]
    mixed = ["--dataset.mixture", str(recipe)]
    dry = train_sh("prepare", TEST_YAML, "--dry-run", *folders, *short, *mixed)
    assert dry.returncode == 0 and "total" in dry.stdout, dry.stdout + dry.stderr
    assert not (tmp_path / "data/prepared").exists() and not list((tmp_path / "data").rglob("MIXED"))
    refused = train_sh("prepare", TEST_YAML, "--total-samples", "5", *folders, *short, *mixed)
    assert refused.returncode == 64 and "--total-samples: for a recipe of a mixture, and" in refused.stderr

    answer = train_sh(TEST_YAML, *folders, *short, *mixed)
    logs = "\n".join(path.read_text() for path in (tmp_path / "runs/test/logs").glob("*"))
    assert answer.returncode == 0, answer.stdout + answer.stderr + logs
    assert "dataset.mixture is trained on instead of test_dataset" in answer.stdout
    run = RunFolder(tmp_path / "runs/test")
    assert run.done.exists()
    assert json.loads(run.manifest.read_text())["mixture"]["folder"].startswith(str(tmp_path / "data/mixtures"))

    second = train_sh("prepare", TEST_YAML, *folders, *short, *mixed, "--name", "second")
    assert second.returncode == 0, second.stderr
    assert "is prepared already" in second.stdout


def test_several_modules_are_mixed_by_name(tmp_path: Path) -> None:
    folders = ["--runs_dir", str(tmp_path / "runs"), "--data_dir", str(tmp_path / "data"), "--cluster", "local"]
    names = ["--dataset.names", "synthetic_dataset,test_dataset", "--dataset.sampling", "interleaved"]
    answer = train_sh("prepare", TEST_YAML, *folders, *names)
    assert answer.returncode == 0, answer.stderr
    (mixture,) = (path.parent for path in (tmp_path / "data/mixtures").glob("*/MIXED"))
    counts = sources(mixture)
    assert set(counts) == {"synthetic_dataset", "test_dataset"}
    assert counts["synthetic_dataset"] == counts["test_dataset"] > 20


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["--dataset.mixture", "nowhere.yaml"], "no file nowhere.yaml; tried"),
        (["--dataset.names", "test_dataset,nowhere"], "no dataset module nowhere.py"),
        (["--dataset.names", "code_alpaca,mbpp"], "commercial"),
        (["--dataset.names", "mbpp", "--dataset.split_ratio", "0.5"], "is for a single dataset module"),
        (["--dataset.names", "mbpp", "--dataset.mixture", "x.yaml"], "keep one of them"),
    ],
)
def test_what_cannot_be_mixed_is_told_before_anything_starts(overrides: list[str], told: str) -> None:
    answer = train_sh("check", TEST_YAML, "--cluster", "local", *overrides)
    assert answer.returncode == 64, answer.stdout
    assert told in answer.stderr, answer.stderr
