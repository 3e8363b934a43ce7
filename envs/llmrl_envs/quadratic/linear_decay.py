"""What a linear decay to zero leaves of a noisy quadratic, without running its steps.

At peak step u (rate times curvature) over T steps the last j steps are u_j = a j, ..., a with a = u / T, so

    P = prod_{i=1}^{T} (1 - a i)^2                                    what is kept of the initial moment
    Q = sum_{j=1}^{T} (a j)^2 prod_{i=1}^{j-1} (1 - a i)^2            what the gradient noise adds

Both are smooth in their limits: sums over i become integrals with end corrections (Euler and Maclaurin), sums over j
are taken by Gauss-Legendre quadrature. At u <= 1/2 the relative error is below 1e-5 from 30 steps on (3e-4 at ten),
and the cost does not grow with T, which is what makes drawing a job cheaper than running it.
"""

from __future__ import annotations

import numpy as np

from llmrl_envs.interface.statistics import Floats, Integers

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)
_REACH = 4.5
"""Where exp(-a j^2) has fallen far enough, in units of a^-1/2."""


def linear_decay(
    peak_step: Floats,  # [D, E] rate times curvature, in (0, 0.9]
    total_steps: Integers,  # [E]
) -> tuple[Floats, Floats, Floats, Floats]:  # [D, E] each
    """P, dP / d log rate, Q, dQ / d log rate of a linear decay from `peak_step` to zero."""
    steps = np.asarray(total_steps, np.float64)
    slope = peak_step / steps
    reach = np.minimum(steps, _REACH / np.sqrt(slope))
    places = reach * (0.5 + 0.5 * _NODES[:, None, None])
    value, derivative, _, _ = _summand(slope, places)
    added = 0.5 * reach * (_WEIGHTS[:, None, None] * value).sum(axis=0)
    added_slope = 0.5 * reach * (_WEIGHTS[:, None, None] * derivative).sum(axis=0)
    value, derivative, growth, growth_slope = _summand(slope, steps)
    added += value * (0.5 + growth / 12.0)
    added_slope += derivative * (0.5 + growth / 12.0) + value * growth_slope / 12.0
    # The product over i <= T is that over i < T + 1.
    log_kept, log_kept_slope, _ = _log_product(slope, steps + 1.0)
    kept = np.exp(log_kept)
    return kept, kept * log_kept_slope, added, added_slope


def _log_product(slope: Floats, place: Floats) -> tuple[Floats, Floats, Floats]:
    """log prod_{i < place} (1 - slope i)^2, its derivative by log slope, and log(1 - slope place)."""
    position = slope * place
    log_rest = np.log1p(-position)
    over = position / (1.0 - position)
    log_product = -2.0 * (((1.0 - position) * log_rest + position) / slope + 0.5 * log_rest + slope * over / 12.0)
    # sum_{i < place} slope i / (1 - slope i), with 1 / (1 - position)^2 - 1 = over (2 + over)
    lost = -(log_rest + position) / slope - 0.5 * over + slope * over * (2.0 + over) / 12.0
    return log_product, -2.0 * lost, log_rest


def _summand(slope: Floats, place: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Summand j = place of Q and its derivative by log slope; d log summand / dj and the slope's derivative of that."""
    log_product, log_product_slope, log_rest = _log_product(slope, place)
    value = (slope * place) ** 2 * np.exp(log_product)
    growth = 2.0 / place + 2.0 * log_rest
    over = slope * place / (1.0 - slope * place)
    return value, value * (2.0 + log_product_slope), growth, -2.0 * over
