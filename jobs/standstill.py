"""Whether a chain still gets anywhere: blocks that start from the same step again and again do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jobs.exit_code import ExitCode

MAX_STARTS_WITHOUT_PROGRESS = 2


def stands_still(events: Iterable[dict[str, Any]], step: int) -> bool:
    """Whether the last blocks all started from `step`, the newest checkpoint, and one more would end as they did."""
    return starts_that_count(events)[-MAX_STARTS_WITHOUT_PROGRESS:] == [step] * MAX_STARTS_WITHOUT_PROGRESS


def starts_that_count(events: Iterable[dict[str, Any]]) -> list[int]:
    """The step from which each block since the user's last word started, but for those that were taken off their node.

    Starts are counted and not ends: a block that is killed leaves no word.
    """
    starts: list[int] = []
    for event in events:
        match event:
            case {"event": "started_by_user" | "captured"}:  # a block may begin by capturing what is missing
                starts = []
            case {"event": "job_start", "kind": "block"}:
                starts.append(event["step"])
            case {"event": "job_end", "kind": "block", "exit_code": ExitCode.STOPPED_EARLY} if starts:
                if event.get("reason") != "time limit":
                    starts.pop()
    return starts
