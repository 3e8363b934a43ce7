"""AdamW-HD against a slow twin, plain AdamW and a bowl."""

import numpy as np
import pytest
import torch

from llmrl.compare.baselines.hypergradient import HypergradientAdamW


def slow_twin(gradients, rate, *, betas, eps, decay, hyper_rate):
    """One parameter vector, as the formulas stand; gradients float64[T, P]. Returns weights and rates."""
    weights = np.ones(gradients.shape[1])
    mean = square = last = np.zeros(gradients.shape[1])
    rates = []
    for step, gradient in enumerate(gradients, start=1):
        if step > 1:
            cosine = gradient @ last / (np.linalg.norm(gradient) * np.linalg.norm(last))
            rate = rate * np.exp(np.clip(hyper_rate * cosine, -0.2, 0.2))
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        last = mean / (1 - betas[0] ** step) / (np.sqrt(square / (1 - betas[1] ** step)) + eps)
        weights = weights - rate * decay * weights - rate * last
        rates.append(rate)
    return weights, rates


def run(gradients, rate, *, parts=(2, 3), **settings):
    sizes = list(parts)
    parameters = [torch.nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in sizes]
    decay = settings.pop("decay", 0.0)
    optimizer = HypergradientAdamW([{"params": [p], "weight_decay": decay} for p in parameters], **settings)
    rates = []
    for gradient in gradients:
        for parameter, part in zip(parameters, np.split(gradient, np.cumsum(sizes)[:-1]), strict=True):
            parameter.grad = torch.tensor(part)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        rates.append(optimizer.learning_rate)
    return torch.cat(parameters).detach().numpy(), rates


def test_it_equals_its_slow_twin_over_100_random_steps():
    gradients = np.random.default_rng(0).normal(size=(100, 5)) + 0.3
    settings = {"betas": (0.8, 0.95), "eps": 1e-6, "decay": 0.1, "hyper_rate": 0.5}
    weights, rates = run(gradients, 1e-2, **settings)
    expected_weights, expected_rates = slow_twin(gradients, 1e-2, **settings)
    np.testing.assert_allclose(rates, expected_rates, rtol=1e-10)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-10)


def test_without_hyper_rate_it_is_adamw():
    gradients = np.random.default_rng(1).normal(size=(20, 5))
    weights, rates = run(gradients, 1e-2, hyper_rate=0.0, decay=0.1)
    parameter = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    reference = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        reference.step()
    np.testing.assert_allclose(weights, parameter.detach().numpy(), rtol=1e-10)
    assert rates == [1e-2] * 20


@pytest.mark.parametrize(("rate", "grows"), [(1e-4, True), (3.0, False)])
def test_a_wrong_rate_is_corrected(rate, grows):
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = HypergradientAdamW([{"params": [parameter]}], hyper_rate=0.5)
    for _ in range(10):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = parameter.detach().clone()
        optimizer.step()
    assert (optimizer.learning_rate > rate) is grows


def test_zero_gradients_and_parameters_without_one_change_no_rate():
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = HypergradientAdamW([{"params": [first, second], "lr": 1e-2}])
    for _ in range(3):
        first.grad = torch.zeros(2)
        optimizer.step()
    assert optimizer.learning_rate == 1e-2
    assert torch.equal(second, torch.ones(2))
