"""From a configuration to an environment and an agent."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv
from llmrl_envs.errors import UserError
from llmrl_envs.fine_tuning import FineTuningEnv
from llmrl_envs.interface.action import ActionTable
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.vector_fine_tuning import FineTuningVectorEnv

from llmrl.config import TrainConfig
from llmrl.config_env import FINE_TUNING_ID, NOISY_QUADRATIC_ID, EnvConfig
from llmrl.dqn.agent import DQNAgent
from llmrl.dqn.interface import Agent
from llmrl.dqn.reinforce import ReinforceAgent
from llmrl.dqn.tabular import TabularAgent
from llmrl.training.population import make_evaluation_population, make_population
from llmrl.training.processes import OneProcess, Processes
from llmrl.training.sharing import connect, process_settings

Environment = gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any]


def make_environment(config: EnvConfig, library: JobLibrary | None = None, *, num_evaluated: int = 0) -> Environment:
    """The environment that the configuration names: single, or a vector environment for a population.

    Args:
        config: The section `env`.
        library: Loaded models to share with other environments that never run at the same time.
        num_evaluated: Jobs that an evaluation runs beside a population whose size follows from the memory.

    Raises:
        UserError: Gymnasium knows no such environment, or it refuses its arguments.
    """
    if config.id == FINE_TUNING_ID and config.population != 1:
        return _many_fine_tunings(config, library, num_evaluated)
    if config.population == 1:
        return make_single_environment(config, library)
    with _named_failures(config):
        return gymnasium.make_vec(_qualified(config.id), num_envs=int(config.population), **_arguments(config))


def _many_fine_tunings(config: EnvConfig, library: JobLibrary | None, num_evaluated: int) -> Environment:
    if config.vectorization == "population":
        library = library or JobLibrary(config.device)
        return make_population(config, library, _population_arguments(config), num_evaluated=num_evaluated)
    makers = [lambda: make_fine_tuning(config, None)] * int(config.population)
    same_step = gymnasium.vector.AutoresetMode.SAME_STEP
    if config.vectorization == "sync":
        return gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=same_step)
    return gymnasium.vector.AsyncVectorEnv(makers, autoreset_mode=same_step)


def make_evaluation_environment(
    config: EnvConfig, env: Environment, library: JobLibrary | None, num_episodes: int
) -> Environment:
    """The environment for greedy episodes away from `env`: a population beside a population, otherwise a single one.

    Its jobs begin at the default level, with no member beside them to compare.

    Args:
        config: The section `env`.
        env: The environment of the training.
        library: Loaded models, shared with `env`.
        num_episodes: Episodes of one evaluation.
    """
    config = _alone(config)
    if not isinstance(env, FineTuningVectorEnv) or num_episodes == 1:
        return make_single_environment(config, library)
    library, arguments = library or JobLibrary(config.device), _population_arguments(config)
    return make_evaluation_population(config, library, arguments, num_jobs=env.num_envs, num_episodes=num_episodes)


def _alone(config: EnvConfig) -> EnvConfig:
    changes: dict[str, Any] = {}
    if config.reward.baseline == "hold":
        changes["reward"] = dataclasses.replace(config.reward, baseline="none")
    if config.tasks is not None:
        changes["tasks"] = config.tasks.model_copy(update={"start_moves": (0,)})
    return config.model_copy(update=changes)


def _population_arguments(config: EnvConfig) -> dict[str, Any]:
    return {"device": config.device, **schedule_arguments(config)}


def make_single_environment(config: EnvConfig, library: JobLibrary | None = None) -> gymnasium.Env[Any, Any]:
    """One environment of the kind that the configuration names, whatever its population."""
    if config.id == FINE_TUNING_ID:
        return make_fine_tuning(config, library)
    with _named_failures(config):
        return gymnasium.make(_qualified(config.id), **_arguments(config))


def _arguments(config: EnvConfig) -> dict[str, Any]:
    return schedule_arguments(config) if config.id == NOISY_QUADRATIC_ID else dict(config.kwargs)


def _qualified(environment_id: str) -> str:
    return f"llmrl_envs:{environment_id}" if environment_id.startswith("llmrl/") else environment_id


@contextmanager
def _named_failures(config: EnvConfig) -> Iterator[None]:
    try:
        yield
    except (gymnasium.error.Error, TypeError, ModuleNotFoundError) as error:
        raise UserError("the environment cannot be made", got=f"{config.id}: {error}", where="env.id") from error


def schedule_arguments(config: EnvConfig) -> dict[str, Any]:
    """Arguments that the fine-tuning and the noisy-quadratic environment share."""
    return {
        "actions": config.actions,
        "observation": config.observation.model_dump(),
        "reward": dict(vars(config.reward)),
        "schedule": dict(vars(config.schedule)),
        **config.kwargs,
    }


def make_fine_tuning(config: EnvConfig, library: JobLibrary | None) -> FineTuningEnv:
    """The fine-tuning environment of a configuration."""
    return FineTuningEnv(config.tasks, device=config.device, library=library, **schedule_arguments(config))


def make_agent(config: TrainConfig, env: Environment, processes: Processes | None = None) -> Agent:
    """The agent of a configuration, for an environment.

    Args:
        config: The configuration.
        env: The environment.
        processes: Those that learn together; not given: this one alone.

    Raises:
        UserError: The environment's spaces or the number of processes are not for this agent.
    """
    processes = processes or OneProcess()
    space = env.single_observation_space if isinstance(env, VectorEnv) else env.observation_space
    actions = env.single_action_space if isinstance(env, VectorEnv) else env.action_space
    if not isinstance(space, gymnasium.spaces.Box) or not isinstance(actions, gymnasium.spaces.Discrete):
        raise UserError(
            "the agents need a Box observation and a Discrete action space",
            got=f"{space} and {actions}",
            where="env.id",
        )
    shapes: dict[str, Any] = {
        "num_envs": env.num_envs if isinstance(env, VectorEnv) else 1,
        "obs_shape": space.shape,
        "num_actions": int(actions.n),
    }
    settings = config.agent.dqn(config.seed)
    if config.agent.name != "dqn" and processes.num_processes > 1:
        raise UserError(
            f"{config.agent.name} learns in one process",
            expected="dqn, or llmrl train without a launcher",
            got=f"{processes.num_processes} processes",
            where="agent.name",
        )
    if config.agent.name == "tabular":
        return TabularAgent(settings, **shapes)
    if config.agent.name == "reinforce":
        return ReinforceAgent(settings, **shapes)
    dtype = np.uint8 if space.dtype == np.uint8 else np.float32
    language = schedule_language(env)
    if config.agent.ignored_features:
        ignored = _positions(config.agent.ignored_features, language[1].names if language else ())
        settings = settings.model_copy(update={"ignored_obs": ignored})
    metadata = {"actions": language[0].hash, "observation": language[1].hash} if language else None
    if processes.num_processes == 1:
        return DQNAgent(settings, **shapes, obs_dtype=dtype, metadata=metadata)
    own = process_settings(settings, processes.rank, processes.num_processes)
    agent = DQNAgent(own, **shapes, obs_dtype=dtype, metadata=metadata, rank=processes.rank)
    connect(agent, settings.batch_size, processes)
    return agent


def _positions(patterns: tuple[str, ...], names: tuple[str, ...]) -> tuple[int, ...]:
    """Positions of the features whose name, without its age, matches one of the patterns."""
    plain = [name.split("@")[0] for name in names]
    for pattern in patterns:
        if not fnmatch.filter(plain, pattern):
            raise UserError(
                "no such feature to ignore",
                expected=f"one of {', '.join(dict.fromkeys(plain))}" if plain else "an environment with named features",
                got=pattern,
                where="agent.ignored_features",
            )
    return tuple(i for i, name in enumerate(plain) if any(fnmatch.fnmatchcase(name, p) for p in patterns))


def schedule_language(env: Environment) -> tuple[ActionTable, ObservationSpec, ScheduleSettings] | None:
    """Action table, observation and schedule of an environment whose policies steer jobs; None for any other."""
    inner: Any = env
    if isinstance(env, gymnasium.vector.SyncVectorEnv):
        inner = env.envs[0]
    if isinstance(env, gymnasium.vector.AsyncVectorEnv):
        names = ("table", "observation_spec", "schedule_settings")
        inner = SimpleNamespace(**{name: env.get_attr(name)[0] for name in names})
    inner = getattr(inner, "unwrapped", inner)
    table, spec = getattr(inner, "table", None), getattr(inner, "observation_spec", None)
    if not isinstance(table, ActionTable) or not isinstance(spec, ObservationSpec):
        return None
    settings = getattr(inner, "schedule_settings", ScheduleSettings())
    return table, spec, settings
