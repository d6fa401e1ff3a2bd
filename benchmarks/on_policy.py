"""Seconds of an optimizer step where the student writes the answers and a live teacher scores them, beside TRL's GKD.

    python benchmarks/on_policy.py
    python benchmarks/on_policy.py --steps 8 --repetitions 3 --batch-size 8 --max-new-tokens 64

Student and teacher have random weights of one shape, so nearly every answer has `max-new-tokens`. Both trainers get the
same questions, all answers are the student's (`share` and `lmbda` 1), and the distance is the forward Kullback-Leibler
divergence (`beta` 0). Each engine is a process of its own, the first step is not counted, repetitions are interleaved
and the cheapest counts. On a CPU the seconds are those that one core works, whatever else the machine does; peak memory
is that of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from mixture.config import DatasetConfig  # noqa: E402
from mixture.dataset_modules import ModuleFile, load_rows  # noqa: E402

ENGINES = ("baton", "trl")
MODULE = PROJECT / "datasets/synthetic_dataset.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--measure", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(options, Path(folder))))
        return
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for _ in range(options.repetitions):
        for engine, runs in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", engine]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(engine, runs[-1], file=sys.stderr, flush=True)
    best = {engine: {name: min(run[name] for run in runs) for name in runs[0]} for engine, runs in found.items()}
    for engine, figures in best.items():
        ratios = {name: figures[name] / best["trl"][name] for name in figures}
        print(
            f"{engine:6} {figures['step_s']:.2f} s a step ({ratios['step_s']:.2f} x TRL), "
            f"{figures['peak_gib']:.2f} GiB ({ratios['peak_gib']:.2f} x)"
        )


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds of a step, and the peak of the process's memory."""
    student, teacher = (random_model(folder / name, seed) for seed, name in enumerate(("student", "teacher")))
    train = {"baton": train_with_baton, "trl": train_with_trl}[options.measure]
    ends = train(options, folder, student, teacher)
    return {
        "step_s": (ends[-1] - ends[0]) / (len(ends) - 1),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def random_model(folder: Path, seed: int) -> Path:
    """The small model with random weights, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    shape = PROJECT / "configs/models/small"
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(shape).save_pretrained(folder)
    return folder


def clock() -> float:
    """Seconds that this process has worked; on a GPU those of the clock."""
    import torch

    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def problems(options: argparse.Namespace) -> DatasetConfig:
    """As many word problems as the steps take."""
    rows = options.steps * options.batch_size
    return DatasetConfig(
        name="synthetic_dataset", packing=False, split_ratio=0.9, module_keys={"num_rows": round(rows / 0.9)}
    )


def train_with_baton(options: argparse.Namespace, folder: Path, student: Path, teacher: Path) -> list[float]:
    """When each optimizer step was done."""
    import distillation
    from distilling.config import DistillationConfig, OnPolicyConfig, TeacherModelConfig
    from distilling.run import DistillationRun
    from mixture.prepare import PreparationRequest, prepare
    from training.config import EvaluationConfig, ModelConfig, TrainingConfig
    from training.run_folder import RunFolder

    dataset, module = problems(options), ModuleFile(MODULE)
    request = PreparationRequest(dataset=dataset, module=module, tokenizer=str(teacher), objective="sft")
    ends: list[float] = []

    class Clocked(RunFolder):
        def record_metrics(self, **metrics: Any) -> None:
            ends.append(clock())

    run = Clocked(folder / "run")
    run.path.mkdir()
    distillation.train(
        DistillationRun(
            folder=run,
            prepared=prepare(request, folder / "data", lambda line: None).folder,
            module=module,
            seed=1,
            dataset=dataset,
            model=ModelConfig(name=str(student), dtype="float32"),
            training=TrainingConfig(
                lr=1e-4, batch_size=options.batch_size, log_every=1, arguments={"report_to": "none"}
            ),
            evaluation=EvaluationConfig(limit=0),
            distillation=DistillationConfig(
                teacher="live",
                teacher_model=TeacherModelConfig(name=str(teacher)),
                weight=1.0,
                on_policy=OnPolicyConfig(share=1.0, max_new_tokens=options.max_new_tokens),
            ),
            cache=None,
        )
    )
    return ends


def train_with_trl(options: argparse.Namespace, folder: Path, student: Path, teacher: Path) -> list[float]:
    """When each optimizer step was done."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **keys: Any) -> None:
            ends.append(clock())

    chats = [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in load_rows(ModuleFile(MODULE), problems(options), "train", None)
    ]
    arguments = GKDConfig(
        output_dir=str(folder / "trl"),
        learning_rate=1e-4,
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=1,
        lmbda=1.0,
        beta=0.0,
        temperature=1.0,
        max_new_tokens=options.max_new_tokens,
        max_length=1024,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
    )
    GKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher),
        args=arguments,
        train_dataset=Dataset.from_list(chats),
        processing_class=AutoTokenizer.from_pretrained(teacher),
        callbacks=[Clock()],
    ).train()
    return ends


if __name__ == "__main__":
    main()
