"""What `check` and `plan` tell of a draft head before it is trained, against what training it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drafting_models import target_config
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from drafting.config import Eagle3Config
from drafting.evaluation import collate_for_draft, unrolled_loss
from drafting.memory import draft_memory
from drafting.model import new_draft
from drafting.target import Target
from drafting.vocabulary import DraftVocabulary
from jobs.config import PROJECT
from jobs.draft_plan import draft_lines, parameters_on_device, supervised_preview
from jobs.launch import refuse_full_disk
from jobs.plan import count_parameters, plan_run
from jobs.preflight import check_run
from mixture.prepare import prepare
from mixture.shards import TokenRow
from training.attention import register_varlen_attention
from training.evaluation import autocast

TOLERATED_FACTOR = 1.25
SHAPES = [
    {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16, "vocab_size": 2000},
    {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 8, "head_dim": 16, "vocab_size": 8000},
]


def peak_of_two_optimizer_steps(
    shape: dict[str, Any], *, tokens: int, steps: int, draft_vocabulary: int, dtype: torch.dtype, recomputes_steps: bool
) -> tuple[int, int]:
    """Bytes that the allocator had given out at most, target and optimizer included; and parameters of the target."""
    config = target_config("llama", max_position_embeddings=4096, **shape)
    row = TokenRow("row", np.arange(tokens, dtype=np.int32) % shape["vocab_size"], np.ones(tokens, bool), "source")
    register_varlen_attention()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="varlen")
        vocabulary = DraftVocabulary(np.arange(draft_vocabulary), config.vocab_size, coverage=1.0)
        target = Target(network.requires_grad_(False), (2, 3, 4), vocabulary)
        draft = new_draft(config, target.head_VH[target.draft_ids_D], seed=1)
        if recomputes_steps:
            draft.activation_checkpointing_enable()
        optimizer = torch.optim.AdamW(draft.parameters())
        for _ in range(2):
            with autocast(torch.device("cpu"), dtype):
                loss = unrolled_loss(draft, target, collate_for_draft([[row]]), step_weights=[1.0] * steps).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max()), network.num_parameters()


@pytest.mark.parametrize("recomputes_steps", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "tokens", "steps", "draft_vocabulary"), [(SHAPES[0], 1024, 5, 500), (SHAPES[1], 256, 3, 4000)]
)
def test_the_memory_that_is_told_is_what_training_takes_within_a_quarter(
    shape: dict[str, Any], tokens: int, steps: int, draft_vocabulary: int, dtype: torch.dtype, recomputes_steps: bool
) -> None:
    measured, parameters = peak_of_two_optimizer_steps(
        shape,
        tokens=tokens,
        steps=steps,
        draft_vocabulary=draft_vocabulary,
        dtype=dtype,
        recomputes_steps=recomputes_steps,
    )
    told = draft_memory(
        target_config("llama", **shape).to_dict(),
        target_parameters=parameters,
        draft_vocabulary=draft_vocabulary,
        steps=steps,
        tokens=tokens,
        number_bytes=dtype.itemsize,
        recomputes_steps=recomputes_steps,
        device_type="cpu",
    )
    assert measured / TOLERATED_FACTOR < told.total < measured * TOLERATED_FACTOR


YAML = """\
trainer: eagle3
cluster: local
dataset:
  name: synthetic_dataset
  num_rows: 20
  max_length: 256
model:
  name: {target}
training:
  lr: 1e-4
  batch_size: 2
"""


@pytest.fixture
def file(tmp_path: Path, small_target: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(YAML.format(target=small_target))
    return file


@pytest.fixture
def small_target(tmp_path: Path) -> Path:
    """The small model with a weights file that a check does not read."""
    target = tmp_path / "target"
    target.mkdir()
    for part in (PROJECT / "configs/models/small").iterdir():
        (target / part.name).write_bytes(part.read_bytes())
    (target / "model.safetensors").touch()
    return target


def test_the_check_tells_memory_and_shows_what_is_supervised_once_there_is_data(file: Path, tmp_path: Path) -> None:
    checked = check_run(file, ["--data_dir", str(tmp_path)])
    plan = plan_run(checked)
    assert plan.draft is not None
    assert draft_lines(plan.draft)[0].startswith("memory of each device, at 512 tokens and 7 steps: about 0.")
    prepare(checked.preparation, tmp_path, lambda line: None, workers=1)
    script = (
        "import sys; from jobs.__main__ import main; main(sys.argv[1:]); "
        "print('HEAVY', sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, "check", str(file), "--data_dir", str(tmp_path)]
    colours = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm"}
    told = subprocess.run(command, cwd=PROJECT, env=colours, capture_output=True, text=True, check=True).stdout
    assert "memory of each device" in told and "prepared data: " in told and "HEAVY []" in told
    assert "\x1b[2m<|im_start|>user" in told, "the question is dimmed"
    assert "<|im_end|>\x1b[0m" in told and "\x1b[32m" in told, "the answer is green to its end"


def test_the_preview_says_how_to_get_one(file: Path, tmp_path: Path) -> None:
    checked = check_run(file, ["--data_dir", str(tmp_path)])
    assert "./train.sh prepare FILE" in str(supervised_preview(checked.config, None))


def test_cached_features_are_told_by_their_size_and_take_the_target_s_layers_off_the_device(
    file: Path, tmp_path: Path
) -> None:
    cached = check_run(file, ["--data_dir", str(tmp_path), "--eagle3.features", "cached"])
    data = prepare(cached.preparation, tmp_path, lambda line: None, workers=1)
    plans = [plan_run(checked).draft for checked in (cached, check_run(file, ["--data_dir", str(tmp_path)]))]
    with_cache, live = (plan for plan in plans if plan is not None)
    assert live.features is None
    assert with_cache.features is not None and with_cache.features.token_bytes == 4 * 320 * 4
    tokens = sum(split.tokens for split in data.splits.values() if split)
    assert with_cache.features.missing_bytes == tokens * 4 * 320 * 4
    assert with_cache.memory is not None and live.memory is not None
    assert with_cache.memory.target == 4096 * 320 * 4 < live.memory.target
    assert any("features on the disk, 5,120 bytes a token" in line for line in draft_lines(with_cache))


def test_a_target_in_shards_is_told_by_its_share(file: Path, tmp_path: Path) -> None:
    shape = json.loads((PROJECT / "configs/models/small/config.json").read_text())
    whole = count_parameters(str(PROJECT / "configs/models/small"))
    assert whole is not None
    in_layers = whole - 4096 * 320
    shared = Eagle3Config(shard_target=True)
    assert parameters_on_device(shape, whole, shared, world_size=1) == whole
    share = parameters_on_device(shape, whole, shared, world_size=4)
    assert share == 4096 * 320 + in_layers // 4 + 2 * in_layers // shape["num_hidden_layers"]


def test_a_run_whose_features_do_not_fit_is_refused_before_it_is_queued(file: Path, tmp_path: Path) -> None:
    checked = check_run(file, ["--data_dir", str(tmp_path), "--eagle3.features", "cached"])
    plan = plan_run(checked)
    assert plan.draft is not None and plan.draft.features is not None
    full = replace(plan.draft.features, missing_bytes=2 * plan.draft.features.free_bytes)
    with pytest.raises(ValueError, match=r"eagle3\.features: the target's features will need about .* free there"):
        refuse_full_disk(replace(plan, draft=replace(plan.draft, features=full)))


def test_a_target_on_the_hub_is_planned_for_by_the_config_that_the_cache_holds(tmp_path: Path) -> None:
    model = tmp_path / "models--organisation--model"
    for file, content in {
        "refs/main": b"0123abcd",
        "snapshots/0123abcd/config.json": (PROJECT / "configs/models/small/config.json").read_bytes(),
    }.items():
        (model / file).parent.mkdir(parents=True)
        (model / file).write_bytes(content)
    script = "from jobs.plan import count_parameters as count; print(count('organisation/model'), count('a/nother'))"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path)}
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    counted = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(PROJECT / "configs/models/small"))
    assert told.split() == [str(counted.num_parameters()), "None"]
