"""Tokens per second of finetuning, side by side: this trainer, a bare PyTorch loop, transformers.Trainer, TRL.

    python benchmarks/finetuning.py
    python benchmarks/finetuning.py --data codealpaca.json --tokenizer tokenizer.json --repetitions 5 --json

Every variant trains the same small Llama from the same random weights on the same samples, with loss on every token
and about as many real tokens in each optimizer step. Every measurement is a process of its own; repetitions are
interleaved, so read the ratios: on a busy machine the seconds mean little, and `--threads 1` is steadiest. With a GPU
the model is of the 1B class, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

PROJECT = Path(__file__).resolve().parents[1]

WARMUP_STEPS = 1
VARIANTS = ["baton", "bare", "trainer_padded", "trl_packed", "trl_padded"]
WORKLOADS = ["instructions", "mixed"]
HEADS = ["chunked", "naive"]

# Dense bfloat16 peak of a GPU in TFLOP/s, as its maker states it.
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "L40S": 362, "4090": 165}


@dataclass(frozen=True)
class Scale:
    """How large the measurement is: the model, the pack, the samples."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int
    capacity: int
    """Tokens in a pack, and real tokens (about) in an optimizer step of any variant."""
    steps: int
    """Optimizer steps, the warm-up among them."""
    head_tokens: int
    head_hidden: int


ON_CPU = Scale(256, 4, 8, 4, 1024, 32_000, 2048, 4, 2048, 512)
ON_GPU = Scale(2048, 16, 32, 8, 8192, 128_256, 16_384, 24, 16_384, 2048)
HEAD_VOCABULARY = 128_256

Sample = list[int]


# ----------------------------------------------------------------------------- what is measured, and how it is shown


def main() -> None:
    options = read_options()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.samples = Path(scratch)
        for workload in options.workloads:
            samples = make_samples(workload, options)
            (options.samples / f"{workload}.json").write_text(json.dumps(samples))
        results = repeat_interleaved(options)
    summary = summarise(results)
    print(json.dumps(summary, indent=2) if options.json else as_text(summary))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="texts for `instructions`: JSON or JSON lines; strings are joined")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json for --data")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--variants", nargs="*", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--workloads", nargs="*", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--heads", nargs="*", default=HEADS, choices=HEADS, help="loss heads to measure")
    parser.add_argument("--threads", type=int, help="CPU threads of a measurement; 1 is steadiest on a busy machine")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if bool(options.data) != bool(options.tokenizer):
        parser.error("--data and --tokenizer go together")
    return options


def repeat_interleaved(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Every measurement once, then every one again: what slows the machine down slows all of them."""
    names = [f"{workload}/{variant}" for workload in options.workloads for variant in options.variants]
    names += [f"head/{head}" for head in options.heads]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for repetition in range(options.repetitions):
        for name in names:
            print(f"{repetition + 1}/{options.repetitions} {name}", file=sys.stderr, flush=True)
            results[name].append(measure_in_own_process(name, options))
    return results


def measure_in_own_process(name: str, options: argparse.Namespace) -> dict[str, float]:
    # As a module: run by its path, this file would hide the trainer of the same name.
    command = [sys.executable, "-m", "benchmarks.finetuning", "--measure", name, "--samples", str(options.samples)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.threads:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    finished = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{name} failed:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])


def summarise(results: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of every figure, and how many times faster `baton` is than each other variant of its workload."""
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
    }
    ratios = {}
    for name, figures in medians.items():
        workload, _, variant = name.partition("/")
        ours = medians.get(f"{workload}/baton")
        if ours and variant != "baton":
            ratios[f"{workload}: baton / {variant}"] = ours["tokens_per_s"] / figures["tokens_per_s"]
    if {"head/chunked", "head/naive"} <= medians.keys():
        for key in ("seconds", "peak_mb"):
            ratios[f"head {key}: chunked / naive"] = medians["head/chunked"][key] / medians["head/naive"][key]
    return {"medians": medians, "ratios": ratios, "runs": results}


def as_text(summary: dict[str, Any]) -> str:
    lines = [f"{'median of each':32}{'tokens/s':>12}{'seconds':>10}{'peak MB':>10}{'MFU':>8}"]
    for name, figures in summary["medians"].items():
        tokens_per_s = f"{figures['tokens_per_s']:,.0f}" if "tokens_per_s" in figures else ""
        mfu = f"{figures['mfu']:.1%}" if "mfu" in figures else ""
        lines.append(f"{name:32}{tokens_per_s:>12}{figures['seconds']:>10.2f}{figures['peak_mb']:>10,.0f}{mfu:>8}")
    lines += ["", *(f"{name:44}{ratio:6.2f} x" for name, ratio in summary["ratios"].items())]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- samples


def make_samples(workload: str, options: argparse.Namespace) -> list[Sample]:
    """Token ids of samples that fill `steps` packs, from the texts given or drawn from the seed."""
    scale = ON_GPU if has_gpu() else ON_CPU
    draw = random.Random(options.seed)
    if workload == "instructions" and options.data:
        texts = read_texts(options.data, options.tokenizer)
        lengthy = ([token % scale.vocabulary for token in text[: scale.capacity]] for text in draw_forever(texts, draw))
    else:
        # Instructions: the lengths of CodeAlpaca under the GPT-2 tokenizer. Mixed: mean of about 300, maximum 2048.
        mean_log, deviation_log, longest = (4.42, 0.71, 1091) if workload == "instructions" else (5.2, 1.0, 2048)
        lengths = (max(8, min(longest, round(draw.lognormvariate(mean_log, deviation_log)))) for _ in iter(int, 1))
        lengthy = ([draw.randrange(3, scale.vocabulary) for _ in range(length)] for length in lengths)
    samples: list[Sample] = []
    while sum(map(len, samples)) < scale.steps * scale.capacity:
        samples.append(next(lengthy))
    return samples


def read_texts(data: Path, tokenizer_file: Path) -> list[Sample]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    text = data.read_text()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    joined = ["\n".join(value for value in row.values() if isinstance(value, str)) for row in rows]
    return [encoding.ids for encoding in tokenizer.encode_batch(joined)]


def draw_forever(texts: list[Sample], draw: random.Random) -> Iterator[Sample]:
    while True:
        yield from draw.sample(texts, len(texts))


def has_gpu() -> bool:
    """Asked in a process of its own, so that the one that waits holds no GPU and little memory."""
    question = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question], check=False).returncode == 0


# ----------------------------------------------------------------------------------------------- one measurement


def measure(options: argparse.Namespace) -> dict[str, float]:
    """The figures of one variant, in this process."""
    import torch

    workload, _, variant = options.measure.partition("/")
    scale = ON_GPU if torch.cuda.is_available() else ON_CPU
    if workload == "head":
        return measure_head(variant, scale)
    samples = json.loads((options.samples / f"{workload}.json").read_text())
    clock = StepClock()
    model = build_model(scale, packed=variant in ("baton", "bare"))
    run: Callable[..., None] = globals()[f"run_{variant}"]
    with tempfile.TemporaryDirectory() as folder:
        run(model, samples, scale, clock, Path(folder))
    figures = {"tokens_per_s": clock.tokens_per_s(), "seconds": clock.seconds(), "peak_mb": peak_mb()}
    if torch.cuda.is_available():
        # 6 floating point operations per parameter and token, forward and backward; attention scores not counted.
        tflops = 6 * sum(parameter.numel() for parameter in model.parameters()) * clock.tokens_per_s() / 1e12
        name = torch.cuda.get_device_name()
        peaks = [peak for gpu, peak in PEAK_TFLOPS.items() if gpu in name]
        if peaks:
            figures["mfu"] = tflops / peaks[0]
    return figures


class StepClock:
    """Real tokens and times of the optimizer steps after the warm-up."""

    def __init__(self) -> None:
        self.ends_s: list[float] = []
        self.tokens: list[int] = []

    def count(self, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        self.tokens.append(inputs["input_ids"].numel() if mask is None else int(mask.sum()))

    def step_ended(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends_s.append(time.perf_counter())

    def seconds(self) -> float:
        return self.ends_s[-1] - self.ends_s[WARMUP_STEPS - 1]

    def tokens_per_s(self) -> float:
        assert len(self.tokens) == len(self.ends_s), "one micro-batch in each optimizer step"
        return sum(self.tokens[WARMUP_STEPS:]) / self.seconds()

    def watch(self, trainer: Trainer) -> None:
        """Count what a Trainer trains on, and look at the clock where its optimizer steps end."""
        from transformers import TrainerCallback

        clock, training_step = self, trainer.training_step

        class Ticker(TrainerCallback):
            def on_step_end(self, *arguments: Any, **named: Any) -> None:
                clock.step_ended()

        def counted_step(model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
            clock.count(inputs)
            return training_step(model, inputs, *arguments, **named)

        trainer.training_step = counted_step
        trainer.add_callback(Ticker())


def peak_mb() -> float:
    """Most memory so far: of the GPU where there is one, else resident memory of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024 / 1e6


def build_model(scale: Scale, *, packed: bool) -> PreTrainedModel:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.attention import register_varlen_attention
    from training.losses import use_chunked_loss

    register_varlen_attention()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=scale.hidden,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.key_value_heads,
        intermediate_size=scale.intermediate,
        vocab_size=scale.vocabulary,
        max_position_embeddings=scale.capacity,
        use_cache=False,
        attn_implementation="varlen" if packed else "sdpa",
    )
    model = LlamaForCausalLM(config)
    if packed:
        use_chunked_loss(model)
    return model


def packed_rows(samples: list[Sample], scale: Scale) -> Any:
    import numpy as np

    from mixture.packing import best_fit_packs
    from mixture.shards import TokenRow
    from training.batches import PackedDataset

    rows = [
        TokenRow(str(number), np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=np.bool_), "benchmark")
        for number, ids in enumerate(samples)
    ]
    return PackedDataset(rows, best_fit_packs(np.array([len(ids) for ids in samples]), scale.capacity))  # type: ignore[arg-type]


def run_baton(model: PreTrainedModel, samples: list[Sample], scale: Scale, clock: StepClock, folder: Path) -> None:
    import torch

    from finetuning import compute_loss
    from training.checkpoints import ResumeTerms
    from training.config import TrainingConfig
    from training.distributed import Ranks
    from training.run_folder import RunFolder
    from training.schedule import Horizon
    from training.trainer import BlockTrainer, training_arguments

    config = TrainingConfig(lr=1e-4, batch_size=1, arguments={"report_to": "none"})
    rows = packed_rows(samples, scale)
    horizon = Horizon.of(config, num_rows=len(rows), world_size=1)
    run_folder = RunFolder(folder)
    precision = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    trainer = BlockTrainer(
        model,
        rows,
        compute_loss,
        config=config,
        arguments=training_arguments(config, folder=run_folder, horizon=horizon, seed=0, precision=precision),
        horizon=horizon,
        terms=ResumeTerms(
            fingerprint="",
            objective="sft",
            parameters="",
            batch_size=1,
            gradient_accumulation=1,
            world_size=1,
            parallelism="ddp",
            horizon_steps=horizon.total_steps,
            optimization="",
        ),
        folder=run_folder,
        ranks=Ranks(),
        start=None,
        stop_requested=lambda: False,
    )
    clock.watch(trainer)
    trainer.train_block()


def run_bare(model: PreTrainedModel, samples: list[Sample], scale: Scale, clock: StepClock, folder: Path) -> None:
    """A textbook loop over the packs, attention and loss of `baton`: the difference is what the trainer costs."""
    import torch

    from training.batches import collate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # as the trainers have it
    for pack in packed_rows(samples, scale):
        batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in collate([pack]).items()}
        clock.count(batch)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step_ended()


def run_trainer_padded(
    model: PreTrainedModel, samples: list[Sample], scale: Scale, clock: StepClock, folder: Path
) -> None:
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    arguments = TrainingArguments(**peer_arguments(folder, padded_batch_size(samples, scale)))
    collator = DataCollatorForLanguageModeling(small_tokenizer(), mlm=False)
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": ids} for ids in samples], data_collator=collator)
    clock.watch(trainer)
    trainer.train()


def run_trl_padded(model: PreTrainedModel, samples: list[Sample], scale: Scale, clock: StepClock, folder: Path) -> None:
    run_trl(model, samples, scale, clock, peer_arguments(folder, padded_batch_size(samples, scale)))


def run_trl_packed(model: PreTrainedModel, samples: list[Sample], scale: Scale, clock: StepClock, folder: Path) -> None:
    packing = {"packing": True, "packing_strategy": "bfd"}
    run_trl(model, samples, scale, clock, {**peer_arguments(folder, batch_size=1), **packing})


def run_trl(
    model: PreTrainedModel, samples: list[Sample], scale: Scale, clock: StepClock, arguments: dict[str, Any]
) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model,
        # TRL recomputes activations unless told otherwise, which no other variant here does.
        SFTConfig(**arguments, max_length=scale.capacity, gradient_checkpointing=False),
        train_dataset=Dataset.from_dict({"input_ids": samples}),
        processing_class=small_tokenizer(),
    )
    clock.watch(trainer)
    trainer.train()


def padded_batch_size(samples: list[Sample], scale: Scale) -> int:
    return max(1, round(scale.capacity * len(samples) / sum(map(len, samples))))


def peer_arguments(folder: Path, batch_size: int) -> dict[str, Any]:
    import torch

    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10,
        "disable_tqdm": True,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
    }


def small_tokenizer() -> Any:
    """A tokenizer that can only pad: the samples are token ids already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def measure_head(variant: str, scale: Scale) -> dict[str, float]:
    """Seconds and peak memory over the inputs of one forward and backward pass of the loss head."""
    import torch
    from torch.nn.functional import cross_entropy, linear

    from training.losses import linear_cross_entropy

    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    hidden = torch.randn(scale.head_tokens, scale.head_hidden, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(HEAD_VOCABULARY, scale.head_hidden, device=device, dtype=dtype).div_(50).requires_grad_()
    targets = torch.randint(HEAD_VOCABULARY, (scale.head_tokens,), device=device)
    held_mb = peak_mb()
    seconds = math.inf
    for _ in range(2):
        hidden.grad = weight.grad = None
        started_s = time.perf_counter()
        if variant == "naive":
            cross_entropy(linear(hidden, weight).float(), targets, reduction="sum").backward()
        else:
            linear_cross_entropy(hidden, weight, targets).backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - started_s)
    return {"seconds": seconds, "peak_mb": peak_mb() - held_mb}


if __name__ == "__main__":
    main()
