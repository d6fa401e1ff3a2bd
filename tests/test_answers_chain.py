"""A run that learns what a model answers: the answers are a job of the chain, and its data is prepared from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_chains import TINY, folders
from tiny_teachers import TEST_YAML, make_teacher, taught_by

from answering.config import AnswersConfig
from jobs import launch
from jobs.__main__ import main
from jobs.capturing import answers_line, array_shape, capture_before_training, is_captured, shards_done
from jobs.exit_code import ExitCode
from jobs.job import run_job
from jobs.plan import plan_run
from jobs.preflight import CheckedRun, check_run
from mixture.mixture_folder import MARKER
from mixture.prepare import PreparedData, prepared_folder
from settings.yaml_tree import ConfigError
from training.run_folder import RunFolder

pytestmark = pytest.mark.chain


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def checked_run(folder: Path, teacher: Path, *overrides: str) -> CheckedRun:
    answers: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1, "keep_unfinished": "true", "shard_rows": 20}
    options = [text for key, value in answers.items() for text in (f"--distillation.answers.{key}", str(value))]
    text = ["--cluster", "local", "--distillation.teacher", "text", *options]
    return check_run(Path(TEST_YAML), [*taught_by(teacher), *folders(folder), *text, *overrides])


def checked_draft(folder: Path, target: Path, *overrides: str) -> CheckedRun:
    """A run that trains a draft of a target on the target's own answers."""
    answers = "{max_new_tokens: 6, temperature: 1, keep_unfinished: true, shard_rows: 20}"
    draft = ["--trainer", "eagle3", "--eagle3.layers", "[0, 1, 2]", "--eagle3.min_coverage", "0"]
    options = ["--cluster", "local", "--model.name", str(target), "--model.from_scratch", "false", *draft]
    return check_run(Path(TEST_YAML), [*TINY, *folders(folder), *options, "--eagle3.answers", answers, *overrides])


def start(checked: CheckedRun) -> tuple[RunFolder, str]:
    key = plan_run(checked).data_key
    return launch.open_run_folder(checked, key, print), key


def test_the_capture_job_has_the_teacher_answer_and_prepares_the_data_from_its_answers(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a job changes into the folder that its run was started from
    checked = checked_run(tmp_path, teacher)
    run, key = start(checked)
    answers = checked.preparation.mixture
    assert answers is not None
    assert answers_line(checked.config, answers) == f"answers {answers} are still to be written"
    training = ["block", "block", "block", "evaluate"]
    assert launch.remaining_jobs(run, checked.config, key) == ["capture", *training]
    assert shards_done(run, checked.config) == 0
    assert run_job("capture", run) == ExitCode.DONE
    assert is_captured(run, checked.config) and shards_done(run, checked.config) == 3
    assert launch.remaining_jobs(run, checked.config, key) == training
    prepared = PreparedData.open(prepared_folder(checked.config.data_folder, key))
    assert prepared is not None
    assert (answers / MARKER).is_file()
    assert answers_line(checked.config, answers) == f"answers {answers} are written"
    lines = [json.loads(line) for file in sorted(answers.glob("train-*.jsonl")) for line in file.open()]
    assert prepared.splits["train"] is not None and prepared.splits["train"].samples == len(lines) > 40
    assert all(line["id"].startswith("synthetic_dataset-train-") for line in lines)
    # Again, as another task of an array that comes late: nothing is left, and nothing is loaded.
    assert run_job("capture", run) == ExitCode.DONE
    assert capture_before_training(lambda: is_captured(run, checked.config), lambda: False, run)


def test_the_capture_verb_has_the_teacher_answer(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = "{max_new_tokens: 6, temperature: 1, keep_unfinished: true}"
    text = ["--cluster", "local", "--distillation.teacher", "text", "--distillation.answers", answers]
    arguments = ["capture", TEST_YAML, *taught_by(teacher), *folders(tmp_path), *text]
    assert main(arguments) == ExitCode.DONE
    told = capsys.readouterr().out
    assert "are still to be written" in told and "are written" in told.splitlines()[-1]
    starts = [event for event in RunFolder(tmp_path / "runs/test").events() if event["event"] == "job_start"]
    assert [event["kind"] for event in starts] == ["capture"]
    assert main(arguments) == ExitCode.DONE  # at once: nothing is left
    untaught = [argument for argument in arguments if argument != "text"]
    untaught.insert(untaught.index("--distillation.teacher") + 1, "none")
    assert main(untaught) == ExitCode.BAD_INPUT
    assert "nothing to capture or to answer" in capsys.readouterr().err


def test_a_block_of_a_draft_has_its_target_answer_and_learns_what_it_says(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checked = checked_draft(tmp_path, teacher)
    as_they_are = checked_draft(tmp_path, teacher, "--eagle3.answers", "null")
    assert plan_run(checked).data_key != plan_run(as_they_are).data_key
    run, key = start(checked)
    assert launch.remaining_jobs(run, checked.config, key)[:2] == ["capture", "block"]
    assert run_job("block", run) == ExitCode.DONE
    events = [event["event"] for event in run.events()]
    assert events.index("captured") < events.index("block_end")
    answers = checked.preparation.mixture
    assert answers is not None and (answers / MARKER).is_file()
    prepared = PreparedData.open(prepared_folder(checked.config.data_folder, key))
    assert prepared is not None and prepared.splits["train"] is not None
    lines = [line for file in answers.glob("train-*.jsonl") for line in file.open()]
    assert prepared.splits["train"].samples == len(lines)


def test_other_answers_are_other_data_and_other_tasks_are_not(teacher: Path, tmp_path: Path) -> None:
    first = checked_run(
        tmp_path, teacher, "--distillation.answers.tasks", "3", "--distillation.answers.batch_size", "2"
    )
    assert array_shape(first.config).tasks == 3
    assert first.config.distillation is not None and first.config.distillation.answers != AnswersConfig()
    keys = {
        plan_run(checked_run(tmp_path, teacher, *overrides)).data_key
        for overrides in ([], ["--seed", "7"], ["--distillation.answers.max_new_tokens", "7"])
    }
    assert len(keys) == 3 and plan_run(first).data_key in keys
    run, _ = start(first)
    again, _ = start(checked_run(tmp_path, teacher, "--distillation.answers.tasks", "5"))
    assert again.path == run.path


def test_rows_of_a_mixture_are_mixed_before_they_are_answered(teacher: Path, tmp_path: Path) -> None:
    options = [option for option in taught_by(teacher) if option not in ("--dataset.num_rows", "60")]
    mixed = ["--dataset.name", "null", "--dataset.names", "synthetic_dataset,test_dataset"]
    text = ["--cluster", "local", "--distillation.teacher", "text"]
    checked = check_run(Path(TEST_YAML), [*options, *folders(tmp_path), *mixed, *text])
    assert checked.mixture is not None and checked.preparation.mixture != checked.mixture.output_dir
    run, key = start(checked)
    assert launch.remaining_jobs(run, checked.config, key)[:2] == ["prepare", "capture"]
    assert checked.mixture.output_dir is not None
    checked.mixture.output_dir.mkdir(parents=True)
    (checked.mixture.output_dir / MARKER).touch()
    assert launch.remaining_jobs(run, checked.config, key)[:2] == ["capture", "block"]


def test_rationales_cannot_be_masked_in_answers_that_mark_none(teacher: Path, tmp_path: Path) -> None:
    for run in (checked_run, checked_draft):
        with pytest.raises(
            ConfigError, match=r"dataset\.mask_rationale: nothing marks what is reasoning in the answers"
        ):
            run(tmp_path, teacher, "--dataset.mask_rationale", "true")


def test_a_wrong_key_of_answers_is_told_with_its_line(teacher: Path, tmp_path: Path) -> None:
    file = tmp_path / "draft.yaml"
    text = Path(TEST_YAML).read_text() + "trainer: eagle3\neagle3:\n  answers:\n    batch_size: 0\n"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        check_run(file)
    line = len(text.splitlines())
    assert f"draft.yaml:{line}: answers.batch_size must be at least 1, got 0" in str(refused.value)
