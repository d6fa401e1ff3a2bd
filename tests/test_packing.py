"""Packs cover every sample once, fit, and are those of textbook best-fit decreasing."""

import time

import numpy as np
import pytest

from mixture.packing import best_fit_packs, single_packs, staged_packs


def textbook_best_fit_decreasing(lengths, capacity):
    """Free room of each pack, one sample at a time, by a search over all packs."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [pack for pack, room in enumerate(rooms) if room >= length]
        if fitting:
            best = min(fitting, key=lambda pack: rooms[pack])
            rooms[best] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


def log_normal_lengths(count, capacity, seed=0):
    return np.random.default_rng(seed).lognormal(5.3, 0.9, count).astype(int).clip(1, capacity)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("capacity", [8, 50, 512])
def test_packs_are_as_full_as_those_of_textbook_best_fit_decreasing(seed, capacity):
    lengths = np.random.default_rng(seed).integers(1, capacity + 1, size=300)
    packs = best_fit_packs(lengths, capacity)
    assert sorted(capacity - lengths[pack].sum() for pack in packs) == textbook_best_fit_decreasing(lengths, capacity)


def test_every_sample_is_in_exactly_one_pack_and_every_pack_fits():
    lengths = log_normal_lengths(20_000, 2048)
    packs = best_fit_packs(lengths, 2048)
    assert np.array_equal(np.sort(packs.indices), np.arange(20_000))
    assert max(lengths[pack].sum() for pack in packs) <= 2048
    assert all(len(pack) for pack in packs)
    assert packs.indices.dtype == np.int32


@pytest.mark.parametrize("capacity", [1024, 2048, 8192])
def test_a_log_normal_mix_fills_packs_to_99_percent(capacity):
    lengths = log_normal_lengths(50_000, capacity)
    packs = best_fit_packs(lengths, capacity)
    assert lengths.sum() / (len(packs) * capacity) >= 0.99


def test_no_more_than_eleven_ninths_of_the_fewest_packs_possible():
    # Triplets that fill a pack exactly: the fewest packs are known.
    generator = np.random.default_rng(1)
    first = generator.integers(250, 400, size=1000)
    second = generator.integers(250, 400, size=1000)
    lengths = np.concatenate([first, second, 1000 - first - second])
    assert len(best_fit_packs(lengths, 1000)) <= 1000 * 11 / 9 + 4


def test_the_same_lengths_give_the_same_packs():
    lengths = log_normal_lengths(5000, 1024)
    first, second = best_fit_packs(lengths, 1024), best_fit_packs(lengths.astype(np.int32), 1024)
    assert np.array_equal(first.indices, second.indices) and np.array_equal(first.starts, second.starts)


def test_samples_of_full_length_stand_alone_and_no_samples_give_no_packs():
    assert [pack.tolist() for pack in best_fit_packs(np.array([8, 8, 8]), 8)] == [[0], [1], [2]]
    assert len(best_fit_packs(np.array([], dtype=int), 8)) == 0


def test_a_sample_longer_than_a_pack_is_refused():
    with pytest.raises(ValueError, match=r"must lie in \[1, 8\], got 3 to 9"):
        best_fit_packs(np.array([3, 9]), 8)


def test_a_million_samples_take_seconds():
    lengths = log_normal_lengths(1_000_000, 4096)
    started = time.process_time()
    best_fit_packs(lengths, 4096)
    assert time.process_time() - started < 10


def test_unpacked_runs_have_one_sample_in_each_pack():
    assert [pack.tolist() for pack in single_packs(3)] == [[0], [1], [2]]


def test_packs_of_stages_hold_every_sample_once_and_never_cross_a_stage():
    lengths = log_normal_lengths(3000, 512)
    stages = [0, 1000, 1001, 2500]
    packs = staged_packs(lengths, 512, stages, window=300)
    assert np.array_equal(np.sort(packs.indices), np.arange(3000))
    assert max(lengths[pack].sum() for pack in packs) <= 512
    ends = [*packs.stages[1:], len(packs)]
    for first, end, sample, last in zip(packs.stages, ends, stages, [*stages[1:], 3000], strict=True):
        in_stage = np.concatenate([packs[pack] for pack in range(first, end)])
        assert np.array_equal(np.sort(in_stage), np.arange(sample, last))


def test_windows_keep_the_order_of_samples_to_within_a_window():
    packs = staged_packs(log_normal_lengths(2000, 512), 512, [0, 1000], window=100)
    windows = [sorted({int(sample) // 100 for sample in pack}) for pack in packs]
    assert all(len(window) == 1 for window in windows) and windows == sorted(windows)


@pytest.mark.parametrize("capacity", [2048, 4096, 8192])
def test_windows_of_20000_samples_are_packed_as_full_as_everything_at_once(capacity):
    lengths = log_normal_lengths(60_000, capacity)
    staged = staged_packs(lengths, capacity, [0, 40_000])
    assert len(staged) / len(best_fit_packs(lengths, capacity)) < 1.001


def test_a_single_stage_is_packed_as_a_whole_and_an_empty_one_has_no_packs():
    lengths = log_normal_lengths(500, 512)
    whole = best_fit_packs(lengths, 512)
    assert np.array_equal(staged_packs(lengths, 512, [0], window=10).indices, whole.indices)
    assert staged_packs(np.array([3, 3]), 8, [0, 2, 2]).stages.tolist() == [0, 1, 1]
