"""Makes the population of a configuration: as many jobs as were asked for, or as fit."""

from __future__ import annotations

from typing import Any

import torch
from llmrl_envs.cores import population_workers
from llmrl_envs.interface.action import UpdateChoice, action_table
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.population.memory import fitting_jobs, free_bytes, job_memory
from llmrl_envs.jobs.population.passes import is_out_of_memory
from llmrl_envs.jobs.population.pool import PopulationPool
from llmrl_envs.vector_fine_tuning import FineTuningVectorEnv

from llmrl.config_env import EnvConfig
from llmrl.failures import print_message

WORKER_BYTES = 500 * 2**20
"""Resident memory of a worker process beside its models and jobs: Python, torch and transformers."""


def make_population(
    config: EnvConfig, library: JobLibrary, arguments: dict[str, Any], *, num_evaluated: int = 0
) -> FineTuningVectorEnv:
    """The population of a configuration.

    With `population: auto`, and on a GPU always, it is tried with one step first: while the memory does not suffice the
    number of jobs is halved, with a message.

    Args:
        config: The section `env`, for fine-tuning.
        library: Loaded models; evaluation may share them.
        arguments: Arguments of the environment.
        num_evaluated: Jobs of another population that is to find memory too.
    """
    automatic = config.population == "auto"
    num_jobs = fitting_population(config, library, num_evaluated) if config.population == "auto" else config.population
    groups = config.groups
    if automatic:
        print_message("population", f"{num_jobs} jobs fit", style="cyan")
    while True:
        env = FineTuningVectorEnv(
            num_jobs, config.tasks, library=library, groups=groups, workers=config.population_workers, **arguments
        )
        if not automatic and library.device.type != "cuda":
            return env
        width = _possible_width(env, num_jobs)
        if width >= num_jobs or num_jobs <= groups:
            return env
        smaller = max(num_jobs // 2 // groups, 1) * groups
        print_message("out of memory", f"{num_jobs} jobs do not fit; going on with {smaller}", style="yellow")
        num_jobs = smaller
        env.close()
        del env
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _possible_width(env: FineTuningVectorEnv, num_jobs: int) -> int:
    """Jobs that go through the model at once in a rehearsal; fewer than `num_jobs` where these do not fit."""
    try:
        return env.rehearse()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return num_jobs // 2


def make_evaluation_population(
    config: EnvConfig, library: JobLibrary, arguments: dict[str, Any], *, num_jobs: int, num_episodes: int
) -> FineTuningVectorEnv:
    """A population for episodes of its own: as many lanes as these need, in rounds of equal size.

    Args:
        config: The section `env`, for fine-tuning.
        library: Loaded models.
        arguments: Arguments of the environment.
        num_jobs: Most lanes.
        num_episodes: Episodes to run.
    """
    num_rounds = -(-num_episodes // num_jobs)
    lanes = -(-num_episodes // num_rounds)
    asked = config.population_workers
    workers = asked if asked == "auto" else min(asked, lanes)
    return FineTuningVectorEnv(lanes, config.tasks, library=library, workers=workers, restarts=False, **arguments)


def fitting_population(config: EnvConfig, library: JobLibrary, num_evaluated: int = 0) -> int:
    """How many jobs of the dearest task fit, a multiple of the groups; with what workers take beside them.

    Args:
        config: The section `env`, for fine-tuning.
        library: Loads models and data.
        num_evaluated: Jobs of another population, which may have half of the memory.
    """
    assert config.tasks is not None
    rolls_back = any(action.choice is UpdateChoice.ROLLBACK for action in action_table(config.actions).actions)
    averaged = config.reward.average_intervals > 0
    pool = PopulationPool(library, averaged=averaged)
    jobs = [library.job(task) for task in config.tasks.tasks]
    memories = [job_memory(pool.session(job), job, rolls_back=rolls_back, averaged=averaged) for job in jobs]
    dearest = max(memories, key=lambda memory: memory.total)
    free = free_bytes(library.device)
    free -= min(num_evaluated * dearest.total, free // 2)
    models = {id(job.loaded): job.loaded.model for job in jobs}
    model_bytes = sum(p.numel() * p.element_size() for model in models.values() for p in model.parameters())

    def fit(available: int) -> int:
        found = fitting_jobs(dearest, library.device, available)
        return max(found // config.groups, 1) * config.groups

    num_jobs = fit(free)
    workers = population_workers(config.population_workers, num_jobs, config.groups, library.device)
    return num_jobs if workers == 1 else fit(max(free - workers * (WORKER_BYTES + model_bytes), 0))
