"""What a teacher's cache is said to cost before it is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilling.config import CacheConfig
from jobs.capture_plan import bytes_per_position, capture_lines, epochs_to_break_even, forward_hours, plan_capture


def test_a_forward_pass_costs_two_operations_a_parameter_and_token() -> None:
    # 8 billion parameters over a billion tokens: 1.6e19 operations at 40 % of 989 TFLOPS.
    assert forward_hours(10**9, 8 * 10**9, 989) == pytest.approx(11.2, abs=0.1)


@pytest.mark.parametrize(
    ("cache", "least", "most"),
    [
        (CacheConfig(), 290, 310),
        (CacheConfig(temperatures=[1.0]), 260, 280),
        (CacheConfig(kind="sampled"), 80, 120),
        (CacheConfig(kind="hybrid"), 100, 130),
    ],
)
def test_bytes_grow_with_what_is_kept(cache: CacheConfig, least: float, most: float) -> None:
    assert least < bytes_per_position(cache) < most


def test_a_cache_pays_from_the_second_epoch_on_where_the_disk_is_cheap() -> None:
    assert epochs_to_break_even(10.0, 0.1) == 2
    assert epochs_to_break_even(10.0, 5.0) == 3
    assert epochs_to_break_even(1.0, 1.0) is None


def test_the_plan_compares_cache_and_live_teacher(tmp_path: Path) -> None:
    plan = plan_capture(
        tmp_path / "teacher/0", CacheConfig(tasks=8), tokens=10**8, positions=5 * 10**7, epochs=3,
        teacher_parameters=8 * 10**9,
    )  # fmt: skip
    assert plan.live_hours("H100") == pytest.approx(3 * 1.12, rel=0.01)
    assert plan.cached_hours("H100") < plan.live_hours("H100")
    assert plan.fits is (plan.cache_bytes is not None and plan.cache_bytes < plan.free_bytes)
    told = "\n".join(capture_lines(plan))
    assert "40% of the peak (A100 312 TFLOPS, H100 989 TFLOPS)" in told
    assert "array of 8 tasks" in told
    assert "the cache pays from 2 epochs or students on" in told


def test_before_the_data_is_prepared_only_the_size_of_a_token_is_known(tmp_path: Path) -> None:
    plan = plan_capture(tmp_path, CacheConfig(), tokens=None, positions=None, epochs=3, teacher_parameters=10)
    assert plan.fits and plan.cache_bytes is None and plan.pass_hours is None
    assert "known once the data is prepared" in "\n".join(capture_lines(plan))
