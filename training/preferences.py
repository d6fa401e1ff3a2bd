"""Learning from preferences: what a model says of whole answers, and the loss of an optimizer step's pairs.

A batch is that of training/batches.py over the rows of its answers, S of them, and further

    answer_tokens   list[int]        supervised tokens of each answer
    desirable       bool [S]         whether it is chosen or desirable; chosen and rejected ones alternate
    mismatched      Batch | absent   KTO: the same prompts with other answers, with `answer_tokens` of their own
    reference       float32 [S]      what the reference says of them; absent where it is asked as training goes
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils.generic import ModelOutput

from mixture.preferences import role_of
from mixture.shards import TokenRow
from training.adapters import add_adapter, export_adapter, load_adapter_state
from training.attention import check_packable, register_varlen_attention
from training.batches import Batch, PackedDataset, collate, even_shares
from training.config import ModelConfig, PreferenceConfig
from training.distributed import Ranks, gather_on_all, sum_over_ranks
from training.evaluation import autocast, to_device
from training.export import replacing
from training.losses import linear_log_probabilities, logit_shape, output_head, supervised_places
from training.models import align_weights, load_model_config, load_weights, precision
from training.preference_losses import Answers, losses, scores
from training.sharding import computing_device, let_go

if TYPE_CHECKING:
    from peft import PeftModel

# Tensors are named by shape. S answers, N supervised tokens.

ANSWER_TOKENS = "answer_tokens"
DESIRABLE = "desirable"
MISMATCHED = "mismatched"
REFERENCE = "reference"

NOT_FOR_MODELS = (ANSWER_TOKENS, DESIRABLE, MISMATCHED, REFERENCE)

ALL = "all"


# --- models


@dataclass
class AnswerValues(ModelOutput):
    """What the forward pass returns when it is given labels."""

    values: torch.Tensor | None = None
    """The log-probability of each supervised token, [N]; of a reward model, the reward of each answer, [S]."""


def use_log_probabilities(model: PreTrainedModel, temperature: float = 1.0) -> None:
    """Has the model's forward return the log-probabilities of the supervised tokens when it is given labels.

    Those of the distribution that is sampled at `temperature`. It never holds the logits of all tokens. Without labels
    the forward is the model's own.
    """

    def values(network: Any, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        places = supervised_places(labels)
        hidden_NH = network.base_model(**inputs, use_cache=False)[0].flatten(0, 1).index_select(0, places.index)
        head, shape = output_head(network), logit_shape(network)
        return linear_log_probabilities(hidden_NH, head, places.targets, shape, temperature=temperature)

    use_values(model, values)


def use_values(model: PreTrainedModel, values: Callable[..., torch.Tensor]) -> None:
    # The class's forward lends its signature, as in use_chunked_loss.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is None:
            return type(self).forward(self, *args, **kwargs)
        return AnswerValues(values=values(self, *args, **kwargs))

    model.forward = types.MethodType(forward, model)


def build_reward_model(model: ModelConfig, *, seed: int, checkpoint: Path | None = None) -> PreTrainedModel | PeftModel:
    """The model with one number as its head, read at an answer's last token, on the CPU; with adapters where they are
    wanted, beside which the head is trained in full.

    All that is trained is float32. As a checkpoint it is a sequence classifier of one label, which transformers loads.
    """
    register_varlen_attention()
    config = load_model_config(model)
    config.num_labels = 1
    set_seed(seed)
    if model.from_scratch and checkpoint is None:
        network = AutoModelForSequenceClassification.from_config(
            config, dtype=torch.float32, attn_implementation=model.attention, trust_remote_code=model.trust_remote_code
        )
    else:
        in_full = checkpoint is not None and not model.peft
        trained = replace(model, name=str(checkpoint), revision=None, adapters=[]) if in_full else model
        network = load_weights(
            trained, config, attention=model.attention, auto_class=AutoModelForSequenceClassification
        )
    if model.attention == "varlen":
        check_packable(network)
    use_rewards(network)
    if not model.peft:
        align_weights(network)
        return network
    network.score.float()
    adapted = add_adapter(network, model, seed=seed, task="SEQ_CLS")
    if checkpoint:
        load_adapter_state(adapted, checkpoint)
    return adapted


def use_rewards(network: PreTrainedModel) -> None:
    """Has the model's forward return the reward of each answer when it is given labels."""

    def values(network: Any, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        hidden_TH = network.base_model(**inputs, use_cache=False)[0].flatten(0, 1)
        last_S = inputs["cu_seq_lens_q"][1:].long() - 1
        # Summing over one number: a view would have FSDP warn of changes in place.
        return network.score(hidden_TH.index_select(0, last_S)).float().sum(-1)

    use_values(network, values)


def export_reward_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, step: int, config: ModelConfig
) -> None:
    """Write the model and its tokenizer to `folder`, whole or not at all, as a sequence classifier of one label.

    An adapter is written with its head as it is, float32; with `merge_adapter` the merged model goes to
    `folder`/merged. The model given is used up.
    """
    model.config.pad_token_id = tokenizer.pad_token_id  # by it transformers finds the last token
    with replacing(folder, step=step) as temporary:
        if config.peft:
            export_adapter(model, temporary, config, step=step)
            if config.merge_adapter:
                merged = model.merge_and_unload(safe_merge=True)
                merged.to(precision(config)).save_pretrained(temporary / "merged")
                tokenizer.save_pretrained(temporary / "merged")
        else:
            model.to(precision(config)).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


# --- batches


@dataclass(frozen=True, slots=True)
class ReferencedRow(TokenRow):
    """One tokenised answer."""

    reference: float
    """Its log-probability under the reference, in nats."""

    @classmethod
    def of(cls, row: TokenRow, reference: float) -> ReferencedRow:
        """A row with what the reference says of it."""
        return cls(row.sample_id, row.input_ids, row.loss_mask, row.source, reference)


@dataclass(frozen=True)
class PreferenceCollate:
    """Packs of answers to their batch; picklable, since it may run in the data loader's processes."""

    has_reference: bool = False
    """Whether rows come as ReferencedRow."""

    def __call__(self, packs: Sequence[list[Any]]) -> Batch:
        rows: list[TokenRow] = [row for pack in packs for row in pack]
        answers = [row for row in rows if role_of(row) != MISMATCHED]
        mismatched = [row for row in rows if role_of(row) == MISMATCHED]
        batch = self.answers_batch(answers)
        batch[DESIRABLE] = torch.tensor([role_of(row) in ("chosen", "desirable") for row in answers], dtype=torch.bool)
        if mismatched:
            batch[MISMATCHED] = self.answers_batch(mismatched)
        return batch

    def answers_batch(self, rows: list[TokenRow]) -> Batch:
        batch = answers_batch(rows)
        if self.has_reference:
            batch[REFERENCE] = torch.tensor([row.reference for row in rows], dtype=torch.float32)  # type: ignore[attr-defined]
        return batch


def answers_batch(rows: list[TokenRow]) -> Batch:
    return {**collate([rows] if rows else []), ANSWER_TOKENS: [int(row.loss_mask[1:].sum()) for row in rows]}


def take_mismatched(batch: Batch) -> Batch:
    """The mismatched answers of a batch, which then has none. Where there are none they are an empty batch, so that
    all processes ask a model in shards as often as the others."""
    if MISMATCHED not in batch:
        nothing = {REFERENCE: torch.zeros(0)} if REFERENCE in batch else {}
        return {**answers_batch([]), **nothing}
    mismatched: Batch = batch.pop(MISMATCHED)
    return mismatched


# --- what models say of a batch


@dataclass(frozen=True)
class Reference:
    """The model as training began with it: a frozen copy, or the policy with its adapters off where that is None."""

    frozen: torch.nn.Module | None
    policy: Any

    @contextmanager
    def network(self) -> Iterator[torch.nn.Module]:
        """The network to ask, in evaluation mode."""
        if self.frozen is not None:
            yield self.frozen
            let_go(self.frozen)
            return
        with self.policy.disable_adapter(), evaluating(self.policy):
            yield self.policy


@contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """Without dropout, and as before afterwards."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def values_of_answers(network: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The summed log-probability of each answer, [S], or its reward."""
    tokens: list[int] = batch[ANSWER_TOKENS]
    inputs = {name: value for name, value in batch.items() if name not in NOT_FOR_MODELS}
    values: torch.Tensor = network(**inputs).values
    if not tokens:  # a batch of no answers: nothing, but with a graph, so that all ranks do the same
        return values.sum() * torch.zeros(0, device=values.device)
    if len(values) == len(tokens) != sum(tokens):
        return values
    return torch.stack([part.sum() for part in values.split(tokens)])


@dataclass
class PreferenceLoss:
    """`compute_loss` of a run, with what was measured since it was last asked."""

    config: PreferenceConfig
    reference: Reference | None
    """To be asked about every batch; None where there is none, or where batches hold what it says."""

    policy: torch.nn.Module
    """The model itself, not what wraps it for training on several processes."""

    precision: torch.dtype
    baseline: float = 0.0
    """KTO: the KL divergence of policy and reference over this optimizer step, never negative."""

    sums: dict[str, Any] = field(default_factory=dict)

    @property
    def has_pairs(self) -> bool:
        return not hasattr(self.config, "desirable_weight")

    def begin_step(self, batches: list[Batch]) -> float:
        """Pairs or labelled answers of an optimizer step, over all processes."""
        answers = sum(len(batch[ANSWER_TOKENS]) for batch in batches)
        self.baseline = self.divergence([take_mismatched(batch) for batch in batches])
        (total,) = sum_over_ranks(float(answers))
        return total / 2 if self.has_pairs else total

    def divergence(self, mismatched: Sequence[Batch]) -> float:
        """Mean log-ratio of mismatched answers over all processes, at least 0: KTO's z0, eq. 8 of arXiv:2402.01306."""
        if self.has_pairs:
            return 0.0
        device = computing_device(self.policy)
        total, count = torch.zeros((), dtype=torch.float64, device=device), 0
        with torch.no_grad(), autocast(device, self.precision), evaluating(self.policy):
            for batch in mismatched:
                answers = self.answers(self.policy, to_device(batch, device))
                total += answers.log_ratios_S.double().sum()
                count += len(answers)
        sums = sum_over_ranks(total.item(), float(count))
        return max(0.0, sums[0] / max(sums[1], 1.0))

    def answers(self, model: torch.nn.Module, batch: Batch) -> Answers:
        """What policy and reference say of a batch."""
        policy_S = values_of_answers(model, batch)
        reference_S = batch[REFERENCE].to(policy_S) if REFERENCE in batch else None
        if self.reference is not None:
            with torch.no_grad(), self.reference.network() as network:
                reference_S = values_of_answers(network, batch)
        tokens_S = torch.tensor(batch[ANSWER_TOKENS], device=policy_S.device, dtype=policy_S.dtype)
        none = torch.ones(len(tokens_S), dtype=torch.bool, device=policy_S.device)
        return Answers(policy_S, reference_S, tokens_S, batch.get(DESIRABLE, none))

    def __call__(self, model: torch.nn.Module, batch: Batch, num_items: torch.Tensor) -> torch.Tensor:
        """The losses of the batch's pairs or answers, summed and divided by `num_items`, those of the whole step."""
        answers = self.answers(model, batch)
        with torch.no_grad():
            found = scores(answers, self.config, self.baseline)
        self.sums["count"] = self.sums.get("count", 0) + len(found["loss"])
        for name in ("accuracy", "margin"):
            self.sums[name] = self.sums.get(name, 0) + found[name].sum()
        return losses(answers, self.config, self.baseline).sum() / num_items

    def take(self) -> dict[str, float]:
        """Accuracy and margin since the last call, over the pairs or answers of all processes; on every process."""
        names = sorted(self.sums)
        found = dict(zip(names, sum_over_ranks(*(float(self.sums[name]) for name in names)), strict=True))
        self.sums = {}
        count = found.pop("count", 0.0)
        return {name: value / count for name, value in found.items()} if count else {}

    def forget_passes(self) -> None:
        self.sums = {}


# --- scores on held-out data


@dataclass(frozen=True)
class ScoredAnswer:
    """What is known of one answer of the test split."""

    source: str
    policy: float
    reference: float | None
    tokens: int
    desirable: bool


def held_out_preferences(
    loss: PreferenceLoss, rows: PackedDataset, to_batch: PreferenceCollate, *, batch_size: int, ranks: Ranks
) -> dict[str, dict[str, float]]:
    """`loss`, `accuracy`, `margin` and `count` over all of `rows`, and of each source; the same on every process.

    Leaves random states, and the model's mode, as they were.
    """
    device = computing_device(loss.policy)
    mine: list[list[ScoredAnswer]] = []
    mismatched: list[Batch] = []
    with torch.no_grad(), autocast(device, loss.precision), evaluating(loss.policy):
        for share in even_shares(len(rows), batch_size=batch_size, rank=ranks.rank, world_size=ranks.world_size):
            packs = [rows[index] for index in share]
            batch = to_batch(packs)
            mismatched.append(take_mismatched(batch))
            sources = [row.source for pack in packs for row in pack if role_of(row) != MISMATCHED]
            mine.append(scored(sources, loss.answers(loss.policy, to_device(batch, device))))
    baseline = loss.divergence(mismatched)
    everyone = [answer for shares in gather_on_all(mine) for batch in shares for answer in batch]
    names = sorted({answer.source for answer in everyone})
    groups = {ALL: everyone, **{name: [one for one in everyone if one.source == name] for name in names}}
    return {name: mean_scores(group, loss.config, baseline) for name, group in groups.items()}


def scored(sources: Sequence[str], answers: Answers) -> list[ScoredAnswer]:
    references = [None] * len(answers) if answers.reference_S is None else answers.reference_S.tolist()
    columns = (answers.policy_S.tolist(), references, answers.tokens_S.tolist(), answers.desirable_S.tolist())
    return [
        ScoredAnswer(source, policy, reference, int(tokens), desirable)
        for source, policy, reference, tokens, desirable in zip(sources, *columns, strict=True)
    ]


def mean_scores(answers: Sequence[ScoredAnswer], config: PreferenceConfig, baseline: float) -> dict[str, float]:
    """Means over pairs or labelled answers, in float64."""
    known = [answer.reference for answer in answers if answer.reference is not None]
    joined = Answers(
        torch.tensor([answer.policy for answer in answers], dtype=torch.float64),
        torch.tensor(known, dtype=torch.float64) if known else None,
        torch.tensor([answer.tokens for answer in answers], dtype=torch.float64),
        torch.tensor([answer.desirable for answer in answers]),
    )
    found = scores(joined, config, baseline)
    means = {name: float(value.mean()) for name, value in found.items()}
    return {**means, "count": len(found["loss"])}
