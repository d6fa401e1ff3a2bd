"""A few dozen short conversations, made here: learned in minutes by a tiny model, for trying a set-up out."""

from mixture.hub import HubSource

SOURCE = HubSource(
    id=None,
    licence="CC0-1.0",
    commercial_use=True,
    rows={"train": 38, "test": 10},
    format="messages",
)

CAPITALS = {
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Chile": "Santiago",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "Finland": "Helsinki",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Spain": "Madrid",
}
QUESTIONS = (
    "What is the capital of {country}?",
    "Which city is the capital of {country}?",
    "Name the capital of {country}.",
)


def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):
    """Rows with `messages`: one question and its answer."""
    rows = [
        conversation(question.format(country=country), f"The capital of {country} is {capital}.")
        for question in QUESTIONS
        for country, capital in CAPITALS.items()
    ]
    train_rows = round(split_ratio * len(rows))
    return {dataset_config.train_split: rows[:train_rows], dataset_config.test_split: rows[train_rows:]}[split]


def conversation(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def score(prediction, row):
    """1.0 where the prediction is the answer, blanks aside."""
    return float(prediction.strip() == row["messages"][-1]["content"])
