"""Conversations of one's own as the data of a draft head: two files, or a recipe that filters and divides one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from dataset_hub import played_hub
from tiny_chains import folders
from tiny_teachers import make_teacher

from jobs.__main__ import main
from jobs.config import PROJECT
from jobs.exit_code import ExitCode
from jobs.plan import plan_run
from jobs.preflight import check_run
from mixture.prepare import PreparedData

RECIPE = """
split: {train: 0.95, validation: 0.05}
datasets:
  - {name: mine, path: mine.jsonl, filters: {min_exchanges: 2}}
"""


def conversation(number: int, exchanges: int) -> dict[str, Any]:
    said = [("human", f"Question {number} of part {part}?", "gpt", f"Answer {part}.") for part in range(exchanges)]
    turns = [{"from": who, "value": text} for one in said for who, text in (one[:2], one[2:])]
    return {"id": f"{number}_0", "conversations": turns}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(tmp_path: Path, *dataset: str) -> PreparedData:
    """What `check` and then `prepare` make of the data of a draft for a target at hand."""
    file = PROJECT / "configs/eagle3_test.yaml"
    target = make_teacher(tmp_path / "target")
    options = ["--model.name", str(target), "--cluster", "local", *folders(tmp_path), *dataset]
    assert main(["check", str(file), *options]) == ExitCode.DONE
    assert main(["prepare", str(file), *options, "--workers", "1"]) == ExitCode.DONE
    found = plan_run(check_run(file, options)).prepared
    assert found is not None
    return found


def samples(data: PreparedData) -> dict[str, int]:
    return {name: split.samples for name, split in data.splits.items() if split is not None}


def test_the_recipe_that_comes_along_takes_ultrachat_and_falls_back_from_one_sharegpt_to_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = PROJECT / "configs/mixtures/eagle3.yaml"
    said = [
        {
            "prompt_id": str(number),
            "messages": [
                {"role": role, "content": f"{text} {number} of {part}"}
                for part in range(1 + number % 2)
                for role, text in (("user", "Question"), ("assistant", "Answer"))
            ],
        }
        for number in range(200)
    ]
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(said), parquet)
    # Two pieces of each conversation, which must not be parted by the split.
    pieces = [{**conversation(number, 2), "id": f"{number}_{piece}"} for number in range(100) for piece in range(2)]
    for number, row in enumerate(pieces):
        row["conversations"][0]["value"] += f" Piece {number}."
    with played_hub(tmp_path / "hub", monkeypatch, tmp_path / "cache") as hub:
        hub.revisions |= {
            "8049631c405ae6576f93f445c6b8166f76f5505a",
            "192ab2185289094fc556ec8ce5ce1e8e587154ca",
            "6f9b78cc1dd15dbb51d3c51ccc219c558962fd77",
        }
        hub.write("HuggingFaceH4/ultrachat_200k/data/train_sft-00000-of-00001.parquet", parquet.getvalue())
        hub.write("RyokoAI/ShareGPT52K/sg_90k_part1.json", json.dumps(pieces[:100]))
        hub.write("RyokoAI/ShareGPT52K/sg_90k_part2.json", json.dumps(pieces[100:]))
        arguments = ["prepare", str(recipe), "--data-dir", str(tmp_path / "data"), "--workers", "1"]
        output = ["--output-dir", str(tmp_path / "out")]
        assert main([*arguments, *output]) == ExitCode.DONE
        hub.asked_for.clear()
        assert main([*arguments, *output]) == ExitCode.DONE
        assert not hub.downloads(), "the second time all is there"
    rows = {
        split: [json.loads(line) for file in (tmp_path / "out").glob(f"{split}-*.jsonl") for line in file.open()]
        for split in ("train", "test")
    }
    assert {row["source"] for row in rows["train"]} == {"ultrachat", "sharegpt"}
    assert len(rows["test"]) == round(len(rows["train"]) / 19)
    conversations = [row["conversations"] for split in rows.values() for row in split]
    assert all([turn["from"] for turn in said][:4] == ["human", "gpt"] * 2 for said in conversations)
    parents = {split: {row["metadata"].get("parent") for row in found} - {None} for split, found in rows.items()}
    assert parents["train"] and parents["test"] and not parents["train"] & parents["test"]


def test_two_files_of_conversations_are_the_train_and_the_test_split(tmp_path: Path) -> None:
    train = write(tmp_path / "mine.jsonl", [conversation(number, 2) for number in range(8)])
    test = write(tmp_path / "held_out.jsonl", [conversation(number, 1) for number in range(8, 11)])
    files = json.dumps({"train": str(train), "test": str(test)})
    data = prepared(tmp_path, "--dataset.name", "sharegpt", "--dataset.data_files", files)
    assert samples(data) == {"train": 8, "test": 3}


def test_a_recipe_takes_conversations_of_enough_exchanges_and_holds_a_part_of_them_out(tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl", [conversation(number, 1 + number % 3) for number in range(300)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    data = prepared(tmp_path, "--dataset.name", "null", "--dataset.mixture", str(recipe))
    counts = samples(data)
    # Who may be held out is a matter of the prompt's hash, so a few conversations beyond the twentieth are in neither.
    assert 180 < sum(counts.values()) <= 200 and counts["test"] == round(counts["train"] / 19)
