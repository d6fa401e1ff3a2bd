"""Every command of the README and of the documents beside it, run as it stands there, in a copy of the project."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.config import PROJECT

pytestmark = pytest.mark.chain

RunCommand = Callable[..., subprocess.CompletedProcess[str]]
README, TRAINERS, DATASETS = ((PROJECT / name).read_text() for name in ("README.md", "TRAINERS.md", "DATASETS.md"))
ONE_SHORT_BLOCK = ["--training.epochs_per_job", "1", "--training.total_jobs", "1"]


def commands(document: str) -> set[str]:
    """Lines and inline snippets of a document that call a script of the project, without their comments."""
    found = re.findall(r"^    (\./\S.*?)(?:\s{2,}#.*)?$|`(\./[^`]+)`", document, re.MULTILINE)
    return {(block or inline).strip() for block, inline in found}


def test_the_readme_is_short_and_every_command_in_it_has_a_test() -> None:
    assert len(README.splitlines()) < 200
    assert commands(README) == {
        "./train.sh configs/test.yaml",  # test_the_first_command_trains
        "./train.sh prepare configs/mixtures/toy.yaml --dry-run",  # test_the_recipe_of_the_readme_is_planned
        "./train.sh configs/test.yaml --name mixed --dataset.mixture configs/mixtures/toy.yaml",
        "./tests/run",  # what runs this test
        "./train.sh configs/gsm8k.yaml --slurm.partition gpu --slurm.gpus_per_node 4",  # test_the_cluster_command_...
        "./train.sh status gsm8k --watch",  # test_status_and_logs_of_a_run
        "./train.sh logs gsm8k -f",
        "./train.sh stop gsm8k",  # test_verbs_that_steer_a_run; tests/test_steering.py, tests/test_extend.py
        "./train.sh cancel gsm8k",
        "./train.sh resume gsm8k",
        "./train.sh extend gsm8k --jobs 2 --lr-policy rewarm",
        "./train.sh doctor configs/gsm8k.yaml",  # test_the_doctor_looks_at_this_machine
        "./train.sh configs/eagle3_test.yaml",  # test_the_model_of_the_first_command_gets_a_draft_head
        "./train.sh configs/distillation_test.yaml",  # test_the_model_of_the_first_command_teaches_another
        "./train.sh configs/examples/dpo.yaml",  # test_an_example_learns_from_preferences
        "./train.sh configs/examples/vision_mixture.yaml",  # test_an_example_learns_from_images_among_texts
        "./train.sh check configs/eagle3.yaml",  # test_the_draft_of_a_served_model_is_checked
        "./train.sh prepare configs/eagle3.yaml",  # tests/test_eagle3_data.py
        "./train.sh plan configs/distillation.yaml",  # test_a_teacher_is_planned_for_examined_and_captured
        "./train.sh doctor configs/distillation.yaml",
        "./train.sh capture configs/distillation.yaml",
        "./train.sh drill configs/test.yaml",  # tests/test_drill.py
        "./train.sh FILE",  # placeholders of the verbs tested below
        "./train.sh check FILE",
        "./train.sh plan FILE",
        "./train.sh check-dataset FILE",
        "./train.sh report NAME",
        "./train.sh datasets",
    }
    assert os.access(PROJECT / "tests/run", os.X_OK)


def test_every_command_of_the_documents_beside_it_has_a_test() -> None:
    assert commands(TRAINERS) == {
        # test_verbs_that_steer_a_run; tests/test_launch.py, tests/test_distributed.py
        "./train.sh resume NAME --slurm.gpus_per_node 1 --training.gradient_accumulation 4",
    }
    assert commands(DATASETS) == {"./train.sh datasets"}  # test_the_list_of_datasets


def test_the_first_command_trains(project_copy: Path) -> None:
    assert (project_copy / "runs/test/DONE").exists()


def test_the_model_of_the_first_command_teaches_another(project_copy: Path, in_copy: RunCommand) -> None:
    answer = in_copy("./train.sh configs/distillation_test.yaml", *ONE_SHORT_BLOCK)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert (project_copy / "runs/distillation_test/DONE").exists()
    assert "student before" in answer.stdout


def test_the_model_of_the_first_command_gets_a_draft_head(project_copy: Path, in_copy: RunCommand) -> None:
    answer = in_copy("./train.sh configs/eagle3_test.yaml", *ONE_SHORT_BLOCK)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert (project_copy / "runs/eagle3_test/export/model.safetensors").exists()


def test_the_draft_of_a_served_model_is_checked(in_copy: RunCommand) -> None:
    at_hand = ["--model.name", "runs/test/export", "--eagle3.layers", "[0, 1, 2]", "--cluster", "local"]
    answer = in_copy("./train.sh check configs/eagle3.yaml", *at_hand)
    assert answer.returncode == 0, answer.stderr
    assert "memory of each device" in answer.stdout


def test_an_example_learns_from_images_among_texts(in_copy: RunCommand) -> None:
    answer = in_copy("./train.sh configs/examples/vision_mixture.yaml", *ONE_SHORT_BLOCK)
    assert answer.returncode == 0, answer.stderr
    assert "perplexity" in answer.stdout


def test_an_example_learns_from_preferences(in_copy: RunCommand) -> None:
    answer = in_copy("./train.sh configs/examples/dpo.yaml", *ONE_SHORT_BLOCK, "--dataset.num_rows", "30")
    assert answer.returncode == 0, answer.stderr
    assert "accuracy" in answer.stdout


@pytest.mark.parametrize("verb", ["plan", "doctor", "capture"])
def test_a_teacher_is_planned_for_examined_and_captured(in_copy: RunCommand, verb: str) -> None:
    at_hand = ["--distillation.teacher_model.name", "runs/test/export", "--model.name", "configs/models/tiny"]
    here = ["--model.from_scratch", "true", "--dataset.mixture", "configs/mixtures/toy.yaml", "--cluster", "local"]
    answer = in_copy(f"./train.sh {verb} configs/distillation.yaml", *at_hand, *here, "--dataset.limit", "40")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "teacher" in answer.stdout


def test_the_cluster_command_is_checked_and_planned(in_copy: RunCommand) -> None:
    command = "./train.sh configs/gsm8k.yaml --slurm.partition gpu --slurm.gpus_per_node 4"
    answer = in_copy(command, "--dry-run", "--cluster", "local")
    assert answer.returncode == 0, answer.stderr
    assert "run gsm8k" in answer.stdout


def test_the_recipe_of_the_readme_is_planned_and_checked(in_copy: RunCommand) -> None:
    recipe = "configs/mixtures/toy.yaml"
    planned = in_copy(f"./train.sh prepare {recipe} --dry-run")
    assert planned.returncode == 0, planned.stderr
    checked = in_copy(f"./train.sh check configs/test.yaml --name mixed --dataset.mixture {recipe}")
    assert checked.returncode == 0, checked.stderr


def test_status_and_logs_of_a_run(in_copy: RunCommand) -> None:
    assert "done" in in_copy("./train.sh status test").stdout
    assert in_copy("./train.sh logs test").returncode == 0
    assert in_copy("./train.sh report test").stdout.strip().endswith("runs/test/report.html")
    unknown = in_copy("./train.sh status gsm8k")
    assert unknown.returncode == 64
    assert "no run gsm8k" in unknown.stderr


@pytest.mark.parametrize(
    "command",
    [
        "stop gsm8k",
        "cancel gsm8k",
        "resume gsm8k",
        "resume gsm8k --slurm.gpus_per_node 1 --training.gradient_accumulation 4",
        "extend gsm8k --jobs 2 --lr-policy rewarm",
    ],
)
def test_verbs_that_steer_a_run_name_the_runs_there_are(in_copy: RunCommand, command: str) -> None:
    answer = in_copy(f"./train.sh {command}")
    assert answer.returncode == 64
    assert "no run gsm8k" in answer.stderr and "test" in answer.stderr


def test_the_doctor_looks_at_this_machine(in_copy: RunCommand) -> None:
    answer = in_copy("./train.sh doctor configs/gsm8k.yaml", "--model.name", "configs/models/tiny")
    assert answer.returncode in (0, 1), answer.stderr
    assert "Slurm" in answer.stdout and "disk" in answer.stdout


@pytest.mark.parametrize("verb", ["check", "plan", "check-dataset"])
def test_verbs_on_a_file(in_copy: RunCommand, verb: str) -> None:
    answer = in_copy(f"./train.sh {verb} configs/test.yaml")
    assert answer.returncode == 0, answer.stderr


def test_the_list_of_datasets(in_copy: RunCommand) -> None:
    assert "gsm8k" in in_copy("./train.sh datasets").stdout


def test_the_dataset_module_of_the_readme_trains(project_copy: Path, in_copy: RunCommand) -> None:
    text = re.search(r"(       def get_custom_dataset.*?)\n\n", README, re.DOTALL)
    assert text is not None
    module = "\n".join(line[7:] for line in text[1].splitlines()).replace(", ...]", "] * 10")
    (project_copy / "datasets/mine.py").write_text(module)
    answer = in_copy("./train.sh prepare configs/test.yaml", "--dataset.name", "mine")
    assert answer.returncode == 0, answer.stderr
    assert "8 rows" in answer.stdout


def test_the_yaml_of_the_readme_is_read(project_copy: Path, in_copy: RunCommand) -> None:
    text = re.search(r"^    dataset:\n.*?gpus_per_node: 1$", README, re.DOTALL | re.MULTILINE)
    assert text is not None
    yaml = "\n".join(line[4:] for line in text[0].splitlines())
    (project_copy / "configs/readme.yaml").write_text(yaml.replace("meta-llama/Llama-3.2-1B", "configs/models/tiny"))
    answer = in_copy("./train.sh check configs/readme.yaml", "--cluster", "local")
    assert answer.returncode == 0, answer.stderr


def test_every_file_that_the_documents_link_to_exists() -> None:
    for document in ("README.md", "TRAINERS.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (PROJECT / document).read_text()):
            assert (PROJECT / target).exists(), f"{document} links to {target}"
