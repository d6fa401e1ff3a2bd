"""The settings of an EAGLE-3 run: what is accepted, and what each mistake is told before anything is queued."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from drafting_models import TARGETS, target_config

from drafting.config import count_draft_parameters
from drafting.model import DraftModel, draft_config
from drafting.run import Eagle3Run
from jobs.config import PROJECT, read_resolved_config, read_run_config, resolved_values
from jobs.preflight import check_run
from settings.yaml_tree import ConfigError

SMALLEST = """\
trainer: eagle3
dataset:
  name: test_dataset
model:
  name: configs/models/small
training:
  lr: 1e-4
"""


def write(folder: Path, text: str = SMALLEST) -> Path:
    file = folder / "run.yaml"
    file.write_text(text)
    return file


def problems_of(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        check_run(file, overrides)
    return [str(problem) for problem in raised.value.problems]


def test_a_run_needs_no_section_of_its_own(tmp_path: Path) -> None:
    config = read_run_config(write(tmp_path), ["--eagle3.steps", "5"])
    assert config.eagle3 is not None
    assert (config.eagle3.steps, config.eagle3.decay, config.eagle3.draft_vocabulary) == (5, 0.8, 32000)
    assert resolved_values(config).keys() & {"finetuning", "distillation", "eagle3"} == {"eagle3"}


@pytest.mark.parametrize("name", ["eagle3.yaml", "eagle3_test.yaml"])
def test_the_configs_that_come_along_can_be_read_back_from_a_run_folder(name: str, tmp_path: Path) -> None:
    config = read_run_config(PROJECT / "configs" / name)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(resolved_values(config)))
    assert read_resolved_config(file) == config


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["--model.from_scratch", "true"], "model.from_scratch: the target of a draft needs trained weights"),
        (["--model.peft", "true"], "model.peft: the target of a draft is frozen"),
        (["--model.tokenizer", "configs/models/tiny"], "the target is served with its own tokenizer and chat template"),
        (["--training.parallelism", "fsdp"], "training.parallelism: fsdp: a draft is small"),
        (["--eagle3.layers", "[3, 2, 1]"], "eagle3.layers must be 3 layers, each above the one before"),
        (["--eagle3.layers", "[1, 2, 8]"], "eagle3.layers: there is no layer 8; the target has layers 0 to 6"),
        (["--eagle3.decay", "1.5"], "eagle3.decay must be in (0, 1], got 1.5"),
        (["--eagle3.chain", "0"], "eagle3.chain must be at least 1, got 0"),
        (["--eagle3.step", "3"], "did you mean eagle3.steps"),
        (["--model.name", "configs/models/tiny"], "eagle3.layers: 2, L // 2 and L - 3 are not three rising layers"),
        (["--distillation.weight", "1"], "distillation: only trainer: distillation reads this section"),
        ([], "has no weights (*.safetensors)"),
    ],
)
def test_each_mistake_is_told(overrides: list[str], told: str, tmp_path: Path) -> None:
    problems = problems_of(write(tmp_path), *overrides)
    assert any(told in problem for problem in problems), problems


def test_a_target_of_another_family_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"model_type": "gemma2", "num_hidden_layers": 26}))
    (problem,) = problems_of(write(tmp_path), "--model.name", str(target))
    assert "a draft head is trained for llama, mistral, qwen2, qwen3 models; this is gemma2" in problem


def test_a_context_shorter_than_the_target_s_is_noted(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    shape = {"model_type": "llama", "num_hidden_layers": 8, "max_position_embeddings": 8192}
    (target / "config.json").write_text(json.dumps(shape))
    (target / "model.safetensors").touch()
    notes = check_run(write(tmp_path), ["--model.name", str(target)]).notes
    assert any("rows of up to 1024 tokens and its target takes 8192" in note for note in notes)


@pytest.mark.parametrize("family", TARGETS)
def test_the_plan_counts_the_parameters_that_are_trained(family: str) -> None:
    config = target_config(family)
    draft = DraftModel(draft_config(config, draft_vocabulary=20))
    counted = count_draft_parameters(config.to_dict(), draft_vocabulary=20)
    assert counted == sum(parameter.numel() for parameter in draft.parameters())


def test_a_trainer_is_not_given_a_model_that_cannot_be_a_target(tmp_path: Path) -> None:
    config = read_run_config(write(tmp_path))
    with pytest.raises(ValueError, match="needs trained weights"):
        Eagle3Run(
            folder=None,  # type: ignore[arg-type]
            prepared=tmp_path,
            module=None,
            seed=1,
            dataset=config.dataset,
            model=replace(config.model, from_scratch=True),
            training=config.training,
            evaluation=config.evaluation,
            eagle3=config.eagle3,  # type: ignore[arg-type]
        )


def test_settings_are_checked_without_torch() -> None:
    code = "import sys, drafting.config, drafting.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0
