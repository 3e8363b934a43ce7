"""Which tensors a Q-network of a configuration has, found out without building it, and without torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from llmrl.dqn.config import NetworkConfig
from llmrl.dqn.ensemble_config import EnsembleConfig, member_prefix

CONVOLUTIONS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # filters, size, stride

Shape = tuple[int, ...]


def tensor_shapes(config: NetworkConfig) -> dict[str, Shape]:
    """Shape of every tensor of a network's `state_dict()`, by name; all are float32."""
    if isinstance(config, EnsembleConfig):
        own = tensor_shapes(config.member)
        return {member_prefix(index) + name: own[name] for index in range(config.num_members) for name in own}
    shapes: dict[str, Shape] = {}
    if config.normalize_obs:
        shapes |= {"obs_mean": config.obs_shape, "obs_std": config.obs_shape}
    num_inputs = 1
    for size in config.obs_shape:
        num_inputs *= size
    if config.torso == "cnn":
        channels, num_inputs = config.obs_shape[0], _num_features(config.obs_shape)
        for index, (filters, size, _) in enumerate(CONVOLUTIONS):
            name = f"torso.convolutions.{index}"
            shapes |= {f"{name}.weight": (filters, channels, size, size), f"{name}.bias": (filters,)}
            channels = filters
    sizes = (num_inputs, *config.hidden_sizes)
    for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        shapes |= _linear(f"torso.layers.{index}", inputs, outputs, noisy=config.noisy)
        if config.layer_norm:
            shapes |= {f"torso.norms.{index}.weight": (outputs,), f"torso.norms.{index}.bias": (outputs,)}
    width = {"expected": 1, "categorical": config.num_atoms, "quantile": config.num_quantiles}[config.head]
    num_outputs = (sum(config.branches or (config.num_actions,)) + int(config.dueling)) * width
    return shapes | _linear("head.layer", sizes[-1], num_outputs, noisy=config.noisy)


def check_shapes(config: NetworkConfig, found: Mapping[str, Shape]) -> None:
    """Compares names and shapes of tensors with those that the configuration asks for.

    Raises:
        ValueError: They differ; names one.
    """
    wanted = tensor_shapes(config)
    if wanted.keys() != found.keys():
        raise ValueError(f"network weights: expected {sorted(wanted)}, got {sorted(found)}")
    for name, shape in wanted.items():
        if tuple(found[name]) != shape:
            raise ValueError(f"network weight {name!r}: expected {list(shape)}, got {list(found[name])}")


def _linear(name: str, num_inputs: int, num_outputs: int, *, noisy: bool) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.weight": (num_outputs, num_inputs), f"{name}.bias": (num_outputs,)}
    if noisy:
        shapes |= {f"{name}.weight_scale": (num_outputs, num_inputs), f"{name}.bias_scale": (num_outputs,)}
    return shapes


def _num_features(obs_shape: Shape) -> int:
    """Entries that the convolutions leave of an image [C, H, W]; never negative."""
    height, width = obs_shape[1:]
    for _, size, stride in CONVOLUTIONS:
        height, width = (max((length - size) // stride + 1, 0) for length in (height, width))
    return CONVOLUTIONS[-1][0] * height * width
