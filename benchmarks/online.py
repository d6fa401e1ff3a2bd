"""GRPO and RLOO on sums: does the mean reward of a small model rise that was finetuned a little from scratch?

    OMP_NUM_THREADS=1 python -m benchmarks.online [--folder FOLDER] [--objectives grpo,rloo] [--model tiny]

A model of a million parameters first learns the answers of a few sums (`sft`), so that some of what it writes is right.
Then it answers 400 sums itself, over three blocks of several epochs, and learns from the reward that
datasets/synthetic_sums.py gives: 1 for the right number. One row a block. The 100 sums held out are no others than
those of training, as there are but 100: it is told how well the reward is learned, not whether it carries over. All
answers are sampled at temperature 1, but those of the last line. A few minutes of one core for each objective.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import finetuning
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.prepare import PreparationRequest, prepare
from training.config import EvaluationConfig, FinetuningConfig, ModelConfig, TrainingConfig
from training.online_config import ONLINE_CONFIGS
from training.run import FinetuningRun
from training.run_folder import RunFolder

PROJECT = Path(__file__).resolve().parent.parent
BLOCKS = 3
SUMS = {"num_rows": 500, "highest": 9}
FEW = {"num_rows": 200, "highest": 9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where runs are kept; a temporary folder where unset")
    parser.add_argument("--objectives", default="grpo,rloo")
    parser.add_argument("--model", default="tiny", help="a folder of configs/models")
    parser.add_argument("--sft-epochs", type=int, default=20, help="of the first phase")
    parser.add_argument("--epochs", type=int, default=4, help="of each of the three blocks")
    parser.add_argument("--lr", type=float, default=5e-4, help="of the answers that are rewarded")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(arguments, arguments.folder or Path(temporary))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Train all phases and print what was seen of held-out sums."""
    model = str(PROJECT / "configs/models" / arguments.model)
    first = run_of(folder, "sft", FinetuningConfig(), model=model, from_scratch=True, epochs=arguments.sft_epochs,
                   jobs=1, lr=3e-3, seed=7, answers=True)  # fmt: skip
    started_s = time.monotonic()
    finetuning.train(first)
    print(f"finetuned on answers: {time.monotonic() - started_s:.0f} s", flush=True)
    for objective in arguments.objectives.split(","):
        settings = {objective: ONLINE_CONFIGS[objective](group_size=8, max_new_tokens=4)}
        config = FinetuningConfig(objective=objective, **settings)
        run = run_of(folder, objective, config, model=str(first.folder.export), epochs=arguments.epochs, jobs=BLOCKS,
                     lr=arguments.lr, seed=42)  # fmt: skip
        started_s = time.monotonic()
        for _ in range(BLOCKS):
            finetuning.train(run)
        result = finetuning.evaluate(run)
        print(f"\n{objective}, {time.monotonic() - started_s:.0f} s")
        print("| | mean reward, held out | mean reward, last steps of training | alike groups | entropy |")
        print("|---|---|---|---|---|")
        print(f"| before | {result['reward_before']:.3f} | | | |")
        for block, event in enumerate(block_ends(run), start=1):
            lines = [line for line in run.folder.metrics() if line["block"] == block][-4:]
            means = [sum(line[key] for line in lines) / len(lines) for key in ("reward", "zero_std_share", "entropy")]
            print(
                f"| block {block} | {event['eval_reward']:.3f} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |"
            )
        print(f"greedy answers right at the end: {result['score']:.3f} of {result['scored_rows']}", flush=True)


def block_ends(run: FinetuningRun) -> list[dict[str, Any]]:
    return [event for event in run.folder.events() if event["event"] == "block_end"]


def run_of(
    folder: Path,
    name: str,
    config: FinetuningConfig,
    *,
    model: str,
    epochs: int,
    jobs: int,
    lr: float,
    seed: int,
    from_scratch: bool = False,
    answers: bool = False,
) -> FinetuningRun:
    """A run on sums of this seed, with its data prepared."""
    run = RunFolder(folder / name)
    run.path.mkdir(parents=True, exist_ok=True)
    dataset = DatasetConfig(
        name="synthetic_sums",
        max_length=64,
        module_keys={**(FEW if answers else SUMS), "seed": seed, "answers": answers},
    )
    module = ModuleFile(PROJECT / "datasets/synthetic_sums.py")
    request = PreparationRequest(
        dataset=dataset, module=module, tokenizer=model, objective="sft" if answers else "prompts"
    )
    return FinetuningRun(
        folder=run,
        prepared=prepare(request, folder / "data", lambda line: None).folder,
        module=module,
        seed=1,
        dataset=dataset,
        model=ModelConfig(name=model, from_scratch=from_scratch),
        training=TrainingConfig(
            lr=lr,
            batch_size=16,
            epochs_per_job=epochs,
            total_jobs=jobs,
            log_every=5,
            arguments={"report_to": "none"},
        ),
        finetuning=config,
        evaluation=EvaluationConfig(limit=100, max_new_tokens=4),
    )


if __name__ == "__main__":
    main()
