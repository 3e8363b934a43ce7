"""Jobs on noisy quadratics for the tests, drawn or made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from llmrl_envs.quadratic.model import NoisyQuadratics, QuadraticDistribution, draw_quadratics


@pytest.fixture
def draw() -> Callable[..., NoisyQuadratics]:
    """Jobs of the usual distribution, one for each of so many seeds."""

    def drawn(count: int, **changes: object) -> NoisyQuadratics:
        return draw_quadratics(QuadraticDistribution(**changes), [np.random.default_rng(seed) for seed in range(count)])

    return drawn


@pytest.fixture
def by_hand() -> Callable[..., NoisyQuadratics]:
    """One job whose mathematics is given and whose other properties are out of the way."""

    def made(
        curvature: Sequence[float], initial: Sequence[float], noise: float, floor: float, total_steps: int
    ) -> NoisyQuadratics:
        one = np.ones(1)
        return NoisyQuadratics(
            curvature=np.array([curvature], float),
            initial=np.array([initial], float),
            noise=noise * one,
            floor=floor * one,
            total_steps=np.array([total_steps]),
            reference_rate=0.5 / max(curvature) * one,
            reference_loss=one,
            given_rate=0.5 / max(curvature) * one,
            weight_norm=10.0 * one,
            loss_noise=0.05 * one,
            seed=np.array([7]),
        )

    return made
