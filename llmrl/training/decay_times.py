"""Structured exploration: a group's members begin their decay at different times, and what waiting gains is read off.

When to begin is a question of optimal stopping: a job that waits one decision more can still begin at the next. So a
group (`env.groups`) shares task, seed and data order, over a base schedule that stays at its peak. Its first member
waits until the base itself decays; the others commit to a cooldown as soon as they may, and after 12, 20, 30 and 45 %
of the budget. Until then they are the same job, so their returns differ by the choice and little else. Where the
actions can raise the level, four more members do so as soon as they may, and decay at times of their own. Where they
can make steps lean on their own gradient, all of these do so from the start, and three plain ones go before them.

**What is stored are contrasts.** The return as a function of the time of the decay is fitted with one peak and is
linear between the times that were tried. At each decision of the member that waits, beginning now pays nothing, and
waiting pays the return of the best time that is still to come less that of now, in units of the best return of the
group. Learned from such transitions, Q(s, wait) - Q(s, begin) is what waiting is worth to a job that stops at the best
moment from there on; it is a little below zero where there is nothing to wait for.

Raising the level pays the best return that is still to come of those that raised it, less that of beginning now at the
lower level. Members that raised theirs at their first opportunity stand for one that does so a few decisions later.
Leaning pays the best return of those that lean, less that of beginning now without, and those that have leant from the
start stand for one that does so later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from llmrl_envs.interface.action import ActionTable, UpdateChoice
from llmrl_envs.interface.base_schedule import WSD_DECAY_FRACTIONS, BaseName
from llmrl_envs.interface.observation import ObservationSpec
from numpy.typing import NDArray

from llmrl.dqn.interface import Agent
from llmrl.training.contrasts import GroupScript, Sight, in_units_of_best, store_contrast


class Plan(NamedTuple):
    """What a member of a group does.

    Attributes:
        time: Share of the budget from which it decays, as soon as it may; 1 waits for the base.
        rises: It raises its level as soon as it may, before.
        leans: Its steps lean on their own gradient, from the start.
    """

    time: float
    rises: bool = False
    leans: bool = False


PLANS = (Plan(1.0), Plan(0.0), Plan(0.12), Plan(0.2), Plan(0.3), Plan(0.45))
RISING_PLANS = (Plan(1.0, rises=True), Plan(0.0, rises=True), Plan(0.2, rises=True), Plan(0.4, rises=True))
PLAIN_PLANS = (Plan(1.0), Plan(0.0), Plan(0.2))
"""The first of each waits for the base."""


def branches_of(table: ActionTable) -> tuple[tuple[Plan, ...], ...]:
    """Members that differ in the time of their decay alone, branch by branch: plain, or leaning; raised ones last."""
    branches = (PLANS,) if table.rise is None else (PLANS, RISING_PLANS)
    if table.lean is None:
        return branches
    return (PLAIN_PLANS, *(tuple(plan._replace(leans=True) for plan in branch) for branch in branches))


def plans_of(table: ActionTable) -> tuple[Plan, ...]:
    """One for each member of a group."""
    return sum(branches_of(table), ())


@dataclass
class _Member:
    """A job of a group under way."""

    began: float | None = None
    has_risen: bool = False
    has_leant: bool = False
    seen: list[tuple[float, Sight]] = field(default_factory=list)
    gain: float = 0.0
    is_over: bool = False


class DecayTimes(GroupScript[_Member]):
    """Acts by plan and passes contrasts on to an agent.

    Args:
        agent: Gets the contrasts of every group that ends.
        table: The environment's actions; one must be a cooldown.
        spec: Layout of its observations.
        num_envs: Environments that act together, in groups of as many as `plans_of(table)`.
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
        self._branches = branches_of(table)
        self._plans = plans_of(table)
        super().__init__(agent, num_envs, len(self._plans))
        self._cooldown, self._hold, self._rise, self._lean = cooldowns[0], table.hold, table.rise, table.lean
        self._latest = 1.0 - WSD_DECAY_FRACTIONS.get(base, 0.0)
        self._progress = spec.names.index("progress")

    def _new_member(self) -> _Member:
        return _Member()

    def act(self, obs: NDArray[Any], mask: NDArray[np.bool_], *, explore: bool) -> NDArray[np.int64]:
        """What the plans say: holding, leaning, raising the level, or the cooldown. int64[E]."""
        actions = np.full(len(obs), self._hold, np.int64)
        for lane, row in enumerate(obs):
            progress, plan = float(row[self._progress]), self._plans[lane % self._group_size]
            if progress == 0.0:
                self._members[lane] = _Member()
            member = self._members[lane]
            if self._lean is not None and plan.leans and not member.has_leant:
                if mask[lane, self._lean]:
                    actions[lane], member.has_leant = self._lean, True
            elif self._rise is not None and plan.rises and not member.has_risen:
                if mask[lane, self._rise]:
                    actions[lane], member.has_risen = self._rise, True
            elif plan.time == 1.0:
                self._look(lane, progress, row, mask)
            elif member.began is None and progress >= np.float32(plan.time) and mask[lane, self._cooldown]:
                actions[lane], member.began = self._cooldown, progress
        return actions

    def _look(self, lane: int, progress: float, row: NDArray[Any], mask: NDArray[np.bool_]) -> None:
        """Keeps what a waiting member sees, and what it might do.

        The group's first, its reference, has a mask that allows nothing but holding: those of its peers say it.
        """
        first = lane - lane % self._group_size
        own = self._plans[lane - first]
        same = [i for i, plan in enumerate(self._plans) if (plan.rises, plan.leans) == (own.rises, own.leans)]
        available: NDArray[np.bool_] = np.any(mask[[first + i for i in same]], axis=0)
        may_lean = self._lean is not None and available[self._lean]
        if progress < self._latest and (available[self._cooldown] or self._members[lane].seen or may_lean):
            available[self._hold] = True
            available[self._cooldown] |= not may_lean
            self._members[lane].seen.append((progress, Sight(row.copy(), available)))

    def _tell(self, first: int, group: list[_Member]) -> None:
        """Passes a group's contrasts on, in the lanes of the members that waited."""
        unit = max(member.gain for member in group)
        places = np.cumsum([0, *map(len, self._branches)]).tolist()
        parts = [group[start:stop] for start, stop in pairwise(places)]
        curves = [self._curve(part, unit) for part in parts]
        for index, (part, curve) in enumerate(zip(parts, curves, strict=True)):
            following = curves[index + 1] if index + 1 < len(curves) else None
            self._tell_branch(first + places[index], part[0].seen, curve, following)

    def _tell_branch(
        self, lane: int, seen: Sequence[tuple[float, Sight]], curve: _Returns, following: _Returns | None
    ) -> None:
        """Passes on what a member that waited might have done at each of its decisions.

        Args:
            lane: The member's.
            seen: What it saw, and when.
            curve: Returns of its branch.
            following: Of the branch that leaning, or raising the level, would have led to.
        """
        for index, (now, sight) in enumerate(seen):
            may_lean = self._lean is not None and bool(sight.mask[self._lean])
            if now < curve.times[0] and not may_lean:
                continue
            later = [*(time for time, _ in seen[index + 1 :]), self._latest]
            begin = curve.best_at([now])
            gains = {self._hold: curve.best_at(later) - begin}
            if sight.mask[self._cooldown]:
                gains[self._cooldown] = 0.0
            for action in (self._rise, self._lean):
                if following is not None and action is not None and sight.mask[action]:
                    gains[action] = following.best_at(later) - begin
            for action, gain in gains.items():
                store_contrast(self._agent, len(self._members), lane, sight, action, gain)

    def _curve(self, members: Sequence[_Member], unit: float) -> _Returns:
        """Of members that differ in the time of their decay alone, the first of which waited for the base."""
        returns = {member.began: member.gain for member in members[1:] if member.began is not None}
        returns[self._latest] = members[0].gain
        times = sorted(returns)
        return _Returns(times, in_units_of_best([returns[time] for time in times], unit))


class _Returns(NamedTuple):
    """The return as a function of the time of the decay, linear between those that were tried."""

    times: list[float]
    gains: list[float]

    def best_at(self, times: Sequence[float]) -> float:
        """The best of some times."""
        return float(np.interp(times, self.times, self.gains).max())
