"""What tests share: a model of 75,000 parameters, data prepared from a small module, and runs made of both."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

# Several test processes share few cores, and sums over threads would not be reproducible between machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from distilling.config import DistillationConfig, TeacherModelConfig
from distilling.run import DistillationRun
from jobs.snapshot import snapshot_code
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.prepare import PreparationRequest, PreparedData, prepare
from training.config import EvaluationConfig, FinetuningConfig, ModelConfig, TrainingConfig
from training.run import FinetuningRun
from training.run_folder import RunFolder

PROJECT = Path(__file__).parent.parent

MODULE = '''
"""Sums of two numbers."""

def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):
    sums = [(a, b) for a in range(2, 12) for b in range(2, 7)]
    rows = [{"question": f"What is {a} plus {b}?" + " Please." * (a % 4), "answer": f"{a} + {b} = {a + b}"}
            for a, b in sums]
    cut = int(len(rows) * split_ratio)
    return rows[:cut] if split == "train" else rows[cut:]

def score(prediction, row):
    return float(prediction.split()[-1:] == row["answer"].split()[-1:])
'''

MakeRun = Callable[..., FinetuningRun]
MakeDistillation = Callable[..., DistillationRun]


RunCommand = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def project_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a user gets it, where `runs/` and `data/` are its own, after the first command of the README."""
    folder = tmp_path_factory.mktemp("copy") / "baton"
    snapshot_code(folder, PROJECT / "datasets/test_dataset.py")
    answer = run_in_copy(folder, "./train.sh configs/test.yaml")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return folder


@pytest.fixture(scope="session")
def in_copy(project_copy: Path) -> RunCommand:
    """in_copy("./train.sh configs/test.yaml", ...): what a command, and further words, does in `project_copy`."""
    return partial(run_in_copy, project_copy)


def run_in_copy(copy: Path, command: str, *more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"BATON_VENV": os.environ.get("BATON_VENV", str(PROJECT / ".venv"))}
    environment.pop("SLURM_CONF", None)
    return subprocess.run(
        [*command.split(), *more], cwd=copy, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama config of 75,000 parameters and the tiny model's tokenizer; no weights."""
    folder = tmp_path_factory.mktemp("model")
    for file in (PROJECT / "configs/models/tiny").iterdir():
        shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def sums_module(tmp_path_factory: pytest.TempPathFactory) -> ModuleFile:
    path = tmp_path_factory.mktemp("module") / "sums.py"
    path.write_text(MODULE)
    return ModuleFile(path)


@pytest.fixture(scope="session")
def prepared_sums(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, sums_module: ModuleFile) -> PreparedData:
    """40 training rows and 10 test rows, in 13 packs of up to 128 tokens."""
    request = PreparationRequest(
        dataset=DatasetConfig(name="sums", max_length=128),
        module=sums_module,
        tokenizer=str(tiny_model),
        objective="sft",
    )
    return prepare(request, tmp_path_factory.mktemp("data"), lambda line: None)


@pytest.fixture
def make_run(tmp_path: Path, tiny_model: Path, sums_module: ModuleFile, prepared_sums: PreparedData) -> MakeRun:
    """make_run("name", model={...}, training={...}): a run in its own folder, with these keys set."""
    return partial(run_on_sums, tmp_path, tiny_model, sums_module, prepared_sums)


def run_on_sums(
    folder: Path,
    tiny_model: Path,
    sums_module: ModuleFile,
    prepared_sums: PreparedData,
    name: str,
    *,
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
) -> FinetuningRun:
    run = RunFolder(folder / name)
    run.path.mkdir(exist_ok=True)
    default_training = {"lr": 1e-2, "batch_size": 2, "arguments": {"report_to": "none"}}
    return FinetuningRun(
        folder=run,
        prepared=prepared_sums.folder,
        module=sums_module,
        seed=1,
        dataset=DatasetConfig(name="sums", max_length=128),
        model=ModelConfig(**{"name": str(tiny_model), "from_scratch": True, **(model or {})}),
        training=TrainingConfig(**{**default_training, **(training or {})}),
        finetuning=FinetuningConfig(),
        evaluation=EvaluationConfig(limit=4, max_new_tokens=8),
    )


HALF_WIDTH = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}


@pytest.fixture(scope="session")
def teacher(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, sums_module: ModuleFile, prepared_sums: PreparedData
) -> Path:
    """The tiny model, after it has learned something."""
    import finetuning

    folder = tmp_path_factory.mktemp("teacher")
    run = run_on_sums(folder, tiny_model, sums_module, prepared_sums, "teacher", training={"epochs_per_job": 4})
    finetuning.train(run)
    return run.folder.export


@pytest.fixture
def student(tmp_path: Path, tiny_model: Path) -> Path:
    """A config of half the teacher's width, without weights."""
    folder = tmp_path / "student"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | HALF_WIDTH))
    return folder


@pytest.fixture
def make_distillation(make_run: MakeRun, teacher: Path, student: Path, tmp_path: Path) -> MakeDistillation:
    """make_distillation("name", teacher="live", training={...}): a run that learns the sums from the tiny teacher."""

    def make(
        name: str, *, model: dict[str, Any] | None = None, training: dict[str, Any] | None = None, **settings: Any
    ) -> DistillationRun:
        keys = {"name": str(student), "from_scratch": "from_teacher" not in settings, **(model or {})}
        plain = make_run(name, model=keys, training=training)
        values = {name: getattr(plain, name) for name in plain.__dataclass_fields__ if name != "finetuning"}
        model_config = TeacherModelConfig(name=str(teacher))
        config = DistillationConfig(**{"teacher": "live", "teacher_model": model_config, **settings})
        cache = tmp_path / f"cache-{config.cache.kind}-{config.cache.k}" if config.teacher == "cache" else None
        if cache is not None:
            from distilling.capture import CaptureRequest, capture

            request = CaptureRequest(
                prepared=plain.prepared, teacher=model_config, cache=config.cache, folder=cache, seed=plain.seed
            )
            assert capture(request, lambda line: None, stop_requested=lambda: False)
        return DistillationRun(**values, distillation=config, cache=cache)

    return make
