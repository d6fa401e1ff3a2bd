"""MBPP: about a thousand entry-level Python tasks, each with a solution and tests.

The test split is a benchmark: training on it makes published scores meaningless.
"""

from mixture.hub import HubSource, load_source, read_files

SOURCE = HubSource(
    id="google-research-datasets/mbpp",
    config="full",
    revision="4bb6404fdc6cacfda99d4ac4205087b89d32030c",
    licence="CC-BY-4.0",
    commercial_use=True,
    rows={"train": 374, "test": 500, "validation": 90, "prompt": 10},
    format="programming task",
)

# The authors' splits, for their single file mbpp.jsonl.
TASK_IDS = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}


def get_custom_dataset(dataset_config, processor, split):
    """Rows with `text`, `code`, `test_list` and `task_id`; a single local file is divided by the authors' task ids."""
    if not isinstance(dataset_config.data_files, str):
        return load_source(SOURCE, dataset_config, split)
    wanted = TASK_IDS[split]
    return read_files([dataset_config.data_files]).filter(lambda row: row["task_id"] in wanted)
