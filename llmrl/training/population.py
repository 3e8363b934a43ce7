"""Makes the population of a configuration: as many jobs as were asked for, or as fit."""

from __future__ import annotations

from typing import Any

import torch
from llmrl_envs.interface.action import UpdateChoice, action_table
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.population.memory import fitting_jobs, job_memory
from llmrl_envs.jobs.population.passes import is_out_of_memory
from llmrl_envs.jobs.population.pool import PopulationPool
from llmrl_envs.vector_fine_tuning import FineTuningVectorEnv

from llmrl.config import EnvConfig
from llmrl.failures import print_message


def make_population(config: EnvConfig, library: JobLibrary, arguments: dict[str, Any]) -> FineTuningVectorEnv:
    """The population of a configuration.

    With `population: auto`, and on a GPU always, it is tried with one step first: while the memory does not suffice the
    number of jobs is halved, with a message.

    Args:
        config: The section `env`, for fine-tuning.
        library: Loaded models; evaluation may share them.
        arguments: Arguments of the environment.
    """
    automatic = config.population == "auto"
    num_jobs = _fitting(config, library) if config.population == "auto" else config.population
    groups = config.groups
    if automatic:
        num_jobs = max(num_jobs // groups, 1) * groups
        print_message("population", f"{num_jobs} jobs fit", style="cyan")
    while True:
        env = FineTuningVectorEnv(num_jobs, config.tasks, library=library, groups=groups, **arguments)
        if not automatic and library.device.type != "cuda":
            return env
        width = _possible_width(env, num_jobs)
        if width >= num_jobs or num_jobs <= groups:
            return env
        smaller = max(num_jobs // 2 // groups, 1) * groups
        print_message("out of memory", f"{num_jobs} jobs do not fit; going on with {smaller}", style="yellow")
        num_jobs = smaller
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


def _fitting(config: EnvConfig, library: JobLibrary) -> int:
    """How many jobs of the dearest task fit."""
    assert config.tasks is not None
    rolls_back = any(action.choice is UpdateChoice.ROLLBACK for action in action_table(config.actions).actions)
    averaged = config.reward.average_intervals > 0
    pool = PopulationPool(library, averaged=averaged)
    jobs = [library.job(task) for task in config.tasks.tasks]
    memories = [job_memory(pool.session(job), job, rolls_back=rolls_back, averaged=averaged) for job in jobs]
    return fitting_jobs(max(memories, key=lambda memory: memory.total), library.device)
