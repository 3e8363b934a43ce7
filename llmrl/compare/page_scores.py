"""Sections of the report on scores: summary, starting rates, profiles, tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from llmrl.compare.page_parts import (
    Cell,
    Palette,
    details,
    factor_label,
    interval,
    number,
    plain,
    section,
    share,
    short,
    table,
)
from llmrl.compare.regimes import ALL_ROWS, REGIMES, TITLES, main_regime
from llmrl.compare.report import shown_regimes
from llmrl.compare.svg import Panel, interval_bar

LOWEST_SHOWN = -1.0


def scores_section(results: Mapping[str, Any], palette: Palette) -> str:
    """Score with both intervals in every regime, one line a method."""
    regimes = shown_regimes(results)
    main = main_regime(regimes)
    spans = {regime: _span(results["aggregate"], regime) for regime in regimes}
    rows = []
    for method, entry in results["aggregate"].items():
        total, cost = entry[ALL_ROWS], results["compute"][method]["cost_per_job"]
        per_cost = entry.get(main, {}).get("score_per_cost")
        cells = [_score_cell(entry.get(regime), spans[regime], palette.kind(method)) for regime in regimes]
        won = total["probability_of_improvement"]
        told = interval(total["improvement_ci_low"], total["improvement_ci_high"], 2)
        rows.append(
            [
                palette.name_cell(method),
                *cells,
                Cell(f"{share(won)}<small>{told}</small>", won),
                Cell(f"{total['failures']}/{total['num_runs']}", total["failures"] / max(total["num_runs"], 1)),
                Cell(number(cost, 2), cost),
                Cell(number(per_cost, 2), per_cost),
            ]
        )
    headings = ["method", *(TITLES[name] for name in regimes), "beats linear", "failed", "cost"]
    headings.append(f"score / cost, {TITLES[main]}")
    intro = (
        "Interquartile mean of the score on the test split: 0 is the model before training, 1 the best linear decay of "
        "the learning-rate sweep. Thick line and brackets: 95 % interval over seeds of these tasks. Thin line: 95 % "
        "interval over tasks as well. Cost: compute of a job in linear decays of the same task, with everything that "
        "the method trained and evaluated."
    )
    return section("scores", "Scores", intro, table(headings, rows, "scores"))


def _span(aggregate: Mapping[str, Any], regime: str) -> tuple[float, float]:
    """One axis for a column, from its lowest to its highest end, 0 and 1 included."""
    keys = ("iqm", "ci_low", "ci_high", "task_ci_low", "task_ci_high")
    entries = [entry[regime] for entry in aggregate.values() if regime in entry]
    ends = [entry[key] for entry in entries for key in keys if entry[key] is not None]
    low, high = min([*ends, 0.0]), max([*ends, 1.0])
    return max(low, LOWEST_SHOWN) - 0.03, high + 0.03


def _score_cell(entry: Mapping[str, Any] | None, span: tuple[float, float], kind: str) -> Cell:
    if entry is None or entry["iqm"] is None:
        return Cell("–")
    inner, outer = _ends(entry, "ci"), _ends(entry, "task_ci")
    bar = interval_bar(entry["iqm"], inner, outer, span=span, marks=(0.0, 1.0), kind=kind)
    told = f"{entry['num_scored']} scored of {entry['num_runs']} rows"
    if outer is not None:
        told += f"; over tasks {interval(*outer)}"
    brackets = interval(entry["ci_low"], entry["ci_high"])
    return Cell(f"<b>{number(entry['iqm'])}</b><small>{brackets}</small>{bar}", entry["iqm"], "", told)


def _ends(entry: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    low, high = entry[f"{name}_low"], entry[f"{name}_high"]
    return None if low is None or high is None else (low, high)


def rates_section(results: Mapping[str, Any], palette: Palette) -> str:
    """Score over the starting rate; nothing where there is one rate only."""
    factors = sorted({float(factor) for entries in results["by_factor"].values() for factor in entries})
    if len(factors) < 2:
        return ""
    points = {
        method: [(float(factor), entry["iqm"]) for factor, entry in entries.items()]
        for method, entries in results["by_factor"].items()
    }
    known = [y for line in points.values() for _, y in line if y is not None]
    bottom = max(min([*known, 0.0]), LOWEST_SHOWN)
    panel = Panel((factors[0], factors[-1]), (bottom, max([*known, 1.0]) + 0.05), width=860, height=340, log_x=True)
    ticks = [(factor, factor_label(factor)) for factor in factors]
    panel.axes(x_label="starting rate / default rate", y_label="score (IQM)", x_ticks=ticks)
    for level in (0.0, 1.0):
        panel.level(level)
    for method in palette.in_front_last():
        panel.line(points[method], palette.kind(method), method, dots=method in palette.coloured)
    intro = "Interquartile mean over tasks and seeds at every starting rate. Flat is good: the rate need not be known."
    return section("rates", "Score over the starting rate", intro, palette.legend() + panel.svg())


def profiles_section(results: Mapping[str, Any], palette: Palette) -> str:
    """Performance profiles, a panel for every regime."""
    taus = results["profiles"]["taus"]
    panels: list[str] = []
    for regime, profiles in results["profiles"]["regimes"].items():
        panel = Panel((falls_from(profiles, taus), taus[-1]), (0.0, 1.0), width=298, height=230)
        panel.axes(title=TITLES[regime], x_label="score τ", y_label="" if panels else "share of runs above τ")
        panel.mark(1.0)
        for method in (name for name in palette.in_front_last() if name in profiles):
            told = profiles[method]
            if told["ci_low"] is not None and method in palette.coloured:
                panel.band(taus, told["ci_low"], told["ci_high"], palette.kind(method))
            panel.line(list(zip(taus, told["share"], strict=True)), palette.kind(method), method)
        panels.append(panel.svg())
    intro = (
        "Share of runs that score higher than τ. A line further up and to the right is better; one that starts to fall "
        "early has runs that went wrong. Bands: pointwise 95 % intervals over seeds."
    )
    return section("profiles", "Performance profiles", intro, palette.legend() + _grid(panels))


def falls_from(profiles: Mapping[str, Any], taus: Sequence[float]) -> float:
    """The highest tau below which every run scores, down to a quarter: what lies left of it shows nothing."""
    lost = [tau for told in profiles.values() for tau, share in zip(taus, told["share"], strict=True) if share < 1.0]
    return max(taus[0], math.floor(4.0 * min([*lost, 0.75])) / 4.0 - 0.05)


def _grid(panels: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(panels)}</div>'


def tasks_section(results: Mapping[str, Any], palette: Palette) -> str:
    """Mean score of every method on every task, a table for every regime."""
    present = [name for name in REGIMES if any(name in entry for entry in results["aggregate"].values())]
    tables = []
    for regime in present:
        rows = [row for row in results["rows"] if regime in (ALL_ROWS, row["regime"])]
        title = f"{TITLES[regime]} ({len({row['task'] for row in rows})} tasks)"
        tables.append(details(title, _task_table(rows, palette), is_open=regime == main_regime(present)))
    oracles = [
        [
            Cell(escape(task), task, "name"),
            Cell("–" if entry["learning_rate"] is None else f"{entry['learning_rate']:.3g}", entry["learning_rate"]),
            Cell(number(entry["loss_test"]), entry["loss_test"]),
            Cell("yes" if entry["at_edge"] else "no"),
        ]
        for task, entry in results["oracle"].items()
    ]
    headings = ["task", "best rate of the sweep", "its test loss", "at the edge of the grid"]
    tables.append(details("yardsticks", table(headings, oracles)))
    intro = "Mean score over starts and seeds. Blue is better than the best of the sweep, orange is worse."
    return section("tasks", "Task by task", intro, "".join(tables))


def _task_table(rows: Sequence[Mapping[str, Any]], palette: Palette) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["score"] is not None:
            scores.setdefault((row["method"], row["task"]), []).append(row["score"])
    lines = []
    for method in palette.methods:
        means = [float(np.mean(scores.get((method, task), [math.nan]))) for task in tasks]
        lines.append([palette.name_cell(method), *(_heat_cell(value) for value in means)])
    return table(["method", *(short(task, 18) for task in tasks)], lines, "heat")


def _heat_cell(score: float) -> Cell:
    if math.isnan(score):
        return Cell("–")
    return Cell(shaded(number(score, 2), score - 1.0, full=0.5), score)


def shaded(text: str, excess: float, full: float) -> str:
    """Text on blue where the excess is above zero and on orange below; strongest at `full`."""
    strength = min(abs(excess) / full, 1.0) * 60
    colour = "var(--better)" if excess > 0.0 else "var(--worse)"
    mixed = f"color-mix(in srgb, {colour} {strength:.0f}%, transparent)"
    return f'<span class="shade" style="background:{mixed}">{text}</span>'


def compute_section(results: Mapping[str, Any], palette: Palette) -> str:
    """What every method cost."""
    lines = []
    for method, entry in results["compute"].items():
        name = palette.name_cell(method) if method in palette.methods else Cell(f"<em>{method}</em>", method, "name")
        memory = entry["peak_memory_bytes"]
        columns = ("num_jobs", "num_runs", "num_trainings", "tokens_trained_per_job", "tokens_evaluated_per_job")
        lines.append(
            [
                name,
                *(Cell(number(entry[key], 2), entry[key]) for key in ("cost_per_job", "cost_per_tuned_job")),
                *(Cell(plain(entry[key]), entry[key]) for key in columns),
                Cell(number(entry["seconds_per_job"], 1), entry["seconds_per_job"]),
                Cell("–" if memory is None else plain(memory / 2**20, " MiB"), memory),
            ]
        )
    headings = ["method", "cost of a job", "of a tuned job", "jobs", "runs", "trainings", "tokens trained a job",
                "tokens evaluated a job", "seconds a job", "peak memory"]  # fmt: skip
    intro = (
        "A job is one start. Runs that several starts share count once under runs. Trainings are all that the runs "
        "took, trials of a search and members of a population included. The cost of a tuned start contains the sweep, "
        "where the given rate matters to the method. Losses measured for curves and tables cost nothing."
    )
    return section("compute", "Compute", intro, table(headings, lines))
