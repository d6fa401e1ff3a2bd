"""The mixture that a run trains on: read from its recipe or made of `dataset.names`, and where it will lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import xxhash

from jobs.config import PROJECT
from mixture import dataset_modules
from mixture.config import DatasetConfig
from mixture.mixer import folders
from mixture.mixture_folder import recipe_record
from mixture.prepare import file_digest, module_digests
from mixture.recipe import Mixture, SourceConfig, Total, read_mixture
from mixture.sources import Place, refuse_non_commercial, wanted_places


def mixture_of(dataset: DatasetConfig, *, seed: int) -> Mixture | None:
    """The mixture that `dataset:` asks for; None where it names a single module.

    Raises:
        ConfigError: the recipe is wrong, each mistake with its line.
    """
    if dataset.mixture:
        return read_mixture(Path(dataset.mixture))
    if not dataset.names:
        return None
    names = dataset.name_list
    share = 1 / len(names) if dataset.sampling == "interleaved" else None
    return Mixture(
        name="+".join(names),
        sources=tuple(SourceConfig(name=name, share=share) for name in names),
        folder=PROJECT,
        seed=seed,
        total=Total(without_repeat=True) if dataset.sampling == "interleaved" else None,
        allow_non_commercial=dataset.allow_non_commercial,
    )


def placed(mixture: Mixture, data_folder: Path) -> Mixture:
    """The mixture with the folder it is written to, named by a key that is known before anything is fetched.

    Raises:
        ValueError: a source's file, glob or module is not there, or its licence forbids commercial use.
    """
    places = [wanted_places(source, source.split or "train", folders(mixture), PROJECT) for source in mixture.sources]
    refuse_non_commercial([chain[0] for chain in places], allow=mixture.allow_non_commercial)
    return replace(mixture, output_dir=data_folder / "mixtures" / recipe_key(mixture, places))


def states_images(mixture: Mixture) -> bool:
    """Whether a module of the mixture says that its rows hold images."""
    chains = [wanted_places(source, source.split or "train", folders(mixture), PROJECT) for source in mixture.sources]
    places = [chain[0] for chain in chains]
    return any(
        (place.hub is not None and place.hub.format == "images")
        or (place.module is not None and dataset_modules.states_images(place.module.path))
        for place in places
    )


def recipe_key(mixture: Mixture, places: list[list[Place]]) -> str:
    """16 hex digits over the recipe and what its sources are on this machine: files by content, modules by text."""
    sources = [[place_identity(place) for place in chain] for chain in places]
    parts = [{**recipe_record(mixture), "metadata": None}, sources]
    return xxhash.xxh3_64_hexdigest(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS, default=str))


def place_identity(place: Place) -> list[Any]:
    files = [file_digest(file) for file in place.files]
    module = module_digests(place.module.path) if place.module else None
    return [place.split, str(place.hub), place.code, files, module]
