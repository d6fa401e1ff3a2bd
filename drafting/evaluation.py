"""Scores of a draft on held-out data: loss, accepted guesses by source, and real decoding with and without it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch

from drafting.acceptance import DEFINITION, Acceptance, supervised_at_steps
from drafting.decoding import Choice, Decoded, Greedy, Limits, Sampling, decode_plainly, decode_with_draft
from drafting.features import STATES, cached_states
from drafting.loss import UnrolledLoss
from drafting.model import DraftModel, PackedSamples
from drafting.target import Target
from drafting.vocabulary import FIRST_GUESS
from mixture.shards import TokenRow, TokenRows
from training.batches import IGNORED, Batch, Collate, PackedDataset, even_shares
from training.batches import collate as plain_collate
from training.distributed import Ranks, gather_on_all, sum_over_ranks
from training.evaluation import autocast, to_device
from training.frozen_shards import in_step

MEASURED_DEFINITION = (
    "tokens for each pass of the target, over all prompts together, the target's own token included and the first "
    "token of each answer, which needs no draft, left out; guesses form a chain, no tree"
)
"""What `acceptance_length` means."""


def collate_for_draft(packs: Sequence[list[TokenRow]]) -> Batch:
    """The packs' batch without labels on the first two tokens of a sample, which no draft can guess."""
    batch = plain_collate(packs)
    batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] < FIRST_GUESS, IGNORED)
    return batch


def unrolled_loss(
    draft: torch.nn.Module, target: Target, batch: Batch, *, step_weights: Sequence[float]
) -> UnrolledLoss:
    """What the draft loses on a batch, summed over its supervised tokens, and where it guesses what the target says."""
    states = cached_states(batch[STATES]) if STATES in batch else target.read_batch(batch)
    return draft(
        states.features_1TF,
        target.embed(batch["input_ids"]),
        PackedSamples(batch["position_ids"], batch["cu_seq_lens_q"], batch["max_length_q"]),
        target.teacher(states),
        batch["labels"],
        step_weights,
    )


class AcceptanceLog:
    """The accepted guesses of the batches since the last line of the log."""

    def __init__(self, steps: int):
        self.steps = steps
        self.counted: Acceptance | None = None

    def add(self, result: UnrolledLoss, batch: Batch) -> None:
        counts = Acceptance.of_hits(result.hits_IT, supervised(batch, self.steps))
        self.counted = self.counted + counts if self.counted else counts

    def take(self) -> dict[str, float]:
        """Those of all processes, and forget them."""
        counted = self.counted or Acceptance.none(self.steps)
        self.counted = None
        total = over_ranks(counted)
        return {"acceptance_length": total.simulated_length, "first_guess": total.joint[0]}

    def forget_passes(self) -> None:
        self.counted = None


def supervised(batch: Batch, steps: int) -> torch.Tensor:
    return supervised_at_steps(batch["labels"][0], batch["position_ids"][0], steps=steps)


def over_ranks(acceptance: Acceptance) -> Acceptance:
    """The counts of all processes together, on the CPU."""
    shape = acceptance.counts_3I.shape
    sums = sum_over_ranks(*map(float, acceptance.counts_3I.flatten().tolist()))
    return Acceptance(torch.tensor(sums).round().long().reshape(shape))


# --- told from the true tokens


@dataclass(frozen=True)
class HeldOutAcceptance:
    """Scores on the whole split."""

    loss: float
    """As in training: the mean over supervised tokens of the weighted sum over steps."""

    tokens: int
    by_source: dict[str, Acceptance]

    @property
    def all(self) -> Acceptance:
        first, *others = self.by_source.values()
        return sum(others, first)

    def as_json(self) -> dict[str, Any]:
        """Of evaluation.json; `acceptance_k` is the share of accepted guesses at depth k, all before it accepted."""
        return {
            "loss": self.loss,
            "tokens": self.tokens,
            "simulated_acceptance_length": self.all.simulated_length,
            "definition_of_simulated_acceptance_length": DEFINITION,
            "models": {
                "draft": {name: scores.as_json() for name, scores in {"all": self.all, **self.by_source}.items()}
            },
        }


def held_out_acceptance(
    draft: torch.nn.Module,
    target: Target,
    rows: PackedDataset,
    *,
    step_weights: Sequence[float],
    batch_size: int,
    precision: torch.dtype,
    ranks: Ranks,
    collate: Collate = collate_for_draft,
) -> HeldOutAcceptance:
    """Loss and accepted guesses on all of `rows`, spread over the processes. Leaves the draft's mode as it was."""
    steps = len(step_weights)
    was_training = draft.training
    draft.eval()
    loss = torch.zeros((), dtype=torch.float64, device=target.device)
    tokens = 0
    counts: dict[str, Acceptance] = defaultdict(lambda: Acceptance.none(steps, target.device))
    with torch.no_grad(), autocast(target.device, precision), in_step(target.network):
        for share in even_shares(len(rows), batch_size=batch_size, rank=ranks.rank, world_size=ranks.world_size):
            packs = [rows[index] for index in share]
            if not packs:
                continue
            batch = to_device(collate(packs), target.device)
            result = unrolled_loss(draft, target, batch, step_weights=step_weights)
            loss += result.loss
            tokens += int((batch["labels"] != IGNORED).sum())
            for source, of_source_T in tokens_of_sources(packs, target.device):
                counts[source] += Acceptance.of_hits(result.hits_IT, supervised(batch, steps) & of_source_T)
    draft.train(was_training)
    loss_sum, token_sum = sum_over_ranks(loss.item(), float(tokens))
    if token_sum == 0:
        raise ValueError("the test split has no token that a draft could guess; check the roles of its messages")
    by_rank = gather_on_all({source: of_source.counts_3I.cpu() for source, of_source in counts.items()})
    merged: dict[str, Acceptance] = defaultdict(lambda: Acceptance.none(steps))
    for of_rank in by_rank:
        for source, counts_3I in of_rank.items():
            merged[source] += Acceptance(counts_3I)
    return HeldOutAcceptance(loss_sum / token_sum, int(token_sum), dict(sorted(merged.items())))


def tokens_of_sources(packs: Sequence[list[TokenRow]], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Each source of the packs' samples, and which tokens of their row are its own, bool [T]."""
    samples = [sample for pack in packs for sample in pack]
    names = sorted({sample.source for sample in samples})
    number = torch.tensor([names.index(sample.source) for sample in samples])
    number_T = number.repeat_interleave(torch.tensor([len(sample.input_ids) for sample in samples])).to(device)
    for index, name in enumerate(names):
        yield name, number_T == index


# --- measured


class Prompt(NamedTuple):
    """What is answered: a held-out row up to its first supervised token."""

    source: str
    input_ids: list[int]


def held_out_prompts(rows: TokenRows, *, limit: int) -> list[Prompt]:
    """The first rows of a split that have something before their first answer."""
    prompts = (Prompt(row.source, row.input_ids[: int(row.loss_mask[1:].argmax()) + 1].tolist()) for row in rows)
    return list(islice((prompt for prompt in prompts if len(prompt.input_ids) >= FIRST_GUESS), limit))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A prompt decoded with a draft and without it, in the same way."""

    prompt: Prompt
    plain: Decoded
    drafted: Decoded
    plain_s: float
    drafted_s: float

    @property
    def diverges_at(self) -> int | None:
        """The first token that is not the same; None where all are."""
        # Where one ends first, its last token is a stop that the other has not.
        pairs = zip(self.plain.tokens, self.drafted.tokens, strict=False)
        return next((number for number, (one, other) in enumerate(pairs) if one != other), None)


def measured_acceptance(
    draft: DraftModel,
    target: Target,
    prompts: Sequence[Prompt],
    limits: Limits,
    *,
    chain: int,
    temperature: float,
    seed: int,
    ranks: Ranks,
) -> dict[str, Any]:
    """What evaluation.json holds of real decoding, with the draft and without it, greedily and at a temperature.

    Prompts are spread over the processes; nothing where there are none.
    """

    def answers(choice: Callable[[int], Choice]) -> list[Answer]:
        mine = range(ranks.rank, len(prompts), ranks.world_size)
        with in_step(target.network):
            given = [answer(draft, target, prompts[n], limits, chain=chain, choice=choice(n)) for n in mine]
        return [one for of_rank in gather_on_all(given) for one in of_rank]

    if not prompts:
        return {}
    # Once for nothing: the first tokens of a process cost more time than all others.
    with in_step(target.network):
        answer(draft, target, prompts[0], replace(limits, max_new_tokens=4), chain=chain, choice=Greedy())
    greedy = answers(lambda number: Greedy())
    sampled = answers(lambda number: Sampling(temperature, torch.Generator().manual_seed(seed + number)))
    different = divergences(greedy)
    return {
        "chain": chain,
        "decoded_prompts": len(greedy),
        "acceptance_length": acceptance_length(greedy),
        "definition_of_acceptance_length": MEASURED_DEFINITION,
        "acceptance_length_by_source": acceptance_lengths(greedy),
        "speedup": speedup(greedy),
        "sampling_temperature": temperature,
        "sampling_acceptance_length": acceptance_length(sampled),
        "sampling_acceptance_length_by_source": acceptance_lengths(sampled),
        "sampling_speedup": speedup(sampled),
        "identical_greedy_answers": len(greedy) - len(different),
        "divergences": different,
    }


def answer(draft: DraftModel, target: Target, prompt: Prompt, limits: Limits, *, chain: int, choice: Choice) -> Answer:
    """A prompt answered by the target alone and with the draft."""
    started_s = time.perf_counter()
    plain = decode_plainly(target, prompt.input_ids, choice, limits)
    plain_s = time.perf_counter() - started_s
    drafted = decode_with_draft(target, draft, prompt.input_ids, choice, limits, chain=chain)
    drafted_s = time.perf_counter() - started_s - plain_s
    return Answer(prompt=prompt, plain=plain, drafted=drafted, plain_s=plain_s, drafted_s=drafted_s)


def acceptance_length(answers: Sequence[Answer]) -> float:
    """Tokens for each pass of the target; see MEASURED_DEFINITION."""
    passes = sum(answer.drafted.passes for answer in answers)
    return sum(answer.drafted.tokens_of_passes for answer in answers) / max(passes, 1)


def acceptance_lengths(answers: Sequence[Answer]) -> dict[str, float]:
    """`acceptance_length` of each source."""
    sources = sorted({answer.prompt.source for answer in answers})
    return {
        source: acceptance_length([answer for answer in answers if answer.prompt.source == source])
        for source in sources
    }


def speedup(answers: Sequence[Answer]) -> float:
    """How many times faster tokens come with the draft."""
    plain = sum(answer.plain_s for answer in answers) / sum(len(answer.plain.tokens) for answer in answers)
    drafted = sum(answer.drafted_s for answer in answers) / sum(len(answer.drafted.tokens) for answer in answers)
    return plain / drafted


def divergences(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Where greedy answers with the draft are not the target's own, and how near its two best tokens were there."""
    return [
        {"source": answer.prompt.source, "token": token, "logit_margin": answer.plain.margins[token]}
        for answer in answers
        if (token := answer.diverges_at) is not None
    ]
