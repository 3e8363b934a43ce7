"""Contrasts between the jobs of a group, as transitions: what one choice gained over another under the same noise.

`GroupScript` is what the scripts that play such groups have in common: they act by plan, add up what each job gains,
and tell an agent of a group when all its jobs have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmrl.dqn.interface import Agent

SMALLEST_UNIT = 0.25
"""Least unit of contrasts, as a return: where no member gains much, differences are noise."""


@dataclass
class Sight:
    """What a member saw at a decision."""

    obs: NDArray[Any]
    mask: NDArray[np.bool_]


class GroupMember(Protocol):
    """What a script keeps of a job: at least what it has gained, and whether it has ended."""

    gain: float
    is_over: bool


Member = TypeVar("Member", bound=GroupMember)


class GroupScript(Generic[Member]):
    """Keeps the members of groups, lane by lane.

    Args:
        agent: Gets the contrasts of every group that ends.
        num_envs: Environments that act together, in groups of `group_size`.
        group_size: Jobs of a group.

    Raises:
        ValueError: The environments are no whole groups.
    """

    def __init__(self, agent: Agent, num_envs: int, group_size: int) -> None:
        if num_envs % group_size:
            raise ValueError(f"num_envs: expected a multiple of {group_size}, got {num_envs}")
        self._agent = agent
        self._group_size = group_size
        self._members = [self._new_member() for _ in range(num_envs)]

    def _new_member(self) -> Member:
        """A job that has not begun."""
        raise NotImplementedError

    def _tell(self, first: int, group: list[Member]) -> None:
        """Passes on the contrasts of a group that has ended, whose first lane is `first`."""
        raise NotImplementedError

    def observe(
        self,
        obs: NDArray[Any],
        action: NDArray[np.int64],
        reward: NDArray[np.floating[Any]],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        next_obs: NDArray[Any],
        mask: NDArray[np.bool_],
        next_mask: NDArray[np.bool_],
        valid: NDArray[np.bool_] | None = None,
    ) -> None:
        """Adds up what jobs gain; of a group that has ended the contrasts go to the agent."""
        for lane, member in enumerate(self._members):
            if valid is None or valid[lane]:
                member.gain += float(reward[lane])
                member.is_over |= bool(terminated[lane])
        for first in range(0, len(self._members), self._group_size):
            group = self._members[first : first + self._group_size]
            if all(member.is_over for member in group):
                self._tell(first, group)
                self._members[first : first + self._group_size] = [self._new_member() for _ in group]

    def end_episodes(self) -> None:
        """Forgets what is under way."""
        self._members = [self._new_member() for _ in self._members]
        self._agent.end_episodes()


def in_units_of_best(returns: Sequence[float], unit: float | None = None) -> list[float]:
    """The returns of a group in units of its best, fitted with one peak; a job that fails counts -1.

    Args:
        returns: Of its members, in the order of what they differ in: level, or time.
        unit: The best return, where these are some of its members.
    """
    unit = max(SMALLEST_UNIT, *returns) if unit is None else max(SMALLEST_UNIT, unit)
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
