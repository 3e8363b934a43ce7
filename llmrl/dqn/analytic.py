"""The gradient of the Q-network written out for the CPU: what autograd gives, in half the time.

On layers of 128 a multiplication takes a few microseconds, and recording it for autograd takes as many. Where the
network is fully connected and the loss is that of one expected value per action, the chain rule has a handful of terms:
multiplications with a batch are torch's, what is left per transition is NumPy's. Tests compare them with autograd,
through which every other configuration goes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmrl.dqn.config import DQNConfig
from llmrl.dqn.networks import QNetwork
from llmrl.dqn.replay import Batch

Floats = NDArray[np.float32]


class Hidden(NamedTuple):
    """What a hidden layer leaves for its backward pass."""

    inputs: Tensor  # [B, inputs]
    normed: tuple[Tensor, Tensor, Tensor] | None  # LayerNorm's input [B, outputs], mean [B, 1], 1 / std [B, 1]
    active: Tensor  # [B, outputs] after the ReLU


class AnalyticGradient:
    """Gradient of the mean weighted loss with respect to the online network.

    With psi the derivative of the elementwise loss and B the size of the batch,

    d loss / d q_tm1[a_tm1] = -weight * psi(td) / B

    Args:
        config: Settings for which `is_analytic` holds.
        online: The network that learns; its parameters keep their place, and `parameter.grad` is written in place.
        target: The target network.
    """

    def __init__(self, config: DQNConfig, online: QNetwork, target: QNetwork) -> None:
        self._config = config
        self._online, self._target = online, target
        self._layers = [_Layer(layer, norm) for layer, norm in online.torso.hidden_layers()]
        self._head = _Layer(online.head.layer, None)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> tuple[float, Floats, Floats]:
        """Fills the gradient; returns mean weighted loss, priority [B] and value of the action taken [B]."""
        size, delta = len(batch.action), self._config.huber_delta
        rows = np.arange(size)
        hidden = self._forward(torch.from_numpy(batch.obs))
        outputs = self._online.head.forward(hidden[-1].active)
        value = outputs.numpy()[rows, batch.action]
        td = batch.reward + batch.discount * self._next_value(batch, rows) - value
        slope = td.clip(-delta, delta) if self._config.loss == "huber" else td
        weighted = slope * batch.weight
        # Where psi is x up to delta and delta beyond, the loss is psi(x) (x - psi(x) / 2), squared or Huber alike.
        loss = float(weighted.dot(td - 0.5 * slope)) / size
        grad = np.zeros(outputs.shape, dtype=np.float32)
        grad[rows, batch.action] = weighted * (-1.0 / size)
        self._backward(hidden, torch.from_numpy(grad))
        return loss, np.abs(td), value

    def _next_value(self, batch: Batch, rows: NDArray[np.int64]) -> Floats:  # [B]
        """What the target network expects after the window, of its own best action or of the online network's."""
        next_obs = torch.from_numpy(batch.next_obs)
        q = self._target.forward(next_obs).numpy()
        selector = self._online.forward(next_obs).numpy() if self._config.double else q
        if np.count_nonzero(batch.next_mask) < batch.next_mask.size:
            selector = np.where(batch.next_mask, selector, -np.inf)
        return np.asarray(q[rows, selector.argmax(axis=1)])

    def _forward(self, obs: Tensor) -> list[Hidden]:
        x = self._online.normalise(obs)
        if x.dim() > 2:
            x = x.flatten(1)
        hidden = [Hidden(x, None, x)]
        for layer in self._layers:
            hidden.append(layer.forward(hidden[-1].active))
        return hidden

    def _backward(self, hidden: list[Hidden], grad: Tensor) -> None:  # [B, A]
        if self._config.dueling:
            # Q = V + A - mean A: the value sees the sum of all gradients, each advantage its own less the mean.
            total = grad.sum(dim=1, keepdim=True)
            grad = torch.cat([total, grad - total / grad.shape[1]], dim=1)
        self._head.fill(hidden[-1].active, grad)
        weight = self._head.weight
        for layer, kept in zip(reversed(self._layers), reversed(hidden), strict=False):
            grad = layer.through_activation(kept, grad @ weight)
            layer.fill(kept.inputs, grad)
            weight = layer.weight


class _Layer:
    """A linear layer, the norm behind it if there is one, and where their gradients go."""

    def __init__(self, layer: nn.Module, norm: nn.Module | None) -> None:
        assert isinstance(layer, nn.Linear)
        assert norm is None or isinstance(norm, nn.LayerNorm)
        self.weight, self.bias = layer.weight.detach(), layer.bias.detach()
        self.weight_grad, self.bias_grad = _grad(layer.weight), _grad(layer.bias)
        self.norm = norm
        self._transposed = self.weight.t()

    def forward(self, x: Tensor) -> Hidden:
        """[B, inputs] -> linear, norm, ReLU."""
        out = torch.addmm(self.bias, x, self._transposed)
        if self.norm is None:
            return Hidden(x, None, out.relu_())
        norm = self.norm
        active, mean, inverse_std = torch.native_layer_norm(
            out, norm.normalized_shape, norm.weight, norm.bias, norm.eps
        )
        return Hidden(x, (out, mean, inverse_std), active.relu_())

    def through_activation(self, kept: Hidden, grad: Tensor) -> Tensor:  # [B, outputs] -> [B, outputs]
        """From the gradient behind the activation to the one behind the multiplication; fills the norm's."""
        grad = torch.ops.aten.threshold_backward(grad, kept.active, 0.0)
        if kept.normed is None or self.norm is None:
            return grad
        norm = self.norm
        grad, weight_grad, bias_grad = torch.ops.aten.native_layer_norm_backward(
            grad, kept.normed[0], norm.normalized_shape, *kept.normed[1:], norm.weight, norm.bias, (True, True, True)
        )
        _grad(norm.weight).copy_(weight_grad)
        _grad(norm.bias).copy_(bias_grad)
        return grad

    def fill(self, inputs: Tensor, grad: Tensor) -> None:  # [B, inputs], [B, outputs]
        """Writes the gradients of weight and bias."""
        torch.mm(grad.t(), inputs, out=self.weight_grad)
        torch.sum(grad, dim=0, out=self.bias_grad)


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def is_analytic(config: DQNConfig) -> bool:
    """Whether `AnalyticGradient` has the gradient of these settings."""
    plain_network = config.torso == "mlp" and config.head == "expected" and config.branches is None
    plain_loss = not config.munchausen and not config.conservative_weight
    return plain_network and plain_loss and not config.noisy
