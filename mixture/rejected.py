"""rejected.jsonl: rows that were left out of a mixture, a few of each source and reason, to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import orjson

from mixture.scan import Rejection
from mixture.whole_files import whole_file

ROWS_PER_REASON = 100


def write_rejected(path: Path, rejections: Iterable[Rejection], *, rows_per_reason: int = ROWS_PER_REASON) -> int:
    """Write the first `rows_per_reason` rows of each source and reason, one JSON object a line; how many were written.

    Each holds source, file, line (1-based), reason, detail and the beginning of the row as it was read. The file
    appears whole or not at all; the counts of all rows are in the statistics.
    """
    written: Counter[tuple[str, str]] = Counter()
    with whole_file(path) as file:
        for rejection in rejections:
            kind = (rejection.source, rejection.reason)
            if written[kind] < rows_per_reason:
                written[kind] += 1
                file.write(as_line(rejection))
    return written.total()


def as_line(rejection: Rejection) -> bytes:
    """The line that is written for a rejection."""
    return orjson.dumps(
        {
            "source": rejection.source,
            "file": str(rejection.file),
            "line": rejection.line,
            "reason": rejection.reason,
            "detail": rejection.detail,
            "row": rejection.excerpt,
        },
        option=orjson.OPT_APPEND_NEWLINE,
    )
