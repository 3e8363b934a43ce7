"""Pictures of a comparison: performance profiles, and learning curves with their schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.compare.page_curves import loss_range, shown_rates, start_title, starts_of
from llmrl.compare.page_parts import Palette, short
from llmrl.compare.page_scores import falls_from
from llmrl.compare.regimes import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_TASKS = 6
_COLOURS = ("#0072b2", "black", "#e69f00", "#009e73", "#d55e00", "#b0579a", "#56b4e9")
_DASHES = ("-", "--", "-", "-", ":", "-.", "-")
_OTHERS = "#c4c8cc"


def draw_profiles(results: Mapping[str, Any], path: Path) -> None:
    """Draws the share of runs above every score to a PNG file, a panel for each regime."""
    from matplotlib.figure import Figure

    palette = Palette(results)
    regimes = results["profiles"]["regimes"]
    figure = Figure(figsize=(3.6 * max(len(regimes), 2), 3.6), dpi=110, layout="constrained")
    taus = results["profiles"]["taus"]
    for place, (regime, profiles) in enumerate(regimes.items()):
        axes = figure.add_subplot(1, len(regimes), place + 1)
        for method in (name for name in palette.in_front_last() if name in profiles):
            told, style = profiles[method], _style(palette, method)
            axes.plot(taus, told["share"], **style)
            if told["ci_low"] is not None and method in palette.coloured:
                axes.fill_between(taus, told["ci_low"], told["ci_high"], color=style["color"], alpha=0.13, linewidth=0)
        axes.axvline(1.0, color="black", linewidth=0.7, linestyle=":")
        axes.set_title(TITLES[regime], fontsize=10)
        axes.set_xlabel("score τ")
        axes.set_xlim(falls_from(profiles, taus), taus[-1])
        axes.set_ylim(-0.02, 1.02)
        if place == 0:
            axes.set_ylabel("share of runs above τ")
    _add_legend(figure, palette)
    figure.savefig(path)


def draw_curves(results: Mapping[str, Any], path: Path) -> None:
    """Draws validation loss and learning rate over steps to a PNG file; of many tasks the first few."""
    from matplotlib.figure import Figure

    palette, curves = Palette(results), results["curves"]
    tasks = list(dict.fromkeys(curve["task"] for curve in curves))[:MAX_TASKS]
    widest = max((len(starts_of(_of_task(curves, task))) for task in tasks), default=1)
    size = (3.2 * max(widest, 2), max(3.8 * len(tasks), 3.0))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    if not tasks:
        figure.text(0.5, 0.5, "the runs hold no curves", ha="center")
    for row, task in enumerate(tasks):
        own = _of_task(curves, task)
        for column, start in enumerate(starts_of(own)):
            shown = [curve for curve in own if (curve["regime"], curve["factor"]) == start]
            place = 2 * row * widest + column + 1
            losses = figure.add_subplot(2 * len(tasks), widest, place)
            rates = figure.add_subplot(2 * len(tasks), widest, place + widest, sharex=losses)
            _draw_start(losses, rates, shown, palette)
            losses.set_ylim(*loss_range(own))
            losses.set_title(f"{task}: {start_title(*start)}" if column == 0 else start_title(*start), fontsize=9)
            if column == 0:
                losses.set_ylabel("validation loss")
                rates.set_ylabel("learning rate")
    _add_legend(figure, palette)
    figure.savefig(path)


def _of_task(curves: Sequence[Mapping[str, Any]], task: str) -> list[Mapping[str, Any]]:
    return [curve for curve in curves if curve["task"] == task]


def _draw_start(losses: Axes, rates: Axes, curves: Sequence[Mapping[str, Any]], palette: Palette) -> None:
    by_method = {curve["method"]: curve for curve in curves}
    for method in (name for name in palette.in_front_last() if name in by_method):
        curve, style = by_method[method], _style(palette, method)
        for axes, values in ((losses, curve["loss_validation"]), (rates, shown_rates(curve))):
            axes.plot(curve["step"], [float("nan") if value is None else value for value in values], **style)
    if any(rate is not None for curve in curves for rate in curve["learning_rate"]):
        rates.set_yscale("log")
    losses.tick_params(labelbottom=False)
    rates.set_xlabel("optimizer steps")


def _style(palette: Palette, method: str) -> dict[str, Any]:
    if method not in palette.coloured:
        return {"color": _OTHERS, "linewidth": 0.9}
    place = palette.coloured.index(method)
    return {"color": _COLOURS[place], "linestyle": _DASHES[place], "linewidth": 1.6}


def _add_legend(figure: Any, palette: Palette) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=short(name), **_style(palette, name)) for name in palette.coloured]
    others = len(palette.methods) - len(palette.coloured)
    if others:
        handles.append(Line2D([], [], color=_OTHERS, linewidth=0.9, label=f"{others} others"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), frameon=False, fontsize=9)
