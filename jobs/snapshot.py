"""The code and the facts that a run keeps, so that later edits never reach queued jobs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.config import PROJECT
from mixture.whole_files import write_whole

RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "peft",
    "accelerate",
    "trl",
    "submitit",
    "tokenizers",
    "numpy",
)
LEFT_OUT_FOLDERS = {".git", ".venv", "runs", "data", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
SECRET_FILES = (".env", ".env.*", ".netrc", "*.pem", "*.key", "*token*.txt", "*credentials*")
MAX_FILE_MIB = 10
OUTSIDE = Path("outside")
"""Where the snapshot keeps a dataset module that does not lie in the project."""


def snapshot_code(target: Path, module: Path | None) -> list[str]:
    """Copy the project's code to `target`, whole or not at all; returns the files left out for their size.

    Tracked, changed and untracked files are taken, ignored ones are not; neither is anything named like a secret.
    A dataset module from outside the project comes along with the Python files beside it.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    too_large = []
    sources = [(PROJECT / relative, relative) for relative in project_files()]
    if module is not None and not module.is_relative_to(PROJECT):
        sources += [(file, OUTSIDE / file.name) for file in module.parent.glob("*.py")]
    for source, relative in sources:
        if any(relative.match(pattern) for pattern in SECRET_FILES):
            continue
        if source.stat().st_size > MAX_FILE_MIB * 2**20:
            too_large.append(str(relative))
            continue
        (temporary / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, temporary / relative)
    temporary.rename(target)
    return too_large


def project_files() -> Iterator[Path]:
    """The files that make up the project, relative to it: by git where it is a checkout, else all but known folders."""
    listing = git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listing is not None:
        yield from (Path(name) for name in listing.split("\0") if name and (PROJECT / name).is_file())
        return
    for folder, subfolders, files in os.walk(PROJECT):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT_FOLDERS]
        yield from ((Path(folder) / file).relative_to(PROJECT) for file in files)


def in_snapshot(path: Path, code: Path) -> Path:
    """Where the snapshot holds `path`; the path itself where it was not copied."""
    copy = code / (path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else OUTSIDE / path.name)
    return copy if copy.exists() else path


def git(*arguments: str) -> str | None:
    """Output of a git command in the project; None where the project is no git checkout."""
    if shutil.which("git") is None or not (PROJECT / ".git").exists():
        return None
    answer = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True)
    return answer.stdout if answer.returncode == 0 else None


def describe_environment() -> dict[str, Any]:
    """Python, packages and git state, for the manifest."""
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES},
        "git": None if commit is None else {"commit": commit.strip(), "changed_files": (changes or "").splitlines()},
    }


def write_manifest(path: Path, facts: dict[str, Any]) -> None:
    """Write manifest.json, which also marks the run folder as complete."""
    write_whole(path, json.dumps(facts, indent=2).encode() + b"\n", synced=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """The facts of a run folder."""
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts
