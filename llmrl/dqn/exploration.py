"""When to take a random action: epsilon over environment steps, and a coin of its own for every environment.

exploration = EpsilonGreedy(LinearEpsilon(1.0, 0.05, 10_000), num_envs=8, rng=np.random.default_rng(0))
action = exploration.choose(mask, env_steps)  # -1 where the greedy action is to be taken
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmrl.dqn.acting import check_mask, random_actions
from llmrl.dqn.config import DQNConfig
from llmrl.dqn.schedules import geometric, linear

GREEDY = -1


class EpsilonSchedule(Protocol):
    """Probability of a random action."""

    def __call__(self, env_steps: int) -> float | NDArray[np.float64]:
        """One epsilon for all environments, or an array [E]."""


@dataclass(frozen=True)
class LinearEpsilon:
    """A straight line from `start` at step 0 to `end` at step `decay_steps`, and `end` after that.

    >>> epsilon = LinearEpsilon(1.0, 0.1, decay_steps=100)
    >>> epsilon(0), epsilon(50), epsilon(100), epsilon(1000)
    (1.0, 0.55, 0.1, 0.1)
    """

    start: float
    end: float
    decay_steps: int

    def __post_init__(self) -> None:
        _check_probability(start=self.start, end=self.end)
        _check_decay_steps(self.decay_steps)

    def __call__(self, env_steps: int) -> float:
        """Epsilon after so many environment steps."""
        return linear(self.start, self.end, env_steps, self.decay_steps)


@dataclass(frozen=True)
class ExponentialEpsilon:
    """A constant ratio per step from `start` at step 0 to `end` at step `decay_steps`, and `end` after that.

    >>> epsilon = ExponentialEpsilon(1.0, 0.01, decay_steps=100)
    >>> epsilon(0), round(epsilon(50), 12), epsilon(100)
    (1.0, 0.1, 0.01)
    """

    start: float
    end: float
    decay_steps: int

    def __post_init__(self) -> None:
        _check_probability(start=self.start, end=self.end)
        _check_decay_steps(self.decay_steps)
        if min(self.start, self.end) <= 0:
            raise ValueError(f"exponential epsilon: expected both ends above 0, got {self.start} and {self.end}")

    def __call__(self, env_steps: int) -> float:
        """Epsilon after so many environment steps."""
        return geometric(self.start, self.end, env_steps, self.decay_steps)


@dataclass(frozen=True)
class LadderEpsilon:
    """A different epsilon for every environment: epsilon**(1 + exponent * i / (E - 1)) for environment i.

    The first environment explores as much as `schedule` says, the last one hardly at all. With one environment it is
    the schedule itself. Horgan et al. 2018, https://arxiv.org/abs/1803.00933

    >>> LadderEpsilon(LinearEpsilon(0.4, 0.4, 1), exponent=7.0, num_envs=3)(0).round(4).tolist()
    [0.4, 0.0162, 0.0007]
    """

    schedule: LinearEpsilon | ExponentialEpsilon
    exponent: float
    num_envs: int

    def __post_init__(self) -> None:
        if self.exponent < 0 or self.num_envs < 1:
            raise ValueError(
                f"ladder: expected exponent >= 0 and num_envs >= 1, got {self.exponent} and {self.num_envs}"
            )

    def __call__(self, env_steps: int) -> NDArray[np.float64]:  # [E]
        """Epsilon of every environment after so many environment steps."""
        place = np.arange(self.num_envs) / max(self.num_envs - 1, 1)
        return np.asarray(self.schedule(env_steps) ** (1.0 + self.exponent * place))


class EpsilonGreedy:
    """Decides for each environment whether to explore, and with which action.

    With `max_repeat` above one an exploratory action goes on for a random number of decisions, drawn from
    P(length) ~ length**-2 up to `max_repeat` (Dabney et al. 2021, https://arxiv.org/abs/2006.01782); an action that is
    no longer available, or an episode that ends, cuts it short.

    Args:
        epsilon: Probability that an environment begins to explore.
        num_envs: Environments E.
        rng: Where the randomness comes from; its state is part of `state_dict`.
        max_repeat: Longest run of one exploratory action.

    Raises:
        ValueError: A number is not positive.
    """

    def __init__(
        self, epsilon: EpsilonSchedule, num_envs: int, rng: np.random.Generator, *, max_repeat: int = 1
    ) -> None:
        if num_envs < 1 or max_repeat < 1:
            raise ValueError(f"expected num_envs >= 1 and max_repeat >= 1, got {num_envs} and {max_repeat}")
        self.epsilon = epsilon
        self.num_envs = num_envs
        self.max_repeat = max_repeat
        self._rng = rng
        self._greedy = np.full(num_envs, GREEDY, dtype=np.int64)  # [E]
        self._greedy.flags.writeable = False
        self._action = self._greedy.copy()  # [E] exploratory action under way
        self._remaining = np.zeros(num_envs, dtype=np.int64)  # [E] decisions for which it still goes on
        weight = np.arange(1, max_repeat + 1) ** -2.0
        self._length_prefix = weight.cumsum() / weight.sum()

    def choose(
        self,
        mask: NDArray[np.bool_],  # [E, A], True = available
        env_steps: int,
    ) -> NDArray[np.int64]:  # [E]
        """The exploratory action of every environment, -1 where the greedy action is to be taken.

        Raises:
            ValueError: The mask has another number of environments, or a row that allows nothing.
        """
        if mask.ndim != 2 or len(mask) != self.num_envs:
            raise ValueError(f"mask: expected shape ({self.num_envs}, A), got {mask.shape}")
        check_mask(mask)
        coin = self._rng.random(self.num_envs)
        starts = coin < self.epsilon(env_steps)
        if self.max_repeat == 1 and not np.count_nonzero(starts):
            return self._greedy
        chosen = self._greedy.copy()
        if self.max_repeat > 1:
            starts &= ~self._go_on(mask, chosen)
        if np.count_nonzero(starts):
            chosen[starts] = random_actions(mask[starts], self._rng)
            if self.max_repeat > 1:
                self._begin(starts, chosen)
        return chosen

    def end_episodes(self, ended: NDArray[np.bool_]) -> None:  # [E]
        """No exploratory action goes on into the next episode."""
        if self.max_repeat > 1:
            self._remaining[ended] = 0

    def state_dict(self) -> dict[str, Any]:
        """State of the generator and of the actions under way, as JSON values."""
        return {
            "generator": self._rng.bit_generator.state,
            "action": self._action.tolist(),
            "remaining": self._remaining.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state.

        Raises:
            ValueError: The state is of another number of environments.
        """
        if not len(state["action"]) == len(state["remaining"]) == self.num_envs:
            raise ValueError(f"exploration state: expected {self.num_envs} environments, got {len(state['action'])}")
        self._rng.bit_generator.state = state["generator"]
        self._action = np.array(state["action"], dtype=np.int64)
        self._remaining = np.array(state["remaining"], dtype=np.int64)

    def _go_on(self, mask: NDArray[np.bool_], chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Fills in the actions that go on, and says where; one that is not available is over."""
        going_on = (self._remaining > 0) & mask[np.arange(self.num_envs), self._action]
        chosen[going_on] = self._action[going_on]
        self._remaining = np.where(going_on, self._remaining - 1, 0)
        return going_on

    def _begin(self, starts: NDArray[np.bool_], chosen: NDArray[np.int64]) -> None:
        """Draws for how many more decisions the actions that begin now go on."""
        draw = self._rng.random(int(starts.sum()))
        self._action[starts] = chosen[starts]
        self._remaining[starts] = self._length_prefix.searchsorted(draw, side="right")


def _check_probability(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"epsilon {name}: expected a number in [0, 1], got {value}")


def _check_decay_steps(decay_steps: int) -> None:
    if decay_steps < 1:
        raise ValueError(f"decay_steps: expected a positive number, got {decay_steps}")


def make_exploration(config: DQNConfig, num_envs: int, rng: np.random.Generator) -> EpsilonGreedy:
    """Exploration as a configuration asks for it, with a generator of its own."""
    schedule = _epsilon_schedule(config, num_envs)
    return EpsilonGreedy(schedule, num_envs, rng, max_repeat=config.exploration_max_repeat)


def _epsilon_schedule(config: DQNConfig, num_envs: int) -> EpsilonSchedule:
    ends = (config.epsilon_start, config.epsilon_end, config.epsilon_decay_steps)
    if config.epsilon_schedule == "exponential":
        return ExponentialEpsilon(*ends)
    if config.epsilon_schedule == "ladder":
        return LadderEpsilon(LinearEpsilon(*ends), config.epsilon_ladder_exponent, num_envs)
    return LinearEpsilon(*ends)
