"""A policy that takes any available action: what steering without knowing costs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmrl.policy import SchedulePolicy
from llmrl.policy_decision import PolicyDecision


class RandomPolicy(SchedulePolicy):
    """Takes the available actions with equal probability.

    Args:
        like: The policy whose actions, observation and schedule it has.
        seed: Of its choices.
    """

    def __init__(self, like: SchedulePolicy, seed: int) -> None:
        super().__init__(like.table, like.spec, like.settings, None, {"name": "random"})
        self._like = like
        self._rng = np.random.default_rng([seed, like.table.num_actions])

    def seeded(self, seed: int) -> RandomPolicy:
        """The same with other choices, at their beginning."""
        return RandomPolicy(self._like, seed)

    def act(self, observation: NDArray[np.float32], mask: NDArray[np.bool_]) -> PolicyDecision:
        """Random actions among those available in mask bool[E, A]."""
        actions = [self._rng.choice(np.flatnonzero(available)) for available in mask]
        return PolicyDecision(np.array(actions, np.int64), np.full(mask.shape, np.nan, np.float32))
