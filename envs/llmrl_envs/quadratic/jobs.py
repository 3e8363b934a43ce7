"""E noisy-quadratic jobs in training: second moments moved exactly, mini-batch measurements drawn around them.

What a job is (its expected loss) follows the closed form and has no randomness. What a job shows is drawn from the
closed-form moments of a mini-batch, so that a policy sees the noise of real training and is paid without it:

- loss: the expected loss times log-normal noise of mean 1 and standard deviation `loss_noise`;
- gradient norm: ||g||^2 is log-normal with the mean sum_i h_i^2 A_i + noise h_i and the variance
  sum_i 2 (noise h_i)^2 + 4 h_i^2 A_i noise h_i that it has around typical parameters, |x_i| = sqrt(A_i);
- cosine to the momentum (plain SGD: to the gradient before): E[g_t g_{t-1}] over the root mean squares, which is
  negative where the rate is too high: E[g_t g_{t-1}] = sum_i h_i^2 (1 - u_i) A_i - eta h_i noise h_i;
- signal to noise: ||E g|| / sqrt(E ||g||^2);
- update norm, ||u||: root of the running mean of ||g||^2 over about ten steps, from its expected value on. The update
  of plain SGD would be one mini-batch's gradient, whose norm can be a third of the next one's. The optimizers that
  levels are defined for are steadier: Adam's update is an average over ten gradients.

No step is clipped or skipped, and the validation loss is left to whoever wants to show the expected loss as one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from llmrl_envs.interface.observation import GROUPS
from llmrl_envs.interface.statistics import Floats, Integers, TrainingStatistics, TuningMode, empty_statistics
from llmrl_envs.quadratic.model import NoisyQuadratics, sum_rows
from llmrl_envs.quadratic.noise import normal_pairs, uniforms

_HIGHEST_LOSS = 1e12
"""What an expected loss beyond every number is shown as."""
_VISIBILITY_COUNTER = 2**40  # beyond every step
_MOMENTUM = 0.9
"""What a step keeps of the running mean of squared gradient norms: Adam's usual decay of its first moment."""
_LANES_AT_ONCE = 256
"""Jobs whose arrays fit into a processor's cache together."""


class QuadraticJobs:
    """State of E jobs.

    Args:
        num_jobs: E.
        dimension: D.
    """

    def __init__(self, num_jobs: int, dimension: int) -> None:
        self.num_jobs = num_jobs
        self.step: Integers = np.zeros(num_jobs, np.int64)
        self.quadratics = _no_quadratics(num_jobs, dimension)
        # Normalised second moments b, and columns that every step of a job needs; dimensions first.
        self._moments: Floats = np.zeros((dimension, num_jobs))
        self._best: Floats = np.zeros((dimension, num_jobs))
        # Running mean of ||g||^2, and what it was where the best parameters were marked.
        self._mean_square: Floats = np.ones(num_jobs)
        self._best_mean_square: Floats = np.ones(num_jobs)
        self._curvature: Floats = np.ones((dimension, num_jobs))
        self._trace: Floats = np.ones(num_jobs)
        self._trace_square: Floats = np.ones(num_jobs)

    def start(self, lanes: Integers, quadratics: NoisyQuadratics) -> None:
        """Starts `quadratics`, one for each of `lanes`.

        Raises:
            ValueError: Another dimension, or not one job for each lane.
        """
        shape = (len(lanes), len(self._moments))
        if quadratics.curvature.shape != shape:
            raise ValueError(f"quadratics: expected curvature of shape {shape}, got {quadratics.curvature.shape}")
        for field in fields(quadratics):
            getattr(self.quadratics, field.name)[lanes] = getattr(quadratics, field.name)
        self.step[lanes] = 0
        self._curvature[:, lanes] = quadratics.curvature.T
        self._trace[lanes] = sum_rows(quadratics.curvature.T)
        self._trace_square[lanes] = sum_rows(quadratics.curvature.T**2)
        self._moments[:, lanes] = self._best[:, lanes] = quadratics.normalised_initial()
        self._mean_square[lanes] = self._best_mean_square[lanes] = self._expected_square(lanes)

    def visibility(self, lanes: Integers) -> Floats:  # [len(lanes), G]
        """Uniform numbers that decide which groups of features a job withholds."""
        counters = _VISIBILITY_COUNTER + np.arange(len(GROUPS))
        return uniforms(self.quadratics.seed[lanes, None], counters[None, :])

    def expected_loss(self) -> Floats:
        """Expected loss now, float64[E]; infinite beyond every number."""
        with np.errstate(over="ignore", invalid="ignore"):
            loss = self.quadratics.floor + 0.5 * self.quadratics.noise * sum_rows(self._moments)
        return np.asarray(np.nan_to_num(loss, nan=np.inf, posinf=np.inf))

    def mark_best(self, lanes: NDArray[np.bool_]) -> None:
        """Remembers the present parameters of `lanes`, bool[E]."""
        self._best[:, lanes] = self._moments[:, lanes]
        self._best_mean_square[lanes] = self._mean_square[lanes]

    def roll_back(self, lanes: NDArray[np.bool_]) -> None:
        """Returns `lanes`, bool[E], to the parameters that were remembered last."""
        self._moments[:, lanes] = self._best[:, lanes]
        self._mean_square[lanes] = self._best_mean_square[lanes]

    # -- measurements before the first step -----------------------------------------------------------------------

    def initial_statistics(self, lanes: Integers) -> TrainingStatistics:
        """Statistics of `lanes` before the first step: nothing but the budget is known."""
        modes = np.full(len(lanes), TuningMode.FULL, np.int64)
        return empty_statistics(self.quadratics.total_steps[lanes], modes, np.ones(len(lanes)))

    def norms(self, lanes: Integers) -> tuple[Floats, Floats]:
        """Root mean square of the gradient norm, and the weight norm, of `lanes`."""
        return np.sqrt(self._expected_square(lanes)), self.quadratics.weight_norm[lanes]

    def _expected_square(self, lanes: Integers) -> Floats:
        """E ||g||^2 of a mini-batch."""
        with np.errstate(over="ignore", invalid="ignore"):
            signal = sum_rows(self._curvature[:, lanes] * self._moments[:, lanes])
            return self._square(lanes, signal + self._trace[lanes])

    def _square(self, lanes: Integers, mean: Floats) -> Floats:
        """E ||g||^2 from `mean`, sum_i h_i (b_i + 1); a number beyond every one is cut."""
        return np.asarray(np.fmin(self.quadratics.noise[lanes] * mean, _HIGHEST_LOSS**2))

    # -- training -------------------------------------------------------------------------------------------------

    def run_interval(
        self,
        num_steps: Integers,  # [E]
        learning_rates: Floats,  # [N, E]
    ) -> TrainingStatistics:
        """Trains every job for its number of steps and returns what its mini-batches showed."""
        shape = (self.num_jobs, len(learning_rates))
        shown = _Measured(np.full(shape, np.nan), np.full(shape, np.nan), *(np.zeros(self.num_jobs) for _ in range(4)))
        # Jobs with intervals of like length together: a group takes as many steps as its longest.
        order = np.argsort(num_steps, kind="stable")
        with np.errstate(over="ignore", invalid="ignore"):
            for begin in range(0, self.num_jobs, _LANES_AT_ONCE):
                lanes = order[begin : begin + _LANES_AT_ONCE]
                places = np.arange(int(num_steps[lanes[-1]]))[:, None]
                taken = places < num_steps[lanes]
                rates = np.where(taken, learning_rates[: len(places), lanes], 0.0)
                sums = self._train(lanes, rates)
                self._measure(shown, lanes, num_steps[lanes], rates, sums)
        self.step += num_steps
        return self._statistics(shown, num_steps)

    def _train(self, lanes: Integers, rates: Floats) -> Floats:  # [N, L] -> [3, N + 1, L]
        """Moves the moments of `lanes`; returns sum_i b_i, sum_i h_i b_i, sum_i h_i^2 b_i before each step and after.

        A rate of zero leaves a job exactly as it is, which is how one with fewer steps waits for the others. The first
        sum follows from the two others: (1 - u_i)^2 b_i + u_i^2 = b_i - 2 eta h_i b_i + eta^2 h_i^2 (b_i + 1).
        """
        curvature, moments = self._curvature.take(lanes, axis=1), self._moments.take(lanes, axis=1)
        sums = np.empty((3, len(rates) + 1, len(lanes)))
        scratch = np.empty((2, *moments.shape))
        shrink, kept = scratch
        sums[0, 0] = sum_rows(moments)
        _weighted_sums(moments, curvature, scratch, sums[1:, 0])
        for step, rate in enumerate(rates):
            np.multiply(curvature, rate, out=shrink)
            np.subtract(1.0, shrink, out=kept)
            kept *= kept
            shrink *= shrink
            moments *= kept
            moments += shrink
            _weighted_sums(moments, curvature, scratch, sums[1:, step + 1])
        sums[0, 1:] = rates**2 * (sums[2, :-1] + self._trace_square[lanes]) - 2.0 * rates * sums[1, :-1]
        np.cumsum(sums[0], axis=0, out=sums[0])
        self._moments[:, lanes] = moments
        return sums

    def _measure(
        self,
        shown: _Measured,
        lanes: Integers,  # [L]
        num_steps: Integers,  # [L]
        rates: Floats,  # [N, L]
        sums: Floats,  # [3, N + 1, L]
    ) -> None:
        """Notes what the mini-batches of `lanes` show."""
        count, columns = len(rates), np.arange(len(lanes))
        places = np.arange(count)[:, None]
        taken = places < num_steps
        loss_draws, norm_draws = normal_pairs(self.quadratics.seed[lanes], self.step[lanes] + places)
        losses = self._losses(lanes, sums[0, :-1], loss_draws)
        norms = self._gradient_norms(lanes, sums[1, :-1], sums[2, :-1], norm_draws)
        shown.loss[lanes, :count] = np.where(taken, losses, np.nan).T
        shown.gradient_norm[lanes, :count] = np.where(taken, norms, np.nan).T
        self._mean_square[lanes] = running_mean(self._mean_square[lanes], norms**2, num_steps)
        shown.update_norm[lanes] = np.sqrt(self._mean_square[lanes])
        relative = shown.update_norm[lanes] / self.quadratics.weight_norm[lanes]
        shown.step_size[lanes] = sum_rows(rates) / num_steps * relative
        _, before, square = sums[:, num_steps - 1, columns]
        after, trace = sums[1, num_steps, columns], self._trace[lanes]
        product = before - rates[num_steps - 1, columns] * (square + self._trace_square[lanes])
        cosine = product / np.sqrt((before + trace) * (after + trace))
        # Where numbers overflow the steps were far too large, and the gradient all signal.
        shown.momentum_cosine[lanes] = np.clip(np.nan_to_num(cosine, nan=-1.0), -1.0, 1.0)
        shown.signal_to_noise[lanes] = np.sqrt(np.nan_to_num(before / (before + trace), nan=1.0))

    def _losses(self, lanes: Integers, moment_sum: Floats, drawn: NDArray[np.float32]) -> Floats:  # [N, L]
        """Mini-batch losses; `moment_sum` is sum_i b_i."""
        expected = self.quadratics.floor[lanes] + 0.5 * self.quadratics.noise[lanes] * moment_sum
        spread = np.sqrt(np.log1p(self.quadratics.loss_noise[lanes] ** 2))
        return np.asarray(np.fmin(expected, _HIGHEST_LOSS) * np.exp(spread * (drawn - 0.5 * spread)))

    def _gradient_norms(  # [N, L]
        self, lanes: Integers, signal: Floats, signal_square: Floats, drawn: NDArray[np.float32]
    ) -> Floats:
        """Gradient norms; `signal` is sum_i h_i b_i, `signal_square` sum_i h_i^2 b_i."""
        mean = signal + self._trace[lanes]
        variance = 2.0 * self._trace_square[lanes] + 4.0 * signal_square
        spread_square = np.log1p(np.nan_to_num(variance / mean**2, posinf=0.0))
        square = self._square(lanes, mean)
        # The norm is the root of a log-normal variable: half the exponent.
        return np.asarray(np.sqrt(square) * np.exp(0.5 * np.sqrt(spread_square) * drawn - 0.25 * spread_square))

    def _statistics(self, shown: _Measured, num_steps: Integers) -> TrainingStatistics:
        return TrainingStatistics(
            step=self.step.copy(),
            total_steps=self.quadratics.total_steps.copy(),
            num_steps=num_steps.copy(),
            loss=shown.loss,
            gradient_norm=shown.gradient_norm,
            clipped=np.zeros(shown.loss.shape, np.bool_),
            skipped=np.zeros(shown.loss.shape, np.bool_),
            update_norm=shown.update_norm,
            weight_norm=self.quadratics.weight_norm.copy(),
            step_size=shown.step_size,
            momentum_cosine=shown.momentum_cosine,
            signal_to_noise=shown.signal_to_noise,
            validation_loss=np.full(self.num_jobs, np.nan),
            mode=np.full(self.num_jobs, TuningMode.FULL, np.int64),
            trainable_fraction=np.ones(self.num_jobs),
        )

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, NDArray[np.generic]]:
        """Everything that changes, as arrays of leading dimension E."""
        own = {
            "step": self.step.copy(),
            "moments": self._moments.T.copy(),
            "best": self._best.T.copy(),
            "mean_square": self._mean_square.copy(),
            "best_mean_square": self._best_mean_square.copy(),
        }
        jobs = {field.name: getattr(self.quadratics, field.name).copy() for field in fields(self.quadratics)}
        return {**own, **jobs}

    def load_state_dict(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Restores what `state_dict` gave; one of an earlier version begins its running mean anew."""
        jobs = {field.name: np.array(state[field.name]) for field in fields(NoisyQuadratics)}
        self.start(np.arange(self.num_jobs), NoisyQuadratics(**jobs))
        self.step = np.array(state["step"], np.int64)
        self._moments = np.ascontiguousarray(np.array(state["moments"], np.float64).T)
        self._best = np.ascontiguousarray(np.array(state["best"], np.float64).T)
        expected = self._expected_square(np.arange(self.num_jobs))
        self._mean_square = np.array(state.get("mean_square", expected))
        self._best_mean_square = np.array(state.get("best_mean_square", expected))


@dataclass(frozen=True)
class _Measured:
    """What an interval's mini-batches show; the fields are those of `TrainingStatistics`."""

    loss: Floats
    gradient_norm: Floats
    update_norm: Floats
    step_size: Floats
    momentum_cosine: Floats
    signal_to_noise: Floats


def running_mean(
    mean: Floats,  # [L] before the first step
    values: Floats,  # [N, L] one for each step; those after `num_steps` are passed over
    num_steps: Integers,  # [L]
) -> Floats:  # [L]
    """The mean after `mean <- 0.9 mean + 0.1 value` at each step.

    mean_n = 0.9^n mean_0 + 0.1 sum_{k < n} 0.9^(n - 1 - k) value_k
    """
    kept = np.cumprod([1.0, *[_MOMENTUM] * len(values)])
    later_steps = num_steps - 1 - np.arange(len(values))[:, None]
    weights = np.where(later_steps >= 0, (1.0 - _MOMENTUM) * kept[np.maximum(later_steps, 0)], 0.0)
    return np.asarray(kept[num_steps] * mean + sum_rows(weights * values))


def _weighted_sums(moments: Floats, curvature: Floats, scratch: Floats, sums: Floats) -> None:
    """Writes sum_i h_i b_i and sum_i h_i^2 b_i to `sums`, float64[2, L]; overwrites `scratch`, [2, D, L]."""
    np.multiply(curvature, moments, out=scratch[0])
    np.multiply(curvature, scratch[0], out=scratch[1])
    np.copyto(sums, sum_rows(scratch))


def _no_quadratics(num_jobs: int, dimension: int) -> NoisyQuadratics:
    """Place for E jobs."""
    names = ("noise", "floor", "reference_rate", "reference_loss", "given_rate", "weight_norm", "loss_noise")
    return NoisyQuadratics(
        curvature=np.ones((num_jobs, dimension)),
        initial=np.ones((num_jobs, dimension)),
        total_steps=np.ones(num_jobs, np.int64),
        seed=np.zeros(num_jobs, np.int64),
        **{name: np.ones(num_jobs) for name in names},
    )
