"""Signals end a job where nothing is to be saved, and only set a flag where something is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_exact_resume import assert_every_row_once_in_each_epoch
from trained_runs import assert_identical, final_weights, train_to_the_end

import finetuning
from jobs.requeue import read_job
from phases import texts
from training.batches import Batch
from training.config import LoraConfig
from training.owner import LostOwnershipError, Owner, heart_beats, newest_ticket, read_ticket
from training.run import FinetuningRun
from training.stopping import STOP_SIGNALS, StopPoll, StopRequested, StopSignals

MakeRun = Callable[..., FinetuningRun]


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    """Installed in this process, and taken away again."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    installed = StopSignals()
    installed.install()
    yield installed
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_an_armed_signal_ends_what_runs_at_once(signals: StopSignals, number: signal.Signals) -> None:
    signals.arm()
    with pytest.raises(StopRequested):
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert signals.received == number


def test_what_is_deferred_is_finished_first_whatever_else_comes(signals: StopSignals, tmp_path: Path) -> None:
    signals.arm()
    poll = StopPoll(signals, tmp_path / "STOP")
    finished = False
    with pytest.raises(StopRequested), signals.deferred():
        assert not poll.is_requested()
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        assert poll.is_requested()
        finished = True
    assert finished and signals.received == signal.SIGUSR2


def test_a_signal_that_came_before_the_handlers_ends_the_job_as_soon_as_it_may() -> None:
    program = (
        "import os, signal\n"
        "from training.stopping import StopRequested, StopSignals\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"  # blocked, so it waits
        "signals = StopSignals()\n"
        "signals.install()\n"
        "try:\n    signals.arm()\nexcept StopRequested:\n    print('stopped by', signals.received.name)\n"
    )
    command = ["env", "--block-signal=TERM", sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "stopped by SIGTERM\n"


def test_what_the_process_was_told_to_ignore_stays_ignored() -> None:
    program = (
        "import os, signal\n"
        "from training.stopping import StopSignals\n"
        "signals = StopSignals()\nsignals.install()\nsignals.arm()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\nprint('still here')\n"
    )
    command = ["env", "--ignore-signal=HUP", sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "still here\n"


@pytest.mark.chain
def test_a_stop_between_micro_batches_gives_the_step_up_and_changes_nothing(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"gradient_accumulation": 3, "batch_size": 1, "log_every": 1, "epochs_per_job": 2}
    base = make_run("base", training={"lr": 1e-3})
    finetuning.train(base)
    adapter = {"peft": True, "lora": LoraConfig(dropout=0.3, r=4)}
    model = {"name": str(base.folder.export), "from_scratch": False, **adapter}
    whole = make_run("whole", model=model, training=training)
    stopped = make_run("stopped", model=model, training=training)
    train_to_the_end(whole)

    micro_batches = 0
    compute_loss = texts.compute_loss

    def loss_that_is_interrupted(model: torch.nn.Module, batch: Batch, num_items: torch.Tensor) -> torch.Tensor:
        nonlocal micro_batches
        micro_batches += 1
        if micro_batches == 8:  # the second of the third step
            stopped.stopping.note(signal.SIGUSR2, None)
        return compute_loss(model, batch, num_items)

    with monkeypatch.context() as patch:
        patch.setattr(texts, "compute_loss", loss_that_is_interrupted)
        with pytest.raises(StopRequested):
            finetuning.train(stopped)
    assert micro_batches == 8
    stopped.stopping.received = None
    stopped.stopping.disarm()
    train_to_the_end(stopped)
    assert [event["step"] for event in stopped.folder.events() if event["event"] == "resumed"] == [2]
    assert_identical(final_weights(stopped), final_weights(whole))
    assert_every_row_once_in_each_epoch(stopped)
    losses = [[line["loss"] for line in run.folder.metrics()] for run in (whole, stopped)]
    tokens = [[line["tokens"] for line in run.folder.metrics()] for run in (whole, stopped)]
    assert losses[0] == losses[1] and tokens[0] == tokens[1]


def test_the_newest_ticket_owns_the_run_and_older_ones_write_nothing_more(tmp_path: Path) -> None:
    first = Owner.take(tmp_path)
    first.check()
    second = Owner.take(tmp_path)
    second.check()
    with pytest.raises(LostOwnershipError, match=f"process {os.getpid()} on .* has taken over this run"):
        first.check()
    second.release()
    with pytest.raises(LostOwnershipError):
        first.check()
    ticket = newest_ticket(tmp_path)
    assert ticket is not None and ticket.suffix == ".released"
    third = Owner.take(tmp_path)
    third.check()
    assert read_ticket(third.ticket) is not None
    assert heart_beats(third.ticket)
    os.utime(third.ticket, (time.time() - 300, time.time() - 300))
    assert not heart_beats(third.ticket)
    third.release()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ("JobState=RUNNING PreemptTime=2026-01-01T10:00:00 EndTime=2099-01-01T10:00:00", "preempted"),
        ("JobState=SIGNALING PreemptTime=None EndTime=2099-01-01T10:00:00", "signal"),
        ("JobState=RUNNING PreemptTime=None EndTime=2020-01-01T10:00:00", "time limit"),
        ("JobState=COMPLETING PreemptTime=None EndTime=2020-01-01T10:00:00", "cancelled"),
        ("JobState=RUNNING EndTime=Unknown", "signal"),
    ],
)
def test_why_a_job_was_signalled_is_read_from_what_slurm_says_of_it(fields: str, reason: str) -> None:
    assert read_job(f"JobId=7 JobName=x {fields} ExitCode=0:9").reason(180) == reason
