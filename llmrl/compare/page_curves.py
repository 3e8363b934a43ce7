"""Section of the report with learning curves and schedules, task by task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmrl.compare.page_parts import Palette, details, factor_label, section
from llmrl.compare.regimes import DEFAULT_RATE, TITLES
from llmrl.compare.svg import Panel

Curve = Mapping[str, Any]
_HEADROOM = 0.15
_LOWEST_RATE_SHARE = 1e-3
"""Rates below this share of the highest are left out of a picture: a decay to zero has no end on a logarithmic axis."""


def curves_section(results: Mapping[str, Any], palette: Palette) -> str:
    """Validation loss and learning rate over steps, a column for each shown start."""
    by_task: dict[str, list[Curve]] = {}
    for curve in results["curves"]:
        by_task.setdefault(curve["task"], []).append(curve)
    if not by_task:
        return section("curves", "Learning curves and schedules", "The runs hold no curves.", "")
    parts = [
        details(task, _task_panels(curves, palette), is_open=place == 0)
        for place, (task, curves) in enumerate(by_task.items())
    ]
    intro = (
        "Validation loss and learning rate, means over the seeds (of rates: geometric), from the default rate, the "
        "lowest and the highest starting rate, and the tuned one. Losses above the picture run along its upper edge. A "
        "click on a name hides or shows a method."
    )
    return section("curves", "Learning curves and schedules", intro, palette.legend() + "".join(parts))


def starts_of(curves: Sequence[Curve]) -> list[tuple[str, float]]:
    """The starts of curves: the default rate, wrong ones from low to high, then the others."""
    order = list(TITLES)
    starts = {(curve["regime"], curve["factor"]) for curve in curves}
    return sorted(starts, key=lambda start: (order.index(start[0]), start[1]))


def start_title(regime: str, factor: float) -> str:
    """What a start is called."""
    return TITLES[regime] if regime in (DEFAULT_RATE, "stress") else f"{TITLES[regime]} ({factor_label(factor)})"


def loss_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """From the lowest loss to a little above the loss before training, so that lost runs do not flatten the others."""
    losses = [value for curve in curves for value in curve["loss_validation"] if value is not None]
    first = [curve["loss_validation"][0] for curve in curves if curve["loss_validation"][0] is not None]
    if not losses:
        return 0.0, 1.0
    low, begin = min(losses), max(first, default=max(losses))
    room = max(begin - low, 1e-9)
    return low - 0.04 * room, begin + _HEADROOM * room


def rate_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """From the lowest shown rate to the highest."""
    rates = [rate for curve in curves for rate in shown_rates(curve) if rate is not None]
    if not rates:
        return 1e-4, 1e-3
    low, high = min(rates), max(rates)
    return (low, high) if high > low else (low / 2, high * 2)


def shown_rates(curve: Curve) -> list[float | None]:
    """The rates of a curve without the last decades of a decay to zero."""
    known = [rate for rate in curve["learning_rate"] if rate is not None]
    least = _LOWEST_RATE_SHARE * max(known, default=math.inf)
    return [rate if rate is not None and rate >= least else None for rate in curve["learning_rate"]]


def _task_panels(curves: Sequence[Curve], palette: Palette) -> str:
    losses, rates = [], []
    limits, rate_limits = loss_range(curves), rate_range(curves)
    for place, (regime, factor) in enumerate(starts_of(curves)):
        shown = {c["method"]: c for c in curves if (c["regime"], c["factor"]) == (regime, factor)}
        end = max(curve["step"][-1] for curve in shown.values())
        loss = Panel((0, end), limits, width=300, height=210)
        loss.axes(title=start_title(regime, factor), y_label="" if place else "validation loss")
        rate = Panel((0, end), rate_limits, width=300, height=180, log_y=True)
        rate.axes(x_label="optimizer steps", y_label="" if place else "learning rate")
        for method in (name for name in palette.in_front_last() if name in shown):
            curve, kind = shown[method], palette.kind(method)
            loss.line(list(zip(curve["step"], curve["loss_validation"], strict=True)), kind, method)
            rate.line(list(zip(curve["step"], shown_rates(curve), strict=True)), kind, method)
        losses.append(loss.svg())
        rates.append(rate.svg())
    columns = "".join(f"<div>{loss}{rate}</div>" for loss, rate in zip(losses, rates, strict=True))
    return f'<div class="grid">{columns}</div>'
