"""Numbers from a seed and a counter: the published bits, and the moments of what is made of them."""

from __future__ import annotations

import numpy as np
import pytest
from llmrl_envs.quadratic.noise import normal_pairs, random_bits, uniforms


def split_mix(seed: int, count: int) -> list[int]:
    """The generator as published, one number after the other."""
    mask, state, numbers = 2**64 - 1, seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        numbers.append(z ^ (z >> 31))
    return numbers


@pytest.mark.parametrize("seed", [0, 1234567, 2**53 - 1])
def test_bits_are_those_of_split_mix(seed: int) -> None:
    bits = random_bits(np.array([seed]), np.arange(1, 9))
    assert bits.tolist() == split_mix(seed, 8)


def test_seeds_and_counters_broadcast() -> None:
    seeds, counters = np.array([3, 4, 5]), np.arange(7)[:, None]
    together = normal_pairs(seeds, counters)[0]
    assert together.shape == (7, 3)
    assert together[2, 1] == normal_pairs(np.array([4]), np.array([2]))[0][0]


def test_normals_are_standard_and_independent() -> None:
    first, second = (values.astype(np.float64) for values in normal_pairs(np.arange(200), np.arange(1000)[:, None]))
    for values in (first, second):
        assert abs(values.mean()) < 4.5 / np.sqrt(values.size)
        assert values.std() == pytest.approx(1.0, abs=0.01)
        assert (values**4).mean() == pytest.approx(3.0, abs=0.06)
        assert (np.abs(values) > 3.0).mean() == pytest.approx(0.0027, abs=0.0004)
        # Neighbours in time and neighbouring seeds have nothing to do with each other.
        assert abs((values[1:] * values[:-1]).mean()) < 0.012
        assert abs((values[:, 1:] * values[:, :-1]).mean()) < 0.012
    assert abs((first * second).mean()) < 0.012


def test_uniforms_fill_the_unit_interval() -> None:
    values = uniforms(np.arange(20_000), np.array([7]))
    assert values.min() >= 0.0
    assert values.max() < 1.0
    counts = np.histogram(values, bins=20, range=(0.0, 1.0))[0]
    assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 50.0
