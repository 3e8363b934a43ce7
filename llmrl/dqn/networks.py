"""The Q-network: observation normalisation, torso, head.

    obs -> normalise -> MLP or convolutional torso -> head -> outputs -> values -> masked argmax

Outputs are [B, A] for the expected head and [B, A, K] for value distributions (logits of K atoms, or K quantiles);
`values` turns them into the numbers that actions are chosen by. Masks are applied by whoever chooses.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from llmrl.dqn.config import NetworkConfig
from llmrl.dqn.distributional import categorical_lower_mean, quantile_lower_mean
from llmrl.dqn.layers import NoisyLinear, apply_linear, apply_norm, convolution, linear
from llmrl.dqn.network_shapes import CONVOLUTIONS
from llmrl.dqn.numpy_network import OBS_CLIP, branch_index


class Torso(nn.Module):
    """Hidden layers: `hidden_sizes` fully connected ones, behind the convolutions where the input is an image.

    Convolutions 32 8x8/4, 64 4x4/2, 64 3x3/1: Mnih et al. 2015, https://www.nature.com/articles/nature14236.
    LayerNorm stands before each activation: Gallici et al. 2024, https://arxiv.org/abs/2407.04811.
    """

    def __init__(self, config: NetworkConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList()
        if config.torso == "cnn":
            channels = config.obs_shape[0]
            for num_outputs, kernel_size, stride in CONVOLUTIONS:
                self.convolutions.append(convolution(channels, num_outputs, kernel_size, stride, generator))
                channels = num_outputs
        sizes = (self._num_inputs(config.obs_shape), *config.hidden_sizes)
        self.layers = nn.ModuleList(
            NoisyLinear(inputs, outputs, config.noisy_scale, generator)
            if config.noisy
            else linear(inputs, outputs, generator)
            for inputs, outputs in itertools.pairwise(sizes)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in config.hidden_sizes if config.layer_norm)
        self.num_outputs = sizes[-1]
        self._steps = list(itertools.zip_longest(map(apply_linear, self.layers), map(apply_norm, self.norms)))

    def hidden_layers(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """The fully connected layers, each with its norm where there is one."""
        return itertools.zip_longest(self.layers, self.norms)

    def _num_inputs(self, obs_shape: tuple[int, ...]) -> int:
        if not self.convolutions:
            return int(np.prod(obs_shape))
        height, width = obs_shape[1:]
        for _, kernel_size, stride in CONVOLUTIONS:
            height, width = ((size - kernel_size) // stride + 1 for size in (height, width))
        if height < 1 or width < 1:
            raise ValueError(f"torso 'cnn': expected images of at least 36x36, got {obs_shape[1:]}")
        return CONVOLUTIONS[-1][0] * height * width

    def forward(self, x: Tensor) -> Tensor:
        """[B, *obs_shape] -> [B, hidden]."""
        for filters in self.convolutions:
            x = F.relu(filters(x))
        if x.dim() > 2:
            x = x.flatten(1)
        for layer, norm in self._steps:
            x = layer(x)
            x = F.relu(x if norm is None else norm(x))
        return x


class Head(nn.Module):
    """Last layer: [B, hidden] -> [B, A] or [B, A, K], with dueling and branches where asked.

    Dueling, Q = V + A - mean_a A: Wang et al. 2016, https://arxiv.org/abs/1511.06581 (both streams leave the same
    hidden layer). Branches: with the action a tuple (a_1 .. a_D), Q(a) = mean_d U_d(a_d): Seyde et al. 2023,
    https://arxiv.org/abs/2210.12566, after the branches of Tavakoli et al. 2018, https://arxiv.org/abs/1711.08946.
    The values are those of whole actions, so that masks and every loss work unchanged.
    """

    branch_index: Tensor  # [A, D] int64: which outputs make up an action

    def __init__(self, config: NetworkConfig, num_inputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.dueling = config.dueling
        self.width = {"expected": 1, "categorical": config.num_atoms, "quantile": config.num_quantiles}[config.head]
        self.distribution = config.head != "expected"
        self.num_branches = len(config.branches or (config.num_actions,))
        self.num_entries = sum(config.branches or (config.num_actions,))
        num_outputs = (self.num_entries + int(config.dueling)) * self.width
        self.layer: nn.Linear | NoisyLinear = (
            NoisyLinear(num_inputs, num_outputs, config.noisy_scale, generator)
            if config.noisy
            else linear(num_inputs, num_outputs, generator)
        )
        self._apply_layer = apply_linear(self.layer)
        self.register_buffer("branch_index", torch.from_numpy(branch_index(config)), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, hidden] -> [B, A] or [B, A, K]."""
        out = self._apply_layer(hidden)
        if self.distribution:
            out = out.view(out.shape[0], -1, self.width)
        value = None
        if self.dueling:
            value, out = out[:, :1], out[:, 1:]
        if self.num_branches > 1:
            out = out[:, self.branch_index].mean(dim=2)
        # The mean over all joint actions is the mean of the branch means, so one rule serves both cases.
        return out if value is None else value + (out - out.mean(dim=1, keepdim=True))


class QNetwork(nn.Module):
    """A Q-network with everything that maps a raw observation to action values.

    Args:
        config: Shape of the network.
        generator: Draws the initial weights.
    """

    obs_mean: Tensor  # [*obs_shape]
    obs_std: Tensor  # [*obs_shape]
    atoms: Tensor  # [K]

    def __init__(self, config: NetworkConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.torso = Torso(config, generator)
        self.head = Head(config, self.torso.num_outputs, generator)
        if config.normalize_obs:
            self.register_buffer("obs_mean", torch.zeros(config.obs_shape))
            self.register_buffer("obs_std", torch.ones(config.obs_shape))
        if config.head == "categorical":
            atoms = torch.linspace(config.value_min, config.value_max, config.num_atoms)
            self.register_buffer("atoms", atoms, persistent=False)
        self._noisy = [module for module in self.modules() if isinstance(module, NoisyLinear)]

    def forward(self, obs: Tensor) -> Tensor:
        """Outputs [B, A], or [B, A, K] of a value distribution, for obs [B, *obs_shape]."""
        return self.head.forward(self.torso.forward(self.normalise(obs)))

    def normalise(self, obs: Tensor) -> Tensor:
        """Images to [0, 1]; vectors by the stored statistics where `normalize_obs` is on."""
        if obs.dtype == torch.uint8:
            obs = obs.to(torch.float32).div_(255.0)
        if self.config.normalize_obs:
            obs = ((obs - self.obs_mean) / self.obs_std).clamp(-OBS_CLIP, OBS_CLIP)
        return obs

    def values(self, outputs: Tensor) -> Tensor:
        """Action values [B, A] that actions are chosen by: means, or means of the lower tail at `cvar_level`."""
        if self.config.head == "categorical":
            return categorical_lower_mean(torch.softmax(outputs, dim=-1), self.atoms, self.config.cvar_level)
        if self.config.head == "quantile":
            return quantile_lower_mean(outputs, self.config.cvar_level)
        return outputs

    def resample_noise(self, generator: torch.Generator) -> None:
        """New noise in every noisy layer."""
        for layer in self._noisy:
            layer.resample(generator)

    def remove_noise(self) -> None:
        """The mean network: no noise in any layer."""
        for layer in self._noisy:
            layer.remove_noise()

    @torch.no_grad()
    def set_obs_statistics(self, mean: NDArray[np.float64], std: NDArray[np.float64]) -> None:
        """Stores the statistics that `normalise` uses, both [*obs_shape]."""
        self.obs_mean.copy_(torch.from_numpy(mean))
        self.obs_std.copy_(torch.from_numpy(std))

    @torch.no_grad()
    def prefer(self, action: int, lead: float) -> None:
        """Makes `action` the greedy one everywhere by `lead`: its outputs are a bias alone, the others' are zero."""
        head, width = self.head, self.head.width
        first = int(head.dueling) * width
        head.layer.weight[first:].zero_()
        head.layer.bias[first:].zero_()
        if isinstance(head.layer, NoisyLinear):
            head.layer.weight_scale[first:].zero_()
            head.layer.bias_scale[first:].zero_()
        bias = head.layer.bias[first:].view(head.num_entries, width)
        # Logits that rise with the atoms lift the mean of a categorical head; 2 is well above any margin in use.
        rise = torch.linspace(0.0, 2.0, width) if self.config.head == "categorical" else torch.full((width,), lead)
        for entry in head.branch_index[action]:
            bias[entry] = rise if self.config.head == "categorical" else rise * head.num_branches

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies a state dict into the network in place, so that views of its parameters stay valid.

        Raises:
            ValueError: Names, shapes or dtypes are not those of the network.
        """
        own = self.state_dict()
        if own.keys() != tensors.keys():
            raise ValueError(f"network weights: expected {sorted(own)}, got {sorted(tensors)}")
        for name, value in own.items():
            given = tensors[name]
            if value.shape != given.shape or value.dtype != given.dtype:
                raise ValueError(
                    f"network weight {name!r}: expected {list(value.shape)} {value.dtype},"
                    f" got {list(given.shape)} {given.dtype}"
                )
            value.copy_(given)


class RunningStatistics:
    """Mean and standard deviation of everything seen, in float64, merged batch by batch.

    Chan et al. 1983, https://doi.org/10.1080/00031305.1983.10483115
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count = 0
        self.mean = np.zeros(shape)
        self.sum_squares = np.zeros(shape)

    def update(self, values: NDArray[np.generic]) -> None:
        """Adds values [B, *shape]."""
        batch = np.asarray(values, dtype=np.float64)
        size = len(batch)
        mean = batch.mean(axis=0)
        delta = mean - self.mean
        total = self.count + size
        self.sum_squares += ((batch - mean) ** 2).sum(axis=0) + delta**2 * (self.count * size / total)
        self.mean += delta * (size / total)
        self.count = total

    def merge(self, other: RunningStatistics) -> None:
        """Adds everything that other statistics have seen."""
        if not other.count:
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        between = delta**2 * (self.count * other.count / total)
        self.sum_squares = self.sum_squares + other.sum_squares + between
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    @property
    def std(self) -> NDArray[np.float64]:
        """Population standard deviation; 1 where a feature has not moved, so that constants pass unscaled."""
        deviation = np.sqrt(self.sum_squares / max(self.count, 1))
        return np.where(deviation > 1e-6, deviation, 1.0)

    def state_dict(self) -> dict[str, NDArray[np.generic]]:
        """Arrays that restore the statistics exactly."""
        return {"count": np.asarray(self.count), "mean": self.mean.copy(), "sum_squares": self.sum_squares.copy()}

    def load_state_dict(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Restores what `state_dict` gave."""
        self.count = int(state["count"])
        self.mean = np.array(state["mean"], dtype=np.float64)
        self.sum_squares = np.array(state["sum_squares"], dtype=np.float64)


def decayed_parameters(network: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Every parameter in order, and whether weight decay applies: to weight matrices and filters, not to vectors."""
    for name, parameter in network.named_parameters():
        yield parameter, parameter.dim() > 1 and not name.endswith("_scale")
