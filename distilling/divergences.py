"""Losses of distillation, computed in chunks: logits of [tokens, vocabulary] never exist, student's or teacher's.

The loss of a token is a mix of the cross entropy with the data and of the divergence from the teacher, both made of
one computation of the student's logits. Everywhere p is the teacher's distribution and q the student's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from distilling.config import DistillationConfig, DivergenceName
from distilling.targets import SparseTargets
from training.losses import (
    PLAIN_LOGITS,
    Head,
    LogitShape,
    gradient_by_outputs,
    linear_loss,
    product_dtype,
    shape_logits,
)

# Tensors are named by shape. N supervised tokens, V vocabulary, S tokens kept of a distribution, H and J hidden widths.

# Logit of a token that is left out. Finite, so that nothing is undefined where every token is left out.
_LEFT_OUT = -1e30

# Mass of the teacher's most probable tokens that `adaptive_kl` calls the head; the paper's.
_HEAD_MASS = 0.5


@dataclass(frozen=True)
class DenseTeacher:
    """What the teacher's whole distributions at the supervised tokens are made of, chunk by chunk."""

    hidden_NJ: torch.Tensor
    head: Head
    """As many tokens as the student's head has."""

    shape: LogitShape = PLAIN_LOGITS


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of the loss, as `DistillationConfig` describes them."""

    divergence: DivergenceName
    weight: float
    temperature: float
    skew: float
    mixing: float

    @classmethod
    def of(cls, config: DistillationConfig) -> LossSettings:
        """Those of a run."""
        return cls(
            divergence=config.divergence,
            weight=config.weight,
            temperature=config.temperature,
            skew=config.skew,
            mixing=config.mixing,
        )


class LossParts(NamedTuple):
    """Sums over tokens, in nats."""

    loss: torch.Tensor
    """To be minimised: it has the graph."""

    cross_entropy: torch.Tensor
    """Of the data, times the tokens' weights; 0 where the loss has no part of it. For logs."""

    divergence: torch.Tensor
    """From the teacher at the temperature, times the tokens' weights; 0 where the loss has no part of it. For logs."""


def distillation_loss(
    hidden_NH: torch.Tensor,
    head: Head,
    targets_N: torch.Tensor,
    teacher: SparseTargets | DenseTeacher | None,
    settings: LossSettings,
    *,
    token_weights_N: torch.Tensor | None = None,
    shape: LogitShape = PLAIN_LOGITS,
    chunk_tokens: int | None = None,
) -> LossParts:
    """Sum over tokens of `token weight * ((1 - weight) * cross entropy + weight * temperature^2 * divergence)`.

    The cross entropy is at temperature 1. `shape` is the student's. Multiplies in the autocast dtype where autocast is
    on, else in the weight's; softmax and sums are in float32. The teacher gets no gradient; none is needed at weight 0.
    """
    if teacher is None:
        assert settings.weight == 0, "a divergence is a distance from a teacher"
    elif isinstance(teacher, DenseTeacher):
        vocabularies = len(head.weight), len(teacher.head.weight)
        assert vocabularies[0] == vocabularies[1], f"heads of {vocabularies} tokens; slice them to the smaller"
        teacher = _ready(teacher)
    else:
        assert settings.divergence == "forward_kl", f"a cache gives no {settings.divergence}"
    mixed = _MixedLoss(targets_N, teacher, settings, token_weights_N, shape)
    sums = linear_loss(hidden_NH, head, mixed.of_chunk, chunk_tokens)
    return LossParts(sums[0], *sums[1:].detach())


def _ready(teacher: DenseTeacher) -> DenseTeacher:
    """The teacher's head in the dtype of its products, without its graph."""
    weight, bias = teacher.head
    dtype = product_dtype(weight)
    head = Head(weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))
    return DenseTeacher(teacher.hidden_NJ.detach(), head, teacher.shape)


@dataclass(frozen=True)
class _MixedLoss:
    targets_N: torch.Tensor
    teacher: SparseTargets | DenseTeacher | None
    settings: LossSettings
    token_weights_N: torch.Tensor | None
    shape: LogitShape

    def of_chunk(
        self, outputs_NV: torch.Tensor, chunk: slice, wants_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A `ChunkLoss`: loss, cross entropy and divergence."""
        dtype = torch.promote_types(outputs_NV.dtype, torch.float32)
        logits_NV = shape_logits(outputs_NV, self.shape).to(dtype)
        # The losses overwrite the logits, and the gradient of a cap is made of them.
        capped_NV = logits_NV.clone() if wants_gradient and self.shape.softcap is not None else logits_NV
        targets_N1 = self.targets_N[chunk, None]
        weights_N1 = logits_NV.new_ones(targets_N1.shape)
        if self.token_weights_N is not None:
            weights_N1 = self.token_weights_N[chunk, None].to(dtype)

        share, temperature = self.settings.weight, self.settings.temperature
        if share == 0 or self.teacher is None:
            parts = _cross_entropy(logits_NV, targets_N1, weights_N1, wants_gradient)
        elif isinstance(self.teacher, SparseTargets):
            parts = _sparse(logits_NV, targets_N1, self.teacher.rows(chunk), self.settings, weights_N1, wants_gradient)
        else:
            log_p_NV = _teacher_log_probabilities(self.teacher, chunk, temperature)
            parts = _dense(logits_NV, targets_N1, log_p_NV, self.settings, weights_N1, wants_gradient)

        cross_entropy = (weights_N1 * parts.cross_entropy_N1).sum()
        divergence = (weights_N1 * parts.divergence_N1).sum()
        loss = (1 - share) * cross_entropy + share * temperature**2 * divergence
        gradient_NV = parts.gradient_NV
        if gradient_NV is not None:
            gradient_NV = gradient_by_outputs(gradient_NV, capped_NV, self.shape)
        return torch.stack([loss, cross_entropy, divergence]), gradient_NV


class _Parts(NamedTuple):
    """Of each token of a chunk, without its weight; the gradient of the loss by the student's logits is with it."""

    cross_entropy_N1: torch.Tensor
    divergence_N1: torch.Tensor
    gradient_NV: torch.Tensor | None


# ------------------------------------------------------------------------- a few tokens of the teacher's distribution


@dataclass(frozen=True)
class _Wanted:
    """Tokens that are to be likely: the loss of a position is -sum_S(weight * log q), and so for the rest of them."""

    ids_NS: torch.Tensor
    weights_NS: torch.Tensor
    kept_NS: torch.Tensor | None = None
    """Which of the ids are outside of the rest; None where no weight is on the rest."""

    rest_weights_N1: torch.Tensor | None = None

    @classmethod
    def of(cls, targets: SparseTargets, weights_N1: torch.Tensor) -> _Wanted:
        """What the divergence wants, at these weights of the positions."""
        wanted = cls(targets.ids_NS, targets.weights_NS * weights_N1)
        if targets.log_tail_N is None:
            return wanted
        kept_NS = targets.log_probabilities_NS > -math.inf
        return replace(wanted, kept_NS=kept_NS, rest_weights_N1=targets.log_tail_N[:, None].exp() * weights_N1)

    def and_one(self, ids_N1: torch.Tensor, weights_N1: torch.Tensor) -> _Wanted:
        """One token more, which stays in the rest if it was there."""
        kept_NS = self.kept_NS
        if kept_NS is not None:
            kept_NS = torch.cat([kept_NS, torch.zeros_like(ids_N1, dtype=torch.bool)], dim=1)
        return replace(
            self,
            ids_NS=torch.cat([self.ids_NS, ids_N1], dim=1),
            weights_NS=torch.cat([self.weights_NS, weights_N1], dim=1),
            kept_NS=kept_NS,
        )


class _Found(NamedTuple):
    log_q_NS: torch.Tensor
    log_rest_N1: torch.Tensor
    gradient_NV: torch.Tensor | None
    """Of the loss that `_Wanted` describes, by the logits."""


def _sparse(
    logits_NV: torch.Tensor,
    targets_N1: torch.Tensor,
    teacher: SparseTargets,
    settings: LossSettings,
    weights_N1: torch.Tensor,
    wants_gradient: bool,
) -> _Parts:
    share, temperature = settings.weight, settings.temperature
    # temperature^2 of the loss, once divided by it: the gradient is by the logits before they are.
    wanted = _Wanted.of(teacher, share * temperature * weights_N1)
    learned_N1 = (1 - share) * weights_N1
    if share == 1 or temperature != 1:
        found = _find(logits_NV / temperature, wanted, wants_gradient)
        divergence_N1 = _sparse_divergence(teacher, found.log_q_NS, found.log_rest_N1)
        if share == 1:
            return _Parts(torch.zeros_like(divergence_N1), divergence_N1, found.gradient_NV)
        data = _cross_entropy(logits_NV, targets_N1, learned_N1, wants_gradient)
        return _Parts(data.cross_entropy_N1, divergence_N1, _sum(data.gradient_NV, found.gradient_NV))
    found = _find(logits_NV, wanted.and_one(targets_N1, learned_N1), wants_gradient)
    divergence_N1 = _sparse_divergence(teacher, found.log_q_NS[:, :-1], found.log_rest_N1)
    return _Parts(-found.log_q_NS[:, -1:], divergence_N1, found.gradient_NV)


def _sparse_divergence(teacher: SparseTargets, log_q_NS: torch.Tensor, log_rest_N1: torch.Tensor) -> torch.Tensor:
    # Filling has log p = -inf, and 0 * -inf is not 0.
    log_p_NS = teacher.log_probabilities_NS.clamp_min(_LEFT_OUT)
    divergence_N1 = (teacher.weights_NS * (log_p_NS - log_q_NS)).sum(1, keepdim=True)
    if teacher.log_tail_N is None:
        return divergence_N1
    tail_N1 = teacher.log_tail_N[:, None].exp()
    return divergence_N1 - torch.special.entr(tail_N1) - tail_N1 * log_rest_N1


def _cross_entropy(
    logits_NV: torch.Tensor, targets_N1: torch.Tensor, weights_N1: torch.Tensor, wants_gradient: bool
) -> _Parts:
    found = _find(logits_NV, _Wanted(targets_N1, weights_N1), wants_gradient)
    return _Parts(-found.log_q_NS, torch.zeros_like(weights_N1), found.gradient_NV)


def _sum(left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor | None:
    return None if left is None or right is None else left.add_(right)


def _find(logits_NV: torch.Tensor, wanted: _Wanted, wants_gradient: bool) -> _Found:
    """The student's log probabilities of the wanted tokens and of the rest. Overwrites the logits, and needs no more.

    The rest is summed by itself: 1 - sum(q) would lose it wherever it is small.
    """
    chosen_NS = logits_NV.gather(1, wanted.ids_NS)
    first_NS = None
    if wanted.kept_NS is not None:
        left_out_NS = torch.where(wanted.kept_NS, _LEFT_OUT, math.inf).to(logits_NV.dtype)
        logits_NV.scatter_reduce_(1, wanted.ids_NS, left_out_NS, "amin")
        first_NS = _first_of_each(wanted.ids_NS, wanted.kept_NS)
    largest_N1 = logits_NV.amax(1, keepdim=True)
    exponentials_NV = logits_NV.sub_(largest_N1).exp_()
    total_N1 = exponentials_NV.sum(1, keepdim=True)
    log_total_N1 = log_all_N1 = largest_N1 + total_N1.log()
    if first_NS is not None:
        log_kept_N1 = chosen_NS.masked_fill(~first_NS, _LEFT_OUT).logsumexp(1, keepdim=True)
        log_all_N1 = torch.logaddexp(log_total_N1, log_kept_N1)
    log_q_NS, log_rest_N1 = chosen_NS - log_all_N1, log_total_N1 - log_all_N1
    if not wants_gradient:
        return _Found(log_q_NS, log_rest_N1, None)

    # All weights pull every token down by its q; then each weight pulls up what it is on.
    mass_N1 = wanted.weights_NS.sum(1, keepdim=True)
    pulls_NS = -wanted.weights_NS
    rest_pull_N1 = torch.zeros_like(mass_N1)
    if first_NS is not None and wanted.rest_weights_N1 is not None:
        rest_pull_N1 = wanted.rest_weights_N1
        mass_N1 = mass_N1 + rest_pull_N1
        pulls_NS = pulls_NS + (mass_N1 * log_q_NS.exp()).masked_fill(~first_NS, 0)
    gradient_NV = exponentials_NV.mul_((mass_N1 * log_rest_N1.exp() - rest_pull_N1) / total_N1)
    # A GPU adds in any order what one call adds to one token, and rounds accordingly. The token of the data, the last,
    # may be a kept one too: a call of its own lets a run be repeated bit for bit.
    for columns in (slice(None, -1), slice(-1, None)):
        gradient_NV.scatter_add_(1, wanted.ids_NS[:, columns], pulls_NS[:, columns])
    return _Found(log_q_NS, log_rest_N1, gradient_NV)


def _first_of_each(ids_NS: torch.Tensor, kept_NS: torch.Tensor) -> torch.Tensor:
    """Which of the kept ids are listed for the first time in their row."""
    ordered_NS, order_NS = ids_NS.masked_fill(~kept_NS, -1).sort(dim=1, stable=True)
    repeated_NS = torch.zeros_like(kept_NS)
    repeated_NS.scatter_(1, order_NS[:, 1:], ordered_NS[:, 1:] == ordered_NS[:, :-1])
    return kept_NS & ~repeated_NS


# ---------------------------------------------------------------------------- the whole of the teacher's distribution


def _dense(
    logits_NV: torch.Tensor,
    targets_N1: torch.Tensor,
    log_p_NV: torch.Tensor,
    settings: LossSettings,
    weights_N1: torch.Tensor,
    wants_gradient: bool,
) -> _Parts:
    share, temperature = settings.weight, settings.temperature
    learned_N1 = (1 - share) * weights_N1
    log_q_NV = _log_softmax(logits_NV, temperature)
    one_softmax = share < 1 and temperature == 1
    cross_entropy_N1 = -log_q_NV.gather(1, targets_N1) if one_softmax else torch.zeros_like(weights_N1)
    # Logits that nobody needs again lend their memory.
    q_NV = log_q_NV.exp() if share < 1 and not one_softmax else torch.exp(log_q_NV, out=logits_NV)
    divergence_N1, pull_NV = _DIVERGENCES[settings.divergence](log_p_NV, log_q_NV, q_NV, settings)
    if not wants_gradient:
        gradient_NV = None
    else:
        # temperature^2 of the loss, once divided by it: the gradient is by the logits before they are.
        pulled_N1 = share * temperature * weights_N1
        pushed_N1 = pulled_N1 * pull_NV.sum(1, keepdim=True)
        if one_softmax:
            pushed_N1 = pushed_N1 + learned_N1
        gradient_NV = pull_NV.mul_(-pulled_N1).addcmul_(q_NV, pushed_N1)
        if one_softmax:
            gradient_NV.scatter_add_(1, targets_N1, -learned_N1)
    if share < 1 and not one_softmax:
        data = _cross_entropy(logits_NV, targets_N1, learned_N1, wants_gradient)
        cross_entropy_N1, gradient_NV = data.cross_entropy_N1, _sum(gradient_NV, data.gradient_NV)
    return _Parts(cross_entropy_N1, divergence_N1, gradient_NV)


def _teacher_log_probabilities(teacher: DenseTeacher, chunk: slice, temperature: float) -> torch.Tensor:
    outputs_NV = linear(teacher.hidden_NJ[chunk].to(teacher.head.weight.dtype), *teacher.head)
    return _log_softmax(shape_logits(outputs_NV, teacher.shape), temperature)


def _log_softmax(logits_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    if temperature != 1:
        logits_NV = logits_NV.to(dtype) / temperature
    return torch.log_softmax(logits_NV, dim=1, dtype=dtype)


# A divergence D takes log p, log q (it may overwrite both) and q, and gives D of each token, [N, 1], and how strongly
# it pulls at each log q, -dD/dlog q, [N, V]. The gradient of D by the logits is then q * sum(pull) - pull.
_Divergence = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, LossSettings],
    tuple[torch.Tensor, torch.Tensor],
]


def _forward_kl(
    log_p: torch.Tensor, log_q: torch.Tensor, q: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q)."""
    gap = torch.sub(log_p, log_q, out=log_q)
    p = log_p.exp_()
    return gap.mul_(p).sum(1, keepdim=True), p


def _reverse_kl(
    log_p: torch.Tensor, log_q: torch.Tensor, q: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q || p)."""
    pull = torch.sub(log_p, log_q, out=log_q).mul_(q)
    return -pull.sum(1, keepdim=True), pull


def _jensen_shannon(
    log_p: torch.Tensor, log_q: torch.Tensor, q: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """mixing * KL(p || m) + (1 - mixing) * KL(q || m), with m = mixing * p + (1 - mixing) * q."""
    share = settings.mixing
    log_m = _log_mixture(log_p, log_q, share)
    pull = torch.sub(log_m, log_q, out=log_q).mul_(q).mul_(1 - share)
    gap = torch.sub(log_p, log_m, out=log_m)
    teachers = gap.mul_(log_p.exp_()).sum(1, keepdim=True)
    return share * teachers - pull.sum(1, keepdim=True), pull


def _skewed_forward_kl(
    log_p: torch.Tensor, log_q: torch.Tensor, q: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || m), with m = skew * p + (1 - skew) * q (DistiLLM, arXiv:2402.03898)."""
    log_m = _log_mixture(log_p, log_q, settings.skew)
    gap = torch.sub(log_p, log_m, out=log_m)
    divergence = log_p.exp_().mul_(gap).sum(1, keepdim=True)
    return divergence, gap.exp_().mul_(q).mul_(1 - settings.skew)


def _skewed_reverse_kl(
    log_p: torch.Tensor, log_q: torch.Tensor, q: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q || m), with m = (1 - skew) * p + skew * q (DistiLLM, arXiv:2402.03898)."""
    log_m = _log_mixture(log_p, log_q, 1 - settings.skew)
    gap = torch.sub(log_q, log_m, out=log_q)
    divergence = torch.mul(q, gap, out=log_m).sum(1, keepdim=True)
    return divergence, torch.exp(gap, out=log_m).mul_(settings.skew).sub_(gap).mul_(q)


def _total_variation(
    log_p: torch.Tensor, log_q: torch.Tensor, q: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of sum |p - q|."""
    gap = log_p.exp_().sub_(q)
    divergence = torch.abs(gap, out=log_q).sum(1, keepdim=True) / 2
    return divergence, gap.sign_().mul_(q).div_(2)


def _adaptive_kl(
    log_p: torch.Tensor, log_q: torch.Tensor, q: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """h * KL(p || q) + (1 - h) * KL(q || p), with h the share of sum |p - q| that lies in the teacher's head.

    The head are the teacher's most probable tokens, as many as have at most half of its mass together, and at least
    one. h is a constant to the gradient. (AKL, arXiv:2404.02657, as its authors' code has it.)
    """
    p = log_p.exp()
    head_share = _head_share(p, q)
    gap = torch.sub(log_p, log_q, out=log_p)
    forward = torch.mul(p, gap, out=log_q).sum(1, keepdim=True)
    pull = gap.mul_(q)
    reverse = -pull.sum(1, keepdim=True)
    divergence = head_share * forward + (1 - head_share) * reverse
    return divergence, pull.mul_(1 - head_share).addcmul_(p, head_share)


def _head_share(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    falling = p.sort(dim=1, descending=True).values
    head_tokens = (falling.cumsum(1) <= _HEAD_MASS).sum(1, keepdim=True).clamp_min(1)
    in_tail = p < falling.gather(1, head_tokens - 1)
    gaps = torch.sub(p, q, out=falling).abs_()
    total = gaps.sum(1, keepdim=True)
    # Where the two are equal both divergences are 0, and so is what any share makes of them.
    return gaps.masked_fill_(in_tail, 0).sum(1, keepdim=True) / total.clamp_min(torch.finfo(total.dtype).tiny)


def _log_mixture(log_p: torch.Tensor, log_q: torch.Tensor, share: float) -> torch.Tensor:
    """log(share * p + (1 - share) * q)."""
    rest = math.log1p(-share)
    shifted = log_p + (math.log(share) - rest)
    return torch.logaddexp(shifted, log_q, out=shifted).add_(rest)


_DIVERGENCES: dict[DivergenceName, _Divergence] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "skewed_forward_kl": _skewed_forward_kl,
    "skewed_reverse_kl": _skewed_reverse_kl,
    "total_variation": _total_variation,
    "adaptive_kl": _adaptive_kl,
}
