"""Every shipped dataset module follows the contract, from local files with the hub's columns."""

import json
import os
from pathlib import Path

import pytest

from mixture.config import DatasetConfig
from mixture.dataset_modules import check_module, load_module, load_rows, resolve_module
from mixture.formats import detect_format
from mixture.hub import HubSource, absolute_data_files
from mixture.inspection import list_datasets

PROJECT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (PROJECT / "datasets").glob("*.py"))
HUB_ROWS = {
    "gsm8k": [{"question": f"{i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(20)],
    "code_alpaca": [{"instruction": f"Print {i}.", "input": "", "output": f"print({i})"} for i in range(20)],
    "mbpp": [
        {"text": f"Return {i}.", "code": f"def f(): return {i}", "task_id": i, "test_list": [f"assert f() == {i}"]}
        for i in (*range(5, 15), *range(595, 605))
    ],
}
REAL_FILES = {
    "gsm8k": ({"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl"}, {"train": 7473, "test": 1319}),
    "code_alpaca": ("codealpaca_2k.json", {"train": 1916, "test": 101}),
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
    assert isinstance(source, HubSource) and source.licence
    assert source.id is None or (len(source.revision) == 40 and int(source.revision, 16))


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
    assert {detect_format(row).name for row in load(split, name=name, data_files=data)} == {source.format}


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
    rows = HUB_ROWS["gsm8k"]
    first, second = write_rows(tmp_path / "a.jsonl", rows[:8]), write_rows(tmp_path / "b.jsonl", rows[8:])
    array = tmp_path / "all.json"
    array.write_text(json.dumps(rows))
    table = tmp_path / "all.csv"
    table.write_text("question,answer\n" + "".join(f"{i} + 1?,{i + 1}\n" for i in range(20)))
    splits = {"train": [first, second], "test": str(array)}
    assert load("train", name="gsm8k", data_files=splits) == rows == load("test", name="gsm8k", data_files=splits)
    assert len(load("train", name="gsm8k", data_files={"train": str(table)})) == 20


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
