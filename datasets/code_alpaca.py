"""CodeAlpaca: 20 k code instructions with generated answers, in Alpaca's columns."""

from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="sahil2801/CodeAlpaca-20k",
    revision="152bb5e9a29651266b018106053980070a0521a1",
    licence="CC-BY-4.0 on the hub; the authors' repository says CC-BY-NC-4.0 for the data",
    commercial_use=False,  # the stricter of the two statements
    rows={"train": 20022},
    format="alpaca",
)

get_custom_dataset = HubRows(SOURCE)
