"""Sections of the report on methods against each other, and on what failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llmrl.compare.page_parts import Cell, Palette, details, interval, number, p_value, section, share, short, table
from llmrl.compare.page_scores import shaded
from llmrl.compare.regimes import ALL_ROWS, TITLES, main_regime
from llmrl.compare.report import shown_regimes
from llmrl.compare.svg import interval_bar

MAX_LISTED_FAILURES = 60
_SIGNIFICANT = 0.05


def pairs_section(results: Mapping[str, Any], palette: Palette) -> str:
    """Paired differences of the reference method to every other one, a table for every regime."""
    reference = results["paired"]["reference"]
    regimes = {name: told for name, told in results["paired"]["regimes"].items() if told}
    tables = "".join(
        details(TITLES[regime], _pair_table(told, palette, reference), is_open=regime == main_regime(regimes))
        for regime, told in regimes.items()
    )
    intro = (
        f"Score of {short(reference)} minus score of the other method, from the same task, rate and seed: above zero "
        f"{short(reference)} is better. p: Wilcoxon's signed-rank test over seeds of all tasks, and over tasks; both "
        "with Holm's correction for the number of methods. Bold: below 0.05."
    )
    body = tables or "<p>No two methods have a scored start in common.</p>"
    return section("pairs", f"{short(reference)} against each method", intro, body)


def _pair_table(told: Mapping[str, Any], palette: Palette, reference: str) -> str:
    ends = [
        value
        for entry in told.values()
        for name in ("mean", "iqm")
        for value in (entry[name]["value"], entry[name]["task_ci_low"], entry[name]["task_ci_high"])
        if value is not None
    ]
    span = (min([*ends, -0.02]), max([*ends, 0.02]))
    kind = palette.kind(reference)
    lines = [
        [
            palette.name_cell(method),
            _difference_cell(entry["mean"], span, kind),
            _difference_cell(entry["iqm"], span, kind),
            Cell(number(entry["worst"]), entry["worst"]),
            *(_p_cell(entry[key]) for key in ("p_value", "p_value_holm", "p_value_tasks", "p_value_tasks_holm")),
            Cell(f"{entry['num_pairs']} / {entry['num_units']} / {entry['num_tasks']}", entry["num_pairs"]),
        ]
        for method, entry in told.items()
    ]
    headings = ["method", "mean difference", "IQM of differences", "worst", "p", "p (Holm)", "p over tasks",
                "p over tasks (Holm)", "pairs / seeds / tasks"]  # fmt: skip
    return table(headings, lines, "scores")


def _difference_cell(entry: Mapping[str, Any], span: tuple[float, float], kind: str) -> Cell:
    inner = None if entry["ci_low"] is None else (entry["ci_low"], entry["ci_high"])
    outer = None if entry["task_ci_low"] is None else (entry["task_ci_low"], entry["task_ci_high"])
    bar = interval_bar(entry["value"], inner, outer, span=span, marks=(0.0,), kind=kind)
    told = "" if outer is None else f"over tasks {interval(*outer)}"
    value = entry["value"]
    brackets = interval(entry["ci_low"], entry["ci_high"])
    return Cell(f"<b>{_signed(value)}</b><small>{brackets}</small>{bar}", value, "", told)


def _signed(value: float) -> str:
    return f"+{number(value)}" if value > 0.0 else number(value)


def _p_cell(value: float) -> Cell:
    text = p_value(value)
    return Cell(f"<b>{text}</b>" if value < _SIGNIFICANT else text, value)


def matrix_section(results: Mapping[str, Any], palette: Palette) -> str:
    """Probability of improvement of every method over every other one, a table for every regime."""
    main = main_regime(results["improvement"])
    tables = "".join(
        details(TITLES[regime], _matrix_table(matrix, palette), is_open=regime == main)
        for regime, matrix in results["improvement"].items()
    )
    intro = (
        "Share of starts from which the method of the line ends with a lower test loss than that of the column, ties "
        "counted half. Bold: the 95 % interval over seeds excludes 50 %."
    )
    return section("matrix", "Who beats whom", intro, tables)


def _matrix_table(matrix: Mapping[str, Mapping[str, Any]], palette: Palette) -> str:
    lines = [
        [palette.name_cell(method), *(_matrix_cell(method, other, matrix) for other in palette.methods)]
        for method in palette.methods
    ]
    return table(["", *(short(name, 20) for name in palette.methods)], lines, "heat")


def _matrix_cell(method: str, other: str, matrix: Mapping[str, Mapping[str, Any]]) -> Cell:
    entry = matrix[method].get(other)
    if entry is None:
        return Cell("" if method == other else "–")
    low, high = entry["ci_low"], entry["ci_high"]
    text = share(entry["probability"])
    clear = low is not None and (low > 0.5 or high < 0.5)
    told = f"{entry['num_pairs']} pairs"
    if low is not None:
        told += f", {interval(low, high, 2)}"
    text = f"<b>{text}</b>" if clear else text
    return Cell(shaded(text, entry["probability"] - 0.5, full=0.5), entry["probability"], "", told)


# -- failures -----------------------------------------------------------------------------------------------------


def failures_section(results: Mapping[str, Any], palette: Palette) -> str:
    """Jobs that ended worse than they began."""
    regimes = [*shown_regimes(results), ALL_ROWS]
    lines = [
        [palette.name_cell(method), *(_failure_cell(entry.get(regime)) for regime in regimes)]
        for method, entry in results["aggregate"].items()
    ]
    counts = table(["method", *(TITLES[name] for name in regimes)], lines)
    lost = [row for row in results["rows"] if row["diverged"]]
    listed = details(f"the runs ({len(lost)})", _failure_table(lost, palette)) if lost else ""
    intro = "Jobs whose test loss ended above the one before training, or not finite; and how many there were."
    return section("failures", "Failures", intro, counts + listed)


def _failure_cell(entry: Mapping[str, Any] | None) -> Cell:
    if entry is None:
        return Cell("–")
    rate = entry["failures"] / max(entry["num_runs"], 1)
    text = f"{entry['failures']}/{entry['num_runs']}"
    return Cell(shaded(text, -rate, full=1.0) if rate else text, rate)


def _failure_table(lost: Sequence[Mapping[str, Any]], palette: Palette) -> str:
    lines = [
        [
            palette.name_cell(row["method"]),
            Cell(escape(row["task"]), row["task"]),
            Cell(TITLES[row["regime"]], row["regime"]),
            Cell(f"{row['learning_rate']:.3g}", row["learning_rate"]),
            Cell(str(row["seed"]), row["seed"]),
            Cell(number(row["loss_initial"]), row["loss_initial"]),
            Cell("not finite" if row["loss_test"] is None else number(row["loss_test"]), row["loss_test"]),
            Cell(escape(", ".join(f"{name} {count}" for name, count in row["events"].items() if count))),
        ]
        for row in lost[:MAX_LISTED_FAILURES]
    ]
    headings = ["method", "task", "regime", "rate", "seed", "loss before", "loss after", "events"]
    rest = len(lost) - len(lines)
    note = f"<p>{rest} more are in results.csv.</p>" if rest > 0 else ""
    return table(headings, lines) + note
