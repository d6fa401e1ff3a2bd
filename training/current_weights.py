"""The weights of a model while it is trained, as a checkpoint that another engine can load."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from training.adapters import has_own_head, is_adapter, merged_weights
from training.distributed import Ranks, failing_together, from_main

IN_MEMORY = Path("/dev/shm")
PREFIX = "baton-weights-"
WRITER = "writer.pid"
"""In a folder: the process that wrote it, and removes it."""


@contextmanager
def current_weights(model: Any, ranks: Ranks, dtype: torch.dtype) -> Iterator[Path]:
    """A folder with the weights in `dtype`, its adapter merged in, for from_pretrained; gone afterwards.

    One process of each node writes it, into the node's memory where there is room. All processes of a block enter and
    leave together, or fail together. The model is, bit for bit, as before.
    """
    name = PREFIX + from_main(secrets.token_hex(8))
    try:
        with failing_together():
            if ranks.local_rank == 0:
                remove_leftovers()
                folder = roomy_folder(sum(weight.numel() for weight in model.parameters()) * dtype.itemsize) / name
                folder.mkdir(mode=0o700)
                (folder / WRITER).write_text(str(os.getpid()))
                write_weights(model, folder, dtype)
        with failing_together():
            yield next(folder / name for folder in places() if (folder / name).is_dir())
    finally:
        if ranks.local_rank == 0:
            for place in places():
                shutil.rmtree(place / name, ignore_errors=True)


def places() -> list[Path]:
    """Folders of this node that weights may lie in, the better one first."""
    return [folder for folder in (IN_MEMORY, Path(tempfile.gettempdir())) if os.access(folder, os.W_OK)]


def roomy_folder(size_bytes: int) -> Path:
    """A folder of this node with room for so much, in memory if it can be."""
    for folder in places():
        if shutil.disk_usage(folder).free > size_bytes:
            return folder
    raise ValueError(
        f"neither {IN_MEMORY} nor {tempfile.gettempdir()} has room for the model's weights "
        f"({size_bytes / 2**30:.1f} GiB), from which vLLM reads them; name a larger TMPDIR, or set engine: transformers"
    )


def remove_leftovers() -> None:
    """Remove what processes of this machine, and of this user, left when they were killed."""
    for place in places():
        for folder in place.glob(f"{PREFIX}*"):
            try:
                process = (folder / WRITER).read_text()
            except OSError:  # just begun, just removed, or another user's
                continue
            if process.isdigit() and not Path("/proc", process).exists():
                shutil.rmtree(folder, ignore_errors=True)


def write_weights(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write config and one file of weights."""
    if is_adapter(model):
        network, held, own_head = model.get_base_model(), merged_weights(model, dtype), has_own_head(model)
    else:
        # One after another to the CPU: the device has no room for a second model.
        held = {name: weight.to("cpu", dtype) for name, weight in model.state_dict().items()}
        network, own_head = model, False
    network.save_pretrained(folder, state_dict=dict(held), max_shard_size="10TB")
    # On a CPU vLLM packs embedding and head apart, and of tied ones would go on with the head that it began with.
    if network.config.tie_word_embeddings and (own_head or network.device.type == "cpu"):
        keep_head(network, held, folder)


def keep_head(network: Any, held: dict[str, torch.Tensor], folder: Path) -> None:
    """Make the head of a model that ties it to the embedding a matrix of its own."""
    head = network.get_output_embeddings()
    name = next(f"{name}.weight" for name, module in network.named_modules() if module is head)
    weights_file, config_file = folder / "model.safetensors", folder / "config.json"
    save_file({**load_file(weights_file), name: held[name].clone()}, weights_file, metadata={"format": "pt"})
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "tie_word_embeddings": False}))
