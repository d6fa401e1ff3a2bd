"""LoRA experts against a single LoRA with as many trained numbers, on a mix of mathematics and code.

    python -m benchmarks.lora_experts --gsm8k gsm8k_train.jsonl --mbpp mbpp.jsonl

A small Llama is first trained from scratch on part of both sets, as plain text. Then each kind of adapter learns the
answers to other questions of both, from the same base in the same order, and is scored on a third part. Of two learning
rates each kind takes the one that is better for it with the first seed. About ten minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.adapters import ExpertSteps
from training.batches import IGNORED, Batch, flat_batch
from training.config import LoraConfig, LoraExpertsConfig, ModelConfig
from training.models import build_model

PROJECT = Path(__file__).resolve().parents[1]
TOKENIZER = PROJECT / "configs/models/tiny"
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 4,
         "head_dim": 32, "num_hidden_layers": 4}  # fmt: skip
NUM_EXPERTS, EXPERT_RANK, TOP_K = 4, 4, 2
LEARNING_RATES = (2e-3, 6e-3)
MAX_TOKENS = 384


@dataclass(frozen=True)
class Row:
    """One question and its answer, in tokens."""

    question: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Domain:
    """The rows of one set: for the base, for the adapters, held out."""

    base: list[Row]
    train: list[Row]
    test: list[Row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True, help="JSON lines with question and answer")
    parser.add_argument("--mbpp", type=Path, required=True, help="JSON lines with text and code")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base-rows", type=int, nargs=2, default=(1600, 350))
    parser.add_argument("--train-rows", type=int, nargs=2, default=(500, 450))
    options = parser.parse_args()
    torch.set_num_threads(1)
    domains = {
        "gsm8k": read_domain(options.gsm8k, ("question", "answer"), options.base_rows[0], options.train_rows[0]),
        "mbpp": read_domain(options.mbpp, ("text", "code"), options.base_rows[1], options.train_rows[1]),
    }
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        train_base(base, domains)
        compare(base, domains, seeds=options.seeds)


def read_domain(path: Path, keys: tuple[str, str], num_base: int, num_train: int) -> Domain:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        question, answer = (json.loads(line)[key] for key in keys)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"{question}\n", answer)]
        if sum(map(len, ids)) < MAX_TOKENS:
            rows.append(Row(ids[0], [*ids[1], tokenizer.eos_token_id]))
    random.Random(0).shuffle(rows)
    return Domain(rows[:num_base], rows[num_base : num_base + num_train], rows[num_base + num_train :][:150])


def train_base(folder: Path, domains: dict[str, Domain]) -> None:
    """A model from scratch, trained on every token of the rows of both sets."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(TOKENIZER)
    config.update(SHAPE)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    model = build_model(ModelConfig(name=str(folder), from_scratch=True), seed=0)
    rows = [row for domain in domains.values() for row in domain.base]
    train(model, batches(rows * 2, seed=0, whole=True), lr=3e-3)
    model.save_pretrained(folder)
    print(f"base: {sum(p.numel() for p in model.parameters()):,} parameters, {losses_text(model, domains)}", flush=True)


def compare(base: Path, domains: dict[str, Domain], *, seeds: int) -> None:
    experts = ModelConfig(
        name=str(base),
        peft=True,
        peft_method="lora_moe",
        lora=LoraConfig(r=EXPERT_RANK, alpha=2 * EXPERT_RANK),
        experts=LoraExpertsConfig(num=NUM_EXPERTS, top_k=TOP_K),
    )
    wanted = num_trained(build_model(experts, seed=0))
    rank = next(r for r in range(1, 999) if num_trained(build_model(single_lora(base, r), seed=0)) >= wanted)
    # Without the balance loss too, to see what it does.
    unbalanced = replace(experts, experts=replace(experts.experts, balance_coefficient=0.0))
    kinds = {"single LoRA": single_lora(base, rank), "experts": experts, "experts, no balance": unbalanced}
    for name, config in kinds.items():
        first = {lr: run(config, domains, lr=lr, seed=0) for lr in LEARNING_RATES}
        best = min(first, key=lambda lr: first[lr]["both"])
        results = [first[best], *(run(config, domains, lr=best, seed=seed) for seed in range(1, seeds))]
        model = build_model(config, seed=0)
        figures = "  ".join(
            f"{key} {statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
            for key in results[0]
            if (values := [result[key] for result in results])
        )
        print(f"{name}: {num_trained(model):,} trained, lr {best}, {seeds} seeds: {figures}", flush=True)
        print(f"    each: {[round(result['both'], 4) for result in results]}; at the rates: "
              f"{ {lr: round(result['both'], 4) for lr, result in first.items()} }", flush=True)  # fmt: skip


def single_lora(base: Path, rank: int) -> ModelConfig:
    return ModelConfig(name=str(base), peft=True, lora=LoraConfig(r=rank, alpha=2 * rank))


def num_trained(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def run(config: ModelConfig, domains: dict[str, Domain], *, lr: float, seed: int) -> dict[str, float]:
    """Train one adapter and score it: loss per answer token on each set and on both, and how unlike its use is."""
    model = build_model(config, seed=seed)
    rows = [row for domain in domains.values() for row in domain.train]
    data = batches(rows, seed=seed)
    if config.peft_method != "lora_moe":
        train(model, data, lr=lr)
        return losses(model, domains)
    steps = ExpertSteps(model, config.experts, steps_per_epoch=len(data))
    train(model, data, lr=lr, added=steps.loss)
    metrics = steps.take()
    return {**losses(model, domains), "balance": metrics["expert_balance"], "apart": apart(model, steps, domains)}


def apart(model: torch.nn.Module, steps: ExpertSteps, domains: dict[str, Domain]) -> float:
    """Half the summed difference between the experts' shares on the two sets: 0 where alike, 1 where disjoint."""
    shares = []
    model.train()
    for domain in domains.values():
        with torch.no_grad():
            model(**as_batch(domain.test[:30]))
        shares.append(torch.stack([layer.take_routing()[0] for layer in steps.layers]))
    return float((shares[0] - shares[1]).abs().sum(-1).mean() / 2)


def train(model: Any, data: Sequence[Batch], *, lr: float, added: Callable[[], torch.Tensor] | None = None) -> None:
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(data), pct_start=0.1)
    model.train()
    for batch in data:
        loss = model(**batch).loss
        (loss + added() if added else loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def batches(rows: Sequence[Row], *, seed: int, whole: bool = False, rows_per_batch: int = 8) -> list[Batch]:
    order = np.random.default_rng(seed).permutation(len(rows))
    return [
        as_batch([rows[row] for row in order[start : start + rows_per_batch]], whole=whole)
        for start in range(0, len(rows), rows_per_batch)
    ]


def as_batch(rows: Sequence[Row], *, whole: bool = False) -> Batch:
    masks = [np.array([whole] * len(row.question) + [True] * len(row.answer)) for row in rows]
    return flat_batch([np.array(row.question + row.answer) for row in rows], masks)


def losses(model: Any, domains: dict[str, Domain]) -> dict[str, float]:
    """Nats per answer token, on each set and, both weighing as much, together."""
    model.eval()
    found = {}
    for name, domain in domains.items():
        total = tokens = 0.0
        for batch in batches(domain.test, seed=0):
            with torch.inference_mode():
                total += model(**batch, num_items_in_batch=torch.tensor(1)).loss.item()
            tokens += int((batch["labels"] != IGNORED).sum())
        found[name] = total / tokens
    return {**found, "both": statistics.mean(found.values())}


def losses_text(model: Any, domains: dict[str, Domain]) -> str:
    return "  ".join(f"{key} {value:.4f}" for key, value in losses(model, domains).items())


if __name__ == "__main__":
    main()
