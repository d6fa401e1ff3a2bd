"""Losses of preferences, from the log-probabilities of whole answers: pure functions, each with its paper.

Tensors are named by shape. S answers, P pairs; where answers come in pairs, chosen and rejected ones alternate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid, relu

from training.config import DpoConfig, KtoConfig, OrpoConfig, PreferenceConfig, RewardConfig


@dataclass(frozen=True)
class Answers:
    """What models say of answers."""

    policy_S: torch.Tensor
    """Log-probability of each answer under the trained model, summed over its tokens, in nats; of a reward model, its
    reward."""

    reference_S: torch.Tensor | None
    """The same under the model that training began with; None where the loss needs none."""

    tokens_S: torch.Tensor
    """Tokens of each answer."""

    desirable_S: torch.Tensor
    """Whether it is chosen or desirable."""

    def __len__(self) -> int:
        return len(self.policy_S)

    @property
    def log_ratios_S(self) -> torch.Tensor:
        """Log-probability under the policy minus that under the reference."""
        assert self.reference_S is not None
        return self.policy_S - self.reference_S


def losses(answers: Answers, config: PreferenceConfig, baseline: float = 0.0) -> torch.Tensor:
    """The loss of each pair, [P], or of each labelled answer, [S]. `baseline`: KTO's estimate of the KL divergence."""
    if isinstance(config, DpoConfig):
        return dpo_losses(answers, config)
    if isinstance(config, KtoConfig):
        return kto_losses(answers, config, baseline)
    return orpo_losses(answers, config) if isinstance(config, OrpoConfig) else reward_losses(answers, config)


def dpo_losses(answers: Answers, config: DpoConfig) -> torch.Tensor:
    """The loss of each pair, [P], and `sft_weight` x the chosen answer's mean cross entropy.

    With d the difference of rewards (`rewards`), s the label smoothing:

    - sigmoid: -(1 - s) log sigmoid(d) - s log sigmoid(-d). Rafailov et al. 2023, eq. 7, arXiv:2305.18290; smoothed as
      in Mitchell 2023, "A note on DPO with noisy preferences".
    - robust: (-(1 - s) log sigmoid(d) + s log sigmoid(-d)) / (1 - 2 s). Chowdhury et al. 2024, arXiv:2403.00409.
    - hinge: max(0, 1 - d). Zhao et al. 2023 (SLiC), arXiv:2305.10425, with DPO's rewards as in Liu et al. 2023 (RSO),
      arXiv:2309.06657.
    - ipo: (h - 1 / (2 beta))^2, h the difference of log-ratios, each divided by its answer's tokens, as the authors
      do. Azar et al. 2023, eq. 17, arXiv:2310.12036.
    - sigmoid_norm: as sigmoid, with log-ratios divided by the answer's tokens. Lambert et al. 2024 (Tulu 3),
      arXiv:2411.15124.
    - simpo: -log sigmoid(d - gamma), without reference, log-probabilities divided by the answer's tokens. Meng et al.
      2024, eq. 6, arXiv:2405.14734.

    The cross entropy beside it: Pang et al. 2024, eq. 1, arXiv:2404.19733.
    """
    chosen_P, rejected_P = in_pairs(rewards(answers, config))
    margins_P = chosen_P - rejected_P
    smoothing = config.label_smoothing
    if config.loss == "hinge":
        losses_P = relu(1 - margins_P)
    elif config.loss == "ipo":
        losses_P = (margins_P / config.beta - 1 / (2 * config.beta)) ** 2
    elif config.loss == "robust":
        clean_P, flipped_P = -logsigmoid(margins_P), -logsigmoid(-margins_P)
        losses_P = ((1 - smoothing) * clean_P - smoothing * flipped_P) / (1 - 2 * smoothing)
    else:
        margins_P = margins_P - config.gamma
        losses_P = -(1 - smoothing) * logsigmoid(margins_P) - smoothing * logsigmoid(-margins_P)
    if config.sft_weight:
        losses_P = losses_P - config.sft_weight * in_pairs(answers.policy_S / answers.tokens_S)[0]
    return losses_P


def kto_losses(answers: Answers, config: KtoConfig, baseline: float) -> torch.Tensor:
    """The loss of each answer, [S]: weight x (1 - sigmoid(±(beta x log-ratio - beta x baseline))), minus for
    undesirable ones. Ethayarajh et al. 2024, eq. 8, arXiv:2402.01306.
    """
    gains_S = config.beta * (answers.log_ratios_S - baseline)
    desirable_S = config.desirable_weight * (1 - torch.sigmoid(gains_S))
    undesirable_S = config.undesirable_weight * (1 - torch.sigmoid(-gains_S))
    return torch.where(answers.desirable_S, desirable_S, undesirable_S)


def orpo_losses(answers: Answers, config: OrpoConfig) -> torch.Tensor:
    """The loss of each pair, [P]: the chosen answer's mean cross entropy, and `odds_weight` x -log sigmoid of the log
    odds ratio, of mean log-probabilities. Hong et al. 2024, eq. 6 and 7, arXiv:2403.07691.
    """
    chosen_P, rejected_P = in_pairs(answers.policy_S / answers.tokens_S)
    log_odds_P = chosen_P - rejected_P - (log_of_rest(chosen_P) - log_of_rest(rejected_P))
    return -chosen_P - config.odds_weight * logsigmoid(log_odds_P)


def log_of_rest(log_probabilities: torch.Tensor) -> torch.Tensor:
    """log(1 - p) of log p, exact for p near 0 and near 1."""
    return torch.log(-torch.expm1(log_probabilities))


def reward_losses(answers: Answers, config: RewardConfig) -> torch.Tensor:
    """The loss of each pair, [P]: -log sigmoid(chosen - rejected - margin), Bradley-Terry with a margin (Touvron et al.
    2023, eq. 2, arXiv:2307.09288), and `centring` x (chosen + rejected)^2 (Eisenstein et al. 2023, arXiv:2312.09244).
    """
    chosen_P, rejected_P = in_pairs(answers.policy_S)
    return -logsigmoid(chosen_P - rejected_P - config.margin) + config.centring * (chosen_P + rejected_P) ** 2


def rewards(answers: Answers, config: PreferenceConfig) -> torch.Tensor:
    """The reward of each answer that the loss compares, [S]; of ORPO its mean log-probability."""
    if isinstance(config, RewardConfig):
        return answers.policy_S
    if isinstance(config, OrpoConfig):
        return answers.policy_S / answers.tokens_S
    if isinstance(config, KtoConfig):
        return config.beta * answers.log_ratios_S
    if config.loss == "simpo":
        return config.beta * answers.policy_S / answers.tokens_S
    per_token = config.loss in ("ipo", "sigmoid_norm")
    return config.beta * (answers.log_ratios_S / answers.tokens_S if per_token else answers.log_ratios_S)


def in_pairs(values_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of chosen and of rejected answers."""
    return values_S[0::2], values_S[1::2]


def scores(answers: Answers, config: PreferenceConfig, baseline: float = 0.0) -> dict[str, torch.Tensor]:
    """Of each pair, [P], or labelled answer, [S]: its `loss`, `accuracy` and `margin`.

    Accuracy is 1 where the chosen answer has the higher reward, and 0.5 where both have the same; a labelled answer's
    reward is compared with the baseline's. The margin is the difference of the two rewards, with the right sign.
    """
    rewards_S = rewards(answers, config)
    if isinstance(config, KtoConfig):
        gains_S = rewards_S - config.beta * baseline
        margins = torch.where(answers.desirable_S, gains_S, -gains_S)
    else:
        chosen_P, rejected_P = in_pairs(rewards_S)
        margins = chosen_P - rejected_P
    accuracy = (margins.sign() + 1) / 2
    return {"loss": losses(answers, config, baseline), "accuracy": accuracy, "margin": margins}
