"""Arithmetic word problems, made from a seed: as many as asked for, with answers that can be checked. No network.

Keys in `dataset:`: `num_rows` (1000) and `seed` (42).
"""

import random
import re

from mixture.hub import HubSource

SOURCE = HubSource(id=None, licence="CC0-1.0", commercial_use=True, format="question/answer")

NAMES = ("Ada", "Ben", "Chloe", "Deniz", "Emil", "Farah", "Goran", "Hana")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
THINGS = ("apples", "books", "coins", "pencils", "shells", "stamps")


def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):
    """Rows with `question` and `answer`; the answer ends in `#### NUMBER`."""
    generator = random.Random(dataset_config.get("seed", 42))
    rows = [problem(generator) for _ in range(dataset_config.get("num_rows", 1000))]
    train_rows = round(split_ratio * len(rows))
    return {dataset_config.train_split: rows[:train_rows], dataset_config.test_split: rows[train_rows:]}[split]


def problem(generator):
    """One problem of two steps."""
    name, friend = generator.sample(NAMES, 2)
    thing = generator.choice(THINGS)
    start, boxes, size = generator.randint(2, 99), generator.randint(2, 9), generator.randint(2, 12)
    bought, total = boxes * size, start + boxes * size
    given = generator.randint(1, total - 1)
    return {
        "question": f"{name} has {start} {thing} and buys {boxes} boxes of {size}. Then {name} gives {given} {thing} "
        f"to {friend}. How many {thing} does {name} have now?",
        "answer": f"{boxes} boxes of {size} are {boxes} * {size} = {bought} {thing}.\n"
        f"{name} has {start} + {bought} = {total}, and after giving {given} away {total} - {given} = {total - given}.\n"
        f"#### {total - given}",
    }


def score(prediction, row):
    """1.0 where the last number of the prediction is the answer's, else 0.0."""
    return float(last_number(prediction) == last_number(row["answer"]))


def last_number(text):
    """The last number of a text, or None."""
    numbers = NUMBER.findall(text.replace(",", ""))
    return float(numbers[-1]) if numbers else None
