"""Every shipped dataset module follows the contract, from local files with the hub's columns."""

import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from dataset_hub import Fault, played_hub
from huggingface_hub import constants

from mixture.config import DatasetConfig
from mixture.dataset_modules import check_module, load_module, load_rows, resolve_module
from mixture.formats import FORMAT_NAMES, canonical_row, detect_format
from mixture.hub import HubRows, HubSource, absolute_data_files
from mixture.inspection import list_datasets
from sandbox.python import missing_protection

PROJECT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (PROJECT / "datasets").glob("*.py"))
TURNS = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
MESSAGES = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
HUB_ROWS = {
    "code_alpaca": [{"instruction": f"Print {i}.", "input": "", "output": f"print({i})"} for i in range(20)],
    "code_contests": [
        {
            "name": f"task {i}",
            "description": f"Print {i}.",
            "solutions": {
                "language": [2, 3, 3, 3, 3],
                "solution": ["cout", *(f"print({i} + {j} - {j})" for j in range(4))],
            },
            "cf_rating": 800,
        }
        for i in range(20)
    ],
    "code_feedback": [
        {"query": f"Print {i}.", "answer": f"print({i})", "resource": "a", "lang": "b"} for i in range(20)
    ],
    "evol_instruct": [{"instruction": f"Print {i}.", "output": f"print({i})"} for i in range(20)],
    "gsm8k": [{"question": f"{i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(20)],
    "hotpot_qa": [
        {
            "id": str(i),
            "question": f"{i} + 1?",
            "answer": str(i + 1),
            "type": "bridge",
            "level": "easy",
            "context": {"title": ["One"], "sentences": [["One is one."]]},
        }
        for i in range(20)
    ],
    "math": [
        {"problem": f"{i} + 1?", "level": "Level 1", "type": "Algebra", "solution": str(i + 1)} for i in range(20)
    ],
    "mbpp": [
        {"text": f"Return {i}.", "code": f"def f(): return {i}", "task_id": i, "test_list": [f"assert f() == {i}"]}
        for i in (*range(5, 15), *range(595, 605))
    ],
    "natural_questions": [{"question": f"{i} + 1?", "answer": [str(i + 1), "one more"]} for i in range(20)],
    "numina_math": [
        {"source": f"olympiad {i}", "problem": str(i), "solution": "4", "messages": MESSAGES} for i in range(20)
    ],
    "open_orca": [
        {"id": f"cot.{i}", "system_prompt": "Think.", "question": f"{i} + 1?", "response": str(i + 1)}
        for i in range(20)
    ],
    "openhermes": [{"conversations": TURNS, "source": f"set {i}", "views": i, "title": None} for i in range(20)],
    "python_code_23k_sharegpt": [{"id": f"python_{i}", "conversations": TURNS} for i in range(20)],
    "python_code_instructions_18k": [
        {"instruction": f"Print {i}.", "input": "", "output": f"print({i})", "prompt": f"### {i}"} for i in range(20)
    ],
    "python_codes_25k": [
        {"instruction": f"Print {i}.", "input": "", "output": f"print({i})", "text": f"Print {i}. print({i})"}
        for i in range(20)
    ],
    "sharegpt": [{"id": f"abc{i}_0", "conversations": TURNS} for i in range(20)],
    "starcoderdata": [
        {"content": f"<reponame>a/b<gh_stars>1-10\nprint({i})\n", "id": str(i), "max_stars_repo_name": "a/b"}
        for i in range(20)
    ],
    "the_stack_v2": [
        {"content": f"print({i})\n", "hexsha": str(i), "max_stars_repo_licenses": ["MIT"]} for i in range(20)
    ],
    "ultrachat": [{"prompt": "2 + 2?", "prompt_id": str(i), "messages": MESSAGES} for i in range(20)],
}
UNPINNED = {"evol_instruct", "ocrvqa", "open_orca", "python_code_23k_sharegpt", "the_stack_v2", "the_stack_v2_ids"}
"""Data sets whose full commit hash is not known here."""

REAL_FILES = {
    "gsm8k": ({"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl"}, {"train": 7473, "test": 1319}),
    "code_alpaca": ("codealpaca_2k.json", {"train": 1815, "test": 202}),
    "mbpp": ("mbpp.jsonl", {"train": 374, "test": 500}),
}
REAL_DATA = os.environ.get("BATON_REAL_DATA")


def load(split, **dataset):
    config = DatasetConfig(**dataset)
    file = resolve_module(config, config_folder=PROJECT, project=PROJECT)
    return list(load_rows(file, config, split, None))


def write_rows(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_datasets_folder_is_no_package_so_hugging_face_datasets_is_not_hidden():
    import datasets

    assert not (PROJECT / "datasets" / "__init__.py").exists()
    assert hasattr(datasets, "load_dataset")


@pytest.mark.parametrize("name", NAMES)
def test_every_module_passes_the_static_check_and_states_source_and_licence(name):
    file = resolve_module(DatasetConfig(name=name), config_folder=PROJECT, project=PROJECT)
    check_module(file)
    source = load_module(file.path).SOURCE
    assert isinstance(source, HubSource) and source.format in {*FORMAT_NAMES, "images"}
    assert (source.id is None or name in UNPINNED) == (source.revision is None)
    for place in source.candidates():
        assert place.revision is None or (len(place.revision) == 40 and int(place.revision, 16))
        assert place.id is None or all(place.split_on_hub(split) for split in place.rows)
        assert set(place.files or {}) <= {place.split_on_hub(split) for split in place.rows}
        assert not any(f"{{{option}}}" in f"{place.config} {place.files}" for option in place.options)


def test_every_name_that_is_asked_for_is_there():
    made_here = {name for name in NAMES if load_module(PROJECT / "datasets" / f"{name}.py").SOURCE.id is None}
    assert {*HUB_ROWS, *made_here, "the_stack_v2_ids", "ocrvqa"} == set(NAMES)


def test_the_listing_reads_the_same_sources_without_running_modules():
    listings = {listing.name: listing for listing in list_datasets(PROJECT)}
    assert sorted(listings) == NAMES
    for name in NAMES:
        assert listings[name].source == load_module(PROJECT / "datasets" / f"{name}.py").SOURCE
        assert listings[name].summary


@pytest.mark.parametrize("name", sorted(HUB_ROWS))
@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_in_the_stated_format(name, split, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", HUB_ROWS[name])
    source = load_module(PROJECT / "datasets" / f"{name}.py").SOURCE
    rows = load(split, name=name, data_files=data)
    assert {detect_format(row).name for row in rows} == {source.format}
    assert all(canonical_row(row, name, "0")["source"] == name for row in rows)


@pytest.mark.parametrize("name", ["synthetic_dataset", "test_dataset"])
def test_generated_rows_are_in_the_stated_format_and_split_without_overlap(name):
    source = load_module(PROJECT / "datasets" / f"{name}.py").SOURCE
    train, test = load("train", name=name), load("test", name=name)
    assert {detect_format(row).name for row in train + test} == {source.format}
    assert not {json.dumps(row) for row in train} & {json.dumps(row) for row in test}
    assert source.rows in ({}, {"train": len(train), "test": len(test)})


# --- local files


def test_one_local_file_is_split_by_ratio_disjoint_whole_and_the_same_each_time(tmp_path):
    rows = [{"question": str(i // 2), "answer": f"#### {i // 2}"} for i in range(200)]  # every row twice
    data = write_rows(tmp_path / "rows.jsonl", rows)
    train, test = (load(split, name="gsm8k", data_files=data, split_ratio=0.8) for split in ("train", "test"))
    questions = {row["question"] for row in train}, {row["question"] for row in test}
    assert [len(part) for part in questions] == [80, 20] and not questions[0] & questions[1]
    assert len(train) + len(test) == 200
    shuffled = write_rows(tmp_path / "shuffled.jsonl", rows[::-1])
    again = {row["question"] for row in load("test", name="gsm8k", data_files=shuffled, split_ratio=0.8)}
    assert again == questions[1]


def test_several_files_are_read_one_after_another_and_other_kinds_too(tmp_path):
    rows, name = HUB_ROWS["code_alpaca"], "code_alpaca"
    first, second = write_rows(tmp_path / "a.jsonl", rows[:8]), write_rows(tmp_path / "b.jsonl", rows[8:])
    array = tmp_path / "all.json"
    array.write_text(json.dumps(rows))
    table = tmp_path / "all.csv"
    table.write_text("instruction,input,output\n" + "".join(f"{i} + 1?,,{i + 1}\n" for i in range(20)))
    splits = {"train": [first, second], "test": str(array)}
    assert load("train", name=name, data_files=splits) == rows == load("test", name=name, data_files=splits)
    assert len(load("train", name=name, data_files={"train": str(table)})) == 20


def test_what_is_wrong_with_local_files_is_said(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", HUB_ROWS["gsm8k"])
    with pytest.raises(ValueError, match=r"data_files has no split 'test', only train: set dataset\.train_split or"):
        load("test", name="gsm8k", data_files={"train": data})
    with pytest.raises(ValueError, match=r"data_files: no file .*absent\.jsonl"):
        load("train", name="gsm8k", data_files=str(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match=r"split_ratio has no effect: the data has its own splits train"):
        load("train", name="gsm8k", data_files={"train": data}, split_ratio=0.5)
    other = tmp_path / "rows.xml"
    other.write_text("<rows/>")
    with pytest.raises(ValueError, match=r"endings \.xml; give files of one kind: \.json, \.jsonl, \.parquet, \.csv"):
        load("train", name="gsm8k", data_files={"train": str(other)})


def test_paths_of_local_files_are_made_absolute_from_the_configs_folder_first(tmp_path):
    (tmp_path / "configs").mkdir()
    near = write_rows(tmp_path / "configs" / "rows.jsonl", [])
    far = write_rows(tmp_path / "far.jsonl", [])
    write_rows(tmp_path / "rows.jsonl", [])
    config = DatasetConfig(name="gsm8k", data_files={"train": ["rows.jsonl", "far.jsonl"], "test": far})
    found = absolute_data_files(config, config_folder=tmp_path / "configs", project=tmp_path)
    assert found.data_files == {"train": [near, far], "test": far}
    with pytest.raises(ValueError, match=r"no file absent\.jsonl\. Looked for:") as raised:
        missing = DatasetConfig(name="gsm8k", data_files="absent.jsonl")
        absolute_data_files(missing, config_folder=tmp_path / "configs", project=tmp_path)
    assert str(tmp_path / "configs" / "absent.jsonl") in str(raised.value)


def test_mbpp_divides_one_file_by_the_authors_task_ids(tmp_path):
    data = write_rows(tmp_path / "mbpp.jsonl", HUB_ROWS["mbpp"])
    ids = {split: [row["task_id"] for row in load(split, name="mbpp", data_files=data)] for split in ("train", "test")}
    assert ids == {"train": [601, 602, 603, 604], "test": [11, 12, 13, 14]}


# --- scores


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("She pays 600 + 400 = 1000\n#### 1,000", 1.0),
        ("The answer is $1,000.00.", 1.0),
        ("First 3, then 1000", 1.0),
        ("#### 1000 because 2 + 2 = 4", 1.0),
        ("#### 100", 0.0),
        ("1000 minus 1 is 999", 0.0),
        ("no idea", 0.0),
        ("", 0.0),
    ],
)
def test_gsm8k_scores_the_final_number(prediction, score):
    module = load_module(PROJECT / "datasets" / "gsm8k.py")
    assert module.score(prediction, {"answer": "600 + 400 = <<600+400=1000>>1000\n#### 1,000"}) == score


def test_gsm8k_tells_negative_numbers_apart():
    module = load_module(PROJECT / "datasets" / "gsm8k.py")
    assert module.score("#### -5", {"answer": "#### -5"}) == 1.0
    assert module.score("#### 5", {"answer": "#### -5"}) == 0.0


NO_SANDBOX = missing_protection()
MBPP = {
    "text": "Add two lists.",
    "code": "def add(a, b):\r\n  return a + b",
    "test_setup_code": "import math",
    "test_list": ["assert add([1], [2]) == [1, 2]", "assert add([], []) == [math.floor(0.5)][1:]"],
}


@pytest.mark.skipif(NO_SANDBOX is not None, reason=f"no sandbox here: {NO_SANDBOX}")
@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        (MBPP["code"], 1.0),
        ("Like this:\n```python\ndef add(a, b):\n    return [*a, *b]\n```\nTry `add([], [])`.", 1.0),
        ("def add(a, b):\n    return [1, 2]", 0.0),
        ("import sys\nsys.exit(0)", 0.0),
        ("", 0.0),
    ],
)
def test_mbpp_scores_code_by_the_tests_of_its_task(prediction, score):
    module = load_module(PROJECT / "datasets" / "mbpp.py")
    assert module.SCORE_NAME == "pass@1" and module.score(prediction, MBPP) == score
    sanitised = {"prompt": "", "test_imports": [MBPP["test_setup_code"]], "test_list": MBPP["test_list"]}
    assert module.tests_of(sanitised) == module.tests_of(MBPP)


CONTEST = {
    "name": "sums",
    "description": "Print the sum of two numbers, then its half.",
    "solutions": {"language": [3, 3], "solution": ["print(1)", "print(2)"]},
    "public_tests": {"input": ["1 2\n"], "output": ["3\n1.5\n"]},
    "private_tests": [{"input": "4 5\n", "output": "9 4.5"}],
    "generated_tests": {"input": ["2 1\n"], "output": ["3 1.500000\n"]},
    "time_limit": {"seconds": 0, "nanos": 200_000_000},
}
RIGHT = """
import sys
def main():
    total = sum(map(int, sys.stdin.buffer.read().split()))
    print(total, total / 2)
if __name__ == "__main__":
    main()
    exit()
"""


def test_tests_of_contests_reach_the_score_and_no_row_to_learn_from(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [CONTEST])
    train, test = (load(split, name="code_contests", data_files={split: data}) for split in ("train", "test"))
    assert [row["id"] for row in train] == ["sums-0", "sums-1"] and not any("tests" in row for row in train)
    (task,) = test
    assert task["time_limit_s"] == 0.2
    assert [test["input"] for test in task["tests"]] == ["1 2\n", "4 5\n", "2 1\n"]
    tasks = write_rows(tmp_path / "tasks.jsonl", [{**CONTEST, "name": str(number)} for number in range(9)])
    parts = [load(split, name="code_contests", data_files=tasks) for split in ("train", "test")]
    assert sorted(row["parent"] for part in parts for row in part) == [str(number) for number in range(9)]


@pytest.mark.skipif(NO_SANDBOX is not None, reason=f"no sandbox here: {NO_SANDBOX}")
@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (f"So:\n```python\n{RIGHT}```", 1.0),
        (RIGHT.replace("total / 2", "total / 2, file=sys.__stdout__"), 1.0),
        (
            f"import atexit\nkept = []\natexit.register(lambda: print(*kept))\n{RIGHT.replace('print', 'kept[:] = ')}",
            1.0,
        ),
        (f"{RIGHT}\nsys.stdout.close()", 1.0),
        ("a, b = map(int, input().split())\nprint(3, 1.5)", 0.0),
        ("a, b = map(int, input().split())\nprint(a + b, int((a + b) / 2))", 0.0),
        ("while True:\n    pass", 0.0),
        ("import os\nos._exit(0)", 0.0),
        ("", 0.0),
    ],
    ids=[
        "right",
        "to the first stream",
        "at the end",
        "closed",
        "right once",
        "less exact",
        "endless",
        "gone",
        "empty",
    ],
)
def test_contests_score_programs_by_what_they_print(answer, score):
    module = load_module(PROJECT / "datasets" / "code_contests.py")
    (task,) = module.read_tasks([CONTEST])
    assert module.SCORE_NAME == "pass@1" and module.score(answer, task) == score
    for row in ({**task, "tests": []}, {"id": "sums-0"}):
        with pytest.raises(ValueError, match=r"sums-0 has no tests: rows to learn from come without them, .* public"):
            module.score(answer, row)


def test_synthetic_answers_are_right_and_score_full_marks():
    module = load_module(PROJECT / "datasets" / "synthetic_dataset.py")
    for row in load("train", name="synthetic_dataset", module_keys={"num_rows": 100}):
        start, boxes, size, given = map(int, module.NUMBER.findall(row["question"]))
        assert row["answer"].endswith(f"#### {start + boxes * size - given}")
        assert module.score(row["answer"], row) == 1.0
        assert module.score(row["answer"] + "1", row) == 0.0


def test_synthetic_rows_follow_their_keys():
    def rows(**keys):
        return load("train", name="synthetic_dataset", module_keys=keys, split_ratio=0.5)

    assert len(rows(num_rows=60)) == 30
    assert rows(seed=1) == rows(seed=1) != rows(seed=2)


@pytest.mark.skipif(not REAL_DATA, reason="BATON_REAL_DATA does not name a folder with the original files")
@pytest.mark.parametrize("name", sorted(REAL_FILES))
def test_the_original_files_load_in_full(name):
    files, counts = REAL_FILES[name]
    folder = Path(str(REAL_DATA))
    paths = {k: str(folder / v) for k, v in files.items()} if isinstance(files, dict) else str(folder / files)
    found = {split: load(split, name=name, data_files=paths) for split in ("train", "test")}
    assert {split: len(rows) for split, rows in found.items()} == counts
    if name == "gsm8k":
        module = load_module(PROJECT / "datasets" / "gsm8k.py")
        assert all(module.score(row["answer"], row) == 1.0 for row in found["train"] + found["test"])
    if name == "mbpp" and not NO_SANDBOX:
        module = load_module(PROJECT / "datasets" / "mbpp.py")
        assert all(module.score(row["code"], row) == 1.0 for row in found["test"][:40])


# --- what modules make of the rows that are stored


def read(name, rows):
    return list(load_module(PROJECT / "datasets" / f"{name}.py").read_rows(iter(rows)))


@pytest.mark.parametrize("as_pairs", [False, True])
def test_code_contests_gives_up_to_three_python_solutions_of_a_task(as_pairs):
    row = HUB_ROWS["code_contests"][7]
    if as_pairs:
        columns = row["solutions"]["language"], row["solutions"]["solution"]
        row = {**row, "solutions": [{"language": a, "solution": b} for a, b in zip(*columns, strict=True)]}
    found = read("code_contests", [row, {**row, "solutions": {"language": [1, 2], "solution": ["a", "b"]}}])
    assert [one["id"] for one in found] == ["task 7-0", "task 7-1", "task 7-2"]
    assert {one["parent"] for one in found} == {"task 7"}
    assert found[1]["answer"] == "```python\nprint(7 + 1 - 1)\n```"


def test_sharegpt_keeps_rows_with_an_exchange_and_the_conversation_that_they_are_a_piece_of():
    page = [{"from": "human", "value": "<p>?"}, {"from": "gpt", "value": "<p>Use <b>4</b>.</p>", "markdown": None}]
    rows = [
        {"id": "a_0", "conversations": TURNS},
        {"id": "a_1", "conversations": [TURNS[1]]},
        {"id": "b", "conversations": [TURNS[1], *page]},
        {"id": "c_0", "conversations": []},
        {"id": "c_1", "conversations": [{"from": "human", "value": ""}, TURNS[1]]},
    ]
    first, second = read("sharegpt", rows)
    assert first == {"id": "a_0", "parent": "a", "conversations": TURNS}
    assert (second["id"], second["parent"], second["conversations"][2]["value"]) == ("b", "b", "Use **4**.")
    assert canonical_row(second, "sharegpt", "0")["messages"][1]["content"] == "Use **4**."


def test_answers_that_reason_have_their_reasoning_marked():
    (row,) = read("gsm8k", HUB_ROWS["gsm8k"][3:4])
    assert row["rationale"] == [[0, len("3 + 1 = 4\n")]]
    assert canonical_row(row, "gsm8k", "0")["metadata"] == {"rationale": row["rationale"]}


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("Add them. So $x = 3.5$. The sum is $\\boxed{4}$.", "The sum is $\\boxed{4}$."),
        ("First $\\boxed{1}$, but no.\\]\n\nThen\n\\[x = \\fbox{2}.\\]", "Then\n\\[x = \\fbox{2}.\\]"),
        ("It is\n\\[y = 5.\\]\nHence $\\boxed{5}$", "Hence $\\boxed{5}$"),
        ("The answer is \\boxed{4}.", None),
        ("There is no box. None at all.", None),
    ],
)
def test_reasoning_in_mathematics_ends_where_the_sentence_with_the_box_begins(solution, answer):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": solution}]
    (first,) = read("math", [{"problem": "?", "solution": solution}])
    (second,) = read("numina_math", [{"source": "a", "messages": turns}])
    assert first["rationale"] == second["rationale"] == (answer and [[0, len(solution) - len(answer)]])


def test_sharegpt_has_two_places_to_fall_back_on():
    source = load_module(PROJECT / "datasets" / "sharegpt.py").SOURCE
    places = [(place.id, place.revision[:4], place.files["train"]) for place in source.candidates()]
    assert places == [
        ("anon8231489123/ShareGPT_Vicuna_unfiltered", "192a", "ShareGPT_V3_unfiltered_cleaned_split.json"),
        ("anon8231489123/ShareGPT_Vicuna_unfiltered", "192a", "ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json"),
        ("RyokoAI/ShareGPT52K", "6f9b", ["sg_90k_part1.json", "sg_90k_part2.json"]),
    ]


def test_starcoderdata_takes_the_tags_off_the_head_of_a_file():
    contents = ["<reponame>a/b<filename>c.py<gh_stars>1-10\nx < 1\n", "x = '<reponame>'\n"]
    assert [row["content"] for row in read("starcoderdata", [{"content": c} for c in contents])] == [
        "x < 1\n",
        "x = '<reponame>'\n",
    ]


def test_files_of_the_stack_v2_are_fetched_by_their_ids_in_order(tmp_path, monkeypatch):
    with played_hub(tmp_path / "hub", monkeypatch, tmp_path / "cache") as hub:
        hub.write("content/of/one", gzip.compress("print('é')".encode("latin-1")))
        hub.write("content/of/two", gzip.compress(b"print(2)"))
        module = load_module(PROJECT / "datasets" / "the_stack_v2_ids.py")
        monkeypatch.setattr(module, "CONTENT", f"{constants.ENDPOINT}/datasets/content/of/resolve/main/")
        rows = [
            {"blob_id": "one", "src_encoding": "latin-1", "is_generated": False},
            {"blob_id": "gone", "src_encoding": "utf-8", "is_generated": False},
            {"blob_id": "one", "src_encoding": "utf-8", "is_generated": False},
            {"blob_id": "two", "src_encoding": "utf-8", "is_generated": True},
            {"blob_id": "two", "src_encoding": None, "is_generated": None},
        ]
        assert [row["text"] for row in read("the_stack_v2_ids", rows)] == ["print('é')", "print(2)"]
        hub.faults = [Fault("two", 503, times=100)]
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        with pytest.raises(ConnectionError, match="503"):
            read("the_stack_v2_ids", rows)


def test_a_module_of_a_gated_set_says_how_to_be_let_in(tmp_path, monkeypatch):
    with played_hub(tmp_path / "hub", monkeypatch, tmp_path / "cache") as hub:
        hub.write("bigcode/starcoderdata/python/a.parquet", b"")
        hub.gated.add("bigcode/starcoderdata")
        with pytest.raises(
            ValueError, match=r"bigcode/starcoderdata is gated: accept its terms at .*, then set HF_TOKEN"
        ):
            load("train", name="starcoderdata")


def test_a_module_reads_from_the_hub_or_from_the_next_place_that_can_be_had(tmp_path, monkeypatch):
    source = HubSource(
        id="org/first",
        licence=None,
        commercial_use=None,
        format="text",
        rows={"train": None, "test": None},
        splits={"test": "validation"},
        files={"train": "train.jsonl", "validation": "validation.jsonl"},
        fallback=[{"id": "org/second"}],
    )
    with played_hub(tmp_path / "hub", monkeypatch, tmp_path / "cache") as hub:
        hub.write("org/second/train.jsonl", '{"text": "a"}\n{"text": "b"}\n')
        hub.write("org/second/validation.jsonl", '{"text": "c"}\n')
        rows = HubRows(source, lambda rows: ({"text": row["text"] * 2} for row in rows))
        with pytest.warns(UserWarning, match="reading org/second instead of: org/first: "):
            assert list(rows(SimpleNamespace(get=lambda key, default=None: default), None, "test")) == [{"text": "cc"}]
