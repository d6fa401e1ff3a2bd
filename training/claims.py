"""Work in shards, a worker for each: a claim file is made exclusively, and taken over from a worker that is gone.

A claim saves work and keeps no data safe: shards are renamed into place whole, so a shard that two workers write by
mischance is only written twice.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import orjson

from training.owner import HEARTBEAT_EVERY_S, OwnerFacts, heart_beats, read_ticket


class InterruptedShardError(Exception):
    """The worker was asked to stop, or its shard was taken over."""


def work_on_shards(
    shards: Iterable[int],
    work: Callable[[int, Claim], None],
    *,
    done_file: Callable[[int], Path],
    is_done: Callable[[int], bool],
    stop_requested: Callable[[], bool],
) -> None:
    """Do the shards that nobody has done or is at, until none is left or the worker is asked to stop.

    `work` looks at its claim and at `stop_requested` from time to time, and leaves by InterruptedShardError.
    """
    for shard in shards:
        if stop_requested():
            return
        claim = Claim.take(done_file(shard).with_suffix(".claim"))
        if claim is None:
            continue
        try:
            if not is_done(shard):  # another worker may have finished it in between
                work(shard, claim)
        except InterruptedShardError:
            continue
        finally:
            claim.release()


class Claim:
    """This process's claim to a shard, until `release`; its modification time is the heartbeat."""

    def __init__(self, path: Path, facts: OwnerFacts) -> None:
        self.path = path
        self.facts = facts
        self.ended = threading.Event()
        threading.Thread(target=self.beat, daemon=True).start()

    @classmethod
    def take(cls, path: Path) -> Claim | None:
        """A claim at `path`, or None where another worker has it and lives."""
        facts = OwnerFacts.of_this_process()
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            if not is_stale(path):
                return None
            return cls.take_over(path, facts)
        with os.fdopen(descriptor, "wb") as file:
            file.write(orjson.dumps(facts))
        return cls(path, facts)

    @classmethod
    def take_over(cls, path: Path, facts: OwnerFacts) -> Claim | None:
        """The claim of a worker that is gone, unless another one is quicker; the last to rename has it."""
        mine = path.with_name(f".{path.name}.{facts.process}@{os.uname().nodename}")
        mine.write_bytes(orjson.dumps(facts))
        mine.rename(path)
        claim = cls(path, facts)
        if claim.is_held():
            return claim
        claim.ended.set()
        return None

    def beat(self) -> None:
        while not self.ended.wait(HEARTBEAT_EVERY_S):
            try:
                if not self.is_held():
                    return
                os.utime(self.path)
            except FileNotFoundError:  # released in between
                return

    def is_held(self) -> bool:
        """Whether no other worker has taken the shard meanwhile."""
        return read_ticket(self.path) == self.facts

    def release(self) -> None:
        """Give the shard up, done or not."""
        self.ended.set()
        if self.is_held():
            self.path.unlink(missing_ok=True)


def is_stale(path: Path) -> bool:
    """Whether the worker behind a claim is gone: by its process, its job or its heartbeat."""
    owner, mine = read_ticket(path), OwnerFacts.of_this_process()
    if owner is not None:
        # This process asks for a claim only when it holds none, so one in its name is that of its namesake before it.
        if (owner.host, owner.process) == (mine.host, mine.process):
            return True
        if owner.host == mine.host and not Path("/proc", str(owner.process)).exists():
            return True
        if owner.job is not None and owner.job == mine.job and owner.restart < mine.restart:
            return True
    return not heart_beats(path)
