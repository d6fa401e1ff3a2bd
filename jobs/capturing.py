"""The teacher's cache of a run: where it lies, whether the chain makes it, and capturing what is missing of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from distilling.config import DistillationConfig
from distilling.identity import cache_folder, cache_key, capture_progress, is_complete
from jobs.config import RunConfig
from jobs.snapshot import read_manifest
from training.distributed import Ranks
from training.run_folder import RunFolder
from training.stopping import StopPoll, StopSignals

if TYPE_CHECKING:
    from distilling.capture import CaptureRequest

POLL_S = 5.0
"""Between looks at what others still capture."""


def has_capture(config: RunConfig) -> bool:
    """Whether the chain makes a teacher's cache, instead of reading one that was made before, or none."""
    distillation = config.distillation
    return distillation is not None and distillation.teacher == "cache" and distillation.cache.folder is None


def key_of_cache(config: RunConfig, data_key: str) -> str | None:
    """The key of the cache that the chain makes; None where it makes none."""
    if not has_capture(config):
        return None
    distillation = distillation_of(config)
    return cache_key(distillation.teacher_model, distillation.cache, data_key=data_key, seed=config.seed)


def folder_of_cache(config: RunConfig, key: str | None) -> Path | None:
    """The folder of the cache that a run reads, made by its chain or before; None where it reads none."""
    distillation = config.distillation
    if distillation is None or distillation.teacher != "cache":
        return None
    if distillation.cache.folder is not None:
        return Path(distillation.cache.folder)
    assert key is not None
    return cache_folder(config.data_folder, key)


def cache_of_run(run: RunFolder, config: RunConfig) -> Path | None:
    """The folder of the cache that a run was started with; None where it reads none."""
    return folder_of_cache(config, read_manifest(run.manifest)["cache_key"])


def is_captured(run: RunFolder, config: RunConfig) -> bool:
    """Whether nothing is left for a capture job of the run."""
    folder = cache_of_run(run, config) if has_capture(config) else None
    return folder is None or is_complete(folder)


def shards_done(run: RunFolder, config: RunConfig) -> int:
    """How far the cache of a run is; 0 where it has none."""
    folder = cache_of_run(run, config)
    return capture_progress(folder).done if folder else 0


def capture_request(config: RunConfig, prepared: Path, folder: Path) -> CaptureRequest:
    """What the capture of a run's teacher is asked for."""
    from distilling.capture import CaptureRequest  # torch

    distillation = distillation_of(config)
    return CaptureRequest(
        teacher=distillation.teacher_model,
        cache=distillation.cache,
        prepared=prepared,
        folder=folder,
        seed=config.seed,
    )


def capture_what_is_missing(
    request: CaptureRequest, run: RunFolder, signals: StopSignals, report: Callable[[str], None]
) -> bool:
    """Capture what nobody else captures already; returns whether the cache is complete.

    Raises:
        StopRequested: a stop signal came. Shards that were finished are kept.
    """
    from distilling.capture import capture

    before = capture_progress(request.folder).done
    with signals.deferred():
        complete = capture(request, report, stop_requested=StopPoll(signals, run.stop).is_requested)
        done = capture_progress(request.folder).done
        if done > before:
            run.record_event("captured", shards=done)
    return complete


def capture_before_training(
    request: CaptureRequest, run: RunFolder, signals: StopSignals, report: Callable[[str], None]
) -> bool:
    """Have the cache complete in the processes of a block; False where the user stops the run before.

    One process of each node captures, since a teacher is spread over all GPUs that its process sees. The others wait.

    Raises:
        StopRequested: a stop signal came.
    """
    captures = Ranks.of_environment().local_rank == 0
    while not (capture_what_is_missing(request, run, signals, report) if captures else is_complete(request.folder)):
        if run.stop.exists():
            return False
        time.sleep(POLL_S)
    if captures:
        free_device_memory()
    return True


def free_device_memory() -> None:
    """Give the teacher's memory back to the device, for the student."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def distillation_of(config: RunConfig) -> DistillationConfig:
    assert config.distillation is not None
    return config.distillation
