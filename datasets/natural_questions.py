"""Natural Questions, open: 88 k questions that people asked a search engine, with short answers of Wikipedia.

The full set holds the HTML of a Wikipedia page with every row, 45 GB in all, for the same questions.
"""

from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="google-research-datasets/nq_open",
    revision="5dd9790a83002ad084ddeb7c420dc716852c6f28",
    licence="CC-BY-SA-3.0",
    commercial_use=True,
    rows={"train": 87925, "test": 3610},
    splits={"test": "validation"},
    files={"train": "nq_open/train-*.parquet", "validation": "nq_open/validation-*.parquet"},
    format="question/answer",
)

get_custom_dataset = HubRows(SOURCE)
