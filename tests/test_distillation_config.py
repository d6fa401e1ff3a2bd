"""Reading the settings of a distillation run: what is accepted, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jobs.config import read_resolved_config, read_run_config, resolved_values
from settings.typed import changed_keys
from settings.yaml_tree import ConfigError, read_config_file

SMALLEST = """\
trainer: distillation
dataset:
  name: test_dataset
model:
  name: configs/models/tiny
training:
  lr: 1e-5
distillation:
  teacher_model:
    name: org/teacher
    revision: v2
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text)
    return file


def problems_of(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        read_run_config(file, overrides)
    return [str(problem) for problem in raised.value.problems]


def test_a_distillation_run_needs_only_a_teacher_beside_what_every_run_needs(tmp_path: Path) -> None:
    config = read_run_config(write(tmp_path, SMALLEST), ["--distillation.temperature", "2"])
    assert config.distillation is not None
    assert config.distillation.teacher == "cache"
    assert config.distillation.temperature == 2
    assert config.objective == "mixed"


def test_a_distillation_run_without_a_section_lacks_its_teacher(tmp_path: Path) -> None:
    text = SMALLEST.partition("distillation:\n")[0]
    assert problems_of(write(tmp_path, text)) == [
        f"{tmp_path}/run.yaml: distillation.teacher_model.name is missing and has no default"
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (SMALLEST + "finetuning:\n  objective: sft\n", "12: finetuning: only trainer: finetuning reads this section"),
        (SMALLEST.replace("trainer: distillation", "trainer: finetuning"), "8: distillation: only trainer: distill"),
        (SMALLEST.replace("trainer: distillation\n", "\n"), "and this run has trainer: finetuning; keep one of them"),
    ],
)
def test_a_section_that_the_trainer_does_not_read_is_an_error(tmp_path: Path, text: str, told: str) -> None:
    (problem,) = problems_of(write(tmp_path, text))
    assert told in problem


def test_all_problems_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        SMALLEST
        + """\
  divergence: reverse_kl
  temperature: 2.5
  cache:
    kindd: topk
  from_teacher:
    every: 0
finetuning:
  objective: sft
""",
    )
    told = problems_of(file, "--distillation.control", "3")
    assert any(line.startswith(f"{file}:15: unknown key distillation.cache.kindd") for line in told)
    assert any(line.startswith(f"{file}:17: distillation.from_teacher.every must be at least 1") for line in told)
    assert any(line.startswith(f"{file}:18: finetuning: only trainer: finetuning") for line in told)
    assert any(line.startswith("--distillation.control: distillation.control: expected a text") for line in told)


def test_a_cache_does_not_give_reverse_kl(tmp_path: Path) -> None:
    file = write(tmp_path, SMALLEST + "  divergence: reverse_kl\n  temperature: 2.5\n")
    told = problems_of(file)
    assert told[0].startswith(f"{file}:12: distillation.divergence: reverse_kl asks for")
    assert told[1].startswith(f"{file}:13: distillation.temperature: 2.5 is not among")


def test_a_student_cut_from_its_teacher_needs_no_name(tmp_path: Path) -> None:
    text = SMALLEST.replace("model:\n  name: configs/models/tiny\n", "") + "  from_teacher: {every: 2}\n"
    config = read_run_config(write(tmp_path, text))
    assert (config.model.name, config.model.revision) == ("org/teacher", "v2")
    assert config.distillation is not None and config.distillation.from_teacher is not None
    assert config.distillation.from_teacher.every == 2


def test_a_student_cut_from_its_teacher_is_no_other_model_and_not_random(tmp_path: Path) -> None:
    file = write(tmp_path, SMALLEST + "  from_teacher: {every: 2}\n")
    told = problems_of(file, "--model.from_scratch", "true")
    assert told[0].startswith(f"{file}:5: model.name: configs/models/tiny is not the teacher (org/teacher)")
    assert told[1].startswith("--model.from_scratch: model.from_scratch would throw away the layers")


def test_every_setting_survives_being_stored_in_the_run_folder(tmp_path: Path) -> None:
    text = SMALLEST.replace("model:\n  name: configs/models/tiny\n", "")
    text += "  teacher: live\n  from_teacher: {layers: [0, 2]}\n  hidden_states: {weight: 1, layers: {1: 2, 2: 4}}\n"
    config = read_run_config(write(tmp_path, text))
    assert config.distillation is not None
    assert config.distillation.hidden_states.layers == {1: 2, 2: 4}
    stored = tmp_path / "config.yaml"
    stored.write_text(yaml.safe_dump(resolved_values(config)))
    assert read_resolved_config(stored) == config
    assert changed_keys(read_config_file(stored).values, resolved_values(config)) == []
    assert "finetuning:" not in stored.read_text()
