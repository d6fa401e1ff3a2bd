"""The example configs of adapters, through all their jobs, on a model at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import launch
from jobs.config import PROJECT
from jobs.exit_code import ExitCode
from jobs.job import run_job
from jobs.plan import plan_run
from jobs.preflight import check_run
from jobs.report import report_page
from training.config import ModelConfig
from training.models import build_model, load_tokenizer
from training.run_folder import RunFolder

pytestmark = pytest.mark.chain


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights."""
    folder = tmp_path_factory.mktemp("base")
    model = ModelConfig(name=str(tiny_model), from_scratch=True)
    build_model(model, seed=5).save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return folder


def run_example(name: str, base: Path, folder: Path) -> RunFolder:
    """The chain's jobs one after another, in this process."""
    folders = ["--runs_dir", str(folder / "runs"), "--data_dir", str(folder / "data"), "--cluster", "local"]
    small = ["--model.name", str(base), "--evaluation.limit", "2", "--evaluation.max_new_tokens", "4"]
    checked = check_run(PROJECT / f"configs/examples/{name}.yaml", [*folders, *small])
    run = launch.open_run_folder(checked, plan_run(checked).data_key, print)
    for kind in ("prepare", "block", "block", "evaluate"):
        assert run_job(kind, run) == ExitCode.DONE  # type: ignore[arg-type]
    return run


def test_the_example_of_an_adapter_ends_with_adapter_and_merged_model(base: Path, tmp_path: Path) -> None:
    run = run_example("adapter", base, tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "merged"} <= {
        path.name for path in run.export.iterdir()
    }
    assert (run.export / "merged/model.safetensors").exists()
    assert run.evaluation.exists()


def test_the_example_of_experts_grows_to_four_and_the_report_shows_their_work(base: Path, tmp_path: Path) -> None:
    run = run_example("lora_experts", base, tmp_path)
    lines = list(run.metrics())
    asleep_at_first = [lines[0][f"expert_{number}"] for number in (3, 4)]
    assert asleep_at_first == [0, 0] and all(lines[-1][f"expert_{number}"] > 0 for number in (1, 2, 3, 4))
    assert "Share of the work of each expert" in report_page(run)
    assert (run.export / "lora_experts.py").exists()
