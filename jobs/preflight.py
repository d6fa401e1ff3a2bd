"""What can be known to be wrong before anything is queued, downloaded or trained: files, model, cluster, folders."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from answering.identity import answers_folder
from distilling.config import DistillationConfig
from drafting.config import Eagle3Config, check_family, feature_layers
from jobs.capturing import key_of_answers
from jobs.cluster import SilentControllerError, read_partitions
from jobs.config import PROJECT, RunConfig, read_tree, run_config
from jobs.distillation_checks import check_cache, check_distillation, find_cache, model_shape, require_weights
from jobs.engine_checks import find_engines
from jobs.local import visible_devices
from jobs.online_checks import find_rewards
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile, check_module, resolve_module, states_images
from mixture.hub import absolute_data_files
from mixture.prepare import PreparationRequest
from mixture.recipe import Mixture
from sandbox.python import missing_protection
from settings.yaml_tree import ConfigError, ConfigTree, Problem
from training.adapter_options import EXPERTS, not_mergeable
from training.config import EvaluationConfig

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """A run whose settings hold together and whose files exist; every path in it is absolute."""

    config: RunConfig
    module: ModuleFile | None
    """The dataset module; None where a mixture is trained on."""
    mixture: Mixture | None
    cluster: Literal["slurm", "local"]
    world_size: int
    notes: list[str]
    """What the user should know although nothing is wrong."""

    @property
    def rows(self) -> PreparationRequest:
        """The rows before a model answers them."""
        return rows_request(self.config, self.module, self.mixture.output_dir if self.mixture else None)

    @property
    def preparation(self) -> PreparationRequest:
        """What the prepare step is asked for."""
        return preparation_request(self.config, self.module, self.mixture.output_dir if self.mixture else None)


def preparation_request(config: RunConfig, module: ModuleFile | None, mixture: Path | None) -> PreparationRequest:
    """The part of the settings that shapes the data: the rows, or the answers to them where a model writes any."""
    rows = rows_request(config, module, mixture)
    key = key_of_answers(config, rows)
    return rows if key is None else replace(rows, mixture=answers_folder(config.data_folder, key))


def rows_request(config: RunConfig, module: ModuleFile | None, mixture: Path | None) -> PreparationRequest:
    """The rows of a run as they are, of a module or of a mixture's folder."""
    dataset, tokenizer = config.dataset, config.tokenizer
    if mixture is not None:  # its folder's name says all about its rows
        dataset = replace(dataset, name="mixture", file=None, mixture=None, names=None)
    return PreparationRequest(
        dataset=dataset,
        module=module,
        mixture=mixture,
        tokenizer=tokenizer.name,
        revision=tokenizer.revision,
        trust_remote_code=tokenizer.trust_remote_code,
        objective=config.objective,
    )


def check_run(file: Path, overrides: Sequence[str] = ()) -> CheckedRun:
    """The run that `file` describes, checked against this machine.

    Raises:
        ConfigError: everything that is wrong, one line each.
    """
    tree = read_tree(file, overrides)
    config = run_config(tree)
    collect = Collector(tree)
    folder = file.resolve().parent
    cluster = collect("cluster", choose_cluster, config.cluster)
    config, module, mixture = find_rows(config, folder, collect)
    config = find_engines(config, folder, collect)
    config = find_models(config, folder, collect)
    config = find_scores(config, module, mixture, folder, collect)
    config = find_folders(config, collect)
    check_packages(config, collect)
    check_protection(config, module, cluster, collect)
    if cluster == "slurm":
        collect("slurm", check_partition, config.slurm.partition, config.slurm.time_limit_minutes)
    notes: list[str] = []
    world_size = config.slurm.world_size if cluster == "slurm" else local_world_size(config, notes)
    collect("evaluation.lm_eval", require_questions, config, world_size)
    if collect.problems:
        raise ConfigError(collect.problems)

    notes = [*collect.notes, *context_notes(config), *notes]
    if config.training.parallelism != "ddp" and world_size == 1:
        notes.append(f"training.parallelism: {config.training.parallelism} spreads nothing over one process")
    return CheckedRun(
        config=config, module=module, mixture=mixture, cluster=cluster, world_size=world_size, notes=notes
    )


class Collector:
    """What checks find wrong, each problem with the place of its key in the file, and what the user should know."""

    def __init__(self, tree: ConfigTree) -> None:
        self.tree = tree
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def __call__(self, key: str, check: Callable[..., Any], *arguments: Any) -> Any:
        """What the check returns; None where it fails, and its ValueError becomes a problem of the key."""
        try:
            return check(*arguments)
        except ConfigError as error:
            self.problems.extend(error.problems)
        except ValueError as error:
            message = " ".join(line.strip() for line in str(error).splitlines())
            self.add(key, message if message.startswith(key) else f"{key}: {message}")
        return None

    def add(self, key: str, message: str) -> None:
        self.problems.append(Problem(self.tree.place(tuple(key.split("."))), message))


def find_rows(
    config: RunConfig, config_folder: Path, collect: Collector
) -> tuple[RunConfig, ModuleFile | None, Mixture | None]:
    """The settings with every file of the rows absolute, and the module or the mixture that the rows are of."""
    dataset = collect("dataset.data_files", find_data_files, config.dataset, config_folder) or config.dataset
    if config.dataset.mixture or config.dataset.names:
        collect.notes += mixture_notes(config.dataset)
        dataset = collect("dataset.mixture", find_recipe, config.dataset, config_folder)
        mixture = dataset and collect("dataset.mixture", find_mixture, dataset, config)
        return replace(config, dataset=dataset or config.dataset), None, mixture
    key = "dataset.file" if config.dataset.file else "dataset.name"
    module = collect(key, find_module, config.dataset, config_folder)
    if module is None:
        return config, None, None
    if states_images(module.path):
        collect("dataset.name", check_settings_for_images, config)
    for unread in unread_module_keys(config.dataset, module):
        collect.add(
            f"dataset.{unread}", f"dataset.{unread}: nothing in {module.path} reads this key; correct or remove it"
        )
    return replace(config, dataset=replace(dataset, file=f"{module.path}:{module.function}")), module, None


def find_models(config: RunConfig, config_folder: Path, collect: Collector) -> RunConfig:
    """The settings with every model, tokenizer and adapter as an absolute path or a known hub id, that fit together."""
    model, distillation = config.model, config.distillation
    if distillation is not None:
        distillation = find_teacher(distillation, config_folder, collect)
    if distillation is not None and distillation.from_teacher is not None:
        name = distillation.teacher_model.name
    else:
        name = collect("model.name", find_model, model.name, model.revision, config_folder)
    tokenizer = model.tokenizer
    if tokenizer is not None:
        tokenizer = collect("model.tokenizer", find_model, tokenizer, None, config_folder, "tokenizer_config.json")
    adapters = [collect("model.adapters", find_adapter, adapter, config_folder) for adapter in model.adapters]
    model = replace(model, name=name or model.name, tokenizer=tokenizer, adapters=adapters)
    config = replace(config, model=model, distillation=distillation)
    if distillation is not None:
        check_distillation(config, collect)
    if config.eagle3 is not None and name is not None:
        collect("model.name", check_target, name)
        collect("eagle3.layers", check_feature_layers, config.eagle3, name)
    return config


def find_scores(
    config: RunConfig, module: ModuleFile | None, mixture: Mixture | None, config_folder: Path, collect: Collector
) -> RunConfig:
    """The settings with all that answers are rewarded and scored by as absolute paths or known hub ids."""
    evaluation = collect("evaluation.lm_eval", find_harness_tasks, config.evaluation, config_folder)
    if config.evaluation.unprotected_code and (module is not None or mixture is not None):
        collect("evaluation.unprotected_code", require_code_score, module)
    is_mixture = bool(config.dataset.mixture or config.dataset.names)
    finetuning = find_rewards(config.finetuning, module, is_mixture, config_folder, find_model, collect)
    return replace(config, evaluation=evaluation or config.evaluation, finetuning=finetuning)


def find_folders(config: RunConfig, collect: Collector) -> RunConfig:
    """The settings with every folder that is written to as an absolute path."""
    checkpoint_dir = collect("model.checkpoint_dir", absolute_checkpoint_dir, config.model.checkpoint_dir)
    collect("runs_dir", check_writable, config.folder.parent)
    collect("data_dir", check_writable, config.data_folder)
    model = replace(config.model, checkpoint_dir=checkpoint_dir)
    return replace(config, runs_dir=str(config.folder.parent), data_dir=str(config.data_folder), model=model)


def check_packages(config: RunConfig, collect: Collector) -> None:
    """Collect what is not installed."""
    collect("model.peft_method", check_adapter_packages, config.model.peft, config.model.peft_method)
    collect("training.parallelism", check_parallelism_packages, config.training.parallelism)


def check_protection(config: RunConfig, module: ModuleFile | None, cluster: str | None, collect: Collector) -> None:
    """Collect, or note where other machines will do it, that this machine cannot run the code that answers hold."""
    if not scores_by_running_code(config, module) or config.evaluation.unprotected_code:
        return
    lacks = missing_protection()
    if lacks and cluster == "local":
        collect.add("evaluation.unprotected_code", f"evaluation.unprotected_code: {lacks}")
    elif lacks:
        collect.notes.append(f"{lacks}. ./train.sh doctor FILE --on-node asks whether a node can")


def find_teacher(distillation: DistillationConfig, config_folder: Path, collect: Collector) -> DistillationConfig:
    """The section with the paths of the teacher and of a cache made before absolute; what is missing is collected."""
    teacher, cache = distillation.teacher_model, distillation.cache
    name = collect("distillation.teacher_model.name", find_model, teacher.name, teacher.revision, config_folder)
    teacher = replace(teacher, name=name or teacher.name)
    if name is not None and (distillation.teacher != "none" or distillation.from_teacher):
        collect("distillation.teacher_model.name", require_weights, name)
    if distillation.teacher == "cache" and cache.folder is not None:
        found = collect("distillation.cache.folder", find_cache, cache.folder, config_folder)
        if found is not None:
            collect("distillation.cache.folder", check_cache, found, teacher, distillation.temperature)
        cache = replace(cache, folder=found or cache.folder)
    return replace(distillation, teacher_model=teacher, cache=cache)


def choose_cluster(wanted: str) -> Literal["slurm", "local"]:
    """Where the chain runs.

    Raises:
        ValueError: Slurm is asked for and not there.
    """
    if wanted == "local":
        return "local"
    missing = missing_slurm()
    if missing and wanted == "slurm":
        raise ValueError(f"slurm needs a cluster, and {missing}; use `cluster: local` to train here")
    return "local" if missing else "slurm"


def missing_slurm() -> str | None:
    """What this machine lacks to submit jobs; None where it belongs to a cluster, even one that is down just now."""
    if shutil.which("sbatch") is None:
        return "there is no sbatch on the PATH"
    answer = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=60)
    return "sbatch here belongs to none: no slurm.conf" if "configuration source" in answer.stderr else None


def find_module(dataset: DatasetConfig, config_folder: Path) -> ModuleFile:
    """The dataset module, found and read but not run.

    Raises:
        ValueError: no such file, a syntax error, or no such function.
    """
    module = resolve_module(dataset, config_folder=config_folder, project=PROJECT)
    check_module(module)
    return module


def check_settings_for_images(config: RunConfig) -> None:
    """Raise ValueError where rows with images cannot be learned so."""
    from mixture.image_preparation import check_settings  # imports that only images pay

    check_settings(config.objective, config.dataset)


def find_recipe(dataset: DatasetConfig, config_folder: Path) -> DatasetConfig:
    """The section with the recipe's path absolute.

    Raises:
        ValueError: there is no such file.
    """
    if not dataset.mixture:
        return dataset
    tried = [folder / Path(dataset.mixture).expanduser() for folder in (config_folder, PROJECT, Path.cwd())]
    for path in tried:
        if path.is_file():
            return replace(dataset, mixture=str(path.resolve()))
    raise ValueError(f"no file {dataset.mixture}; tried {', '.join(map(str, dict.fromkeys(tried)))}")


def find_mixture(dataset: DatasetConfig, config: RunConfig) -> Mixture:
    """The mixture, read and checked, and the folder that it will lie in.

    Raises:
        ConfigError: the recipe is wrong, each mistake with its line.
        ValueError: a file or module of a source is not there, or its images cannot be learned so.
    """
    from jobs import mixing  # a second of imports, and only mixtures pay it

    mixture = mixing.mixture_of(dataset, seed=config.seed)
    assert mixture is not None
    mixture = mixing.placed(mixture, config.data_folder)
    if mixing.states_images(mixture):
        check_settings_for_images(config)
    return mixture


def mixture_notes(dataset: DatasetConfig) -> list[str]:
    """A word where a mixture takes the place of a module that the file names too."""
    module = dataset.file or dataset.name
    chosen = "dataset.mixture" if dataset.mixture else "dataset.names"
    return [f"{chosen} is trained on instead of {module}"] if module else []


def find_data_files(dataset: DatasetConfig, config_folder: Path) -> DatasetConfig:
    """The section with every path of `data_files` absolute.

    Raises:
        ValueError: a file does not exist.
    """
    return absolute_data_files(dataset, config_folder=config_folder, project=PROJECT)


def unread_module_keys(dataset: DatasetConfig, module: ModuleFile) -> list[str]:
    """Keys of `dataset:` that neither the kit nor the module's text knows: most likely typing mistakes."""
    text = module.path.read_text(encoding="utf-8")
    if "asdict" in text:
        return []
    return [key for key in dataset.module_keys if not re.search(rf"\b{re.escape(key)}\b", text)]


def runs_code(module: ModuleFile | None) -> bool:
    """Whether a module runs code to score answers, as far as its text tells."""
    return module is not None and bool(re.search(r"\bunprotected\b", module.path.read_text(encoding="utf-8")))


def scores_by_running_code(config: RunConfig, module: ModuleFile | None) -> bool:
    """Whether the run scores answers by running them: at its end, or as rewards."""
    online = config.finetuning.online
    is_rewarded = online is not None and any(source.kind == "module" for source in online.rewards)
    writes_no_answers = config.trainer == "eagle3" or config.finetuning.objective == "reward"
    is_evaluated = config.evaluation.limit > 0 and not writes_no_answers
    return (is_rewarded or is_evaluated) and runs_code(module)


def require_code_score(module: ModuleFile | None) -> None:
    """Raise ValueError where no module runs code to score answers, as far as its text tells."""
    if not runs_code(module):
        what = "a mixture scores no answers" if module is None else f"nothing in {module.path} runs code of a model"
        raise ValueError(f"{what}; remove the key")


def find_model(name: str, revision: str | None, config_folder: Path, needed_file: str = "config.json") -> str:
    """The model's folder as an absolute path, or its hub id once the hub or the local cache knows it.

    Raises:
        ValueError: neither a folder with `needed_file` nor a known hub id.
    """
    for folder in (config_folder, PROJECT, Path.cwd()):
        candidate = folder / Path(name).expanduser()
        if candidate.is_dir():
            if not (candidate / needed_file).is_file():
                raise ValueError(f"the folder {candidate} has no {needed_file}")
            return str(candidate.resolve())
    if not HUB_ID.fullmatch(name):
        raise ValueError(f"no folder {name}, and it cannot be a hub id (organisation/model) either")
    check_hub_model(name, revision, needed_file)
    return name


def find_adapter(name: str, config_folder: Path) -> str:
    """The folder of a trained adapter that can be merged, as an absolute path.

    Raises:
        ValueError: no such folder, no adapter in it, or one that never becomes part of the weights.
    """
    for folder in (config_folder, PROJECT, Path.cwd()):
        candidate = folder / Path(name).expanduser()
        if (candidate / "adapter_config.json").is_file():
            method = json.loads((candidate / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"].lower()
            method = EXPERTS if method == "lora_experts" else method
            if reason := not_mergeable(method):
                raise ValueError(f"{candidate} cannot be merged: it is of the kind {method}, and {reason}")
            return str(candidate.resolve())
    raise ValueError(f"no folder {name} with an adapter_config.json")


def check_hub_model(name: str, revision: str | None, needed_file: str) -> None:
    """Raise ValueError unless the local cache or the hub has the model; asks the hub once, without downloading."""
    from httpx2 import HTTPError
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(try_to_load_from_cache(name, needed_file, revision=revision), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, needed_file, revision=revision))
    except GatedRepoError:
        raise ValueError(f"{name} is gated: accept its terms on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise ValueError(f"{name} has no revision {revision} on the hub") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"no folder {name}, and the hub has no model of that id (private ones need HF_TOKEN)"
        ) from None
    except EntryNotFoundError:
        raise ValueError(f"{name} on the hub has no {needed_file}, so it is no transformers model") from None
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"no folder {name}, it is not in the local cache, and the hub does not answer: {error}"
        ) from None


def check_adapter_packages(peft: bool, method: str) -> None:
    """Raise ValueError where the adapter needs a package that is not installed."""
    if peft and method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("qlora needs the package bitsandbytes in .venv; install it, or use lora")


def find_harness_tasks(evaluation: EvaluationConfig, config_folder: Path) -> EvaluationConfig:
    """The section with the folder of own tasks of lm-evaluation-harness absolute.

    Raises:
        ValueError: the harness is not installed, or there is no such folder.
    """
    lm_eval = evaluation.lm_eval
    if lm_eval is None:
        return evaluation
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("its tasks need the package lm-eval in .venv: .venv/bin/pip install 'lm-eval>=0.4.13,<0.5'")
    if lm_eval.include_path is None:
        return evaluation
    tried = [folder / Path(lm_eval.include_path).expanduser() for folder in (config_folder, PROJECT, Path.cwd())]
    for path in tried:
        if path.is_dir():
            return replace(evaluation, lm_eval=replace(lm_eval, include_path=str(path.resolve())))
    raise ValueError(
        f"include_path: no folder {lm_eval.include_path}; tried {', '.join(map(str, dict.fromkeys(tried)))}"
    )


def require_questions(config: RunConfig, world_size: int) -> None:
    """Raise ValueError where the processes that score a model get fewer questions of a task than they are."""
    lm_eval = config.evaluation.lm_eval
    if config.spreads_evaluation and lm_eval is not None and lm_eval.limit is not None and lm_eval.limit < world_size:
        raise ValueError(
            f"limit: {lm_eval.limit} is below the {world_size} processes that share the questions of a task; raise it"
        )


def check_parallelism_packages(parallelism: str) -> None:
    """Raise ValueError where the way to train on several processes needs a package that is not installed."""
    if parallelism == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "deepspeed needs the package of this name: .venv/bin/pip install '.[deepspeed]'; or use fsdp, which needs "
            "none"
        )


def absolute_checkpoint_dir(checkpoint_dir: str | None) -> str | None:
    if checkpoint_dir is None:
        return None
    path = PROJECT / Path(checkpoint_dir).expanduser()
    check_writable(path.parent)
    return str(path)


def check_writable(folder: Path) -> None:
    """Raise ValueError unless `folder`, or the nearest folder above it that exists, can be written to."""
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ValueError(f"{folder} cannot be made: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"no permission to write in {nearest}; name another folder")


def check_partition(wanted: str | None, limit_minutes: int | None) -> None:
    """Raise ValueError where a wanted partition does not exist, or it or the default one has a shorter limit.

    A silent controller passes.
    """
    try:
        partitions = {partition.name: partition for partition in read_partitions()}
    except SilentControllerError:
        return  # submission will wait for the controller, and name it if it stays away
    default = [name for name, partition in partitions.items() if partition.is_default]
    for name in wanted.split(",") if wanted else default:
        if name not in partitions:
            raise ValueError(f"slurm.partition {name} does not exist; there are {', '.join(sorted(partitions))}")
        longest = partitions[name].max_minutes
        if limit_minutes is not None and longest is not None and limit_minutes > longest:
            raise ValueError(
                f"slurm.time is {limit_minutes} min, and {name} allows {longest} min (its jobs never start)"
            )


def check_target(target: str) -> None:
    """Raise ValueError for a local model that no draft head can be trained for."""
    if model_type := model_shape(target).get("model_type"):
        check_family(model_type)
    require_weights(target)


def check_feature_layers(eagle3: Eagle3Config, target: str) -> None:
    """Raise ValueError for layers that a local target does not have."""
    if depth := model_shape(target).get("num_hidden_layers"):
        feature_layers(eagle3.layers, depth=depth)


def context_notes(config: RunConfig) -> list[str]:
    """A word where rows may be longer than the positions of the model, or shorter than those of a draft's target."""
    file = Path(config.model.name) / "config.json"
    if not file.is_file():
        return []
    positions = json.loads(file.read_text(encoding="utf-8")).get("max_position_embeddings")
    if positions is not None and config.eagle3 is not None and config.dataset.max_length < positions:
        return [
            f"the draft learns from rows of up to {config.dataset.max_length} tokens and its target takes {positions}: "
            "far beyond that length its guesses are worth less; raise dataset.max_length if it is served there"
        ]
    if positions is None or config.dataset.max_length <= positions:
        return []
    return [f"dataset.max_length is {config.dataset.max_length}, and the model was made for {positions} positions"]


def local_world_size(config: RunConfig, notes: list[str]) -> int:
    """Processes for a chain that runs here: one per visible GPU, up to the number asked for."""
    processes = max(1, min(config.slurm.tasks_per_node, visible_gpus()))
    if processes < config.slurm.world_size:
        notes.append(
            f"here {processes} process{'es' if processes > 1 else ''} train instead of {config.slurm.world_size} "
            "on the cluster, so one optimizer step sees fewer rows"
        )
    return processes


def visible_gpus() -> int:
    """NVIDIA devices of this machine, counted without starting CUDA."""
    return len(visible_devices(os.environ))
