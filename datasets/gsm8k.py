"""GSM8K: grade-school maths word problems; answers reason step by step and end in `#### NUMBER`."""

import re

from mixture.hub import HubRows, HubSource
from mixture.rationales import before

SOURCE = HubSource(
    id="openai/gsm8k",
    config="main",
    revision="740312add88f781978c0658806c59bc2815b9866",
    licence="MIT",
    commercial_use=True,
    rows={"train": 7473, "test": 1319},
    files={"train": "main/train-*.parquet", "test": "main/test-*.parquet"},
    format="question/answer",
)

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def read_rows(rows):
    """Rows as they are, with the reasoning marked: all that stands before `####`."""
    for row in rows:
        yield {**row, "rationale": before(row["answer"], "####")}


get_custom_dataset = HubRows(SOURCE, read_rows)


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
