"""The best schedule for a noisy quadratic: the learning rates with the lowest expected final loss.

The final loss is noise / 2 * sum_i b_i(T). Seen from one step t it is an exact parabola in that step's rate,

    sum_i w_i(t+1) [(1 - eta h_i)^2 b_i(t) + (eta h_i)^2],      w_i(t) = prod_{s >= t} (1 - eta_s h_i)^2

where b(t) depends on the earlier rates alone and the weights w(t+1), the adjoint of the recursion, on the later ones.
So the best rate of step t with all others fixed is sum_i w_i h_i b_i / sum_i w_i h_i^2 (b_i + 1). A sweep forwards sets
every rate to it and carries b along, a sweep backwards does so and carries w along. No sweep can raise the loss, there
is no step size to choose, and a dozen sweeps reach the minimum. It is a local one; several starts are tried.
"""

from __future__ import annotations

import numpy as np

from llmrl_envs.interface.statistics import Floats, Integers
from llmrl_envs.quadratic.model import NoisyQuadratics, expected_losses

_TRUST = 2.0
"""Largest factor by which a sweep changes a rate: later and earlier rates were chosen for one nearby."""
_LANES_AT_ONCE = 64


def optimal_schedule(quadratic: NoisyQuadratics, tolerance: float = 1e-9, max_sweeps: int = 200) -> Floats:  # [T]
    """Learning rates with the lowest expected final loss of one job, float64[T].

    Args:
        quadratic: One job.
        tolerance: Sweeps end when they lower the excess loss by less than this share.
        max_sweeps: Sweeps end at the latest after so many, forwards and backwards counted as one.

    Raises:
        ValueError: There is not exactly one job.
    """
    if len(quadratic) != 1:
        raise ValueError(f"quadratic: expected one job, got {len(quadratic)}; optimal_schedules takes many")
    return optimal_schedules(quadratic, tolerance, max_sweeps)[:, 0]


def optimal_schedules(
    quadratics: NoisyQuadratics, tolerance: float = 1e-9, max_sweeps: int = 200
) -> Floats:  # [max T, E]
    """The same for many jobs: a column each, with zeros after the end of its budget."""
    rates = np.zeros((int(quadratics.total_steps.max()), len(quadratics)))
    # Jobs of like budgets together: a group takes as many steps as its longest.
    order = np.argsort(quadratics.total_steps, kind="stable")
    for begin in range(0, len(order), _LANES_AT_ONCE):
        group = order[begin : begin + _LANES_AT_ONCE]
        found = _best_of_starts(quadratics[group], tolerance, max_sweeps)
        rates[: len(found), group] = found
    return rates


def _best_of_starts(quadratics: NoisyQuadratics, tolerance: float, max_sweeps: int) -> Floats:
    found = [_descend(quadratics, start, tolerance, max_sweeps) for start in _starts(quadratics)]
    final = np.array([expected_losses(quadratics, rates)[-1] for rates in found])
    best = final.argmin(axis=0)
    return np.asarray(np.stack(found)[best, :, np.arange(len(quadratics))].T)


def _starts(quadratics: NoisyQuadratics) -> tuple[Floats, ...]:
    """Three shapes at a stable rate: linear, constant, and one that falls like 1 / t after a tenth of the budget."""
    steps = np.arange(int(quadratics.total_steps.max()))[:, None]
    progress = steps / quadratics.total_steps
    running = progress < 1.0
    stable = 1.0 / quadratics.curvature.max(axis=1)
    peak = np.minimum(quadratics.reference_rate, stable)
    linear = peak * (1.0 - progress)
    constant = np.broadcast_to(peak / 3.0, progress.shape)
    hyperbolic = np.minimum(2.0 * peak, stable) / np.maximum(1.0, 10.0 * progress)
    return tuple(np.where(running, shape, 0.0) for shape in (linear, constant, hyperbolic))


def _descend(quadratics: NoisyQuadratics, start: Floats, tolerance: float, max_sweeps: int) -> Floats:  # [T, E]
    sweeps = _Sweeps(quadratics, start)
    loss = np.full(len(quadratics), np.inf)
    for _ in range(max_sweeps):
        sweeps.backwards()
        new = sweeps.forwards()
        if (loss - new <= tolerance * new).all():
            break
        loss = new
    return sweeps.rates


class _Sweeps:
    """Rates of E jobs, with the normalised moments before each step and the weights after it.

    Attributes:
        rates: float64[T, E].
    """

    def __init__(self, quadratics: NoisyQuadratics, start: Floats) -> None:
        steps, lanes = start.shape
        self.rates: Floats = start.copy()
        self._curvature: Floats = np.ascontiguousarray(quadratics.curvature.T)
        self._budgets: Integers = quadratics.total_steps
        self._moments: Floats = np.empty((steps + 1, len(self._curvature), lanes))
        self._weights: Floats = np.empty((steps + 1, len(self._curvature), lanes))
        self._moments[0] = quadratics.normalised_initial()
        self._weights[steps] = 1.0
        for step in range(steps):
            self._carry_moments(step)

    def backwards(self) -> None:
        """Improves every rate, the last first."""
        for step in reversed(range(len(self.rates))):
            self._improve(step)
            self._weights[step] = (1.0 - self._curvature * self.rates[step]) ** 2 * self._weights[step + 1]

    def forwards(self) -> Floats:
        """Improves every rate, the first first; returns sum_i b_i after the last step, float64[E]."""
        for step in range(len(self.rates)):
            self._improve(step)
            self._carry_moments(step)
        return np.asarray(self._moments[-1].sum(axis=0))

    def _carry_moments(self, step: int) -> None:
        shrink = self._curvature * self.rates[step]
        self._moments[step + 1] = (1.0 - shrink) ** 2 * self._moments[step] + shrink**2

    def _improve(self, step: int) -> None:
        weighted, moments = self._weights[step + 1] * self._curvature, self._moments[step]
        down = np.einsum("de,de->e", weighted, moments)
        up = np.einsum("de,de,de->e", weighted, self._curvature, moments + 1.0)
        rate = self.rates[step]
        # Of a parabola the best point of the trusted range is the one nearest to its minimum.
        nearest = np.clip(down / up, rate / _TRUST, rate * _TRUST)
        self.rates[step] = np.where(step < self._budgets, nearest, 0.0)
