"""What a job's exit status tells the chain."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The codes that mean something; anything else is a crash, which the next block makes good."""

    DONE = 0
    BAD_INPUT = 64
    LOSS_NOT_FINITE = 65
    STOPPED_EARLY = 75
    NO_VALID_CHECKPOINT = 76

    @property
    def halts(self) -> bool:
        """Whether another try would end the same way."""
        return self in (ExitCode.BAD_INPUT, ExitCode.LOSS_NOT_FINITE, ExitCode.NO_VALID_CHECKPOINT)


CRASHED = 1
