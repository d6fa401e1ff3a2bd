"""A model whose weights, gradients and optimizer are spread over the processes of a block: torch's FSDP2.

fully_shard is called here and not through accelerate, which gathers final norm and head when the norm runs: under an
adapter it finds no norm, and the chunked losses would meet the head's weight in shards. Here all that lies outside the
layers is gathered while the model runs.

In a checkpoint the weights are whole, as from_pretrained reads them, and the optimizer's state lies in shards by the
name of its weight (torch.distributed.checkpoint), which any number of processes can load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from training.adapters import is_adapter
from training.config import FsdpConfig

OPTIMIZER_FOLDER = "optimizer"


def shard(model: nn.Module, config: FsdpConfig, *, device: torch.device, precision: torch.dtype) -> None:
    """Spread the model over all processes of the block, in place; nothing where there is one process.

    Weights are kept as they are, and gathered and multiplied in `precision`; gradients are summed in float32.

    Raises:
        ValueError: the model has no module of the classes that are to be wrapped.
    """
    if not distributed.is_initialized():
        return
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (distributed.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if precision == torch.float32 else precision,
            reduce_dtype=torch.float32,
            # Targets of a teacher are given to the forward pass as well, and stay as they are.
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if config.cpu_offload else OffloadPolicy(),
    }
    for layer in wrapped_modules(model, config):
        fully_shard(layer, reshard_after_forward=config.reshard_after_forward, **options)
    fully_shard(model, reshard_after_forward=False, **options)


def wrapped_modules(model: nn.Module, config: FsdpConfig) -> list[nn.Module]:
    """The modules whose weights are gathered together, inner ones before those around them; else ValueError.

    All processes gather them at once, so only what every batch asks can be among them. What sees and what looks at
    images is not, as a batch of texts leaves it out: it is gathered with all that lies outside the layers.
    """
    network, decoder = network_of(model), decoder_of(model)
    looking = [decoder.layers[number] for number in getattr(decoder.config, "cross_attention_layers", None) or []]
    left_out = {module for layer in looking for module in layer.modules()}
    names = set(config.wrap or network._no_split_modules or [])
    asked = [module for module in reversed(list(decoder.modules())) if module not in left_out]
    modules = [module for module in asked if type(module).__name__ in names]
    missing = set(config.wrap) - {type(module).__name__ for module in modules}
    if missing or not modules:
        layers = sorted({type(module).__name__ for module in asked})
        unknown = ", ".join(sorted(missing or names))
        wanted = f"no module of the class {unknown}" if unknown else "no layers that it names itself"
        raise ValueError(
            f"training.fsdp.wrap: what reads texts in {type(network).__name__} has {wanted}; name the classes of its "
            f"layers, out of {', '.join(layers)}"
        )
    return modules


def network_of(model: nn.Module) -> Any:
    """The network inside an adapter, or the model itself."""
    return model.get_base_model() if is_adapter(model) else model  # type: ignore[operator]


def decoder_of(model: nn.Module) -> Any:
    """The part of a model that reads texts: every forward pass, and every token that is written, asks it once."""
    return network_of(model).get_decoder()


def convert(model: Any, dtype: torch.dtype) -> Any:
    """The model with its weights in another precision, in place; also one in shards that was asked before."""
    model = model.to(dtype)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for weight in group.fsdp_params:
                    # The memory that it was gathered into, which FSDP makes once and for one precision.
                    weight.all_gather_outputs = []
                    vars(weight).pop("_unsharded_param", None)
                group._init_mp_dtypes()
    return model


def let_go(model: nn.Module) -> None:
    """Give up all that a pass has gathered: without a backward pass, what lies outside the layers is kept whole."""
    if isinstance(model, FSDPModule):
        model.reset_iter_state()


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of the model, or of some of its layers, are spread over the processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def computing_device(model: nn.Module) -> torch.device:
    """Where the model's forward pass runs: where its weights are, or where they are gathered."""
    weight = next(model.parameters())
    if isinstance(weight, DTensor) and weight.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return weight.device


def own_part(weight: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def whole_weights(model: nn.Module, *, only_trained: bool) -> dict[str, torch.Tensor]:
    """The model's weights on the CPU of the first process, gathered one after another; nothing on the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=only_trained)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights


def save_optimizer(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Write the optimizer's state, each process its own shards. OSError on all processes where any cannot write."""
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    try:
        save({"optimizer": state}, checkpoint_id=folder / OPTIMIZER_FOLDER, no_dist=not distributed.is_initialized())
    except CheckpointException as error:  # no Exception, and a table of tracebacks
        reasons = [f"process {rank}: {reason}" for rank, (reason, _) in error.failures.items()]
        raise OSError("; ".join(reasons)) from error


def load_optimizer(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Load what `save_optimizer` wrote, by however many processes it was."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    load({"optimizer": state}, checkpoint_id=folder / OPTIMIZER_FOLDER, no_dist=not distributed.is_initialized())
    set_optimizer_state_dict(model, optimizer, state, options=options)
