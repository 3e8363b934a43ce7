"""Values that move over a run; pure functions of a step, so that resuming needs no state."""

from __future__ import annotations


def progress(step: int, num_steps: int) -> float:
    """Share of the way, from 0 at step 0 to 1 at `num_steps` and after."""
    return min(max(step / num_steps, 0.0), 1.0)


def linear(start: float, end: float, step: int, num_steps: int) -> float:
    """Straight line from `start` to `end`, exactly `end` from `num_steps` on."""
    share = progress(step, num_steps)
    return end if share == 1.0 else start + (end - start) * share


def geometric(start: float, end: float, step: int, num_steps: int) -> float:
    """Constant ratio from step to step, from `start` to `end`, both above zero."""
    share = progress(step, num_steps)
    return end if share == 1.0 else float(start * (end / start) ** share)
