"""What a person sees of a comparison in the terminal, and the rows as a CSV file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from llmrl.compare.regimes import ALL_ROWS, REGIMES, TITLES, main_regime
from llmrl.run_directory import atomic_write_text

_REGIMES_BESIDE_THE_REST = 2
"""With more regimes the other columns go into a table of their own, so that 80 characters hold either."""


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the rows; what is None in JSON is empty here, and a mapping is JSON text."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    headings, lines = row_cells(rows)
    writer.writerow(headings)
    writer.writerows(lines)
    atomic_write_text(path, text.getvalue())


def row_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Headings and lines of the rows; a mapping becomes JSON text."""
    lines = [[json.dumps(value) if isinstance(value, dict) else value for value in row.values()] for row in rows]
    return list(rows[0]), lines


def shown_regimes(results: Mapping[str, Any]) -> list[str]:
    """The regimes that have rows, in the order of tables; without that of all rows."""
    entries = results["aggregate"].values()
    return [name for name in REGIMES if name != ALL_ROWS and any(name in entry for entry in entries)]


def table_cells(results: Mapping[str, Any], digits: int = 3) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the summary: a method a line, its scores in every regime, wins, failures and cost.

    "linear runs" is the compute of a job in linear decays, and "score a run" the score over it at wrong rates.
    """
    compute = results["compute"]
    regimes = shown_regimes(results)
    headings = ["method", *(TITLES[name] for name in regimes)]
    main = main_regime(regimes)
    headings += ["beats linear", "failed", "tokens a job", "linear runs", "score a run"]
    lines = []
    for method, entry in results["aggregate"].items():
        total = entry[ALL_ROWS]
        lines.append(
            [
                method,
                *(_score(entry.get(regime), digits) for regime in regimes),
                _share(total["probability_of_improvement"]),
                f"{total['failures']}/{total['num_runs']}",
                f"{compute[method]['tokens_trained_per_job']:,.0f}",
                _decimal(compute[method]["cost_per_job"]),
                _decimal(entry.get(main, {}).get("score_per_cost")),
            ]
        )
    sweep = compute["sweep"]
    cost = sweep["cost_per_job"]
    tokens = f"{sweep['tokens_trained_per_job']:,.0f}"
    per_run = 1 / cost if cost else None
    lines.append(["sweep", *("1" for _ in regimes), "", "", tokens, _decimal(cost), _decimal(per_run)])
    return headings, lines


def print_report(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the tables and the warnings to stdout."""
    console = console or Console()
    title = "score: interquartile mean, [95 % interval]\n0 before training, 1 best of a sweep"
    num_regimes = len(shown_regimes(results))
    if num_regimes <= _REGIMES_BESIDE_THE_REST:
        headings, lines = table_cells(results)
        # What the cost is in tokens is in the files.
        kept = [place for place, heading in enumerate(headings) if heading not in ("tokens a job", "score a run")]
        _print_table(console, title, headings, lines, kept)
    else:
        headings, lines = table_cells(results, digits=2)
        _print_table(console, title, headings, lines, range(1 + num_regimes))
        _print_table(console, "over all rows", headings, lines, [0, *range(1 + num_regimes, len(headings))])
    for warning in results["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)


def _print_table(
    console: Console, title: str, headings: Sequence[str], lines: Sequence[Sequence[str]], columns: Sequence[int]
) -> None:
    table = Table(title=title)
    for place in columns:
        first = place == 0
        # Only names of methods, which may be long paths, are wrapped.
        justify: Literal["left", "right"] = "left" if first else "right"
        table.add_column(headings[place].replace(" ", "\n", 1), justify=justify, no_wrap=not first, overflow="fold")
    for line in lines:
        table.add_row(*(line[place] for place in columns), end_section=line is lines[-2])
    console.print(table)


def _score(entry: Mapping[str, Any] | None, digits: int) -> str:
    if entry is None or entry["iqm"] is None:
        return "-"
    if entry["ci_low"] is None:
        return f"{entry['iqm']:.{digits}f}"
    return f"{entry['iqm']:.{digits}f}\n[{entry['ci_low']:.{digits}f}, {entry['ci_high']:.{digits}f}]"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
