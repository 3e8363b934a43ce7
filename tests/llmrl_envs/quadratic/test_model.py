"""The closed form against simulation, and what the distribution of jobs promises."""

from __future__ import annotations

import numpy as np
import pytest
from llmrl_envs.errors import UserError
from llmrl_envs.quadratic.model import QuadraticDistribution, draw_quadratics, expected_losses, spectrum


def linear(quadratics, factor: float = 1.0) -> np.ndarray:  # [T, E]
    progress = np.arange(int(quadratics.total_steps.max()))[:, None] / quadratics.total_steps
    return np.where(progress < 1.0, factor * quadratics.reference_rate * (1.0 - progress), 0.0)


def test_expected_losses_by_hand(by_hand) -> None:
    job = by_hand([1.0, 0.5], [1.0, 2.0], noise=0.1, floor=0.3, total_steps=2)
    # A: (1, 2) -> (0.25 + 0.025, 0.5625 * 2 + 0.0125) -> with rate 1: (0.1, 0.25 * 1.1375 + 0.05)
    expected = [0.3 + 0.5 * (1.0 + 1.0), 0.3 + 0.5 * (0.275 + 0.5 * 1.1375), 0.3 + 0.5 * (0.1 + 0.5 * 0.334375)]
    np.testing.assert_allclose(expected_losses(job, np.array([0.5, 1.0]))[:, 0], expected, rtol=1e-14)
    assert job.initial_loss[0] == pytest.approx(1.3)


def test_expected_losses_equal_simulated_training(by_hand) -> None:
    rng = np.random.default_rng(0)
    curvature, initial, noise = np.array([1.0, 0.3, 0.05]), np.array([0.5, 1.0, 4.0]), 0.4
    job = by_hand(curvature, initial, noise=noise, floor=0.2, total_steps=25)
    rates = 0.7 * (1.0 - np.arange(25) / 25)
    runs = 40_000
    x = rng.standard_normal((runs, 3)) * np.sqrt(initial)
    expected = expected_losses(job, rates)[:, 0]
    for step, rate in enumerate(rates):
        losses = 0.2 + 0.5 * (curvature * x**2).sum(axis=1)
        assert abs(losses.mean() - expected[step]) < 4.5 * losses.std() / np.sqrt(runs)
        gradient = curvature * x + rng.standard_normal(x.shape) * np.sqrt(noise * curvature)
        x = x - rate * gradient
    losses = 0.2 + 0.5 * (curvature * x**2).sum(axis=1)
    assert abs(losses.mean() - expected[-1]) < 4.5 * losses.std() / np.sqrt(runs)


def test_divergence_is_infinite_not_an_error(by_hand) -> None:
    job = by_hand([1.0, 0.5], [1.0, 1.0], noise=0.1, floor=0.1, total_steps=400)
    assert expected_losses(job, np.full(400, 100.0))[-1, 0] == np.inf


def test_the_reference_rate_is_the_best_linear_one(draw) -> None:
    jobs = draw(60)
    final = expected_losses(jobs, linear(jobs))[-1]
    np.testing.assert_allclose(final, jobs.reference_loss, rtol=1e-5)
    for factor in (0.25, 0.5, 0.8, 0.95, 1.05, 1.25, 2.0, 4.0):
        assert (expected_losses(jobs, linear(jobs, factor))[-1] > final).all(), factor


def test_jobs_are_what_the_distribution_says(draw) -> None:
    jobs = draw(400)
    assert (jobs.noise > 0).all()
    np.testing.assert_allclose(jobs.initial_loss - jobs.floor, 1.0)
    np.testing.assert_allclose(jobs.curvature[:, 0], 1.0)
    assert (np.diff(jobs.curvature, axis=1) < 0).all()
    for values, low, high in (
        (jobs.total_steps, 60, 1000),
        (jobs.floor, 0.05, 0.5),
        (jobs.loss_noise, 0.01, 0.1),
        (jobs.given_rate / jobs.reference_rate, 10**-1.5, 10**1.5),
        (1.0 / jobs.curvature[:, -1], 10**0.5, 10**2.5),
    ):
        assert values.min() >= low * (1 - 1e-12)
        assert values.max() <= high * (1 + 1e-12)
        # Log-uniform: a tenth of the draws near each end.
        place = (np.log(values) - np.log(low)) / (np.log(high) - np.log(low))
        assert 0.05 < (place < 0.1).mean() < 0.16
        assert 0.05 < (place > 0.9).mean() < 0.16


def test_spectrum_has_the_condition_number_asked_for() -> None:
    h = spectrum(16, np.array([0.5, 1.0, 2.0]), np.array([4.0, 100.0, 30.0]))
    np.testing.assert_allclose(h[0] / h[-1], [4.0, 100.0, 30.0])
    np.testing.assert_allclose(h[:, 1], 1.0 / (1.0 + 99.0 / 15.0 * np.arange(16)))


def test_a_generator_gives_the_same_job_alone_and_among_others() -> None:
    def draw(seeds):
        return draw_quadratics(QuadraticDistribution(), [np.random.default_rng(seed) for seed in seeds])

    together, alone = draw([1, 2, 3]), draw([2])
    for name, value in vars(alone).items():
        np.testing.assert_array_equal(value, getattr(together, name)[1:2], err_msg=name)
    assert len({*draw(range(50)).seed.tolist()}) == 50


def test_selecting_lanes_copies(draw) -> None:
    jobs = draw(4)
    part = jobs[np.array([2, 0])]
    assert len(part) == 2
    assert part.noise[0] == jobs.noise[2]
    part.noise[0] = -1.0
    assert jobs.noise[2] > 0


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"dimension": 1}, "dimension"),
        ({"total_steps": (5, 100)}, "total_steps"),
        ({"total_steps": (200, 100)}, "total_steps"),
        ({"largest_step": 1.5}, "largest_step"),
        ({"floor": (0.0, 0.5)}, "floor"),
        ({"log10_rate_error": (1.0, -1.0)}, "log10_rate_error"),
    ],
)
def test_a_wrong_distribution_is_told(settings: dict[str, object], where: str) -> None:
    with pytest.raises(UserError) as error:
        QuadraticDistribution(**settings)
    assert error.value.where == where
    assert error.value.expected
