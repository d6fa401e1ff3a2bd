"""The draft vocabulary: the most frequent supervised tokens of the training data, counted once for each data set."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mixture.prepare import PreparedData
from mixture.shards import TokenRows
from mixture.whole_files import write_whole

# Arrays are named by shape. D draft vocabulary, V target vocabulary.

FIRST_GUESS = 2
"""The first token of a sample that a draft can guess: it needs a hidden state and the token after it."""

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class DraftVocabulary:
    """The target's tokens that a draft can guess."""

    ids_D: npt.NDArray[np.int64]
    """The target's id of each draft token, ascending."""

    target_size: int
    coverage: float
    """Share of the supervised training tokens that it holds."""

    def __len__(self) -> int:
        return len(self.ids_D)

    @property
    def offsets_D(self) -> npt.NDArray[np.int64]:
        """`d2t` of the format that engines read: the target's id minus the draft's."""
        return self.ids_D - np.arange(len(self.ids_D))

    @property
    def is_draft_token_V(self) -> npt.NDArray[np.bool_]:
        """`t2d` of the format: whether the draft knows a token of the target."""
        known = np.zeros(self.target_size, np.bool_)
        known[self.ids_D] = True
        return known

    @property
    def index_V(self) -> npt.NDArray[np.int64]:
        """The draft's id of each token of the target, -1 where it has none."""
        index = np.full(self.target_size, -1, np.int64)
        index[self.ids_D] = np.arange(len(self.ids_D))
        return index

    @cached_property
    def digest(self) -> str:
        """Of the tokens: a draft trained for others is another draft."""
        return hashlib.sha256(self.ids_D.tobytes()).hexdigest()[:16]


def draft_vocabulary(prepared: PreparedData, *, target_size: int, size: int, min_coverage: float) -> DraftVocabulary:
    """The `size` most frequent supervised tokens of the train split, or all tokens of a target that has fewer.

    ValueError where they cover less than `min_coverage` of the supervised tokens, or the data suits no draft.
    """
    vocabulary = most_frequent(supervised_counts(prepared, target_size=target_size), size=size)
    if vocabulary.coverage < min_coverage:
        raise ValueError(
            f"eagle3.draft_vocabulary: the {len(vocabulary)} most frequent tokens are {vocabulary.coverage:.2%} of the "
            f"supervised ones, below eagle3.min_coverage ({min_coverage:.2%}), and a draft misses all others; raise "
            "draft_vocabulary, or lower min_coverage"
        )
    return vocabulary


def most_frequent(counts_V: npt.NDArray[np.int64], *, size: int) -> DraftVocabulary:
    """The tokens with the highest counts; of equal counts the lower id, so tokens never seen fill up what is short."""
    order = np.lexsort((np.arange(len(counts_V)), -counts_V))
    ids = np.sort(order[:size])
    return DraftVocabulary(ids, len(counts_V), float(counts_V[ids].sum() / max(counts_V.sum(), 1)))


def supervised_counts(prepared: PreparedData, *, target_size: int) -> npt.NDArray[np.int64]:
    """How often each token is to be guessed in the train split; kept beside the data, under its fingerprint.

    ValueError where a row has no such token, or a token is none of the target's.
    """
    cache = prepared.folder / f"supervised_counts_{prepared.fingerprint}.npy"
    if cache.exists():
        counts = np.load(cache)
    else:
        counts = count_supervised(TokenRows.open(prepared.folder, "train"))
        content = io.BytesIO()
        np.save(content, counts)
        write_whole(cache, content.getvalue())
    if len(counts) > target_size:
        raise ValueError(
            f"the data has a token {len(counts) - 1} and the target embeds {target_size}; prepare it with the "
            "target's own tokenizer"
        )
    return np.pad(counts, (0, target_size - len(counts)))


def count_supervised(rows: TokenRows) -> npt.NDArray[np.int64]:
    """How often each token is to be guessed; ValueError where a row has none."""
    counts = np.zeros(0, np.int64)
    empty_rows = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        guessed = []
        for number in range(start, min(start + _ROWS_AT_ONCE, len(rows))):
            row = rows[number]
            guessed.append(row.input_ids[FIRST_GUESS:][row.loss_mask[FIRST_GUESS:]])
            if not len(guessed[-1]):
                empty_rows.append(row.sample_id)
        more = np.bincount(np.concatenate(guessed))
        size = max(len(counts), len(more))
        counts = np.pad(counts, (0, size - len(counts))) + np.pad(more, (0, size - len(more)))
    if empty_rows:
        raise ValueError(
            f"{len(empty_rows)} rows of the train split have no supervised token after their first {FIRST_GUESS}, the "
            f"first of them {empty_rows[0]}: nothing can be learned from them. Look at the rows with "
            "./train.sh check-dataset FILE and leave them out"
        )
    return counts
