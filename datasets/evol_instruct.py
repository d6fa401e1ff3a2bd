"""Evol-Instruct-Code: 78 k code instructions made harder step by step, with generated answers."""

from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="nickrosh/Evol-Instruct-Code-80k-v1",
    licence="CC-BY-NC-SA-4.0",
    commercial_use=False,
    rows={"train": 78264},
    files={"train": "EvolInstruct-Code-80k.json"},
    format="alpaca",
)

get_custom_dataset = HubRows(SOURCE)
