"""The draft vocabulary is the most frequent supervised tokens, in a fixed order, counted once for each data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from drafting.vocabulary import draft_vocabulary, most_frequent
from mixture.prepare import PreparedData
from mixture.shards import TokenRow, TokenRows, TokenWriter


def prepared(folder: Path, *rows: tuple[list[int], list[bool]], fingerprint: str = "f") -> PreparedData:
    with TokenWriter(folder, "train", max_length=8) as writer:
        for number, (ids, mask) in enumerate(rows):
            writer.add(TokenRow(f"row-{number}", np.array(ids, np.int32), np.array(mask), "source"))
    return PreparedData(folder=folder, fingerprint=fingerprint)


def test_the_most_frequent_supervised_tokens_that_a_draft_can_guess_are_taken(tmp_path: Path) -> None:
    data = prepared(
        tmp_path,
        # The first two tokens of a row cannot be guessed, and a question is not to be.
        ([7, 7, 3, 5, 5, 9], [True, True, False, True, True, True]),
        ([7, 7, 3, 5, 4, 9], [True, True, False, True, True, True]),
    )
    vocabulary = draft_vocabulary(data, target_size=12, size=2, min_coverage=0.8)
    assert vocabulary.ids_D.tolist() == [5, 9]
    assert vocabulary.coverage == pytest.approx(5 / 6)
    assert vocabulary.offsets_D.tolist() == [5, 8] and vocabulary.offsets_D.dtype == np.int64
    assert np.flatnonzero(vocabulary.is_draft_token_V).tolist() == [5, 9]
    assert vocabulary.is_draft_token_V.dtype == np.bool_ and len(vocabulary.is_draft_token_V) == 12
    assert vocabulary.index_V[[4, 5, 9]].tolist() == [-1, 0, 1]


def test_of_equal_counts_the_lower_id_is_taken_and_tokens_never_seen_fill_up_what_is_short() -> None:
    counts = np.array([0, 2, 0, 1, 1, 1, 0])
    assert most_frequent(counts, size=3).ids_D.tolist() == [1, 3, 4]
    assert most_frequent(counts, size=6).ids_D.tolist() == [0, 1, 2, 3, 4, 5]
    assert most_frequent(counts, size=100).ids_D.tolist() == list(range(7))


def test_another_choice_of_tokens_has_another_digest() -> None:
    counts = np.array([0, 2, 0, 1, 1, 1, 0])
    assert most_frequent(counts, size=3).digest == most_frequent(counts * 2, size=3).digest
    assert most_frequent(counts, size=3).digest != most_frequent(counts[::-1], size=3).digest


def test_a_vocabulary_that_covers_too_little_is_refused(tmp_path: Path) -> None:
    data = prepared(tmp_path, ([7, 7, 3, 4, 5], [True] * 5))
    with pytest.raises(ValueError, match=r"the 1 most frequent tokens are 33\.33% of the supervised ones"):
        draft_vocabulary(data, target_size=12, size=1, min_coverage=0.9)


def test_a_row_that_teaches_a_draft_nothing_is_refused_by_name(tmp_path: Path) -> None:
    data = prepared(tmp_path, ([7, 7, 3], [True] * 3), ([7, 7, 3], [True, True, False]))
    with pytest.raises(ValueError, match=r"1 rows of the train split .* the first of them row-1"):
        draft_vocabulary(data, target_size=12, size=1, min_coverage=0)


def test_a_token_that_the_target_does_not_have_is_refused(tmp_path: Path) -> None:
    data = prepared(tmp_path, ([7, 7, 30], [True] * 3))
    with pytest.raises(ValueError, match="the data has a token 30 and the target embeds 12"):
        draft_vocabulary(data, target_size=12, size=1, min_coverage=0)


def test_tokens_are_counted_once_for_a_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepared(tmp_path, ([7, 7, 3], [True] * 3))
    first = draft_vocabulary(data, target_size=12, size=2, min_coverage=0)
    with monkeypatch.context() as patch:
        patch.setattr(TokenRows, "open", lambda *arguments: pytest.fail("counted again"))
        assert draft_vocabulary(data, target_size=12, size=2, min_coverage=0).digest == first.digest
    changed = prepared(tmp_path, ([7, 7, 9], [True] * 3), fingerprint="g")
    assert draft_vocabulary(changed, target_size=12, size=1, min_coverage=0).ids_D.tolist() == [9]
