"""Replay buffer: facts about single steps in preallocated columns; targets are built when a batch is drawn.

    replay = ReplayBuffer(100_000, num_envs=8, obs_shape=(40,), num_actions=9)
    replay.add(obs, action, reward, terminated, truncated, next_obs, mask, next_mask)  # one step of every environment
    batch = replay.sample(128, rng, n_step=3, gamma=0.99)

n and gamma are arguments of `sample`: they can change while the experience stays, and old experience can be reused.
"""

from __future__ import annotations

import json
import uuid
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrl.dqn.replay_batch import Batch, RewardTransform, build_batch
from llmrl.dqn.replay_checks import TransitionSpec, check_positive
from llmrl.dqn.replay_merge import Experience, HeldExperience, Share, merge
from llmrl.dqn.replay_rows import Changed, Rows
from llmrl.dqn.replay_storage import LoadReport, StoredReplay, append_replay, check_agrees, write_replay
from llmrl.dqn.sum_tree import SumTree

__all__ = ["Batch", "LoadReport", "ReplayBuffer", "Sampling"]

Sampling = Literal["uniform", "prioritized", "lap"]
PRIORITY_FLOOR = 1e-6  # added to |td| so that no stored transition is out of reach


class ReplayBuffer:
    """The last transitions of `num_envs` environments, capacity // num_envs of each.

    Args:
        capacity: Transitions to hold; rounded down to a multiple of num_envs (`replay.capacity` says to what).
        num_envs: Environments E that are stepped together.
        obs_shape: Shape of one observation. uint8 [stack, height, width] keeps every frame once.
        num_actions: Actions A.
        obs_dtype: np.float32 or np.uint8.
        sampling: "uniform"; "prioritized": probability ~ (|td| + 1e-6)**alpha, with importance weights (Schaul et al.
            2016, https://arxiv.org/abs/1511.05952); "lap": probability ~ max(|td|, 1)**alpha, no weights, to be used
            with the Huber loss (Fujimoto et al. 2020, https://arxiv.org/abs/2007.06049).
        alpha: Exponent of the priorities.
        normalize_weights: Divide importance weights by the largest of the batch, so that they only scale steps down.
        metadata: What the numbers mean, as JSON values (hashes of the observation spec and the action table); saved,
            and compared when experience is restored or merged.

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
        self.spec = TransitionSpec(num_envs, tuple(obs_shape), obs_dtype, num_actions)
        self.rows = Rows(self.spec, capacity // num_envs)
        self.num_envs, self.capacity = num_envs, self.rows.capacity
        self.sampling, self.alpha, self.normalize_weights = sampling, alpha, normalize_weights
        self.metadata = json.loads(json.dumps(metadata or {}))
        self.max_priority = 0.0
        self._raise_max_priority(1.0)
        self.num_stale_updates = 0
        self._tree = None if sampling == "uniform" else SumTree(self.capacity)
        self._identity = uuid.uuid4().hex  # which folders may be appended to

    def __len__(self) -> int:
        """Transitions that can be drawn."""
        return self.rows.total

    @property
    def num_bytes(self) -> int:
        """Bytes of all columns, frames and priorities."""
        return self.rows.num_bytes + (0 if self._tree is None else self._tree.num_bytes)

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
        self._changed(
            self.rows.append(
                self.spec.check(obs, action, reward, terminated, truncated, next_obs, mask, next_mask, episode, valid)
            )
        )

    def end_episodes(self) -> None:
        """The next transition of every lane begins an episode: no window runs from what is stored into what comes."""
        self.rows.open[:] = False

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
        if self._tree is None:
            index = self.rows.slots_of(rng.integers(0, len(self), batch_size))
        else:
            index = self._tree.sample(batch_size, rng)
        return build_batch(self.rows, index, self._weights(index, beta), n_step, gamma, reward_transform)

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
        if index.min() < 0 or index.max() >= self.capacity:
            raise ValueError(f"index: expected 0 to {self.capacity - 1}, got {index.min()} to {index.max()}")
        fresh = self.rows.generation[index] == generation
        num_stale = len(index) - int(np.count_nonzero(fresh))
        if num_stale:
            self.num_stale_updates += num_stale
            index, values = index[fresh], values[fresh]
        self._tree.set_later(index, self._leaf(values))
        self._raise_max_priority(float(values.max(initial=0.0)))
        return len(index)

    def save(self, path: Path) -> None:
        """Writes everything to a new folder and then puts it in the place of `path`: whole or not at all."""
        write_replay(path, self.rows, self._about(), self._priorities())

    def append(self, path: Path) -> None:
        """Adds to `path` what came since it was written, and keeps there what was overwritten here meanwhile.

        Raises:
            ValueError: The folder is not of this buffer, or is damaged.
        """
        append_replay(path, self.rows, self._about(), self._priorities())

    def restore(self, path: Path) -> LoadReport:
        """Takes over what was saved; what is drawn from then on is what the saved buffer would have drawn.

        From a damaged folder every transition before the damage is taken, with a warning.

        Raises:
            ValueError: The folder is missing, of another version, shape, capacity or metadata, or nothing is intact.
        """
        stored = StoredReplay(path)
        check_agrees(str(path), stored.about, self._about(), ("spec", "metadata", "num_envs", "capacity"))
        rows = Rows(self.spec, self.rows.num_rows)
        if stored.damage is None:
            stored.fill(rows)
        self.rows = rows
        self._tree = None if self._tree is None else SumTree(self.capacity)
        self._identity = stored.about["identity"]
        self.max_priority = 0.0
        self._raise_max_priority(stored.about["max_priority"])
        self.num_stale_updates = stored.about["num_stale_updates"]
        if stored.damage is not None:
            return self.merge(stored)
        same = all(stored.about[key] == self._about()[key] for key in ("sampling", "alpha"))
        priorities = stored.priorities() if same else None
        if self._tree is not None:
            self._tree.set(rows.live_slots(), self._highest_leaf if priorities is None else priorities)
        return LoadReport(stored.num_stored, len(self), None)

    def merge(self, source: Path | StoredReplay | ReplayBuffer, *, rank: int = 0, num_processes: int = 1) -> LoadReport:
        """Adds the experience of another run as if it had just been collected.

        The other run may have had another number of environments or capacity, but observations and actions must mean
        the same. What does not fit is left out, the oldest first. From a damaged folder every transition before the
        damage is taken, with a warning.

        Args:
            source: A folder, or a buffer.
            rank: Which share to take where several processes divide the experience among them.
            num_processes: How many do.

        Raises:
            ValueError: The folder cannot be read, or shapes or metadata differ.
        """
        if isinstance(source, ReplayBuffer):
            check_agrees("replay buffer", source._about(), self._about(), ("spec", "metadata"))
            experience: Experience = HeldExperience(source.rows)
            num_stored, damage = len(source), None
        else:
            experience = stored = source if isinstance(source, StoredReplay) else StoredReplay(source)
            check_agrees(str(stored.path), stored.about, self._about(), ("spec", "metadata"))
            num_stored, damage = stored.num_stored, stored.damage
        if num_processes > 1:
            experience = Share(experience, rank, num_processes)
        for changed in merge(self.rows, experience):
            self._changed(changed)
        num_loaded = min(len(experience.environment), self.capacity)
        if damage is not None:
            warnings.warn(f"{stored.path}: {damage}; took {num_loaded} transitions before that", stacklevel=2)
        return LoadReport(num_stored, num_loaded, damage)

    def _about(self) -> dict[str, Any]:
        """What a saved buffer says about itself; JSON values."""
        spec = self.spec
        shape, dtype = list(spec.obs_shape), spec.obs_dtype.name
        return {
            "identity": self._identity,
            "spec": {"obs_shape": shape, "obs_dtype": dtype, "num_actions": spec.num_actions},
            "metadata": self.metadata,
            "num_envs": self.num_envs,
            "capacity": self.capacity,
            "sampling": self.sampling,
            "alpha": self.alpha,
            "max_priority": self.max_priority,
            "num_stale_updates": self.num_stale_updates,
        }

    def _priorities(self) -> NDArray[np.float64] | None:
        """Leaves of the sum tree, in the order in which the transitions were written."""
        return None if self._tree is None else self._tree.get(self.rows.live_slots())

    def _changed(self, changed: Changed) -> None:
        """New transitions get the highest priority so far; emptied slots can no longer be drawn."""
        if self._tree is not None:
            self._tree.set_later(changed.filled, self._highest_leaf)
            if len(changed.emptied):
                self._tree.set_later(changed.emptied, 0.0)

    def _raise_max_priority(self, priority: float) -> None:
        if priority > self.max_priority:
            self.max_priority = priority
            self._highest_leaf = float(self._leaf(np.array(priority)))

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
