"""Known schedules as demonstrations: a script acts, the agent watches, and its replay starts with sane jobs.

A demonstration follows the shape of a usual schedule (linear, cosine, or warm-up-stable-decay) at a random level. Over
the environment's own base schedule this means a target level that changes with progress:

    target(p) = offset + round(log(shape(p) / base(p)) / log(grid step))
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llmrl_envs.interface.action import ActionTable, UpdateChoice
from llmrl_envs.interface.base_schedule import BaseName, base_factor
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from numpy.typing import NDArray

from llmrl.dqn.interface import Agent

SHAPES: tuple[BaseName, ...] = ("linear", "cosine", "wsd")
_RESOLUTION = 1000


class Demonstrator:
    """Acts by script and passes what happens on to an agent.

    Args:
        agent: Gets every transition.
        table: The environment's actions.
        spec: Layout of its observations.
        settings: Its schedule settings.
        num_envs: Environments that act together.
        rng: Draws each episode's shape and level.
    """

    def __init__(
        self,
        agent: Agent,
        table: ActionTable,
        spec: ObservationSpec,
        settings: ScheduleSettings,
        num_envs: int,
        rng: np.random.Generator,
    ) -> None:
        self._agent = agent
        self._table = table
        self._settings = settings
        self._rng = rng
        self._progress = spec.names.index("progress")
        self._level = spec.names.index("level")
        self._shape = np.zeros(num_envs, np.int64)
        self._offset = np.zeros(num_envs, np.int64)

    def act(self, obs: NDArray[Any], mask: NDArray[np.bool_], *, explore: bool) -> NDArray[np.int64]:
        """The available action that comes closest to the target level, int64[E]."""
        levels = len(self._table.levels)
        centre = max(self._table.default_level, levels - 1 - self._table.default_level, 1)
        actions = np.zeros(len(obs), np.int64)
        for lane, row in enumerate(obs):
            if row[self._progress] == 0.0:
                self._shape[lane] = self._rng.integers(len(SHAPES))
                self._offset[lane] = self._rng.integers(-2, 3)
            level = self._table.default_level + round(float(row[self._level]) * centre)
            target = np.clip(self._target(lane, float(row[self._progress])), 0, levels - 1)
            actions[lane] = self._towards(int(target), level, mask[lane])
        return actions

    def _target(self, lane: int, progress: float) -> int:
        at = np.array([round(progress * _RESOLUTION)])
        total, warmup = np.array([_RESOLUTION]), self._settings.warmup_steps(np.array([_RESOLUTION]))
        shape = base_factor(SHAPES[int(self._shape[lane])], at, total, warmup)[0]
        base = base_factor(self._settings.base, at, total, warmup)[0]
        step = np.log(self._table.levels[1] / self._table.levels[0])
        bend = np.log(shape / base) / step if shape > 0 and base > 0 else 0.0
        return self._table.default_level + int(self._offset[lane]) + round(float(bend))

    def _towards(self, target: int, level: int, mask: NDArray[np.bool_]) -> int:
        best, distance = self._table.hold, abs(target - level) + 0.5
        for index, action in enumerate(self._table.actions):
            if not mask[index] or action.choice is not UpdateChoice.NONE:
                continue
            reached = level + action.move if action.level is None else action.level
            if abs(target - reached) < distance:
                best, distance = index, abs(target - reached)
        return best

    def observe(self, *arguments: Any, **named: Any) -> None:
        """Passes a transition on."""
        self._agent.observe(*arguments, **named)

    def end_episodes(self) -> None:
        """Passes it on."""
        self._agent.end_episodes()
