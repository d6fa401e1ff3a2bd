"""Going on with a run under settings that split its optimizer steps otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_chains import checked_run

from jobs.config import read_resolved_config
from jobs.launch import open_run_folder
from jobs.plan import plan_run
from jobs.snapshot import read_manifest
from settings.yaml_tree import ConfigError


def test_a_run_may_go_on_over_fewer_processes_only_with_as_many_rows_a_step(tmp_path: Path) -> None:
    alone = replace(checked_run(tmp_path, "--cluster", "local"), world_size=1)
    together = replace(alone, world_size=2)
    data_key = plan_run(alone).data_key
    run = open_run_folder(together, data_key, print)
    with pytest.raises(ConfigError, match=r"4 = 2 rows .* -> 2 = .* \(training.gradient_accumulation: 2 keeps them\)"):
        open_run_folder(alone, data_key, print)
    assert read_manifest(run.manifest)["world_size"] == 2

    accumulating = replace(alone.config, training=replace(alone.config.training, gradient_accumulation=2))
    open_run_folder(replace(alone, config=accumulating), data_key, print)
    assert read_manifest(run.manifest)["world_size"] == 1
    assert read_resolved_config(run.config).training.gradient_accumulation == 2
