"""Losses of a language model's head, computed in chunks: logits of [tokens, vocabulary] never exist.

`use_chunked_loss` gives a causal language model this loss inside its own forward, so adapters, DDP and FSDP work.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from training.chunks import tokens_per_chunk

# Tensors are named by shape. B rows, T tokens, N supervised tokens, H hidden width, V vocabulary.

IGNORED = -100


@dataclass(frozen=True)
class LogitShape:
    """What a model does to its logits after the head: `softcap * tanh(scale * logits / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None


PLAIN_LOGITS = LogitShape()


class Head(NamedTuple):
    """The output head's parameters, [V, H] and [V]."""

    weight: torch.Tensor
    bias: torch.Tensor | None


ChunkLoss = Callable[[torch.Tensor, slice, bool], tuple[torch.Tensor, torch.Tensor | None]]
"""Takes the head's outputs for a slice of the tokens, which it may overwrite, and whether a gradient is wanted. Gives
sums over these tokens, and the gradient of the first by the outputs; both in float32 or wider."""


def linear_cross_entropy(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    shape: LogitShape | None = None,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Sum of the cross entropies of `hidden @ weight.T + bias` against `targets`, in nats."""

    def chunk_loss(
        outputs_NV: torch.Tensor, chunk: slice, wants_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _cross_entropy_and_gradient(outputs_NV, targets_N[chunk], shape or LogitShape(), wants_gradient)

    return linear_loss(hidden_NH, Head(weight_VH, bias_V), chunk_loss, chunk_tokens)[0]


def linear_loss(
    hidden_NH: torch.Tensor, head: Head, chunk_loss: ChunkLoss, chunk_tokens: int | None = None
) -> torch.Tensor:
    """The sums that `chunk_loss` makes of the head's outputs, over all tokens; only the first has a gradient.

    Multiplies in the autocast dtype where autocast is on, else in the weight's. Gradients are made in the forward
    pass, chunk by chunk: no outputs are kept and none are computed twice.
    """
    if chunk_tokens is None:
        chunk_tokens = tokens_per_chunk(*head.weight.shape, device_type=hidden_NH.device.type)
    if not torch.is_grad_enabled():
        hidden_NH = hidden_NH.detach()
        head = Head(head.weight.detach(), None if head.bias is None else head.bias.detach())
    sums: torch.Tensor = _LinearLoss.apply(hidden_NH, *head, chunk_loss, chunk_tokens)
    return sums


def linear_log_probabilities(
    hidden_NH: torch.Tensor,
    head: Head,
    targets_N: torch.Tensor,
    shape: LogitShape = PLAIN_LOGITS,
    chunk_tokens: int | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The log-probability of each target, [N], in nats; every one of them may have a gradient of its own.

    Of the distribution that is sampled at `temperature`. The logits of a chunk are forgotten and computed again in the
    backward pass.
    """
    if chunk_tokens is None:
        chunk_tokens = tokens_per_chunk(*head.weight.shape, device_type=hidden_NH.device.type)
    parts = [
        checkpoint(
            _log_probabilities, hidden, *head, targets, shape, temperature,
            use_reentrant=False, preserve_rng_state=False,
        )
        for hidden, targets in zip(hidden_NH.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True)
    ]  # fmt: skip
    return torch.cat(parts)


def _log_probabilities(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    shape: LogitShape,
    temperature: float,
) -> torch.Tensor:
    logits_NV = shape_logits(linear(hidden_NH.to(weight_VH.dtype), weight_VH, bias_V), shape)
    sum_dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    if temperature != 1:
        logits_NV = logits_NV.to(sum_dtype) / temperature
    chosen_N1 = logits_NV.gather(1, targets_N[:, None]).to(sum_dtype)
    return chosen_N1.squeeze(1) - logits_NV.to(sum_dtype).logsumexp(-1)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        chunk_loss: ChunkLoss,
        chunk_tokens: int,
    ) -> torch.Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dtype = product_dtype(weight_VH)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        weight = weight_VH.to(dtype)
        bias = None if bias_V is None else bias_V.to(dtype)
        sums = torch.zeros((), dtype=sum_dtype, device=hidden_NH.device)
        grad_hidden = torch.empty_like(hidden_NH) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_VH, dtype=sum_dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=sum_dtype) if wants_bias and bias_V is not None else None

        with torch.autocast(hidden_NH.device.type, enabled=False):
            # No tokens at all are one empty chunk.
            for start in range(0, max(len(hidden_NH), 1), chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                hidden = hidden_NH[chunk].to(dtype)
                chunk_sums, grad_outputs = chunk_loss(linear(hidden, weight, bias), chunk, any(ctx.needs_input_grad))
                sums = sums + chunk_sums
                if grad_outputs is None:
                    continue
                if grad_bias is not None:
                    grad_bias += grad_outputs.sum(0)
                grad_outputs = grad_outputs.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = grad_outputs @ weight
                if grad_weight is not None:
                    _add_product(grad_weight, grad_outputs.t(), hidden)

        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VH.dtype),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
        )
        return sums

    @staticmethod
    def backward(ctx: Any, grad_sums: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = (None if saved is None else saved * grad_sums[0].to(saved.dtype) for saved in ctx.saved_tensors)
        return (*gradients, None, None)


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype that products with this weight are made in."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


def _cross_entropy_and_gradient(
    outputs_NV: torch.Tensor, targets_N: torch.Tensor, shape: LogitShape, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    logits_NV = shape_logits(outputs_NV, shape)
    sum_dtype = torch.promote_types(outputs_NV.dtype, torch.float32)
    log_probabilities = torch.log_softmax(logits_NV, dim=-1, dtype=sum_dtype)
    loss = -log_probabilities.gather(1, targets_N[:, None]).sum()[None]
    if not wants_gradient:
        return loss, None
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, targets_N[:, None], gradient.new_full((len(targets_N), 1), -1.0))
    return loss, gradient_by_outputs(gradient, logits_NV, shape)


def shape_logits(outputs: torch.Tensor, shape: LogitShape) -> torch.Tensor:
    """The logits that a model makes of its head's outputs; in float32 or wider where they are not the same."""
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    if shape.scale != 1:
        outputs = outputs.to(dtype) * shape.scale
    if shape.softcap is not None:
        outputs = torch.tanh(outputs.to(dtype) / shape.softcap) * shape.softcap
    return outputs


def gradient_by_outputs(gradient: torch.Tensor, logits: torch.Tensor, shape: LogitShape) -> torch.Tensor:
    """Turns a gradient by the logits into that by the head's outputs; both arguments are overwritten."""
    if shape.softcap is not None:
        gradient.mul_(logits.div_(shape.softcap).square_().neg_().add_(1))
    if shape.scale != 1:
        gradient.mul_(shape.scale)
    return gradient


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds left @ right to `total`, which may be wider than the product's dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


@dataclass(frozen=True)
class SupervisedPlaces:
    """Where a batch predicts a token that counts: the flat positions, [N], and the tokens to be predicted, [N]."""

    index: torch.Tensor
    targets: torch.Tensor


def supervised_places(labels_BT: torch.Tensor) -> SupervisedPlaces:
    """The places whose next token is a label."""
    targets = pad(labels_BT[:, 1:], (0, 1), value=IGNORED).flatten()
    index = (targets != IGNORED).nonzero().squeeze(1)
    return SupervisedPlaces(index, targets[index])


def causal_loss(
    hidden_BTH: torch.Tensor,
    head: Head,
    labels_BT: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shape: LogitShape | None = None,
) -> torch.Tensor:
    """Next-token loss of rows of hidden states: token t is scored against label t + 1; labels of -100 are skipped.

    Summed and divided by `num_items_in_batch`, or by the supervised tokens of these rows; 0 where there are none.
    """
    places = supervised_places(labels_BT.to(hidden_BTH.device))
    total = linear_cross_entropy(
        hidden_BTH.flatten(0, 1).index_select(0, places.index), head.weight, places.targets, head.bias, shape
    )
    if num_items_in_batch is None:
        return total / max(len(places.targets), 1)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / max(num_items_in_batch, 1)


def use_chunked_loss(model: PreTrainedModel) -> None:
    """Makes the model's forward compute its loss in chunks and return no logits when it is given labels.

    Without labels the forward is the model's own. Call it before or after adapters are added to the model.
    Raises ValueError for a model whose logits are not a (scaled, capped) linear head on its decoder's output.
    """
    check_logits(model)

    # The class's forward lends its signature: Trainer reads from it which columns the model takes.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is None:
            return type(self).forward(self, *args, **kwargs)
        return _forward_with_loss(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
    # Read by Trainer, which then passes num_items_in_batch.
    model.accepts_loss_kwargs = True


def _forward_with_loss(
    model: PreTrainedModel,
    *args: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> CausalLMOutputWithPast | tuple[Any, ...]:
    if kwargs.pop("output_router_logits", None) or getattr(model.config, "output_router_logits", False):
        raise ValueError(
            "the router's auxiliary loss is not computed here; set output_router_logits: false in the model's config"
        )
    kwargs.pop("logits_to_keep", None)
    outputs = model.base_model(*args, **{"use_cache": False, **kwargs})
    loss = causal_loss(outputs[0], output_head(model), labels, num_items_in_batch, logit_shape(model))
    output = CausalLMOutputWithPast(
        loss=loss,
        past_key_values=outputs.get("past_key_values"),
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
    )
    return output.to_tuple() if return_dict is False else output


def output_head(model: PreTrainedModel) -> Head:
    """The head as it is now: plain, or the trained copy that peft's `modules_to_save` keeps. Else ValueError."""
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):
        trained = head.active_adapters and not head.disable_adapters
        head = head.modules_to_save[head.active_adapters[0]] if trained else head.original_module
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise ValueError(
            f"the output head of {type(model).__name__} is {type(head).__name__}, not a plain linear layer. Leave it "
            "out of target_modules and out of quantisation; to train it, name it in modules_to_save"
        )
    whole, held = (head.out_features, head.in_features), tuple(head.weight.shape)
    if held != whole:
        raise ValueError(
            f"the weight of the output head has shape {held} here, not {whole}: it is partitioned across processes "
            "(DeepSpeed ZeRO-3), which the chunked loss does not support. Use FSDP or ZeRO-2"
        )
    return Head(head.weight, head.bias)


def logit_shape(model: PreTrainedModel) -> LogitShape:
    """The scale and cap on the logits that the model's config names (Cohere, Granite, Gemma)."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return LogitShape(scale=scale / divisor, softcap=getattr(config, "final_logit_softcapping", None))


class _HiddenStates(BaseModelOutputWithPast):
    """Output of a decoder that has nothing but hidden states."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> None:
    """Raises ValueError unless the model's own forward makes the logits that a chunked loss is about to assume."""
    head, shape = output_head(model), logit_shape(model)
    if head.weight.is_meta:
        return
    positions = torch.arange(2 * head.weight.shape[1], device=head.weight.device, dtype=torch.float32)
    hidden_BTH = positions.sin().view(1, 2, -1).to(head.weight.dtype)
    expected = shape_logits(linear(hidden_BTH, *head), shape)
    tokens_BT = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    # Most models call their base model, some (OPT) its decoder.
    decoders = {model.base_model, model.get_decoder()} - {model}
    for decoder in decoders:
        decoder.forward = lambda *args, **kwargs: _HiddenStates(last_hidden_state=hidden_BTH)
    try:
        logits = type(model).forward(model, input_ids=tokens_BT).logits
    finally:
        for decoder in decoders:
            del decoder.forward
    # bfloat16 rounds to 8 bits; a scale or cap that was missed shows as far more than 2 %.
    if not torch.allclose(logits.float(), expected.float(), rtol=0.02, atol=0.02 * expected.abs().max().item()):
        raise ValueError(
            f"{type(model).__name__} does more to its logits than a linear head, a scale and a cap; the chunked loss "
            "cannot train it"
        )
