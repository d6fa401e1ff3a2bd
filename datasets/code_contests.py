"""CodeContests: 13 k tasks of programming contests, with up to three correct Python solutions each.

The test split is a benchmark: training on it makes published scores meaningless.
"""

from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="deepmind/code_contests",
    revision="802411c3010cb00d1b05bad57ca77365a3c699d6",
    licence="CC-BY-4.0",
    commercial_use=True,
    rows={"train": 13328, "validation": 117, "test": 165},
    splits={"validation": "valid"},
    files={"train": "data/train-*.parquet", "valid": "data/valid-*.parquet", "test": "data/test-*.parquet"},
    columns=["name", "description", "solutions", "cf_rating"],
    format="question/answer",
)

PYTHON3 = 3
SOLUTIONS_PER_TASK = 3


def read_rows(rows):
    """Rows with `question`, a task, and `answer`, one of its solutions; `parent` is the task."""
    for row in rows:
        for number, solution in enumerate(python_solutions(row["solutions"])[:SOLUTIONS_PER_TASK]):
            yield {
                "id": f"{row['name']}-{number}",
                "parent": row["name"],
                "question": row["description"],
                "answer": f"```python\n{solution.strip()}\n```",
                "rating": row.get("cf_rating"),
            }


def python_solutions(solutions):
    """Texts of the Python 3 solutions, which come as one list a field or as a list of pairs."""
    if isinstance(solutions, dict):
        pairs = zip(solutions["language"], solutions["solution"], strict=True)
    else:
        pairs = ((solution["language"], solution["solution"]) for solution in solutions)
    return [text for language, text in pairs if language == PYTHON3]


get_custom_dataset = HubRows(SOURCE, read_rows)
