"""Python-Code ShareGPT: about 23 k conversations with ChatGPT about Python."""

from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="ajibawa-2023/Python-Code-23k-ShareGPT",
    licence="CC-BY-NC-ND-4.0",
    commercial_use=False,
    rows={"train": None},
    files={"train": "Python-Code-23k-ShareGPT.json"},
    format="sharegpt",
)

get_custom_dataset = HubRows(SOURCE)
