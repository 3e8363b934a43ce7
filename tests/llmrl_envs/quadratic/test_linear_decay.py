"""The closed form of a linear decay against running its steps."""

from __future__ import annotations

import numpy as np
import pytest
from llmrl_envs.quadratic.linear_decay import linear_decay


def run_steps(peak_step: np.ndarray, total_steps: int) -> tuple[np.ndarray, np.ndarray]:
    kept, added = np.ones_like(peak_step), np.zeros_like(peak_step)
    for step in range(total_steps):
        taken = peak_step * (1.0 - step / total_steps)
        kept, added = (1.0 - taken) ** 2 * kept, (1.0 - taken) ** 2 * added + taken**2
    return kept, added


@pytest.mark.parametrize(("total_steps", "tolerance"), [(10, 5e-4), (30, 2e-5), (61, 5e-6), (500, 1e-6)])
def test_equals_running_the_steps(total_steps: int, tolerance: float) -> None:
    peak = np.geomspace(1e-4, 0.5, 24)[:, None]
    kept, kept_slope, added, added_slope = linear_decay(peak, np.array([total_steps]))
    expected_kept, expected_added = run_steps(peak, total_steps)
    np.testing.assert_allclose(kept, expected_kept, rtol=tolerance)
    np.testing.assert_allclose(added, expected_added, rtol=tolerance)
    higher, lower = run_steps(peak * 1.000001, total_steps), run_steps(peak / 1.000001, total_steps)
    width = 2.0 * np.log(1.000001)
    np.testing.assert_allclose(kept_slope, (higher[0] - lower[0]) / width, rtol=4 * tolerance, atol=1e-280)
    np.testing.assert_allclose(added_slope, (higher[1] - lower[1]) / width, rtol=4 * tolerance)


def test_one_step_decay_of_a_budget_of_two_by_hand() -> None:
    kept, added = run_steps(np.array([[0.4]]), 2)
    assert kept[0, 0] == pytest.approx(0.6**2 * 0.8**2)
    assert added[0, 0] == pytest.approx(0.4**2 * 0.8**2 + 0.2**2)


def test_lanes_have_their_own_budgets() -> None:
    peak = np.array([[0.3, 0.3], [0.01, 0.02]])
    together = linear_decay(peak, np.array([40, 200]))
    for lane, steps in enumerate((40, 200)):
        alone = linear_decay(peak[:, lane : lane + 1], np.array([steps]))
        for values, value in zip(together, alone, strict=True):
            np.testing.assert_array_equal(values[:, lane : lane + 1], value)
