"""Small charts as SVG text for a page that needs no network.

Colours are classes, so that the page's style sheet decides them, for light and for dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import TypeAlias

Point: TypeAlias = tuple[float, float | None]
Scale: TypeAlias = Callable[[float], float]


def linear_scale(low: float, high: float, start: float, end: float) -> Scale:
    """Maps low .. high to start .. end; what lies beyond is put on the nearer end."""
    span = (high - low) or 1.0
    return lambda value: start + (min(max(value, low), high) - low) / span * (end - start)


def log_scale(low: float, high: float, start: float, end: float) -> Scale:
    """Maps positive low .. high to start .. end by their logarithms."""
    inner = linear_scale(math.log(low), math.log(high), start, end)
    return lambda value: inner(math.log(max(value, low)))


def nice_ticks(low: float, high: float, num: int = 5) -> list[float]:
    """About `num` round numbers within low .. high.

    >>> nice_ticks(-1.0, 1.1)
    [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    raw = (high - low) / num if high > low else 1.0
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) + 0.0 for index in range(first, last + 1)]


def decade_ticks(low: float, high: float) -> list[float]:
    """The powers of ten within low .. high, at most five; both ends where there is none."""
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    chosen = [10.0**power for power in powers][:: max(1, math.ceil(len(powers) / 5))]
    return chosen or [low, high]


class Panel:
    """One chart with axes.

    Args:
        x: Range of the x axis.
        y: Range of the y axis.
        width: Of the whole, pixels.
        height: Of the whole, pixels.
        log_x: Logarithmic x axis.
        log_y: Logarithmic y axis.
    """

    LEFT, RIGHT, TOP, BOTTOM = 46, 14, 22, 34

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        width: int = 320,
        height: int = 220,
        log_x: bool = False,
        log_y: bool = False,
    ) -> None:
        self.width, self.height = width, height
        self._ranges = (x, y)
        self._logs = (log_x, log_y)
        self.x = (log_scale if log_x else linear_scale)(*x, self.LEFT, width - self.RIGHT)
        self.y = (log_scale if log_y else linear_scale)(*y, height - self.BOTTOM, self.TOP)
        self._parts: list[str] = []

    def axes(
        self,
        *,
        title: str = "",
        x_label: str = "",
        y_label: str = "",
        x_ticks: Sequence[tuple[float, str]] | None = None,
    ) -> None:
        """Draws the grid, numbers and labels; to be called first, so that lines lie above."""
        bottom, right = self.height - self.BOTTOM, self.width - self.RIGHT
        for value in self._ticks(1):
            y = self.y(value)
            self._parts.append(f'<line class="grid" x1="{self.LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self._text(self.LEFT - 5, y + 3.5, _number(value), "tick end")
        for value, label in x_ticks or [(value, _number(value)) for value in self._ticks(0)]:
            x = self.x(value)
            self._parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            self._text(x, bottom + 15, label, "tick middle")
        self._parts.append(f'<line class="axis" x1="{self.LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        self._text((self.LEFT + right) / 2, self.height - 4, x_label, "label middle")
        self._text(self.LEFT, 13, title, "heading")
        if y_label:
            place = f"translate(10 {(self.TOP + bottom) / 2:.1f}) rotate(-90)"
            self._parts.append(f'<text class="label middle" transform="{place}">{escape(y_label)}</text>')

    def _ticks(self, axis: int) -> list[float]:
        low, high = self._ranges[axis]
        return decade_ticks(low, high) if self._logs[axis] else nice_ticks(low, high)

    def _text(self, x: float, y: float, text: str, kind: str) -> None:
        if text:
            self._parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>')

    def line(self, points: Sequence[Point], kind: str, title: str = "", *, dots: bool = False) -> None:
        """Draws a line, broken where a value is None; what lies beyond the axis runs along its edge."""
        path, pen = [], "M"
        for x, y in points:
            if y is None:
                pen = "M"
                continue
            path.append(f"{pen}{self.x(x):.1f} {self.y(y):.1f}")
            pen = "L"
        told = f"<title>{escape(title)}</title>" if title else ""
        if path:
            self._parts.append(f'<path class="line {kind}" d="{"".join(path)}">{told}</path>')
        if dots:
            circles = "".join(
                f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="2.6"/>' for x, y in points if y is not None
            )
            self._parts.append(f'<g class="dot {kind}">{circles}{told}</g>')

    def band(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], kind: str) -> None:
        """Fills between two curves."""
        there = [f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in zip(xs, high, strict=True)]
        back = [f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in zip(xs, low, strict=True)][::-1]
        self._parts.append(f'<path class="band {kind}" d="M{"L".join(there + back)}Z"/>')

    def level(self, value: float, kind: str = "reference") -> None:
        """Draws a horizontal line over the whole width, if it lies within the axis."""
        low, high = self._ranges[1]
        if low <= value <= high:
            y, right = self.y(value), self.width - self.RIGHT
            self._parts.append(f'<line class="{kind}" x1="{self.LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')

    def mark(self, value: float, kind: str = "reference") -> None:
        """Draws a vertical line over the whole height, if it lies within the axis."""
        low, high = self._ranges[0]
        if low <= value <= high:
            x, bottom = self.x(value), self.height - self.BOTTOM
            self._parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{self.TOP}" y2="{bottom}"/>')

    def svg(self) -> str:
        """The chart."""
        inside = "".join(self._parts)
        return f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" width="{self.width}">{inside}</svg>'


def interval_bar(
    value: float,
    inner: tuple[float, float] | None,
    outer: tuple[float, float] | None,
    *,
    span: tuple[float, float],
    marks: Sequence[float],
    kind: str,
    width: int = 150,
) -> str:
    """A number with its intervals for a table cell: a dot, a thick line, and a thin one for the wider interval.

    Args:
        value: The dot.
        inner: Ends of the thick line.
        outer: Ends of the thin line.
        span: Range of the axis, shared by a column.
        marks: Where thin vertical lines stand.
        kind: Class of the colour.
        width: Pixels.
    """
    scale = linear_scale(*span, 4, width - 4)
    parts = [
        f'<line class="reference" x1="{scale(mark):.1f}" x2="{scale(mark):.1f}" y1="0" y2="14"/>'
        for mark in marks
        if span[0] <= mark <= span[1]
    ]
    for ends, name in ((outer, "thin"), (inner, "thick")):
        if ends is not None:
            parts.append(
                f'<line class="{name} {kind}" x1="{scale(ends[0]):.1f}" x2="{scale(ends[1]):.1f}" y1="7" y2="7"/>'
            )
    parts.append(f'<g class="dot {kind}"><circle cx="{scale(value):.1f}" cy="7" r="3"/></g>')
    return f'<svg class="bar" viewBox="0 0 {width} 14" width="{width}" height="14">{"".join(parts)}</svg>'


def _number(value: float) -> str:
    if value != 0.0 and not 5e-3 <= abs(value) < 1e4:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}"
