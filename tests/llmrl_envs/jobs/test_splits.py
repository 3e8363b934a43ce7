"""The deterministic cut: the same for every order, no example in two splits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.data_files import Place
from llmrl_envs.jobs.examples import ClassificationExample, TextExample
from llmrl_envs.jobs.splits import complete_splits, cut, fixed_subset

FRACTIONS = (0.8, 0.1, 0.1)


def documents(texts):
    return [TextExample(text, Place("a.txt", line)) for line, text in enumerate(texts, start=1)]


def contents(splits):
    return {split: [example.text for example in examples] for split, examples in splits.items()}


def test_shares_are_as_asked_for_and_nothing_is_lost():
    texts = [f"document {i}" for i in range(200)]
    found = contents(complete_splits({"train": documents(texts)}, FRACTIONS))
    assert {split: len(part) for split, part in found.items()} == {"train": 160, "validation": 20, "test": 20}
    assert sorted(text for part in found.values() for text in part) == sorted(texts)
    assert found["train"] == sorted(found["train"], key=texts.index)


@given(st.lists(st.integers(0, 30), min_size=40, max_size=80).filter(lambda x: len(set(x)) > 10), st.randoms())
def test_the_cut_ignores_order_and_keeps_duplicates_together(numbers, random):
    texts = [f"document {number}" for number in numbers]
    shuffled = random.sample(texts, len(texts))
    found = contents(complete_splits({"train": documents(texts)}, FRACTIONS))
    again = contents(complete_splits({"train": documents(shuffled)}, FRACTIONS))
    assert {split: sorted(part) for split, part in found.items()} == {s: sorted(part) for s, part in again.items()}
    members = [set(part) for part in found.values()]
    assert all(members)
    assert sum(map(len, members)) == len(set(texts))


def test_the_same_text_under_two_labels_stays_in_one_split():
    place = Place("a.csv", 1)
    examples = [ClassificationExample(f"text {i // 2}", None, i % 2, place) for i in range(80)]
    splits = cut(examples, {"validation": 0.25, "test": 0.25})
    members = [{example.text for example in part} for part in splits.values()]
    assert sum(map(len, members)) == 40


def test_only_missing_splits_are_cut_and_proportions_are_kept():
    train, test = documents([f"document {i}" for i in range(90)]), documents(["held out"])
    splits = complete_splits({"train": train, "test": test}, FRACTIONS)
    assert contents(splits)["test"] == ["held out"]
    assert len(splits["validation"]) == 10
    assert len(splits["train"]) == 80
    complete = complete_splits({"train": train, "validation": test, "test": test}, FRACTIONS)
    assert len(complete["train"]) == 90


@pytest.mark.parametrize("text", ["word " * 2000, "字" * 5000, "\n".join(f"line {i}" for i in range(900))])
def test_one_long_text_is_cut_by_position(text):
    found = contents(complete_splits({"train": documents([text])}, FRACTIONS))
    parts = [found[split][0] for split in ("train", "validation", "test")]
    assert "".join("".join(parts).split()) == "".join(text.split())
    shares = np.array([len(part) for part in parts]) / len(text)
    assert shares == pytest.approx(FRACTIONS, abs=0.03)
    if " " in text:
        assert " ".join(parts).split() == text.split()


def test_too_little_to_cut_is_told():
    few = [ClassificationExample("same", None, 0, Place("a.csv", line)) for line in range(50)]
    with pytest.raises(UserError, match="too few different examples"):
        complete_splits({"train": few}, FRACTIONS)
    with pytest.raises(UserError, match="too short to cut"):
        complete_splits({"train": documents(["ab"])}, FRACTIONS)


def test_a_subset_is_always_the_same_and_spreads():
    chosen = fixed_subset(1000, 100)
    assert len(set(chosen.tolist())) == 100
    assert chosen.tolist() == sorted(fixed_subset(1000, 100).tolist())
    assert 350 < chosen.mean() < 650
    assert fixed_subset(5, 9).tolist() == [0, 1, 2, 3, 4]
