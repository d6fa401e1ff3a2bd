"""vLLM writes answers in a process of its own: by the model's weights, the same again, and its faults are said.

The tests that need vLLM run where BATON_VLLM_PYTHON names a Python that has it, or the one of the tests does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from drafting_models import target_config
from safetensors.torch import load_file
from test_eagle3 import MODULE as TOLD_SUMS
from transformers import AutoModelForCausalLM

import eagle3
import finetuning
from answering.answers import AnswersRequest, write_answers
from answering.config import AnswersConfig
from answering.generation import Draws, continuations
from answering.vllm_engine import VllmEngine, environment_of
from drafting.config import Eagle3Config
from drafting.decoding import Greedy, Limits, decode_with_draft
from drafting.evaluation import held_out_prompts
from drafting.export import load_exported
from drafting.run import Eagle3Run
from jobs.config import PROJECT
from jobs.preflight import check_run
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.mixture_folder import finish_folder
from mixture.prepare import PreparationRequest, prepare
from mixture.scatter import WrittenPart
from mixture.shards import TokenRows
from rewarding.rollouts import rollouts_batch
from settings.yaml_tree import ConfigError
from training.checkpoints import newest_valid
from training.config import EvaluationConfig, FinetuningConfig, LoraConfig, ModelConfig, TrainingConfig
from training.models import build_model, load_frozen_model
from training.online_config import GrpoConfig, RlooConfig
from training.run_folder import RunFolder
from training.vllm_config import VllmConfig

PYTHON = os.environ.get("BATON_VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)
needs_vllm = pytest.mark.skipif(PYTHON is None, reason="no Python with vllm: name one in BATON_VLLM_PYTHON")
SMALL = {"kv_cache_memory_bytes": 1 << 24, "enforce_eager": True, "max_num_seqs": 64, "max_num_batched_tokens": 128}
PROMPTS = [np.arange(10, 10 + length) for length in (3, 9, 6, 3)]
STOPS = [2, 4]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with opinions of its own: vLLM's attention on a CPU takes heads of 32, and no smaller ones."""
    return made_model(tmp_path_factory.mktemp("bold") / "model", tiny_model, tied=request.param)


def made_model(folder: Path, like: Path, *, tied: bool) -> Path:
    shutil.copytree(like, folder)
    config = json.loads((like / "config.json").read_text())
    shape = {"hidden_size": 32, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    (folder / "config.json").write_text(json.dumps({**config, **shape, "tie_word_embeddings": tied}))
    network = build_model(ModelConfig(name=str(folder), from_scratch=True), seed=1)
    for weight in network.parameters():
        if weight.ndim == 2:
            weight.data *= 10
    network.save_pretrained(folder)
    return folder


def make_engine(**keys: Any) -> VllmEngine:
    config = VllmConfig(python=PYTHON, arguments={**SMALL, **keys})
    return VllmEngine(config, key="finetuning.grpo.vllm", dtype=torch.float32, max_length=64)


@pytest.fixture(scope="module")
def engine(model: Path) -> Any:
    engine = make_engine()
    engine.load(str(model))
    yield engine
    engine.close()


@needs_vllm
@pytest.mark.chain
def test_greedy_answers_and_their_log_probabilities_are_those_of_the_model(engine: VllmEngine, model: Path) -> None:
    network = load_frozen_model(ModelConfig(name=str(model), dtype="float32"))
    expected = continuations(network, PROMPTS, stops=STOPS, room=[12, 5, 12, 1])
    found = engine.continuations(PROMPTS, stops=STOPS, room=[12, 5, 12, 1])
    assert [one.ids.tolist() for one in found] == [one.ids.tolist() for one in expected]
    assert [one.is_finished for one in found] == [one.is_finished for one in expected]
    for prompt, answer in zip(PROMPTS, found, strict=True):
        assert answer.log_probabilities == pytest.approx(log_probabilities(network, prompt, answer.ids), abs=1e-4)


def log_probabilities(network: Any, prompt: Any, ids: Any, temperature: float = 1.0) -> Any:
    with torch.no_grad():
        logits = network(input_ids=torch.from_numpy(np.concatenate([prompt, ids]))[None]).logits[
            0, len(prompt) - 1 : -1
        ]
    told = (logits / temperature).log_softmax(-1)
    return told[torch.arange(len(ids)), torch.from_numpy(ids)].numpy()


@needs_vllm
@pytest.mark.chain
def test_a_key_draws_the_same_again_and_tokens_as_often_as_they_are_probable(engine: VllmEngine, model: Path) -> None:
    draws = Draws(range(500), temperature=0.5)
    network = load_frozen_model(ModelConfig(name=str(model), dtype="float32"))
    asked: dict[str, Any] = {"stops": STOPS, "room": [1] * 500, "draws": draws}
    first, again = (engine.continuations([PROMPTS[1]] * 500, **asked) for _ in range(2))
    assert [one.ids.tolist() for one in first] == [one.ids.tolist() for one in again]
    counts = Counter(int(one.ids[0]) for one in first)
    assert len(counts) > 5
    for token, count in counts.most_common(3):
        log_probability = float(log_probabilities(network, PROMPTS[1], np.array([token]), temperature=0.5)[0])
        share = np.exp(log_probability)
        assert count / 500 == pytest.approx(share, abs=4 * (share / 500) ** 0.5)
        found = next(float(one.log_probabilities[0]) for one in first if one.ids[0] == token)  # type: ignore[index]
        assert found == pytest.approx(log_probability, abs=1e-4)


@needs_vllm
@pytest.mark.chain
def test_settings_that_vllm_refuses_are_said_with_their_section(model: Path) -> None:
    engine = make_engine(no_such_argument=1)
    with pytest.raises(ValueError, match=r"finetuning\.grpo\.vllm: vLLM failed: .*no_such_argument"):
        engine.load(str(model))
    assert engine.process is not None and engine.process.poll() == 0


@needs_vllm
@pytest.mark.chain
def test_a_server_that_is_killed_is_said(model: Path) -> None:
    engine = make_engine()
    engine.load(str(model))
    assert engine.process is not None
    engine.process.kill()
    with pytest.raises(RuntimeError, match="vLLM ended with exit status -9"):
        engine.continuations(PROMPTS, stops=STOPS, room=[4] * 4)


@pytest.mark.parametrize(
    ("visible", "seen"),
    [({"CUDA_VISIBLE_DEVICES": "4,7"}, "7"), ({"CUDA_VISIBLE_DEVICES": "GPU-ab, GPU-cd"}, "GPU-cd"), ({}, "1")],
)
def test_a_server_sees_the_gpu_of_its_process_and_none_of_the_others(visible: dict[str, str], seen: str) -> None:
    environ = {**visible, "RANK": "1", "WORLD_SIZE": "2", "HOME": "/home/me"}
    found = environment_of(torch.device("cuda", 1), environ)
    assert found["CUDA_VISIBLE_DEVICES"] == seen and found["HOME"] == "/home/me"
    assert not {"RANK", "WORLD_SIZE"} & found.keys()
    assert environment_of(None, environ).get("CUDA_VISIBLE_DEVICES") == visible.get("CUDA_VISIBLE_DEVICES")


def test_a_python_without_vllm_is_said() -> None:
    engine = VllmEngine(VllmConfig(), key="finetuning.grpo.vllm", dtype=torch.float32, max_length=64)
    if importlib.util.find_spec("vllm"):
        pytest.skip("this Python has vllm")
    with pytest.raises(ValueError, match=r"finetuning\.grpo\.vllm: vLLM failed: ModuleNotFoundError: .*'vllm'"):
        engine.load("model")
    assert engine.process is not None and engine.process.poll() == 0


def test_a_python_with_vllm_is_looked_for_before_the_queue(tmp_path: Path) -> None:
    folders = ["--runs_dir", str(tmp_path / "runs"), "--data_dir", str(tmp_path / "data"), "--cluster", "local"]
    asked = [*folders, "--finetuning.grpo.engine", "vllm", "--finetuning.grpo.vllm.python"]
    example = PROJECT / "configs/examples/grpo.yaml"
    bare = tmp_path / "bare"
    venv.create(bare)
    for python, said in (
        (
            "nowhere/bin/python",
            r"finetuning\.grpo\.vllm\.python: no program nowhere/bin/python; tried .*pip install vllm",
        ),
        (str(bare / "bin/python"), rf"{bare}/bin/python has no package vllm; install it there"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_run(example, [*asked, python])
    # What makes an environment is the link to its Python, which stays one.
    (bare / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages/vllm").mkdir()
    found = check_run(example, [*asked, str(bare / "bin/python")]).config.finetuning.online
    assert found is not None and found.vllm == VllmConfig(python=str(bare / "bin/python"))


def test_a_process_without_answers_has_the_entries_of_the_others() -> None:
    assert rollouts_batch([], drawn_elsewhere=True)["drawn"].shape == (0,)
    assert "drawn" not in rollouts_batch([], drawn_elsewhere=False)


# --- answers to the rows of a mixture


@needs_vllm
@pytest.mark.chain
def test_answers_to_a_mixture_are_those_of_the_model(model: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What is {} plus 2?"}, {"role": "assistant", "content": "?"}] * 2
    rows = [
        {"id": f"row-{i}", "source": "sums", "category": None, "metadata": {}}
        | {"messages": [{**turn, "content": turn["content"].format(i)} for turn in turns]}
        for i in range(6)
    ]
    part = WrittenPart(file="train-00000.jsonl", split="train", stage=0, rows={}, bytes=0, checksum="")
    (tmp_path / part.file).write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    finish_folder(tmp_path, "rows", [part])
    written = {}
    for engine, vllm in (("transformers", None), ("vllm", VllmConfig(python=PYTHON, arguments=SMALL))):
        request = AnswersRequest(
            writer=ModelConfig(name=str(model)),
            writer_key="model",
            answers=AnswersConfig(max_new_tokens=8, keep_unfinished=True, engine=engine, vllm=vllm),  # type: ignore[arg-type]
            rows=PreparationRequest(
                dataset=DatasetConfig(mixture="recipe.yaml", max_length=64),
                mixture=tmp_path, tokenizer=str(model), objective="sft",
            ),
            folder=tmp_path / engine,
            seed=1,
        )  # fmt: skip
        assert write_answers(request, lambda line: None, stop_requested=lambda: False)
        written[engine] = (request.folder / part.file).read_text()
    assert written["vllm"] == written["transformers"] != (tmp_path / part.file).read_text()


# --- learning from what it writes


SHORT: dict[str, Any] = {"group_size": 4, "max_new_tokens": 6, "engine": "vllm"}


@needs_vllm
@pytest.mark.chain
@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        (GrpoConfig(**SHORT), {}),
        (RlooConfig(**SHORT, beta=0.1), {"peft": True, "peft_method": "dora", "lora": LoraConfig(r=4)}),
    ],
    ids=["grpo", "rloo of an adapter"],
)
def test_two_blocks_equal_one_run_and_the_engine_follows_the_weights(
    settings: GrpoConfig | RlooConfig, keys: dict[str, Any], make_run: Any, model: Path, tmp_path: Path
) -> None:
    settings = replace(settings, vllm=VllmConfig(python=PYTHON, arguments=SMALL))
    module = ModuleFile(PROJECT / "datasets/synthetic_sums.py")
    dataset = DatasetConfig(name="sums", max_length=64, module_keys={"num_rows": 15})
    asked = PreparationRequest(dataset=dataset, module=module, tokenizer=str(model), objective="prompts")
    prepared = prepare(asked, tmp_path / "data", lambda line: None)
    runs = []
    for name, epochs, jobs in (("chain", 1, 2), ("whole", 2, 1)):
        training = {"epochs_per_job": epochs, "total_jobs": jobs, "log_every": 1, "batch_size": 2,
                    "gradient_accumulation": 2}  # fmt: skip
        run = make_run(name, model={"name": str(model), "from_scratch": False, **keys}, training=training)
        config = FinetuningConfig(objective=settings.section, **{settings.section: settings})
        run = replace(run, module=module, prepared=prepared.folder, finetuning=config, dataset=dataset)
        while not finetuning.train(run).finished:
            pass
        runs.append(run)
    chain, whole = ([line for line in run.folder.metrics()] for run in runs)
    assert [line["reward"] for line in chain] == [line["reward"] for line in whole]
    checkpoints = [newest_valid(run.folder.checkpoints)[0] for run in runs]
    weights = [load_file(next(found.path.glob("*model.safetensors"))) for found in checkpoints if found]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    # The policy moves away from where it began, and the engine with it.
    assert 0 < max(line["engine_gap"] for line in chain) < 1e-4
    assert finetuning.evaluate(runs[0])["reward"] == pytest.approx(finetuning.evaluate(runs[1])["reward"])


# --- draft heads

SPECULATE = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    asked = json.loads(sys.argv[1])
    llm = LLM(**asked["llm"], disable_log_stats=False)
    settings = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
    written = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], settings, use_tqdm=False)
    passes = next(one.value for one in llm.get_metrics() if one.name == "vllm:spec_decode_num_drafts")
    print(json.dumps({"passes": passes, "ids": [list(one.outputs[0].token_ids) for one in written]}))

if __name__ == "__main__":
    main()
"""


@needs_vllm
@pytest.mark.chain
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_draft_head_saves_in_vllm_the_passes_that_it_saves_here(
    family: str, tiny_model: Path, tmp_path: Path
) -> None:
    """In as many passes of the target, vLLM writes what the target alone would."""
    target = tmp_path / "target"
    shutil.copytree(tiny_model, target)
    torch.manual_seed(2)
    config = target_config(family, vocab_size=4096, hidden_size=128, head_dim=32, initializer_range=0.15)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
    module = tmp_path / "told_sums.py"
    module.write_text(TOLD_SUMS)
    dataset = DatasetConfig(name="told_sums", max_length=128)
    asked = PreparationRequest(dataset=dataset, module=ModuleFile(module), tokenizer=str(target), objective="sft")
    prepared = prepare(asked, tmp_path / "data", lambda line: None, workers=1)
    run = Eagle3Run(
        folder=RunFolder(tmp_path / "draft"), prepared=prepared.folder, module=None, seed=1, dataset=dataset,
        model=ModelConfig(name=str(target)),
        training=TrainingConfig(lr=1e-2, batch_size=4, epochs_per_job=12, arguments={"report_to": "none"}),
        eagle3=Eagle3Config(draft_vocabulary=2000, steps=3), evaluation=EvaluationConfig(limit=0),
    )  # fmt: skip
    run.folder.path.mkdir()
    assert eagle3.train(run).finished

    prompts = [prompt.input_ids for prompt in held_out_prompts(TokenRows.open(run.prepared, "test"), limit=8)]
    draft, _ = load_exported(run.folder.export)
    limits = Limits(max_new_tokens=33, stop_ids=frozenset())
    here = [decode_with_draft(eagle3.build_target(run), draft, ids, Greedy(), limits, chain=3) for ids in prompts]
    llm = {"model": str(target), "dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True, **SMALL,
           "generation_config": "vllm", "speculative_config": {"method": "eagle3", "model": str(run.folder.export),
                                                               "num_speculative_tokens": 3}}  # fmt: skip
    asked_of_vllm = json.dumps({"llm": llm, "tokens": 33, "prompts": [list(map(int, ids)) for ids in prompts]})
    environment = environment_of(None, os.environ)
    found = json.loads(
        subprocess.run(
            [str(PYTHON), "-I", "-c", SPECULATE, asked_of_vllm], env=environment, stdout=subprocess.PIPE, check=True
        ).stdout.splitlines()[-1]
    )
    assert found["ids"] == [one.tokens for one in here]
    assert found["passes"] == sum(one.passes for one in here) < 8 * 32
