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
import pyarrow as pa
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
    return PreparationRequest(dataset=config, module=ModuleFile(module), tokenizer=str(tokenizer), objective="sft")


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


def test_conversations_without_an_answer_are_left_out_and_counted(tmp_path):
    text = """
GOOD = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Four."}]
UNANSWERED = [{"from": "human", "value": "Hello?"}]

def get_custom_dataset(dataset_config, processor, split):
    return [{"conversations": GOOD}, {"conversations": UNANSWERED}, {"conversations": GOOD}]
"""
    prepared = prepare(make_request(tmp_path, text), tmp_path / "data", silent)
    assert prepared.splits["train"].samples == 3
    assert prepared.splits["train"].rows == 2
    assert prepared.splits["train"].dropped == {"no question with an answer": 1}


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
        f"request = dict(dataset=dataset, module=module, tokenizer={request.tokenizer!r}, objective='sft')\n"
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


@pytest.mark.chain
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


@pytest.mark.chain
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
    monkeypatch.setattr("mixture.tokenising.SAMPLES_PER_BATCH", 7)
    pieces = prepare(make_request(tmp_path / "b"), tmp_path / "b", silent)
    assert whole.fingerprint == pieces.fingerprint
    first, second = TokenRows.open(whole.folder, "test")[3], TokenRows.open(pieces.folder, "test")[3]
    assert np.array_equal(first.input_ids, second.input_ids)


# --- workers


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.chain
def test_any_number_of_workers_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("mixture.tokenising.SAMPLES_PER_BATCH", 64)
    text = (
        num_rows_many().replace('f"What is {i} + 1?"', '"Why? " * (i % 9) + str(i)').replace("str(i + 1)", "str(i) * 3")
    )
    contents = []
    for workers in (1, 2, 3):
        request = make_request(tmp_path / str(workers), text, max_length=48)
        told = []
        prepared = prepare(request, tmp_path / str(workers), told.append, workers=workers)
        content = content_of(prepared.folder)
        stats = json.loads(content.pop("stats.json"))
        contents.append((content, {**stats, "tokenizer": ""}, prepared.folder.name))
        assert told[-1].startswith("test: ") and 0 < prepared.splits["train"].rows < 2400
    assert contents[0] == contents[1] == contents[2]


def test_a_mistake_in_a_row_is_named_the_same_by_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("mixture.tokenising.SAMPLES_PER_BATCH", 64)
    text = num_rows_many().replace(
        '"answer": str(i + 1)}', '**({"answer": str(i)} if i != 2000 else {"answer": None, "text": "x"})}'
    )
    messages = []
    for workers in (1, 2):
        with pytest.raises(ValueError, match="sample sums-train-2000 is plain text") as caught:
            prepare(make_request(tmp_path, text), tmp_path, silent, workers=workers)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and list((tmp_path / "prepared").iterdir()) == []


@pytest.mark.chain
def test_a_worker_that_is_killed_is_an_error_and_workers_end_with_the_run(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path; import test_prepare as t; from mixture.prepare import prepare\n"
        "import mixture.tokenising, os, signal, time\n"
        "mixture.tokenising.SAMPLES_PER_BATCH = 64\n"
        "tokenised = mixture.tokenising.tokenised\n"
        "def slow(renderer, batch):\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(0.1 if sys.argv[1] == 'killed' else 60)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "mixture.tokenising.tokenised = slow\n"
        f"root = Path({str(tmp_path)!r})\n"
        "try:\n    prepare(t.make_request(root, t.num_rows_many()), root, t.silent, workers=2)\n"
        "except RuntimeError as error:\n    print(error)\n"
    )

    def start(what: str) -> subprocess.Popen:
        command = [sys.executable, "-c", code, what]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])

    killed = start("killed")
    assert killed.communicate(timeout=120)[0].splitlines()[-1].startswith("a worker that makes tokens was ended")
    run = start("waiting")
    worker = int(run.stdout.readline())
    run.kill()
    run.wait()
    for _ in range(100):
        if not Path("/proc", str(worker)).exists():
            break
        time.sleep(0.1)
    assert not Path("/proc", str(worker)).exists()


def test_shards_are_cut_at_the_size_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("mixture.shards.MEGABYTE", 4000)
    monkeypatch.setattr("mixture.shards.TOKENS_PER_BATCH", 1)
    prepared = prepare(make_request(tmp_path, num_rows_many(), shard_size_mb=2), tmp_path, silent)
    shards = sorted((prepared.folder / "tokens").glob("train-*.parquet"))
    assert len(shards) > 3 and all(shard.stat().st_size < 14_000 for shard in shards)


def test_the_key_does_not_depend_on_the_tokenizer_backend(tmp_path):
    request = make_request(tmp_path)
    other = replace(request, dataset=replace(request.dataset, tokenizer_backend="huggingface"))
    assert data_key(request) == data_key(other)
    assert data_key(replace(request, dataset=replace(request.dataset, shard_size_mb=7))) != data_key(request)


# --- mixtures


def make_mixture(folder: Path, stages=((0, 100), (0, 50), (1, 90)), compress=False) -> Path:
    """A finished mixture: three parts of train in two stages, and one of validation."""
    folder.mkdir(parents=True)
    parts = []
    for number, (stage, count) in enumerate([*stages, (0, 20)]):
        split = "validation" if number == len(stages) else "train"
        file = f"{split}-{number:05d}.jsonl" + (".zst" if compress else "")
        with pa.output_stream(str(folder / file), compression="zstd" if compress else None) as out:
            for row in range(count):
                source = "sums" if row % 5 else "words"
                question = f"{stage} {number} {row}?" + " Why?" * (row % 7)
                answer = {"role": "assistant", "content": "yes " * (8 if source == "words" else 2)}
                sample = {"id": f"{split}-{number}-{row}", "source": source, "category": "c", "metadata": {"a": 1}}
                sample["messages"] = [{"role": "user", "content": question}, answer]
                out.write(json.dumps(sample).encode() + b"\n")
        parts.append({"file": file, "split": split, "stage": stage, "rows": {}, "bytes": 0, "checksum": ""})
    (folder / "MIXED").write_text(json.dumps({"key": folder.name, "parts": parts}))
    return folder


def mixture_request(root: Path, mixture: Path, **dataset) -> PreparationRequest:
    request = make_request(root)
    config = DatasetConfig(name="mix", max_length=128, **dataset)
    return replace(request, module=None, mixture=mixture, dataset=config)


@pytest.mark.parametrize("compress", [False, True])
def test_a_mixture_is_prepared_with_its_stages_and_counts_by_source(tmp_path, compress):
    told = []
    mixture = make_mixture(tmp_path / "mix", compress=compress)
    prepared = prepare(mixture_request(tmp_path, mixture), tmp_path, told.append)
    train, rows = prepared.splits["train"], TokenRows.open(prepared.folder, "train")
    assert (train.samples, prepared.splits["test"].samples, train.formats) == (240, 20, {"messages": 240})
    assert [row.sample_id for row in rows][:2] == ["train-0-0", "train-0-1"] and not prepared.has_score
    packs = read_packs(prepared.folder, "train")
    assert train.stages == packs.stages.tolist() and len(train.stages) == 2
    second = train.stages[1]
    assert sorted(sample for pack in range(second) for sample in packs[pack]) == list(range(150))
    for source in ("sums", "words"):
        mine = [row for row in rows if row.source == source]
        stats = train.sources[source]
        assert (stats.samples, stats.rows) == (len(mine), len(mine))
        assert stats.tokens == sum(len(row.input_ids) for row in mine)
        assert stats.loss_tokens == sum(int(row.loss_mask[1:].sum()) for row in mine)
    assert train.sources["sums"].samples == 192
    words = train.sources["words"]
    line = f"train: words 48 rows (20.0%), {words.tokens} tokens ({words.tokens / train.tokens:.1%}), "
    assert any(told_line.startswith(line) for told_line in told)
    assert not (prepared.folder / "train.jsonl").exists()
    assert prepared == PreparedData.open(prepared.folder)


def test_rows_that_are_dropped_shift_the_stages_and_a_stage_that_is_left_empty_is_none(tmp_path):
    mixture = make_mixture(tmp_path / "mix", stages=((0, 10), (1, 10), (2, 5)))
    lines = (mixture / "train-00001.jsonl").read_text().splitlines()
    long = [line.replace("yes yes", "yes " * 200) for line in lines]
    (mixture / "train-00001.jsonl").write_text("\n".join(long) + "\n")
    prepared = prepare(mixture_request(tmp_path, mixture, packing=False), tmp_path, silent)
    assert prepared.splits["train"].stages == [0, 10] and prepared.splits["train"].rows == 15


def test_the_key_of_a_mixture_is_its_folders_or_else_its_markers(tmp_path):
    key = data_key(mixture_request(tmp_path, tmp_path / "not made yet" / "0123456789abcdef"))
    elsewhere = make_mixture(tmp_path / "mix")
    first = data_key(mixture_request(tmp_path, elsewhere))
    marker = (elsewhere / "MIXED").read_text()
    (elsewhere / "MIXED").write_text(marker.replace('"key": "mix"', '"key": "0123456789abcdef"'))
    assert data_key(mixture_request(tmp_path, elsewhere)) == key != first


def test_a_mixture_that_is_not_finished_is_refused(tmp_path):
    mixture = make_mixture(tmp_path / "mix")
    (mixture / "MIXED").unlink()
    with pytest.raises(ValueError, match="mix is no finished mixture: there is no MIXED in it"):
        prepare(mixture_request(tmp_path, mixture), tmp_path, silent)


def test_a_part_that_holds_other_rows_is_refused_by_name(tmp_path):
    mixture = make_mixture(tmp_path / "mix")
    (mixture / "train-00002.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(ValueError, match=r"train-00002\.jsonl, row 0 or one of the 1 .* no canonical sample"):
        prepare(mixture_request(tmp_path, mixture), tmp_path, silent)


def test_limit_keeps_the_first_rows_of_a_mixture(tmp_path):
    mixture = make_mixture(tmp_path / "mix")
    prepared = prepare(mixture_request(tmp_path, mixture, limit=120), tmp_path, silent)
    assert [split.samples for split in prepared.splits.values()] == [120, 20]


def test_data_comes_from_a_module_or_from_a_mixture(tmp_path):
    with pytest.raises(ValueError, match="from a dataset module or from a mixture: name one"):
        replace(make_request(tmp_path), module=None)
