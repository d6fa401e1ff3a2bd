"""Models that are asked and not trained, shared out over the processes of the block (PyTorch's FSDP2).

Each process keeps a part of every decoder layer and, while a layer computes, the whole of that one. The numbers are
those of the whole model, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule

from training.config import FsdpConfig, TrainingConfig
from training.distributed import agree_on_any, failing_together, from_main
from training.sharding import computing_device, decoder_of, is_sharded, let_go, shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_in_shards(
    load: Callable[[], PreTrainedModel], without_weights: Callable[[], PreTrainedModel], device: torch.device
) -> PreTrainedModel:
    """A teacher or target in shards on the processes' devices; whole where there is one process.

    Embedding, last norm and head are whole on each, as they are read outside of a forward pass.

    Rank 0 alone calls `load`, on its CPU, so that a node holds the model once beside the shards; the others are sent
    their parts. `without_weights`: the same model with its parameters on the meta device, and its buffers filled.
    """
    if not distributed.is_initialized():
        return load().to(device).requires_grad_(False).eval()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    loaded = None
    with failing_together():
        if distributed.get_rank() == 0:
            loaded = load()
    network = without_weights().requires_grad_(False).eval()
    network.generation_config = from_main(loaded and loaded.generation_config)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in network.get_decoder().layers:
        # Said outright: unsaid, a layer that no other module around it is spread with stays whole after its first pass.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    make_room(network, device)
    weights = loaded.state_dict() if loaded else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, weights, options=options)
    return network


def make_room(network: PreTrainedModel, device: torch.device) -> None:
    """Memory for the parameters on the device, and the buffers as they were."""
    buffers = dict(network.named_buffers())
    network.to_empty(device=device)
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])
    network.tie_weights()


def place_to_ask(model: nn.Module, training: TrainingConfig, device: torch.device) -> Any:
    """A model that was loaded on the CPU, frozen, on the device; with `training.parallelism: fsdp` its share of it.

    In shards it is asked by its forward pass, which gathers all that lies outside the layers too, and by all processes
    equally often or within `in_step`.
    """
    model = model.requires_grad_(False).eval()
    if training.parallelism != "fsdp" or not distributed.is_initialized():
        return model.to(device)
    # Nothing follows a pass that could use its layers once more.
    config = replace(training.fsdp or FsdpConfig(), reshard_after_forward=True)
    shard(model, config, device=device, precision=torch.float32)
    return model


@contextmanager
def in_step(model: Any) -> Iterator[None]:
    """Let the processes ask a model as often as each needs to, be it in shards or not; without dropout, for answers.

    The parts of a layer are gathered by all processes at once, so one that has asked its last goes on asking, for
    nothing, until all have. Within, the processes exchange nothing else (generate is given `synced_gpus=False`), and
    may call what lies inside the model, not its forward pass alone. A model in shards is asked without gradients, not
    in inference mode: what was gathered in it can be gathered again nowhere else.
    """
    if not is_sharded(model):
        yield
        return
    decoder = decoder_of(model)

    def others_are_told(*arguments: Any) -> None:
        agree_on_any(True)

    was_training = model.training
    model.eval()
    with gathered_ends(model):
        hook = decoder.register_forward_pre_hook(others_are_told)
        try:
            yield
        finally:  # a process that failed, too: the others wait for its parts
            hook.remove()
            with torch.no_grad():
                while any(agree_on_any(False)):
                    decoder(**nothing_to_read(model))
    model.train(was_training)


@contextmanager
def gathered_ends(model: Any) -> Iterator[None]:
    """Let the processes call what lies inside a model in shards: what lies outside its layers is whole meanwhile."""
    has_ends_in_shards = isinstance(model, FSDPModule)
    if has_ends_in_shards:
        with torch.no_grad():  # a pass of the whole gathers it, and nothing after the pass gives it up
            model(**nothing_to_read(model))
    yield
    let_go(model)


def nothing_to_read(model: nn.Module) -> dict[str, Any]:
    """A text of one token that nobody waits for."""
    return {"input_ids": torch.zeros(1, 1, dtype=torch.int64, device=computing_device(model)), "use_cache": False}
