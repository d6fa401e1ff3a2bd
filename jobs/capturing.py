"""A model's work before training: the teacher's cache or the answers of a run, where they lie, and what is missing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from answering.config import AnswersConfig
from answering.identity import answers_folder, answers_key
from distilling.config import DistillationConfig
from distilling.identity import cache_folder, cache_key
from jobs.chain import ONE_JOB, ArrayShape
from jobs.config import RunConfig
from jobs.snapshot import read_manifest
from mixture.prepare import MIXTURE_MARKER, PreparationRequest, PreparedData, data_key, prepared_folder
from training.config import ModelConfig
from training.distributed import Ranks
from training.run_folder import RunFolder
from training.shard_folder import capture_progress, is_complete
from training.stopping import StopPoll, StopSignals

if TYPE_CHECKING:
    from answering.answers import AnswersRequest
    from distilling.capture import CaptureRequest

POLL_S = 5.0
"""Between looks at what others still capture."""


def has_capture(config: RunConfig) -> bool:
    """Whether the chain makes a teacher's cache, instead of reading one that was made before, or none."""
    distillation = config.distillation
    return distillation is not None and distillation.teacher == "cache" and distillation.cache.folder is None


@dataclass(frozen=True)
class Answering:
    """Who writes the answers that a run learns, and how."""

    writer: ModelConfig
    writer_key: str
    """The section of the settings that names it."""

    answers: AnswersConfig


def answering_of(config: RunConfig) -> Answering | None:
    """Who writes answers: the teacher of a distillation by text, or the target of a draft; None where nobody does."""
    distillation, eagle3 = config.distillation, config.eagle3
    if distillation is not None and distillation.teacher == "text":
        teacher = distillation.teacher_model
        writer = ModelConfig(
            name=teacher.name,
            revision=teacher.revision,
            dtype=teacher.dtype,
            trust_remote_code=teacher.trust_remote_code,
        )
        return Answering(writer, "distillation.teacher_model", distillation.answers)
    if eagle3 is not None and eagle3.answers is not None:
        return Answering(config.model, "model", eagle3.answers)
    return None


def writes_answers(config: RunConfig) -> bool:
    """Whether a model writes the answers that the run learns, so that its data is prepared only afterwards."""
    return answering_of(config) is not None


def key_of_answers(config: RunConfig, rows: PreparationRequest) -> str | None:
    """The key of the answers to these rows; None where nobody writes any."""
    answering = answering_of(config)
    if answering is None:
        return None
    return answers_key(answering.writer, answering.answers, data_key=data_key(rows), seed=config.seed)


def array_shape(config: RunConfig) -> ArrayShape:
    """The Slurm array in which the run's teacher or target works."""
    answering = answering_of(config)
    if answering is not None:
        return ArrayShape(tasks=answering.answers.tasks, gpus=answering.answers.gpus_per_task)
    if not has_capture(config):
        return ONE_JOB
    cache = distillation_of(config).cache
    return ArrayShape(tasks=cache.tasks, gpus=cache.gpus_per_task)


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
    if writes_answers(config):
        folder = prepared_folder(config.data_folder, read_manifest(run.manifest)["data_key"])
        return PreparedData.open(folder) is not None
    cache = cache_of_run(run, config) if has_capture(config) else None
    return cache is None or is_complete(cache)


def shards_done(run: RunFolder, config: RunConfig) -> int:
    """How far the cache or the answers of a run are; 0 where it has none."""
    if writes_answers(config):
        return capture_progress(answers_folder(config.data_folder, read_manifest(run.manifest)["answers_key"])).done
    folder = cache_of_run(run, config)
    return capture_progress(folder).done if folder else 0


def answers_line(config: RunConfig, answers: Path) -> str:
    """What a plan says of the answers in a folder."""
    progress = capture_progress(answers)
    if (answers / MIXTURE_MARKER).is_file():
        state = "are written"
    elif progress.total is None:
        state = "are still to be written"
    else:
        state = f"are written for {progress.done} of {progress.total} shards"
    tasks = array_shape(config).tasks
    return f"answers {answers} {state}" + (f", by a Slurm array of {tasks} tasks" if tasks > 1 else "")


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


def answers_request(config: RunConfig, rows: PreparationRequest) -> AnswersRequest:
    """What a run's teacher or target is asked to answer."""
    from answering.answers import AnswersRequest  # torch

    key, answering = key_of_answers(config, rows), answering_of(config)
    assert key is not None and answering is not None
    return AnswersRequest(
        writer=answering.writer,
        writer_key=answering.writer_key,
        answers=answering.answers,
        rows=rows,
        folder=answers_folder(config.data_folder, key),
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

    return in_shards(partial(capture, request, report), request.folder, run, signals)


def answer_what_is_missing(
    request: AnswersRequest, run: RunFolder, signals: StopSignals, report: Callable[[str], None]
) -> bool:
    """Answer what nobody else has answered; returns whether the answers are complete.

    Raises:
        StopRequested: a stop signal came. Shards that were finished are kept.
    """
    from answering.answers import write_answers

    return in_shards(partial(write_answers, request, report), request.folder, run, signals)


def in_shards(work: Callable[..., bool], folder: Path, run: RunFolder, signals: StopSignals) -> bool:
    """Let a stop request end work that is done in shards between them, and record how far it came."""
    before = capture_progress(folder).done
    with signals.deferred():
        complete = work(stop_requested=StopPoll(signals, run.stop).is_requested)
        done = capture_progress(folder).done
        if done > before:
            run.record_event("captured", shards=done)
    return complete


def capture_before_training(work: Callable[[], bool], is_done: Callable[[], bool], run: RunFolder) -> bool:
    """Have the `work` before training done in the processes of a block; False where the user stops the run before.

    One process of each node works, since its model is spread over all GPUs that its process sees. The others wait.

    Raises:
        StopRequested: a stop signal came.
    """
    works = Ranks.of_environment().local_rank == 0
    while not (work() if works else is_done()):
        if run.stop.exists():
            return False
        time.sleep(POLL_S)
    if works:
        free_device_memory()
    return True


def free_device_memory() -> None:
    """Give the memory of the model that has done its work back to the device, for training."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def distillation_of(config: RunConfig) -> DistillationConfig:
    assert config.distillation is not None
    return config.distillation
