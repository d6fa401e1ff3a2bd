"""What training a draft holds on its device, told from the target's config.json: no torch, so that a login node can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drafting.config import NUM_FEATURES, count_draft_parameters
from training.chunks import tokens_per_chunk

BYTES_PER_TRAINED_PARAMETER = 4 * 4
"""Weight, gradient and both moments of AdamW, float32."""


@dataclass(frozen=True, kw_only=True)
class DraftMemory:
    """Bytes on one device at the peak of an optimizer step, without what the device's libraries take themselves."""

    target: int
    """Weights of the target that are on the device."""

    draft: int
    """Weights, gradients and optimizer."""

    activations: int
    """What is kept for the backward pass, of all steps, and what the target computed."""

    logits: int
    """Of both sides, a chunk at a time."""

    @property
    def total(self) -> int:
        return self.target + self.draft + self.activations + self.logits


def draft_memory(
    target: Mapping[str, Any],
    *,
    target_parameters: int,
    draft_vocabulary: int,
    steps: int,
    tokens: int,
    number_bytes: int,
    recomputes_steps: bool,
    device_type: str = "cuda",
) -> DraftMemory:
    """The peak for micro-batches of so many tokens. KeyError where `target`, the values of its config.json, lacks one.

    `target_parameters`: those of the target that are on the device. `number_bytes`: 4 or 2, of the forward pass.
    `recomputes_steps`: training.gradient_checkpointing. All tokens count as supervised.
    """
    hidden, vocabulary = target["hidden_size"], target["vocab_size"]
    draft_vocabulary = min(draft_vocabulary, vocabulary)
    is_narrow = number_bytes < 4
    guesses = min(
        tokens_per_chunk(draft_vocabulary, hidden, device_type=device_type),
        tokens_per_chunk(vocabulary, hidden, device_type=device_type) * steps,
        tokens * steps,
    )
    # Probabilities of both sides in float32, and logits and gradient in the numbers of the forward pass beside them.
    chunk = guesses * draft_vocabulary * (3 * 4 + (2 * number_bytes if is_narrow else 0))
    target_chunk = -(-guesses // steps) * (vocabulary * number_bytes + draft_vocabulary * (number_bytes + 4))
    head_gradient = draft_vocabulary * hidden * 4
    return DraftMemory(
        target=target_parameters * number_bytes,
        draft=count_draft_parameters(target, draft_vocabulary=draft_vocabulary) * BYTES_PER_TRAINED_PARAMETER,
        activations=tokens * bytes_kept_of_token(target, steps, number_bytes, recomputes_steps=recomputes_steps),
        logits=chunk + target_chunk + head_gradient,
    )


def bytes_kept_of_token(target: Mapping[str, Any], steps: int, number_bytes: int, *, recomputes_steps: bool) -> int:
    """What all steps keep of a token for the backward pass, and what the target computed of it."""
    hidden, keys_and_values = target["hidden_size"], 2 * key_value_width(target)
    # Features, their sum, the target's last hidden state, and the embedding, as it is and padded.
    given = (NUM_FEATURES + 1 + 1 + 2) * hidden
    # The hidden states of all steps: in a row, normed (in float32), those that count, and their gradient.
    before_head = steps * hidden * (4 * number_bytes + (4 if number_bytes < 4 else 0))
    of_step = bytes_kept_of_step(target, number_bytes)
    if recomputes_steps:
        return of_step + steps * (hidden + keys_and_values) * number_bytes + given * number_bytes + before_head
    # Each step holds copies of the keys and values of those between the first and itself.
    copies = steps * (steps - 1) // 2 * keys_and_values
    return steps * of_step + (copies + given) * number_bytes + before_head


def bytes_kept_of_step(target: Mapping[str, Any], number_bytes: int) -> int:
    """What one step keeps of a token for the backward pass."""
    hidden, inner = target["hidden_size"], target["intermediate_size"]
    queries = target["num_attention_heads"] * head_width(target)
    # Both inputs side by side; queries, what they attended to, and that once more for the projection behind it; keys
    # and values; the residual before and behind the attention, and its norm; the four of the gated part.
    numbers = 2 * hidden + 3 * queries + 2 * key_value_width(target) + 3 * hidden + 4 * inner
    wide = 3 * hidden * 4 if number_bytes < 4 else 0  # what the three norms see, in float32
    return int(numbers * number_bytes + wide)


def head_width(target: Mapping[str, Any]) -> int:
    return int(target.get("head_dim") or target["hidden_size"] // target["num_attention_heads"])


def key_value_width(target: Mapping[str, Any]) -> int:
    """Values in the keys of a token."""
    return int(target.get("num_key_value_heads") or target["num_attention_heads"]) * head_width(target)
