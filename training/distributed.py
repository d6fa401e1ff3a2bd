"""The processes of one block, a process per GPU: who they are, how they meet, how they agree."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mixture.whole_files import write_whole

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

T = TypeVar("T")

JOIN_TIMEOUT_S = 600
COLLECTIVE_TIMEOUT_S = 1800


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the processes of the block."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def of_environment(cls) -> Ranks:
        """As torchrun (RANK, ...) or an srun step (SLURM_PROCID, ...) says; one process where neither does."""
        environ = os.environ
        if "RANK" in environ:
            world_size = int(environ["WORLD_SIZE"])
            return cls(
                rank=int(environ["RANK"]),
                world_size=world_size,
                local_rank=int(environ["LOCAL_RANK"]),
                local_world_size=int(environ.get("LOCAL_WORLD_SIZE", world_size)),
            )
        # Not SLURM_NTASKS: a batch script sees it too, without being one of the tasks.
        if "SLURM_STEP_NUM_TASKS" in environ:
            tasks_per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", environ["SLURM_STEP_NUM_TASKS"])
            return cls(
                rank=int(environ["SLURM_PROCID"]),
                world_size=int(environ["SLURM_STEP_NUM_TASKS"]),
                local_rank=int(environ["SLURM_LOCALID"]),
                local_world_size=tasks_on_node(tasks_per_node, int(environ.get("SLURM_NODEID", "0"))),
            )
        return cls()


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Read Slurm's shorthand: "2(x3),1" is 2 tasks on each of three nodes, then 1 on the fourth."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        tasks, _, repeats = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(repeats or 1)
    return counts[node]


def join_ranks(folder: Path, ranks: Ranks) -> None:
    """Meet the other processes of the block; nothing to do where there is one. `folder` is shared by all of them.

    Tensors on the CPU travel over gloo and those on GPUs over NCCL. CUDA_VISIBLE_DEVICES is left as it is.
    """
    if ranks.world_size == 1:
        return
    import torch
    from torch import distributed

    if distributed.is_initialized():
        return
    store = publish_store(folder, ranks) if ranks.is_main else find_store(folder, ranks)
    local_rank = ranks.local_rank
    if torch.cuda.is_available():
        # Where Slurm shows each task one GPU only, that one is device 0 for every task.
        local_rank = 0 if torch.cuda.device_count() == 1 else local_rank
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(
        backend,
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    distributed.monitored_barrier() if backend == "gloo" else distributed.barrier()
    if ranks.is_main:
        rendezvous_file(folder).unlink(missing_ok=True)
    # accelerate, inside transformers.Trainer, reads who we are from here.
    os.environ.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world_size),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(ranks.local_world_size),
        MASTER_ADDR=store.host,
        MASTER_PORT=str(store.port),
    )


def publish_store(folder: Path, ranks: Ranks) -> TCPStore:
    """Rank 0's store, on a port that the kernel chose, so that two jobs on one node never collide."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    is_one_node = ranks.local_world_size == ranks.world_size
    # srun starts on the first node of a batch job, where rank 0 runs: the address that the other nodes can reach.
    address = "127.0.0.1" if is_one_node else os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or socket.gethostname()
    rendezvous_file(folder).unlink(missing_ok=True)
    store = TCPStore(address, 0, ranks.world_size, is_master=True, wait_for_workers=False)
    write_whole(rendezvous_file(folder), f"{address} {store.port}".encode(), synced=True)
    return store


def find_store(folder: Path, ranks: Ranks) -> TCPStore:
    """Rank 0's store, once rank 0 has published it. A file left by a killed launch points nowhere and is read again."""
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while time.monotonic() < deadline:
        if rendezvous_file(folder).exists():
            address, port = rendezvous_file(folder).read_text().split()
            try:
                return TCPStore(address, int(port), ranks.world_size, timeout=timedelta(seconds=10))
            except DistError:
                continue
        time.sleep(0.05)
    raise TimeoutError(f"rank 0 published no address in {rendezvous_file(folder)} within {JOIN_TIMEOUT_S} s")


def rendezvous_file(folder: Path) -> Path:
    """One for each start of the processes: job, step and restart on Slurm, else the process that launched them."""
    environ = os.environ
    if "SLURM_JOB_ID" in environ:
        launch = [environ["SLURM_JOB_ID"], environ.get("SLURM_STEP_ID", "0"), environ.get("SLURM_RESTART_COUNT", "0")]
    else:
        launch = ["local", str(os.getppid())]
    return folder / f".rendezvous-{'-'.join(launch)}"


def agree_on_any(*flags: bool) -> list[bool]:
    """For each flag, whether any process has it set; the same answer on every process."""
    from torch import distributed, tensor, uint8

    if not distributed.is_initialized():
        return list(flags)
    votes = tensor(flags, dtype=uint8)
    distributed.all_reduce(votes, op=distributed.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def from_main(value: T) -> T:
    """Rank 0's value, on every process."""
    from torch import device, distributed

    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0, device=device("cpu"))
    return values[0]


@contextmanager
def failing_together() -> Iterator[None]:
    """Run a step that all processes must finish: return once all have, or raise on every one where it failed on any."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    (anyone_failed,) = agree_on_any(error is not None)
    if error:
        raise error
    if anyone_failed:
        raise RuntimeError("it failed on another process of the block, whose log says why")


def sum_over_ranks(*values: float) -> list[float]:
    """The sum of each value over all processes; the same on every process."""
    from torch import distributed, float64, tensor

    if not distributed.is_initialized():
        return list(values)
    sums = tensor(values, dtype=float64)
    distributed.all_reduce(sums)
    return [float(value) for value in sums.tolist()]


def gather_on_all(value: T) -> list[T]:
    """Every process's value, by rank, on every process."""
    from torch import distributed

    if not distributed.is_initialized():
        return [value]
    values: list[T] = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
