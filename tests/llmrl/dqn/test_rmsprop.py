"""RMSProp of the first DQN against the formula in plain float64."""

from __future__ import annotations

import math

import numpy as np
import torch

from llmrl.dqn.rmsprop import CentredRMSprop


def test_two_steps_by_hand() -> None:
    value = torch.tensor([1.0])
    value.grad = torch.tensor([2.0])
    optimizer = CentredRMSprop([value], lr=0.5, decay=0.5, epsilon=1.0)
    optimizer.step()  # v = 2, m = 1, variance 1: 1 - 0.5 * 2 / sqrt(2)
    assert value.item() == np.float32(1 - 1 / math.sqrt(2))
    value.grad = torch.tensor([0.0])
    before = value.item()
    optimizer.step()
    assert value.item() == before


def test_many_steps_equal_the_formula() -> None:
    rng = np.random.default_rng(0)
    value = torch.from_numpy(rng.normal(size=7).astype(np.float32))
    weights = value.numpy().astype(np.float64)
    square, mean = np.zeros(7), np.zeros(7)
    optimizer = CentredRMSprop([value], lr=1e-2, decay=0.9, epsilon=1e-3)
    for _ in range(100):
        gradient = rng.normal(size=7) * 10 ** rng.uniform(-3, 1)
        value.grad = torch.from_numpy(gradient.astype(np.float32))
        optimizer.step()
        square = 0.9 * square + 0.1 * gradient**2
        mean = 0.9 * mean + 0.1 * gradient
        weights -= 1e-2 * gradient / np.sqrt(square - mean**2 + 1e-3)
    np.testing.assert_allclose(value.numpy(), weights, rtol=1e-3, atol=1e-5)


def test_a_gradient_that_has_settled_is_divided_by_the_root_of_epsilon() -> None:
    """Where PyTorch's divides by epsilon itself, ten times as much at 0.01."""
    value = torch.zeros(1)
    optimizer = CentredRMSprop([value], lr=1.0, decay=0.5, epsilon=0.01)
    for _ in range(200):
        value.grad = torch.ones(1)
        before = value.clone()
        optimizer.step()
    np.testing.assert_allclose((before - value).item(), 1.0 / math.sqrt(0.01), rtol=1e-3)
