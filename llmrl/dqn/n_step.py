"""n-step returns built from stored single steps, for a batch of starting points at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class NStep(NamedTuple):
    """n-step returns of B windows; all arrays are [B]."""

    reward: NDArray[np.float64]  # sum of gamma**k * reward over the window
    discount: NDArray[np.float64]  # gamma**length: what a value after the window counts, before termination
    last: NDArray[np.int64]  # slot of the window's last transition


def n_step_returns(
    stop: NDArray[np.bool_],  # [N] True: no window goes on past this slot
    reward: NDArray[np.float64],  # [B, n] rewards of `window_slots`
    windows: NDArray[np.int64],  # [B, n] `window_slots` of the starts
    gamma: float,
) -> NStep:
    """Discounted sums over windows of at most n transitions that end early at the first `stop`.

    reward = sum_{k<m} gamma**k * r_k,  discount = gamma**m,  m = min(n, steps up to and with the first stop)

    A stop is the end of an episode (terminated or truncated) or the newest transition of a lane (the write head). A
    window that ends early bootstraps from the next observation of its last transition, discounted by gamma**m.
    """
    num_starts, n_step = windows.shape
    stopped = stop.take(windows)  # [B, n]
    stopped[:, -1] = True
    final = stopped.argmax(axis=1)  # [B] place of the last transition in its window
    powers = gamma ** np.arange(n_step + 1.0)
    inside = np.arange(n_step) <= final[:, None]
    total = np.where(inside, reward * powers[:-1], 0.0).sum(axis=1)
    return NStep(total, powers.take(final + 1), windows[np.arange(num_starts), final])


def window_slots(
    start: NDArray[np.int64],  # [B]
    n_step: int,
    num_envs: int,
    num_slots: int,
) -> NDArray[np.int64]:  # [B, n]
    """Slots of the n transitions that follow each start in its lane, ring-wise.

    Slot = row * num_envs + lane, so the successor in the same lane is num_envs further on, whatever the lane.
    """
    return np.asarray((start[:, None] + num_envs * np.arange(n_step)) % num_slots)
