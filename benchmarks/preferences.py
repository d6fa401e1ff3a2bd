"""DPO on real pairs: does it raise the held-out pairwise accuracy of a small model that was finetuned from scratch?

    OMP_NUM_THREADS=1 python -m benchmarks.preferences PAIRS.json --base MODEL [--folder FOLDER]

PAIRS.json: rows with `conversations`, `chosen` and `rejected` (LLaMA-Factory's dpo_en_demo.json). MODEL: one that was
finetuned from scratch, such as the teacher of distillation_texts.py. It learns the pairs by DPO over three blocks, once
for each of `--folds` parts of the pairs that is held out meanwhile, so that every pair is held out once. One row a
block, over all parts; the first is before training, where both answers have the same reward by definition. `likelier`
is the share of held-out pairs whose chosen answer has the higher log-probability per token.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import finetuning
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.prepare import PreparationRequest, prepare
from phases import preferences
from training.checkpoints import Checkpoint, newest_valid
from training.config import DpoConfig, EvaluationConfig, FinetuningConfig, ModelConfig, OrpoConfig, TrainingConfig
from training.distributed import Ranks
from training.run import FinetuningRun
from training.run_folder import RunFolder

BLOCKS = 3

MODULE = """
import json

def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):
    rows = json.load(open(dataset_config.data_files))
    is_held_out = [number % dataset_config.folds == dataset_config.fold for number in range(len(rows))]
    return [row for row, held_out in zip(rows, is_held_out) if held_out == (split == "test")]
"""


@dataclass(frozen=True)
class Seen:
    """Of one held-out part, before or after a block."""

    pairs: int
    accuracy: float
    margin: float
    loss: float
    likelier: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where runs are kept; a temporary folder where unset")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--max-length", type=int, default=2048)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(options, options.folder or Path(temporary))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Train a model for each part that is held out, and print what was seen of all parts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.py").write_text(MODULE)
    started_s = time.monotonic()
    by_fold = [seen_over_blocks(run_of(options, folder, fold)) for fold in range(options.folds)]
    for number, seen in enumerate(zip(*by_fold, strict=True)):
        pairs = sum(one.pairs for one in seen)
        mean = {
            name: sum(getattr(one, name) * one.pairs for one in seen) / pairs
            for name in ("accuracy", "margin", "loss", "likelier")
        }
        error = math.sqrt(mean["accuracy"] * (1 - mean["accuracy"]) / pairs)
        print(
            f"{f'block {number}' if number else 'before':8} accuracy {mean['accuracy']:.3f} +- {error:.3f} of {pairs} "
            f"pairs, margin {mean['margin']:+.3f}, loss {mean['loss']:.4f}, likelier {mean['likelier']:.3f}"
        )
    print(f"{time.monotonic() - started_s:.0f} s")


def run_of(options: argparse.Namespace, folder: Path, fold: int) -> FinetuningRun:
    """The run of one part that is held out, in a folder of its own, its data prepared."""
    dataset = DatasetConfig(
        name="pairs",
        file=str(folder / "pairs.py"),
        data_files=str(options.pairs),
        max_length=options.max_length,
        module_keys={"folds": options.folds, "fold": fold},
    )
    module = ModuleFile(folder / "pairs.py")
    request = PreparationRequest(dataset=dataset, module=module, tokenizer=str(options.base), objective="pairs")
    run = RunFolder(folder / f"fold-{fold}")
    run.path.mkdir()
    return FinetuningRun(
        folder=run,
        prepared=prepare(request, folder / "data", print).folder,
        module=module,
        seed=1,
        dataset=dataset,
        model=ModelConfig(name=str(options.base), dtype="float32"),
        training=TrainingConfig(
            lr=options.lr, batch_size=4, epochs_per_job=1, total_jobs=BLOCKS, warmup=0.1, log_every=10,
            arguments={"report_to": "none"},
        ),
        finetuning=FinetuningConfig(objective="dpo", dpo=DpoConfig(beta=options.beta)),
        evaluation=EvaluationConfig(limit=0),
    )  # fmt: skip


def seen_over_blocks(run: FinetuningRun) -> list[Seen]:
    """What is seen of the held-out part before training and after each block."""
    seen = [held_out(run, None)]
    for _ in range(BLOCKS):
        finetuning.train(run)
        seen.append(held_out(run, newest_valid(run.folder.checkpoints)[0]))
        print(f"{run.folder.path.name}: {seen[-1]}", flush=True)
    return seen


def held_out(run: FinetuningRun, checkpoint: Checkpoint | None) -> Seen:
    model = preferences.build_model(run, checkpoint)
    by_likelihood = replace(run, finetuning=FinetuningConfig(objective="orpo", orpo=OrpoConfig()))
    rewards, likelihoods = (
        preferences.held_out_preferences(one, preferences.build_loss(one, model), Ranks())["all"]
        for one in (run, by_likelihood)
    )
    return Seen(
        int(rewards["count"]),
        # Before training both answers have the same reward, and no pair is right or wrong.
        rewards["accuracy"] if checkpoint else 0.5,
        rewards["margin"],
        rewards["loss"],
        likelihoods["accuracy"],
    )


if __name__ == "__main__":
    main()
