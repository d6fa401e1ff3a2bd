"""Losses of preferences against their published formulas, in float64, and against TRL's."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from training.config import DpoConfig, KtoConfig, OrpoConfig, PreferenceConfig, RewardConfig
from training.losses import Head, LogitShape, linear_log_probabilities
from training.preference_losses import Answers, losses, scores

PAIRS = 5


def answers(seed: int = 0) -> Answers:
    """Five pairs of log-probabilities that need a gradient."""
    torch.manual_seed(seed)
    tokens = torch.randint(2, 9, (2 * PAIRS,)).double()
    policy = (-tokens * torch.rand(2 * PAIRS, dtype=torch.float64)).requires_grad_()
    reference = -tokens * torch.rand(2 * PAIRS, dtype=torch.float64)
    return Answers(policy, reference, tokens, torch.tensor([True, False] * PAIRS))


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


def dpo(a: Answers, c: DpoConfig) -> list[torch.Tensor]:
    """As the papers write them, a pair at a time."""
    found = []
    for w in range(0, len(a), 2):
        l = w + 1  # noqa: E741
        assert a.reference_S is not None
        ratio_w, ratio_l = a.policy_S[w] - a.reference_S[w], a.policy_S[l] - a.reference_S[l]
        n_w, n_l, e = a.tokens_S[w], a.tokens_S[l], c.label_smoothing
        d = c.beta * ratio_w - c.beta * ratio_l
        forms = {
            "sigmoid": -(1 - e) * torch.log(sigmoid(d)) - e * torch.log(sigmoid(-d)),
            "robust": (-(1 - e) * torch.log(sigmoid(d)) + e * torch.log(sigmoid(-d))) / (1 - 2 * e),
            "hinge": torch.maximum(torch.zeros_like(d), 1 - d),
            "ipo": (ratio_w / n_w - ratio_l / n_l - 1 / (2 * c.beta)) ** 2,
            "sigmoid_norm": -torch.log(sigmoid(c.beta * (ratio_w / n_w - ratio_l / n_l))),
            "simpo": -torch.log(sigmoid(c.beta / n_w * a.policy_S[w] - c.beta / n_l * a.policy_S[l] - c.gamma)),
        }
        found.append(forms[c.loss] - c.sft_weight * a.policy_S[w] / n_w)
    return found


def kto(a: Answers, c: KtoConfig, z0: float) -> list[torch.Tensor]:
    assert a.reference_S is not None
    found = []
    for r, is_desirable in zip(a.policy_S - a.reference_S, a.desirable_S, strict=True):
        lam = c.desirable_weight if is_desirable else c.undesirable_weight
        found.append(lam - lam * sigmoid(c.beta * (r - z0) if is_desirable else c.beta * (z0 - r)))
    return found


def orpo(a: Answers, c: OrpoConfig) -> list[torch.Tensor]:
    p = torch.exp(a.policy_S / a.tokens_S)
    odds = p / (1 - p)
    return [
        -torch.log(p[w]) - c.odds_weight * torch.log(sigmoid(torch.log(odds[w] / odds[w + 1])))
        for w in range(0, len(a), 2)
    ]


def reward(a: Answers, c: RewardConfig) -> list[torch.Tensor]:
    r = a.policy_S
    return [
        -torch.log(sigmoid(r[w] - r[w + 1] - c.margin)) + c.centring * (r[w] + r[w + 1]) ** 2
        for w in range(0, len(a), 2)
    ]


BY_HAND: list[tuple[PreferenceConfig, Callable[[Answers], list[torch.Tensor]]]] = [
    *[
        (config, lambda a, config=config: dpo(a, config))
        for config in (
            DpoConfig(beta=0.3),
            DpoConfig(beta=0.3, label_smoothing=0.1, sft_weight=0.5),
            DpoConfig(loss="robust", label_smoothing=0.2),
            DpoConfig(loss="hinge", beta=0.8),
            DpoConfig(loss="ipo", beta=0.2),
            DpoConfig(loss="sigmoid_norm", beta=2.0),
            DpoConfig(loss="simpo", beta=2.0, gamma=0.7),
        )
    ],
    (KtoConfig(beta=0.4, desirable_weight=1.3, undesirable_weight=0.6), lambda a: kto(a, BY_HAND[7][0], 0.5)),  # type: ignore[arg-type]
    (OrpoConfig(odds_weight=0.3), lambda a: orpo(a, OrpoConfig(odds_weight=0.3))),
    (RewardConfig(margin=0.4, centring=0.05), lambda a: reward(a, RewardConfig(margin=0.4, centring=0.05))),
]


@pytest.mark.parametrize(("config", "by_hand"), BY_HAND, ids=[str(config) for config, _ in BY_HAND])
def test_losses_and_gradients_are_those_of_the_papers(
    config: PreferenceConfig, by_hand: Callable[[Answers], list[torch.Tensor]]
) -> None:
    mine, theirs = answers(), answers()
    found, expected = losses(mine, config, 0.5), torch.stack(by_hand(theirs))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), mine.policy_S)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), theirs.policy_S)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


def test_before_training_dpo_cannot_tell_answers_apart_and_its_loss_is_log_2() -> None:
    a = answers()
    assert a.reference_S is not None
    same = Answers(a.reference_S, a.reference_S, a.tokens_S, a.desirable_S)
    found = scores(same, DpoConfig())
    assert found["loss"].tolist() == pytest.approx([math.log(2)] * PAIRS)
    assert found["accuracy"].tolist() == [0.5] * PAIRS and found["margin"].tolist() == [0.0] * PAIRS


@pytest.mark.parametrize("shape", [LogitShape(), LogitShape(scale=0.5, softcap=3.0)])
def test_log_probabilities_in_chunks_are_those_of_all_logits(shape: LogitShape) -> None:
    torch.manual_seed(1)
    tensors = [torch.randn(11, 6), torch.randn(17, 6), torch.randn(17)]
    hidden, weight, bias = (tensor.double().requires_grad_() for tensor in tensors)
    targets, upstream = torch.randint(17, (11,)), torch.randn(11).double()
    found = linear_log_probabilities(hidden, Head(weight, bias), targets, shape, chunk_tokens=4)
    logits = shape.scale * (hidden @ weight.T + bias)
    logits = torch.tanh(logits / shape.softcap) * shape.softcap if shape.softcap else logits
    expected = log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found @ upstream, (hidden, weight, bias)),
        torch.autograd.grad(expected @ upstream, (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


TRL_LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "robust": {"label_smoothing": 0.2},
    "hinge": {},
    "ipo": {},
    "sigmoid_norm": {},
}


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL, which losses are compared with, is not installed")
def test_dpo_losses_are_those_of_trl(teacher: Any, tmp_path: Any) -> None:
    """On the tiny model moved away from its reference, one batch of two pairs, through TRL's own collator and loss."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    rows = [{"prompt": f"What is {n} plus 2?", "chosen": f"{n} + 2 = {n + 2}", "rejected": "No idea!"} for n in (3, 44)]
    for loss, settings in TRL_LOSSES.items():
        policy, reference = (AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32) for _ in range(2))
        torch.manual_seed(3)
        for weight in policy.parameters():
            weight.data += 0.02 * torch.randn_like(weight)
        arguments = DPOConfig(
            output_dir=str(tmp_path), loss_type=[loss], beta=0.3, report_to="none", use_cpu=True, bf16=False,
            gradient_checkpointing=False, per_device_train_batch_size=2, **settings,
        )  # fmt: skip
        trainer = DPOTrainer(
            policy, reference, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )  # fmt: skip
        policy.eval()
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
        theirs = trainer.compute_loss(policy, batch).item()
        mine = losses(answers_of(policy, reference, batch), DpoConfig(loss=loss, beta=0.3, **settings))  # type: ignore[arg-type]
        assert mine.mean().item() == pytest.approx(theirs, rel=1e-4), loss


def answers_of(policy: Any, reference: Any, batch: dict[str, torch.Tensor]) -> Answers:
    """What both models say of TRL's batch, which holds all chosen answers and then all rejected ones."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].double()
    order = torch.arange(len(ids)).view(2, -1).T.flatten()

    def sums(model: Any) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits.double()
        found = log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None]).squeeze(2)
        return (found * mask).sum(1)[order]

    return Answers(sums(policy), sums(reference), mask.sum(1)[order], torch.tensor([True, False] * (len(ids) // 2)))
