"""Shapes, heads, masks, normalisation and initialisation of the Q-network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmrl.dqn.config import NetworkConfig
from llmrl.dqn.flat import FlatParameters
from llmrl.dqn.network_file import load_network, save_network
from llmrl.dqn.networks import QNetwork, RunningStatistics

VARIANTS = [
    {},
    {"layer_norm": True},
    {"dueling": True},
    {"noisy": True, "dueling": True},
    {"head": "categorical", "num_atoms": 7},
    {"head": "quantile", "num_quantiles": 5, "dueling": True, "cvar_level": 0.3},
    {"branches": (3, 2)},
    {"branches": (3, 2), "dueling": True, "normalize_obs": True},
    {"hidden_sizes": ()},
]


def network(seed: int = 0, **changes: object) -> QNetwork:
    values = {"obs_shape": (4,), "num_actions": 6, "hidden_sizes": (16, 16), **changes}
    return QNetwork(NetworkConfig(**values), torch.Generator().manual_seed(seed))


def obs(num: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", VARIANTS)
def test_values_have_one_entry_for_each_action(changes: dict[str, object]) -> None:
    net = network(**changes)
    values = net.values(net(obs()))
    assert values.shape == (3, 6)
    assert values.isfinite().all()


@pytest.mark.parametrize("changes", VARIANTS)
def test_weights_come_from_the_generator_alone(changes: dict[str, object]) -> None:
    before = torch.random.get_rng_state()
    first, again, other = network(**changes), network(**changes), network(seed=1, **changes)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_dueling_advantages_average_to_zero() -> None:
    net = network(dueling=True)
    hidden = net.torso(obs())
    value = net.head.layer(hidden)[:, 0]
    torch.testing.assert_close(net(obs()).mean(dim=1), value)


def test_branches_add_up_as_a_loop_says() -> None:
    net = network(branches=(3, 2))
    out = net.head.layer(net.torso(obs()))
    for action in range(6):
        first, second = divmod(action, 2)
        torch.testing.assert_close(net(obs())[:, action], (out[:, first] + out[:, 3 + second]) / 2)


def test_noise_moves_the_values_and_goes_away() -> None:
    net = network(noisy=True)
    mean = net(obs())
    net.resample_noise(torch.Generator().manual_seed(0))
    noisy = net(obs())
    net.resample_noise(torch.Generator().manual_seed(0))
    assert torch.equal(net(obs()), noisy)
    assert not torch.equal(noisy, mean)
    net.remove_noise()
    assert torch.equal(net(obs()), mean)


def test_factorised_noise_by_hand() -> None:
    net = network(noisy=True, hidden_sizes=())
    layer = net.head.layer
    layer.noise_in.copy_(torch.tensor([1.0, -2.0, 0.0, 0.5]))
    layer.noise_out.fill_(3.0)
    row = obs(1)[0]
    expected = sum(
        (layer.weight[2, i] + layer.weight_scale[2, i] * 3.0 * layer.noise_in[i]) * row[i] for i in range(4)
    ) + (layer.bias[2] + layer.bias_scale[2] * 3.0)
    torch.testing.assert_close(net(obs(1))[0, 2], expected)


def test_the_published_convolutions() -> None:
    net = network(torso="cnn", obs_shape=(4, 84, 84), hidden_sizes=(512,))
    shapes = [tuple(layer.weight.shape) for layer in net.torso.convolutions]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]
    assert net.torso.layers[0].in_features == 3136
    images = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    torch.testing.assert_close(net(images), net(images.float() / 255))


def test_an_image_too_small_for_the_convolutions_is_refused() -> None:
    with pytest.raises(ValueError, match="expected images of at least 36x36, got"):
        network(torso="cnn", obs_shape=(4, 20, 20))


def test_normalisation_standardises_and_clips() -> None:
    net = network(normalize_obs=True)
    net.set_obs_statistics(np.full(4, 2.0), np.full(4, 4.0))
    torch.testing.assert_close(net.normalise(torch.tensor([[6.0, 2.0, -2.0, 1e9]])), torch.tensor([[1.0, 0, -1, 10]]))


def test_running_statistics_equal_those_of_everything_at_once() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, [1.0, 5.0], size=(50, 2))
    values = np.concatenate([values, np.zeros((50, 1))], axis=1)
    statistics = RunningStatistics((3,))
    for piece in np.split(values, [1, 2, 10, 37]):
        statistics.update(piece)
    np.testing.assert_allclose(statistics.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.std[:2], values[:, :2].std(axis=0), rtol=1e-12)
    assert statistics.std[2] == 1.0


@pytest.mark.parametrize("changes", [v for v in VARIANTS if v != {"hidden_sizes": ()}])
@pytest.mark.parametrize("action", [0, 3, 5])
def test_the_preferred_action_is_greedy_everywhere(changes: dict[str, object], action: int) -> None:
    net = network(**changes)
    net.prefer(action, 0.01)
    assert net.values(net(obs(50))).argmax(dim=1).eq(action).all()


def test_flat_parameters_are_the_networks_own() -> None:
    net, twin = network(dueling=True, layer_norm=True), network(dueling=True, layer_norm=True)
    flat = FlatParameters(net)
    assert torch.equal(net(obs()), twin(obs()))
    net(obs()).square().sum().backward()
    twin(obs()).square().sum().backward()
    expected = torch.cat([p.grad.reshape(-1) for p in twin.parameters()])
    torch.testing.assert_close(flat.gradient, expected)
    flat.values.zero_()
    assert net(obs()).abs().sum() == 0
    vectors = sum(p.numel() for p in net.parameters() if p.dim() == 1)
    assert (flat.decay_mask == 0).sum() == vectors


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_network_file_gives_the_network_back(tmp_path: Path, changes: dict[str, object]) -> None:
    net = network(**changes)
    save_network(net, tmp_path / "network.safetensors")
    loaded = load_network(tmp_path / "network.safetensors")
    assert loaded.config == net.config
    assert torch.equal(loaded(obs()), net(obs()))


def test_damaged_network_files_say_what_was_expected(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    with pytest.raises(ValueError, match="expected a safetensors file"):
        load_network(path)
    save_network(network(), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="expected a safetensors file"):
        load_network(path)


def test_weights_of_another_shape_are_refused() -> None:
    small = {name: value for name, value in network(hidden_sizes=(8, 8)).state_dict().items()}
    with pytest.raises(ValueError, match="expected \\[16, 4\\]"):
        network().load_weights(small)
    with pytest.raises(ValueError, match="expected \\["):
        network().load_weights({})


def test_merged_statistics_are_those_of_everything_together():
    rng = np.random.default_rng(0)
    parts = [rng.normal(loc=i, scale=1 + i, size=(size, 3)) for i, size in enumerate((5, 0, 40, 1))]
    merged = RunningStatistics((3,))
    for part in parts:
        one = RunningStatistics((3,))
        if len(part):
            one.update(part)
        merged.merge(one)
    every = np.concatenate(parts)
    assert merged.count == len(every)
    np.testing.assert_allclose(merged.mean, every.mean(axis=0))
    np.testing.assert_allclose(merged.std, every.std(axis=0))
