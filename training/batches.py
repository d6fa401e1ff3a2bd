"""Batches without padding, in an order that is a pure function of seed, epoch and position.

A batch is one flat row of all its samples' tokens, T in total over S samples:

    input_ids, labels, position_ids   [1, T]   labels are -100 where nothing is learned; positions restart at 0
    cu_seq_lens_q, cu_seq_lens_k      [S + 1]  int32, where each sample begins, and T
    max_length_q, max_length_k        int      tokens of the longest sample
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mixture.image_rows import ImageRows
from mixture.packing import Packs
from mixture.shards import TokenRow, TokenRows

IGNORED = -100
ROW_NUMBERS = "row_numbers"

Batch = dict[str, Any]
ComputeLoss = Callable[[torch.nn.Module, Batch, torch.Tensor], torch.Tensor]
"""(model, batch, num_items) -> the loss summed over the batch's supervised tokens, divided by `num_items`."""


Collate = Callable[[Sequence[list[Any]]], Batch]
"""Packs, each the list of samples that share a row, to their batch; no packs give one token that teaches nothing."""


class PackedDataset(Dataset[list[Any]]):
    """The packs of a split; each is the list of samples that share a row. Unpacked data has one sample in each."""

    def __init__(self, rows: TokenRows | ImageRows, packs: Packs):
        self.rows = rows
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[Any]:
        return [self.rows[int(sample)] for sample in self.packs[int(index)]]


class NumberedPacks(Dataset[tuple[int, list[Any]]]):
    """The packs of a split, each with its number: the row that it was read as."""

    def __init__(self, packs: PackedDataset):
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> tuple[int, list[Any]]:
        return int(index), self.packs[index]


def collate_numbered(packs: Sequence[tuple[int, list[Any]]], *, collate: Collate) -> Batch:
    """The packs' batch with their numbers in `row_numbers`, int64, to be taken off before the model sees it."""
    numbers = np.array([number for number, _ in packs], dtype=np.int64)
    return {**collate([samples for _, samples in packs]), ROW_NUMBERS: numbers}


def collate(packs: Sequence[list[TokenRow]]) -> Batch:
    """One flat row of the packs' samples; no packs give one token that teaches nothing, so that ranks stay in step."""
    samples = [sample for pack in packs for sample in pack]
    if not samples:
        return flat_batch([np.zeros(1, dtype=np.int64)], [np.zeros(1, dtype=bool)])
    return flat_batch([sample.input_ids for sample in samples], [sample.loss_mask for sample in samples])


def flat_batch(input_ids: Sequence[np.ndarray], loss_masks: Sequence[np.ndarray]) -> Batch:
    lengths = np.array([len(ids) for ids in input_ids])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    tokens = np.concatenate(input_ids).astype(np.int64)
    labels = np.where(np.concatenate(loss_masks), tokens, IGNORED)
    # Nothing before a sample may predict its first token: in a pack that would be the sample before it.
    labels[starts] = IGNORED
    positions = np.arange(len(tokens)) - np.repeat(starts, lengths)
    boundaries = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
    longest = int(lengths.max())
    return {
        "input_ids": torch.from_numpy(tokens)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


class BlockSampler:
    """The micro-batches of one rank for one epoch: lists of row numbers, the same for the same seed and epoch.

    `stages`: the first row of each stage; rows are shuffled inside their stage, and stages keep their order.

    An optimizer step takes the next `batch_size x gradient_accumulation x world_size` rows of the epoch's order, so
    the rows of a step do not depend on how they are spread over ranks and micro-batches. Every rank gets as many
    micro-batches as the others; where the epoch's last rows do not reach a rank, its batch is empty.
    """

    def __init__(
        self, num_rows: int, *, batch_size: int, rank: int, world_size: int, seed: int, stages: Sequence[int] = (0,)
    ):
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.stages = stages
        self.epoch = 0

    @property
    def batch_sampler(self) -> BlockSampler:
        """transformers.Trainer looks one level down for the sampler that it tells the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.num_rows / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[np.ndarray]:
        order = epoch_order(self.num_rows, seed=self.seed, epoch=self.epoch, stages=self.stages)
        for share in even_shares(self.num_rows, batch_size=self.batch_size, rank=self.rank, world_size=self.world_size):
            yield order[share.start : share.stop]


def even_shares(num_rows: int, *, batch_size: int, rank: int, world_size: int) -> Iterator[range]:
    """The positions of each micro-batch of one rank; as many for every rank, so the last may be empty."""
    for start in range(0, num_rows, batch_size * world_size):
        mine = range(start + rank * batch_size, start + (rank + 1) * batch_size)
        yield range(min(mine.start, num_rows), min(mine.stop, num_rows))


def epoch_order(num_rows: int, *, seed: int, epoch: int, stages: Sequence[int] = (0,)) -> np.ndarray:
    """The order of an epoch's rows: shuffled inside each stage, given by its first row."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    ends = [*stages[1:], num_rows]
    return np.concatenate([first + generator.permutation(end - first) for first, end in zip(stages, ends, strict=True)])
