"""Noisy quadratics: the mathematics of training on them, and the distribution that jobs are drawn from.

The loss of parameters theta is `floor + 1/2 sum_i h_i x_i^2` with x = theta - theta*. One step of SGD at the learning
rate eta with gradient noise of covariance diag(c) changes the second moments A_i = E[x_i^2] to

    A_i <- (1 - eta h_i)^2 A_i + eta^2 c_i

so the expected loss of any schedule is known exactly (Wu et al. 2018, https://arxiv.org/abs/1803.02021; Zhang et al.
2019, https://arxiv.org/abs/1907.04164). As in the latter the noise is proportional to the curvature, c_i = noise * h_i.
With b_i = h_i A_i / noise and u_i = eta h_i the recursion loses its constants,

    b_i <- (1 - u_i)^2 b_i + u_i^2,        expected loss = floor + noise / 2 * sum_i b_i

and that is the form in which everything here is computed. Arrays inside functions have the shape [D, E], dimensions
first, because sums over D dimensions of many jobs are then sums of long rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import DEFAULT_RELATIVE_UPDATE
from llmrl_envs.interface.statistics import Floats, Integers
from llmrl_envs.quadratic.linear_decay import linear_decay


@dataclass(frozen=True)
class NoisyQuadratics:
    """E fine-tuning jobs on noisy quadratics.

    Attributes:
        curvature: float64[E, D], eigenvalues h_i of the Hessian; the largest is 1.
        initial: float64[E, D], E[x_i^2] before the first step; the initial loss above the floor is 1.
        noise: float64[E], the gradient noise has the covariance noise * diag(h).
        floor: float64[E], loss at the optimum.
        total_steps: int64[E], the budget T.
        reference_rate: float64[E], peak of the best linear decay to zero over the budget.
        reference_loss: float64[E], expected loss at its end.
        given_rate: float64[E], learning rate that the job comes with: the reference's, wrong by up to 30 times.
        weight_norm: float64[E], ||theta||; gives relative update sizes their scale.
        loss_noise: float64[E], standard deviation of a mini-batch's loss over its mean.
        seed: int64[E], of what the mini-batches show.
    """

    curvature: Floats
    initial: Floats
    noise: Floats
    floor: Floats
    total_steps: Integers
    reference_rate: Floats
    reference_loss: Floats
    given_rate: Floats
    weight_norm: Floats
    loss_noise: Floats
    seed: Integers

    def __len__(self) -> int:
        return len(self.total_steps)

    def __getitem__(self, lanes: slice | Integers | NDArray[np.bool_]) -> NoisyQuadratics:
        """The jobs of some lanes; a copy."""
        return NoisyQuadratics(**{field.name: getattr(self, field.name)[lanes].copy() for field in fields(self)})

    @property
    def initial_loss(self) -> Floats:
        """Expected loss before the first step, float64[E]."""
        return np.asarray(self.floor + 0.5 * (self.curvature * self.initial).sum(axis=1))

    def normalised_initial(self) -> Floats:  # [D, E]
        """b_i before the first step."""
        return np.ascontiguousarray((self.curvature * self.initial / self.noise[:, None]).T)


@dataclass(frozen=True)
class QuadraticDistribution:
    """What jobs are drawn from; pairs are the ends of a range.

    The noise is not drawn but follows: it is the one that makes the drawn peak rate the best one for a linear decay.
    So the best rate of every job is known without a search, and stays away from the edge of stability (rate * h = 2),
    beyond which a quadratic, unlike a network, would forgive every excess.

    Attributes:
        dimension: D.
        total_steps: Budget, log-uniform.
        exponent: The spectrum is h_i = (1 + s i)^-exponent, uniform.
        log10_condition: s makes the condition number h_0 / h_{D-1} this one, uniform.
        initial_power: E[x_i^2] before the first step falls with h_i^-initial_power, uniform.
        initial_spread: Standard deviation of its logarithm around that.
        contraction: exp(-contraction) is what the reference leaves of a direction of the (geometric) mean curvature,
            log-uniform; it sets the reference's peak rate.
        largest_step: Upper limit of that rate; 1 removes the steepest direction in one step.
        floor: Loss at the optimum, log-uniform; the initial loss above it is 1.
        loss_noise: Relative noise of a mini-batch's loss, log-uniform.
        log10_rate_error: The given rate over the reference's, uniform.
        log10_level_error: Standard deviation of the level that the reference means, around the default level.
    """

    dimension: int = 32
    total_steps: tuple[int, int] = (60, 1000)
    exponent: tuple[float, float] = (0.5, 1.5)
    log10_condition: tuple[float, float] = (0.5, 2.5)
    initial_power: tuple[float, float] = (0.0, 0.5)
    initial_spread: float = 0.5
    contraction: tuple[float, float] = (1.0, 4.0)
    largest_step: float = 0.5
    floor: tuple[float, float] = (0.05, 0.5)
    loss_noise: tuple[float, float] = (0.01, 0.1)
    log10_rate_error: tuple[float, float] = (-1.5, 1.5)
    log10_level_error: float = 0.15

    def __post_init__(self) -> None:
        _check(self.dimension >= 2, "dimension", "at least 2", self.dimension)
        _check(0.0 < self.largest_step <= 0.9, "largest_step", "a number in (0, 0.9]", self.largest_step)
        _check(self.total_steps[0] >= 10, "total_steps", "at least 10 steps", self.total_steps)
        for name in ("exponent", "contraction", "floor", "loss_noise"):
            _check(getattr(self, name)[0] > 0.0, name, "positive numbers", getattr(self, name))
        for name in _RANGES:
            low, high = getattr(self, name)
            _check(low <= high, name, "the lower end first", (low, high))


_RANGES = (
    "total_steps", "contraction", "floor", "loss_noise",
    "exponent", "log10_condition", "initial_power", "log10_rate_error",
)  # fmt: skip
_NUM_LOG_RANGES = 4
_NUM_SEEDS = 2.0**53  # as many as a uniform number tells apart


def _check(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise UserError("the distribution of quadratics is wrong", expected=expected, got=got, where=name)


def draw_quadratics(distribution: QuadraticDistribution, generators: Sequence[np.random.Generator]) -> NoisyQuadratics:
    """One job from each generator; what a generator gives does not depend on the others."""
    lanes, dimension = len(generators), distribution.dimension
    uniform = np.empty((lanes, len(_RANGES) + 1))
    normal = np.empty((lanes, dimension + 1))
    for lane, generator in enumerate(generators):
        uniform[lane] = generator.random(len(_RANGES) + 1)
        normal[lane] = generator.standard_normal(dimension + 1)
    total_steps, contraction, floor, loss_noise, exponent, condition, power, rate_error = _in_ranges(
        distribution, uniform[:, :-1].T
    )
    # Rounding down would give the upper end no probability, rounding to the nearest half of it at both ends.
    steps = np.minimum(np.floor(total_steps), distribution.total_steps[1]).astype(np.int64)
    curvature = spectrum(dimension, exponent, 10.0**condition)
    initial = np.exp(distribution.initial_spread * normal[:, :-1].T) * curvature**-power
    initial *= 2.0 / sum_rows(curvature * initial)
    mean_curvature = np.exp(sum_rows(np.log(curvature)) / dimension)
    rate = np.minimum(2.0 * contraction / (mean_curvature * steps), distribution.largest_step)
    noise, excess = noise_of_best_rate(curvature, curvature * initial, rate, steps)
    gradient_norm = np.sqrt(sum_rows(curvature * (curvature * initial + noise)))
    level = DEFAULT_RELATIVE_UPDATE * 10.0 ** (distribution.log10_level_error * normal[:, -1])
    return NoisyQuadratics(
        curvature=np.ascontiguousarray(curvature.T),
        initial=np.ascontiguousarray(initial.T),
        noise=noise,
        floor=floor,
        total_steps=steps,
        reference_rate=rate,
        reference_loss=floor + excess,
        given_rate=rate * 10.0**rate_error,
        weight_norm=rate * gradient_norm / level,
        loss_noise=loss_noise,
        seed=(uniform[:, -1] * _NUM_SEEDS).astype(np.int64),
    )


def _in_ranges(distribution: QuadraticDistribution, uniform: Floats) -> Floats:
    """Numbers in [0, 1) moved into the ranges of `_RANGES`, the first few on a logarithmic scale, float64[R, E]."""
    ends = np.array([getattr(distribution, name) for name in _RANGES], np.float64)
    ends[:_NUM_LOG_RANGES] = np.log(ends[:_NUM_LOG_RANGES])
    values = ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * uniform
    values[:_NUM_LOG_RANGES] = np.exp(values[:_NUM_LOG_RANGES])
    return np.asarray(values)


def spectrum(dimension: int, exponent: Floats, condition: Floats) -> Floats:  # [D, E]
    """Power law h_i = (1 + s i)^-exponent with h_0 = 1 and h_{D-1} = 1 / condition."""
    slope = (condition ** (1.0 / exponent) - 1.0) / (dimension - 1)
    return np.asarray((1.0 + slope * np.arange(dimension)[:, None]) ** -exponent)


def noise_of_best_rate(
    curvature: Floats,  # [D, E]
    initial: Floats,  # [D, E] h_i E[x_i^2]
    rate: Floats,  # [E]
    total_steps: Integers,  # [E]
) -> tuple[Floats, Floats]:  # [E], [E]
    """The gradient noise at which `rate` is the best peak of a linear decay, and the excess loss that then remains.

    After the decay the excess loss is 1/2 sum_i (h_i A_i P_i + noise Q_i), see `linear_decay`. It is stationary in the
    logarithm of the rate where noise = -sum_i h_i A_i P_i' / sum_i Q_i'.
    """
    kept, kept_slope, added, added_slope = linear_decay(curvature * rate, total_steps)
    noise = -sum_rows(initial * kept_slope) / sum_rows(added_slope)
    return noise, 0.5 * (sum_rows(initial * kept) + noise * sum_rows(added))


def sum_rows(rows: Floats) -> Floats:  # [..., D, E] -> [..., E]
    """Sum over the last axis but one, row after row whatever E is: a job alone gives the same bits as among others."""
    rows = np.ascontiguousarray(rows)
    if rows.shape[-1] == 1:
        # NumPy would sum a single column in pairs.
        return np.asarray(np.add.accumulate(rows, axis=-2)[..., -1, :])
    return np.asarray(np.add.reduce(rows, axis=-2))


def expected_losses(quadratics: NoisyQuadratics, learning_rates: Floats) -> Floats:  # [T + 1, E]
    """Expected loss before each step and after the last, float64[T + 1, E].

    Args:
        quadratics: E jobs.
        learning_rates: float64[T, E], or [T] for all alike; a job with a shorter budget gets zeros at its end.
    """
    rates = np.asarray(learning_rates, np.float64)
    rates = np.broadcast_to(rates[:, None] if rates.ndim == 1 else rates, (len(rates), len(quadratics)))
    curvature, moments = quadratics.curvature.T, quadratics.normalised_initial()
    sums = np.empty((len(rates) + 1, len(quadratics)))
    sums[0] = moments.sum(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        for step, rate in enumerate(rates):
            shrink = curvature * rate
            moments = (1.0 - shrink) ** 2 * moments + shrink**2
            sums[step + 1] = moments.sum(axis=0)
        losses = quadratics.floor + 0.5 * quadratics.noise * sums
    return np.nan_to_num(losses, nan=np.inf, posinf=np.inf)
