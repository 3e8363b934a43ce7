"""What a training loop needs of an agent, whatever it learns by."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Agent(Protocol):
    """What a training loop needs of an agent; every array has the environments E as its leading dimension."""

    @property
    def env_steps(self) -> int:
        """Transitions observed."""

    @property
    def learner_steps(self) -> int:
        """Updates done."""

    def act(self, obs: NDArray[Any], mask: NDArray[np.bool_], *, explore: bool) -> NDArray[np.int64]:
        """Actions [E] for observations [E, *obs_shape] among those available in mask [E, A]."""

    def q_values(self, obs: NDArray[Any]) -> NDArray[np.float32]:
        """Action values (or preferences) [E, A]."""

    def observe(
        self,
        obs: NDArray[Any],
        action: NDArray[np.int64],
        reward: NDArray[np.floating[Any]],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        next_obs: NDArray[Any],
        mask: NDArray[np.bool_] | None = None,
        next_mask: NDArray[np.bool_] | None = None,
        valid: NDArray[np.bool_] | None = None,
    ) -> None:
        """Stores one step of every environment; lanes where `valid` is False are left out."""

    def end_episodes(self) -> None:
        """The episodes under way will not be continued."""

    def learn(self) -> dict[str, float] | None:
        """Does the updates that are due after the last `observe`; None when there were none."""

    def save(self, directory: Path) -> None:
        """Writes everything that `load` needs to go on exactly."""

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote."""
