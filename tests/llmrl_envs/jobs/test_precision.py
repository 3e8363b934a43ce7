"""Number formats, and steps that are not taken."""

import pytest
import torch
from llmrl_envs.jobs.precision import Precision, resolve_precision
from torch.nn import Parameter

CPU = torch.device("cpu")


def job(name, *, fused=True):
    parameter = Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, fused=fused)
    return Precision(name, CPU), parameter, optimizer


def step(precision, parameter, optimizer, gradient):
    precision.scale((parameter * torch.tensor(gradient)).sum()).backward()
    precision.unscale(optimizer)
    norm = parameter.grad.norm()
    precision.step(optimizer, norm)
    optimizer.zero_grad()
    return float(norm)


def test_auto_is_full_precision_where_there_is_no_gpu():
    assert resolve_precision("auto", CPU) == "fp32"
    assert [resolve_precision(name, CPU) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_forward_passes_run_in_the_format_and_weights_stay_full(name, dtype):
    precision, weight = Precision(name, CPU), Parameter(torch.eye(2))
    with precision.autocast():
        assert (torch.ones(2, 2) @ weight).dtype == dtype
    assert (torch.ones(2, 2) @ weight).dtype == weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_gradients_have_their_own_scale_after_unscaling(name):
    assert step(*job(name), [3.0, 4.0]) == pytest.approx(5.0)


@pytest.mark.parametrize(("name", "fused"), [("fp32", True), ("fp32", False), ("fp16", True), ("fp16", False)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_neither_weights_nor_moments(name, fused, bad):
    precision, parameter, optimizer = job(name, fused=fused)
    clean = job(name, fused=fused)
    for gradient in ([1.0, 2.0], [bad, 1.0], [2.0, 1.0]):
        before = parameter.detach().clone()
        step(precision, parameter, optimizer, gradient)
        if gradient[0] == gradient[0] and gradient[0] != float("inf"):
            step(*clean, gradient)
            assert not torch.equal(parameter, before)
        else:
            assert torch.equal(parameter, before)
    assert torch.equal(parameter, clean[1])
    own, other = optimizer.state[parameter], clean[2].state[clean[1]]
    assert all(torch.equal(torch.as_tensor(own[name]), torch.as_tensor(other[name])) for name in other)


@pytest.mark.parametrize(("name", "fused"), [("fp32", True), ("fp32", False), ("fp16", True), ("fp16", False)])
@pytest.mark.parametrize("share", [1.0, 0.7])
def test_a_step_that_is_not_allowed_moves_nothing_and_leaves_the_loss_scale_alone(name, fused, share):
    precision, parameter, optimizer = job(name, fused=fused)
    step(precision, parameter, optimizer, [1.0, 2.0])
    before, state = parameter.detach().clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}
    scale = precision.state_dict().get("loss_scale")
    precision.scale((parameter * torch.tensor([3.0, -1.0])).sum()).backward()
    precision.unscale(optimizer)
    allowed = torch.tensor(False) if fused else False
    precision.step(optimizer, parameter.grad.norm(), share, allowed=allowed)
    optimizer.zero_grad()
    assert torch.equal(parameter, before)
    assert all(torch.equal(value, optimizer.state[parameter][name]) for name, value in state.items())
    assert precision.state_dict().get("loss_scale") == scale
    step(precision, parameter, optimizer, [1.0, 2.0])
    assert not torch.equal(parameter, before)


def test_the_loss_scale_falls_after_an_overflow_and_its_state_is_kept():
    precision, parameter, optimizer = job("fp16")
    step(precision, parameter, optimizer, [1.0, 1.0])
    first = precision.state_dict()
    step(precision, parameter, optimizer, [float("inf"), 1.0])
    lower = precision.state_dict()
    assert lower["loss_scale"] == first["loss_scale"] / 2
    assert (first["loss_scale_growth"], lower["loss_scale_growth"]) == (1, 0)
    precision.load_state_dict(first)
    assert precision.state_dict() == first
    fresh = job("fp16")
    fresh[0].load_state_dict(lower)
    step(*fresh, [1.0, 1.0])
    assert fresh[0].state_dict() == {**lower, "loss_scale_growth": 1}


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_formats_without_a_loss_scale_have_no_state(name):
    precision = Precision(name, CPU)
    assert precision.state_dict() == {}
    precision.load_state_dict({"step": 3.0})
