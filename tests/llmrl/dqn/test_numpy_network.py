import numpy as np
import pytest
import torch

from llmrl.dqn.config import NetworkConfig
from llmrl.dqn.network_shapes import tensor_shapes
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


@pytest.mark.parametrize(
    "shape", [{}, {"layer_norm": True, "head": "quantile"}, {"noisy": True, "dueling": True}], ids=str
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_images_go_through_the_same_convolutions(shape, dtype):
    config = NetworkConfig(obs_shape=(2, 36, 44), num_actions=3, torso="cnn", hidden_sizes=(16,), **shape)
    network = QNetwork(config, torch.Generator().manual_seed(0))
    twin = NumpyNetwork(config, {name: value.numpy() for name, value in network.state_dict().items()})
    obs = np.random.default_rng(0).integers(0, 255, size=(3, 2, 36, 44)).astype(dtype)
    with torch.no_grad():
        expected = network.values(network(torch.from_numpy(obs))).numpy()
    np.testing.assert_allclose(twin.values(obs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [*SHAPES, {"noisy": True, "normalize_obs": True}], ids=str)
@pytest.mark.parametrize("obs_shape", [(5,), (2, 36, 44)], ids=str)
def test_shapes_are_known_before_a_network_is_built(shape, obs_shape):
    torso = "mlp" if len(obs_shape) == 1 else "cnn"
    config = NetworkConfig(obs_shape=obs_shape, num_actions=6, torso=torso, **shape)
    state = QNetwork(config, torch.Generator()).state_dict()
    assert tensor_shapes(config) == {name: tuple(value.shape) for name, value in state.items()}


def test_what_it_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"expected a tensor 'torso\.layers\.0\.weight'"):
        NumpyNetwork(NetworkConfig(obs_shape=(4,), num_actions=2), {})
