"""The fields of transformers.TrainingArguments, known without importing torch."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

OWNED_ARGUMENTS: dict[str, str] = {
    "output_dir": "runs_dir and name",
    "seed": "seed",
    "data_seed": "seed",
    "per_device_train_batch_size": "training.batch_size",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "learning_rate": "training.lr",
    "num_train_epochs": "training.epochs_per_job and training.total_jobs",
    "max_steps": "training.epochs_per_job and training.total_jobs",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "lr_scheduler_type": "training.lr_scheduler",
    "lr_scheduler_kwargs": "training.lr_scheduler",
    "warmup_steps": "training.warmup",
    "warmup_ratio": "training.warmup",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "save_strategy": "training.save_every",
    "save_steps": "training.save_every",
    "save_total_limit": "training.keep_checkpoints",
    "save_only_model": "the chain: every checkpoint is a resume point",
    "load_best_model_at_end": "the chain: every block continues the newest checkpoint",
    "logging_strategy": "training.log_every",
    "logging_steps": "training.log_every",
    "eval_strategy": "the chain: the test split is scored at block ends",
    "eval_steps": "the chain: the test split is scored at block ends",
    "logging_first_step": "training.log_every; the first and last step of a block are always logged",
    "logging_nan_inf_filter": "the trainer: a loss that is not finite ends the chain",
    "include_num_input_tokens_seen": "the trainer: metrics.jsonl counts tokens",
    "eval_on_start": "the chain: the test split is scored at block ends",
    "label_smoothing_factor": "the trainer: the loss is plain cross entropy",
    "auto_find_batch_size": "training.batch_size; another one would break exact resume",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "training.gradient_checkpointing",
    "activation_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing_kwargs": "training.gradient_checkpointing",
    "dataloader_drop_last": "the packed batches: every row is trained on in every epoch",
    "parallelism_config": "training.parallelism",
    "fsdp": "training.parallelism: fsdp, and training.fsdp",
    "deepspeed": "training.parallelism: deepspeed, and training.deepspeed",
    "fsdp_config": "training.parallelism: fsdp, and training.fsdp",
    "ddp_backend": "the trainer: NCCL on GPUs, gloo on the CPU",
    "ddp_timeout": "the trainer: 30 minutes",
    "use_cpu": "the machine: a GPU is used where there is one",
    "disable_tqdm": "the trainer: a job's log gets one line per logging step",
    "log_level": "the trainer",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "remove_unused_columns": "the packed batches",
    "group_by_length": "the packed batches; random grouping would break exact resume",
    "train_sampling_strategy": "the packed batches; random grouping would break exact resume",
    "average_tokens_across_devices": "the trainer: gradients are normalised by the global token count",
    "ignore_data_skip": "the trainer: a resumed block starts at its row",
    "resume_from_checkpoint": "the chain: every block continues the newest valid checkpoint",
    "enable_jit_checkpoint": "the chain",
    "overwrite_output_dir": "the chain",
    "do_train": "the chain",
    "do_eval": "the chain",
    "do_predict": "the chain",
    "push_to_hub": "you: publish the export folder when you have looked at it",
}
"""Fields that other keys of a run decide, and which; giving them twice would be a contradiction."""


@cache
def training_argument_names() -> frozenset[str]:
    """Every field of transformers.TrainingArguments, read from its source: importing it costs six seconds."""
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.submodule_search_locations, "transformers is in requirements.lock"
    source = Path(package.submodule_search_locations[0], "training_args.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            annotated = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
            return frozenset(target.id for target in annotated if isinstance(target, ast.Name))
    raise AssertionError("transformers/training_args.py has no class TrainingArguments")
