"""The 3x3 grid of the classic example: nine states, two of them final, action values known exactly.

    1 2 3      start 1, trap 6 (reward -1, ends), goal 8 (reward +1, ends), every other step 0.
    4 5 6      Actions: 0 up, 1 right, 2 down, 3 left. Moving into a wall stays. Discount 0.9.
    7 8 9

>>> import gymnasium
>>> env = gymnasium.make("llmrl_envs:llmrl/GridWorld-v0")
>>> obs, info = env.reset(seed=0)
>>> info["state"]
1
>>> [env.step(action)[1] for action in (2, 2, 1)]
[0.0, 0.0, 1.0]
>>> float(optimal_q()[0].max())
0.81
"""

from __future__ import annotations

from typing import Any, ClassVar, SupportsInt

import gymnasium
import numpy as np
from numpy.typing import NDArray

ROWS, COLUMNS = 3, 3
NUM_STATES = ROWS * COLUMNS
START, TRAP, GOAL = 1, 6, 8
DISCOUNT = 0.9
ACTIONS = ("up", "right", "down", "left")
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # (row, column) of each action


def transition(state: int, action: int) -> tuple[int, float, bool]:
    """One move of the deterministic grid.

    Args:
        state: 1..9, not a final state.
        action: Index into `ACTIONS`.

    Returns:
        Next state, reward, and whether the episode ended there.
    """
    row, column = divmod(state - 1, COLUMNS)
    row = min(max(row + MOVES[action][0], 0), ROWS - 1)
    column = min(max(column + MOVES[action][1], 0), COLUMNS - 1)
    next_state = row * COLUMNS + column + 1
    reward = {TRAP: -1.0, GOAL: 1.0}.get(next_state, 0.0)
    return next_state, reward, next_state in (TRAP, GOAL)


def optimal_q(discount: float = DISCOUNT, tolerance: float = 1e-12) -> NDArray[np.float64]:  # [9, 4]
    """Optimal action values by value iteration.

    Q(s, a) = r(s, a) + discount * max_b Q(s', b), with 0 after a final state. Row s - 1 belongs to state s; the rows
    of the two final states are zero.

    Args:
        discount: Discount factor in [0, 1).
        tolerance: Iteration stops when no value moves by more.

    Raises:
        ValueError: The discount is outside [0, 1).
    """
    if not 0.0 <= discount < 1.0:
        raise ValueError(f"discount: expected a number in [0, 1), got {discount}")
    q = np.zeros((NUM_STATES, len(ACTIONS)))
    while True:
        previous = q.copy()
        for state in range(1, NUM_STATES + 1):
            if state in (TRAP, GOAL):
                continue
            for action in range(len(ACTIONS)):
                next_state, reward, terminated = transition(state, action)
                q[state - 1, action] = reward + (0.0 if terminated else discount * previous[next_state - 1].max())
        if np.abs(q - previous).max() <= tolerance:
            return q


class GridWorldEnv(gymnasium.Env[NDArray[np.float32], np.int64]):
    """The grid as a Gymnasium environment, id `llmrl/GridWorld-v0`.

    Observation: float32[9], one-hot over the states, so that the network that learns schedules can learn this too;
    `info["state"]` is the state's number 1..9. Episodes of the registered id are truncated after 100 steps.

    Args:
        render_mode: None or `"ansi"`.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi"], "render_fps": 4}  # type: ignore[misc]
    discount = DISCOUNT

    def __init__(self, render_mode: str | None = None) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(
                f"render_mode: expected one of {self.metadata['render_modes']} or None, got {render_mode!r}"
            )
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, shape=(NUM_STATES,), dtype=np.float32)
        self.action_space = gymnasium.spaces.Discrete(len(ACTIONS))
        self._state: int | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Go back to the start.

        Args:
            seed: Seeds the (unused) generator; the grid is deterministic.
            options: None, or `{"state": s}` to start at the non-final state s instead of 1.

        Raises:
            ValueError: The asked-for state is final or outside the grid.
        """
        super().reset(seed=seed)
        state = START if not options else options.get("state", START)
        if state not in range(1, NUM_STATES + 1) or state in (TRAP, GOAL):
            raise ValueError(f"options['state']: expected a non-final state of 1..{NUM_STATES}, got {state!r}")
        self._state = int(state)
        return self._observation(), {"state": self._state}

    def step(self, action: SupportsInt) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Move once; `terminated` on the trap and on the goal.

        Raises:
            gymnasium.error.ResetNeeded: Before the first reset, or after an episode ended.
            ValueError: The action is not 0..3.
        """
        if self._state is None or self._state in (TRAP, GOAL):
            raise gymnasium.error.ResetNeeded("call reset() before step(): no episode is running")
        if not self.action_space.contains(np.int64(int(action))):
            raise ValueError(f"action: expected an integer 0..{len(ACTIONS) - 1}, got {action!r}")
        self._state, reward, terminated = transition(self._state, int(action))
        return self._observation(), reward, terminated, False, {"state": self._state}

    def render(self) -> str | None:
        """Three lines of text: `A` the agent, `x` the trap, `G` the goal. None without a render mode."""
        if self.render_mode is None:
            return None
        symbols = {TRAP: "x", GOAL: "G"} | ({self._state: "A"} if self._state else {})
        cells = [symbols.get(state, ".") for state in range(1, NUM_STATES + 1)]
        return "\n".join(" ".join(cells[start : start + COLUMNS]) for start in range(0, NUM_STATES, COLUMNS)) + "\n"

    @staticmethod
    def optimal_q() -> NDArray[np.float64]:  # [9, 4]
        """Optimal action values at the environment's discount; row s - 1 belongs to state s."""
        return optimal_q()

    def _observation(self) -> NDArray[np.float32]:  # [9]
        obs = np.zeros(NUM_STATES, dtype=np.float32)
        if self._state is not None:
            obs[self._state - 1] = 1.0
        return obs
