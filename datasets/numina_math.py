"""NuminaMath-CoT: 860 k mathematical problems with step-by-step solutions, from many collections.

It holds problems of the training sets of GSM8K and MATH: mixed with those, deduplicate.
"""

from mixture.hub import HubRows, HubSource
from mixture.rationales import before_boxed_answer

SOURCE = HubSource(
    id="AI-MO/NuminaMath-CoT",
    revision="9d8d210c9f6a36c8f3cd84045668c9b7800ef517",
    licence="Apache-2.0",
    commercial_use=True,
    rows={"train": 859494, "test": 100},
    files={"train": "data/train-*.parquet", "test": "data/test-*.parquet"},
    columns=["source", "messages"],
    format="messages",
)


def read_rows(rows):
    """Rows with `messages`, the collection they are from, and all before the boxed answer's sentence marked."""
    for row in rows:
        rationale = before_boxed_answer(row["messages"][-1]["content"])
        yield {"messages": row["messages"], "collection": row["source"], "rationale": rationale}


get_custom_dataset = HubRows(SOURCE, read_rows)
