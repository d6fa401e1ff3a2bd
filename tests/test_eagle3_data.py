"""Conversations of one's own as the data of a draft head: two files, or a recipe that filters and divides one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
