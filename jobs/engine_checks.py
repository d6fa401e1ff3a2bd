"""What can be known to be wrong with an engine that writes answers, before anything is queued."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from answering.config import AnswersConfig
from jobs.config import PROJECT, RunConfig
from training.online_config import OnlineConfig
from training.vllm_config import VllmConfig

HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
LOOK_S = 60.0


def find_engines(config: RunConfig, config_folder: Path, collect: Callable[..., Any]) -> RunConfig:
    """The settings with the Pythons that have vLLM as absolute paths; what is missing is collected."""

    def found(key: str, section: Any) -> Any:
        if section is None or section.engine != "vllm":
            return section
        assert isinstance(section, AnswersConfig | OnlineConfig)
        vllm = section.vllm or VllmConfig()
        python = collect(f"{key}.vllm.python", find_python, vllm.python, config_folder)
        return replace(section, vllm=replace(vllm, python=python or vllm.python))

    finetuning, distillation, eagle3 = config.finetuning, config.distillation, config.eagle3
    if finetuning.online is not None:
        name = finetuning.online.section
        online: dict[str, Any] = {name: found(f"finetuning.{name}", finetuning.online)}
        finetuning = replace(finetuning, **online)
    if distillation is not None:
        distillation = replace(distillation, answers=found("distillation.answers", distillation.answers))
    if eagle3 is not None:
        eagle3 = replace(eagle3, answers=found("eagle3.answers", eagle3.answers))
    return replace(config, finetuning=finetuning, distillation=distillation, eagle3=eagle3)


def find_python(python: str | None, config_folder: Path) -> str | None:
    """The path of a Python that has vllm; None where this kit's own has it and no other is named.

    Raises:
        ValueError: there is none, or it has no vllm.
    """
    make = "make it an environment of its own: python3 -m venv .vllm && .vllm/bin/pip install vllm"
    if python is None:
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                f"engine vllm needs the package vllm, and {sys.executable} has none; {make}, and name .vllm/bin/python"
            )
        return None
    # Not resolved: what makes an environment of a Python is the link that leads to it.
    tried = [(folder / Path(python).expanduser()).absolute() for folder in (config_folder, PROJECT, Path.cwd())]
    path = next((path for path in tried if path.is_file() and os.access(path, os.X_OK)), None)
    if path is None:
        raise ValueError(f"no program {python}; tried {', '.join(map(str, dict.fromkeys(tried)))}; {make}")
    try:
        looked = subprocess.run([path, "-I", "-c", HAS_VLLM], capture_output=True, timeout=LOOK_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{path} cannot be asked for vllm: {error}; is it a Python? {make}") from error
    if looked.returncode != 0:
        raise ValueError(f"{path} has no package vllm; install it there: {path} -m pip install vllm")
    return str(path)
