"""OpenHermes 2.5: a million generated conversations and instructions, compiled from many collections."""

from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="teknium/OpenHermes-2.5",
    revision="05c3557e57b6dd1d0e0cb8369ba53b43e15fd10b",
    licence=None,
    commercial_use=None,
    rows={"train": 1001551},
    files={"train": "openhermes2_5.json"},
    format="sharegpt",
)


def read_rows(rows):
    """Rows with the conversation and the collection it is from; the other columns are empty in most rows."""
    for row in rows:
        turns = [{"from": turn["from"], "value": turn["value"]} for turn in row["conversations"]]
        yield {"conversations": turns, "system_prompt": row.get("system_prompt"), "collection": row.get("source")}


get_custom_dataset = HubRows(SOURCE, read_rows)
