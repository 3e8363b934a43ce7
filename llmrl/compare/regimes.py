"""The situations that a comparison looks at, one name each.

default  the task's own rate
wrong    that rate times every other of `learning_rate_factors`
tuned    the rate that the sweep found best for the task
stress   tasks of `stress_tasks` (bad batches, label noise, tiny data), from their own rate
all      every row
"""

from __future__ import annotations

from collections.abc import Collection

DEFAULT_RATE, WRONG_RATE, TUNED_RATE, STRESS, ALL_ROWS = "default", "wrong", "tuned", "stress", "all"
REGIMES = (DEFAULT_RATE, WRONG_RATE, TUNED_RATE, STRESS, ALL_ROWS)
"""In the order of tables."""

TITLES = {
    DEFAULT_RATE: "default rate",
    WRONG_RATE: "wrong rate",
    TUNED_RATE: "tuned rate",
    STRESS: "stress",
    ALL_ROWS: "all",
}


def regime_of(factor: float) -> str:
    """The regime of a start that is a factor on the task's default rate."""
    return DEFAULT_RATE if factor == 1.0 else WRONG_RATE


def main_regime(present: Collection[str]) -> str:
    """The regime that stands for a comparison where there is room for one: wrong rates, if any are compared."""
    return next(name for name in (WRONG_RATE, DEFAULT_RATE, *REGIMES) if name in present)
