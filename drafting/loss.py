"""The loss of all steps of a draft: soft cross entropy with the target's distribution on the draft vocabulary.

Neither side's logits of all tokens ever exist: a chunk of tokens is taken at a time, the target's logits are made from
its last hidden states once for all steps, and gradients are made along with the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from training.losses import IGNORED, tokens_per_chunk

# Tensors are named by shape. I steps, T tokens, N supervised tokens, n of a chunk, H hidden width, V target vocabulary,
# D draft vocabulary.


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

    step_losses_I: torch.Tensor
    """The sum of each step, not weighted. No gradient."""

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
    chunk_tokens: int | None = None,
) -> UnrolledLoss:
    """Cross entropy of the draft at (step i, index p) with the target's distribution of x_{p + 2 + i}.

    It counts exactly where x_{p + 2 + i} is supervised and in the same sample as x_p. Where the target's most probable
    token is outside of the draft vocabulary, the loss is 0 and the guess a miss; elsewhere the target's distribution is
    renormalised on the draft vocabulary. Multiplies in the autocast dtype where autocast is on, else in the weights';
    softmax and sums are in float32.
    """
    supervised = supervised_tokens(labels_T, positions_T, steps=len(step_weights))
    if chunk_tokens is None:
        chunk_tokens = tokens_per_chunk(*teacher.head_VH.shape, device_type=normed_ITH.device.type)
    if not torch.is_grad_enabled():
        normed_ITH, draft_head_DH = normed_ITH.detach(), draft_head_DH.detach()
    return UnrolledLoss(
        *_UnrolledCrossEntropy.apply(normed_ITH, draft_head_DH, teacher, supervised, tuple(step_weights), chunk_tokens)
    )


@dataclass(frozen=True)
class SupervisedTokens:
    """Where the supervised tokens of a flat row stand, those that most steps reach first."""

    tokens_N: torch.Tensor
    """Index of each in the row, int64."""

    reached_I: list[int]
    """Step i guesses the first so many of them: the others stand too near to the beginning of their sample."""


def supervised_tokens(labels_T: torch.Tensor, positions_T: torch.Tensor, *, steps: int) -> SupervisedTokens:
    """The tokens that a draft learns to guess: step i guesses token s at index s - 2 - i of the same sample."""
    # By reach, so that the tokens of each step are a beginning of the list, and one transfer tells all its lengths.
    tokens_N = ((labels_T != IGNORED) & (positions_T >= 2)).nonzero().squeeze(1)
    reach_N = (positions_T[tokens_N] - 1).clamp(max=steps)
    order = reach_N.argsort(descending=True, stable=True)
    reached = (reach_N[None] > torch.arange(steps, device=reach_N.device)[:, None]).sum(1).tolist()
    return SupervisedTokens(tokens_N[order], reached)


class _UnrolledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        normed_ITH: torch.Tensor,
        draft_head_DH: torch.Tensor,
        teacher: Teacher,
        supervised: SupervisedTokens,
        step_weights: tuple[float, ...],
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device_type = normed_ITH.device.type
        has_autocast = torch.is_autocast_enabled(device_type)
        product_dtype = torch.get_autocast_dtype(device_type) if has_autocast else draft_head_DH.dtype
        sum_dtype = torch.promote_types(product_dtype, torch.float32)
        wants_gradient = any(ctx.needs_input_grad)
        draft_head = draft_head_DH.to(product_dtype)
        grad_normed = torch.zeros_like(normed_ITH) if wants_gradient else None
        grad_head = torch.zeros_like(draft_head_DH, dtype=sum_dtype) if wants_gradient else None
        losses_I = torch.zeros(len(step_weights), dtype=sum_dtype, device=normed_ITH.device)
        hits_IT = torch.zeros(normed_ITH.shape[:2], dtype=torch.bool, device=normed_ITH.device)

        with torch.autocast(device_type, enabled=False):
            for start in range(0, len(supervised.tokens_N), chunk_tokens):
                tokens_n = supervised.tokens_N[start : start + chunk_tokens]
                probabilities_nD, guess_n = teacher_distribution(teacher, tokens_n - 1, sum_dtype)
                for step, weight in enumerate(step_weights):
                    count = min(max(supervised.reached_I[step] - start, 0), len(tokens_n))
                    index_n = tokens_n[:count] - 2 - step
                    normed_nH = normed_ITH[step, index_n].to(product_dtype)
                    log_q_nD, hits_IT[step, index_n] = _draft_distribution(
                        linear(normed_nH, draft_head), guess_n[:count], sum_dtype
                    )
                    p_nD = probabilities_nD[:count]
                    losses_I[step] -= torch.dot(p_nD.flatten(), log_q_nD.flatten())
                    if grad_normed is None or grad_head is None:
                        continue
                    # Rows of p sum to 1, or to 0 where the target's token is outside; so do those of the gradient.
                    grad_logits = log_q_nD.exp_().mul_(guess_n[:count, None] >= 0).sub_(p_nD).mul_(weight)
                    grad_logits = grad_logits.to(product_dtype)
                    grad_normed[step, index_n] = (grad_logits @ draft_head).to(grad_normed.dtype)
                    grad_head += grad_logits.t() @ normed_nH

        ctx.save_for_backward(grad_normed, None if grad_head is None else grad_head.to(draft_head_DH.dtype))
        ctx.mark_non_differentiable(losses_I, hits_IT)
        return losses_I @ losses_I.new_tensor(step_weights), losses_I, hits_IT

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, *unused: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = (None if saved is None else saved * grad_loss.to(saved.dtype) for saved in ctx.saved_tensors)
        return (*gradients, None, None, None, None)


def teacher_distribution(
    teacher: Teacher, rows_n: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the token after each row: its probabilities on the draft vocabulary, and the most probable token's draft id.

    Where that token is outside of the draft vocabulary the id is -1 and the probabilities are 0.
    """
    logits_nV = linear(teacher.hidden_TH[rows_n].to(teacher.head_VH.dtype), teacher.head_VH)
    guess_n = teacher.draft_index_V[logits_nV.argmax(-1)]
    probabilities_nD = logits_nV[:, teacher.draft_ids_D].softmax(-1, dtype=dtype)
    return probabilities_nD.mul_(guess_n[:, None] >= 0), guess_n


def _draft_distribution(
    logits_nD: torch.Tensor, guess_n: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return logits_nD.log_softmax(-1, dtype=dtype), logits_nD.argmax(-1) == guess_n
