"""Replay buffer: facts about single steps in preallocated columns; targets are built when a batch is drawn.

    replay = ReplayBuffer(100_000, num_envs=8, obs_shape=(40,), num_actions=9)
    replay.add(obs, action, reward, terminated, truncated, next_obs, mask, next_mask)  # one step of every environment
    batch = replay.sample(128, rng, n_step=3, gamma=0.99)

Each environment has a lane: a ring of capacity // num_envs rows. Slot = row * num_envs + lane, so that the successor of
a transition is num_envs slots further on. The columns are fields of one array of records: a draw touches one place in
memory per transition. n and gamma are arguments of `sample`, so they can change while the experience stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrl.dqn.n_step import n_step_returns, window_slots
from llmrl.dqn.replay_checks import Transitions, TransitionSpec, check_positive
from llmrl.dqn.replay_observations import FrameObservations, ObservationStore, PairedObservations
from llmrl.dqn.sum_tree import SumTree

Sampling = Literal["uniform", "prioritized", "lap"]
RewardTransform = Callable[[NDArray[np.float64]], NDArray[np.float64]]
PRIORITY_FLOOR = 1e-6  # added to |td| so that no stored transition is out of reach
SPARE_FRAMES = 8  # one frame in so many is spare, for the additional frames at the start of an episode
MAX_STACK = 16  # a uint8 observation with more leading entries than this is an image, not a stack of frames


@dataclass(frozen=True)
class Batch:
    """B transitions over n steps, ready for a loss. `discount` carries termination: 0 = nothing comes after."""

    obs: NDArray[Any]  # [B, *obs_shape] float32 or uint8
    action: NDArray[np.int64]  # [B]
    reward: NDArray[np.float32]  # [B] sum of gamma**k * reward over the window
    discount: NDArray[np.float32]  # [B] gamma**m for a window of m steps, 0 after termination
    next_obs: NDArray[Any]  # [B, *obs_shape] m steps later; the final observation where an episode ended
    mask: NDArray[np.bool_]  # [B, A] actions available at obs
    next_mask: NDArray[np.bool_]  # [B, A] actions available at next_obs
    weight: NDArray[np.float32]  # [B] importance weight of each loss
    index: NDArray[np.int64]  # [B] slot, for update_priorities
    generation: NDArray[np.int64]  # [B] number of the transition in that slot, for update_priorities


class ReplayBuffer:
    """The last `capacity` transitions of `num_envs` environments.

    Args:
        capacity: Transitions to hold; rounded down to a multiple of num_envs (`replay.capacity` says to what).
        num_envs: Environments E that are stepped together, one lane each.
        obs_shape: Shape of one observation. uint8 [stack, height, width] keeps every frame once.
        num_actions: Actions A.
        obs_dtype: np.float32 or np.uint8.
        sampling: "uniform"; "prioritized": probability ~ (|td| + 1e-6)**alpha, with importance weights (Schaul et al.
            2016, https://arxiv.org/abs/1511.05952); "lap": probability ~ max(|td|, 1)**alpha, no weights, to be used
            with the Huber loss (Fujimoto et al. 2020, https://arxiv.org/abs/2007.06049).
        alpha: Exponent of the priorities.
        normalize_weights: Divide importance weights by the largest of the batch, so that they only scale steps down.
        metadata: What the numbers mean, as JSON values (hashes of the observation spec and the action table); saved,
            and compared when experience is loaded or merged.

    Raises:
        ValueError: A size is not positive, or a choice is unknown.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        obs_shape: tuple[int, ...],
        num_actions: int,
        *,
        obs_dtype: type[np.generic] = np.float32,
        sampling: Sampling = "uniform",
        alpha: float = 0.6,
        normalize_weights: bool = True,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        check_positive(capacity=capacity, num_envs=num_envs, num_actions=num_actions)
        if capacity < num_envs:
            raise ValueError(f"capacity: expected at least num_envs={num_envs}, got {capacity}")
        if sampling not in ("uniform", "prioritized", "lap"):
            raise ValueError(f"sampling: expected 'uniform', 'prioritized' or 'lap', got {sampling!r}")
        if obs_dtype not in (np.float32, np.uint8):
            raise ValueError(f"obs_dtype: expected numpy.float32 or numpy.uint8, got {obs_dtype!r}")
        if not alpha >= 0:
            raise ValueError(f"alpha: expected a number >= 0, got {alpha}")
        self.num_envs = num_envs
        self.num_rows = capacity // num_envs
        self.capacity = self.num_rows * num_envs
        self.spec = TransitionSpec(num_envs, tuple(obs_shape), obs_dtype, num_actions)
        self.sampling, self.alpha, self.normalize_weights = sampling, alpha, normalize_weights
        self.metadata = dict(metadata or {})
        self.num_stale_updates = 0
        self.max_priority = 1.0
        self.observations = _observation_store(self.spec, self.capacity)
        self._records = np.zeros(self.capacity, dtype=_record_dtype(self.observations, num_actions))
        self._generation = self._records["generation"]  # number of the transition in each slot, -1 = none
        self._generation[:] = -1
        self._stop = np.ones(self.capacity, dtype=np.bool_)  # no n-step window goes on past these slots
        self._tree = None if sampling == "uniform" else SumTree(self.capacity)
        self._head = np.zeros(num_envs, dtype=np.int64)  # [E] row that is written next
        self._count = np.zeros(num_envs, dtype=np.int64)  # [E] transitions held
        self._open = np.zeros(num_envs, dtype=np.bool_)  # [E] the newest transition's episode goes on
        self._episode = np.full(num_envs, -1, dtype=np.int64)  # [E] episode of the newest transition
        self._next_episode = 0
        self._next_generation = 0

    def __len__(self) -> int:
        """Transitions that can be drawn."""
        return int(self._count.sum())

    @property
    def num_bytes(self) -> int:
        """Bytes of all columns, frames and priorities."""
        tree = 0 if self._tree is None else self._tree.num_bytes
        return self._records.nbytes + self._stop.nbytes + self.observations.num_bytes() + tree

    def add(
        self,
        obs: ArrayLike,  # [E, *obs_shape]
        action: ArrayLike,  # [E] integer
        reward: ArrayLike,  # [E]
        terminated: ArrayLike,  # [E] bool: the episode ended in a state with no future
        truncated: ArrayLike,  # [E] bool: the episode was cut short; its last state had a future
        next_obs: ArrayLike,  # [E, *obs_shape]; where an episode ended its final observation
        mask: ArrayLike | None = None,  # [E, A] bool, True = available at obs; None = all
        next_mask: ArrayLike | None = None,  # [E, A] bool, the same at next_obs; without meaning after termination
        episode: ArrayLike | None = None,  # [E] integer; None = counted here
        valid: ArrayLike | None = None,  # [E] bool; lanes that are False are left as they are
    ) -> None:
        """Stores one step of every environment; each lane that is full loses its oldest transition.

        Raises:
            ValueError: A wrong shape or dtype, an action that is out of range or masked, an all-false mask, NaN or
                infinity. The buffer is then unchanged.
        """
        self._append(
            self.spec.check(obs, action, reward, terminated, truncated, next_obs, mask, next_mask, episode, valid)
        )

    def end_episodes(self) -> None:
        """The next transition of every lane begins an episode: no window runs from what is stored into what comes."""
        self._open[:] = False

    def sample(
        self,
        batch_size: int,
        rng: np.random.Generator,
        *,
        n_step: int,
        gamma: float,
        beta: float = 0.0,
        reward_transform: RewardTransform | None = None,
    ) -> Batch:
        """Draws transitions, each as the start of a window of at most n steps.

        A window never goes on past the end of an episode, a truncation or the newest transition of its lane; a shorter
        window of m steps has discount gamma**m, which is an exact m-step return.

        Args:
            batch_size: Draws B, with replacement.
            rng: Where the randomness comes from.
            n_step: Longest window n.
            gamma: Discount per step.
            beta: Exponent of the importance weights (sampling "prioritized"): (len(self) * probability)**-beta.
            reward_transform: Applied to the single-step rewards before they are summed (clipping, scaling).

        Raises:
            ValueError: The buffer is empty, batch_size or n_step is not positive, or gamma is outside [0, 1].
        """
        check_positive(batch_size=batch_size, n_step=n_step)
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma: expected a number in [0, 1], got {gamma}")
        if len(self) == 0:
            raise ValueError("sampling from a replay buffer: expected at least one transition, got an empty buffer")
        index = self._draw(batch_size, rng)
        return self._batch(index, n_step, gamma, self._weights(index, beta), reward_transform)

    def update_priorities(
        self,
        index: NDArray[np.int64],  # [B] Batch.index
        generation: NDArray[np.int64],  # [B] Batch.generation
        priority: ArrayLike,  # [B] |td error|
    ) -> int:
        """Sets priorities after learning; alpha is applied here and only here.

        A slot that was overwritten since the batch was drawn keeps its priority (`num_stale_updates` counts those).
        With uniform sampling there is nothing to set.

        Returns:
            How many priorities were set.

        Raises:
            ValueError: Shapes differ, an index is out of range, or a priority is negative or not finite.
        """
        values = np.asarray(priority, dtype=np.float64)
        if not index.shape == generation.shape == values.shape:
            shapes = (index.shape, generation.shape, values.shape)
            raise ValueError(f"index, generation, priority: expected one shape, got {shapes}")
        if values.size and not (values.min() >= 0 and values.max() < np.inf):
            raise ValueError(f"priority: expected finite numbers >= 0, got {values.min()} to {values.max()}")
        if self._tree is None or not values.size:
            return 0
        fresh = self._generation.take(index) == generation
        if not fresh.all():
            self.num_stale_updates += int((~fresh).sum())
            index, values = index[fresh], values[fresh]
        self._tree.set(index, self._leaf(values))
        self.max_priority = max(self.max_priority, float(values.max(initial=0.0)))
        return len(index)

    def _append(self, t: Transitions) -> None:
        """Writes checked transitions, one in each of some lanes."""
        num = len(t.lanes)
        rows = self._head[t.lanes]
        self._begin_episodes(t)
        records: NDArray[Any] = np.zeros(num, dtype=self._records.dtype)
        records["episode"] = self._episode[t.lanes]
        records["generation"] = np.arange(self._next_generation, self._next_generation + num)
        records["action"], records["reward"] = t.action, t.reward
        records["terminated"], records["truncated"] = t.terminated, t.truncated
        records["mask"] = True if t.mask is None else t.mask
        records["next_mask"] = True if t.next_mask is None else t.next_mask | t.terminated[:, None]
        self.observations.write(records, t.obs, t.next_obs, t.lanes)
        slots = rows * self.num_envs + t.lanes
        self._records[slots] = records
        self._stop[slots] = True
        self._open[t.lanes] = ~(t.terminated | t.truncated)
        self._head[t.lanes] = (rows + 1) % self.num_rows
        self._count[t.lanes] = np.minimum(self._count[t.lanes] + 1, self.num_rows)
        self._next_generation += num
        if self._tree is not None:
            self._tree.set(slots, float(self._leaf(np.array(self.max_priority))))
        self._drop_lost()

    def _begin_episodes(self, t: Transitions) -> None:
        """Numbers the episodes of new transitions, and lets windows run from their predecessors into them."""
        open_, episode = self._open[t.lanes], self._episode[t.lanes]
        if t.episode is not None:
            open_ = open_ & (t.episode == episode)
            self._episode[t.lanes] = t.episode
        else:
            starting = t.lanes[~open_]
            self._episode[starting] = self._next_episode + np.arange(len(starting))
        self._next_episode = max(self._next_episode, int(self._episode.max()) + 1)
        going_on = t.lanes[open_]
        self._stop[(self._head[going_on] - 1) % self.num_rows * self.num_envs + going_on] = False

    def _drop_lost(self) -> None:
        """Drops the oldest transitions of lanes whose frames have been overwritten."""
        if not self.observations.loses:
            return
        while True:
            lanes = np.flatnonzero(self._count > 0)
            slots = (self._head[lanes] - self._count[lanes]) % self.num_rows * self.num_envs + lanes
            lost = self.observations.lost(self._records[slots])
            if not lost.any():
                return
            self._generation[slots[lost]] = -1
            self._count[lanes[lost]] -= 1
            if self._tree is not None:
                self._tree.set(slots[lost], 0.0)

    def _draw(self, batch_size: int, rng: np.random.Generator) -> NDArray[np.int64]:  # [B]
        """Slots, uniformly or in proportion to their priorities."""
        if self._tree is not None:
            return self._tree.sample(batch_size, rng)
        total = len(self)
        number = rng.integers(0, total, batch_size)  # lane by lane, each from its oldest transition
        if total == self.capacity:
            return number
        ends = self._count.cumsum()
        lane = ends.searchsorted(number, side="right")
        age = number - (ends - self._count).take(lane)
        row = ((self._head - self._count).take(lane) + age) % self.num_rows
        return row * self.num_envs + lane

    def _weights(self, index: NDArray[np.int64], beta: float) -> NDArray[np.float32]:  # [B]
        """(len(self) * probability)**-beta, over the largest of the batch if weights are normalised."""
        if self._tree is None or self.sampling == "lap":
            return np.ones(len(index), dtype=np.float32)
        weight = (len(self) * self._tree.get(index) / self._tree.total) ** -beta
        if self.normalize_weights:
            weight /= weight.max()
        return weight.astype(np.float32)

    def _leaf(self, priority: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the tree holds for a priority."""
        if self.sampling == "lap":
            return np.asarray(np.maximum(priority, 1.0) ** self.alpha)
        return np.asarray((priority + PRIORITY_FLOOR) ** self.alpha)

    def _batch(
        self,
        index: NDArray[np.int64],
        n_step: int,
        gamma: float,
        weight: NDArray[np.float32],
        reward_transform: RewardTransform | None,
    ) -> Batch:
        """The transitions that start at some slots, over windows of at most n steps."""
        first = self._records.take(index)
        windows = window_slots(index, n_step, self.num_envs, self.capacity)
        reward = self._records["reward"][windows].astype(np.float64)
        returns = n_step_returns(
            self._stop, reward if reward_transform is None else reward_transform(reward), windows, gamma
        )
        last = first if n_step == 1 else self._records.take(returns.last)
        return Batch(
            obs=self.observations.read(first, "obs"),
            action=first["action"].astype(np.int64),
            reward=returns.reward.astype(np.float32),
            discount=np.where(last["terminated"], 0.0, returns.discount).astype(np.float32),
            next_obs=self.observations.read(last, "next_obs"),
            mask=np.ascontiguousarray(first["mask"]),
            next_mask=np.ascontiguousarray(last["next_mask"]),
            weight=weight,
            index=index,
            generation=np.ascontiguousarray(first["generation"]),
        )


def _observation_store(spec: TransitionSpec, capacity: int) -> ObservationStore:
    """Frames once for stacks of images, pairs for everything else."""
    shape = spec.obs_shape
    if spec.obs_dtype is np.uint8 and len(shape) == 3 and shape[0] <= MAX_STACK:
        spare = capacity // SPARE_FRAMES + 4 * shape[0] * spec.num_envs
        return FrameObservations(shape, capacity + spare, spec.num_envs)
    return PairedObservations(shape, spec.obs_dtype)


def _record_dtype(observations: ObservationStore, num_actions: int) -> np.dtype[Any]:
    """One transition; eight-byte fields first so that every field is aligned."""
    fields = [("episode", np.int64, ()), ("generation", np.int64, ()), *observations.fields]
    fields += [("reward", np.float32, ()), ("action", np.int32, ()), ("terminated", np.bool_, ())]
    fields += [("truncated", np.bool_, ()), ("mask", np.bool_, (num_actions,)), ("next_mask", np.bool_, (num_actions,))]
    return np.dtype(fields, align=True)
