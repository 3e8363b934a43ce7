"""From action values to actions; numpy only, shared by agents and by whoever uses an exported network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def check_mask(mask: NDArray[np.bool_]) -> None:
    """Every environment must have an action left.

    Raises:
        ValueError: A row of `mask` [E, A] is all False.
    """
    if np.count_nonzero(mask) == mask.size:
        return
    available = mask.any(axis=1)
    if not available.all():
        lanes = np.flatnonzero(~available).tolist()
        raise ValueError(f"action mask: expected an available action in every environment, got none in {lanes}")


def greedy_actions(
    q: NDArray[np.float32],  # [E, A]
    mask: NDArray[np.bool_] | None = None,  # [E, A], True = available
    *,
    default_action: int | None = None,
    margin: float | Sequence[float] = 0.0,  # or [A]
) -> NDArray[np.int64]:  # [E]
    """The available action of highest value; the default action unless another exceeds it by more than `margin`.

    With a margin for each action, the one that exceeds its own by most.
    """
    if not isinstance(margin, float):
        q, margin = q - np.asarray(margin, q.dtype), 0.0
    if mask is not None and np.count_nonzero(mask) < mask.size:
        q = np.where(mask, q, -np.inf)
    best: NDArray[np.int64] = q.argmax(axis=1)
    if default_action is None:
        return best
    default = q[:, default_action]
    lead = q[np.arange(len(q)), best] - np.where(np.isfinite(default), default, -np.inf)
    return np.where(lead > margin, best, default_action)


def random_actions(
    mask: NDArray[np.bool_],  # [E, A], True = available
    rng: np.random.Generator,
) -> NDArray[np.int64]:  # [E]
    """One available action for each environment, all equally likely."""
    if np.count_nonzero(mask) == mask.size:
        return np.asarray((rng.random(len(mask)) * mask.shape[1]).astype(np.int64))
    counts = mask.sum(axis=1)
    rank = (rng.random(len(mask)) * counts).astype(np.int64)  # which of the available ones, from 0
    action: NDArray[np.int64] = (mask.cumsum(axis=1) > rank[:, None]).argmax(axis=1)
    return action
