"""Loss lies exactly on what the assistant says, in any chat template; what cannot be traced is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
import trl
from chat_tokenizers import (
    CHATML,
    CHATML_WITH_GENERATION,
    LLAMA_3,
    MISTRAL,
    REASONING,
    chat_tokenizer,
)

from mixture.formats import Sample
from mixture.render import GENERATION_BLOCK, ChatTemplate, Renderer, generation_prompt

PLAIN = [("system", "Be kind."), ("user", "Hi?"), ("assistant", "Hello there."), ("user", "1 + 1"), ("assistant", "2")]
BLANKS = [("user", " Hi? \n"), ("assistant", "\n  Héllo 🙂 \n\n there. \n")]
REASONED = [
    ("user", "Hi?"),
    ("assistant", "<think>\nfirst\n</think>\n\nHello."),
    ("user", "And?"),
    ("assistant", "<think>\nsecond\n</think>\n\nBye."),
]


def sample(turns, **kept):
    return Sample(
        id="s", source="test", content={"messages": [{"role": role, "content": text, **kept} for role, text in turns]}
    )


def renderer(template=CHATML, *, objective="sft", max_length=4096, over_length=None, trim_offsets=False):
    tokenizer = chat_tokenizer(template, trim_offsets=trim_offsets)
    return Renderer(tokenizer, objective=objective, max_length=max_length, over_length=over_length)


def runs_with_loss(rendering, row):
    """Decoded runs of neighbouring tokens that carry loss."""
    runs, run = [], []
    for token, labelled in zip(row.input_ids.tolist(), row.loss_mask.tolist(), strict=True):
        if labelled:
            run.append(token)
        elif run:
            runs.append(rendering.tokenizer.decode(run))
            run = []
    return [*runs, rendering.tokenizer.decode(run)] if run else runs


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        (CHATML, PLAIN, ["Hello there.<|im_end|>", "2<|im_end|>"]),
        (CHATML, BLANKS, ["\n  Héllo 🙂 \n\n there. \n<|im_end|>"]),
        (CHATML, REASONED, [turns[1] + "<|im_end|>" for turns in REASONED[1::2]]),
        (CHATML_WITH_GENERATION, PLAIN, ["Hello there.<|im_end|>", "2<|im_end|>"]),
        (CHATML_WITH_GENERATION, BLANKS, ["\n  Héllo 🙂 \n\n there. \n<|im_end|>"]),
        (LLAMA_3, PLAIN, ["Hello there.<|eot_id|>", "2<|eot_id|>"]),
        (LLAMA_3, BLANKS, ["Héllo 🙂 \n\n there.<|eot_id|>"]),
        # Mistral's model writes the blank after [/INST] itself.
        (MISTRAL, PLAIN, [" Hello there.</s>", " 2</s>"]),
        (MISTRAL, BLANKS, [" Héllo 🙂 \n\n there.</s>"]),
        # The model also writes the reasoning block; the template cuts it off in earlier turns.
        (REASONING, REASONED, ["Hello.<|im_end|>", "<think>\nsecond\n</think>\n\nBye.<|im_end|>"]),
        (REASONING, PLAIN, ["Hello there.<|im_end|>", "<think>\n\n</think>\n\n2<|im_end|>"]),
    ],
)
def test_loss_lies_on_assistant_turns_and_their_end_in_any_template(template, turns, expected, trim_offsets):
    rendering = renderer(template, trim_offsets=trim_offsets)
    (row,) = rendering.token_rows([sample(turns)])
    assert runs_with_loss(rendering, row) == expected


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, MISTRAL, REASONING])
def test_tokens_are_those_of_the_template_itself(template):
    rendering = renderer(template)
    (row,) = rendering.token_rows([sample(PLAIN)])
    encoding = rendering.tokenizer.apply_chat_template(sample(PLAIN).content["messages"], return_dict=True)
    assert row.input_ids.tolist() == encoding["input_ids"]


def test_a_template_with_generation_blocks_and_one_without_give_the_same_mask():
    with_blocks, without = renderer(CHATML_WITH_GENERATION), renderer(CHATML)
    (first,), (second,) = with_blocks.token_rows([sample(PLAIN)]), without.token_rows([sample(PLAIN)])
    assert np.array_equal(first.input_ids, second.input_ids) and np.array_equal(first.loss_mask, second.loss_mask)


def test_content_that_repeats_the_users_words_or_the_headers_is_not_confused():
    turns = [("user", "Hello"), ("assistant", "Hello"), ("user", "<|im_end|>Hello"), ("assistant", "assistant\nHello")]
    rendering = renderer(CHATML)
    (row,) = rendering.token_rows([sample(turns)])
    assert runs_with_loss(rendering, row) == ["Hello<|im_end|>", "assistant\nHello<|im_end|>"]


def test_private_use_characters_in_a_conversation_do_no_harm():
    turns = [("user", "\ue000"), ("assistant", "\ue001 x \ue000")]
    rendering = renderer(CHATML)
    (row,) = rendering.token_rows([sample(turns)])
    assert runs_with_loss(rendering, row) == ["\ue001 x \ue000<|im_end|>"]


def test_reasoning_in_its_own_key_carries_loss():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['reasoning_content'] %}"
        "{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Hello.", "reasoning_content": "greet"},
    ]
    rendering = renderer(template)
    (row,) = rendering.token_rows([Sample(id="s", source="test", content={"messages": messages})])
    assert runs_with_loss(rendering, row) == ["<think>greet</think>Hello.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m['content'] | length }}{{ ': ' + m['content'] + '\n' }}{% endfor %}",
            "cannot be traced",
        ),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'][:9] + '\n' }}{% endfor %}", "leaves out"),
        ("{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}", "exactly once"),
        ("{{ messages[0]['content'] }}", "exactly once"),
    ],
)
def test_a_template_that_cannot_be_traced_is_refused_and_never_gives_a_wrong_mask(template, message):
    with pytest.raises(ValueError, match=message):
        renderer(template).token_rows([sample([("user", "Hi?"), ("assistant", "Hello there, how are you?")])])


def test_a_template_without_an_end_of_turn_is_noticed():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    assert ChatTemplate(chat_tokenizer(template)).end_of_turn == ""
    assert ChatTemplate(chat_tokenizer(CHATML)).end_of_turn == "<|im_end|>"


def test_conversations_need_a_chat_template():
    with pytest.raises(
        ValueError, match=r"no chat template: name the instruct variant's tokenizer in model\.tokenizer"
    ):
        renderer(None).token_rows([sample(PLAIN)])


def test_conversations_that_the_template_refuses_are_dropped_and_counted():
    rendering = renderer(MISTRAL)
    rows = rendering.token_rows([sample([("assistant", "I begin."), ("user", "No.")]), sample(PLAIN)])
    assert len(rows) == 1
    assert rendering.dropped == {"refused by the chat template: roles must alternate user/assistant": 1}


def test_rows_without_anything_to_learn_are_dropped_and_counted():
    rendering = renderer(CHATML)
    assert rendering.token_rows([sample([("user", "Hi?")]), sample([("user", "Hi?"), ("assistant", "")])]) == []
    assert rendering.dropped == {"no token to learn from": 2}


# --- pretraining and tokenised rows


def test_pretraining_text_ends_with_the_end_of_text_token_and_carries_loss_everywhere():
    rendering = renderer(None, objective="pretrain")
    (row,) = rendering.token_rows([Sample(id="t", source="test", content={"text": "The capital."})])
    assert rendering.tokenizer.decode(row.input_ids) == "The capital.<|endoftext|>"
    assert row.loss_mask.all() and (row.sample_id, row.source) == ("t", "test")


def test_pretraining_on_conversations_carries_loss_on_every_token():
    rendering = renderer(CHATML, objective="pretrain")
    (row,) = rendering.token_rows([sample(PLAIN)])
    assert row.loss_mask.all()


def test_plain_text_is_no_material_for_sft():
    with pytest.raises(ValueError, match=r"sample t is plain text, but the objective sft .* set finetuning\.objective"):
        renderer().token_rows([Sample(id="t", source="test", content={"text": "x"})])


def test_preference_pairs_are_no_material_for_sft():
    pair = Sample(id="p", source="test", content={"prompt": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(ValueError, match="sample p holds prompt, chosen, rejected, which the objective sft does not"):
        renderer().token_rows([pair])


def test_tokenised_rows_pass_as_they_are_and_kinds_may_be_mixed():
    given = Sample(id="g", source="test", content={"input_ids": [5, 6, 7], "loss_mask": [False, False, True]})
    rows = renderer().token_rows([sample(PLAIN), given, sample(PLAIN)])
    assert rows[1].input_ids.tolist() == [5, 6, 7] and rows[1].loss_mask.tolist() == [False, False, True]
    assert np.array_equal(rows[0].input_ids, rows[2].input_ids)


# --- over-long rows


def token_sample(length, loss_from=0):
    mask = [position >= loss_from for position in range(length)]
    return Sample(id="long", source="test", content={"input_ids": list(range(length)), "loss_mask": mask})


@pytest.mark.parametrize(
    ("objective", "over_length", "expected"),
    [
        ("sft", None, []),
        ("pretrain", None, [("long#0", 8), ("long#1", 8), ("long#2", 3)]),
        ("sft", "split", [("long#0", 8), ("long#1", 8), ("long#2", 3)]),
        ("pretrain", "drop", []),
        ("sft", "truncate", [("long", 8)]),
        ("mixed", None, []),
    ],
)
def test_over_long_rows_follow_the_policy_and_are_counted(objective, over_length, expected):
    rendering = renderer(objective=objective, max_length=8, over_length=over_length)
    rows = rendering.token_rows([token_sample(19), token_sample(8)])
    assert [(row.sample_id, len(row.input_ids)) for row in rows] == [*expected, ("long", 8)]
    assert rendering.longer_than_max_length == 1
    assert rendering.dropped == ({"longer than max_length": 1} if not expected else {})


def test_the_mixed_objective_learns_answers_of_conversations_and_all_of_texts():
    text = Sample(id="text", source="t", content={"text": "one two three four five six seven eight nine ten"})
    rendering = renderer(objective="mixed", max_length=64)
    chat_row, text_row = rendering.token_rows([sample(PLAIN), text])
    (alone,) = renderer(objective="sft", max_length=64).token_rows([sample(PLAIN)])
    assert (chat_row.input_ids == alone.input_ids).all() and (chat_row.loss_mask == alone.loss_mask).all()
    assert not chat_row.loss_mask.all() and text_row.loss_mask.all()
    pieces = renderer(objective="mixed", max_length=8).token_rows([text])
    assert [row.sample_id for row in pieces][:2] == ["text#0", "text#1"]


def test_pieces_of_a_split_row_without_loss_are_dropped_and_counted():
    rendering = renderer(max_length=8, over_length="split")
    rows = rendering.token_rows([token_sample(17, loss_from=10)])
    assert [row.sample_id for row in rows] == ["long#1"]  # the last piece is one token, which is never predicted
    assert rendering.dropped == {"no token to learn from": 2}


def test_generation_starts_from_everything_before_the_last_answer():
    messages = sample(PLAIN).content["messages"]
    assert generation_prompt(sample(PLAIN)) == {"prompt_messages": messages[:4]}
    assert generation_prompt(Sample(id="p", source="t", content={"prompt": "q"})) == {"prompt": "q"}
    assert generation_prompt(Sample(id="t", source="t", content={"text": "x"})) is None


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, MISTRAL, REASONING])
def test_the_ids_of_a_prompt_are_the_templates_own_and_control_tokens_in_a_question_are_text(template):
    rendering, question = renderer(template), sample(PLAIN).content["messages"][:4]
    expected = rendering.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)
    assert rendering.prompt_ids(question).tolist() == expected["input_ids"]
    special = set(rendering.tokenizer.added_tokens_decoder)
    literal = [{**turn, "content": turn["content"] + "</s>"} for turn in question]
    found = [sum(token in special for token in rendering.prompt_ids(turns).tolist()) for turns in (question, literal)]
    assert found[0] == found[1] > 0


# --- the templates of published models


def published_templates():
    """Chat templates that trl ships for tests, those with generation blocks left out."""
    folder = Path(trl.__file__).parent / "chat_templates"
    templates = {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}
    return {name: text for name, text in templates.items() if not GENERATION_BLOCK.search(text)}


PUBLISHED = published_templates()
TEMPLATES_FOR_IMAGES = {"idefics3", "llava_next", "smolvlm"}  # these want content as a list of parts
OWN_OPENING = r"((\s|</?think>)*|<\|channel\|>final<\|message\|>| to=user<\|message\|>)"


def published_tokenizer(template):
    tokenizer = chat_tokenizer(template)
    written_as_special = set(re.findall(r"<\|[^|<>'\"]+\|>|<\uff5c[^\uff5c]+\uff5c>|<[a-z_]*turn\|?>", template))
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": sorted(written_as_special)})
    return tokenizer


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_are_masked_right_or_refused(name):
    turns = [("user", "Hi?"), ("assistant", "Hello."), ("user", "1 + 1"), ("assistant", "2")]
    try:
        chat = ChatTemplate(published_tokenizer(PUBLISHED[name])).rendered(sample(turns).content["messages"])
    except ValueError as error:
        assert name in TEMPLATES_FOR_IMAGES, f"{name} is refused: {error}"
        return
    first, second = (chat.text[start:end] for start, end in chat.spans)
    # Before the content at most the reasoning block or channel that the model writes itself, after it only one token.
    assert re.fullmatch(OWN_OPENING + r"Hello\.(<[^<>]+>)?", first)
    assert re.fullmatch(OWN_OPENING + r"2(<[^<>]+>)?", second)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", ["Hello.<|im_end|>", "<think>\nsecond\n</think>\n\nBye.<|im_end|>"]),
        # Their generation prompt opens the reasoning block already.
        ("qwen3_6", ["Hello.<|im_end|>", "second\n</think>\n\nBye.<|im_end|>"]),
        ("qwen3_5_nothink", ["Hello.<|im_end|>", "<think>\nsecond\n</think>\n\nBye.<|im_end|>"]),
        ("deepseekv3", ["\n\nHello.<\uff5cend▁of▁sentence\uff5c>", "\n\nBye.<\uff5cend▁of▁sentence\uff5c>"]),
    ],
)
def test_published_templates_that_move_reasoning_are_traced(name, expected):
    chat = ChatTemplate(published_tokenizer(PUBLISHED[name])).rendered(sample(REASONED).content["messages"])
    assert [chat.text[start:end] for start, end in chat.spans] == expected


def test_earlier_turns_may_end_in_another_token_than_the_last():
    chat = ChatTemplate(published_tokenizer(PUBLISHED["gptoss"])).rendered(sample(PLAIN).content["messages"])
    assert [chat.text[start:end].split("|")[-2] for start, end in chat.spans] == ["end", "return"]
