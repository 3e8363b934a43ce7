"""Members of a group leave the default level as planned, each in its own way, and the one that holds does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.observation import ObservationSpec
from numpy.typing import NDArray

from llmrl.config import TrainConfig
from llmrl.training.deviations import LATEST_PROGRESS, Deviator, deviation_plan

TABLE = action_table("moves_only")
SPEC = ObservationSpec(TABLE)


class Silent:
    """An agent that counts what it is told."""

    def __init__(self) -> None:
        self.observed = self.ended = 0

    def observe(self, *_: Any, **__: Any) -> None:
        self.observed += 1

    def end_episodes(self) -> None:
        self.ended += 1


def places(deviator: Deviator, num_envs: int, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Grid places from the default after each of 20 decisions, [20, E]."""
    moves = np.array([action.move for action in TABLE.actions])
    found, now = [], np.zeros(num_envs, np.int64)
    for progress in np.linspace(0.0, 0.95, 20):
        obs = np.zeros((num_envs, SPEC.size), np.float32)
        obs[:, SPEC.names.index("progress")] = progress
        now = now + moves[deviator.act(obs, mask, explore=True)]
        found.append(now)
    return np.array(found)


def test_each_member_of_a_group_deviates_in_its_own_way_and_the_first_holds() -> None:
    agent = Silent()
    deviator = Deviator(agent, TABLE, SPEC, 18, 9, np.random.default_rng(0))  # type: ignore[arg-type]
    found = places(deviator, 18, np.ones((18, 5), np.bool_))
    constant = [0, -2, -1, 1, 2]
    assert (found[:, :5] == constant).all()
    assert (found[:, 9:14] == constant).all()
    assert (found[1:, 5] == 3).all()
    assert (found[1:, 6] == 4).all()
    assert (found[-1, [7, 8, 16, 17]] != 0).any()
    deviator.observe()
    deviator.end_episodes()
    assert (agent.observed, agent.ended) == (1, 1)


def test_a_move_that_is_not_available_is_not_made() -> None:
    deviator = Deviator(Silent(), TABLE, SPEC, 9, 9, np.random.default_rng(0))  # type: ignore[arg-type]
    only_hold = np.zeros((9, 5), np.bool_)
    only_hold[:, TABLE.hold] = True
    assert (places(deviator, 9, only_hold) == 0).all()


def test_random_moves_are_due_in_order_before_the_level_is_final() -> None:
    rng = np.random.default_rng(1)
    plans = [deviation_plan(7, rng) for _ in range(200)]
    assert {len(plan) for plan in plans} == {1, 2}
    for plan in plans:
        due = [progress for progress, _ in plan]
        assert due == sorted(due)
        assert max(due) < LATEST_PROGRESS
    assert np.median([plan[0][0] for plan in plans]) < 0.35


def test_a_table_without_moves_is_refused() -> None:
    with pytest.raises(ValueError, match="plain moves"):
        Deviator(Silent(), action_table("levels"), SPEC, 1, 1, np.random.default_rng(0))  # type: ignore[arg-type]


def test_holding_is_a_baseline_for_groups_alone() -> None:
    env = {"tasks": {"tasks": [{"data": "builtin:json"}]}, "reward": {"baseline": "hold", "measured": "end"}}
    with pytest.raises(ValueError, match=r"env\.groups"):
        TrainConfig.model_validate({"env": env})
    assert TrainConfig.model_validate({"env": {**env, "population": 4, "groups": 2}}).env.groups == 2
