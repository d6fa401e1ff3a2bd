"""What trainers are told: model, adapters, optimisation, evaluation. No torch here, so a login node can check a run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from training.adapter_options import adapter_problems
from training.online_config import ONLINE_CONFIGS, GrpoConfig, OnlineConfig, RlooConfig

LearningRateSchedule = Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"]
ExtensionPolicy = Literal["constant", "rewarm", "stretch"]
Parallelism = Literal["ddp", "fsdp", "deepspeed"]


@dataclass(kw_only=True, frozen=True)
class LoraConfig:
    """Low-rank adapters (peft), read where `model.peft` is true."""

    r: int = 16
    """Rank of the update."""

    alpha: int = 32
    """Scale; the update is multiplied by alpha / r."""

    dropout: float = 0.0
    """Dropout on the adapter's input."""

    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get an adapter, or `all-linear` for every linear layer but the output head."""

    modules_to_save: list[str] = field(default_factory=list)
    """Layers trained in full beside the adapters."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"model.lora.r must be at least 1, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.lora.dropout must be in [0, 1), got {self.dropout}")


@dataclass(kw_only=True, frozen=True)
class LoraExpertsConfig:
    """Experts of `model.peft_method: lora_moe`, each a LoRA as `model.lora` says, and the router between them."""

    num: int = 4
    """Experts of every layer in the first epoch."""

    top_k: int = 2
    """Experts that work on a token."""

    balance_coefficient: float = 0.01
    """Weight of the load-balance loss, which is 1 where all experts have as much to do."""

    grow_every_epochs: int | None = None
    """One more expert wakes after so many epochs. Unset: as many from the beginning to the end."""

    max_num: int | None = None
    """Experts to grow to; needed beside `grow_every_epochs`."""

    def __post_init__(self) -> None:
        problems = []
        if self.num < 1:
            problems.append(f"model.experts.num must be at least 1, got {self.num}")
        if not 1 <= self.top_k <= self.num:
            problems.append(f"model.experts.top_k must be from 1 to model.experts.num ({self.num}), got {self.top_k}")
        if self.balance_coefficient < 0:
            problems.append(f"model.experts.balance_coefficient must not be negative, got {self.balance_coefficient}")
        if self.grow_every_epochs is not None and self.grow_every_epochs < 1:
            problems.append(f"model.experts.grow_every_epochs must be at least 1, got {self.grow_every_epochs}")
        if (self.grow_every_epochs is None) != (self.max_num is None):
            problems.append("model.experts.max_num and model.experts.grow_every_epochs need each other")
        if self.max_num is not None and self.max_num < self.num:
            problems.append(f"model.experts.max_num must be at least num ({self.num}), got {self.max_num}")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def most(self) -> int:
        """The experts that there will be."""
        return self.max_num or self.num

    def num_at(self, epoch: int) -> int:
        """The experts that are awake in this epoch, counted from 0."""
        added = epoch // self.grow_every_epochs if self.grow_every_epochs else 0
        return min(self.most, self.num + added)


@dataclass(kw_only=True, frozen=True)
class ModelConfig:
    """The model to train, and whether in full or through adapters."""

    name: str
    """Hub id, or a folder with config.json."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    tokenizer: str | None = None
    """Hub id or folder of the tokenizer. Unset: the model's own."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the forward pass. `auto`: bfloat16 on a GPU that has it, float32 elsewhere."""

    from_scratch: bool = False
    """Random weights from the model's config instead of its trained ones."""

    attention: Literal["varlen", "sdpa", "eager"] = "varlen"
    """`varlen` attends inside each packed sample only and needs no mask; the others need `dataset.packing: false`."""

    trust_remote_code: bool = False
    """Run Python code shipped with the model. Read it first."""

    peft: bool = False
    """Train adapters instead of all weights."""

    peft_method: str = "lora"
    """Kind of adapter: lora, rslora, dora, qlora (the base in 4 bits, needs bitsandbytes), lora_moe (several experts
    and a router), or any of peft's methods for causal language models by peft's name."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    """Shape of the adapters of lora, rslora, dora, qlora, and of each expert of lora_moe."""

    experts: LoraExpertsConfig = field(default_factory=LoraExpertsConfig)
    """The experts of lora_moe."""

    adapter: dict[str, Any] = field(default_factory=dict)
    """Options of `peft_method`: the fields of its config class in peft, as {init_lora_weights: pissa} of lora."""

    adapters: list[str] = field(default_factory=list)
    """Folders of adapters trained before, merged into the model in this order before anything is trained."""

    merge_adapter: bool = False
    """Export the base model with the adapter merged in, beside the adapter."""

    train_vision: bool | None = None
    """Train the vision tower of an image-text model too. Unset: where all weights are trained, and not by adapters."""

    checkpoint_dir: str | None = None
    """Folder that receives the trained model. Unset: `export/` in the run folder."""

    def __post_init__(self) -> None:
        if self.merge_adapter and not self.peft:
            raise ValueError("model.merge_adapter needs model.peft: true")
        if self.from_scratch and self.peft:
            raise ValueError("model.from_scratch cannot be combined with model.peft: an adapter on random weights")
        if self.adapters and self.from_scratch:
            raise ValueError("model.adapters belong to trained weights, which model.from_scratch does not have")
        if self.adapters and self.peft and self.peft_method == "qlora":
            raise ValueError("model.adapters cannot be merged into the 4 bits of model.peft_method: qlora; use lora")
        if self.adapters and self.peft and not self.merge_adapter:
            raise ValueError(
                "model.adapters needs model.merge_adapter: true: a new adapter fits model.name only with those below it"
            )
        problems = adapter_problems(self.peft_method, self.adapter, merge=self.merge_adapter) if self.peft else []
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(kw_only=True, frozen=True)
class Extension:
    """Blocks that `./train.sh extend` added to a run, and how the learning rate goes on."""

    jobs: int
    """Blocks added."""

    lr_policy: ExtensionPolicy
    """`constant`: the rate that the old horizon ended with. `rewarm`: a linear warmup to `training.lr`, then
    `training.lr_scheduler` over the added epochs. `stretch`: `training.lr_scheduler` as if the horizon had been the
    longer one from the beginning."""

    from_step: int
    """Optimizer steps before the policy holds: the old horizon; for `stretch`, those that were done already."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"an extension needs at least 1 job, got {self.jobs}")
        if self.from_step < 0:
            raise ValueError(f"an extension cannot begin at step {self.from_step}")

    def __str__(self) -> str:
        return f"{self.lr_policy} for {self.jobs} more jobs from step {self.from_step}"


@dataclass(kw_only=True, frozen=True)
class FsdpConfig:
    """How torch's fully_shard (FSDP2) spreads the model, read where `training.parallelism` is fsdp."""

    reshard_after_forward: bool = True
    """Give a layer's weights up after its forward pass and gather them again for its backward pass. `false` keeps them:
    less traffic, and the memory of all weights."""

    cpu_offload: bool = False
    """Keep weights, gradients and the optimizer in the node's memory, and step there: slow, for the last few GB."""

    wrap: list[str] = field(default_factory=list)
    """Classes of modules whose weights are gathered together. Unset: the decoder layers, as the model names them. What
    sees, and layers that look at images, are gathered with all the rest, as batches of texts leave them out."""


@dataclass(kw_only=True, frozen=True)
class DeepspeedConfig:
    """How DeepSpeed's ZeRO spreads the training, read where `training.parallelism` is deepspeed."""

    stage: int = 2
    """1: the optimizer's state is spread over the processes; 2: the gradients too. Each holds all weights."""

    offload_optimizer: bool = False
    """Keep the optimizer's state in the node's memory, and step there."""

    options: dict[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's own config, as {zero_optimization: {reduce_bucket_size: 5e8}}."""

    def __post_init__(self) -> None:
        given = [key for key in DEEPSPEED_OWNED if key in self.options]
        zero = self.options.get("zero_optimization") or {}
        given += [f"zero_optimization.{key}" for key in ("stage", "offload_optimizer", "offload_param") if key in zero]
        problems = [
            f"training.deepspeed.options.{key}: {DEEPSPEED_OWNED.get(key, 'training.deepspeed')} decides it; remove it"
            for key in given
        ]
        if self.stage not in (1, 2):
            problems.append(
                f"training.deepspeed.stage must be 1 or 2, got {self.stage}; to spread the weights too (stage 3), use "
                "training.parallelism: fsdp, since the losses need the whole output head"
            )
        if problems:
            raise ValueError("\n".join(problems))


SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Values of training.arguments.optim whose state is as large as the weights, number by number, or nothing: what fsdp
can spread."""

DEEPSPEED_OWNED = {
    "train_batch_size": "training.batch_size, training.gradient_accumulation and the number of processes",
    "train_micro_batch_size_per_gpu": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.lr, training.weight_decay and training.arguments.optim",
    "scheduler": "training.lr_scheduler",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}
"""Keys of DeepSpeed's config that other keys of a run decide, and which."""


@dataclass(kw_only=True, frozen=True)
class TrainingConfig:
    """Optimisation over the whole chain. The horizon is `epochs_per_job` x `total_jobs` epochs, and its extensions."""

    lr: float
    """Peak learning rate, reached at the end of warmup."""

    batch_size: int = 8
    """Rows (packs, where the dataset is packed) per device and micro-batch."""

    epochs_per_job: int = 1
    """Epochs in one block of the chain."""

    total_jobs: int = 1
    """Blocks in the chain."""

    extensions: list[Extension] = field(default_factory=list)
    """Blocks added later, oldest first; written by `./train.sh extend`."""

    gradient_accumulation: int = 1
    """Micro-batches per optimizer step; gradients are normalised by the global token count."""

    lr_scheduler: LearningRateSchedule = "cosine"
    """Shape of the learning rate after warmup, over the whole horizon."""

    warmup: float = 0.03
    """Linear warmup from 0: a share of the horizon when below 1, else optimizer steps."""

    weight_decay: float = 0.0
    """AdamW weight decay."""

    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""

    save_every: str | int | None = None
    """Checkpoints inside a block: optimizer steps (200) or time (30m, 2h). Unset: at block ends only."""

    keep_checkpoints: int = 2
    """Newest checkpoints to keep, at least 2."""

    log_every: int = 10
    """Optimizer steps between lines in metrics.jsonl."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    parallelism: Parallelism = "ddp"
    """How processes train one model, each on its share of the rows. `ddp`: each holds the whole model. `fsdp`: weights,
    gradients and the optimizer's state are spread over all of them. `deepspeed`: gradients and state are, by ZeRO; it
    needs `pip install .[deepspeed]`."""

    fsdp: FsdpConfig | None = None
    """Settings of the parallelism of this name."""

    deepspeed: DeepspeedConfig | None = None
    """Settings of the parallelism of this name."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Any field of transformers.TrainingArguments that this kit does not set itself."""

    def __post_init__(self) -> None:
        problems = []
        if self.lr <= 0:
            problems.append(f"training.lr must be above 0, got {self.lr}")
        for key in ("batch_size", "epochs_per_job", "total_jobs", "gradient_accumulation", "log_every"):
            if getattr(self, key) < 1:
                problems.append(f"training.{key} must be at least 1, got {getattr(self, key)}")
        if self.keep_checkpoints < 2:
            problems.append(f"training.keep_checkpoints must be at least 2, got {self.keep_checkpoints}")
        if self.warmup < 0:
            problems.append(f"training.warmup must not be negative, got {self.warmup}")
        problems += [
            f"training.{name} is read only where training.parallelism is {name}, and it is {self.parallelism}"
            for name in ("fsdp", "deepspeed")
            if name != self.parallelism and getattr(self, name) is not None
        ]
        try:
            _ = self.save_interval
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def save_interval(self) -> SaveInterval:
        """`save_every`, read as steps or seconds."""
        if self.save_every is None:
            return SaveInterval()
        text = str(self.save_every).strip()
        match = re.fullmatch(r"(\d+)\s*(steps?|s|m|min|h)?", text)
        if not match or int(match[1]) < 1:
            raise ValueError(f"training.save_every must be steps (200) or a time (90s, 30m), got {self.save_every!r}")
        number, unit = int(match[1]), match[2]
        if unit in (None, "step", "steps"):
            return SaveInterval(steps=number)
        return SaveInterval(seconds=number * {"s": 1, "m": 60, "min": 60, "h": 3600}[unit])

    @property
    def optimization(self) -> str:
        """How weights are updated, in words: a checkpoint is resumed under these settings only."""
        words = f"lr {self.lr}, {self.lr_scheduler}, warmup {self.warmup}, weight decay {self.weight_decay}"
        return ", then ".join([words, *map(str, self.extensions)])

    @property
    def num_jobs(self) -> int:
        """Blocks in the chain, extensions included."""
        return self.total_jobs + sum(extension.jobs for extension in self.extensions)

    def before_extension(self, number: int) -> TrainingConfig:
        """The settings before the extension of this number, counted from 0, and those after it were made."""
        return replace(self, extensions=self.extensions[:number])

    def warmup_steps(self, horizon_steps: int) -> int:
        """Optimizer steps of warmup for a horizon of `horizon_steps`."""
        return round(self.warmup * horizon_steps) if self.warmup < 1 else round(self.warmup)


@dataclass(kw_only=True, frozen=True)
class SaveInterval:
    """When to save inside a block: after so many steps, or so many seconds. Both unset: never."""

    steps: int | None = None
    seconds: int | None = None


@dataclass(kw_only=True, frozen=True)
class DpoConfig:
    """Direct preference optimisation, read where `finetuning.objective` is dpo."""

    loss: Literal["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "simpo"] = "sigmoid"
    """How a pair's margin becomes a loss; each with its paper in training/preference_losses.py. `sigmoid_norm` and
    `simpo` divide log-probabilities by the answer's tokens, and `simpo` needs no reference."""

    beta: float = 0.1
    """Strength of the pull to the reference; for `ipo` its tau."""

    label_smoothing: float = 0.0
    """Share of pairs taken to be labelled the wrong way round, below 0.5; for `sigmoid` and `robust`."""

    gamma: float = 0.0
    """Margin by which `simpo` wants the chosen answer to win, in units of reward."""

    sft_weight: float = 0.0
    """Weight of the chosen answer's mean cross entropy beside the loss."""

    precompute_reference: bool = False
    """Ask the reference about all answers once, before the first block, and keep what it says beside the prepared
    data: no block then holds or runs a second model."""

    def __post_init__(self) -> None:
        problems = []
        if self.beta <= 0:
            problems.append(f"finetuning.dpo.beta must be above 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            problems.append(f"finetuning.dpo.label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            problems.append(f"finetuning.dpo.label_smoothing is read by sigmoid and robust only, not by {self.loss}")
        if self.gamma and self.loss != "simpo":
            problems.append(f"finetuning.dpo.gamma is read by simpo only, not by {self.loss}")
        if self.sft_weight < 0:
            problems.append(f"finetuning.dpo.sft_weight must not be negative, got {self.sft_weight}")
        if self.precompute_reference and not self.has_reference:
            problems.append("finetuning.dpo.precompute_reference: simpo has no reference; leave it out")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with the model as the chain began with it."""
        return self.loss != "simpo"


@dataclass(kw_only=True, frozen=True)
class KtoConfig:
    """Kahneman-Tversky optimisation on answers labelled one by one, read where `finetuning.objective` is kto."""

    beta: float = 0.1
    """Strength of the pull to the reference."""

    desirable_weight: float = 1.0
    """Weight of the loss of desirable answers."""

    undesirable_weight: float = 1.0
    """Weight of the loss of undesirable answers."""

    precompute_reference: bool = False
    """As `finetuning.dpo.precompute_reference`."""

    has_reference = True

    def __post_init__(self) -> None:
        problems = []
        if self.beta <= 0:
            problems.append(f"finetuning.kto.beta must be above 0, got {self.beta}")
        for key in ("desirable_weight", "undesirable_weight"):
            if getattr(self, key) < 0:
                problems.append(f"finetuning.kto.{key} must not be negative, got {getattr(self, key)}")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(kw_only=True, frozen=True)
class OrpoConfig:
    """Odds ratio preference optimisation, read where `finetuning.objective` is orpo."""

    odds_weight: float = 0.1
    """Weight of the odds ratio beside the chosen answer's cross entropy."""

    has_reference = False
    precompute_reference = False

    def __post_init__(self) -> None:
        if self.odds_weight <= 0:
            raise ValueError(f"finetuning.orpo.odds_weight must be above 0, got {self.odds_weight}")


@dataclass(kw_only=True, frozen=True)
class RewardConfig:
    """A reward model on pairs, read where `finetuning.objective` is reward."""

    margin: float = 0.0
    """Difference of rewards that the chosen answer should win by."""

    centring: float = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps rewards around 0."""

    has_reference = False
    precompute_reference = False

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise ValueError(f"finetuning.reward.margin must not be negative, got {self.margin}")
        if self.centring < 0:
            raise ValueError(f"finetuning.reward.centring must not be negative, got {self.centring}")


PreferenceConfig = DpoConfig | KtoConfig | OrpoConfig | RewardConfig

PREFERENCE_CONFIGS: dict[str, type[PreferenceConfig]] = {
    "dpo": DpoConfig,
    "kto": KtoConfig,
    "orpo": OrpoConfig,
    "reward": RewardConfig,
}


@dataclass(kw_only=True, frozen=True)
class FinetuningConfig:
    """The finetuning trainer."""

    objective: Literal["sft", "pretrain", "mixed", "dpo", "kto", "orpo", "reward", "grpo", "rloo"] = "sft"
    """`sft`: loss on assistant turns. `pretrain`: loss on every token. `mixed`: on assistant turns of conversations
    and on every token of plain texts. `dpo`, `orpo`: of two answers the chosen one becomes likelier. `kto`: the same
    of answers labelled one by one. `reward`: a model that gives the chosen answer the higher number. `grpo`, `rloo`:
    the model answers prompts itself, and the answers with the higher reward become likelier."""

    dpo: DpoConfig | None = None
    """Settings of the objective of this name."""

    kto: KtoConfig | None = None
    """Settings of the objective of this name."""

    orpo: OrpoConfig | None = None
    """Settings of the objective of this name."""

    reward: RewardConfig | None = None
    """Settings of the objective of this name."""

    grpo: GrpoConfig | None = None
    """Settings of the objective of this name."""

    rloo: RlooConfig | None = None
    """Settings of the objective of this name."""

    def __post_init__(self) -> None:
        problems = [
            f"finetuning.{name} is read only where finetuning.objective is {name}, and it is {self.objective}"
            for name in (*PREFERENCE_CONFIGS, *ONLINE_CONFIGS)
            if name != self.objective and getattr(self, name) is not None
        ]
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def preference(self) -> PreferenceConfig | None:
        """The settings of an objective that learns from preferences; None for the others."""
        if self.objective not in PREFERENCE_CONFIGS:
            return None
        given: PreferenceConfig | None = getattr(self, self.objective)
        return given or PREFERENCE_CONFIGS[self.objective]()

    @property
    def online(self) -> OnlineConfig | None:
        """The settings of an objective whose answers the model writes itself; None for the others."""
        if self.objective not in ONLINE_CONFIGS:
            return None
        given: OnlineConfig | None = getattr(self, self.objective)
        return given or ONLINE_CONFIGS[self.objective]()


@dataclass(kw_only=True, frozen=True)
class LmEvalConfig:
    """Tasks of lm-evaluation-harness, for which .venv needs its package: pip install lm-eval."""

    tasks: list[str]
    """Names of tasks and groups, as `lm-eval ls tasks` lists them. Those that run a model's code are refused."""

    num_fewshot: int | None = None
    """Examples before each question. Unset: as each task says."""

    limit: int | None = None
    """Questions of each task. Unset: all."""

    batch_size: int | None = None
    """Rows per batch. Unset: `evaluation.batch_size`."""

    apply_chat_template: bool = False
    """Ask in the turns of the model's chat template."""

    include_path: str | None = None
    """A folder with tasks of your own, in the harness's YAML."""

    def __post_init__(self) -> None:
        problems = []
        if not self.tasks:
            problems.append("evaluation.lm_eval.tasks names no task; name one, or leave evaluation.lm_eval out")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            problems.append(f"evaluation.lm_eval.num_fewshot must not be negative, got {self.num_fewshot}")
        for key in ("limit", "batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                problems.append(f"evaluation.lm_eval.{key} must be at least 1, got {value}")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(kw_only=True, frozen=True)
class EvaluationConfig:
    """The last job of the chain: scores on the test split."""

    limit: int = 100
    """Rows to generate answers for, where the dataset module has `score`; 0 turns generation off."""

    max_new_tokens: int = 256
    """Longest generated answer."""

    batch_size: int | None = None
    """Rows per evaluation batch. Unset: `training.batch_size`."""

    unprotected_code: bool = False
    """Run answers that are code also on a machine that cannot protect itself from them, with what protection it has."""

    lm_eval: LmEvalConfig | None = None
    """Tasks of lm-evaluation-harness to score the model on."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"evaluation.limit must not be negative, got {self.limit}")
        if self.max_new_tokens < 1:
            raise ValueError(f"evaluation.max_new_tokens must be at least 1, got {self.max_new_tokens}")
