"""Running summaries of train losses and gradient norms that the observation is made from, for E jobs.

Everything here depends on the per-step values alone, so it does not change with the loss's scale, with how often a job
logs, or with how many processes share a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from llmrl_envs.interface.statistics import Booleans, Floats, Integers, TrainingStatistics

_TINY = 1e-12


class LossTracker:
    """Exponential averages, noise, slope and spikes of E jobs' train losses and gradient norms.

    Args:
        num_lanes: E.
    """

    HALF_LIVES: ClassVar[tuple[float, ...]] = (0.005, 0.015, 0.05, 0.12, 0.3)
    """Half-lives of the averages as shares of the budget; never under one step."""
    NUM_SCALES: ClassVar[int] = len(HALF_LIVES)
    NOISE_DECAY: ClassVar[float] = 0.9
    """Per-step decay of the noise and gradient averages."""

    def __init__(self, num_lanes: int) -> None:
        self.averages: Floats = np.full((num_lanes, self.NUM_SCALES), np.nan)
        self.minima: Floats = np.full((num_lanes, self.NUM_SCALES), np.inf)
        self.last_log_loss: Floats = np.full(num_lanes, np.nan)
        self.noise_sum: Floats = np.zeros(num_lanes)
        self.noise_weight: Floats = np.zeros(num_lanes)
        self.gradient_mean: Floats = np.zeros(num_lanes)
        self.gradient_square: Floats = np.zeros(num_lanes)
        self.gradient_weight: Floats = np.zeros(num_lanes)
        self.slope: Floats = np.zeros(num_lanes)
        self.spike: Floats = np.zeros(num_lanes)
        self.gradient_features: Floats = np.zeros((num_lanes, 5))

    def reset(self, lanes: Integers) -> None:
        """Forgets everything about `lanes`."""
        self.averages[lanes] = np.nan
        self.minima[lanes] = np.inf
        self.last_log_loss[lanes] = np.nan
        for name in ("noise_sum", "noise_weight", "gradient_mean", "gradient_square", "gradient_weight", "slope"):
            getattr(self, name)[lanes] = 0.0
        self.spike[lanes] = 0.0
        self.gradient_features[lanes] = 0.0

    def update(self, statistics: TrainingStatistics) -> None:
        """Takes in one interval, step by step."""
        valid = statistics.valid
        usable = valid & np.isfinite(statistics.loss)
        log_loss = np.log(np.maximum(np.where(usable, statistics.loss, 1.0), _TINY))
        decay = 0.5 ** (1.0 / np.maximum(np.array(self.HALF_LIVES) * statistics.total_steps[:, None], 1.0))
        self.spike = np.where(usable.any(axis=1), -np.inf, 0.0)
        for position in range(statistics.loss.shape[1]):
            self._update_step(statistics.loss[:, position], log_loss[:, position], usable[:, position], decay)
        self.spike = np.where(np.isfinite(self.spike), self.spike, 0.0)
        self.slope = self._slope(log_loss, usable)
        self._update_gradients(statistics, valid)

    def _update_step(self, loss: Floats, log_loss: Floats, usable: Booleans, decay: Floats) -> None:
        expected = np.where(np.isnan(self.averages[:, 1]), np.nan, np.log(np.maximum(self.averages[:, 1], _TINY)))
        z_score = (log_loss - expected) / np.maximum(self.noise(), 1e-6)
        # Before the first difference the noise is not known, and any rise would look like a spike.
        judged = usable & np.isfinite(z_score) & (self.noise_weight > 0.0)
        self.spike = np.where(judged, np.maximum(self.spike, z_score), self.spike)
        column = loss[:, None]
        moved = np.where(np.isnan(self.averages), column, decay * self.averages + (1.0 - decay) * column)
        self.averages = np.where(usable[:, None], moved, self.averages)
        self.minima = np.where(usable[:, None], np.minimum(self.minima, moved), self.minima)
        step = log_loss - self.last_log_loss
        counted = usable & np.isfinite(step)
        step = np.where(counted, step, 0.0)
        self.noise_sum = np.where(counted, self.NOISE_DECAY * self.noise_sum + 0.5 * step * step, self.noise_sum)
        self.noise_weight = np.where(counted, self.NOISE_DECAY * self.noise_weight + 1.0, self.noise_weight)
        self.last_log_loss = np.where(usable, log_loss, self.last_log_loss)

    def noise(self) -> Floats:
        """Standard deviation of the log-loss from step to step, float64[E].

        Half the mean squared successive difference (von Neumann's estimator), which a slow trend does not disturb.
        """
        return np.sqrt(self.noise_sum / np.maximum(self.noise_weight, 1.0)) + 1e-6

    def smoothed(self) -> Floats:
        """The loss averaged over the second-shortest half-life, nats per target, float64[E]; NaN before any step."""
        return self.averages[:, 1]

    def ratios(self) -> Floats:
        """clip((ema_i - min_i) / (ema_{i+1} - min_i) - 1, -1, 1) for neighbouring half-lives, float64[E, M - 1].

        Negative while the loss falls, zero where it stands still, positive where it rises.
        """
        faster, slower = self.averages[:, :-1], self.averages[:, 1:]
        with np.errstate(invalid="ignore", divide="ignore"):
            minimum = self.minima[:, :-1]
            span = slower - minimum
            ratio = (faster - minimum) / np.where(np.abs(span) > 1e-9 * np.abs(slower), span, np.nan) - 1.0
        return np.clip(np.nan_to_num(ratio, nan=0.0), -1.0, 1.0)

    def _slope(self, log_loss: Floats, usable: Booleans) -> Floats:
        """Slope of the log-loss over the interval divided by its standard error, float64[E]."""
        count = usable.sum(axis=1)
        position = np.arange(log_loss.shape[1], dtype=np.float64)[None, :] * usable
        safe = np.maximum(count, 1)
        centred = (position - (position.sum(axis=1) / safe)[:, None]) * usable
        squares = (centred**2).sum(axis=1)
        covariance = (centred * log_loss).sum(axis=1)
        enough = (count >= 2) & (squares > 0.0)
        score = covariance / (np.sqrt(np.where(enough, squares, 1.0)) * self.noise())
        return np.where(enough, score, 0.0)

    def _update_gradients(self, statistics: TrainingStatistics, valid: Booleans) -> None:
        usable = valid & np.isfinite(statistics.gradient_norm) & ~statistics.skipped
        norm = np.where(usable, statistics.gradient_norm, 1.0)
        log_norm = np.where(usable, np.log(np.maximum(norm, _TINY)), 0.0)
        count = usable.sum(axis=1)
        safe = np.maximum(count, 1)
        known = self.gradient_weight > 0.0
        weight = np.maximum(self.gradient_weight, 1.0)
        mean = self.gradient_mean / weight
        deviation = np.sqrt(np.maximum(self.gradient_square / weight - mean * mean, 1e-6))
        interval_mean = log_norm.sum(axis=1) / safe
        newest = _last_valid(log_norm, usable)
        average = (norm * usable).sum(axis=1) / safe
        variance = (((norm - average[:, None]) * usable) ** 2).sum(axis=1) / safe
        trend = np.where(known & (count > 0), interval_mean - mean, 0.0)
        z_score = np.where(known & (count > 0), (newest - mean) / deviation, 0.0)
        steps = np.maximum(valid.sum(axis=1), 1)
        clipped = (statistics.clipped & valid).sum(axis=1) / steps
        skipped = (statistics.skipped & valid).sum(axis=1) / steps
        variation = np.sqrt(variance) / np.maximum(average, _TINY)
        self.gradient_features = np.stack([trend, z_score, variation, clipped, skipped], axis=1)
        forget = self.NOISE_DECAY**count
        self.gradient_mean = forget * self.gradient_mean + log_norm.sum(axis=1)
        self.gradient_square = forget * self.gradient_square + (log_norm**2).sum(axis=1)
        self.gradient_weight = forget * self.gradient_weight + count

    _STATE = (
        "averages", "minima", "last_log_loss", "noise_sum", "noise_weight", "gradient_mean", "gradient_square",
        "gradient_weight", "slope", "spike", "gradient_features",
    )  # fmt: skip

    def state_dict(self) -> dict[str, NDArray[np.generic]]:
        """Everything that changes, as arrays of leading dimension E."""
        return {name: getattr(self, name).copy() for name in self._STATE}

    def load_state_dict(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Restores what `state_dict` gave."""
        for name in self._STATE:
            setattr(self, name, np.array(state[name], np.float64))


def _last_valid(values: Floats, usable: Booleans) -> Floats:
    """The last usable entry of each row, float64[E]; 0 where there is none."""
    if values.shape[1] == 0:
        return np.zeros(len(values))
    reversed_position = np.argmax(usable[:, ::-1], axis=1)
    picked = values[np.arange(len(values)), values.shape[1] - 1 - reversed_position]
    return np.where(usable.any(axis=1), picked, 0.0)
