"""Jobs of a population: what is told to them for an interval and what they give back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmrl_envs.jobs.loading import Job


@dataclass(eq=False)
class Member:
    """A job under way in a population.

    Attributes:
        job: The task with its data; its model is the population's.
        seed: Seed of the data order.
        row: Where its weights are now; rows change places.
        home: Where its best state is kept; the same as long as the job lasts.
        step: Optimizer steps done.
        average_weight: Weight of a step in the exponential average of the weights; 0 keeps none.
        has_best: There is a state to roll back to.
    """

    job: Job
    seed: int
    row: int
    home: int
    step: int = 0
    average_weight: float = 0.0
    has_best: bool = False

    @property
    def shape_key(self) -> tuple[int, int, int]:
        """Jobs that share it go through the model together."""
        task = self.job.task
        return task.batch_size, task.gradient_accumulation, task.max_length


@dataclass(frozen=True)
class IntervalPlan:
    """What a job does in an interval.

    Attributes:
        member: The job.
        rates: float64[N], the learning rate of each of its optimizer steps.
        limit: Gradient norm above which a gradient is scaled down.
        frozen: The lower half of the layers stays as it is.
        probe: Measure the update at the last step.
        momentum_share: Of Adam's mean in its updates; see `lean_on_gradient`.
        skip_outliers: Steps whose loss stands out are not taken; see `OutlierSteps`.
    """

    member: Member
    rates: NDArray[np.float64]
    limit: float
    frozen: bool = False
    probe: bool = True
    momentum_share: float = 1.0
    skip_outliers: bool = False


@dataclass(frozen=True)
class IntervalResult:
    """What an interval of a job measured; see `TrainingStatistics`.

    Attributes:
        loss: float64[N], nats per target; NaN where it stood out.
        gradient_norm: float64[N], before clipping.
        momentum_cosine: NaN where it was not measured, like the following ones.
        update_norm: ||u||.
        weight_norm: ||theta||.
        signal_to_noise: Of Adam's moments.
    """

    loss: NDArray[np.float64]
    gradient_norm: NDArray[np.float64]
    momentum_cosine: float
    update_norm: float
    weight_norm: float
    signal_to_noise: float
