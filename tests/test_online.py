"""Models learn from rewards of their own answers: two blocks equal one run, whoever asks; what is wrong is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_runs import assert_identical, train_to_the_end, trained_weights

import finetuning
from jobs.config import PROJECT, read_run_config
from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.prepare import PreparationRequest, PreparedData, prepare
from mixture.prompts import PromptRows
from mixture.shards import TokenRows
from phases import rewards
from settings.yaml_tree import ConfigError
from training.block import build_data
from training.checkpoints import newest_valid
from training.config import EvaluationConfig, FinetuningConfig, LoraConfig
from training.distributed import Ranks
from training.online_config import GrpoConfig, RewardSource, RlooConfig
from training.run import FinetuningRun, NonFiniteLossError

MakeRun = Callable[..., FinetuningRun]
SUMS = ModuleFile(PROJECT / "datasets/synthetic_sums.py")


def prepared_prompts(model: Path, data: Path, module: ModuleFile = SUMS, **keys: Any) -> PreparedData:
    dataset = DatasetConfig(name=module.path.stem, max_length=64, module_keys=keys)
    request = PreparationRequest(dataset=dataset, module=module, tokenizer=str(model), objective="prompts")
    return prepare(request, data, lambda line: None)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> PreparedData:
    """12 training prompts and 3 test prompts."""
    return prepared_prompts(tiny_model, tmp_path_factory.mktemp("data"), num_rows=15)


@pytest.fixture
def make_online_run(make_run: MakeRun, prepared: PreparedData) -> MakeRun:
    def make(name: str, settings: GrpoConfig | RlooConfig, **keys: Any) -> FinetuningRun:
        run = make_run(name, **keys)
        config = FinetuningConfig(objective=settings.section, **{settings.section: settings})
        dataset = replace(run.dataset, max_length=64)
        return replace(run, module=SUMS, prepared=prepared.folder, finetuning=config, dataset=dataset)

    return make


SHORT: dict[str, Any] = {"group_size": 4, "max_new_tokens": 6}


# --- the chain


@pytest.mark.chain
@pytest.mark.parametrize(
    "settings",
    [
        GrpoConfig(**SHORT),
        GrpoConfig(**SHORT, loss="dapo", beta=0.1, iterations=2, temperature=0.8),
        RlooConfig(**SHORT, beta=0.1),
    ],
    ids=["grpo", "dapo with a reference and two iterations", "rloo with a reference"],
)
def test_two_blocks_equal_one_uninterrupted_run_bit_for_bit(
    settings: GrpoConfig | RlooConfig, make_online_run: MakeRun
) -> None:
    training = {"gradient_accumulation": 2, "log_every": 1}
    chain = make_online_run("chain", settings, training={**training, "epochs_per_job": 1, "total_jobs": 2})
    whole = make_online_run("whole", settings, training={**training, "epochs_per_job": 2, "total_jobs": 1})
    assert_identical(trained_weights(chain), trained_weights(whole))
    lines = [list(run.folder.metrics()) for run in (chain, whole)]
    assert [line["reward"] for line in lines[0]] == [line["reward"] for line in lines[1]]
    assert {"reward", "reward_module", "reward_std", "zero_std_share", "answer_tokens", "cut_share", "entropy"} < set(
        lines[0][0]
    )
    assert ("kl" in lines[0][0]) == bool(settings.beta)
    assert all("eval_reward" in event for event in chain.folder.events() if event["event"] == "block_end")


@pytest.mark.chain
def test_two_blocks_of_an_adapter_with_dropout_in_bfloat16_equal_one_run(
    make_online_run: MakeRun, teacher: Path
) -> None:
    model = {"name": str(teacher), "from_scratch": False, "peft": True, "lora": LoraConfig(r=4, dropout=0.2),
             "dtype": "bfloat16"}  # fmt: skip
    settings = GrpoConfig(**SHORT, beta=0.1)
    chain = make_online_run("chain", settings, model=model, training={"epochs_per_job": 1, "total_jobs": 2})
    whole = make_online_run("whole", settings, model=model, training={"epochs_per_job": 2, "total_jobs": 1})
    trained = trained_weights(chain)
    assert_identical(trained, trained_weights(whole))
    assert all(bool(weight.any()) for name, weight in trained.items() if "lora_B" in name), "they began as zeros"
    assert "kl" in next(iter(chain.folder.metrics()))


def test_a_gradient_that_is_not_finite_at_a_further_iteration_ends_the_block_without_a_checkpoint(
    make_online_run: MakeRun,
) -> None:
    run = make_online_run("run", GrpoConfig(**SHORT, iterations=3), training={"lr": 1e18, "save_every": 1})
    with pytest.raises(NonFiniteLossError, match=r"at iteration 2 of step 1\. .*finetuning\.grpo\.iterations"):
        finetuning.train(run)
    assert newest_valid(run.folder.checkpoints) == (None, [])


@pytest.mark.chain
def test_a_stop_between_micro_batches_changes_nothing(make_online_run: MakeRun) -> None:
    """The step is abandoned, and its answers are written again by the same numbers."""
    training = {"gradient_accumulation": 3, "epochs_per_job": 2}
    run, whole = (make_online_run(name, GrpoConfig(**SHORT), training=training) for name in ("run", "whole"))
    from training.block import train_block

    def build(start: Any) -> Any:
        trainer = rewards.build_trainer(run, start)
        asked = iter([False] * 4 + [True] * 99)  # after each of the micro-batches of a step
        trainer.schedule.stop_requested = lambda: next(asked)
        return trainer

    stopped = train_block(run, build_trainer=build, score_block=lambda trainer: {}, export=lambda end: None)
    assert stopped.stopped and 0 < stopped.step < stopped.horizon_steps
    assert_identical(trained_weights(run), trained_weights(whole))


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dapo", "dr_grpo", "rloo"])
def test_micro_batches_do_not_change_the_loss(loss: Any, make_online_run: MakeRun) -> None:
    settings = RlooConfig(**SHORT) if loss == "rloo" else GrpoConfig(**SHORT, loss=loss, beta=0.1)
    run = make_online_run("run", settings)
    packs = build_data(run, "train")
    rows = [packs[pack] for pack in range(6)]
    gradients = [gradient(run, split) for split in ([rows], [rows[:2], rows[2:]], [[], *([row] for row in rows)])]
    assert gradients[0].abs().max() > 1e-5
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-7)


def gradient(run: FinetuningRun, micro_batches: list[Any]) -> torch.Tensor:
    """Of one optimizer step over these micro-batches, each a list of packs of one prompt."""
    from rewarding.rollouts import PromptCollate

    model = rewards.build_model(run, None)
    loss = rewards.build_loss(run, rewards.build_writer(run, model, Ranks(), None), step=0)
    batches = [PromptCollate()(packs) for packs in micro_batches]
    items = loss.begin_step(batches)
    for batch in batches:
        loss(model, batch, torch.tensor(items)).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def test_further_iterations_are_updates_from_the_same_answers(make_online_run: MakeRun) -> None:
    from rewarding.rollouts import PromptCollate

    training = {"lr": 0.5, "lr_scheduler": "constant", "warmup": 0, "max_grad_norm": 0, "batch_size": 6,
                "gradient_accumulation": 2, "arguments": {"optim": "sgd", "report_to": "none"}}  # fmt: skip
    run = make_online_run("run", GrpoConfig(**SHORT, iterations=3, epsilon=0.05), training=training)
    trained = trained_weights(run)

    model = rewards.build_model(run, None)
    loss = rewards.build_loss(run, rewards.build_writer(run, model, Ranks(), None), step=0)
    packs = build_data(run, "train")
    batch = PromptCollate()([packs[pack] for pack in range(len(packs))])
    items = torch.tensor(loss.begin_step([batch]))
    for iteration in range(3):
        loss.iteration = iteration
        loss(model.train(), batch, items).backward()
        for weight in model.parameters():
            assert weight.grad is not None
            weight.data -= 0.5 * weight.grad
            weight.grad = None
    expected = {name: weight for name, weight in model.state_dict().items() if name in trained}
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-6)
    (line,) = run.folder.metrics()
    assert line["step"] == 1 and line["clip_share"] > 0
    assert line["clip_share"] == pytest.approx(loss.take()["clip_share"])


def test_a_resume_with_another_reward_is_refused(make_online_run: MakeRun) -> None:
    run = make_online_run("run", GrpoConfig(**SHORT), training={"total_jobs": 2})
    finetuning.train(run)
    other = GrpoConfig(**SHORT, rewards=[RewardSource(weight=2.0)])
    with pytest.raises(ValueError, match="objective"):
        finetuning.train(replace(run, finetuning=FinetuningConfig(objective="grpo", grpo=other)))


@pytest.mark.chain
def test_evaluation_tells_the_mean_reward_before_and_after(make_online_run: MakeRun) -> None:
    settings = GrpoConfig(group_size=8, max_new_tokens=2)
    run = make_online_run("run", settings, training={"epochs_per_job": 10, "batch_size": 4, "lr": 1e-2})
    train_to_the_end(run)
    result = finetuning.evaluate(run)
    assert json.loads(run.folder.evaluation.read_text()) == result
    assert result["models"]["grpo"]["all"] == result["models"]["grpo"]["synthetic_sums"]
    assert result["count"] == 3
    assert result["reward"] == result["models"]["grpo"]["all"]["reward"] == pytest.approx(result["reward_module"])
    assert result["reward_before"] == result["models"]["before"]["all"]["reward"]
    assert result["reward"] > 1.3 * result["reward_before"]
    (end,) = [event for event in run.folder.events() if event["event"] == "block_end"]
    assert end["eval_reward"] == pytest.approx(result["reward"])
    assert "score" in result, "the module's score is told too"


@pytest.mark.chain
@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_the_examples_train_in_two_chained_blocks(objective: str, make_run: MakeRun, tmp_path: Path) -> None:
    config = read_run_config(PROJECT / f"configs/examples/{objective}.yaml", ["--dataset.num_rows", "20"])
    model = make_run("unused").model
    request = PreparationRequest(dataset=config.dataset, module=SUMS, tokenizer=model.name, objective=config.objective)
    run = replace(
        make_run("example"),
        module=SUMS,
        dataset=config.dataset,
        prepared=prepare(request, tmp_path, lambda line: None).folder,
        finetuning=config.finetuning,
        training=replace(config.training, arguments={"report_to": "none"}),
    )
    assert not finetuning.train(run).finished
    assert finetuning.train(run).finished
    assert "reward" in list(run.folder.metrics())[-1]


# --- rewards


def made_module(folder: Path, rows: list[dict[str, Any]], more: str = "") -> ModuleFile:
    path = folder / "made.py"
    path.write_text(
        f"def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):\n    return {rows!r}\n\n{more}\n"
    )
    return ModuleFile(path)


def run_on(run: FinetuningRun, module: ModuleFile, data: Path, settings: GrpoConfig) -> FinetuningRun:
    return replace(
        run,
        module=module,
        prepared=prepared_prompts(Path(run.model.name), data, module).folder,
        finetuning=FinetuningConfig(objective="grpo", grpo=settings),
        dataset=replace(run.dataset, max_length=64),
    )


ROWS = [
    {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{n} + 1"}], "n": n} for n in (4, 5)
]


def test_a_reward_is_told_the_turns_the_answer_as_text_and_the_row_as_it_was(make_run: MakeRun, tmp_path: Path) -> None:
    more = """
def reward(prompt_messages, answer, row):
    assert prompt_messages == row["prompt"] and prompt_messages[-1]["content"] == f"{row['n']} + 1"
    assert isinstance(answer, str) and "<|" not in answer
    return row["n"]

def score(prediction, row):
    raise AssertionError("reward comes first")
"""
    settings = GrpoConfig(**SHORT, rewards=[RewardSource(weight=0.5)])
    run = run_on(make_run("run"), made_module(tmp_path, ROWS, more), tmp_path, settings)
    train_to_the_end(replace(run, evaluation=replace(run.evaluation, limit=0)))
    (line,) = run.folder.metrics()
    assert line["reward_module"] == 4.5 and line["reward"] == 2.25
    assert line["zero_std_share"] == 1 and line["reward_std"] == 0


def test_a_module_with_score_alone_is_rewarded_by_it(make_run: MakeRun, tmp_path: Path) -> None:
    module = made_module(tmp_path, ROWS, "def score(prediction, row):\n    return float(row['n'])")
    run = run_on(make_run("run"), module, tmp_path, GrpoConfig(**SHORT))
    train_to_the_end(run)
    assert next(iter(run.folder.metrics()))["reward"] == 4.5


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "return 1 / (row['n'] - 5)",
            r"made\.py:5: ZeroDivisionError: .* \(in reward for row made-train-1 and the answer",
        ),
        (
            "return float('nan') if row['n'] == 5 else 1",
            r"made\.py: nan in reward for row made-train-1 .* finite number",
        ),
        ("return None", r"made\.py.* TypeError: .* \(in reward for row made-train-"),
    ],
)
def test_a_reward_that_raises_or_is_no_number_names_the_row(
    body: str, said: str, make_run: MakeRun, tmp_path: Path
) -> None:
    module = made_module(tmp_path, ROWS, f"def reward(prompt_messages, answer, row):\n    {body}")
    run = run_on(make_run("run"), module, tmp_path, GrpoConfig(**SHORT))
    with pytest.raises(ValueError, match=said):
        finetuning.train(run)


def test_a_module_without_reward_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    run = run_on(make_run("run"), made_module(tmp_path, ROWS), tmp_path, GrpoConfig(**SHORT))
    with pytest.raises(ValueError, match=r"finetuning\.grpo\.rewards: .*made\.py has no function reward; add reward\("):
        finetuning.train(run)


def reward_model(folder: Path, tiny_model: Path) -> Path:
    """A reward model as finetuning.objective: reward exports it, untrained."""
    from training.config import ModelConfig
    from training.models import load_tokenizer
    from training.preferences import build_reward_model, export_reward_model

    model = ModelConfig(name=str(tiny_model), from_scratch=True)
    tokenizer = load_tokenizer(model)
    export_reward_model(build_reward_model(model, seed=3), tokenizer, folder, step=1, config=model)
    return folder


def test_a_module_that_runs_code_is_told_whether_it_may_unprotected(make_run: MakeRun, tmp_path: Path) -> None:
    module = made_module(
        tmp_path, ROWS, "def score(prediction, row, unprotected=False):\n    return float(unprotected)"
    )
    run = replace(make_run("run"), module=module, finetuning=FinetuningConfig(objective="grpo"))
    from rewarding.rewards import Answered

    for unprotected in (True, False):
        run = replace(run, evaluation=EvaluationConfig(unprotected_code=unprotected))
        found = rewards.build_rewards(run).of([Answered("one", [], {}, "pass")])
        assert found["module"].tolist() == [float(unprotected)]


def test_a_reward_model_gives_what_transformers_makes_of_the_conversation(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rewarding.rewards import Answered, build_rewards

    folder = reward_model(tmp_path / "reward", tiny_model)
    config = GrpoConfig(
        rewards=[RewardSource(kind="model", name=str(folder), weight=2.0), RewardSource(kind="model", name=str(folder))]
    )
    turns = [{"role": "user", "content": "2 + 2"}]
    asked = [Answered("one", turns, {}, "4"), Answered("two", turns, {}, "certainly five")]
    found = build_rewards(config, None, torch.device("cpu"), unprotected=False).of(asked)
    assert list(found) == ["model", "model_2"]
    classifier, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    for place, one in enumerate(asked):
        text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": one.answer}], tokenize=False)
        with torch.no_grad():
            expected = classifier(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item()
        assert found["model"][place].item() == pytest.approx(expected, abs=1e-5)


def test_a_chat_model_is_refused_as_a_reward_model(teacher: Path) -> None:
    from rewarding.rewards import build_rewards

    config = GrpoConfig(rewards=[RewardSource(kind="model", name=str(teacher))])
    with pytest.raises(ValueError, match=r"is LlamaForCausalLM, and kind: model takes a sequence classifier"):
        build_rewards(config, None, torch.device("cpu"), unprotected=False)


def test_a_judge_reads_prompt_and_answer_and_what_it_cannot_say_is_counted(teacher: Path) -> None:
    from rewarding.rewards import Answered, build_rewards

    question = "Judge {answer} to {prompt}!"
    source = RewardSource(kind="judge", name=str(teacher), prompt=question, highest=5)
    rewards = build_rewards(GrpoConfig(rewards=[source]), None, torch.device("cpu"), unprotected=False)
    judge: Any = rewards.sources["judge"]
    one = Answered("one", [{"role": "user", "content": "what is {answer}?"}], {}, "it is {prompt}")
    read = judge.tokenizer.decode(judge.prompt_ids(one))
    assert "Judge it is {prompt} to user: what is {answer}?!" in read
    assert [judge.value(reply) for reply in ("4", "Score: 2.5/5", "no idea", "-1", "7")] == [0.8, 0.5, 0, 0, 0]
    assert rewards.unread["replies"] == 3
    (value,) = rewards.of([one])["judge"].tolist()
    assert 0 <= value <= 1


@pytest.mark.chain
def test_training_by_a_judge_and_a_reward_model_tells_each_reward(
    make_online_run: MakeRun, teacher: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = reward_model(tmp_path / "reward", tiny_model)
    rewards = [RewardSource(kind="judge", name=str(teacher)), RewardSource(kind="model", name=str(folder), weight=0.5)]
    run = make_online_run("run", GrpoConfig(**SHORT, rewards=rewards))
    train_to_the_end(run)
    line = list(run.folder.metrics())[-1]
    assert line["reward"] == pytest.approx(line["reward_judge"] + 0.5 * line["reward_model"])
    assert 0 <= line["judge_unread"] <= 1


# --- prompts that cannot be asked


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": " "}, r"made\.py, train row 1: sample made-train-1: prompt is empty"),
        ({"question": "", "answer": "4"}, r"made\.py, train row 1: sample made-train-1: prompt is empty"),
        (
            {"text": "no question"},
            r"sample made-train-1 holds text and no prompt, which this finetuning\.objective answers",
        ),
        ({"prompt": "q", "of": {1, 2}}, r"made\.py, train row 1: .* not JSON serializable: set"),
        ({"prompt": "q", "id": "made-train-0"}, r"two different rows have the id 'made-train-0'"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(row: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path) -> None:
    module = made_module(tmp_path, [{"prompt": "2 + 2"}, row])
    with pytest.raises(ValueError, match=said):
        prepared_prompts(tiny_model, tmp_path, module)


def test_prompts_end_where_the_answer_begins_and_long_ones_are_dropped(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        {"question": "2 + 2", "answer": "4"},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ]
        },
        {"prompt": "word " * 99, "id": "long"},
    ]
    found = prepared_prompts(tiny_model, tmp_path, made_module(tmp_path, rows))
    train = found.splits["train"]
    assert train is not None and train.dropped == {"no room for an answer within max_length": 1} and train.packs == 2
    from training.models import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [tokenizer.decode(row.input_ids) for row in TokenRows.open(found.folder, "train")]
    assert all(text.endswith("<|im_start|>assistant\n") for text in texts)
    assert "4" not in texts[0] and texts[1].count("<|im_end|>") == 3
    kept = PromptRows(found.folder, "train")
    assert kept["made-train-0"].row == rows[0] and kept["long"].row == rows[2]
    with pytest.raises(KeyError, match="no row 'other'"):
        kept["other"]


def test_a_mixture_of_prompts_is_asked_with_its_samples_as_rows(tiny_model: Path, tmp_path: Path) -> None:
    from mixture.mixture_folder import finish_folder
    from mixture.scatter import WrittenPart

    folder = tmp_path / "mixed"
    folder.mkdir()
    lines = [
        {"id": f"s-{n}", "source": "s", "category": None, "metadata": {"total": n}, "prompt": f"{n} + 0"}
        for n in (1, 2)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    part = WrittenPart(file="train.jsonl", split="train", stage=0, rows={"s": 2}, bytes=1, checksum="")
    finish_folder(folder, "0" * 16, [part])
    request = PreparationRequest(
        dataset=DatasetConfig(name="mixture", max_length=64), mixture=folder, tokenizer=str(tiny_model),
        objective="prompts",
    )  # fmt: skip
    found = prepare(request, tmp_path, lambda line: None)
    assert PromptRows(found.folder, "train")["s-2"].row["metadata"] == {"total": 2}


# --- settings

EXAMPLE = PROJECT / "configs/examples/grpo.yaml"
ADAPTER = ["--model.from_scratch", "false", "--model.peft", "true"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--dataset.packing", "true"], r"dataset\.packing: .* one prompt a row"),
        (["--training.parallelism", "deepspeed"], r"training\.parallelism: .* deepspeed .* cannot write answers"),
        (["--finetuning.grpo.group_size", "1"], r"finetuning\.grpo\.group_size must be at least 2"),
        (["--finetuning.grpo.rewards", "[{kind: judge}]"], r"kind: judge needs name"),
        (["--finetuning.grpo.rewards", "[{kind: modle}]"], r"item 1, kind: expected one of module, .* got 'modle'"),
        (["--finetuning.grpo.rewards", "[{}, {knd: module}]"], r"item 2: unknown key knd; did you mean kind\?"),
        (["--finetuning.grpo.rewards", "[]"], r"finetuning\.grpo\.rewards is empty"),
        (["--finetuning.objective", "sft"], r"finetuning\.grpo is read only where"),
        (["--finetuning.grpo.vllm.python", "x"], r"finetuning\.grpo\.vllm is read only where .*engine is vllm"),
        (
            ["--finetuning.grpo.engine", "vllm", "--finetuning.grpo.vllm.arguments", "{seed: 1, max_num_seqs: 8}"],
            r"vllm\.arguments\.seed: decided by seed",
        ),
        (
            [*ADAPTER, "--model.peft_method", "qlora", "--finetuning.grpo.engine", "vllm"],
            r"finetuning\.grpo\.engine: vllm is given .* its base is held in 4 bits",
        ),
        (
            ["--training.parallelism", "fsdp", "--finetuning.grpo.engine", "vllm"],
            r"finetuning\.grpo\.engine: vllm is given the whole .* fsdp keeps in shards",
        ),
        ([*ADAPTER, "--model.peft_method", "lora_moe"], r"model\.peft_method: lora_moe does not learn from rewards"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_before_the_queue(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_run_config(EXAMPLE, overrides)


def test_what_rewards_need_is_looked_for_before_the_queue(tmp_path: Path, teacher: Path) -> None:
    from jobs.preflight import check_run

    folders = ["--runs_dir", str(tmp_path / "runs"), "--data_dir", str(tmp_path / "data"), "--cluster", "local"]
    rewards = "--finetuning.grpo.rewards"
    wrong = [
        (["--dataset.name", "ultrachat", "--dataset.num_rows", "null"], r"ultrachat\.py has no function reward"),
        (
            [rewards, f"[{{kind: model, name: {teacher}}}]"],
            r"kind: model cannot be LlamaForCausalLM .* is it kind: judge",
        ),
        ([rewards, "[{kind: model, name: no/where/at/all}]"], r"finetuning\.grpo\.rewards: no folder no/where/at/all"),
    ]
    for overrides, said in wrong:
        with pytest.raises(ConfigError, match=said):
            check_run(EXAMPLE, [*folders, *overrides])
    judged = check_run(EXAMPLE, [*folders, rewards, f"[{{kind: judge, name: {teacher}}}]"])
    assert judged.config.finetuning.online is not None
    assert judged.config.finetuning.online.rewards[0].name == str(teacher)
