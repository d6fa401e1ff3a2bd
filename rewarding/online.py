"""An optimizer step of GRPO or RLOO: answers are written and rewarded, then learned from; and mean rewards held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mixture.prompts import PromptRows
from rewarding.losses import (
    AnswerTokens,
    advantages,
    deviations,
    in_groups,
    is_clipped,
    kl_estimates,
    loss_items,
    loss_sum,
    sums_by_answer,
)
from rewarding.rewards import Rewards
from rewarding.rollouts import ADVANTAGES, DRAWN, OLD, PLACE, PROMPTS, Rollout, Writer, rollouts_batch
from training.batches import Batch, PackedDataset, even_shares
from training.distributed import Ranks, failing_together, gather_on_all, sum_over_ranks
from training.evaluation import autocast, to_device
from training.frozen_shards import in_step
from training.online_config import OnlineConfig, RlooConfig
from training.preferences import ALL, ANSWER_TOKENS, REFERENCE, Reference, evaluating

NOT_FOR_MODEL = (ANSWER_TOKENS, ADVANTAGES, OLD, DRAWN, REFERENCE, PLACE)

SHOWN_ANSWERS = 10


@dataclass(frozen=True)
class Rewarded:
    """Answers to a batch's prompts: what each is worth by each source, and in all."""

    rollouts: list[Rollout]
    rewards: dict[str, torch.Tensor]
    total_S: torch.Tensor


@dataclass
class OnlineLoss:
    """`compute_loss` of a run, with what was measured since it was last asked."""

    config: OnlineConfig
    writer: Writer
    rewards: Rewards
    rows: PromptRows
    """The train split's, for the rewards."""

    reference: Reference | None
    step: int
    """Optimizer steps of the chain so far."""

    batches: list[Batch] = field(default_factory=list)
    """The answered micro-batches of the step, for its further iterations."""

    items: float = 0.0
    """What the loss of the step is divided by."""

    iteration: int = 0
    """Updates from the step's answers so far."""

    passes: dict[tuple[int, int], dict[str, float | torch.Tensor]] = field(default_factory=dict)
    """What was measured in the step, by iteration and micro-batch."""

    sums: dict[str, float | torch.Tensor] = field(default_factory=dict)

    def begin_step(self, batches: list[Batch]) -> float:
        """Answer and reward the prompts of a step's micro-batches; returns what its loss is divided by, over all
        processes. ValueError, on every process, where a reward fails on one."""
        self.add_passes()
        self.writer.begin()
        prompts = [batch[PROMPTS] for batch in batches]
        with failing_together(), in_step(self.writer.network):
            written = self.writer.write(prompts, occasion=str(self.step), answers=self.config.group_size)
            rewarded = [self.rewarded(rollouts) for rollouts in written]
        with failing_together():
            for place, (batch, answered) in enumerate(zip(batches, rewarded, strict=True)):
                self.take_up(batch, answered)
                batch[PLACE] = place
        self.step += 1
        self.batches, self.iteration = batches, 0
        lengths = [tokens for batch in batches for tokens in batch[ANSWER_TOKENS]]
        answers, tokens = sum_over_ranks(float(len(lengths)), float(sum(lengths)))
        self.items = loss_items(self.config, answers=answers, tokens=tokens)
        return self.items

    def rewarded(self, rollouts: list[Rollout]) -> Rewarded:
        """Answers, and what they are worth."""
        rewards = self.rewards.of(self.writer.answered(rollouts, self.rows))
        return Rewarded(rollouts, rewards, self.rewards.total(rewards))

    def take_up(self, batch: Batch, answers: Rewarded) -> None:
        """Put the answers to a batch's prompts in their place. Models are asked by all processes equally often."""
        rollouts, total_S, device = answers.rollouts, answers.total_S, self.writer.device
        answered = to_device(rollouts_batch(rollouts, drawn_elsewhere=self.writer.engine is not None), device)
        self.ask_before_updates(answered)
        kl_S = None
        if isinstance(self.config, RlooConfig) and self.reference is not None:
            kl_S = sums_by_answer(answered[OLD] - answered[REFERENCE], answered[ANSWER_TOKENS]).double().cpu()
        answered[ADVANTAGES] = advantages(total_S, self.config, kl_S).to(device, torch.float32)
        batch.clear()
        batch.update(answered)
        self.note_rewards(rollouts, answers.rewards, total_S)

    def ask_before_updates(self, batch: Batch) -> None:
        """Add what policy and reference say of the answers now, where the loss needs it later."""
        network = self.writer.network
        with torch.no_grad(), autocast(self.writer.device, self.writer.precision):
            if self.config.iterations > 1 or (isinstance(self.config, RlooConfig) and self.reference is not None):
                with evaluating(network):
                    batch[OLD] = log_probabilities(network, batch)
            if self.reference is not None:
                with self.reference.network() as reference:
                    batch[REFERENCE] = log_probabilities(reference, batch)

    def tokens(self, policy_N: torch.Tensor, batch: Batch) -> AnswerTokens:
        old_N = batch[OLD] if self.config.iterations > 1 else policy_N.detach()
        return AnswerTokens(
            policy_N, old_N, batch.get(REFERENCE), batch[ANSWER_TOKENS], batch[ADVANTAGES], batch.get(DRAWN)
        )

    def __call__(self, model: torch.nn.Module, batch: Batch, num_items: torch.Tensor) -> torch.Tensor:
        """The loss of the batch's answers, divided by `num_items`, those of the whole step."""
        policy_N = log_probabilities(model, batch)
        answers = self.tokens(policy_N, batch)
        with torch.no_grad():
            self.passes[self.iteration, batch[PLACE]] = self.measured(answers)
        # With a graph also where there are no answers, so that all processes do the same.
        return (loss_sum(answers, self.config) + 0 * policy_N.sum()) / num_items

    # What is told

    def note_rewards(
        self, rollouts: Sequence[Rollout], rewards: dict[str, torch.Tensor], total_S: torch.Tensor
    ) -> None:
        deviations_P = deviations(in_groups(total_S, self.config))
        lengths = [len(rollout.continuation.ids) for rollout in rollouts]
        self.add(
            answers=len(rollouts),
            groups=len(deviations_P),
            reward=float(total_S.sum()),
            reward_std=float(deviations_P.sum()),
            zero_std_share=float((deviations_P < 1e-8).sum()),
            answer_tokens=sum(lengths),
            cut_share=sum(not rollout.continuation.is_finished for rollout in rollouts),
            judge_unread=self.rewards.unread.total(),
            **{f"reward_{name}": float(value.sum()) for name, value in rewards.items()},
        )
        self.rewards.unread.clear()

    def measured(self, answers: AnswerTokens) -> dict[str, float | torch.Tensor]:
        """Sums over a batch's answers; they stay on the device."""
        clipped = is_clipped(answers, self.config)
        found: dict[str, float | torch.Tensor] = {
            "tokens": len(answers.policy_N),
            "entropy": -answers.policy_N.sum(),
            "ratios": len(clipped),
            "clip_share": clipped.sum(),
        }
        if answers.reference_N is not None:
            found["kl"] = kl_estimates(answers.policy_N, answers.reference_N).sum()
        if answers.drawn_N is not None:
            found["engine_gap"] = (answers.old_N - answers.drawn_N).abs().sum()
        return found

    def add_passes(self) -> None:
        for found in self.passes.values():
            self.add(**found)
        self.passes = {}

    def add(self, **values: float | torch.Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def take(self) -> dict[str, float]:
        """What was measured since the last call, over all processes; on every process.

        Means over answers: `reward` and each of its parts, `answer_tokens`, `cut_share` (ended for want of room),
        `judge_unread`. Over groups: `reward_std`, `zero_std_share` (nothing to learn). Over tokens: `entropy`, as
        minus the log-probability of what was drawn, `kl`, `engine_gap` (how far off the log-probabilities of another
        engine are, dropout among the reasons), and `clip_share` (with RLOO over answers).
        """
        self.add_passes()
        names = sorted(self.sums)
        found = dict(zip(names, sum_over_ranks(*(float(self.sums[name]) for name in names)), strict=True))
        self.sums = {}
        if not found.get("answers"):
            return {}
        counts = {name: found.pop(name) for name in ("answers", "groups", "tokens", "ratios")}
        if not any(source.startswith("judge") for source in self.rewards.sources):
            del found["judge_unread"]
        of = {"reward_std": "groups", "zero_std_share": "groups", "clip_share": "ratios"}
        of |= dict.fromkeys(("entropy", "kl", "engine_gap"), "tokens")
        return {name: value / counts[of.get(name, "answers")] for name, value in found.items()}

    def forget_passes(self) -> None:
        self.passes = {}


def log_probabilities(network: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The log-probability of every token of the answers, [N]."""
    inputs = {name: value for name, value in batch.items() if name not in NOT_FOR_MODEL}
    values: torch.Tensor = network(**inputs).values
    return values


# --- rewards on held-out prompts


@dataclass(frozen=True)
class HeldOutAnswer:
    """One answer to a prompt of the test split."""

    source: str
    prompt: str
    prediction: str
    rewards: dict[str, float]
    """`reward`, and each of its parts."""

    tokens: int
    is_cut: bool


def held_out_rewards(
    writer: Writer, rewards: Rewards, prompts: PackedDataset, rows: PromptRows, *, limit: int, batch_size: int,
    ranks: Ranks,
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:  # fmt: skip
    """Mean reward of an answer to each of the first `limit` prompts, over all of them and of each source, and some of
    the answers; the same on every process.

    The answers are sampled as in training, by numbers that are the same for every model. Leaves random states, and the
    model's mode, as they were.
    """
    writer.begin()
    with failing_together(), in_step(writer.network):
        count = min(limit, len(prompts))
        shares_of_rank = even_shares(count, batch_size=batch_size, rank=ranks.rank, world_size=ranks.world_size)
        asked = [[row for place in share for row in prompts[place]] for share in shares_of_rank]
        written = writer.write(asked, occasion="held out", answers=1)
        mine = [held_out_answers(writer, rewards, rollouts, rows) for rollouts in written]
    rewards.unread.clear()
    shares = gather_on_all(mine)
    everyone = [answer for batches in zip(*shares, strict=True) for batch in batches for answer in batch]
    names = sorted({answer.source for answer in everyone})
    groups = {ALL: everyone, **{name: [one for one in everyone if one.source == name] for name in names}}
    shown = [{"prompt": one.prompt, "prediction": one.prediction, **one.rewards} for one in everyone[:SHOWN_ANSWERS]]
    return {name: mean_rewards(group) for name, group in groups.items()}, shown


def held_out_answers(
    writer: Writer, rewards: Rewards, rollouts: Sequence[Rollout], rows: PromptRows
) -> list[HeldOutAnswer]:
    answered = writer.answered(rollouts, rows)
    parts = rewards.of(answered)
    totals = rewards.total(parts).tolist()
    found = {f"reward_{name}": value.tolist() for name, value in parts.items()}
    return [
        HeldOutAnswer(
            source=rollout.prompt.source,
            prompt="\n".join(turn["content"] for turn in one.messages),
            prediction=one.answer,
            rewards={"reward": totals[place], **{name: values[place] for name, values in found.items()}},
            tokens=len(rollout.continuation.ids),
            is_cut=not rollout.continuation.is_finished,
        )
        for place, (rollout, one) in enumerate(zip(rollouts, answered, strict=True))
    ]


def mean_rewards(answers: Sequence[HeldOutAnswer]) -> dict[str, float]:
    """Means over answers, and how many they are."""
    count = len(answers)
    names = answers[0].rewards if answers else {}
    return {
        **{name: sum(one.rewards[name] for one in answers) / count for name in names},
        "answer_tokens": sum(one.tokens for one in answers) / count,
        "cut_share": sum(one.is_cut for one in answers) / count,
        "count": count,
    }
