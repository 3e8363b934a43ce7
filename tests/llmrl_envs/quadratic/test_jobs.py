"""Jobs in training: the exact losses, and measurements whose moments are those of simulated mini-batches."""

from __future__ import annotations

import numpy as np
import pytest
from llmrl_envs.quadratic.jobs import QuadraticJobs, running_mean
from llmrl_envs.quadratic.model import NoisyQuadratics, expected_losses


def started(quadratics: NoisyQuadratics) -> QuadraticJobs:
    jobs = QuadraticJobs(len(quadratics), quadratics.curvature.shape[1])
    jobs.start(np.arange(len(quadratics)), quadratics)
    return jobs


def repeat(quadratics: NoisyQuadratics, count: int) -> NoisyQuadratics:
    """The same job many times over, each with mini-batches of its own."""
    many = quadratics[np.zeros(count, np.int64)]
    many.seed[:] = np.arange(count)
    return many


def test_ragged_intervals_follow_the_closed_form(draw) -> None:
    quadratics = draw(300, total_steps=(40, 120))
    jobs = started(quadratics)
    rng = np.random.default_rng(0)
    rates = rng.uniform(0.0, 1.5, (120, 300)) * quadratics.reference_rate
    expected = expected_losses(quadratics, np.where(np.arange(120)[:, None] < quadratics.total_steps, rates, 0.0))
    lanes = np.arange(300)
    for _ in range(6):
        num_steps = rng.integers(1, 9, 300)
        places = np.minimum(jobs.step + np.arange(num_steps.max())[:, None], 119)
        before = jobs.step.copy()
        statistics = jobs.run_interval(num_steps, rates[places, lanes])
        np.testing.assert_array_equal(jobs.step, before + num_steps)
        np.testing.assert_array_equal(statistics.step, jobs.step)
        np.testing.assert_allclose(jobs.expected_loss(), expected[jobs.step, lanes], rtol=1e-12)
        np.testing.assert_array_equal(np.isfinite(statistics.loss), statistics.valid)
        np.testing.assert_array_equal(np.isfinite(statistics.gradient_norm), statistics.valid)


def test_measurements_have_the_moments_of_mini_batches(by_hand) -> None:
    """Simulated at parameters of typical size, and for the cosine at parameters drawn around the optimum."""
    curvature, initial, noise = np.array([1.0, 0.4, 0.1, 0.05]), np.array([0.8, 1.0, 2.0, 4.0]), 0.3
    one = by_hand(curvature, initial, noise=noise, floor=0.2, total_steps=2)
    runs, rate = 60_000, 0.9
    jobs = started(repeat(one, runs))
    shown = jobs.run_interval(np.full(runs, 1), np.full((1, runs), rate))
    rng = np.random.default_rng(1)

    def drawn_noise() -> np.ndarray:
        return rng.standard_normal((runs, 4)) * np.sqrt(noise * curvature)

    squares = ((curvature * np.sqrt(initial) + drawn_noise()) ** 2).sum(axis=1)
    seen = shown.gradient_norm[:, 0] ** 2
    assert seen.mean() == pytest.approx(squares.mean(), abs=4.5 * squares.std() * np.sqrt(2.0 / runs))
    assert seen.var() == pytest.approx(squares.var(), rel=0.06)
    np.testing.assert_allclose(shown.update_norm**2, 0.9 * squares.mean() + 0.1 * seen, rtol=0.01)
    np.testing.assert_allclose(shown.step_size, rate * shown.update_norm / 10.0)

    x = rng.standard_normal((runs, 4)) * np.sqrt(initial)
    first = curvature * x + drawn_noise()
    second = curvature * (x - rate * first) + drawn_noise()
    products = (first * second).sum(axis=1)
    size = np.sqrt((first**2).sum(axis=1).mean() * (second**2).sum(axis=1).mean())
    assert shown.momentum_cosine[0] == pytest.approx(products.mean() / size, abs=4.5 * products.std() / size / 245)
    signal = (curvature**2 * initial).sum()
    assert shown.signal_to_noise[0] == pytest.approx(np.sqrt(signal / (signal + noise * curvature.sum())))

    losses = shown.loss[:, 0]
    expected = one.initial_loss[0]
    assert losses.mean() == pytest.approx(expected, abs=4.5 * 0.05 * expected / np.sqrt(runs))
    assert losses.std() / losses.mean() == pytest.approx(0.05, rel=0.02)
    assert abs(np.corrcoef(losses, seen)[0, 1]) < 0.02


def test_the_update_norm_is_a_running_mean_step_by_step(draw) -> None:
    quadratics = draw(300)
    jobs, rng = started(quadratics), np.random.default_rng(6)
    twin = jobs.norms(np.arange(300))[0] ** 2
    for _ in range(4):
        num_steps = rng.integers(1, 30, 300)
        rates = rng.uniform(0.0, 1.0, (29, 300)) * quadratics.reference_rate
        shown = jobs.run_interval(num_steps, rates)
        for lane in range(300):
            for norm in shown.gradient_norm[lane, : num_steps[lane]]:
                twin[lane] = 0.9 * twin[lane] + 0.1 * norm**2
            mean_rate = rates[: num_steps[lane], lane].mean()
            assert shown.update_norm[lane] == pytest.approx(np.sqrt(twin[lane]))
            assert shown.step_size[lane] == pytest.approx(
                mean_rate * np.sqrt(twin[lane]) / quadratics.weight_norm[lane]
            )


def test_a_running_mean_by_hand() -> None:
    values = np.array([[0.0, 10.0], [20.0, 1e9]])
    assert running_mean(np.array([10.0, 20.0]), values, np.array([2, 1])) == pytest.approx([10.1, 19.0])


def test_one_mini_batch_hardly_changes_the_update_norm(by_hand) -> None:
    """As with Adam; the gradient of a single mini-batch at times has a third of its usual norm."""
    jobs = started(repeat(by_hand([1.0, 0.1, 0.02], [0.1, 0.1, 0.1], noise=1.0, floor=0.1, total_steps=100), 5_000))
    usual = jobs.norms(np.arange(5_000))[0]
    shown = jobs.run_interval(np.full(5_000, 1), np.zeros((1, 5_000)))
    assert (shown.gradient_norm[:, 0] / usual).min() < 1 / 3
    assert (shown.update_norm / usual).min() > 0.94
    shown = jobs.run_interval(np.full(5_000, 40), np.zeros((40, 5_000)))
    assert 1.0 < np.median(usual / shown.update_norm) < 1.1
    assert np.log(shown.update_norm).std() < 0.3 * np.log(shown.gradient_norm[:, 0]).std()


def test_cosine_tells_too_high_from_too_low(by_hand) -> None:
    job = by_hand([1.0, 0.5], [4.0, 4.0], noise=0.01, floor=0.1, total_steps=10)
    cosines = []
    for rate in (0.01, 1.9):
        jobs = started(job)
        cosines.append(jobs.run_interval(np.array([4]), np.full((4, 1), rate)).momentum_cosine[0])
    assert cosines[0] > 0.9
    assert cosines[1] < -0.3


def test_one_job_and_many_give_the_same_bits(draw) -> None:
    quadratics = draw(700)
    together, rng = started(quadratics), np.random.default_rng(3)
    num_steps = rng.integers(1, 30, 700)
    rates = rng.uniform(0.0, 1.0, (29, 700)) * quadratics.reference_rate
    statistics = together.run_interval(num_steps, rates)
    for lane in (0, 255, 256, 699):
        alone = started(quadratics[lane : lane + 1])
        count = int(num_steps[lane])
        shown = alone.run_interval(num_steps[lane : lane + 1], rates[:count, lane : lane + 1])
        assert alone.expected_loss()[0] == together.expected_loss()[lane]
        np.testing.assert_array_equal(shown.loss[0], statistics.loss[lane, :count])
        np.testing.assert_array_equal(shown.gradient_norm[0], statistics.gradient_norm[lane, :count])
        assert shown.momentum_cosine[0] == statistics.momentum_cosine[lane]
        assert shown.update_norm[0] == statistics.update_norm[lane]
        assert shown.step_size[0] == statistics.step_size[lane]


def test_what_overflows_stays_a_number(by_hand) -> None:
    jobs = started(by_hand([1.0, 0.5], [1.0, 1.0], noise=0.1, floor=0.1, total_steps=100))
    statistics = jobs.run_interval(np.array([100]), np.full((100, 1), 1e4))
    assert jobs.expected_loss()[0] == np.inf
    for values in (statistics.loss, statistics.gradient_norm, statistics.step_size, statistics.update_norm):
        assert np.isfinite(values).all()
    assert statistics.momentum_cosine[0] == -1.0
    assert statistics.signal_to_noise[0] == 1.0


def test_rolling_back_restores_the_marked_parameters(draw) -> None:
    jobs = started(draw(3))
    rates = np.tile(jobs.quadratics.reference_rate, (5, 1))
    jobs.run_interval(np.full(3, 5), rates)
    marked = jobs.expected_loss()
    jobs.mark_best(np.array([True, False, True]))
    jobs.run_interval(np.full(3, 5), rates)
    later = jobs.expected_loss()
    jobs.roll_back(np.array([True, False, False]))
    np.testing.assert_array_equal(jobs.expected_loss(), [marked[0], later[1], later[2]])
    np.testing.assert_array_equal(jobs.step, [10, 10, 10])


def test_rolling_back_restores_the_running_mean_with_the_parameters(draw) -> None:
    jobs, rates = started(draw(2)), np.zeros((5, 2))
    jobs.run_interval(np.full(2, 5), rates)
    jobs.mark_best(np.array([True, True]))
    marked = jobs.state_dict()["mean_square"]
    jobs.run_interval(np.full(2, 5), rates)
    later = jobs.state_dict()["mean_square"]
    jobs.roll_back(np.array([True, False]))
    np.testing.assert_array_equal(jobs.state_dict()["mean_square"], [marked[0], later[1]])
    assert (marked != later).all()


def test_state_goes_on_bit_for_bit(draw) -> None:
    quadratics = draw(4)
    jobs, again = started(quadratics), QuadraticJobs(4, 32)
    rates = np.tile(quadratics.reference_rate, (5, 1))
    jobs.run_interval(np.full(4, 5), rates)
    again.load_state_dict(jobs.state_dict())
    first, second = (each.run_interval(np.full(4, 5), rates) for each in (jobs, again))
    for name, value in vars(first).items():
        np.testing.assert_array_equal(value, getattr(second, name), err_msg=name)
    np.testing.assert_array_equal(jobs.expected_loss(), again.expected_loss())


def test_a_state_without_a_running_mean_begins_one(draw) -> None:
    quadratics = draw(4)
    jobs, again = started(quadratics), QuadraticJobs(4, 32)
    rates = np.tile(quadratics.reference_rate, (5, 1))
    jobs.run_interval(np.full(4, 5), rates)
    state = {name: value for name, value in jobs.state_dict().items() if "mean_square" not in name}
    again.load_state_dict(state)
    expected = jobs.norms(np.arange(4))[0] ** 2
    np.testing.assert_allclose(again.state_dict()["mean_square"], expected)
    np.testing.assert_allclose(again.state_dict()["best_mean_square"], expected)
    first, second = (each.run_interval(np.full(4, 5), rates) for each in (jobs, again))
    np.testing.assert_array_equal(first.loss, second.loss)


def test_a_job_that_does_not_fit_is_refused(draw) -> None:
    with pytest.raises(ValueError, match=r"expected curvature of shape \(1, 16\), got \(1, 32\)"):
        QuadraticJobs(1, 16).start(np.arange(1), draw(1))
    with pytest.raises(ValueError, match=r"expected curvature of shape \(2, 32\), got \(1, 32\)"):
        QuadraticJobs(2, 32).start(np.arange(2), draw(1))


def test_losses_without_noise_are_the_expected_ones(draw) -> None:
    quadratics = draw(20, loss_noise=(1e-12, 1e-12))
    rates = np.tile(3.0 * quadratics.reference_rate, (30, 1))
    statistics = started(quadratics).run_interval(np.full(20, 30), rates)
    np.testing.assert_allclose(statistics.loss.T, expected_losses(quadratics, rates)[:-1], rtol=1e-9)
