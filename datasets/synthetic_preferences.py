"""Sums with a right and a wrong answer, made from a seed, as pairs or as labelled answers. No network.

Keys in `dataset:`: `num_rows` (200), `seed` (42), and `labelled` (false): rows with one answer and a label, for KTO.
"""

import random

from mixture.hub import HubSource

SOURCE = HubSource(id=None, licence="CC0-1.0", commercial_use=True, format="preference")


def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):
    """Rows with `prompt`, `chosen` and `rejected`, or with `prompt`, `completion` and `label`."""
    generator = random.Random(dataset_config.get("seed", 42))
    rows = [pair(generator) for _ in range(dataset_config.get("num_rows", 200))]
    if dataset_config.get("labelled", False):
        rows = [labelled(row, right=generator.random() < 0.5) for row in rows]
    train_rows = round(split_ratio * len(rows))
    return {dataset_config.train_split: rows[:train_rows], dataset_config.test_split: rows[train_rows:]}[split]


def pair(generator):
    """One question, its answer as a sum, and one that is wrong and says so too loudly."""
    first, second = generator.randint(2, 99), generator.randint(2, 99)
    wrong = first + second + generator.choice([-10, -2, -1, 1, 2, 10])
    return {
        "prompt": f"What is {first} plus {second}?",
        "chosen": f"{first} + {second} = {first + second}",
        "rejected": f"Obviously {wrong}!",
    }


def labelled(row, *, right):
    """One of the two answers, and which it is."""
    return {"prompt": row["prompt"], "completion": row["chosen" if right else "rejected"], "label": right}
