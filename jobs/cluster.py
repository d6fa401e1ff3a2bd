"""What Slurm says of itself: version, settings, partitions, nodes and limits, as its own commands print them."""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from dataclasses import dataclass

ASK_TIMEOUT_S = 60

SIGNAL_EARLY_S = 30
"""How much earlier than asked Slurm may send the signal before the time limit."""

NODE_FORMAT = "%R|%G|%D|%c|%m"
ASSOCIATION_FORMAT = "Account,Partition,QOS,MaxSubmit"
QOS_FORMAT = "Name,GraceTime,PreemptMode,MaxSubmitPU"


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One partition, as `scontrol show partition` has it."""

    name: str
    is_default: bool
    state: str
    max_minutes: int | None
    """Longest time limit of a job; None where there is none."""

    grace_s: int
    preempt_mode: str


@dataclass(frozen=True, kw_only=True)
class NodeKind:
    """Nodes of one partition that are alike."""

    partition: str
    gpu_type: str | None
    gpus: int
    num_nodes: int
    cores: int
    memory_mib: int


@dataclass(frozen=True, kw_only=True)
class Qos:
    """One quality of service."""

    name: str
    grace_s: int
    preempt_mode: str
    max_submit: int | None
    """Jobs of one user, queued and running."""


@dataclass(frozen=True, kw_only=True)
class Association:
    """One account that this user may charge."""

    account: str
    partition: str | None
    qos: tuple[str, ...]
    max_submit: int | None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A whole cluster. Everything but the version is empty where its controller does not answer."""

    version: str
    silence: str | None
    """What the commands said instead of an answer; None where the controller answers."""

    settings: dict[str, str]
    partitions: list[Partition]
    nodes: list[NodeKind]
    associations: list[Association]
    qos: list[Qos]

    @property
    def release(self) -> tuple[int, int]:
        """Year and month of the controller's release, else of the commands here: what Slurm calls a major version."""
        year, month = re.findall(r"\d+", self.settings.get("SLURM_VERSION", self.version))[:2]
        return int(year), int(month)

    @property
    def kill_wait_s(self) -> int:
        return number(self.settings["KillWait"])

    @property
    def parameters(self) -> set[str]:
        """The words of SlurmctldParameters and PreemptParameters."""
        lists = (self.settings.get(key, "") for key in ("SlurmctldParameters", "PreemptParameters"))
        return {word.strip().lower() for text in lists for word in text.split(",")}


def read_cluster() -> Cluster:
    """Ask Slurm for everything. A controller that does not answer is part of the answer."""
    version = ask("scontrol", "--version")[0]
    try:
        return Cluster(
            version=version,
            silence=None,
            settings=parse_settings(answer("scontrol", "show", "config")),
            partitions=read_partitions(),
            nodes=parse_nodes(answer("sinfo", "--noheader", f"--format={NODE_FORMAT}")),
            associations=parse_associations(ask_accounting("assoc", f"user={getpass.getuser()}", ASSOCIATION_FORMAT)),
            qos=parse_qos(ask_accounting("qos", QOS_FORMAT)),
        )
    except SilentControllerError as error:
        return Cluster(
            version=version, silence=str(error), settings={}, partitions=[], nodes=[], associations=[], qos=[]
        )


def read_partitions() -> list[Partition]:
    """The partitions.

    Raises:
        SilentControllerError: with the command's own words.
    """
    return parse_partitions(answer("scontrol", "show", "partition", "--oneliner"))


class SilentControllerError(RuntimeError):
    """The controller does not answer."""


def answer(*command: str) -> str:
    text, error = ask(*command)
    if error is not None:
        raise SilentControllerError(error)
    return text


def ask(*command: str) -> tuple[str, str | None]:
    """What a command prints, and its complaint where it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "", f"{command[0]} gave no answer within {ASK_TIMEOUT_S} s"
    return done.stdout.strip(), None if done.returncode == 0 else done.stderr.strip() or f"{command[0]} failed"


def ask_accounting(what: str, *options: str) -> str:
    """What sacctmgr knows; nothing where there is no accounting to ask."""
    if shutil.which("sacctmgr") is None:
        return ""
    *where, columns = options
    return ask("sacctmgr", "--noheader", "--parsable2", "show", what, *where, f"format={columns}")[0]


def parse_settings(text: str) -> dict[str, str]:
    """`scontrol show config`, the section on cgroups included; unset values are empty."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): "" if value.strip() == "(null)" else value.strip() for key, _, value in pairs}


def parse_partitions(text: str) -> list[Partition]:
    """`scontrol show partition --oneliner`, a partition a line."""
    partitions = []
    for line in text.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        partitions.append(
            Partition(
                name=fields["PartitionName"],
                is_default=fields["Default"] == "YES",
                state=fields["State"],
                max_minutes=partition_minutes(fields["MaxTime"]),
                grace_s=number(fields["GraceTime"]),
                preempt_mode=fields["PreemptMode"],
            )
        )
    return partitions


def parse_nodes(text: str) -> list[NodeKind]:
    """sinfo's lines in NODE_FORMAT."""
    nodes = []
    for line in text.splitlines():
        partition, gres, num_nodes, cores, memory = line.split("|")
        gpu = re.search(r"\bgpu(?::(?P<type>[A-Za-z_][\w.-]*))?:(?P<count>\d+)", gres)
        nodes.append(
            NodeKind(
                partition=partition,
                gpu_type=gpu["type"] if gpu else None,
                gpus=int(gpu["count"]) if gpu else 0,
                num_nodes=int(num_nodes),
                cores=number(cores),  # "64+" where nodes differ
                memory_mib=number(memory),
            )
        )
    return nodes


def parse_associations(text: str) -> list[Association]:
    """sacctmgr's lines in ASSOCIATION_FORMAT."""
    rows = (line.split("|") for line in text.splitlines())
    return [
        Association(account=account, partition=partition or None, qos=tuple(filter(None, qos.split(","))),
                    max_submit=int(max_submit) if max_submit else None)
        for account, partition, qos, max_submit in rows
    ]  # fmt: skip


def parse_qos(text: str) -> list[Qos]:
    """sacctmgr's lines in QOS_FORMAT."""
    rows = (line.split("|") for line in text.splitlines())
    return [
        Qos(name=name, grace_s=clock_seconds(grace), preempt_mode=mode,
            max_submit=int(max_submit) if max_submit else None)
        for name, grace, mode, max_submit in rows
    ]  # fmt: skip


def partition_minutes(text: str) -> int | None:
    """A partition's time limit in minutes, rounded up; None where there is no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes + (seconds > 0)


def clock_seconds(text: str) -> int:
    """HH:MM:SS in seconds; 0 where nothing is set."""
    seconds = 0
    for part in re.findall(r"\d+", text):
        seconds = seconds * 60 + int(part)
    return seconds


def number(text: str) -> int:
    """The number at the start of a value such as `30 sec`."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0
