"""Steps environments with an agent and hands it every transition, once and right.

collector = Collector(gymnasium.make("CartPole-v1"), agent, seed=0)
while collector.env_steps < 50_000:
    for episode in collector.step():
        print(episode.episode_return)
    agent.learn()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from llmrl.dqn.lanes import Step, lane_info, make_lanes


class CollectingAgent(Protocol):
    """What the collector asks of an agent. Arrays have a leading E, one entry for each environment."""

    def act(self, obs: NDArray[Any], mask: NDArray[np.bool_], *, explore: bool) -> NDArray[np.int64]:
        """An available action for every environment."""

    def observe(
        self,
        obs: NDArray[Any],  # [E, *shape]
        action: NDArray[np.int64],  # [E]
        reward: NDArray[np.float64],  # [E]
        terminated: NDArray[np.bool_],  # [E]
        truncated: NDArray[np.bool_],  # [E]
        next_obs: NDArray[Any],  # [E, *shape]
        mask: NDArray[np.bool_],  # [E, A]
        next_mask: NDArray[np.bool_],  # [E, A]
        valid: NDArray[np.bool_] | None = None,  # [E]; False where there was no transition; None = all valid
    ) -> None:
        """Takes one transition of every valid environment."""

    def end_episodes(self) -> None:
        """The episodes under way will not be continued."""


@dataclass(frozen=True)
class Episode:
    """An episode that ended."""

    environment: int  # lane
    index: int  # number of the episode, counted over all lanes in the order in which they began
    episode_return: float  # undiscounted
    length: int  # steps
    terminated: bool
    truncated: bool
    info: dict[str, Any]  # of its last step


class Collector:
    """Collects experience from a single Gymnasium environment or a vector environment in any autoreset mode.

    The mask of available actions is read from `info["action_mask"]`; without one all actions are available. A single
    environment is reset with a seed derived from (`seed`, number of the episode), so that a run that is resumed between
    two episodes sees what an uninterrupted one sees. A vector environment is seeded once.

    Args:
        env: Environment with a `Discrete` action space.
        agent: Who acts and observes.
        seed: Seed of the environments.

    Raises:
        ValueError: An action space or autoreset mode that is not supported.
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any], agent: CollectingAgent, *, seed: int
    ) -> None:
        self.agent = agent
        self.env_steps = 0  # transitions, over all lanes
        self._lanes = make_lanes(env, seed)
        self._vector = isinstance(env, VectorEnv)
        num_envs = self._lanes.num_envs
        self.num_envs, self.num_actions = num_envs, self._lanes.num_actions
        self._index = np.arange(num_envs)  # [E] number of the episode under way, or of the next one
        self._next_index = num_envs
        self._return = np.zeros(num_envs)  # [E] of the episode so far
        self._length = np.zeros(num_envs, dtype=np.int64)  # [E]

    @property
    def at_episode_boundary(self) -> bool:
        """No environment is within an episode: all there is to resume is the number of the next one."""
        return not self._length.any()

    def step(self, *, explore: bool = True) -> list[Episode]:
        """Acts once in every environment; returns the episodes that ended with it.

        Args:
            explore: Whether the agent may explore.
        """
        obs, mask = self._lanes.begin(self._index)
        action = self.agent.act(obs, mask, explore=explore)
        step = self._lanes.step(action)
        self.agent.observe(
            obs,
            action,
            step.reward,
            step.terminated,
            step.truncated,
            step.next_obs,
            mask,
            step.next_mask,
            valid=step.valid,
        )
        return self._account(step)

    def state_dict(self) -> dict[str, Any]:
        """Counters, and where the environments stand if they can tell; JSON values but for what environments add."""
        return {
            "env_steps": self.env_steps,
            "index": self._index.tolist(),
            "next_index": self._next_index,
            "return": self._return.tolist(),
            "length": self._length.tolist(),
            "lanes": self._lanes.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state; episodes whose environment could not save its state begin anew.

        Raises:
            ValueError: The state is of another number of environments.
        """
        if len(state["index"]) != self.num_envs:
            raise ValueError(f"collector state: expected {self.num_envs} environments, got {len(state['index'])}")
        self.env_steps = int(state["env_steps"])
        self._index = np.array(state["index"], dtype=np.int64)
        self._next_index = int(state["next_index"])
        self._return = np.array(state["return"], dtype=np.float64)
        self._length = np.array(state["length"], dtype=np.int64)
        if state["lanes"] is not None:
            self._lanes.load_state_dict(state["lanes"])
        else:
            self._return[:], self._length[:] = 0.0, 0
            self.agent.end_episodes()

    def _account(self, step: Step) -> list[Episode]:
        """Adds a step to the episodes under way and closes those that ended."""
        ended = step.terminated | step.truncated
        if step.valid is None:
            self.env_steps += self.num_envs
            self._return += step.reward
            self._length += 1
        else:
            self.env_steps += int(step.valid.sum())
            self._return += np.where(step.valid, step.reward, 0.0)
            self._length += step.valid
            ended &= step.valid
        if not np.count_nonzero(ended):
            return []
        return [self._close(lane, step) for lane in ended.nonzero()[0].tolist()]

    def _close(self, lane: int, step: Step) -> Episode:
        episode = Episode(
            environment=lane,
            index=int(self._index[lane]),
            episode_return=float(self._return[lane]),
            length=int(self._length[lane]),
            terminated=bool(step.terminated[lane]),
            truncated=bool(step.truncated[lane]),
            info=lane_info(step.final_info, lane) if self._vector else step.final_info,
        )
        self._index[lane] = self._next_index
        self._next_index += 1
        self._return[lane], self._length[lane] = 0.0, 0
        return episode
