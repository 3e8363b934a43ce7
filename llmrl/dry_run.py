"""Tries a configured job for a few steps and says what a whole one would take: tokens, memory, time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from llmrl_envs.cores import population_workers
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.schedule import Schedule
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.jobs.batches import batch_indices
from llmrl_envs.jobs.loading import Job, JobLibrary
from llmrl_envs.jobs.population.members import IntervalPlan
from llmrl_envs.jobs.population.session import PopulationSession
from llmrl_envs.jobs.saved_tensors import counted_saved_tensors
from llmrl_envs.jobs.session import FineTuningSession
from llmrl_envs.jobs.task import FineTuningTask

from llmrl.compare.names import ALWAYS_RATE_INDEPENDENT, METHOD_NAMES, NUM_JOBS, POLICY_NAMES, SEARCH_TRIALS
from llmrl.config import CompareConfig, FinetuneConfig, TrainConfig
from llmrl.config_base import Settings
from llmrl.config_env import FINE_TUNING_ID
from llmrl.training.population import fitting_population

NUM_TIMED_STEPS = 3
_TUNED = 0.0
"""Stands for the factor that only the sweep will tell."""
GENTLE_RATE = 1e-6
"""Rate of the tried steps: they are timed, not meant to learn."""


@dataclass(frozen=True)
class TaskTrial:
    """What a few steps of one task showed.

    Attributes:
        name: The task.
        precision: Number format of the forward pass.
        batch_shapes: Shape of each tensor of one forward pass.
        tokens_per_step: Tokens of one optimizer step, padding not counted.
        num_parameters: Parameters of the model.
        num_trained: Those that are trained.
        memory_bytes: By purpose: parameters, gradients, moments, activations.
        num_decisions: Decisions of a job.
        seconds_per_step: Wall time of an optimizer step.
        seconds_per_evaluation: Wall time of one pass over the validation subset.
        job_seconds: Estimated wall time of the job's steps.
        population: Jobs that are trained at once; the times are a job's share of them.
        workers: Processes that train these.
    """

    name: str
    precision: str
    batch_shapes: dict[str, tuple[int, ...]]
    tokens_per_step: float
    num_parameters: int
    num_trained: int
    memory_bytes: dict[str, int]
    num_decisions: int
    seconds_per_step: float
    seconds_per_evaluation: float
    job_seconds: float
    population: int = 1
    workers: int = 1


def try_task(
    task: FineTuningTask,
    library: JobLibrary,
    population: int = 1,
    workers: int = 1,
    settings: ScheduleSettings | None = None,
) -> TaskTrial:
    """Loads a task and trains it for a few steps at a rate that changes next to nothing.

    Args:
        task: The task.
        library: Loads models and data.
        population: Jobs that are trained at once.
        workers: Processes that train them; one's part is timed.
        settings: When decisions come; None takes the usual ones.

    Raises:
        UserError: Model or data cannot be loaded or do not fit the task.
    """
    job = library.job(task)
    session = FineTuningSession(job, seed=0)
    schedule = Schedule(action_table("factors"), np.array([task.steps]), np.array([GENTLE_RATE]))
    activations = _activation_bytes(session, schedule)
    num_timed = min(NUM_TIMED_STEPS, task.steps - session.step)
    before, tokens_before = time.perf_counter(), session.tokens_trained
    if num_timed:
        session.run_interval(num_timed, schedule)
        _wait(job.device)
    step_seconds = (time.perf_counter() - before) / max(num_timed, 1)
    tokens = (session.tokens_trained - tokens_before) / max(num_timed, 1)
    before = time.perf_counter()
    session.evaluate("validation")
    evaluation_seconds = time.perf_counter() - before
    if population > 1:
        step_seconds, evaluation_seconds = _population_seconds(job, population, workers)
    return TaskTrial(
        name=task.name,
        precision=session.precision.name,
        batch_shapes=_batch_shapes(job),
        tokens_per_step=tokens,
        num_parameters=job.loaded.num_parameters,
        num_trained=sum(parameter.numel() for parameter in job.loaded.trainable.values()),
        memory_bytes={**_state_bytes(job), "activations": activations},
        num_decisions=len((settings or ScheduleSettings()).intervals(task.steps)),
        seconds_per_step=step_seconds,
        seconds_per_evaluation=evaluation_seconds,
        job_seconds=task.steps * step_seconds,
        population=population,
        workers=workers,
    )


def population_of(config: Settings, library: JobLibrary) -> tuple[int, int]:
    """Jobs that a training runs at once, and its workers; (1, 1) of any other command.

    Args:
        config: The configuration.
        library: Loads models and data, where the number follows from the memory.
    """
    if not isinstance(config, TrainConfig) or config.env.population == 1 or config.env.vectorization != "population":
        return 1, 1
    env = config.env
    size = fitting_population(env, library) if env.population == "auto" else env.population
    return size, population_workers(env.population_workers, size, env.groups, library.device)


def _population_seconds(job: Job, population: int, workers: int) -> tuple[float, float]:
    """A job's share of the wall time of an optimizer step and of a pass over the validation subset."""
    lanes, threads = -(-population // workers), torch.get_num_threads()
    try:
        if workers > 1:
            torch.set_num_threads(1)
        session = PopulationSession(job)
        session.reserve(lanes)
        members = [session.add(job, seed) for seed in range(lanes)]
        plans = [IntervalPlan(member, np.full(NUM_TIMED_STEPS, GENTLE_RATE), 1.0) for member in members]
        begun = time.perf_counter()
        session.run_interval(plans)
        _wait(job.device)
        trained = time.perf_counter()
        session.evaluate(members, "validation")
        evaluated = time.perf_counter()
    finally:
        torch.set_num_threads(threads)
    return (trained - begun) / NUM_TIMED_STEPS / population, (evaluated - trained) / population


def tasks_of(config: Settings) -> tuple[FineTuningTask, ...]:
    """The fine-tuning tasks of a configuration; none for a training in another environment."""
    if isinstance(config, TrainConfig):
        return config.env.tasks.tasks if config.env.id == FINE_TUNING_ID and config.env.tasks else ()
    if isinstance(config, FinetuneConfig):
        return (config.task,)
    return config.all_tasks if isinstance(config, CompareConfig) else ()


def schedule_settings_of(config: Settings) -> ScheduleSettings | None:
    """The schedule settings that a configuration gives its jobs; None where they are the policy's."""
    if isinstance(config, TrainConfig):
        return config.env.schedule
    return config.schedule if isinstance(config, FinetuneConfig | CompareConfig) else None


def estimate_seconds(config: Settings, trials: tuple[TaskTrial, ...]) -> float:
    """Wall time of the whole command, from the time of a job of each task; learning and plots not counted.

    A training evaluates at every decision and runs a reference for each task and seed; for a comparison see
    `num_compared_runs`.
    """
    if not trials:
        return float("nan")
    if isinstance(config, TrainConfig):
        return _training_seconds(config, trials)
    if isinstance(config, CompareConfig):
        usual = [trial.job_seconds for trial in trials[: len(config.tasks)]]
        stress = [trial.job_seconds for trial in trials[len(config.tasks) :]]
        a_seed = num_compared_runs(config) * sum(usual) + num_compared_runs(config, stress=True) * sum(stress)
        return len(config.seeds) * a_seed / config.workers
    return sum(trial.job_seconds for trial in trials)


def num_compared_runs(config: CompareConfig, *, stress: bool = False) -> int:
    """Different runs of a comparison for one task and seed, as far as the configuration tells without its policies.

    A usual schedule runs once for every starting rate, and linear decay shares its runs with the sweep. A policy runs
    once, because the level that it starts at does not depend on the rate; one whose table or start does is counted
    short. The searches share their trials, of which the first is linear decay at the given rate.
    The tuned rate is counted as one more start, although it may be one of the others; tasks of `stress_tasks` have
    their own rate only.
    """
    factors = {1.0} if stress else {*config.learning_rate_factors, *([_TUNED] if config.tuned else [])}
    from_level = config.schedule is None or config.schedule.start != "given"
    names = config.methods if "policy" in config.methods else ("policy", *config.methods)
    runs = {("linear", 0, factor) for factor in config.oracle_factors}
    for name in names:
        once = name in ALWAYS_RATE_INDEPENDENT or (from_level and _is_policy(name))
        job = "search" if name in SEARCH_TRIALS else name
        jobs = [("linear" if job == "search" and not index else job, index) for index in range(NUM_JOBS.get(name, 1))]
        runs |= {(*job, factor) for job in jobs for factor in ({1.0} if once else factors)}
    # Linear decay from the tuned rate is a run of the sweep.
    return len(runs - {("linear", 0, _TUNED)})


def _is_policy(name: str) -> bool:
    return name in POLICY_NAMES or name not in METHOD_NAMES


def _training_seconds(config: TrainConfig, trials: tuple[TaskTrial, ...]) -> float:
    assert config.env.tasks is not None
    episodes = [trial.job_seconds + (trial.num_decisions + 1) * trial.seconds_per_evaluation for trial in trials]
    episode_seconds = float(np.mean(episodes))
    num_training = config.training.decisions / float(np.mean([trial.num_decisions for trial in trials]))
    period = config.training.evaluation_period_episodes
    num_evaluations = 1 + (num_training // period if period else 0)
    num_evaluated = num_evaluations * config.training.evaluation_episodes
    num_references = min(len(trials) * config.env.tasks.num_seeds, num_training)
    return episode_seconds * (num_training + config.training.demonstrations + num_evaluated + num_references)


def _batch_shapes(job: Job) -> dict[str, tuple[int, ...]]:
    indices = batch_indices(len(job.data.train), job.task.batch_size, 0, 0)
    return {name: tuple(tensor.shape) for name, tensor in job.data.train.collate(indices).items()}


def _state_bytes(job: Job) -> dict[str, int]:
    """Bytes of what lives as long as the job."""
    every = sum(parameter.numel() * parameter.element_size() for parameter in job.loaded.model.parameters())
    trained = sum(parameter.numel() * parameter.element_size() for parameter in job.loaded.trainable.values())
    return {"parameters": every, "gradients": trained, "moments": 2 * trained}


def _activation_bytes(session: FineTuningSession, schedule: Schedule) -> int:
    """Most bytes that one step keeps between forward and backward pass, measured on a step."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in session.job.loaded.model.parameters()}
    with counted_saved_tensors(parameters) as peak:
        session.run_interval(1, schedule)
    return peak[0]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
