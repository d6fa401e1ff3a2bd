"""vLLM beside this process: answers of many prompts at once, by continuous batching (arXiv:2309.06180).

It runs in a process of its own under the Python that has it (answering/vllm_server.py), so neither its versions nor its
random states, threads and signals touch the training, and its memory goes when it goes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from answering.generation import Continuation, Draws, Ids
from training.vllm_config import VllmConfig

SERVER = Path(__file__).with_name("vllm_server.py")

SHARE_ALONE = 0.9
SHARE_BESIDE_TRAINING = 0.3

END_S = 20.0
"""How long vLLM may take to end before it is killed."""

OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Who a process is among those that train together, which vLLM's process is none of."""


class VllmEngine:
    """One model in vLLM; started when weights are first loaded."""

    def __init__(
        self,
        config: VllmConfig,
        *,
        key: str,
        dtype: torch.dtype,
        max_length: int,
        device: torch.device | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """`key`: the section of the settings that asks for it. `device`: the GPU that it shares with the training;
        without one it has all GPUs of this process to itself."""
        self.config = config
        self.key = key
        self.environment = environment_of(device, os.environ)
        is_alone = device is None
        # A prompt that is read in chunks has draws taken back, which vLLM cannot do with a seed on a CPU.
        on_cpu = {} if torch.cuda.is_available() else {"enable_chunked_prefill": False}
        self.arguments = {
            **on_cpu,
            **config.arguments,
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": max_length,
            "gpu_memory_utilization": config.gpu_memory_share or (SHARE_ALONE if is_alone else SHARE_BESIDE_TRAINING),
            "tensor_parallel_size": max(1, torch.cuda.device_count()) if is_alone else 1,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "seed": 0,
            "skip_tokenizer_init": True,
            "use_tqdm_on_load": False,
            "generation_config": "vllm",  # none of the model's own settings
            "logprobs_mode": "processed_logprobs",  # of the distribution that is drawn from, at its temperature
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.lines: Any = None
        self.ending: weakref.finalize[..., Any] | None = None

    def load(self, model: str) -> None:
        """Write from now on with these weights: a folder, or on the first call also a hub id.

        ValueError where vLLM does not start: what it says, and the section.
        """
        if self.process is not None:
            self.ask(load=model)
            return
        self.start_process()
        try:
            self.ask(start={**self.arguments, "model": model})
        except RuntimeError as error:
            self.close()
            raise ValueError(f"{self.key}: {error}") from error

    def start_process(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                # Isolated: neither the folder of the server nor the working directory may hide vLLM's modules.
                [self.config.python or sys.executable, "-I", str(SERVER), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__,
                start_new_session=True,  # Ctrl-C is for this process, which ends it
            )
        self.lines = ours.makefile("rw")
        ours.close()
        self.ending = weakref.finalize(self, end, self.process, self.lines)

    def close(self) -> None:
        """End vLLM; otherwise it ends with this object, or this process."""
        if self.ending is not None:
            self.ending()

    def continuations(
        self, prompts: Sequence[Ids], *, stops: Sequence[int], room: Sequence[int], draws: Draws | None = None
    ) -> list[Continuation]:
        """As answering.generation.continuations, with the log-probability of each token; together as far as vLLM has
        memory for them. Drawn with the continuation's key as its seed."""
        if not prompts:
            return []
        found = self.ask(
            prompts=[prompt.tolist() for prompt in prompts],
            room=list(room),
            stops=list(stops),
            temperature=draws.temperature if draws else 0.0,
            seeds=[key % 2**63 for key in draws.keys] if draws else None,
        )
        return [
            Continuation(np.array(ids, dtype=np.int64), ids[-1] in stops, np.array(log_probabilities, dtype=np.float32))
            for ids, log_probabilities in zip(found["ids"], found["log_probabilities"], strict=True)
        ]

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its reply. RuntimeError: it says that it failed, or it is gone."""
        assert self.process is not None
        try:
            self.lines.write(json.dumps(request) + "\n")
            self.lines.flush()
            line = self.lines.readline()
        except OSError:
            line = ""
        if not line:
            status = self.process.wait()
            raise RuntimeError(f"vLLM ended with exit status {status}; its last words are in this log")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"vLLM failed: {reply['error']}")
        return reply


def end(process: subprocess.Popen[bytes], lines: Any) -> None:
    """End a server, which does so by itself once nobody can ask it any more."""
    try:
        lines.close()
        process.wait(END_S)
    except (OSError, subprocess.TimeoutExpired):
        process.kill()
        process.wait()


def environment_of(device: torch.device | None, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server that sees this GPU alone, or with None or on the CPU what this process sees."""
    environment = {name: value for name, value in environ.items() if name not in OF_RANKS}
    # Its engine in its own process: what is drawn then does not depend on how two processes meet.
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings are of what is asked for here
    if device is not None and device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number].strip() if visible else str(number)
    return environment
