"""Advantages and losses of rewarded answers against their published formulas, in float64, and against TRL's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from rewarding.losses import (
    HIGHEST_IMPORTANCE,
    AnswerTokens,
    advantages,
    is_clipped,
    kl_estimates,
    loss_items,
    loss_sum,
    sums_by_answer,
)
from training.losses import Head, LogitShape, linear_log_probabilities
from training.online_config import GrpoConfig, OnlineConfig, RlooConfig

TOKENS = (3, 1, 5, 2)
LONGEST = 6


def answers(has_reference: bool = True, drawn_elsewhere: bool = False) -> AnswerTokens:
    """Four answers to two prompts, somewhat away from the policy that wrote them."""
    torch.manual_seed(1)
    policy = (-torch.rand(sum(TOKENS), dtype=torch.float64)).requires_grad_()
    old = policy.detach() + 0.4 * torch.randn(sum(TOKENS), dtype=torch.float64)
    reference = policy.detach() + 0.4 * torch.randn(sum(TOKENS), dtype=torch.float64)
    leads = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    drawn = old + torch.randn(sum(TOKENS), dtype=torch.float64) if drawn_elsewhere else None
    return AnswerTokens(policy, old, reference if has_reference else None, TOKENS, leads, drawn)


def by_hand(a: AnswerTokens, config: OnlineConfig) -> torch.Tensor:
    """As the papers write them, a token at a time."""
    total, first = torch.zeros((), dtype=torch.float64), 0
    for tokens, lead in zip(a.tokens_S, a.advantages_S, strict=True):
        places = range(first, first + tokens)
        first += tokens
        if isinstance(config, RlooConfig):
            ratio = torch.exp(sum(a.policy_N[place] for place in places) - sum(a.old_N[place] for place in places))
            total = total - importance_by_hand(a, places) * gain_of(ratio, lead, config) / 4
            continue
        assert isinstance(config, GrpoConfig)
        weight = {"grpo": 1 / tokens / 4, "dr_grpo": 1 / config.max_new_tokens / 4}.get(config.loss, 1 / sum(TOKENS))
        for place in places:
            ratio = torch.exp(a.policy_N[place] - a.old_N[place])
            gain = importance_by_hand(a, [place]) * gain_of(ratio, lead, config)
            if a.reference_N is not None:
                odds = torch.exp(a.reference_N[place] - a.policy_N[place])
                gain = gain - config.beta * (odds - torch.log(odds) - 1)
            total = total - weight * gain
    return total


def importance_by_hand(a: AnswerTokens, places: Sequence[int]) -> float:
    """Of these tokens together."""
    if a.drawn_N is None:
        return 1.0
    return min(2.0, math.exp(sum(float(a.old_N[place]) - float(a.drawn_N[place]) for place in places)))


def gain_of(ratio: torch.Tensor, lead: torch.Tensor, config: OnlineConfig) -> torch.Tensor:
    return torch.minimum(ratio * lead, ratio.clamp(1 - config.epsilon, 1 + config.clip_high) * lead)


SETTINGS: list[OnlineConfig] = [
    *[GrpoConfig(group_size=2, max_new_tokens=LONGEST, loss=loss, beta=0.3, epsilon=0.1, epsilon_high=0.3)  # type: ignore[arg-type]
      for loss in ("grpo", "bnpo", "dapo", "dr_grpo")],
    RlooConfig(group_size=2, epsilon=0.05),
]  # fmt: skip


@pytest.mark.parametrize("drawn_elsewhere", [False, True], ids=["", "drawn by another engine"])
@pytest.mark.parametrize("config", SETTINGS, ids=lambda config: getattr(config, "loss", "rloo"))
def test_losses_and_gradients_are_those_of_the_papers(config: OnlineConfig, drawn_elsewhere: bool) -> None:
    mine, theirs = (answers(drawn_elsewhere=drawn_elsewhere) for _ in range(2))
    if mine.drawn_N is not None:
        log_ratios = mine.old_N - mine.drawn_N
        assert 0 < (log_ratios > math.log(HIGHEST_IMPORTANCE)).double().mean() < 1, "the cut-off is at work"
    found = loss_sum(mine, config) / loss_items(config, answers=4, tokens=sum(TOKENS))
    expected = by_hand(theirs, config)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, mine.policy_N), torch.autograd.grad(expected, theirs.policy_N), rtol=1e-9, atol=1e-12
    )
    assert 0 < is_clipped(mine, config).float().mean() < 1


def test_advantages_are_leads_over_the_group_or_over_the_others() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0, 3.0, 3.0], dtype=torch.float64)
    divisor = rewards[:3].std().item() + 1e-4
    scaled = [2 / 3 / divisor, -1 / 3 / divisor, -1 / 3 / divisor, 0, 0, 0]
    assert advantages(rewards, GrpoConfig(group_size=3)).tolist() == pytest.approx(scaled)
    assert advantages(rewards, GrpoConfig(group_size=3, scale="none")).tolist() == pytest.approx(
        [2 / 3, -1 / 3, -1 / 3, 0, 0, 0]
    )
    assert advantages(rewards, RlooConfig(group_size=3)).tolist() == pytest.approx([1, -0.5, -0.5, 0, 0, 0])
    kl = torch.tensor([2.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    assert advantages(rewards, RlooConfig(group_size=3, beta=0.5), kl).tolist() == pytest.approx([0] * 6)


def test_the_first_update_of_rloo_is_that_of_reinforce() -> None:
    a = answers(has_reference=False)
    a = AnswerTokens(a.policy_N, a.policy_N.detach(), None, TOKENS, a.advantages_S)
    (found,) = torch.autograd.grad(loss_sum(a, RlooConfig()), a.policy_N)
    torch.testing.assert_close(found, -a.by_token(a.advantages_S))


def test_no_answers_give_no_loss_and_no_advantage() -> None:
    none = torch.zeros(0, requires_grad=True)
    for config in SETTINGS:
        a = AnswerTokens(none, none.detach(), None, (), torch.zeros(0))
        assert loss_sum(a, config).item() == 0 and advantages(torch.zeros(0), config).shape == (0,)


def test_log_probabilities_are_those_of_the_temperature_that_is_sampled_at() -> None:
    torch.manual_seed(1)
    hidden, weight, targets = torch.randn(5, 4).double(), torch.randn(9, 4).double(), torch.randint(9, (5,))
    shape = LogitShape(scale=2.0, softcap=3.0)
    found = linear_log_probabilities(hidden, Head(weight, None), targets, shape, chunk_tokens=2, temperature=0.5)
    logits = torch.tanh(2 * hidden @ weight.T / 3) * 3
    torch.testing.assert_close(found, (logits / 0.5).log_softmax(1).gather(1, targets[:, None]).squeeze(1))


# --- against TRL

REWARDS = [0.3, -1.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0]


def trl_trainer(kind: str, teacher: Path, folder: Path, **settings: Any) -> Any:
    """TRL's trainer of the tiny model, and what it makes of two prompts with four answers each."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    config_class, trainer_class = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    arguments = config_class(
        output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=8, num_generations=4, max_completion_length=LONGEST, num_iterations=2,
        temperature=0.7, epsilon=0.05, epsilon_high=0.1, beta=0.3, **settings,
    )  # fmt: skip
    return trainer_class(
        policy, lambda completions, **columns: REWARDS, args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": f"What is {n} plus 2?"} for n in range(8)]),
        processing_class=AutoTokenizer.from_pretrained(teacher),
    )  # fmt: skip


PAPERS_KL = {"use_bias_correction_kl": False}
CASES: list[tuple[str, OnlineConfig, dict[str, Any]]] = [
    ("GRPO", GrpoConfig(loss="grpo"), {"loss_type": "grpo", **PAPERS_KL}),
    ("GRPO", GrpoConfig(loss="bnpo"), {"loss_type": "bnpo", **PAPERS_KL}),
    ("GRPO", GrpoConfig(loss="dapo"), {"loss_type": "dapo", **PAPERS_KL}),
    ("GRPO", GrpoConfig(loss="dr_grpo"), {"loss_type": "dr_grpo", **PAPERS_KL}),
    ("GRPO", GrpoConfig(scale="none"), {"loss_type": "grpo", "scale_rewards": "none", **PAPERS_KL}),
    ("RLOO", RlooConfig(), {}),
]


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL, which losses are compared with, is not installed")
@pytest.mark.parametrize(
    ("kind", "config", "settings"), CASES, ids=["grpo", "bnpo", "dapo", "dr_grpo", "unscaled", "rloo"]
)
def test_advantages_and_losses_are_those_of_trl(
    kind: str, config: OnlineConfig, settings: dict[str, Any], teacher: Path, tmp_path: Path
) -> None:
    """On answers that TRL's trainer wrote, with its own log-probabilities, once the weights have moved."""
    config = replace(
        config, group_size=4, max_new_tokens=LONGEST, temperature=0.7, epsilon=0.05, epsilon_high=0.1, beta=0.3
    )
    trainer = trl_trainer(kind, teacher, tmp_path, **settings)
    move(trainer.model)  # away from the reference
    trainer.model.train()
    inputs = trainer._generate_and_score_completions(
        [{"prompt": f"What is {n} plus 2?"} for n in (3, 7) for _ in range(4)]
    )
    trainer.model.eval()
    mask = inputs["completion_mask"].bool()
    tokens = mask.sum(1).tolist()

    def log_probabilities(network: Any) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            found = trainer._get_per_token_logps_and_entropies(network, ids, attention, mask.shape[1])[0]
        return found[mask]

    old, reference = log_probabilities(trainer.model), log_probabilities(trainer.ref_model)
    kl = sums_by_answer(old - reference, tokens) if kind == "RLOO" else None
    leads = advantages(torch.tensor(REWARDS), config, kl)
    torch.testing.assert_close(inputs["advantages"], leads, rtol=1e-5, atol=1e-5)

    move(trainer.model)  # away from the policy that answered
    inputs |= {"num_items_in_batch": mask.sum()}
    with torch.no_grad():
        theirs = trainer._compute_loss(trainer.model, inputs)
    mine = AnswerTokens(log_probabilities(trainer.model), old, reference if kind == "GRPO" else None, tokens, leads)
    assert is_clipped(mine, config).any() and kl_estimates(old, reference).mean() > 1e-3
    found = loss_sum(mine, config) / loss_items(config, answers=8, tokens=sum(tokens))
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)


def move(network: torch.nn.Module) -> None:
    torch.manual_seed(3)
    for weight in network.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
