"""Sums that NumPy and torch take, against plain ones in float64."""

import numpy as np
import pytest
import torch
from llmrl_envs.interface import tensor_sums
from llmrl_envs.interface.tensor_sums import PIECE, cpu_array, cpu_dot, dot_products, square_sum, total
from torch.nn import Parameter

SIZES = (0, 1, 7, 8191, 8192, 8193, 3 * 8192 + 5, PIECE, PIECE + 1, 2 * PIECE + 8192 + 3)


def random(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(params=["numpy", "torch"])
def path(request, monkeypatch):
    """The same sums the way that a CPU's tensors go, and the way that a device's do."""
    if request.param == "torch":
        monkeypatch.setattr(tensor_sums, "cpu_array", lambda tensor: None)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_dot_product_is_that_of_plain_float64(size, dtype):
    x, y = random(size, dtype), random(size, dtype, seed=1) + 0.1
    expected = float(x.double() @ y.double())
    scale = float(x.double().norm() * y.double().norm())
    assert cpu_dot(x.numpy(), y.numpy()) == pytest.approx(expected, abs=1e-6 * scale)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_products_of_pairs_and_squares_are_those_of_plain_float64(dtype):
    pairs = [(random(size, dtype), random(size, dtype, seed=1) + 0.5) for size in SIZES]
    first, second = (torch.cat([t.double() for t in side]) for side in zip(*pairs, strict=True))
    expected = [float(first @ second), float(first @ first), float(second @ second)]
    assert dot_products(pairs).tolist() == pytest.approx(expected, rel=1e-5)
    assert float(square_sum(x for x, _ in pairs)) == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.usefixtures("path")
def test_nothing_adds_up_to_zero():
    assert dot_products([]).tolist() == [0.0, 0.0, 0.0]
    assert float(square_sum([])) == 0.0


@pytest.mark.usefixtures("path")
def test_gradients_in_half_precision_meet_moments_in_full():
    gradient, momentum = random(70_000, torch.bfloat16), random(70_000, seed=1) + 0.5
    expected = float(gradient.double() @ momentum.double())
    assert float(dot_products([(gradient, momentum)])[0]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("path")
def test_a_transposed_weight_counts_in_any_order():
    weight = Parameter(random((300, 500)).T)
    assert not weight.is_contiguous()
    assert float(square_sum([weight])) == pytest.approx(float(weight.detach().double().square().sum()), rel=1e-6)


def test_a_sum_that_is_not_finite_says_so():
    x = torch.ones(PIECE + 3)
    x[-1] = float("nan")
    assert torch.isnan(square_sum([torch.ones(3), x]))
    x[-1] = float("inf")
    assert torch.isinf(square_sum([x]))


def test_an_array_is_the_tensor_itself_and_there_is_none_of_other_kinds():
    weight = Parameter(torch.ones(2, 3))
    array = cpu_array(weight)
    assert array.shape == (6,)
    assert np.shares_memory(array, weight.detach().numpy())
    assert cpu_array(torch.ones(2, dtype=torch.bfloat16)) is None
    assert cpu_array(torch.ones(2, device="meta")) is None

    class Quantised(torch.Tensor):
        """A tensor whose numbers are not what its memory holds."""

    assert cpu_array(torch.ones(2).as_subclass(Quantised)) is None


def test_parts_add_up_wherever_they_are():
    assert float(total([1.5, torch.tensor(2.0, dtype=torch.float64), 3.0])) == 6.5
    assert total([]).dtype == total([1.0]).dtype == total([torch.ones(())]).dtype == torch.float32


def test_sums_do_not_depend_on_the_number_of_threads():
    """Torch's own may: rates would differ in their last digits from one machine to the next."""
    pairs, threads = [(random(300_000), random(300_000, seed=1))], torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(dot_products(pairs).tolist())
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
