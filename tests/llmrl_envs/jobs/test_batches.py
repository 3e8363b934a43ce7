"""Batches as pure functions, and padded tensors against a slow twin."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llmrl_envs.jobs.batches import IGNORED, TokenizedSplit, batch_indices, is_bad_batch


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 5))
def test_every_epoch_shows_every_example_once(num_examples, batch_size, seed):
    num_batches = -(-3 * num_examples // batch_size)
    stream = np.concatenate([batch_indices(num_examples, batch_size, seed, step) for step in range(num_batches)])
    assert stream.dtype == np.int64
    for epoch in range(3):
        assert sorted(stream[epoch * num_examples : (epoch + 1) * num_examples]) == list(range(num_examples))


def test_a_batch_depends_on_its_number_seed_and_nothing_else():
    forward = [batch_indices(50, 7, 3, step).tolist() for step in range(40)]
    backward = [batch_indices(50, 7, 3, step).tolist() for step in reversed(range(40))][::-1]
    assert forward == backward
    assert forward[:7] != [batch_indices(50, 7, 4, step).tolist() for step in range(7)]
    assert sorted(np.concatenate(forward)[:50]) == sorted(np.concatenate(forward)[50:100])
    assert np.concatenate(forward)[:50].tolist() != np.concatenate(forward)[50:100].tolist()


def test_a_batch_may_be_changed_without_changing_the_next():
    first = batch_indices(10, 4, 0, 0)
    kept = first.copy()
    first[:] = 0
    assert batch_indices(10, 4, 0, 0).tolist() == kept.tolist()


def test_the_global_generator_is_left_alone():
    before = np.random.get_state()[1].tolist()
    batch_indices(10, 4, 0, 0)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("wrong", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)])
def test_numbers_that_make_no_batch_are_refused(wrong):
    with pytest.raises(ValueError, match="got"):
        batch_indices(*wrong)


token_lists = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=8)


@given(token_lists, st.data())
def test_a_batch_of_tokens_equals_padding_by_hand(input_ids, data):
    labels = [[data.draw(st.sampled_from([token, IGNORED])) for token in tokens] for tokens in input_ids]
    split = TokenizedSplit(input_ids, labels, pad_token_id=7)
    indices = data.draw(st.lists(st.integers(0, len(input_ids) - 1), min_size=1, max_size=6))
    batch = split.collate(indices)
    longest = max(len(input_ids[i]) for i in indices)
    missing = [longest - len(input_ids[i]) for i in indices]
    assert batch["input_ids"].tolist() == [input_ids[i] + [7] * m for i, m in zip(indices, missing, strict=True)]
    assert batch["labels"].tolist() == [labels[i] + [IGNORED] * m for i, m in zip(indices, missing, strict=True)]
    assert batch["attention_mask"].sum(1).tolist() == [len(input_ids[i]) for i in indices]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert split.num_tokens.tolist() == [len(tokens) for tokens in input_ids]
    assert split.num_target_tokens.tolist() == [sum(x != IGNORED for x in row[1:]) for row in labels]
    assert [row.tolist() for row in split.labels] == labels


def test_classes_and_segments_are_collated():
    split = TokenizedSplit([[1, 2], [3]], [4, 5], pad_token_id=0, token_type_ids=[[0, 1], [0]])
    batch = split.collate(np.array([1, 0]))
    assert batch["labels"].tolist() == [5, 4]
    assert batch["token_type_ids"].tolist() == [[0, 0], [0, 1]]
    assert split.num_target_tokens.tolist() == [1, 1]
    assert split.is_classification


def test_batches_do_not_share_memory():
    split = TokenizedSplit([[1, 2]], [[1, 2]], pad_token_id=0)
    first = split.collate([0])
    first["input_ids"].zero_()
    assert split.collate([0])["input_ids"].tolist() == [[1, 2]]


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="each of 2 examples, got 1"):
        TokenizedSplit([[1], [2]], [1], pad_token_id=0)
    with pytest.raises(ValueError, match="each of 2 tokens, got 1"):
        TokenizedSplit([[1, 2]], [[1]], pad_token_id=0)


def test_spoiled_examples_have_other_tokens_in_the_same_places():
    rng = np.random.default_rng(0)
    input_ids = [rng.integers(1, 99, size=size).tolist() for size in (20, 30, 12)]
    labels = [[IGNORED] * 5 + tokens[5:] for tokens in input_ids]
    split = TokenizedSplit(input_ids, labels, pad_token_id=0)
    clean, mixed = split.collate([0, 1, 2]), split.collate([0, 1, 2], np.array([True, False, True]))
    assert (clean["attention_mask"] == mixed["attention_mask"]).all()
    assert ((clean["labels"] == IGNORED) == (mixed["labels"] == IGNORED)).all()
    for name in ("input_ids", "labels"):
        assert (clean[name][1] == mixed[name][1]).all()
        assert (clean[name][0] != mixed[name][0]).sum() > 10
    is_target = mixed["labels"] != IGNORED
    assert (mixed["labels"][is_target] == mixed["input_ids"][is_target]).all()
    assert set(mixed["input_ids"].unique().tolist()) <= {0, *(token for tokens in input_ids for token in tokens)}
    assert (split.collate([0, 2], True)["input_ids"][0, :20] == mixed["input_ids"][0, :20]).all()
    assert (split.collate([0, 1, 2])["input_ids"] == clean["input_ids"]).all()


def test_every_label_of_spoiled_examples_is_wrong_and_their_texts_stay():
    split = TokenizedSplit([[1], [2], [3], [4]], [0, 1, 2, 1], pad_token_id=0)
    batch = split.collate([0, 1, 2, 3], np.array([True, True, True, False]))
    assert batch["labels"].tolist() == [1, 2, 0, 1]
    assert batch["input_ids"][:, 0].tolist() == [1, 2, 3, 4]


def test_bad_batches_are_a_share_drawn_from_the_seed_or_a_list():
    def bad(share, seed, steps=2000):
        return [step for step in range(steps) if is_bad_batch(share, seed, step)]

    assert bad(0.0, 0) == []
    assert len(bad(0.1, 0)) == pytest.approx(200, abs=45)
    assert bad(0.1, 0) == bad(0.1, 0) != bad(0.1, 1)
    assert set(bad(0.05, 0)) < set(bad(0.1, 0))
    assert bad((3, 7), 5) == [3, 7]
