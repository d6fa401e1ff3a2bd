"""The plan's numbers against the real things they foretell."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from jobs.config import PROJECT
from jobs.plan import count_parameters, plan_run
from jobs.preflight import check_run
from mixture.prepare import prepare

TEST_YAML = PROJECT / "configs/test.yaml"
SHAPE = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 160, "vocab_size": 500,
}  # fmt: skip


@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": True}, {"head_dim": 32}, {"num_key_value_heads": 8}])
def test_parameters_are_counted_as_the_model_has_them(tmp_path: Path, change: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | change))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert count_parameters(str(tmp_path)) == model.num_parameters()


def test_shapes_that_the_formula_does_not_cover_are_left_unknown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"num_local_experts": 8}))
    assert count_parameters(str(tmp_path)) is None
    assert count_parameters("organisation/on-the-hub") is None


def test_blocks_divide_the_horizon_and_share_one_learning_rate_curve(tmp_path: Path) -> None:
    overrides = ["--data_dir", str(tmp_path), "--cluster", "local", "--training.total_jobs", "4"]
    checked = check_run(TEST_YAML, overrides)
    before = plan_run(checked)
    assert before.horizon is None and all(block.steps is None for block in before.blocks)

    data = prepare(checked.preparation, tmp_path, lambda line: None)
    plan = plan_run(checked)
    train = data.splits["train"]
    assert train is not None and plan.horizon is not None
    assert plan.horizon.total_steps == 16 * -(-train.packs // 4)
    assert [block.epochs for block in plan.blocks] == [(1, 4), (5, 8), (9, 12), (13, 16)]
    steps = [block.steps for block in plan.blocks if block.steps]
    assert steps[0][0] == 0 and steps[-1][1] == plan.horizon.total_steps
    assert all(before[1] == after[0] for before, after in itertools.pairwise(steps))
    assert plan.train_tokens == 16 * train.tokens
    rates = [block.learning_rates for block in plan.blocks if block.learning_rates]
    assert rates[0][0] == 0 and rates[-1][1] < rates[1][0] <= checked.config.training.lr


def test_gpu_hours_are_what_the_time_limits_allow(tmp_path: Path) -> None:
    overrides = ["--slurm.gpus_per_node", "4", "--slurm.nodes", "2", "--slurm.time", "30", "--cluster", "local"]
    checked = check_run(TEST_YAML, ["--data_dir", str(tmp_path), *overrides])
    assert plan_run(checked).max_gpu_hours is None  # not on a cluster
    on_cluster = type(checked)(**{**vars(checked), "cluster": "slurm"})
    assert plan_run(on_cluster).max_gpu_hours == 3 * 2 * 4 * 0.5
