"""Structured exploration: a group's members begin their decay at different times, and what waiting gains is read off.

When to begin is a question of optimal stopping: a job that waits one decision more can still begin at the next. So a
group (`env.groups`) shares task, seed and data order, over a base schedule that stays at its peak. Its first member
waits until the base itself decays; the others commit to a cooldown as soon as they may, and after 12, 20, 30 and 45 %
of the budget. Until then they are the same job, so their returns differ by the choice and little else.

**What is stored are contrasts.** The return as a function of the time of the decay is fitted with one peak and is
linear between the times that were tried. At each decision of the member that waits, beginning now pays nothing, and
waiting pays the return of the best time that is still to come less that of now, in units of the best return of the
group. Learned from such transitions, Q(s, wait) - Q(s, begin) is what waiting is worth to a job that stops at the best
moment from there on; it is a little below zero where there is nothing to wait for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from llmrl_envs.interface.action import ActionTable, UpdateChoice
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule import WSD_DECAY_FRACTIONS, BaseName
from numpy.typing import NDArray

from llmrl.dqn.agent import Agent
from llmrl.training.contrasts import GroupScript, Sight, in_units_of_best, store_contrast

TIMES = (1.0, 0.0, 0.12, 0.2, 0.3, 0.45)
"""Shares of the budget from which the members of a group decay, as soon as they may; the first waits for the base."""
GROUP_SIZE = len(TIMES)


@dataclass
class _Member:
    """A job of a group under way."""

    began: float | None = None
    seen: list[tuple[float, Sight]] = field(default_factory=list)
    gain: float = 0.0
    is_over: bool = False


class DecayTimes(GroupScript[_Member]):
    """Acts by plan and passes contrasts on to an agent.

    Args:
        agent: Gets the contrasts of every group that ends.
        table: The environment's actions; one must be a cooldown.
        spec: Layout of its observations.
        num_envs: Environments that act together, in groups of `GROUP_SIZE`.
        base: Their base schedule, one that stays at its peak for a while.

    Raises:
        ValueError: The table has no cooldown, the base decays from the start, or the environments are no whole groups.
    """

    def __init__(self, agent: Agent, table: ActionTable, spec: ObservationSpec, num_envs: int, base: BaseName) -> None:
        cooldowns = [index for index, action in enumerate(table.actions) if action.choice is UpdateChoice.COOLDOWN]
        if not cooldowns:
            raise ValueError(f"table: expected a cooldown among the actions, got {table.names} in {table.name!r}")
        if base != "constant" and base not in WSD_DECAY_FRACTIONS:
            raise ValueError(f"base: expected constant, wsd or wsd_40, got {base!r}")
        super().__init__(agent, num_envs, GROUP_SIZE)
        self._cooldown, self._hold = cooldowns[0], table.hold
        self._latest = 1.0 - WSD_DECAY_FRACTIONS.get(base, 0.0)
        self._progress = spec.names.index("progress")

    def _new_member(self) -> _Member:
        return _Member()

    def act(self, obs: NDArray[Any], mask: NDArray[np.bool_], *, explore: bool) -> NDArray[np.int64]:
        """Holding, or the cooldown of a member whose time has come. int64[E]."""
        actions = np.full(len(obs), self._hold, np.int64)
        for lane, row in enumerate(obs):
            progress, place = row[self._progress], lane % GROUP_SIZE
            if progress == 0.0:
                self._members[lane] = _Member()
            member = self._members[lane]
            if place == 0:  # its own mask allows nothing but holding: the others' says what it might do
                others = mask[lane + 1 : lane + GROUP_SIZE, self._cooldown]
                if progress < self._latest and (others.any() or member.seen):
                    available = np.zeros(mask.shape[1], np.bool_)
                    available[[self._hold, self._cooldown]] = True
                    member.seen.append((float(progress), Sight(row.copy(), available)))
            elif member.began is None and progress >= np.float32(TIMES[place]) and mask[lane, self._cooldown]:
                actions[lane] = self._cooldown
                member.began = float(progress)
        return actions

    def _tell(self, first: int, group: list[_Member]) -> None:
        """Passes a group's contrasts on, in the lane of the member that waited."""
        returns = {member.began: member.gain for member in group[1:] if member.began is not None}
        returns[self._latest] = group[0].gain
        times = sorted(returns)
        gains = in_units_of_best([returns[time] for time in times])
        seen = [(time, sight) for time, sight in group[0].seen if time >= times[0]]
        at_decision = np.interp([*(time for time, _ in seen), self._latest], times, gains)
        for place, (_, sight) in enumerate(seen):
            waiting = float(at_decision[place + 1 :].max() - at_decision[place])
            for action, gain in ((self._hold, waiting), (self._cooldown, 0.0)):
                store_contrast(self._agent, len(self._members), first, sight, action, gain)
