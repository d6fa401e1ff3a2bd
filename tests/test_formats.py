"""Every known row format becomes the same canonical sample, and nothing is guessed."""

import json
import os
from pathlib import Path

import pytest

from mixture.formats import FORMAT_NAMES, ROLES, canonical_row, canonical_sample, detect_format

REAL_DATA = os.environ.get("BATON_REAL_DATA")
EXCHANGE = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def content(row):
    return canonical_sample(row, source="mine", row_id="mine-0").content


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": EXCHANGE}),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        ),
        ("alpaca", {"instruction": "2 + 2?", "input": "", "output": "4"}),
        ("query/answer", {"query": "2 + 2?", "answer": "4", "lang": "en"}),
        ("question/answer", {"question": "2 + 2?", "answer": "4"}),
        ("prompt/completion", {"prompt": "2 + 2?", "completion": "4"}),
        ("prompt/completion", {"prompt": EXCHANGE[:1], "completion": EXCHANGE[1:]}),
        ("prompt/completion", {"prompt": EXCHANGE[0], "completion": EXCHANGE[1]}),
        ("programming task", {"text": "2 + 2?", "code": "4", "task_id": 1}),
        ("programming task", {"prompt": "2 + 2?", "code": "4", "source_file": "a"}),
        ("alpaca", {"instruction": "2 + 2?", "response": "4"}),
        ("alpaca", {"instruction": "2 + 2?", "input": "", "output": "4", "prompt": "### 2 + 2?", "text": "2 + 2? 4"}),
        ("question/response", {"question": "2 + 2?", "response": "4", "system_prompt": ""}),
        ("problem/solution", {"problem": "2 + 2?", "solution": "4", "level": "Level 1", "type": "Algebra"}),
        ("question/answer", {"question": "2 + 2?", "answer": ["4", "four"]}),
        ("messages", {"prompt": "2 + 2?", "prompt_id": "a", "messages": EXCHANGE}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}, EXCHANGE[1]]}),
    ],
)
def test_the_same_exchange_in_any_format_gives_the_same_messages(name, row):
    assert detect_format(row).name == name
    assert content(row) == {"messages": EXCHANGE}


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("text", {"text": "Once"}, {"text": "Once"}),
        ("prompt", {"prompt": "2 + 2?"}, {"prompt": "2 + 2?"}),
        (
            "preference",
            {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
            {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        ),
        (
            "sharegpt preference",
            {
                "conversations": [{"from": "human", "value": "2 + 2?"}],
                "chosen": {"from": "gpt", "value": "4"},
                "rejected": {"from": "gpt", "value": "5"},
            },
            {
                "prompt": EXCHANGE[:1],
                "chosen": EXCHANGE[1:],
                "rejected": [{"role": "assistant", "content": "5"}],
            },
        ),
        (
            "tokenised",
            {"input_ids": [1, 2, 3, 0], "labels": [-100, 2, 3, -100], "attention_mask": [1, 1, 1, 0]},
            {"input_ids": [1, 2, 3], "loss_mask": [False, True, True]},
        ),
        ("tokenised", {"input_ids": [1, 2]}, {"input_ids": [1, 2], "loss_mask": [True, True]}),
    ],
)
def test_formats_that_are_not_conversations_keep_their_own_content(name, row, expected):
    assert detect_format(row).name == name
    assert content(row) == expected


@pytest.mark.parametrize("spelling", [*ROLES, "USER", " Human ", "GPT"])
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_all_spellings_of_roles_are_read(spelling, keys):
    turn = dict(zip(keys, (spelling, "x"), strict=True))
    assert content({"messages": [turn]})["messages"] == [{"role": ROLES[spelling.strip().lower()], "content": "x"}]


def sharegpt(*speakers, **columns):
    turns = [{"from": speaker, "value": f"{place}"} for place, speaker in enumerate(speakers)]
    return canonical_row({"conversations": turns, **columns}, "mine", "mine-0")


def told(row):
    return [int(turn["content"]) for turn in row["messages"]]


@pytest.mark.parametrize(
    ("speakers", "kept"),
    [
        (["human", "gpt", "human", "gpt"], [0, 1, 2, 3]),
        (["gpt", "human", "gpt"], [1, 2]),
        (["system", "gpt", "human", "gpt", "human"], [0, 2, 3]),
        (["human", "gpt", "gpt", "human", "gpt"], [0, 1]),
        (["human", "gpt", "human", "human", "gpt"], [0, 1]),
        (["human", "gpt", "system", "human", "gpt"], [0, 1]),
        (["human", "function_call", "observation", "gpt"], [0, 1, 2, 3]),
        (["human", "gpt", "human", "function_call", "observation"], [0, 1, 2, 3]),
    ],
)
def test_sharegpt_keeps_whole_exchanges_up_to_the_first_turn_out_of_turn(speakers, kept):
    row = sharegpt(*speakers)
    assert told(row) == kept
    assert row["metadata"] == ({} if len(kept) == len(speakers) else {"turns_cut": len(speakers) - len(kept)})


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_is_the_first_turn_and_no_turn_that_was_cut(column):
    row = sharegpt("human", "gpt", **{column: "Be brief."})
    assert row["messages"][0] == {"role": "system", "content": "Be brief."} and row["metadata"] == {}


@pytest.mark.parametrize("speakers", [["gpt"], ["human"], ["system", "gpt", "human"], ["human", "human", "gpt"]])
def test_sharegpt_without_one_whole_exchange_is_an_error_that_names_the_turns(speakers):
    with pytest.raises(ValueError, match="no question with an answer: the turns are "):
        sharegpt(*speakers)


CHAT_PAGE = """<div class="markdown prose w-full"><p>Use <code>a &lt; b</code> &amp; <strong>go</strong>:</p>
<pre><div class="rounded-md"><div class="flex"><span>python</span><button>Copy code</button></div>
<div><code class="hljs language-python"><span>def</span> f(x):
    return x * 2
</code></div></div></pre><ol><li><p>One</p></li><li>Two<ul><li>inner <em>part</em></li></ul></li></ol>
<h2>More</h2><p>See <a href="https://example.org/?a=1&amp;b=2">this</a>.<br>Bye</p>
<table><thead><tr><th>A</th><th>B</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table></div>"""
CHAT_MARKDOWN = """Use `a < b` & **go**:

```python
def f(x):
    return x * 2
```

1. One

2. Two
   - inner *part*

## More

See [this](https://example.org/?a=1&b=2).
Bye

| A | B |
| --- | --- |
| 1 | 2 |"""


def test_answers_saved_as_the_html_of_a_chat_page_become_markdown_and_other_html_stays():
    page = [{"from": "human", "value": "<p>Why?</p>"}, {"from": "gpt", "value": CHAT_PAGE}]
    turns = content({"conversations": page})["messages"]
    assert [turn["content"] for turn in turns] == ["<p>Why?</p>", CHAT_MARKDOWN]
    code = '<div class="box"><p>Hi</p></div>'
    assert (
        content({"messages": [EXCHANGE[0], {"role": "assistant", "content": code}]})["messages"][1]["content"] == code
    )


def test_preferences_give_the_same_sample_in_all_their_forms():
    bad = {"role": "assistant", "content": "5"}
    expected = {"prompt": EXCHANGE[:1], "chosen": EXCHANGE[1:], "rejected": [bad]}
    assert content({"chosen": EXCHANGE, "rejected": [EXCHANGE[0], bad]}) == expected
    assert content({"prompt": "2 + 2?", "chosen": EXCHANGE, "rejected": [EXCHANGE[0], bad]}) == expected
    assert content({"prompt": EXCHANGE[:1], "chosen": EXCHANGE[1:], "rejected": [bad]}) == expected
    assert content({"prompt": "2 + 2?", "chosen": EXCHANGE[1:], "rejected": [bad]}) == {**expected, "prompt": "2 + 2?"}


def test_of_several_right_answers_the_first_is_learned_and_all_are_kept():
    row = canonical_row({"question": "2 + 2?", "answer": ["4", "four"]}, "mine", "mine-0")
    assert row["messages"] == EXCHANGE and row["metadata"] == {"answers": ["4", "four"]}


def test_a_format_that_is_asked_for_is_the_only_one_tried():
    row = {"instruction": "2 + 2?", "output": "4", "text": "2 + 2 = 4"}
    assert canonical_row(row, "mine", "mine-0", "maths", "text") == {
        "id": "mine-0",
        "source": "mine",
        "category": "maths",
        "metadata": {"instruction": "2 + 2?", "output": "4"},
        "text": "2 + 2 = 4",
    }
    with pytest.raises(ValueError, match="fits not the format messages that is asked for"):
        canonical_row(row, "mine", "mine-0", None, "messages")
    with pytest.raises(ValueError, match="unknown format 'chatml'; known: auto, tokenised"):
        canonical_row(row, "mine", "mine-0", None, "chatml")


def test_alpaca_keeps_system_history_and_input_as_turns():
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief.", "history": [["1 + 1?", "2"]]}
    assert content(row)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Add.\n\n2, 2"},
        {"role": "assistant", "content": "4"},
    ]


def test_a_programming_task_shows_its_tests():
    row = {"text": "Add two.", "code": "def f(x): return x + 2", "test_list": ["assert f(1) == 3"]}
    asked = content(row)["messages"][0]["content"]
    assert asked == "Add two.\n\nYour code should pass these tests:\n\nassert f(1) == 3"


def test_text_parts_are_joined_and_further_keys_of_a_turn_are_kept():
    turn = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    row = {"messages": [{**turn, "reasoning_content": "why", "name": None}]}
    assert content(row)["messages"] == [{"role": "assistant", "content": "ab", "reasoning_content": "why"}]


def test_columns_that_are_null_do_not_count():
    assert detect_format({"messages": None, "text": "Once", "prompt": None}).name == "text"


def test_id_category_and_other_plain_columns_are_kept():
    sample = canonical_sample(
        {"question": "q", "answer": "a", "id": 7, "category": "maths", "level": 3, "vector": [1.0]},
        source="mine",
        row_id="mine-0",
    )
    assert sample.as_json() == {
        "id": "7",
        "source": "mine",
        "category": "maths",
        "metadata": {"level": 3},
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    }


@pytest.mark.parametrize(
    "row", [{"messages": EXCHANGE}, {"text": "Once"}, {"input_ids": [1, 2], "labels": [-100, 2]}, {"prompt": "q"}]
)
def test_a_written_sample_reads_back_as_itself(row):
    sample = canonical_sample({**row, "note": "kept"}, source="mine", row_id="mine-0")
    assert canonical_sample(sample.as_json(), source="other", row_id="other-0") == sample


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"frage": "2 + 2?", "antwort": "4"}, "columns frage, antwort fits no known format"),
        ({"messages": "hello"}, "column messages must hold a list of turns, got str"),
        ({"messages": []}, "column messages holds no turns"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, r"messages\[0\] has role 'narrator'; known: system"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\] has content of type int, expected text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a content part that is not text"),
        ({"question": "q", "answer": []}, "column answer holds list, expected text or a list of texts"),
        ({"query": "q", "answer": 4}, "column query holds str and column answer holds int, expected text"),
        ({"chosen": "a", "rejected": "b"}, "must be lists of turns, to tell prompt from answer"),
        ({"chosen": EXCHANGE, "rejected": EXCHANGE}, "share their first 2 turns, of 2 and 2"),
        ({"input_ids": [1, 2], "labels": [2, 3]}, "label 2 at a token 1"),
        ({"input_ids": [1, 2], "labels": [1]}, "must agree"),
    ],
)
def test_what_cannot_be_read_says_why_and_shows_the_row(row, message):
    with pytest.raises(ValueError, match=message) as raised:
        content(row)
    assert next(iter(row)) + ": " in str(raised.value)


def test_long_rows_are_shortened_in_messages():
    with pytest.raises(ValueError, match="fits no known format") as raised:
        content({"unknown": "x" * 10_000})
    assert len(str(raised.value)) < 1500


def test_what_is_no_row_at_all_is_told():
    for row in (["text"], "text", 5, None):
        with pytest.raises(ValueError, match="a row must be a dict of columns, got"):
            canonical_row(row, "mine", "mine-0")


@pytest.mark.skipif(not REAL_DATA, reason="BATON_REAL_DATA does not name a folder with the original files")
@pytest.mark.parametrize(
    ("file", "name", "key"),
    [
        ("alpaca_en_demo.json", "alpaca", "messages"),
        ("codealpaca_2k.json", "alpaca", "messages"),
        ("dpo_en_demo.json", "sharegpt preference", "rejected"),
        ("gsm8k_train.jsonl", "question/answer", "messages"),
        ("hotpot_dev_simplified.json", "question/answer", "messages"),
        ("mbpp.jsonl", "programming task", "messages"),
        ("nq_open_dev.jsonl", "question/answer", "messages"),
        ("sharegpt_dummy.json", "sharegpt", "messages"),
    ],
)
def test_every_row_of_the_original_files_is_read_in_its_format(file, name, key):
    text = (Path(str(REAL_DATA)) / file).read_text()
    rows = json.loads(text) if file.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    assert {detect_format(row).name for row in rows} == {name} and name in FORMAT_NAMES
    assert all(canonical_row(row, "real", str(place))[key] for place, row in enumerate(rows))
