"""Structured exploration: a group's members hold neighbouring levels, and what a move gains is read off between them.

Values of neighbouring levels differ by less than the noise of one job, and an error of one decision is repeated at the
next. So a group (`env.groups`) shares task, seed and data order. Its first member stays at the default level; at a
decision that is drawn for the group, early ones more often, the others go to -3 .. 3 grid places from there, two places
a decision at most, and stay. Their returns are measured under the same noise.

**What is stored are contrasts.** At each early decision at which a member stands at its level, and for each move that
leads to the level of another member, a transition with this observation that ends there and pays the other's return
less its own, in units of the best return of the group; staying pays nothing. Learned from such transitions, Q(s, a) is
the gain of moving by `a` now over staying, at every level of the group; a policy that is greedy to it settles. The
decision at which the group parts gives exact contrasts; at the others a level that was taken up a little earlier or
later stands for one that is taken up now, which is why only early decisions count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from llmrl_envs.interface.action import ActionTable, UpdateChoice
from llmrl_envs.interface.observation import ObservationSpec
from numpy.typing import NDArray

from llmrl.dqn.interface import Agent
from llmrl.training.contrasts import GroupScript, Sight, in_units_of_best, store_contrast

PLACES = (0, -3, -2, -1, 1, 2, 3)
"""Levels of a group's members, as grid places from the default; the first member is the one that holds."""
NEAREST = PLACES.index(-1)
"""The member whose mask says what the first one might do: that one's own allows nothing but holding."""
GROUP_SIZE = len(PLACES)
FARTHEST = 2
"""Grid places that a level moves at one decision."""
EARLINESS = 1.7
"""Groups part at the first decision from progress `latest / 2 * U**EARLINESS` on, so that two moves find room."""


@dataclass
class _Member:
    """A job of a group under way: how far it is from its level, and what it saw there."""

    way: int
    seen: list[Sight] = field(default_factory=list)
    gain: float = 0.0
    is_over: bool = False


class NeighbourLevels(GroupScript[_Member]):
    """Acts by plan and passes contrasts on to an agent.

    Args:
        agent: Gets the contrasts of every group that ends.
        table: The environment's actions; it must have plain moves of one and two places in both directions.
        spec: Layout of its observations.
        num_envs: Environments that act together, in groups of `GROUP_SIZE`.
        latest: Progress before which groups part and decisions count: where levels become final.
        rng: Draws when each group parts.

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
        moves = [move for move in range(-FARTHEST, FARTHEST + 1) if move]
        if not set(moves) <= plain.keys():
            raise ValueError(f"table: expected plain moves {moves}, got {sorted(plain)} in {table.name!r}")
        super().__init__(agent, num_envs, GROUP_SIZE)
        self._action_of = {**plain, 0: table.hold}
        self._latest, self._rng = latest, rng
        self._progress = spec.names.index("progress")
        self._due = np.zeros(num_envs)

    def _new_member(self) -> _Member:
        return _Member(0)

    def act(self, obs: NDArray[Any], mask: NDArray[np.bool_], *, explore: bool) -> NDArray[np.int64]:
        """The next move of each lane towards its level, once its group has parted. int64[E]."""
        actions = np.full(len(obs), self._action_of[0], np.int64)
        for lane, row in enumerate(obs):
            progress, place = float(row[self._progress]), lane % GROUP_SIZE
            if progress == 0.0:
                self._members[lane] = _Member(PLACES[place])
                self._due[lane] = self._draw_parting() if place == 0 else self._due[lane - 1]
            member = self._members[lane]
            if member.way == 0 and progress < self._latest:
                member.seen.append(Sight(row.copy(), mask[lane if place else lane + NEAREST].copy()))
            elif progress >= self._due[lane]:
                move = int(np.clip(member.way, -FARTHEST, FARTHEST))
                if mask[lane, self._action_of[move]]:
                    actions[lane] = self._action_of[move]
                    member.way -= move
        return actions

    def _draw_parting(self) -> float:
        return float(self._latest / 2 * self._rng.random() ** EARLINESS)

    def _tell(self, first: int, group: list[_Member]) -> None:
        """Passes a group's contrasts on, in the lanes in which they were seen."""
        measured = {place: member.gain for place, member in zip(PLACES, group, strict=True) if member.way == 0}
        places = sorted(measured)
        gains = dict(zip(places, in_units_of_best([measured[place] for place in places]), strict=True))
        for offset, (place, member) in enumerate(zip(PLACES, group, strict=True)):
            for sight in member.seen if place in gains else ():
                for move in range(-FARTHEST, FARTHEST + 1):
                    action = self._action_of[move]
                    if place + move in gains and sight.mask[action]:
                        gain = gains[place + move] - gains[place]
                        store_contrast(self._agent, len(self._members), first + offset, sight, action, gain)
