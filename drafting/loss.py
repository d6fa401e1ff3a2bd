"""The loss of all steps of a draft: soft cross entropy with the target's distribution on the draft vocabulary.

Neither side's logits of all tokens ever exist: they are made a chunk of guesses at a time, the target's from its last
hidden states and once for all steps that guess the same token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from training.chunks import tokens_per_chunk
from training.losses import IGNORED, Head, linear_loss

# Tensors are named by shape. I steps, T tokens, N guesses that count, n those of a chunk, U the tokens guessed there,
# H hidden width, V target vocabulary, D draft vocabulary.


@dataclass(frozen=True)
class Teacher:
    """What a target says of each next token of a batch."""

    hidden_TH: torch.Tensor
    """Its last hidden states, after the final norm."""

    head_VH: torch.Tensor
    draft_ids_D: torch.Tensor
    """The target's id of each draft token, ascending, int64."""

    draft_index_V: torch.Tensor
    """The draft's id of each token, -1 outside of its vocabulary, int64."""


class UnrolledLoss(NamedTuple):
    """What the unrolled draft lost, and where it guessed what the target says."""

    loss: torch.Tensor
    """Cross entropies in nats, summed over supervised tokens and, weighted, over steps."""

    hits_IT: torch.Tensor
    """Whether the guess at (step, index) is the target's most probable token; never outside of the draft vocabulary."""


def unrolled_cross_entropy(
    normed_ITH: torch.Tensor,
    draft_head_DH: torch.Tensor,
    teacher: Teacher,
    *,
    labels_T: torch.Tensor,
    positions_T: torch.Tensor,
    step_weights: Sequence[float],
    chunk_guesses: int | None = None,
) -> UnrolledLoss:
    """Cross entropy of the draft at (step i, index p) with the target's distribution of x_{p + 2 + i}.

    It counts exactly where x_{p + 2 + i} is supervised and in the same sample as x_p. Where the target's most probable
    token is outside of the draft vocabulary, the loss is 0 and the guess a miss; elsewhere the target's distribution is
    renormalised on the draft vocabulary. Multiplies in the autocast dtype where autocast is on, else in the weights';
    softmax and sums are in float32.
    """
    steps = len(step_weights)
    guesses = guesses_that_count(labels_T, positions_T, steps=steps)
    flat_index_N = guesses.step_N * normed_ITH.shape[1] + guesses.token_N - 2 - guesses.step_N
    weight_dtype = torch.promote_types(normed_ITH.dtype, torch.float32)
    weight_N = torch.tensor(step_weights, dtype=weight_dtype, device=normed_ITH.device)[guesses.step_N]
    hits = torch.zeros(normed_ITH.shape[:2], dtype=torch.bool, device=normed_ITH.device).flatten()

    def chunk_loss(
        logits_nD: torch.Tensor, chunk: slice, wants_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        target = teacher_distribution(teacher, guesses.token_N[chunk] - 1)
        loss, gradient, hits[flat_index_N[chunk]] = _cross_entropy_and_gradient(
            logits_nD, target, weight_N[chunk], wants_gradient
        )
        return loss, gradient

    if chunk_guesses is None:
        # Both sides' logits of a chunk exist at once.
        chunk_guesses = min(
            tokens_per_chunk(*draft_head_DH.shape, device_type=normed_ITH.device.type),
            tokens_per_chunk(*teacher.head_VH.shape, device_type=normed_ITH.device.type) * steps,
        )
    normed_NH = normed_ITH.flatten(0, 1).index_select(0, flat_index_N)
    loss = linear_loss(normed_NH, Head(draft_head_DH, None), chunk_loss, chunk_guesses)[0]
    return UnrolledLoss(loss, hits.view(normed_ITH.shape[:2]))


@dataclass(frozen=True)
class Guesses:
    """The guesses of a flat row that count, those of one token next to each other."""

    token_N: torch.Tensor
    """Index in the row of what is guessed, int64."""

    step_N: torch.Tensor
    """The step that guesses it, int64: it stands two tokens and as many more before."""


def guesses_that_count(labels_T: torch.Tensor, positions_T: torch.Tensor, *, steps: int) -> Guesses:
    """Of each supervised token the guesses at all steps that begin in its own sample."""
    tokens = ((labels_T != IGNORED) & (positions_T >= 2)).nonzero().squeeze(1)
    reaching_steps = (positions_T[tokens] - 1).clamp(max=steps)
    token_N = tokens.repeat_interleave(reaching_steps)
    first_guess_N = (reaching_steps.cumsum(0) - reaching_steps).repeat_interleave(reaching_steps)
    return Guesses(token_N, torch.arange(len(token_N), device=token_N.device) - first_guess_N)


class TeacherDistribution(NamedTuple):
    """What a target says at some places: all zeros where its most probable token is outside of the draft vocabulary."""

    probabilities_nD: torch.Tensor
    """Renormalised on the draft vocabulary."""

    top_n: torch.Tensor
    """The draft's id of the most probable token, -1 outside of its vocabulary."""


def teacher_distribution(teacher: Teacher, rows_n: torch.Tensor) -> TeacherDistribution:
    """Of the token after each row; rows that are the same as the one before are computed once."""
    rows_U, of_guess_n = rows_n.unique_consecutive(return_inverse=True)
    logits_UV = linear(teacher.hidden_TH[rows_U].to(teacher.head_VH.dtype), teacher.head_VH)
    top_U = teacher.draft_index_V[logits_UV.argmax(-1)]
    dtype = torch.promote_types(logits_UV.dtype, torch.float32)
    probabilities_UD = logits_UV[:, teacher.draft_ids_D].softmax(-1, dtype=dtype).mul_(top_U[:, None] >= 0)
    return TeacherDistribution(probabilities_UD[of_guess_n], top_U[of_guess_n])


def _cross_entropy_and_gradient(
    logits_nD: torch.Tensor, target: TeacherDistribution, weight_n: torch.Tensor, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The chunk's weighted sum, its gradient by the logits, and which guesses hit."""
    dtype = torch.promote_types(logits_nD.dtype, torch.float32)
    weight_n = weight_n * (target.top_n >= 0)
    guess_n = logits_nD.argmax(-1)
    q_nD = logits_nD.softmax(-1, dtype=dtype)
    # The logarithm of the sum of exponentials, from what the softmax made of the largest logit.
    log_sum_n = _at(logits_nD, guess_n).to(dtype) - _at(q_nD, guess_n).log()
    loss_n = log_sum_n - torch.linalg.vecdot(target.probabilities_nD, logits_nD.to(dtype))
    gradient = q_nD.sub_(target.probabilities_nD).mul_(weight_n[:, None]) if wants_gradient else None
    return (loss_n @ weight_n)[None], gradient, guess_n == target.top_n


def _at(values_nD: torch.Tensor, index_n: torch.Tensor) -> torch.Tensor:
    return values_nD.gather(1, index_n[:, None]).squeeze(1)
