"""What a replay buffer accepts; every complaint says what was expected and what came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Transitions:
    """One step of some environments, checked."""

    lanes: NDArray[np.int64]  # [K] environments, ascending
    obs: NDArray[Any]  # [K, *obs_shape]
    action: NDArray[Any]  # [K] integer
    reward: NDArray[Any]  # [K] float
    terminated: NDArray[np.bool_]  # [K]
    truncated: NDArray[np.bool_]  # [K]
    next_obs: NDArray[Any]  # [K, *obs_shape]
    mask: NDArray[np.bool_] | None  # [K, A]; None = every action is available
    next_mask: NDArray[np.bool_] | None  # [K, A]
    episode: NDArray[Any] | None  # [K]; None = not numbered by the caller


@dataclass(frozen=True)
class TransitionSpec:
    """Shapes and dtypes of the transitions of one buffer.

    Args:
        num_envs: Environments E.
        obs_shape: Shape of one observation.
        obs_dtype: np.float32 or np.uint8.
        num_actions: Actions A.
    """

    num_envs: int
    obs_shape: tuple[int, ...]
    obs_dtype: type[np.generic]
    num_actions: int

    def check(
        self,
        obs: ArrayLike,
        action: ArrayLike,
        reward: ArrayLike,
        terminated: ArrayLike,
        truncated: ArrayLike,
        next_obs: ArrayLike,
        mask: ArrayLike | None,
        next_mask: ArrayLike | None,
        episode: ArrayLike | None,
        valid: ArrayLike | None,
    ) -> Transitions:
        """The transitions of the valid lanes; what the other lanes hold is not looked at, except for its shape.

        Raises:
            ValueError: A wrong shape or dtype, an action that is out of range or masked, an all-false mask (one after
                termination has no meaning), NaN or infinity.
        """
        transitions = Transitions(
            np.arange(self.num_envs),
            self._observation("obs", obs),
            self._vector("action", action, "iu"),
            self._vector("reward", reward, "fiu"),
            self._vector("terminated", terminated, "b"),
            self._vector("truncated", truncated, "b"),
            self._observation("next_obs", next_obs),
            None if mask is None else self._mask("mask", mask),
            None if next_mask is None else self._mask("next_mask", next_mask),
            None if episode is None else self._vector("episode", episode, "iu"),
        )
        if valid is not None:
            transitions = _select(transitions, self._vector("valid", valid, "b"))
        self._check_values(transitions)
        return transitions

    def _observation(self, name: str, value: ArrayLike) -> NDArray[Any]:
        array = np.asarray(value)
        shape = (self.num_envs, *self.obs_shape)
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
        if array.dtype == self.obs_dtype:
            return array
        if self.obs_dtype is np.uint8 or array.dtype.kind not in "fiub":
            raise ValueError(f"{name}: expected dtype {np.dtype(self.obs_dtype)}, got {array.dtype}")
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is refused with the values
            return array.astype(self.obs_dtype)

    def _vector(self, name: str, value: ArrayLike, kinds: str) -> NDArray[Any]:
        array = np.asarray(value)
        if array.shape != (self.num_envs,):
            raise ValueError(f"{name}: expected shape ({self.num_envs},), got {array.shape}")
        if array.dtype.kind not in kinds:
            expected = {"iu": "integer", "fiu": "number", "b": "bool"}[kinds]
            raise ValueError(f"{name}: expected dtype {expected}, got {array.dtype}")
        return array

    def _mask(self, name: str, value: ArrayLike) -> NDArray[np.bool_]:
        array = np.asarray(value)
        if array.shape != (self.num_envs, self.num_actions):
            raise ValueError(f"{name}: expected shape ({self.num_envs}, {self.num_actions}), got {array.shape}")
        if array.dtype.kind != "b":
            raise ValueError(f"{name}: expected dtype bool, got {array.dtype}")
        return array

    def _check_values(self, transitions: Transitions) -> None:
        t = transitions
        for name, array in (("obs", t.obs), ("reward", t.reward), ("next_obs", t.next_obs)):
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"{name}: expected finite numbers, got {array[~np.isfinite(array)].flat[0]}")
        if t.action.size and not (t.action.min() >= 0 and t.action.max() < self.num_actions):
            raise ValueError(f"action: expected 0 to {self.num_actions - 1}, got {t.action.tolist()}")
        if t.mask is not None:
            check_some_action("mask", t.mask)
            if not t.mask[np.arange(len(t.action)), t.action].all():
                raise ValueError(f"action: expected an available one, got {t.action.tolist()} of {t.mask.tolist()}")
        if t.next_mask is not None:
            check_some_action("next_mask", t.next_mask | t.terminated[:, None])


def check_some_action(name: str, mask: NDArray[np.bool_]) -> None:
    """Raises ValueError where a row of a mask [K, A] allows nothing."""
    if not mask.any(axis=1).all():
        raise ValueError(f"{name}: expected at least one available action in every environment, got all false")


def check_positive(**values: int) -> None:
    """Raises ValueError for a value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")


def _select(t: Transitions, valid: NDArray[np.bool_]) -> Transitions:
    """The lanes that are valid."""
    return Transitions(
        np.flatnonzero(valid),
        t.obs[valid],
        t.action[valid],
        t.reward[valid],
        t.terminated[valid],
        t.truncated[valid],
        t.next_obs[valid],
        None if t.mask is None else t.mask[valid],
        None if t.next_mask is None else t.next_mask[valid],
        None if t.episode is None else t.episode[valid],
    )
