"""Models and tokenizers: load or make them, put adapters on them, export what was trained."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging

from mixture.processors import find_processor
from training.adapter_options import EXPERTS
from training.adapters import add_adapter, export_adapter, four_bits, load_adapter_state, merge_adapters
from training.attention import check_packable, register_varlen_attention
from training.config import ModelConfig
from training.export import replacing
from training.frozen_shards import load_in_shards
from training.losses import use_chunked_loss

# Bars of one file each would be all that a job's log shows.
logging.disable_progress_bar()

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


def load_tokenizer(model: ModelConfig, *, key: str = "model") -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token; `key` is the section that names the model, for messages."""
    name, revision = (model.tokenizer, None) if model.tokenizer else (model.name, model.revision)
    key = f"{key}.tokenizer" if model.tokenizer else f"{key}.name"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: no tokenizer found under {name!r}. {where_tried(name)}\n{error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_processor(model: ModelConfig) -> ProcessorMixin:
    """The processor of an image-text model, its tokenizer with a pad token. ValueError where it has none."""
    name, revision = (model.tokenizer, None) if model.tokenizer else (model.name, model.revision)
    processor: ProcessorMixin | None = find_processor(
        name, revision=revision, trust_remote_code=model.trust_remote_code
    )
    if processor is None:
        raise ValueError(f"model.name: no processor found under {name!r}. {where_tried(name)}")
    return processor


def build_model(
    model: ModelConfig,
    *,
    seed: int,
    checkpoint: Path | None = None,
    layers: Sequence[int] | None = None,
    reads_images: bool = False,
) -> PreTrainedModel | PeftModel:
    """The model to train, on the CPU: all weights in float32, or adapters in float32 on a frozen base.

    The forward pass runs in `precision(model)` under autocast; float32 weights take the many small updates that
    bfloat16 would round away. A frozen base takes no updates and is held in the precision of the forward pass.
    With `checkpoint`, what was trained comes from there; the seed then decides nothing. With `layers`, only these
    layers of the decoder are kept, counted from 0. With `reads_images`, an image-text model, which attends to padded
    rows; its vision tower is frozen as `model.train_vision` says.
    """
    register_varlen_attention()
    config = load_model_config(model)
    require_embeddings(model, config)
    auto_class: Any = AutoModelForCausalLM
    if reads_images:
        require_image_text(model, config)
        auto_class, model = AutoModelForImageTextToText, with_padded_attention(model)
    elif model.train_vision is not None:
        raise ValueError(
            f"model.train_vision: the rows hold no images, so what sees of {model.name} is never trained; leave it out"
        )
    set_seed(seed)
    if checkpoint and not model.peft:
        trained = replace(model, name=str(checkpoint), revision=None, adapters=[])
        network = load_weights(
            trained,
            shallower(config, layers) if layers else config,
            attention=model.attention,
            auto_class=auto_class,
        )
    elif model.from_scratch:
        network = auto_class.from_config(
            config, dtype=torch.float32, attn_implementation=model.attention, trust_remote_code=model.trust_remote_code
        )
    else:
        network = load_weights(model, config, attention=model.attention, auto_class=auto_class)
        if layers:
            keep_layers(network, layers)
    if model.attention == "varlen":
        check_packable(network)
    use_chunked_loss(network)
    if not model.peft:
        align_weights(network)
        if reads_images and model.train_vision is False:
            vision_tower(network).requires_grad_(False)
        return network
    leave_alone = name_of(vision_tower(network), network) if reads_images and not model.train_vision else None
    adapted = add_adapter(network, model, seed=seed, leave_alone=leave_alone)
    if checkpoint:
        load_adapter_state(adapted, checkpoint)
    return adapted


def align_weights(network: PreTrainedModel) -> None:
    """Move weights out of the file that they were loaded from. They begin anywhere there, and where a matrix begins
    decides how a CPU's sums over it round: a resumed run would not round like an uninterrupted one."""
    for weight in network.parameters():
        weight.data = weight.data.clone()


def require_image_text(model: ModelConfig, config: PretrainedConfig) -> None:
    """Raise ValueError for a model that reads no images."""
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"model.name: the rows hold images, and {model.name} is a {config.model_type} model, which reads text "
            "only; name an image-text model"
        )


def with_padded_attention(model: ModelConfig) -> ModelConfig:
    """The settings with attention that takes padded rows: `varlen` is for packs, and rows with images are in none."""
    return replace(model, attention="sdpa") if model.attention == "varlen" else model


def vision_tower(network: PreTrainedModel) -> torch.nn.Module:
    """The part of an image-text model that sees; ValueError where transformers does not tell which it is."""
    tower: torch.nn.Module = network.get_encoder(modality="image")
    if tower in (network, network.base_model):
        raise ValueError(
            f"{type(network).__name__} does not tell which part of it sees; set model.train_vision: true to train all"
        )
    return tower


def name_of(part: torch.nn.Module, network: torch.nn.Module) -> str:
    return next(name for name, module in network.named_modules() if module is part)


def load_model_config(model: ModelConfig, *, key: str = "model") -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}.name: no model found under {model.name!r}. {where_tried(model.name)}\n{error}"
        ) from error


def require_embeddings(model: ModelConfig, config: PretrainedConfig) -> None:
    """Raise ValueError where another model's tokenizer has tokens that this model cannot embed."""
    if model.tokenizer is None:
        return
    tokens, embeddings = len(load_tokenizer(model)), config.get_text_config().vocab_size
    if tokens > embeddings:
        raise ValueError(
            f"model.tokenizer: {model.tokenizer} has {tokens} tokens and {model.name} embeds {embeddings}; "
            "leave model.tokenizer out to use the model's own"
        )


def where_tried(name: str) -> str:
    folder = Path(name).expanduser().resolve()
    found = "which exists" if folder.is_dir() else "which does not exist"
    offline = " (HF_HUB_OFFLINE is set: only what the cache holds)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return f"Tried the folder {folder}, {found}, and the hub{offline}."


def load_frozen_model(
    model: ModelConfig,
    *,
    key: str = "model",
    attention: str | None = None,
    layers: int | None = None,
    device: torch.device | None = None,
    in_shards: bool = False,
) -> PreTrainedModel:
    """The model with its trained weights, in the precision of its forward pass: to be read, not trained.

    `attention`: its implementation; unset, what transformers takes. `layers`: its first decoder layers that are kept;
    unset, all. On a device, or without one spread over all GPUs of this process, or on the CPU where it has none.
    `in_shards`: its layers shared out over the processes of the block, all of which must ask it equally often
    (training/frozen_shards.py). ValueError where there is none under that name; `key` is the section that names it.
    """
    register_varlen_attention()
    config = load_model_config(model, key=key)
    if layers is not None:
        config = shallower(config, range(layers))

    def load() -> PreTrainedModel:
        spread = "auto" if device is None and torch.cuda.is_available() else None
        with nullcontext() if layers is None else without_load_report():
            return load_weights(model, config, dtype=precision(model), attention=attention, key=key, device_map=spread)

    def without_weights() -> PreTrainedModel:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=precision(model),
                attn_implementation=attention,
                trust_remote_code=model.trust_remote_code,
            )

    if in_shards:
        assert device is not None
        network = load_in_shards(load, without_weights, device)
    else:
        network = load() if device is None else load().to(device)
    if attention == "varlen":
        check_packable(network)
    return network.requires_grad_(False).eval()


@contextmanager
def without_load_report() -> Iterator[None]:
    """Nothing said of weights that the file has and the model, on purpose, has not."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def load_with_tokenizer(
    model: ModelConfig, *, key: str, device: torch.device | None = None, in_shards: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model to be asked, as `load_frozen_model` gives it, and its tokenizer."""
    tokenizer = load_tokenizer(model, key=key)
    return load_frozen_model(model, key=key, device=device, in_shards=in_shards), tokenizer


@contextmanager
def told_of_full_memory(*, lower: str, key: str) -> Iterator[None]:
    """What to do where the device has too little memory for a model that is asked, as a ValueError.

    `lower` is the setting that helps, `key` the section that names the model.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{key}: the model does not fit into the memory of this device. Lower {lower}, set {key}.dtype: bfloat16, "
            "or give each task more GPUs (slurm.gpus_per_node): the model is spread over all that a task sees.\n"
            f"{error}"
        ) from error


def load_weights(
    model: ModelConfig,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype | None = None,
    attention: str | None,
    key: str = "model",
    device_map: str | None = None,
    auto_class: Any = AutoModelForCausalLM,
) -> PreTrainedModel:
    """The trained weights; unless told otherwise in float32, and as the base of an adapter in `precision(model)`."""
    dtype = dtype or (precision(model) if model.peft else torch.float32)
    try:
        network = auto_class.from_pretrained(
            model.name,
            config=config,
            revision=model.revision,
            dtype=torch.float32 if model.adapters else dtype,
            attn_implementation=attention,
            trust_remote_code=model.trust_remote_code,
            device_map=device_map,
            quantization_config=four_bits(precision(model)) if model.peft_method == "qlora" and model.peft else None,
        )
    except OSError as error:
        raise ValueError(
            f"{key}.name: {model.name!r} has a config and no weights that can be read. {where_tried(model.name)}"
            + (" To start with random weights, set model.from_scratch: true." if key == "model" else "")
            + f"\n{error}"
        ) from error
    return merge_adapters(network, model.adapters).to(dtype) if model.adapters else network


def shallower(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The config of the same model with only these layers of its decoder; ValueError where one does not exist."""
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    depth = text_config.num_hidden_layers
    if layers and max(layers) >= depth:
        raise ValueError(f"layers: there is no layer {max(layers)}; the model has layers 0 to {depth - 1}")
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = [text_config.layer_types[layer] for layer in layers]
    text_config.num_hidden_layers = len(layers)
    return config


def keep_layers(network: PreTrainedModel, layers: Sequence[int]) -> None:
    """Take all other layers out of the decoder."""
    network.config = shallower(network.config, layers)
    decoder = network.get_decoder()
    decoder.config = network.config.get_text_config()
    decoder.layers = torch.nn.ModuleList(decoder.layers[layer] for layer in layers)
    for number, layer in enumerate(decoder.layers):
        for module in layer.modules():  # attention looks up its keys and values in the cache by this
            if hasattr(module, "layer_idx"):
                module.layer_idx = number


def precision(model: ModelConfig) -> torch.dtype:
    """Arithmetic of the forward pass."""
    if model.dtype == "auto":
        has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[model.dtype]


def parameters_hash(network: torch.nn.Module, model: ModelConfig) -> str:
    """Of what is trained: names and shapes, and for an adapter its settings and the base that it belongs to."""
    shapes = [(name, list(weight.shape)) for name, weight in network.named_parameters() if weight.requires_grad]
    base = [model.name, model.revision, *model.adapters]
    adapter = [*base, model.peft_method, asdict(model.lora), model.adapter] if model.peft else model.adapters or None
    experts = asdict(model.experts) if model.peft and model.peft_method == EXPERTS else None
    return hashlib.sha256(json.dumps([shapes, adapter, experts]).encode()).hexdigest()[:16]


def export_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    folder: Path,
    *,
    step: int,
    config: ModelConfig,
) -> None:
    """Write the trained model and its tokenizer or processor to `folder`, whole or not at all, for from_pretrained.

    An adapter is written as it is, float32; with `merge_adapter` the merged model goes to `folder`/merged. A model
    trained in full is written in `precision(config)`. The model given is used up: its weights are
    cast and merged in place.
    """
    with replacing(folder, step=step) as temporary:
        if config.peft:
            export_adapter(model, temporary, config, step=step)
            if config.merge_adapter:
                merged = model.merge_and_unload(safe_merge=True)
                save_whole_model(merged, tokenizer, temporary / "merged", precision(config))
        else:
            save_whole_model(model, tokenizer, temporary, precision(config))
        tokenizer.save_pretrained(temporary)


def save_whole_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, folder: Path, dtype: torch.dtype
) -> None:
    """safetensors, config, and a generation config that stops where the tokenizer's turns end."""
    model.config.use_cache = True
    model.generation_config.eos_token_id = stop_token_ids(model, tokenizer)
    model.generation_config.pad_token_id = text_tokenizer(tokenizer).pad_token_id
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def text_tokenizer(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one inside a processor."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> list[int]:
    """The tokens that end an answer: end of text, and what the chat template puts after an assistant's turn."""
    return stops_of(model.generation_config, tokenizer)


def load_generation_config(model: ModelConfig) -> GenerationConfig:
    """The model's own settings for generation, as from_pretrained gives them to it."""
    try:
        return GenerationConfig.from_pretrained(model.name, revision=model.revision)
    except OSError:
        return GenerationConfig.from_model_config(load_model_config(model))


def stops_of(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> list[int]:
    """The same, of a model with these settings."""
    configured = generation.eos_token_id
    plain = text_tokenizer(tokenizer)
    stops = set(configured if isinstance(configured, list) else [configured]) | {plain.eos_token_id}
    ids = ids_of_exchange(tokenizer)
    special = [token for token in ids if token in plain.all_special_ids]
    if special:
        answer_begins = len(ids) - 1 - ids[::-1].index(special[-1])
        stops |= set(ids[answer_begins : answer_begins + 1])
    return sorted(stop for stop in stops if stop is not None)


def ids_of_exchange(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> list[int]:
    """A question and an answer as the chat template writes them; nothing where there is none."""
    if not tokenizer.chat_template:
        return []
    if text_tokenizer(tokenizer) is tokenizer:
        turns: list[Any] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids: list[int] = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        return ids
    texts = {"user": "a", "assistant": "b"}
    turns = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return text_tokenizer(tokenizer).encode(text, add_special_tokens=False)
