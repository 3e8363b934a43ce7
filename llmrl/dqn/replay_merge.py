"""Adding stored experience to a buffer's rows, whatever number of lanes it came from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmrl.dqn.replay_checks import Transitions
from llmrl.dqn.replay_rows import Changed, Rows

PIECE_ROWS = 1_024  # transitions that are in memory twice at a time


class Experience(Protocol):
    """K transitions in the order in which they were written."""

    environment: NDArray[np.int64]  # [K] lane
    begins: NDArray[np.bool_]  # [K] the predecessor in the lane is not the predecessor in time

    def transitions(self, which: NDArray[np.int64]) -> Transitions:
        """Some of the transitions, by place in [0, K)."""


class HeldExperience:
    """The transitions of rows in memory."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._slots = rows.live_slots()
        self.environment = self._slots % rows.num_envs
        self.begins = rows.begins(self._slots)

    def transitions(self, which: NDArray[np.int64]) -> Transitions:
        """Some of the transitions."""
        return self._rows.transitions(self._slots[which])


class Share:
    """The part of some experience that falls to one of several processes.

    Unbroken runs stay whole; each goes to the process that has been dealt the fewest transitions so far.

    Args:
        source: All of it; every process must see the same.
        rank: The process, from 0.
        num_processes: Number of processes.
    """

    def __init__(self, source: Experience, rank: int, num_processes: int) -> None:
        dealt = np.zeros(num_processes, dtype=np.int64)
        begins = source.begins.copy()
        own = [np.zeros(0, dtype=np.int64)]
        for run in unbroken_runs(source.environment, source.begins):
            receiver = int(dealt.argmin())
            dealt[receiver] += len(run)
            if receiver == rank:
                own.append(run)
                begins[run[0]] = True
        self._source = source
        self._places = np.sort(np.concatenate(own))
        self.environment = source.environment[self._places]
        self.begins = begins[self._places]

    def transitions(self, which: NDArray[np.int64]) -> Transitions:
        """Some of the transitions."""
        return self._source.transitions(self._places[which])


def merge(rows: Rows, source: Experience) -> Iterator[Changed]:
    """Writes experience into `rows` as if it had just been collected; what does not fit is its oldest part.

    Unbroken runs of one lane stay unbroken; each goes to the lane that has received the least so far. Nothing is
    joined to what the lanes held before, or to what comes after.
    """
    runs = _newest(unbroken_runs(source.environment, source.begins), rows.capacity)
    received = np.zeros(rows.num_envs, dtype=np.int64)
    for run in runs:
        lane = int(received.argmin())
        received[lane] += len(run)
        rows.open[lane] = False
        for start in range(0, len(run), min(PIECE_ROWS, rows.num_rows)):
            piece = run[start : start + min(PIECE_ROWS, rows.num_rows)]
            yield _extend(rows, lane, source.transitions(piece), begins=start == 0)


def unbroken_runs(environment: NDArray[np.int64], begins: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Places of transitions that follow each other in time in one lane, run by run, the earliest run first."""
    if not len(environment):
        return []
    order = np.argsort(environment, kind="stable")  # lane by lane
    starts = begins[order] | (np.diff(environment[order], prepend=-1) != 0)
    return sorted(np.split(order, np.flatnonzero(starts[1:]) + 1), key=lambda run: int(run[0]))


def _newest(runs: list[NDArray[np.int64]], capacity: int) -> list[NDArray[np.int64]]:
    """The last runs that hold `capacity` transitions, the first of them cut if need be."""
    kept: list[NDArray[np.int64]] = []
    room = capacity
    for run in reversed(runs):
        if room == 0:
            break
        kept.append(run[-room:])
        room -= len(kept[-1])
    return kept[::-1]


def _extend(rows: Rows, lane: int, t: Transitions, *, begins: bool) -> Changed:
    """Writes one piece of a run; a run is one episode, and its number the next that is free."""
    num = len(t.action)
    episode = rows.next_episode if begins else int(rows.episode[lane])
    return rows.extend(lane, t._replace(lanes=np.full(num, lane), episode=np.full(num, episode)), begins=begins)
