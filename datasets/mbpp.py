"""MBPP: about a thousand entry-level Python tasks, each with a solution and tests.

The test split is a benchmark: training on it makes published scores meaningless. Greedy answers are run with the tests
of their tasks, in a sandbox.
"""

from mixture.hub import HubRows, HubSource
from sandbox.python import code_of, run_tests

SOURCE = HubSource(
    id="google-research-datasets/mbpp",
    config="full",
    revision="4bb6404fdc6cacfda99d4ac4205087b89d32030c",
    licence="CC-BY-4.0",
    commercial_use=True,
    rows={"train": 374, "test": 500, "validation": 90, "prompt": 10},
    files={
        "train": "full/train-*.parquet",
        "test": "full/test-*.parquet",
        "validation": "full/validation-*.parquet",
        "prompt": "full/prompt-*.parquet",
    },
    format="programming task",
)

# The authors' splits, for their single file mbpp.jsonl.
TASK_IDS = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}


def is_in_split(row, split):
    """Whether a row of the authors' single file belongs to the split."""
    return row["task_id"] in TASK_IDS[split]


get_custom_dataset = HubRows(SOURCE, is_in_split=is_in_split)

SCORE_NAME = "pass@1"
SCORE_IN_THREADS = True


def score(prediction, row, unprotected=False):
    """1.0 where the prediction's code passes all tests of the task, else 0.0."""
    return float(run_tests(code_of(prediction), tests_of(row), unprotected=unprotected).passed)


def tests_of(row):
    """The tests of a task as a program; the sanitised form has imports where the full one has code to set up."""
    setup = row.get("test_imports") or [row.get("test_setup_code") or ""]
    return "\n".join([*setup, *row["test_list"]])
