"""Advantages and losses of answers that were rewarded: pure functions, each with its paper.

Tensors are named by shape. P prompts, G answers to each, S = P x G answers, prompt by prompt, N tokens of all answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training.online_config import GrpoConfig, OnlineConfig

SMALLEST_DEVIATION = 1e-4
"""Added to a group's standard deviation, as TRL does."""

HIGHEST_IMPORTANCE = 2.0
"""What the importance of a token, or with RLOO of an answer, is cut off at, as in the work named in `importance`."""


@dataclass(frozen=True)
class AnswerTokens:
    """What models say of the tokens of answers, in nats."""

    policy_N: torch.Tensor
    """Log-probability of each token under the trained model."""

    old_N: torch.Tensor
    """The same before the step's first update; where there is but one update, `policy_N` without its gradient."""

    reference_N: torch.Tensor | None
    """The same under the model that training began with; None where the loss needs none."""

    tokens_S: Sequence[int]
    """Tokens of each answer."""

    advantages_S: torch.Tensor
    """How much better each answer is than those it is compared with."""

    drawn_N: torch.Tensor | None = None
    """The same under the engine that drew them; None where that is the policy itself."""

    def by_answer(self, values_N: torch.Tensor) -> torch.Tensor:
        """The sum of a value of tokens over each answer, [S]."""
        return sums_by_answer(values_N, self.tokens_S)

    def by_token(self, values_S: torch.Tensor) -> torch.Tensor:
        """A value of answers at each of their tokens, [N]."""
        return values_S.repeat_interleave(torch.tensor(self.tokens_S, dtype=torch.int64, device=values_S.device))


def sums_by_answer(values_N: torch.Tensor, tokens_S: Sequence[int]) -> torch.Tensor:
    """The sum of a value of tokens over each answer, [S]."""
    if not tokens_S:
        return values_N.new_zeros(0)
    return torch.stack([part.sum() for part in values_N.split(list(tokens_S))])


# --- advantages


def in_groups(rewards_S: torch.Tensor, config: OnlineConfig) -> torch.Tensor:
    """The rewards of each prompt's answers, [P, G]."""
    return rewards_S.view(len(rewards_S) // config.group_size, config.group_size)


def group_advantages(rewards_PG: torch.Tensor, config: GrpoConfig) -> torch.Tensor:
    """(reward - mean) / standard deviation of the answers to one prompt, [P, G]: section 4.1.2 of arXiv:2402.03300.

    `scale: none` does not divide: Liu et al. 2025, arXiv:2503.20783, section 3.2.
    """
    leads_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return leads_PG if config.scale == "none" else leads_PG / (deviations(rewards_PG) + SMALLEST_DEVIATION)[:, None]


def deviations(rewards_PG: torch.Tensor) -> torch.Tensor:
    """The standard deviation of each group, [P]; also of no groups, of which torch's own warns."""
    squares_PG = (rewards_PG - rewards_PG.mean(1, keepdim=True)) ** 2
    return (squares_PG.sum(1) / (rewards_PG.shape[1] - 1)).sqrt()


def leave_one_out_advantages(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Each reward minus the mean of the others of its group, [P, G]: Ahmadian et al. 2024, eq. 4, arXiv:2402.14740."""
    others_PG = (rewards_PG.sum(1, keepdim=True) - rewards_PG) / (rewards_PG.shape[1] - 1)
    return rewards_PG - others_PG


def advantages(rewards_S: torch.Tensor, config: OnlineConfig, kl_S: torch.Tensor | None = None) -> torch.Tensor:
    """The advantage of each answer, [S]. `kl_S`: of RLOO with a reference, log-probabilities of the answers under the
    policy that wrote them minus those under the reference, which `beta` takes off the rewards.
    """
    if kl_S is not None:
        rewards_S = rewards_S - config.beta * kl_S
    rewards_PG = in_groups(rewards_S, config)
    found_PG = (
        group_advantages(rewards_PG, config) if isinstance(config, GrpoConfig) else leave_one_out_advantages(rewards_PG)
    )
    return found_PG.flatten()


# --- losses


def loss_sum(answers: AnswerTokens, config: OnlineConfig) -> torch.Tensor:
    """The loss of all answers, to be divided by the `loss_items` of the whole step."""
    return grpo_sum(answers, config) if isinstance(config, GrpoConfig) else rloo_sum(answers, config)


def loss_items(config: OnlineConfig, *, answers: float, tokens: float) -> float:
    """What the loss of an optimizer step is divided by, from its answers and their tokens on all processes."""
    if not isinstance(config, GrpoConfig) or config.loss == "grpo":
        return answers
    return answers * config.max_new_tokens if config.loss == "dr_grpo" else tokens


def grpo_sum(answers: AnswerTokens, config: GrpoConfig) -> torch.Tensor:
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta KL of each token, r the ratio of new to old
    probability: eq. 3 of arXiv:2402.03300; `epsilon_high` of its own: Yu et al. 2025 (DAPO), arXiv:2503.14476.

    What a token weighs, of all tokens of the optimizer step over micro-batches and processes:

    - grpo: 1 / (answers x tokens of its answer), so every answer the same. arXiv:2402.03300, eq. 3.
    - bnpo, dapo: 1 / tokens. BNPO takes the tokens of a batch and DAPO those of all groups; as no loss depends on the
      micro-batches here, they are the same. arXiv:2503.14476, eq. 8.
    - dr_grpo: 1 / (answers x max_new_tokens), free of a bias by length. arXiv:2503.20783.
    """
    losses_N = clipped(answers.policy_N - answers.old_N, answers.by_token(answers.advantages_S), config)
    if answers.drawn_N is not None:
        losses_N = losses_N * importance(answers.old_N - answers.drawn_N)
    if answers.reference_N is not None:
        losses_N = losses_N + config.beta * kl_estimates(answers.policy_N, answers.reference_N)
    if config.loss == "grpo":
        return (answers.by_answer(losses_N) / torch.tensor(answers.tokens_S, device=losses_N.device)).sum()
    return losses_N.sum()


def rloo_sum(answers: AnswerTokens, config: OnlineConfig) -> torch.Tensor:
    """-min(r A, clip(r) A) of each answer, r the ratio of new to old probability of the whole of it; at the first
    update its gradient is that of REINFORCE, A grad log p: arXiv:2402.14740, eq. 6."""
    losses_S = clipped(answers.by_answer(answers.policy_N - answers.old_N), answers.advantages_S, config)
    if answers.drawn_N is not None:
        losses_S = losses_S * importance(answers.by_answer(answers.old_N - answers.drawn_N))
    return losses_S.sum()


def importance(log_ratios: torch.Tensor) -> torch.Tensor:
    """How much more probable to the policy than to the engine that drew it, cut off where it is large: truncated
    importance sampling, Ionides 2008; between an engine and a trainer: Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"."""
    return log_ratios.detach().exp().clamp(max=HIGHEST_IMPORTANCE)


def clipped(log_ratios: torch.Tensor, advantages: torch.Tensor, config: OnlineConfig) -> torch.Tensor:
    ratios = log_ratios.exp()
    near = ratios.clamp(1 - config.epsilon, 1 + config.clip_high)
    return -torch.minimum(ratios * advantages, near * advantages)


def is_clipped(answers: AnswerTokens, config: OnlineConfig) -> torch.Tensor:
    """Where the ratio is so far from 1 that nothing more is learned: of tokens, [N], or with RLOO of answers, [S]."""
    log_ratios, leads = answers.policy_N - answers.old_N, answers.advantages_S
    if isinstance(config, GrpoConfig):
        leads = answers.by_token(leads)
    else:
        log_ratios = answers.by_answer(log_ratios)
    ratios = log_ratios.exp()
    return ((ratios < 1 - config.epsilon) & (leads < 0)) | ((ratios > 1 + config.clip_high) & (leads > 0))


def kl_estimates(policy_N: torch.Tensor, reference_N: torch.Tensor) -> torch.Tensor:
    """An unbiased and never negative estimate of the KL divergence at each token: eq. 4 of arXiv:2402.03300."""
    difference_N = reference_N - policy_N
    return difference_N.exp() - difference_N - 1
