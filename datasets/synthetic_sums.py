"""Sums to be answered, made from a seed, with a reward that can be worked out. No network.

Keys in `dataset:`: `num_rows` (200), `seed` (42), `highest` (9), the largest number added, and `answers` (false): rows
with the right answer to learn from, for a first phase of `sft`.
"""

import random
import re

from mixture.hub import HubSource

SOURCE = HubSource(id=None, licence="CC0-1.0", commercial_use=True, format="prompt")

NUMBER = re.compile(r"-?\d+")


def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):
    """Rows with `prompt` and `total`, and with `completion` where answers are asked for."""
    generator = random.Random(dataset_config.get("seed", 42))
    highest = dataset_config.get("highest", 9)
    has_answers = dataset_config.get("answers", False)
    rows = [question(generator, highest, has_answers) for _ in range(dataset_config.get("num_rows", 200))]
    train_rows = round(split_ratio * len(rows))
    return {dataset_config.train_split: rows[:train_rows], dataset_config.test_split: rows[train_rows:]}[split]


def question(generator, highest, has_answer):
    """One sum."""
    first, second = generator.randint(0, highest), generator.randint(0, highest)
    row = {"prompt": f"{first} + {second} =", "total": first + second}
    return {**row, "completion": str(first + second)} if has_answer else row


def reward(prompt_messages, answer, row):
    """1 for the right number and no other; else at most 0.1, which a short answer of digits gets, so that a model that
    cannot add learns first to give numbers."""
    if not answer:
        return 0.0
    if score(answer, row):
        return 1.0
    return 0.1 / (1 + sum(not character.isdigit() for character in answer))


def score(prediction, row):
    """1.0 where the prediction holds the right number and no other, else 0.0."""
    return float(NUMBER.findall(prediction) == [str(row["total"])])
