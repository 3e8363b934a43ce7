"""What a policy says, whatever its network runs in; imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from llmrl_envs.interface.action import ActionTable
from numpy.typing import NDArray

from llmrl.dqn.acting import greedy_actions

if TYPE_CHECKING:
    from llmrl_envs.interface.observation import ObservationSpec

    from llmrl.dqn.config import NetworkConfig


@dataclass(frozen=True)
class PolicyDecision:
    """What a policy says about E observations.

    Attributes:
        actions: int64[E].
        q_values: float32[E, A]; NaN for a policy without values.
    """

    actions: NDArray[np.int64]
    q_values: NDArray[np.float32]


def check_observation(observation: NDArray[np.float32], size: int) -> None:
    """Compares an observation with the expected float32[E, O].

    Raises:
        ValueError: Its shape is another.
    """
    if observation.ndim != 2 or observation.shape[1] != size:
        raise ValueError(f"observation: expected float32[E, {size}], got {observation.shape}")


def finite_values(
    act: Callable[[NDArray[np.float32], NDArray[np.bool_]], PolicyDecision], spec: ObservationSpec, table: ActionTable
) -> bool:
    """Whether a policy tells finite values at zero and at the ends of its observation's range.

    Weights that are finite can be so large that their sums are not.
    """
    observations = np.stack([*spec.bounds(), np.clip(0.0, *spec.bounds())]).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        values = act(observations, np.ones((3, table.num_actions), np.bool_)).q_values
    return bool(np.isfinite(values).all())


def hold_decision(table: ActionTable, num: int) -> PolicyDecision:
    """Holding, for `num` observations."""
    return PolicyDecision(np.full(num, table.hold, np.int64), np.full((num, table.num_actions), np.nan, np.float32))


def greedy_decision(
    q_values: NDArray[np.float32],  # [E, A]
    mask: NDArray[np.bool_],  # [E, A], True = available
    config: NetworkConfig,
) -> PolicyDecision:
    """The best available actions, with the network's own default action and margin."""
    actions = greedy_actions(q_values, mask, default_action=config.default_action, margin=config.default_action_margin)
    return PolicyDecision(actions, q_values)
