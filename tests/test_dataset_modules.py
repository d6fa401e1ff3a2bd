"""Dataset modules are found, checked, loaded and called by the contract, and their errors say what to do."""

import pickle
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from mixture.config import DatasetConfig
from mixture.dataset_modules import (
    ModuleFile,
    check_module,
    data_collator,
    load_module,
    load_rows,
    module_config,
    resolve_module,
    score_function,
)


def write_module(folder: Path, text: str, name: str = "rows.py") -> ModuleFile:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return ModuleFile(path)


def module_returning(folder: Path, expression: str, head: str = "") -> ModuleFile:
    return write_module(
        folder, f"{head}\ndef get_custom_dataset(dataset_config, processor, split):\n    {expression}\n"
    )


# --- finding


def test_a_name_is_looked_up_in_the_projects_datasets_folder(tmp_path):
    file = write_module(tmp_path / "datasets", "", "gsm8k.py")
    found = resolve_module(DatasetConfig(name="gsm8k"), config_folder=tmp_path, project=tmp_path)
    assert found == ModuleFile(file.path.resolve(), "get_custom_dataset")


def test_a_file_beside_the_config_wins_over_the_same_file_in_the_project(tmp_path):
    write_module(tmp_path / "datasets", "")
    near = write_module(tmp_path / "configs", "")
    config = DatasetConfig(file="rows.py:other_function")
    found = resolve_module(config, config_folder=tmp_path / "configs", project=tmp_path)
    assert found == ModuleFile(near.path.resolve(), "other_function")


def test_files_are_also_tried_in_the_project_and_the_working_folder(tmp_path, monkeypatch):
    in_datasets = write_module(tmp_path / "project" / "datasets", "", "a.py")
    in_project = write_module(tmp_path / "project", "", "b.py")
    in_working = write_module(tmp_path / "working", "", "c.py")
    monkeypatch.chdir(tmp_path / "working")
    for file in (in_datasets, in_project, in_working):
        config = DatasetConfig(file=file.path.name)
        found = resolve_module(config, config_folder=tmp_path / "configs", project=tmp_path / "project")
        assert found.path == file.path.resolve()


def test_a_home_folder_is_expanded_and_a_colon_in_a_folder_belongs_to_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write_module(tmp_path / "a:b", "")
    found = resolve_module(DatasetConfig(file="~/a:b/rows.py:rows"), config_folder=tmp_path, project=tmp_path)
    assert found == ModuleFile(file.path.resolve(), "rows")


def test_a_missing_module_lists_every_path_tried_and_the_nearest_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_module(tmp_path / "datasets", "", "gsm8k.py")
    with pytest.raises(ValueError, match=r"did you mean gsm8k\?") as raised:
        resolve_module(DatasetConfig(file="gms8k.py"), config_folder=tmp_path / "configs", project=tmp_path)
    for folder in (tmp_path / "configs", tmp_path / "datasets", tmp_path):
        assert f"  {folder / 'gms8k.py'}" in str(raised.value)


def test_a_file_that_is_not_python_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'rows.txt' is not a \.py file"):
        resolve_module(DatasetConfig(file="rows.txt"), config_folder=tmp_path, project=tmp_path)


# --- checking without running


def test_a_syntax_error_is_reported_with_file_and_line(tmp_path):
    file = write_module(tmp_path, "x = 1\ndef get_custom_dataset(:\n")
    with pytest.raises(ValueError, match=r"rows\.py:2: "):
        check_module(file)


def test_a_missing_function_names_those_there_are_and_the_nearest(tmp_path):
    file = write_module(tmp_path, "def get_costum_dataset(a, b, c): ...\ndef other(): ...\n")
    with pytest.raises(ValueError, match="defines get_costum_dataset, other; did you mean get_costum_dataset"):
        check_module(file)


def test_checking_never_runs_the_module(tmp_path):
    check_module(module_returning(tmp_path, "return []", head="raise SystemExit('ran')"))


@pytest.mark.parametrize(
    "text",
    [
        "from elsewhere import get_custom_dataset",
        "from elsewhere import *",
        "get_custom_dataset = make()",
        "try:\n    import x\nexcept ImportError:\n    def get_custom_dataset(a, b, c): ...",
        "def get_custom_dataset(*args): ...",
    ],
)
def test_functions_that_are_imported_assigned_or_nested_in_a_try_are_found(tmp_path, text):
    check_module(write_module(tmp_path, text))


def test_a_function_with_too_few_arguments_is_refused(tmp_path):
    file = write_module(tmp_path, "def get_custom_dataset(dataset_config, split): ...")
    with pytest.raises(ValueError, match=r"rows\.py:1: .* takes 2 positional arguments, needs three"):
        check_module(file)


# --- loading


def test_a_module_runs_once_and_its_objects_can_be_pickled(tmp_path):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nRUNS = []\nRUNS.append(1)\n"
        "@dataclass\nclass Collator:\n    size: int\n    def __call__(self, samples): return samples\n"
        "def get_data_collator(processor): return Collator(7)\n"
    )
    file = write_module(tmp_path, text)
    assert load_module(file.path) is load_module(file.path)
    assert load_module(file.path).RUNS == [1]
    collator = data_collator(file, None)
    assert pickle.loads(pickle.dumps(collator)) == collator


def test_an_edited_file_gets_another_module_name(tmp_path):
    file = write_module(tmp_path, "VALUE = 1")
    first = load_module(file.path)
    file.path.write_text("VALUE = 2")
    second = load_module(file.path)
    assert (first.VALUE, second.VALUE) == (1, 2)
    assert first.__name__ != second.__name__ and second.__name__.isidentifier()


def test_files_beside_the_module_can_be_imported(tmp_path):
    write_module(tmp_path, "ROWS = [{'text': 'from beside'}]", "rows_from_beside.py")
    file = module_returning(tmp_path, "return ROWS", head="from rows_from_beside import ROWS")
    assert list(load_rows(file, DatasetConfig(name="x"), "train", None)) == [{"text": "from beside"}]


def test_a_module_that_fails_while_loading_names_its_line_and_can_be_loaded_again(tmp_path):
    file = write_module(tmp_path, "x = 1\ny = x / 0\n")
    with pytest.raises(ValueError, match=r"rows\.py:2: ZeroDivisionError: division by zero"):
        load_module(file.path)
    assert not [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == str(file.path)]


# --- what the module sees


def test_the_config_object_gives_every_key_by_attribute_and_item():
    config = module_config(DatasetConfig(name="mine", split_ratio=0.9, module_keys={"style": "short", "my-key": 3}))
    assert (config.style, config["style"], config.get("style")) == ("short", "short", "short")
    assert config["my-key"] == 3 and "my-key" in config
    assert (config.dataset, config.data_path, config.test_split, config.split_ratio) == ("mine", "", "test", 0.9)
    assert config.get("absent", 5) == 5 and config.get("limit", 7) == 7
    assert dict(config) == config.asdict() and config.asdict()["style"] == "short"
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_key_that_is_not_there_names_those_that_are():
    with pytest.raises(AttributeError, match=r"no key 'styel'; `dataset:` holds .*style"):
        _ = module_config(DatasetConfig(name="x", module_keys={"style": 1})).styel


# --- calling


def test_the_module_is_called_with_config_processor_and_split(tmp_path):
    file = module_returning(tmp_path, "return [{'text': f'{dataset_config.tone} {processor} {split}'}]")
    config = DatasetConfig(name="x", module_keys={"tone": "kind"})
    assert list(load_rows(file, config, "test", "processor")) == [{"text": "kind processor test"}]


def test_split_ratio_reaches_the_function_only_when_the_config_sets_it_and_is_told(tmp_path):
    file = write_module(
        tmp_path, "def get_custom_dataset(config, processor, split, split_ratio=0.8): return [{'text': split_ratio}]"
    )
    told = []
    assert list(load_rows(file, DatasetConfig(name="x"), "train", None, told.append)) == [{"text": 0.8}]
    assert told == []
    assert list(load_rows(file, DatasetConfig(name="x", split_ratio=0.9), "train", None, told.append)) == [
        {"text": 0.9}
    ]
    assert told == ["split_ratio 0.9 from the config; the module's default is 0.8"]


def test_a_split_ratio_that_the_function_cannot_take_is_an_error(tmp_path):
    file = module_returning(tmp_path, "return [{'text': 'a'}]")
    with pytest.raises(ValueError, match=r"split_ratio is 0\.9, but get_custom_dataset in .* takes no split_ratio"):
        load_rows(file, DatasetConfig(name="x", split_ratio=0.9), "train", None)


def test_a_split_that_the_modules_dict_lacks_names_those_it_has_and_the_key(tmp_path):
    head = "from datasets import Dataset"
    split = "Dataset.from_list([{'text': str(i)} for i in range(10)]).train_test_split(0.2, seed=1)[split]"
    file = module_returning(tmp_path, f"return {split}", head=head)
    config = DatasetConfig(name="x", test_split="validation")
    with pytest.raises(ValueError, match=r"no split 'validation', only train, test; set dataset\.test_split: test"):
        load_rows(file, config, "validation", None)
    assert len(load_rows(file, config, "train", None)) == 8


def test_a_returned_mapping_gives_its_split_or_names_those_it_has(tmp_path):
    rows = DatasetDict({"train": Dataset.from_list([{"text": "a"}]), "dev": Dataset.from_list([{"text": "b"}])})
    file = module_returning(tmp_path, "return dataset_config.rows")
    config = DatasetConfig(name="x", module_keys={"rows": rows})
    assert list(load_rows(file, config, "train", None)) == [{"text": "a"}]
    with pytest.raises(ValueError, match=r"dataset\.test_split: .* only train, dev; set dataset\.test_split: dev"):
        load_rows(file, config, "test", None)


def test_a_key_error_about_something_else_is_shown_as_it_is(tmp_path):
    file = module_returning(tmp_path, "return {}['question']")
    with pytest.raises(ValueError, match=r"rows\.py:3: KeyError: 'question'") as raised:
        load_rows(file, DatasetConfig(name="x"), "train", None)
    assert isinstance(raised.value.__cause__, KeyError)


def test_an_attribute_error_inside_the_module_is_not_taken_for_a_missing_function(tmp_path):
    file = module_returning(tmp_path, "return None.rows")
    with pytest.raises(ValueError, match=r"rows\.py:3: AttributeError: 'NoneType' object has no attribute 'rows'"):
        load_rows(file, DatasetConfig(name="x"), "train", None)


def test_a_lost_connection_passes_through_so_that_the_job_is_retried(tmp_path):
    file = module_returning(tmp_path, "raise ConnectionError('hub unreachable')")
    with pytest.raises(ConnectionError, match="hub unreachable"):
        load_rows(file, DatasetConfig(name="x"), "train", None)


@pytest.mark.parametrize("kind", ["list", "dataset", "stream", "generator", "indexed"])
def test_rows_come_as_lists_datasets_streams_generators_or_indexed_objects_and_are_limited(tmp_path, kind):
    head = (
        "class Indexed:\n    def __len__(self): return 5\n    def __getitem__(self, i): return {'text': str(i)}\n"
        "def stream():\n    for i in range(5): yield {'text': str(i)}\n"
    )
    made = {
        "list": "[{'text': str(i)} for i in range(5)]",
        "dataset": "Dataset.from_list([{'text': str(i)} for i in range(5)])",
        "stream": "IterableDataset.from_generator(stream)",
        "generator": "stream()",
        "indexed": "Indexed()",
    }[kind]
    file = module_returning(tmp_path, f"return {made}", head=f"from datasets import Dataset, IterableDataset\n{head}")
    assert [row["text"] for row in load_rows(file, DatasetConfig(name="x"), "train", None)] == list("01234")
    assert [row["text"] for row in load_rows(file, DatasetConfig(name="x", limit=3), "train", None)] == list("012")
    assert len(list(load_rows(file, DatasetConfig(name="x", limit=9), "train", None))) == 5


def test_a_limit_never_reads_past_itself(tmp_path):
    head = "def stream():\n    yield {'text': 'a'}\n    raise RuntimeError('read too far')\n"
    file = module_returning(tmp_path, "return stream()", head=head)
    assert list(load_rows(file, DatasetConfig(name="x", limit=1), "train", None)) == [{"text": "a"}]


def test_an_error_in_a_stream_names_the_modules_line(tmp_path):
    head = "def stream():\n    yield {'text': 'a'}\n    raise RuntimeError('bad row')\n"
    file = module_returning(tmp_path, "return stream()", head=head)
    with pytest.raises(ValueError, match=r"rows\.py:3: RuntimeError: bad row"):
        list(load_rows(file, DatasetConfig(name="x"), "train", None))


def test_no_rows_and_things_that_are_no_rows_are_refused(tmp_path):
    empty = module_returning(tmp_path / "empty", "return []")
    with pytest.raises(ValueError, match="for split 'train' returned 0 rows"):
        load_rows(empty, DatasetConfig(name="x"), "train", None)
    none = module_returning(tmp_path / "none", "return None")
    with pytest.raises(ValueError, match="returned NoneType; return a list of dicts"):
        load_rows(none, DatasetConfig(name="x"), "train", None)


def test_collator_and_score_are_optional_and_found_where_they_are(tmp_path):
    bare = module_returning(tmp_path / "bare", "return []")
    assert data_collator(bare, None) is None and score_function(bare) is None
    full = write_module(
        tmp_path / "full",
        "def get_data_collator(processor, dataset_config): return (processor, dataset_config.name)\n"
        "def score(prediction, row): return float(prediction == row['answer'])\n",
    )
    assert data_collator(full, "processor", DatasetConfig(name="mine")) == ("processor", "mine")
    assert score_function(full)("4", {"answer": "4"}) == 1.0
