"""The DQN agent: acts, stores what happened, learns, saves and resumes bit for bit.

agent = DQNAgent(DQNConfig(seed=0), num_envs=1, obs_shape=(4,), num_actions=2)
action = agent.act(obs, mask, explore=True)                        # [E, O], [E, A] -> [E]
agent.observe(obs, action, reward, terminated, truncated, next_obs, mask, next_mask)
metrics = agent.learn()                                            # None when no update was due
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from llmrl.dqn.acting import check_mask, greedy_actions
from llmrl.dqn.agent_files import read_json, read_tensors, restoring, write_json
from llmrl.dqn.config import DQNConfig
from llmrl.dqn.exploration import GREEDY, make_exploration
from llmrl.dqn.learner import Learner, UpdateResult
from llmrl.dqn.network_file import save_network
from llmrl.dqn.networks import RunningStatistics
from llmrl.dqn.numpy_network import NumpyNetwork
from llmrl.dqn.replay import Batch, ReplayBuffer
from llmrl.dqn.replay_checks import is_finite

FORMAT_VERSION = 1
UNSEEN_DEVIATION = 1e30  # standardised by this an entry is zero, in every form in which a network is exported
FEW_OBS = 8  # up to so many observations at once NumPy is faster than torch


class DQNAgent:
    """DQN with every flag of `DQNConfig`.

    Args:
        config: All settings, the seed among them.
        num_envs: Environments E that act together.
        obs_shape: Shape of one observation.
        num_actions: Actions A.
        obs_dtype: float32, or uint8 for images.
        device: Where the networks live; "auto" is CUDA where there is one.
        metadata: What observations and actions mean (hashes); experience is only merged where it agrees.
        rank: Number of the process where several learn together: all start from the same network, and each explores
            and samples differently. They also need `learner.average_gradient`, and `env_steps` set to the sum over
            all of them before each `learn`, which then does the same updates everywhere.

    Attributes:
        merge_statistics: Where several processes learn together: the merged statistics of the observations of all.
    """

    def __init__(
        self,
        config: DQNConfig,
        *,
        num_envs: int,
        obs_shape: tuple[int, ...],
        num_actions: int,
        obs_dtype: type[np.generic] = np.float32,
        device: str = "cpu",
        metadata: dict[str, Any] | None = None,
        rank: int = 0,
    ) -> None:
        self.config = config
        self.num_envs, self.num_actions, self.obs_shape = num_envs, num_actions, tuple(obs_shape)
        network_seed = int(np.random.SeedSequence(config.seed).generate_state(1, np.uint64)[0] >> np.uint64(1))
        generator = torch.Generator().manual_seed(network_seed)
        self.learner = Learner(config, config.network(self.obs_shape, num_actions), generator, resolve_device(device))
        self._seed_generators(rank)
        self._statistics = RunningStatistics(self.obs_shape)
        self.merge_statistics: Callable[[RunningStatistics], RunningStatistics] | None = None
        self.replay = ReplayBuffer(
            config.replay_capacity,
            num_envs,
            self.obs_shape,
            num_actions,
            obs_dtype=obs_dtype,
            sampling=config.sampling,
            alpha=config.priority_exponent,
            metadata=metadata,
        )
        self.env_steps = 0
        self._scheduled_updates = 0
        if config.ignored_obs:
            self._check_ignored()
            self._use_statistics()
        self._few = self._numpy_network()

    def _check_ignored(self) -> None:
        size = self.obs_shape[0]
        if len(self.obs_shape) != 1 or max(self.config.ignored_obs) >= size:
            expected = f"positions in observations of shape {self.obs_shape}"
            raise ValueError(f"ignored_obs: expected {expected}, got {self.config.ignored_obs}")

    def _numpy_network(self) -> NumpyNetwork | None:
        """The online network over the same memory, for few observations at once on the CPU."""
        network = self.learner.online
        if self.learner.device.type != "cpu" or network.config.torso != "mlp" or network.config.noisy:
            return None
        return NumpyNetwork(network.config, {name: value.numpy() for name, value in network.state_dict().items()})

    def _seed_generators(self, *key: int) -> None:
        """Generators of exploration, sampling and acting noise, a process's own; the learner's is the same in all."""
        explore, sample, noise = np.random.SeedSequence(self.config.seed, spawn_key=key).spawn(3)
        self.exploration = make_exploration(self.config, self.num_envs, np.random.default_rng(explore))
        self._sample_rng = np.random.default_rng(sample)
        self._noise_generator = torch.Generator().manual_seed(int(noise.generate_state(1)[0]))

    @property
    def learner_steps(self) -> int:
        """Updates so far, those from logs included."""
        return self.learner.learner_steps

    @property
    def epsilon(self) -> float:
        """Share of random actions now; the mean over environments where they differ."""
        return float(np.mean(self.exploration.epsilon(self.env_steps)))

    def q_values(self, obs: NDArray[Any]) -> NDArray[np.float32]:
        """Action values [E, A] of the network as it stands, by which greedy actions are chosen."""
        if obs.shape[1:] != self.obs_shape:
            raise ValueError(f"obs: expected shape [E, {', '.join(map(str, self.obs_shape))}], got {obs.shape}")
        if self._few is not None and len(obs) <= FEW_OBS:
            return self._few.values(obs)
        network = self.learner.online
        with torch.inference_mode():
            inputs = torch.from_numpy(np.ascontiguousarray(obs)).to(self.learner.device)
            return network.values(network(inputs)).cpu().numpy()

    def act(self, obs: NDArray[Any], mask: NDArray[np.bool_], *, explore: bool) -> NDArray[np.int64]:
        """Actions [E]: greedy ones, or with exploration where `explore`.

        Raises:
            ValueError: A wrong shape, an environment without an available action, or values that are not finite.
        """
        if mask.shape != (len(obs), self.num_actions):
            raise ValueError(f"mask: expected shape {(len(obs), self.num_actions)}, got {mask.shape}")
        if not explore:
            check_mask(mask)
            return self._greedy(obs, mask, noisy=False)
        chosen = self.exploration.choose(mask, self.env_steps)
        greedy = chosen == GREEDY
        num_greedy = np.count_nonzero(greedy)
        if not num_greedy:
            return chosen
        best = self._greedy(obs, mask, noisy=self.config.noisy)
        return best if num_greedy == len(greedy) else np.where(greedy, best, chosen)

    def _greedy(self, obs: NDArray[Any], mask: NDArray[np.bool_], *, noisy: bool) -> NDArray[np.int64]:
        network = self.learner.online
        if noisy:
            network.resample_noise(self._noise_generator)
        elif self.config.noisy:
            network.remove_noise()
        q = self.q_values(obs)
        if not is_finite(q):
            raise ValueError("obs: expected finite observations, got action values that are not finite")
        config = self.config
        return greedy_actions(q, mask, default_action=config.default_action, margin=config.default_action_margin)

    def observe(
        self,
        obs: NDArray[Any],
        action: NDArray[np.int64],
        reward: NDArray[np.floating[Any]],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        next_obs: NDArray[Any],
        mask: NDArray[np.bool_] | None = None,
        next_mask: NDArray[np.bool_] | None = None,
        valid: NDArray[np.bool_] | None = None,
    ) -> None:
        """Stores one step of every environment in the replay buffer."""
        self.replay.add(obs, action, reward, terminated, truncated, next_obs, mask, next_mask, valid=valid)
        if self.config.normalize_obs and self.env_steps < self.config.normalize_obs_steps:
            self._statistics.update(obs if valid is None else obs[valid])
        self.exploration.end_episodes(terminated | truncated)
        self.env_steps += self.num_envs if valid is None else int(valid.sum())

    def end_episodes(self) -> None:
        """Cuts off the episodes under way: what comes next begins new ones."""
        self.replay.end_episodes()
        self.exploration.end_episodes(np.ones(self.num_envs, dtype=np.bool_))

    def learn(self) -> dict[str, float] | None:
        """Updates until `replay_ratio` per environment step is reached; metrics of the last one.

        The count of updates follows from the count of steps, so nothing drifts and a resumed run does the same.
        """
        beyond = self.env_steps - self.config.learning_starts
        if beyond < 0 or len(self.replay) == 0:
            return None
        due = int(beyond * self.config.replay_ratio) + 1 - self._scheduled_updates
        if due <= 0:
            return None
        if self.config.normalize_obs:
            self._use_statistics()
        for _ in range(due - 1):
            self._update()
        self._scheduled_updates += due
        return self._update().metrics()

    def learn_from_log(self, num_updates: int) -> Iterator[dict[str, float]]:
        """Updates on stored experience alone, without an environment; yields the metrics of each.

        Load experience into `replay` first; `conservative_weight` keeps values of actions outside the log down. These
        updates do not count against `replay_ratio`.

        Raises:
            ValueError: The replay buffer is empty.
        """
        if self.config.normalize_obs and self.learner_steps == 0:
            if not self._statistics.count:
                batch = self.replay.sample(max(len(self.replay), 1), self._sample_rng, n_step=1, gamma=0.0)
                self._statistics.update(batch.obs)
            self._use_statistics()
        for _ in range(num_updates):
            yield self._update().metrics()

    def _use_statistics(self) -> None:
        seen = self._statistics if self.merge_statistics is None else self.merge_statistics(self._statistics)
        deviation = seen.std
        deviation[list(self.config.ignored_obs)] = UNSEEN_DEVIATION
        for network in (self.learner.online, self.learner.target):
            network.set_obs_statistics(seen.mean, deviation)

    def _update(self) -> UpdateResult:
        batch = self._sample()
        result = self.learner.update(batch)
        if self.config.sampling != "uniform" and not result.skipped:
            self.replay.update_priorities(batch.index, batch.generation, result.priorities())
        return result

    def _sample(self) -> Batch:
        learner, config = self.learner, self.config
        return self.replay.sample(
            config.batch_size,
            self._sample_rng,
            n_step=learner.n_step,
            gamma=learner.gamma,
            beta=learner.importance_exponent if config.sampling == "prioritized" else 0.0,
            reward_transform=self._transform_reward if self._transforms_reward else None,
        )

    @property
    def _transforms_reward(self) -> bool:
        config = self.config
        return config.reward_clip is not None or config.reward_scale != 1.0 or config.reward_shift != 0.0

    def _transform_reward(self, reward: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rewards as the learner sees them: scaled, shifted, clipped; the buffer keeps the facts."""
        reward = reward * self.config.reward_scale + self.config.reward_shift
        limit = self.config.reward_clip
        return reward if limit is None else np.clip(reward, -limit, limit)

    def export_network(self, path: Path) -> None:
        """Writes the network that acts as one self-describing file, see `network_file.load_network`."""
        self.learner.online.remove_noise()
        save_network(self.learner.online, path)

    def save(self, directory: Path) -> None:
        """Writes networks, optimizer, replay, counters and every generator to a folder."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = self.learner.tensors()
        for name, value in self._statistics.state_dict().items():
            tensors[f"statistics.{name}"] = torch.from_numpy(np.array(value))
        tensors["acting_noise"] = self._noise_generator.get_state()
        save_file(tensors, directory / "learner.safetensors")
        self.replay.save(directory / "replay")
        write_json(
            directory / "agent.json",
            {
                "format_version": FORMAT_VERSION,
                "agent": "dqn",
                "config": json.loads(self.config.model_dump_json()),
                "num_envs": self.num_envs,
                "env_steps": self.env_steps,
                "scheduled_updates": self._scheduled_updates,
                "counters": self.learner.counters(),
                "exploration": self.exploration.state_dict(),
                "sample_rng": self._sample_rng.bit_generator.state,
            },
        )

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote; the agent goes on as the saved one would have, bit for bit.

        Raises:
            ValueError: Files are missing, damaged, of another version, or of an agent of another shape.
        """
        with restoring(directory):
            state = self._load_learner(directory)
            self.replay.restore(directory / "replay")
            self.exploration.load_state_dict(state["exploration"])
            self._sample_rng.bit_generator.state = state["sample_rng"]

    def load_shares(self, directories: Sequence[Path], *, rank: int, num_processes: int) -> None:
        """Goes on from agents that learned together, in another number of processes than they did.

        Networks, optimizer and counters are theirs exactly. Their experience is divided among the processes, unbroken
        runs whole, and has the highest priority again; generators start anew.

        Raises:
            ValueError: Files are missing, damaged, of another version, or of an agent of another shape.
        """
        merged = RunningStatistics(self.obs_shape)
        for directory in reversed(directories):  # so that what is loaded last, and kept, is the first one's
            with restoring(directory):
                self._load_learner(directory)
            merged.merge(self._statistics)
        # Merging over the processes counts everything once: all of it is with the first, nothing with the others.
        self._statistics = merged if rank == 0 else RunningStatistics(self.obs_shape)
        for directory in directories:
            self.replay.merge(directory / "replay", rank=rank, num_processes=num_processes)
        self._seed_generators(rank, self.env_steps)

    def _load_learner(self, directory: Path) -> dict[str, Any]:
        """Restores networks, optimizer, statistics and counters; returns the state that they were read from."""
        state = read_json(directory / "agent.json", version=FORMAT_VERSION, agent="dqn")
        tensors = read_tensors(directory / "learner.safetensors")
        prefix = "statistics."
        statistics = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        if "acting_noise" in tensors:  # absent from files of the first version
            self._noise_generator.set_state(tensors.pop("acting_noise"))
        self.learner.load(tensors, state["counters"])
        self._statistics.load_state_dict({name: value.numpy() for name, value in statistics.items()})
        self.env_steps = state["env_steps"]
        self._scheduled_updates = state["scheduled_updates"]
        return state


def resolve_device(name: str) -> torch.device:
    """A device by name; "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
