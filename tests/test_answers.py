"""A model writes the answers of the training rows anew, turn by turn; the same ones, however it was cut short."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from answering.answers import AnswersRequest, write_answers
from answering.config import AnswersConfig
from answering.identity import answers_folder, answers_key
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.mixture_folder import finish_folder, marker_key
from mixture.prepare import PreparationRequest, data_key, prepare
from mixture.scatter import WrittenPart
from mixture.shards import TokenRows
from training.config import ModelConfig
from training.models import stop_token_ids
from training.shard_folder import capture_progress, done_file

PROJECT = Path(__file__).parents[1]
MAX_NEW_TOKENS = 24


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Random weights with sharp distributions, which end some of their answers and not others."""
    folder = tmp_path_factory.mktemp("writer") / "model"
    shutil.copytree(tiny_model, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    end_of_turn = stop_token_ids(model, AutoTokenizer.from_pretrained(folder))[-1]
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(60)
        model.get_output_embeddings().weight.mul_(60)
        model.get_output_embeddings().weight[end_of_turn].mul_(2)
    model.save_pretrained(folder)
    return folder


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, contents, strict=False)]


ROWS = [
    {"id": f"row-{i}", "source": "one" if i % 3 else "two", "category": "chat", "metadata": {"level": i}}
    | {"messages": turns(f"What is {i} plus 2?", "old", f"And {i} plus 3?", "old", "Why?", "old")[: 2 + 2 * (i % 3)]}
    for i in range(24)
]
TEST = [{"id": "t", "source": "one", "category": None, "metadata": {}, "messages": turns("Held out?", "Yes.")}]


def make_mixture(folder: Path, *stages: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    parts = []
    for stage, rows in enumerate([*stages, TEST]):
        name, split = (f"train-{stage:05d}.jsonl", "train") if stage < len(stages) else ("test-00000.jsonl", "test")
        (folder / name).write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
        parts.append(WrittenPart(file=name, split=split, stage=stage, rows={}, bytes=0, checksum=""))
    finish_folder(folder, "key of the rows", parts)
    return folder


def rows_of(mixture: Path, model: Path, *, objective: Any = "sft", **dataset: Any) -> PreparationRequest:
    config = DatasetConfig(**{"mixture": "recipe.yaml", "max_length": 200, **dataset})
    return PreparationRequest(dataset=config, mixture=mixture, tokenizer=str(model), objective=objective)


@pytest.fixture
def request_for(tmp_path: Path, writer: Path) -> Any:
    """request_for("name", rows, temperature=...): a request of several shards of several batches."""

    def make(name: str, *stages: list[dict[str, Any]], objective: str = "sft", **answers: Any) -> AnswersRequest:
        mixture = tmp_path / f"rows of {name}"
        settings = {"max_new_tokens": MAX_NEW_TOKENS, "shard_rows": 9, "batch_size": 4, **answers}
        return AnswersRequest(
            writer=ModelConfig(name=str(writer)),
            writer_key="model",
            answers=AnswersConfig(**settings),
            rows=rows_of(make_mixture(mixture, *(stages or [ROWS])), writer, objective=objective),
            folder=tmp_path / name,
            seed=1,
        )

    return make


def run(request: AnswersRequest, stop_after: int | None = None) -> tuple[bool, list[str]]:
    """Write here; `stop_after` looks at the stop request it comes."""
    lines: list[str] = []
    looks = iter(range(10_000))
    finished = write_answers(request, lines.append, stop_requested=lambda: next(looks) == (stop_after or -1))
    return finished, lines


def answered(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("train-*.jsonl")) for line in file.open()]


# --- what is written


def test_every_answer_is_the_models_own_after_its_own_earlier_ones(request_for: Any, writer: Path) -> None:
    request = request_for("answers", keep_unfinished=True)
    assert run(request)[0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(writer), AutoTokenizer.from_pretrained(writer)
    stops = stop_token_ids(model, tokenizer)
    found = {row["id"]: row for row in answered(request.folder)}
    answers = 0
    for row in ROWS:
        written: list[dict[str, str]] = []
        for turn in row["messages"]:
            if turn["role"] == "user":
                written.append(turn)
                continue
            prompt = tokenizer.apply_chat_template(
                written, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            ids = model.generate(
                prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=stops, pad_token_id=0
            )[0, prompt.shape[1] :]
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            if text:
                written.append({"role": "assistant", "content": text})
                answers += 1
            if not text or ids[-1] not in stops:
                break
        if written[-1]["role"] == "user":
            written.pop()
        if not written:
            assert row["id"] not in found
        else:
            assert found[row["id"]] == {**row, "messages": written}
    assert list(found) == [row["id"] for row in ROWS if row["id"] in found], "in their order"
    assert answers > len(ROWS) / 2


def test_answers_that_come_to_no_end_are_dropped_with_what_follows_them_and_counted(request_for: Any) -> None:
    settings = {"temperature": 1.0, "max_new_tokens": 40}
    kept, dropped = request_for("kept", keep_unfinished=True, **settings), request_for("dropped", **settings)
    (_, told), (_, told_of_dropped) = run(kept), run(dropped)
    unfinished = [line for line in told_of_dropped if line.endswith("rows have an answer that comes to no end")]
    assert len(unfinished) == 1 and unfinished[0] in told
    with_all = {row["id"]: row["messages"] for row in answered(kept.folder)}
    without = {row["id"]: row["messages"] for row in answered(dropped.folder)}
    assert len(without) < len(with_all)
    assert any(len(messages) < len(with_all[name]) for name, messages in without.items())
    for name, messages in without.items():
        assert messages == with_all[name][: len(messages)] and messages[-1]["role"] == "assistant"
    lost = len(ROWS) - len(without)
    assert f"answers: {lost} rows are left out" in told_of_dropped


def test_a_sampled_answer_depends_on_its_sample_alone(request_for: Any) -> None:
    first = request_for("first", temperature=0.7)
    other = request_for("other", temperature=0.7, shard_rows=5, batch_size=3)
    reseeded = replace(request_for("reseeded", temperature=0.7), seed=2)
    for request in (first, other, reseeded):
        assert run(request)[0]
    assert answered(first.folder) == answered(other.folder) != answered(reseeded.folder)


def test_prompts_are_answered_and_what_cannot_be_is_left_out_passed_or_refused(request_for: Any) -> None:
    head = {"source": "one", "category": None, "metadata": {"rationale": [[0, 1]]}}
    prompt = {"id": "prompt", **head, "prompt": "What is 4 plus 2?"}
    pair = {"id": "pair", **head, "prompt": turns("What is 5 plus 2?"), "chosen": "a", "rejected": "b"}
    calls = [*turns("Sum?"), {"role": "assistant", "content": "", "tool_calls": [{}]}, *turns("a", "b")]
    tools = {"id": "tools", **head, "messages": calls}
    text = {"id": "text", **head, "text": "Once."}
    tokens = {"id": "tokens", **head, "input_ids": [1], "loss_mask": [True]}
    long = {"id": "long", **head, "messages": turns("word " * 300, "old")}
    request = request_for("answers", [prompt, pair, tools, text, long], objective="pretrain", keep_unfinished=True)
    _, lines = run(request)
    first, second, third = answered(request.folder)
    assert (first["id"], first["metadata"], first["messages"][0]) == ("prompt", {}, turns("What is 4 plus 2?")[0])
    assert (second["id"], [turn["role"] for turn in second["messages"]]) == ("pair", ["user", "assistant"])
    assert second.keys() == first.keys() and third == text
    assert set(lines) >= {
        "answers: 2 written in 3 rows",
        "answers: 1 rows call tools, whose results belong to the calls as they were",
        "answers: 1 rows have a question that fills dataset.max_length",
        "answers: 1 rows are plain text and stay as they are",
        "answers: 2 rows are left out",
    }
    with pytest.raises(ValueError, match="sample text is plain text, which holds no question to answer"):
        run(request_for("sft", [text]))
    with pytest.raises(ValueError, match="sample tokens came tokenised"):
        run(request_for("tokens", [tokens]))


# --- what it is read as


def test_the_folder_is_a_mixture_with_the_stages_of_the_rows_and_the_real_test_split(
    request_for: Any, writer: Path, tmp_path: Path
) -> None:
    request = request_for("answers", ROWS[:10], ROWS[10:], keep_unfinished=True)
    assert run(request)[0]
    assert marker_key(request.folder) == request.key
    assert (request.folder / "test-00000.jsonl").read_bytes() == (
        Path(str(request.rows.mixture)) / "test-00000.jsonl"
    ).read_bytes()
    assert {file.suffix for file in request.folder.iterdir()} == {".jsonl", ".done", ".json", ""}
    prepared = prepare(rows_of(request.folder, writer), tmp_path, lambda line: None)
    train, test = prepared.splits["train"], prepared.splits["test"]
    assert train is not None and test is not None
    assert train.samples == len(answered(request.folder)) and len(train.stages) == 2 and test.samples == 1
    assert set(train.sources) == {"one", "two"}


def test_answers_to_the_rows_of_a_module_are_learned_and_its_test_rows_still_scored(
    writer: Path, sums_module: ModuleFile, tmp_path: Path
) -> None:
    rows = PreparationRequest(
        dataset=DatasetConfig(name="sums", max_length=128),
        module=sums_module,
        tokenizer=str(writer),
        objective="sft",
    )
    answers = AnswersConfig(max_new_tokens=8, keep_unfinished=True)
    teacher = ModelConfig(name=str(writer))
    folder = answers_folder(tmp_path, answers_key(teacher, answers, data_key=data_key(rows), seed=1))
    assert run(AnswersRequest(writer=teacher, writer_key="model", answers=answers, rows=rows, folder=folder, seed=1))[0]
    with_answers = replace(rows, mixture=folder)
    assert data_key(with_answers) not in (data_key(rows), data_key(replace(with_answers, module=None)))
    prepared, before = (prepare(request, tmp_path, lambda line: None) for request in (with_answers, rows))
    assert prepared.has_score
    assert (prepared.folder / "test_rows.jsonl").read_bytes() == (before.folder / "test_rows.jsonl").read_bytes()
    found, old = (
        {row.sample_id: row.input_ids.tolist() for row in TokenRows.open(p.folder, "train")} for p in (prepared, before)
    )
    assert len(found) > 20 and all(found[name] != old[name] for name in found)


# --- cut short, moved, shared

CHILD = """
import sys, time
from pathlib import Path
import orjson
from answering.answers import AnswersRequest, write_answers
from answering.config import AnswersConfig
from mixture.config import DatasetConfig
from mixture.prepare import PreparationRequest
from training.config import ModelConfig
settings = orjson.loads(sys.argv[1])
rows = settings["rows"]
rows |= {"dataset": DatasetConfig(**rows["dataset"]), "mixture": Path(rows["mixture"])}
request = AnswersRequest(
    writer=ModelConfig(name=settings["writer"]["name"]), writer_key="model",
    answers=AnswersConfig(**settings["answers"]),
    rows=PreparationRequest(**rows), folder=Path(settings["folder"]), seed=settings["seed"],
)
looks = 0
def stop_requested():
    global looks
    looks += 1
    if looks == int(sys.argv[2]):
        print("hanging", flush=True)
        time.sleep(600)
    return False
write_answers(request, print, stop_requested=stop_requested)
"""


@pytest.mark.chain
def test_work_that_is_killed_inside_a_shard_goes_on_to_the_same_answers(request_for: Any) -> None:
    unbroken, broken = request_for("unbroken", temperature=0.7), request_for("broken", temperature=0.7)
    assert run(unbroken)[0]
    command = [sys.executable, "-c", CHILD, orjson.dumps(asdict(broken), default=str).decode(), "8"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert "hanging\n" in child.stdout
        child.kill()
    assert list(broken.folder.glob("*.claim")), "killed with a claim in hand"
    progress = capture_progress(broken.folder)
    assert (progress.total, marker_key(broken.folder)) == (3, None) and 0 < progress.done < 3
    assert run(broken)[0]
    assert answered(broken.folder) == answered(unbroken.folder)
    assert {file.name for file in broken.folder.iterdir()} == {file.name for file in unbroken.folder.iterdir()}


def test_a_stop_request_leaves_whole_shards_and_another_worker_the_shard_that_it_is_at(request_for: Any) -> None:
    unbroken, shared = request_for("unbroken"), request_for("shared")
    assert run(unbroken)[0]
    assert run(shared, stop_after=5)[0] is False
    left = [shard for shard in range(3) if not done_file(shared.folder, shard).exists()]
    assert 0 < len(left) < 3
    claim = done_file(shared.folder, left[0]).with_suffix(".claim")
    claim.write_bytes(orjson.dumps({"job": "7", "restart": 0, "host": "elsewhere", "process": 1}))
    assert run(shared)[0] is False, "its heart has just beaten"
    assert capture_progress(shared.folder).done == 2
    os.utime(claim, (time.time() - 100,) * 2)
    assert run(shared)[0]
    assert answered(shared.folder) == answered(unbroken.folder)
    # Nothing is left to do: the model is not even looked at.
    assert run(replace(shared, writer=ModelConfig(name="no such model"))) == (True, [])


# --- whose answers they are


def test_the_key_tells_apart_all_that_shapes_answers_and_nothing_else(writer: Path) -> None:
    teacher, greedy, sampled = ModelConfig(name=str(writer)), AnswersConfig(), AnswersConfig(temperature=1.0)

    def key(answers: AnswersConfig = greedy, *, data: str = "a", seed: int = 1, **other: Any) -> str:
        return answers_key(replace(teacher, **other), answers, data_key=data, seed=seed)

    assert len({key(), key(data="b"), key(dtype="bfloat16"), key(sampled), key(sampled, seed=2)}) == 5
    assert len({key(), key(replace(greedy, max_new_tokens=9)), key(replace(greedy, keep_unfinished=True))}) == 3
    assert key() == key(seed=2) == key(replace(greedy, batch_size=1, tasks=3, shard_rows=7))


def test_a_folder_with_other_answers_is_refused(request_for: Any) -> None:
    request = request_for("answers")
    assert run(request, stop_after=2)[0] is False
    with pytest.raises(ValueError, match=r"holds other answers .* by other settings of `answers`"):
        run(replace(request, answers=replace(request.answers, temperature=0.5)))
