"""MATH: 12,500 problems of mathematics competitions in seven subjects, with worked solutions.

The test split is a benchmark: training on it makes published scores meaningless. The first upload of this data was
taken down on a claim of copyright; this one is a later copy.
"""

from mixture.hub import HubRows, HubSource
from mixture.rationales import before_boxed_answer

SOURCE = HubSource(
    id="EleutherAI/hendrycks_math",
    revision="21a5633873b6a120296cce3e2df9d5550074f4a3",
    licence="MIT; claims on some of the problems are not settled",
    commercial_use=True,
    rows={"train": 7500, "test": 5000},
    files={"train": "*/train-*.parquet", "test": "*/test-*.parquet"},
    format="problem/solution",
)


def read_rows(rows):
    """Rows as they are, with the reasoning marked: all that stands before the sentence with the boxed answer."""
    for row in rows:
        yield {**row, "rationale": before_boxed_answer(row["solution"])}


get_custom_dataset = HubRows(SOURCE, read_rows)
