"""Attention inside each packed sample only: the implementation `varlen` for transformers, without any mask.

A pack is one flat row; `cu_seq_lens_q` says where its samples begin and end. On CUDA one kernel reads those boundaries,
elsewhere each sample is attended by itself. Without boundaries (generation, one plain row) it is what `sdpa` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Tensors are named by shape. B rows, H heads, K key/value heads, T tokens, D width of a head, S samples.

_LARGEST_KERNEL_HEAD = 256
_PACKABLE_LAYERS = {"full_attention", "sliding_attention"}


def register_varlen_attention() -> None:
    """Makes `attn_implementation="varlen"` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register("varlen", varlen_attention)
    AttentionMaskInterface.register("varlen", varlen_mask)


def check_packable(model: PreTrainedModel) -> None:
    """Raises ValueError where samples of one pack would see each other: layers that `varlen` cannot separate."""
    name = type(model).__name__
    advice = "Set dataset.packing: false and model.attention: sdpa."
    if not model._supports_attention_backend:
        raise ValueError(
            f"{name} does not hand sample boundaries to its attention, so model.attention: varlen cannot work. {advice}"
        )
    text_config = model.config.get_text_config()
    foreign_layers = set(getattr(text_config, "layer_types", None) or ()) - _PACKABLE_LAYERS
    if foreign_layers:
        raise ValueError(
            f"{name} has layers of kind {', '.join(sorted(foreign_layers))}; model.attention: varlen separates "
            f"packed samples only in {' and '.join(sorted(_PACKABLE_LAYERS))}. {advice}"
        )
    if getattr(text_config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"{name} caps its attention scores (attn_logit_softcapping), which model.attention: varlen cannot. "
            "Set dataset.packing: false and model.attention: eager."
        )


def varlen_mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    **arguments: Any,
) -> torch.Tensor | None:
    """The mask for `varlen`: none where boundaries or causal order say it all, else the one `sdpa` would get."""
    if attention_mask is None and q_length == kv_length and not use_vmap:
        return None
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, use_vmap=use_vmap, **arguments
    )


def varlen_attention(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each sample to itself, [B, T, H, D].

    Raises ValueError for what the kernels cannot do: score capping, sinks, dropout, a mask beside the boundaries.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = sliding_window if causal else None
    num_tokens, num_keys = query_BHTD.shape[2], key_BKTD.shape[2]

    if cu_seq_lens_q is None:
        if attention_mask is None and window is not None and num_tokens == num_keys > window:
            attention_mask = window_mask(num_tokens, window, query_BHTD.device)
        return sdpa_attention_forward(
            module, query_BHTD, key_BKTD, value_BKTD, attention_mask, dropout, scaling, is_causal, **arguments
        )

    _check_packed_call(module, query_BHTD, attention_mask, dropout, arguments)
    if has_varlen_kernel(query_BHTD):
        assert max_length_q is not None, "cu_seq_lens_q came without max_length_q"
        out_BTHD = _attend_by_kernel(
            query_BHTD, key_BKTD, value_BKTD, cu_seq_lens_q, max_length_q, causal, window, scaling
        )
    else:
        out_BTHD = _attend_by_sample(
            query_BHTD, key_BKTD, value_BKTD, cu_seq_lens_q.diff().tolist(), causal, window, scaling
        )
    return out_BTHD, None


def _check_packed_call(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    arguments: dict[str, Any],
) -> None:
    layer = type(module).__name__
    if query_BHTD.shape[0] != 1:
        raise ValueError(f"packed samples come as one flat row, got a batch of {query_BHTD.shape[0]} rows")
    if attention_mask is not None:
        raise ValueError(
            f"{layer} was given a mask beside the boundaries of packed samples; set dataset.packing: false "
            "and model.attention: sdpa"
        )
    if dropout:
        raise ValueError(
            f"{layer} drops attention weights ({dropout}), which model.attention: varlen cannot; set "
            "attention_dropout to 0 in the model's config, or model.attention: sdpa and dataset.packing: false"
        )
    for argument, meaning in (
        ("softcap", "caps its scores"),
        ("s_aux", "has attention sinks"),
        ("position_bias", "biases its scores"),
    ):
        if arguments.get(argument) is not None:
            raise ValueError(
                f"{layer} {meaning}, which model.attention: varlen cannot; set dataset.packing: false and "
                "model.attention: eager"
            )


def has_varlen_kernel(query: torch.Tensor) -> bool:
    """Whether the flash kernel takes these tensors: half precision, heads up to 256 wide, Ampere (2020) or later."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= _LARGEST_KERNEL_HEAD
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _attend_by_kernel(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    causal: bool,
    window: int | None,
    scaling: float | None,
) -> torch.Tensor:
    # Heads of unequal width (multi-head latent attention) are padded with zeros, which change no score and no sum.
    value_width = value_BKTD.shape[-1]
    value_BKTD = pad(value_BKTD, (0, query_BHTD.shape[-1] - value_width))
    out_THD = varlen_attn(
        query_BHTD[0].transpose(0, 1),
        key_BKTD[0].transpose(0, 1),
        value_BKTD[0].transpose(0, 1),
        cu_seq_lens,
        cu_seq_lens,
        max_length,
        max_length,
        scale=scaling,
        # The kernel counts the keys to the left of the query; transformers counts the query too.
        window_size=(-1 if window is None else window - 1, 0 if causal else -1),
        enable_gqa=query_BHTD.shape[1] != key_BKTD.shape[1],
    )
    assert isinstance(out_THD, torch.Tensor)
    return out_THD[None, ..., :value_width]


def _attend_by_sample(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    lengths: list[int],
    causal: bool,
    window: int | None,
    scaling: float | None,
) -> torch.Tensor:
    grouped = query_BHTD.shape[1] != key_BKTD.shape[1]
    # split, not slices: a split's gradient is one concatenation, a slice's a zero tensor as long as the pack.
    samples = zip(*(tensor.split(lengths, dim=2) for tensor in (query_BHTD, key_BKTD, value_BKTD)), strict=True)
    out_BTHD = []
    for length, (query, key, value) in zip(lengths, samples, strict=True):
        mask = None if window is None or length <= window else window_mask(length, window, query.device)
        out = scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal and mask is None, scale=scaling, enable_gqa=grouped
        )
        out_BTHD.append(out.transpose(1, 2))
    return torch.cat(out_BTHD, dim=1)


def window_mask(num_tokens: int, window: int, device: torch.device) -> torch.Tensor:
    """Boolean [T, T]: which keys a query sees, itself and the `window - 1` before it."""
    all_pairs = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device)
    return all_pairs.tril().triu(1 - window)
