"""The Q-network in NumPy: the same numbers as `QNetwork` without torch, and faster for a few observations.

    network = NumpyNetwork(config, {name: array, ...})   # as `QNetwork.state_dict()` names them
    q = network.values(obs)                              # [E, O] -> [E, A]

Arrays are used where they are, so that a network over views of learning parameters is always up to date.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmrl.dqn.config import NetworkConfig
from llmrl.dqn.ensemble_config import EnsembleConfig, member_tensors
from llmrl.dqn.network_shapes import CONVOLUTIONS

OBS_CLIP = 10.0  # standardised observations are clipped here, so that one far outside cannot throw the network
NORM_EPSILON = 1e-5

Floats = NDArray[np.float32]


class NumpyNetwork:
    """The forward pass of a Q-network; noisy layers act by their means.

    Args:
        config: Shape of the network.
        tensors: Weights by the names of `QNetwork.state_dict()`; more than is needed may be there.

    Raises:
        ValueError: A tensor is missing.
    """

    def __init__(self, config: NetworkConfig, tensors: Mapping[str, Floats]) -> None:
        try:
            self._convolutions = [
                (tensors[f"torso.convolutions.{i}.weight"], tensors[f"torso.convolutions.{i}.bias"], stride)
                for i, (_, _, stride) in enumerate(CONVOLUTIONS if config.torso == "cnn" else ())
            ]
            self._layers = [
                (tensors[f"torso.layers.{i}.weight"], tensors[f"torso.layers.{i}.bias"])
                for i in range(len(config.hidden_sizes))
            ]
            self._norms = [
                (tensors[f"torso.norms.{i}.weight"], tensors[f"torso.norms.{i}.bias"])
                for i in range(len(config.hidden_sizes) if config.layer_norm else 0)
            ]
            self._zeros = [np.zeros_like(bias) for _, bias in self._layers]  # faster than the number
            self._head = tensors["head.layer.weight"], tensors["head.layer.bias"]
            self._obs = (tensors["obs_mean"], tensors["obs_std"]) if config.normalize_obs else None
        except KeyError as error:
            raise ValueError(f"network in NumPy: expected a tensor {error}, got {sorted(tensors)}") from error
        self._config = config
        self._width = {"expected": 1, "categorical": config.num_atoms, "quantile": config.num_quantiles}[config.head]
        self._branch_index = branch_index(config) if config.branches else None

    def values(self, obs: Floats | NDArray[np.uint8]) -> Floats:
        """Action values [E, A] for observations [E, *obs_shape]; images may be uint8."""
        num = len(obs)
        x: Floats = np.asarray(obs, dtype=np.float32)
        if obs.dtype == np.uint8:
            x = x / np.float32(255.0)
        if self._obs is not None:
            x = ((x - self._obs[0]) / self._obs[1]).clip(-OBS_CLIP, OBS_CLIP)
        for weight, bias, stride in self._convolutions:
            x = _convolve(weight, bias, x, stride)
            np.maximum(x, 0.0, out=x)
        # One observation goes through as a vector: a product of matrix and vector has less of a start.
        x = x.reshape(-1) if num == 1 else x.reshape(num, -1)
        for index, (weight, bias) in enumerate(self._layers):
            x = _linear(weight, bias, x)
            if self._norms:
                x = _layer_norm(x, *self._norms[index])
            np.maximum(x, self._zeros[index], out=x)
        out = _linear(*self._head, x).reshape(num, -1)
        return self._read(out if self._width == 1 else out.reshape(num, -1, self._width))

    def _read(self, out: Floats) -> Floats:  # [E, A or 1 + A] or [E, A or 1 + A, K] -> [E, A]
        value = None
        if self._config.dueling:
            value, out = out[:, :1], out[:, 1:]
        if self._branch_index is not None:
            out = out[:, self._branch_index].mean(axis=2)
        if value is not None:
            out = value + (out - out.mean(axis=1, keepdims=True))
        if self._config.head == "categorical":
            return self._categorical(out)
        return self._quantile(out) if self._config.head == "quantile" else out

    def _categorical(self, logits: Floats) -> Floats:  # [E, A, K] -> [E, A]
        config = self._config
        powers = np.exp(logits - logits.max(axis=2, keepdims=True))
        mass = powers / powers.sum(axis=2, keepdims=True)
        if config.cvar_level < 1.0:
            below = mass.cumsum(axis=2) - mass
            mass = np.minimum(mass, np.maximum(config.cvar_level - below, 0.0))
        atoms = np.linspace(config.value_min, config.value_max, config.num_atoms, dtype=np.float32)
        return np.asarray((mass * atoms).sum(axis=2) / min(config.cvar_level, 1.0), dtype=np.float32)

    def _quantile(self, quantiles: Floats) -> Floats:  # [E, A, K] -> [E, A]
        level, num = self._config.cvar_level, self._width
        if level >= 1.0:
            return np.asarray(quantiles.mean(axis=2))
        mass = np.clip(level - np.arange(num) / num, 0.0, 1.0 / num)
        return np.asarray((np.sort(quantiles, axis=2) * mass).sum(axis=2) / level, dtype=np.float32)


class NumpyEnsemble:
    """The forward pass of an `EnsembleNetwork`.

    Args:
        config: Shape of the ensemble.
        tensors: Weights by the names of its `state_dict()`.

    Raises:
        ValueError: A tensor is missing.
    """

    def __init__(self, config: EnsembleConfig, tensors: Mapping[str, Floats]) -> None:
        self._lower_bound = np.float32(config.lower_bound)
        self._members = [
            NumpyNetwork(config.member, member_tensors(tensors, index)) for index in range(config.num_members)
        ]

    def values(self, obs: Floats | NDArray[np.uint8]) -> Floats:
        """Action values [E, A] for observations [E, *obs_shape]."""
        found = np.stack([member.values(obs) for member in self._members])
        mean = found.mean(axis=0)
        return np.asarray(mean - self._lower_bound * found.std(axis=0, ddof=1) if self._lower_bound else mean)


class ActionValues(Protocol):
    """What both forms give."""

    def values(self, obs: Floats | NDArray[np.uint8]) -> Floats:
        """Action values [E, A] for observations [E, *obs_shape]."""


def numpy_network(config: NetworkConfig, tensors: Mapping[str, Floats]) -> ActionValues:
    """A network or an ensemble, as its configuration says."""
    return NumpyEnsemble(config, tensors) if isinstance(config, EnsembleConfig) else NumpyNetwork(config, tensors)


def _linear(weight: Floats, bias: Floats, x: Floats) -> Floats:
    """A new array, `weight @ x + bias` for one observation or each of several."""
    out = weight.dot(x) if x.ndim == 1 else x @ weight.T
    out += bias
    return out


def _convolve(weight: Floats, bias: Floats, x: Floats, stride: int) -> Floats:
    """Filters [F, C, S, S] over images [E, C, H, W] without padding -> [E, F, H', W']."""
    size = weight.shape[-1]
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))[:, :, ::stride, ::stride]
    out = np.tensordot(windows, weight, axes=((1, 4, 5), (1, 2, 3)))  # [E, H', W', F]
    return np.ascontiguousarray(np.moveaxis(out + bias, 3, 1), dtype=np.float32)


def _layer_norm(x: Floats, weight: Floats, bias: Floats) -> Floats:
    x = x - x.mean(axis=-1, keepdims=True)
    inverse_std = 1.0 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + NORM_EPSILON)
    return np.asarray(x * (inverse_std * weight) + bias)


def branch_index(config: NetworkConfig) -> NDArray[np.int64]:  # [A, D]
    """Outputs that make up each action; actions count in row-major order, as `numpy.unravel_index` does."""
    branches = config.branches or (config.num_actions,)
    offsets = np.concatenate([[0], np.cumsum(branches)[:-1]])
    factors = np.stack(np.unravel_index(np.arange(config.num_actions), branches), axis=1)
    return np.asarray(factors + offsets)
