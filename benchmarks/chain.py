"""What the chain itself costs, on the Slurm that `sbatch` talks to: signals, gaps between blocks, submission, status.

    python benchmarks/chain.py                          # on a cluster, with the partition and limits of the file
    eval "$(tests/cluster/up)"; python benchmarks/chain.py    # on a Slurm of two nodes on this machine

One small chain is trained, and told by USR2 to save and go on twice in its first block; a chain of 50 blocks is
submitted, held, and cancelled again, beside the same number of jobs that plain sbatch submits one after another.
Training is CPU-bound on a test cluster, so seconds of start-up say most about how busy the machine is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from jobs import launch  # noqa: E402
from jobs.chain import Journal  # noqa: E402
from jobs.plan import plan_run  # noqa: E402
from jobs.preflight import check_run  # noqa: E402
from jobs.status import read_status  # noqa: E402
from training.run_folder import RunFolder  # noqa: E402

BLOCK_MINUTES = 30
MANY_BLOCKS = 50
SIGNALS = 2


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Seconds between the last step of one block and the first of the next, and what they are made of."""

    total: float
    save: float
    evaluate_and_leave: float
    """From the committed checkpoint to the end of the job: test loss, and the process's own end."""

    slurm: float
    """From there until the next job's Python says that it has started: Slurm, and the first imports."""

    start_up: float
    """Imports, model and data, until the checkpoint is loaded."""

    first_step: float


def folders(folder: Path) -> list[str]:
    return ["--runs_dir", str(folder / "runs"), "--data_dir", str(folder / "data")]


def train_with_signals(file: Path, folder: Path, arguments: list[str]) -> RunFolder:
    """A chain that is told to save and go on SIGNALS times in its first block."""
    command = [str(PROJECT / "train.sh"), str(file), *folders(folder), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (run,) = launch.runs_in(folder / "runs")
    block = next(str(job.id) for job in Journal.open(run).jobs if job.kind == "block")
    for number in range(SIGNALS):
        wait_for(lambda number=number: training_in_start(run, number))
        subprocess.run(["scancel", "--signal=USR2", block], check=True)
        wait_for(lambda number=number: len(events(run, "stop_signal")) > number)
    wait_for(run.done.exists)
    return run


def training_in_start(run: RunFolder, number: int) -> bool:
    """Whether the block trains in its start of this number, and has done so for some steps."""
    starts = [event for event in events(run, "job_start") if event["kind"] == "block"]
    if len(starts) <= number:
        return False
    return sum(line["time"] > starts[number]["time"] for line in run.metrics()) >= 3


def wait_for(condition: Any) -> None:
    while not condition():
        time.sleep(0.1)


def events(run: RunFolder, name: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == name]


def seconds_to_safety(run: RunFolder) -> list[float]:
    """From each signal to the committed checkpoint."""
    saves = [event["time"] for event in events(run, "checkpoint")]
    signals = [event["received_at"] for event in events(run, "stop_signal")]
    return [min(save for save in saves if save > signal) - signal for signal in signals]


def seconds_until_training_again(run: RunFolder) -> list[float]:
    """From each signal to the next optimizer step that was logged."""
    signals = [event["received_at"] for event in events(run, "stop_signal")]
    ends = [event["time"] for event in events(run, "stop_signal")]
    steps = [line["time"] for line in run.metrics()]
    return [min(step for step in steps if step > end) - signal for signal, end in zip(signals, ends, strict=True)]


def gaps(run: RunFolder) -> Iterator[Gap]:
    """Those between blocks that ended at their boundary."""
    steps = [line["time"] for line in run.metrics()]
    for end in events(run, "block_end"):
        job_end = first_after(events(run, "job_end"), end["time"])
        later = [event for event in events(run, "job_start") if event["time"] > job_end]
        if not later or later[0]["kind"] != "block":
            continue
        start = later[0]["time"]
        resumed = first_after(events(run, "resumed"), start)
        saved = max(event["time"] for event in events(run, "checkpoint") if event["time"] < end["time"])
        last_step, first_step = max(step for step in steps if step < saved), min(step for step in steps if step > start)
        yield Gap(
            total=first_step - last_step,
            save=saved - last_step,
            evaluate_and_leave=job_end - saved,
            slurm=start - job_end,
            start_up=resumed - start,
            first_step=first_step - resumed,
        )


def first_after(found: list[dict[str, Any]], moment: float) -> float:
    return float(min(event["time"] for event in found if event["time"] >= moment))


def submission_seconds(file: Path, folder: Path, arguments: list[str]) -> tuple[float, float, RunFolder]:
    """Seconds to submit a chain of MANY_BLOCKS that does not start, in all and without settling; and its run."""
    overrides = [*folders(folder), *arguments, "--training.total_jobs", str(MANY_BLOCKS), "--name", "many"]
    overrides += ["--slurm.extra.begin", "now+1hour"]
    checked = check_run(file, overrides)
    plan = plan_run(checked)
    run = launch.open_run_folder(checked, plan.data_key, lambda line: None)
    moments: list[float] = []
    began = time.monotonic()
    launch.submit(run, checked, plan, lambda line: moments.append(time.monotonic()))
    # Its data is prepared, so that it is the blocks and the evaluation, a line for each.
    return time.monotonic() - began, moments[MANY_BLOCKS] - began, run


def plain_sbatch_seconds() -> float:
    """The same number of jobs, each after the one before, by sbatch alone."""
    began = time.monotonic()
    ids: list[str] = []
    for _ in range(MANY_BLOCKS + 1):
        after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        command = ["sbatch", "--parsable", "--begin=now+1hour", "--output=/dev/null", *after, "--wrap=true"]
        ids.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    took = time.monotonic() - began
    subprocess.run(["scancel", *reversed(ids)], check=True)
    return took


def status_seconds(run: RunFolder) -> tuple[float, float]:
    """Of `./train.sh status NAME` as a whole, and of reading the status alone."""
    with contextlib.redirect_stdout(io.StringIO()):
        began = time.monotonic()
        read_status(run)
        reading = time.monotonic() - began
    began = time.monotonic()
    subprocess.run([str(PROJECT / "train.sh"), "status", str(run.path)], check=True, capture_output=True)
    return time.monotonic() - began, reading


def measure(file: Path, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """All figures, in seconds."""
    run = train_with_signals(file, folder, arguments)
    saves = events(run, "checkpoint")
    between = list(gaps(run))
    submitted, without_settling, many = submission_seconds(file, folder, arguments)
    status, reading = status_seconds(many)
    ids = [str(job.id) for job in Journal.open(many).jobs]
    subprocess.run(["scancel", *reversed(ids)], check=True)
    gap = statistics.median(gap.total for gap in between)
    return {
        "signal_to_committed_checkpoint": seconds_to_safety(run),
        "signal_to_training_again": seconds_until_training_again(run),
        "gaps_between_blocks": [asdict(one) for one in between],
        "save": [event["seconds"] for event in saves],
        "checkpoint_megabytes": saves[-1]["num_bytes"] / 1e6,
        f"submission_of_{MANY_BLOCKS}_blocks": submitted,
        f"submission_of_{MANY_BLOCKS}_blocks_without_settling": without_settling,
        f"plain_sbatch_of_{MANY_BLOCKS}_blocks": plain_sbatch_seconds(),
        f"status_of_{MANY_BLOCKS}_blocks": status,
        f"reading_status_of_{MANY_BLOCKS}_blocks": reading,
        f"overhead_at_{BLOCK_MINUTES}_minute_blocks": gap / (60 * BLOCK_MINUTES + gap),
    }


def show(figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        words = name.replace("_", " ")
        if name.startswith("gaps"):
            for gap in value:
                parts = "  ".join(f"{part.replace('_', ' ')} {seconds:.2f}" for part, seconds in gap.items())
                print(f"{words:48}{parts}")
        elif isinstance(value, list):
            print(f"{words:48}" + "  ".join(f"{seconds:.3f}" for seconds in value))
        elif name.startswith("overhead"):
            print(f"{words:48}{value:.2%}")
        else:
            print(f"{words:48}{value:.3f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=PROJECT / "configs/test.yaml", help="the run (configs/test.yaml)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON as well")
    options, rest = parser.parse_known_args()
    arguments = [
        *("--training.total_jobs", "3", "--training.epochs_per_job", "20", "--training.log_every", "1"),
        *("--slurm.time", "20", *rest),
    ]
    with tempfile.TemporaryDirectory(prefix="chain-benchmark-") as folder:
        figures = measure(options.file, Path(folder), arguments)
    show(figures)
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
