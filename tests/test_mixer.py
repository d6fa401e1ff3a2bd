"""From a recipe to finished files: exact counts, the same bytes every time, statistics, freezing, bad recipes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from dataset_hub import Fault, played_hub
from mixture_sources import chat_row, code_row, question_row, write_rows

from mixture import scan, scatter
from mixture.config import DatasetConfig
from mixture.mixer import DatasetMixer, MixtureResult, get_dataset, run_mixture
from mixture.prepare import PreparationRequest, prepare
from mixture.recipe import read_mixture
from mixture.shards import TokenRows

REAL_DATA = os.environ.get("BATON_REAL_DATA")
needs_real_data = pytest.mark.skipif(not REAL_DATA, reason="BATON_REAL_DATA names no folder with real files")

TOY = """
metadata: {phase: pretrain_phase1}
datasets:
  - {name: math, mix_ratio: 0.6, max_samples: 300, path: math.jsonl}
  - {name: chat, mix_ratio: 0.4, max_samples: 100, path: chat.jsonl}
"""

CATEGORIES = """
total_samples: 1000
category_ratios: {reasoning: 0.25, chat: 0.45, code: 0.30}
split: {validation: 0.1}
datasets:
  math: {enabled: true, category: reasoning, allocation: 1.0, path: math.jsonl}
  chat: {enabled: true, category: chat, allocation: 0.7, path: chat.jsonl}
  notes: {enabled: true, category: chat, allocation: 0.3, path: notes.jsonl}
  code: {enabled: true, category: code, allocation: 1.0, path: code.jsonl, filters: {min_chars: 100}}
"""


@dataclass
class Kitchen:
    """A folder with four small sources, and whatever is mixed of them."""

    folder: Path
    told: list[str] = field(default_factory=list)

    def recipe(self, text: str) -> Path:
        path = self.folder / "mix.yaml"
        path.write_text(text)
        return path

    def mix(self, text: str, data: str = "data", **options: Any) -> MixtureResult:
        mixture = read_mixture(self.recipe(text))
        return run_mixture(mixture, self.folder / data, self.told.append, **{"workers": 1, **options})


@pytest.fixture
def kitchen(tmp_path: Path) -> Kitchen:
    write_rows(tmp_path / "math.jsonl", [question_row(number) for number in range(400)])
    write_rows(tmp_path / "chat.jsonl", [chat_row(number) for number in range(100)])
    write_rows(
        tmp_path / "notes.jsonl", [{"text": f"A note on the number {number}, at some length."} for number in range(900)]
    )
    write_rows(tmp_path / "code.jsonl", [code_row(number % 250) for number in range(300)])
    return Kitchen(tmp_path)


def rows_of(result: MixtureResult, split: str = "train") -> list[dict[str, Any]]:
    assert result.folder is not None
    files = sorted(result.folder.glob(f"{split}-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_counts_in_the_files_are_those_of_the_plan(kitchen: Kitchen) -> None:
    result = kitchen.mix("split: {train: 1}" + TOY)
    assert Counter(row["source"] for row in rows_of(result)) == {"math": 240, "chat": 160}
    assert {source.name: source.rows for source in result.plan.sources} == {"math": 240, "chat": 160}
    chats = Counter(row["id"] for row in rows_of(result) if row["source"] == "chat")
    assert Counter(chats.values()) == {1: 40, 2: 60}  # one whole epoch of 100, then 60 of them once more
    questions = Counter(row["id"] for row in rows_of(result) if row["source"] == "math")
    assert set(questions.values()) == {1}


def test_rows_are_shuffled_as_a_whole(kitchen: Kitchen) -> None:
    sources = [row["source"] for row in rows_of(kitchen.mix(TOY))]
    for part in (sources[:100], sources[-100:]):
        assert 25 <= Counter(part)["chat"] <= 55


@pytest.mark.chain
@pytest.mark.parametrize("recipe", [TOY, CATEGORIES], ids=["mixed", "categories"])
def test_two_runs_give_the_same_bytes_for_any_number_of_workers(kitchen: Kitchen, recipe: str) -> None:
    one, two = kitchen.mix(recipe, "one"), kitchen.mix(recipe, "two", workers=3)
    assert one.folder is not None and two.folder is not None
    first, second = files_of(one.folder), files_of(two.folder)
    for name in first:
        assert first[name].replace(b"/one/", b"/two/") == second[name], name
    assert first.keys() == second.keys()


def test_another_seed_gives_another_order_of_the_same_counts(kitchen: Kitchen) -> None:
    one, two = kitchen.mix(TOY), kitchen.mix("seed: 7" + TOY)
    assert one.key != two.key
    assert rows_of(one) != rows_of(two)
    assert Counter(row["source"] for row in rows_of(one)) == Counter(row["source"] for row in rows_of(two))


def test_a_finished_mixture_is_taken_as_it_is(kitchen: Kitchen) -> None:
    first = kitchen.mix(TOY)
    assert first.folder is not None
    marker = (first.folder / "MIXED").stat().st_mtime_ns
    again = kitchen.mix(TOY)
    assert again == first
    assert (first.folder / "MIXED").stat().st_mtime_ns == marker


def test_a_changed_source_makes_another_mixture(kitchen: Kitchen) -> None:
    first = kitchen.mix(TOY)
    write_rows(kitchen.folder / "chat.jsonl", [chat_row(number) for number in range(1, 101)])
    assert kitchen.mix(TOY).key != first.key


def test_categories_have_folders_statistics_and_a_summary(kitchen: Kitchen) -> None:
    result = kitchen.mix(CATEGORIES + f"output_dir: {kitchen.folder / 'out'}\n")
    out = kitchen.folder / "out"
    assert result.folder == out
    counts = {"reasoning/math": 250, "chat/chat": 315, "chat/notes": 135, "code/code": 300}
    for name, count in counts.items():
        lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_bytes().splitlines()]
        assert len(lines) == count
        category, source = name.split("/")
        assert {(line["source"], line["category"]) for line in lines} == {(source, category)}
        assert all({"text", "id", "source", "category", "metadata"} <= line.keys() for line in lines)
        stats = json.loads((out / f"{name}.stats.json").read_text())
        assert list(stats) == [
            "samples",
            "total_chars",
            "size_mb",
            "avg_length",
            "min_length",
            "max_length",
            "duplicates_removed",
            "output_file",
        ]
        assert stats["samples"] == count
        assert stats["output_file"] == str(out / f"{name}.jsonl")
        assert stats["size_mb"] == round((out / f"{name}.jsonl").stat().st_size / 2**20, 2)
        assert stats["min_length"] <= stats["avg_length"] <= stats["max_length"]
        assert stats["avg_length"] == round(stats["total_chars"] / count)
    assert json.loads((out / "code/code.stats.json").read_text())["duplicates_removed"] == 50
    chat = json.loads((out / "chat/chat.jsonl").read_bytes().splitlines()[0])
    assert chat["text"].startswith("user: Chat ")
    assert "\nassistant: " in chat["text"]
    summary = json.loads((out / "download_summary.json").read_text())
    assert summary["total_samples"] == 1000
    assert summary["categories"]["chat"]["samples"] == 450
    assert summary["categories"]["chat"]["datasets"] == ["chat", "notes"]
    assert summary["datasets"]["math"] == json.loads((out / "reasoning/math.stats.json").read_text())
    assert Counter(row["source"] for row in rows_of(result)) == {"math": 250, "chat": 315, "notes": 135, "code": 300}
    assert "## math" in (out / "ATTRIBUTION.md").read_text()


def test_held_out_rows_are_in_no_training_file(kitchen: Kitchen) -> None:
    result = kitchen.mix(CATEGORIES)
    held_out = {row["id"] for row in rows_of(result, "test")}
    assert held_out
    assert not held_out & {row["id"] for row in rows_of(result)}
    assert len(rows_of(result, "test")) == len(held_out) == result.plan.held_out_rows


def test_a_dry_run_shows_the_plan_and_writes_no_mixture(kitchen: Kitchen) -> None:
    result = kitchen.mix(CATEGORIES, dry_run=True)
    assert result.folder is None
    assert result.plan.rows == 1000
    table = "\n".join(kitchen.told)
    for part in ("math", "25.00%", "50 duplicate", "download 0 B; disk about", "epochs", "tokens are estimated"):
        assert part in table
    assert not list(kitchen.folder.rglob("train-*"))
    made = kitchen.mix(CATEGORIES)
    assert made.plan == result.plan


def test_mixing_by_tokens_is_reported_both_ways(kitchen: Kitchen, tiny_model: Path) -> None:
    result = kitchen.mix(
        f"by: tokens\ntotal: {{tokens: 30000}}\ntokenizer: {tiny_model}\n" + TOY.replace("max_samples", "max_epochs")
    )
    shares = {source.name: source.token_share for source in result.plan.sources}
    assert shares == pytest.approx({"math": 0.6, "chat": 0.4}, abs=0.005)
    assert result.plan.tokens == pytest.approx(30000, rel=0.01)
    assert result.plan.sources[0].row_share > 0.7


def test_short_prompts_come_first(kitchen: Kitchen) -> None:
    recipe = TOY.replace("metadata", "short_prompts_first: {tokens: 16, share: 0.3}\nmetadata")
    result = kitchen.mix(recipe)
    assert [(part.split, part.stage) for part in result.parts] == [("train", 0), ("train", 1), ("test", 0)]
    first = sum(result.parts[0].rows.values())
    for row in rows_of(result)[:first]:
        prompt = row["messages"][0]["content"]
        assert len(prompt.encode()) < 64
    assert any("first stage" in line for line in kitchen.told) == (first < 120)


def test_contaminated_and_near_rows_are_dropped_and_told(kitchen: Kitchen) -> None:
    pytest.importorskip("rensa", reason="near duplicates need the extra near-duplicates")
    evaluation = [question_row(number) for number in range(5)]
    write_rows(kitchen.folder / "evaluation.jsonl", evaluation)
    words = " ".join(f"word{number}" for number in range(60))
    notes = [{"text": f"{words} and the end {number}"} for number in range(3)] + [
        {"text": words + " quite another"}
    ] * 2
    write_rows(
        kitchen.folder / "notes.jsonl",
        notes + [{"text": f"Number {n}: " + " ".join(str(n * k) for k in range(9))} for n in range(50)],
    )
    recipe = """
dedup: {near: true}
decontaminate: [evaluation.jsonl]
split: {train: 1}
datasets:
  - {name: math, path: math.jsonl}
  - {name: notes, path: notes.jsonl}
"""
    result = kitchen.mix(recipe)
    math, notes_plan = result.plan.sources
    assert math.supply.dropped == {"contaminated": 5}
    assert notes_plan.supply.dropped == {"duplicate": 1, "near duplicate": 3}
    assert (math.rows, notes_plan.rows) == (395, 51)
    assert result.folder is not None
    items = json.loads((result.folder / "contamination.json").read_text())
    assert items["math"]["evaluation.jsonl:1"] == 1
    for source in result.plan.sources:
        assert source.supply.read == sum(source.supply.dropped.values()) + source.supply.rows


def test_rejected_rows_are_kept_with_their_reason(kitchen: Kitchen) -> None:
    with (kitchen.folder / "math.jsonl").open("ab") as file:
        file.write(b'{"question": "\xff"}\n{"question": broken\n')
    result = kitchen.mix(TOY)
    assert result.folder is not None
    rejected = [json.loads(line) for line in (result.folder / "rejected.jsonl").read_bytes().splitlines()]
    assert {(row["source"], row["line"], row["reason"]) for row in rejected} == {
        ("math", 401, "not valid UTF-8"),
        ("math", 402, "not valid JSON"),
    }


# --- kills


@pytest.mark.chain
def test_killed_at_random_moments_it_ends_with_the_bytes_of_an_unbroken_run(
    kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(scatter, "BUCKET_BYTES", 20_000)
    recipe = CATEGORIES + "compress: zstd\n"
    unbroken = kitchen.mix(recipe, "whole")
    mixture = read_mixture(kitchen.recipe(recipe))
    killed = kitchen.folder / "killed"
    moments = random.Random(11)
    context = multiprocessing.get_context("fork")
    finished = 0
    # By how far it has come, not by the clock: on a busy machine a clock would kill too early or too late.
    for files in sorted(moments.randrange(files_below(kitchen.folder / "whole")) for _ in range(10)):
        process = context.Process(target=run_mixture, args=(mixture, killed, str), kwargs={"workers": 2})
        process.start()
        while process.is_alive() and files_below(killed) < files:
            time.sleep(0.001)
        process.kill()
        process.join()
        finished += process.exitcode == 0
    assert finished < 10
    again = kitchen.mix(recipe, "killed")
    assert unbroken.folder is not None and again.folder is not None
    first, second = files_of(unbroken.folder), files_of(again.folder)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].replace(b"/whole/", b"/killed/") == second[name], name


def test_killed_while_it_fetches_it_asks_for_no_file_again_that_it_had(
    kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = "total: 200\ndatasets: [{name: far, mix_ratio: 1, hub: org/far, file: [a.jsonl, b.jsonl]}]"
    data = kitchen.folder / "data"
    with played_hub(kitchen.folder / "hub", monkeypatch, kitchen.folder / "cache") as hub:
        for name, numbers in (("a", range(100)), ("b", range(100, 400))):
            rows = "".join(json.dumps(code_row(number)) + "\n" for number in numbers)
            hub.write(f"org/far/{name}.jsonl", rows)
        hub.faults = [Fault("b.jsonl", 503, times=10**6)]
        mixture = read_mixture(kitchen.recipe(recipe))
        process = multiprocessing.get_context("fork").Process(target=run_mixture, args=(mixture, data, str))
        process.start()
        while not list(data.glob("sources/*/part-00000.jsonl")):
            assert process.is_alive()
            time.sleep(0.01)
        process.kill()
        process.join()
        hub.faults.clear()
        hub.asked_for.clear()
        again = kitchen.mix(recipe)
        assert hub.downloads() and all("b.jsonl" in line for line in hub.downloads())
        unbroken = kitchen.mix(recipe, "whole")
    assert rows_of(again) == rows_of(unbroken)


def files_below(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*"))


# --- the folder


def test_a_folder_with_other_files_is_not_taken(kitchen: Kitchen) -> None:
    recipe = TOY + f"output_dir: {kitchen.folder}\n"
    with pytest.raises(ValueError, match="holds files that are no mixture's"):
        kitchen.mix(recipe)
    assert (kitchen.folder / "math.jsonl").is_file()


def test_a_changed_recipe_replaces_what_its_folder_held(kitchen: Kitchen) -> None:
    out = kitchen.folder / "out"
    kitchen.mix(CATEGORIES + f"output_dir: {out}\n")
    (out / "mine.txt").write_text("stays")
    kitchen.mix(TOY + f"output_dir: {out}\n")
    assert not (out / "chat/notes.jsonl").exists()
    assert (out / "mine.txt").exists()
    total = sum(len(file.read_bytes().splitlines()) for file in out.rglob("train-*.jsonl"))
    assert total == 400
    again = kitchen.mix(TOY + f"output_dir: {out}\n")
    assert again.folder == out


def test_a_folder_whose_old_mixture_was_only_half_removed_is_not_taken_for_somebody_elses(
    kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file: Path, missing_ok: bool = False) -> None:
        if file.name == "mixture.lock.json":
            raise KeyboardInterrupt
        unlink(file, missing_ok=missing_ok)

    unlink = Path.unlink
    out = f"output_dir: {kitchen.folder / 'out'}\n"
    kitchen.mix(CATEGORIES + out)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", interrupted)
        kitchen.mix(TOY + out)
    assert len(rows_of(kitchen.mix(TOY + out))) == 400


# --- the lock file


def test_a_lock_file_is_met_or_what_differs_is_named(kitchen: Kitchen) -> None:
    first = kitchen.mix(TOY)
    assert first.folder is not None
    lock = kitchen.folder / "toy.lock.json"
    lock.write_bytes((first.folder / "mixture.lock.json").read_bytes())
    record = json.loads(lock.read_text())
    assert record["sources"]["chat"]["rows"] == 160
    assert record["sources"]["chat"]["files"][0][1] == (kitchen.folder / "chat.jsonl").stat().st_size
    assert record["output"][0]["checksum"]
    assert kitchen.mix(TOY, frozen=lock) == first
    assert kitchen.mix(TOY, "elsewhere", frozen=lock).key == first.key
    with pytest.raises(ValueError, match="recipe: seed was 42, is 43"):
        kitchen.mix("seed: 43" + TOY, frozen=lock)
    write_rows(kitchen.folder / "chat.jsonl", [chat_row(number) for number in range(1, 101)])
    with pytest.raises(ValueError, match="chat: revision was"):
        kitchen.mix(TOY, frozen=lock)
    with pytest.raises(ValueError, match="no file"):
        kitchen.mix(TOY, frozen=kitchen.folder / "none.json")
    with pytest.raises(ValueError, match="is no lock file"):
        kitchen.mix(TOY, frozen=kitchen.folder / "mix.yaml")


# --- sources that cannot do


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("spoil", "recipe", "message"),
    [
        (lambda folder: (folder / "chat.jsonl").write_text(""), TOY, "datasets.chat: it holds 0 rows"),
        (lambda folder: (folder / "chat.jsonl").unlink(), TOY, "chat.jsonl"),
        (None, TOY.replace("path: chat.jsonl", "max_epochs: 1"), "no path, hub or file is given"),
        (None, TOY.replace("name: chat", "name: gsm8kk").replace(", path: chat.jsonl", ""), "did you mean gsm8k"),
        (None, TOY.replace("path: chat.jsonl", "path: chat.jsonl, max_epochs: 1"), "it would need 1.6"),
        (None, TOY.replace("path: chat", "filters: {min_chars: 100000}, path: chat"), "none of 100 rows is left"),
        (None, TOY.replace("path: chat.jsonl", "path: chat.jsonl, licence: cc-by-nc-4.0"), "allow_non_commercial"),
        (None, "decontaminate: [nowhere.jsonl]" + TOY, "decontaminate: no file nowhere.jsonl"),
        (None, "tokenizer: nowhere/at-all\n" + TOY, "tokenizer: cannot load"),
        (
            lambda folder: (folder / "chat.jsonl").write_text('{"colour": "blue"}\n' * 5),
            TOY,
            "none of 5 rows fits no known format",
        ),
    ],
)
def test_what_a_mixture_cannot_do_is_said(
    kitchen: Kitchen, spoil: Callable[[Path], Any] | None, recipe: str, message: str
) -> None:
    if spoil:
        spoil(kitchen.folder)
    with pytest.raises(ValueError, match="(?s)" + message):
        kitchen.mix(recipe)
    assert not list(kitchen.folder.rglob("MIXED"))


# --- the hub


def test_only_as_much_is_fetched_as_is_needed_and_more_where_filters_take_it(
    kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"text": ("short" if number % 4 else "a text that is long enough to stay") + f" {number}"}
        for number in range(8000)
    ]
    recipe = """
total: 600
datasets:
  - {name: far, mix_ratio: 1, hub: org/far, file: rows.jsonl, filters: {min_chars: 20}}
"""
    with played_hub(kitchen.folder / "hub", monkeypatch, kitchen.folder / "cache") as hub:
        hub.write("org/far/rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        planned = kitchen.mix(recipe, dry_run=True)
        assert not hub.downloads()
        assert any("not on this machine" in note for note in planned.plan.notes)
        result = kitchen.mix(recipe)
    (far,) = result.plan.sources
    assert far.rows == 600
    assert far.pool >= 600
    assert far.supply.read < 8000
    assert any("fetching more" in line for line in kitchen.told)


# --- as a library


def test_the_library_calls_of_the_document_work(kitchen: Kitchen, capsys: pytest.CaptureFixture[str]) -> None:
    mixer = DatasetMixer.from_yaml(str(kitchen.recipe(TOY)))
    validation = mixer.validate_mixture()
    assert validation["is_valid"] is True
    assert validation["total_ratio"] == 1.0
    cache = kitchen.folder / "cache"
    train = mixer.prepare_dataset(output_file=str(kitchen.folder / "train.jsonl"), split="train", cache_dir=str(cache))
    held_out = mixer.prepare_dataset(kitchen.folder / "val.jsonl", split="validation", cache_dir=cache)
    assert train == str(kitchen.folder / "train.jsonl")
    rows = [json.loads(line) for line in Path(train).read_bytes().splitlines()]
    assert Counter(row["source"] for row in rows) == {"math": 240, "chat": 160}
    assert not {row["id"] for row in rows} & {
        json.loads(line)["id"] for line in Path(held_out).read_bytes().splitlines()
    }
    with pytest.raises(ValueError, match="split must be train or validation"):
        mixer.prepare_dataset("x.jsonl", split="dev")


def test_validation_of_a_wrong_recipe_says_so_without_raising(kitchen: Kitchen) -> None:
    validation = DatasetMixer.from_yaml(kitchen.recipe(TOY.replace("0.4", "0.5"))).validate_mixture()
    assert validation["is_valid"] is False
    assert validation["total_ratio"] == 1.1
    assert "mix_ratio must sum to 1, got 1.1" in validation["problems"][0]


def test_get_dataset_gives_training_rows_and_validation_rows() -> None:
    train = get_dataset("synthetic_dataset", num_rows=50)
    assert (len(train), train.column_names) == (40, ["question", "answer"])
    both = get_dataset("synthetic_dataset", with_validation=True, num_rows=50)
    assert {name: len(rows) for name, rows in both.items()} == {"train": 40, "validation": 10}
    with pytest.raises(ValueError, match="did you mean gsm8k"):
        get_dataset("gsm8")


def test_a_mixture_can_be_trained_on(kitchen: Kitchen, tiny_model: Path) -> None:
    def train_rows(recipe: str) -> TokenRows:
        request = PreparationRequest(
            dataset=DatasetConfig(name="toy", max_length=256),
            mixture=kitchen.mix(recipe).folder,
            tokenizer=str(tiny_model),
            objective="sft",
        )
        return TokenRows.open(prepare(request, kitchen.folder / "data", lambda line: None).folder, "train")

    rows, otherwise_spelled = train_rows(TOY), train_rows(TOY + "turns: conversations\n")
    assert Counter(row.source for row in rows) == {"math": 240, "chat": 160}
    assert [row.input_ids.tolist() for row in rows] == [row.input_ids.tolist() for row in otherwise_spelled]


def test_conversations_that_hold_more_than_text_cannot_be_written_as_such(kitchen: Kitchen) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    turns = [{"role": "user", "content": "1 and 1?"}, call, {"role": "tool", "content": "2"}]
    (kitchen.folder / "calls.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    told = r"turns: conversations has no place .* turn 1 has tool_calls; set turns: messages"
    with pytest.raises(ValueError, match=told):
        kitchen.mix("turns: conversations\ndatasets:\n  - {name: calls, path: calls.jsonl}\n")


# --- real files


@needs_real_data
def test_the_toy_mixture_of_real_files(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(f"""
datasets:
  - {{name: gsm8k, mix_ratio: 0.6, max_samples: 5000, path: {REAL_DATA}/gsm8k_train.jsonl}}
  - {{name: code_alpaca, mix_ratio: 0.4, max_samples: 2017, path: {REAL_DATA}/codealpaca_2k.json}}
""")
    result = run_mixture(read_mixture(path), tmp_path / "data", lambda line: None)
    assert Counter(row["source"] for row in rows_of(result)) == {"gsm8k": 4210, "code_alpaca": 2807}
    assert len({row["id"] for row in rows_of(result) if row["source"] == "code_alpaca"}) == result.plan.sources[1].pool


@needs_real_data
def test_the_distillation_mixture_of_real_files(tmp_path: Path) -> None:
    files = {
        "openhermes": ("instruction_chat", 0.4, "alpaca_en_demo.json"),
        "ultrachat": ("instruction_chat", 0.6, "sharegpt_dummy.json"),
        "the_stack_python": ("code", 0.5, "mbpp.jsonl"),
        "starcoder": ("code", 0.5, "codealpaca_2k.json"),
        "gsm8k": ("math_reasoning", 1.0, "gsm8k_train.jsonl"),
        "natural_questions": ("factual_qa", 0.5, "nq_open_dev.jsonl"),
        "hotpot_qa": ("factual_qa", 0.5, "hotpot_dev_simplified.json"),
    }
    entries = "\n".join(
        f"  {name}: {{enabled: true, category: {category}, allocation: {share}, path: {REAL_DATA}/{file}}}"
        for name, (category, share, file) in files.items()
    )
    path = tmp_path / "distillation.yaml"
    path.write_text(f"""
total_samples: 10000
output_dir: {tmp_path / "distillation"}
category_ratios: {{instruction_chat: 0.35, code: 0.30, math_reasoning: 0.25, factual_qa: 0.10}}
datasets:
{entries}
""")
    result = run_mixture(read_mixture(path), tmp_path / "data", lambda line: None)
    assert Counter(row["category"] for row in rows_of(result)) == {
        "instruction_chat": 3500,
        "code": 3000,
        "math_reasoning": 2500,
        "factual_qa": 1000,
    }
    for source in result.plan.sources:
        lines = (tmp_path / "distillation" / str(source.category) / f"{source.name}.jsonl").read_bytes().splitlines()
        assert len(lines) == source.rows
