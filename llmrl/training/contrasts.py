"""Contrasts between the jobs of a group, as transitions: what one choice gained over another under the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrl.dqn.agent import Agent

SMALLEST_UNIT = 0.25
"""Least unit of contrasts, as a return: where no member gains much, differences are noise."""


@dataclass
class Sight:
    """What a member saw at a decision."""

    obs: NDArray[Any]
    mask: NDArray[np.bool_]


def in_units_of_best(returns: Sequence[float]) -> list[float]:
    """The returns of a group in units of its best, fitted with one peak; a job that fails counts -1.

    Args:
        returns: Of its members, in the order of what they differ in: level, or time.
    """
    unit = max(SMALLEST_UNIT, *returns)
    fitted: list[float] = (with_one_peak(np.maximum(np.asarray(returns, np.float64), -unit)) / unit).tolist()
    return fitted


def store_contrast(agent: Agent, num_envs: int, lane: int, sight: Sight, action: int, gain: float) -> None:
    """Passes on one transition that ends where it begins: at this sight the action is worth so much.

    Args:
        agent: Gets it.
        num_envs: Environments that act together.
        lane: Where it was seen.
        sight: What was seen.
        action: What was done.
        gain: What it gained.
    """
    obs, mask = np.repeat(sight.obs[None], num_envs, axis=0), np.repeat(sight.mask[None], num_envs, axis=0)
    here, nowhere = np.arange(num_envs) == lane, np.zeros(num_envs, np.bool_)
    actions, gains = np.full(num_envs, action, np.int64), np.full(num_envs, gain)
    agent.observe(obs, actions, gains, here, nowhere, obs, mask, mask, valid=here)


def with_one_peak(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sequence nearest to `values` by least squares that rises to a peak and falls from there, float64[N].

    Args:
        values: float64[N], finite.
    """
    fits = [np.concatenate([_rising(values[:peak]), -_rising(-values[peak:])]) for peak in range(len(values) + 1)]
    return min(fits, key=lambda fit: float(np.square(fit - values).sum()))


def _rising(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest sequence that never falls: neighbours that do are pooled (Ayer et al. 1955), float64[N]."""
    pools: list[tuple[float, int]] = []
    for value in values.tolist():
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, size = pools.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        pools.append((mean, count))
    return np.repeat([mean for mean, _ in pools], [count for _, count in pools])
