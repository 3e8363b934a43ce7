"""One update of the Q-network from one batch of transitions.

    learner = Learner(config, config.network((4,), 2), torch.Generator().manual_seed(0))
    batch = replay.sample(config.batch_size, rng, n_step=learner.n_step, gamma=learner.gamma)
    result = learner.update(batch)
    replay.update_priorities(batch.index, batch.generation, result.priorities())

The learner owns both networks, the optimizer and the generator of noise and resets; it knows no environment. On a
CUDA device the same arithmetic runs as one captured graph, see `captured.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmrl.dqn import losses
from llmrl.dqn.analytic import AnalyticGradient, is_analytic
from llmrl.dqn.captured import CapturedUpdate, Measured, can_capture
from llmrl.dqn.config import DQNConfig, NetworkConfig
from llmrl.dqn.flat import FlatParameters, update_target
from llmrl.dqn.flat_adam import FlatAdam
from llmrl.dqn.networks import QNetwork
from llmrl.dqn.replay import Batch
from llmrl.dqn.rmsprop import CentredRMSprop
from llmrl.dqn.schedules import geometric, linear
from llmrl.dqn.td_loss import TensorBatch, elementwise_loss

# `QNetwork.prefer` lifts the default action by this much: enough to win ties, too little to hide what is learned.
DEFAULT_ACTION_LEAD = 0.01


# What the optimizers remember: numbers, and vectors of the size of all parameters.
AVERAGES = {"adam": {"step", "exp_avg", "exp_avg_sq"}, "rmsprop": {"square_avg", "grad_avg"}}


@dataclass(frozen=True)
class UpdateResult:
    """What one update measured; tensors stay on the device until they are asked for."""

    loss: Tensor | float  # [] mean weighted loss
    priority: Tensor | NDArray[np.float32]  # [B] |TD error|, or the loss of a value distribution
    value: Tensor | float  # [] mean value of the actions taken
    gradient_norm: Tensor | float  # [] before clipping
    skipped: bool  # the gradient was not finite and nothing was changed

    def priorities(self) -> NDArray[np.float32]:
        """New priorities [B]; not-a-number where the loss was not finite."""
        return self.priority.cpu().numpy() if isinstance(self.priority, Tensor) else self.priority

    def metrics(self) -> dict[str, float]:
        """Numbers to log."""
        return {
            "loss": float(self.loss),
            "td_error": float(self.priority.mean()),
            "value": float(self.value),
            "gradient_norm": float(self.gradient_norm),
            "skipped": float(self.skipped),
        }


class Learner:
    """Online and target network, optimizer, and the update that connects them.

    Args:
        config: All settings.
        network_config: Shape of the network, from `config.network`.
        generator: CPU generator of the initial weights, noise and resets; the learner goes on using it.
        device: Where the networks live.

    Attributes:
        average_gradient: Where several processes learn together: averages the vector of all gradients over them, in
            place. Processes that start from the same generator then hold the same network, bit for bit; a gradient
            that is not finite in one of them is skipped in all.
    """

    def __init__(
        self,
        config: DQNConfig,
        network_config: NetworkConfig,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        self.average_gradient: Callable[[Tensor], None] | None = None
        self.config = config
        self.network_config = network_config
        self.generator = generator
        self.device = torch.device(device)
        self.online = self._new_network()
        self.target = QNetwork(network_config, torch.Generator()).to(self.device)
        self.parameters = FlatParameters(self.online)
        self.target_parameters = FlatParameters(self.target)
        self.target_parameters.values.copy_(self.parameters.values)
        self.optimizer = self._new_optimizer()
        analytic = is_analytic(config) and self.device.type == "cpu"
        self._analytic = AnalyticGradient(config, self.online, self.target, self.parameters) if analytic else None
        self._captured: CapturedUpdate | None = None
        self.learner_steps = 0
        self.num_skipped = 0
        self.num_resets = 0

    @property
    def n_step(self) -> int:
        """Length of the returns to sample for the next update."""
        end = self.config.n_step_end
        if end is None:
            return self.config.n_step
        return round(geometric(self.config.n_step, end, self.learner_steps, self.config.horizon_learner_steps))

    @property
    def gamma(self) -> float:
        """Discount to sample with for the next update; annealed geometrically in 1 - gamma."""
        end = self.config.gamma_end
        if end is None or end == self.config.gamma:
            return self.config.gamma
        return 1.0 - geometric(
            1.0 - self.config.gamma, 1.0 - end, self.learner_steps, self.config.horizon_learner_steps
        )

    @property
    def learning_rate(self) -> float:
        """Rate of the next update."""
        config = self.config
        if config.learning_rate_end is None:
            return config.learning_rate
        return linear(
            config.learning_rate, config.learning_rate_end, self.learner_steps, config.learning_rate_decay_steps
        )

    @property
    def importance_exponent(self) -> float:
        """Beta of the importance weights for the next update."""
        config = self.config
        return linear(
            config.importance_exponent,
            config.importance_exponent_end,
            self.learner_steps,
            config.importance_learner_steps,
        )

    def update(self, batch: Batch) -> UpdateResult:
        """One optimizer step on one batch; skips and counts it when the gradient is not finite."""
        if self.config.noisy:
            self.online.resample_noise(self.generator)
            self.target.resample_noise(self.generator)
        self._set_learning_rate()
        priority: Tensor | NDArray[np.float32]
        loss: Tensor | float
        value: Tensor | float
        norm: Tensor | float
        if can_capture(self):
            loss, priority, value, norm = self._replayed(TensorBatch.from_numpy(batch, self.device))
            skipped = not math.isfinite(float(norm))
        else:
            loss, priority, value, norm = self.backward(batch)
            skipped = not self.apply(float(norm))
        self.num_skipped += skipped
        self._finish()
        return UpdateResult(loss, priority, value, norm, skipped)

    def backward(
        self, batch: Batch
    ) -> tuple[Tensor | float, Tensor | NDArray[np.float32], Tensor | float, Tensor | float]:
        """Fills the gradient; returns mean loss, priorities [B], mean value and gradient norm, all detached."""
        if self._analytic is None:
            return self.differentiate(TensorBatch.from_numpy(batch, self.device))
        loss, priority, value = self._analytic(batch)
        self._average_gradient()
        return loss, priority, float(value.mean()), self._analytic.norm()

    def differentiate(self, batch: TensorBatch) -> Measured:
        """`backward` by autograd, on any device and for all settings."""
        self.parameters.gradient.zero_()
        loss, priority, value = elementwise_loss(self.config, self.online, self.target, batch)
        mean_loss = losses.weighted_mean(loss, batch.weight)
        mean_loss.backward()  # type: ignore[no-untyped-call]
        self._average_gradient()
        return mean_loss.detach(), priority, value.mean(), torch.linalg.vector_norm(self.parameters.gradient)

    def _average_gradient(self) -> None:
        """Averages the gradient over the processes that learn together."""
        if self.average_gradient is not None:
            self.average_gradient(self.parameters.gradient)

    def _replayed(self, batch: TensorBatch) -> Measured:
        """The update as a captured graph, recorded when the first batch of a shape comes."""
        if self._captured is None or not self._captured.matches(batch):
            self._captured = CapturedUpdate(self, batch)
        return self._captured(batch)

    def _set_learning_rate(self) -> None:
        group = self.optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(self.learning_rate)
        else:
            group["lr"] = self.learning_rate

    def apply(self, norm: float) -> bool:
        """Clips and steps; False, and nothing changed, when the gradient norm is not finite."""
        if not math.isfinite(norm):
            return False
        limit = self.config.max_grad_norm
        if limit is not None and norm > limit:
            self.parameters.gradient.mul_(limit / norm)
        if self.config.weight_decay:
            rate = self.optimizer.param_groups[0]["lr"] * self.config.weight_decay
            self.parameters.values.mul_(1.0 - self.parameters.decay_mask * rate)
        self.optimizer.step()
        return True

    def _finish(self) -> None:
        """What follows an optimizer step: the counter, the target network, resets."""
        self.learner_steps += 1
        if self.learner_steps % self.config.target_update_period == 0:
            update_target(self.target_parameters.values, self.parameters.values, self.config.target_ema)
        period, until = self.config.reset_period, self.config.reset_until_learner_steps
        if period and self.learner_steps % period == 0 and (until is None or self.learner_steps <= until):
            self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Fresh weights in the head or everywhere, mixed with the share of the old ones that is kept.

        The optimizer's averages go back to zero with them, and the target network follows at once.

        Nikishin et al. 2022, https://arxiv.org/abs/2205.07802
        """
        fresh = FlatParameters(self._new_network()).values
        keep = self.config.reset_keep
        offset = 0
        for name, parameter in self.online.named_parameters():
            piece = slice(offset, offset + parameter.numel())
            offset += parameter.numel()
            if self.config.reset_scope == "head" and not name.startswith("head."):
                continue
            mixed = keep * self.parameters.values[piece] + (1.0 - keep) * fresh[piece]
            self.parameters.values[piece] = mixed
            self.target_parameters.values[piece] = mixed
            for value in self.optimizer.state[self.parameters.values].values():
                if isinstance(value, Tensor) and value.numel() == self.parameters.values.numel():
                    value[piece] = 0.0
        self.num_resets += 1

    def _new_network(self) -> QNetwork:
        network = QNetwork(self.network_config, self.generator)
        if self.config.default_action is not None:
            network.prefer(self.config.default_action, DEFAULT_ACTION_LEAD)
        return network.to(self.device)

    def _new_optimizer(self) -> torch.optim.Optimizer | FlatAdam:
        config, values = self.config, [self.parameters.values]
        if config.optimizer == "adam" and self.device.type != "cuda":
            return FlatAdam(
                self.parameters.values, lr=config.learning_rate, betas=config.adam_betas, eps=config.adam_epsilon
            )
        if config.optimizer == "adam":
            # A recorded graph reads the rate from a tensor, since a number would be part of the recording.
            rate = torch.tensor(config.learning_rate, device=self.device)
            return torch.optim.Adam(
                values, lr=rate, betas=config.adam_betas, eps=config.adam_epsilon, fused=True, capturable=True
            )
        return CentredRMSprop(
            values, lr=config.learning_rate, decay=config.rmsprop_decay, epsilon=config.rmsprop_epsilon
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything of the learner that is a tensor, on the CPU; what `load_tensors` takes."""
        state = {f"online.{name}": value for name, value in self.online.state_dict().items()}
        state |= {f"target.{name}": value for name, value in self.target.state_dict().items()}
        for name, value in self.optimizer.state[self.parameters.values].items():
            state[f"optimizer.{name}"] = torch.as_tensor(value)
        state["generator"] = self.generator.get_state()
        return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}

    def counters(self) -> dict[str, int]:
        """Everything of the learner that is a number."""
        return {
            "learner_steps": self.learner_steps,
            "num_skipped": self.num_skipped,
            "num_resets": self.num_resets,
        }

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Restores what `tensors` and `counters` gave, bit for bit.

        Raises:
            ValueError: A tensor is missing, of another shape, or unknown.
        """
        rest = dict(tensors)
        self.generator.set_state(rest.pop("generator"))
        self.online.load_weights(_take(rest, "online."))
        self.target.load_weights(_take(rest, "target."))
        state = _take(rest, "optimizer.")
        if rest:
            raise ValueError(f"learner state: expected online, target, optimizer and generator, got {sorted(rest)}")
        self.optimizer.state.clear()
        if state:
            self._check_optimizer(state)
            self.optimizer.state[self.parameters.values] = {
                name: value.to(self.device).clone() for name, value in state.items()
            }
        self._captured = None  # it holds the addresses of the old state
        self.learner_steps = counters["learner_steps"]
        self.num_skipped = counters["num_skipped"]
        self.num_resets = counters["num_resets"]

    def _check_optimizer(self, state: dict[str, Tensor]) -> None:
        expected = AVERAGES[self.config.optimizer]
        sizes = {name: list(value.shape) for name, value in state.items()}
        own = list(self.parameters.values.shape)
        if sizes.keys() != expected or any(size != ([] if name == "step" else own) for name, size in sizes.items()):
            raise ValueError(f"state of the optimizer: expected {sorted(expected)} of shape {own}, got {sizes}")


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Removes and returns the entries under a prefix, without it."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}
