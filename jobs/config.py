"""The settings of a run: YAML and command line in, typed and checked dataclasses out, all problems at once."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from distilling.config import DistillationConfig
from drafting.config import Eagle3Config, target_problems
from jobs.online_checks import online_contradictions
from mixture.config import DatasetConfig
from mixture.render import Objective
from settings.typed import build, leaves
from settings.yaml_tree import ConfigError, ConfigTree, Problem, read_config_file, read_overrides
from training.adapter_options import EXPERTS, LORA_FAMILY, is_prompt_method
from training.arguments import OWNED_ARGUMENTS, training_argument_names
from training.config import SHARDED_OPTIMIZERS, EvaluationConfig, FinetuningConfig, ModelConfig, TrainingConfig

PROJECT = Path(__file__).resolve().parent.parent
"""The folder with train.sh: relative paths to runs, data and dataset modules start here."""

TrainerName = Literal["finetuning", "distillation", "eagle3"]
"""Each trainer has a section of its name, which only its runs have."""

SECRET_KEY = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|access_?key|credentials?)$", re.IGNORECASE)
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(kw_only=True, frozen=True)
class SlurmConfig:
    """What each job of the chain asks Slurm for."""

    partition: str | None = None
    """Partition; the cluster's default where unset."""

    time: str | int | None = None
    """Time limit of one block: HH:MM:SS, D-HH:MM:SS, or minutes."""

    warning_s: int | None = None
    """Seconds before the time limit at which a job is told to save and to go on in another turn; Slurm may do so up to
    30 s earlier. Unset: 120, and at most half of `time`."""

    nodes: int = 1
    """Nodes per block."""

    gpus_per_node: int | None = None
    """GPUs, and so processes, per node. Unset: one process per node and no GPU request."""

    cpus_per_task: int | None = None
    """CPU cores per process."""

    mem: str | int | None = None
    """Memory per node: 64G, or MiB."""

    account: str | None = None
    """Account the time is charged to."""

    qos: str | None = None
    """Quality of service."""

    constraint: str | None = None
    """Node features, for example a GPU type."""

    gpu_id: int | str | None = None
    """CUDA_VISIBLE_DEVICES, for clusters and machines where Slurm hands out no GPUs; refused beside `gpus_per_node`."""

    setup: list[str] = field(default_factory=list)
    """Shell lines run at the start of every job, for example `module load cuda`."""

    extra: dict[str, Any] = field(default_factory=dict)
    """Any further sbatch option by its long name, for example {reservation: friday, exclusive: true}."""

    def __post_init__(self) -> None:
        problems = []
        if self.nodes < 1:
            problems.append(f"slurm.nodes must be at least 1, got {self.nodes}")
        if self.gpus_per_node is not None and self.gpus_per_node < 1:
            problems.append(f"slurm.gpus_per_node must be at least 1 where it is given, got {self.gpus_per_node}")
        if self.gpus_per_node is not None and self.gpu_id is not None:
            problems.append("slurm.gpu_id picks a device by hand and fights slurm.gpus_per_node; keep one of them")
        try:
            self.time_limit_minutes  # noqa: B018
        except ValueError as error:
            problems.append(str(error))
        if self.warning_s is not None and self.warning_s < 1:
            problems.append(f"slurm.warning_s must be at least 1, got {self.warning_s}")
        for option in self.extra:
            if option.replace("-", "_") in OWNED_SBATCH_OPTIONS:
                problems.append(f"slurm.extra.{option} is set by the chain itself; remove it")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def time_limit_minutes(self) -> int | None:
        """`time` in whole minutes, rounded up, read as sbatch reads it."""
        if self.time is None:
            return None
        text = str(self.time)
        match = re.fullmatch(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})", text)
        if not match:
            raise ValueError(f"slurm.time must be HH:MM:SS, D-HH:MM:SS or minutes, got {text!r}")
        parts = [int(part) for part in match["clock"].split(":")]
        if match["days"] is not None:
            hours, minutes, seconds = (*parts, 0, 0)[:3]
        elif len(parts) == 3:
            hours, minutes, seconds = parts
        else:
            hours, minutes, seconds = 0, *((*parts, 0)[:2])
        total_s = (int(match["days"] or 0) * 24 + hours) * 3600 + minutes * 60 + seconds
        if total_s < 60:
            raise ValueError(f"slurm.time must be at least one minute, got {text!r}")
        return -(-total_s // 60)

    @property
    def warning_seconds(self) -> int:
        """`warning_s`, or what it is where it is unset."""
        if self.warning_s is not None:
            return self.warning_s
        return min(120, (self.time_limit_minutes or 4) * 30)

    @property
    def tasks_per_node(self) -> int:
        """Processes per node: one per GPU."""
        return self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Processes of one block."""
        return self.nodes * self.tasks_per_node


OWNED_SBATCH_OPTIONS = frozenset(
    """partition time nodes gpus_per_node cpus_per_task mem account qos constraint job_name dependency output error
    ntasks ntasks_per_node requeue kill_on_invalid_dep hold signal wrap open_mode gres chdir""".split()  # noqa: SIM905
)
"""sbatch options that keys of this section, or the chain, decide."""


@dataclass(kw_only=True, frozen=True)
class TokenizerSource:
    """Where a tokenizer is loaded from."""

    name: str
    revision: str | None
    trust_remote_code: bool


@dataclass(kw_only=True, frozen=True)
class RunConfig:
    """One run: what is trained on what, how, and where."""

    name: str
    """Name of the run and of its folder; the file's name where unset."""

    trainer: TrainerName = "finetuning"
    """Which trainer runs in the blocks."""

    cluster: Literal["auto", "slurm", "local"] = "auto"
    """`slurm` submits the chain, `local` runs it here; `auto` takes Slurm where sbatch is on the PATH."""

    seed: int = 42
    """Seed of everything random: new weights, data order, dropout."""

    runs_dir: str = "runs"
    """Folder of run folders; relative paths start at the project's folder."""

    data_dir: str = "data"
    """Folder of prepared data, shared by all runs; relative paths start at the project's folder."""

    dataset: DatasetConfig
    model: ModelConfig
    training: TrainingConfig
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    finetuning: FinetuningConfig = field(default_factory=FinetuningConfig)
    distillation: DistillationConfig | None = None
    eagle3: Eagle3Config | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if not RUN_NAME.fullmatch(self.name):
            raise ValueError(
                f"name must be letters, digits, '.', '_' and '-', starting with a letter or digit, got {self.name!r}"
            )

    @property
    def folder(self) -> Path:
        """The run folder."""
        return PROJECT / Path(self.runs_dir).expanduser() / self.name

    @property
    def data_folder(self) -> Path:
        """Where prepared data lies."""
        return PROJECT / Path(self.data_dir).expanduser()

    @property
    def tokenizer(self) -> TokenizerSource:
        """The tokenizer that makes the tokens: the one that is named, else that of the teacher whose distributions over
        them are learned, else the model's own."""
        model, distillation = self.model, self.distillation
        if model.tokenizer is not None:
            return TokenizerSource(name=model.tokenizer, revision=None, trust_remote_code=model.trust_remote_code)
        source = distillation.teacher_model if distillation and distillation.teacher != "text" else model
        return TokenizerSource(name=source.name, revision=source.revision, trust_remote_code=source.trust_remote_code)

    @property
    def spreads_evaluation(self) -> bool:
        """Whether the evaluation takes all processes of a block: what it asks lies in shards on them."""
        distillation, eagle3 = self.distillation, self.eagle3
        return (
            self.training.parallelism == "fsdp"
            or (distillation is not None and distillation.shard_teacher)
            or (eagle3 is not None and eagle3.shard_target)
        )

    @property
    def objective(self) -> Objective:
        """What the data is prepared for."""
        if self.trainer != "finetuning":
            return "mixed"
        if self.finetuning.objective in ("sft", "pretrain", "mixed"):
            return self.finetuning.objective
        if self.finetuning.online is not None:
            return "prompts"
        return "labelled" if self.finetuning.objective == "kto" else "pairs"


def read_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked settings of the run that `path` describes, with `--section.key value` overrides applied.

    Raises:
        ConfigError: everything that is wrong with file and overrides, one line each.
    """
    return run_config(read_tree(path, overrides))


def read_tree(path: Path, overrides: Sequence[str]) -> ConfigTree:
    """The values of a file with overrides applied, each with its place, before any of them is typed or checked."""
    tree = read_config_file(path)
    for key_path, value in read_overrides(overrides):
        tree.override(key_path, value)
    if tree.values.get("name") is None:
        tree.values["name"] = path.stem
    return tree


def run_config(tree: ConfigTree) -> RunConfig:
    """A tree as typed, complete and checked settings.

    Raises:
        ConfigError: everything that is wrong with it, one line each.
    """
    problems = [*secrets_in_settings(tree), *unknown_training_arguments(tree), *sections_of_other_trainers(tree)]
    move_module_keys(tree)
    fill_in_student(tree)
    config = build(RunConfig, tree.values, (), tree, problems)
    if config is not None:
        problems += contradictions(config, tree)
    if problems:
        raise ConfigError(problems)
    assert config is not None
    return config


def read_resolved_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings that a run folder's config.yaml holds: complete, and checked when the run was made.

    Raises:
        ConfigError: the file was damaged or edited, or an override is wrong.
    """
    tree = read_config_file(path)
    for key_path, value in read_overrides(overrides):
        tree.override(key_path, value)
    problems = secrets_in_settings(tree)
    move_module_keys(tree)
    config = build(RunConfig, tree.values, (), tree, problems)
    if problems:
        raise ConfigError(problems)
    assert config is not None
    return config


def move_module_keys(tree: ConfigTree) -> None:
    """Gather the keys of `dataset:` that only the dataset module knows, without losing a typing mistake among them."""
    section = tree.values.get("dataset")
    if not isinstance(section, dict):
        return
    known = {item.name for item in dataclasses.fields(DatasetConfig)}
    extra = {key: section.pop(key) for key in list(section) if key not in known and not misspelt(key, known)}
    if extra:
        section["module_keys"] = extra


def misspelt(key: str, known: set[str]) -> bool:
    return bool(difflib.get_close_matches(key, known, n=1, cutoff=0.85))


def sections_of_other_trainers(tree: ConfigTree) -> list[Problem]:
    """Take the sections out that the run's trainer does not read, and tell of them; its own is there at least empty."""
    trainer = tree.values.get("trainer") or "finetuning"
    names = get_args(TrainerName)
    if trainer not in names:
        return []
    if tree.values.get(trainer) is None:
        tree.values[trainer] = {}
    return [
        Problem(
            tree.place((name,)),
            f"{name}: only trainer: {name} reads this section, and this run has trainer: {trainer}; keep one of them",
        )
        for name in names
        if name != trainer and tree.values.pop(name, None) is not None
    ]


def fill_in_student(tree: ConfigTree) -> None:
    """Name the teacher as the model where the student is cut from it and nothing else is named."""
    distillation, model = tree.values.get("distillation"), tree.values.setdefault("model", {})
    if not isinstance(distillation, dict) or not isinstance(model, dict | None):
        return
    teacher = distillation.get("teacher_model")
    if distillation.get("from_teacher") and isinstance(teacher, dict) and "name" in teacher:
        model = tree.values["model"] = model or {}
        if model.get("name") is None:
            model |= {"name": teacher["name"], "revision": teacher.get("revision")}


def unknown_training_arguments(tree: ConfigTree) -> list[Problem]:
    """Keys of `training.arguments` that transformers does not have, or that other keys of this file decide."""
    section = tree.values.get("training")
    arguments = section.get("arguments") if isinstance(section, dict) else None
    if not isinstance(arguments, dict):
        return []
    names = training_argument_names()
    problems = []
    for key in arguments:
        path = ("training", "arguments", key)
        if key in OWNED_ARGUMENTS:
            problems.append(
                Problem(tree.place(path), f"{'.'.join(path)} is decided by {OWNED_ARGUMENTS[key]}; remove it")
            )
        elif key not in names:
            nearest = difflib.get_close_matches(key, names, n=1)
            advice = f"; did you mean {nearest[0]}?" if nearest else ""
            problems.append(Problem(tree.place(path), f"transformers.TrainingArguments has no field {key}{advice}"))
    return problems


def secrets_in_settings(tree: ConfigTree) -> list[Problem]:
    """Settings are written to the run folder, so a secret among them is refused; its value is never shown."""
    return [
        Problem(tree.place(path), f"{'.'.join(path)} looks like a secret, and settings are stored in the run folder; "
                "put it in the environment instead (HF_TOKEN for the hub)")
        for path, value in leaves(tree.values)
        if SECRET_KEY.search(path[-1]) and isinstance(value, str) and value
    ]  # fmt: skip


def contradictions(config: RunConfig, tree: ConfigTree) -> list[Problem]:
    """Settings that are fine alone and wrong together."""
    found = [
        contradictions_of_rows(config),
        contradictions_of_model(config),
        contradictions_of_adapter(config, tree.values["model"]),
        contradictions_of_parallelism(config),
        contradictions_of_scores(config),
        contradictions_of_rewards(config, packing=tree.values["dataset"].get("packing")),
        contradictions_of_draft(config),
        contradictions_of_student(config),
    ]
    return [
        Problem(tree.place(tuple(key.split("."))), message) for messages in found for key, message in messages.items()
    ]


# Each of these gives messages by key.


def contradictions_of_rows(config: RunConfig) -> dict[str, str]:
    """What cannot be asked of rows that the model attends to, or that a model writes, in this way."""
    messages = {}
    if config.model.attention != "varlen" and config.dataset.packing:
        messages["model.attention"] = (
            f"model.attention: {config.model.attention} would let packed samples see each other; "
            "use varlen, or set dataset.packing: false"
        )
    by_teacher = config.distillation is not None and config.distillation.teacher == "text"
    by_target = config.eagle3 is not None and config.eagle3.answers is not None
    if config.dataset.mask_rationale and (by_teacher or by_target):
        messages["dataset.mask_rationale"] = (
            "dataset.mask_rationale: nothing marks what is reasoning in the answers that a model writes "
            f"({'distillation.teacher: text' if by_teacher else 'eagle3.answers'}); keep one of them"
        )
    return messages


def contradictions_of_model(config: RunConfig) -> dict[str, str]:
    """What the trainer, or the objective, does not do with a model."""
    messages = {}
    if config.model.adapters and config.trainer != "finetuning":
        messages["model.adapters"] = (
            f"model.adapters are merged by trainer: finetuning only, not by {config.trainer}; merge them first and "
            "name what they made as the model"
        )
    if config.model.train_vision is not None and (config.trainer, config.objective) != ("finetuning", "sft"):
        messages["model.train_vision"] = (
            "model.train_vision is read where rows with images are learned, by trainer: finetuning with "
            "finetuning.objective: sft alone; leave it out"
        )
    return messages


def contradictions_of_adapter(config: RunConfig, given: dict[str, Any]) -> dict[str, str]:
    """What cannot be said beside the kind of adapter, or without one; `given` is what the file says of the model."""
    if not config.model.peft:
        keys = [key for key in ("lora", "peft_method", "adapter", "experts") if given.get(key) is not None]
        return {f"model.{key}": f"model.{key} is read only where model.peft is true" for key in keys}
    method = config.model.peft_method
    messages = {}
    if method not in (*LORA_FAMILY, EXPERTS) and given.get("lora") is not None:
        messages["model.lora"] = f"model.lora is not read by {method}; its options go into model.adapter"
    if method != EXPERTS and given.get("experts") is not None:
        messages["model.experts"] = f"model.experts is read only by model.peft_method: {EXPERTS}"
    if is_prompt_method(method) and config.dataset.packing:
        messages["model.peft_method"] = (
            f"model.peft_method: {method} stands before every sample, so each sample is a row of its own, and packs of "
            "them would mostly be padding; set dataset.packing: false"
        )
    if config.trainer != "finetuning" and (method == EXPERTS or is_prompt_method(method)):
        messages["model.peft_method"] = (
            f"model.peft_method: {method} is trained by trainer: finetuning only, not by {config.trainer}; use lora"
        )
    preference = config.finetuning.preference if config.trainer == "finetuning" else None
    if preference is not None and (method == EXPERTS or is_prompt_method(method)):
        messages["model.peft_method"] = (
            f"model.peft_method: {method} does not learn from preferences; use lora, or finetuning.objective: sft"
        )
    if preference is not None and preference.has_reference and "init_lora_weights" in config.model.adapter:
        messages["model.adapter"] = (
            "model.adapter.init_lora_weights: the reference of preferences is the model with its adapter off, and "
            "other first weights change the model below; leave it out"
        )
    if config.training.parallelism != "ddp" and method in (EXPERTS, "adalora"):
        messages["model.peft_method"] = (
            f"model.peft_method: {method} looks at whole weights between the steps, which training.parallelism: "
            f"{config.training.parallelism} keeps in shards; use training.parallelism: ddp"
        )
    return messages


def contradictions_of_parallelism(config: RunConfig) -> dict[str, str]:
    """What cannot be spread over processes."""
    parallelism, distillation = config.training.parallelism, config.distillation
    optimizer = config.training.arguments.get("optim", SHARDED_OPTIMIZERS[0])
    messages = {}
    if parallelism == "deepspeed" and distillation is not None and distillation.on_policy.share:
        messages["distillation.on_policy"] = (
            "distillation.on_policy: a student that training.parallelism: deepspeed spreads over processes cannot "
            "write answers here; use training.parallelism: ddp or fsdp, or set distillation.on_policy.share: 0"
        )
    if parallelism == "fsdp" and config.model.dtype == "float16":
        messages["model.dtype"] = (
            "model.dtype: float16 scales its losses by the gradients, which training.parallelism: fsdp keeps in "
            "shards; use bfloat16"
        )
    if parallelism == "fsdp" and config.model.peft and config.model.peft_method == "qlora":
        messages["model.peft_method"] = (
            "model.peft_method: qlora holds its base in 4 bits, which training.parallelism: fsdp cannot spread; use "
            "ddp, or lora"
        )
    if parallelism == "fsdp" and optimizer not in SHARDED_OPTIMIZERS:
        messages["training.arguments.optim"] = (
            "training.arguments.optim: training.parallelism: fsdp spreads the state of "
            f"{', '.join(SHARDED_OPTIMIZERS)}, not that of {optimizer}"
        )
    return messages


def contradictions_of_scores(config: RunConfig) -> dict[str, str]:
    """What cannot be scored of a model."""
    is_reward_model = config.trainer == "finetuning" and config.finetuning.objective == "reward"
    if config.evaluation.lm_eval is None or not (config.eagle3 is not None or is_reward_model):
        return {}
    kind = "a reward model" if is_reward_model else "a draft head"
    return {
        "evaluation.lm_eval": "evaluation.lm_eval: its tasks are for models that write texts, which "
        f"{kind} does not; leave it out"
    }


def contradictions_of_rewards(config: RunConfig, *, packing: Any) -> dict[str, str]:
    """What cannot be said of a phase whose answers the model writes itself; `packing` as the file has it, or None."""
    if config.trainer != "finetuning" or config.finetuning.online is None:
        return {}
    return online_contradictions(config.finetuning.online, config.model, config.training, packing=packing)


def contradictions_of_draft(config: RunConfig) -> dict[str, str]:
    """What cannot be said of the target of a draft head."""
    problems = target_problems(config.model, config.training) if config.eagle3 is not None else []
    return {problem.partition(":")[0]: problem for problem in problems}


def contradictions_of_student(config: RunConfig) -> dict[str, str]:
    """What cannot be said of a student that is cut from its teacher."""
    if config.distillation is None or config.distillation.from_teacher is None:
        return {}
    model, teacher = config.model, config.distillation.teacher_model
    messages = {}
    if (model.name, model.revision) != (teacher.name, teacher.revision):
        messages["model.name"] = (
            f"model.name: {model.name} is not the teacher ({teacher.name}) that distillation.from_teacher cuts the "
            "student from; leave out one of them"
        )
    if model.from_scratch:
        messages["model.from_scratch"] = (
            "model.from_scratch would throw away the layers that distillation.from_teacher takes; keep one of them"
        )
    return messages


def resolved_values(config: RunConfig) -> dict[str, Any]:
    """Every setting as plain values, in the shape of the YAML file; what config.yaml in the run folder holds."""
    values: dict[str, Any] = with_text_keys(dataclasses.asdict(config))
    values["dataset"].update(values["dataset"].pop("module_keys"))
    return {key: value for key, value in values.items() if key == config.trainer or key not in get_args(TrainerName)}


def with_text_keys(value: Any) -> Any:
    """The value with the keys of all its mappings as texts, as they are read from YAML."""
    if isinstance(value, dict):
        return {str(key): with_text_keys(item) for key, item in value.items()}
    return value
