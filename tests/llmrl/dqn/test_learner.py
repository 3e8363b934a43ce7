"""One update: what it changes, what it must not change, and that it can go on after a stop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmrl.dqn.captured import step_without_branches
from llmrl.dqn.config import DQNConfig
from llmrl.dqn.learner import Learner
from llmrl.dqn.replay import Batch
from llmrl.dqn.td_loss import TensorBatch

NUM_OBS, NUM_ACTIONS = 4, 6
VARIANTS: list[dict[str, Any]] = [
    {},
    {"double": False, "dueling": False, "layer_norm": False},
    {"loss": "squared", "weight_decay": 0.01, "max_grad_norm": 0.5},
    {"munchausen": True},
    {"head": "categorical", "num_atoms": 11},
    {"head": "quantile", "num_quantiles": 8, "cvar_level": 0.5},
    {"branches": (3, 2)},
    {"noisy": True},
    {"conservative_weight": 1.0},
    {"optimizer": "rmsprop", "target_update_period": 3, "target_ema": 1.0},
    {"reset_period": 4, "reset_scope": "all", "reset_keep": 0.5},
    {"reset_period": 3, "reset_scope": "head"},
    {"normalize_obs": True},
    {"learning_rate_end": 0.0, "learning_rate_decay_steps": 7},
]


def learner(seed: int = 0, **changes: Any) -> Learner:
    config = DQNConfig(hidden_sizes=(16, 16), **changes)
    network = config.network((NUM_OBS,), NUM_ACTIONS)
    return Learner(config, network, torch.Generator().manual_seed(seed))


def batch(seed: int = 0, num: int = 8) -> Batch:
    rng = np.random.default_rng(seed)
    mask = rng.random((num, NUM_ACTIONS)) < 0.7
    action = rng.integers(NUM_ACTIONS, size=num)
    mask[np.arange(num), action] = True
    return Batch(
        obs=rng.normal(size=(num, NUM_OBS)).astype(np.float32),
        action=action,
        reward=rng.normal(size=num).astype(np.float32),
        discount=rng.choice(np.array([0.0, 0.97], dtype=np.float32), size=num),
        next_obs=rng.normal(size=(num, NUM_OBS)).astype(np.float32),
        mask=mask,
        next_mask=mask[::-1].copy(),
        weight=rng.random(num).astype(np.float32),
        index=np.arange(num),
        generation=np.arange(num),
    )


def changed(other: Batch, **columns: Any) -> Batch:
    return Batch(**{**other.__dict__, **columns})


@pytest.mark.parametrize("changes", [v for v in VARIANTS if "reset_period" not in v and "noisy" not in v])
def test_an_update_lowers_the_loss_on_a_batch_that_repeats(changes: dict[str, Any]) -> None:
    learning = learner(**{"learning_rate": 1e-2, "target_ema": 1.0, "target_update_period": 1000, **changes})
    fixed = changed(batch(), discount=np.zeros(8, dtype=np.float32), weight=np.ones(8, dtype=np.float32))
    losses_seen = [float(learning.update(fixed).loss) for _ in range(60)]
    assert losses_seen[-1] < 0.8 * losses_seen[0]


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_target_network_gets_no_gradient(changes: dict[str, Any]) -> None:
    learning = learner(**changes)
    learning.backward(batch())
    assert learning.parameters.gradient.abs().sum() > 0
    assert learning.target_parameters.gradient.abs().sum() == 0


@pytest.mark.parametrize("double", [False, True])
def test_the_gradient_is_that_of_a_loop_with_constant_targets(double: bool) -> None:
    learning, data = learner(double=double), batch()
    q = learning.online(torch.from_numpy(data.obs))
    with torch.no_grad():
        online = learning.online(torch.from_numpy(data.next_obs)).numpy()
        target = learning.target(torch.from_numpy(data.next_obs)).numpy()
    total = torch.zeros(())
    for i in range(len(data.action)):
        available = np.flatnonzero(data.next_mask[i])
        best = max(available, key=lambda a: (online if double else target)[i, a])
        constant = float(data.reward[i] + data.discount[i] * target[i, best])
        error = constant - q[i, int(data.action[i])]
        huber = 0.5 * error**2 if abs(float(error.detach())) <= 1 else abs(error) - 0.5
        total = total + float(data.weight[i]) * huber / len(data.action)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(learning.online.parameters()))])
    learning.backward(data)
    torch.testing.assert_close(learning.parameters.gradient, expected, rtol=1e-4, atol=1e-7)


def test_an_adam_step_by_hand() -> None:
    learning = learner(learning_rate=0.01, max_grad_norm=None, weight_decay=0.1)
    before = learning.parameters.values.clone()
    learning.update(batch())
    gradient, decay = learning.parameters.gradient, learning.parameters.decay_mask
    # The first step of Adam is the sign of the gradient, whatever its size; decay shrinks weight matrices first.
    expected = before * (1 - 0.01 * 0.1 * decay) - 0.01 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(learning.parameters.values, expected)


def test_the_gradient_is_clipped_to_its_norm() -> None:
    learning = learner(max_grad_norm=0.01)
    result = learning.update(batch())
    assert float(result.gradient_norm) > 0.01
    assert float(learning.parameters.gradient.norm()) == pytest.approx(0.01, rel=1e-4)


def test_importance_weights_count_under_huber() -> None:
    heavy, light = (changed(batch(), weight=np.full(8, w, dtype=np.float32)) for w in (1.0, 0.25))
    gradients = []
    for weighted in (heavy, light):
        learning = learner(loss="huber")
        learning.backward(weighted)
        gradients.append(learning.parameters.gradient.clone())
    torch.testing.assert_close(0.25 * gradients[0], gradients[1])


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    learning = learner(target_ema=1.0, target_update_period=100)
    learning.update(batch())
    before, state = learning.parameters.values.clone(), learning.tensors()
    reward = batch().reward.copy()
    reward[3] = np.inf
    result = learning.update(changed(batch(), reward=reward, weight=np.full(8, np.nan, dtype=np.float32)))
    assert result.skipped
    assert learning.num_skipped == 1
    assert torch.equal(learning.parameters.values, before)
    after = learning.tensors()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert not learning.update(batch()).skipped
    assert not torch.equal(learning.parameters.values, before)


CAPTURED = [{}, {"weight_decay": 0.1, "max_grad_norm": 0.05}, {"head": "quantile"}, {"munchausen": True}]


@pytest.mark.parametrize("changes", CAPTURED)
def test_the_update_without_branches_is_the_plain_one(changes: dict[str, Any]) -> None:
    plain, other = learner(**changes), learner(**changes)
    for step in range(100):
        data = batch(step)
        if step % 10 == 3:
            data = changed(data, weight=np.full(8, np.nan, dtype=np.float32))
        norm = float(plain.backward(data)[3])
        plain.apply(norm)
        step_without_branches(other, TensorBatch.from_numpy(data, other.device))
        torch.testing.assert_close(other.parameters.values, plain.parameters.values, rtol=1e-6, atol=1e-8)
    assert torch.isfinite(plain.parameters.values).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [*CAPTURED, {"noisy": True}, {"reset_period": 30}])
def test_the_captured_update_is_the_eager_one(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = DQNConfig(hidden_sizes=(128, 128), **changes)
    network = config.network((NUM_OBS,), NUM_ACTIONS)
    eager, captured = (Learner(config, network, torch.Generator().manual_seed(0), "cuda") for _ in range(2))
    for step in range(100):
        data = batch(step)
        if step % 10 == 3:
            data = changed(data, weight=np.full(8, np.nan, dtype=np.float32))
        results = [captured.update(data)]
        with monkeypatch.context() as patch:
            patch.setattr("llmrl.dqn.learner.can_capture", lambda _: False)
            results.append(eager.update(data))
        assert results[0].skipped == results[1].skipped == (step % 10 == 3)
        torch.testing.assert_close(captured.parameters.values, eager.parameters.values, rtol=1e-5, atol=1e-6)


def test_averaged_gradients_are_those_of_all_batches_together() -> None:
    ranks = [learner(max_grad_norm=None), learner(max_grad_norm=None)]
    parts = [batch(1), batch(2)]
    gradients = []
    for rank, part in zip(ranks, parts, strict=True):
        rank.backward(part)
        gradients.append(rank.parameters.gradient.clone())
    mean = (gradients[0] + gradients[1]) / 2
    for rank, part in zip(ranks, parts, strict=True):
        rank.average_gradient = lambda gradient: gradient.copy_(mean)
        rank.update(part)
    assert torch.equal(ranks[0].parameters.values, ranks[1].parameters.values)
    both = changed(
        parts[0], **{name: np.concatenate([getattr(p, name) for p in parts]) for name in TensorBatch._fields}
    )
    alone = learner(max_grad_norm=None)
    alone.backward(both)
    torch.testing.assert_close(alone.parameters.gradient, mean)


def test_the_target_network_is_copied_once_a_period() -> None:
    learning = learner(target_update_period=3, target_ema=1.0)
    start = learning.parameters.values.clone()
    for step in range(1, 7):
        learning.update(batch(step))
        if step < 3:
            assert torch.equal(learning.target_parameters.values, start)
        elif step % 3 == 0:
            assert torch.equal(learning.target_parameters.values, learning.parameters.values)
        else:
            assert not torch.equal(learning.target_parameters.values, learning.parameters.values)


def test_the_averaged_target_by_hand() -> None:
    learning = learner(target_ema=0.1)
    expected = learning.parameters.values.clone()
    for step in range(5):
        learning.update(batch(step))
        expected = 0.9 * expected + 0.1 * learning.parameters.values
    torch.testing.assert_close(learning.target_parameters.values, expected)


def test_resets_renew_the_head_and_leave_the_torso() -> None:
    learning = learner(reset_period=2, reset_scope="head")
    learning.update(batch(0))
    torso = learning.online.torso.layers[0].weight
    learning.update(batch(1))
    assert learning.num_resets == 1
    fresh = learning.online.head.layer.weight
    assert torch.equal(fresh, learning.target.head.layer.weight)
    assert float(fresh.detach().abs().max()) <= 1 / np.sqrt(16)
    moments = learning.optimizer.state[learning.parameters.values]["exp_avg"]
    num_head = fresh.numel() + learning.online.head.layer.bias.numel()
    assert (moments[-num_head:] == 0).all()
    assert (moments[:-num_head] != 0).any()
    assert not torch.equal(torso, learning.target.torso.layers[0].weight)


def test_shrink_and_perturb_keeps_its_share() -> None:
    learning = learner(reset_keep=0.5, reset_scope="all", layer_norm=False)
    learning.update(batch())
    old = learning.parameters.values.clone()
    twin_generator = torch.Generator()
    twin_generator.set_state(learning.generator.get_state())
    learning.reset()
    fresh = Learner(learning.config, learning.network_config, twin_generator).parameters.values
    torch.testing.assert_close(learning.parameters.values, 0.5 * old + 0.5 * fresh)


def test_resets_stop_where_they_are_told_to() -> None:
    learning = learner(reset_period=2, reset_until_learner_steps=4)
    for step in range(10):
        learning.update(batch(step))
    assert learning.num_resets == 2


def test_n_gamma_rate_and_beta_move_from_start_to_end() -> None:
    learning = learner(
        n_step=10, n_step_end=3, gamma=0.97, gamma_end=0.997, horizon_learner_steps=10,
        learning_rate=1e-2, learning_rate_end=1e-3, learning_rate_decay_steps=10,
        importance_exponent=0.4, importance_learner_steps=10,
    )  # fmt: skip
    seen = []
    for step in (0, 5, 10, 100):
        learning.learner_steps = step
        seen.append((learning.n_step, learning.gamma, learning.learning_rate, learning.importance_exponent))
    np.testing.assert_allclose(
        seen,
        [
            (10, 0.97, 1e-2, 0.4),
            (5, 1 - 0.03 * 10**-0.5, 5.5e-3, 0.7),
            (3, 0.997, 1e-3, 1.0),
            (3, 0.997, 1e-3, 1.0),
        ],
    )


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_restored_learner_goes_on_bit_for_bit(changes: dict[str, Any]) -> None:
    learning = learner(**changes)
    for step in range(5):
        learning.update(batch(step))
    tensors, counters = learning.tensors(), learning.counters()
    other = learner(seed=9, **changes)
    other.load(tensors, counters)
    for step in range(5, 12):
        first, second = learning.update(batch(step)), other.update(batch(step))
        assert float(first.loss) == float(second.loss)
    ends = learning.tensors(), other.tensors()
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert learning.counters() == other.counters()


def test_a_state_of_another_network_is_refused() -> None:
    tensors, counters = learner().tensors(), learner().counters()
    with pytest.raises(ValueError, match="expected"):
        learner(dueling=False).load(tensors, counters)


def test_updates_draw_nothing_from_the_global_generators() -> None:
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    learning = learner(noisy=True, reset_period=2)
    for step in range(4):
        learning.update(batch(step))
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_averse_action_choice_avoids_the_wide_distribution() -> None:
    quantiles = torch.tensor([[[-4.0, 0.0, 6.0, 8.0], [1.0, 1.0, 2.0, 2.0]]])
    network = {level: learner(head="quantile", num_quantiles=4, cvar_level=level).online for level in (0.25, 1.0)}
    assert network[1.0].values(quantiles).argmax().item() == 0
    assert network[0.25].values(quantiles).argmax().item() == 1
