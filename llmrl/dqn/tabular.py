"""Q-learning on a table: the smallest agent that DQN can be checked against.

Q(s, a) += step * (r + gamma * max_b Q(s', b) - Q(s, a)),  step = visits(s, a) ** -0.6

Watkins and Dayan 1992, https://doi.org/10.1007/BF00992698; step sizes of Even-Dar and Mansour 2003,
https://www.jmlr.org/papers/v5/evendar03a.html, which need no tuning. Reads gamma, the exploration flags and seed of
the configuration (`config.FLAGS_READ`). A state is an observation rounded to `resolution`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from llmrl.dqn.acting import check_mask, greedy_actions
from llmrl.dqn.agent_files import read_json, read_tensors, restoring, write_json
from llmrl.dqn.config import DQNConfig
from llmrl.dqn.exploration import GREEDY, make_exploration

FORMAT_VERSION = 1
STEP_EXPONENT = 0.6


class QTable:
    """Action values and visit counts of states as they are met; unseen states are worth nothing.

    Args:
        num_actions: Actions A.
        num_features: Numbers that make up a state.
    """

    def __init__(self, num_actions: int, num_features: int) -> None:
        self.rows: dict[bytes, int] = {}
        self.keys = np.zeros((16, num_features), dtype=np.int64)
        self.values = np.zeros((16, num_actions))
        self.visits = np.zeros((16, num_actions), dtype=np.int64)

    def row(self, key: NDArray[np.int64]) -> int:
        """Row of a state [D], new if it has not been met."""
        code = key.tobytes()
        found = self.rows.get(code)
        if found is not None:
            return found
        row = len(self.rows)
        if row == len(self.keys):
            self.keys = np.concatenate([self.keys, np.zeros_like(self.keys)])
            self.values = np.concatenate([self.values, np.zeros_like(self.values)])
            self.visits = np.concatenate([self.visits, np.zeros_like(self.visits)])
        self.rows[code] = row
        self.keys[row] = key
        return row

    def lookup(self, key: NDArray[np.int64]) -> NDArray[np.float64]:  # [A]
        """Action values of a state; zeros if it has not been met."""
        row = self.rows.get(key.tobytes())
        return np.zeros(self.values.shape[1]) if row is None else self.values[row]


class TabularAgent:
    """Q-learning with the agent interface; arguments as for `DQNAgent`.

    Args:
        config: gamma, exploration and seed are read.
        num_envs: Environments E that act together.
        obs_shape: Shape of one observation.
        num_actions: Actions A.
        resolution: Observations closer than about this are one state.
    """

    def __init__(
        self,
        config: DQNConfig,
        *,
        num_envs: int,
        obs_shape: tuple[int, ...],
        num_actions: int,
        resolution: float = 0.01,
    ) -> None:
        if not resolution > 0:
            raise ValueError(f"resolution: expected a positive number, got {resolution}")
        self.config, self.num_envs, self.num_actions = config, num_envs, num_actions
        self.obs_shape, self.resolution = tuple(obs_shape), resolution
        self.exploration = make_exploration(config, num_envs, np.random.default_rng(config.seed))
        self.table = QTable(num_actions, int(np.prod(obs_shape)))
        self.env_steps = 0
        self.learner_steps = 0
        self._pending: list[tuple[NDArray[np.int64], int, float, bool, NDArray[np.int64], NDArray[np.bool_]]] = []

    @property
    def epsilon(self) -> float:
        """Share of random actions now."""
        return float(np.mean(self.exploration.epsilon(self.env_steps)))

    def states(self, obs: NDArray[Any]) -> NDArray[np.int64]:  # [E, D]
        """Observations [E, *obs_shape] as the integers that name a state."""
        if obs.shape[1:] != self.obs_shape:
            raise ValueError(f"obs: expected shape [E, *{self.obs_shape}], got {obs.shape}")
        if not np.isfinite(obs).all():
            raise ValueError("obs: expected finite numbers, got NaN or infinity")
        return np.rint(np.asarray(obs, dtype=np.float64).reshape(len(obs), -1) / self.resolution).astype(np.int64)

    def q_values(self, obs: NDArray[Any]) -> NDArray[np.float32]:
        """Action values [E, A]."""
        return np.stack([self.table.lookup(key) for key in self.states(obs)]).astype(np.float32)

    def act(self, obs: NDArray[Any], mask: NDArray[np.bool_], *, explore: bool) -> NDArray[np.int64]:
        """Actions [E], greedy or epsilon-greedy."""
        check_mask(mask)
        greedy = greedy_actions(self.q_values(obs), mask)
        if not explore:
            return greedy
        chosen = self.exploration.choose(mask, self.env_steps)
        return np.where(chosen == GREEDY, greedy, chosen)

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
        """Keeps one step of every environment until `learn`."""
        if next_mask is None:
            next_mask = np.ones((self.num_envs, self.num_actions), dtype=np.bool_)
        lanes = range(self.num_envs) if valid is None else np.flatnonzero(valid)
        states, next_states = self.states(obs), self.states(next_obs)
        for i in lanes:
            self._pending.append(
                (states[i], int(action[i]), float(reward[i]), bool(terminated[i]), next_states[i], next_mask[i])
            )
        self.exploration.end_episodes(terminated | truncated)
        self.env_steps += len(lanes)

    def end_episodes(self) -> None:
        """Nothing runs over several steps but exploratory actions."""
        self.exploration.end_episodes(np.ones(self.num_envs, dtype=np.bool_))

    def learn(self) -> dict[str, float] | None:
        """One update for every new transition; a truncated step bootstraps, a terminated one does not."""
        if not self._pending:
            return None
        errors = [self._update(*transition) for transition in self._pending]
        self._pending.clear()
        self.learner_steps += len(errors)
        return {"td_error": float(np.mean(np.abs(errors))), "states": float(len(self.table.rows))}

    def _update(
        self,
        state: NDArray[np.int64],
        action: int,
        reward: float,
        terminated: bool,
        next_state: NDArray[np.int64],
        next_mask: NDArray[np.bool_],
    ) -> float:
        """One step of Q-learning; returns the TD error."""
        future = 0.0 if terminated else self.config.gamma * self.table.lookup(next_state)[next_mask].max()
        row = self.table.row(state)
        self.table.visits[row, action] += 1
        td_error = float(reward + future - self.table.values[row, action])
        self.table.values[row, action] += self.table.visits[row, action] ** -STEP_EXPONENT * td_error
        return td_error

    def save(self, directory: Path) -> None:
        """Writes the table, the counters and the generator to a folder; transitions still waiting are learned first."""
        self.learn()
        directory.mkdir(parents=True, exist_ok=True)
        num = len(self.table.rows)
        arrays = {"keys": self.table.keys, "values": self.table.values, "visits": self.table.visits}
        tensors = {name: torch.from_numpy(array[:num].copy()) for name, array in arrays.items()}
        save_file(tensors, directory / "table.safetensors")
        state = {
            "format_version": FORMAT_VERSION,
            "agent": "tabular",
            "resolution": self.resolution,
            "env_steps": self.env_steps,
            "learner_steps": self.learner_steps,
            "exploration": self.exploration.state_dict(),
        }
        write_json(directory / "agent.json", state)

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote.

        Raises:
            ValueError: Files are missing, damaged, or of an agent of another shape.
        """
        with restoring(directory):
            state = read_json(directory / "agent.json", version=FORMAT_VERSION, agent="tabular")
            tensors = {name: value.numpy() for name, value in read_tensors(directory / "table.safetensors").items()}
            table = QTable(self.num_actions, int(np.prod(self.obs_shape)))
            expected = {"keys": table.keys.shape[1], "values": self.num_actions, "visits": self.num_actions}
            got = {name: value.shape[1] for name, value in tensors.items()}
            if got != expected:
                raise ValueError(f"{directory}: expected a table of widths {expected}, got {got}")
            for key in tensors["keys"]:
                table.row(key)
            num = len(table.rows)
            table.values[:num], table.visits[:num] = tensors["values"], tensors["visits"]
            self.table = table
            self.resolution = float(state["resolution"])
            self.env_steps, self.learner_steps = state["env_steps"], state["learner_steps"]
            self.exploration.load_state_dict(state["exploration"])
            self._pending.clear()
