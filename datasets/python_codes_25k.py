"""Python-Codes: 25 k Python tasks with answers, in Alpaca's columns.

The hub holds the same rows in two files; read as a whole, it gives every row twice.
"""

from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="flytech/python-codes-25k",
    revision="0ed98ff2a76c5d133d8c157b814189a5a17ebd20",
    licence="MIT, stated in the description only",
    commercial_use=True,
    rows={"train": 24813},
    files={"train": "python-codes-25k.jsonl"},
    format="alpaca",
)

get_custom_dataset = HubRows(SOURCE)
