"""How answers are written. No torch here, so a login node can check a run."""

from __future__ import annotations

from dataclasses import dataclass

from training.vllm_config import Engine, VllmConfig, unread_vllm

SIDE_BY_SIDE = {"transformers": 32, "vllm": 512}


@dataclass(kw_only=True, frozen=True)
class AnswersConfig:
    """How a model writes the answers of the training rows anew."""

    max_new_tokens: int = 1024
    """Longest answer. One that has come to no end by then, or at `dataset.max_length`, is unfinished."""

    temperature: float = 0.0
    """Of its sampling, from its whole distribution; 0 takes the most probable token each time."""

    batch_size: int | None = None
    """Answers that are written side by side. Unset: 32, and with vllm, which gives room to the next as soon as one has
    ended, 512."""

    shard_rows: int = 1024
    """Rows that are answered as one piece: what one interruption can cost."""

    tasks: int = 1
    """Jobs that write side by side, one Slurm array; each takes the next shard that nobody has."""

    gpus_per_task: int = 1
    """GPUs of each of them, where `slurm.gpus_per_node` is set; a model too large for one is spread over them."""

    keep_unfinished: bool = False
    """Keep answers that come to no end, instead of dropping them and what would follow in the conversation."""

    engine: Engine = "transformers"
    """What writes. `vllm` is much faster on a GPU."""

    vllm: VllmConfig | None = None
    """Settings of the engine of this name."""

    def __post_init__(self) -> None:
        problems = [
            f"answers.{key} must be at least 1, got {getattr(self, key)}"
            for key in ("max_new_tokens", "batch_size", "shard_rows", "tasks", "gpus_per_task")
            if (value := getattr(self, key)) is not None and value < 1
        ]
        if self.temperature < 0:
            problems.append(f"answers.temperature must not be negative, got {self.temperature}")
        problems += unread_vllm("answers", self.engine, self.vllm)
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def side_by_side(self) -> int:
        """`batch_size`, or its default."""
        return self.batch_size or SIDE_BY_SIDE[self.engine]
