"""The written-out gradient against autograd, and the flat Adam against torch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmrl.dqn.analytic import is_analytic
from llmrl.dqn.config import DQNConfig
from llmrl.dqn.flat_adam import FlatAdam
from llmrl.dqn.learner import Learner
from llmrl.dqn.replay import Batch
from llmrl.dqn.td_loss import TensorBatch

NUM_ACTIONS = 6
ANALYTIC: list[dict[str, Any]] = [
    {},
    {"double": False, "dueling": False, "layer_norm": False},
    {"double": False, "dueling": True, "layer_norm": False, "loss": "squared"},
    {"layer_norm": True, "dueling": False, "hidden_sizes": (16, 24, 8), "huber_delta": 0.3},
    {"normalize_obs": True, "hidden_sizes": (16,)},
    {"hidden_sizes": ()},
    {"weight_decay": 0.1, "sampling": "prioritized"},
]
OTHERS: list[dict[str, Any]] = [
    {"noisy": True},
    {"branches": (2, 3)},
    {"head": "quantile"},
    {"head": "categorical"},
    {"conservative_weight": 0.5},
    {"munchausen": True},
    {"torso": "cnn"},
]


def make_learner(obs_shape: tuple[int, ...] = (5,), **changes: Any) -> Learner:
    config = DQNConfig(**{"hidden_sizes": (16, 24), **changes})
    learner = Learner(config, config.network(obs_shape, NUM_ACTIONS), torch.Generator().manual_seed(0))
    if config.normalize_obs:
        learner.online.set_obs_statistics(np.full(obs_shape, 0.5), np.full(obs_shape, 2.0))
    return learner


def make_batch(seed: int, num: int = 32, obs_shape: tuple[int, ...] = (5,)) -> Batch:
    rng = np.random.default_rng(seed)
    mask = rng.random((num, NUM_ACTIONS)) < 0.7
    action = rng.integers(NUM_ACTIONS, size=num)
    mask[np.arange(num), action] = True
    obs, next_obs = 3 * rng.normal(size=(2, num, *obs_shape)).astype(np.float32)
    return Batch(
        obs=obs,
        action=action,
        reward=3 * rng.normal(size=num).astype(np.float32),
        discount=rng.choice(np.array([0.0, 0.97], dtype=np.float32), size=num),
        next_obs=next_obs,
        mask=mask,
        next_mask=mask[::-1].copy(),
        weight=rng.random(num).astype(np.float32),
        index=np.arange(num),
        generation=np.arange(num),
    )


@pytest.mark.parametrize("changes", ANALYTIC, ids=str)
@pytest.mark.parametrize("num", [1, 32])
def test_it_is_what_autograd_gives(changes: dict[str, Any], num: int) -> None:
    learner = make_learner(**changes)
    assert is_analytic(learner.config)
    batch = make_batch(1, num)
    learner.parameters.gradient.fill_(torch.nan)  # whatever was there is replaced
    loss, priority, value, _ = learner.backward(batch)
    written = learner.parameters.gradient.clone()
    expected_loss, expected_priority, expected_value, _ = learner.differentiate(
        TensorBatch.from_numpy(batch, learner.device)
    )
    torch.testing.assert_close(written, learner.parameters.gradient, rtol=1e-4, atol=1e-6)
    assert written.abs().sum() > 0
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    torch.testing.assert_close(torch.from_numpy(priority), expected_priority)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-5)


@pytest.mark.parametrize("changes", ANALYTIC, ids=str)
def test_a_hundred_updates_are_those_of_autograd(changes: dict[str, Any]) -> None:
    written, twin = make_learner(**changes), make_learner(**changes)
    twin._analytic = None
    for seed in range(100):
        batch = make_batch(seed)
        written.update(batch)
        twin.update(batch)
    torch.testing.assert_close(written.parameters.values, twin.parameters.values, rtol=2e-3, atol=2e-5)
    torch.testing.assert_close(written.target_parameters.values, twin.target_parameters.values, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_other_settings_go_through_autograd(changes: dict[str, Any]) -> None:
    shape = (4, 36, 36) if "torso" in changes else (5,)
    learner = make_learner(shape, **changes)
    assert not is_analytic(learner.config)
    assert np.isfinite(float(learner.update(make_batch(0, 4, shape)).loss))


def test_a_loaded_learner_writes_to_its_own_gradient() -> None:
    learner, other = make_learner(), make_learner(seed=1)
    learner.update(make_batch(0))
    other.load(learner.tensors(), learner.counters())
    learner.update(make_batch(1))
    other.update(make_batch(1))
    assert torch.equal(learner.parameters.values, other.parameters.values)


def test_flat_adam_is_the_adam_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator)
    theirs = torch.nn.Parameter(values.clone())
    values.grad = torch.zeros_like(values)
    ours = FlatAdam(values, lr=1e-2, betas=(0.8, 0.95), eps=1e-6)
    adam = torch.optim.Adam([theirs], lr=1e-2, betas=(0.8, 0.95), eps=1e-6, fused=True)
    for step in range(100):
        gradient = torch.randn(1000, generator=generator) * 10.0 ** (step % 7 - 3)
        values.grad.copy_(gradient)
        theirs.grad = gradient
        ours.param_groups[0]["lr"] = adam.param_groups[0]["lr"] = 1e-2 / (1 + step)
        ours.step()
        adam.step()
    assert torch.equal(values, theirs.detach())
    for name, value in adam.state[theirs].items():
        assert torch.equal(ours.state[values][name], value), name


def test_flat_adam_leaves_everything_where_the_gradient_is_not_finite() -> None:
    values = torch.ones(3)
    values.grad = torch.ones(3)
    adam = FlatAdam(values, lr=0.1, betas=(0.9, 0.999), eps=1e-8)
    adam.step()
    before = [values.clone(), *(tensor.clone() for tensor in adam.state[values].values())]
    values.grad[0] = torch.inf
    adam.found_inf = torch.ones(())
    adam.step()
    after = [values, *adam.state[values].values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
