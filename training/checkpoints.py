"""Resume points: written beside, verified, renamed into place, and found again by looking. No torch here.

checkpoints/step_00000012/                a checkpoint
    marker.json                           written last; without a good one the folder is no checkpoint
    model.safetensors optimizer.pt ...    what the trainer wrote; the marker lists every file with its size
checkpoints/step_00000018.tmp-JOB         being written, or left by a job that died writing
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from training.config import TrainingConfig
from training.ledger import EpochRows, Ledger

MARKER = "marker.json"
MIN_KEPT = 2


class NoValidCheckpointError(RuntimeError):
    """Checkpoints exist and none can be trusted; starting over silently would throw the chain's work away."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """How the rows of an optimizer step are split over processes and micro-batches."""

    batch_size: int
    gradient_accumulation: int
    world_size: int

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation * self.world_size

    @classmethod
    def of(cls, training: TrainingConfig, *, world_size: int) -> Split:
        """As the settings have it for so many processes."""
        return cls(
            batch_size=training.batch_size, gradient_accumulation=training.gradient_accumulation, world_size=world_size
        )

    def __str__(self) -> str:
        rows = f"{self.batch_size} row{'s' if self.batch_size > 1 else ''}"
        micro_batches = f"{self.gradient_accumulation} micro-batch{'es' if self.gradient_accumulation > 1 else ''}"
        return f"{rows} x {micro_batches} x {self.world_size} process{'es' if self.world_size > 1 else ''}"


@dataclass(frozen=True, kw_only=True)
class ResumeTerms:
    """What a resumed block must share with the block before it. Anything else would be another run."""

    fingerprint: str
    """Of the prepared data."""

    objective: str
    parameters: str
    """Of the names and shapes of the trainable parameters, and of the adapter's settings."""

    batch_size: int
    gradient_accumulation: int
    world_size: int
    parallelism: str
    horizon_steps: int
    optimization: str
    """Learning rate, its schedule and the weight decay, in words."""

    @property
    def split(self) -> Split:
        return Split(
            batch_size=self.batch_size,
            gradient_accumulation=self.gradient_accumulation,
            world_size=self.world_size,
        )

    def split_as(self, split: Split) -> ResumeTerms:
        return replace(self, **asdict(split))


REMEDY = {
    # What splits a step has one remedy for all of it, told by `refusal_of_split`.
    "fingerprint": "the prepared data changed; restore the dataset settings and files that the chain began with",
    "objective": "restore finetuning.objective, or the section of the trainer that the chain began with",
    "parameters": "what is trained changed; restore model.name, model.peft, model.peft_method, model.lora, "
    "model.adapter and model.experts",
    "parallelism": "restore training.parallelism, which decides how the optimizer's state lies in a checkpoint",
    "optimization": "restore training.lr, training.lr_scheduler, training.warmup, training.weight_decay and "
    "training.extensions",
    "horizon_steps": "the learning rate spans the whole chain; restore training.epochs_per_job and "
    "training.total_jobs, and go on beyond them with ./train.sh extend",
}


SPLIT = (
    "training.batch_size, training.gradient_accumulation and the number of processes (slurm.nodes x "
    "slurm.gpus_per_node)"
)
"""What splits the rows of an optimizer step, for the user."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a chain has come."""

    step: int
    epoch: float
    samples: int
    """Rows trained on so far (packs, where the dataset is packed), repeats included."""

    learning_rate: float
    """Of the next optimizer step."""

    terms: ResumeTerms
    ledger: Ledger
    """The rows that were trained on, exactly as old as the weights."""

    tied_to_split: str | None
    """Why the same rows, split otherwise over processes and micro-batches, would have trained another model; None where
    only sums were rounded otherwise."""

    @property
    def finished_epochs(self) -> int:
        return int(self.epoch)

    @property
    def whole_epochs(self) -> int:
        """The epochs that have ended and had every row exactly once."""
        return self.finished_epochs - len(self.wrong_epochs)

    @property
    def wrong_epochs(self) -> list[EpochRows]:
        """The epochs that have ended and had not."""
        return self.ledger.wrong_epochs(self.finished_epochs)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Progress):
    """A checkpoint that was read back and found whole."""

    path: Path
    num_bytes: int


def newest_valid(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, or None before the first one, and why each newer one was passed over.

    Raises NoValidCheckpointError where there are checkpoints but no whole one.
    """
    rejected: list[str] = []
    for path in checkpoint_folders(folder):
        try:
            return read_checkpoint(path), rejected
        except ValueError as error:
            rejected.append(f"{path.name}: {error}")
    if rejected:
        raise NoValidCheckpointError(
            f"{folder} holds checkpoints, and none is whole:\n  " + "\n  ".join(rejected) + "\n"
            "Restore one from a backup, or move them away to train from the start."
        )
    return None, rejected


def checkpoint_folders(folder: Path) -> list[Path]:
    """Folders with the name of a checkpoint, newest first. The name says nothing about what is inside."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"step_\d{8}", path.name)), reverse=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's marker and check every file that it lists. Raises ValueError with what is wrong."""
    try:
        marker = orjson.loads((path / MARKER).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"no {MARKER}: it was never finished") from None
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{MARKER} is not whole: {error}") from error
    try:
        files: dict[str, int] = marker.pop("files")
        checkpoint = Checkpoint(
            path=path,
            num_bytes=sum(files.values()),
            terms=ResumeTerms(**marker.pop("terms")),
            ledger=Ledger.of_json(marker.pop("ledger")),
            **marker,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MARKER} lacks what this version needs: {error}") from error
    if path.name != folder_name(checkpoint.step):
        raise ValueError(f"{MARKER} is that of step {checkpoint.step}")
    for name, size in files.items():
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if (path / name).stat().st_size != size:
            raise ValueError(f"{name} has {(path / name).stat().st_size} bytes, and had {size} when it was written")
    return checkpoint


def refuse_changed_terms(
    checkpoint: Checkpoint, terms: ResumeTerms, *, before_extensions: Sequence[ResumeTerms] = ()
) -> None:
    """Raise ValueError, naming each change and how to go on, where a resume would not continue the same run.

    `before_extensions`: other terms that the checkpoint may have been written under, because the chain was extended.
    """
    before = checkpoint.terms
    other_split = refusal_of_split(terms.split, before=before.split, tied=checkpoint.tied_to_split)
    changes = [] if other_split is None else [other_split]
    continued = [one.split_as(before.split) for one in (terms, *before_extensions)]
    if terms.split.rows_per_step != before.split.rows_per_step:  # the number of steps follows it
        continued = [replace(one, horizon_steps=before.horizon_steps) for one in continued]
    if before not in continued:
        old, new = asdict(before), asdict(continued[0])
        changes += [f"{key}: {old[key]} -> {new[key]} ({REMEDY[key]})" for key in old if old[key] != new[key]]
    if changes:
        raise ValueError(
            f"cannot resume {checkpoint.path}: this run is not the one that wrote it\n  " + "\n  ".join(changes) + "\n"
            "or give the run another name to train from the start."
        )


def refusal_of_split(split: Split, *, before: Split, tied: str | None) -> str | None:
    """Why a chain cannot go on with its steps split in another way, and what to set; None where it can.

    The rows of a step depend on their number alone, and the loss is divided by what the whole step holds. So the same
    number of rows trains the same model up to the rounding of sums, unless something `tied` the steps to their split.
    """
    if split == before:
        return None
    if split.rows_per_step != before.rows_per_step:
        accumulation, rest = divmod(before.rows_per_step, split.batch_size * split.world_size)
        advice = (
            f"training.gradient_accumulation: {accumulation} keeps them"
            if not rest and not tied
            else f"restore {SPLIT}"
        )
        old, new = (f"{one.rows_per_step} = {one}" for one in (before, split))
        return f"rows of an optimizer step: {old} -> {new} ({advice})"
    if tied:
        return f"split of an optimizer step: {before} -> {split} (restore {SPLIT}: {tied})"
    return None


def temporary_folder(folder: Path, step: int, owner: str) -> Path:
    """Where a checkpoint is written before it is one. `owner` names the job, so that leftovers can be told apart."""
    return folder / f"{folder_name(step)}.tmp-{owner}"


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def require_free_disk(folder: Path, num_bytes: int) -> None:
    """Raise OSError where the disk cannot take `num_bytes` more."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"{folder}: a checkpoint needs about {num_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free. "
            "The checkpoints before it are intact."
        )


def commit(temporary: Path, progress: Progress, *, keep: int) -> Checkpoint:
    """Make the written folder a checkpoint: to disk, marker last, renamed into place; then prune the oldest."""
    files = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files_under(temporary)}
    assert files, f"nothing was written to {temporary}"
    sync_files(temporary)
    write_marker(temporary / MARKER, {**asdict(progress), "files": files})
    for folder in {path.parent for path in files_under(temporary)}:
        sync(folder)

    final = temporary.parent / folder_name(progress.step)
    if final.exists():
        # Only a broken one can be there: a block starts at the newest whole checkpoint and saves after it.
        shutil.rmtree(final)
    temporary.rename(final)
    sync(final.parent)
    checkpoint = read_checkpoint(final)
    prune(final.parent, keep=keep)
    return checkpoint


def files_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync_files(folder: Path) -> None:
    for path in files_under(folder):
        sync(path)


def write_marker(path: Path, marker: dict[str, Any]) -> None:
    with path.open("wb") as file:
        file.write(orjson.dumps(marker, option=orjson.OPT_INDENT_2))
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Have the disk, not the page cache, hold a file or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(folder: Path, *, keep: int) -> None:
    """Remove the oldest checkpoints, and never so many that fewer than `keep` whole ones are left."""
    whole = 0
    for path in checkpoint_folders(folder):
        if whole >= max(keep, MIN_KEPT):
            shutil.rmtree(path)
        else:
            whole += is_whole(path)


def is_whole(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except ValueError:
        return False
    return True


def sweep_unfinished(folder: Path) -> list[str]:
    """Remove what jobs that died while saving left behind. For the one block that owns the run folder."""
    stale = unfinished_folders(folder)
    for path in stale:
        shutil.rmtree(path)
    return [path.name for path in stale]


def unfinished_folders(folder: Path) -> list[Path]:
    """Folders of checkpoints that are being written, or whose job died writing them."""
    return [path for path in folder.glob("step_*.tmp-*") if path.is_dir()]
