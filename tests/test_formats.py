"""Every known row format becomes the same canonical sample, and nothing is guessed."""

import pytest

from mixture.formats import canonical_sample, detect_format

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
        ("programming task", {"text": "2 + 2?", "code": "4", "task_id": 1}),
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


@pytest.mark.parametrize(
    ("spelling", "role"),
    [
        ("human", "user"),
        ("USER", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("bing", "assistant"),
        ("model", "assistant"),
        ("system", "system"),
        ("observation", "tool"),
    ],
)
def test_all_spellings_of_roles_are_read(spelling, role):
    assert content({"conversations": [{"from": spelling, "value": "x"}]})["messages"][0]["role"] == role


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
        ({"question": "q", "answer": ["a", "b"]}, "column answer holds list, expected text"),
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
