"""The problems of `solve.py`: their environments, and the settings that solve them.

Settings were chosen on seeds from 100 on; reported seeds start at 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium
from catch import NUM_FRAMES, make_catch
from known_optima import (
    grid_world_details,
    make_grid_world,
    make_quadratic,
    make_quadratics,
    noisy_quadratic_details,
)


@dataclass(frozen=True)
class Problem:
    """An environment and the settings that solve it; `settings` takes the number of environment steps."""

    make: Callable[[], gymnasium.Env[Any, Any]]
    settings: Callable[[int], dict[str, Any]]
    details: Callable[[Any, int], dict[str, Any]] = field(default=lambda agent, steps: {})
    num_episodes: int = 100
    make_training: Callable[[], Any] | None = None  # a vector environment to train in; without, what `make` makes


def gym(name: str) -> Callable[[], gymnasium.Env[Any, Any]]:
    """A registered environment, made when called."""
    return lambda: gymnasium.make(name)


def decaying(steps: int, learning_rate: float, replay_ratio: float = 1.0) -> dict[str, Any]:
    """Learning rate that falls linearly to zero over the run, so that the last policy is not one in passing."""
    updates = max(int(steps * replay_ratio), 1)
    return {
        "learning_rate": learning_rate,
        "learning_rate_end": 0.0,
        "learning_rate_decay_steps": updates,
        "replay_ratio": replay_ratio,
    }


def grid_world(steps: int) -> dict[str, Any]:
    """Every action keeps being tried, since the values of all of them are compared."""
    return {
        **decaying(steps, 2e-3),
        "gamma": 0.9,
        "n_step": 1,
        "hidden_sizes": (64,),
        "batch_size": 32,
        "learning_starts": 100,
        "epsilon_end": 1.0,
        "target_ema": 0.02,
    }


def cart_pole(steps: int) -> dict[str, Any]:
    """A cart that drifts away slowly shows in small differences of value: Munchausen widens them."""
    return {
        **decaying(steps, 5e-4),
        "n_step": 5,
        "batch_size": 128,
        "munchausen": True,
        "epsilon_decay_steps": min(max(steps // 5, 1), 4_000),
    }


def lunar_lander(steps: int) -> dict[str, Any]:
    """Rewards of +-100 scaled to the range that the Huber loss is made for."""
    return {
        **decaying(steps, 5e-4),
        "n_step": 3,
        "batch_size": 64,
        "munchausen": True,
        "reward_scale": 0.1,
        "epsilon_decay_steps": max(steps // 8, 1),
    }


def acrobot(steps: int) -> dict[str, Any]:
    """Reward -1 a step until the goal. One action is worth little: a distribution of returns is what orders them."""
    return {
        **decaying(steps, 1e-3, 0.5),
        "head": "categorical",
        "value_min": -10.0,
        "value_max": 0.0,
        "hidden_sizes": (256, 256),
        "n_step": 3,
        "batch_size": 64,
        "reward_scale": 0.1,
        "epsilon_decay_steps": max(steps // 8, 1),
    }


def mountain_car(steps: int) -> dict[str, Any]:
    """The goal is met by chance only if exploratory actions last: they repeat; velocities are tiny: standardised.

    They last until the end: with fewer of them one seed in three settles on a policy that swings once too often. Long
    returns carry the goal's news back, but hold what was explored: they shrink to one step by five sixths of the run.
    """
    settings = decaying(steps, 1e-3, 0.5)
    return {
        **settings,
        "n_step": 10,
        "n_step_end": 1,
        "horizon_learner_steps": max(settings["learning_rate_decay_steps"] * 5 // 6, 1),
        "batch_size": 64,
        "reward_scale": 0.1,
        "normalize_obs": True,
        "exploration_max_repeat": 32,
        "epsilon_decay_steps": max(steps // 4, 1),
    }


def noisy_quadratic(steps: int) -> dict[str, Any]:
    """Decisions are cheap and what sets actions apart is small: few updates, large batches, returns to the end.

    Munchausen widens the difference, so that fewer jobs are left at a rate that ruins them.
    """
    return {
        **decaying(steps, 2e-3, 0.04),
        "munchausen": True,
        "gamma": 1.0,
        "n_step": 30,
        "batch_size": 512,
        "reward_scale": 5.0,
        "target_ema": 0.01,
        "replay_capacity": 200_000,
        "learning_starts": min(20_000, max(steps // 10, 1)),
        "epsilon_start": 0.3,
        "epsilon_end": 0.01,
        "epsilon_decay_steps": max(steps // 4, 1),
    }


def catch(steps: int) -> dict[str, Any]:
    """The published convolutions on frames."""
    return {
        **decaying(steps, 5e-4, 0.25),
        "torso": "cnn",
        "hidden_sizes": (128,),
        "batch_size": 32,
        "n_step": 5,
        "gamma": 0.97,
        "replay_capacity": 20_000,
        "epsilon_decay_steps": max(steps // 4, 1),
    }


def make_atari(name: str, *, training: bool = False) -> gymnasium.Env[Any, Any]:
    """An Atari game as in Mnih et al. 2015: 84x84 grey frames, one in four, four stacked; needs the extra `games`.

    In training a lost life ends the episode, in evaluation the game's end does.
    """
    import ale_py
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    gymnasium.register_envs(ale_py)
    game = gymnasium.make(name, frameskip=1)
    return FrameStackObservation(AtariPreprocessing(game, terminal_on_life_loss=training), NUM_FRAMES)


def atari(steps: int) -> dict[str, Any]:
    """The published network, on a replay buffer that fits a small machine."""
    return {
        "torso": "cnn",
        "hidden_sizes": (512,),
        "batch_size": 32,
        "learning_rate": 1e-4,
        "replay_ratio": 0.25,
        "replay_capacity": 100_000,
        "learning_starts": min(2_000, max(steps // 10, 1)),
        "reward_clip": 1.0,
        "epsilon_end": 0.01,
        "epsilon_decay_steps": max(steps // 4, 1),
    }


PROBLEMS = {
    "GridWorld": Problem(make_grid_world, grid_world, grid_world_details),
    "CartPole-v1": Problem(gym("CartPole-v1"), cart_pole),
    "LunarLander-v3": Problem(gym("LunarLander-v3"), lunar_lander),
    "Acrobot-v1": Problem(gym("Acrobot-v1"), acrobot),
    "MountainCar-v0": Problem(gym("MountainCar-v0"), mountain_car),
    "NoisyQuadratic": Problem(
        make_quadratic, noisy_quadratic, noisy_quadratic_details, num_episodes=200, make_training=make_quadratics
    ),
    "Catch": Problem(make_catch, catch),
}


def problem_of(name: str) -> Problem:
    """A problem by name; `ALE/...` is any Atari game.

    Raises:
        ValueError: No problem has the name.
    """
    if name.startswith("ALE/"):
        return Problem(
            lambda: make_atari(name), atari, num_episodes=5, make_training=lambda: make_atari(name, training=True)
        )
    if name not in PROBLEMS:
        raise ValueError(f"env: expected one of {sorted(PROBLEMS)} or ALE/NAME, got {name!r}")
    return PROBLEMS[name]


def settings_of(problem: Problem, steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    """The problem's settings with changes; what changes over the run's updates does so for another replay ratio too."""
    settings = problem.settings(steps)
    if "replay_ratio" in changes and "learning_rate_decay_steps" in settings:
        times = changes["replay_ratio"] / settings["replay_ratio"]
        for name in ("learning_rate_decay_steps", "horizon_learner_steps"):
            if name in settings:
                settings[name] = max(round(settings[name] * times), 1)
    return {**settings, **changes}
