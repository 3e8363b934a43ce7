"""Steps that lean on their own gradient, against QHAdam written out."""

import pytest
import torch
from llmrl_envs.interface.momentum import lean_on_gradient
from llmrl_envs.interface.schedule import QUASI_HYPERBOLIC_SHARE

BETAS, EPS, DECAY = (0.9, 0.99), 1e-8, 0.1


class QHAdam:
    """As in Ma and Yarats 2019, with decoupled weight decay and for one tensor."""

    def __init__(self, weights):
        self.weights, self.mean, self.square, self.steps = weights.clone(), 0.0, 0.0, 0

    def step(self, gradient, rate, share):
        self.steps += 1
        self.mean = BETAS[0] * self.mean + (1 - BETAS[0]) * gradient
        self.square = BETAS[1] * self.square + (1 - BETAS[1]) * gradient**2
        mean, square = self.mean / (1 - BETAS[0] ** self.steps), self.square / (1 - BETAS[1] ** self.steps)
        direction = (share * mean + (1 - share) * gradient) / (square.sqrt() + EPS)
        self.weights = self.weights * (1 - rate * DECAY) - rate * direction


def _adamw(parameters, **more):
    return torch.optim.AdamW(parameters, lr=1e-2, betas=BETAS, eps=EPS, weight_decay=DECAY, **more)


@pytest.mark.parametrize("kind", [{}, {"fused": True}, {"foreach": True}, {"capturable": False, "foreach": False}])
def test_twenty_steps_are_those_of_qhadam(kind):
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(3, 5, generator=generator))
    optimizer, twin = _adamw([parameter], **kind), QHAdam(parameter.detach())
    for index in range(20):
        share, rate = (1.0, QUASI_HYPERBOLIC_SHARE, 0.3)[index % 3], 1e-2 / (index + 1)
        gradient = torch.randn(3, 5, generator=generator)
        parameter.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        lean_on_gradient(optimizer, share)
        twin.step(gradient, rate, share)
        torch.testing.assert_close(parameter.detach(), twin.weights, rtol=1e-5, atol=1e-6)


def test_a_rate_that_is_a_tensor_counts_too():
    parameters = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizers = [_adamw([p], foreach=False) for p in parameters]
    optimizers[1].param_groups[0]["lr"] = torch.tensor(1e-2)
    for parameter, optimizer in zip(parameters, optimizers, strict=True):
        parameter.grad = torch.tensor([1.0, -1.0, 2.0, 0.0])
        optimizer.step()
        parameter.grad = torch.tensor([3.0, 1.0, 0.0, 0.0])
        optimizer.step()
        lean_on_gradient(optimizer, 0.7)
    torch.testing.assert_close(parameters[0], parameters[1])
    assert parameters[0][3].item() == pytest.approx((1 - 1e-3) ** 2), "what has no gradient is decayed and nothing else"


def test_maximising_leans_the_other_way():
    down, up = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    for parameter, sign in ((down, 1.0), (up, -1.0)):
        optimizer = torch.optim.AdamW([parameter], lr=1e-2, maximize=sign < 0)
        for gradient in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, 2.0, 0.5])):
            parameter.grad = sign * gradient
            optimizer.step()
            lean_on_gradient(optimizer, 0.7)
    torch.testing.assert_close(down, up)


def test_a_step_that_a_fused_optimizer_skips_is_not_leant_on():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = _adamw([parameter], fused=True)
    for gradient, skipped in ((float("nan"), 1.0), (1.0, 0.0), (float("nan"), 1.0)):
        parameter.grad = torch.full((3,), gradient)
        optimizer.found_inf = torch.tensor(skipped)
        before = parameter.detach().clone()
        optimizer.step()
        lean_on_gradient(optimizer, 0.7)
        assert torch.equal(parameter.detach(), before) == bool(skipped)
    assert torch.isfinite(parameter).all()


def test_parameters_without_a_gradient_and_plain_steps_change_nothing():
    moved, still = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = _adamw([moved, still])
    moved.grad = torch.ones(3)
    optimizer.step()
    before = [moved.detach().clone(), still.detach().clone()]
    lean_on_gradient(optimizer, 1.0)
    assert torch.equal(moved.detach(), before[0])
    moved.grad = torch.full((3,), 5.0)
    lean_on_gradient(optimizer, 0.7)
    assert torch.equal(still.detach(), before[1])
    assert not torch.equal(moved.detach(), before[0])
