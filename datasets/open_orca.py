"""OpenOrca: 4.2 million FLAN questions under system prompts, answered by GPT-4 (first) and GPT-3.5.

`answers: 1M-GPT4` keeps those of GPT-4 only.
"""

from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="Open-Orca/OpenOrca",
    licence="MIT",
    commercial_use=True,
    rows={"train": None},
    files={"train": "{answers}-Augmented.parquet"},
    options={"answers": "*"},
    format="question/response",
)

get_custom_dataset = HubRows(SOURCE)
