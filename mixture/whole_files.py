"""Files that are there whole or not at all, however their writer ends."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_file(path: Path, *, synced: bool = False) -> Iterator[BinaryIO]:
    """A file to write, renamed to `path` when the block ends well and removed when it does not.

    `synced`: on the disk before it is renamed, so that it outlasts a power cut. OSError says what a full disk needs.
    """
    unfinished = path.with_name(f".{path.name}.{threading.get_native_id()}.{os.getpid()}@{os.uname().nodename}")
    try:
        with unfinished.open("wb") as file:
            yield file
            if synced:
                file.flush()
                os.fsync(file.fileno())
        unfinished.rename(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise OSError(
                error.errno, f"the disk is full: make room in {path.parent} and start again; what is done is kept"
            ) from error
        raise


def write_whole(path: Path, content: bytes, *, synced: bool = False) -> None:
    """Write a small file whole."""
    with whole_file(path, synced=synced) as file:
        file.write(content)


def join_files(parts: Sequence[Path], path: Path) -> None:
    """Write the parts one after another as one whole file."""
    with whole_file(path) as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 22)


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of processes of this machine that were killed."""
    for file in folder.glob(f".*@{os.uname().nodename}"):
        process = file.name.rpartition("@")[0].rpartition(".")[2]
        if process.isdigit() and not Path("/proc", process).exists():
            file.unlink(missing_ok=True)
