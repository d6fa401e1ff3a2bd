"""StarCoder's training data: 783 GB of source code under permissive licences, in 86 languages.

`language` is a folder of the data set: python, javascript, java, go, ... Tags such as `<reponame>` at the head of a
file are taken off.
"""

import re

from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="bigcode/starcoderdata",
    revision="9fc30b578cedaec69e47302df72cf00feed7c8c4",
    licence="the licences of the files, and the terms of The Stack",
    commercial_use=None,
    gated=True,
    rows={"train": None},
    files={"train": "{language}/*.parquet"},
    columns=["content", "id", "max_stars_repo_name", "max_stars_repo_path"],
    options={"language": "python"},
    format="text",
)

TAGS = re.compile(r"\A(?:<(?:reponame|filename|gh_stars)>[^\n<]*)+\n?")


def read_rows(rows):
    """Rows with the text of a file and where it is from."""
    for row in rows:
        yield {**row, "content": TAGS.sub("", row["content"])}


get_custom_dataset = HubRows(SOURCE, read_rows)
