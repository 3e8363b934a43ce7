"""One DQN agent in every process, all with the same network: what each takes, and what they do together.

A configuration describes the whole training, whatever number of processes runs it: decisions, batch size, replay
capacity and every schedule count all processes together. A process draws its part of each batch from its own replay,
and gradients are added with the parts as weights, so that each update is one on the whole batch.
"""

from __future__ import annotations

import hashlib

import torch
from llmrl_envs.errors import UserError
from torch import Tensor

from llmrl.dqn.agent import DQNAgent
from llmrl.dqn.config import DQNConfig
from llmrl.dqn.networks import RunningStatistics
from llmrl.training.processes import Processes


def batch_share(batch_size: int, rank: int, num_processes: int) -> int:
    """Transitions of a batch that a process draws; the first ones take what does not divide.

    Raises:
        UserError: There would be none for some.
    """
    if batch_size < num_processes:
        raise UserError(
            "the batch is smaller than the number of processes",
            expected=f"at least {num_processes} transitions",
            got=batch_size,
            where="agent.batch_size",
        )
    return batch_size // num_processes + int(rank < batch_size % num_processes)


def process_settings(settings: DQNConfig, rank: int, num_processes: int) -> DQNConfig:
    """The settings of one process's agent: its part of the batch and of the replay."""
    batch_size = batch_share(settings.batch_size, rank, num_processes)
    capacity = -(-settings.replay_capacity // num_processes)
    return settings.model_copy(update={"batch_size": batch_size, "replay_capacity": capacity})


def connect(agent: DQNAgent, batch_size: int, processes: Processes) -> None:
    """Makes an agent learn together with those of the other processes.

    Args:
        agent: This process's, with the settings that `process_settings` gives.
        batch_size: Of all processes together.
        processes: All of them.
    """
    weight = batch_share(batch_size, processes.rank, processes.num_processes) / batch_size

    def average_gradient(gradient: Tensor) -> None:
        gradient.mul_(weight)
        processes.add(gradient)

    def merge_statistics(own: RunningStatistics) -> RunningStatistics:
        merged = RunningStatistics(agent.obs_shape)
        for state in processes.gather(own.state_dict()):
            other = RunningStatistics(agent.obs_shape)
            other.load_state_dict(state)
            merged.merge(other)
        return merged

    agent.learner.average_gradient = average_gradient
    agent.merge_statistics = merge_statistics


def learner_digest(agent: DQNAgent) -> str:
    """SHA-256 of everything that must be equal in all processes: networks, optimizer, generator."""
    return digest_of(agent.learner.tensors())


def digest_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_equal(digests: list[str]) -> None:
    """Makes sure that all processes hold the same network.

    Raises:
        RuntimeError: They do not: machines that calculate differently, or a mistake of the program.
    """
    if len(set(digests)) > 1:
        told = ", ".join(f"process {rank}: {digest[:12]}" for rank, digest in enumerate(digests))
        raise RuntimeError(f"the processes' networks differ: expected equal digests, got {told}")
