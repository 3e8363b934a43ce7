"""Rates of the baselines against hand-computed numbers and against the libraries that they come from."""

import numpy as np
import pytest
import torch
from transformers import optimization
from transformers.optimization import GreedyLR

from llmrl.compare.baselines.rates import FixedRates, greedy_bounded_rates, greedy_rates, plateau_rates


def trace(rates, losses):
    """The rate after each loss."""
    found = []
    for loss in losses:
        rates.observe(loss)
        found.append(float(rates.learning_rate(np.array([0]))[0]))
    return found


def test_fixed_rates_are_a_shape_over_a_peak():
    rates = FixedRates("linear", 2e-3, 10, warmup_steps=2)
    found = [float(rates.learning_rate(np.array([step]))[0]) for step in (0, 1, 2, 6, 9)]
    assert found == pytest.approx([2e-3 / 3, 4e-3 / 3, 2e-3, 1e-3, 2.5e-4])


def test_plateau_halves_after_the_third_loss_without_improvement():
    losses = [3.0, 2.0, 2.1, 2.0, 2.0, 1.0, 1.0, 1.0, float("nan")]
    assert trace(plateau_rates(1e-3), losses) == [1e-3] * 4 + [5e-4] * 4 + [2.5e-4]


def test_greedy_is_the_library_with_its_defaults():
    losses = np.random.default_rng(0).normal(size=60).cumsum().tolist()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-2)
    library, expected = GreedyLR(optimizer), []
    for loss in losses:
        library.step(loss)
        expected.append(optimizer.param_groups[0]["lr"])
    assert trace(greedy_rates(5e-2), losses) == expected
    assert len(set(expected)) > 1


def test_greedy_defaults_never_lower_a_small_rate():
    assert trace(greedy_rates(1e-4), [1.0] + [2.0] * 40) == [1e-4] * 41
    falling = trace(greedy_rates(1e-4), list(range(12, 0, -1)))
    assert falling == pytest.approx([1e-4] * 10 + [1e-4 / 0.95] * 2)


def test_bounded_greedy_moves_after_two_and_stays_in_its_range():
    assert trace(greedy_bounded_rates(1e-3), [3.0, 2.0, 2.5, 2.5]) == pytest.approx(
        [1e-3, 1e-3 / 0.7, 1e-3 / 0.7, 1e-3]
    )
    assert trace(greedy_bounded_rates(1e-3), range(40, 0, -1))[-1] == pytest.approx(3e-2)
    assert trace(greedy_bounded_rates(1e-5), [0.0] + [1.0] * 40)[-1] == pytest.approx(1e-5 / 30)


@pytest.mark.parametrize(
    ("base", "library"),
    [
        ("constant", lambda optimizer: optimization.get_constant_schedule_with_warmup(optimizer, 5)),
        ("linear", lambda optimizer: optimization.get_linear_schedule_with_warmup(optimizer, 5, 50)),
        ("cosine", lambda optimizer: optimization.get_cosine_schedule_with_warmup(optimizer, 5, 50)),
        (
            "cosine_10",
            lambda optimizer: optimization.get_cosine_with_min_lr_schedule_with_warmup(
                optimizer, 5, 50, min_lr_rate=0.1
            ),
        ),
        ("inverse_sqrt", lambda optimizer: optimization.get_inverse_sqrt_schedule(optimizer, 5)),
        (
            "polynomial",
            lambda optimizer: optimization.get_polynomial_decay_schedule_with_warmup(
                optimizer, 5, 50, lr_end=0.0, power=2.0
            ),
        ),
        (
            "wsd",
            lambda optimizer: optimization.get_wsd_schedule(
                optimizer, 5, 9, num_training_steps=50, decay_type="linear", min_lr_ratio=0.0
            ),
        ),
        (
            "wsd_40",
            lambda optimizer: optimization.get_wsd_schedule(
                optimizer, 5, 18, num_training_steps=50, decay_type="linear", min_lr_ratio=0.0
            ),
        ),
    ],
)
def test_shapes_are_those_of_transformers_after_the_warm_up(base, library):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler, rates = library(optimizer), FixedRates(base, 1e-3, 50, warmup_steps=5)
    for step in range(50):
        if step >= 5:
            expected = optimizer.param_groups[0]["lr"]
            assert float(rates.learning_rate(np.array([step]))[0]) == pytest.approx(expected, abs=1e-12), step
        optimizer.step()
        scheduler.step()


def test_inverse_square_root_without_a_warm_up_takes_a_twentieth_of_the_budget():
    rates = FixedRates("inverse_sqrt", 1.0, 100)
    assert float(rates.learning_rate(np.array([15]))[0]) == pytest.approx((5 / 20) ** 0.5)
