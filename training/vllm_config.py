"""vLLM as what writes answers. No torch here, so a login node can check a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Engine = Literal["transformers", "vllm"]

OWNED = {
    "model": "the model's name, and the step of the training",
    "revision": "the model's revision",
    "dtype": "the model's dtype",
    "trust_remote_code": "the model's trust_remote_code",
    "max_model_len": "dataset.max_length",
    "gpu_memory_utilization": "gpu_memory_share",
    "tensor_parallel_size": "the GPUs that it is given",
    "seed": "seed",
    "skip_tokenizer_init": "this kit",
    "use_tqdm_on_load": "this kit",
    "generation_config": "this kit",
    "logprobs_mode": "this kit",
}
"""Arguments of vllm.LLM that other keys of a run decide, and which."""


@dataclass(kw_only=True, frozen=True)
class VllmConfig:
    """How vLLM writes answers, in a process of its own beside each that asks; read where `engine` is vllm."""

    python: str | None = None
    """The Python of an environment that has vllm, as .vllm/bin/python: vLLM wants its own versions of torch and
    transformers. Unset: the one that this kit runs on."""

    gpu_memory_share: float | None = None
    """What it takes of its GPU's memory, for weights and cache together. Unset: 0.3 beside a training, else 0.9."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vllm.LLM, as {max_num_seqs: 512}."""

    def __post_init__(self) -> None:
        problems = [
            f"vllm.arguments.{name}: decided by {OWNED[name]}; remove it" for name in self.arguments if name in OWNED
        ]
        if self.gpu_memory_share is not None and not 0 < self.gpu_memory_share < 1:
            problems.append(f"vllm.gpu_memory_share must be above 0 and below 1, got {self.gpu_memory_share}")
        if problems:
            raise ValueError("\n".join(problems))


def shaping_settings(engine: Engine, vllm: VllmConfig | None) -> dict[str, Any]:
    """What of an engine shapes what it writes, for keys and comparisons: where vLLM is found, and its memory, do not.

    Nothing for transformers.
    """
    if engine == "transformers":
        return {}
    return {"engine": engine, "arguments": vllm.arguments if vllm else {}}


def unread_vllm(key: str, engine: Engine, vllm: VllmConfig | None) -> list[str]:
    """What is wrong with a section `key` that holds both."""
    if engine == "vllm" or vllm is None:
        return []
    return [f"{key}.vllm is read only where {key}.engine is vllm, and it is {engine}"]
