"""Python Code Instructions: 19 k Python tasks with answers, in Alpaca's columns."""

from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="iamtarun/python_code_instructions_18k_alpaca",
    revision="7cae181e29701a8663a07a3ea43c8e105b663ba1",
    licence=None,
    commercial_use=None,
    rows={"train": 18612},
    format="alpaca",
)

get_custom_dataset = HubRows(SOURCE)
