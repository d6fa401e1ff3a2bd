"""MATH: 12,500 problems of mathematics competitions in seven subjects, with worked solutions.

The test split is a benchmark: training on it makes published scores meaningless. The first upload of this data was
taken down on a claim of copyright; this one is a later copy.
"""

from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="EleutherAI/hendrycks_math",
    revision="21a5633873b6a120296cce3e2df9d5550074f4a3",
    licence="MIT; claims on some of the problems are not settled",
    commercial_use=True,
    rows={"train": 7500, "test": 5000},
    files={"train": "*/train-*.parquet", "test": "*/test-*.parquet"},
    format="problem/solution",
)

get_custom_dataset = HubRows(SOURCE)
