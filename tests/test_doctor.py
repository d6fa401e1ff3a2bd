"""The doctor reads what Slurm prints, in several versions of it, and says what it means for a chain."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from jobs import doctor
from jobs.cluster import (
    Association,
    Cluster,
    NodeKind,
    parse_associations,
    parse_nodes,
    parse_partitions,
    parse_qos,
    parse_settings,
    partition_minutes,
)
from jobs.config import PROJECT, RunConfig, SlurmConfig, read_run_config
from jobs.doctor import (
    NODE_CHECKS,
    Finding,
    cluster_findings,
    judge,
    node_findings,
    run_findings,
    save_finding,
    submit_limit,
    warnings_s,
)
from jobs.triage import BlockTiming
from sandbox.python import missing_protection
from training.config import SaveInterval
from training.run_folder import append_line

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster

pytest_plugins = ["slurm_cluster"]

# Slurm 22.05.8 as tests/cluster brings it up, word for word.
CONFIG_22_05 = (Path(__file__).parent / "slurm_22_05_config.txt").read_text()
PARTITIONS_22_05 = (
    "PartitionName=gpucluster AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A "
    "DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=10 Hidden=NO MaxNodes=UNLIMITED MaxTime=04:00:00 "
    "MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=node[1-2] PriorityJobFactor=1 PriorityTier=1 RootOnly=NO "
    "ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=REQUEUE State=UP TotalCPUs=8 TotalNodes=2 "
    "SelectTypeParameters=NONE JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED "
    "TRES=cpu=8,mem=16000M,node=2,billing=8,gres/gpu=4\n"
    "PartitionName=urgent AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=NO QoS=N/A "
    "DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED "
    "MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=node[1-2] PriorityJobFactor=1 PriorityTier=10 RootOnly=NO "
    "ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=OFF State=UP TotalCPUs=8 TotalNodes=2 "
    "SelectTypeParameters=NONE JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED "
    "TRES=cpu=8,mem=16000M,node=2,billing=8,gres/gpu=4"
)
# 23.02 renamed the user's signal; a cluster that preempts by QOS, binds devices and keeps no accounts.
CONFIG_23_02 = """\
Configuration data as of 2024-08-19T19:08:02
AccountingStorageType   = accounting_storage/none
AuthInfo                = (null)
JobRequeue              = 0
KillWait                = 30 sec
MinJobAge               = 300 sec
OverTimeLimit           = 5 min
PreemptMode             = REQUEUE
PreemptParameters       = send_user_signal,reclaim_licenses
PreemptType             = preempt/qos
SLURM_VERSION           = 23.02.7
SlurmctldParameters     = (null)

Cgroup Support Configuration:
ConstrainCores          = yes
ConstrainDevices        = yes

Slurmctld(primary) at login is UP
"""
# 25.11 prints (null) where older ones name a plugin that does nothing, and has a requeue delay of its own.
CONFIG_25_11 = """\
AccountingStorageType   = (null)
AuthInfo                = cred_expire=60
JobRequeue              = 1
KillWait                = 30 sec
MinJobAge               = 300 sec
OverTimeLimit           = 0 min
PreemptMode             = OFF
PreemptParameters       = (null)
PreemptType             = (null)
SLURM_VERSION           = 25.11.4
SchedulerParameters     = bf_interval=30,requeue_delay=15
SlurmctldParameters     = (null)
"""
PARTITIONS_25_11 = (
    "PartitionName=cpu AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A "
    "DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO ExclusiveTopo=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED "
    "MaxTime=7-00:00:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED MaxCPUsPerSocket=UNLIMITED NodeSets=cpu_nodes "
    "Nodes=c[1-2] PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE "
    "PreemptMode=OFF State=DRAIN TotalCPUs=24 TotalNodes=2 SelectTypeParameters=NONE JobDefaults=(null) "
    "DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED TRES=cpu=24,mem=15674M,node=2,billing=24"
)


def cluster(version: str, config: str, partitions: str = PARTITIONS_22_05, **known: Any) -> Cluster:
    parts: dict[str, Any] = {"nodes": parse_nodes("gpucluster|gpu:2|2|4|8000"), "associations": [], "qos": []}
    return Cluster(
        version=version,
        silence=None,
        settings=parse_settings(config) | {"SLURM_VERSION": version.split()[-1]},
        partitions=parse_partitions(partitions),
        **(parts | known),
    )


def debian_22_05(**known: Any) -> Cluster:
    return cluster("slurm-wlm 22.05.8", CONFIG_22_05, **known)


def findings_of(cluster: Cluster) -> Iterator[Finding]:
    """For jobs with default settings."""
    return cluster_findings(cluster, SlurmConfig())


def finding(findings: Any, about: str) -> Finding:
    (one,) = [found for found in findings if found.about == about]
    return one


# Reading


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("04:00:00", 240), ("1-00:00:00", 1440), ("30:00", 30), ("00:00:30", 1), ("infinite", None), ("UNLIMITED", None)],
)
def test_partition_limits_are_read_as_slurm_writes_them(text: str, minutes: int | None) -> None:
    assert partition_minutes(text) == minutes


def test_the_settings_of_a_real_cluster_are_read() -> None:
    settings = parse_settings(CONFIG_22_05)
    assert (settings["KillWait"], settings["PreemptType"]) == ("3 sec", "preempt/partition_prio")
    assert settings["Epilog"] == "" and settings["PowerPlugin"] == ""
    assert settings["AuthInfo"] == "socket=/tmp/baton-cluster/munge/socket,cred_expire=5"


@pytest.mark.parametrize(
    ("gres", "gpu_type", "gpus"),
    [
        ("gpu:2", None, 2),
        ("gpu:a100:4(S:0-1)", "a100", 4),
        ("lscratch:1T,gpu:nvidia_h100_80gb_hbm3:8(S:0-1)", "nvidia_h100_80gb_hbm3", 8),
        ("(null)", None, 0),
    ],
)
def test_gpus_are_read_from_the_resources_of_a_node(gres: str, gpu_type: str | None, gpus: int) -> None:
    assert parse_nodes(f"main|{gres}|3|64+|512000+") == [
        NodeKind(partition="main", gpu_type=gpu_type, gpus=gpus, num_nodes=3, cores=64, memory_mib=512000)
    ]


def test_limits_are_read_as_sacctmgr_prints_them() -> None:
    associations = parse_associations("lab||normal,long|20\nother|gpu|normal|")
    assert associations[0] == Association(account="lab", partition=None, qos=("normal", "long"), max_submit=20)
    qos = parse_qos("normal|00:00:00|cluster|\nlong|00:02:00|requeue|8")
    assert (qos[1].grace_s, qos[1].max_submit) == (120, 8)
    limited = debian_22_05(associations=associations, qos=qos)
    assert submit_limit(limited, SlurmConfig()) == 8
    assert submit_limit(limited, SlurmConfig(account="other")) is None
    assert submit_limit(limited, SlurmConfig(account="lab", qos="normal")) == 20


# What it means


def test_a_preempting_partition_tells_its_real_warning() -> None:
    found = finding(findings_of(debian_22_05()), "partition gpucluster (default)")
    assert found.level == "note"
    assert "at least 13 s from the warning to the kill (grace 10 s, often some more, then KillWait 3 s)" in found.found
    assert "not preempted" in finding(findings_of(debian_22_05()), "partition urgent").found


def test_the_option_for_the_own_signal_is_found_under_both_its_names() -> None:
    assert "USR2 first (preempt_send_user_signal)" in finding(findings_of(debian_22_05()), "signals").found
    renamed = cluster("slurm 23.02.7", CONFIG_23_02)
    assert "USR2 first (send_user_signal)" in finding(findings_of(renamed), "signals").found
    unset = cluster("slurm 25.11.4", CONFIG_25_11)
    assert "get TERM" in finding(findings_of(unset), "signals").found


def test_preemption_by_qos_takes_the_grace_of_the_qos() -> None:
    qos = parse_qos("normal|00:02:00|cluster|\nscavenger|00:00:00|cancel|\nfrozen|00:00:00|suspend|")
    findings = list(findings_of(cluster("slurm 23.02.7", CONFIG_23_02, qos=qos)))
    assert "at least 150 s" in finding(findings, "QOS normal").found
    assert finding(findings, "QOS normal").level == "fine"
    assert (
        "30 s" in finding(findings, "QOS scavenger").found and "cancelled" in finding(findings, "QOS scavenger").found
    )
    assert "frozen" in finding(findings, "QOS frozen").found
    assert "not preempted" in finding(findings, "partition gpucluster (default)").found


@pytest.mark.parametrize(
    ("config", "version", "delay_s"),
    [(CONFIG_22_05, "slurm-wlm 22.05.8", 6), (CONFIG_23_02, "slurm 23.02.7", 121), (CONFIG_25_11, "slurm 25.11.4", 15),
     (CONFIG_25_11.replace("requeue_delay=15", ""), "slurm 25.11.4", 61),
     (CONFIG_25_11.replace("cred_expire=60", "cred_expire=3"), "slurm 25.05.1", 121)],
)  # fmt: skip
def test_the_delay_of_a_requeued_job_is_known(config: str, version: str, delay_s: int) -> None:
    found = finding(findings_of(cluster(version, config)), "requeue")
    assert f"after {delay_s} s" in found.found
    assert found.level == ("note" if "JobRequeue              = 0" in config else "fine")


@pytest.mark.parametrize(
    ("version", "level"),
    [("slurm 21.08.5", "fine"), ("slurm-wlm 22.05.8", "note"), ("slurm 23.02.7", "note"), ("slurm 23.11.4", "fine")],
)
def test_srun_forgets_the_cores_of_a_job_in_some_versions_only(version: str, level: str) -> None:
    assert finding(findings_of(cluster(version, CONFIG_22_05)), "cores").level == level


def test_time_limit_accounting_and_binding_are_told() -> None:
    findings = list(findings_of(cluster("slurm 23.02.7", CONFIG_23_02)))
    limit = finding(findings, "time limit").found
    assert (
        limit
        == "USR2 120 s before it, or up to 30 s earlier; TERM at it (5 min later, by OverTimeLimit), KILL 30 s later"
    )
    assert finding(findings, "accounting").found == "off: sacct knows nothing, squeue knows ended jobs for 300 s"
    assert finding(findings, "GPUs").found.endswith("a job sees only its own, numbered from 0 (ConstrainDevices)")
    newest = list(findings_of(cluster("slurm 25.11.4", CONFIG_25_11, PARTITIONS_25_11, nodes=[])))
    assert finding(newest, "accounting").level == "note"
    assert finding(newest, "GPUs").found == "Slurm hands out none (no gres/gpu)"
    assert finding(newest, "partition cpu (default)").found == "up to 10080 min; it is DRAIN"


def test_a_partition_of_several_gpu_types_is_told() -> None:
    nodes = parse_nodes("main|gpu:a100:4|2|64|512000\nmain|gpu:h100:8|1|96|1024000\nother|gpu:2|1|8|8000")
    found = finding(findings_of(debian_22_05(nodes=nodes)), "GPUs")
    assert found.level == "note" and found.advice.startswith("main: a chain that changes the type")


# A run on a cluster


def run_config(*overrides: str) -> RunConfig:
    return read_run_config(PROJECT / "configs/test.yaml", overrides)


def timing(save_s: float, step_s: float | None = 2.0) -> BlockTiming:
    interval = SaveInterval()
    return BlockTiming(
        start_s=10,
        step_s=step_s,
        save_s=save_s,
        saved=True,
        limit_s=3600,
        warning_s=120,
        save_interval=interval,
        block_steps=None,
    )


def test_a_save_that_takes_longer_than_the_warning_is_a_problem() -> None:
    preempted = warnings_s(SlurmConfig(), debian_22_05())
    assert save_finding(preempted, timing(10.5)).level == "fine"
    slow = save_finding(preempted, timing(11.5))
    assert slow.level == "problem"
    assert slow.found.startswith("a save took up to 11.5 s, a step 2 s: more than the 13 s that gpucluster gives")
    assert "no save was measured yet" in save_finding(preempted, timing(0)).found


def test_each_warning_that_a_run_may_get_counts() -> None:
    assert sorted(warnings_s(SlurmConfig(partition="gpucluster,urgent"), debian_22_05()).values()) == [13, 120]
    assert list(warnings_s(SlurmConfig(partition="urgent"), debian_22_05()).values()) == [120]
    by_qos = cluster("slurm 23.02.7", CONFIG_23_02, qos=parse_qos("normal|00:00:20|cluster|"))
    assert sorted(warnings_s(SlurmConfig(qos="normal"), by_qos).values()) == [50, 120]


def test_a_device_picked_by_hand_fights_a_cluster_that_hands_out_gpus() -> None:
    config = run_config("--slurm.gpu_id", "1")
    assert finding(run_findings(config, debian_22_05(), timing(1)), "slurm.gpu_id").level == "problem"
    assert not [one for one in run_findings(config, debian_22_05(nodes=[]), timing(1)) if one.about == "slurm.gpu_id"]


def test_a_chain_longer_than_the_limit_on_queued_jobs_is_told() -> None:
    limited = debian_22_05(associations=parse_associations("lab|||8"))
    config = run_config("--training.total_jobs", "10")
    assert "12 jobs, and 8 may be queued" in finding(run_findings(config, limited, timing(1)), "submission").found


def test_what_a_node_lacks_is_judged_by_what_it_breaks() -> None:
    seen = {"node": "node7", "project": "no", "runs": "no", "python": "no", "sbatch": "yes", "internet": "no"}
    levels = {check.key: judge(check, seen).level for check in NODE_CHECKS}
    assert levels == {"project": "note", "runs": "problem", "python": "problem", "scontrol": "note", "sbatch": "fine",
                      "sandbox": "note", "internet": "note"}  # fmt: skip


# The command


def ask_doctor(*arguments: str, **environment: str) -> tuple[int, list[dict[str, str]]]:
    answer = subprocess.run(
        [sys.executable, "-m", "jobs", "doctor", "--json", *arguments],
        cwd=PROJECT, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert answer.stdout, answer.stderr
    return answer.returncode, json.loads(answer.stdout)


def test_without_slurm_it_says_so_and_looks_at_this_machine(tmp_path: Path) -> None:
    code, findings = ask_doctor(PATH=str(tmp_path))
    assert code == 0
    assert [found["about"] for found in findings] == ["Slurm", "this machine", "disk"]
    assert findings[0]["found"] == "no cluster: there is no sbatch on the PATH"
    assert " cores, " in findings[1]["found"]


def test_what_is_wrong_with_a_file_is_a_problem_too(tmp_path: Path) -> None:
    arguments = [
        str(PROJECT / "configs/test.yaml"),
        "--model.name",
        "no/such-model/at-all",
        "--runs_dir",
        str(tmp_path),
    ]
    code, findings = ask_doctor(*arguments, PATH=str(tmp_path), HF_HUB_OFFLINE="1")
    assert code == 1
    (wrong,) = [found for found in findings if found["level"] == "problem"]
    assert "no/such-model/at-all" in wrong["found"]


def test_a_disk_that_holds_no_two_checkpoints_is_a_problem(tmp_path: Path) -> None:
    assert doctor.disk_finding(tmp_path, 10**18).level == "problem"
    assert doctor.disk_finding(tmp_path, 10**3).level == "fine"


def test_it_imports_no_torch() -> None:
    program = "import sys, jobs.doctor, jobs.triage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=PROJECT).returncode == 0


@pytest.mark.cluster
def test_a_real_cluster_and_its_nodes_are_examined(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    append_line(tmp_path / "test/events.jsonl", {"time": time.time(), "event": "checkpoint", "seconds": 14.0})
    code, findings = ask_doctor(
        str(PROJECT / "configs/test.yaml"), "--runs_dir", str(tmp_path), "--slurm.time", "5:00:00", "--on-node",
        SLURM_CONF=str(slurm.folder / "slurm.conf"),
    )  # fmt: skip
    assert code == 1
    by_level = {level: [found for found in findings if found["level"] == level] for level in ("problem", "fine")}
    assert [found["about"] for found in by_level["problem"]] == ["saving in time", "settings"]
    assert "a save took up to 14 s: more than the 13 s that gpucluster gives" in by_level["problem"][0]["found"]
    assert "slurm.time is 300 min, and gpucluster allows 240 min" in by_level["problem"][1]["found"]
    node = {found["found"] for found in by_level["fine"] if found["about"] == "node node1"}
    assert node >= {"has the interpreter", "has the runs folder, to write in", "has scontrol inside a job",
                    "has sbatch inside a job"}  # fmt: skip
    protection = "what protects it from code that a model wrote"
    assert (f"has {protection}" in node) == (missing_protection() is None)
    assert list(tmp_path.iterdir()) == [tmp_path / "test"]


@pytest.mark.cluster
def test_a_node_that_is_busy_is_not_waited_for_longer_than_said(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "NODE_WAIT_S", 1)
    job = slurm.run("sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 60")
    slurm.wait_for_state(job, "RUNNING")
    (found,) = node_findings(SlurmConfig(), tmp_path)
    assert (found.level, found.about) == ("note", "a node")
    assert "Requested nodes are busy" in found.found
