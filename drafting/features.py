"""The target's hidden states on disk: what a draft reads of it, written once for all epochs and runs.

PREPARED/features/KEY/
    manifest.json                    what they were made of
    train-00017.safetensors          `states` [tokens, 4 H]: consecutive packs one after another; of each token the
                                     inputs of the three feature layers, and the last hidden state
    train-00017.done                 bytes of the shard; written last

The head makes the target's whole distribution of the last hidden state, so nothing is lost, at a fraction of its size.
Each pack went through the target alone: a run with training.batch_size 1 reads, on the same kind of device, bit for bit
what it would have computed.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import orjson
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save

from drafting.config import FEATURES_FOLDER, NUM_FEATURES
from drafting.target import Target, TargetStates
from mixture.packing import Packs
from mixture.shards import TokenRow, TokenRows, read_packs
from mixture.whole_files import remove_leftovers, whole_file, write_whole
from training.batches import Batch, Collate, PackedDataset, collate
from training.distributed import Ranks, failing_together, from_main
from training.evaluation import autocast, to_device
from training.frozen_shards import in_step
from training.model_identity import model_digest

if TYPE_CHECKING:
    from mixture.prepare import PreparedData
    from training.config import ModelConfig

# Tensors are named by shape. T tokens, W width of all states of a token, P packs, S shards.

FORMAT_VERSION = 1
"""Raised whenever the same request gives other files."""

STATES = "target_states"
"""Of a batch, [1, T, W]."""

SHARD_BYTES = 512 << 20
OPEN_SHARDS = 64
REMOVE = "remove the folder, and the next block writes it again"

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class FeatureIdentity:
    """What cached features were made of; they serve only runs that are made of the same."""

    target: str
    """Name, for messages: a target that was moved is the same one."""

    target_digest: str
    data_fingerprint: str
    layers: list[int]
    dtype: str
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(cls, target: Target, model: ModelConfig, prepared: PreparedData) -> FeatureIdentity:
        return cls(
            target=model.name,
            target_digest=model_digest(model.name, model.revision),
            data_fingerprint=prepared.fingerprint,
            layers=list(target.layers),
            dtype=str(target.network.dtype).removeprefix("torch."),
        )

    @property
    def key(self) -> str:
        """16 hex digits that name the folder."""
        parts = {name: value for name, value in asdict(self).items() if name != "target"}
        return xxhash.xxh3_64_hexdigest(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS))


def features_folder(prepared: PreparedData, identity: FeatureIdentity) -> Path:
    """Where the features of prepared data lie."""
    return prepared.folder / FEATURES_FOLDER / identity.key


@dataclass(frozen=True)
class ShardLayout:
    """Which packs of a split lie in which shard."""

    packs: Packs
    lengths: npt.NDArray[np.int32]
    """Tokens of each row."""

    token_bytes: int

    @cached_property
    def starts_P(self) -> npt.NDArray[np.int64]:
        """The token at which each pack begins, of the whole split, and its end."""
        return np.concatenate([[0], np.cumsum(self.lengths[self.packs.indices], dtype=np.int64)])[self.packs.starts]

    @cached_property
    def first_packs(self) -> list[int]:
        """The first pack of each shard, and the number of packs."""
        firsts, per_shard = [0], max(SHARD_BYTES // self.token_bytes, 1)
        while firsts[-1] < len(self.packs):
            end = int(np.searchsorted(self.starts_P, self.starts_P[firsts[-1]] + per_shard, side="right")) - 1
            firsts.append(max(end, firsts[-1] + 1))
        return firsts

    @property
    def shards(self) -> range:
        return range(len(self.first_packs) - 1)

    def tokens(self, shard: int) -> int:
        return int(self.starts_P[self.first_packs[shard + 1]] - self.starts_P[self.first_packs[shard]])

    def place(self, pack: int) -> tuple[int, slice]:
        """The shard of a pack, and its tokens there."""
        shard = int(np.searchsorted(self.first_packs, pack, side="right")) - 1
        first = self.starts_P[self.first_packs[shard]]
        return shard, slice(int(self.starts_P[pack] - first), int(self.starts_P[pack + 1] - first))


@dataclass(frozen=True, kw_only=True)
class SplitFeatures:
    """The features of one split, written or not."""

    folder: Path
    split: str
    rows: PackedDataset
    layout: ShardLayout

    @classmethod
    def of(cls, folder: Path, prepared: Path, split: str, *, token_bytes: int) -> SplitFeatures:
        rows, packs = TokenRows.open(prepared, split), read_packs(prepared, split)
        layout = ShardLayout(packs, rows.lengths(), token_bytes)
        return cls(folder=folder, split=split, rows=PackedDataset(rows, packs), layout=layout)

    def shard_file(self, shard: int) -> Path:
        return self.folder / f"{self.split}-{shard:05d}.safetensors"

    def missing(self) -> list[int]:
        """Shards that are not there, or not whole."""
        return [shard for shard in self.layout.shards if not is_done(self.shard_file(shard))]


def is_done(shard: Path) -> bool:
    """Whether a shard is marked and has the size that its marker says."""
    marker = shard.with_suffix(".done")
    return marker.is_file() and shard.is_file() and shard.stat().st_size == int(marker.read_text())


# --- writing


def write_features(
    target: Target,
    whole_target: Callable[[], Target],
    model: ModelConfig,
    prepared: PreparedData,
    *,
    precision: torch.dtype,
    ranks: Ranks,
    report: Report,
    shard_written: Callable[[], None],
) -> dict[str, SplitFeatures]:
    """The target's features of each split, of which the processes write what is missing side by side.

    `target` may lack its layers; `whole_target` is asked where something is missing.
    ValueError: the disk has no room for them, or their folder holds others.
    """
    identity = FeatureIdentity.of(target, model, prepared)
    folder = features_folder(prepared, identity)
    splits = splits_of(folder, target, prepared)
    with failing_together():
        if ranks.is_main:
            take_folder(folder, identity)
    missing = from_main([(name, shard) for name, split in splits.items() for shard in split.missing()])
    with failing_together():
        if ranks.is_main:
            require_room(folder, splits, missing, report)
    if missing:
        whole = whole_target()
        with failing_together(), in_step(whole.network):
            for name, shard in missing[ranks.rank :: ranks.world_size]:
                write_shard(splits[name], shard, whole, precision)
                shard_written()
    return splits


def splits_of(folder: Path, target: Target, prepared: PreparedData) -> dict[str, SplitFeatures]:
    token_bytes = target.states_width * target.network.dtype.itemsize
    return {
        name: SplitFeatures.of(folder, prepared.folder, name, token_bytes=token_bytes)
        for name, split in prepared.splits.items()
        if split
    }


def take_folder(folder: Path, identity: FeatureIdentity) -> None:
    """Make the folder of these features; ValueError where it holds others."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        write_whole(manifest, orjson.dumps(asdict(identity), option=orjson.OPT_INDENT_2), synced=True)
        return
    found, wanted = orjson.loads(manifest.read_bytes()), asdict(identity)
    differences = [
        f"{name}: {found.get(name)} and {wanted[name]}"
        for name in wanted
        if name != "target" and found.get(name) != wanted[name]
    ]
    if differences:
        raise ValueError(
            f"{folder} holds features of something else. Of its manifest, and of this run:\n  "
            + "\n  ".join(differences)
            + f"\n{REMOVE}"
        )


def require_room(
    folder: Path, splits: dict[str, SplitFeatures], missing: Sequence[tuple[str, int]], report: Report
) -> None:
    """Tell the size of the features; ValueError where the disk has no room for what is missing."""
    token_bytes = next(iter(splits.values())).layout.token_bytes
    needed = sum(splits[name].layout.tokens(shard) for name, shard in missing) * token_bytes
    whole = sum(split.layout.tokens(shard) for split in splits.values() for shard in split.layout.shards) * token_bytes
    free = shutil.disk_usage(folder).free
    report(
        f"target's features {folder}: {token_bytes:,} bytes a token, {whole / 1e9:,.3g} GB, of which "
        f"{needed / 1e9:,.3g} GB are to be written; {free / 1e9:,.3g} GB are free there"
    )
    if needed > free:
        raise ValueError(
            f"eagle3.features: the target's features need {needed / 1e9:,.3g} GB more in {folder}, and "
            f"{free / 1e9:,.3g} GB are free there; free space, name another data_dir, or use eagle3.features: live"
        )


def write_shard(split: SplitFeatures, shard: int, target: Target, precision: torch.dtype) -> None:
    """Write one shard and its marker."""
    layout, path = split.layout, split.shard_file(shard)
    states_TW = torch.empty(layout.tokens(shard), target.states_width, dtype=target.network.dtype)
    for pack in range(layout.first_packs[shard], layout.first_packs[shard + 1]):
        _, place = layout.place(pack)
        batch = to_device(collate([split.rows[pack]]), target.device)
        with autocast(target.device, precision):
            states = target.read_batch(batch)
        states_TW[place] = torch.cat([states.features_1TF, states.last_1TH], dim=-1)[0].cpu()
    with whole_file(path, synced=True) as file:
        file.write(save({"states": states_TW}))
    write_whole(path.with_suffix(".done"), str(path.stat().st_size).encode(), synced=True)


# --- reading


@dataclass(frozen=True, slots=True)
class FeaturedRow(TokenRow):
    """One tokenised sample, and the target's states of its tokens."""

    states_TW: torch.Tensor


class FeaturedPacks(PackedDataset):
    """The packs of a split, each sample with the target's states, from files that are mapped into memory. Picklable."""

    def __init__(self, features: SplitFeatures):
        super().__init__(features.rows.rows, features.rows.packs)
        self.features = features
        self.open_shards: OrderedDict[int, Any] = OrderedDict()
        if missing := features.missing():
            raise ValueError(
                f"{features.shard_file(missing[0])} is missing or cut short; start the chain again, and its block "
                "writes it again"
            )

    def __getitem__(self, index: int) -> list[Any]:
        samples = super().__getitem__(index)
        shard, place = self.features.layout.place(int(index))
        states_TW = self.shard(shard)[place]
        lengths = [len(sample.input_ids) for sample in samples]
        return [
            FeaturedRow(sample.sample_id, sample.input_ids, sample.loss_mask, sample.source, states)
            for sample, states in zip(samples, states_TW.split(lengths), strict=True)
        ]

    def shard(self, shard: int) -> Any:
        """The states of an open shard, to be sliced; the one that was not used for longest is closed for it."""
        states = self.open_shards.pop(shard, None)
        if states is None:
            states = safe_open(self.features.shard_file(shard), framework="pt").get_slice("states")
            if len(self.open_shards) == OPEN_SHARDS:
                self.open_shards.popitem(last=False)
        self.open_shards[shard] = states
        return states

    def __reduce__(self) -> tuple[type[FeaturedPacks], tuple[SplitFeatures]]:
        return FeaturedPacks, (self.features,)


@dataclass(frozen=True)
class CollateWithStates:
    """Packs to their batch, with the target's states; picklable."""

    collate: Collate
    states_width: int
    dtype: torch.dtype

    def __call__(self, packs: Sequence[list[Any]]) -> Batch:
        batch = self.collate(packs)
        states = [sample.states_TW for pack in packs for sample in pack]
        # No packs are one token that teaches nothing.
        batch[STATES] = torch.cat(states or [torch.zeros(1, self.states_width, dtype=self.dtype)])[None]
        return batch


def cached_states(states_1TW: torch.Tensor) -> TargetStates:
    """What `Target.read_batch` gave when the states were written."""
    hidden = states_1TW.shape[-1] // (NUM_FEATURES + 1)
    features_1TF, last_1TH = states_1TW.split([NUM_FEATURES * hidden, hidden], dim=-1)
    return TargetStates(features_1TF.contiguous(), last_1TH.contiguous())
