"""Processes of a block on this machine, which meet over gloo and stay up between what they are asked to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from trained_runs import processes_that_start_fast

OnRanks = Callable[..., list[object]]
"""on_ranks(function, ...): what it returns on each of them."""


@contextmanager
def started_ranks(number: int) -> Iterator[OnRanks]:
    """So many processes, until the end of the context."""
    ranks = [ProcessPoolExecutor(1, mp_context=processes_that_start_fast()) for _ in range(number)]

    def run(function: Callable[..., object], *arguments: object) -> list[object]:
        futures = [pool.submit(as_rank, rank, number, function, *arguments) for rank, pool in enumerate(ranks)]
        return [future.result(timeout=200) for future in futures]

    yield run
    for pool in ranks:
        pool.shutdown()


def as_rank(rank: int, number: int, function: Callable[..., object], *arguments: object) -> object:
    import torch

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(number), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    return function(*arguments)
