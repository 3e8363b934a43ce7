"""REINFORCE with a learned value baseline: the simplest policy gradient, on the agents' interface.

    policy loss = -mean (G_t - v(s_t)) log pi(a_t | s_t) - entropy_weight * mean H(pi(. | s_t))
    value loss  = mean (G_t - v(s_t))**2 / 2,   G_t = r_t + gamma G_{t+1}, bootstrapped with v where it was truncated

Williams 1992, https://doi.org/10.1007/BF00992696. On-policy: whole episodes are gathered, used for one update once they
hold `batch_size` steps, and dropped. Reads torso, hidden_sizes, layer_norm, gamma, learning_rate, batch_size,
max_grad_norm and seed of the configuration (`config.FLAGS_READ`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from llmrl.dqn.acting import check_mask, greedy_actions
from llmrl.dqn.agent_files import read_json, read_tensors, restoring, write_json
from llmrl.dqn.config import DQNConfig, NetworkConfig
from llmrl.dqn.flat import FlatParameters
from llmrl.dqn.losses import masked
from llmrl.dqn.network_file import save_network
from llmrl.dqn.networks import QNetwork

FORMAT_VERSION = 1
COLUMNS = ("obs", "action", "reward", "mask", "target")  # of finished steps; target is the return G


def discounted_returns(
    reward: NDArray[np.float64],  # [T]
    gamma: float,
    bootstrap: float,
) -> NDArray[np.float64]:  # [T]
    """`G_t = r_t + gamma * G_{t+1}` with `G_T = bootstrap`: 0 after termination, the value of the last state else."""
    returns = np.zeros(len(reward))
    following = bootstrap
    for step in reversed(range(len(reward))):
        following = reward[step] + gamma * following
        returns[step] = following
    return returns


class ReinforceAgent:
    """REINFORCE with a value baseline; arguments as for `DQNAgent`.

    Args:
        config: See the module.
        num_envs: Environments E that act together.
        obs_shape: Shape of one observation.
        num_actions: Actions A.
        entropy_weight: Keeps the policy from settling too early.
    """

    epsilon = 0.0

    def __init__(
        self,
        config: DQNConfig,
        *,
        num_envs: int,
        obs_shape: tuple[int, ...],
        num_actions: int,
        entropy_weight: float = 0.01,
    ) -> None:
        self.config, self.num_envs, self.num_actions = config, num_envs, num_actions
        self.obs_shape, self.entropy_weight = tuple(obs_shape), entropy_weight
        generator = torch.Generator().manual_seed(config.seed)
        shape = NetworkConfig(
            obs_shape=self.obs_shape,
            num_actions=num_actions,
            torso=config.torso,
            hidden_sizes=config.hidden_sizes,
            layer_norm=config.layer_norm,
        )
        self.policy = QNetwork(shape, generator)
        self.value = QNetwork(shape.model_copy(update={"num_actions": 1}), generator)
        self.parameters = FlatParameters(torch.nn.ModuleList([self.policy, self.value]))
        self.optimizer = torch.optim.Adam([self.parameters.values], lr=config.learning_rate, fused=True)
        self._rng = np.random.default_rng(config.seed)
        self._open: list[list[tuple[Any, ...]]] = [[] for _ in range(num_envs)]
        self._finished: list[dict[str, NDArray[Any]]] = []
        self.env_steps = 0
        self.learner_steps = 0

    def q_values(self, obs: NDArray[Any]) -> NDArray[np.float32]:
        """Logits [E, A]: preferences rather than values, highest for the likeliest action."""
        if obs.shape[1:] != self.obs_shape:
            raise ValueError(f"obs: expected shape [E, *{self.obs_shape}], got {obs.shape}")
        with torch.inference_mode():
            return self.policy(torch.from_numpy(np.ascontiguousarray(obs))).numpy()  # type: ignore[no-any-return]

    def act(self, obs: NDArray[Any], mask: NDArray[np.bool_], *, explore: bool) -> NDArray[np.int64]:
        """Actions [E]: drawn from the policy where `explore`, else the likeliest."""
        check_mask(mask)
        logits = self.q_values(obs)
        if explore:
            # The largest of logits with Gumbel noise is a draw from their softmax.
            logits = logits + self._rng.gumbel(size=logits.shape).astype(np.float32)
        return greedy_actions(logits, mask)

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
        """Adds one step to the episode of every environment; `next_mask` is not needed."""
        if mask is None:
            mask = np.ones((self.num_envs, self.num_actions), dtype=np.bool_)
        lanes = list(range(self.num_envs)) if valid is None else np.flatnonzero(valid).tolist()
        for i in lanes:
            self._open[i].append((obs[i].copy(), int(action[i]), float(reward[i]), mask[i].copy()))
            if terminated[i] or truncated[i]:
                self._finish(i, None if terminated[i] else next_obs[i])
        self.env_steps += len(lanes)

    def _finish(self, lane: int, last_obs: NDArray[Any] | None) -> None:
        """Turns an episode into returns; `last_obs` is where it was truncated."""
        obs, action, reward, mask = (np.asarray(column) for column in zip(*self._open[lane], strict=True))
        bootstrap = 0.0
        if last_obs is not None:
            with torch.inference_mode():
                bootstrap = float(self.value(torch.from_numpy(np.ascontiguousarray(last_obs[None]))))
        target = discounted_returns(reward, self.config.gamma, bootstrap)
        self._finished.append(dict(zip(COLUMNS, (obs, action, reward, mask, target), strict=True)))
        self._open[lane] = []

    def end_episodes(self) -> None:
        """Drops the episodes under way: their returns are not known."""
        self._open = [[] for _ in range(self.num_envs)]

    def learn(self) -> dict[str, float] | None:
        """One update on all finished episodes once they hold `batch_size` steps."""
        if sum(len(episode["action"]) for episode in self._finished) < self.config.batch_size:
            return None
        columns = {name: np.concatenate([episode[name] for episode in self._finished]) for name in COLUMNS}
        self._finished = []
        self.parameters.gradient.zero_()
        loss, metrics = self._loss({name: torch.from_numpy(column) for name, column in columns.items()})
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.linalg.vector_norm(self.parameters.gradient))
        metrics |= {"gradient_norm": norm, "skipped": float(not np.isfinite(norm))}
        if np.isfinite(norm):
            limit = self.config.max_grad_norm
            if limit is not None and norm > limit:
                self.parameters.gradient.mul_(limit / norm)
            self.optimizer.step()
        self.learner_steps += 1
        return metrics

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Policy and value loss of T steps; no gradient flows from the policy into the baseline."""
        log_policy = torch.log_softmax(masked(self.policy(batch["obs"]), batch["mask"]), dim=1)
        value = self.value(batch["obs"]).squeeze(1)
        target = batch["target"].to(value.dtype)
        taken = log_policy.gather(1, batch["action"].unsqueeze(1)).squeeze(1)
        finite = log_policy.masked_fill(~batch["mask"], 0.0)
        entropy = -(finite.exp() * batch["mask"] * finite).sum(dim=1).mean()
        policy_loss = -((target - value.detach()) * taken).mean()
        value_loss = 0.5 * (target - value).square().mean()
        metrics = {"loss": float(policy_loss.detach()), "value_loss": float(value_loss.detach())}
        metrics["entropy"] = float(entropy.detach())
        return policy_loss + value_loss - self.entropy_weight * entropy, metrics

    def export_network(self, path: Path) -> None:
        """Writes the policy network; its likeliest action is the greedy one of `network_file.load_network`."""
        save_network(self.policy, path)

    def save(self, directory: Path) -> None:
        """Writes networks, optimizer, finished episodes, counters and the generator.

        Steps of episodes under way are kept too, so that a run whose environments resume goes on exactly.
        """
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"policy.{name}": value for name, value in self.policy.state_dict().items()}
        tensors |= {f"value.{name}": value for name, value in self.value.state_dict().items()}
        for name, value in self.optimizer.state[self.parameters.values].items():
            tensors[f"optimizer.{name}"] = value
        for number, episode in enumerate(self._finished):
            tensors |= {f"finished.{number}.{name}": torch.from_numpy(column) for name, column in episode.items()}
        for lane, steps in enumerate(self._open):
            for name, column in zip(COLUMNS, zip(*steps, strict=True), strict=False):
                tensors[f"open.{lane}.{name}"] = torch.from_numpy(np.asarray(column))
        save_file({name: value.detach().clone() for name, value in tensors.items()}, directory / "agent.safetensors")
        state = {
            "format_version": FORMAT_VERSION,
            "agent": "reinforce",
            "num_finished": len(self._finished),
            "env_steps": self.env_steps,
            "learner_steps": self.learner_steps,
            "rng": self._rng.bit_generator.state,
        }
        write_json(directory / "agent.json", state)

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote, bit for bit.

        Raises:
            ValueError: Files are missing, damaged, or of an agent of another shape.
        """
        with restoring(directory):
            state = read_json(directory / "agent.json", version=FORMAT_VERSION, agent="reinforce")
            tensors = read_tensors(directory / "agent.safetensors")
            self.policy.load_weights(_under(tensors, "policy."))
            self.value.load_weights(_under(tensors, "value."))
            self.optimizer.state.clear()
            if moments := _under(tensors, "optimizer."):
                self.optimizer.state[self.parameters.values] = moments
            self._finished = [
                {name: value.numpy() for name, value in _under(tensors, f"finished.{number}.").items()}
                for number in range(state["num_finished"])
            ]
            self._open = [self._open_steps(_under(tensors, f"open.{lane}.")) for lane in range(self.num_envs)]
            self.env_steps, self.learner_steps = state["env_steps"], state["learner_steps"]
            self._rng.bit_generator.state = state["rng"]

    def _open_steps(self, columns: dict[str, Tensor]) -> list[tuple[Any, ...]]:
        if not columns:
            return []
        obs, action, reward, mask = (columns[name].numpy() for name in COLUMNS[:4])
        return [(obs[t], int(action[t]), float(reward[t]), mask[t]) for t in range(len(action))]


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
