"""Scores: the loss of every supervised token, and answers judged by the dataset module."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
from conftest import run_on_sums
from safetensors.torch import load_file
from trained_runs import train_to_the_end
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetuning
from jobs import launch
from jobs.config import read_resolved_config
from jobs.plan import plan_run
from jobs.preflight import check_run
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile, load_module, module_score
from mixture.prepare import PreparationRequest, PreparedData, prepare
from settings.yaml_tree import ConfigError
from training.block import build_data
from training.checkpoints import NoValidCheckpointError, newest_valid
from training.config import EvaluationConfig
from training.evaluation import generate, prompt_text
from training.run import FinetuningRun, NonFiniteLossError
from training.run_folder import RunFolder

pytestmark = pytest.mark.chain

MakeRun = Callable[..., FinetuningRun]

PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, sums_module: ModuleFile, prepared_sums: PreparedData
) -> FinetuningRun:
    folder, training = tmp_path_factory.mktemp("trained"), {"epochs_per_job": 3, "total_jobs": 2}
    run = run_on_sums(folder, tiny_model, sums_module, prepared_sums, "trained", training=training)
    train_to_the_end(run)
    return run


def test_the_test_loss_is_the_mean_over_all_supervised_tokens(trained: FinetuningRun) -> None:
    result = finetuning.evaluate(trained)
    model = AutoModelForCausalLM.from_pretrained(trained.folder.export)
    losses = []
    for sample in build_data(trained, "test").rows:
        ids = torch.from_numpy(sample.input_ids.astype("int64"))
        mask = torch.from_numpy(sample.loss_mask)[1:]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[mask])
    reference = torch.cat(losses)
    assert result["loss"] == pytest.approx(reference.mean().item(), abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["tokens"] == len(reference)
    assert orjson.loads(trained.folder.evaluation.read_bytes()) == orjson.loads(orjson.dumps(result))


def test_the_test_loss_falls_from_block_to_block_and_batches_do_not_change_it(trained: FinetuningRun) -> None:
    ends = [event for event in trained.folder.events() if event["event"] == "block_end"]
    assert [end["block"] for end in ends] == [1, 2]
    assert ends[1]["eval_loss"] < ends[0]["eval_loss"]
    for batch_size in (1, 7):
        evaluation = EvaluationConfig(limit=0, batch_size=batch_size)
        loss = finetuning.evaluate(replace(trained, evaluation=evaluation))["loss"]
        assert loss == pytest.approx(ends[1]["eval_loss"], abs=1e-6)


def test_answers_are_scored_by_the_module(trained: FinetuningRun) -> None:
    result = finetuning.evaluate(trained)
    assert result["scored_rows"] == 4
    assert 0 <= result["score"] <= 1
    examples = result["examples"]
    assert (
        examples[0]["prompt"]
        == "<|im_start|>user\nWhat is 10 plus 2? Please. Please.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert all(example["score"] in (0.0, 1.0) for example in examples)


NAMED_SCORE = """
import threading, time

SCORE_NAME = "pass@1"
SCORE_IN_THREADS = {in_threads}
threads = set()

def score(prediction, row, unprotected=None):
    threads.add(threading.current_thread())
    time.sleep(0.01 * len(row["answer"]))  # answers are judged in another order than they were asked for
    return float(row["answer"].startswith("10 + 3") and unprotected)
"""


@pytest.mark.parametrize("in_threads", [True, False])
def test_a_score_has_the_name_that_its_module_gives_it_and_runs_in_threads_where_that_is_allowed(
    in_threads: bool, trained: FinetuningRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    module = ModuleFile(tmp_path / "named.py")
    module.path.write_text(NAMED_SCORE.format(in_threads=in_threads))
    evaluation = replace(trained.evaluation, unprotected_code=True)
    result = finetuning.evaluate(replace(trained, module=module, evaluation=evaluation))
    assert result["pass@1"] == 0.25 and "score" not in result
    assert [example["score"] for example in result["examples"]] == [0.0, 1.0, 0.0, 0.0]
    assert capfd.readouterr().out.splitlines()[-1].startswith("answers: 4 of 4 written, 4 scored, ")
    assert (threading.main_thread() not in load_module(module.path).threads) == in_threads


@pytest.mark.parametrize("name", ["loss", 1])
def test_a_score_of_a_name_that_is_taken_is_refused(name: object, tmp_path: Path) -> None:
    module = ModuleFile(tmp_path / "named.py")
    module.path.write_text(f"SCORE_NAME = {name!r}\ndef score(prediction, row): return 1.0\n")
    with pytest.raises(
        ValueError, match=rf"named.py: SCORE_NAME is {name!r}; name what `score` returns, and not epoch"
    ):
        module_score(module, unprotected=False)


def test_what_is_scored_may_change_on_the_way_and_code_is_run_unprotected_only_where_it_is_run_at_all(
    tmp_path: Path,
) -> None:
    """A last job that failed for what it was to score can be tried again."""
    folders = ["--runs_dir", str(tmp_path / "runs"), "--data_dir", str(tmp_path / "data"), "--cluster", "local"]

    def opened(*overrides: str) -> RunFolder:
        checked = check_run(PROJECT / "configs/test.yaml", [*folders, *overrides])
        return launch.open_run_folder(checked, plan_run(checked).data_key, print)

    run = opened()
    assert opened("--evaluation.limit", "3") == run
    assert read_resolved_config(run.config).evaluation.limit == 3
    with pytest.raises(ConfigError, match=r"evaluation\.unprotected_code: nothing in .*test_dataset\.py runs code"):
        opened("--evaluation.unprotected_code", "true")


def test_without_a_checkpoint_there_is_nothing_to_evaluate(make_run: MakeRun) -> None:
    with pytest.raises(NoValidCheckpointError, match="holds no checkpoint to evaluate"):
        finetuning.evaluate(make_run("run"))


def test_one_batch_is_learnt_by_heart_and_recited_in_padded_batches_as_alone(
    make_run: MakeRun, sums_module: ModuleFile, tmp_path: Path
) -> None:
    model_folder = str(PROJECT / "configs/models/tiny")
    three_rows = PreparationRequest(
        dataset=DatasetConfig(name="sums", max_length=256, limit=3),
        module=sums_module,
        tokenizer=model_folder,
        objective="sft",
    )
    prepared = prepare(three_rows, tmp_path / "data", lambda line: None)
    training = {"lr": 3e-3, "epochs_per_job": 100, "log_every": 1, "warmup": 5}
    run = replace(make_run("run", model={"name": model_folder}, training=training), prepared=prepared.folder)
    finetuning.train(run)
    losses = [line["loss"] for line in run.folder.metrics()]
    assert len(losses) == 100
    assert losses[0] > 7.5
    assert losses[-1] < 0.02

    model = AutoModelForCausalLM.from_pretrained(run.folder.export)
    tokenizer = AutoTokenizer.from_pretrained(run.folder.export)
    questions = [f"What is 2 plus {number}? Please. Please." for number in (2, 3, 4)]
    prompts = [prompt_text({"prompt": question}, tokenizer) for question in questions]
    config = EvaluationConfig(max_new_tokens=12)
    together = generate(model, tokenizer, prompts, config=config, batch_size=3)
    assert together == ["2 + 2 = 4", "2 + 3 = 5", "2 + 4 = 6"]
    assert together == [generate(model, tokenizer, [prompt], config=config, batch_size=1)[0] for prompt in prompts]


def test_a_loss_or_gradient_that_is_not_finite_stops_the_block_and_reaches_no_checkpoint(make_run: MakeRun) -> None:
    run = make_run("run", training={"lr": 1e30, "save_every": 1, "lr_scheduler": "constant"})
    # Weights of 1e30 pass the normalisation layers: the loss is finite when the gradient no longer is.
    with pytest.raises(NonFiniteLossError, match=r"the loss is [\d.]+ and the norm of the gradient nan, .* step 2"):
        finetuning.train(run)
    newest, _ = newest_valid(run.folder.checkpoints)
    assert newest is not None
    assert all(weight.isfinite().all() for weight in load_file(newest.path / "model.safetensors").values())
    assert newest.step == max(line["step"] for line in run.folder.metrics())


def test_metrics_have_the_first_and_last_step_of_every_block(trained: FinetuningRun) -> None:
    lines = list(trained.folder.metrics())
    assert {1, 21, 22, 42} <= {line["step"] for line in lines}
    assert lines[-1]["epoch"] == 6
    assert {line["block"] for line in lines} == {1, 2}
    tokens = sum(len(row.input_ids) for row in build_data(trained, "train").rows)
    assert lines[-1]["tokens"] == 6 * tokens
    assert all(line["tokens_per_s"] > 0 for line in lines)


def test_questions_without_a_template_are_plain_text(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    assert prompt_text({"prompt_messages": [{"role": "user", "content": "Why?"}]}, tokenizer) == "Why?\n"
