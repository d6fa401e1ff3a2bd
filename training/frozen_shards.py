"""A frozen model beside the trained one, its layers shared out over the processes of the block (PyTorch's FSDP2).

Each process keeps a part of every decoder layer and, while a layer computes, the whole of that one. Embedding, last
norm and head are whole on each, as losses read the head in pieces. The numbers are those of the whole model, bit for
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from training.distributed import agree_on_any, failing_together, from_main
from training.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_in_shards(
    load: Callable[[], PreTrainedModel], without_weights: Callable[[], PreTrainedModel], device: torch.device
) -> PreTrainedModel:
    """The frozen model in shards on the processes' devices; whole where there is one process.

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


@contextmanager
def in_step(network: PreTrainedModel) -> Iterator[None]:
    """Let the processes ask a model as often as each needs to, be it in shards or not.

    The parts of a layer are gathered by all processes at once, so one that has asked its last goes on asking, for
    nothing, until all have. Within, the processes exchange nothing else.
    """
    if not is_sharded(network):
        yield
        return

    def others_are_told(*arguments: Any) -> None:
        agree_on_any(True)

    hook = network.base_model.register_forward_pre_hook(others_are_told)
    try:
        yield
    finally:  # a process that failed, too: the others wait for its parts
        hook.remove()
        nothing_11 = torch.zeros(1, 1, dtype=torch.int64, device=network.device)
        with torch.no_grad():
            while any(agree_on_any(False)):
                network.base_model(input_ids=nothing_11, use_cache=False)
