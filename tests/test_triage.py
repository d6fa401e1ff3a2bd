"""Failures are told apart by what they really print.

Where a machine without a GPU cannot produce a failure, its words are quoted from where somebody met it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.exit_code import ExitCode
from jobs.triage import (
    SIGNS,
    TAIL_BYTES,
    Action,
    BlockTiming,
    Diagnosis,
    Kind,
    LogTail,
    diagnose,
    hosts_to_exclude,
    kinds_at_step,
    read_log_tail,
    record_diagnosis,
    time_last_block,
)
from training.config import SaveInterval
from training.run_folder import RunFolder, append_line

QUOTED: list[tuple[str, Kind, Action]] = [
    # https://github.com/snakemake/snakemake-executor-plugin-slurm/pull/371
    ("slurmstepd: error: Detected 2 oom_kill events in StepId=71.13. Some of the step tasks have been OOM Killed.",
     "out of memory", "retry"),
    # https://github.com/nathanweeks/exonerate/issues/31
    ("slurmstepd: error: Detected 12 oom-kill event(s) in StepId=16198179.batch. Some of your processes may have been "
     "killed by the cgroup out-of-memory handler.", "out of memory", "retry"),
    # https://github.com/hafs-community/HAFS/issues/101
    ("srun: error: Orion-01-01: task 4: Out Of Memory", "out of memory", "retry"),
    # Slurm 22.05.8 on tests/cluster: a task of 800 MB in a job of 300 MB
    ("slurmstepd-node1: error: StepId=1.0 exceeded memory limit (509197312 > 314572800), being killed\n"
     "srun: error: node1: task 0: Killed\nsrun: launch/slurm: _step_signal: Terminating StepId=1.0\n"
     "slurmstepd-node1: error: Exceeded job memory limit", "out of memory", "retry"),
    # torch 2.13, whose loader's worker was killed as the kernel does it when memory is short
    ("RuntimeError: DataLoader worker (pid 20573) is killed by signal: Killed.", "out of memory", "retry"),
    # Slurm 22.05.8 on tests/cluster: SIGKILL, SIGSEGV, a killed node, a job at its time limit
    ("srun: error: node1: task 0: Killed\nsrun: Force Terminated StepId=2.0", "killed by a signal", "retry"),
    ("srun: error: node1: task 0: Segmentation fault", "killed by a signal", "retry"),
    ("srun: error: Node failure on node2\nsrun: Job step aborted: Waiting up to 5 seconds for job step to finish.",
     "node lost", "other node"),
    ("slurmstepd-node1: error: *** STEP 4.0 ON node1 CANCELLED AT 2026-11-26T23:05:57 DUE TO TIME LIMIT ***",
     "time limit", "retry"),
    # https://github.com/murong-xu/CADS/issues/4
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 22.78 GiB. GPU 0 has a total capacity of 31.47 GiB "
     "of which 12.73 GiB is free. Including non-PyTorch memory, this process has 18.73 GiB memory in use.",
     "GPU out of memory", "retry"),
    # https://github.com/pytorch/pytorch/issues/16417, older wording
    ("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 22.00 MiB. GPU 0 has a total capacity of "
     "23.65 GiB of which 11.06 MiB is free.", "GPU out of memory", "retry"),
    # https://github.com/vllm-project/vllm/issues/5222
    ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "GPU fault", "other node"),
    # https://github.com/wilicc/gpu-burn/issues/1
    ("[74789.644138] NVRM: Xid (PCI:0000:02:00): 79, GPU has fallen off the bus.", "GPU fault", "other node"),
    # https://github.com/stas00/ml-engineering, compute/accelerator/nvidia/debug.md
    ("NVRM: Xid (PCI:0000:10:1c): 63, pid=1896, Row Remapper: New row marked for remapping, reset gpu to activate.",
     "GPU fault", "other node"),
    # https://github.com/pytorch/pytorch/issues/100691
    ("RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable", "GPU fault", "other node"),
    # https://github.com/EleutherAI/lm-evaluation-harness/issues/2293
    ("/opt/conda/conda-bld/pytorch_1720538643151/work/aten/src/ATen/native/cuda/Indexing.cu:1231: "
     "indexSelectSmallIndex: block: [31,0,0], thread: [29,0,0] Assertion `srcIndex < srcSelectDimSize` failed.\n"
     "RuntimeError: CUDA error: device-side assert triggered", "bug on the GPU", "halt"),
    # https://github.com/yewzijian/RegTR/issues/33
    ("RuntimeError: CUDA error: an illegal memory access was encountered", "bug on the GPU", "retry"),
    # https://pastebin.com/fTNHmgzB: an Xid that the program is to blame for
    ("kernel: NVRM: Xid (PCI:0000:08:00): 31, Ch 0000003b, intr 10000000. MMU Fault: ENGINE GRAPHICS HUBCLIENT_SCC "
     "faulted @ 0x0_04687000.", "bug on the GPU", "retry"),
    # https://github.com/hiyouga/LlamaFactory/issues/7396
    ("[rank0]:[E321 02:07:08.408271257 ProcessGroupNCCL.cpp:607] [Rank 0] Watchdog caught collective operation timeout:"
     " WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, NumelIn=466119168, NumelOut=466119168, Timeout(ms)=600000) ran for "
     "600060 milliseconds before timing out.", "lost peer", "retry"),
    # https://github.com/NVIDIA/nccl/issues/1612
    ("[0] misc/socket.cc:71 NCCL WARN socketProgress: Connection closed by remote peer 10.10.1.3<36138>",
     "lost peer", "retry"),
    # https://github.com/NVIDIA/nccl/issues/795
    ("a100-st-p4d24xlarge-22:183006:183220 [1] misc/socket.cc:518 NCCL WARN Net : Call to recv from "
     "10.200.84.247<58355> failed : Broken pipe", "lost peer", "retry"),
    # https://github.com/open-mmlab/mmdetection/issues/12069
    ("OSError: [Errno 122] Disk quota exceeded", "disk full", "halt"),
    # https://github.com/ArjunaCluster/ArjunaUsers/issues/46
    ("slurmstepd: error: execve(): /tmp/slurmd/job00089/slurm_script: No such file or directory",
     "missing file", "retry"),
]  # fmt: skip


def diagnose_text(text: str, **known: Any) -> Diagnosis:
    return diagnose([LogTail(text=text)], **known)


def run_python(program: str, *, before: str = "") -> tuple[str, int]:
    """What a Python program prints as it fails, and its exit code; `before` is run by the shell that starts it."""
    command = ["bash", "-c", f'{before or ":"}; exec "$0" -c "$1"', sys.executable, program]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    assert done.returncode != 0
    return done.stdout, done.returncode


@pytest.mark.parametrize(("text", "kind", "action"), QUOTED)
def test_what_others_met_is_recognised(text: str, kind: Kind, action: Action) -> None:
    diagnosis = diagnose_text(text, exit_code=1)
    assert (diagnosis.kind, diagnosis.action) == (kind, action)
    assert diagnosis.evidence in text.replace("[rank0]:", "")


@pytest.mark.parametrize(
    ("program", "before", "kind", "action", "evidence"),
    [
        ("bytearray(10**9)", "ulimit -v 400000", "out of memory", "retry", "MemoryError"),
        ("import numpy; numpy.ones(10**15)", "", "out of memory", "retry", "_ArrayMemoryError: Unable to allocate"),
        ("open('/dev/full', 'wb').write(b'x' * 10**6)", "", "disk full", "halt", "[Errno 28] No space left on device"),
        ("import no_such_package", "", "import error", "halt", "No module named 'no_such_package'"),
        ("from os import no_such_name", "", "import error", "halt", "cannot import name 'no_such_name'"),
        ("open('/no/such/file')", "", "missing file", "retry", "'/no/such/file'"),
        ("{}['key']", "", "unknown crash", "retry", "KeyError: 'key'"),
    ],
)
def test_real_failures_of_a_process_are_recognised(
    program: str, before: str, kind: Kind, action: Action, evidence: str
) -> None:
    printed, code = run_python(program, before=before)
    diagnosis = diagnose_text(printed, exit_code=code)
    assert (diagnosis.kind, diagnosis.action) == (kind, action)
    assert evidence in diagnosis.evidence


def test_a_process_that_was_killed_says_nothing_and_its_exit_code_does() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process.send_signal(signal.SIGKILL)
    for code in (process.wait(), 128 + 9):  # as subprocess has it, and as a shell has it
        diagnosis = diagnose_text("step 3/100  epoch 0.10\n", exit_code=code)
        assert (diagnosis.kind, diagnosis.evidence) == ("killed by a signal", "exit code 137: SIGKILL")


LOSE_A_PEER = """
import os, signal, sys
from datetime import timedelta
from torch import distributed, ones
rank = int(sys.argv[1])
store = distributed.FileStore(sys.argv[2], 2)
distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
distributed.all_reduce(ones(1))
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
distributed.all_reduce(ones(1))
"""


@pytest.mark.chain
def test_a_rank_that_lost_its_peer_is_told_from_the_one_that_died(tmp_path: Path) -> None:
    logs = [tmp_path / f"7_{rank}_log.out" for rank in range(2)]
    command = [sys.executable, "-c", LOSE_A_PEER]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("wb") as output:
            processes.append(
                subprocess.Popen(
                    [*command, str(rank), str(tmp_path / "store")], stdout=output, stderr=subprocess.STDOUT
                )
            )
    assert [process.wait(timeout=120) for process in processes] == [1, -9]
    tails = [read_log_tail(log) for log in logs]
    diagnosis = diagnose(tails, exit_code=1)
    assert (diagnosis.kind, diagnosis.action) == ("lost peer", "retry")
    # Whether the peer's socket was closed or reset depends on what was on its way.
    assert "Connection closed by peer" in diagnosis.evidence or "Connection reset by peer" in diagnosis.evidence
    # With what srun would have added, the dead process is the cause.
    tails.append(LogTail(text="slurmstepd: error: Detected 1 oom_kill event in StepId=7.0."))
    assert diagnose(tails, exit_code=1).kind == "out of memory"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ExitCode.BAD_INPUT, "bad settings or data"),
        (ExitCode.LOSS_NOT_FINITE, "loss not finite"),
        (ExitCode.NO_VALID_CHECKPOINT, "no valid checkpoint"),
    ],
)
def test_our_own_exit_codes_halt_the_chain_with_their_message(code: ExitCode, kind: Kind) -> None:
    diagnosis = diagnose_text("Traceback (most recent call last):\nValueError: so\nerror: block: so\n", exit_code=code)
    assert (diagnosis.kind, diagnosis.action, diagnosis.evidence) == (kind, "halt", "error: block: so")


def test_slurms_state_is_evidence_where_the_log_is_silent() -> None:
    assert diagnose([], slurm_state="OUT_OF_MEMORY").kind == "out of memory"
    assert diagnose([], slurm_state="NODE_FAIL").action == "other node"
    assert diagnose([], slurm_state="PREEMPTED", earlier=["preempted"] * 50).action == "retry"
    assert diagnose([], exit_code=None).evidence == "the log ends without an error"


def test_every_kind_that_comes_back_at_the_same_step_halts_in_the_end() -> None:
    for sign in SIGNS:
        if sign.max_failures is not None and sign.slurm_states:
            earlier: list[Kind] = [sign.kind] * (sign.max_failures - 1)
            assert diagnose([], slurm_state=sign.slurm_states[0], earlier=earlier).action == "halt", sign.kind


def test_a_gpu_out_of_memory_twice_at_the_same_step_halts() -> None:
    text = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert diagnose_text(text, exit_code=1).action == "retry"
    assert diagnose_text(text, exit_code=1, earlier=["lost peer"]).action == "retry"
    assert diagnose_text(text, exit_code=1, earlier=["GPU out of memory"]).action == "halt"


def test_a_full_temporary_folder_is_the_nodes_and_a_full_run_folder_everybodys() -> None:
    assert diagnose_text("OSError: [Errno 28] No space left on device: '/tmp/torch_cache/a'").action == "other node"
    assert diagnose_text("OSError: [Errno 28] No space left on device: '/project/runs/a'").action == "halt"


# Reading logs

STARTED = "submitit INFO (2026-11-26 23:00:00,000) - Starting with JobEnvironment(job_id=7, hostname=vm, node={}(2))"


def test_only_the_last_start_of_a_requeued_job_counts(tmp_path: Path) -> None:
    log = tmp_path / "7_0_log.out"
    log.write_text(f"{STARTED.format(0)}\nMemoryError\n{STARTED.format(1)}\nKeyError: 'now'\n")
    now, before = read_log_tail(log), read_log_tail(log, starts_ago=1)
    assert (diagnose([now], exit_code=1).evidence, now.node) == ("KeyError: 'now'", 1)
    assert (diagnose([before], exit_code=1).kind, before.node) == ("out of memory", 0)
    assert read_log_tail(log, starts_ago=2).text == ""


def test_a_huge_binary_log_is_read_at_its_end_only(tmp_path: Path) -> None:
    log = tmp_path / "7_3_log.out"
    with log.open("wb") as file:
        file.write(STARTED.format(1).encode() + b"\nMemoryError\n")
        file.seek(4 * 2**30)  # a hole: 4 GiB to read, nothing on the disk
        file.write(os.urandom(2**20) + b"\n\x1b[31m[rank3]: RuntimeError: CUDA error: uncorrectable ECC error\x1b[0m\n")
    tail = read_log_tail(log)
    assert len(tail.text) <= TAIL_BYTES
    found = diagnose([LogTail(text="", node=0), tail], exit_code=1, hosts=["node1", "node2"])
    assert (found.kind, found.host) == ("GPU fault", "node2")
    assert found.evidence == "RuntimeError: CUDA error: uncorrectable ECC error"


def test_srun_accuses_the_host_that_it_names_and_not_the_one_it_writes_from() -> None:
    hosts = ["node1", "node2"]
    log = LogTail(text="srun: error: Node failure on node2", node=0)
    assert diagnose([log], slurm_state="NODE_FAIL", hosts=hosts).host == "node2"
    several = LogTail(text="srun: error: node[1-2]: tasks 0-1: Killed", node=0)
    assert diagnose([several], exit_code=137, hosts=hosts).host is None
    assert diagnose([], slurm_state="NODE_FAIL", hosts=["node1"]).host == "node1"


def test_the_process_that_died_first_is_the_cause_and_not_those_that_srun_ended_after_it() -> None:
    lost = LogTail(text="RuntimeError: [/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:23441")
    killed, left = "srun: error: node2: task 1: Killed", "srun: error: node1: task 0: Exited with exit code 1"
    assert diagnose([LogTail(text=f"{killed}\n{left}"), lost], exit_code=137).host == "node2"
    assert diagnose([LogTail(text=f"{killed}\n{left}"), lost], exit_code=137).kind == "killed by a signal"
    assert diagnose([LogTail(text=f"{left}\n{killed}"), lost], exit_code=137).kind == "lost peer"


# What a run remembers


def diagnosis(kind: Kind, host: str | None = None) -> Diagnosis:
    return Diagnosis(kind=kind, evidence="", advice="", action="retry", host=host)


def test_two_faults_of_a_host_exclude_it_and_a_broken_gpu_does_at_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    seen: list[tuple[Kind, str | None]] = [
        ("node lost", "node1"), ("GPU out of memory", "node2"), ("GPU out of memory", "node2"),
        ("node disk full", None), ("node lost", None), ("lost peer", "node3"),
    ]  # fmt: skip
    for kind, host in seen:
        record_diagnosis(run, diagnosis(kind, host), job="7", job_kind="block", step=10)
    assert hosts_to_exclude(run.events()) == []
    record_diagnosis(run, diagnosis("node disk full", "node1"), job="8", job_kind="block", step=20)
    record_diagnosis(run, diagnosis("GPU fault", "node4"), job="9", job_kind="block", step=30)
    run.record_event("started_by_user")
    assert hosts_to_exclude(run.events()) == ["node1", "node4"]
    assert [event["job"] for event in run.events()][:1] == ["7"]


def test_failures_are_counted_by_step_until_the_user_runs_the_file_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step, kind in ((10, "lost peer"), (20, "lost peer"), (20, "GPU out of memory")):
        record_diagnosis(run, diagnosis(kind), job=None, job_kind="block", step=step)  # type: ignore[arg-type]
    assert kinds_at_step(run.events(), 20, "block") == ["lost peer", "GPU out of memory"]
    assert kinds_at_step(run.events(), 20, "capture") == []
    run.record_event("started_by_user")
    assert kinds_at_step(run.events(), 20, "block") == []


# Blocks that are too long for their time limit


def timed_block(folder: Path, *, save_interval: SaveInterval, block_steps: int | None = 400) -> BlockTiming:
    """A block of an hour: 100 s to the first step, 30 s a step, saves of 60 s, as its files have it."""
    run = RunFolder(folder)
    append_line(folder / "events.jsonl", {"time": 900.0, "event": "checkpoint", "seconds": 60.0})
    append_line(folder / "events.jsonl", {"time": 1000.0, "event": "job_start", "kind": "block"})
    for step, time in ((20, 500.0), (21, 1100.0), (31, 1400.0), (111, 3800.0)):
        append_line(folder / "metrics.jsonl", {"time": time, "step": step})
    return time_last_block(run, limit_s=3600, warning_s=90, save_interval=save_interval, block_steps=block_steps)


def test_a_time_limit_without_a_checkpoint_says_what_would_fit(tmp_path: Path) -> None:
    timing = timed_block(tmp_path, save_interval=SaveInterval())
    assert (timing.start_s, timing.step_s, timing.save_s, timing.saved) == (100, 30, 60, False)
    found = diagnose([], slurm_state="TIMEOUT", timing=timing)
    assert found.action == "retry"
    # (3600 - 100 - 60 - 120) / 2 = 1660 s between saves; 100 + 60 + 120 + 400 x 30 = 12280 s for the whole block.
    assert found.advice == (
        "starting took 0:01:40 and a step takes 30 s, a save 60 s: "
        "set training.save_every: 27m or less or slurm.time: 3:25:00 or more"
    )


def test_a_limit_that_fits_no_step_only_wants_more_time(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").touch()
    timing = time_last_block(
        RunFolder(tmp_path), limit_s=600, warning_s=90, save_interval=SaveInterval(steps=5), block_steps=None
    )
    assert diagnose([], slurm_state="TIMEOUT", timing=timing).advice == (
        "no step was finished within 0:10:00: raise slurm.time"
    )


def test_a_block_that_saved_before_its_limit_is_nothing_to_worry_about(tmp_path: Path) -> None:
    timed_block(tmp_path, save_interval=SaveInterval())
    append_line(tmp_path / "events.jsonl", {"time": 2000.0, "event": "checkpoint", "seconds": 50.0})
    timing = time_last_block(
        RunFolder(tmp_path), limit_s=3600, warning_s=90, save_interval=SaveInterval(), block_steps=400
    )
    assert "goes on from there" in diagnose([], slurm_state="TIMEOUT", timing=timing).advice
