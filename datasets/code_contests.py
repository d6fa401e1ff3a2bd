"""CodeContests: 13 k tasks of programming contests, with up to three correct Python solutions each.

The test split is a benchmark: training on it makes published scores meaningless. Greedy answers are run on the inputs
of their tasks, in a sandbox. Held-out rows, and those of a single local file, are one a task; tasks without a Python
solution are left out.
"""

from collections.abc import Mapping

from mixture.hub import HubRows, HubSource, load_source
from sandbox.python import Limits, code_of
from sandbox.standard_streams import run_on_input

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
TESTS = ("public_tests", "private_tests", "generated_tests")
USUAL_TIME_S = 2.0
SLOWER = 5
"""Time limits are those of compiled programs, on machines that do nothing else."""
FILES_BYTES = 64 << 20


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


def read_tasks(rows):
    """The first of these rows for each task, with what `score` needs: its tests, and seconds for each of them."""
    for row in rows:
        for task in list(read_rows([row]))[:1]:
            yield {**task, "tests": tests_of(row), "time_limit_s": time_limit_s(row.get("time_limit"))}


def python_solutions(solutions):
    """Texts of the Python 3 solutions."""
    return [text for language, text in pairs(solutions, "language", "solution") if language == PYTHON3]


def tests_of(row):
    """Inputs of a task with the outputs that are expected, those that its authors show first."""
    found = [pair for name in TESTS for pair in pairs(row.get(name) or [], "input", "output")]
    return [{"input": given, "output": expected} for given, expected in found]


def time_limit_s(limit):
    """Seconds of a time limit {seconds, nanos}."""
    seconds = (limit["seconds"] or 0) + (limit["nanos"] or 0) / 1e9 if limit else 0
    return seconds or USUAL_TIME_S


def pairs(values, first, second):
    """Pairs that come as one list a field or as a list of pairs."""
    if isinstance(values, Mapping):
        return zip(values[first], values[second], strict=True)
    return ((value[first], value[second]) for value in values)


class Contests(HubRows):
    """Rows to learn from without their tests, which are most of the data; held-out rows with them."""

    def __call__(self, dataset_config, processor, split, split_ratio=0.9):
        data_files = dataset_config.get("data_files")
        has_splits = not data_files or isinstance(data_files, Mapping)
        read = self.read_rows if has_splits and split == dataset_config.train_split else read_tasks
        return load_source(self.source, dataset_config, split, split_ratio, read)


get_custom_dataset = Contests(SOURCE, read_rows)

SCORE_NAME = "pass@1"
SCORE_IN_THREADS = True


def score(prediction, row, unprotected=False):
    """1.0 where the prediction's code answers every test of the task as expected and in time, else 0.0."""
    if not row.get("tests"):
        raise ValueError(
            f"{row['id']} has no tests: rows to learn from come without them, and held-out ones where the data has "
            f"{', '.join(TESTS)}"
        )
    program = code_of(prediction)
    limits = Limits(time_s=row["time_limit_s"] * SLOWER, folder_bytes=FILES_BYTES)
    return float(
        all(
            run_on_input(program, test["input"], test["output"], limits=limits, unprotected=unprotected).passed
            for test in row["tests"]
        )
    )
