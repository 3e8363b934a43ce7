"""What a level is multiplied with over a job's budget, and when a policy is asked."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from llmrl_envs.interface.statistics import Floats, Integers

BaseName = Literal["constant", "linear", "cosine", "wsd", "wsd_40", "cosine_10", "inverse_sqrt", "polynomial"]
BASE_NAMES: tuple[BaseName, ...] = get_args(BaseName)
WSD_DECAY_FRACTIONS = {"wsd": 0.2, "wsd_40": 0.4}
COSINE_FLOOR = 0.1
POLYNOMIAL_POWER = 2.0
SQRT_TIMESCALE_FRACTION = 0.05
"""Share of the budget that takes the place of a missing warm-up as the time scale of `inverse_sqrt`."""


def base_factor(name: BaseName, step: Integers, total_steps: Integers, warmup_steps: Integers) -> Floats:
    """The base schedule's factor for the optimizer step with index `step` (from 0), float64[E].

    Rises linearly over the warm-up to 1, then is constant or falls: to zero at `total_steps` linearly, by a half
    cosine, as the square of what is left ("polynomial"), or linearly over the last fifth ("wsd": warm-up, stable,
    decay) or the last two fifths ("wsd_40"); by a half cosine to a tenth ("cosine_10"); or as the inverse square root
    of the step over the warm-up ("inverse_sqrt").

    >>> base_factor("linear", np.array([0, 5, 10]), np.array(10), np.array(0))
    array([1. , 0.5, 0. ])
    """
    step_float = np.asarray(step, np.float64)
    span = np.maximum(np.asarray(total_steps) - warmup_steps, 1)
    progress = np.clip((step_float - warmup_steps) / span, 0.0, 1.0)
    if name == "constant":
        decay = np.ones_like(progress)
    elif name == "linear":
        decay = 1.0 - progress
    elif name == "cosine":
        decay = 0.5 * (1.0 + np.cos(np.pi * progress))
    elif name == "cosine_10":
        decay = COSINE_FLOOR + (1.0 - COSINE_FLOOR) * 0.5 * (1.0 + np.cos(np.pi * progress))
    elif name == "polynomial":
        decay = (1.0 - progress) ** POLYNOMIAL_POWER
    elif name == "inverse_sqrt":
        missing = np.maximum(np.rint(SQRT_TIMESCALE_FRACTION * np.asarray(total_steps)), 1.0)
        timescale = np.where(np.asarray(warmup_steps) > 0, warmup_steps, missing)
        decay = np.sqrt(timescale / (timescale + np.maximum(step_float - warmup_steps, 0.0)))
    else:
        decay = np.minimum(1.0, (1.0 - progress) / WSD_DECAY_FRACTIONS[name])
    rise = np.minimum(1.0, (step_float + 1.0) / np.maximum(warmup_steps + 1, 1))
    return np.asarray(rise * decay, np.float64)


USUAL_DECISIONS = 40
SHORTEST_INTERVAL = 4
"""Optimizer steps of an interval behind the first few: statistics of fewer say little."""


def decision_intervals(
    total_steps: int, num_decisions: int = USUAL_DECISIONS, *, early: bool = True
) -> tuple[int, ...]:
    """Lengths of a job's decision intervals in optimizer steps; they add up to `total_steps`.

    One decision comes every n = max(4, round(total_steps / num_decisions)) steps. With `early`, four short intervals
    and three middling ones come first, because a wrong rate does its damage at the beginning.

    >>> decision_intervals(40)
    (2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 4, 4)
    >>> decision_intervals(40, 5, early=False)
    (8, 8, 8, 8, 8)
    """
    if total_steps < 1:
        raise ValueError(f"total_steps: expected at least 1, got {total_steps}")
    usual = max(SHORTEST_INTERVAL, round(total_steps / num_decisions))
    first, second = max(2, round(usual / 4)), max(4, round(usual / 2))
    lengths = [first] * 4 + [second] * 3 if early else []
    lengths += [usual] * (1 + (max(total_steps - sum(lengths), 0)) // usual)
    ends = np.minimum(np.cumsum(lengths), total_steps)
    intervals = np.diff(ends, prepend=0)
    kept = [int(length) for length in intervals if length > 0]
    if len(kept) > 1 and kept[-1] < usual // 2:
        kept[-2:] = [kept[-2] + kept[-1]]
    return tuple(kept)
