"""Why a job failed and what the chain should do: its exit code, Slurm's state and its logs, held against one table."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jobs.chain import JobKind
from jobs.cluster import SIGNAL_EARLY_S
from jobs.exit_code import ExitCode
from jobs.status import clock
from training.config import SaveInterval
from training.run_folder import RunFolder

Kind = Literal[
    "bad settings or data",
    "loss not finite",
    "no valid checkpoint",
    "node lost",
    "time limit",
    "preempted",
    "GPU fault",
    "bug on the GPU",
    "GPU out of memory",
    "node disk full",
    "disk full",
    "out of memory",
    "import error",
    "no permission",
    "missing file",
    "lost peer",
    "killed by a signal",
    "unknown crash",
]
Action = Literal["retry", "halt", "other node"]

CLEAR_HARDWARE_FAULTS: frozenset[Kind] = frozenset({"GPU fault"})
FAULTS_THAT_EXCLUDE_A_HOST = 2
TAIL_BYTES = 64 * 1024
HEAD_BYTES = 4096
MAX_LINE_LENGTH = 2000
MAX_EVIDENCE_LENGTH = 300


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Why a job failed, how that is known, and what to do."""

    kind: Kind
    evidence: str
    """The line of the log that shows it, or what the exit code or Slurm's state says."""

    advice: str
    action: Action
    """`other node`: try again, and once the fault is sure or comes again there, without that host."""

    host: str | None
    """Where it happened, as far as the logs tell; None accuses nobody."""


@dataclass(frozen=True, kw_only=True)
class LogTail:
    """The end of what one process wrote since its last start."""

    text: str
    node: int | None = None
    """Which of the job's nodes it ran on, counted from 0."""


@dataclass(frozen=True, kw_only=True)
class BlockTiming:
    """What the last block did with its time, and what it was allowed; None where it is unknown."""

    start_s: float | None
    """From the start of the job to the end of its first optimizer step."""

    step_s: float | None
    save_s: float
    """The slowest save of the run; 0 before the first."""

    saved: bool
    """Whether the block committed a checkpoint."""

    limit_s: float
    warning_s: float
    """How long before the limit the block is told to save."""

    save_interval: SaveInterval
    block_steps: int | None


@dataclass(frozen=True, kw_only=True)
class Sign:
    """One row of the table: how a kind of failure is known, and what follows from it."""

    kind: Kind
    advice: str
    action: Action
    max_failures: int | None = 1
    """At the same step; the one that reaches it halts the chain. None: never."""

    exit_codes: Iterable[int] = ()
    """As a shell has them: 128 + N for signal N."""

    slurm_states: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    """Patterns, any of which is found in a line of a log."""


KILLED_ADVICE = "nothing says who sent it: raise slurm.mem if memory was short; segmentation faults are native bugs"

# A CUDA error keeps its wording from cudaGetErrorString; tracebacks end with the exception's name at the line's start.
# The order decides: a cause comes before what it brings about. A GPU that falls over, a full disk and a dead process
# all end as a lost peer on the other ranks.
SIGNS = (
    # The three codes say that another try would end the same way.
    Sign(
        kind="bad settings or data",
        action="halt",
        exit_codes=[ExitCode.BAD_INPUT],
        advice="mend the key, file or row that the message names, then run the file again",
    ),
    Sign(
        kind="loss not finite",
        action="halt",
        exit_codes=[ExitCode.LOSS_NOT_FINITE],
        advice="lower training.lr, lengthen training.warmup or set model.dtype: float32, under another --name",
    ),
    Sign(
        kind="no valid checkpoint",
        action="halt",
        exit_codes=[ExitCode.NO_VALID_CHECKPOINT],
        advice="restore a checkpoint of checkpoints/ from a backup, or move them away to train from the start",
    ),
    # Slurm requeues the job itself, and gives no work to a node that is down; twice on one host is a bad host.
    Sign(
        kind="node lost",
        action="other node",
        max_failures=3,
        slurm_states=("NODE_FAIL", "BOOT_FAIL"),
        lines=(
            r"^srun: error: Node failure on ",
            r"DUE TO NODE FAILURE",
            r"^(srun|slurmstepd\S*|slurmd\S*): .*lost connection",
        ),
        advice="nothing of yours is wrong; a shorter training.save_every loses less when a node dies",
    ),
    # A slow start (cold caches, a first compilation) is faster the second time; twice too long stays too long.
    Sign(
        kind="time limit",
        action="retry",
        max_failures=2,
        slurm_states=("TIMEOUT", "DEADLINE"),
        lines=(r"DUE TO TIME LIMIT",),
        advice="raise slurm.time or shorten training.save_every",
    ),
    Sign(
        kind="preempted",
        action="retry",
        max_failures=None,
        slurm_states=("PREEMPTED",),
        lines=(r"DUE TO PREEMPTION",),
        advice="the next block goes on; a shorter training.save_every loses less, another slurm.partition may be safe",
    ),
    # Xid 13, 31, 43 and 45 are how the driver reports mistakes of programs; the others are the device or its driver.
    Sign(
        kind="GPU fault",
        action="other node",
        max_failures=3,
        lines=(
            r"NVRM: Xid \([^)]*\): (?!(13|31|43|45)\b)\d+",
            r"uncorrectable (ECC|NVLink) error",
            r"GPU has fallen off the bus|GPU is lost",
            r"CUDA error: (hardware stack error|unknown error|system not yet initialized)",
            r"CUDA-capable device.* busy or unavailable",
            r"Unable to determine the device handle for (GPU|gpu)",
            r"libcuda\.so\.1: cannot open shared object file",
        ),
        advice="tell the administrators the node and this line; later jobs avoid it (slurm.extra: {exclude: NODE} too)",
    ),
    # An index out of range comes from the data, and the order of the data never changes.
    Sign(
        kind="bug on the GPU",
        action="halt",
        lines=(r"device-side assert triggered", r"thread: \[\d+,\d+,\d+\] Assertion "),
        advice="an index is out of range, mostly a token id beyond the model's vocabulary: compare model.tokenizer "
        "with model.name; slurm.setup: [export CUDA_LAUNCH_BLOCKING=1] shows the line",
    ),
    # Races in kernels do not repeat, wrong addresses do.
    Sign(
        kind="bug on the GPU",
        action="retry",
        max_failures=2,
        lines=(
            r"an illegal memory access was encountered",
            r"CUDA error: (misaligned address|an illegal instruction was encountered|unspecified launch failure)",
            r"NVRM: Xid \([^)]*\): (13|31|43|45)\b",
        ),
        advice="a kernel reached for foreign memory; slurm.setup: [export CUDA_LAUNCH_BLOCKING=1] shows which, "
        "model.attention: sdpa avoids ours",
    ),
    # Once may be a neighbour on the device, or fragments after days; the same step has the same rows and needs as much.
    Sign(
        kind="GPU out of memory",
        action="retry",
        max_failures=2,
        lines=(
            r"\b(torch\.)?(cuda\.)?OutOfMemoryError: ",
            r"CUDA out of memory",
            r"CUDA error: out of memory|Cuda failure \d* ?'out of memory'",
            r"CU(BLAS|DNN)_STATUS_ALLOC_FAILED",
        ),
        advice="ask for a larger GPU (slurm.constraint), or start another --name with training.gradient_checkpointing: "
        "true, or half the training.batch_size and twice the training.gradient_accumulation",
    ),
    # Before `disk full`: here another node helps, there none does.
    Sign(
        kind="node disk full",
        action="other node",
        max_failures=3,
        lines=(r"(No space left on device|Errno 28|Errno 122).*['\" ]/(tmp|var/tmp|dev/shm|local)\b",),
        advice="the node's own disk is full; slurm.setup: [export TMPDIR=/elsewhere] uses another",
    ),
    # Nobody frees a quota while the chain runs, and each try would train up to its next save in vain.
    Sign(
        kind="disk full",
        action="halt",
        lines=(
            r"No space left on device|\[Errno 28\]|os error 28\b",
            r"Disk quota exceeded|\[Errno 122\]|os error 122\b",
            r"a checkpoint needs about .* GB and the disk has .* GB free",
        ),
        advice="free space or quota below runs_dir and data_dir, or name others, then run the file again",
    ),
    # A leak in a loader grows anew from every checkpoint on, so it only halts a chain that gets nowhere.
    Sign(
        kind="out of memory",
        action="retry",
        max_failures=2,
        slurm_states=("OUT_OF_MEMORY",),
        lines=(
            r"^srun: error: .*: Out Of Memory",
            r"oom[-_ ]kill",
            r"[Ee]xceeded (job |step )?memory limit",
            r"^(\w+\.)*_?(Array)?MemoryError\b",
            r"Cannot allocate memory|\[Errno 12\]",
            r"can't allocate memory|std::bad_alloc",
            r"out of shared memory|DataLoader worker .* is killed by signal: Killed",
        ),
        advice="raise slurm.mem, or lower training.arguments.dataloader_num_workers",
    ),
    # Every job starts the same interpreter with the same packages.
    Sign(
        kind="import error",
        action="halt",
        lines=(r"^(ModuleNotFoundError|ImportError): ",),
        advice="install the package into the environment of ./train.sh, or load what it needs in slurm.setup",
    ),
    Sign(
        kind="no permission",
        action="halt",
        lines=(r"^PermissionError: ", r"^(\S+: )*(error: )?execve\(\): .*: Permission denied"),
        advice="give your user access to the path, or point runs_dir, data_dir or dataset.data_files elsewhere",
    ),
    # The same words for a file that is nowhere and for a file system that one node has not mounted.
    Sign(
        kind="missing file",
        action="retry",
        max_failures=2,
        lines=(
            r"^FileNotFoundError: ",
            r"^(slurmstepd|srun|bash)\S*: .*No such file or directory",
            r"Stale file handle|Transport endpoint is not connected",
        ),
        advice="the path must exist on every node; ./train.sh doctor --on-node tells what a node sees",
    ),
    # Before `lost peer`, which is what the other processes say of one that was killed.
    Sign(
        kind="killed by a signal",
        action="retry",
        max_failures=2,
        lines=(
            r"^srun: error: .*: tasks? .*: "
            r"(Killed|Segmentation fault|Aborted|Bus error|Terminated|Floating point exception|Illegal instruction)",
        ),
        advice=KILLED_ADVICE,
    ),
    Sign(
        kind="lost peer",
        action="retry",
        max_failures=3,
        lines=(
            r"gloo.*(Connection (closed|reset) by peer|Timed out waiting|connectFullMesh failed)",
            r"Watchdog caught collective operation timeout",
            r"NCCL WARN .*(Connection closed by remote peer|Call to (recv|send|connect)\w* .* failed)",
            r"nccl(Remote|System)Error",
            r"^torch\.distributed\.Dist(Network|Store|Backend)?Error: ",
            r"rank 0 published no address",
        ),
        advice="another process or the network failed first: its log says why; where nothing does, name the network in "
        "slurm.setup: [export NCCL_SOCKET_IFNAME=...]",
    ),
    Sign(
        kind="killed by a signal",
        action="retry",
        max_failures=2,
        exit_codes=range(129, 129 + 64),
        advice=KILLED_ADVICE,
    ),
)
UNKNOWN = Sign(
    kind="unknown crash",
    action="retry",
    max_failures=2,
    advice="read the end of the log: ./train.sh logs NAME",
)


def diagnose(
    logs: Sequence[LogTail],
    *,
    exit_code: int | None = None,
    slurm_state: str | None = None,
    hosts: Sequence[str] = (),
    earlier: Sequence[Kind] = (),
    timing: BlockTiming | None = None,
) -> Diagnosis:
    """What a failed job died of, the surest sign first.

    `exit_code` is as in `subprocess` (negative for a signal) or as in a shell (128 + signal), `hosts` are the job's
    nodes in Slurm's order, `earlier` holds the kinds of failures at the same step before this one.
    """
    status = 128 - exit_code if exit_code is not None and exit_code < 0 else exit_code
    lines = [(line, log.node) for log in logs for line in without_echoes(readable_lines(log.text))]
    for sign in SIGNS:
        seen = evidence_of(sign, lines, status, slurm_state)
        if seen:
            break
    else:
        sign, seen = UNKNOWN, last_words(lines, status)
    evidence, node = seen
    failures = earlier.count(sign.kind) + 1
    halts = sign.max_failures is not None and failures >= sign.max_failures
    return Diagnosis(
        kind=sign.kind,
        evidence=evidence[:MAX_EVIDENCE_LENGTH],
        advice=time_limit_advice(timing) if sign.kind == "time limit" and timing else sign.advice,
        action="halt" if halts else sign.action,
        host=accused_host(evidence, node, hosts),
    )


def evidence_of(
    sign: Sign, lines: Sequence[tuple[str, int | None]], status: int | None, slurm_state: str | None
) -> tuple[str, int | None] | None:
    """The last line that shows the sign, or the code or state that does, and the node that wrote it."""
    if sign.lines:
        pattern = re.compile("|".join(f"(?:{line})" for line in sign.lines))
        for line, node in reversed(lines):
            if pattern.search(line):
                return line, node
    if status is not None and status in sign.exit_codes:
        return last_words(lines, status)
    if slurm_state is not None and slurm_state.split()[0] in sign.slurm_states:
        return f"Slurm state {slurm_state}", None
    return None


def accused_host(evidence: str, node: int | None, hosts: Sequence[str]) -> str | None:
    """Where it happened: the host that srun names, or the one whose process wrote the evidence."""
    if len(hosts) == 1:
        return hosts[0]
    if evidence.startswith(("srun:", "slurm")):
        # Words about all nodes, written into the first process's log.
        named = re.match(r"srun: error: (?:Node failure on )?(?P<host>[\w.-]+)(?:$|: )", evidence)
        return named["host"] if named else None
    return hosts[node] if node is not None and node < len(hosts) else None


def last_words(lines: Sequence[tuple[str, int | None]], status: int | None) -> tuple[str, int | None]:
    """The line that names the error: our own last one, else the last exception, else the exit code."""
    if status is not None and status > 128:
        return f"exit code {status}: {signal_name(status - 128)}", None
    for pattern in (r"^error: ", r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b"):
        for line, node in reversed(lines):
            if re.search(pattern, line):
                return line, node
    return f"exit code {status}" if status is not None else "the log ends without an error", None


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def time_limit_advice(timing: BlockTiming) -> str:
    """What a block that was ended by its time limit needs to get further."""
    if timing.saved:
        return "it left a checkpoint, and the next block goes on from there; a longer slurm.time needs fewer blocks"
    if timing.start_s is None:
        return f"no step was finished within {clock(timing.limit_s)}: raise slurm.time"
    if timing.step_s is None:
        return f"only one step was logged, {clock(timing.start_s)} after the start: raise slurm.time"
    fixed_s = timing.start_s + timing.save_s + timing.warning_s + SIGNAL_EARLY_S
    spent = (
        f"starting took {clock(timing.start_s)} and a step takes {timing.step_s:.3g} s"
        + (f", a save {timing.save_s:.3g} s" if timing.save_s else "")
    )  # fmt: skip
    remedies = []
    # Half of what is left, so that one late save is not the end.
    affordable_s = (timing.limit_s - fixed_s) / 2
    if affordable_s >= timing.step_s:
        remedies.append(f"training.save_every: {save_every(affordable_s, timing.step_s)} or less")
    interval_s = seconds_between_saves(timing)
    if interval_s is not None and fixed_s + interval_s > timing.limit_s:
        remedies.append(f"slurm.time: {clock(60 * -(-(fixed_s + interval_s) // 60))} or more")
    return f"{spent}: set {' or '.join(remedies) or 'a longer slurm.time'}"


def seconds_between_saves(timing: BlockTiming) -> float | None:
    """How long a block trains until it saves for the first time; None where that is unknown."""
    interval = timing.save_interval
    assert timing.step_s is not None
    if interval.seconds is not None:
        return interval.seconds + timing.step_s
    steps = interval.steps if interval.steps is not None else timing.block_steps
    return None if steps is None else steps * timing.step_s


def save_every(seconds: float, step_s: float) -> str:
    """An interval as the key takes it: whole minutes, or steps where they are shorter."""
    return f"{int(seconds // 60)}m" if seconds >= 120 else str(int(seconds // step_s))


# Reading what is known of a failed job


def read_log_tail(path: Path, *, starts_ago: int = 0) -> LogTail:
    """What a log says since the process's last start, at most its last 64 KiB.

    A requeued job appends to the log of its earlier try; `starts_ago=1` reads that one. Empty where it is not there.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES).decode(errors="replace")
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        tail = file.read(TAIL_BYTES).decode(errors="replace")
    starts = [match.start() for match in START_LINE.finditer(tail)]
    edges = [0, *starts, len(tail)] if not starts or starts[0] > 0 else [*starts, len(tail)]
    if starts_ago + 2 > len(edges):
        return LogTail(text="")
    text = tail[edges[-2 - starts_ago] : edges[-1 - starts_ago]]
    started = START_LINE.search(text) or START_LINE.search(head)
    return LogTail(text=text, node=int(started["node"]) if started else None)


START_LINE = re.compile(r"submitit INFO .*Starting with JobEnvironment\(.*\bnode=(?P<node>\d+)\(")
"""What submitit prints first in each process. It names the machine too, but not as Slurm calls it."""


def readable_lines(text: str) -> list[str]:
    """The lines of a log without colours, bars that overwrite themselves, rank labels and binary rubbish."""
    lines = []
    for line in re.split(r"[\r\n]+", text):
        plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line[:MAX_LINE_LENGTH])
        plain = re.sub(r"^\[rank\d+\]:\s?|[^\x20-\x7e\xa0-\U0010ffff]", "", plain).rstrip()
        if plain:
            lines.append(plain)
    return lines


def without_echoes(lines: Sequence[str]) -> Iterator[str]:
    """The lines with only the first task that srun names: the others are those that it ended because of that one."""
    named = False
    for line in lines:
        is_task = re.match(r"srun: error: .*: tasks? .*: ", line) is not None
        if not (is_task and named):
            yield line
        named = named or is_task


def time_last_block(
    run: RunFolder, *, limit_s: float, warning_s: float, save_interval: SaveInterval, block_steps: int | None
) -> BlockTiming:
    """How the run's last block spent its time, from its events and metrics."""
    events = list(run.events())
    started_s = max((event["time"] for event in events if event["event"] == "job_start" and event["kind"] == "block"),
                    default=0.0)  # fmt: skip
    saves = [event for event in events if event["event"] == "checkpoint"]
    steps = [line for line in run.metrics() if line["time"] >= started_s]
    step_s = None
    if steps and steps[-1]["step"] > steps[0]["step"]:
        step_s = (steps[-1]["time"] - steps[0]["time"]) / (steps[-1]["step"] - steps[0]["step"])
    return BlockTiming(
        start_s=steps[0]["time"] - started_s if steps else None,
        step_s=step_s,
        save_s=max((save["seconds"] for save in saves), default=0.0),
        saved=any(save["time"] >= started_s for save in saves),
        limit_s=limit_s,
        warning_s=warning_s,
        save_interval=save_interval,
        block_steps=block_steps,
    )


# What the run remembers of its failures


def record_diagnosis(run: RunFolder, diagnosis: Diagnosis, *, job: str | None, job_kind: JobKind, step: int) -> None:
    """Append the diagnosis of job `job` to the run's events; `step` is how far jobs of its kind had come by then."""
    run.record_event("diagnosis", step=step, job_kind=job_kind, **{**asdict(diagnosis), "job": job})


def kinds_at_step(events: Iterable[Mapping[str, Any]], step: int, job_kind: JobKind) -> list[Kind]:
    """The kinds of failures of such jobs at this step so far. Running the file again is the user's word that they are
    mended."""
    kinds: list[Kind] = []
    for event in events:
        if event["event"] == "started_by_user":
            kinds = []
        elif event["event"] == "diagnosis" and (event["step"], event["job_kind"]) == (step, job_kind):
            kinds.append(event["kind"])
    return kinds


def hosts_to_exclude(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """Hosts that later jobs should not get (sbatch --exclude): one clear hardware fault, or two faults of a host.

    The user's word does not mend a host, so faults count for the whole run.
    """
    of_hosts = {sign.kind for sign in SIGNS if sign.action == "other node"}
    faults: Counter[str] = Counter()
    for event in events:
        if event["event"] == "diagnosis" and event["host"] and event["kind"] in of_hosts:
            faults[event["host"]] += FAULTS_THAT_EXCLUDE_A_HOST if event["kind"] in CLEAR_HARDWARE_FAULTS else 1
    return sorted(host for host, count in faults.items() if count >= FAULTS_THAT_EXCLUDE_A_HOST)
