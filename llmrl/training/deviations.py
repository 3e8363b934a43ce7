"""Structured exploration around holding: every job of a group leaves the default level in a way of its own, and stays.

Values of neighbouring levels differ by less than the noise of one job. So the members of a group (`env.groups`), which
share task, seed and data order with the one that holds, are given the contrasts that matter: each constant level, and
a move or two somewhere on the way. Every job then tells what *one* decision was worth if nothing was done after it,
which is what a Monte-Carlo return with `reward.baseline: hold` says.

Place in the group, counted from the member that holds, and its moves in grid places:

    1 .. 4    -2, -1, +1, +2 at the first decision: a level that is held throughout
    5         +2 and +1 at the first two decisions
    6         +2 and +2
    7 ..      one or two moves of -2 .. +2 at random decisions, earlier ones more often
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llmrl_envs.interface.action import ActionTable, UpdateChoice
from llmrl_envs.interface.observation import ObservationSpec
from numpy.typing import NDArray

from llmrl.dqn.agent import Agent

MOVES = (-2, -1, 1, 2)
STEEP_CLIMBS = ((2, 1), (2, 2))
LATEST_PROGRESS = 0.9
EARLINESS = 1.5
"""Progress of a random move is LATEST_PROGRESS * U**EARLINESS."""

Plan = list[tuple[float, int]]
"""Moves to come: progress from which each is due, and grid places; in order."""


def deviation_plan(place: int, rng: np.random.Generator) -> Plan:
    """What the member of a group at a place from 1 on does, see the module."""
    if place <= len(MOVES):
        return [(0.0, MOVES[place - 1])]
    if place <= len(MOVES) + len(STEEP_CLIMBS):
        return [(0.0, move) for move in STEEP_CLIMBS[place - len(MOVES) - 1]]
    count = 1 + int(rng.random() < 0.5)
    due = np.sort(LATEST_PROGRESS * rng.random(count) ** EARLINESS)
    return [(float(progress), int(rng.choice(MOVES))) for progress in due]


class Deviator:
    """Acts by plan and passes what happens on to an agent.

    Args:
        agent: Gets every transition.
        table: The environment's actions; it must have a plain move for each of `MOVES`.
        spec: Layout of its observations.
        num_envs: Environments that act together.
        group_size: Jobs of a group.
        rng: Draws each episode's plan.

    Raises:
        ValueError: The table lacks a move.
    """

    def __init__(
        self,
        agent: Agent,
        table: ActionTable,
        spec: ObservationSpec,
        num_envs: int,
        group_size: int,
        rng: np.random.Generator,
    ) -> None:
        plain = {a.move: i for i, a in enumerate(table.actions) if a.level is None and a.choice is UpdateChoice.NONE}
        if not set(MOVES) <= plain.keys():
            raise ValueError(f"table: expected plain moves {MOVES}, got {sorted(plain)} in {table.name!r}")
        self._agent, self._hold, self._action_of = agent, table.hold, plain
        self._group_size, self._rng = group_size, rng
        self._progress = spec.names.index("progress")
        self._plans: list[Plan] = [[] for _ in range(num_envs)]

    def act(self, obs: NDArray[Any], mask: NDArray[np.bool_], *, explore: bool) -> NDArray[np.int64]:
        """The move that is due in each lane, where it is available; otherwise holding. int64[E]."""
        actions = np.full(len(obs), self._hold, np.int64)
        for lane, row in enumerate(obs):
            progress, place = float(row[self._progress]), lane % self._group_size
            if progress == 0.0:
                self._plans[lane] = deviation_plan(place, self._rng) if place or self._group_size == 1 else []
            if self._plans[lane] and progress >= self._plans[lane][0][0]:
                action = self._action_of[self._plans[lane].pop(0)[1]]
                actions[lane] = action if mask[lane, action] else self._hold
        return actions

    def observe(self, *arguments: Any, **named: Any) -> None:
        """Passes a transition on."""
        self._agent.observe(*arguments, **named)

    def end_episodes(self) -> None:
        """Passes it on."""
        self._agent.end_episodes()
