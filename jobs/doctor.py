"""The doctor: what this cluster, or this machine, will do to a chain of jobs, and what the kit does about it."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.capture_doctor import distillation_findings
from jobs.capturing import array_shape, has_capture, writes_answers
from jobs.cluster import (
    SIGNAL_EARLY_S,
    Cluster,
    NodeKind,
    Partition,
    Qos,
    number,
    read_cluster,
)
from jobs.config import PROJECT, RunConfig, SlurmConfig, read_run_config
from jobs.findings import Finding, Level, fine, note, problem
from jobs.plan import checkpoint_bytes, count_parameters
from jobs.preflight import check_run, missing_slurm, visible_gpus
from jobs.triage import BlockTiming, time_last_block
from settings.yaml_tree import ConfigError
from training.run_folder import RunFolder

DEFAULT_CRED_EXPIRE_S = 120
SHORT_WARNING_S = 60
CHECKPOINTS_THAT_MUST_FIT = 2
NODE_WAIT_S = 120
LEVEL_STYLE: dict[Level, str] = {"fine": "green", "note": "yellow", "problem": "bold red"}


def run_doctor(arguments: Sequence[str], console: Console) -> int:
    """`./train.sh doctor [FILE]`; returns 0, or 1 where there is a problem."""
    parser = argparse.ArgumentParser(
        prog="./train.sh doctor",
        allow_abbrev=False,
        description="what this cluster does to jobs, and what the kit does",
    )
    parser.add_argument("file", type=Path, nargs="?", help="a run's YAML file to look at too; --section.key as always")
    parser.add_argument("--on-node", action="store_true", help=f"ask a node as well: one job, {NODE_WAIT_S} s at most")
    parser.add_argument("--gpus", action="store_true", help="have torch name the GPUs of this machine")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options, overrides = parser.parse_known_args(arguments)
    if overrides and options.file is None:
        parser.error(f"unknown: {' '.join(overrides)}")
    config = read_run_config(options.file, overrides) if options.file else None
    if options.on_node and not options.json:
        console.print(f"asking a node through srun; waiting {NODE_WAIT_S} s at most", highlight=False)
    findings = list(examine(config, options.file, overrides, on_node=options.on_node, gpus=options.gpus))
    if options.json:
        print(orjson.dumps([asdict(finding) for finding in findings], option=orjson.OPT_INDENT_2).decode())
    else:
        show_findings(findings, console)
    return int(any(finding.level == "problem" for finding in findings))


def examine(
    config: RunConfig | None, file: Path | None, overrides: Sequence[str], *, on_node: bool, gpus: bool
) -> Iterator[Finding]:
    """Everything that can be known about this place, and about a run here where one is given."""
    slurm = config.slurm if config else SlurmConfig()
    missing = missing_slurm()
    if missing:
        yield note("Slurm", f"no cluster: {missing}", "the chain runs on this machine, block after block, same code")
        yield machine_finding(gpus)
        if on_node:
            yield note("a node", "there is none to ask without Slurm", "leave out --on-node")
        cluster = None
    else:
        cluster = read_cluster()
        yield from cluster_findings(cluster, slurm)
        if gpus:
            yield machine_finding(gpus)
    runs = nearest_folder(config.folder.parent if config else PROJECT / "runs")
    if config is None:
        yield disk_finding(runs, None)
    else:
        assert file is not None
        timing = time_last_block(
            RunFolder(config.folder),
            limit_s=60 * (slurm.time_limit_minutes or 0),
            warning_s=slurm.warning_seconds,
            save_interval=config.training.save_interval,
            block_steps=None,
        )
        if cluster and not cluster.silence and config.cluster != "local":
            yield from run_findings(config, cluster, timing)
        yield from settings_findings(file, overrides, runs)
    if on_node and cluster:
        yield from node_findings(slurm, runs)


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings, one a line."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "about", "found", "what follows"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        style = LEVEL_STYLE[finding.level]
        table.add_row(f"[{style}]{finding.level}[/]", *map(escape, (finding.about, finding.found, finding.advice)))
    console.print(table, highlight=False)


# This machine


def machine_finding(gpus: bool) -> Finding:
    """Cores, memory and GPUs of this machine; GPUs by name only where torch may be asked."""
    cores = len(os.sched_getaffinity(0))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    names = gpu_names() if gpus else [f"{visible_gpus()} GPUs"]
    found = f"{cores} cores, {memory_gib:.1f} GiB of memory, {', '.join(names) or 'no GPU that torch can use'}"
    return fine("this machine", found, "one process per GPU, one in all without GPUs")


def gpu_names() -> list[str]:
    import torch  # seconds, and only where the user asks for it

    return [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]


def nearest_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    while not folder.is_dir():
        folder = folder.parent
    return folder


def disk_finding(runs: Path, num_bytes: int | None) -> Finding:
    """Free disk where runs lie, against the checkpoints that must fit there."""
    free = shutil.disk_usage(runs).free
    found = f"{free / 1e9:,.2f} GB free in {runs}"
    if num_bytes is None:
        return fine("disk", found, "each save looks first whether it fits; a quota is seen only when it is met")
    needed = f"{CHECKPOINTS_THAT_MUST_FIT} checkpoints need {num_bytes / 1e9:,.2f} GB"
    if free < num_bytes:
        return problem("disk", f"{found}; {needed}", "free space, or name another runs_dir")
    return fine("disk", f"{found}; {needed}", "each save looks first whether it fits; older ones are pruned after it")


# The cluster


def cluster_findings(cluster: Cluster, slurm: SlurmConfig) -> Iterator[Finding]:
    """What the cluster's settings mean for a chain."""
    if cluster.silence is not None:
        yield note("Slurm", cluster.version, "settings are known once the controller answers")
        yield problem("controller", cluster.silence, "wait for it; submitting then adds what is missing, nothing twice")
        return
    controller = cluster.settings.get("SLURM_VERSION", "")
    yield fine("Slurm", f"{cluster.version}, controller {controller}, which answers", "jobs are submitted from here")
    for partition in cluster.partitions:
        yield partition_finding(partition, cluster)
    yield from qos_findings(cluster)
    yield signals_finding(cluster)
    yield time_limit_finding(cluster, slurm.warning_seconds)
    yield requeue_finding(cluster)
    yield cores_finding(cluster)
    yield gpus_finding(cluster)
    yield accounting_finding(cluster)
    yield submit_limit_finding(cluster)


def partition_finding(partition: Partition, cluster: Cluster) -> Finding:
    """A partition's time limit, and the warning before a preempted job is killed."""
    about = f"partition {partition.name}" + (" (default)" if partition.is_default else "")
    limit = f"up to {partition.max_minutes} min" if partition.max_minutes else "no time limit"
    if partition.state != "UP":
        return note(about, f"{limit}; it is {partition.state}", "jobs wait there until it is UP")
    if not preempts_by(cluster, "partition_prio") or partition.preempt_mode == "OFF":
        return fine(about, f"{limit}; jobs in it are not preempted", "blocks end by themselves or at their time limit")
    return preemption(about, f"{limit}; ", partition.preempt_mode, partition.grace_s, cluster)


def qos_findings(cluster: Cluster) -> Iterator[Finding]:
    """The same for each QOS, where the cluster preempts by QOS."""
    if not preempts_by(cluster, "qos"):
        return
    for qos in cluster.qos:
        yield preemption(f"QOS {qos.name}", "", preempt_mode(qos, cluster), qos.grace_s, cluster)


def preempt_mode(qos: Qos, cluster: Cluster) -> str:
    return cluster.settings["PreemptMode"] if qos.preempt_mode == "cluster" else qos.preempt_mode.upper()


def preempts_by(cluster: Cluster, plugin: str) -> bool:
    return cluster.settings["PreemptType"].endswith(f"/{plugin}")


def preemption(about: str, before: str, mode: str, grace_s: int, cluster: Cluster) -> Finding:
    """What preemption does to a running block."""
    window_s = grace_s + cluster.kill_wait_s
    if "SUSPEND" in mode:
        return note(
            about, f"{before}preempted jobs are frozen, without a signal, and woken later",
            "a frozen block goes on where it stood; if its processes time out in between, the next block resumes",
        )  # fmt: skip
    # The controller looks at the end of the grace only when it schedules: 10 s asked, 11 to 16 s measured on 22.05.
    found = (
        f"{before}preempted jobs get at least {window_s} s from the warning to the kill "
        f"(grace {grace_s} s, often some more, then KillWait {cluster.kill_wait_s} s)"
    )
    if "CANCEL" in mode:
        return note(
            about, f"{found} and are cancelled",
            "the next block goes on from the last checkpoint; run the file again to add the block that is missing",
        )  # fmt: skip
    advice = "a step and a save must fit into that; after it the job is queued again"
    if window_s < SHORT_WARNING_S:
        return note(about, found, f"{advice}. Doctor FILE compares it with the saves of a run")
    return fine(about, found, advice)


def signals_finding(cluster: Cluster) -> Finding:
    """What a preempted job is told."""
    own_signal = {"preempt_send_user_signal", "send_user_signal"} & cluster.parameters
    if own_signal:
        return fine(
            "signals", f"preempted jobs get USR2 first ({own_signal.pop()}), TERM after the grace, then KILL",
            "USR2 and TERM both mean: save after this step and leave",
        )  # fmt: skip
    option = "preempt_send_user_signal" if cluster.release < (23, 2) else "send_user_signal"
    return fine(
        "signals", f"preempted jobs get TERM, again after the grace, then KILL; {option} is not set",
        "USR2 and TERM both mean: save after this step and leave",
    )  # fmt: skip


def time_limit_finding(cluster: Cluster, warning_s: int) -> Finding:
    """What a job is told at its time limit."""
    over_min = number(cluster.settings.get("OverTimeLimit", ""))
    extra = f" ({over_min} min later, by OverTimeLimit)" if over_min else ""
    return fine(
        "time limit",
        f"USR2 {warning_s} s before it, or up to {SIGNAL_EARLY_S} s earlier; TERM at it{extra}, KILL "
        f"{cluster.kill_wait_s} s later",
        f"a step and a save must fit into {warning_s} s; what is left of slurm.time after them is not used",
    )


def requeue_finding(cluster: Cluster) -> Finding:
    """Whether and when an interrupted job comes back."""
    delay_s = requeue_delay_s(cluster)
    found = f"an interrupted job may start again after {delay_s} s"
    advice = "jobs are submitted with --requeue; `scontrol update JobId=J StartTime=now+5seconds` cuts the wait"
    if cluster.settings.get("JobRequeue") == "0":
        return note("requeue", f"{found}, but only if it asked to (JobRequeue=0)", advice)
    return fine("requeue", found, advice)


def requeue_delay_s(cluster: Cluster) -> int:
    """How long a requeued job waits: the life of its credential and a second, or requeue_delay from 25.11 on."""
    delay = re.search(r"\brequeue_delay=(\d+)", cluster.settings.get("SchedulerParameters", ""))
    if delay and cluster.release >= (25, 11):
        return int(delay[1])
    expire = re.search(r"\bcred_expire=(\d+)", cluster.settings.get("AuthInfo", ""))
    # Slurm takes its default in the place of a life below 5 s, without a word.
    return (int(expire[1]) if expire and int(expire[1]) >= 5 else DEFAULT_CRED_EXPIRE_S) + 1


def cores_finding(cluster: Cluster) -> Finding:
    """Whether the steps of a job get the cores that the job asked for."""
    if (22, 5) <= cluster.release < (23, 11):
        return note("cores", "srun of this version forgets --cpus-per-task", "the chain names it again for each step")
    return fine("cores", "srun keeps the job's --cpus-per-task", "slurm.cpus_per_task reaches every process")


def gpus_finding(cluster: Cluster) -> Finding:
    """Which GPUs there are and how a job is kept to its own."""
    with_gpus = [kind for kind in cluster.nodes if kind.gpus]
    if not with_gpus:
        return note(
            "GPUs", "Slurm hands out none (no gres/gpu)", "leave slurm.gpus_per_node unset; slurm.gpu_id picks by hand"
        )
    found = "; ".join(describe_gpus(kind) for kind in with_gpus)
    bound = (
        "a job sees only its own, numbered from 0 (ConstrainDevices)"
        if cluster.settings.get("ConstrainDevices", "").lower() == "yes"
        else "bound by CUDA_VISIBLE_DEVICES alone"
    )
    mixed = [
        partition for partition in {kind.partition for kind in with_gpus}
        if len({kind.gpu_type for kind in with_gpus if kind.partition == partition}) > 1
    ]  # fmt: skip
    if mixed:
        advice = "a chain that changes the type changes its numbers: pin one with slurm.constraint"
        return note("GPUs", f"{found}; {bound}", f"{', '.join(sorted(mixed))}: {advice}")
    return fine(
        "GPUs", f"{found}; {bound}", "one process per GPU of slurm.gpus_per_node; their numbers stay as they are"
    )


def describe_gpus(kind: NodeKind) -> str:
    gpu_type = f" {kind.gpu_type}" if kind.gpu_type else ""
    return f"{kind.partition}: {kind.num_nodes} x {kind.gpus}{gpu_type}, {kind.cores} cores, {kind.memory_mib} MiB"


def accounting_finding(cluster: Cluster) -> Finding:
    """Who remembers jobs that ended."""
    age = f"squeue knows ended jobs for {number(cluster.settings['MinJobAge'])} s"
    advice = "the run's own files remember everything; a job that is gone is never taken for done"
    if cluster.settings["AccountingStorageType"] in ("", "accounting_storage/none"):
        return note("accounting", f"off: sacct knows nothing, {age}", advice)
    return fine("accounting", f"on; {age}", advice)


def submit_limit(cluster: Cluster, slurm: SlurmConfig) -> int | None:
    """Jobs that this user may have queued at once under these settings; None where nobody says."""
    accounts = [one for one in cluster.associations if slurm.account in (None, one.account)]
    names = {slurm.qos} if slurm.qos else {name for one in accounts for name in one.qos}
    limits = [one.max_submit for one in accounts] + [qos.max_submit for qos in cluster.qos if qos.name in names]
    return min((limit for limit in limits if limit is not None), default=None)


def submit_limit_finding(cluster: Cluster) -> Finding:
    limit = submit_limit(cluster, SlurmConfig())
    if limit is None:
        return fine("submission", "no limit on queued jobs is known", "the whole chain is submitted at once")
    return fine(
        "submission", f"at most {limit} jobs queued at once", "run the file again to add the blocks that were refused"
    )


# A run on the cluster


def run_findings(config: RunConfig, cluster: Cluster, timing: BlockTiming) -> Iterator[Finding]:
    """What the cluster means for this run."""
    slurm = config.slurm
    for partition in partitions_of(slurm, cluster):
        if partition.max_minutes is None or (slurm.time_limit_minutes or 0) <= partition.max_minutes:
            yield asked_partition_finding(slurm, partition)
    yield save_finding(warnings_s(slurm, cluster), timing)
    if slurm.gpu_id is not None and any(kind.gpus for kind in cluster.nodes):
        yield problem(
            "slurm.gpu_id", f"{slurm.gpu_id}, and Slurm hands out GPUs here",
            "use slurm.gpus_per_node: 1 instead; a device picked by hand is somebody else's",
        )  # fmt: skip
    capture_tasks = array_shape(config).tasks if has_capture(config) or writes_answers(config) else 0
    jobs, limit = config.training.total_jobs + 2 + capture_tasks, submit_limit(cluster, slurm)
    if limit is not None and jobs > limit:
        yield note(
            "submission", f"the chain has {jobs} jobs, and {limit} may be queued at once",
            "run the file again to add the rest, or take fewer, longer blocks (training.epochs_per_job)"
            + (", or fewer tasks that capture or answer" if capture_tasks else ""),
        )  # fmt: skip


def partitions_of(slurm: SlurmConfig, cluster: Cluster) -> list[Partition]:
    """The partitions that the run's jobs go to; those that do not exist are for the settings' check to name."""
    if slurm.partition is None:
        return [partition for partition in cluster.partitions if partition.is_default]
    return [partition for partition in cluster.partitions if partition.name in slurm.partition.split(",")]


def asked_partition_finding(slurm: SlurmConfig, partition: Partition) -> Finding:
    """The time that blocks ask for, where the partition grants it; the settings' check names what it does not."""
    limit = f"{partition.name} allows " + (f"{partition.max_minutes} min" if partition.max_minutes else "any time")
    asked = slurm.time_limit_minutes
    if asked is None:
        return note("slurm.time", f"unset; {limit}", "the partition's default ends a block; set slurm.time")
    return fine("slurm.time", f"{asked} min; {limit}", "a block that needs longer saves and is resumed")


def warnings_s(slurm: SlurmConfig, cluster: Cluster) -> dict[str, int]:
    """Every warning that a block of the run may get, in words, and its seconds until the kill."""
    warnings = {f"the {slurm.warning_seconds} s before the time limit": slurm.warning_seconds}
    preempting: list[tuple[str, int, str]] = []
    if preempts_by(cluster, "partition_prio"):
        preempting = [(one.name, one.grace_s, one.preempt_mode) for one in partitions_of(slurm, cluster)]
    elif preempts_by(cluster, "qos"):
        preempting = [
            (one.name, one.grace_s, preempt_mode(one, cluster)) for one in cluster.qos if one.name == slurm.qos
        ]
    for name, grace_s, mode in preempting:
        if mode in ("REQUEUE", "CANCEL"):
            seconds = grace_s + cluster.kill_wait_s
            warnings[f"the {seconds} s that {name} gives when it preempts"] = seconds
    return warnings


def save_finding(warnings: Mapping[str, int], timing: BlockTiming) -> Finding:
    """The run's slowest save and a step against the shortest of these warnings, in seconds."""
    about = "saving in time"
    window, shortest_s = min(warnings.items(), key=lambda item: item[1])
    if not timing.save_s:
        return fine(about, f"no save was measured yet; {window} must do", "ask again after the first checkpoint")
    needed_s = timing.save_s + (timing.step_s or 0)
    found = f"a save took up to {timing.save_s:.3g} s" + (f", a step {timing.step_s:.3g} s" if timing.step_s else "")
    if needed_s > shortest_s:
        return problem(
            about, f"{found}: more than {window}",
            "set training.save_every so short that what is lost hurts little, or choose another slurm.partition",
        )  # fmt: skip
    return fine(about, f"{found}: within {window}", "a block that is warned loses nothing")


def settings_findings(file: Path, overrides: Sequence[str], runs: Path) -> Iterator[Finding]:
    """What `check` finds wrong with the file, and the disk that its checkpoints need."""
    try:
        checked = check_run(file, overrides)
    except ConfigError as error:
        for wrong in error.problems:
            yield problem("settings", str(wrong), "mend the file; ./train.sh check says the same")
        return
    yield fine("settings", f"{file} is fine", "./train.sh plan shows blocks, steps and costs")
    all_bytes = checkpoint_bytes(checked, count_parameters(checked.config.model.name))
    one_bytes = all_bytes // (checked.config.training.keep_checkpoints + 1) if all_bytes else None
    yield disk_finding(runs, CHECKPOINTS_THAT_MUST_FIT * one_bytes if one_bytes else None)
    if checked.config.distillation is not None:
        yield from distillation_findings(checked)


# A node, asked through a job of its own

PROBE = """
say() { if "${@:2}" >/dev/null 2>&1; then echo "$1=yes"; else echo "$1=no"; fi; }
echo "node=${SLURMD_NODENAME:-$HOSTNAME}"
say project test -r "$1/train.sh"
say runs test -w "$2"
say python "$3" -c pass
say scontrol scontrol show job "$SLURM_JOB_ID"
say sbatch sbatch --test-only --wrap=true
say sandbox env PYTHONPATH="$1" "$3" -c "from sandbox.python import run_tests; run_tests('', '')"
say internet "$3" -c "import os, urllib.request as u; u.urlopen(os.environ.get('HF_ENDPOINT', '$4'), timeout=10)"
"""
HUB = "https://huggingface.co"


def node_findings(slurm: SlurmConfig, runs: Path) -> Iterator[Finding]:
    """What a node sees, from one short job that is waited for at most NODE_WAIT_S."""
    # A file made here and found there: a folder of the same name would not show that it is shared.
    try:
        with tempfile.NamedTemporaryFile(dir=runs, prefix=".doctor-") as marker:
            done = subprocess.run(
                probe_command(slurm, Path(marker.name)), capture_output=True, text=True, timeout=NODE_WAIT_S + 60
            )
    except subprocess.TimeoutExpired:
        yield note("a node", "the job started and did not end", "look for a job baton-doctor with squeue --me")
        return
    if done.returncode != 0:
        words = "; ".join(line for line in done.stderr.splitlines() if "error" in line) or done.stderr.strip()
        yield note("a node", f"no answer: {words}", "try when nodes are free, or name slurm.partition in a FILE")
        return
    seen = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    yield from (judge(check, seen) for check in NODE_CHECKS)


def probe_command(slurm: SlurmConfig, marker: Path) -> list[str]:
    """srun for one small task where the run's jobs would go, at once or not at all."""
    asked = {
        "partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "constraint": slurm.constraint
    }  # fmt: skip
    return [
        "srun", "--ntasks=1", "--nodes=1", "--time=2", f"--immediate={NODE_WAIT_S}", "--job-name=baton-doctor",
        "--chdir=/", "--input=none", *(f"--{option}={value}" for option, value in asked.items() if value),
        "bash", "-c", PROBE, "doctor", str(PROJECT), str(marker), sys.executable, HUB,
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NodeCheck:
    """A question to a node, and what follows from either answer."""

    key: str
    what: str
    if_yes: str
    if_no: str
    level_if_no: Level


NODE_CHECKS = (
    NodeCheck(key="project", what="the project's folder", level_if_no="note",
              if_yes="the setup lines of a job may use files of it", if_no="jobs run the copy in the run folder"),
    NodeCheck(key="runs", what="the runs folder, to write in", level_if_no="problem",
              if_yes="checkpoints and logs land where you see them", if_no="name a shared folder as runs_dir"),
    NodeCheck(key="python", what="the interpreter", level_if_no="problem",
              if_yes="jobs run in this environment", if_no="put the environment on a shared disk (BATON_VENV)"),
    NodeCheck(key="scontrol", what="scontrol inside a job", level_if_no="note",
              if_yes="an interrupted block can queue itself again", if_no="the next block goes on instead"),
    NodeCheck(key="sbatch", what="sbatch inside a job", level_if_no="note",
              if_yes="jobs may submit jobs", if_no="everything is submitted from here; run the file again to add jobs"),
    NodeCheck(key="sandbox", what="what protects it from code that a model wrote", level_if_no="note",
              if_yes="answers that are code can be run to score them",
              if_no="answers that are code are not run, unless evaluation.unprotected_code says so"),
    NodeCheck(key="internet", what="the hub over the internet", level_if_no="note",
              if_yes="models and data can be fetched in jobs",
              if_no="fetch the model here first and use --prepare-here"),
)  # fmt: skip


def judge(check: NodeCheck, seen: dict[str, str]) -> Finding:
    """One answer of a node."""
    about = f"node {seen.get('node', '?')}"
    if seen.get(check.key) == "yes":
        return fine(about, f"has {check.what}", check.if_yes)
    return Finding(about=about, level=check.level_if_no, found=f"lacks {check.what}", advice=check.if_no)
