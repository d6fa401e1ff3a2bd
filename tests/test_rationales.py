"""Reasoning that samples mark is left out of the loss, token by token, and the answer after it is not."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chat_tokenizers import CHATML, CHATML_WITH_GENERATION, LLAMA_3, MISTRAL, REASONING, chat_tokenizer

from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.formats import Sample
from mixture.prepare import PreparationRequest, data_key, prepare
from mixture.render import Renderer
from mixture.shards import TokenRows
from mixture.tokenizers import FAST_BACKENDS

REASONING_TEXT = "Ann has 2 + 3 = <<2+3=5>>5 apples. é🙂\n"
ANSWER = REASONING_TEXT + "#### 5"
SPAN = [[0, len(REASONING_TEXT)]]


def exchange(answer=ANSWER, spans=SPAN, question="How many?", earlier=()):
    turns = [*earlier, ("user", question), ("assistant", answer)]
    messages = [{"role": role, "content": text} for role, text in turns]
    return Sample(id="s", source="test", content={"messages": messages}, metadata={"rationale": spans})


def renderer(template=CHATML, *, mask_rationale=True, objective="sft", **settings):
    settings = {"max_length": 4096, "over_length": None, **settings}
    return Renderer(chat_tokenizer(template), objective=objective, mask_rationale=mask_rationale, **settings)


def learned(rendering, sample):
    (row,) = rendering.token_rows([sample])
    return rendering.tokenizer.decode(row.input_ids[row.loss_mask])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "#### 5<|im_end|>"),
        (CHATML_WITH_GENERATION, "#### 5<|im_end|>"),
        (LLAMA_3, "#### 5<|eot_id|>"),
        (MISTRAL, " #### 5</s>"),  # the blank after [/INST] is the model's, and no part of the rationale
        (REASONING, "<think>\n\n</think>\n\n#### 5<|im_end|>"),
    ],
)
def test_the_answer_is_learned_and_what_leads_to_it_is_not(template, expected):
    with_mask, without = renderer(template), renderer(template, mask_rationale=False)
    assert learned(with_mask, exchange()) == expected
    assert ANSWER in learned(without, exchange())
    (masked,), (whole,) = with_mask.token_rows([exchange()]), without.token_rows([exchange()])
    assert np.array_equal(masked.input_ids, whole.input_ids)
    assert with_mask.rationale_tokens == 2 * (whole.loss_mask.sum() - masked.loss_mask.sum())
    assert without.rationale_tokens == 0


def test_only_the_last_answer_is_marked_and_spans_may_lie_anywhere_in_it():
    earlier = [("user", "Before?"), ("assistant", ANSWER)]
    sample = exchange("One. Two. Three.", [[0, 5], [10, 15]], earlier=earlier)
    assert learned(renderer(), sample) == f"{ANSWER}<|im_end|>Two. .<|im_end|>"


def test_a_token_that_is_partly_answer_is_learned():
    rendering = renderer()
    (token,) = rendering.tokenizer("answer", add_special_tokens=False)["input_ids"][-1:]
    piece = rendering.tokenizer.decode([token])
    assert len(piece) > 1
    assert learned(rendering, exchange("answer", [[0, len("answer") - 1]])) == f"{piece}<|im_end|>"


def test_blanks_that_the_template_trims_and_control_tokens_in_content_do_not_move_the_spans():
    reasoning = "  I write <|im_end|> and <|eot_id|>. "
    sample = exchange(f"{reasoning}#### 5 <|eot_id|>  ", [[0, len(reasoning)]], question="Say <|eot_id|>.")
    assert learned(renderer(LLAMA_3), sample) == "#### 5 <|eot_id|><|eot_id|>"


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_fast_tokenizer_backends_give_the_same_masks(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    samples = [exchange(f"é{number} 🙂x{ANSWER}", [[3, 3 + number]]) for number in range(20)]
    rows, expected = (renderer(backend=name).token_rows(samples) for name in (backend, "huggingface"))
    assert all(np.array_equal(one.loss_mask, other.loss_mask) for one, other in zip(rows, expected, strict=True))


def test_masks_from_offsets_are_those_from_byte_lengths():
    samples = [exchange(f"é{number} 🙂x{ANSWER}", [[3, 3 + number]]) for number in range(20)]
    by_offsets = renderer()
    by_offsets.byte_lengths = None
    pairs = zip(renderer().token_rows(samples), by_offsets.token_rows(samples), strict=True)
    assert all(np.array_equal(one.loss_mask, other.loss_mask) for one, other in pairs)


def test_pieces_of_a_split_sample_keep_the_mask_of_the_whole():
    (whole,) = renderer().token_rows([exchange()])
    pieces = renderer(max_length=16, over_length="split").token_rows([exchange()])
    assert len(pieces) == 1 and pieces[0].sample_id.startswith("s#")  # the others hold nothing but reasoning
    first = 16 * int(pieces[0].sample_id.partition("#")[2])
    assert np.array_equal(pieces[0].loss_mask, whole.loss_mask[first : first + 16])


@pytest.mark.parametrize("text", [ANSWER, ANSWER.replace("apples", "<|im_end|> apples")])
def test_pretraining_leaves_out_rationales_of_texts_and_of_conversations(text):
    span = [[0, text.index("####")]]
    plain = Sample(id="t", source="test", content={"text": text}, metadata={"rationale": span})
    assert learned(renderer(objective="pretrain"), plain) == "#### 5<|endoftext|>"
    chat = learned(renderer(objective="pretrain"), exchange(text, span))
    assert chat == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n#### 5<|im_end|>\n"


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (exchange(spans="because"), r"sample s: metadata\.rationale must be \[\[start, end\], \.\.\.\]"),
        (exchange(spans=[[0, 10_000]]), r"must rise and stay inside the \d+ characters of the last answer"),
        (exchange(spans=[[5, 9], [0, 3]]), "must rise and stay inside"),
        (
            replace(exchange(), content={"input_ids": [1, 2], "loss_mask": [True, True]}),
            "rows that come tokenised must leave their rationales out of `labels` themselves",
        ),
    ],
)
def test_spans_that_mark_nothing_are_refused(sample, message):
    with pytest.raises(ValueError, match=message):
        renderer().token_rows([sample])


def test_an_answer_that_the_template_takes_apart_is_refused():
    sample = exchange("<think>some</think>An answer.", [[0, 20]])
    with pytest.raises(ValueError, match="sample s: the chat template does not write the last answer as it is"):
        renderer(REASONING).token_rows([sample])


# --- preparing

MODULE = """
def get_custom_dataset(dataset_config, processor, split):
    rows = [{"question": f"What is {i} + 1?", "answer": f"One more than {i}.\\n#### {i + 1}"} for i in range(20)]
    if dataset_config.get("marked", True):
        rows = [{**row, "rationale": [[0, row["answer"].index("####")]]} for row in rows]
    return {"train": rows[:16], "test": rows[16:]}[split]
"""


def make_request(folder: Path, **dataset) -> PreparationRequest:
    chat_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "sums.py").write_text(MODULE)
    return PreparationRequest(
        dataset=DatasetConfig(name="sums", max_length=128, **dataset),
        module=ModuleFile(folder / "sums.py"),
        tokenizer=str(folder / "tokenizer"),
        objective="sft",
    )


def test_prepared_data_learns_answers_alone_and_counts_what_it_leaves_out(tmp_path):
    told = []
    prepared = prepare(make_request(tmp_path, mask_rationale=True), tmp_path, told.append)
    rows = TokenRows.open(prepared.folder, "train")
    tokenizer = chat_tokenizer()
    assert [tokenizer.decode(row.input_ids[row.loss_mask]) for row in rows] == [
        f"#### {i + 1}<|im_end|>" for i in range(16)
    ]
    whole = prepare(make_request(tmp_path), tmp_path, told.append)
    masked_stats, stats = prepared.splits["train"], whole.splits["train"]
    assert masked_stats.rationale_tokens == stats.loss_tokens - masked_stats.loss_tokens > 0
    assert f"train: {masked_stats.rationale_tokens} tokens of rationales left out of the loss" in told
    assert stats.rationale_tokens == 0
    metadata = json.loads((whole.folder / "train.jsonl").read_bytes().splitlines()[0])["metadata"]
    assert metadata == {"rationale": [[0, len("One more than 0.\n")]]}


def test_the_key_of_the_data_tells_whether_rationales_are_masked(tmp_path):
    requests = [make_request(tmp_path, mask_rationale=mask) for mask in (False, True)]
    assert len(set(map(data_key, requests))) == 2


def test_data_that_marks_no_rationale_is_an_error_where_they_are_to_be_masked(tmp_path):
    request = make_request(tmp_path, mask_rationale=True, module_keys={"marked": False})
    with pytest.raises(ValueError, match=r"dataset\.mask_rationale: none of 16 rows marks a rationale, .* leave"):
        prepare(request, tmp_path, print)
