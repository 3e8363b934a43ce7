"""What is a target and what is not, per objective."""

import pytest
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.batches import IGNORED
from llmrl_envs.jobs.data_files import Place
from llmrl_envs.jobs.examples import ClassificationExample, InstructionExample, Message, TextExample
from llmrl_envs.jobs.objectives import (
    fit,
    resolve_labels,
    tokenize_classification,
    tokenize_instructions,
    tokenize_texts,
)

PLACE = Place("a.jsonl", 1)
PAD, BOS, EOS = 0, 1, 2


def instruction(prompt, completion):
    return InstructionExample((Message("user", prompt),), completion, PLACE)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def targets(split, index=0):
    return [label for label in split.labels[index].tolist() if label != IGNORED]


def test_documents_are_joined_and_cut_into_blocks(tokenizer):
    split = tokenize_texts([TextExample("abc", PLACE), TextExample("defgh", PLACE)], tokenizer, max_length=4)
    stream = [*ids(tokenizer, "abc"), EOS, *ids(tokenizer, "defgh"), EOS]
    assert [row.tolist() for row in split.input_ids] == [stream[:4], stream[4:8]]
    assert [row.tolist() for row in split.labels] == [stream[:4], stream[4:8]]
    assert split.num_target_tokens.tolist() == [3, 3]


def test_a_beginning_token_is_kept_where_the_tokenizer_adds_it(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    split = tokenize_texts([TextExample("ab", PLACE), TextExample("c", PLACE)], tokenizer, max_length=64)
    assert split.input_ids[0].tolist() == [BOS, *ids(tokenizer, "ab"), EOS, BOS, *ids(tokenizer, "c"), EOS]


def test_a_text_without_two_tokens_is_told(make_tokenizer):
    with pytest.raises(UserError, match="too short to learn from"):
        tokenize_texts([TextExample("a", PLACE)], make_tokenizer(eos_token=None), max_length=8)


def test_only_the_completion_is_learned_and_it_ends_with_the_end_token(tokenizer):
    split = tokenize_instructions([instruction("ab", "cd")], tokenizer, max_length=16)
    assert split.input_ids[0].tolist() == [*ids(tokenizer, "ab\n"), *ids(tokenizer, "cd"), EOS]
    assert split.labels[0].tolist() == [IGNORED] * 3 + [*ids(tokenizer, "cd"), EOS]
    assert split.num_target_tokens.tolist() == [3]


def test_a_long_prompt_loses_its_beginning_not_the_completion_its_targets(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    split = tokenize_instructions([instruction("x" * 100 + "yz", "cd")], tokenizer, max_length=8)
    assert split.input_ids[0].tolist() == [BOS, *ids(tokenizer, "xyz\n"), *ids(tokenizer, "cd"), EOS]
    assert targets(split) == [*ids(tokenizer, "cd"), EOS]


def test_a_long_completion_leaves_a_quarter_to_the_prompt(tokenizer):
    split = tokenize_instructions([instruction("x" * 50, "c" * 50)], tokenizer, max_length=16)
    assert len(split.input_ids[0]) == 16
    assert split.num_target_tokens.tolist() == [12]


@pytest.mark.parametrize(
    ("prompt", "completion", "max_length", "num_kept", "expected"),
    [
        ([1, 2], [3], 8, 1, ([1, 2], [3])),
        ([1, 2, 3, 4], [5, 6], 4, 0, ([3, 4], [5, 6])),
        ([1, 2, 3, 4], [5, 6], 4, 1, ([1, 4], [5, 6])),
        ([1, 2, 3, 4], [5, 6, 7, 8], 4, 1, ([1], [5, 6, 7])),
        ([], [5, 6, 7], 2, 0, ([], [5, 6])),
    ],
)
def test_fitting_by_hand(prompt, completion, max_length, num_kept, expected):
    assert fit(prompt, completion, max_length, num_kept) == expected


def test_an_example_always_has_a_target(make_tokenizer):
    for tokenizer in (make_tokenizer(), make_tokenizer(adds_bos=True)):
        empty = InstructionExample((Message("user", ""), Message("user", "")), "", PLACE)
        split = tokenize_instructions([instruction("", ""), empty], tokenizer, max_length=16)
        assert (split.num_target_tokens >= 1).all()


def test_several_messages_without_a_template_are_named_lines(tokenizer):
    example = InstructionExample((Message("user", "a"), Message("assistant", "b"), Message("user", "c")), "d", PLACE)
    split = tokenize_instructions([example], tokenizer, max_length=64)
    text = tokenizer.decode(split.input_ids[0])
    assert text == "User: a\nAssistant: b\nUser: c\nAssistant: d</s>"


def test_a_chat_template_is_used_and_ends_once(make_tokenizer, chat_template):
    tokenizer = make_tokenizer(adds_bos=True, chat_template=chat_template)
    split = tokenize_instructions([instruction("ab", "cd")], tokenizer, max_length=64)
    assert tokenizer.decode(split.input_ids[0]) == "<user>ab</s>\n<assistant>cd</s>"
    assert tokenizer.decode(targets(split)) == "cd</s>"


def test_a_template_that_refuses_is_told_with_the_line(make_tokenizer):
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('no user') }}")
    with pytest.raises(UserError, match="refuses this conversation") as caught:
        tokenize_instructions([instruction("a", "b")], tokenizer, max_length=8)
    assert caught.value.where == "a.jsonl:1"
    assert "no user" in caught.value.got


def classified(text, label, pair=None, line=1):
    return ClassificationExample(text, pair, label, Place("a.jsonl", line))


def test_texts_to_classify_keep_their_special_tokens_and_are_cut(make_tokenizer):
    tokenizer = make_tokenizer(is_encoder=True)
    split = tokenize_classification([classified("abcdef", 1), classified("a", 0)], [1, 0], tokenizer, max_length=4)
    assert split.input_ids[0].tolist() == [BOS, *ids(tokenizer, "ab"), EOS]
    assert split.labels.tolist() == [1, 0]
    assert set(split.collate([0, 1])) == {"input_ids", "attention_mask", "labels"}


def test_pairs_tell_their_segments(make_tokenizer):
    tokenizer = make_tokenizer(is_encoder=True)
    split = tokenize_classification([classified("ab", 0, pair="c")], [0], tokenizer, max_length=16)
    assert split.input_ids[0].tolist() == [BOS, *ids(tokenizer, "ab"), EOS, *ids(tokenizer, "c"), EOS]
    assert split.collate([0])["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]


def test_an_empty_text_without_special_tokens_is_still_an_input(tokenizer):
    split = tokenize_classification([classified("", 0)], [0], tokenizer, max_length=4)
    assert split.collate([0])["input_ids"].tolist() == [[PAD]]


@pytest.mark.parametrize(
    ("labels", "names", "num_labels", "classes", "label_names"),
    [
        ([0, 2, 1], None, None, [0, 2, 1], ("0", "1", "2")),
        ([0, 0, 0], None, None, [0, 0, 0], ("0", "1")),
        ([0, 1], None, 3, [0, 1], ("0", "1", "2")),
        (["spam", "ham"], None, None, [1, 0], ("ham", "spam")),
        (["spam", 7], None, None, [1, 0], ("7", "spam")),
        (["no", "yes"], ("yes", "no"), None, [1, 0], ("yes", "no")),
        ([1, "yes"], ("yes", "no"), None, [1, 0], ("yes", "no")),
        ([1], ("yes", "no"), 3, [1], ("yes", "no", "2")),
    ],
)
def test_classes_are_numbered(labels, names, num_labels, classes, label_names):
    examples = {"train": [classified("a", label) for label in labels]}
    assert resolve_labels(examples, names, num_labels) == ({"train": classes}, label_names)


def test_names_are_numbered_over_all_splits():
    splits = {"train": [classified("a", "b")], "test": [classified("a", "a")]}
    assert resolve_labels(splits, None, None) == ({"train": [1], "test": [0]}, ("a", "b"))


@pytest.mark.parametrize(
    ("label", "names", "num_labels", "what", "expected"),
    [
        (2, None, 2, "label out of range", "0 .. 1 (2 classes)"),
        (-1, None, None, "label out of range", "0 .. 1 (2 classes)"),
        (2, ("no", "yes"), None, "label out of range", "0 .. 1 (2 classes)"),
        ("yess", ("no", "yes"), None, "unknown label", "one of no, yes"),
        ("c", None, 2, "label out of range", "0 .. 1 (2 classes)"),
    ],
)
def test_a_label_that_does_not_fit_is_told_with_its_line(label, names, num_labels, what, expected):
    first = ["a", "b"] if label == "c" else [0, 1]
    examples = [classified("x", first[0]), classified("x", first[1], line=2), classified("x", label, line=3)]
    with pytest.raises(UserError) as caught:
        resolve_labels({"train": examples}, names, num_labels)
    assert (caught.value.what, caught.value.expected, caught.value.where) == (what, expected, "a.jsonl:3")
    assert str(label) in str(caught.value.got)
