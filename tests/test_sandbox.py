"""Programs that nobody has read are tested without reaching anything of ours."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandbox.confinement import CREATE_RULESET
from sandbox.python import Limits, TestRun, code_of, missing_protection, run_tests

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster

pytest_plugins = ["slurm_cluster"]

PROJECT = Path(__file__).parent.parent
SHORT = Limits(time_s=1.0, memory_bytes=256 << 20, folder_bytes=1 << 20)

MISSING = missing_protection()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no sandbox here: {MISSING}")


def run(program: str, tests: str = "") -> TestRun:
    return run_tests(program, tests, limits=SHORT)


def test_a_right_program_passes_and_a_wrong_one_does_not() -> None:
    tests = "assert total([1, 2]) == 3\nassert total([]) == 0"
    assert run("def total(numbers):\n    return sum(numbers)", tests).passed
    wrong = run("def total(numbers):\n    return 3", tests)
    assert wrong.outcome == "failed" and "AssertionError" in wrong.output
    assert run("def total(numbers:", tests).output.endswith("SyntaxError: '(' was never closed\n")
    assert "NameError" in run("", tests).output


def test_programs_have_packages_threads_and_files_of_their_own() -> None:
    program = """
import datetime, decimal, hashlib, random, re, threading, zoneinfo
import numpy
done = []
thread = threading.Thread(target=done.append, args=[1])
thread.start(); thread.join()
open("mine.txt", "w").write("kept")
"""
    found = run(program, 'assert done == [1] and open("mine.txt").read() == "kept" and numpy.ones(2).sum() == 2')
    assert found.passed, found.output


def test_texts_are_in_the_same_order_in_sets_of_every_run() -> None:
    printed = {run("print(list({str(n) for n in range(20)}))").output for _ in range(2)}
    assert len(printed) == 1 and "'19'" in printed.pop()


# --- what programs use


def test_an_endless_loop_and_an_endless_sleep_are_ended() -> None:
    started = time.monotonic()
    assert run("while True: pass").outcome == "out of time"
    assert run("import time; time.sleep(60)").outcome == "out of time"
    assert (
        run("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass").outcome == "out of time"
    )
    assert time.monotonic() - started < 8


def test_memory_files_and_output_are_bounded() -> None:
    assert "MemoryError" in run("hog = bytearray(1 << 30)").output
    assert "Function not implemented" in run("import os; os.memfd_create('hog')").output
    assert "File too large" in run("open('large', 'wb').write(bytes(2 << 20))").output
    many = "for n in range(10**6):\n    open(str(n), 'wb').write(bytes(1 << 16))"
    assert run(many).outcome == "too many bytes in files"
    flood = run("while True: print('x' * 1000)")
    assert flood.outcome == "too much output" and len(flood.output) == SHORT.output_bytes


def test_a_fork_bomb_makes_no_process() -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError as error: print(error); break"
    assert "Function not implemented" in run(bomb).output
    assert "Function not implemented" in run("import subprocess; subprocess.run(['true'])").output
    assert "Function not implemented" in run("import os; os.execv('/bin/true', ['true'])").output


# --- what is ours


def test_no_connection_reaches_a_server_on_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        program = f"import socket\nsocket.create_connection({server.getsockname()!r}).send(b'secret')"
        assert "Function not implemented" in run(program).output
        with pytest.raises(TimeoutError):
            server.accept()


def test_secrets_of_the_home_folder_the_environment_and_other_processes_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("a-secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "a-secret")
    for place in (tmp_path / "token", f"/proc/{os.getpid()}/environ", "/proc/self/environ", "/etc/passwd"):
        assert "PermissionError" in run(f"print(open({str(place)!r}).read())").output, place
    assert "PermissionError" in run(f"import os; print(os.listdir({str(tmp_path)!r}))").output
    found = run("import os; print(dict(os.environ))").output
    assert "LANG" in found and "a-secret" not in found and str(tmp_path) not in found


def test_nothing_outside_its_folder_is_changed(tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    ours.write_text("kept")
    before = ours.stat()
    for change in (
        "open({0!r}, 'w')", "open({0!r}, 'a')", "os.truncate({0!r}, 0)", "os.open({0!r}, os.O_TRUNC)",
        "os.remove({0!r})", "os.rename({0!r}, 'mine')", "os.link({0!r}, 'mine')", "os.symlink({0!r}, 'mine')",
        "os.chmod({0!r}, 0)", "os.utime({0!r}, (0, 0))", "os.mkdir({1!r} + '/new')", "open({1!r} + '/new', 'w')",
        "os.chmod(os.__file__, 0)", "os.open(os.__file__, os.O_TRUNC)", "open('/dev/shm/new', 'w')",
    ):  # fmt: skip
        found = run(f"import os\n{change.format(str(ours), str(tmp_path))}")
        assert found.output.splitlines()[-1].startswith(("PermissionError", "OSError: [Errno 38]")), (change, found)
    assert ours.stat() == before and ours.read_text() == "kept" and list(tmp_path.iterdir()) == [ours]


def test_other_processes_get_no_signal(tmp_path: Path) -> None:
    victim = subprocess.Popen(["sleep", "60"])
    try:
        calls = f"""
import ctypes, fcntl, os, signal
pid = {victim.pid}
library = ctypes.CDLL(None)
reader, writer = os.pipe()
for attempt in (
    lambda: os.kill(pid, 9), lambda: os.kill(-1, 9), lambda: os.killpg(pid, 9), lambda: signal.pidfd_send_signal(0, 9),
    lambda: fcntl.fcntl(reader, fcntl.F_SETOWN, pid), lambda: os.sched_setaffinity(pid, [0]),
    lambda: os.setpriority(os.PRIO_PROCESS, pid, 19), lambda: os.setsid(), lambda: os.pidfd_open(pid),
):
    try: attempt()
    except OSError as error: assert error.errno == 38, error
    else: raise SystemError("allowed")
# io_uring_setup, ptrace, process_vm_writev, bpf, userfaultfd, unshare, and a call of the x32 numbers
for number in (425, 101, 311, 321, 323, 272, 1 << 30 | 39):
    assert library.syscall(number, 0, pid, 0, 0, 0) == -1, number
os.kill(os.getpid(), 0)
"""
        found = run(calls)
        assert found.passed, found.output
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@pytest.mark.parametrize(
    "leaving", ["sys.exit(0)", "os._exit(0)", "os.kill(os.getpid(), 15)", "raise KeyboardInterrupt"]
)
def test_a_program_that_leaves_before_its_tests_ran_has_not_passed(leaving: str) -> None:
    assert run(f"import os, sys\n{leaving}", "assert False").outcome == "failed"
    assert run(f"import os, sys\ndef f(): {leaving}", "f()\nassert False").outcome == "failed"


def test_what_is_said_in_place_of_the_nonce_does_not_pass() -> None:
    said = """
import os
for place in range(3, 64):
    try: os.write(place, b'passed')
    except OSError: pass
os._exit(0)
"""
    assert run(said).outcome == "failed"


def test_folders_are_removed_and_a_program_ends_with_the_process_that_ran_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run("open('left behind', 'w')").passed and not list(tmp_path.iterdir())
    code = "from sandbox.python import *; run_tests('import time; time.sleep(60)', '')"
    ours = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, env={**os.environ, "TMPDIR": str(tmp_path)})
    started = time.monotonic()
    while not (theirs := children(ours.pid)) or not asleep(theirs[0]):
        assert ours.poll() is None and time.monotonic() - started < 20
        time.sleep(0.02)
    ours.send_signal(signal.SIGKILL)
    ours.wait()
    while Path(f"/proc/{theirs[0]}/environ").exists() and asleep(theirs[0]):
        assert time.monotonic() - started < 20
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def asleep(pid: int) -> bool:
    """Whether a process is alive, confined and sleeps."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "Seccomp:\t2" in lines and "State:\tS" in lines


# --- machines that cannot


WITHOUT_CALLS = """
import ctypes, json, struct, sys
from sandbox.confinement import *
numbers = json.loads(sys.argv[1])
code = b"".join([instruction(LOAD, NUMBER_AT), *(part for number in numbers for part in (
    instruction(EQUAL, number, skip_if_false=1), instruction(RETURN, ENOSYS))), instruction(RETURN, ALLOW)])
buffer = ctypes.create_string_buffer(code, len(code))
header = ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(buffer)))
kernel(libc().prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
kernel(libc().prctl, PR_SET_SECCOMP, 2, ctypes.addressof(header), 0, 0)
"""
RUN_TESTS = """
from sandbox.python import run_tests
for program, unprotected in json.loads(sys.argv[2]):
    try:
        found = run_tests(program, "", unprotected=unprotected)
        print(found.outcome, (found.output.splitlines() or [""])[-1])
    except ValueError as error:
        print(error)
"""
UNSHARE = {"x86_64": 272, "aarch64": 97}[platform.machine()]


def runs_without(calls: list[int], *runs: tuple[str, bool]) -> list[str]:
    """What becomes of programs, each allowed to be unprotected or not, on a kernel without these system calls."""
    command = [sys.executable, "-c", WITHOUT_CALLS + RUN_TESTS, json.dumps(calls), json.dumps(runs)]
    found = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def check_without(calls: list[int], *arguments: str) -> subprocess.CompletedProcess[str]:
    """What `./train.sh check` says of a run that scores code, on a kernel without these system calls."""
    program = WITHOUT_CALLS + "from jobs.__main__ import main\nsys.exit(main(sys.argv[2:]))"
    check = ["check", "configs/test.yaml", "--dataset.name", "mbpp", "--dataset.packing", "false", *arguments]
    command = [sys.executable, "-c", program, json.dumps(calls), *check]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)


READS, FORKS = "open('/etc/passwd').read()", "import os; os.fork()"


def test_where_landlock_is_missing_files_are_protected_by_mounts(tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    ours.write_text("kept")
    works = "import numpy, zoneinfo, hashlib, os; open('a', 'w').write('b'); assert os.listdir() == ['a'], os.listdir()"
    changes = [f"open({str(ours)!r}, 'w')", "import os; open(os.__file__, 'a')", "open('/new', 'w')"]
    found = runs_without([CREATE_RULESET], *((program, False) for program in (works, READS, FORKS, *changes)))
    if "user namespace" in found[0]:
        pytest.skip(f"no mounts of one's own here either: {found[0]}")
    assert found[0] == "passed "
    assert found[1].startswith("failed FileNotFoundError") and found[2].startswith("failed OSError: [Errno 38]")
    assert found[3].startswith("failed FileNotFoundError")
    assert found[4].startswith("failed OSError: [Errno 30] Read-only file system") and "Errno 30" in found[5]
    assert ours.read_text() == "kept"


def test_where_files_cannot_be_protected_nothing_runs_unless_that_is_allowed() -> None:
    refused, reads, forks = runs_without([CREATE_RULESET, UNSHARE], (READS, False), (READS, True), (FORKS, True))
    assert "it lacks Landlock, of Linux 5.13 or newer and switched on (Function not implemented), or mounts" in refused
    assert "evaluation.unprotected_code: true" in refused
    assert reads == "passed " and forks.startswith("failed OSError")


def test_where_files_cannot_be_protected_a_run_that_scores_code_is_told_so_before_it_starts() -> None:
    here = ["--cluster", "local"]
    refused = check_without([CREATE_RULESET, UNSHARE], *here)
    assert refused.returncode == 64 and len(refused.stderr.splitlines()) == 1
    assert "evaluation.unprotected_code: answers of a model are programs that nobody has read" in refused.stderr
    for allowed in (["--evaluation.unprotected_code", "true"], ["--evaluation.limit", "0"]):
        assert check_without([CREATE_RULESET, UNSHARE], *here, *allowed).returncode == 0
    assert check_without([], *here).returncode == 0


@pytest.mark.cluster
def test_on_a_cluster_it_is_a_note_since_the_nodes_may_be_other_machines(slurm: SlurmCluster) -> None:
    told = check_without([CREATE_RULESET, UNSHARE], "--cluster", "slurm")
    assert told.returncode == 0, told.stderr
    note = " ".join(told.stdout.split())
    assert "note: answers of a model are programs" in note and "doctor FILE --on-node asks whether a node can" in note


# --- code in answers


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("def f(): pass", "def f(): pass"),
        ("Sure!\n```python\ndef f(): pass\n```\nUse it:\n```python\nf()\n```", "def f(): pass\n"),
        ("Install:\n```bash\npip install x\n```\n```py\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n", "x = 1\n"),
        ("```Python title=a.py\nx = '```'\n  ```", "x = '```'\n"),
        ("```json\n{}\n```", "```json\n{}\n```"),
    ],
)
def test_code_is_found_in_answers(answer: str, code: str) -> None:
    assert code_of(answer) == code
