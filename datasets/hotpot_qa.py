"""HotpotQA: 90 k questions whose answers take facts from two Wikipedia articles, without the articles."""

from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="hotpotqa/hotpot_qa",
    config="distractor",
    revision="1908d6afbbead072334abe2965f91bd2709910ab",
    licence="CC-BY-SA-4.0",
    commercial_use=True,
    rows={"train": 90447, "test": 7405},
    splits={"test": "validation"},
    files={"train": "distractor/train-*.parquet", "validation": "distractor/validation-*.parquet"},
    columns=["id", "question", "answer", "type", "level"],
    format="question/answer",
)


def read_rows(rows):
    """Rows with `question` and `answer`, and how hard they are."""
    for row in rows:
        yield {column: row.get(column) for column in SOURCE.columns}


get_custom_dataset = HubRows(SOURCE, read_rows)
