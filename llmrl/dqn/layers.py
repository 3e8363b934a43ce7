"""Layers of the Q-network whose randomness comes from a generator that is passed in."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Transform = Callable[[Tensor], Tensor]


@torch.no_grad()
def initialise(layer: nn.Linear | nn.Conv2d, generator: torch.Generator) -> None:
    """Draws weights and bias from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's own default, from `generator`."""
    bound = 1.0 / math.sqrt(layer.weight[0].numel())
    layer.weight.uniform_(-bound, bound, generator=generator)
    if layer.bias is not None:
        layer.bias.uniform_(-bound, bound, generator=generator)


def linear(num_inputs: int, num_outputs: int, generator: torch.Generator) -> nn.Linear:
    """A fully connected layer initialised from `generator`; on its way it draws nothing from the global one."""
    layer = nn.Linear(num_inputs, num_outputs, device="meta").to_empty(device="cpu")
    initialise(layer, generator)
    return layer


def convolution(
    num_inputs: int, num_outputs: int, kernel_size: int, stride: int, generator: torch.Generator
) -> nn.Conv2d:
    """A convolution without padding, initialised from `generator`."""
    layer = nn.Conv2d(num_inputs, num_outputs, kernel_size, stride=stride, device="meta").to_empty(device="cpu")
    initialise(layer, generator)
    return layer


class NoisyLinear(nn.Module):
    """Fully connected layer with factorised Gaussian noise on weights and bias.

    y = (mu_w + sigma_w * f(e_out) f(e_in)^T) x + mu_b + sigma_b * f(e_out),  f(e) = sign(e) sqrt(|e|)

    The noise is drawn by `resample` and zero until then; `remove_noise` gives the mean network.

    Fortunato et al. 2018, https://arxiv.org/abs/1706.10295
    """

    noise_in: Tensor  # [inputs]
    noise_out: Tensor  # [outputs]

    def __init__(self, num_inputs: int, num_outputs: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(num_inputs)
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(num_outputs).uniform_(-bound, bound, generator=generator))
        self.weight_scale = nn.Parameter(torch.full((num_outputs, num_inputs), scale * bound))
        self.bias_scale = nn.Parameter(torch.full((num_outputs,), scale * bound))
        self.register_buffer("noise_in", torch.zeros(num_inputs), persistent=False)
        self.register_buffer("noise_out", torch.zeros(num_outputs), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs] -> [B, outputs] under the current noise."""
        weight = self.weight + self.weight_scale * torch.outer(self.noise_out, self.noise_in)
        return F.linear(x, weight, self.bias + self.bias_scale * self.noise_out)

    @torch.no_grad()
    def resample(self, generator: torch.Generator) -> None:
        """Draws new noise; the generator lives on the CPU, so that every device sees the same numbers."""
        for noise in (self.noise_in, self.noise_out):
            drawn = torch.randn(noise.shape, generator=generator)
            noise.copy_(drawn.sign() * drawn.abs().sqrt())

    @torch.no_grad()
    def remove_noise(self) -> None:
        """Sets the noise to zero."""
        self.noise_in.zero_()
        self.noise_out.zero_()


def apply_linear(layer: nn.Module) -> Transform:
    """The layer as a bare function of its parameters.

    Calling a module costs several times a multiplication of this size; the parameters stay the module's own.
    """
    if not isinstance(layer, nn.Linear):
        return layer.forward
    weight, bias = layer.weight, layer.bias
    return lambda x: F.linear(x, weight, bias)


def apply_norm(norm: nn.Module) -> Transform:
    """LayerNorm as a bare function of its parameters, see `apply_linear`."""
    assert isinstance(norm, nn.LayerNorm)
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: F.layer_norm(x, shape, weight, bias, eps)
