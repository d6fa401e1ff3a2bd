"""What distillation costs beside its peers.

    python benchmarks/distillation.py
    python benchmarks/distillation.py --sections loss --repetitions 3 --json

`loss`: forward KL from the whole of a live teacher's distribution, and from a cache of its 64 most probable tokens,
mixed with cross entropy, at a vocabulary of 128,256: seconds of a forward and backward pass (on a CPU those that one
core works, whatever else the machine does), and peak memory over the inputs. `cache`: see teacher_cache.py.

Every engine is a process of its own;
repetitions are interleaved and the cheapest counts, so read the ratios. A peer that is not installed is skipped:
pip install liger-kernel.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teacher_cache import cache_section

if TYPE_CHECKING:
    import torch

    from distilling.divergences import DenseTeacher, LossSettings
    from distilling.targets import SparseTargets
    from training.losses import Head

PROJECT = Path(__file__).resolve().parents[1]

VOCABULARY = 128_256
KEPT = 64


def main() -> None:
    options = read_options()
    if options.measure:
        print(json.dumps(measure_loss(options)))
        return
    figures = {section: SECTIONS[section](options) for section in options.sections}
    if options.json:
        print(json.dumps(figures, indent=2))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", type=lambda names: names.split(","), default=list(SECTIONS), help="with commas")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--engines", nargs="*", default=list(LOSSES), choices=list(LOSSES), help="of the loss section")
    parser.add_argument("--tokens", type=int, help="supervised tokens of the loss; unset: 2048, and 8192 on a GPU")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON, behind the tables")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"--sections: no {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return options


# ------------------------------------------------------------------------------------------------ loss, as it is shown


def loss_section(options: argparse.Namespace) -> dict[str, Any]:
    """Cheapest seconds and peak memory of every engine."""
    names = [f"{source}/{engine}" for engine in options.engines for source in LOSSES[engine]]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for repetition in range(options.repetitions):
        for name in names:
            print(f"{repetition + 1}/{options.repetitions} loss {name}", file=sys.stderr, flush=True)
            run = measure_in_own_process(name, options)
            if run:
                runs[name].append(run)
    figures = {name: {key: min(run[key] for run in found) for key in found[0]} for name, found in runs.items() if found}
    print(loss_table(figures))
    require_same_losses(figures)
    return figures


def measure_in_own_process(name: str, options: argparse.Namespace) -> dict[str, float] | None:
    engine = name.partition("/")[2]
    if importlib.util.find_spec(PACKAGES.get(engine, "torch")) is None:
        print(f"{engine} is not installed: pip install {PACKAGES[engine].replace('_', '-')}", file=sys.stderr)
        return None
    command = [sys.executable, __file__, "--measure", name]
    command += ["--temperature", str(options.temperature)]
    command += ["--tokens", str(options.tokens)] if options.tokens else []
    finished = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{name} failed:\n{finished.stderr}")
    figures: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return figures


def loss_table(figures: dict[str, dict[str, float]]) -> str:
    lines = [f"{'forward KL and cross entropy':32}{'seconds':>10}{'peak MB':>10}{'x dense':>10}{'x memory':>10}"]
    for name, found in sorted(figures.items()):
        ratios = ""
        dense = figures.get(f"{name.partition('/')[0]}/dense")
        if dense:
            ratios = "".join(f"{found[key] / dense[key]:>10.2f}" for key in ("seconds", "peak_mb"))
        lines.append(f"{name:32}{found['seconds']:>10.3f}{found['peak_mb']:>10,.0f}{ratios}")
    return "\n".join(lines)


def require_same_losses(figures: dict[str, dict[str, float]]) -> None:
    for name, found in figures.items():
        source, _, engine = name.partition("/")
        dense = figures.get(f"{source}/dense")
        if dense and engine != "trl" and not math.isclose(found["loss"], dense["loss"], rel_tol=0.01):
            sys.exit(f"{name} has a loss of {found['loss']}, and the dense reference {dense['loss']}")


# ----------------------------------------------------------------------------------------------- loss, one measurement


@dataclass(frozen=True)
class Inputs:
    """Of one pass. The teacher is as wide as the student on a CPU, and twice as wide on a GPU."""

    hidden: torch.Tensor
    head: Head
    targets: torch.Tensor
    teacher: DenseTeacher
    cache: SparseTargets | None
    settings: LossSettings

    def first(self, num_tokens: int) -> Inputs:
        """Those of fewer tokens."""
        some = slice(num_tokens)
        teacher = replace(self.teacher, hidden_NJ=self.teacher.hidden_NJ[some])
        hidden = self.hidden.detach()[some].requires_grad_()
        return replace(
            self, hidden=hidden, targets=self.targets[some], teacher=teacher, cache=self.cache and self.cache.rows(some)
        )


def measure_loss(options: argparse.Namespace) -> dict[str, float]:
    """Seconds, loss, and peak memory over the inputs, of forward and backward, in this process."""
    import torch

    source, _, engine = options.measure.partition("/")
    on_gpu = torch.cuda.is_available()
    num_tokens = options.tokens or (8192 if on_gpu else 2048)
    torch.set_num_threads(1)
    inputs = make_inputs(num_tokens, options.temperature, on_gpu=on_gpu, cached=source == "cache")
    run_pass(LOSSES[engine][source], inputs.first(num_tokens if on_gpu else 16))
    inputs.head.weight.grad = None
    held_mb = forget_peak_mb()
    seconds, loss = run_pass(LOSSES[engine][source], inputs)
    return {"seconds": seconds, "peak_mb": read_peak_mb() - held_mb, "loss": loss}


def make_inputs(num_tokens: int, temperature: float, *, on_gpu: bool, cached: bool) -> Inputs:
    import torch

    from distilling.divergences import DenseTeacher, LossSettings
    from training.losses import Head

    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    width, teacher_width = (2048, 4096) if on_gpu else (512, 512)

    def draw(rows: int, columns: int, size: float) -> torch.Tensor:
        return torch.randn(rows, columns, device=device, dtype=dtype).mul_(size)

    teacher = DenseTeacher(
        draw(num_tokens, teacher_width, 1), Head(draw(VOCABULARY, teacher_width, 3 / math.sqrt(teacher_width)), None)
    )
    return Inputs(
        draw(num_tokens, width, 1).requires_grad_(),
        Head(draw(VOCABULARY, width, 2 / math.sqrt(width)).requires_grad_(), None),
        torch.randint(VOCABULARY, (num_tokens,), device=device),
        teacher,
        keep_top(teacher, temperature) if cached else None,
        LossSettings(divergence="forward_kl", weight=0.5, temperature=temperature, skew=0.1, mixing=0.5),
    )


def keep_top(teacher: DenseTeacher, temperature: float) -> SparseTargets:
    import torch
    from torch.nn.functional import linear

    from distilling.targets import SparseTargets

    kept = []
    for hidden in teacher.hidden_NJ.split(128):
        log_p = torch.log_softmax(linear(hidden, teacher.head.weight).float() / temperature, dim=1)
        top = log_p.topk(KEPT)
        tail = log_p.scatter(1, top.indices, -math.inf).logsumexp(1)
        kept.append((top.indices, top.values, top.values.exp(), tail))
    return SparseTargets(*(torch.cat(parts) for parts in zip(*kept, strict=True)))


def run_pass(loss_of: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> tuple[float, float]:
    """Seconds and loss of one forward and backward pass."""
    import torch

    inputs.hidden.grad = inputs.head.weight.grad = None
    if not torch.cuda.is_available():
        started_s = time.process_time()
        loss = loss_of(inputs)
        loss.backward()
        return time.process_time() - started_s, loss.item()
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    started.record()
    loss = loss_of(inputs)
    loss.backward()
    ended.record()
    torch.cuda.synchronize()
    return started.elapsed_time(ended) / 1e3, loss.item()


def forget_peak_mb() -> float:
    """Starts the measurement of the peak anew, and gives what is held now."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mb("VmRSS")


def read_peak_mb() -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else resident_mb("VmHWM")


def resident_mb(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name)) * 1024 / 1e6


# --------------------------------------------------------------------------------------------------- loss, the engines


def baton_teacher(inputs: Inputs) -> torch.Tensor:
    from distilling.divergences import distillation_loss

    return distillation_loss(inputs.hidden, inputs.head, inputs.targets, inputs.teacher, inputs.settings).loss


def baton_cache(inputs: Inputs) -> torch.Tensor:
    from distilling.divergences import distillation_loss

    assert inputs.cache is not None
    return distillation_loss(inputs.hidden, inputs.head, inputs.targets, inputs.cache, inputs.settings).loss


def dense_teacher(inputs: Inputs) -> torch.Tensor:
    import torch
    from torch.nn.functional import kl_div, linear

    temperature = inputs.settings.temperature
    with torch.no_grad():
        teacher_logits = linear(inputs.teacher.hidden_NJ, inputs.teacher.head.weight).float()
        log_p = torch.log_softmax(teacher_logits / temperature if temperature != 1 else teacher_logits, dim=1)
        del teacher_logits
    data, log_q, _ = dense_student(inputs)
    return mixed(data, kl_div(log_q, log_p, reduction="sum", log_target=True), inputs)


def dense_cache(inputs: Inputs) -> torch.Tensor:
    data, log_q, logits = dense_student(inputs)
    kept = inputs.cache
    assert kept is not None
    tail = kept.log_tail_N
    assert tail is not None
    divergence = (kept.weights_NS * (kept.log_probabilities_NS - log_q.gather(1, kept.ids_NS))).sum()
    log_rest = logits.scatter(1, kept.ids_NS, -math.inf).logsumexp(1) - logits.logsumexp(1)
    return mixed(data, divergence + (tail.exp() * (tail - log_rest)).sum(), inputs)


def dense_student(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy; log probabilities and logits at the temperature."""
    import torch
    from torch.nn.functional import cross_entropy, linear, nll_loss

    logits = linear(inputs.hidden, inputs.head.weight).float()
    if inputs.settings.temperature == 1:
        log_q = torch.log_softmax(logits, dim=1)
        return nll_loss(log_q, inputs.targets, reduction="sum"), log_q, logits
    data = cross_entropy(logits, inputs.targets, reduction="sum")
    logits = logits / inputs.settings.temperature
    return data, torch.log_softmax(logits, dim=1), logits


def mixed(data: torch.Tensor, divergence: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    weight, temperature = inputs.settings.weight, inputs.settings.temperature
    return (1 - weight) * data + weight * temperature**2 * divergence


def trl_teacher(inputs: Inputs) -> torch.Tensor:
    """The divergence alone: TRL's trainer has no cross entropy beside it."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    teacher = inputs.teacher
    divergence, _ = ChunkedDivergenceFunction.apply(
        inputs.hidden, inputs.head.weight, None, teacher.hidden_NJ, teacher.head.weight, None, 0.0,
        inputs.settings.temperature,
    )  # fmt: skip
    loss: torch.Tensor = divergence.sum()
    return loss


def liger_teacher(inputs: Inputs) -> torch.Tensor:
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    weight, temperature = inputs.settings.weight, inputs.settings.temperature
    # Compiled, as it is meant to be, where that needs no C++ compiler.
    loss_of = LigerFusedLinearJSDLoss(
        1 - weight, weight * temperature**2, beta=0.0, temperature=temperature, compiled=torch.cuda.is_available()
    )
    teacher = inputs.teacher
    loss: torch.Tensor = loss_of(
        inputs.hidden, inputs.head.weight, teacher.hidden_NJ, teacher.head.weight, inputs.targets
    )
    return loss * len(inputs.targets)


PACKAGES = {"trl": "trl", "liger": "liger_kernel"}
# No peer here learns from a cache without whole logits.
LOSSES: dict[str, dict[str, Callable[[Inputs], torch.Tensor]]] = {
    "baton": {"teacher": baton_teacher, "cache": baton_cache},
    "dense": {"teacher": dense_teacher, "cache": dense_cache},
    "trl": {"teacher": trl_teacher},
    "liger": {"teacher": liger_teacher},
}

SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"loss": loss_section, "cache": cache_section}


if __name__ == "__main__":
    main()
