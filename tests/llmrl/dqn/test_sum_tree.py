from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrl.dqn import sum_tree
from llmrl.dqn.sum_tree import SumTree

CAPACITIES = [1, 2, 3, 63, 64, 65, 100, 4096, 100_000]


class NaiveTree:
    """Adds everything up whenever it is asked."""

    def __init__(self, capacity: int) -> None:
        self.priority = np.zeros(capacity)

    def set(self, index, priority):
        for i, p in zip(index, priority, strict=True):
            self.priority[i] = p

    @property
    def total(self):
        return math.fsum(self.priority)

    def find(self, mass):
        passed = 0.0
        for i, p in enumerate(self.priority):
            if p > 0 and mass < passed + p:
                return i
            passed += p
        raise AssertionError(f"{mass} is not in [0, {passed})")


def programs(priorities):
    """Capacity and a list of batches of (place in [0, 1), priority)."""
    batch = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), priorities), min_size=1, max_size=20)
    return st.tuples(st.sampled_from(CAPACITIES), st.lists(batch, min_size=1, max_size=6))


def run(program):
    capacity, batches = program
    tree, naive = SumTree(capacity), NaiveTree(capacity)
    for batch in batches:
        index = [int(place * capacity) for place, _ in batch]
        priority = [p for _, p in batch]
        tree.set(index, priority)
        naive.set(index, priority)
    return tree, naive


@settings(max_examples=60, deadline=None)
@given(programs(st.integers(0, 1000)), st.data())
def test_agrees_with_the_naive_tree_wherever_sums_are_exact(program, data):
    tree, naive = run(program)
    assert tree.total == naive.total
    assert np.array_equal(tree.leaves, naive.priority)
    if naive.total == 0:
        return
    mass = data.draw(st.floats(0, naive.total, exclude_max=True))
    places = [0.0, mass, float(int(mass)), math.nextafter(naive.total, 0.0)]
    assert tree.find(places).tolist() == [naive.find(place) for place in places]
    assert [tree._find_one(place) for place in places] == [naive.find(place) for place in places]


heavy_tailed = st.one_of(st.just(0.0), st.floats(1e-12, 1e12))


@settings(max_examples=60, deadline=None)
@given(programs(heavy_tailed), st.integers(0, 2**32 - 1))
def test_heavy_tailed_priorities(program, seed):
    tree, naive = run(program)
    assert tree.total == pytest.approx(naive.total, rel=1e-13)
    if naive.total == 0:
        return
    mass = np.append(np.random.default_rng(seed).random(50) * tree.total, [0.0, np.nextafter(tree.total, 0.0)])
    mass = np.minimum(mass, np.nextafter(tree.total, 0.0))
    found = tree.find(mass)
    assert (naive.priority[found] > 0).all()
    end = naive.priority.cumsum()[found]
    slack = 1e-12 * naive.total
    assert (mass <= end + slack).all()
    assert (mass >= end - naive.priority[found] - slack).all()


@settings(max_examples=30, deadline=None)
@given(programs(heavy_tailed))
def test_sums_depend_on_the_leaves_alone_and_not_on_how_they_came_about(program):
    tree, naive = run(program)
    other = SumTree(tree.capacity)
    other.set(np.arange(tree.capacity), naive.priority)
    assert tree.total == other.total
    if tree.total > 0:
        mass = np.linspace(0, np.nextafter(tree.total, 0.0), 23)
        assert np.array_equal(tree.find(mass), other.find(mass))


def test_a_large_priority_that_came_and_went_leaves_no_trace():
    # Incremental sums, and float32 ones anyway, would have lost the small priorities in the large one.
    tree = SumTree(5000)
    tree.set(np.arange(5000), 1e-6)
    before = tree.total
    for i in range(100):
        tree.set([i], 1e12)
        tree.set([i], 1e-6)
    assert tree.total == before == pytest.approx(5e-3, rel=1e-12)
    assert tree.find([0.0, np.nextafter(tree.total, 0.0)]).tolist() == [0, 4999]


def test_sums_are_double_precision():
    tree = SumTree(100_000)
    tree.set(np.arange(100_000), 0.1)
    assert tree.total == pytest.approx(10_000.0, rel=1e-12)
    tree.set([0], 1e9)
    assert tree.find([1e9 + 0.15]).tolist() == [2]


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_first_and_last_draw(capacity):
    tree = SumTree(capacity)
    tree.set([0, capacity - 1], 2.5)
    assert tree.find([0.0]).tolist() == [0]
    assert tree.find([np.nextafter(tree.total, 0.0)]).tolist() == [capacity - 1]


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_a_leaf_without_priority_is_never_drawn(capacity):
    rng = np.random.default_rng(capacity)
    tree = SumTree(capacity)
    positive = rng.random(capacity) < 0.1
    positive[capacity // 2] = True
    tree.set(np.arange(capacity), np.where(positive, rng.random(capacity) ** 8 + 1e-300, 0.0))
    drawn = tree.sample(20_000, rng)
    assert positive[drawn].all()


def test_nor_is_it_where_a_product_rounds_the_same_sum_differently(monkeypatch):
    tree = SumTree(5000)
    tree.set([16, 31, 40], 1.0)
    monkeypatch.setattr(sum_tree, "PREFIX", sum_tree.PREFIX * (1 + 1e-12 * np.arange(sum_tree.FAN_OUT + 1)))
    assert tree.find([0.0, 1.0 + 8e-12, 2.0]).tolist() == [16, 31, 40]  # the second would fall on a leaf without


@pytest.mark.parametrize(("capacity", "seed"), [(5, 0), (100, 1), (5000, 2)])
def test_draws_are_in_proportion_to_the_priorities(capacity, seed):
    rng = np.random.default_rng(seed)
    tree = SumTree(capacity)
    priority = rng.exponential(size=capacity) + 0.1
    tree.set(np.arange(capacity), priority)
    num = 200
    counts = np.zeros(capacity)
    for _ in range(num):
        counts += np.bincount(tree.sample(capacity, rng), minlength=capacity)
    expected = num * capacity * priority / priority.sum()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # Stratified draws vary less than independent ones, whose chi-square has mean and half its variance capacity - 1.
    assert chi_square < capacity - 1 + 4 * math.sqrt(2 * (capacity - 1))


def test_changes_that_wait_count_from_the_next_question_on():
    tree = SumTree(70_000)
    tree.set_later(np.array([69_999, 5]), 3.0)
    assert tree.total == 6.0
    tree.set_later(np.array([5]), 0.0)
    assert tree.find([0.0, 2.9]).tolist() == [69_999, 69_999]
    for _ in range(10_000):
        tree.set_later(np.array([1]), 2.0)
    assert tree.total == 5.0


def test_of_an_index_that_occurs_twice_the_last_priority_counts():
    tree = SumTree(10)
    tree.set([3, 4, 3], [1.0, 2.0, 5.0])
    assert tree.total == 7.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SumTree(0), "expected a positive number, got 0"),
        (lambda: SumTree(3).set([3], 1.0), "expected 0 to 2, got 3"),
        (lambda: SumTree(3).set([-1], 1.0), "expected 0 to 2, got -1"),
        (lambda: SumTree(3).set([0], -1.0), "expected finite numbers >= 0, got -1.0"),
        (lambda: SumTree(3).set([0], float("nan")), "expected finite numbers >= 0, got nan"),
        (lambda: SumTree(3).set([0], float("inf")), "expected finite numbers >= 0, got inf"),
        (lambda: SumTree(3).set([0, 1], [1.0]), r"expected shape \(2,\) like the indices, got \(1,\)"),
        (lambda: SumTree(3).find([0.0]), "expected a positive priority, got none"),
        (lambda: SumTree(3).sample(2, np.random.default_rng(0)), "expected a positive priority, got none"),
        (lambda: _tree_of_two().sample(0, np.random.default_rng(0)), "batch_size: expected a positive number, got 0"),
        (lambda: _tree_of_two().find([2.0]), r"expected numbers in \[0, 2.0\), got 2.0 to 2.0"),
        (lambda: _tree_of_two().find([-0.1]), r"expected numbers in \[0, 2.0\), got -0.1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _tree_of_two():
    tree = SumTree(2)
    tree.set([0, 1], 1.0)
    return tree
