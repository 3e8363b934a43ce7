"""A falling object to be caught with a paddle, on an 84x84 screen: the smallest task that needs a convolution.

The object falls from a random column and drifts sideways; the paddle at the bottom moves left, stays, or moves right. A
catch ends the episode with reward 1, a miss with -1. Where the object comes down follows from several frames only, and
both are blocks of pixels in any column: a network must find them wherever they are.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import FrameStackObservation
from numpy.typing import NDArray

SIZE = 84
OBJECT = 6  # pixels a side
PADDLE = 14  # pixels wide
FALL = 4  # pixels a step
PADDLE_SPEED = 5  # pixels a step
NUM_FRAMES = 4


class CatchEnv(gymnasium.Env[NDArray[np.uint8], np.int64]):
    """One object per episode. Observation: uint8 [84, 84]. Actions: 0 left, 1 stay, 2 right."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 255, shape=(SIZE, SIZE), dtype=np.uint8)
        self.action_space = gymnasium.spaces.Discrete(3)
        self._x = self._y = self._drift = self._paddle = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """A new object at the top; the paddle anywhere."""
        super().reset(seed=seed)
        self._x = int(self.np_random.integers(SIZE - OBJECT + 1))
        self._paddle = int(self.np_random.integers(SIZE - PADDLE + 1))
        self._drift = int(self.np_random.integers(-2, 3))
        self._y = 0
        return self._frame(), {}

    def step(self, action: np.int64) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """The paddle moves, the object falls and bounces off the sides."""
        if not self.action_space.contains(np.int64(action)):
            raise ValueError(f"action: expected 0, 1 or 2, got {action}")
        self._paddle = int(np.clip(self._paddle + (int(action) - 1) * PADDLE_SPEED, 0, SIZE - PADDLE))
        self._x += self._drift
        if not 0 <= self._x <= SIZE - OBJECT:
            self._drift = -self._drift
            self._x += 2 * self._drift
        self._y += FALL
        landed = self._y + OBJECT >= SIZE
        caught = self._x + OBJECT > self._paddle and self._x < self._paddle + PADDLE
        return self._frame(), (1.0 if caught else -1.0) if landed else 0.0, landed, False, {}

    def _frame(self) -> NDArray[np.uint8]:
        frame = np.zeros((SIZE, SIZE), dtype=np.uint8)
        frame[self._y : self._y + OBJECT, self._x : self._x + OBJECT] = 255
        frame[SIZE - 3 :, self._paddle : self._paddle + PADDLE] = 160
        return frame


def make_catch() -> gymnasium.Env[Any, Any]:
    """The task with the last four frames stacked: uint8 [4, 84, 84]."""
    return FrameStackObservation(CatchEnv(), NUM_FRAMES)
