"""What one decision interval of fine-tuning measured, for one job or for many side by side.

Arrays have a leading dimension E, one lane a job; a single job is E = 1. The intervals of different jobs may differ in
length, so per-step arrays are padded to the longest, N, and `num_steps` says how many entries count. NaN means that
the job cannot supply the value (no validation set, no per-parameter gradients under a sharded optimizer).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


class TuningMode(IntEnum):
    """Which parameters a job trains."""

    FULL = 0
    LORA = 1
    PARTIAL = 2


@dataclass(frozen=True)
class TrainingStatistics:
    """One decision interval of E jobs.

    Attributes:
        step: int64[E], optimizer steps done, skipped ones included.
        total_steps: int64[E], optimizer steps in the job's budget.
        num_steps: int64[E], valid entries in each row of the per-step arrays.
        loss: float64[E, N], mean train cross-entropy of each step, nats per target, before the step.
        gradient_norm: float64[E, N], global norm before clipping; NaN where the host does not tell.
        clipped: bool[E, N], the gradient was scaled down.
        skipped: bool[E, N], the step was not taken because its loss or gradient was not finite.
        update_norm: float64[E], norm of the optimizer's update at learning rate one, at the interval's last step.
        weight_norm: float64[E], norm of the weights that the update changes, there.
        step_size: float64[E], mean over the interval of learning_rate * update_norm / weight_norm.
        momentum_cosine: float64[E], cosine of the last step's gradient to the momentum before it.
        signal_to_noise: float64[E], ||m|| / sqrt(sum v) of Adam's bias-corrected moments, in [0, 1].
        validation_loss: float64[E], nats per target, where the job evaluates anyway.
        mode: int64[E], a `TuningMode`.
        trainable_fraction: float64[E], trained parameters over all parameters.
    """

    step: Integers
    total_steps: Integers
    num_steps: Integers
    loss: Floats
    gradient_norm: Floats
    clipped: Booleans
    skipped: Booleans
    update_norm: Floats
    weight_norm: Floats
    step_size: Floats
    momentum_cosine: Floats
    signal_to_noise: Floats
    validation_loss: Floats
    mode: Integers
    trainable_fraction: Floats

    @property
    def num_lanes(self) -> int:
        """Number of jobs, E."""
        return len(self.step)

    @property
    def valid(self) -> Booleans:
        """bool[E, N], which per-step entries count."""
        positions: Integers = np.arange(self.loss.shape[1])
        return np.asarray(positions[None, :] < self.num_steps[:, None])

    @property
    def stuck(self) -> Booleans:
        """bool[E], lanes that took steps in the interval and had to skip every one."""
        return np.asarray((self.skipped | ~self.valid).all(axis=1) & (self.num_steps > 0))

    @property
    def ends_skipped(self) -> Booleans:
        """bool[E], lanes whose last step of the interval was skipped: nothing tells whether the weights are sound."""
        positions: Integers = np.arange(self.loss.shape[1])
        return np.asarray((self.skipped & (positions[None, :] == self.num_steps[:, None] - 1)).any(axis=1))


def empty_statistics(
    total_steps: Integers,  # [E]
    mode: Integers,  # [E]
    trainable_fraction: Floats,  # [E]
) -> TrainingStatistics:
    """Statistics of jobs that have not begun: no steps, nothing measured."""
    lanes = len(total_steps)

    def unknown() -> Floats:
        return np.full(lanes, np.nan)

    return TrainingStatistics(
        step=np.zeros(lanes, np.int64),
        total_steps=np.asarray(total_steps, np.int64),
        num_steps=np.zeros(lanes, np.int64),
        loss=np.zeros((lanes, 0)),
        gradient_norm=np.zeros((lanes, 0)),
        clipped=np.zeros((lanes, 0), np.bool_),
        skipped=np.zeros((lanes, 0), np.bool_),
        update_norm=unknown(),
        weight_norm=unknown(),
        step_size=unknown(),
        momentum_cosine=unknown(),
        signal_to_noise=unknown(),
        validation_loss=unknown(),
        mode=np.asarray(mode, np.int64),
        trainable_fraction=np.asarray(trainable_fraction, np.float64),
    )
