"""OCR-VQA: covers of books with several questions about each, in The Cauldron's columns `images` and `texts`."""

from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="HuggingFaceM4/the_cauldron",
    config="ocrvqa",
    licence=None,
    commercial_use=None,
    rows={"train": None},
    format="images",
)

get_custom_dataset = HubRows(SOURCE)


def score(prediction, row):
    """1.0 where the prediction is the answer to the last question, case and full stop aside."""
    return float(plain(prediction) == plain(row["texts"][-1]["assistant"]))


def plain(text):
    return text.strip().rstrip(".").lower()
