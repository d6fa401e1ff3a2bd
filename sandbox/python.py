"""Python programs that nobody has read, tested in a process of their own that can do no harm."""

from __future__ import annotations

import marshal
import math
import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from sandbox import confinement
from sandbox.confinement import LACKS, READY

START_S = 120.0
"""For the interpreter to start, which on a busy shared file system takes long; the program's own time comes after."""

POLL_S = 0.05
MAX_ANSWER_BYTES = 4096

Outcome = Literal["passed", "failed", "out of time", "too much output", "too many bytes in files"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use."""

    time_s: float = 10.0
    """By the clock, and as much of one processor."""

    memory_bytes: int = 1 << 30
    """Address space, that of the interpreter included."""

    folder_bytes: int = 16 << 20
    """In the files of its folder; looked at twenty times a second."""

    output_bytes: int = 64 << 10


USUAL = Limits()


@dataclass(frozen=True)
class TestRun:
    """How a program did in its tests."""

    __test__ = False  # for pytest, which takes it for tests of ours

    outcome: Outcome
    output: str
    """What it printed, and the traceback of the error that ended it."""

    @property
    def passed(self) -> bool:
        """Whether program and tests ran to their end."""
        return self.outcome == "passed"


def run_tests(program: str, tests: str, *, limits: Limits = USUAL, unprotected: bool = False) -> TestRun:
    """Run a Python program and then its tests, in one namespace whose `__name__` is not `__main__`.

    It has passed only where a number that is made up for each run comes back once the last test is done, so that a
    program that leaves early has not. A program that searches its own process for that number finds it: this tells
    wrong answers from right ones, not forgers from honest ones.

    The process can:

    - read the standard library and installed packages, shared libraries and time zones, and change the files of a fresh
      folder, which is removed afterwards (Landlock, of Linux 5.13, by which names and sizes of other files can still be
      seen; where there is none, a file system of its own in a user namespace);
    - start threads; no processes, no programs, no sockets of any kind, so no asyncio either; send signals to nobody but
      itself (a seccomp filter that knows the system calls that are allowed);
    - use memory, processor time, files and output as `limits` say.

    Its environment holds nothing of ours, hashes of texts are the same in every run, and it ends with us.

    Raises:
        ValueError: this machine cannot protect itself so. With `unprotected`, the program runs with what protection
            there is.
    """
    nonce = secrets.token_hex(16)
    task = {
        "program": program,
        "tests": tests,
        "nonce": nonce,
        "cpu_s": math.ceil(limits.time_s),
        "memory_bytes": limits.memory_bytes,
        "folder_bytes": limits.folder_bytes,
        "readable": files_of_python(),
        "unprotected": unprotected,
        "parent": os.getpid(),
    }
    with tempfile.TemporaryDirectory(prefix="baton-sandbox-") as folder, tempfile.TemporaryFile() as task_file:
        marshal.dump(task, task_file)
        task_file.seek(0)
        answers, answers_of_child = os.pipe()
        with open(answers, "rb", buffering=0) as answer_pipe:  # noqa: PTH123
            try:
                process = subprocess.Popen(
                    [sys.executable, "-s", confinement.__file__, str(answers_of_child)],
                    stdin=task_file,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    bufsize=0,
                    cwd=folder,
                    env=environment(folder),
                    pass_fds=[answers_of_child],
                    start_new_session=True,
                )
            finally:
                os.close(answers_of_child)
            assert process.stdout is not None
            with process.stdout:
                watched = Watched(process, process.stdout, answer_pipe, Path(folder), limits)
                try:
                    outcome = watched.until_it_ends(nonce.encode())
                finally:
                    kill_group(process)
        if watched.answer.startswith(LACKS):
            raise ValueError(refusal(watched.answer.removeprefix(LACKS).decode()))
        if not watched.answer.startswith(READY):
            raise RuntimeError(f"no program could be run in the sandbox: {watched.text()}")
        return TestRun(outcome, watched.text())


def files_of_python() -> list[str]:
    """What a Python program reads: the standard library, installed packages, shared libraries, time zones."""
    folders = [sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [str(Path(sys.base_prefix) / "lib"), "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    folders += os.environ.get("LD_LIBRARY_PATH", "").split(":")
    files = ["/etc/ld.so.cache", "/etc/localtime", "/dev/urandom"]
    return [path for path in (*folders, *files) if path and Path(path).exists()]


def refusal(lacks: str) -> str:
    """What the user is told where the machine cannot protect itself."""
    return (
        "answers of a model are programs that nobody has read, and this machine cannot protect itself from them: it "
        f"lacks {lacks}. Evaluate on another machine, set evaluation.limit: 0, or set evaluation.unprotected_code: "
        "true to run them with what protection there is"
    )


def missing_protection() -> str | None:
    """Why this machine cannot run a program that nobody has read; None where it can."""
    try:
        run_tests("", "")
    except ValueError as error:
        return str(error)
    return None


def environment(folder: str) -> dict[str, str]:
    """All that the process is told: where shared libraries are, and what keeps its answers the same in every run."""
    libraries = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**libraries, **threads, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}


@dataclass
class Watched:
    """A process with what it has said so far."""

    process: subprocess.Popen[bytes]
    output_pipe: IO[bytes]
    answer_pipe: IO[bytes]
    folder: Path
    limits: Limits
    output: bytearray = field(default_factory=bytearray)
    answer: bytearray = field(default_factory=bytearray)

    def until_it_ends(self, nonce: bytes) -> Outcome:
        """Read what it says until it ends, or goes beyond a limit."""
        deadline = time.monotonic() + START_S
        with selectors.DefaultSelector() as selector:
            selector.register(self.output_pipe, selectors.EVENT_READ, self.output)
            selector.register(self.answer_pipe, selectors.EVENT_READ, self.answer)
            while selector.get_map():
                has_started = bool(self.answer)
                for key, _ in selector.select(POLL_S):
                    piece = os.read(key.fd, 1 << 16)
                    key.data.extend(piece)
                    if not piece:
                        selector.unregister(key.fileobj)
                if not has_started and self.answer:
                    deadline = time.monotonic() + self.limits.time_s
                if len(self.output) > self.limits.output_bytes or len(self.answer) > MAX_ANSWER_BYTES:
                    return "too much output"
                if bytes_in(self.folder) > self.limits.folder_bytes:
                    return "too many bytes in files"
                if time.monotonic() > deadline:
                    return "out of time"
        passed = self.process.wait() == 0 and self.answer == READY + nonce
        if self.process.returncode == -signal.SIGXCPU:
            return "out of time"
        return "passed" if passed else "failed"

    def text(self) -> str:
        """What it printed, as far as it is kept."""
        return self.output[: self.limits.output_bytes].decode(errors="replace")


def bytes_in(folder: Path) -> int:
    """Bytes in the files of a folder, each at least one page of a file system."""
    total = 0
    for entry in os.scandir(folder):
        try:
            total += max(4096, entry.stat(follow_symlinks=False).st_size)
        except FileNotFoundError:  # removed since
            continue
    return total


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started, and wait for it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


def code_of(answer: str) -> str:
    """The Python code of an answer: its first fenced block that says so, or that says nothing; without fences all."""
    blocks = [(language.lower(), code) for language, code in FENCE.findall(answer)]
    python = [code for language, code in blocks if language in ("python", "python3", "py")]
    plain = [code for language, code in blocks if not language]
    return (python or plain or [answer])[0]
