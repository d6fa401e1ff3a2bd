"""Reading a run's settings: what is accepted, and what each mistake is told."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from jobs.config import PROJECT, read_resolved_config, read_run_config, resolved_values
from jobs.preflight import check_run
from settings import typed
from settings.typed import changed_keys
from settings.yaml_tree import ConfigError, read_config_file

SMALLEST = """
dataset:
  name: test_dataset
model:
  name: configs/models/tiny
training:
  lr: 1e-5
"""

# As the design document of the kit gives it; only the model and the time limit are others.
REQUIREMENT = """
# Example config.yaml structure
dataset:
  name: "custom_dataset"
  file: "synthetic_dataset.py"  # or test_dataset.py for small dataset
  test_split: "test"
  split_ratio: 0.8

model:
  name: "configs/models/tiny"
  peft: true
  peft_method: "lora"
  checkpoint_dir: "finetuned_model/fine-tuned"

training:
  batch_size: 8
  lr: 1e-5
  epochs_per_job: 1
  total_jobs: 10
  gradient_accumulation: 1

slurm:
  partition: "gpucluster"
  time: "00:30:00"
  nodes: 1
  gpu_id: 3  # CUDA_VISIBLE_DEVICES
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text)
    return file


def problems_of(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        read_run_config(file, overrides)
    return [str(problem) for problem in raised.value.problems]


def test_the_yaml_of_the_requirements_is_read_as_written(tmp_path: Path) -> None:
    config = read_run_config(write(tmp_path, REQUIREMENT))
    assert config.name == "run"
    assert config.dataset.file == "synthetic_dataset.py"
    assert config.dataset.split_ratio == 0.8
    assert config.model.peft and config.model.peft_method == "lora"
    assert config.model.checkpoint_dir == "finetuned_model/fine-tuned"
    assert config.training.lr == 1e-5
    assert (config.training.epochs_per_job, config.training.total_jobs) == (1, 10)
    assert config.slurm.partition == "gpucluster"
    assert config.slurm.time_limit_minutes == 30
    assert config.slurm.gpu_id == 3


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("04:00:00", 240), ("12:00:00", 720), ("1-12", 2160), ("2-00:30:00", 2910), ("90", 90), ("10:30", 11)],
)
def test_a_time_limit_needs_no_quotes_and_reads_as_sbatch_reads_it(tmp_path: Path, time: str, minutes: int) -> None:
    config = read_run_config(write(tmp_path, SMALLEST + f"slurm: {{time: {time}}}\n"))
    assert config.slurm.time_limit_minutes == minutes


def test_a_time_limit_is_read_the_same_behind_a_key_that_prefers_numbers(tmp_path: Path) -> None:
    typed.type_parser.cache_clear()
    config = read_run_config(write(tmp_path, SMALLEST + "slurm: {gpu_id: 3, time: 12:00:00}\n"))
    assert config.slurm.time_limit_minutes == 720


def test_all_independent_problems_are_told_at_once_with_file_and_line(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """\
dataset:
  name: gsm8k
  max_lenght: 64
model:
  name: 5
training:
  lr: fast
  bathc_size: 2
  total_jobs: 0
slurm:
  time: soon
trainr: finetuning
""",
    )
    assert problems_of(file, "--seed", "x") == [
        f"{file}:3: unknown key dataset.max_lenght; did you mean dataset.max_length?",
        f"{file}:5: model.name: expected a text, got 5; quote it to make it a text",
        f"{file}:7: training.lr: expected a number, got 'fast'",
        f"{file}:8: unknown key training.bathc_size; did you mean training.batch_size?",
        f"{file}:11: slurm.time must be HH:MM:SS, D-HH:MM:SS or minutes, got 'soon'",
        f"{file}:12: unknown key trainr; did you mean trainer?",
        "--seed: seed: expected a whole number, got 'x'",
    ]


def test_values_out_of_range_are_told_although_a_key_beside_them_is_unknown(tmp_path: Path) -> None:
    file = write(tmp_path, SMALLEST.replace("lr: 1e-5", "lr: -1\n  batch_size: 0\n  optimizerr: adam"))
    told = problems_of(file)
    assert any("training.lr must be above 0, got -1.0" in line for line in told)
    assert any("training.batch_size must be at least 1, got 0" in line for line in told)
    assert any("unknown key training.optimizerr" in line for line in told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\na: 2\n", "run.yaml:2: a was already given at"),
        ("a: [1\n", "not valid YAML"),
        ("\ta: 1\n", "indent with spaces, not tabs"),
        ("- a\n", "expected `key: value` lines"),
        ("", "the file is empty"),
        ("a: !!python/object:os.system x\n", "is not supported; write a plain value"),
        ("dataset: gsm8k\n", "dataset is a section: put its keys below it, got 'gsm8k'"),
        ("dataset: {name: x}\n", "model.name is missing and has no default"),
    ],
)
def test_a_broken_file_is_told_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    assert any(told in line and "\n" not in line for line in problems_of(write(tmp_path, text)))


def test_a_missing_file_is_told_with_the_working_folder(tmp_path: Path) -> None:
    assert "no such file (working folder" in problems_of(tmp_path / "none.yaml")[0]


def test_an_override_sets_any_key_by_the_rules_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, SMALLEST)
    overrides = ["--training.lr", "3e-4", "--slurm.setup=[module load cuda, 'echo a: b']", "--name", "other"]
    config = read_run_config(file, [*overrides, "--dataset.level", "hard", "--slurm.extra.reservation", "friday"])
    assert config.training.lr == 3e-4
    assert config.slurm.setup == ["module load cuda", "echo a: b"]
    assert config.name == "other"
    assert config.dataset.module_keys == {"level": "hard"}
    assert config.slurm.extra == {"reservation": "friday"}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["--training.lr"], "a value is missing"),
        (["lr=3"], "expected --section.key VALUE"),
        (["--training.lr.x", "3"], "lr is not a section"),
    ],
)
def test_a_malformed_override_is_told(tmp_path: Path, overrides: list[str], told: str) -> None:
    assert told in problems_of(write(tmp_path, SMALLEST), *overrides)[0]


def test_training_arguments_are_checked_by_name(tmp_path: Path) -> None:
    section = "  arguments: {neftune_noise: 5, learning_rate: 1, adam_beta2: 0.95}\n"
    told = problems_of(write(tmp_path, SMALLEST + section))
    assert len(told) == 2
    assert "no field neftune_noise; did you mean neftune_noise_alpha?" in told[0]
    assert "learning_rate is decided by training.lr; remove it" in told[1]


def test_a_secret_among_the_settings_is_refused_and_not_shown(tmp_path: Path) -> None:
    told = problems_of(write(tmp_path, SMALLEST), "--training.arguments.hub_token", "hf_abcdef")
    assert "looks like a secret" in told[0]
    assert "hf_abcdef" not in "".join(told)


LEARN_BY_DPO = ["--finetuning.objective", "dpo", "--model.peft", "true"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["--model.attention", "sdpa"], "would let packed samples see each other"),
        (["--model.lora.r", "8"], "read only where model.peft is true"),
        (["--slurm.gpu_id", "1", "--slurm.gpus_per_node", "2"], "keep one of them"),
        ([*LEARN_BY_DPO, "--model.peft_method", "lora_moe"], "does not learn from preferences"),
        ([*LEARN_BY_DPO, "--model.adapter", "{init_lora_weights: pissa}"], "change the model below"),
        (["--slurm.extra.dependency", "afterok:1"], "is set by the chain itself"),
        (["--model.merge_adapter", "true"], "needs model.peft"),
        (["--model.train_vision", "true", "--finetuning.objective", "dpo"], "where rows with images are learned"),
        (["--training.save_every", "sometimes"], "must be steps (200) or a time"),
        (["--name", "../up"], "name must be letters"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path: Path, overrides: list[str], told: str) -> None:
    assert any(told in line for line in problems_of(write(tmp_path, SMALLEST), *overrides))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["--model.peft_method", "prefix_tunning"], "did you mean prefix_tuning?"),
        (["--model.peft_method", "loha", "--model.adapter.rank", "3"], "model.adapter.rank: loha has no such option"),
        (["--model.peft_method", "loha", "--model.lora.r", "3"], "model.lora is not read by loha"),
        (["--model.experts.num", "3"], "model.experts is read only by model.peft_method: lora_moe"),
        (
            ["--model.peft_method", "prompt_tuning", "--model.adapter.num_virtual_tokens", "3"],
            "set dataset.packing: false",
        ),
        (["--model.peft_method", "lora_moe", "--trainer", "distillation"], "is trained by trainer: finetuning only"),
        (["--model.adapters", "[a]"], "model.adapters needs model.merge_adapter: true"),
        (["--model.peft_method", "adalora", "--training.parallelism", "fsdp"], "keeps in shards"),
        (["--model.peft_method", "lora_moe", "--model.merge_adapter", "true"], "lora_moe cannot be merged: which"),
    ],
)
def test_adapters_that_cannot_be_are_refused_before_the_queue(tmp_path: Path, overrides: list[str], told: str) -> None:
    teacher = ["--distillation.teacher_model.name", "configs/models/tiny"] if "distillation" in overrides else []
    problems = problems_of(write(tmp_path, SMALLEST), "--model.peft", "true", *overrides, *teacher)
    assert any(told in line for line in problems), problems


FSDP = ["--training.parallelism", "fsdp"]
DEEPSPEED = ["--training.parallelism", "deepspeed"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["--training.arguments.fsdp", "full_shard"], "is decided by training.parallelism: fsdp, and training.fsdp"),
        (["--training.arguments.deepspeed", "zero.json"], "is decided by training.parallelism: deepspeed"),
        (["--training.fsdp.cpu_offload", "true"], "read only where training.parallelism is fsdp, and it is ddp"),
        ([*FSDP, "--training.deepspeed.stage", "1"], "read only where training.parallelism is deepspeed"),
        ([*FSDP, "--model.dtype", "float16"], "use bfloat16"),
        ([*FSDP, "--model.peft", "true", "--model.peft_method", "qlora"], "fsdp cannot spread; use ddp, or lora"),
        ([*FSDP, "--training.arguments.optim", "adafactor"], "not that of adafactor"),
        (
            [
                *DEEPSPEED,
                "--trainer",
                "distillation",
                "--distillation.teacher_model.name",
                "configs/models/tiny",
                "--distillation.teacher",
                "live",
                "--distillation.on_policy.share",
                "0.5",
            ],
            "that training.parallelism: deepspeed spreads over processes cannot write answers here",
        ),
        ([*DEEPSPEED, "--training.deepspeed.stage", "3"], "use training.parallelism: fsdp"),
        ([*DEEPSPEED, "--training.deepspeed.options.bf16.enabled", "true"], "options.bf16: model.dtype decides it"),
        (
            [*DEEPSPEED, "--training.deepspeed.options.zero_optimization.stage", "1"],
            "options.zero_optimization.stage: training.deepspeed decides it",
        ),
    ],
)
def test_ways_to_share_the_work_that_cannot_be_are_refused(tmp_path: Path, overrides: list[str], told: str) -> None:
    problems = problems_of(write(tmp_path, SMALLEST), *overrides)
    assert any(told in line for line in problems), problems


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed here")
def test_deepspeed_that_is_not_installed_is_told_before_the_queue(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training.parallelism: deepspeed needs the package of this name"):
        check_run(PROJECT / "configs/test.yaml", [*DEEPSPEED, "--data_dir", str(tmp_path), "--runs_dir", str(tmp_path)])


def test_every_setting_survives_being_stored_in_the_run_folder(tmp_path: Path) -> None:
    import yaml

    config = read_run_config(write(tmp_path, REQUIREMENT), ["--dataset.level", "3", "--slurm.setup", "['a: b', '#c']"])
    stored = tmp_path / "config.yaml"
    stored.write_text(yaml.safe_dump(resolved_values(config)))
    assert read_resolved_config(stored) == config
    assert changed_keys(read_config_file(stored).values, resolved_values(config)) == []


def test_changed_settings_are_named_with_both_values(tmp_path: Path) -> None:
    file = write(tmp_path, SMALLEST)
    before, after = read_run_config(file), read_run_config(file, ["--training.lr", "1e-4", "--dataset.level", "2"])
    assert changed_keys(resolved_values(before), resolved_values(after)) == [
        ("dataset.level", None, 2),
        ("training.lr", 1e-5, 1e-4),
    ]


def test_every_shipped_config_is_read() -> None:
    files = [path for path in (PROJECT / "configs").rglob("*.yaml") if "mixtures" not in path.parts]
    assert len(files) >= 2
    for file in files:
        read_run_config(file)


@pytest.mark.parametrize("verb", ["check", "plan", "status"])
def test_verbs_for_the_login_node_import_no_torch(verb: str, tmp_path: Path) -> None:
    arguments = [] if verb == "status" else [str(PROJECT / "configs/test.yaml"), "--data_dir", str(tmp_path)]
    script = (
        "import sys; from jobs.__main__ import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'trl'} & set(sys.modules); "
        "print('HEAVY', sorted(heavy)); sys.exit(code)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, verb, *arguments], cwd=PROJECT, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert "HEAVY []" in answer.stdout
