"""UnifiedDataset: shapes and masks of every phase, lines read by offset, and rows that do not suit a phase."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from training.unified_dataset import UnifiedDataset

TINY = Path(__file__).parent.parent / "configs/models/tiny"

TEXTS = [{"text": "This is sample text from dataset A...", "source": "a"}, {"text": "Another one.", "source": "b"}]
CHATS = [
    {"conversations": [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}]},
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "See you."},
        ],
        "source": "chat",
    },
]
PAIRS = [{"prompt": "Name a colour.", "chosen": "Blue is one.", "rejected": "No."}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def written(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pretraining_rows_are_shifted_by_one_and_padded(tmp_path: Path, tokenizer: Any) -> None:
    data = UnifiedDataset(written(tmp_path, TEXTS), tokenizer, max_length=32, phase="pretrain")
    inputs, targets, loss_mask = data[0]
    assert [tensor.shape for tensor in (inputs, targets, loss_mask)] == [(31,)] * 3
    assert [tensor.dtype for tensor in (inputs, targets, loss_mask)] == [torch.int64] * 3
    assert torch.equal(inputs[1:], targets[:-1])
    length = int(loss_mask.sum()) + 1
    assert tokenizer.decode(torch.cat([inputs[:1], targets[: length - 1]])) == TEXTS[0]["text"] + tokenizer.eos_token
    assert loss_mask.tolist() == [1] * (length - 1) + [0] * (32 - length)


def test_a_loader_gives_the_batches_of_the_document(tmp_path: Path, tokenizer: Any) -> None:
    data = UnifiedDataset(str(written(tmp_path, TEXTS * 8)), tokenizer, max_length=16, phase="pretrain")
    batches = 0
    for X, Y, loss_mask in DataLoader(data, batch_size=4, shuffle=True, num_workers=2):
        assert X.shape == Y.shape == loss_mask.shape == (4, 15)
        batches += 1
    assert batches == 4


def test_loss_counts_in_assistant_turns_only(tmp_path: Path, tokenizer: Any) -> None:
    data = UnifiedDataset(written(tmp_path, CHATS), tokenizer, max_length=128, phase="sft")
    for index, spoken in ((0, ["It is 4."]), (1, ["Hello!", "See you."])):
        _, targets, loss_mask = data[index]
        learned = tokenizer.decode(targets[loss_mask.bool()])
        assert all(turn in learned for turn in spoken)
        assert not any(question in learned for question in ("What", "Hi", "Bye"))


def test_preferences_share_their_prompt_and_count_only_answers(tmp_path: Path, tokenizer: Any) -> None:
    data = UnifiedDataset(written(tmp_path, PAIRS), tokenizer, max_length=64, phase="dpo")
    row = data[0]
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in row.items()} == {
        f"{name}_{kind}": ((64,), torch.int64)
        for name in ("chosen", "rejected")
        for kind in ("ids", "attention_mask", "mask")
    }
    answers = [tokenizer.decode(row[f"{name}_ids"][row[f"{name}_mask"].bool()]) for name in ("chosen", "rejected")]
    assert answers[0].startswith("Blue is one.")
    assert answers[1].startswith("No.")
    begin = int(row["chosen_mask"].argmax())
    assert begin == int(row["rejected_mask"].argmax())
    assert torch.equal(row["chosen_ids"][:begin], row["rejected_ids"][:begin])


def test_only_the_last_answer_of_a_preference_counts(tmp_path: Path, tokenizer: Any) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    rows = [
        {
            "prompt": turns,
            "chosen": [{"role": "assistant", "content": "See you."}],
            "rejected": [{"role": "assistant", "content": "Why?"}],
        }
    ]
    row = UnifiedDataset(written(tmp_path, rows), tokenizer, max_length=96, phase="dpo")[0]
    assert "Hello" not in tokenizer.decode(row["chosen_ids"][row["chosen_mask"].bool()])


@pytest.mark.parametrize("phase", ["ppo", "rlaif"])
def test_prompts_end_where_the_answer_begins(tmp_path: Path, tokenizer: Any, phase: str) -> None:
    rows = [{"prompt": "Name a colour."}, *CHATS, *PAIRS]
    data = UnifiedDataset(written(tmp_path, rows), tokenizer, max_length=64, phase=phase)
    for index, question in enumerate(["Name a colour.", "What is 2+2?", "Bye", "Name a colour."]):
        row = data[index]
        assert [row[name].shape for name in ("input_ids", "attention_mask")] == [(64,), (64,)]
        assert row["attention_mask"][-1] == 1
        text = tokenizer.decode(row["input_ids"][row["attention_mask"].bool()])
        assert question in text
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        assert text.endswith(expected[-12:])
    assert "Hello!" in tokenizer.decode(data[2]["input_ids"])


def test_long_rows_are_cut_to_the_length(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": "word " * 1000}]
    inputs, _, loss_mask = UnifiedDataset(written(tmp_path, rows), tokenizer, max_length=16)[0]
    assert inputs.shape == (15,)
    assert loss_mask.sum() == 15


def test_lines_are_found_by_offset_and_the_file_is_not_in_memory(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "ä"}\n{"text": "b"}\n{"text": "last, without a newline"}')
    data = UnifiedDataset(path, tokenizer, max_length=32)
    assert len(data) == 3
    assert [data.sample(index).content["text"] for index in (-1, 0, 1)] == ["last, without a newline", "ä", "b"]
    assert [data.sample(index).content["text"] for index in range(3)][1] == "b"
    with pytest.raises(IndexError):
        data[3]
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[0][0], data[0][0])


@pytest.mark.parametrize(
    ("rows", "phase", "message"),
    [
        (TEXTS, "dpo", "the phase dpo needs prompt, chosen and rejected"),
        (TEXTS, "sft", "plain text"),
        (TEXTS, "ppo", "the phase ppo needs a prompt"),
        (PAIRS, "pretrain", "the phase pretrain needs text or messages"),
        ([{"colour": "blue"}], "sft", "row 0"),
    ],
)
def test_a_row_that_does_not_suit_the_phase_is_named(
    tmp_path: Path, tokenizer: Any, rows: list[dict[str, Any]], phase: str, message: str
) -> None:
    data = UnifiedDataset(written(tmp_path, rows), tokenizer, phase=phase)
    with pytest.raises(ValueError, match=message):
        data[0]


def test_wrong_arguments_are_named(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, TEXTS)
    with pytest.raises(ValueError, match="phase must be one of pretrain, sft, dpo, ppo, rlaif, got 'sfd'"):
        UnifiedDataset(path, tokenizer, phase="sfd")
    with pytest.raises(ValueError, match="no file"):
        UnifiedDataset(tmp_path / "none.jsonl", tokenizer)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no rows"):
        UnifiedDataset(path, tokenizer)
    with pytest.raises(ValueError, match="decompress"):
        UnifiedDataset(tmp_path / "a.jsonl.zst", tokenizer)
