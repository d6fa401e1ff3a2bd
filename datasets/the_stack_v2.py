"""The Stack: source code under permissive licences, with its text, from the collection that The Stack v2 builds on.

The Stack v2 itself holds no text, only ids: `the_stack_v2_ids` reads those and fetches the files they stand for.
`language` is a folder of the data set: python, javascript, java, go, ...
"""

from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="bigcode/the-stack-dedup",
    licence="the licences of the files, in max_stars_repo_licenses, and the terms of The Stack",
    commercial_use=None,
    gated=True,
    rows={"train": None},
    files={"train": "data/{language}/*.parquet"},
    columns=["content", "hexsha", "max_stars_repo_name", "max_stars_repo_path", "max_stars_repo_licenses"],
    options={"language": "python"},
    format="text",
)

get_custom_dataset = HubRows(SOURCE)
