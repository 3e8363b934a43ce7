"""Greedy episodes: those of a population are those of single environments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from llmrl_envs.fine_tuning import FineTuningEnv
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.vector_fine_tuning import FineTuningVectorEnv

from llmrl.config_env import EnvConfig
from llmrl.training.evaluation import evaluate
from llmrl.training.setup import make_environment, make_evaluation_environment

TASK: dict[str, Any] = {
    "data": "builtin:json", "steps": 8, "batch_size": 2, "max_length": 16, "validation_examples": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def library() -> JobLibrary:
    return JobLibrary("cpu")


def env_config(**changes: Any) -> EnvConfig:
    tasks = {"tasks": [TASK], "num_seeds": 2, "steps_range": [4, 12]}
    return EnvConfig.model_validate({"tasks": tasks, "device": "cpu", "population": 3, **changes})


def climb(obs: Any, mask: Any) -> Any:
    """The last action that there is, and holding in the second half."""
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    return np.where(obs[:, 0] > 0.5, 2, last)


def test_episodes_together_are_those_of_single_environments(library: JobLibrary) -> None:
    config = env_config()
    training = make_environment(config, library)
    together = make_evaluation_environment(config, training, library, 5)
    assert isinstance(together, FineTuningVectorEnv)
    assert together.num_envs == 3, "two rounds: of three and of two episodes"
    alone = make_evaluation_environment(env_config(population=1), training.unwrapped, library, 1)
    assert isinstance(alone, FineTuningEnv)
    for seed in (0, 1):
        found = evaluate(together, climb, seed=seed, num_episodes=5)
        wanted = evaluate(alone, climb, seed=seed, num_episodes=5)
        assert vars(found) == pytest.approx(vars(wanted), rel=1e-3, abs=1e-4)
        assert evaluate(together, climb, seed=seed, num_episodes=5) == found


def test_an_evaluation_leaves_the_training_as_it_was(library: JobLibrary) -> None:
    config = env_config()
    traces = []
    for evaluated in (False, True):
        env = make_environment(config, library)
        assert isinstance(env, FineTuningVectorEnv)
        env.reset(seed=0)
        env.step(np.full(3, 2))
        if evaluated:
            evaluate(make_evaluation_environment(config, env, library, 3), climb, seed=0, num_episodes=3)
        traces.append([env.step(np.full(3, 2))[0].tobytes() for _ in range(4)])
    assert traces[0] == traces[1]
