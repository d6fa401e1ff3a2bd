"""Data is prepared once for each key, whole or not at all, and the key changes with all that shapes it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chat_tokenizers import CHATML, LLAMA_3, chat_tokenizer

from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.prepare import PreparationRequest, PreparedData, data_key, prepare, prepared_folder
from mixture.shards import TokenRows, read_packs

MODULE = """
def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(dataset_config.get("num_rows", 50))]
    cut = round(split_ratio * len(rows))
    return {"train": rows[:cut], "test": rows[cut:]}[split]

def score(prediction, row):
    return float(prediction == row["answer"])
"""


def make_request(folder: Path, text: str = MODULE, **dataset) -> PreparationRequest:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        chat_tokenizer(CHATML).save_pretrained(tokenizer)
    module = folder / "sums.py"
    module.write_text(text)
    config = DatasetConfig(name="sums", max_length=dataset.pop("max_length", 128), **dataset)
    return PreparationRequest(
        dataset=config, module=ModuleFile(module), tokenizer=str(tokenizer), objective="sft", seed=1
    )


def silent(line: str) -> None:
    """Ignore progress."""


def test_prepared_data_holds_samples_tokens_packs_and_counts(tmp_path):
    request = make_request(tmp_path)
    told = []
    prepared = prepare(request, tmp_path, told.append)
    train, test = prepared.splits["train"], prepared.splits["test"]
    assert (train.samples, train.rows, test.rows, train.formats) == (40, 40, 10, {"question/answer": 40})
    rows, packs = TokenRows.open(prepared.folder, "train"), read_packs(prepared.folder, "train")
    assert (len(rows), len(packs)) == (train.rows, train.packs)
    assert sum(len(row.input_ids) for row in rows) == train.tokens
    assert sum(int(row.loss_mask[1:].sum()) for row in rows) == train.loss_tokens
    assert sorted(index for pack in packs for index in pack) == list(range(40))
    assert max(sum(len(rows[index].input_ids) for index in pack) for pack in packs) <= 128
    samples = [json.loads(line) for line in (prepared.folder / "train.jsonl").read_text().splitlines()]
    assert samples[0] == {
        "id": "sums-train-0",
        "source": "sums",
        "category": None,
        "metadata": {},
        "messages": [{"role": "user", "content": "What is 0 + 1?"}, {"role": "assistant", "content": "1"}],
    }
    assert "train: 40 rows (40 question/answer)" in told
    assert prepared.has_score and prepared == PreparedData.open(prepared.folder)


def test_raw_test_rows_are_kept_with_what_generation_starts_from_where_there_is_a_score(tmp_path):
    folder = prepare(make_request(tmp_path), tmp_path, silent).folder
    kept = [json.loads(line) for line in (folder / "test_rows.jsonl").read_text().splitlines()]
    assert len(kept) == 10
    assert kept[0] == {
        "row": {"question": "What is 40 + 1?", "answer": "41"},
        "prompt_messages": [{"role": "user", "content": "What is 40 + 1?"}],
    }
    without = prepare(make_request(tmp_path, MODULE.partition("def score")[0]), tmp_path, silent)
    assert not without.has_score and not (without.folder / "test_rows.jsonl").exists()


def test_rows_that_json_cannot_hold_are_prepared_but_not_scored_and_that_is_told(tmp_path):
    text = MODULE.replace('"answer": str(i + 1)}', '"answer": str(i + 1), "thing": object()}')
    told = []
    prepared = prepare(make_request(tmp_path, text), tmp_path, told.append)
    assert prepared.splits["test"].rows == 10 and not (prepared.folder / "test_rows.jsonl").exists()
    assert any(line.startswith("test: answers will not be generated and scored: row sums-test-0") for line in told)


def test_a_second_run_takes_what_is_there_without_loading_the_module_again(tmp_path):
    request = make_request(tmp_path, MODULE + f"\nopen({str(tmp_path / 'runs')!r}, 'a').write('x')\n")
    first = prepare(request, tmp_path, silent)
    told = []
    assert prepare(request, tmp_path, told.append) == first
    assert told == [f"data {first.folder.name} is prepared already"]
    assert (tmp_path / "runs").read_text() == "x"


def test_the_fingerprint_depends_on_the_tokens_and_not_on_where_they_were_made(tmp_path):
    first = prepare(make_request(tmp_path / "a"), tmp_path / "a", silent)
    second = prepare(make_request(tmp_path / "b"), tmp_path / "b", silent)
    other = prepare(make_request(tmp_path / "a", num_rows_changed()), tmp_path / "a", silent)
    unpacked = prepare(make_request(tmp_path / "a", packing=False), tmp_path / "a", silent)
    assert first.fingerprint == second.fingerprint
    assert len({first.fingerprint, other.fingerprint, unpacked.fingerprint}) == 3
    assert [len(pack) for pack in read_packs(unpacked.folder, "train")] == [1] * 40


def num_rows_changed() -> str:
    return MODULE.replace("{i} + 1?", "{i} plus 1?")


def test_a_template_that_never_ends_a_turn_is_warned_about(tmp_path):
    request = make_request(tmp_path)
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    chat_tokenizer(template).save_pretrained(request.tokenizer)
    told = []
    prepare(request, tmp_path, told.append)
    assert [line for line in told if line.startswith("warning")] == [
        "warning: the chat template closes answers with no special token, so the model cannot learn to stop"
    ]


# --- the key


def test_the_key_changes_with_everything_that_shapes_the_data(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a"}\n')
    base = make_request(tmp_path, data_files=str(data))
    keys = [data_key(base)]
    for changed in (
        replace(base, seed=2),
        replace(base, objective="pretrain"),
        *(
            replace(base, dataset=replace(base.dataset, **change))
            for change in (
                {"max_length": 64},
                {"packing": False},
                {"limit": 5},
                {"split_ratio": 0.5},
                {"test_split": "validation"},
                {"over_length": "truncate"},
                {"module_keys": {"num_rows": 9}},
            )
        ),
        replace(base, module=ModuleFile(base.module.path, "other")),
    ):
        keys.append(data_key(changed))
    data.write_text('{"text": "b"}\n')
    keys.append(data_key(base))
    base.module.path.write_text(MODULE + "\n# edited")
    keys.append(data_key(base))
    chat_tokenizer(LLAMA_3).save_pretrained(base.tokenizer)
    keys.append(data_key(base))
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)


def test_the_key_changes_with_files_that_the_module_imports_and_not_with_others(tmp_path):
    (tmp_path / "words.py").write_text("WORDS = 1")
    request = make_request(tmp_path, "from words import WORDS\n" + MODULE)
    first = data_key(request)
    (tmp_path / "unrelated.py").write_text("X = 1")
    assert data_key(request) == first
    (tmp_path / "words.py").write_text("WORDS = 2")
    assert data_key(request) != first


def test_the_key_stays_when_a_default_is_written_out_or_files_move(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a"}\n')
    request = make_request(tmp_path, data_files=str(data))
    key = data_key(request)
    written_out = data_key(replace(request, dataset=replace(request.dataset, over_length="drop")))
    moved = make_request(tmp_path / "elsewhere", data_files=str(data.rename(tmp_path / "moved.jsonl")))
    assert key == written_out == data_key(moved)


def test_the_key_needs_no_heavy_imports(tmp_path):
    request = make_request(tmp_path)
    code = (
        "import sys; from pathlib import Path; from mixture.config import DatasetConfig\n"
        "from mixture.dataset_modules import ModuleFile; from mixture.prepare import *\n"
        f"module = ModuleFile(Path({str(request.module.path)!r})); dataset = DatasetConfig(name='sums')\n"
        f"request = dict(dataset=dataset, module=module, tokenizer={request.tokenizer!r}, objective='sft', seed=1)\n"
        "data_key(PreparationRequest(**request))\n"
        "assert PreparedData.open(Path('nowhere')) is None\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.strip() == "[]"


def test_a_missing_data_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"dataset\.data_files: no file .*absent\.jsonl"):
        data_key(make_request(tmp_path, data_files=str(tmp_path / "absent.jsonl")))


# --- what goes wrong


def test_a_missing_test_split_says_which_key_to_set(tmp_path):
    with pytest.raises(ValueError, match=r"dataset\.test_split: .* only train, test; set dataset\.test_split: test"):
        prepare(make_request(tmp_path, test_split="validation"), tmp_path, silent)


def test_a_row_in_no_known_format_names_module_split_and_row(tmp_path):
    text = MODULE.replace('"question"', '"frage"')
    with pytest.raises(ValueError, match=r"sums\.py, train row 0: a row with columns frage, answer fits no known"):
        prepare(make_request(tmp_path, text), tmp_path, silent)


def test_a_split_with_nothing_to_learn_from_says_why(tmp_path):
    with pytest.raises(ValueError, match="split train: none of 40 rows is left to learn from; dropped: 40 longer than"):
        prepare(make_request(tmp_path, max_length=8), tmp_path, silent)


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    request = replace(make_request(tmp_path), tokenizer=str(tmp_path / "tokenizer" / "absent"))
    with pytest.raises(ValueError, match=r"model\.tokenizer: cannot load a tokenizer from .*absent"):
        prepare(request, tmp_path, silent)


def test_a_failure_leaves_nothing_behind(tmp_path):
    request = make_request(tmp_path, MODULE.replace('"answer": str(i + 1)', '"answer": 1 if i == 45 else "1"'))
    with pytest.raises(ValueError, match="column answer holds int"):
        prepare(request, tmp_path, silent)
    assert list((tmp_path / "prepared").iterdir()) == []


def test_a_full_disk_passes_through_and_leaves_nothing_that_looks_finished(tmp_path):
    request = make_request(tmp_path, num_rows_many())
    code = (
        "import resource, signal, sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path; import test_prepare as t; from mixture.prepare import prepare\n"
        "import transformers\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        f"root = Path({str(tmp_path)!r})\n"
        "try:\n    prepare(t.make_request(root, t.num_rows_many()), root, t.silent)\n"
        "except OSError as error:\n    print('OSError', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True
    )
    assert done.stdout.startswith("OSError")
    assert list((tmp_path / "prepared").iterdir()) == []
    assert prepare(request, tmp_path, silent).splits["train"].rows == 2400


def num_rows_many() -> str:
    return MODULE.replace('"num_rows", 50', '"num_rows", 3000')


# --- several runs


def prepare_in_process(request: PreparationRequest, root: Path, result: Path) -> None:
    prepared = prepare(request, root, silent)
    result.write_text(f"{prepared.fingerprint} {prepared.folder.name}")


def test_runs_at_once_end_with_the_same_whole_data(tmp_path):
    request = make_request(tmp_path, num_rows_many())
    results = [tmp_path / f"result-{run}" for run in range(3)]
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=prepare_in_process, args=(request, tmp_path, result)) for result in results]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    outcomes = {result.read_text() for result in results}
    assert len(outcomes) == 1
    assert [path.name for path in (tmp_path / "prepared").iterdir()] == [outcomes.pop().split()[1]]


def test_a_killed_run_leaves_nothing_that_looks_finished_and_the_next_one_cleans_up(tmp_path):
    slow = MODULE.replace("return {", "import time; time.sleep(60 if dataset_config.get('slow') else 0); return {")
    request = make_request(tmp_path, slow, module_keys={"slow": True})
    run = multiprocessing.get_context("fork").Process(target=prepare, args=(request, tmp_path, silent))
    run.start()
    prepared = tmp_path / "prepared"
    while not (prepared.exists() and list(prepared.iterdir())):
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.join()
    assert PreparedData.open(prepared_folder(tmp_path, data_key(request))) is None
    (left,) = prepared.iterdir()
    request.module.path.write_text(slow.replace("60 if", "0 if"))
    # The same key as the killed run's: what it left is renamed to the new key.
    left.rename(left.with_name(left.name.replace(left.name.split(".")[1], data_key(request))))
    done = prepare(request, tmp_path, silent)
    assert list(prepared.iterdir()) == [done.folder]


def test_token_rows_do_not_depend_on_the_batches_they_were_made_in(tmp_path, monkeypatch):
    whole = prepare(make_request(tmp_path / "a"), tmp_path / "a", silent)
    monkeypatch.setattr("mixture.prepare.SAMPLES_PER_BATCH", 7)
    pieces = prepare(make_request(tmp_path / "b"), tmp_path / "b", silent)
    assert whole.fingerprint == pieces.fingerprint
    first, second = TokenRows.open(whole.folder, "test")[3], TokenRows.open(pieces.folder, "test")[3]
    assert np.array_equal(first.input_ids, second.input_ids)
