"""Tasks of lm-evaluation-harness, by name, on the model in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetuning
from jobs.config import PROJECT, read_run_config
from jobs.preflight import check_run, require_questions
from jobs.report import evaluation_section
from jobs.status_view import scores
from settings.yaml_tree import ConfigError
from training.config import EvaluationConfig, LmEvalConfig
from training.run import FinetuningRun

MakeRun = Callable[..., FinetuningRun]

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval, an extra of this project, is not installed"
)

SUMS = [
    {"question": f"What is {a} plus {b}?", "choices": [f"{a} + {b} = {a + b}", "No idea!"]}
    for a in (3, 5, 7)
    for b in (2, 4)
]

TASKS = {
    "sums_to_choose": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "sums_to_write": """
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def write_tasks(folder: Path) -> Path:
    """Two tasks over six sums in a local file."""
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    for name, text in TASKS.items():
        shared = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        (folder / f"{name}.yaml").write_text(
            shared + 'test_split: test\ndoc_to_text: "{{question}}"\ntarget_delimiter: "\\n"\n' + text
        )
    return folder


@needs_lm_eval
def test_the_scores_are_those_of_the_exported_model(make_run: MakeRun, tmp_path: Path) -> None:
    tasks = LmEvalConfig(tasks=list(TASKS), include_path=str(write_tasks(tmp_path / "tasks")), batch_size=4)
    run = make_run("run", training={"epochs_per_job": 3})
    finetuning.train(run)
    result = finetuning.evaluate(replace(run, evaluation=EvaluationConfig(limit=0, lm_eval=tasks)))
    assert json.loads(run.folder.evaluation.read_text())["lm_eval"] == result["lm_eval"]

    model = AutoModelForCausalLM.from_pretrained(run.folder.export)
    tokenizer = AutoTokenizer.from_pretrained(run.folder.export)

    def log_probability(question: str, answer: str) -> float:
        start = len(tokenizer(f"{question}\n")["input_ids"])
        ids = torch.tensor([tokenizer(f"{question}\n{answer}")["input_ids"]])
        with torch.no_grad():
            found = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        return float(found[start - 1 :].sum())

    right = [
        log_probability(row["question"], row["choices"][0]) > log_probability(row["question"], row["choices"][1])
        for row in SUMS
    ]
    found = result["lm_eval"]
    assert found["sums_to_choose"]["acc"] == pytest.approx(sum(right) / len(SUMS))
    assert 0 < found["sums_to_choose"]["acc_stderr"] < 1 or sum(right) in (0, len(SUMS))
    assert 0 <= found["sums_to_write"]["exact_match"] <= 1


@needs_lm_eval
def test_a_task_that_the_harness_lacks_is_named_with_its_likely_name(make_run: MakeRun, tmp_path: Path) -> None:
    tasks = LmEvalConfig(tasks=["sums_to_chose"], include_path=str(write_tasks(tmp_path / "tasks")))
    run = make_run("run")
    finetuning.train(run)
    with pytest.raises(ValueError, match=r"lm_eval\.tasks: .* no task sums_to_chose \(did you mean sums_to_choose"):
        finetuning.evaluate(replace(run, evaluation=EvaluationConfig(limit=0, lm_eval=tasks)))


def test_its_scores_are_in_the_report_and_the_status() -> None:
    found = {"loss": 1.5, "lm_eval": {"arc_easy": {"acc": 0.5, "acc_stderr": 0.125}, "<b>": {"exact_match": 0.25}}}
    page = evaluation_section(found)
    assert "<h2>Tasks of lm-evaluation-harness</h2>" in page
    assert "<tr><td>arc_easy</td><td>0.5</td><td>0.125</td><td></td></tr>" in page and "<td>&lt;b&gt;</td>" in page
    assert scores(found)[1:] == ["  arc_easy: acc 0.5, acc stderr 0.125", "  <b>: exact match 0.25"]


# --- what is said before anything is queued


def overrides(*more: str) -> list[str]:
    return ["--evaluation.lm_eval.tasks", "[arc_easy]", *more]


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed here, so nothing is missing")
def test_a_missing_harness_is_told_before_the_queue(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"evaluation\.lm_eval: its tasks need the package lm-eval in \.venv: \.venv/bin/pip"
    ):
        check_run(PROJECT / "configs/test.yaml", overrides("--runs_dir", str(tmp_path)))


@needs_lm_eval
def test_a_missing_folder_of_tasks_is_told_before_the_queue(tmp_path: Path) -> None:
    found = check_run(
        PROJECT / "configs/test.yaml",
        overrides("--runs_dir", str(tmp_path), "--evaluation.lm_eval.include_path", "configs"),
    )
    assert found.config.evaluation.lm_eval == LmEvalConfig(tasks=["arc_easy"], include_path=str(PROJECT / "configs"))
    with pytest.raises(ConfigError, match=r"evaluation\.lm_eval: include_path: no folder nowhere; tried "):
        check_run(PROJECT / "configs/test.yaml", overrides("--evaluation.lm_eval.include_path", "nowhere"))


def test_fewer_questions_than_the_processes_that_share_them_are_told_before_the_queue() -> None:
    limited = overrides("--evaluation.lm_eval.limit", "4")
    sharded = read_run_config(PROJECT / "configs/test.yaml", [*limited, "--training.parallelism", "fsdp"])
    with pytest.raises(ValueError, match="limit: 4 is below the 8 processes that share the questions"):
        require_questions(sharded, 8)
    require_questions(sharded, 4)
    require_questions(read_run_config(PROJECT / "configs/test.yaml", limited), 8)  # one process scores a whole model


@pytest.mark.parametrize(("file", "kind"), [("examples/reward", "a reward model"), ("eagle3_test", "a draft head")])
def test_models_that_write_no_texts_have_no_tasks(file: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"evaluation\.lm_eval: .* which {kind} does not; leave it out"):
        read_run_config(PROJECT / f"configs/{file}.yaml", overrides())


def test_settings_that_make_no_sense_are_told_together() -> None:
    with pytest.raises(
        ValueError, match=r"tasks names no task(.|\n)*num_fewshot must not be negative, got -1(.|\n)*limit"
    ):
        LmEvalConfig(tasks=[], num_fewshot=-1, limit=0)
