"""A draft head trained in a chain: exact, small checkpoints, an export that decodes what the target alone would say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drafting_models import target_config
from safetensors.torch import load_file
from trained_runs import processes_that_start_fast, train_to_the_end
from transformers import AutoModelForCausalLM

import eagle3
from drafting import features
from drafting.config import Eagle3Config
from drafting.decoding import Greedy, Limits, decode_plainly, decode_with_draft
from drafting.evaluation import collate_for_draft, held_out_prompts, unrolled_loss
from drafting.export import lint, load_exported
from drafting.run import Eagle3Run
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.prepare import PreparationRequest, PreparedData, prepare
from mixture.shards import TokenRows, read_packs
from training.attention import register_varlen_attention
from training.batches import PackedDataset, collate
from training.block import build_data
from training.checkpoints import newest_valid
from training.config import EvaluationConfig, ModelConfig, TrainingConfig
from training.losses import use_chunked_loss
from training.run_folder import RunFolder

pytestmark = pytest.mark.chain

MODULE = '''
"""Sums told in the same words; every fifth is held out."""

def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):
    rows = [{"question": f"What is {a} plus {b}?", "answer": f"We begin at {a} and count {b} steps further from there."}
            for a in range(2, 9) for b in range(2, 9)]
    return [row for number, row in enumerate(rows) if (number % 5 == 0) == (split == "test")]
'''
FAMILIES = ("llama", "qwen3", "mistral")
MakeRun = Callable[..., Eagle3Run]


@pytest.fixture(scope="session")
def targets(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """A folder of each family with seven layers of random weights, in one file, and the tiny tokenizer."""
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family)
        torch.manual_seed(2)
        config = target_config(family, vocab_size=4096, max_position_embeddings=512, initializer_range=0.3)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folders[family])
        for file in tiny_model.glob("*token*"):
            shutil.copy(file, folders[family])
        shutil.copy(tiny_model / "chat_template.jinja", folders[family])
    return folders


@pytest.fixture(scope="session")
def told_sums(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> PreparedData:
    """39 training rows and 10 test rows, in packs of up to 128 tokens."""
    path = tmp_path_factory.mktemp("told_module") / "told_sums.py"
    path.write_text(MODULE)
    request = PreparationRequest(
        dataset=DatasetConfig(name="told_sums", max_length=128),
        module=ModuleFile(path),
        tokenizer=str(tiny_model),
        objective="sft",
    )
    return prepare(request, tmp_path_factory.mktemp("told_data"), lambda line: None, workers=1)


@pytest.fixture
def make_run(tmp_path: Path, targets: dict[str, Path], told_sums: PreparedData) -> MakeRun:
    """make_run("name", "qwen3", training={...}, eagle3={...}): a run in its own folder, with these keys set."""

    def make(
        name: str,
        family: str = "llama",
        *,
        model: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Eagle3Run:
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir(exist_ok=True)
        default_training = {"lr": 1e-2, "batch_size": 4, "log_every": 1, "arguments": {"report_to": "none"}}
        return Eagle3Run(
            folder=folder,
            prepared=told_sums.folder,
            module=None,
            seed=1,
            dataset=DatasetConfig(name="told_sums", max_length=128),
            model=ModelConfig(**{"name": str(targets[family]), **(model or {})}),
            training=TrainingConfig(**{**default_training, **(training or {})}),
            eagle3=Eagle3Config(**{"draft_vocabulary": 2000, "steps": 3, **(settings or {})}),
            evaluation=EvaluationConfig(limit=3, max_new_tokens=12),
        )

    return make


def final_state(run: Eagle3Run) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    checkpoint, rejected = newest_valid(run.folder.checkpoints)
    assert checkpoint is not None and not rejected
    weights = load_file(checkpoint.path / "model.safetensors")
    return weights, torch.load(checkpoint.path / "optimizer.pt", weights_only=True)["state"]


def test_three_blocks_equal_one_uninterrupted_run_bit_for_bit(make_run: MakeRun) -> None:
    training = {"gradient_accumulation": 2, "max_grad_norm": 0.5, "weight_decay": 0.1}
    chain = make_run("chain", training={**training, "total_jobs": 3})
    whole = make_run("whole", training={**training, "epochs_per_job": 3})
    assert len(train_to_the_end(chain)) == 3
    assert len(train_to_the_end(whole)) == 1
    (weights, moments), (expected_weights, expected_moments) = final_state(chain), final_state(whole)
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)
    assert moments.keys() == expected_moments.keys()
    for number in moments:
        assert all(torch.equal(moments[number][name], expected_moments[number][name]) for name in moments[number])


@pytest.fixture
def first_block(make_run: MakeRun) -> Path:
    """The folder of a run after the first of two blocks."""
    run = make_run("first", training={"total_jobs": 2})
    eagle3.train(run)
    return run.folder.path


def test_a_checkpoint_holds_the_trained_weights_of_the_draft_and_nothing_of_the_target(make_run: MakeRun) -> None:
    run = make_run("run")
    target = eagle3.build_target(run)
    draft = eagle3.build_model(run, target, None)
    eagle3.train(run)
    weights, _ = final_state(run)
    assert weights.keys() == {name for name, _ in draft.named_parameters()}
    assert torch.equal(draft.lm_head.weight, target.head_VH[target.draft_ids_D])
    assert not torch.equal(weights["lm_head.weight"], draft.lm_head.weight)


@pytest.mark.parametrize(
    "changes",
    [{"steps": 4}, {"decay": 0.5}, {"layers": [1, 2, 3]}, {"draft_vocabulary": 1999}, {"loss_mean": "all_tokens"}],
)
def test_a_resume_as_another_draft_is_refused(changes: dict[str, Any], make_run: MakeRun, first_block: Path) -> None:
    run = make_run("run", training={"total_jobs": 2}, settings=changes)
    shutil.copytree(first_block, run.folder.path, dirs_exist_ok=True)
    with pytest.raises(
        ValueError,
        match=r"objective: eagle3: .* or the section of the trainer that the chain began with|other target, draft",
    ):
        eagle3.train(run)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_trained_for_any_family_is_exported_as_it_is_and_decodes_what_the_target_says(
    family: str, make_run: MakeRun
) -> None:
    run = make_run("run", family)
    train_to_the_end(run)
    target = eagle3.build_target(run)
    checkpoint, _ = newest_valid(run.folder.checkpoints)
    trained = eagle3.build_model(run, target, checkpoint)
    exported, ids = load_exported(run.folder.export)
    assert lint(run.folder.export, target.network.config) == []
    assert torch.equal(ids, target.draft_ids_D)
    rows = build_data(run, "test")
    batch = collate_for_draft([rows[index] for index in range(len(rows))])
    weights = run.eagle3.step_weights
    with torch.no_grad():
        one, other = (unrolled_loss(draft, target, batch, step_weights=weights) for draft in (trained, exported))
    assert torch.equal(one.loss, other.loss) and torch.equal(one.hits_IT, other.hits_IT)

    scores = eagle3.evaluate(run)
    assert scores["identical_greedy_answers"] == scores["decoded_prompts"] == 3 and scores["divergences"] == []
    assert scores["models"]["draft"].keys() == {"all", "told_sums"}
    for decoded in ("", "sampling_"):
        length = scores[f"{decoded}acceptance_length"]
        assert scores[f"{decoded}acceptance_length_by_source"] == {"told_sums": length}


@pytest.fixture(scope="module")
def on_two_ranks() -> Iterator[Callable[..., None]]:
    """on_two_ranks(run, ...): train and evaluate each run on two processes, which stay up."""
    context = processes_that_start_fast()
    with ProcessPoolExecutor(1, mp_context=context) as first, ProcessPoolExecutor(1, mp_context=context) as second:

        def train_all(*runs: Eagle3Run) -> None:
            for future in [pool.submit(train_as_rank, rank, runs) for rank, pool in enumerate((first, second))]:
                future.result(timeout=200)

        yield train_all


def train_as_rank(rank: int, runs: Sequence[Eagle3Run]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    for run in runs:
        eagle3.train(run)
        eagle3.evaluate(run)


def test_two_ranks_see_the_losses_and_the_accepted_guesses_that_one_rank_sees_and_a_target_in_shards_says_the_same(
    make_run: MakeRun, on_two_ranks: Callable[..., None]
) -> None:
    one = make_run("one", training={"batch_size": 6})
    two = make_run("two", training={"batch_size": 3})
    sharded = make_run("sharded", training={"batch_size": 3}, settings={"shard_target": True})
    eagle3.train(one)
    eagle3.evaluate(one)
    on_two_ranks(two, sharded)
    weights, expected = final_state(sharded)[0], final_state(two)[0]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    scores, expected_scores = (json.loads(run.folder.evaluation.read_text()) for run in (sharded, two))
    for name in ("speedup", "sampling_speedup"):
        del scores[name], expected_scores[name]
    assert scores == expected_scores and scores["decoded_prompts"] == 3, "an odd number of prompts on two ranks"
    for of_one, of_two in zip(one.folder.metrics(), two.folder.metrics(), strict=True):
        for name in ("loss", "grad_norm", "acceptance_length"):
            assert of_two[name] == pytest.approx(of_one[name], rel=1e-3), name
    scores_of_one, scores_of_two = (json.loads(run.folder.evaluation.read_text()) for run in (one, two))
    for name in ("loss", "tokens", "simulated_acceptance_length", "decoded_prompts", "identical_greedy_answers"):
        assert scores_of_two[name] == pytest.approx(scores_of_one[name], rel=1e-2), name


@pytest.fixture(scope="session")
def talkative_target(targets: dict[str, Path], told_sums: PreparedData, tmp_path_factory: Any) -> Path:
    """The Llama target, trained until it does the sums."""
    folder = tmp_path_factory.mktemp("talkative") / "target"
    shutil.copytree(targets["llama"], folder)
    config = target_config("llama", vocab_size=4096, max_position_embeddings=512, hidden_size=32, head_dim=8)
    torch.manual_seed(2)
    register_varlen_attention()
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="varlen")
    use_chunked_loss(network)
    rows = PackedDataset(TokenRows.open(told_sums.folder, "train"), read_packs(told_sums.folder, "train"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, betas=(0.9, 0.95))
    for step in range(80):
        packs = [rows[(3 * step + number) % len(rows)] for number in range(3)]
        network(**collate(packs)).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(folder)
    return folder


def test_a_draft_of_a_target_that_can_be_predicted_saves_passes_and_changes_no_token(
    make_run: MakeRun, talkative_target: Path
) -> None:
    run = make_run(
        "run",
        model={"name": str(talkative_target)},
        settings={"draft_vocabulary": 60, "min_coverage": 0.9},
        training={"epochs_per_job": 2, "total_jobs": 3, "log_every": 4},
    )
    assert len(train_to_the_end(run)) == 3
    ends = [event["eval_acceptance_length"] for event in run.folder.events() if event["event"] == "block_end"]
    assert ends[0] < ends[-1]
    scores = eagle3.evaluate(run)
    assert scores["identical_greedy_answers"] == scores["decoded_prompts"]
    assert scores["acceptance_length"] > 2
    assert scores["simulated_acceptance_length"] == pytest.approx(ends[-1])

    target = eagle3.build_target(run)
    exported, _ = load_exported(run.folder.export)
    prompt = held_out_prompts(TokenRows.open(run.prepared, "test"), limit=1)[0].input_ids
    limits = Limits(max_new_tokens=40, stop_ids=frozenset())
    plain = decode_plainly(target, prompt, Greedy(), limits)
    for chain in (1, 3, 6):
        drafted = decode_with_draft(target, exported, prompt, Greedy(), limits, chain=chain)
        assert drafted.tokens == plain.tokens
        assert drafted.passes < plain.passes


# --- cached features


@pytest.fixture
def own_data(tmp_path: Path, told_sums: PreparedData) -> Path:
    """A copy of the prepared data that no other test has written features beside."""
    return Path(shutil.copytree(told_sums.folder, tmp_path / "data"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few packs in a shard of features."""
    monkeypatch.setattr(features, "SHARD_BYTES", 100_000)


def shards_of(run: Eagle3Run) -> dict[str, int]:
    """The shards of all cached features of a run's data, with the moment they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (run.prepared / "features").rglob("*.safetensors")}


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_blocks_on_cached_features_equal_one_uninterrupted_run_with_a_live_target_bit_for_bit(
    dtype: str, make_run: MakeRun, own_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"batch_size": 1, "gradient_accumulation": 4, "log_every": 3}
    live = make_run("live", model={"dtype": dtype}, training={**training, "epochs_per_job": 3})
    cached = make_run(
        "cached", model={"dtype": dtype}, training={**training, "total_jobs": 3}, settings={"features": "cached"}
    )
    cached = replace(cached, prepared=own_data)
    train_to_the_end(live)
    eagle3.train(cached)
    shards = shards_of(cached)
    assert len(shards) > 3
    bytes_a_token = 4 * 24 * (4 if dtype == "float32" else 2)
    assert f": {bytes_a_token} bytes a token, " in capsys.readouterr().out
    train_to_the_end(cached)
    assert shards_of(cached) == shards, "nothing is written twice"
    (weights, moments), (expected_weights, expected_moments) = final_state(cached), final_state(live)
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    for number in expected_moments:
        assert all(torch.equal(moments[number][name], expected_moments[number][name]) for name in moments[number])
    for of_live, of_cached in zip(live.folder.metrics(), cached.folder.metrics(), strict=False):
        if of_live["step"] == of_cached["step"]:
            assert of_live["loss"] == of_cached["loss"]
    assert eagle3.evaluate(cached)["loss"] == eagle3.evaluate(live)["loss"]


def test_features_of_larger_batches_are_those_of_the_live_target_to_rounding(make_run: MakeRun, own_data: Path) -> None:
    live = make_run("live")
    cached = replace(make_run("cached", settings={"features": "cached"}), prepared=own_data)
    train_to_the_end(live)
    train_to_the_end(cached)
    for of_live, of_cached in zip(live.folder.metrics(), cached.folder.metrics(), strict=True):
        assert of_cached["loss"] == pytest.approx(of_live["loss"], rel=1e-5)


@pytest.mark.usefixtures("small_shards")
def test_a_shard_that_is_cut_short_or_unmarked_is_written_again_and_no_other(make_run: MakeRun, own_data: Path) -> None:
    run = replace(make_run("first", settings={"features": "cached"}), prepared=own_data)
    eagle3.train(run)
    before = shards_of(run)
    cut, unmarked = sorted((run.prepared / "features").rglob("train-*.safetensors"))[:2]
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-1])
    unmarked.with_suffix(".done").unlink()
    again = replace(make_run("again", settings={"features": "cached"}), prepared=own_data)
    eagle3.train(again)
    assert cut.read_bytes() == whole
    after = shards_of(again)
    assert {name for name in before if after[name] != before[name]} == {cut.name, unmarked.name}


def write_until_killed(run: Eagle3Run) -> None:
    features.SHARD_BYTES = 100_000
    eagle3.train(run)


@pytest.mark.usefixtures("small_shards")
def test_a_writer_that_is_killed_costs_no_more_than_the_shard_it_was_at(make_run: MakeRun, own_data: Path) -> None:
    run = replace(make_run("run", settings={"features": "cached"}), prepared=own_data)
    writer = processes_that_start_fast().Process(target=write_until_killed, args=(run,))
    writer.start()
    while len(done := list((own_data / "features").rglob("*.done"))) < 2:
        assert writer.is_alive()
        time.sleep(0.005)
    writer.kill()
    writer.join()
    written = {marker: marker.stat().st_mtime_ns for marker in done}
    whole = replace(make_run("whole", settings={"features": "cached"}), prepared=own_data.with_name("other-data"))
    shutil.copytree(own_data, whole.prepared, ignore=shutil.ignore_patterns("features"))
    eagle3.train(run)
    assert all(marker.stat().st_mtime_ns == moment for marker, moment in written.items())
    eagle3.train(whole)
    contents = [
        {shard.name: shard.read_bytes() for shard in (one.prepared / "features").rglob("*.safetensors")}
        for one in (run, whole)
    ]
    assert contents[0] == contents[1] and len(contents[0]) > 3


def test_a_target_without_its_layers_embeds_and_judges_as_the_whole_one(make_run: MakeRun) -> None:
    run = make_run("run")
    whole, without = eagle3.build_target(run), eagle3.build_target(run, with_layers=False)
    ids, states = torch.arange(5)[None], torch.randn(1, 5, 24)
    assert torch.equal(whole.embed(ids), without.embed(ids))
    assert torch.equal(whole.logits(states), without.logits(states))
    assert whole.layers == without.layers and not without.network.get_decoder().layers


def test_another_target_has_features_of_its_own_and_a_folder_of_others_is_refused(
    make_run: MakeRun, own_data: Path
) -> None:
    run = replace(make_run("run", settings={"features": "cached"}), prepared=own_data)
    other_layers = replace(make_run("layers", settings={"features": "cached", "layers": [0, 1, 2]}), prepared=own_data)
    other_target = replace(make_run("target", "qwen3", settings={"features": "cached"}), prepared=own_data)
    for one in (run, other_layers, other_target):
        eagle3.train(one)
    manifests = sorted((own_data / "features").glob("*/manifest.json"))
    contents = [json.loads(file.read_text()) for file in manifests]
    assert len(contents) == 3
    theirs = next(file for file, found in zip(manifests, contents, strict=True) if found["layers"] == [0, 1, 2])
    mine = next(
        file
        for file, found in zip(manifests, contents, strict=True)
        if found["target"] == run.model.name and file != theirs
    )
    shutil.copy(theirs, mine)
    with pytest.raises(ValueError, match=r"layers: \[0, 1, 2\] and \[2, 3, 4\]"):
        eagle3.train(replace(make_run("again", settings={"features": "cached"}), prepared=own_data))


@pytest.fixture
def full_data(tmp_path: Path, told_sums: PreparedData) -> Iterator[Path]:
    """The prepared data on a disk that has little room beside them."""
    folder = tmp_path / "full"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a file system of a few kilobytes needs the right to mount one: {mounted.stderr.strip()}")
    try:
        yield Path(shutil.copytree(told_sums.folder, folder / "data"))
    finally:
        subprocess.run(["umount", folder], check=True)


def test_features_that_the_disk_has_no_room_for_are_refused_before_anything_is_written(
    make_run: MakeRun, full_data: Path
) -> None:
    run = replace(make_run("run", settings={"features": "cached"}), prepared=full_data)
    with pytest.raises(ValueError, match=r"eagle3.features: the target's features need .* GB more in"):
        eagle3.train(run)
    assert not shards_of(run)


def test_two_ranks_with_a_target_in_shards_write_the_features_side_by_side(
    make_run: MakeRun, own_data: Path, on_two_ranks: Callable[..., None]
) -> None:
    settings = {"features": "cached"}
    one = replace(make_run("one", training={"batch_size": 6}, settings=settings), prepared=own_data)
    settings = {**settings, "shard_target": True}
    two = replace(make_run("two", training={"batch_size": 3}, settings=settings), prepared=own_data)
    on_two_ranks(two)
    written = shards_of(two)
    eagle3.train(one)
    assert shards_of(one) == written
    for of_one, of_two in zip(one.folder.metrics(), two.folder.metrics(), strict=True):
        assert of_two["loss"] == pytest.approx(of_one["loss"], rel=1e-3)
