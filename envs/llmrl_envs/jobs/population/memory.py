"""How much memory a population takes, and how many jobs fit.

A job's own memory is its row (trained weights, gradients, two moments; the best state's three and the average's one
where they are kept) and its activations. What all jobs share, the frozen weights, is loaded once. Reference runs take
rows of their own while they are made, as many as there are jobs at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import psutil
import torch

from llmrl_envs.jobs.loading import Job
from llmrl_envs.jobs.peak_memory import peak_allocation
from llmrl_envs.jobs.population.members import IntervalPlan
from llmrl_envs.jobs.population.session import PopulationSession

USABLE_SHARE = 0.8
"""Share of the free memory that is planned with: passes need room for temporaries too."""
MOST_JOBS = {"cpu": 64, "cuda": 1024}
"""Beyond these a pass is wide enough to keep the device busy, and more jobs only take memory."""

_TRAINING_ROWS, _BEST_ROWS = 4, 3


@dataclass(frozen=True)
class JobMemory:
    """Bytes of one job.

    Attributes:
        row: What is kept of it as long as it lasts.
        reference: The row of a reference run.
        activations: The most that a step takes beside rows: what it keeps for its backward pass, and gradients of that.
    """

    row: int
    reference: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes that one job more takes."""
        return self.row + self.reference + self.activations


def job_memory(session: PopulationSession, job: Job, *, rolls_back: bool, averaged: bool) -> JobMemory:
    """Bytes of a job: rows from the number of trained weights, activations measured on one step.

    Args:
        session: A population of the job's kind without jobs.
        job: The job.
        rolls_back: Best states are kept.
        averaged: Averaged weights are kept.
    """
    width = session.stack.layout.num_columns * session.stack.weights.element_size()
    rows = _TRAINING_ROWS + averaged + (_BEST_ROWS + averaged if rolls_back else 0)
    activations = measure_activations(session, job, 1)
    return JobMemory(rows * width, (_TRAINING_ROWS + averaged) * width, activations)


def measure_activations(session: PopulationSession, job: Job, num_jobs: int) -> int:
    """Most bytes that one step of so many equal jobs takes beside their rows; the jobs are gone afterwards."""
    session.reserve(len(session.members) + num_jobs)
    members = [session.add(job, 0) for _ in range(num_jobs)]
    with peak_allocation(session.device) as peak:
        session.run_interval([IntervalPlan(member, np.zeros(1), 1.0, probe=False) for member in members])
    for member in members:
        session.remove(member)
    return peak[0]


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def fitting_jobs(memory: JobMemory, device: torch.device, available: int | None = None) -> int:
    """How many jobs fit: min(most, share of the free bytes / bytes of a job), at least one.

    Args:
        memory: Of one job.
        device: Where they run.
        available: Free bytes; None asks the device.
    """
    free = free_bytes(device) if available is None else available
    most = MOST_JOBS.get(device.type, MOST_JOBS["cpu"])
    return int(min(max(USABLE_SHARE * free / memory.total, 1), most))
