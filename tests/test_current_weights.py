"""A model that is trained is handed over as a checkpoint, its adapter merged in, and goes on bit for bit."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from training.config import LoraConfig, ModelConfig
from training.current_weights import current_weights, remove_leftovers
from training.distributed import Ranks
from training.models import build_model

IDS = torch.arange(5, 25)[None]

ADAPTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "lora": {"peft": True, "lora": LoraConfig(r=4, dropout=0.5)},
    "dora": {"peft": True, "peft_method": "dora", "lora": LoraConfig(r=4)},
    "a head of its own": {"peft": True, "lora": LoraConfig(r=4, modules_to_save=["lm_head"])},
    "a head and an embedding of their own": {
        "peft": True,
        "lora": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    },
    "hira": {"peft": True, "peft_method": "hira"},
    "ln_tuning": {"peft": True, "peft_method": "ln_tuning"},
    "ia3": {"peft": True, "peft_method": "ia3"},
    "vera": {"peft": True, "peft_method": "vera", "adapter": {"r": 4}},
}


def changed(model: Any) -> Any:
    """The model after its trained weights have moved."""
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)
    return model


@pytest.mark.parametrize("keys", ADAPTERS.values(), ids=ADAPTERS)
def test_the_checkpoint_is_the_model_and_the_model_is_as_before(keys: dict[str, Any], teacher: Path) -> None:
    model = changed(build_model(ModelConfig(name=str(teacher), **keys), seed=1)).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with current_weights(model, Ranks(), torch.float32) as folder:
            found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=IDS).logits
        assert not folder.exists()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == trained
    assert (expected - build_model(ModelConfig(name=str(teacher)), seed=1)(input_ids=IDS).logits).abs().max() > 2e-3


def test_what_killed_processes_left_in_memory_goes_and_what_others_write_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name, process in (("left", ended.pid), ("others", os.getppid())):
        (tmp_path / f"baton-weights-{name}").mkdir()
        (tmp_path / f"baton-weights-{name}/writer.pid").write_text(str(process))
    remove_leftovers()
    assert [folder.name for folder in tmp_path.iterdir()] == ["baton-weights-others"]


def test_the_checkpoint_goes_when_its_reader_fails(teacher: Path) -> None:
    model = build_model(ModelConfig(name=str(teacher)), seed=1)
    with (
        pytest.raises(RuntimeError, match="the reader"),
        current_weights(model, Ranks(), torch.bfloat16) as folder,
    ):
        assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
        raise RuntimeError("the reader")
    assert not folder.exists()
