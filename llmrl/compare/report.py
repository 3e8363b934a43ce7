"""What a person sees of a comparison: a table in the terminal and a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from llmrl.compare.results import DEFAULT_RATE, WRONG_RATE
from llmrl.run_directory import atomic_write_text


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the rows; what is None in JSON is empty here."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(path, text.getvalue())


def table_cells(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the summary: a method a line, its scores in every regime, wins, failures and cost."""
    aggregate = results["aggregate"]
    regimes = [name for name in (DEFAULT_RATE, WRONG_RATE) if any(name in entry for entry in aggregate.values())]
    titles = [f"{name} rate" for name in regimes]
    headings = ["method", *titles, "beats linear", "failed", "tokens a job"]
    lines = []
    for method, entry in aggregate.items():
        total = entry["all"]
        lines.append(
            [
                method,
                *(_score(entry.get(regime)) for regime in regimes),
                _share(total["probability_of_improvement"]),
                f"{total['failures']}/{total['num_runs']}",
                f"{results['compute'][method]['tokens_trained_per_job']:,.0f}",
            ]
        )
    sweep = f"{results['compute']['sweep']['tokens_trained_per_job']:,.0f}"
    lines.append(["sweep", *("1" for _ in regimes), "", "", sweep])
    return headings, lines


def print_report(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the table and the warnings to stdout."""
    console = console or Console()
    headings, lines = table_cells(results)
    table = Table(title="score: interquartile mean, [95 % interval]\n0 before training, 1 best of a sweep")
    for position, heading in enumerate(headings):
        first = position == 0
        # Only names of methods, which may be long paths, are wrapped.
        justify: Literal["left", "right"] = "left" if first else "right"
        table.add_column(heading.replace(" ", "\n", 1), justify=justify, no_wrap=not first, overflow="fold")
    for line in lines:
        table.add_row(*line, end_section=line is lines[-2])
    console.print(table)
    for warning in results["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)


def _score(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["iqm"] is None:
        return "-"
    if entry["ci_low"] is None:
        return f"{entry['iqm']:.3f}"
    return f"{entry['iqm']:.3f}\n[{entry['ci_low']:.3f}, {entry['ci_high']:.3f}]"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
