"""Control tokens in content are plain text, masks hold without offsets, and fast backends give the same ids or none."""

import importlib.util
import json
import re

import numpy as np
import pytest
from chat_tokenizers import CHATML, CHATML_WITH_GENERATION, CORPUS, LLAMA_3, MISTRAL, REASONING, chat_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import mixture.tokenizers
from mixture.formats import Sample
from mixture.render import Renderer
from mixture.tokenizers import FAST_BACKENDS, MAKERS, ByteLengths, FlatIds, choose_backend, longest_of, offsets_backend

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "[INST]", "[/INST]"]


def sentencepiece_like_tokenizer(template, *, as_normalizer):
    """BPE over words with ▁ for blanks and bytes for unknown characters, as converted SentencePiece models are."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if as_normalizer:  # Llama 2
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:  # Mistral
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*SPECIAL_TOKENS, *byte_tokens], show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator([*CORPUS * 4, "[INST] <|im_start|>"], trainer)
    settings = json.loads(tokenizer.to_str())
    # The trainer knows byte tokens as special ones only; in converted models they are ordinary.
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] not in byte_tokens]
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    wrapped.chat_template = template
    return wrapped


TOKENIZERS = {
    "byte-level": chat_tokenizer,
    "sentencepiece, ▁ by normalizer": lambda template: sentencepiece_like_tokenizer(template, as_normalizer=True),
    "sentencepiece, ▁ by pre-tokenizer": lambda template: sentencepiece_like_tokenizer(template, as_normalizer=False),
}


def sample(*turns):
    roles = ("user", "assistant") if len(turns) % 2 == 0 else ("system", "user", "assistant")
    names = [
        roles[index] if index < len(roles) else roles[-2 + (index - len(roles)) % 2] for index in range(len(turns))
    ]
    messages = [{"role": role, "content": text} for role, text in zip(names, turns, strict=True)]
    return Sample(id="s", source="test", content={"messages": messages})


def renderer(tokenizer, objective="sft", backend="huggingface"):
    return Renderer(tokenizer, objective=objective, max_length=4096, over_length=None, backend=backend)


def special_ids(tokenizer):
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def assert_same_rows(first, second):
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.loss_mask, other.loss_mask)


# --- control tokens in content


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_GENERATION, REASONING, MISTRAL])
def test_control_tokens_in_content_become_plain_text_and_those_of_the_template_stay(kind, template):
    tokenizer = TOKENIZERS[kind](template)
    harmless, literal = (
        sample("Say XX now XX", "I say XX, XX", "XXa\n XX b", "end"),
        sample("Say <|im_end|> now <s>", "I say <|endoftext|>, </s>", "<|im_start|>a\n [INST] b", "end"),
    )
    rendering = renderer(tokenizer)
    (expected,), (row,) = rendering.token_rows([harmless]), rendering.token_rows([literal])
    special = special_ids(tokenizer)
    count = [sum(token in special for token in ids.input_ids.tolist()) for ids in (expected, row)]
    assert count[0] == count[1] > 0
    order = [[token for token in ids.input_ids.tolist() if token in special] for ids in (expected, row)]
    assert order[0] == order[1]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_GENERATION])
def test_masks_stay_exact_around_control_tokens_in_content(kind, template):
    tokenizer = TOKENIZERS[kind](template)
    answers = ["<|im_end|>", "é <|im_start|>assistant\n</s>🙂 <|im_end|>"]
    (row,) = renderer(tokenizer).token_rows([sample("<|im_end|>\n", answers[0], "Hi <|im_start|>", answers[1])])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids, mask = row.input_ids.tolist(), row.loss_mask.tolist()
    runs, run = [], []
    for token, labelled in zip(ids, mask, strict=True):
        if labelled:
            run.append(token)
        elif run:
            runs.append(run)
            run = []
    assert not run and [len([t for t in r if t == end]) for r in runs] == [1, 1] and all(r[-1] == end for r in runs)
    assert [tokenizer.decode(r[:-1]).strip() for r in runs] == answers


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", [CHATML, MISTRAL, REASONING])
def test_ids_are_those_of_a_tokenizer_whose_control_tokens_have_other_names(kind, template):
    tokenizer = TOKENIZERS[kind](template)
    settings, other_template = tokenizer.backend_tokenizer.to_str(), template
    for number, token in enumerate(SPECIAL_TOKENS):
        settings = settings.replace(json.dumps(token), json.dumps(f"\u2042{number}"))
        other_template = other_template.replace(token, f"\u2042{number}")
    renamed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(settings))
    renamed.chat_template = other_template
    chat = sample("Say <|im_end|> now<s>", "I say <|endoftext|>, <s>.\n", "[INST]a [/INST]  </s>", "<|im_start|>")
    (row,) = renderer(tokenizer).token_rows([chat])
    expected = renamed.apply_chat_template(chat.content["messages"], tokenize=True, return_dict=True)["input_ids"]
    assert row.input_ids.tolist() == expected


def test_control_tokens_in_tool_calls_and_system_turns_become_plain_text():
    template = CHATML.replace("message['content'] +", "message['content'] + message.get('tool_calls', '') | string +")
    tokenizer = chat_tokenizer(template)
    messages = [
        {"role": "system", "content": "<|im_end|>"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "a", "tool_calls": [{"arguments": {"text": "<|im_end|>"}}]},
    ]
    (row,) = renderer(tokenizer).token_rows([Sample(id="s", source="t", content={"messages": messages})])
    assert row.input_ids.tolist().count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3


def test_reasoning_marks_in_an_answer_stay_tokens_and_in_a_question_become_text():
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    (row,) = renderer(tokenizer).token_rows([sample("What is <think>? <s>", "<think>a word</think>It opens.")])
    assert row.input_ids.tolist().count(tokenizer.convert_tokens_to_ids("<think>")) == 1


def test_the_longest_of_thousands_of_control_tokens_is_found():
    words = {*SPECIAL_TOKENS, "<|im_start|>x", *(f"<unused{number}>" for number in range(6000))}
    pattern = re.compile(longest_of(words))
    assert all(pattern.fullmatch(word) for word in words)
    found = pattern.findall("<unused17> <|im_start|>x<|im_start|>y <unused6000> </s><s")
    assert found == ["<unused17>", "<|im_start|>x", "<|im_start|>", "</s>"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_control_tokens_in_plain_text_become_ordinary_tokens(kind):
    tokenizer = TOKENIZERS[kind](None)
    text = Sample(id="t", source="test", content={"text": "one <|endoftext|> two</s> three"})
    (row,) = renderer(tokenizer, "pretrain").token_rows([text])
    assert special_ids(tokenizer) & set(row.input_ids[:-1].tolist()) <= {tokenizer.unk_token_id}
    assert row.input_ids[-1] == tokenizer.eos_token_id


def test_a_conversation_with_control_tokens_and_the_marks_that_tell_them_is_refused_by_name():
    with pytest.raises(ValueError, match="sample s: a conversation holds control tokens, and the characters"):
        renderer(chat_tokenizer()).token_rows([sample("<|im_end|> \U000f2001", "a")])


# --- masks without offsets


TEXTS = ["Hi", "é🙂 ünï", "a\u0301 e\u0301", "\n\n  two  \t", "한국어 日本語", "x" * 50, "\u200d👩‍🚀", " "]


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, MISTRAL, REASONING])
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_masks_from_byte_lengths_are_those_from_offsets(template, normalizer):
    tokenizer = chat_tokenizer(template)
    tokenizer.backend_tokenizer.normalizer = normalizer
    samples = [sample(f"{one} q", f"{two} a", two, f"b{one}") for one in TEXTS for two in TEXTS]
    by_bytes, by_offsets = renderer(tokenizer), renderer(tokenizer)
    by_offsets.byte_lengths = None
    assert by_bytes.byte_lengths is not None
    assert_same_rows(by_bytes.token_rows(samples), by_offsets.token_rows(samples))


def test_tokenizers_whose_tokens_are_not_bytes_of_the_text_keep_to_offsets():
    for kind in list(TOKENIZERS)[1:]:
        assert ByteLengths.of_backend(offsets_backend(TOKENIZERS[kind](CHATML))) is None
    lowering = chat_tokenizer()
    lowering.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert ByteLengths.of_backend(offsets_backend(lowering)) is None


def test_rows_do_not_depend_on_the_batch_they_are_rendered_in():
    tokenizer = chat_tokenizer(MISTRAL)
    samples = [sample(f"q{index}", f"a{index}") for index in range(9)]
    samples[4] = Sample(id="bad", source="t", content={"messages": [{"role": "assistant", "content": "I begin."}]})
    together, alone = renderer(tokenizer), renderer(tokenizer)
    assert_same_rows(together.token_rows(samples), [row for one in samples for row in alone.token_rows([one])])
    assert together.dropped == alone.dropped and together.dropped.total() == 1


# --- backends

SAMPLES = [
    sample(f"What is {one} {index}?", f"{two}{index} <x>") for index in range(5) for one in TEXTS for two in TEXTS
]


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_fast_backend_gives_the_same_rows(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    tokenizer = chat_tokenizer()
    rendering = renderer(tokenizer)
    choice = rendering.choose_backend(backend, SAMPLES)
    assert choice.lines[0].startswith(f"tokenizer_backend {backend}")
    if choice.name == "huggingface":
        pytest.skip(f"{backend} says why it is not used: {choice.lines[0]}")
    others = [*SAMPLES, sample("<|im_end|>", "<s>")]
    assert_same_rows(renderer(tokenizer, backend=backend).token_rows(others), rendering.token_rows(others))
    texts = [Sample(id="t", source="t", content={"text": text}) for text in [*TEXTS, "a <s> b"]]
    assert_same_rows(
        renderer(tokenizer, "pretrain", backend).token_rows(texts), renderer(tokenizer, "pretrain").token_rows(texts)
    )


def test_a_tokenizer_whose_masks_need_offsets_keeps_to_hugging_face_and_that_is_told():
    rendering = renderer(TOKENIZERS["sentencepiece, ▁ by normalizer"](CHATML))
    choice = rendering.choose_backend("auto", SAMPLES)
    assert choice.name == "huggingface" and "loss masks need the places of tokens" in choice.lines[0]


def test_a_backend_with_other_ids_is_not_used_and_that_is_told(monkeypatch):
    def shifted(backend):
        def encode(texts):
            given = MAKERS["huggingface"](backend)(texts)
            return FlatIds(given.ids + (len(texts) > 2), given.starts)

        return encode

    monkeypatch.setitem(mixture.tokenizers.MAKERS, "fastokens", shifted)
    monkeypatch.setattr(mixture.tokenizers, "is_installed", lambda name: name == "fastokens")
    backend = offsets_backend(chat_tokenizer())
    choice = choose_backend("auto", backend, ["a", "b", "c"])
    assert choice.name == "huggingface"
    assert choice.lines == (
        "tokenizer_backend fastokens is not used: row 0 of the sample has other ids than Hugging Face gives",
        "tokenizer_backend huggingface",
    )
    assert choose_backend("auto", backend, ["a"]).name == "fastokens"


def test_a_backend_that_cannot_read_the_tokenizer_is_not_used_and_that_is_told(monkeypatch):
    def failing(backend):
        raise RuntimeError("unknown pre-tokenizer")

    monkeypatch.setitem(mixture.tokenizers.MAKERS, "gigatoken", failing)
    monkeypatch.setattr(mixture.tokenizers, "is_installed", lambda name: name == "gigatoken")
    choice = choose_backend("gigatoken", offsets_backend(chat_tokenizer()), ["a"])
    assert choice.lines[0] == "tokenizer_backend gigatoken is not used: RuntimeError: unknown pre-tokenizer"


def test_a_backend_asked_for_by_name_and_not_installed_is_an_error(monkeypatch):
    monkeypatch.setattr(mixture.tokenizers, "is_installed", lambda name: False)
    with pytest.raises(ValueError, match=r"dataset\.tokenizer_backend: fastokens is not installed; install the extra"):
        choose_backend("fastokens", offsets_backend(chat_tokenizer()), ["a"])
