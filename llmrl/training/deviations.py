"""Structured exploration: the members of a group stay at their level, and at one decision each makes another move.

Values of neighbouring levels differ by less than the noise of one job, and an error of one decision is repeated at the
next. So a group (`env.groups`) shares task, seed, data order and starting level (`tasks.start_moves`); its first member
stays there, and at a decision that is drawn for the group, early ones more often, the others move by -2, -1, +1, +2
grid places and stay from then on. With `reward.baseline: hold` a job's return is what its one move gained over staying,
measured under the same noise.

**That is all that is stored of a job: the decision at which it branched, with the return as a transition that ends
there.** What came before is the same in all members, and to pay it for what was done later would make holding look as
bad as the moves that followed it. Learned from such transitions, Q(s, a) is the gain of moving by `a` now over staying,
at every level that jobs start from; a policy that is greedy to it settles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from llmrl_envs.interface.action import ActionTable, UpdateChoice
from llmrl_envs.interface.observation import ObservationSpec
from numpy.typing import NDArray

from llmrl.dqn.agent import Agent

MOVES = (-2, -1, 1, 2)
GROUP_SIZE = len(MOVES) + 1
EARLINESS = 1.7
"""Groups branch at the first decision from progress `latest * U**EARLINESS` on."""


@dataclass
class _Branch:
    """A job that has branched: what is stored when it ends."""

    obs: NDArray[Any]
    action: int
    mask: NDArray[np.bool_]
    gain: float = 0.0


class Deviator:
    """Acts by plan and passes branches on to an agent.

    Args:
        agent: Gets one transition of every job that ends.
        table: The environment's actions; it must have a plain move for each of `MOVES`.
        spec: Layout of its observations.
        num_envs: Environments that act together, in groups of `GROUP_SIZE`.
        latest: Progress before which groups branch: where levels become final.
        rng: Draws when each group branches.

    Raises:
        ValueError: The table lacks a move, or the environments are no whole groups.
    """

    def __init__(
        self,
        agent: Agent,
        table: ActionTable,
        spec: ObservationSpec,
        num_envs: int,
        latest: float,
        rng: np.random.Generator,
    ) -> None:
        plain = {a.move: i for i, a in enumerate(table.actions) if a.level is None and a.choice is UpdateChoice.NONE}
        if not set(MOVES) <= plain.keys():
            raise ValueError(f"table: expected plain moves {MOVES}, got {sorted(plain)} in {table.name!r}")
        if num_envs % GROUP_SIZE:
            raise ValueError(f"num_envs: expected a multiple of {GROUP_SIZE}, got {num_envs}")
        self._agent, self._hold = agent, table.hold
        self._actions = (table.hold, *(plain[move] for move in MOVES))
        self._latest, self._rng = latest, rng
        self._progress = spec.names.index("progress")
        self._due = np.zeros(num_envs)
        self._branches: list[_Branch | None] = [None] * num_envs

    def act(self, obs: NDArray[Any], mask: NDArray[np.bool_], *, explore: bool) -> NDArray[np.int64]:
        """The move of each lane whose group branches now, where it is available; otherwise holding. int64[E]."""
        actions = np.full(len(obs), self._hold, np.int64)
        for lane, row in enumerate(obs):
            progress, place = float(row[self._progress]), lane % GROUP_SIZE
            if progress == 0.0:
                self._branches[lane] = None
                self._due[lane] = self._latest * self._rng.random() ** EARLINESS if place == 0 else self._due[lane - 1]
            if self._branches[lane] is None and progress >= self._due[lane]:
                action = self._actions[place]
                actions[lane] = action if mask[lane, action] else self._hold
                self._branches[lane] = _Branch(row.copy(), int(actions[lane]), mask[lane].copy())
        return actions

    def observe(
        self,
        obs: NDArray[Any],
        action: NDArray[np.int64],
        reward: NDArray[np.floating[Any]],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        next_obs: NDArray[Any],
        mask: NDArray[np.bool_],
        next_mask: NDArray[np.bool_],
        valid: NDArray[np.bool_] | None = None,
    ) -> None:
        """Adds up what jobs gain; of those that ended the branch goes to the agent."""
        ended = np.zeros(len(obs), np.bool_)
        obs, action, mask, gain = obs.copy(), action.copy(), mask.copy(), np.zeros(len(obs))
        for lane, branch in enumerate(self._branches):
            if branch is None or (valid is not None and not valid[lane]):
                continue
            branch.gain += float(reward[lane])
            if terminated[lane]:
                obs[lane], action[lane], mask[lane], gain[lane] = branch.obs, branch.action, branch.mask, branch.gain
                ended[lane], self._branches[lane] = True, None
        if ended.any():
            self._agent.observe(obs, action, gain, ended, np.zeros_like(ended), obs, mask, mask, valid=ended)

    def end_episodes(self) -> None:
        """Forgets what is under way."""
        self._branches = [None] * len(self._branches)
        self._agent.end_episodes()
