"""The two-node Slurm of tests/cluster as the fixture `slurm`; load it with `pytest_plugins = ["slurm_cluster"]`.

pytest wants to load a plugin itself, so test modules import SlurmCluster, for annotations, under TYPE_CHECKING only.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "cluster"
IMPOSSIBLE_STATUS = 3


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster; SLURM_CONF points at it while a test uses it."""

    folder: Path

    def run(self, *command: str, timeout_s: float = 60) -> str:
        """Return what a Slurm command prints; fail with its own words when it fails."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def daemon(self, action: str, name: str) -> None:
        """Start, stop, kill, freeze or thaw a daemon, see tests/cluster/daemon."""
        self.run(str(SCRIPTS / "daemon"), action, name)

    def job_state(self, job_id: str) -> str:
        """Return the state squeue knows, in capitals; jobs that ended stay known for an hour."""
        return self.run("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job_id}")

    def wait_for_state(self, job_id: str, *states: str, timeout_s: float = 60) -> None:
        """Return as soon as the job is in one of these states."""
        deadline = time.monotonic() + timeout_s
        while (state := self.job_state(job_id)) not in states:
            assert time.monotonic() < deadline, (
                f"job {job_id} is {state} after {timeout_s} s, not {' or '.join(states)}"
            )
            time.sleep(0.2)


@pytest.fixture(scope="session")
def slurm_for_session() -> Iterator[SlurmCluster]:
    """Bring the cluster up, once. A cluster that BATON_CLUSTER names is its owner's, and stays up."""
    owned_elsewhere = "BATON_CLUSTER" in os.environ
    # Not below pytest's own folder, which only its user may enter: the database runs as another one.
    folder = Path(os.environ.get("BATON_CLUSTER") or tempfile.mkdtemp(prefix="baton-cluster-"))
    environment = os.environ | {"BATON_CLUSTER": str(folder)}
    up = subprocess.run([SCRIPTS / "up"], env=environment, capture_output=True, text=True, timeout=300)
    if up.returncode == IMPOSSIBLE_STATUS:
        pytest.skip(up.stderr.strip())
    assert up.returncode == 0, up.stderr
    yield SlurmCluster(folder)
    if not owned_elsewhere:
        subprocess.run([SCRIPTS / "down"], env=environment, check=True, capture_output=True, timeout=120)
        shutil.rmtree(folder)


@pytest.fixture
def slurm(slurm_for_session: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The cluster, all daemons up and no job of another test in it."""
    cluster = slurm_for_session
    monkeypatch.setenv("BATON_CLUSTER", str(cluster.folder))
    monkeypatch.setenv("SLURM_CONF", str(cluster.folder / "slurm.conf"))
    yield cluster
    cluster.run(str(SCRIPTS / "up"))
    remaining = cluster.run("squeue", "--noheader", "--format=%A").split()
    if remaining:
        cluster.run("scancel", *remaining)
    for job_id in remaining:
        cluster.wait_for_state(job_id, "CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")
