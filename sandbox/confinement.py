"""What a process gives up for good before it runs a program that nobody has read: limits, files, system calls.

Run as a script by sandbox/python.py: gives everything up, then runs the program and its tests. It imports little, since
every run waits for it: no dataclasses, json or pathlib.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

READY = b"ready\n"
"""What the parent is told once all is given up, before the program runs."""

LACKS = b"lacks "
"""What the parent is told, with what that is, where not all can be given up and the program does not run."""

MAX_OPEN_FILES = 64


# --------------------------------------------------------------------------------------------------------------- limits


def limit_resources(*, cpu_s: int, memory_bytes: int, file_bytes: int) -> None:
    """Processor time, address space, and the size and number of files of this process, for good."""
    limits = {
        resource.RLIMIT_CPU: (cpu_s, cpu_s + 1),  # a signal that tells what was the matter, then the end
        resource.RLIMIT_AS: (memory_bytes, memory_bytes),
        resource.RLIMIT_FSIZE: (file_bytes, file_bytes),
        resource.RLIMIT_NOFILE: (MAX_OPEN_FILES, MAX_OPEN_FILES),
        resource.RLIMIT_CORE: (0, 0),
    }
    for name, values in limits.items():
        _, hard = resource.getrlimit(name)
        soft, new_hard = (value if hard == resource.RLIM_INFINITY else min(value, hard) for value in values)
        resource.setrlimit(name, (soft, new_hard))


# -------------------------------------------------------------------------------------------------- calls of the kernel

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SIGKILL = 9


def kernel(function: Any, *arguments: Any) -> int:
    """The answer of a C function that takes longs and pointers; OSError where it is -1."""
    answer: int = function(*(ctypes.c_long(one) if isinstance(one, int) else one for one in arguments))
    if answer == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return answer


def libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library


# ---------------------------------------------------------------------------------------------------------------- files


def confine_files(readable: Sequence[str], own_folder: str) -> None:
    """Leave this process only these files and folders to read, and of all only its own folder to change.

    OSError where the kernel offers no way to do so.
    """
    changeable = [os.devnull, "/dev/zero", own_folder]
    try:
        landlock_version()
    except OSError as landlock:
        try:
            confine_by_mounts(readable, changeable, own_folder)
        except OSError as mounts:
            raise OSError(
                f"Landlock, of Linux 5.13 or newer and switched on ({landlock.strerror}), or mounts of one's own in a "
                f"user namespace ({mounts.strerror})"
            ) from mounts
        return
    confine_by_landlock(readable, changeable)


# By Landlock, landlock(7).
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on all machines
GET_VERSION, PATH_BENEATH = 1, 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REGULAR = 1, 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8
TRUNCATE = 1 << 14
RIGHTS_OF_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Rights that each version of Landlock knows; newer ones know no less than the last."""


def landlock_version() -> int:
    """The version of Landlock; OSError where there is none."""
    return kernel(libc().syscall, CREATE_RULESET, None, 0, GET_VERSION)


def confine_by_landlock(readable: Iterable[str], changeable: Iterable[str]) -> None:
    """Take all rights of this process that Landlock knows but those to these files."""
    handled = (1 << RIGHTS_OF_VERSION[min(landlock_version(), max(RIGHTS_OF_VERSION))]) - 1
    library = libc()
    attributes = ctypes.create_string_buffer(struct.pack("=Q", handled), 8)
    ruleset = kernel(library.syscall, CREATE_RULESET, attributes, 8, 0)
    of_files = READ_FILE | WRITE_FILE | TRUNCATE
    for paths, rights in (
        (readable, READ_FILE | READ_DIR),
        (changeable, of_files | READ_DIR | REMOVE_FILE | MAKE_REGULAR),
    ):
        for path in paths:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = rights & handled if os.path.isdir(path) else rights & handled & of_files
            rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, place), 12)
            kernel(library.syscall, ADD_RULE, ruleset, PATH_BENEATH, rule, 0)
            os.close(place)
    kernel(library.syscall, RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


# By mounts of one's own, user_namespaces(7), mount(2).
NEW_USERS, NEW_MOUNTS = 0x10000000, 0x00020000
READ_ONLY, NO_SET_ID, NO_DEVICES, REMOUNT, BIND, WITH_MOUNTS_BELOW, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
KEPT_FLAGS = {2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}
"""What statvfs(3) tells of a mount, as mount(2) wants to be told: an own mount may not take these off."""

DETACH = 2


def confine_by_mounts(readable: Sequence[str], changeable: Sequence[str], own_folder: str) -> None:
    """Put this process into a file system that holds nothing but these files."""
    library = libc()
    user, group = os.getuid(), os.getgid()
    kernel(library.unshare, NEW_USERS | NEW_MOUNTS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)

    def mount(source: str | None, target: str, flags: int, kind: str | None = None) -> None:
        names = (None if one is None else os.fsencode(one) for one in (source, target, kind))
        source_name, target_name, kind_name = names
        kernel(library.mount, source_name, target_name, kind_name, flags, None)

    mount(None, "/", PRIVATE | WITH_MOUNTS_BELOW)
    root = f"{own_folder}/root"
    os.mkdir(root)
    mount("none", root, NO_SET_ID | NO_DEVICES, "tmpfs")
    for path in (*not_below_another([*readable, *map(os.path.realpath, readable)]), *changeable):
        place = root + path
        if os.path.isdir(path):
            os.makedirs(place, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            open(place, "w").close()
        mount(path, place, BIND if path == own_folder else BIND | WITH_MOUNTS_BELOW)
    for target in mounts_below(root):
        if target.removeprefix(root) not in changeable:
            kept = sum(wanted for told, wanted in KEPT_FLAGS.items() if os.statvfs(target).f_flag & told)
            mount(None, target, REMOUNT | BIND | READ_ONLY | kept)
    os.chdir(root)
    kernel(library.syscall, MACHINES[os.uname().machine].pivot_root, b".", b".")
    kernel(library.umount2, b".", DETACH)
    os.chdir(own_folder)
    os.rmdir(root)


def not_below_another(paths: Iterable[str]) -> list[str]:
    """The paths without those that another one holds."""
    chosen: list[str] = []
    for path in sorted({os.path.normpath(path) for path in paths}):
        if not any(path.startswith(f"{other}/") for other in chosen):
            chosen.append(path)
    return chosen


def mounts_below(root: str) -> list[str]:
    """The mounts at a folder and below it."""
    with open("/proc/self/mountinfo") as file:
        targets = [line.split()[4] for line in file]
    return [target for target in targets if target == root or target.startswith(f"{root}/")]


# ------------------------------------------------------------------------------------ system calls: seccomp, seccomp(2)


class Machine:
    """How a kind of processor names itself to seccomp, its column in SYSTEM_CALLS, and one more system call."""

    def __init__(self, architecture: int, column: int, pivot_root: int) -> None:
        self.architecture = architecture
        self.column = column
        self.pivot_root = pivot_root


MACHINES = {"x86_64": Machine(0xC000003E, 0, 155), "aarch64": Machine(0xC00000B7, 1, 41)}

SYSTEM_CALLS = """
read 0 63                  write 1 64                 close 3 57                 fstat 5 80
lseek 8 62                 mmap 9 222                 mprotect 10 226            munmap 11 215
brk 12 214                 mremap 25 216              madvise 28 233             msync 26 227
pread64 17 67              pwrite64 18 68             readv 19 65                writev 20 66
newfstatat 262 79          stat 4 -                   lstat 6 -                  statx 332 291
access 21 -                faccessat 269 48           faccessat2 439 439         readlink 89 -
readlinkat 267 78          getdents64 217 61          getcwd 79 17               chdir 80 49
fchdir 81 50               flock 73 32                fsync 74 82                fdatasync 75 83
ftruncate 77 46            rename 82 -                renameat 264 38            renameat2 316 276
unlink 87 -                unlinkat 263 35            dup 32 23                  dup2 33 -
dup3 292 24                pipe 22 -                  pipe2 293 59               select 23 -
pselect6 270 72            poll 7 -                   ppoll 271 73               sendfile 40 71
copy_file_range 326 285    close_range 436 436        fadvise64 221 223          statfs 137 43
fstatfs 138 44             umask 95 166               sched_yield 24 124         sched_getaffinity 204 123
getpriority 140 141        nanosleep 35 101           clock_nanosleep 230 115    clock_gettime 228 113
clock_getres 229 114       time 201 -                 gettimeofday 96 169        times 100 153
alarm 37 -                 setitimer 38 103           getitimer 36 102           rt_sigaction 13 134
rt_sigprocmask 14 135      rt_sigreturn 15 139        rt_sigpending 127 136      rt_sigtimedwait 128 137
rt_sigsuspend 130 133      sigaltstack 131 132        futex 202 98               set_robust_list 273 99
set_tid_address 218 96     rseq 334 293               membarrier 324 283         getcpu 309 168
restart_syscall 219 128    arch_prctl 158 -           exit 60 93                 exit_group 231 94
getpid 39 172              getppid 110 173            gettid 186 178             getuid 102 174
geteuid 107 175            getgid 104 176             getegid 108 177            getgroups 115 158
getpgrp 111 -              getpgid 121 155            getsid 124 156             uname 63 160
sysinfo 99 179             getrlimit 97 163           setrlimit 160 164          getrusage 98 165
getrandom 318 278          wait4 61 260               open 2 -                   openat 257 56
fcntl 72 25                ioctl 16 29                clone 56 220               kill 62 129
tgkill 234 131             prlimit64 302 261
"""
"""All that a program may ask of the kernel, numbered for x86_64 and aarch64. Of itself, never of another process: there
are no sockets, no new processes, no programs to start, no changes of owners, modes and times, no memory outside
RLIMIT_AS, and no io_uring, by which all of that could be had."""

CLONE_THREAD = 0x10000
FILE_COMMANDS = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    1030,
)  # of fcntl: copies, flags, locks; not F_SETOWN, which sends signals
DEVICE_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # of ioctl: is it a terminal, how much is to be read


class Condition:
    """Whether an argument of a system call, masked, is one of these values, or where `negated` none of them."""

    def __init__(self, argument: int, mask: int, values: Sequence[int], *, negated: bool = False) -> None:
        self.argument = argument
        self.mask = mask
        self.values = values
        self.negated = negated


def conditions() -> dict[str, Condition]:
    """Of the system calls that are allowed only sometimes."""
    all_bits = 0xFFFFFFFF
    this_process = (os.getpid(),)
    # Landlock before version 3 lets a file that can be read be emptied, unless it is opened to be written.
    emptied = (os.O_TRUNC,)
    return {
        "open": Condition(1, os.O_TRUNC | os.O_ACCMODE, emptied, negated=True),
        "openat": Condition(2, os.O_TRUNC | os.O_ACCMODE, emptied, negated=True),
        "clone": Condition(0, CLONE_THREAD, (CLONE_THREAD,)),
        "kill": Condition(0, all_bits, this_process),
        "tgkill": Condition(0, all_bits, this_process),
        "prlimit64": Condition(0, all_bits, (0,)),
        "fcntl": Condition(1, all_bits, FILE_COMMANDS),
        "ioctl": Condition(1, all_bits, DEVICE_COMMANDS),
    }


def confine_system_calls() -> None:
    """Leave this process only SYSTEM_CALLS; all others answer as on a kernel that lacks them.

    OSError where that cannot be had.
    """
    if os.uname().machine not in MACHINES:
        raise OSError(f"a list of system calls for {os.uname().machine} (there are {', '.join(MACHINES)})")
    program = b"".join(filter_instructions(MACHINES[os.uname().machine], conditions()))
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program) // 8, ctypes.addressof(code)))
    kernel(libc().prctl, PR_SET_SECCOMP, 2, ctypes.addressof(header), 0, 0)


LOAD, AND, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
KILL, ALLOW, ENOSYS = 0x80000000, 0x7FFF0000, 0x00050000 | 38
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16


def filter_instructions(machine: Machine, when: dict[str, Condition]) -> Iterable[bytes]:
    """The filter in the instructions of classic BPF: allowed calls one after another, then the refusal."""
    yield instruction(LOAD, ARCHITECTURE_AT)
    yield instruction(EQUAL, machine.architecture, skip_if_true=1)
    yield instruction(RETURN, KILL)
    yield instruction(LOAD, NUMBER_AT)
    words = SYSTEM_CALLS.split()
    for name, *numbers in zip(words[0::3], words[1::3], words[2::3], strict=True):
        if numbers[machine.column] == "-":
            continue
        answer = list(answer_to(when[name])) if name in when else [instruction(RETURN, ALLOW)]
        yield instruction(EQUAL, int(numbers[machine.column]), skip_if_false=len(answer))
        yield from answer
    yield instruction(RETURN, ENOSYS)


def answer_to(condition: Condition) -> Iterable[bytes]:
    """Allow or refuse by an argument. Its lower half decides: the kernel takes all of these as 32 bits."""
    yield instruction(LOAD, ARGUMENTS_AT + 8 * condition.argument)
    yield instruction(AND, condition.mask)
    found, otherwise = (ENOSYS, ALLOW) if condition.negated else (ALLOW, ENOSYS)
    for value in condition.values:
        yield instruction(EQUAL, value, skip_if_false=1)
        yield instruction(RETURN, found)
    yield instruction(RETURN, otherwise)


def instruction(code: int, value: int, *, skip_if_true: int = 0, skip_if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, skip_if_true, skip_if_false, value)


# ---------------------------------------------------------------------------------------------------------- as a script


def main(arguments: Sequence[str]) -> None:
    """Give up what can be, run the program and its tests, and write the nonce where both came to their end."""
    del sys.path[0]  # the folder of this file, which is not the program's
    task = marshal.load(sys.stdin.buffer)
    answers = int(arguments[0])
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    lacks = give_up(task)
    if os.getppid() != task["parent"]:
        return
    if lacks and not task["unprotected"]:
        os.write(answers, LACKS + " and ".join(lacks).encode())
        return
    os.write(answers, READY)
    for name in ("program", "tests"):
        exec(compile(task[name], f"<{name}>", "exec"), task.setdefault("namespace", {"__name__": "program"}))
    sys.stdout.flush()
    os.write(answers, task["nonce"].encode())
    os._exit(0)  # what the program left to be done at its end is not wanted


def give_up(task: dict[str, Any]) -> list[str]:
    """Give up all that can be; returns what this machine lacks to give up more."""
    limit_resources(cpu_s=task["cpu_s"], memory_bytes=task["memory_bytes"], file_bytes=task["folder_bytes"])
    set_process = libc().prctl
    kernel(set_process, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    lacks = []
    try:
        confine_files(task["readable"], os.getcwd())
    except OSError as error:
        lacks.append(str(error))
    kernel(set_process, PR_SET_DUMPABLE, 0, 0, 0, 0)  # some machines write dumps whatever RLIMIT_CORE says
    kernel(set_process, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)  # a new user namespace would take it back
    try:
        confine_system_calls()
    except OSError as error:
        lacks.append(f"seccomp filters ({error.strerror})" if error.strerror else str(error))
    return lacks


if __name__ == "__main__":
    main(sys.argv[1:])
