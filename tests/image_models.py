"""Image-text models without weights and their processors, of two families that take images in different ways."""

from __future__ import annotations

import shutil
from pathlib import Path

PROJECT = Path(__file__).parent.parent
TINY_VISION = PROJECT / "configs/models/tiny_vision"

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def idefics3(folder: Path) -> Path:
    """Idefics3, the family of SmolVLM: an image becomes tokens of the row."""
    from transformers import AutoConfig

    shutil.copytree(TINY_VISION, folder)
    config = AutoConfig.from_pretrained(folder)
    for part, more in ((config.text_config, {"num_key_value_heads": 1, "head_dim": 8}), (config.vision_config, {})):
        for key, value in {**SIZES, **more}.items():
            setattr(part, key, value)
    config.save_pretrained(folder)
    return folder


def mllama(folder: Path) -> Path:
    """Llama 3.2 Vision: an image is one token, and layers of cross attention look at its tiles."""
    from transformers import AutoTokenizer, MllamaConfig, MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "configs/models/tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>", "<|python_tag|>"]})
    tokenizer.chat_template = None
    template = (TINY_VISION / "chat_template.jinja").read_text().replace("<image>", "<|image|>")
    pixels = MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=2)
    MllamaProcessor(pixels, tokenizer, chat_template="{{ '<|begin|>' }}" + template).save_pretrained(folder)
    MllamaConfig(
        text_config={
            **SIZES,
            "num_key_value_heads": 1,
            "num_hidden_layers": 2,
            "cross_attention_layers": [1],
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "attention_heads": 2,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "image_size": 16,
            "patch_size": 8,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            "intermediate_layers_indices": [0],
            "vision_output_dim": 32,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    ).save_pretrained(folder)
    return folder


FAMILIES = {"idefics3": idefics3, "mllama": mllama}
