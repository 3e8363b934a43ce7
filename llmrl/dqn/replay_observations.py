"""How a replay buffer keeps observations: vectors as pairs, stacks of image frames with every frame once.

A store adds fields to the buffer's row record, says what they hold for new transitions, and reads batches back.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Field = tuple[str, Any, tuple[int, ...]]  # name, dtype and shape in a row
Side = Literal["obs", "next_obs"]


class ObservationStore(Protocol):
    """Where the observations of a buffer live."""

    fields: list[Field]
    loses: bool  # whether rows can lose their observations

    def write(
        self,
        obs: NDArray[Any],  # [K, *shape]
        next_obs: NDArray[Any],  # [K, *shape]
        lanes: NDArray[np.int64],  # [K]
    ) -> dict[str, NDArray[Any]]:
        """Values [K] of the fields of new rows."""

    def read(self, records: NDArray[Any], side: Side) -> NDArray[Any]:  # [B] rows -> [B, *shape]
        """Observations of some rows, as new contiguous arrays."""

    def lost(self, records: NDArray[Any]) -> NDArray[np.bool_]:  # [B] rows -> [B]
        """Rows whose observations have been overwritten."""

    def num_bytes(self) -> int:
        """Bytes held beside the rows."""


class PairedObservations:
    """Observation and next observation of every transition, side by side in its row.

    Args:
        shape: Shape of one observation.
        dtype: float32 or uint8.
    """

    loses = False

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.fields: list[Field] = [("obs", dtype, shape), ("next_obs", dtype, shape)]

    def write(self, obs: NDArray[Any], next_obs: NDArray[Any], lanes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Both observations go into the rows."""
        return {"obs": obs, "next_obs": next_obs}

    def read(self, records: NDArray[Any], side: Side) -> NDArray[Any]:
        """Copies observations out of the rows."""
        return np.ascontiguousarray(records[side])

    def lost(self, records: NDArray[Any]) -> NDArray[np.bool_]:
        """No row loses its observations."""
        return np.zeros(len(records), dtype=np.bool_)

    def num_bytes(self) -> int:
        """Nothing is held beside the rows."""
        return 0


class FrameObservations:
    """Stacks of frames; a frame that several stacks share is kept once.

    Frames live in one ring of `capacity` frames for all lanes and are named by running numbers: frame f is in place
    f % capacity until frame f + capacity overwrites it. A row holds the numbers of its two stacks. Only frames that are
    equal byte for byte are shared, so what is read is what was written, whatever the environment does with its stack.

    Args:
        shape: [stack, *frame] shape of one observation.
        capacity: Frames to hold.
        num_envs: Lanes E.

    Raises:
        ValueError: The ring cannot hold the frames of one transition of every lane.
    """

    loses = True

    def __init__(self, shape: tuple[int, ...], capacity: int, num_envs: int) -> None:
        self.stack = shape[0]
        self.fields: list[Field] = [("frame", np.int64, (2, self.stack))]
        self._reserve = 2 * self.stack * num_envs  # frames that one call of `write` may add
        if capacity < 2 * self._reserve:
            raise ValueError(f"frames to hold: expected at least {2 * self._reserve}, got {capacity}")
        self.frames = np.zeros((capacity, *shape[1:]), dtype=np.uint8)
        self.num_written = 0
        self._newest: dict[int, NDArray[np.int64]] = {}  # lane -> frame numbers of the lane's last next_obs

    def write(self, obs: NDArray[Any], next_obs: NDArray[Any], lanes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Stores the frames that are new; the numbers of all of them go into the rows."""
        numbers = np.empty((len(obs), 2, self.stack), dtype=np.int64)
        for k, lane in enumerate(lanes.tolist()):
            numbers[k, 0] = self._store(obs[k], self._newest.get(lane))
            follows = np.append(numbers[k, 0, 1:], numbers[k, 0, -1:])  # where a sliding stack finds its frames
            numbers[k, 1] = self._newest[lane] = self._store(next_obs[k], follows)
        return {"frame": numbers}

    def read(self, records: NDArray[Any], side: Side) -> NDArray[Any]:
        """Gathers the frames of the rows' stacks."""
        numbers = records["frame"][:, 0 if side == "obs" else 1]
        return self.frames.take(numbers % len(self.frames), axis=0)

    def lost(self, records: NDArray[Any]) -> NDArray[np.bool_]:
        """Rows with a frame that has been overwritten."""
        oldest = records["frame"].min(axis=(1, 2))
        return np.asarray(oldest < self.num_written - len(self.frames))

    def num_bytes(self) -> int:
        """Bytes of the ring."""
        return self.frames.nbytes

    @property
    def oldest(self) -> int:
        """Number of the oldest frame that is held."""
        return max(0, self.num_written - len(self.frames))

    def restore(self, frames: NDArray[Any], first: int) -> None:
        """Takes over successive frames, numbered from `first`; what is written next shares none of them."""
        self.num_written = first + len(frames)
        self._newest.clear()
        for start in range(self.oldest, self.num_written, len(self.frames)):
            numbers = np.arange(max(start, first), min(start + len(self.frames), self.num_written))
            self.frames[numbers % len(self.frames)] = frames[numbers - first]

    def _store(self, stack: NDArray[Any], expected: NDArray[np.int64] | None) -> NDArray[np.int64]:  # [stack]
        """Numbers of the frames of one stack, which are those of `expected` where the bytes agree."""
        safe = self.num_written - len(self.frames) + self._reserve  # not overwritten before the next call
        if expected is not None and expected.min() >= safe:
            known = self.frames.take(expected % len(self.frames), axis=0) == stack
            same = known.reshape(self.stack, -1).all(axis=1)
        else:
            same = np.zeros(self.stack, dtype=np.bool_)
        numbers = np.empty(self.stack, dtype=np.int64)
        for j in range(self.stack):
            if same[j] and expected is not None:
                numbers[j] = expected[j]
            elif j and np.array_equal(stack[j], stack[j - 1]):
                numbers[j] = numbers[j - 1]
            else:
                numbers[j] = self._append(stack[j])
        return numbers

    def _append(self, frame: NDArray[Any]) -> int:
        self.frames[self.num_written % len(self.frames)] = frame
        self.num_written += 1
        return self.num_written - 1
