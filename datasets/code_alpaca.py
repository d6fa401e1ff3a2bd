"""CodeAlpaca: 20 k code instructions with generated answers, in Alpaca's columns."""

from mixture.hub import HubSource, load_source

SOURCE = HubSource(
    id="sahil2801/CodeAlpaca-20k",
    revision="152bb5e9a29651266b018106053980070a0521a1",
    licence="CC-BY-4.0 on the hub; the authors' repository says CC-BY-NC-4.0 for the data",
    commercial_use=False,  # the stricter of the two statements
    rows={"train": 20022},
    format="alpaca",
)


def get_custom_dataset(dataset_config, processor, split, split_ratio=0.95):
    """Rows with `instruction`, `input` and `output`; there is one set, divided by `split_ratio`."""
    return load_source(SOURCE, dataset_config, split, split_ratio)
