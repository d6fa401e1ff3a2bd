"""Attention of a draft that looks at its own guesses: the prefix as the target saw it, and one key more per step.

At step i the query at index p sees the keys of step 0 up to p, in its own sample, and of each later step only the one
at p: exactly what the cache holds after a chain of i guesses from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

# Tensors are named by shape. H heads, K key/value heads, G heads that share one, T tokens of all samples, t queries of
# a block, S keys before the end of that block, D width of a head, J steps since the first.

_BLOCK_QUERIES = 512


def attend_to_guesses(
    query_1HTD: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    *,
    lengths: Sequence[int],
    scaling: float,
) -> torch.Tensor:
    """Attention at a step after the first, [1, H, T, D]. `keys` and `values` are [1, K, T, D], one for each step.

    Scores are made anew in the backward pass, a block of queries at a time, so none of [T, T] are ever kept.
    """
    num_keys = keys[0].shape[1]
    grouped = query_1HTD[0].unflatten(0, (num_keys, -1))
    samples = zip(
        grouped.split(list(lengths), dim=2),
        *(tensor[0].split(list(lengths), dim=1) for tensor in (*keys, *values)),
        strict=True,
    )
    blocks = []
    for length, (query_KGTD, *others) in zip(lengths, samples, strict=True):
        keys_KTD, values_KTD = others[: len(keys)], others[len(keys) :]
        for start in range(0, length, _BLOCK_QUERIES):
            block = slice(start, min(start + _BLOCK_QUERIES, length))
            arguments = (
                query_KGTD[:, :, block],
                keys_KTD[0][:, : block.stop],
                values_KTD[0][:, : block.stop],
                torch.stack([key[:, block] for key in keys_KTD[1:]], dim=2),
                torch.stack([value[:, block] for value in values_KTD[1:]], dim=2),
                scaling,
            )
            blocks.append(checkpoint(attend_block, *arguments, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(blocks, dim=2).flatten(0, 1)[None]


def attend_block(
    query_KGtD: torch.Tensor,
    prefix_key_KSD: torch.Tensor,
    prefix_value_KSD: torch.Tensor,
    guess_key_KtJD: torch.Tensor,
    guess_value_KtJD: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """The last t of S queries: softmax over their prefix and over their own J guesses at once, [K, G, t, D]."""
    num_queries, num_keys = query_KGtD.shape[2], prefix_key_KSD.shape[1]
    prefix_KGtS = query_KGtD @ prefix_key_KSD[:, None].mT
    guess_KGtJ = torch.einsum("kgtd,ktjd->kgtj", query_KGtD, guess_key_KtJD)
    wide = torch.promote_types(query_KGtD.dtype, torch.float32)
    scores_KGtA = torch.cat([prefix_KGtS, guess_KGtJ], dim=-1).to(wide) * scaling
    visible_tS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_KGtD.device).tril(
        num_keys - num_queries
    )
    visible_tA = pad(visible_tS, (0, guess_KGtJ.shape[-1]), value=True)
    weights_KGtA = scores_KGtA.masked_fill(~visible_tA, -torch.inf).softmax(dim=-1).to(prefix_value_KSD.dtype)
    prefix_KGtD = weights_KGtA[..., :num_keys] @ prefix_value_KSD[:, None]
    return prefix_KGtD + torch.einsum("kgtj,ktjd->kgtd", weights_KGtA[..., num_keys:], guess_value_KtJD)
