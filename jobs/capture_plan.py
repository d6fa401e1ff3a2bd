"""What a teacher's cache costs, before it is made: bytes, GPU-hours, and from how many epochs on it is worth it."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from distilling.config import CacheConfig
from distilling.identity import kept_temperatures
from training.shard_folder import is_complete

PEAK_TFLOPS = {"A100": 312, "H100": 989}
"""Of dense bfloat16 arithmetic."""

UTILISATION = 0.4
"""Share of the peak that a forward pass is assumed to reach."""

DISK_BYTES_PER_S = 200e6
"""Assumed of a shared file system, for writing a cache and for reading it once an epoch."""

SHARE_OF_DIFFERENT_DRAWS = {"sampled": 0.35, "hybrid": 0.9}
"""Draws repeat: 50 of a whole distribution are about 17 tokens; from the tail alone most are different."""


@dataclass(frozen=True, kw_only=True)
class PlannedCapture:
    """The teacher's cache of a run, and what a live teacher would cost instead. Hours are of one GPU of each kind."""

    folder: Path
    complete: bool
    tasks: int
    positions: int | None
    """Tokens with loss, at which the teacher's distribution is kept; None until the data is prepared."""

    bytes_per_position: float
    cache_bytes: int | None
    free_bytes: int
    pass_hours: dict[str, float] | None
    """One forward pass of the teacher over the training data; None where its size is not known."""

    disk_hours: float | None
    """To write the cache once, or to read it once."""

    epochs: int
    break_even_epochs: dict[str, int | None] | None
    """Epochs, over all students, from which on the cache costs less; None where it never does."""

    @property
    def fits(self) -> bool:
        """Whether there is room for it, as far as is known. A quota is seen only when it is met."""
        return self.complete or self.cache_bytes is None or self.cache_bytes <= self.free_bytes

    def cached_hours(self, device: str) -> float:
        """The teacher's pass, writing, and reading in each epoch."""
        assert self.pass_hours is not None and self.disk_hours is not None
        return self.pass_hours[device] + (1 + self.epochs) * self.disk_hours

    def live_hours(self, device: str) -> float:
        """A pass of the teacher in each epoch."""
        assert self.pass_hours is not None
        return self.epochs * self.pass_hours[device]


def plan_capture(
    folder: Path,
    cache: CacheConfig,
    *,
    tokens: int | None,
    positions: int | None,
    epochs: int,
    teacher_parameters: int | None,
) -> PlannedCapture:
    """The costs of a cache of data with so many tokens, of which `positions` have loss."""
    each = bytes_per_position(cache)
    size = None if positions is None else round(positions * each)
    disk_hours = None if size is None else size / DISK_BYTES_PER_S / 3600
    hours = None
    if tokens is not None and teacher_parameters is not None:
        hours = {device: forward_hours(tokens, teacher_parameters, peak) for device, peak in PEAK_TFLOPS.items()}
    break_even = None
    if hours is not None and disk_hours is not None:
        break_even = {device: epochs_to_break_even(one, disk_hours) for device, one in hours.items()}
    return PlannedCapture(
        folder=folder,
        complete=is_complete(folder),
        tasks=cache.tasks,
        positions=positions,
        bytes_per_position=each,
        cache_bytes=size,
        free_bytes=free_bytes(folder),
        pass_hours=hours,
        disk_hours=disk_hours,
        epochs=epochs,
        break_even_epochs=break_even,
    )


def bytes_per_position(cache: CacheConfig) -> float:
    """Of a position in a shard, about: distilling/cache.py lists the columns, and the upper bits of ids shrink away."""
    different_draws = cache.num_draws * SHARE_OF_DIFFERENT_DRAWS.get(cache.kind, 0)
    label_and_kept_tokens = 2 * (1 + len(cache.keep_tokens))
    sums = 8 * len(kept_temperatures(cache))
    return 4 * cache.top_tokens + 5 * different_draws + label_and_kept_tokens + sums + (4 if cache.num_draws else 0)


def forward_hours(tokens: int, parameters: int, peak_tflops: float) -> float:
    """GPU-hours of a forward pass: two operations a parameter and token."""
    return 2 * parameters * tokens / (UTILISATION * peak_tflops * 1e12) / 3600


def epochs_to_break_even(pass_hours: float, disk_hours: float) -> int | None:
    """The first number of epochs E with pass + (1 + E) disk <= E pass; None where reading costs as much as a pass."""
    if pass_hours <= disk_hours:
        return None
    return math.ceil((pass_hours + disk_hours) / (pass_hours - disk_hours))


def free_bytes(folder: Path) -> int:
    """Free disk where a folder lies or will lie."""
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def capture_lines(plan: PlannedCapture) -> list[str]:
    """The plan for people."""
    lines = [f"teacher's cache {plan.folder}" + (" is complete" if plan.complete else "")]
    size = f"about {plan.bytes_per_position:,.0f} bytes a token with loss"
    if plan.positions is None or plan.cache_bytes is None:
        lines.append(f"  {size}; how many there are is known once the data is prepared")
    else:
        room = "" if plan.complete else f"; {gigabytes(plan.free_bytes)} are free there, as far as no quota says less"
        lines.append(f"  {plan.positions:,} tokens with loss, {size}: {gigabytes(plan.cache_bytes)}{room}")
    if plan.tasks > 1:
        lines.append(f"  captured by a Slurm array of {plan.tasks} tasks")
    if plan.pass_hours is None or plan.break_even_epochs is None:
        return lines
    lines.append(
        f"  GPU-hours of the teacher, if it reaches {UTILISATION:.0%} of the peak ("
        + ", ".join(f"{device} {peak} TFLOPS" for device, peak in PEAK_TFLOPS.items())
        + f") and the disk {DISK_BYTES_PER_S / 1e6:.0f} MB/s:"
    )
    for device, even in plan.break_even_epochs.items():
        worth = (
            f"the cache pays from {even} epochs or students on" if even else "the cache never pays: its disk is slower"
        )
        lines.append(
            f"  {device}: {plan.pass_hours[device]:,.3g} a pass; over {plan.epochs} epochs "
            f"{plan.cached_hours(device):,.3g} cached, {plan.live_hours(device):,.3g} live; {worth}"
        )
    return lines


def gigabytes(size: int) -> str:
    return f"{size / 1e9:,.3g} GB"
