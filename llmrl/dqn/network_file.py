"""A Q-network, or several, as one safetensors file that describes itself: weights, and the configuration as JSON."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llmrl.dqn.ensemble import EnsembleNetwork
from llmrl.dqn.ensemble_config import EnsembleConfig, read_network_config
from llmrl.dqn.network_shapes import check_shapes
from llmrl.dqn.networks import QNetwork

CONFIG_KEY = "network_config"


def save_network(network: QNetwork | EnsembleNetwork, path: Path) -> None:
    """Writes weights and configuration to `path`."""
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, path, metadata={CONFIG_KEY: network.config.model_dump_json()})


def load_network(path: Path) -> QNetwork | EnsembleNetwork:
    """Rebuilds the network that `save_network` wrote, on the CPU and ready to act.

    Raises:
        ValueError: The file is missing, damaged, no network, or of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected a safetensors file with a Q-network, got {error}") from error
    if CONFIG_KEY not in metadata:
        raise ValueError(f"{path}: expected {CONFIG_KEY!r} in its metadata, got {sorted(metadata)}")
    try:
        config = read_network_config(metadata[CONFIG_KEY])
    except ValueError as error:  # of JSON, or of a field
        raise ValueError(f"{path}: expected a network configuration, got {error}") from error
    # Before the network takes memory: a file of a few bytes may describe a network of many gigabytes.
    check_shapes(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    network = EnsembleNetwork(config) if isinstance(config, EnsembleConfig) else QNetwork(config, torch.Generator())
    network.load_weights(tensors)
    return network.eval()
