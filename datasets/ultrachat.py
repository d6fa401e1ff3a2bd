"""UltraChat: 200 k generated conversations of several turns, filtered."""

from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="HuggingFaceH4/ultrachat_200k",
    revision="8049631c405ae6576f93f445c6b8166f76f5505a",
    licence="MIT",
    commercial_use=True,
    rows={"train": 207865, "test": 23110},
    # The other two, train_gen and test_gen, end in a question.
    splits={"train": "train_sft", "test": "test_sft"},
    files={"train_sft": "data/train_sft-*.parquet", "test_sft": "data/test_sft-*.parquet"},
    columns=["messages", "prompt_id"],
    format="messages",
)

get_custom_dataset = HubRows(SOURCE)
