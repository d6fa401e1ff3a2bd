"""The folder that receives the trained model: ours or nobody's, written whole or not at all. No torch here."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.checkpoints import sync

MARKER = "baton.json"


def is_exported(folder: Path, *, step: int) -> bool:
    """Whether `folder` holds the model of this step."""
    marker = folder / MARKER
    return marker.exists() and json.loads(marker.read_text())["step"] == step


def require_own_folder(folder: Path) -> None:
    """Raise ValueError where an export would overwrite what this kit did not write."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).exists())):
        raise ValueError(
            f"model.checkpoint_dir: {folder} exists and was not written by this kit, so it is left alone. "
            "Name a new or empty folder."
        )


@contextmanager
def replacing(folder: Path, *, step: int) -> Iterator[Path]:
    """A temporary folder to write the model of `step` to; it takes the place of `folder` if all goes well."""
    require_own_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        (temporary / MARKER).write_text(json.dumps({"step": step}))
        for path in temporary.rglob("*"):
            sync(path)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` where `folder` is. A rename cannot replace a folder with files in it, so the old one steps aside."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
