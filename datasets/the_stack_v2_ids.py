"""The Stack v2: source code by the ids of its files, whose text is fetched from Software Heritage one by one.

Bulk download needs an agreement with Software Heritage: https://www.softwareheritage.org. `language` is a configuration
of the data set: Python, JavaScript, Java, Go, ...
"""

import gzip
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from mixture.fetch import fetched_bytes
from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="bigcode/the-stack-v2-dedup",
    config="{language}",
    licence="the licences of the files, in detected_licenses, and the terms of The Stack v2 and of Software Heritage",
    commercial_use=None,
    gated=True,
    rows={"train": None},
    columns=["blob_id", "src_encoding", "path", "repo_name", "detected_licenses", "license_type", "is_generated"],
    options={"language": "Python"},
    format="text",
)

CONTENT = "https://softwareheritage.s3.amazonaws.com/content/"
SIDE_BY_SIDE = 32


def read_rows(rows):
    """Rows with the text of a file, but for files that were generated and those that are not there any more."""
    wanted = (row for row in rows if not row.get("is_generated"))
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        while batch := list(islice(wanted, 8 * SIDE_BY_SIDE)):
            for row, content in zip(batch, pool.map(content_of, batch), strict=True):
                if content is not None:
                    yield {**row, "text": content}


def content_of(row):
    """The text of a file by its id; None where it is gone or not in the encoding that is stated."""
    packed = fetched_bytes(CONTENT + row["blob_id"])
    try:
        return None if packed is None else gzip.decompress(packed).decode(row["src_encoding"] or "utf-8")
    except (UnicodeDecodeError, LookupError):
        return None


get_custom_dataset = HubRows(SOURCE, read_rows)
