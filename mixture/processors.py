"""The processor of an image-text model, which makes tokens and pixels of its rows."""

from __future__ import annotations

from typing import Any

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def find_processor(name: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    """The processor, its tokenizer with a pad token; None where the model reads texts only.

    ValueError: it cannot be loaded.
    """
    if not has_processor_files(name, revision):
        return None
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise ValueError(
            f"model.name: the processor of {name!r} needs a package that is not installed; those of Qwen-VL and "
            f"SmolVLM need the extra vision of pyproject.toml, with torchvision of the same build as torch: {error}"
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"model.name: cannot load a processor from {name!r}: {error}") from error
    if getattr(processor, "image_processor", None) is None:
        return None
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def has_processor_files(name: str, revision: str | None) -> bool:
    """Whether the model comes with settings of a processor."""
    from transformers.utils import cached_file

    return any(
        cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for file in PROCESSOR_FILES
    )
