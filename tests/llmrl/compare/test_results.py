"""Rows and aggregates of results that are made up, so that every number is known."""

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmrl.compare.cache import RunResult
from llmrl.compare.methods import resolve_methods, sweep_method
from llmrl.compare.plan import Plan, make_plan
from llmrl.compare.plot import draw_comparison
from llmrl.compare.report import print_report, table_cells
from llmrl.compare.results import ComparisonShape, aggregate_rows, make_results
from llmrl.run_directory import to_json_value


def result(loss: float | None, *, initial: float = 3.0, tokens: int = 100) -> RunResult:
    diverged = loss is None or loss > initial
    return RunResult(
        loss_initial=initial, loss_test=loss, accuracy_test=None, diverged=diverged, seconds=1.0, tokens_trained=tokens,
        tokens_evaluated=10,
    )  # fmt: skip


def plan_of(config) -> Plan:
    return make_plan(config, resolve_methods(config, "hold"), sweep_method(config), "cpu")


def results_of(config, losses) -> dict[str, Any]:
    """`losses` maps (method, given rate, seed) to a test loss."""
    plan = plan_of(config)
    found = {k: result(losses(run.method, run.learning_rate, run.seed)) for k, run in plan.runs.items()}
    return make_results(ComparisonShape.of(config), plan, found, {name: {} for name in resolve_methods(config, "hold")})


def made_up(method: str, rate: float, seed: int) -> float | None:
    if method == "policy":
        return 1.8 + 0.1 * seed
    if method == "constant":
        return None if rate > 0.05 else 2.5
    return {0.001: 2.5, 0.003: 2.2, 0.01: 2.0, 0.03: 2.3, 0.1: 4.0}[round(rate, 5)]


@pytest.fixture
def results(make_config) -> dict[str, Any]:
    return results_of(make_config(), made_up)


def select(results: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in results["rows"] if all(row[key] == value for key, value in wanted.items())]


def test_there_is_a_row_for_every_start(results: dict[str, Any]) -> None:
    starts = {(r["task"], r["method"], r["learning_rate_factor"], r["seed"]) for r in results["rows"]}
    assert len(starts) == len(results["rows"]) == 2 * 3 * 3 * 2
    assert {r["regime"] for r in select(results, learning_rate_factor=1)} == {"default"}
    assert {r["regime"] for r in results["rows"] if r["learning_rate_factor"] != 1} == {"wrong"}
    assert select(results, learning_rate_factor=10)[0]["learning_rate"] == pytest.approx(0.1)


def test_scores_are_against_the_best_of_the_sweep(results: dict[str, Any]) -> None:
    assert results["oracle"]["squares"] == {"learning_rate": 0.01, "loss_test": 2.0, "at_edge": False}
    assert results["oracle_at_edge"] is False
    assert select(results, method="policy", seed=0)[0]["score"] == pytest.approx(1.2)
    assert select(results, method="policy", seed=1)[0]["score"] == pytest.approx(1.1)
    assert select(results, method="linear", learning_rate_factor=1)[0]["score"] == pytest.approx(1.0)
    # 4.0 is worse than the floor: (3 - 4) / (3 - 2) = -1 just reaches it.
    assert select(results, method="linear", learning_rate_factor=10)[0]["score"] == pytest.approx(-1.0)
    (lost,) = select(results, method="constant", learning_rate_factor=10, task="rhymes", seed=1)
    assert (lost["score"], lost["loss_test"], lost["diverged"]) == (-1.0, None, True)


def test_a_run_that_stands_for_several_rows_is_said_to(results: dict[str, Any]) -> None:
    for factor, reused in ((0.1, False), (1, True), (10, True)):
        assert {row["reused"] for row in select(results, method="policy", learning_rate_factor=factor)} == {reused}
    assert not any(row["reused"] for row in results["rows"] if row["method"] != "policy")


def test_aggregates_by_hand(results: dict[str, Any]) -> None:
    policy = results["aggregate"]["policy"]
    # Scores 1.2, 1.1 in both tasks: a quarter of 4, 8 or 12 values is cut on either side.
    for regime, num_runs in (("default", 4), ("wrong", 8), ("all", 12)):
        assert policy[regime]["iqm"] == pytest.approx(1.15)
        assert (policy[regime]["num_runs"], policy[regime]["num_scored"]) == (num_runs, num_runs)
        assert policy[regime]["failures"] == 0
        assert (policy[regime]["ci_low"], policy[regime]["ci_high"]) == pytest.approx((1.1, 1.2))
        assert policy[regime]["probability_of_improvement"] == 1.0
    constant = results["aggregate"]["constant"]
    # Default rate: 2.5 against 2.0. Wrong: 2.5 ties with linear's 2.5 at 0.001, a lost run loses against 4.0.
    assert constant["default"]["probability_of_improvement"] == 0.0
    assert constant["wrong"]["probability_of_improvement"] == 0.25
    assert constant["wrong"]["failures"] == 4
    assert constant["wrong"]["iqm"] == pytest.approx((2 * 0.5 + 2 * -1.0) / 4)
    linear = results["aggregate"]["linear"]
    assert {linear[regime]["probability_of_improvement"] for regime in linear} == {0.5}
    assert results["by_factor"]["linear"]["0.1"]["iqm"] == pytest.approx(0.5)
    assert list(results["by_factor"]["linear"]) == ["0.1", "1", "10"]


def test_compute_counts_every_run_once_and_the_whole_sweep(results: dict[str, Any]) -> None:
    compute = results["compute"]
    # Two tasks and two seeds; the policy's run is the same from every rate, the sweep takes three rates.
    assert (compute["policy"]["num_jobs"], compute["policy"]["num_runs"]) == (12, 4)
    assert (compute["policy"]["tokens_trained"], compute["policy"]["tokens_trained_per_job"]) == (400, 100)
    assert (compute["linear"]["num_jobs"], compute["linear"]["num_runs"]) == (12, 12)
    assert (compute["sweep"]["num_jobs"], compute["sweep"]["num_runs"]) == (4, 12)
    assert (compute["sweep"]["tokens_trained"], compute["sweep"]["tokens_trained_per_job"]) == (1200, 300)
    assert compute["sweep"]["tokens_evaluated_per_job"] == 30


def test_the_sweep_shares_the_runs_of_linear_at_equal_rates(make_config) -> None:
    plan = plan_of(make_config())
    # Per task and seed: 1 policy, 3 constant, 3 linear, and of the sweep's 3 rates one is linear's.
    assert len(plan.runs) == 2 * 2 * (1 + 3 + 3 + 2)
    assert [run.task for run in plan.runs.values()] == sorted(run.task for run in plan.runs.values())


def test_an_oracle_at_the_edge_is_warned_of(make_config) -> None:
    results = results_of(make_config(oracle_factors=[1, 3]), made_up)
    assert results["oracle"]["rhymes"]["at_edge"] is True
    assert results["oracle_at_edge"] is True
    assert sum("edge of the grid" in warning for warning in results["warnings"]) == 2


def test_without_a_yardstick_there_is_no_score_and_no_infinity(make_config) -> None:
    results = results_of(make_config(), lambda method, rate, seed: 3.0)
    assert {row["score"] for row in results["rows"]} == {None}
    assert results["aggregate"]["policy"]["all"]["iqm"] is None
    assert results["aggregate"]["policy"]["all"]["num_scored"] == 0
    assert results["aggregate"]["policy"]["all"]["probability_of_improvement"] == 0.5
    assert sum("no score" in warning for warning in results["warnings"]) == 2
    json.dumps(to_json_value(results), allow_nan=False)


def test_a_sweep_of_lost_runs_is_no_yardstick_either(make_config) -> None:
    results = results_of(make_config(), lambda method, rate, seed: None if method == "linear" else 2.0)
    assert results["oracle"]["squares"] == {"learning_rate": None, "loss_test": None, "at_edge": True}
    assert {row["score"] for row in results["rows"]} == {None}
    assert results["aggregate"]["policy"]["all"]["probability_of_improvement"] == 1.0


def test_one_seed_has_no_interval_and_says_so(make_config) -> None:
    results = results_of(make_config(seeds=[5]), made_up)
    assert results["aggregate"]["policy"]["all"]["ci_low"] is None
    assert "one seed: there are no intervals" in results["warnings"]


def test_without_linear_there_is_no_improvement_to_tell(make_config) -> None:
    results = results_of(make_config(methods=["policy", "constant"]), made_up)
    assert results["aggregate"]["policy"]["all"]["probability_of_improvement"] is None
    assert results["aggregate"]["policy"]["all"]["iqm"] == pytest.approx(1.15)


def test_without_factor_one_there_is_no_default_regime(make_config) -> None:
    results = results_of(make_config(learning_rate_factors=[0.1]), made_up)
    assert set(results["aggregate"]["policy"]) == {"wrong", "all"}


def test_no_rows_add_up_to_nothing() -> None:
    assert aggregate_rows([], [])["iqm"] is None


@pytest.mark.parametrize("num_copies", [0, 8])
def test_every_outcome_can_be_drawn_and_told(make_config, tmp_path: Path, num_copies: int) -> None:
    """Nothing scored, lost runs, one rate, and more tasks and methods than there is room for."""
    config = make_config(learning_rate_factors=[1], seeds=[0])
    results = results_of(config, lambda method, rate, seed: None if method == "constant" else 3.0)
    for copy in range(num_copies):
        task, method = f"task {copy}", f"runs/a/policy/far/down/in/the/folders/{copy}"
        results["rows"] += [{**row, "task": task} for row in select(results, task="squares")]
        results["rows"] += [{**row, "method": method} for row in select(results, method="policy")]
        results["oracle"][task] = results["oracle"]["squares"]
        for part in ("aggregate", "by_factor", "compute"):
            results[part][method] = results[part]["policy"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_comparison(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    console = Console(file=io.StringIO(), width=80)
    print_report(results, console)
    printed = console.file.getvalue()
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert "no score" in printed
    assert "1/2" not in printed
    assert "2/2" in printed


def test_the_table_tells_scores_with_their_intervals(results: dict[str, Any]) -> None:
    headings, lines = table_cells(results)
    assert headings[:3] == ["method", "default rate", "wrong rate"]
    cells = {line[0]: dict(zip(headings[1:], line[1:], strict=True)) for line in lines}
    assert list(cells["policy"].values())[:2] == ["1.150\n[1.100, 1.200]", "1.150\n[1.100, 1.200]"]
    assert list(cells["policy"].values())[2:5] == ["100 %", "0/12", "100"]
    # Every run trains 100 tokens, and evaluates 10, of which three cost as much as a trained one.
    assert (cells["policy"]["linear runs"], cells["policy"]["score a run"]) == ("1.00", "1.15")
    assert (cells["sweep"]["tokens a job"], cells["sweep"]["linear runs"]) == ("300", "3.00")
