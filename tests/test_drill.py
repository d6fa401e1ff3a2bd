"""./train.sh drill passes where faults cost nothing, and finds a chain that they do cost something."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jobs import faults
from jobs.config import PROJECT
from jobs.drill import drill, ledger_problems, show_drill, weight_difference
from jobs.faults import FAULTS, Fault, Strike, outcome_of
from jobs.progress import console_for_messages
from training.checkpoints import Checkpoint, ResumeTerms, newest_valid, read_checkpoint
from training.ledger import EpochRows, Ledger
from training.schedule import Horizon


def options(tmp_path: Path, model: Path) -> list[str]:
    """configs/test.yaml with the smallest model, folders below `tmp_path`."""
    folders = ["--runs_dir", str(tmp_path / "runs"), "--data_dir", str(tmp_path / "data")]
    return [*folders, "--model.name", str(model), "--model.checkpoint_dir", str(tmp_path / "export")]


@pytest.mark.chain
def test_six_faults_cost_the_chain_of_the_readme_nothing_but_time(tmp_path: Path, tiny_model: Path) -> None:
    command = [str(PROJECT / "train.sh"), "drill", str(PROJECT / "configs/test.yaml"), "--json"]
    answer = subprocess.run([*command, *options(tmp_path, tiny_model)], capture_output=True, text=True, timeout=280)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    result = json.loads(answer.stdout)
    assert result["passed"] and result["problems"] == []
    assert [fault["fault"] for fault in result["faults"]] == list(FAULTS)
    outcomes = {fault["fault"]: fault for fault in result["faults"]}
    assert all(fault["not_hit"] is None and fault["seconds_to_training"] > 0 for fault in outcomes.values())
    for fault in ("SIGTERM", "SIGUSR2"):
        assert outcomes[fault]["steps_again"] == 0 and outcomes[fault]["seconds_to_checkpoint"] < 30
    assert all(fault["steps_again"] > 0 for name, fault in outcomes.items() if name not in ("SIGTERM", "SIGUSR2"))
    assert list((tmp_path / "runs").iterdir()) == []
    assert not (tmp_path / "export").exists()
    assert not (tmp_path / "data").exists()


@pytest.mark.chain
def test_a_chain_that_resumes_with_other_momentum_fails_and_the_first_tensor_is_named(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_in_half = faults.cut_in_half

    def cut_and_turn_momentum_round(file: Path) -> None:
        cut_in_half(file)
        checkpoint, _ = newest_valid(file.parent.parent)
        assert checkpoint is not None
        optimizer = torch.load(checkpoint.path / "optimizer.pt")
        for state in optimizer["state"].values():
            state["exp_avg"].neg_()
        torch.save(optimizer, checkpoint.path / "optimizer.pt")
        assert read_checkpoint(checkpoint.path) == checkpoint, "nothing that is looked at on resume has changed"

    monkeypatch.setattr(faults, "cut_in_half", cut_and_turn_momentum_round)
    monkeypatch.setattr("jobs.drill.NUM_BLOCKS", 1)  # a start of a block takes seconds, and this needs no second one
    chosen: tuple[Fault, ...] = ("SIGTERM", "half-written checkpoint")
    overrides = options(tmp_path, tiny_model)
    result = drill(PROJECT / "configs/test.yaml", overrides, console_for_messages(), faults=chosen)
    assert not result.passed
    assert result.difference is not None and result.difference.tensor == "model.embed_tokens.weight"
    assert 0 < result.difference.largest < 1
    assert result.own_difference is None
    assert all(fault.not_hit is None for fault in result.faults)
    (problem,) = result.problems
    assert "model.embed_tokens.weight and" in problem and "two uninterrupted trainings are identical" in problem
    assert result.folder is not None and (Path(result.folder) / "chain/events.jsonl").exists()
    show_drill(result, console_for_messages())
    told = capsys.readouterr().out
    assert "does this machine reproduce itself at all?" in told
    assert f"everything is kept in {result.folder}" in told

    (problem,) = replace(result, own_difference=result.difference).problems
    assert problem.startswith("your settings are not reproducible on this device even without faults")


def strike(fault: Fault, **facts: Any) -> Strike:
    return Strike(fault=fault, block_started_s=10, at_s=20, step=5, done_step=6, kept_step=4, **facts)


STARTS = [{"event": "job_start", "time": 11}, {"event": "job_start", "time": 30}]
END = {"event": "job_end", "time": 21}


@pytest.mark.parametrize(
    ("one", "event", "why"),
    [
        (strike("SIGTERM"), END, "the block did not end by the signal"),
        (strike("SIGUSR2"), {"event": "stop_signal", "time": 21, "signal": "SIGTERM"}, "did not end by the signal"),
        (strike("SIGKILL in a step"), END, "the block had ended by itself"),
        (strike("SIGKILL while saving"), {"event": "checkpoint", "time": 21, "step": 6}, "no half-written checkpoint"),
        (strike("full disk"), {"event": "error", "time": 21, "message": "out of memory"}, "did not fail to save"),
        (
            strike("half-written checkpoint", damaged=("step_00000006",)),
            {"event": "resumed", "time": 31, "rejected": ["step_00000003: no marker.json"]},
            "did not say that it passed the damaged checkpoint over",
        ),
    ],
)
def test_a_fault_that_the_events_do_not_show_counts_as_not_hit(one: Strike, event: dict[str, Any], why: str) -> None:
    events = sorted([*STARTS, event], key=lambda event: event["time"])
    not_hit = outcome_of(one, events, []).not_hit
    assert not_hit is not None and why in not_hit


def test_what_a_fault_has_cost_is_read_from_the_run() -> None:
    events = [
        STARTS[0],
        {"event": "checkpoint", "time": 15, "step": 4},
        {"event": "checkpoint", "time": 20.5, "step": 6},
        {"event": "stop_signal", "time": 20.6, "signal": "SIGTERM"},
        STARTS[1],
    ]
    outcome = outcome_of(strike("SIGTERM"), events, [{"time": 19, "step": 6}, {"time": 33, "step": 5}])
    assert outcome.not_hit is None
    assert (outcome.steps_again, outcome.seconds_to_checkpoint, outcome.seconds_to_training) == (2, 0.5, 13)


def test_weights_differ_where_a_single_bit_does_and_where_a_tensor_is_missing(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    weights = {"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.ones(2, 2)}
    save_file(weights, one / "model.safetensors")
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert weight_difference(one, other) is None

    save_file({**weights, "a": -weights["a"]}, other / "model.safetensors")
    difference = weight_difference(one, other)
    assert difference is not None
    assert (difference.tensor, difference.num_tensors, difference.largest) == ("a", 1, 0.0)

    save_file({"a": weights["a"] + 0.5}, other / "model.safetensors")
    difference = weight_difference(one, other)
    assert difference is not None and str(difference) == "a and 1 more tensors, largest difference inf"


def test_a_ledger_with_a_row_too_many_or_an_epoch_too_few_is_told() -> None:
    whole = [EpochRows.of(epoch, np.arange(4)) for epoch in range(3)]
    horizon = Horizon(steps_per_epoch=2, epochs_per_job=3, total_jobs=1)
    end = checkpoint_with(Ledger(rows_per_epoch=4).adding(whole), epoch=3)
    assert ledger_problems(end, horizon) == []
    assert ledger_problems(replace(end, epoch=2), horizon) == ["2 epochs were finished instead of 3"]
    repeated = Ledger(rows_per_epoch=4).adding([*whole, EpochRows.of(1, np.array([2]))])
    assert ledger_problems(checkpoint_with(repeated, epoch=3), horizon) != []


def checkpoint_with(ledger: Ledger, *, epoch: int) -> Checkpoint:
    terms = ResumeTerms(
        fingerprint="f", objective="sft", parameters="p", batch_size=2, gradient_accumulation=1, world_size=1,
        parallelism="ddp", horizon_steps=6, optimization="lr 1",
    )  # fmt: skip
    return Checkpoint(
        path=Path("step_00000006"), num_bytes=1, step=6, epoch=epoch, samples=12, learning_rate=0.0, terms=terms,
        ledger=ledger, tied_to_split=None,
    )  # fmt: skip
