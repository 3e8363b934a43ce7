"""Random numbers as a pure function of a job's seed and a counter.

A job's measurement noise at a step can so be drawn for all jobs in one array operation, in any order, with nothing to
store: what a job shows depends on its seed and its step alone. The bits are those of SplitMix64 (Steele, Lea and Flood
2014, https://doi.org/10.1145/2660193.2660195), started at the seed and moved to the counter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmrl_envs.interface.statistics import Floats, Integers

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_UNIT = np.float32(2.0**-32)
_TURN = np.float32(2.0 * np.pi * 2.0**-32)


def random_bits(seed: Integers, counter: Integers) -> NDArray[np.uint64]:
    """64 random bits for each pair of a seed and a counter; arguments broadcast to at least one dimension."""
    bits = np.atleast_1d(seed).astype(np.uint64) + np.atleast_1d(counter).astype(np.uint64) * _STEP
    bits ^= bits >> np.uint64(30)
    bits *= _FIRST
    bits ^= bits >> np.uint64(27)
    bits *= _SECOND
    bits ^= bits >> np.uint64(31)
    return bits


def uniforms(seed: Integers, counter: Integers) -> Floats:
    """Uniform numbers in [0, 1)."""
    return np.asarray((random_bits(seed, counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def normal_pairs(seed: Integers, counter: Integers) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two independent standard normals for each pair of a seed and a counter (Box and Muller).

    In single precision, which is ample for noise; no value lies beyond 6.7.
    """
    bits = random_bits(seed, counter)
    upper = (bits >> np.uint64(32)).astype(np.float32)
    lower = bits.astype(np.uint32).astype(np.float32)
    radius = np.sqrt(np.float32(-2.0) * np.log((upper + np.float32(1.0)) * _UNIT))
    angle = lower * _TURN
    return radius * np.cos(angle), radius * np.sin(angle)
