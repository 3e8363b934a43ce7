#!/usr/bin/env python
"""Write the results of a comparison, and which targets they meet, into README.md between two markers.

    python scripts/results_table.py runs/validation/results.json           # README.md of this repository
    python scripts/results_table.py runs/validation/results.json --readme other.md

What stands between `<!-- results -->` and `<!-- end of results -->` is replaced. A target that the comparison did not
measure (a method or regime that is missing) says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results_targets import LINEAR, TARGETS, NotMeasuredError, Results, Target, with_interval

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
REGIMES = {"default": "usual rate", "wrong": "wrong rate", "tuned": "tuned rate", "stress": "stress"}


def results_section(results: Results, source: str) -> str:
    """Markdown of the tables."""
    regimes = [name for name in REGIMES if any(name in told for told in results["aggregate"].values())]
    tasks = sorted({row["task"] for row in results["rows"]})
    seeds = sorted({row["seed"] for row in results["rows"]})
    lines = [
        f"{len(tasks)} tasks, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} ({source}).",
        "Score: 1 is the best linear decay of a sweep of rates,",
        "0 the loss before fine-tuning. Interquartile means with 95 % intervals over tasks; in brackets",
        "behind, the share of starts that end better than linear decay from the same rate. A job that ends worse than",
        "it began is a failure.",
        "",
        f"| method | {' | '.join(REGIMES[name] for name in regimes)} | failures |",
        f"|---|{'---|' * (len(regimes) + 1)}",
    ]
    for method, told in results["aggregate"].items():
        cells = [_cell(told.get(regime), is_linear=method == LINEAR) for regime in regimes]
        counted = [told[regime] for regime in regimes if regime in told]
        failures = f"{sum(part['failures'] for part in counted)} of {sum(part['num_runs'] for part in counted)}"
        lines.append(f"| {method} | {' | '.join(cells)} | {failures} |")
    lines += ["", "| target | measured | met |", "|---|---|---|"]
    return "\n".join([*lines, *(_target_row(target, results) for target in TARGETS)])


def _cell(told: Mapping[str, Any] | None, *, is_linear: bool) -> str:
    if told is None or told["iqm"] is None:
        return ""
    better = told.get("probability_of_improvement")
    return with_interval(told["iqm"], told) + ("" if better is None or is_linear else f" ({better:.0%})")


def _target_row(target: Target, results: Results) -> str:
    try:
        found, met = target.measure(results)
    except NotMeasuredError as error:
        return f"| {target.asks} | not measured: {error} | |"
    return f"| {target.asks} | {found} | {'yes' if met else '**no**'} |"


def replace_between(text: str, section: str) -> str:
    """The text with `section` between the markers.

    Raises:
        ValueError: The markers are not there once each, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ValueError(f"expected {BEGIN} and behind it {END}, each once")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Reads results, writes the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path, default=Path(__file__).parents[1] / "README.md")
    parser.add_argument("--source", default="`scripts/reproduce_results.sh`", help="what made them, for the reader")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text(encoding="utf-8"))
    text = options.readme.read_text(encoding="utf-8")
    try:
        told = replace_between(text, results_section(results, options.source))
    except ValueError as error:
        print(f"error: {options.readme}: {error}", file=sys.stderr)
        return 2
    options.readme.write_text(told, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
