"""What a replay buffer accepts; every complaint says what was expected and what came."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LARGE_SQUARE = 1e76  # the sum of squares of float32 numbers that no conversion from float64 has to look at


class Transitions(NamedTuple):
    """One step of some environments, or successive steps of one."""

    lanes: NDArray[np.int64]  # [K] environments
    obs: NDArray[Any]  # [K, *obs_shape]
    action: NDArray[Any]  # [K] integer
    reward: NDArray[Any]  # [K]
    terminated: NDArray[np.bool_]  # [K]
    truncated: NDArray[np.bool_]  # [K]
    next_obs: NDArray[Any]  # [K, *obs_shape]
    mask: NDArray[np.bool_] | None  # [K, A]; None = every action is available
    next_mask: NDArray[np.bool_] | None  # [K, A]
    episode: NDArray[Any] | None  # [K]; None = not numbered by the caller


class TransitionSpec:
    """Shapes and dtypes of the transitions of one buffer.

    Args:
        num_envs: Environments E.
        obs_shape: Shape of one observation.
        obs_dtype: np.float32 or np.uint8.
        num_actions: Actions A.
    """

    def __init__(
        self, num_envs: int, obs_shape: tuple[int, ...], obs_dtype: type[np.generic], num_actions: int
    ) -> None:
        self.num_envs = num_envs
        self.obs_shape = obs_shape
        self.obs_dtype = np.dtype(obs_dtype)
        self.num_actions = num_actions
        self._lanes = np.arange(num_envs)
        self._obs_shape = (num_envs, *obs_shape)

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
        checked = Transitions(
            self._lanes,
            self._observation("obs", obs),
            self._vector("action", action, "iu"),
            self._reward(reward),
            self._vector("terminated", terminated, "b"),
            self._vector("truncated", truncated, "b"),
            self._observation("next_obs", next_obs),
            None if mask is None else self._mask("mask", mask),
            None if next_mask is None else self._mask("next_mask", next_mask),
            None if episode is None else self._vector("episode", episode, "iu"),
        )
        if valid is not None:
            kept = self._vector("valid", valid, "b")
            checked = Transitions(*(None if array is None else array[kept] for array in checked))  # type: ignore[arg-type]
        self._check_values(checked)
        return checked

    def _observation(self, name: str, value: ArrayLike) -> NDArray[Any]:
        array = np.asarray(value)
        if array.shape != self._obs_shape:
            raise ValueError(f"{name}: expected shape {self._obs_shape}, got {array.shape}")
        if array.dtype == self.obs_dtype:
            return array
        if self.obs_dtype == np.uint8 or array.dtype.kind not in "fiub":
            raise ValueError(f"{name}: expected dtype {self.obs_dtype}, got {array.dtype}")
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is refused with the values
            return array.astype(self.obs_dtype)

    def _vector(self, name: str, value: ArrayLike, kinds: str) -> NDArray[Any]:
        array = np.asarray(value)
        if array.shape != self._lanes.shape:
            raise ValueError(f"{name}: expected shape ({self.num_envs},), got {array.shape}")
        if array.dtype.kind not in kinds:
            expected = {"iu": "integer", "fiu": "number", "b": "bool"}[kinds]
            raise ValueError(f"{name}: expected dtype {expected}, got {array.dtype}")
        return array

    def _reward(self, value: ArrayLike) -> NDArray[np.float32]:
        reward = self._vector("reward", value, "fiu")
        if reward.dtype.char in "fd" and float(np.vdot(reward, reward)) < LARGE_SQUARE:
            return reward.astype(np.float32, copy=False)
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is refused with the values
            return reward.astype(np.float32, copy=False)

    def _mask(self, name: str, value: ArrayLike) -> NDArray[np.bool_]:
        array = np.asarray(value)
        if array.shape != (self.num_envs, self.num_actions):
            raise ValueError(f"{name}: expected shape ({self.num_envs}, {self.num_actions}), got {array.shape}")
        if array.dtype.kind != "b":
            raise ValueError(f"{name}: expected dtype bool, got {array.dtype}")
        return array

    def _check_values(self, t: Transitions) -> None:
        # Whatever is not finite in either makes the sum of the products so.
        if t.obs.dtype.kind == "f" and not math.isfinite(np.vdot(t.obs, t.next_obs)):
            check_finite("obs", t.obs)
            check_finite("next_obs", t.next_obs)
        if not math.isfinite(sum(t.reward.tolist())):
            check_finite("reward", t.reward)
        chosen = t.action.tolist()
        if chosen and not (min(chosen) >= 0 and max(chosen) < self.num_actions):
            raise ValueError(f"action: expected 0 to {self.num_actions - 1}, got {chosen}")
        if t.mask is not None and not _all(t.mask) and not t.mask[self._lanes[: len(chosen)], t.action].all():
            _check_some_action("mask", t.mask)
            raise ValueError(f"action: expected an available one, got {chosen} of {t.mask.tolist()}")
        if t.next_mask is not None and not _all(t.next_mask) and not t.next_mask.any(axis=1).all():
            _check_some_action("next_mask", t.next_mask | t.terminated[:, None])


def _all(mask: NDArray[np.bool_]) -> bool:
    """`mask.all()` for few values, where a reduction is mostly its start."""
    return bool(np.count_nonzero(mask) == mask.size)


def is_finite(array: NDArray[np.floating[Any]]) -> bool:
    """Whether an array holds neither NaN nor infinity."""
    # The sum of squares of what is finite is finite, or too large, which the exact test allows.
    return math.isfinite(np.vdot(array, array)) or bool(np.isfinite(array).all())


def check_finite(name: str, array: NDArray[Any]) -> None:
    """Raises ValueError where an array holds NaN or infinity."""
    if array.dtype.kind == "f" and not is_finite(array):
        raise ValueError(f"{name}: expected finite numbers, got {array[~np.isfinite(array)].flat[0]}")


def _check_some_action(name: str, mask: NDArray[np.bool_]) -> None:
    if not mask.any(axis=1).all():
        raise ValueError(f"{name}: expected at least one available action in every environment, got all false")


def check_positive(**values: int) -> None:
    """Raises ValueError for a value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")
