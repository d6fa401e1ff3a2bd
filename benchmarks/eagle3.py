"""What a training step of a draft head costs beside a straightforward implementation of the published algorithm.

    python benchmarks/eagle3.py
    python benchmarks/eagle3.py --tokens 512 --json

One sequence, a target vocabulary of 128,256, a draft vocabulary of 32,000, 7 steps, every token supervised: forward,
loss and backward of the draft, given the target's hidden states. `published` attends with a dense causal mask and one
column for each guess, and holds the logits of all tokens, of target and draft, in float32.

Seconds are, on a CPU, those that its cores worked, whatever else the machine does. Memory is the peak over the inputs.
Every engine is a process of its own; repetitions are interleaved and the cheapest counts, so read the ratios. That both
compute the same loss and the same gradient is asserted.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from drafting.loss import Teacher
    from drafting.model import DraftModel

PROJECT = Path(__file__).resolve().parents[1]

VOCABULARY = 128_256
DRAFT_VOCABULARY = 32_000
STEP_WEIGHTS = tuple(0.8**step for step in range(7))
WIDTHS = {
    "cpu": {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2},
    "cuda": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
}


def main() -> None:
    options = read_options()
    if options.measure:
        print(json.dumps(measure(options.measure, options.tokens)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
    for repetition in range(options.repetitions):
        for name in ENGINES:
            print(f"{repetition + 1}/{options.repetitions} {name}", file=sys.stderr, flush=True)
            runs[name].append(measure_in_own_process(name, options.tokens))
    figures = {name: {key: min(run[key] for run in found) for key in found[0]} for name, found in runs.items()}
    require_same_results(figures)
    print(table(figures, options.tokens))
    if options.json:
        print(json.dumps(figures, indent=2))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of the sequence")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON, behind the table")
    parser.add_argument("--measure", choices=list(ENGINES), help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_in_own_process(name: str, tokens: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.eagle3", "--measure", name, "--tokens", str(tokens)]
    finished = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{name} failed:\n{finished.stderr}")
    figures: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return figures


def require_same_results(figures: dict[str, dict[str, float]]) -> None:
    ours, published = figures["drafting"], figures["published"]
    for key in ("loss", "gradient_norm"):
        if not math.isclose(ours[key], published[key], rel_tol=0.01):
            sys.exit(f"{key} is {ours[key]} here and {published[key]} by the published formulas")


def table(figures: dict[str, dict[str, float]], tokens: int) -> str:
    published = figures["published"]
    lines = [f"{'':12}{'seconds':>10}{'tokens/s':>10}{'peak MB':>10}{'x time':>10}{'x memory':>10}"]
    for name, found in figures.items():
        ratios = "".join(f"{found[key] / published[key]:>10.2f}" for key in ("seconds", "peak_mb"))
        speed = tokens / found["seconds"]
        lines.append(f"{name:12}{found['seconds']:>10.2f}{speed:>10,.0f}{found['peak_mb']:>10,.0f}{ratios}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ one measurement


@dataclass(frozen=True)
class Inputs:
    """Of one step."""

    draft: DraftModel
    features_1TF: torch.Tensor
    embeddings_1TH: torch.Tensor
    teacher: Teacher
    labels_1T: torch.Tensor


def measure(name: str, tokens: int) -> dict[str, float]:
    """Loss, norm of the gradient, seconds and peak memory of one step; a first one is not counted."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = make_inputs(tokens, device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        run(name, make_inputs(64, device))
        base_mb = peak_mb(device)
        started_s = clock_s(device)
        loss = run(name, inputs)
        seconds = clock_s(device) - started_s
    norms = [parameter.grad.float().norm() for parameter in inputs.draft.parameters() if parameter.grad is not None]
    return {
        "loss": loss,
        "gradient_norm": torch.stack(norms).norm().item(),
        "seconds": seconds,
        "peak_mb": peak_mb(device) - base_mb,
    }


def run(name: str, inputs: Inputs) -> float:
    loss = ENGINES[name](inputs)
    loss.backward()
    return loss.item()


def clock_s(device: torch.device) -> float:
    """Of a GPU the time, of a CPU the time that its cores worked."""
    import torch

    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_mb(device: torch.device) -> float:
    import torch

    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated() / 2**20


def make_inputs(tokens: int, device: torch.device) -> Inputs:
    import torch
    from transformers import LlamaConfig

    from drafting.loss import Teacher
    from drafting.model import draft_config, new_draft

    torch.manual_seed(0)
    target = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=8192, **WIDTHS[device.type])
    width, dtype = target.hidden_size, torch.bfloat16 if device.type == "cuda" else torch.float32
    head_VH = torch.randn(VOCABULARY, width, dtype=dtype, device=device) / width**0.5
    ids_D = torch.arange(DRAFT_VOCABULARY, device=device) * 4
    index_V = torch.full((VOCABULARY,), -1, device=device)
    index_V[ids_D] = torch.arange(DRAFT_VOCABULARY, device=device)
    assert draft_config(target, draft_vocabulary=DRAFT_VOCABULARY).hidden_size == width
    return Inputs(
        new_draft(target, head_VH[ids_D], seed=0).to(device),
        torch.randn(1, tokens, 3 * width, dtype=dtype, device=device),
        torch.randn(1, tokens, width, dtype=dtype, device=device),
        Teacher(torch.randn(tokens, width, dtype=dtype, device=device) * 3, head_VH, ids_D, index_V),
        torch.zeros(1, tokens, dtype=torch.long, device=device),
    )


# -------------------------------------------------------------------------------------------------------------- engines


def by_drafting(inputs: Inputs) -> torch.Tensor:
    """This project's."""
    import torch

    from drafting.model import PackedSamples

    tokens = inputs.labels_1T.shape[1]
    device = inputs.labels_1T.device
    samples = PackedSamples(
        torch.arange(tokens, device=device)[None], torch.tensor([0, tokens], dtype=torch.int32, device=device), tokens
    )
    result = inputs.draft(
        inputs.features_1TF, inputs.embeddings_1TH, samples, inputs.teacher, inputs.labels_1T, STEP_WEIGHTS
    )
    return result.loss / tokens


def as_published(inputs: Inputs) -> torch.Tensor:
    """Line by line: shifts to the left, a dense causal mask, one more column of scores a step, logits in float32."""
    import torch
    from torch.nn.functional import pad
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    draft, teacher = inputs.draft, inputs.teacher
    layer, attention = draft.midlayer, draft.midlayer.self_attn
    tokens, device = inputs.labels_1T.shape[1], inputs.labels_1T.device
    groups = draft.config.num_attention_heads // draft.config.num_key_value_heads

    def shifted(tensor_1TX: torch.Tensor) -> torch.Tensor:
        return pad(tensor_1TX[:, 1:], (0, 0, 0, 1))

    target_1TV = shifted((teacher.hidden_TH.to(teacher.head_VH.dtype) @ teacher.head_VH.T)[None]).float()
    target_mask_1T1 = (teacher.draft_index_V[target_1TV.argmax(-1)] >= 0)[..., None]
    target_1TD = target_1TV[..., teacher.draft_ids_D].softmax(-1)
    supervised_1T1 = torch.arange(tokens, device=device)[None, :, None] < tokens - 2
    causal_TT = torch.full((tokens, tokens), -torch.inf, device=device).triu(1)
    embeddings = shifted(inputs.embeddings_1TH)
    hidden = draft.fc(inputs.features_1TF)
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    total = torch.zeros((), device=device)
    for step, weight in enumerate(STEP_WEIGHTS):
        both = torch.cat([layer.input_layernorm(embeddings), layer.hidden_norm(hidden)], dim=-1)
        rotation = draft.rotary(hidden, torch.arange(tokens, device=device)[None] + step)
        query, key = apply_rotary_pos_emb(
            attention.heads(attention.q_proj(both)), attention.heads(attention.k_proj(both)), *rotation
        )
        value = attention.heads(attention.v_proj(both)).repeat_interleave(groups, dim=1)
        keys, values = [*keys, key.repeat_interleave(groups, dim=1)], [*values, value]
        scores = query @ keys[0].mT * attention.scaling + causal_TT
        for guess in keys[1:]:
            scores = torch.cat([scores, (query * guess).sum(-1, keepdim=True) * attention.scaling], dim=-1)
        weights = scores.float().softmax(-1).to(value.dtype)
        attended = weights[..., :tokens] @ values[0]
        for column, guess in enumerate(values[1:], start=tokens):
            attended = attended + weights[..., column : column + 1] * guess
        hidden = hidden + attention.o_proj(attended.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        log_q = draft.lm_head(draft.norm(hidden)).float().log_softmax(-1)
        total = total - weight * (target_mask_1T1 * supervised_1T1 * target_1TD * log_q).sum(-1).mean()
        embeddings, target_1TD = shifted(embeddings), shifted(target_1TD)
        target_mask_1T1, supervised_1T1 = shifted(target_mask_1T1), shifted(supervised_1T1)
    return total


ENGINES: dict[str, Callable[[Inputs], torch.Tensor]] = {"drafting": by_drafting, "published": as_published}


if __name__ == "__main__":
    main()
