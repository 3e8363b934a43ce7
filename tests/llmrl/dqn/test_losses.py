"""Losses against hand-computed numbers and plain-loop float64 twins on random inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from llmrl.dqn import distributional, losses

SEEDS = range(5)


class Problem:
    """Random inputs of one loss, float64, with a mask that leaves every row an action."""

    def __init__(self, seed: int, num: int = 7, num_actions: int = 4, width: int = 5) -> None:
        rng = np.random.default_rng(seed)
        self.q_tm1 = rng.normal(size=(num, num_actions))
        self.q_tm1_target = rng.normal(size=(num, num_actions))
        self.q_t = rng.normal(size=(num, num_actions))
        self.q_t_selector = rng.normal(size=(num, num_actions))
        self.action = rng.integers(num_actions, size=num)
        self.reward = rng.normal(size=num)
        self.discount = rng.choice([0.0, 0.9, 0.99**3], size=num)
        self.mask = rng.random((num, num_actions)) < 0.6
        self.mask[np.arange(num), rng.integers(num_actions, size=num)] = True
        self.mask_tm1 = self.mask[::-1].copy()
        self.mask_tm1[np.arange(num), self.action] = True
        self.distribution_tm1 = rng.normal(size=(num, width))
        self.distribution_t = rng.normal(size=(num, width))
        self.weight = rng.random(num)
        self.num = num

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(getattr(self, name)))


def test_q_learning_by_hand() -> None:
    td_error = losses.q_learning_td_error(
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor([0, 1]),
        torch.tensor([1.0, -1.0]),
        torch.tensor([0.5, 0.0]),
        torch.tensor([[4.0, 6.0], [9.0, 9.0]]),
    )
    # 1 + 0.5 * 6 - 1 = 3; terminated: -1 - 4 = -5
    assert td_error.tolist() == [3.0, -5.0]


def test_double_q_by_hand() -> None:
    td_error = losses.double_q_td_error(
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([0]),
        torch.tensor([1.0]),
        torch.tensor([0.5]),
        torch.tensor([[7.0, 3.0]]),
        torch.tensor([[4.0, 6.0]]),
    )
    # The online network chooses action 0, the target network values it at 4: 1 + 0.5 * 4 - 1
    assert td_error.tolist() == [2.0]


def test_a_masked_action_is_neither_chosen_nor_bootstrapped_from() -> None:
    mask = torch.tensor([[True, False]])
    arguments = (torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0.0]), torch.tensor([1.0]))
    values = torch.tensor([[4.0, 6.0]])
    assert losses.q_learning_td_error(*arguments, values, mask).item() == 4.0
    assert losses.double_q_td_error(*arguments, values, values, mask).item() == 4.0
    munchausen = losses.munchausen_td_error(*arguments, values, values, 0.03, 0.0, -1.0, None, mask)
    assert munchausen.item() == pytest.approx(4.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_q_learning_twin(seed: int) -> None:
    p = Problem(seed)
    expected = [
        p.reward[i]
        + p.discount[i] * max(q for q, available in zip(p.q_t[i], p.mask[i], strict=True) if available)
        - p.q_tm1[i][p.action[i]]
        for i in range(p.num)
    ]
    got = losses.q_learning_td_error(*map(p.tensor, ("q_tm1", "action", "reward", "discount", "q_t", "mask")))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_double_q_twin(seed: int) -> None:
    p = Problem(seed)
    expected = []
    for i in range(p.num):
        best = max((a for a in range(4) if p.mask[i][a]), key=lambda a: p.q_t_selector[i][a])
        expected.append(p.reward[i] + p.discount[i] * p.q_t[i][best] - p.q_tm1[i][p.action[i]])
    names = ("q_tm1", "action", "reward", "discount", "q_t_selector", "q_t", "mask")
    np.testing.assert_allclose(losses.double_q_td_error(*map(p.tensor, names)).numpy(), expected, rtol=1e-12)


def softmax_over_available(q: np.ndarray, mask: np.ndarray, temperature: float) -> dict[int, float]:
    top = max(q[a] for a in range(len(q)) if mask[a])
    powers = {a: math.exp((q[a] - top) / temperature) for a in range(len(q)) if mask[a]}
    return {a: power / sum(powers.values()) for a, power in powers.items()}


@pytest.mark.parametrize("temperature", [0.03, 0.5])
@pytest.mark.parametrize("seed", SEEDS)
def test_munchausen_twin(seed: int, temperature: float) -> None:
    p = Problem(seed)
    expected = []
    for i in range(p.num):
        before = softmax_over_available(p.q_tm1_target[i], p.mask_tm1[i], temperature)
        after = softmax_over_available(p.q_t[i], p.mask[i], temperature)
        taken = before[p.action[i]]
        bonus = max(temperature * math.log(taken), -1.0) if taken > 0 else -1.0
        soft = sum(pi * (p.q_t[i][a] - temperature * math.log(pi)) for a, pi in after.items() if pi > 0)
        expected.append(p.reward[i] + 0.9 * bonus + p.discount[i] * soft - p.q_tm1[i][p.action[i]])
    names = ("q_tm1", "action", "reward", "discount", "q_tm1_target", "q_t")
    got = losses.munchausen_td_error(
        *map(p.tensor, names), temperature, 0.9, -1.0, p.tensor("mask_tm1"), p.tensor("mask")
    )
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_huber_and_squared_by_hand() -> None:
    td_error = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0])
    assert losses.huber(td_error).tolist() == [2.5, 0.5, 0.0, 0.125, 1.5]
    assert losses.huber(td_error, 2.0).tolist() == [4.0, 0.5, 0.0, 0.125, 2.0]
    assert losses.squared(td_error).tolist() == [4.5, 0.5, 0.0, 0.125, 2.0]


def test_the_huber_gradient_is_the_clipped_td_error() -> None:
    td_error = torch.linspace(-3, 3, 31, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.huber(td_error).sum(), td_error)
    torch.testing.assert_close(gradient, td_error.detach().clamp(-1, 1))


def test_importance_weights_scale_each_element() -> None:
    assert losses.weighted_mean(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.25])).item() == 1.5


@pytest.mark.parametrize("seed", SEEDS)
def test_conservative_penalty_twin(seed: int) -> None:
    p = Problem(seed)
    expected = [
        math.log(sum(math.exp(p.q_tm1[i][a]) for a in range(4) if p.mask_tm1[i][a])) - p.q_tm1[i][p.action[i]]
        for i in range(p.num)
    ]
    got = losses.conservative_penalty(p.tensor("q_tm1"), p.tensor("action"), p.tensor("mask_tm1"))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


def test_projection_by_hand() -> None:
    atoms = torch.tensor([0.0, 1.0, 2.0])
    # Atoms move to 0.5, 1.0, 1.5 in the first row, to 3 (clipped to 2) in the terminated second one.
    projected = distributional.project_categorical(
        atoms, torch.tensor([0.5, 3.0]), torch.tensor([0.5, 0.0]), torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.3, 0.5]])
    )
    torch.testing.assert_close(projected, torch.tensor([[0.1, 0.65, 0.25], [0.0, 0.0, 1.0]]))


@pytest.mark.parametrize("seed", SEEDS)
def test_categorical_twin(seed: int) -> None:
    p = Problem(seed)
    atoms = np.linspace(-2.0, 3.0, 5)
    spacing = atoms[1] - atoms[0]
    expected = []
    for i in range(p.num):
        weights = np.exp(p.distribution_t[i]) / np.exp(p.distribution_t[i]).sum()
        target = np.zeros(5)
        for j in range(5):
            place = (min(max(p.reward[i] + p.discount[i] * atoms[j], -2.0), 3.0) + 2.0) / spacing
            low, high = math.floor(place), math.ceil(place)
            if low == high:
                target[low] += weights[j]
            else:
                target[low] += weights[j] * (high - place)
                target[high] += weights[j] * (place - low)
        log_normaliser = math.log(sum(math.exp(x) for x in p.distribution_tm1[i]))
        expected.append(-sum(target[j] * (p.distribution_tm1[i][j] - log_normaliser) for j in range(5)))
    got = distributional.categorical_td_loss(
        p.tensor("distribution_tm1"),
        torch.from_numpy(atoms),
        p.tensor("reward"),
        p.tensor("discount"),
        torch.softmax(p.tensor("distribution_t"), dim=1),
    )
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("delta", [0.3, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_quantile_twin(seed: int, delta: float) -> None:
    p = Problem(seed)
    expected = []
    for i in range(p.num):
        total = 0.0
        for k in range(5):
            for j in range(5):
                u = p.reward[i] + p.discount[i] * p.distribution_t[i][j] - p.distribution_tm1[i][k]
                size = 0.5 * u * u if abs(u) <= delta else delta * (abs(u) - 0.5 * delta)
                total += abs((k + 0.5) / 5 - (1.0 if u < 0 else 0.0)) * size / delta / 5
        expected.append(total)
    got = distributional.quantile_td_loss(
        p.tensor("distribution_tm1"),
        distributional.quantile_midpoints(5).double(),
        p.tensor("reward"),
        p.tensor("discount"),
        p.tensor("distribution_t"),
        delta,
    )
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)


def test_quantile_regression_finds_the_quantiles() -> None:
    samples = torch.from_numpy(np.random.default_rng(0).exponential(size=4000))
    quantiles = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([quantiles], lr=0.02)
    for _ in range(800):
        optimizer.zero_grad()
        loss = distributional.quantile_td_loss(
            quantiles,
            distributional.quantile_midpoints(4),
            torch.zeros(1),
            torch.ones(1),
            samples.unsqueeze(0),
            delta=0.01,
        )
        loss.sum().backward()
        optimizer.step()
    expected = [-math.log(1 - (k + 0.5) / 4) for k in range(4)]
    np.testing.assert_allclose(quantiles.detach().numpy()[0], expected, atol=0.08)


@pytest.mark.parametrize(
    ("level", "expected"),
    [(1.0, 2.5), (0.5, 1.5), (0.25, 1.0), (0.1, 1.0), (0.375, (1.0 * 0.25 + 2.0 * 0.125) / 0.375)],
)
def test_lower_mean_by_hand(level: float, expected: float) -> None:
    quantiles = torch.tensor([[4.0, 2.0, 1.0, 3.0]])
    assert distributional.quantile_lower_mean(quantiles, level).item() == pytest.approx(expected)
    uniform = torch.full((1, 4), 0.25)
    atoms = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert distributional.categorical_lower_mean(uniform, atoms, level).item() == pytest.approx(expected)


def gradients_of_targets(seed: int) -> dict[str, list[Tensor | None]]:
    p = Problem(seed)
    names = ("q_tm1_target", "q_t", "q_t_selector", "distribution_t")
    leaf = {name: p.tensor(name).requires_grad_() for name in names}
    own = {name: p.tensor(name).requires_grad_() for name in ("q_tm1", "distribution_tm1")}
    action, reward, discount = p.tensor("action"), p.tensor("reward"), p.tensor("discount")
    atoms = torch.linspace(-2, 3, 5, dtype=torch.float64)
    q_tm1, distribution_tm1 = own["q_tm1"], own["distribution_tm1"]
    common = (q_tm1, action, reward, discount)
    outputs = {
        "q_learning": losses.q_learning_td_error(*common, leaf["q_t"]),
        "double": losses.double_q_td_error(*common, leaf["q_t_selector"], leaf["q_t"]),
        "munchausen": losses.munchausen_td_error(*common, leaf["q_tm1_target"], leaf["q_t"], 0.03, 0.9, -1.0),
        "categorical": distributional.categorical_td_loss(
            distribution_tm1, atoms, reward, discount, torch.softmax(leaf["distribution_t"], dim=1)
        ),
        "quantile": distributional.quantile_td_loss(
            distribution_tm1, distributional.quantile_midpoints(5), reward, discount, leaf["distribution_t"]
        ),
    }
    found = {}
    for name, output in outputs.items():
        inputs = [*leaf.values(), q_tm1, distribution_tm1]
        found[name] = list(torch.autograd.grad(output.sum(), inputs, allow_unused=True))
    return found


def test_no_gradient_flows_through_a_target() -> None:
    for name, gradients in gradients_of_targets(0).items():
        assert all(gradient is None for gradient in gradients[:4]), name
        assert any(gradient is not None for gradient in gradients[4:]), name
