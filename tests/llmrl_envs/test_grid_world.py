"""GridWorld: the transition table, the known optimal values, and Gymnasium's conventions."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings

import gymnasium
import llmrl_envs
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from llmrl_envs.grid_world import GridWorldEnv, optimal_q, transition

UP, RIGHT, DOWN, LEFT = range(4)


def make(**arguments: object) -> gymnasium.Env:
    return gymnasium.make("llmrl/GridWorld-v0", **arguments)


@pytest.mark.parametrize(
    ("state", "action", "expected"),
    [
        (1, UP, (1, 0.0, False)),
        (1, LEFT, (1, 0.0, False)),
        (1, RIGHT, (2, 0.0, False)),
        (1, DOWN, (4, 0.0, False)),
        (3, RIGHT, (3, 0.0, False)),
        (3, DOWN, (6, -1.0, True)),
        (5, RIGHT, (6, -1.0, True)),
        (5, DOWN, (8, 1.0, True)),
        (9, UP, (6, -1.0, True)),
        (9, LEFT, (8, 1.0, True)),
        (9, DOWN, (9, 0.0, False)),
        (7, RIGHT, (8, 1.0, True)),
    ],
)
def test_transition(state: int, action: int, expected: tuple[int, float, bool]) -> None:
    assert transition(state, action) == expected


def test_optimal_values_by_hand() -> None:
    q = optimal_q()
    assert q.shape == (9, 4)
    assert q.dtype == np.float64
    # V*: one step from the goal 1, two steps 0.9, three steps 0.81, four steps 0.729.
    np.testing.assert_allclose(q.max(axis=1), [0.81, 0.9, 0.81, 0.9, 1.0, 0.0, 1.0, 0.0, 1.0], atol=1e-12)
    np.testing.assert_allclose(q[0], [0.729, 0.81, 0.81, 0.729], atol=1e-12)
    np.testing.assert_allclose(q[4], [0.81, -1.0, 1.0, 0.81], atol=1e-12)
    np.testing.assert_allclose(q[2], [0.729, 0.729, -1.0, 0.81], atol=1e-12)


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.99])
def test_optimal_values_satisfy_bellman(discount: float) -> None:
    q = optimal_q(discount)
    for state in (1, 2, 3, 4, 5, 7, 9):
        for action in range(4):
            next_state, reward, terminated = transition(state, action)
            target = reward if terminated else reward + discount * q[next_state - 1].max()
            assert q[state - 1, action] == pytest.approx(target, abs=1e-10)


def test_greedy_episode_reaches_the_goal_in_three_steps() -> None:
    env = make()
    obs, _ = env.reset(seed=0)
    q = env.unwrapped.optimal_q()
    rewards = []
    terminated = False
    while not terminated:
        obs, reward, terminated, truncated, info = env.step(int(q[int(obs.argmax())].argmax()))
        rewards.append(reward)
        assert not truncated
    assert rewards == [0.0, 0.0, 1.0]
    assert info["state"] == 8


def test_observation_is_one_hot_of_the_state() -> None:
    env = make()
    for state in (1, 2, 3, 4, 5, 7, 9):
        obs, info = env.reset(options={"state": state})
        assert info == {"state": state}
        assert obs.dtype == np.float32
        assert obs.tolist() == np.eye(9)[state - 1].tolist()


def test_long_episode_is_truncated_not_terminated() -> None:
    env = make()
    env.reset(seed=0)
    for step in range(1, 101):
        _, _, terminated, truncated, _ = env.step(UP)
        assert not terminated
        assert truncated == (step == 100)


def test_check_env_without_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(render_mode="ansi").unwrapped)


def test_render() -> None:
    env = make(render_mode="ansi")
    env.reset(seed=0)
    env.step(DOWN)
    assert env.render() == ". . .\nA . x\n. G .\n"


def test_bad_input() -> None:
    env = GridWorldEnv()
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(UP)
    with pytest.raises(ValueError, match=r"expected a non-final state of 1\.\.9, got 6"):
        env.reset(options={"state": 6})
    env.reset()
    for action in (-1, 4):
        with pytest.raises(ValueError, match=rf"expected an integer 0\.\.3, got {action}"):
            env.step(action)
    env.reset(options={"state": 5})
    env.step(DOWN)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(UP)
    with pytest.raises(ValueError, match="expected one of"):
        GridWorldEnv(render_mode="human")
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\), got 1.0"):
        optimal_q(1.0)


def test_registration_is_light_and_repeatable() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(llmrl_envs)
    code = "import sys, llmrl_envs, gymnasium; gymnasium.make('llmrl/GridWorld-v0'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
