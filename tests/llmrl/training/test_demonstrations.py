"""Demonstrations follow the shape that they are meant to follow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from llmrl_envs.interface.action import UpdateChoice, action_table
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule_settings import ScheduleSettings

from llmrl.training.demonstrations import Demonstrator


class Silent:
    """An agent that counts what it is told."""

    def __init__(self) -> None:
        self.observed = self.ended = 0

    def observe(self, *_: Any, **__: Any) -> None:
        self.observed += 1

    def end_episodes(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("name", ["moves", "levels", "factors", "joint"])
def test_levels_reach_the_target_by_available_moves_alone(name: str) -> None:
    table = action_table(name)
    spec = ObservationSpec(table)
    agent = Silent()
    demonstrator = Demonstrator(agent, table, spec, ScheduleSettings(), 1, np.random.default_rng(0))  # type: ignore[arg-type]
    centre = max(table.default_level, len(table.levels) - 1 - table.default_level)
    level = table.default_level
    seen = []
    for progress in np.linspace(0.0, 0.85, 12):
        obs = np.zeros((1, spec.size), np.float32)
        obs[0, spec.names.index("progress")] = progress
        obs[0, spec.names.index("level")] = (level - table.default_level) / centre
        targets = [a.level if a.level is not None else level + a.move for a in table.actions]
        mask = np.array([[0 <= t < len(table.levels) for t in targets]])
        action = int(demonstrator.act(obs, mask, explore=True)[0])
        assert mask[0, action]
        assert table.actions[action].choice is UpdateChoice.NONE
        level = targets[action]
        seen.append(level - table.default_level)
    assert max(abs(place) for place in seen[:3]) <= 4
    demonstrator.observe()
    demonstrator.end_episodes()
    assert (agent.observed, agent.ended) == (1, 1)
