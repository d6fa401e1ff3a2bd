"""GSM8K: grade-school maths word problems; answers reason step by step and end in `#### NUMBER`."""

import re

from mixture.hub import HubSource, load_source

SOURCE = HubSource(
    id="openai/gsm8k",
    config="main",
    revision="740312add88f781978c0658806c59bc2815b9866",
    licence="MIT",
    commercial_use=True,
    rows={"train": 7473, "test": 1319},
    format="question/answer",
)

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def get_custom_dataset(dataset_config, processor, split, split_ratio=0.9):
    """Rows with `question` and `answer`. `split_ratio` divides a single local file; the hub has its own splits."""
    return load_source(SOURCE, dataset_config, split, split_ratio)


def score(prediction, row):
    """1.0 where the prediction's final number is the reference's, else 0.0."""
    return float(final_number(prediction) == final_number(row["answer"]))


def final_number(text):
    """The first number after `####`, else the last number of the text, else None; `$1,000.00` reads as 1000."""
    _, mark, after = text.rpartition("####")
    numbers = NUMBER.findall(after)
    if not numbers:
        return None
    return float((numbers[0] if mark else numbers[-1]).replace(",", "").replace("$", ""))
