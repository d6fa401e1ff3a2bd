"""Batches are flat rows without padding, in an order that seed, epoch and position decide."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import finetuning
from mixture.config import DatasetConfig
from mixture.prepare import PreparationRequest, PreparedData, prepare
from mixture.shards import TokenRow, TokenRows, read_packs
from training.batches import BlockSampler, PackedDataset, collate, epoch_order
from training.checkpoints import newest_valid
from training.run import FinetuningRun

MakeRun = Callable[..., FinetuningRun]


def token_row(*input_ids: int, masked: int = 0) -> TokenRow:
    mask = np.arange(len(input_ids)) >= masked
    return TokenRow("id", np.array(input_ids, dtype=np.int32), mask, "source")


def test_a_batch_is_one_flat_row_with_the_boundaries_of_its_samples() -> None:
    batch = collate([[token_row(5, 6, 7), token_row(8, 9, masked=1)], [token_row(1, 2, 3, 4, masked=2)]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, -100, 3, 4]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 9]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["position_ids"].dtype == torch.int64
    assert batch["max_length_q"] == batch["max_length_k"] == 4


def test_a_batch_without_rows_is_one_token_that_teaches_nothing() -> None:
    batch = collate([])
    assert batch["labels"].tolist() == [[-100]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 1]


def test_the_packs_of_a_split_hold_every_token_row_once(prepared_sums: PreparedData) -> None:
    rows = TokenRows.open(prepared_sums.folder, "train")
    dataset = PackedDataset(rows, read_packs(prepared_sums.folder, "train"))
    packed = [sample.sample_id for index in range(len(dataset)) for sample in dataset[index]]
    assert sorted(packed) == sorted(row.sample_id for row in rows)
    assert max(collate([dataset[index]])["input_ids"].shape[1] for index in range(len(dataset))) <= 128


def micro_batches(num_rows: int, *, batch_size: int, world_size: int, epoch: int = 0) -> list[list[list[int]]]:
    """[rank][micro-batch] row numbers."""
    ranks = []
    for rank in range(world_size):
        sampler = BlockSampler(num_rows, batch_size=batch_size, rank=rank, world_size=world_size, seed=3)
        sampler.set_epoch(epoch)
        ranks.append([batch.tolist() for batch in sampler])
        assert len(ranks[-1]) == len(sampler)
    return ranks


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "world_size"), list(itertools.product([1, 12, 13, 29], [1, 2, 3], [1, 2, 4]))
)
def test_an_epoch_has_every_row_once_and_every_rank_as_many_batches(
    num_rows: int, batch_size: int, world_size: int
) -> None:
    ranks = micro_batches(num_rows, batch_size=batch_size, world_size=world_size)
    assert sorted(itertools.chain(*itertools.chain(*ranks))) == list(range(num_rows))
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) <= batch_size for batches in ranks for batch in batches)


def test_the_rows_of_an_optimizer_step_do_not_depend_on_ranks_or_micro_batches() -> None:
    def steps(batch_size: int, accumulation: int, world_size: int) -> list[set[int]]:
        ranks = micro_batches(29, batch_size=batch_size, world_size=world_size)
        count = -(-len(ranks[0]) // accumulation)
        return [
            {row for batches in ranks for batch in batches[k * accumulation : (k + 1) * accumulation] for row in batch}
            for k in range(count)
        ]

    assert steps(12, 1, 1) == steps(4, 3, 1) == steps(3, 2, 2) == steps(3, 1, 4)


def test_the_order_is_new_in_every_epoch_and_the_same_in_every_process() -> None:
    assert micro_batches(29, batch_size=2, world_size=1, epoch=4) == micro_batches(
        29, batch_size=2, world_size=1, epoch=4
    )
    assert micro_batches(29, batch_size=2, world_size=1, epoch=4) != micro_batches(
        29, batch_size=2, world_size=1, epoch=5
    )
    # Pinned: another order would break the resume of every chain that is under way.
    assert epoch_order(8, seed=1, epoch=0).tolist() == [0, 5, 4, 1, 2, 6, 3, 7]


def test_rows_are_shuffled_inside_their_stage_only() -> None:
    orders = [epoch_order(100, seed=1, epoch=epoch, stages=[0, 30, 90]).tolist() for epoch in range(3)]
    for order in orders:
        assert sorted(order[:30]) == list(range(30)) and sorted(order[30:90]) == list(range(30, 90))
        assert sorted(order[90:]) == list(range(90, 100)) and order[:30] != list(range(30))
    assert len({tuple(order) for order in orders}) == 3
    assert orders[1] == epoch_order(100, seed=1, epoch=1, stages=[0, 30, 90]).tolist()
    sampler = BlockSampler(100, batch_size=7, rank=0, world_size=1, seed=1, stages=[0, 30, 90])
    sampler.set_epoch(1)
    assert [row for batch in sampler for row in batch.tolist()] == orders[1]


@pytest.mark.chain
def test_a_chain_trains_the_stages_of_a_mixture_in_order_and_resumes_exactly(
    make_run: MakeRun, prepared_sums: PreparedData, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (prepared_sums.folder / "train.jsonl").read_text().splitlines(keepends=True)
    mixture = tmp_path / "mixture"
    mixture.mkdir()
    for stage, rows in enumerate((lines[:25], lines[25:])):
        (mixture / f"{stage}.jsonl").write_text("".join(rows))
    parts = [{"file": f"{stage}.jsonl", "split": "train", "stage": stage} for stage in (0, 1)]
    (mixture / "MIXED").write_text(json.dumps({"key": "sums", "parts": parts}))
    request = PreparationRequest(
        dataset=DatasetConfig(name="sums", max_length=128),
        mixture=mixture,
        tokenizer=str(tiny_model),
        objective="sft",
    )
    prepared = prepare(request, tmp_path, lambda line: None)
    seen: list[int] = []
    read = PackedDataset.__getitem__

    def recorded(self: PackedDataset, index: int) -> list[TokenRow]:
        seen.append(int(index))
        return read(self, index)

    weights, orders = [], []
    for name, blocks in (("whole", 1), ("chain", 3)):
        run = make_run(name, training={"lr": 1e-3, "epochs_per_job": 3 // blocks, "total_jobs": blocks})
        run = replace(run, prepared=prepared.folder)
        seen.clear()
        monkeypatch.setattr(PackedDataset, "__getitem__", recorded)
        while not finetuning.train(run).finished:
            pass
        monkeypatch.setattr(PackedDataset, "__getitem__", read)
        orders.append(list(seen))
        (file,) = newest_checkpoint(run).glob("*model.safetensors")
        weights.append(file.read_bytes())
    train = prepared.splits["train"]
    assert train is not None and train.stages == [0, train.stages[1]] and prepared.splits.get("test") is None
    for epoch in range(3):
        order = orders[0][epoch * train.packs : (epoch + 1) * train.packs]
        assert sorted(order[: train.stages[1]]) == list(range(train.stages[1]))
        assert sorted(order) == list(range(train.packs))
    assert orders[0] == orders[1] and weights[0] == weights[1]


def newest_checkpoint(run: FinetuningRun) -> Path:
    checkpoint, _ = newest_valid(run.folder.checkpoints)
    assert checkpoint is not None
    return checkpoint.path


def test_the_loss_and_the_weights_do_not_depend_on_micro_batches(make_run: MakeRun) -> None:
    whole = make_run("whole", training={"lr": 1e-3, "batch_size": 4, "log_every": 1})
    parts = make_run("parts", training={"lr": 1e-3, "batch_size": 1, "gradient_accumulation": 4, "log_every": 1})
    finetuning.train(whole)
    finetuning.train(parts)
    whole_lines, parts_lines = list(whole.folder.metrics()), list(parts.folder.metrics())
    assert len(whole_lines) == 4
    for whole_line, parts_line in zip(whole_lines, parts_lines, strict=True):
        assert parts_line["loss"] == pytest.approx(whole_line["loss"], abs=1e-5)
        assert parts_line["grad_norm"] == pytest.approx(whole_line["grad_norm"], rel=1e-4)
        assert parts_line["tokens"] == whole_line["tokens"]
