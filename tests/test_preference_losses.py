"""Losses of preferences against their published formulas, in float64, and against TRL's."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from mixture.shards import TokenRow
from training.batches import collate
from training.config import DpoConfig, KtoConfig, ModelConfig, OrpoConfig, PreferenceConfig, RewardConfig
from training.losses import Head, LogitShape, linear_log_probabilities
from training.preference_losses import Answers, losses, scores
from training.preferences import build_reward_model

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


needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="TRL, which losses are compared with, is not installed")
PAIRS_OF_TEXTS = [
    {"prompt": f"What is {n} plus 2?", "chosen": f"{n} + 2 = {n + 2}", "rejected": "No idea!"} for n in (3, 44)
]
LABELLED_TEXTS = [
    {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
    for pair in PAIRS_OF_TEXTS
    for kind in ("chosen", "rejected")
]


def moved(model: Any, seed: int = 3) -> Any:
    """The model away from where it began, without dropout."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    return model.eval()


def trl_arguments(folder: Path) -> dict[str, Any]:
    """For TRL's trainers: one batch of all rows, on the CPU, in float32."""
    return {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False,
            "gradient_checkpointing": False, "per_device_train_batch_size": 4}  # fmt: skip


def trl_batch(trainer: Any) -> dict[str, Any]:
    """All rows in one batch, through TRL's own tokens and collator."""
    return trainer.data_collator([trainer.train_dataset[index] for index in range(len(trainer.train_dataset))])


@needs_trl
def test_dpo_losses_are_those_of_trl(teacher: Path, tmp_path: Path) -> None:
    """On the tiny model moved away from its reference, one batch of two pairs, through TRL's own collator and loss."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    for loss, settings in TRL_LOSSES.items():
        policy, reference = (AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32) for _ in range(2))
        arguments = DPOConfig(loss_type=[loss], beta=0.3, **settings, **trl_arguments(tmp_path))
        trainer = DPOTrainer(
            moved(policy), reference, args=arguments, train_dataset=Dataset.from_list(PAIRS_OF_TEXTS),
            processing_class=tokenizer,
        )  # fmt: skip
        batch = trl_batch(trainer)
        theirs = trainer.compute_loss(policy, batch).item()
        mine = losses(answers_of(policy, reference, batch), DpoConfig(loss=loss, beta=0.3, **settings))  # type: ignore[arg-type]
        assert mine.mean().item() == pytest.approx(theirs, rel=1e-4), loss


@needs_trl
@pytest.mark.parametrize("moves", ["policy", "reference"])
def test_kto_losses_are_those_of_trl(moves: str, teacher: Path, tmp_path: Path) -> None:
    """With the divergence of mismatched answers above zero, and below it, where both take zero."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    policy, reference = (AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32) for _ in range(2))
    moved(policy if moves == "policy" else reference, seed=4)
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    trainer = KTOTrainer(
        policy, reference, args=KTOConfig(beta=0.3, **weights, **trl_arguments(tmp_path)),
        train_dataset=Dataset.from_list(LABELLED_TEXTS), processing_class=AutoTokenizer.from_pretrained(teacher),
    )  # fmt: skip
    policy.eval()
    batch = trl_batch(trainer)
    theirs = trainer.compute_loss(policy, dict(batch)).item()
    mismatched = {name.removeprefix("KL_"): value for name, value in batch.items() if name.startswith("KL_")}
    divergence = log_ratios(policy, reference, mismatched).mean().item()
    found = in_order(policy, reference, batch, torch.arange(4), batch["label"].bool())
    mine = losses(found, KtoConfig(beta=0.3, **weights), max(0.0, divergence))
    assert mine.mean().item() == pytest.approx(theirs, rel=1e-4)
    assert (divergence > 0) == (moves == "policy")


@needs_trl
def test_orpo_losses_are_those_of_trl_but_for_the_prompt(teacher: Path, tmp_path: Path) -> None:
    """TRL's cross entropy counts the tokens of the prompt too; that of the answer alone, which it tells, is put in."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    policy = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    trainer = ORPOTrainer(
        moved(policy), args=ORPOConfig(beta=0.3, **trl_arguments(tmp_path)),
        train_dataset=Dataset.from_list(PAIRS_OF_TEXTS), processing_class=AutoTokenizer.from_pretrained(teacher),
    )  # fmt: skip
    policy.eval()
    batch = trl_batch(trainer)
    theirs, metrics = trainer.get_batch_loss_metrics(policy, batch)
    theirs = theirs.item() - metrics["nll_loss"] - metrics["logps/chosen"]
    joined = trainer.concatenated_inputs(batch, padding_value=trainer.padding_value)
    sequences = {
        "input_ids": joined["concatenated_input_ids"],
        "attention_mask": joined["concatenated_attention_mask"],
        "completion_mask": (joined["concatenated_labels"] != -100).long(),
    }
    mine = losses(answers_of(policy, policy, sequences), OrpoConfig(odds_weight=0.3))
    assert mine.mean().item() == pytest.approx(theirs, rel=1e-4)


@needs_trl
@pytest.mark.parametrize("centring", [0.0, 0.05])
def test_rewards_and_their_losses_are_those_of_trl(centring: float, teacher: Path, tmp_path: Path) -> None:
    """Our rewards come from packed answers, TRL's from padded ones."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig as TrlConfig
    from trl import RewardTrainer

    network = AutoModelForSequenceClassification.from_pretrained(teacher, num_labels=1, dtype=torch.float32)
    rows = [{**pair, "margin": 0.4} for pair in PAIRS_OF_TEXTS]
    arguments = TrlConfig(center_rewards_coefficient=centring or None, **trl_arguments(tmp_path))
    trainer = RewardTrainer(
        moved(network), args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(teacher),
    )  # fmt: skip
    network.eval()
    batch = trl_batch(trainer)
    theirs = trainer.compute_loss(network, dict(batch)).item()

    ours = build_reward_model(ModelConfig(name=str(teacher)), seed=1)
    ours.load_state_dict(network.state_dict())
    order = torch.arange(4).view(2, -1).T.flatten()
    rewards = [
        ours.eval()(**collate([[TokenRow("", ids.numpy(), np.ones(len(ids), dtype=bool), "")]])).values
        for ids in (batch["input_ids"][index][batch["attention_mask"][index].bool()] for index in order)
    ]
    none = torch.ones(4)
    mine = losses(Answers(torch.cat(rewards), None, none, none.bool()), RewardConfig(margin=0.4, centring=centring))
    assert mine.mean().item() == pytest.approx(theirs, rel=1e-4)


def answers_of(policy: Any, reference: Any, batch: dict[str, torch.Tensor]) -> Answers:
    """What both models say of TRL's batch, which holds all chosen answers and then all rejected ones."""
    pairs = len(batch["input_ids"]) // 2
    order = torch.arange(2 * pairs).view(2, -1).T.flatten()
    return in_order(policy, reference, batch, order, torch.tensor([True, False] * pairs))


def in_order(
    policy: Any, reference: Any, batch: dict[str, torch.Tensor], order: torch.Tensor, desirable: torch.Tensor
) -> Answers:
    tokens = batch["completion_mask"][:, 1:].double().sum(1)[order]
    return Answers(sums(policy, batch)[order], sums(reference, batch)[order], tokens, desirable)


def log_ratios(policy: Any, reference: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return sums(policy, batch) - sums(reference, batch)


def sums(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The log-probability of each answer, from all logits."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].double()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits.double()
    return (log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None]).squeeze(2) * mask).sum(1)
