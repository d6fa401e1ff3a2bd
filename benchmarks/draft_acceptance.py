"""How many tokens a draft head brings a pass of its target on real text, block by block, with and without regeneration.

    python benchmarks/distillation_texts.py --texts FOLDER --folder OUT --stage teacher
    python benchmarks/draft_acceptance.py --target OUT/runs/teacher/export --texts FOLDER --folder OUT/drafts

The target is a model of 21 million parameters, trained from scratch on the texts in FOLDER. Its draft is trained in
three chained blocks, once on the rows as they are and once on answers that the target wrote itself; then prompts of
gsm8k_test.jsonl, which neither has seen, are really decoded with a chain of 3, greedily and by sampling. All through
./train.sh; earlier drafts are scored from copies of the run folder. Finished runs are not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).parents[1]
sys.path.insert(0, str(PROJECT))

import eagle3  # noqa: E402
from jobs.job import open_run, run_of_trainer  # noqa: E402
from training.run_folder import RunFolder  # noqa: E402
from training.stopping import StopSignals  # noqa: E402

BLOCKS = 3
SCORES = {
    "greedy": "acceptance_length",
    "sampling": "sampling_acceptance_length",
    "told": "simulated_acceptance_length",
    "identical": "identical_greedy_answers",
}


def main() -> None:
    options = read_options()
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{'rows':12} {'block':>5} " + " ".join(f"{title:>9}" for title in SCORES)]
    for name in ("as_they_are", "regenerated"):
        train(options, name)
        for block in range(1, BLOCKS + 1):
            scores = scores_after(options.folder / "runs" / name, block)
            cells = " ".join(f"{scores[key]!s:>9.9}" for key in SCORES.values())
            lines.append(f"{name:12} {block:5} {cells}")
    print("\n".join(lines))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="with gsm8k_train.jsonl and gsm8k_test.jsonl")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=400, help="training rows")
    parser.add_argument("--prompts", type=int, default=40)
    return parser.parse_args()


def train(options: argparse.Namespace, name: str) -> None:
    """Train one draft, or finish it; nothing to do where it is done."""
    config: dict[str, Any] = {
        "trainer": "eagle3",
        "cluster": "local",
        "runs_dir": str(options.folder / "runs"),
        "data_dir": str(options.folder / "data"),
        "dataset": {
            "name": "gsm8k",
            "data_files": {
                split: str((options.texts / f"gsm8k_{split}.jsonl").resolve()) for split in ("train", "test")
            },
            "limit": options.rows,
            "max_length": 512,
        },
        "model": {"name": str(options.target.resolve()), "dtype": "float32"},
        "training": {
            "lr": 1e-3,
            "batch_size": 1,
            "epochs_per_job": 1,
            "total_jobs": BLOCKS,
            "keep_checkpoints": BLOCKS,
        },
        "eagle3": {"steps": 4, "draft_vocabulary": 2048},
        "evaluation": {"limit": options.prompts, "max_new_tokens": 96},
    }
    if name == "regenerated":
        config["eagle3"]["answers"] = {"max_new_tokens": 96, "keep_unfinished": True}
    file = options.folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    subprocess.run([str(PROJECT / "train.sh"), str(file)], check=True, stdout=sys.stdout)


def scores_after(run: Path, block: int) -> dict[str, Any]:
    """What evaluation.json of a run says, or said if the run had ended with an earlier block."""
    checkpoints = sorted((run / "checkpoints").iterdir())
    if block < BLOCKS:
        copy = run.parent / f"{run.name}-block-{block}"
        if not (copy / "evaluation.json").is_file():
            shutil.rmtree(copy, ignore_errors=True)
            left_out = {checkpoint.name for checkpoint in checkpoints[block:]} | {"evaluation.json", "DONE"}
            shutil.copytree(run, copy, ignore=lambda _, names: left_out & set(names))
            eagle3.evaluate(run_of_trainer(open_run(RunFolder(copy)), StopSignals()))
        run = copy
    scores: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return scores


if __name__ == "__main__":
    main()
