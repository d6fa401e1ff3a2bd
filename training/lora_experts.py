"""Several LoRA experts beside each linear layer, and a router that sends every token to the best few of them.

With x a token's input of a layer, W the frozen weight, E_i = B_i A_i expert i of rank r, and R the router's matrix:

    p = softmax(R x)        g_i = p_i / sum of p_j over the k largest, for these k; 0 for all others
    y = W x + alpha / r * sum_i g_i B_i A_i x

This is the mixture of MixLoRA (Li et al. 2024, arXiv:2404.15159), with a router beside each layer. So that all experts
get work, the load-balance loss of Switch Transformers (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6) is added:

    balance = N * sum_i f_i P_i     f_i: expert i's share of all pairs of token and chosen expert; P_i: mean of p_i

over the N experts that are awake and the real tokens of a batch; it is 1 where all have as much to do. Experts can be
added over time: all are there from the beginning, and those that still sleep are in no softmax and get no gradient.

This file needs torch and safetensors only and is exported with every adapter: `load_lora_experts(model, folder)`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import dropout, linear

# Tensors are named by shape. T tokens, I inputs and O outputs of the layer, N experts, R their rank.

PEFT_TYPE = "LORA_EXPERTS"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class ExpertsShape:
    """What the experts are: how many, of which rank, on which layers."""

    num_experts: int
    top_k: int
    r: int
    alpha: int
    dropout: float
    target_modules: str | list[str]
    """`all-linear`, a regular expression of the layers' full names, or the ends of their names."""


@dataclass
class Routing:
    """What all layers of a model share: how many experts are awake, and which tokens of the batch are real."""

    num_awake: int
    is_real: torch.Tensor | None = None
    """[B, T]; None where all are."""


class ExpertLinear(nn.Module):
    """A frozen linear layer with the experts beside it."""

    def __init__(self, base_layer: nn.Linear, shape: ExpertsShape, routing: Routing):
        super().__init__()
        num, device = shape.num_experts, base_layer.weight.device
        self.base_layer = base_layer
        self.shape = shape
        self.routing = routing
        self.lora_A = nn.Parameter(torch.empty(num, shape.r, base_layer.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(num, base_layer.out_features, shape.r, device=device))
        self.router = nn.Parameter(torch.empty(num, base_layer.in_features, device=device))
        nn.init.uniform_(self.lora_A, -1 / math.sqrt(base_layer.in_features), 1 / math.sqrt(base_layer.in_features))
        # Equal logits would send every token to the first experts.
        nn.init.normal_(self.router, std=0.02)
        self.probabilities: torch.Tensor | None = None
        self.is_chosen: torch.Tensor | None = None

    def forward(self, inputs_TI: torch.Tensor) -> torch.Tensor:
        """The layer's outputs; leading dimensions are free."""
        awake = self.routing.num_awake
        gates_TN = self.route(inputs_TI)
        inner = linear(
            dropout(inputs_TI, self.shape.dropout, self.training).to(self.lora_A.dtype),
            self.lora_A[:awake].flatten(0, 1),
        )
        # All experts, with gates of 0: as many products as one LoRA of rank N * R, and nothing is sorted by expert.
        scale = self.shape.alpha / self.shape.r
        gated = inner.unflatten(-1, (awake, self.shape.r)) * (gates_TN * scale).to(inner.dtype)[..., None]
        outputs_TO = self.base_layer(inputs_TI)
        added = linear(gated.flatten(-2), self.lora_B[:awake].transpose(0, 1).flatten(1))
        return outputs_TO + added.to(outputs_TO.dtype)

    def route(self, inputs_TI: torch.Tensor) -> torch.Tensor:
        """The weight of each expert for each token, [..., N]; in float32 or wider, whatever the precision around it."""
        awake = self.routing.num_awake
        with torch.autocast(inputs_TI.device.type, enabled=False):
            dtype = torch.promote_types(self.router.dtype, torch.float32)
            probabilities = linear(inputs_TI.to(dtype), self.router[:awake].to(dtype)).softmax(-1)
        chosen = probabilities.topk(min(self.shape.top_k, awake), dim=-1).indices
        is_chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, chosen, True)
        if self.training:
            self.probabilities, self.is_chosen = probabilities, is_chosen
        kept = probabilities * is_chosen
        return kept / kept.sum(-1, keepdim=True)

    def take_routing(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the last forward pass in training: the share of the work and the mean probability of each expert, [N]."""
        assert self.probabilities is not None and self.is_chosen is not None, "no forward pass in training came before"
        probabilities, is_chosen = self.probabilities.flatten(0, -2), self.is_chosen.flatten(0, -2)
        self.probabilities = self.is_chosen = None
        if self.routing.is_real is not None:
            is_real = self.routing.is_real.flatten()
            probabilities, is_chosen = probabilities[is_real], is_chosen[is_real]
        chosen = is_chosen.to(probabilities.dtype).sum(0)
        return chosen / chosen.sum(), probabilities.mean(0)


def balance(share_N: torch.Tensor, probability_N: torch.Tensor) -> torch.Tensor:
    """How unevenly the experts are used: 1 where evenly, and up to their number where one does all the work."""
    return len(share_N) * (share_N.detach() * probability_N).sum()


def add_lora_experts(model: nn.Module, shape: ExpertsShape, *, num_awake: int) -> None:
    """Freeze the model and put experts beside its layers. Raises ValueError where no layer is meant."""
    names = [name for name, module in model.named_modules() if is_target(model, name, module, shape.target_modules)]
    if not names:
        raise ValueError(f"target_modules {shape.target_modules!r} is the name of no linear layer of the model")
    routing = Routing(num_awake)
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        base_layer = model.get_submodule(name)
        assert isinstance(base_layer, nn.Linear)
        setattr(model.get_submodule(parent), child, ExpertLinear(base_layer, shape, routing))
    model.register_forward_pre_hook(note_real_tokens, with_kwargs=True)


def is_target(model: nn.Module, name: str, module: nn.Module, target_modules: str | list[str]) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    if target_modules == "all-linear":
        return module is not model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def note_real_tokens(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Before each forward pass: padding takes no part in the balance."""
    mask = kwargs.get("attention_mask")
    routing_of(model).is_real = mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def has_experts(model: nn.Module) -> bool:
    return next(expert_layers(model), None) is not None


def expert_layers(model: nn.Module) -> Iterator[ExpertLinear]:
    return (module for module in model.modules() if isinstance(module, ExpertLinear))


def routing_of(model: nn.Module) -> Routing:
    return next(expert_layers(model)).routing


def save_lora_experts(model: nn.Module, folder: Path, *, base_model: str) -> None:
    """Write the experts that were awake, with what `load_lora_experts` needs to know."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, ExpertLinear)}
    awake = routing_of(model).num_awake
    shape = asdict(next(iter(layers.values())).shape) | {"num_experts": awake}
    config = {"peft_type": PEFT_TYPE, "base_model_name_or_path": base_model, **shape}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    weights = {
        f"{name}.{part}": getattr(layer, part)[:awake].detach().contiguous()
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B", "router")
    }
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / Path(__file__).name).write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")


def load_lora_experts(model: nn.Module, folder: Path | str) -> None:
    """Put the experts of an export beside the layers of its base model, ready to answer."""
    config = json.loads((Path(folder) / CONFIG_FILE).read_text())
    shape = ExpertsShape(**{key: config[key] for key in ExpertsShape.__dataclass_fields__})
    add_lora_experts(model, shape, num_awake=shape.num_experts)
    result = model.load_state_dict(load_file(Path(folder) / WEIGHTS_FILE), strict=False)
    if result.unexpected_keys:
        raise ValueError(f"{folder} belongs to another model: here is no {', '.join(result.unexpected_keys)}")
    model.eval()
