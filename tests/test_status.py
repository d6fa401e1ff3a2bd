"""What `./train.sh status` and `logs` say of a run, from its files alone and fast."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_chains import checked_run

from jobs import launch
from jobs.__main__ import main
from jobs.chain import ChainJob, Journal
from jobs.job_rows import JobRow, SlurmAnswer, read_job_rows
from jobs.log_files import show_logs
from jobs.plan import plan_run
from jobs.queue import QueuedJob
from jobs.status import measured_gap, read_status, seconds_left, training_pace
from jobs.status_view import show_status
from training.run_folder import RunFolder, append_line

BLOCK_STEPS = 10
NODE = "node1"


def event(moment: float, name: str, job: str | None = None, **details: Any) -> dict[str, Any]:
    return {"time": moment, "event": name, "job": job, "host": NODE, **details}


def job_start(moment: float, kind: str, job: str | None, *, step: int = 0, restart: int = 0, **more: Any) -> Any:
    return event(moment, "job_start", job, kind=kind, pid=1, restart=restart, step=step, **more)


def job_end(moment: float, kind: str, job: str | None, code: int, step: int, **more: Any) -> dict[str, Any]:
    return event(moment, "job_end", job, kind=kind, exit_code=code, seconds=9.0, step=step, **more)


def whole_block(job: str, number: int, start: float) -> list[dict[str, Any]]:
    """The events of a block that found nothing in its way: 100 s of training, 20 s from its end to the next."""
    first, last = (number - 1) * BLOCK_STEPS, number * BLOCK_STEPS
    return [
        job_start(start, "block", job, step=first),
        *([event(start + 5, "resumed", job, step=first)] if first else []),
        event(start + 105, "checkpoint", job, step=last, epoch=float(number), loss=5.0 / number),
        event(start + 106, "block_end", job, step=last, epoch=float(number), block=number, eval_loss=4.0),
        job_end(start + 107, "block", job, 0, last),
    ]


def queued(job: ChainJob, state: str, reason: str = "None") -> QueuedJob:
    return QueuedJob(str(job.id), job.name, state, reason, NODE if state == "RUNNING" else "", "0:10", "(null)")


def journal_of(tmp_path: Path, *kinds: str) -> Journal:
    journal = Journal(tmp_path / "chain.json", "abcdef12")
    names = [f"baton-test-abcdef12-{kind}-{number}" for number, kind in enumerate(kinds, 1)]
    journal.write(
        [
            ChainJob(kind=kind, name=name, id=str(number), released=True)  # type: ignore[arg-type]
            for number, (kind, name) in enumerate(zip(kinds, names, strict=True), 1)
        ]
    )
    return journal


def rows_of(events: Sequence[Any], journal: Journal, answer: SlurmAnswer, *, finished: int = 0) -> list[JobRow]:
    return read_job_rows(events, [], journal, answer, finished_blocks=finished, block_steps=BLOCK_STEPS, num_blocks=4)


def test_a_requeued_job_is_one_row_and_those_behind_it_are_numbered_on(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, "prepare", "block", "block", "evaluate")
    _, block, behind, evaluate = journal.jobs
    events = [
        job_start(0, "prepare", "1"), job_end(1, "prepare", "1", 0, 0),
        job_start(2, "block", "2"), job_end(9, "block", "2", 75, 5, reason="preempted"), event(9, "requeued", "2"),
        job_start(20, "block", "2", step=5, restart=1),
        job_end(30, "block", "2", 75, 7, reason="time limit"), event(30, "requeued", "2"),
    ]  # fmt: skip
    answer = SlurmAnswer(
        jobs=[queued(block, "PENDING", "BeginTime"), queued(behind, "PENDING", "Dependency"),
              queued(evaluate, "PENDING", "Dependency")]
    )  # fmt: skip
    rows = rows_of(events, journal, answer)
    assert [(row.title, row.state, row.restarts) for row in rows] == [
        ("prepare", "done", 0),
        ("block 1", "waiting", 2),
        ("block 2", "waiting", 0),
        ("evaluate", "waiting", 0),
    ]
    assert rows[1].reason.startswith("its start time has not come")
    assert rows[2].reason == "waits for the job before it"


def test_a_failed_job_says_what_was_found_and_what_to_do(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, "block", "block")
    found = {"kind": "out of memory", "advice": "raise slurm.mem"}
    events = [job_start(0, "block", "1"), event(9, "diagnosis", "1", step=0, **found), job_start(20, "block", "2")]
    rows = rows_of(events, journal, SlurmAnswer(jobs=[queued(journal.jobs[1], "RUNNING")]))
    assert [(row.state, row.diagnosis, row.advice) for row in rows] == [
        ("failed", "out of memory", "raise slurm.mem"),
        ("running", None, None),
    ]


@pytest.mark.parametrize(
    ("in_slurm", "state"), [(None, "ended without a word"), ("CANCELLED", "cancelled"), ("TIMEOUT", "failed")]
)
def test_a_job_that_was_killed_is_not_shown_as_running(tmp_path: Path, in_slurm: str | None, state: str) -> None:
    journal = journal_of(tmp_path, "block")
    answer = SlurmAnswer(jobs=[queued(journal.jobs[0], in_slurm)] if in_slurm else [])
    assert [row.state for row in rows_of([job_start(0, "block", "1")], journal, answer)] == [state]


def test_what_a_job_wrote_after_slurm_was_asked_counts(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, "block")
    events = [job_start(100, "block", "1")]
    for asked_at_s, state in [(99.0, "running"), (101.0, "waiting")]:
        answer = SlurmAnswer(jobs=[queued(journal.jobs[0], "PENDING")], asked_at_s=asked_at_s)
        (row,) = rows_of(events, journal, answer)
        assert row.state == state


def test_without_an_answer_from_slurm_the_files_tell(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, "prepare", "block", "evaluate")
    events = [job_start(0, "prepare", "1"), job_end(1, "prepare", "1", 0, 0), job_start(2, "block", "2")]
    rows = rows_of(events, journal, SlurmAnswer(silence="unable to contact"))
    assert [(row.title, row.state) for row in rows] == [
        ("prepare", "done"),
        ("block 1", "running"),
        ("evaluate", "waiting"),
    ]
    assert {row.reason for row in rows[1:]} == {"as far as the run's files tell"}


def test_the_time_left_counts_training_at_the_last_speed_and_the_gaps_between_blocks() -> None:
    events = whole_block("1", 1, 0) + whole_block("2", 2, 120)
    assert measured_gap(events) == 20
    metrics = [{"time": 10.0 * step + (50 if step > 10 else 0), "step": step} for step in range(5, 16)]
    starts = [job_start(120, "block", "2", step=10)]
    assert training_pace(metrics, starts) == 10
    # 25 steps in what is left of this block and two more, with two gaps
    assert seconds_left(15, 40, 10, seconds_per_step=10, gap_s=20) == 250 + 40
    assert seconds_left(15, 40, 10, seconds_per_step=None, gap_s=20) is None


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The folder of a run of three blocks that has not begun, without Slurm."""
    checked = checked_run(tmp_path, "--cluster", "local")
    return launch.open_run_folder(checked, plan_run(checked).data_key, print)


def test_a_run_of_50_blocks_and_100_000_metrics_is_shown_at_once(run: RunFolder, tmp_path: Path) -> None:
    run.config.write_text(run.config.read_text().replace("total_jobs: 3", "total_jobs: 50"))
    for number in range(1, 50):
        for line in whole_block(str(number), number, 120.0 * number):
            append_line(run.path / "events.jsonl", line)
    horizon = 50 * BLOCK_STEPS
    lines = [{"time": 0.1 * n, "step": n // 205, "epoch": n / 2050, "block": 49, "loss": 2.5, "lr": 1e-4,
              "horizon_steps": horizon, "grad_norm": 1.0, "tokens": n, "tokens_per_s": 1.0}
             for n in range(100_000)]  # fmt: skip
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read_status(run)
    started = time.perf_counter()
    status = read_status(run)
    show_status(status, Console(file=(tmp_path / "shown").open("w"), width=160))
    seconds = time.perf_counter() - started
    assert [row.title for row in status.jobs] == [f"block {number}" for number in range(1, 50)]
    assert (status.step, status.horizon_steps, status.loss) == (487, horizon, 2.5)
    assert seconds < 0.5, "all metrics alone take that long to read"


def test_the_log_of_a_block_is_that_of_the_newest_job_that_trained_it(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.logs.mkdir()
    for number, start_step, end_step in [(1, 0, 10), (2, 10, 15), (3, 15, 20), (4, 20, 30)]:
        log = f"block-{number}.log"
        (run.logs / log).write_text(f"words of job {number}\n")
        os.utime(run.logs / log, (number, number))
        code = 0 if end_step % 10 == 0 else 1
        append_line(run.path / "events.jsonl", job_start(number, "block", None, step=start_step, log=log))
        append_line(run.path / "events.jsonl", job_end(number, "block", None, code, end_step))
    run.record_metrics(step=30, horizon_steps=30, epoch=3.0, block=3, loss=1.0, lr=0.0)
    for block, words in [(1, "words of job 1\n"), (2, "words of job 3\n"), (None, "words of job 4\n")]:
        show_logs(run, rank=0, block=block, follow=False)
        assert capsys.readouterr().out == words
    with pytest.raises(ValueError, match="no job that trained block 4; it has trained 1, 2, 3"):
        show_logs(run, rank=0, block=4, follow=False)


def test_a_run_whose_name_is_mistyped_is_guessed(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules[main.__module__], "PROJECT", run.path.parent.parent)
    for verb in ("status", "logs", "stop", "cancel", "resume"):
        assert main([verb, "tset"]) == 64
        assert "did you mean test? There are: test" in capsys.readouterr().err
    assert main(["status", "test"]) == 0
    assert "unfinished" in capsys.readouterr().out
