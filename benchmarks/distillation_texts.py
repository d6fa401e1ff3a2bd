"""Distillation on real texts, end to end: does a student learn more from its teacher than from the texts alone?

A teacher of about 20 million parameters is trained from scratch, then students of a quarter of its size, each on the
same tokens once: from the teacher's cache, from the live teacher, and from the texts alone (the control), over several
seeds. All through ./train.sh, as a user would. Compared is the held-out perplexity.

    python benchmarks/distillation_texts.py --texts FOLDER --folder OUT [--seeds 3] [--stage teacher|students|table]

FOLDER holds .json and .jsonl files of rows in any format that the kit knows, and .txt files, which are cut into pieces.
Finished runs are not run again, so a call that was cut off is repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).parents[1]
SHAPES = {
    "teacher": {"hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 8, "num_attention_heads": 7},
    "student": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 5, "num_attention_heads": 4},
}
TEACHERS = ("cache", "live", "none")
MODULE = """
import json, random
from pathlib import Path

PIECE_CHARACTERS = 1200

def get_custom_dataset(dataset_config, processor, split, split_ratio=0.95):
    rows = []
    for file in sorted(Path(dataset_config.texts).iterdir()):
        if any(name in file.name for name in ("dpo", "mt_bench", "nq_open", "test")):
            continue
        if file.suffix == ".jsonl":
            found = [json.loads(line) for line in file.open()]
        elif file.suffix == ".json":
            found = json.loads(file.read_text())
        elif file.suffix == ".txt":
            text = file.read_text()
            pieces = range(0, len(text), PIECE_CHARACTERS)
            found = [{"text": text[start : start + PIECE_CHARACTERS]} for start in pieces]
        else:
            continue
        random.Random(0).shuffle(found)
        rows += found[: dataset_config.rows_per_file]
    random.Random(1).shuffle(rows)
    cut = int(len(rows) * split_ratio)
    return rows[:cut] if split == "train" else rows[cut:]
"""


def main() -> None:
    options = read_options()
    options.folder.mkdir(parents=True, exist_ok=True)
    write_models(options.folder)
    (options.folder / "texts.py").write_text(MODULE)
    if options.stage in ("all", "teacher"):
        run(options.folder, "teacher", teacher_config(options))
    if options.stage in ("all", "students"):
        for seed in range(1, options.seeds + 1):
            for teacher in TEACHERS:
                run(options.folder, f"{teacher}-{seed}", student_config(options, teacher, seed))
    if options.stage != "teacher":
        print(table(options.folder, options.seeds))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows-per-file", type=int, default=2000, help="first rows of each file, in random order")
    parser.add_argument("--student-rows", type=int, help="train rows that students see; unset: those of the teacher")
    parser.add_argument("--dtype", default="float32", help="arithmetic of the students")
    parser.add_argument("--teacher-epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weight", type=float, default=0.9, help="share of the divergence in the loss")
    parser.add_argument("--stage", choices=["all", "teacher", "students", "table"], default="all")
    return parser.parse_args()


def write_models(folder: Path) -> None:
    """Configs of both models, without weights, with the tokenizer of the project's small models."""
    source = PROJECT / "configs/models/small"
    for name, shape in SHAPES.items():
        (folder / name).mkdir(exist_ok=True)
        for file in source.iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
        config = json.loads((source / "config.json").read_text())
        heads = shape["num_attention_heads"]
        config |= {**shape, "num_key_value_heads": heads, "head_dim": shape["hidden_size"] // heads}
        (folder / name / "config.json").write_text(json.dumps(config, indent=2))


def common(options: argparse.Namespace) -> dict[str, Any]:
    """What all runs share: the same tokens among them."""
    return {
        "cluster": "local",
        "runs_dir": str(options.folder / "runs"),
        "data_dir": str(options.folder / "data"),
        "dataset": {
            "file": str(options.folder / "texts.py"),
            "name": "texts",
            "texts": str(options.texts.resolve()),
            "rows_per_file": options.rows_per_file,
            "max_length": 512,
        },
        "evaluation": {"limit": 0},
    }


def teacher_config(options: argparse.Namespace) -> dict[str, Any]:
    return {
        **common(options),
        "model": {"name": str(options.folder / "teacher"), "from_scratch": True, "dtype": "bfloat16"},
        "training": {
            "lr": 1.5e-3,
            "batch_size": 8,
            "epochs_per_job": 1,
            "total_jobs": options.teacher_epochs,
            "warmup": 40,
            "weight_decay": 0.1,
        },
        "finetuning": {"objective": "mixed"},
    }


def student_config(options: argparse.Namespace, teacher: str, seed: int) -> dict[str, Any]:
    """A student on the same tokens once, of rows that the teacher saw and scored on rows that it did not."""
    shared = common(options)
    return {
        **shared,
        "trainer": "distillation",
        "seed": seed,
        "dataset": {**shared["dataset"], "limit": options.student_rows},
        "model": {"name": str(options.folder / "student"), "from_scratch": True, "dtype": options.dtype},
        "training": {"lr": 2e-3, "batch_size": 8, "warmup": 40, "weight_decay": 0.1},
        "distillation": {
            "teacher": teacher,
            "teacher_model": {"name": str(options.folder / "runs/teacher/export"), "dtype": "float32"},
            "weight": options.weight,
        },
    }


def run(folder: Path, name: str, config: dict[str, Any]) -> None:
    """Train a run, or finish it; nothing to do where it is done."""
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    print(f"== {name}", flush=True)
    subprocess.run([str(PROJECT / "train.sh"), str(file)], check=True, stdout=sys.stdout)


def table(folder: Path, seeds: int) -> str:
    """Held-out perplexity, divergence from the teacher and calibration error of each kind of student."""
    lines = [f"{'':10} {'perplexity, by seed':32} {'mean':>8} {'spread':>8} {'KL':>8} {'agree':>8} {'ECE':>8}"]
    for teacher in TEACHERS:
        found = [evaluation(folder, f"{teacher}-{seed}") for seed in range(1, seeds + 1)]
        perplexities = [models["student"]["all"]["perplexity"] for models in found if models]
        if not perplexities:
            continue
        means = {
            name: statistics.mean(models["student"]["all"].get(name, float("nan")) for models in found if models)
            for name in ("divergence", "agreement", "calibration_error")
        }
        spread = statistics.stdev(perplexities) if len(perplexities) > 1 else float("nan")
        listed = " ".join(f"{value:.3f}" for value in perplexities)
        lines.append(
            f"{teacher:10} {listed:32} {statistics.mean(perplexities):8.3f} {spread:8.3f} "
            f"{means['divergence']:8.4f} {means['agreement']:8.4f} {means['calibration_error']:8.4f}"
        )
    first = evaluation(folder, "cache-1")
    if first and "teacher" in first:
        lines.append(f"{'teacher':10} {first['teacher']['all']['perplexity']:.3f}")
    return "\n".join(lines)


def evaluation(folder: Path, name: str) -> dict[str, Any] | None:
    """What the evaluation of a run compared."""
    file = folder / "runs" / name / "evaluation.json"
    return json.loads(file.read_text())["models"] if file.is_file() else None


if __name__ == "__main__":
    main()
