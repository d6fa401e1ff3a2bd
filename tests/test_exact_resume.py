"""A chain of blocks gives the weights of one uninterrupted run, bit for bit."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trained_runs import assert_identical, final_weights, processes_that_start_fast, train_to_the_end

import finetuning
from training.checkpoints import newest_valid
from training.ledger import Ledger
from training.run import FinetuningRun

pytestmark = pytest.mark.chain

MakeRun = Callable[..., FinetuningRun]


def assert_every_row_once_in_each_epoch(run: FinetuningRun) -> None:
    checkpoint, _ = newest_valid(run.folder.checkpoints)
    assert checkpoint is not None
    assert checkpoint.ledger == Ledger(rows_per_epoch=13, whole_epochs=int(checkpoint.epoch))


@pytest.fixture
def base_model(make_run: MakeRun, tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with weights, for adapters to stand on."""
    run = make_run("base", training={"lr": 1e-3})
    finetuning.train(run)
    return run.folder.export


KINDS = {
    "full": {},
    "lora": {"peft": True, "lora": {"dropout": 0.2, "r": 4}},
    "dora": {"peft": True, "peft_method": "dora", "lora": {"r": 4, "modules_to_save": ["lm_head"]}},
}


def model_keys(kind: str, base: Path) -> dict[str, object]:
    from training.config import LoraConfig

    keys = dict(KINDS[kind])
    if kind != "full":
        keys |= {"name": str(base), "from_scratch": False, "lora": LoraConfig(**keys["lora"])}  # type: ignore[arg-type]
    return keys


@pytest.mark.parametrize("kind", KINDS)
def test_four_blocks_equal_one_uninterrupted_run(kind: str, make_run: MakeRun, base_model: Path) -> None:
    keys = model_keys(kind, base_model)
    training = {"gradient_accumulation": 2, "save_every": 3, "max_grad_norm": 0.5, "weight_decay": 0.1}
    chain = make_run("chain", model=keys, training={**training, "epochs_per_job": 1, "total_jobs": 4})
    whole = make_run("whole", model=keys, training={**training, "epochs_per_job": 4, "total_jobs": 1})
    assert len(train_to_the_end(chain)) == 4
    assert len(train_to_the_end(whole)) == 1
    assert_identical(final_weights(chain), final_weights(whole))


def train_in_this_process(run: FinetuningRun) -> None:
    torch.set_num_threads(1)
    train_to_the_end(run)


def test_a_run_killed_in_mid_epoch_ends_with_the_same_weights(make_run: MakeRun) -> None:
    training = {"lr": 1e-3, "batch_size": 1, "epochs_per_job": 10, "total_jobs": 1}
    whole, killed = make_run("whole", training=training), make_run("killed", training={**training, "save_every": 4})
    process = processes_that_start_fast().Process(target=train_in_this_process, args=(killed,))
    process.start()
    wait_for_checkpoint(killed, step=8)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    start, _ = newest_valid(killed.folder.checkpoints)
    assert start is not None and 8 <= start.step < 10 * 13

    train_to_the_end(killed)
    train_to_the_end(whole)
    assert_identical(final_weights(killed), final_weights(whole))
    assert_every_row_once_in_each_epoch(killed)
    assert [event["step"] for event in killed.folder.events() if event["event"] == "resumed"] == [start.step]


def wait_for_checkpoint(run: FinetuningRun, *, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        checkpoint, _ = newest_valid(run.folder.checkpoints)
        if checkpoint and checkpoint.step >= step:
            return
        time.sleep(0.01)
    raise TimeoutError(f"no checkpoint of step {step}")


def cut_in_half(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_in_half, "optimizer.pt has "),
        (empty, "optimizer.pt has 0 bytes"),
        (Path.unlink, "optimizer.pt is missing"),
    ],
)
def test_a_broken_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    damage: Callable[[Path], None], said: str, make_run: MakeRun
) -> None:
    training = {"save_every": 2, "epochs_per_job": 1, "total_jobs": 2}
    chain, whole = make_run("chain", training=training), make_run("whole", training=training)
    first = finetuning.train(chain)
    newest = chain.folder.checkpoints / f"step_{first.step:08d}"
    damage(newest / "optimizer.pt")

    train_to_the_end(chain)
    train_to_the_end(whole)
    assert_identical(final_weights(chain), final_weights(whole))
    assert_every_row_once_in_each_epoch(chain)
    resumed = next(event for event in chain.folder.events() if event["event"] == "resumed")
    assert resumed["step"] < first.step
    assert resumed["rejected"][0].startswith(f"{newest.name}: {said}")


def test_a_stop_file_ends_the_block_at_the_next_step_and_the_chain_goes_on_from_there(make_run: MakeRun) -> None:
    training = {"epochs_per_job": 2, "total_jobs": 1}
    stopped, whole = make_run("stopped", training=training), make_run("whole", training=training)
    stopped.folder.stop.touch()
    result = finetuning.train(stopped)
    assert (result.step, result.finished) == (1, False)
    stopped.folder.stop.unlink()
    train_to_the_end(stopped)
    train_to_the_end(whole)
    assert_identical(final_weights(stopped), final_weights(whole))
    assert_every_row_once_in_each_epoch(stopped)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("batch_size", 4, "rows of an optimizer step: 2 = 2 rows x 1 micro-batch x 1 process -> 4 = 4 rows x "),
        ("gradient_accumulation", 2, "rows of an optimizer step: 2 = 2 rows x 1 micro-batch x 1 process -> 4 = 2 rows"),
        ("total_jobs", 3, "horizon_steps: "),
        ("lr", 0.5, "optimization: lr 0.01, cosine, warmup 0.03, weight decay 0.0 -> lr 0.5,"),
    ],
)
def test_a_resume_under_other_settings_is_refused(key: str, value: object, said: str, make_run: MakeRun) -> None:
    run = make_run("run", training={"total_jobs": 2})
    finetuning.train(run)
    with pytest.raises(ValueError, match="this run is not the one that wrote it") as refusal:
        finetuning.train(replace(run, training=replace(run.training, **{key: value})))
    assert said in str(refusal.value)
    assert f"training.{key}" in str(refusal.value)


def test_a_finished_run_returns_at_once_and_exports_what_is_missing(make_run: MakeRun) -> None:
    run = make_run("run")
    end = finetuning.train(run)
    marker = run.folder.export / "baton.json"
    exported_at = marker.stat().st_mtime_ns
    started_s = time.monotonic()
    assert finetuning.train(run) == end
    assert time.monotonic() - started_s < 0.5
    assert marker.stat().st_mtime_ns == exported_at
    marker.unlink()
    for file in run.folder.export.iterdir():
        file.unlink()
    assert finetuning.train(run) == end
    assert marker.exists()
