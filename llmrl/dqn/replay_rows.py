"""The facts of a replay buffer: one row per transition, one lane per environment, a ring in every lane.

Slot = row * num_envs + lane, so the successor of a transition is num_envs slots further on, whatever its lane. The
columns are fields of one array of records, so that reading a transition touches one place in memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmrl.dqn.replay_checks import Transitions, TransitionSpec
from llmrl.dqn.replay_observations import FrameObservations, ObservationStore, PairedObservations

SPARE_FRAMES = 8  # one frame in so many is spare, for the additional frames at the start of an episode
MAX_STACK = 16  # a uint8 observation with more leading entries than this is an image, not a stack of frames
NONE = np.zeros(0, dtype=np.int64)
STATE = ("head", "count", "open", "episode")


class Changed(NamedTuple):
    """Slots that a change filled, and slots that it emptied."""

    filled: NDArray[np.int64]
    emptied: NDArray[np.int64]


class Rows:
    """Transitions of E lanes, the last `num_rows` of each.

    Args:
        spec: Shapes and dtypes of the transitions.
        num_rows: Rows in each lane.
    """

    def __init__(self, spec: TransitionSpec, num_rows: int) -> None:
        num_envs = spec.num_envs
        self.spec = spec
        self.num_envs = num_envs
        self.num_rows = num_rows
        self.capacity = num_rows * num_envs
        self.total = 0  # transitions held
        self.observations = _observation_store(spec, self.capacity)
        self.records: NDArray[Any] = np.zeros(self.capacity, dtype=_record_dtype(self.observations, spec.num_actions))
        self.columns: dict[str, NDArray[Any]] = {name: self.records[name] for name in self.records.dtype.names or ()}
        self.generation = self.columns["generation"]  # [N] running number of the transition in each slot, -1 = none
        self.generation[:] = -1
        self.stop = np.ones(self.capacity, dtype=np.bool_)  # [N] no window goes on past these slots
        self.head = np.zeros(num_envs, dtype=np.int64)  # [E] row that is written next
        self.count = np.zeros(num_envs, dtype=np.int64)  # [E] transitions held
        self.open = np.zeros(num_envs, dtype=np.bool_)  # [E] the newest transition's episode goes on
        self.episode = np.full(num_envs, -1, dtype=np.int64)  # [E] episode of the newest transition
        self.next_episode = 0
        self.next_generation = 0
        self.in_step = True  # every lane holds as many as every other, in the same rows
        self._lanes = np.arange(num_envs)

    @property
    def num_bytes(self) -> int:
        """Bytes of all columns and frames."""
        return self.records.nbytes + self.stop.nbytes + self.observations.num_bytes()

    def append(self, t: Transitions) -> Changed:
        """Writes one transition in each of some lanes; a full lane loses its oldest."""
        if self.in_step and len(t.lanes) == self.num_envs:
            return self._append_one(t) if self.num_envs == 1 and t.episode is None else self._append_row(t)
        self.in_step = False
        lanes, row = t.lanes, self.head[t.lanes]
        slots = row * self.num_envs + lanes
        self.stop[slots - self.num_envs] = ~self._begin_episodes(t, lanes)  # row -1 is the last one
        self._fill(slots, t, self.episode[lanes])
        self.stop[slots] = True
        self.open[lanes] = ~(t.terminated | t.truncated)
        self.head[lanes] = (row + 1) % self.num_rows
        if self.total < self.capacity:
            self.count[lanes] = np.minimum(self.count[lanes] + 1, self.num_rows)
        return Changed(slots, self._drop_lost())

    def _append_row(self, t: Transitions) -> Changed:
        """`append` where all lanes write the same row: slices in place of index arrays."""
        row, num_envs = self.head.item(0), self.num_envs
        first = row * num_envs
        before = (first or self.capacity) - num_envs
        self.stop[before : before + num_envs] = ~self._begin_episodes(t, slice(None))
        self._fill(slice(first, first + num_envs), t, self.episode)
        self.stop[first : first + num_envs] = True
        np.logical_not(t.terminated | t.truncated, out=self.open)
        self.head[:] = 0 if row + 1 == self.num_rows else row + 1
        if self.total < self.capacity:
            self.count += 1
            self.total += num_envs
        return Changed(self._lanes + first, self._drop_lost() if self.observations.loses else NONE)

    def _append_one(self, t: Transitions) -> Changed:
        """`append` where there is one lane: a record as a whole, in a fifth of the time of its fields one by one."""
        row, going_on = self.head.item(), self.open.item()
        terminated, truncated = t.terminated.item(), t.truncated.item()
        if not going_on:
            self.episode[0] = self.next_episode
            self.next_episode += 1
        self.stop[row - 1] = not going_on
        self.records[row] = (
            self.episode.item(),
            self.next_generation,
            *self.observations.write(t.obs, t.next_obs, t.lanes).values(),
            t.reward.item(),
            t.action.item(),
            terminated,
            truncated,
            True if t.mask is None else t.mask,
            True if t.next_mask is None or terminated else t.next_mask,
        )
        self.stop[row] = True
        self.open[0] = not (terminated or truncated)
        self.head[0] = 0 if row + 1 == self.num_rows else row + 1
        self.next_generation += 1
        if self.total < self.capacity:
            self.count[0] += 1
            self.total += 1
        return Changed(self._lanes + row, self._drop_lost() if self.observations.loses else NONE)

    def extend(self, lane: int, t: Transitions, *, begins: bool) -> Changed:
        """Writes K <= num_rows transitions that follow each other in time into one lane.

        Args:
            lane: Where to.
            t: Transitions, all with this lane and with their episode's number.
            begins: Whether they begin anew; False = the first follows the lane's newest transition.
        """
        self.in_step = False
        num = len(t.action)
        slots = (self.head[lane] + np.arange(num)) % self.num_rows * self.num_envs + lane
        episode = np.asarray(t.episode)
        if not begins:
            self.stop[(slots[0] - self.num_envs) % self.capacity] = False
        self._fill(slots, t, episode)
        self.stop[slots] = np.arange(num) == num - 1
        self.open[lane] = False
        self.episode[lane] = episode[-1]
        self.next_episode = max(self.next_episode, int(episode.max()) + 1)
        self.head[lane] = (self.head[lane] + num) % self.num_rows
        self.count[lane] = min(self.count[lane] + num, self.num_rows)
        return Changed(slots, self._drop_lost())

    def slots_of(self, number: NDArray[np.int64]) -> NDArray[np.int64]:  # [B] -> [B]
        """Slots by number in [0, total), each once."""
        if self.in_step or self.total == self.capacity:
            return number
        ends = self.count.cumsum()
        lane = ends.searchsorted(number, side="right")
        age = number - (ends - self.count).take(lane)
        row = ((self.head - self.count).take(lane) + age) % self.num_rows
        return np.asarray(row * self.num_envs + lane)

    def live_slots(self) -> NDArray[np.int64]:  # [total]
        """Slots that hold a transition, in the order in which they were written."""
        slots = self.slots_of(np.arange(self.total))
        return slots[np.argsort(self.generation[slots], kind="stable")]

    def begins(self, slots: NDArray[np.int64]) -> NDArray[np.bool_]:  # [K] -> [K]
        """Transitions whose predecessor in the lane is not their predecessor in time, or is no longer held."""
        before = (slots - self.num_envs) % self.capacity
        return np.asarray(self.stop[before] | (self.generation[before] < 0))

    def transitions(self, slots: NDArray[np.int64]) -> Transitions:
        """The facts in some slots."""
        records = self.records[slots]
        return Transitions(
            slots % self.num_envs,
            self.observations.read(records, "obs"),
            records["action"],
            records["reward"],
            records["terminated"],
            records["truncated"],
            self.observations.read(records, "next_obs"),
            records["mask"],
            records["next_mask"],
            records["episode"],
        )

    def state_dict(self) -> dict[str, Any]:
        """Where every lane stands, as JSON values; the rows themselves are not in it."""
        lanes = {name: getattr(self, name).tolist() for name in STATE}
        numbers = {"next_episode": self.next_episode, "next_generation": self.next_generation}
        return {**lanes, **numbers, "in_step": self.in_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over where every lane stood; `lane_slots` then says where its rows belong.

        Raises:
            ValueError: The state is not one of these lanes.
        """
        values = {name: np.asarray(state[name]) for name in STATE}
        shapes = {name: value.shape for name, value in values.items() if value.shape != (self.num_envs,)}
        if shapes:
            raise ValueError(f"state of the lanes: expected {self.num_envs} values of each kind, got {shapes}")
        head, count = values["head"], values["count"]
        if min(head.min(), count.min()) < 0 or head.max() >= self.num_rows or count.max() > self.num_rows:
            raise ValueError(f"state of the lanes: expected rows up to {self.num_rows}, got {head}, {count}")
        for name, value in values.items():
            getattr(self, name)[:] = value
        self.next_episode, self.next_generation = int(state["next_episode"]), int(state["next_generation"])
        self.total = int(self.count.sum())
        level = (head == head[0]).all() and (count == min(count[0], self.num_rows)).all()
        self.in_step = bool(state.get("in_step", False) and level)  # files of the first version do not say

    def lane_slots(self, lane: int) -> NDArray[np.int64]:  # [count]
        """Slots of one lane's transitions, the oldest first."""
        row = (self.head[lane] - self.count[lane] + np.arange(self.count[lane])) % self.num_rows
        return np.asarray(row * self.num_envs + lane)

    def _begin_episodes(self, t: Transitions, lanes: NDArray[np.int64] | slice) -> NDArray[np.bool_]:
        """Numbers the episodes of new transitions; says in which lanes they follow the newest transition."""
        going_on = self.open[lanes]
        if t.episode is not None:
            going_on = going_on & (t.episode == self.episode[lanes])
            self.episode[lanes] = t.episode
            self.next_episode = max(self.next_episode, int(self.episode.max()) + 1)
        elif np.count_nonzero(going_on) < len(going_on):
            starting = t.lanes[~going_on]
            self.episode[starting] = self.next_episode + np.arange(len(starting))
            self.next_episode += len(starting)
        return going_on

    def _fill(self, slots: NDArray[np.int64] | slice, t: Transitions, episode: NDArray[np.int64]) -> None:
        """Writes K transitions into K slots, numbered on from the last."""
        column, num = self.columns, len(t.action)
        column["episode"][slots] = episode
        column["generation"][slots] = np.arange(self.next_generation, self.next_generation + num)
        column["action"][slots] = t.action
        column["reward"][slots] = t.reward
        column["terminated"][slots] = t.terminated
        column["truncated"][slots] = t.truncated
        column["mask"][slots] = True if t.mask is None else t.mask
        column["next_mask"][slots] = True if t.next_mask is None else t.next_mask
        if t.next_mask is not None and np.count_nonzero(t.next_mask) < t.next_mask.size:
            column["next_mask"][slots] |= t.terminated[:, None]  # without meaning there, but never all False
        for name, values in self.observations.write(t.obs, t.next_obs, t.lanes).items():
            column[name][slots] = values
        self.next_generation += num

    def _drop_lost(self) -> NDArray[np.int64]:
        """Forgets the oldest transitions of lanes whose frames have been overwritten; recounts the rest."""
        emptied: list[NDArray[np.int64]] = []
        while self.observations.loses:
            lanes = np.flatnonzero(self.count > 0)
            oldest = (self.head[lanes] - self.count[lanes]) % self.num_rows * self.num_envs + lanes
            lost = self.observations.lost(self.records[oldest])
            if not lost.any():
                break
            self.in_step = False
            self.generation[oldest[lost]] = -1
            self.count[lanes[lost]] -= 1
            emptied.append(oldest[lost])
        if emptied or self.total < self.capacity:
            self.total = int(self.count.sum())
        return np.concatenate(emptied) if emptied else NONE


def _observation_store(spec: TransitionSpec, capacity: int) -> ObservationStore:
    """Frames once for stacks of images, pairs for everything else."""
    shape = spec.obs_shape
    if spec.obs_dtype == np.uint8 and len(shape) == 3 and shape[0] <= MAX_STACK:
        spare = capacity // SPARE_FRAMES + 4 * shape[0] * spec.num_envs
        return FrameObservations(shape, capacity + spare, spec.num_envs)
    return PairedObservations(shape, spec.obs_dtype)


def _record_dtype(observations: ObservationStore, num_actions: int) -> np.dtype[Any]:
    """One transition; large fields first so that every field is aligned without gaps."""
    fields = [("episode", np.int64, ()), ("generation", np.int64, ()), *observations.fields]
    fields += [("reward", np.float32, ()), ("action", np.int32, ()), ("terminated", np.bool_, ())]
    fields += [("truncated", np.bool_, ()), ("mask", np.bool_, (num_actions,)), ("next_mask", np.bool_, (num_actions,))]
    return np.dtype(fields, align=True)
