"""Pieces that the sections of the report's page are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from llmrl.compare.methods import LINEAR
from llmrl.compare.regimes import ALL_ROWS
from llmrl.policy_reference import HOLD

NUM_COLOURS = 7
"""Methods with a colour of their own; more cannot be told apart, by some readers in particular."""


@dataclass(frozen=True)
class Cell:
    """A table cell.

    Attributes:
        html: What it shows.
        order: What it is sorted by; None sorts last.
        kind: Its class.
        title: Shown when pointed at.
    """

    html: str
    order: float | str | None = None
    kind: str = ""
    title: str = ""

    def render(self) -> str:
        """The cell as HTML."""
        order = "" if self.order is None else f' data-order="{escape(str(self.order))}"'
        kind = f' class="{self.kind}"' if self.kind else ""
        title = f' title="{escape(self.title)}"' if self.title else ""
        return f"<td{kind}{order}{title}>{self.html}</td>"


def table(headings: Sequence[str], rows: Iterable[Sequence[Cell]], kind: str = "") -> str:
    """A table that a click on a heading sorts."""
    head = "".join(f'<th scope="col"><button type="button">{escape(text)}</button></th>' for text in headings)
    body = "".join(f"<tr>{''.join(cell.render() for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="sortable {kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def section(name: str, title: str, intro: str, body: str) -> str:
    """A section with an anchor; `intro` is plain text."""
    return f'<section id="{name}"><h2>{escape(title)}</h2><p class="intro">{escape(intro)}</p>{body}</section>'


def details(title: str, body: str, *, is_open: bool = False) -> str:
    """A part that can be folded."""
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{body}</details>"


class Palette:
    """Colours of methods, the same in every chart: the reference, linear decay, hold, and the best of the others.

    Args:
        results: What `results.json` holds.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.methods = list(results["aggregate"])
        first = [name for name in (results["paired"]["reference"], LINEAR, HOLD) if name in self.methods]
        ranked = sorted(self.methods, key=lambda name: -_score_of(results["aggregate"][name]))
        self.coloured = list(dict.fromkeys([*first, *ranked]))[:NUM_COLOURS]

    def kind(self, method: str) -> str:
        """Classes of everything drawn for a method: its colour, and a mark that the legend switches."""
        colour = f"c{self.coloured.index(method)}" if method in self.coloured else "muted"
        return f"{colour} m{self.methods.index(method)}"

    def in_front_last(self) -> list[str]:
        """Methods in the order of drawing: those without a colour below the others, the reference on top."""
        return [name for name in self.methods if name not in self.coloured] + self.coloured[::-1]

    def legend(self) -> str:
        """A switch for every method; those with a colour first."""
        others = [name for name in self.methods if name not in self.coloured]
        chips = "".join(
            f'<button type="button" class="chip {self.kind(name)}" data-method="m{self.methods.index(name)}" '
            f'aria-pressed="true"><i></i>{escape(short(name))}</button>'
            for name in (*self.coloured, *others)
        )
        return f'<div class="legend" aria-label="Methods; a click hides or shows one">{chips}</div>'

    def name_cell(self, method: str) -> Cell:
        """The cell that names a method."""
        return Cell(f'<i class="swatch {self.kind(method)}"></i>{escape(short(method))}', method, "name", method)


def _score_of(entry: Mapping[str, Any]) -> float:
    score = entry.get(ALL_ROWS, {}).get("iqm")
    return float("-inf") if score is None else float(score)


def short(name: str, length: int = 28) -> str:
    """The end of a long path."""
    return name if len(name) <= length else f"…{name[1 - length :]}"


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many digits behind the point; a dash for none."""
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def factor_label(factor: float) -> str:
    """A starting rate against the default one: ×3, /30, 1."""
    if factor == 1.0:
        return "1"
    return f"×{factor:.3g}" if factor > 1.0 else f"/{1.0 / factor:.3g}"


def plain(value: float | None, unit: str = "") -> str:
    """A large number with separators; a dash for none."""
    return "–" if value is None else f"{value:,.0f}{unit}"


def share(value: float | None) -> str:
    """A share in per cent; a dash for none."""
    return "–" if value is None else f"{100 * value:.0f} %"


def p_value(value: float | None) -> str:
    """A probability; tiny ones by their bound."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """`[low, high]`; nothing where there is none."""
    return "" if low is None or high is None else f"[{number(low, digits)}, {number(high, digits)}]"
