"""Tokens that each engine writes a second, as answers before a training are written: transformers beside vLLM.

    python benchmarks/writing.py --vllm-python .vllm/bin/python
    python benchmarks/writing.py --vllm-python .vllm/bin/python --prompts 512 --layers 32 --hidden 4096 --dtype bfloat16

A Llama of random weights answers prompts of many lengths by drawing, each up to a room of its own: answers of a real
model end at different lengths too, and a batch waits for its longest. Both engines are given the same prompts and
rooms, `answers.batch_size` of them at once as each has it by default. The first call, which compiles, is not counted,
and repetitions are interleaved; the fastest counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from answering.config import SIDE_BY_SIDE  # noqa: E402
from answering.generation import Continuation, Draws, Ids, continuations  # noqa: E402
from answering.vllm_engine import VllmEngine  # noqa: E402
from training.vllm_config import VllmConfig  # noqa: E402

VOCABULARY = 32_000
NO_STOP = [VOCABULARY - 1]
LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True, help="a Python that has vllm")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--longest", type=int, default=128, help="tokens of the longest answer")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--kv-cache-gib", type=float, help="of vLLM on a CPU")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder) / "model")


def compare(options: argparse.Namespace, folder: Path) -> None:
    dtype = getattr(torch, options.dtype)
    network = random_model(folder, layers=options.layers, hidden=options.hidden).to(dtype)
    arguments = {"kv_cache_memory_bytes": int(options.kv_cache_gib * 2**30)} if options.kv_cache_gib else {}
    config = VllmConfig(python=options.vllm_python, gpu_memory_share=0.5, arguments=arguments)
    engine = VllmEngine(config, key="vllm", dtype=dtype, max_length=LENGTH)
    engine.load(str(folder))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    writers = {"transformers": partial(continuations, network.to(device)), "vllm": engine.continuations}
    prompts, room = asked(options.prompts, longest=options.longest)
    speeds: dict[str, list[float]] = {name: [] for name in writers}
    for write in writers.values():
        tokens_per_s(write, prompts[:8], room[:8], at_once=8)
    for _ in range(options.repetitions):
        for name, write in writers.items():
            speeds[name].append(tokens_per_s(write, prompts, room, at_once=SIDE_BY_SIDE[name]))
            print(f"{name}: {speeds[name][-1]:,.0f} tokens/s", file=sys.stderr, flush=True)
    engine.close()
    best = {name: max(found) for name, found in speeds.items()}
    parameters = sum(weight.numel() for weight in network.parameters())
    print(f"{parameters / 1e6:.0f} M parameters in {options.dtype} on {device.type}, {options.prompts} prompts, "
          f"answers of 1 to {options.longest} tokens")  # fmt: skip
    for name, speed in best.items():
        print(f"{name:12} {speed:10,.0f} tokens/s   {speed / best['transformers']:.2f} x")


def random_model(folder: Path, *, layers: int, hidden: int) -> torch.nn.Module:
    """A Llama with its weights in a folder, eight heads to a group of keys and values."""
    torch.manual_seed(1)
    heads = max(1, hidden // 64)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 8),
        max_position_embeddings=LENGTH,
        eos_token_id=NO_STOP[0],
    )
    network = AutoModelForCausalLM.from_config(config)
    network.save_pretrained(folder)
    return network.eval()


def asked(count: int, *, longest: int) -> tuple[list[Ids], list[int]]:
    """Prompts of 16 to 256 tokens, and how long each answer may be."""
    generator = np.random.default_rng(1)
    prompts = [generator.integers(10, VOCABULARY - 10, size=length) for length in generator.integers(16, 257, count)]
    order = sorted(range(count), key=lambda number: len(prompts[number]))  # as answers are asked for
    room = generator.integers(1, longest + 1, count).tolist()
    return [prompts[number] for number in order], [room[number] for number in order]


def tokens_per_s(
    write: Callable[..., list[Continuation]], prompts: list[Ids], room: list[int], *, at_once: int
) -> float:
    began, tokens = time.perf_counter(), 0
    for first in range(0, len(prompts), at_once):
        part = slice(first, first + at_once)
        draws = Draws(range(first, first + len(prompts[part])), temperature=1.0)
        written = write(prompts[part], stops=NO_STOP, room=room[part], draws=draws)
        tokens += sum(len(one.ids) for one in written)
    return tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
