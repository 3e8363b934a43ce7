"""Batches: from the slots that were drawn to arrays that a loss takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrl.dqn.n_step import n_step_returns, window_slots
from llmrl.dqn.replay_rows import Rows

RewardTransform = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Batch:
    """B transitions over n steps, ready for a loss. `discount` carries termination: 0 = nothing comes after."""

    obs: NDArray[Any]  # [B, *obs_shape] float32 or uint8
    action: NDArray[np.int64]  # [B]
    reward: NDArray[np.float32]  # [B] sum of gamma**k * reward over the window
    discount: NDArray[np.float32]  # [B] gamma**m for a window of m steps, 0 after termination
    next_obs: NDArray[Any]  # [B, *obs_shape] m steps later; the final observation where an episode ended
    mask: NDArray[np.bool_]  # [B, A] actions available at obs
    next_mask: NDArray[np.bool_]  # [B, A] actions available at next_obs
    weight: NDArray[np.float32]  # [B] importance weight of each loss
    index: NDArray[np.int64]  # [B] slot, for update_priorities
    generation: NDArray[np.int64]  # [B] number of the transition in that slot, for update_priorities


def build_batch(
    rows: Rows,
    index: NDArray[np.int64],  # [B] slots
    weight: NDArray[np.float32],  # [B]
    n_step: int,
    gamma: float,
    reward_transform: RewardTransform | None,
) -> Batch:
    """The transitions that start at some slots, over windows of at most n steps."""
    last = first = rows.records.take(index)
    if n_step == 1:
        reward, discount = first["reward"], np.array(gamma, dtype=np.float32)
        if reward_transform is not None:
            reward = _transformed(reward, reward_transform)
    else:
        windows = window_slots(index, n_step, rows.num_envs, rows.capacity)
        returns = n_step_returns(
            rows.stop, _transformed(rows.columns["reward"][windows], reward_transform), windows, gamma
        )
        reward, discount = returns.reward, returns.discount.astype(np.float32)
        last = rows.records.take(returns.last)
    return Batch(
        obs=rows.observations.read(first, "obs"),
        action=first["action"].astype(np.int64),
        reward=reward.astype(np.float32),
        discount=np.where(last["terminated"], np.float32(0.0), discount),
        next_obs=rows.observations.read(last, "next_obs"),
        mask=np.ascontiguousarray(first["mask"]),
        next_mask=np.ascontiguousarray(last["next_mask"]),
        weight=weight,
        index=index,
        generation=np.ascontiguousarray(first["generation"]),
    )


def _transformed(reward: NDArray[np.float32], transform: RewardTransform | None) -> NDArray[np.float64]:
    """Single-step rewards as they are summed."""
    exact = reward.astype(np.float64)
    return exact if transform is None else transform(exact)
