"""The weights of a model while it is trained, as a checkpoint that another engine can load."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from training.adapters import is_adapter, merged, plain_weights
from training.distributed import Ranks, failing_together, from_main

IN_MEMORY = Path("/dev/shm")


@contextmanager
def current_weights(model: Any, ranks: Ranks, dtype: torch.dtype) -> Iterator[Path]:
    """A folder with the weights in `dtype`, its adapter merged in, for from_pretrained; gone afterwards.

    One process of each node writes it, into the node's memory where there is room. All processes of a block enter and
    leave together, or fail together. The model is, bit for bit, as before.
    """
    folder = roomy_folder(sum(weight.numel() for weight in model.parameters()) * dtype.itemsize)
    folder /= f"baton-{from_main(secrets.token_hex(8))}"
    try:
        with failing_together():
            if ranks.local_rank == 0:
                folder.mkdir(mode=0o700)
                write_weights(model, folder, dtype)
        with failing_together():
            yield folder
    finally:
        if ranks.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def roomy_folder(size_bytes: int) -> Path:
    """A folder of this node with room for so much, in memory if it can be."""
    for folder in (IN_MEMORY, Path(tempfile.gettempdir())):
        if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > size_bytes:
            return folder
    raise ValueError(
        f"neither {IN_MEMORY} nor {tempfile.gettempdir()} has room for the model's weights "
        f"({size_bytes / 2**30:.1f} GiB), from which vLLM reads them; name a larger TMPDIR, or set engine: transformers"
    )


def write_weights(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write config and one file of weights."""
    network = model.get_base_model() if is_adapter(model) else model
    with merged(model) if is_adapter(model) else nullcontext():
        weights = plain_weights(model) if is_adapter(model) else network.state_dict()
        # One after another to the CPU: the device has no room for a second model.
        held = {name: weight.to("cpu", dtype) for name, weight in weights.items()}
    network.save_pretrained(folder, state_dict=dict(held), max_shard_size="10TB")
    if network.config.tie_word_embeddings:
        keep_head(network, held, folder)


def keep_head(network: Any, held: dict[str, torch.Tensor], folder: Path) -> None:
    """Make the head of tied models a matrix of its own where it is one, having been trained without the embedding, and
    on a CPU: there vLLM packs the two apart, and of tied ones would go on with the head that it began with."""
    head, embedding = (
        next(f"{name}.weight" for name, module in network.named_modules() if module is part)
        for part in (network.get_output_embeddings(), network.get_input_embeddings())
    )
    if network.device.type != "cpu" and torch.equal(held[head], held[embedding]):
        return
    weights_file, config_file = folder / "model.safetensors", folder / "config.json"
    save_file({**load_file(weights_file), head: held[head].clone()}, weights_file, metadata={"format": "pt"})
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "tie_word_embeddings": False}))
