"""Which column plays which role."""

import pytest
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.data_files import Table
from llmrl_envs.jobs.examples import Message, read_examples, template_columns


def table(*rows):
    return Table(rows, "a.jsonl", range(1, len(rows) + 1))


def one(objective, row, **fields):
    return read_examples(table(row), objective, fields)[0]


@pytest.mark.parametrize(
    ("row", "fields", "text"),
    [
        ({"text": "a", "id": 3}, {}, "a"),
        ({"content": "a", "id": 3}, {}, "a"),
        ({"body": "a"}, {}, "a"),
        ({"text": "a", "body": "b"}, {"text": "body"}, "b"),
        ({"title": "a", "body": "b"}, {"text": "{title}: {body}"}, "a: b"),
    ],
)
def test_text_is_found(row, fields, text):
    assert one("language_modeling", row, **fields).text == text


@pytest.mark.parametrize(
    ("row", "fields", "prompt", "completion"),
    [
        ({"prompt": "p", "completion": "c"}, {}, "p", "c"),
        ({"prompt": "p", "response": "c"}, {}, "p", "c"),
        ({"question": "p", "answer": 7}, {}, "p", "7"),
        ({"instruction": "p", "output": "c"}, {}, "p", "c"),
        ({"instruction": "p", "input": "", "output": "c"}, {}, "p", "c"),
        ({"instruction": "p", "input": "i", "output": "c"}, {}, "p\n\ni", "c"),
        (
            {"en": "a dog", "de": "ein Hund"},
            {"prompt": "To German: {en}", "completion": "de"},
            "To German: a dog",
            "ein Hund",
        ),
        ({"t": {"en": "a", "de": "b"}}, {"prompt": "{t.en}", "completion": "t.de"}, "a", "b"),
        ({"t.en": "a", "de": "b"}, {"prompt": "t.en {{x}}", "completion": "de"}, "t.en {x}", "b"),
    ],
)
def test_prompt_and_completion_are_found(row, fields, prompt, completion):
    example = one("instruction", row, **fields)
    assert example.prompt == (Message("user", prompt),)
    assert example.completion == completion


CONVERSATION = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
]


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"messages": CONVERSATION}, {}),
        ({"chat": CONVERSATION}, {"messages": "chat"}),
        ({"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:]}, {}),
        ({"prompt": CONVERSATION[:2], "completion": "a"}, {}),
    ],
)
def test_the_last_message_is_the_completion(row, fields):
    example = one("instruction", row, **fields)
    assert example.prompt == (Message("system", "s"), Message("user", "u"))
    assert example.completion == "a"


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"text": "a", "label": 1}, {}, ("a", None, 1)),
        ({"text": "a", "label": "2"}, {}, ("a", None, 2)),
        ({"text": "a", "label": 2.0}, {}, ("a", None, 2)),
        ({"text": "a", "label": True}, {}, ("a", None, 1)),
        ({"text": "a", "label": " spam "}, {}, ("a", None, "spam")),
        ({"text": "a", "text_pair": "b", "label": 0}, {}, ("a", "b", 0)),
        ({"sentence": "a", "label": 0, "idx": 5}, {}, ("a", None, 0)),
        ({"premise": "a", "hypothesis": "b", "label": 0}, {}, ("a", "b", 0)),
        ({"text": "a", "label": 0, "sentiment": 1}, {"label": "sentiment"}, ("a", None, 1)),
        ({"x": "a", "y": "b", "z": 1}, {"text": "x", "text_pair": "y", "label": "z"}, ("a", "b", 1)),
    ],
)
def test_texts_and_labels_are_found(row, fields, expected):
    assert one("classification", row, **fields)[:3] == expected


@pytest.mark.parametrize(
    ("objective", "fields", "got"),
    [
        ("language_modeling", {"text": "txt"}, "'txt'; did you mean 'text'?"),
        ("instruction", {"prompt": "text", "completion": "{anser}"}, "'anser'; did you mean 'answer'?"),
        ("classification", {"label": "clas"}, "'clas'; did you mean 'class'?"),
    ],
)
def test_a_missing_column_is_told_with_those_there_are(objective, fields, got):
    with pytest.raises(UserError) as caught:
        one(objective, {"text": "a", "answer": "b", "class": "c"}, **fields)
    assert caught.value.got == got
    assert caught.value.expected == "one of the columns there are: text, answer, class"
    assert caught.value.where == "a.jsonl:1"


@pytest.mark.parametrize("objective", ["language_modeling", "instruction", "classification"])
def test_unrecognised_columns_are_told(objective):
    with pytest.raises(UserError, match="no column recognised") as caught:
        one(objective, {"x": "a", "y": "b"})
    assert caught.value.got == "columns x, y"
    assert "data.fields" in caught.value.expected


def test_a_value_that_is_no_text_is_told_with_its_line():
    with pytest.raises(UserError, match="holds no text") as caught:
        read_examples(table({"text": "a"}, {"text": ["b"]}), "language_modeling", {})
    assert caught.value.where == "a.jsonl:2"
    assert caught.value.got == "list ['b']"
    with pytest.raises(UserError, match="nothing"):
        read_examples(table({"text": "a"}, {"other": 1}), "language_modeling", {})


@pytest.mark.parametrize("label", [None, "", 0.5, float("nan"), [1]])
def test_a_label_that_is_no_class_is_told(label):
    with pytest.raises(UserError, match="is no class"):
        one("classification", {"text": "a", "label": label})


@pytest.mark.parametrize("messages", ["hello", [], CONVERSATION[:2], [{"role": "user"}, CONVERSATION[2]]])
def test_a_broken_conversation_is_told(messages):
    with pytest.raises(UserError, match="no conversation that ends with an answer"):
        one("instruction", {"messages": messages})


def test_half_a_pair_of_fields_and_a_malformed_template_are_told():
    with pytest.raises(UserError, match="incomplete"):
        one("instruction", {"a": "x", "b": "y"}, prompt="a")
    with pytest.raises(UserError, match="malformed template"):
        template_columns("Translate {en")
