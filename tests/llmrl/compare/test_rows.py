"""What a single start comes to: steps to the target, tuned rates, costs, curves."""

import pytest

from llmrl.compare.cache import RunResult
from llmrl.compare.compute import Costs, compute_of
from llmrl.compare.curves import mean_curve, mean_curves
from llmrl.compare.plan import Cell, Plan
from llmrl.compare.rows import find_oracles, find_targets, make_row, steps_to_target, tuned_factors
from llmrl.compare.scoring import Oracle
from llmrl.hosts.curve import CurvePoint


def curve(*losses: float | None, rate: float = 1e-3) -> tuple[CurvePoint, ...]:
    return tuple(CurvePoint(10 * place, loss, None, rate) for place, loss in enumerate(losses))


def result(loss: float | None = 2.0, *, tokens: int = 100, **changes) -> RunResult:
    values = {
        "loss_initial": 3.0, "loss_test": loss, "accuracy_test": None, "diverged": loss is None, "seconds": 1.0,
        "tokens_trained": tokens, "tokens_evaluated": 0, **changes,
    }  # fmt: skip
    return RunResult(**values)


def cell(method: str, regime: str, key: str, *, factor: float = 1.0, seed: int = 0) -> Cell:
    return Cell(0, method, regime, factor, factor * 1e-3, seed, key, reused=False)


SWEEP = Plan(
    rows=[cell("x", "default", "x"), cell("x", "tuned", "x3", factor=3.0), cell("hold", "tuned", "h", factor=3.0)],
    sweep=[cell("linear", "tuned", f"l{factor}", factor=factor) for factor in (1.0, 3.0)],
)
FOUND = {
    "l1.0": result(2.5, curve=curve(3.0, 2.8, 2.6)),
    "l3.0": result(2.0, tokens=140, curve=curve(3.0, 2.4, 2.1)),
    "x": result(1.5, tokens=240, tokens_evaluated=36, num_trials=2),
    "x3": result(1.4),
    "h": result(1.3),
}


def test_steps_to_the_target_by_hand() -> None:
    points = curve(3.0, None, 2.2, 2.1, 2.3)
    assert steps_to_target(points, 2.2) == 20
    assert steps_to_target(points, 2.15) == 30
    assert steps_to_target(points, 2.0) is None
    assert steps_to_target(points, float("nan")) is None
    assert steps_to_target((), 2.0) is None


def test_the_target_is_where_the_best_of_the_sweep_ends() -> None:
    oracles = find_oracles(SWEEP, 1, FOUND)
    assert oracles[0].learning_rate == pytest.approx(3e-3)
    assert find_targets(SWEEP, oracles, FOUND) == {(0, 0): 2.1}
    assert tuned_factors(SWEEP, oracles) == {0: 3.0}


def test_a_sweep_without_a_finite_loss_tunes_nothing() -> None:
    oracles = find_oracles(SWEEP, 1, {**FOUND, "l1.0": result(None), "l3.0": result(None)})
    assert tuned_factors(SWEEP, oracles) == {}


@pytest.mark.parametrize(
    ("points", "target", "steps", "reached"),
    [
        (curve(3.0, 2.0), 2.1, 10, True),
        (curve(3.0, 2.5), 2.1, None, False),
        ((), 2.1, None, None),
        (curve(3.0, 2.0), float("nan"), None, None),
    ],
)
def test_never_and_not_known_are_told_apart(points, target: float, steps: int | None, reached: bool | None) -> None:
    oracle = Oracle(1e-3, {0: 2.0}, at_edge=False)
    row = make_row(cell("x", "default", "x"), "t", result(curve=points), oracle, target=target, cost=1.0)
    assert (row["steps_to_target"], row["target_reached"]) == (steps, reached)


def test_costs_by_hand() -> None:
    costs = Costs(SWEEP, FOUND, {"x": {}, "hold": {"depends_on_rate": False}})
    # A run of the sweep trains 120 tokens on average; three evaluated tokens cost as much as a trained one.
    assert costs.of(SWEEP.rows[0]) == pytest.approx((240 + 36 / 3) / 120)
    # A tuned start of a method that needs the rate pays for the sweep, 240 tokens.
    assert costs.of(SWEEP.rows[1]) == pytest.approx((100 + 240) / 120)
    assert costs.of(SWEEP.rows[2]) == pytest.approx(100 / 120)
    assert Costs(Plan(), FOUND, {}).of(SWEEP.rows[0]) is None


def test_totals_by_hand() -> None:
    rows = [{"method": c.method, "regime": c.regime, "cost": 2.0 + place} for place, c in enumerate(SWEEP.rows)]
    told = compute_of(1, SWEEP, FOUND, ["x", "hold"], rows)
    assert (told["x"]["num_jobs"], told["x"]["num_runs"], told["x"]["num_trainings"]) == (2, 2, 3)
    assert (told["x"]["cost_per_job"], told["x"]["cost_per_tuned_job"]) == (2.0, 3.0)
    assert (told["hold"]["cost_per_job"], told["hold"]["cost_per_tuned_job"]) == (None, 4.0)
    assert (told["sweep"]["cost_per_job"], told["sweep"]["tokens_trained_per_job"]) == (2.0, 240)
    assert told["x"]["peak_memory_bytes"] is None


def test_a_mean_curve_by_hand() -> None:
    one = (CurvePoint(0, 3.0), CurvePoint(10, 2.0, 2.5, 1e-3), CurvePoint(15, 1.9, 2.0, 1e-3))
    two = (CurvePoint(0, 3.0), CurvePoint(10, None, 2.7, 1e-5), CurvePoint(20, 1.0, 2.0, 1e-3))
    assert mean_curve([one, two]) == {
        "step": [0, 10],
        "loss_validation": [3.0, None],
        "loss_train": [None, 2.6],
        "learning_rate": [None, 1e-4],
    }


def test_of_the_wrong_rates_the_outermost_are_shown() -> None:
    factors = (0.1, 0.3, 1.0, 3.0, 10.0)
    cells = [cell("x", "default" if factor == 1.0 else "wrong", "k", factor=factor) for factor in factors]
    shown = mean_curves(
        Plan(rows=[*cells, cell("x", "tuned", "k", factor=3.0)]), ["t"], {"k": result(curve=curve(3.0))}
    )
    assert [(c["regime"], c["factor"]) for c in shown] == [
        ("wrong", 0.1), ("default", 1.0), ("wrong", 10.0), ("tuned", 3.0)
    ]  # fmt: skip
    assert mean_curves(Plan(rows=cells), ["t"], {"k": result()}) == []
