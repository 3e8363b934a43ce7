"""Greedy episodes on a fixed set of jobs, away from the training's random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv
from llmrl_envs.jobs.loading import JobLibrary
from numpy.typing import NDArray

from llmrl.config import TrainConfig
from llmrl.config_env import FINE_TUNING_ID
from llmrl.dqn.interface import Agent
from llmrl.dqn.lanes import episode_seed
from llmrl.policy import SchedulePolicy
from llmrl.training.setup import Environment, make_environment, make_evaluation_environment, schedule_language

EVALUATION_STREAM = 1_000_003
"""Added to the run's seed, so that no evaluation job is a training job."""

Act = Callable[[NDArray[Any], NDArray[np.bool_]], NDArray[np.int64]]


@dataclass(frozen=True)
class EvaluationResult:
    """Means over the evaluation episodes.

    Attributes:
        episode_return: Undiscounted.
        score: The environment's `info["score"]` at the end (for fine-tuning: improvement over that of the linear decay
            from the default rate); the return where the environment gives none.
        diverged: Share of episodes that ended with `info["diverged"]`.
    """

    episode_return: float
    score: float
    diverged: float


class Evaluator:
    """Greedy episodes of an agent; for schedules beside holding on the same jobs.

    Args:
        env: A single environment, or a vector environment whose lanes rest when their episode is over.
        agent: Whose policy it is.
        seed: The run's seed.
        num_episodes: Episodes of one evaluation.
    """

    def __init__(self, env: Environment, agent: Agent, *, seed: int, num_episodes: int) -> None:
        self.env, self._agent = env, agent
        self._seed, self._num_episodes = seed, num_episodes
        self._language = schedule_language(env)
        self._hold: EvaluationResult | None = None

    def evaluate(self) -> dict[str, float]:
        """What an `EvaluationResult` holds, and for schedules `hold_score`."""
        values: dict[str, float] = dict(vars(self._run(lambda obs, mask: self._agent.act(obs, mask, explore=False))))
        if self._language is not None:
            hold = self._language[0].hold
            if self._hold is None:
                self._hold = self._run(lambda obs, mask: np.full(len(obs), hold))
            values["hold_score"] = self._hold.score
        return values

    def hold_state(self) -> dict[str, float] | None:
        """What holding achieved, as JSON values; it is measured once in a run."""
        return None if self._hold is None else dict(vars(self._hold))

    def load_hold_state(self, state: dict[str, float] | None) -> None:
        """Goes on with what `hold_state` gave."""
        self._hold = None if state is None else EvaluationResult(**state)

    def _run(self, act: Act) -> EvaluationResult:
        return evaluate(self.env, act, seed=self._seed, num_episodes=self._num_episodes)


def evaluate(env: Environment, act: Act, *, seed: int, num_episodes: int) -> EvaluationResult:
    """Runs the same episodes for every call with the same seed.

    Args:
        env: A single environment, or a vector environment whose lanes rest when their episode is over; episodes are
            reset with seeds of their own.
        act: Actions int64[E] for observations [E, ...] and masks bool[E, A].
        seed: The run's seed.
        num_episodes: Episodes.
    """
    seeds = [episode_seed(seed + EVALUATION_STREAM, index) for index in range(num_episodes)]
    if isinstance(env, VectorEnv):
        rows = [row for first in range(0, num_episodes, env.num_envs) for row in _round(env, act, seeds[first:])]
    else:
        rows = [_episode(env, act, own) for own in seeds]
    means = np.array(rows).mean(axis=0)
    return EvaluationResult(*(float(value) for value in means))


def evaluate_policy(config: TrainConfig, policy: SchedulePolicy) -> EvaluationResult:
    """Greedy episodes of a policy on the jobs that a training with a configuration is judged by.

    Args:
        config: The training's; its seed tells which jobs.
        policy: Made for the observations and actions of that training.
    """
    library = JobLibrary(config.env.device) if config.env.id == FINE_TUNING_ID else None
    num_episodes = config.training.evaluation_episodes
    env = make_environment(config.env, library, num_evaluated=num_episodes)
    judged = make_evaluation_environment(config.env, env, library, num_episodes)
    return evaluate(
        judged, lambda obs, mask: policy.act(obs, mask).actions, seed=config.seed, num_episodes=num_episodes
    )


def _episode(env: gymnasium.Env[Any, Any], act: Act, seed: int) -> tuple[float, float, float]:
    obs, info = env.reset(seed=seed)
    total, over = 0.0, False
    while not over:
        mask = info.get("action_mask")
        num_actions = int(env.action_space.n)  # type: ignore[attr-defined]
        available = np.ones(num_actions, np.bool_) if mask is None else np.asarray(mask, np.bool_)
        action = act(np.asarray(obs)[None], available[None])
        obs, reward, terminated, truncated, info = env.step(int(action[0]))
        total += float(reward)
        over = bool(terminated or truncated)
    return total, float(info.get("score", total)), float(info.get("diverged", False))


def _round(env: VectorEnv[Any, Any, Any], act: Act, seeds: list[int]) -> list[tuple[float, float, float]]:
    """An episode of each lane, for the first of `seeds`; lanes for which there is none repeat the last."""
    count = min(env.num_envs, len(seeds))
    every = [*seeds[:count], *seeds[count - 1 : count] * (env.num_envs - count)]
    obs, infos = env.reset(seed=every)  # type: ignore[arg-type] # every vector environment takes one for each lane
    total, over = np.zeros(env.num_envs), np.zeros(env.num_envs, np.bool_)
    while not over[:count].all():
        actions = act(np.asarray(obs), np.asarray(infos["action_mask"], np.bool_))
        obs, rewards, terminations, truncations, infos = env.step(actions)
        total += np.where(over, 0.0, rewards)
        over |= terminations | truncations
    ended = zip(total, infos["score"], infos["diverged"], strict=True)
    return [(float(paid), float(score), float(diverged)) for paid, score, diverged in ended][:count]
