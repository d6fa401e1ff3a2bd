"""Adapters on a frozen model: put on, stepped, kept in checkpoints, exported; peft's own and LoRA experts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from training import adalora, lora_experts
from training.adapter_options import EXPERTS, LORA_FAMILY, OWN_TARGETS, adapter_method
from training.batches import IGNORED, Batch
from training.config import LoraExpertsConfig, ModelConfig
from training.lora_experts import ExpertsShape
from training.losses import output_head
from training.schedule import Horizon

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

STATE_FILE = "trained_model.safetensors"
"""In a checkpoint: all that is trained, by its name in the model, and what the method remembers between steps."""

NUM_AWAKE = "experts_awake"

Task = Literal["CAUSAL_LM", "SEQ_CLS"]
"""What a model is for, in peft's words: to write texts, or to classify them."""


# ----------------------------------------------------------------------------------------------------------- put on


def add_adapter(
    network: PreTrainedModel,
    model: ModelConfig,
    *,
    seed: int,
    task: Task = "CAUSAL_LM",
    leave_alone: str | None = None,
) -> PreTrainedModel | PeftModel:
    """The frozen model with a new adapter of `model.peft_method`; the seed decides its weights.

    The part of the model that is named `leave_alone` gets none. The head of a classifier is trained in full beside it.

    Raises ValueError, naming the key and the model's layers, where the adapter does not fit the model.
    """
    import peft

    if model.peft_method == "qlora":
        network = peft.prepare_model_for_kbit_training(network, use_gradient_checkpointing=False)
    set_seed(seed)
    section = "model.lora" if model.peft_method in (*LORA_FAMILY, EXPERTS) and not model.adapter else "model.adapter"
    try:
        if model.peft_method == EXPERTS:
            if leave_alone is not None:
                raise ValueError("it cannot leave the vision tower alone; use lora, or set model.train_vision: true")
            lora_experts.add_lora_experts(network, experts_shape(model), num_awake=model.experts.num)
            return network
        adapted = peft.get_peft_model(network, peft_config(model, task, leave_alone))
        if not any(weight.requires_grad for weight in adapted.parameters()):
            raise ValueError("it matches no layer, so nothing would be trained")
        if task == "CAUSAL_LM":
            output_head(network)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        layers = sorted(
            {name.rpartition(".")[2] for name, layer in network.named_modules() if not list(layer.children())}
        )
        raise ValueError(
            f"{section}: {model.peft_method} does not fit this model: {error}\nThe model's layers: {', '.join(layers)}"
        ) from error
    if is_prompt(adapted):
        give_each_sample_a_row(adapted)
    if adalora.has_rank_allocator(adapted):
        adalora.leave_loss_alone(adapted)
    return adapted


def merge_adapters(network: PreTrainedModel, folders: Sequence[str]) -> PreTrainedModel:
    """The model with adapters that were trained before as a part of its weights, one after another."""
    from peft import PeftConfig, PeftModel

    for folder in folders:
        try:
            config = PeftConfig.from_pretrained(folder)
            config.task_type = None  # what a model that writes has learned may begin one that classifies
            network = PeftModel.from_pretrained(network, folder, config=config).merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ValueError(f"model.adapters: {folder} cannot be merged into this model: {error}") from error
    return network.requires_grad_(True)


def experts_shape(model: ModelConfig) -> ExpertsShape:
    lora, experts = model.lora, model.experts
    return ExpertsShape(
        num_experts=experts.most,
        top_k=experts.top_k,
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
    )


def peft_config(model: ModelConfig, task: Task, leave_alone: str | None) -> Any:
    """The config object of peft for `model.peft_method`, which leaves alone the part of the model of this name."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    options = dict(model.adapter)
    if leave_alone is not None:
        if "exclude_modules" not in adapter_method(model.peft_method).options:
            raise ValueError("it cannot leave the vision tower alone; use lora, or set model.train_vision: true")
        options["exclude_modules"] = excluded_modules(leave_alone, options.get("exclude_modules"))
    if model.peft_method in LORA_FAMILY:
        return peft.LoraConfig(
            task_type=task,
            r=model.lora.r,
            lora_alpha=model.lora.alpha,
            lora_dropout=model.lora.dropout,
            target_modules=model.lora.target_modules,
            modules_to_save=model.lora.modules_to_save or None,
            use_dora=model.peft_method == "dora",
            use_rslora=model.peft_method == "rslora",
            **options,
        )
    if "target_modules" in adapter_method(model.peft_method).options and model.peft_method not in OWN_TARGETS:
        options.setdefault("target_modules", "all-linear")
    if model.peft_method == "adalora":
        options["total_step"] = adalora.placeholder_steps(options)
    return PEFT_TYPE_TO_CONFIG_MAPPING[model.peft_method.upper()](task_type=task, **options)


def excluded_modules(leave_alone: str, excluded: str | list[str] | None) -> str:
    """A pattern, as peft matches it with whole names, of a part of the model and of what the user leaves out beside it:
    a pattern too, or the ends of names."""
    patterns = [rf"{re.escape(leave_alone)}\..*"]
    if isinstance(excluded, str):
        patterns.append(excluded)
    elif excluded:
        patterns.append(rf"(?:.*\.)?(?:{'|'.join(map(re.escape, excluded))})")
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def is_adapter(model: nn.Module) -> bool:
    """Whether the model is one of peft's."""
    return hasattr(model, "peft_config")


def is_prompt(model: nn.Module) -> bool:
    return is_adapter(model) and bool(model.active_peft_config.is_prompt_learning)  # type: ignore[union-attr]


def give_each_sample_a_row(adapted: PeftModel) -> None:
    """Have the forward pass take flat batches: what stands before a text must stand before each of them."""
    forward = adapted.forward

    def forward_rows(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **(padded_rows(kwargs) if "cu_seq_lens_q" in kwargs else kwargs))

    adapted.forward = forward_rows


def padded_rows(batch: Batch) -> Batch:
    """A flat batch with each sample in a row of its own, padded on the right and masked."""
    flat = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids"}
    rows = {key: value for key, value in batch.items() if key not in flat}
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    rows["attention_mask"] = pad_sequence(
        [torch.ones(length, dtype=torch.long, device=batch["input_ids"].device) for length in lengths], batch_first=True
    )
    for key, padding in (("input_ids", 0), ("labels", IGNORED)):
        if key in batch:
            rows[key] = pad_sequence(batch[key][0].split(lengths), batch_first=True, padding_value=padding)
    return rows


def four_bits(compute_dtype: torch.dtype) -> object:
    """The base of a QLoRA adapter: NF4 with double quantisation, as in arXiv:2305.14314."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        raise ValueError("model.peft_method: qlora needs a CUDA device, and none is here; use lora or dora")
    if find_spec("bitsandbytes") is None:
        raise ValueError("model.peft_method: qlora needs bitsandbytes (pip install bitsandbytes); or use lora or dora")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


# ---------------------------------------------------------------------------------------------------------- stepped


class AdapterSteps(TrainerCallback):
    """What a method does beside following the gradient; most do nothing."""

    def loss(self) -> torch.Tensor | None:
        """What is added to the loss of the forward pass that was made last."""
        return None

    def take(self) -> dict[str, float]:
        """Metrics since the last call."""
        return {}


def adapter_steps(
    model: nn.Module, config: ModelConfig, *, horizon: Horizon, first_horizon_steps: int
) -> AdapterSteps | None:
    """What the model's adapter does in the steps of a chain that was `first_horizon_steps` long before extensions."""
    if lora_experts.has_experts(model):
        return ExpertSteps(model, config.experts, steps_per_epoch=horizon.steps_per_epoch)
    if adalora.has_rank_allocator(model):
        adalora.set_length(model, first_horizon_steps)
        return RankSteps(model)
    return None


class RankSteps(AdapterSteps):
    """Allocates the ranks of AdaLoRA after every optimizer step."""

    def __init__(self, model: Any):
        self.model = model

    def loss(self) -> torch.Tensor:
        return adalora.orthogonality(self.model)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.model.base_model.update_and_allocate(state.global_step)


class ExpertSteps(AdapterSteps):
    """Wakes the experts of each epoch, keeps their load in balance and tells of it."""

    def __init__(self, model: nn.Module, config: LoraExpertsConfig, *, steps_per_epoch: int):
        self.routing = lora_experts.routing_of(model)
        self.layers = list(lora_experts.expert_layers(model))
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.shares: list[torch.Tensor] = []
        self.balances: list[torch.Tensor] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.routing.num_awake = self.config.num_at(state.global_step // self.steps_per_epoch)

    def loss(self) -> torch.Tensor:
        routed = [layer.take_routing() for layer in self.layers]
        balance = torch.stack([lora_experts.balance(*shares) for shares in routed]).mean()
        # Experts that sleep have done nothing.
        share = torch.stack([share for share, _ in routed]).mean(0)
        self.shares.append(nn.functional.pad(share, (0, self.config.most - len(share))))
        self.balances.append(balance.detach())
        return self.config.balance_coefficient * balance

    def take(self) -> dict[str, float]:
        """The share of the work of each expert, over all layers, and the balance: 1 is even."""
        if not self.shares:
            return {}
        shares = torch.stack(self.shares).nanmean(0).tolist()
        metrics = {f"expert_{number}": share for number, share in enumerate(shares, start=1)}
        metrics["expert_balance"] = torch.stack(self.balances).nanmean().item()
        self.shares, self.balances = [], []
        return metrics


# ------------------------------------------------------------------------------------------------ kept in checkpoints


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def save_adapter_state(
    model: nn.Module, folder: Path, *, names: Sequence[str], weights: Mapping[str, torch.Tensor] | None
) -> None:
    """Write what is trained, whole: peft's own files leave out what only training needs.

    `weights`: where they are, if not in the model, whose own are shards.
    """
    weights = dict(model.named_parameters()) if weights is None else weights
    state = {name: weights[name].detach().contiguous() for name in names}
    if lora_experts.has_experts(model):
        state[NUM_AWAKE] = torch.tensor(lora_experts.routing_of(model).num_awake)
    if adalora.has_rank_allocator(model):
        state |= adalora.allocator_state(model)
    folder.mkdir(exist_ok=True)
    save_file(state, folder / STATE_FILE, metadata={"format": "pt"})


@torch.no_grad()
def load_adapter_state(model: nn.Module, checkpoint: Path) -> None:
    """Put what a checkpoint holds into a model that was built like the one it came from."""
    state = load_file(checkpoint / STATE_FILE)
    if lora_experts.has_experts(model):
        lora_experts.routing_of(model).num_awake = int(state.pop(NUM_AWAKE))
    if adalora.has_rank_allocator(model):
        adalora.load_allocator(model, state)
    weights = dict(model.named_parameters())
    if sorted(state) != sorted(trained_names(model)):
        different = sorted(set(state) ^ set(trained_names(model)))
        raise ValueError(f"{checkpoint} holds another adapter than model.peft_method makes: {', '.join(different[:5])}")
    for name, value in state.items():
        weights[name].copy_(value)


# ------------------------------------------------------------------------------------------------- merged for a while


@torch.no_grad()
def merged_weights(adapted: PeftModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of the model with its adapter merged in, on the CPU, by the names that they have without an adapter.

    The model is as before afterwards, bit for bit: peft's own way back would round. Of the device's memory that of one
    layer is taken.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    network: Any = adapted.get_base_model()
    layers: dict[str, Any] = {
        name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)
    }
    inside = tuple(f"{name}." for name in layers)
    weights = {
        name.replace(".modules_to_save.default.", "."): weight.to("cpu", dtype)
        for name, weight in network.state_dict().items()
        if ".original_module." not in name and not name.startswith(inside)
    }
    for name, layer in layers.items():
        for part, weight in merged_layer(layer, dtype).items():
            weights[f"{name}.{part}"] = weight
    return weights


def merged_layer(layer: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of one layer with its adapter merged in, on the CPU."""
    # Some methods put other tensors in the place of the base's, some change those that are there.
    own = [(weight, weight.data, weight.data.clone()) for weight in layer.get_base_layer().parameters()]
    layer.merge(safe_merge=True)
    found = {name: weight.to("cpu", dtype, copy=True) for name, weight in layer.get_base_layer().state_dict().items()}
    layer.unmerge()
    for weight, data, content in own:
        weight.data = data.copy_(content)
    return found


def has_own_head(adapted: PeftModel) -> bool:
    """Whether the adapter trains head or embedding apart from each other, even if the model ties them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    network: Any = adapted.get_base_model()
    ends = (network.get_output_embeddings(), network.get_input_embeddings())
    return any(isinstance(end, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for end in ends)


# --------------------------------------------------------------------------------------------------------- exported


def export_adapter(model: Any, folder: Path, config: ModelConfig, *, step: int) -> None:
    """Write the adapter alone, as peft reads it, with a card that says what it is and how to load it."""
    if is_adapter(model):
        model.save_pretrained(folder)
    else:
        lora_experts.save_lora_experts(model, folder, base_model=config.name)
    (folder / "README.md").write_text(adapter_card(model, config, step=step), encoding="utf-8")


def adapter_card(model: Any, config: ModelConfig, *, step: int) -> str:
    """The README.md of an exported adapter."""
    reads_images = hasattr(getattr(model, "config", None), "vision_config")
    text = "Processor" if reads_images else "Tokenizer"
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    below = f"It was trained on the base with {', '.join(config.adapters)} merged in; `merged/` holds all of them.\n\n"
    revision = f", revision={config.revision!r}" if config.revision else ""
    options = {"lora": asdict(config.lora)} if config.peft_method in (*LORA_FAMILY, EXPERTS) else {}
    options |= {"experts": asdict(config.experts)} if config.peft_method == EXPERTS else {}
    options |= {"adapter": config.adapter} if config.adapter else {}
    if is_adapter(model):
        library, first, load = "peft", "from peft import PeftModel", "model = PeftModel.from_pretrained(model, FOLDER)"
    else:
        library, first = "transformers", "from lora_experts import load_lora_experts  # beside this file"
        load = "load_lora_experts(model, FOLDER)"
    is_classifier = is_adapter(model) and model.active_peft_config.task_type == "SEQ_CLS"
    writes = "AutoModelForImageTextToText" if reads_images else "AutoModelForCausalLM"
    auto_model = "AutoModelForSequenceClassification" if is_classifier else writes
    labels = (
        f", num_labels={model.config.num_labels}, pad_token_id={model.config.pad_token_id}" if is_classifier else ""
    )
    return f"""---
base_model: {config.name}
library_name: {library}
tags: [{config.peft_method}]
---

# An adapter for {Path(config.name).name}

Kind: {config.peft_method}, {trained:,} trained numbers, after {step} optimizer steps.

{below if config.adapters else ""}It holds the difference to its base model and needs it:

```python
from transformers import {auto_model}, Auto{text}
{first}

model = {auto_model}.from_pretrained({config.name!r}{revision}{labels})
{load}
{text.lower()} = Auto{text}.from_pretrained(FOLDER)
```

Trained with:

```json
{json.dumps(options, indent=2)}
```
"""
