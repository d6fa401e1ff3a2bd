"""What Slurm lists, as jobs: the lines of an array are one."""

from __future__ import annotations

import pytest

from jobs.queue import QueuedJob, folded


def task(job_id: str, state: str, reason: str = "None", dependency: str = "(null)") -> QueuedJob:
    return QueuedJob(job_id, "baton-x-0-capture-1", state, reason, "", "0:00", dependency)


def test_the_lines_of_an_array_are_one_job_and_other_lines_stay() -> None:
    before, array, after = folded(
        [
            task("11", "RUNNING"),
            task("12_0", "PENDING", "JobHeldUser", "afterany:11(unfulfilled)"),
            task("12_1", "PENDING", "JobHeldUser", "afterany:11(unfulfilled)"),
            task("13", "PENDING", "Dependency", "afterany:12_*(unfulfilled)"),
        ]
    )
    assert before.tasks == () and after.tasks == ()
    assert array.id == "12"
    assert [one.id for one in array.tasks] == ["12_0", "12_1"]
    assert array.is_held and array.dependencies == ["afterany:11"]
    assert after.dependencies == ["afterany:12"]


@pytest.mark.parametrize(
    ("states", "state"),
    [
        (["COMPLETED", "PENDING", "RUNNING"], "RUNNING"),
        (["COMPLETED", "PENDING", "COMPLETING"], "COMPLETING"),
        (["COMPLETED", "PENDING", "CANCELLED"], "PENDING"),
        (["CANCELLED", "COMPLETED"], "COMPLETED"),
        (["CANCELLED", "CANCELLED"], "CANCELLED"),
    ],
)
def test_an_array_is_where_its_furthest_task_is(states: list[str], state: str) -> None:
    (array,) = folded(task(f"12_{number}", one) for number, one in enumerate(states))
    assert array.state == state
