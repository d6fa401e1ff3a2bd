"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): the ranks of its updates are allocated anew after optimizer steps.

peft allocates; here the chain's length becomes the schedule, what the allocator remembers survives a block's end, and
the penalty that keeps the updates orthogonal is added once per optimizer step, where peft adds it to every loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

ALLOCATOR = "rank_allocator."
MEMORIES = ("exp_avg_ipt", "exp_avg_unc")


def placeholder_steps(options: Mapping[str, Any]) -> int:
    """A length that peft accepts until `set_length` tells the chain's."""
    return options.get("tinit", 0) + options.get("tfinal", 0) + 1


def has_rank_allocator(model: nn.Module) -> bool:
    return getattr(getattr(model, "base_model", None), "rankallocator", None) is not None


def leave_loss_alone(adapted: Any) -> None:
    """Keep peft from adding the penalty to every loss, held-out ones included; `orthogonality` is added in training."""
    tuner = adapted.base_model
    tuner.forward = tuner.model.forward


def set_length(adapted: Any, total_steps: int) -> None:
    """Have ranks fall between `tinit` and `tfinal` steps before the end. ValueError where no steps are between them."""
    config = adapted.active_peft_config
    if config.tinit + config.tfinal >= total_steps:
        raise ValueError(
            f"model.adapter.tinit ({config.tinit}) and model.adapter.tfinal ({config.tfinal}) leave none of the "
            f"chain's {total_steps} optimizer steps to reduce ranks in; lower them"
        )
    if config.init_r <= config.target_r:
        raise ValueError(
            f"model.adapter.init_r ({config.init_r}) must be above model.adapter.target_r ({config.target_r}): ranks "
            "only fall"
        )
    config.total_step = total_steps


def orthogonality(adapted: Any) -> torch.Tensor:
    """The penalty: how far the singular vectors are from orthogonal, averaged over the matrices, times its weight."""
    distances = []
    for name, weight in adapted.named_parameters():
        if weight.requires_grad and (".lora_A." in name or ".lora_B." in name):
            product = weight @ weight.T if ".lora_A." in name else weight.T @ weight
            distances.append(torch.linalg.norm(product - torch.eye(len(product), device=product.device)))
    return adapted.active_peft_config.orth_reg_weight * torch.stack(distances).mean()


def allocator_state(adapted: Any) -> dict[str, torch.Tensor]:
    """What the allocator remembers between optimizer steps."""
    allocator, config = adapted.base_model.rankallocator, adapted.active_peft_config
    state = {f"{ALLOCATOR}total_step": torch.tensor(config.total_step)}
    for memory in MEMORIES:
        state |= {f"{ALLOCATOR}{memory}.{name}": value for name, value in getattr(allocator, memory).items()}
    for name, kept in (config.rank_pattern or {}).items():
        state[f"{ALLOCATOR}rank_pattern.{name}"] = torch.tensor(kept)
    return state


def load_allocator(adapted: Any, state: dict[str, torch.Tensor]) -> None:
    """Take the allocator's part out of the state."""
    allocator, config = adapted.base_model.rankallocator, adapted.active_peft_config
    config.total_step = int(state.pop(f"{ALLOCATOR}total_step"))
    for memory in MEMORIES:
        setattr(allocator, memory, take_all(state, f"{ALLOCATOR}{memory}."))
    allocator.ipt = {name: torch.zeros_like(value) for name, value in allocator.exp_avg_ipt.items()}
    pattern = take_all(state, f"{ALLOCATOR}rank_pattern.")
    config.rank_pattern = {name: kept.tolist() for name, kept in pattern.items()} or None


def take_all(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
