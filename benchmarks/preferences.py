"""DPO on real pairs: does it raise the held-out pairwise accuracy of a small model that was finetuned from scratch?

    OMP_NUM_THREADS=1 python -m benchmarks.preferences PAIRS.json [--folder FOLDER]

PAIRS.json: rows with `conversations`, `chosen` and `rejected` (LLaMA-Factory's dpo_en_demo.json). A model of a few
million parameters first learns the chosen answers of the training pairs, then both by DPO over three blocks. One row
a block; the first is before training, where both answers have the same reward by definition. `likelier` is the share
of held-out pairs whose chosen answer has the higher log-probability per token. About ten minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import finetuning
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.prepare import PreparationRequest, prepare
from training.config import DpoConfig, EvaluationConfig, FinetuningConfig, ModelConfig, OrpoConfig, TrainingConfig
from training.distributed import Ranks
from training.run import FinetuningRun
from training.run_folder import RunFolder

PROJECT = Path(__file__).resolve().parent.parent
BLOCKS = 3

MODULE = """
import json

def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):
    rows = json.load(open(dataset_config.data_files))
    if dataset_config.get("answers"):
        rows = [{"conversations": [*row["conversations"], row["chosen"]]} for row in rows]
    cut = round(len(rows) * split_ratio)
    return rows[:cut] if split == "train" else rows[cut:]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--folder", type=Path, help="where runs are kept; a temporary folder where unset")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(arguments.pairs, arguments.folder or Path(temporary))


def measure(pairs: Path, folder: Path) -> None:
    """Train both phases and print what was seen of held-out pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.py").write_text(MODULE)
    started_s = time.monotonic()
    answers = run_of(pairs, folder, "answers", FinetuningConfig(), from_scratch=True, epochs=4, jobs=1, lr=2e-3)
    finetuning.train(answers)
    (end,) = [event for event in answers.folder.events() if event["event"] == "block_end"]
    print(f"finetuned on chosen answers: held-out loss {end['eval_loss']:.3f}, {time.monotonic() - started_s:.0f} s")

    config = FinetuningConfig(objective="dpo", dpo=DpoConfig(beta=0.1))
    run = run_of(
        pairs, folder, "dpo", config, model=str(answers.folder.export), epochs=1, jobs=BLOCKS, lr=1e-4
    )  # a tenth of the rate that a model so small is finetuned with
    print_row("before", run, likelier(run, None))
    for block in range(1, BLOCKS + 1):
        finetuning.train(run)
        print_row(f"block {block}", run, likelier(run, "newest"))
    result = finetuning.evaluate(run)
    print(json.dumps(result["models"], indent=2))
    print(f"{time.monotonic() - started_s:.0f} s in all")


def run_of(
    pairs: Path,
    folder: Path,
    name: str,
    config: FinetuningConfig,
    *,
    epochs: int,
    jobs: int,
    lr: float,
    model: str = str(PROJECT / "configs/models/tiny"),
    from_scratch: bool = False,
) -> FinetuningRun:
    """A run in a folder of its own, its data prepared."""
    dataset = DatasetConfig(
        name="pairs",
        file=str(folder / "pairs.py"),
        data_files=str(pairs),
        max_length=2048,
        module_keys={"answers": config.preference is None},
    )
    module = ModuleFile(folder / "pairs.py")
    request = PreparationRequest(
        dataset=dataset,
        module=module,
        tokenizer=model,
        objective="sft" if config.preference is None else "pairs",
    )
    run = RunFolder(folder / name)
    run.path.mkdir()
    return FinetuningRun(
        folder=run,
        prepared=prepare(request, folder / "data", print).folder,
        module=module,
        seed=1,
        dataset=dataset,
        model=ModelConfig(name=model, from_scratch=from_scratch),
        training=TrainingConfig(
            lr=lr, batch_size=4, epochs_per_job=epochs, total_jobs=jobs, log_every=10, arguments={"report_to": "none"}
        ),
        finetuning=config,
        evaluation=EvaluationConfig(limit=0),
    )


def likelier(run: FinetuningRun, start: str | None) -> float:
    """The share of held-out pairs whose chosen answer is likelier per token."""
    from training.checkpoints import newest_valid

    checkpoint = newest_valid(run.folder.checkpoints)[0] if start else None
    model = finetuning.build_model(run, checkpoint)
    by_likelihood = replace(run, finetuning=FinetuningConfig(objective="orpo", orpo=OrpoConfig()))
    loss = finetuning.preference_loss(by_likelihood, model)
    found: dict[str, Any] = finetuning.held_out_preferences(by_likelihood, loss, Ranks())
    return float(found["all"]["accuracy"])


def print_row(name: str, run: FinetuningRun, share: float) -> None:
    ends = [event for event in run.folder.events() if event["event"] == "block_end"]
    of_rewards = (
        f"accuracy {ends[-1]['eval_accuracy']:.3f}, margin {ends[-1]['eval_margin']:+.3f}, loss "
        f"{ends[-1]['eval_loss']:.4f}"
        if ends
        else "accuracy 0.500, margin +0.000, loss 0.6931"
    )
    print(f"{name}: {of_rewards}, likelier {share:.3f}", flush=True)


if __name__ == "__main__":
    main()
