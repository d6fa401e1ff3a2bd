"""Decoding with a draft: it guesses a chain of tokens, one pass of the target accepts a part and adds a token.

What comes out is what the target alone would have said: the same tokens where it is greedy, the same distribution where
it samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import DynamicCache

from drafting.model import DraftCache, DraftModel
from drafting.target import Target, TargetStates

# Tensors are named by shape. K guesses of a chain, V target vocabulary, D draft vocabulary.


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Where an answer ends."""

    max_new_tokens: int
    stop_ids: frozenset[int]

    def cut(self, tokens: Sequence[int]) -> tuple[list[int], bool]:
        """The tokens up to the first stop or the most that are allowed, and whether they end there."""
        kept = list(tokens[: self.max_new_tokens])
        for number, token in enumerate(kept):
            if token in self.stop_ids:
                return kept[: number + 1], True
        return kept, len(kept) == self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """An answer, and what it took."""

    tokens: list[int]
    passes: int
    """Of the target after the prompt's, which gives the first token."""

    margins: list[float]
    """How far the most probable token's logit lies above the second's at each token; empty where a draft helped."""

    @property
    def tokens_of_passes(self) -> int:
        """All but the first token, which no draft could have guessed."""
        return len(self.tokens) - 1


class Choice(Protocol):
    """How tokens are chosen from logits, and which guesses are kept."""

    def first(self, logits_V: torch.Tensor) -> int:
        """A token of the target."""

    def guess(self, logits_D: torch.Tensor) -> tuple[int, torch.Tensor | None]:
        """A token of the draft, and the probabilities that it was drawn from, if it was drawn."""

    def accept(self, guesses: Sequence[int], drawn_from: Sequence[torch.Tensor], logits_KV: torch.Tensor) -> list[int]:
        """The guesses that are kept and the target's token behind them: 1 to K + 1 tokens, for K + 1 rows of logits.

        `drawn_from`: for each guess that was drawn its probabilities, over the target's vocabulary.
        """


class Greedy:
    """The most probable token, always."""

    def first(self, logits_V: torch.Tensor) -> int:
        return int(logits_V.argmax())

    def guess(self, logits_D: torch.Tensor) -> tuple[int, torch.Tensor | None]:
        return int(logits_D.argmax()), None

    def accept(self, guesses: Sequence[int], drawn_from: Sequence[torch.Tensor], logits_KV: torch.Tensor) -> list[int]:
        tokens: list[int] = logits_KV.argmax(-1).tolist()
        agreed = next((number for number, guess in enumerate(guesses) if guess != tokens[number]), len(guesses))
        return tokens[: agreed + 1]


class Sampling:
    """Tokens drawn at a temperature; guesses are kept so that the target's distribution stays (arXiv:2211.17192)."""

    def __init__(self, temperature: float, generator: torch.Generator):
        self.temperature = temperature
        self.generator = generator

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """In float32 on the CPU, where the generator is."""
        return (logits.float() / self.temperature).softmax(-1).cpu()

    def draw(self, probabilities: torch.Tensor) -> int:
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def first(self, logits_V: torch.Tensor) -> int:
        return self.draw(self.probabilities(logits_V))

    def guess(self, logits_D: torch.Tensor) -> tuple[int, torch.Tensor | None]:
        probabilities_D = self.probabilities(logits_D)
        return self.draw(probabilities_D), probabilities_D

    def accept(self, guesses: Sequence[int], drawn_from: Sequence[torch.Tensor], logits_KV: torch.Tensor) -> list[int]:
        target = self.probabilities(logits_KV)
        for number, (guess, q_V) in enumerate(zip(guesses, drawn_from, strict=True)):
            p_V = target[number]
            if torch.rand((), generator=self.generator) * q_V[guess] < p_V[guess]:
                continue
            return [*guesses[:number], self.draw((p_V - q_V).clamp(min=0))]
        return [*guesses, self.draw(target[len(guesses)])]


@torch.no_grad()
def decode_plainly(target: Target, prompt: Sequence[int], choice: Choice, limits: Limits) -> Decoded:
    """The target alone, a token at a time."""
    cache = DynamicCache()
    tokens: list[int] = []
    margins: list[float] = []
    given, is_over = list(prompt), False
    while not is_over:
        states = target.read(torch.tensor([given], device=target.device), past_key_values=cache)
        logits_V = target.logits(states.last_1TH[:, -1:])[0, 0]
        first, second = logits_V.float().topk(2).values.tolist()
        margins.append(first - second)
        given = [choice.first(logits_V)]
        tokens, is_over = limits.cut([*tokens, *given])
    return Decoded(tokens=tokens, passes=len(tokens) - 1, margins=margins)


@torch.no_grad()
def decode_with_draft(
    target: Target,
    draft: DraftModel,
    prompt: Sequence[int],
    choice: Choice,
    limits: Limits,
    *,
    chain: int,
) -> Decoded:
    """The target with a draft that guesses `chain` tokens ahead of each of its passes."""
    target_cache = DynamicCache()
    drafter = ChainDrafter(target, draft)
    states = target.read(torch.tensor([list(prompt)], device=target.device), past_key_values=target_cache)
    text = [*prompt, choice.first(target.logits(states.last_1TH[:, -1:])[0, 0])]
    drafter.take_up(states, text)
    tokens, is_over = limits.cut(text[len(prompt) :])
    passes = 0
    while not is_over:
        guesses, drawn_from = drafter.guess(choice, chain)
        given = torch.tensor([[text[-1], *guesses]], device=target.device)
        states = target.read(given, past_key_values=target_cache)
        accepted = choice.accept(guesses, drawn_from, target.logits(states.last_1TH)[0])
        passes += 1
        text += accepted
        # All but the newest token have been read by the target now; what it read of other guesses is forgotten.
        refused = 1 + len(guesses) - len(accepted)
        if refused:
            target_cache.crop(-refused)
        drafter.take_up(first_tokens(states, len(accepted)), text)
        tokens, is_over = limits.cut(text[len(prompt) :])
    return Decoded(tokens=tokens, passes=passes, margins=[])


def first_tokens(states: TargetStates, number: int) -> TargetStates:
    return TargetStates(states.features_1TF[:, :number], states.last_1TH[:, :number])


class ChainDrafter:
    """A draft in the middle of one text."""

    def __init__(self, target: Target, draft: DraftModel):
        self.target = target
        self.draft = draft
        self.cache = DraftCache()
        self.hidden_11H: torch.Tensor | None = None

    def take_up(self, states: TargetStates, text: Sequence[int]) -> None:
        """What the target computed of further tokens of `text`, up to all but the last one."""
        start = self.cache.length
        fused = self.draft.fuse(states.features_1TF)
        embeddings = self.embed(text[start + 1 :])
        self.hidden_11H = self.draft.extend(fused, embeddings, start, self.cache)[:, -1:]

    def guess(self, choice: Choice, chain: int) -> tuple[list[int], list[torch.Tensor]]:
        """Tokens that may follow the text, and what each was drawn from, over the target's vocabulary."""
        assert self.hidden_11H is not None
        known, hidden = self.cache.length, self.hidden_11H
        guesses: list[int] = []
        drawn_from: list[torch.Tensor] = []
        for number in range(chain):
            if number:
                hidden = self.draft.extend(hidden, self.embed(guesses[-1:]), known + number - 1, self.cache)
            guess, probabilities_D = choice.guess(self.draft.logits(hidden)[0, 0])
            if probabilities_D is not None:
                drawn_from.append(probabilities_D.new_zeros(len(self.target.head_VH)))
                drawn_from[-1][self.target.draft_ids_D.to(probabilities_D.device)] = probabilities_D
            guesses.append(int(self.target.draft_ids_D[guess]))
        self.cache.crop(known)
        return guesses, drawn_from

    def embed(self, tokens: Sequence[int]) -> torch.Tensor:
        return self.target.embed(torch.tensor([list(tokens)], device=self.target.device))
