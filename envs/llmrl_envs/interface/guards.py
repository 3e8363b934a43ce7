"""Guards outside the policy: they act on what the job shows, whatever the policy says."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from llmrl_envs.interface.loss_tracker import LossTracker
from llmrl_envs.interface.statistics import Booleans, Floats, Integers

PATIENCE_DECISIONS = 3
LOST_SHARE = 0.3
NOISE_MULTIPLE = 3.0
SPIKE_MULTIPLE = 6.0
"""A step's loss this many standard deviations of the step-to-step noise above its average is a spike."""
VALIDATION_PERIOD = 1.0 / 12.0
"""Share of the budget that passes between two validation losses that count."""
TURNED_SHARE = 0.02
TURNED_LOSS = 0.01


class FallBehindGuard:
    """Tells when a job has lost too much of what it had gained, several decisions in a row.

    A job is behind its envelope when its smoothed train loss stands above the best it had by more than the larger of
    30 % of the gain so far and three standard deviations of the step-to-step noise, or when no step of an interval had
    a finite loss and gradient. After three such decisions in a row the policy has failed here, and the schedule falls
    back to a linear decay.

    Args:
        num_lanes: Number of jobs, E.
    """

    def __init__(self, num_lanes: int) -> None:
        self.first: Floats = np.full(num_lanes, np.nan)
        self.best: Floats = np.full(num_lanes, np.inf)
        self.decisions_behind: Integers = np.zeros(num_lanes, np.int64)

    def reset(self, lanes: Integers) -> None:
        """Forgets `lanes`."""
        self.first[lanes] = np.nan
        self.best[lanes] = np.inf
        self.decisions_behind[lanes] = 0

    def update(self, losses: LossTracker, stuck: Booleans | None = None) -> tuple[Booleans, Booleans]:
        """Takes in the state after an interval.

        Args:
            losses: The tracker, after the interval.
            stuck: bool[E], lanes that skipped every step of the interval: the tracker knows nothing new of them.

        Returns:
            The lanes that are now at their best, bool[E], and those that must fall back, bool[E].
        """
        smoothed = losses.smoothed()
        known = np.isfinite(smoothed)
        lost = np.zeros_like(known) if stuck is None else np.asarray(stuck, np.bool_)
        self.first = np.where(known & np.isnan(self.first), smoothed, self.first)
        at_best = known & ~lost & (smoothed <= self.best)
        self.best = np.where(at_best, smoothed, self.best)
        gain = np.where(known, self.first - self.best, 0.0)
        tolerance = np.maximum(LOST_SHARE * gain, NOISE_MULTIPLE * losses.noise() * np.where(known, self.best, 1.0))
        behind = lost | (known & (smoothed - np.where(known, self.best, 0.0) > tolerance))
        self.decisions_behind = np.where(behind, self.decisions_behind + 1, 0)
        return np.asarray(at_best), np.asarray(self.decisions_behind >= PATIENCE_DECISIONS)

    _STATE = ("first", "best", "decisions_behind")

    def state_dict(self) -> dict[str, NDArray[np.generic]]:
        """Everything that changes, as arrays of leading dimension E."""
        return {name: getattr(self, name).copy() for name in self._STATE}

    def load_state_dict(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Restores what `state_dict` gave."""
        for name in self._STATE:
            setattr(self, name, np.array(state[name]))


class OverfitGuard:
    """Tells when a job's validation loss has turned: it learns its examples by heart, or its rate is too high.

    No train loss shows it: examples that come again are known by then. A job has turned when its validation loss stands
    above its lowest by more than the larger of two per cent of what it has gained since the first and one per cent of
    itself, or, where targets are few, the square root of the loss over their number. However often a host validates, a
    loss counts only when it is the first, when a twelfth of the budget has passed since the one before, or at the job's
    end. A job whose loss is measured before its first step can be taken back to where it began.

    Args:
        num_lanes: Number of jobs, E.

    Attributes:
        turns: int64[E], how often a lane has turned since its loss was lowest.
    """

    def __init__(self, num_lanes: int) -> None:
        self.first: Floats = np.full(num_lanes, np.nan)
        self.best: Floats = np.full(num_lanes, np.inf)
        self.last_step: Integers = np.zeros(num_lanes, np.int64)
        self.turns: Integers = np.zeros(num_lanes, np.int64)

    def reset(self, lanes: Integers) -> None:
        """Forgets `lanes`."""
        self.first[lanes] = np.nan
        self.best[lanes] = np.inf
        self.last_step[lanes] = 0
        self.turns[lanes] = 0

    @property
    def knows(self) -> Booleans:
        """Lanes that have shown a validation loss, bool[E]."""
        return np.isfinite(self.best)

    def due(self, step: Integers, total_steps: Integers) -> Booleans:
        """Lanes whose validation loss would count now, bool[E].

        Args:
            step: int64[E], optimizer steps done.
            total_steps: int64[E], budgets.
        """
        passed = step - self.last_step >= VALIDATION_PERIOD * total_steps
        return np.asarray(~self.knows | ((step > self.last_step) & (passed | (step >= total_steps))))

    def update(
        self, losses: Floats, step: Integers, total_steps: Integers, num_targets: Floats | float = np.inf
    ) -> tuple[Booleans, Booleans]:
        """Takes in validation losses.

        Args:
            losses: float64[E], nats per target; NaN where none was measured, infinite where it is not finite.
            step: int64[E], optimizer steps done.
            total_steps: int64[E], budgets.
            num_targets: float64[E], targets that each loss is the mean over; infinite where it is not known.

        Returns:
            The lanes that are now at their best, bool[E], and those that have turned, bool[E].
        """
        counts = self.due(step, total_steps) & ~np.isnan(losses)
        self.last_step = np.where(counts, step, self.last_step)
        at_best = counts & (losses < self.best)
        self.first = np.where(counts & np.isnan(self.first) & np.isfinite(losses), losses, self.first)
        self.best = np.where(at_best, losses, self.best)
        lowest = np.where(self.knows, self.best, 0.0)
        gain = np.where(self.knows, self.first - lowest, 0.0)
        # A target's cross-entropy varies about as much as it is large, so this is the order of the mean's error.
        error = np.sqrt(lowest / num_targets)
        tolerance = np.maximum(np.maximum(TURNED_SHARE * gain, TURNED_LOSS * lowest), error)
        turned = counts & self.knows & (losses - lowest > tolerance)
        self.turns = np.where(at_best, 0, self.turns + turned)
        return np.asarray(at_best), np.asarray(turned)

    _STATE = ("first", "best", "last_step", "turns")

    def state_dict(self) -> dict[str, NDArray[np.generic]]:
        """Everything that changes, as arrays of leading dimension E."""
        return {name: getattr(self, name).copy() for name in self._STATE}

    def load_state_dict(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Restores what `state_dict` gave; what an earlier version wrote, which had no such guard, changes nothing."""
        for name in self._STATE:
            if name in state:
                setattr(self, name, np.array(state[name]))
