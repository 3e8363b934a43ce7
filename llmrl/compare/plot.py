"""The picture of a comparison: scores with intervals, and test loss over the starting rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrl.compare.regimes import DEFAULT_RATE, STRESS, TITLES, TUNED_RATE, WRONG_RATE
from llmrl.compare.report import shown_regimes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_TASK_PANELS = 6
_COLUMNS = 3
_HEADROOM = 0.15
_REGIME_STYLE = {
    DEFAULT_RATE: ("o", "black"),
    WRONG_RATE: ("s", "#0072b2"),
    TUNED_RATE: ("D", "#e69f00"),
    STRESS: ("^", "#009e73"),
}
_MARKERS = "osD^vPX*<>"


def draw_comparison(results: Mapping[str, Any], path: Path) -> None:
    """Draws the picture to a PNG file; of many tasks the first few have a panel of their own."""
    from matplotlib.figure import Figure

    tasks = list(results["oracle"])[:MAX_TASK_PANELS]
    num_rows = 1 + math.ceil(len(tasks) / _COLUMNS)
    num_columns = min(_COLUMNS, max(2, len(tasks)))
    figure = Figure(figsize=(4.4 * num_columns, 3.4 * num_rows), dpi=110, layout="constrained")
    grid = figure.add_gridspec(num_rows, 2 * num_columns)
    _draw_scores(figure.add_subplot(grid[0, :num_columns]), results)
    curves = figure.add_subplot(grid[0, num_columns:])
    _draw_score_curves(curves, results)
    for index, task in enumerate(tasks):
        row, column = 1 + index // _COLUMNS, 2 * (index % _COLUMNS)
        _draw_losses(figure.add_subplot(grid[row, column : column + 2]), results, task)
    handles, labels = curves.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 2 * num_columns), frameon=False)
    figure.suptitle("dashed: best of the sweep; dotted: before training; hollow: off the scale", fontsize=9)
    figure.savefig(path)


def _draw_scores(axes: Axes, results: Mapping[str, Any]) -> None:
    """IQM and interval of every method in every regime, the first method on top."""
    methods = list(results["aggregate"])
    shown = shown_regimes(results)
    spacing = min(0.24, 0.8 / len(shown))
    for offset, regime in enumerate(shown):
        marker, color = _REGIME_STYLE[regime]
        axes.plot([], [], marker, color=color, label=TITLES[regime])
        for place, method in enumerate(methods):
            entry = results["aggregate"][method].get(regime)
            if entry is None or entry["iqm"] is None:
                continue
            y = place + spacing * (offset - (len(shown) - 1) / 2)
            if entry["ci_low"] is not None:
                axes.plot([entry["ci_low"], entry["ci_high"]], [y, y], color=color, linewidth=2, alpha=0.6)
            axes.plot(entry["iqm"], y, marker, color=color, markersize=5)
    for value, style in ((0.0, ":"), (1.0, "--")):
        axes.plot([value, value], [-0.5, len(methods) - 0.5], style, color="black", linewidth=0.8)
    axes.set_yticks(range(len(methods)), [_short(name) for name in methods])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_xlabel("score (IQM, 95 % interval)")
    axes.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False)


def _draw_score_curves(axes: Axes, results: Mapping[str, Any]) -> None:
    """Score of every method over the starting rate, all tasks together."""
    for index, (method, entries) in enumerate(results["by_factor"].items()):
        points = [(float(f), e["iqm"]) for f, e in entries.items() if e["iqm"] is not None]
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot([x for x, _ in points], [y for _, y in points], f"{marker}-", color=f"C{index}", label=_short(method),
                  markersize=4, linewidth=1.3)  # fmt: skip
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.axhline(0.0, color="black", linewidth=0.8, linestyle=":")
    _label_factors(axes, sorted(float(factor) for factor in next(iter(results["by_factor"].values()))))
    axes.set_ylabel("score (IQM)")
    axes.set_title("over all tasks", fontsize=10)


def _draw_losses(axes: Axes, results: Mapping[str, Any], task: str) -> None:
    """Mean test loss of every method over the starting rate; what is worse than the start lies on the upper edge."""
    rows = [row for row in results["rows"] if row["task"] == task and row["regime"] != TUNED_RATE]
    initial = _mean([row["loss_initial"] for row in rows])
    oracle = results["oracle"][task]["loss_test"]
    best = min(value for value in (initial, oracle, *_losses(rows)) if value is not None and math.isfinite(value))
    top = initial + _HEADROOM * max(initial - best, 1e-9)
    for index, method in enumerate(results["aggregate"]):
        own = [row for row in rows if row["method"] == method]
        factors = sorted({row["learning_rate_factor"] for row in own})
        values = [_mean([r["loss_test"] for r in own if r["learning_rate_factor"] == f]) for f in factors]
        marker, color = _MARKERS[index % len(_MARKERS)], f"C{index}"
        # NaN compares false, so that a loss that is not finite is off the scale too.
        beyond = [not value <= top for value in values]
        shown = [top if off else value for value, off in zip(values, beyond, strict=True)]
        axes.plot(factors, shown, "-", color=color, linewidth=1.3)
        for factor, value, off in zip(factors, shown, beyond, strict=True):
            axes.plot(factor, value, marker, color=color, markersize=4, markerfacecolor="white" if off else color)
    axes.axhline(initial, color="black", linewidth=0.8, linestyle=":")
    if oracle is not None:
        axes.axhline(oracle, color="black", linewidth=0.8, linestyle="--")
    _label_factors(axes, sorted({row["learning_rate_factor"] for row in rows}))
    axes.set_ylim(top=top + 0.04 * (top - best))
    axes.set_ylabel("test loss (nats per target)")
    axes.set_title(f"{task} (default rate {_default_rate(rows):.2g})", fontsize=10)


def _label_factors(axes: Axes, factors: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(factors, [f"{factor:.3g}" for factor in factors])
    axes.minorticks_off()
    axes.set_xlabel("starting rate / default rate")


def _losses(rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    return [row["loss_test"] for row in rows]


def _mean(values: Sequence[float | None]) -> float:
    """Mean over the seeds; NaN if one is not finite."""
    return float(np.mean([math.nan if value is None else value for value in values]))


def _default_rate(rows: Sequence[Mapping[str, Any]]) -> float:
    return float(rows[0]["learning_rate"] / rows[0]["learning_rate_factor"])


def _short(name: str) -> str:
    """The end of a long path."""
    return name if len(name) <= 24 else f"…{name[-23:]}"
