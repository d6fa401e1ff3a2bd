"""Requests to stop: what Slurm, or a person, sends to a job, and where in the job it takes effect.

Where nothing needs to be saved (while loading, in evaluation) the first signal ends the job at once, by an exception.
While `deferred`, in training, it only sets a flag that is looked at between micro-batches. Later signals do nothing.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
"""Preemption and cancellation; the warning before the time limit; the keyboard; the end of the terminal."""


class StopRequested(BaseException):
    """The job was asked to stop. No Exception, so that no library takes it for an error of its own."""


class StopSignals:
    """The first stop signal of this process, and when it came."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.received_at_s: float | None = None
        self.is_armed = False
        """Whether a signal raises StopRequested where the process is, instead of only being noted."""

        self.process = os.getpid()

    def install(self) -> None:
        """Handle STOP_SIGNALS from here on, also those that came while they were blocked. For the main thread.

        What this process was started to ignore, as under nohup, it ignores.
        """
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.note)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it before every other signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler. Data loading workers inherit it; they end with the process that started them."""
        if os.getpid() != self.process or self.received is not None:
            return
        self.received, self.received_at_s = signal.Signals(number), time.time()
        if self.is_armed:
            raise StopRequested

    def arm(self) -> None:
        """Let signals end what follows by StopRequested; one that has come already does so now."""
        self.is_armed = True
        if self.received is not None:
            raise StopRequested

    def disarm(self) -> None:
        """Only note signals from here on."""
        self.is_armed = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block finish what it must save; a signal that came meanwhile raises StopRequested at its end."""
        self.disarm()
        yield
        self.arm()


class StopPoll:
    """Whether training shall end: a stop signal has come, or the user has put a STOP file into the run folder."""

    def __init__(self, signals: StopSignals, stop_file: Path) -> None:
        self.signals = signals
        self.stop_file = stop_file
        self.looked_at_s = 0.0
        self.file_exists = False

    def is_requested(self) -> bool:
        """Cheap enough for every micro-batch: the file system, maybe a network away, is asked once a second."""
        if time.monotonic() - self.looked_at_s > 1:
            self.looked_at_s = time.monotonic()
            self.file_exists = self.stop_file.exists()
        return self.file_exists or self.signals.received is not None


def ignore_stop_signals() -> None:
    """For the rest of the process: Python restores the default actions while it shuts down, and those would kill it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
