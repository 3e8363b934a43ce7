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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
REGIMES = {"default": "usual rate", "wrong": "wrong rate", "tuned": "tuned rate", "stress": "stress"}
POLICY, HOLD, LINEAR = "policy", "hold", "linear"
RIVALS = ("linear", "cosine", "greedy", "plateau", "schedule_free", "prodigy", "zclip")

Results = Mapping[str, Any]


class NotMeasuredError(Exception):
    """The comparison lacks what a target is about."""


@dataclass(frozen=True)
class Target:
    """A target: what is asked, and how a comparison answers.

    Attributes:
        asks: In words.
        measure: Gives what was found, in words, and whether that is enough.
    """

    asks: str
    measure: Callable[[Results], tuple[str, bool]]


def results_section(results: Results, source: str) -> str:
    """Markdown of the tables."""
    regimes = [name for name in REGIMES if any(name in told for told in results["aggregate"].values())]
    tasks = sorted({row["task"] for row in results["rows"]})
    seeds = sorted({row["seed"] for row in results["rows"]})
    lines = [
        f"{len(tasks)} tasks, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} ({source}).",
        "Score: 1 is the best linear decay of a sweep of rates,",
        f"0 the loss before fine-tuning. Interquartile means with 95 % intervals over {_units(seeds)}; in brackets",
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


def _units(seeds: Sequence[int]) -> str:
    """What varies in the intervals: seeds within tasks, or the tasks themselves where there is one seed."""
    return "seeds within tasks" if len(seeds) > 1 else "tasks"


def _interval(told: Mapping[str, Any]) -> tuple[float, float] | None:
    """The interval over seeds within tasks, or where there is none that over tasks."""
    for low, high in (("ci_low", "ci_high"), ("task_ci_low", "task_ci_high")):
        if told.get(low) is not None:
            return told[low], told[high]
    return None


def _cell(told: Mapping[str, Any] | None, *, is_linear: bool) -> str:
    if told is None or told["iqm"] is None:
        return ""
    bounds = _interval(told)
    interval = "" if bounds is None else f" [{bounds[0]:.2f}, {bounds[1]:.2f}]"
    better = told.get("probability_of_improvement")
    return f"{told['iqm']:.2f}{interval}" + ("" if better is None or is_linear else f" ({better:.0%})")


def _target_row(target: Target, results: Results) -> str:
    try:
        found, met = target.measure(results)
    except NotMeasuredError as error:
        return f"| {target.asks} | not measured: {error} | |"
    return f"| {target.asks} | {found} | {'yes' if met else '**no**'} |"


# ---------------------------------------------------------------------------------------------------------- targets


def _at(results: Results, *path: str) -> Any:
    value: Any = results
    for key in path:
        if not isinstance(value, Mapping) or value.get(key) is None:
            raise NotMeasuredError(" ".join(path))
        value = value[key]
    return value


def _bounds(told: Mapping[str, Any]) -> tuple[float, float]:
    bounds = _interval(told)
    if bounds is None:
        raise NotMeasuredError("an interval")
    return bounds


def _score_at_wrong_rates(results: Results) -> tuple[str, bool]:
    told = _at(results, "aggregate", POLICY, "wrong")
    score = _at(told, "iqm")
    return _cell(told, is_linear=True), score >= 1.0


def _advantage(other: str, regime: str, least: float) -> Callable[[Results], tuple[str, bool]]:
    """The policy's paired advantage in score; the low end of its interval has to be above `least`."""

    def measure(results: Results) -> tuple[str, bool]:
        told = _at(results, "paired", "regimes", regime, other, "iqm")
        value, (low, high) = _at(told, "value"), _bounds(told)
        return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]", low > least

    return measure


def _better_than_rivals(results: Results) -> tuple[str, bool]:
    told = _at(results, "improvement", "wrong", POLICY)
    there = [name for name in RIVALS if name in told]
    if len(there) < len(RIVALS):
        raise NotMeasuredError(", ".join(name for name in RIVALS if name not in told))
    hardest = min(there, key=lambda name: _bounds(told[name]))
    low, high = _bounds(told[hardest])
    return f"hardest is {hardest}: {told[hardest]['probability']:.2f} [{low:.2f}, {high:.2f}]", low > 0.75


def _fewer_failures(results: Results) -> tuple[str, bool]:
    own, theirs = (_at(results, "aggregate", name, "stress", "failures") for name in (POLICY, "zclip"))
    return f"{own} against {theirs}", 3 * own <= theirs


def _no_worse_than_linear(results: Results) -> tuple[str, bool]:
    worst = _at(results, "paired", "regimes", "stress", LINEAR, "worst")
    return f"{worst:+.3f}", worst >= -0.02


TARGETS = (
    Target("wrong rate: score of at least 1.00", _score_at_wrong_rates),
    Target("wrong rate: above hold, interval above zero", _advantage(HOLD, "wrong", 0.0)),
    Target("wrong rate: better than each usual schedule in more than 0.75 of starts (low end)", _better_than_rivals),
    Target("tuned rate: at most 0.01 below linear decay (low end)", _advantage(LINEAR, "tuned", -0.01)),
    Target(
        "wrong rate: not below a search of 5 trials, for a fifth of its compute", _advantage("search_5", "wrong", -0.01)
    ),
    Target("stress: at most a third of the failures of ZClip with linear decay", _fewer_failures),
    Target("stress: no run more than 0.02 below linear decay", _no_worse_than_linear),
)


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
