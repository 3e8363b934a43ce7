import numpy as np
import pytest
import torch

from llmrl.dqn.config import NetworkConfig
from llmrl.dqn.networks import QNetwork
from llmrl.dqn.numpy_network import NumpyNetwork

SHAPES = [
    {},
    {"layer_norm": True, "dueling": True},
    {"hidden_sizes": (), "dueling": True},
    {"normalize_obs": True, "hidden_sizes": (16,)},
    {"branches": (2, 3), "dueling": True},
    {"branches": (2, 3)},
    {"head": "categorical", "dueling": True},
    {"head": "categorical", "cvar_level": 0.3, "layer_norm": True},
    {"head": "quantile", "cvar_level": 0.25, "dueling": True},
    {"head": "quantile"},
    {"noisy": True},
]


def both(**shape):
    config = NetworkConfig(obs_shape=(5,), num_actions=6, **shape)
    network = QNetwork(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    if config.normalize_obs:
        network.set_obs_statistics(np.linspace(-1, 1, 5), np.linspace(0.01, 2, 5))
    return network, NumpyNetwork(config, {name: value.numpy() for name, value in network.state_dict().items()})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num", [1, 2, 7])
def test_it_is_the_network(shape, num):
    network, twin = both(**shape)
    obs = np.random.default_rng(num).normal(size=(num, 5)).astype(np.float32)
    with torch.no_grad():
        expected = network.values(network(torch.from_numpy(obs))).numpy()
    got = twin.values(obs)
    assert got.dtype == np.float32
    assert got.shape == (num, 6)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_it_follows_a_network_that_learns():
    network, twin = both()
    obs = np.ones((1, 5), dtype=np.float32)
    before = twin.values(obs)
    with torch.no_grad():
        network.head.layer.bias.add_(1.0)
    np.testing.assert_allclose(twin.values(obs), before + 1.0, rtol=1e-6)


def test_what_it_cannot_be_is_refused():
    with pytest.raises(ValueError, match="expected torso 'mlp', got 'cnn'"):
        NumpyNetwork(NetworkConfig(obs_shape=(4, 84, 84), num_actions=2, torso="cnn"), {})
    with pytest.raises(ValueError, match=r"expected a tensor 'torso\.layers\.0\.weight'"):
        NumpyNetwork(NetworkConfig(obs_shape=(4,), num_actions=2), {})
