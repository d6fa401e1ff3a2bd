"""Capture a teacher: its forward pass over the prepared data, shard by shard, into the cache of distilling/cache.py.

What is written is a function of the request alone. Draws are seeded by sample, and a forward pass holds rows of one
shard only, so a capture that was killed, moved or spread over many workers gives the rows of an unbroken one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch.nn.functional import linear

from distilling.cache import (
    LARGEST_VOCABULARY,
    LOWEST_LOG,
    Fidelity,
    KeptRow,
    Manifest,
    is_done,
    mark_done,
    num_shards,
    positions_of,
    row_digest,
    sample_hash,
    write_shard,
)
from distilling.config import CacheConfig, TeacherModelConfig
from distilling.identity import CacheIdentity, kept_temperatures
from distilling.teacher import Teacher, load_teacher
from mixture.prepare import PreparedData
from mixture.shards import TokenRow, TokenRows
from mixture.whole_files import remove_leftovers
from training.batches import IGNORED, flat_batch
from training.chunks import tokens_per_chunk
from training.claims import Claim, InterruptedShardError, work_on_shards
from training.losses import shape_logits
from training.models import stop_token_ids, told_of_full_memory
from training.shard_folder import done_file

# Tensors are named by shape. N positions, V vocabulary, K most probable tokens, M tokens that are always kept,
# T temperatures, D draws of a position.

REPORT_EVERY_S = 30.0

Report = Callable[[str], None]
StopRequested = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class CaptureRequest:
    """All that shapes a cache, and where it goes."""

    teacher: TeacherModelConfig
    cache: CacheConfig
    prepared: Path
    """Folder of prepared data; its train split is captured."""

    folder: Path
    """The cache's."""

    seed: int
    """Of the draws."""


def capture(request: CaptureRequest, report: Report, *, stop_requested: StopRequested) -> bool:
    """Capture the shards that nobody has captured or is at. Any number of processes may do so side by side.

    Returns whether the cache is complete; if not, this one was asked to stop, or others are still at the last shards.
    ValueError: the teacher, the data, or a folder that holds another cache.
    """
    request.folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(request.folder)
    found = Manifest.read(request.folder)
    if found is not None and not unfinished(request.folder, found):
        return True
    prepared = open_prepared(request.prepared)
    with told_of_full_memory(lower="distillation.cache.batch_tokens", key="distillation.teacher_model"):
        teacher = load_teacher(request.teacher)
    manifest = agreed_manifest(request, teacher, prepared)
    rows = TokenRows.open(request.prepared, "train")
    worker = Worker(request, manifest, teacher, rows, report, stop_requested)
    return worker.run()


def unfinished(folder: Path, manifest: Manifest) -> list[int]:
    """Shards that are not there, or not whole."""
    return [shard for shard in range(manifest.shards) if not is_done(folder, shard)]


def open_prepared(folder: Path) -> PreparedData:
    prepared = PreparedData.open(folder)
    if prepared is None:
        raise ValueError(f"{folder} holds no prepared data; the first job of the chain prepares it")
    return prepared


# --- what is captured


def agreed_manifest(request: CaptureRequest, teacher: Teacher, prepared: PreparedData) -> Manifest:
    """The manifest that all workers write by; ValueError where the folder has that of another request."""
    wanted = manifest_of(request, teacher, prepared)
    found = Manifest.read(request.folder)
    if found is None:
        wanted.write(request.folder)
        return wanted
    if differences := found.differences(wanted):
        raise ValueError(
            f"{request.folder} holds another cache. Of its manifest, and of this capture:\n  "
            + "\n  ".join(differences)
            + "\nGo on with the settings and on the kind of device that it was begun with, or remove the folder"
        )
    return found


def manifest_of(request: CaptureRequest, teacher: Teacher, prepared: PreparedData) -> Manifest:
    train = prepared.splits["train"]
    assert train is not None, "preparation fails where the train split has no rows"
    if teacher.vocabulary > LARGEST_VOCABULARY:
        raise ValueError(
            f"{request.teacher.name} gives {teacher.vocabulary} logits, and a cache keeps ids below "
            f"{LARGEST_VOCABULARY}; use distillation.teacher: live"
        )
    cache = request.cache
    return Manifest(
        identity=CacheIdentity.of(request.teacher, teacher.tokenizer, data_fingerprint=prepared.fingerprint),
        dtype=str(teacher.model.dtype).removeprefix("torch."),
        vocabulary=teacher.vocabulary,
        kind=cache.kind,
        k=min(cache.top_tokens, teacher.vocabulary),
        draws=cache.num_draws,
        temperatures=kept_temperatures(cache),
        keep_ids=keep_ids(cache, teacher),
        seed=request.seed,
        shards=num_shards(train.loss_tokens, cache.shard_tokens),
        positions_per_row=train.loss_tokens / train.rows,
        writer=f"torch {torch.__version__}, transformers {transformers.__version__}",
    )


def keep_ids(cache: CacheConfig, teacher: Teacher) -> list[int]:
    """The tokens that end an answer, and `distillation.cache.keep_tokens`."""
    vocabulary = teacher.tokenizer.get_vocab()
    unknown = [token for token in cache.keep_tokens if vocabulary.get(token, teacher.vocabulary) >= teacher.vocabulary]
    if unknown:
        raise ValueError(
            f"distillation.cache.keep_tokens: {', '.join(map(repr, unknown))} is no token of the teacher; name single "
            "tokens as they stand in its tokenizer.json"
        )
    return sorted({*stop_token_ids(teacher.model, teacher.tokenizer), *(vocabulary[t] for t in cache.keep_tokens)})


def rows_by_shard(rows: TokenRows, shards: int) -> list[npt.NDArray[np.int64]]:
    """Numbers of each shard's rows, every sample once. ValueError where a sample id has different tokens."""
    hashes = np.fromiter(map(sample_hash, rows.sample_ids()), np.uint64, len(rows))
    order = np.argsort(hashes, kind="stable")
    is_first = np.append(True, np.diff(hashes[order]) != 0)
    firsts = order[is_first]
    first_of_each = firsts[np.cumsum(is_first) - 1]
    for number, first in zip(order[~is_first], first_of_each[~is_first], strict=True):
        require_same(rows[int(number)], rows[int(first)])
    shard_of = hashes[firsts] % np.uint64(shards)
    return [np.sort(firsts[shard_of == shard]) for shard in range(shards)]


def require_same(row: TokenRow, other: TokenRow) -> None:
    if row_digest(row) != row_digest(other) or row.sample_id != other.sample_id:
        raise ValueError(
            f"sample id {row.sample_id!r} stands for different tokens in the prepared data, and the teacher's cache "
            "finds rows by it; give every sample an id of its own"
        )


# --- the work


class Worker:
    """Takes one shard after another until none is left."""

    def __init__(
        self,
        request: CaptureRequest,
        manifest: Manifest,
        teacher: Teacher,
        rows: TokenRows,
        report: Report,
        stop_requested: StopRequested,
    ) -> None:
        self.request = request
        self.manifest = manifest
        self.teacher = teacher
        self.rows = rows
        self.report = report
        self.stop_requested = stop_requested
        self.began_s = self.told_s = time.monotonic()
        self.tokens = 0
        self.left_at_begin = len(unfinished(request.folder, manifest))

    def run(self) -> bool:
        """Whether the cache is complete at the end."""
        numbers = rows_by_shard(self.rows, self.manifest.shards)
        work_on_shards(
            unfinished(self.request.folder, self.manifest),
            lambda shard, claim: self.capture_shard(shard, numbers[shard], claim),
            done_file=partial(done_file, self.request.folder),
            is_done=partial(is_done, self.request.folder),
            stop_requested=self.stop_requested,
        )
        return not unfinished(self.request.folder, self.manifest)

    def capture_shard(self, shard: int, numbers: npt.NDArray[np.int64], claim: Claim) -> None:
        """Write one shard and its marker."""
        in_order = sorted(numbers.tolist(), key=lambda number: self.rows[number].sample_id)
        fidelity: dict[str, Fidelity] = {}
        rows = write_shard(
            self.request.folder, shard, self.manifest, self.captured(in_order, claim, fidelity, f"shard {shard}")
        )
        mark_done(self.request.folder, shard, rows=rows, fidelity=dict(sorted(fidelity.items())))
        self.tell("shards", every_s=0)

    def captured(
        self, numbers: list[int], claim: Claim, fidelity: dict[str, Fidelity], what: str
    ) -> Iterator[tuple[TokenRow, KeptRow]]:
        """The rows with what is kept of them; `fidelity` is summed up meanwhile."""
        done = 0
        for batch in self.batches(numbers):
            if self.stop_requested() or not claim.is_held():
                raise InterruptedShardError
            with told_of_full_memory(lower="distillation.cache.batch_tokens", key="distillation.teacher_model"):
                kept_rows = kept_of(self.teacher, batch, self.manifest)
            for row, kept in zip(batch, kept_rows, strict=True):
                fidelity[row.source] = fidelity.get(row.source, Fidelity()) + fidelity_of(row, kept, self.manifest)
                yield row, kept
            done += len(batch)
            self.tokens += sum(len(row.input_ids) for row in batch)
            self.tell(f"{what} ({done} of {len(numbers)} rows); shards", every_s=REPORT_EVERY_S)
        if not claim.is_held():
            raise InterruptedShardError

    def batches(self, numbers: list[int]) -> Iterator[list[TokenRow]]:
        """Rows of up to `batch_tokens` tokens together, in order; at least one."""
        limit = self.request.cache.batch_tokens if self.teacher.is_packable else 1
        batch: list[TokenRow] = []
        tokens = 0
        for number in numbers:
            row = self.rows[number]
            if batch and tokens + len(row.input_ids) > limit:
                yield batch
                batch, tokens = [], 0
            batch.append(row)
            tokens += len(row.input_ids)
        if batch:
            yield batch

    def tell(self, what: str, *, every_s: float) -> None:
        """A line of progress: everybody's shards, this worker's speed, and the time left at everybody's pace."""
        now = time.monotonic()
        if now - self.told_s < every_s:
            return
        self.told_s = now
        left = len(unfinished(self.request.folder, self.manifest))
        done_here = self.left_at_begin - left
        seconds = now - self.began_s
        pace = f", about {left * seconds / done_here / 60:.0f} min left" if done_here and left else ""
        total = self.manifest.shards
        self.report(f"{what}: {total - left} of {total} captured, {self.tokens / seconds:,.0f} tokens/s{pace}")


def fidelity_of(row: TokenRow, kept: KeptRow, manifest: Manifest) -> Fidelity:
    """How well what is kept of a row stands for the teacher, and the teacher for the row."""
    labels_N1 = row.input_ids[positions_of(row), None]
    return Fidelity(
        positions=len(labels_N1),
        kept_mass=float((1 - np.exp(kept.log_tail_NT[:, 0].astype(np.float64))).sum()),
        nll=float(-kept.label_logp_N.astype(np.float64).sum()),
        labels_in_top=int((kept.topk_NK == labels_N1).sum()),
        keeps_in_top=int(np.isin(kept.topk_NK, manifest.keep_ids).sum()),
        keeps=len(labels_N1) * len(manifest.keep_ids),
    )


# --- one forward pass


def kept_of(teacher: Teacher, rows: Sequence[TokenRow], manifest: Manifest) -> list[KeptRow]:
    """What is kept of the teacher's distributions of some rows, by one forward pass of its decoder."""
    for row in rows:
        if (largest := int(row.input_ids.max())) >= manifest.vocabulary:
            raise ValueError(
                f"sample {row.sample_id!r} has token {largest}, and the teacher has {manifest.vocabulary}: the data "
                "were made with another tokenizer; leave model.tokenizer out to use the teacher's"
            )
    batch = flat_batch([row.input_ids for row in rows], [row.loss_mask for row in rows])
    labels_T = batch["labels"][0]
    places_N = (labels_T != IGNORED).nonzero().squeeze(1)
    hidden_TH = teacher.hidden_states(batch)
    hidden_NH = hidden_TH.index_select(0, (places_N - 1).to(hidden_TH.device))
    uniforms_ND = np.concatenate([uniforms(row, manifest) for row in rows])
    whole = reduced(teacher, hidden_NH, labels_T[places_N], torch.from_numpy(uniforms_ND), manifest)
    if not np.isfinite(whole.lse_NT).all():
        raise ValueError(
            f"the teacher's logits are not finite somewhere in samples {rows[0].sample_id!r} to "
            f"{rows[-1].sample_id!r}; set distillation.teacher_model.dtype: bfloat16 or float32"
        )
    return split(whole, [len(positions_of(row)) for row in rows])


def uniforms(row: TokenRow, manifest: Manifest) -> npt.NDArray[np.float64]:
    """The random numbers of a row's draws, the same wherever and beside whatever it is captured."""
    generator = np.random.Generator(np.random.Philox(key=[manifest.seed, sample_hash(row.sample_id)]))
    return generator.random((len(positions_of(row)), manifest.draws))


@torch.inference_mode()
def reduced(
    teacher: Teacher, hidden_NH: torch.Tensor, labels_N: torch.Tensor, uniforms_ND: torch.Tensor, manifest: Manifest
) -> KeptRow:
    """What is kept of all positions, as if they were one row. Logits exist for a chunk of positions at a time."""
    head = teacher.head
    device = head.weight.device
    chunk_tokens = tokens_per_chunk(*head.weight.shape, device_type=device.type)
    chunks = []
    for start in range(0, max(len(labels_N), 1), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits_NV = shape_logits(linear(hidden_NH[chunk], *head), teacher.logit_shape).float()
        chunks.append(reduce_logits(logits_NV, labels_N[chunk].to(device), uniforms_ND[chunk].to(device), manifest))
    parts = [torch.cat(tensors).cpu().numpy() for tensors in zip(*chunks, strict=True)]
    top, top_logp, label_logp, keep_logp, lse, log_tail, draws, draws_logp, num_draws = parts
    return KeptRow(top, top_logp, label_logp, keep_logp, lse, log_tail, *counted(draws, draws_logp, num_draws))


class _Reduced(NamedTuple):
    """What is kept of the logits of some positions."""

    topk_NK: torch.Tensor
    topk_logp_NK: torch.Tensor
    label_logp_N: torch.Tensor
    keep_logp_NM: torch.Tensor
    lse_NT: torch.Tensor
    log_tail_NT: torch.Tensor
    draws_ND: torch.Tensor
    """Ids in ascending order, the same one again for each time that it was drawn."""

    draws_logp_ND: torch.Tensor
    num_draws_N: torch.Tensor
    """How many of them count."""


def reduce_logits(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, uniforms_ND: torch.Tensor, manifest: Manifest
) -> _Reduced:
    """What is kept of some positions. The logits, float32, are overwritten."""
    lse_NT = torch.stack([(logits_NV / t).logsumexp(1) for t in manifest.temperatures], 1)
    lse_N1 = lse_NT[:, :1]
    top = logits_NV.topk(manifest.k, dim=1)
    labels_N1 = labels_N[:, None]
    keep_NM = torch.tensor(manifest.keep_ids, dtype=torch.int64, device=logits_NV.device).expand(len(labels_N), -1)
    label_logp_N1, keep_logp_NM = logits_NV.gather(1, labels_N1) - lse_N1, logits_NV.gather(1, keep_NM) - lse_N1
    # What is left is the tail: summed as it is, since 1 minus the rest would be rounding errors where it is small.
    logits_NV.scatter_(1, torch.cat([top.indices, labels_N1, keep_NM], 1), -torch.inf)
    log_tail_NT = torch.stack([(logits_NV / t).logsumexp(1) for t in manifest.temperatures], 1) - lse_NT
    draws_ND, num_draws_N = draw(logits_NV, log_tail_NT[:, 0], uniforms_ND, proportional=manifest.kind == "sampled")
    return _Reduced(
        topk_NK=top.indices,
        topk_logp_NK=(top.values - lse_N1).clamp_(min=LOWEST_LOG),
        label_logp_N=label_logp_N1[:, 0].clamp_(min=LOWEST_LOG),
        keep_logp_NM=keep_logp_NM.clamp_(min=LOWEST_LOG),
        lse_NT=lse_NT,
        log_tail_NT=log_tail_NT.clamp_(min=LOWEST_LOG),
        draws_ND=draws_ND,
        draws_logp_ND=(logits_NV.gather(1, draws_ND) - lse_N1).clamp_(min=LOWEST_LOG),
        num_draws_N=num_draws_N,
    )


def draw(
    logits_NV: torch.Tensor, log_tail_N: torch.Tensor, uniforms_ND: torch.Tensor, *, proportional: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids drawn in proportion to exp(logit), ascending, and how many of them count.

    The mass is cut into as many equal parts as there are draws and each part gives one, so every token is drawn as
    often as its probability says on average, and closer to that than by independent draws. `proportional`: a tail
    with a tenth of the mass gets a tenth of the draws, at least one.
    """
    count, num_draws = uniforms_ND.shape
    if not num_draws:
        return uniforms_ND.long(), torch.zeros(count, dtype=torch.int64, device=uniforms_ND.device)
    wanted_N = torch.full_like(log_tail_N, num_draws)
    if proportional:
        wanted_N = (log_tail_N.exp() * num_draws).ceil().clamp(1, num_draws)
    # In float64: over 100,000 tokens a running sum in float32 would lose the small ones.
    cumulated_NV = (logits_NV - logits_NV.amax(1, keepdim=True)).double().exp_().cumsum(1).nan_to_num_(0)
    parts_ND = (torch.arange(num_draws, device=uniforms_ND.device) + uniforms_ND) / wanted_N[:, None]
    points_ND = parts_ND.clamp(max=1) * cumulated_NV[:, -1:]
    draws_ND = torch.searchsorted(cumulated_NV, points_ND, right=True).clamp_(max=logits_NV.shape[1] - 1)
    return draws_ND, torch.where(log_tail_N > LOWEST_LOG, wanted_N, 0).long()


def counted(
    draws_ND: npt.NDArray[np.int64], logp_ND: npt.NDArray[np.float32], num_draws_N: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Different ids of all positions one after another, how often each was drawn, its log p, where positions begin."""
    counts = np.arange(draws_ND.shape[1]) < num_draws_N[:, None]
    is_new = counts.copy()
    is_new[:, 1:] &= draws_ND[:, 1:] != draws_ND[:, :-1]
    times_D = np.bincount(np.cumsum(is_new.ravel())[counts.ravel()] - 1)
    starts = np.concatenate([[0], np.cumsum(is_new.sum(1))])
    return draws_ND[is_new], times_D, logp_ND[is_new], starts


def split(whole: KeptRow, lengths: Sequence[int]) -> list[KeptRow]:
    """The rows that follow one another in a whole."""
    rows = []
    ends = np.cumsum(lengths)
    for first, last in zip(ends - lengths, ends, strict=True):
        part = slice(first, last)
        starts = whole.drawn_starts[first : last + 1]
        drawn = slice(starts[0], starts[-1])
        rows.append(
            KeptRow(
                topk_NK=whole.topk_NK[part],
                topk_logp_NK=whole.topk_logp_NK[part],
                label_logp_N=whole.label_logp_N[part],
                keep_logp_NM=whole.keep_logp_NM[part],
                lse_NT=whole.lse_NT[part],
                log_tail_NT=whole.log_tail_NT[part],
                drawn_D=whole.drawn_D[drawn],
                drawn_count_D=whole.drawn_count_D[drawn],
                drawn_logp_D=whole.drawn_logp_D[drawn],
                drawn_starts=starts - starts[0],
            )
        )
    return rows
